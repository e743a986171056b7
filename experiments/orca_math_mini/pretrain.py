"""Makes what the experiment starts from: a base model with its own tokenizer, and the word problems.

    python experiments/orca_math_mini/pretrain.py --output_dir output/mini
    python experiments/orca_math_mini/pretrain.py --output_dir output/mini --scale small --train_samples 2000

The folder holds model/ (Hugging Face format, bf16), train.jsonl, validation.jsonl and test.jsonl. The model is
pre-trained on plain sentences, bare arithmetic and simpler stories, never on a question. The same seed gives the same
files, and on the same kind of machine the same weights. `full` is for a GPU; `small` takes two to three minutes on 2
cores.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; without it sums differ by run
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer's threads do not survive a fork

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from experiments.orca_math_mini.problems import pretraining_texts, problems, splits
from fsdp_utils.core.devices import pick_device
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import flag, parse
from fsdp_utils.core.folders import new_folder
from fsdp_utils.core.ranks import fail
from fsdp_utils.core.safetensors_io import CheckpointReader
from fsdp_utils.model.weights import fingerprint
from scripts.make_demo import PROMPT, make_tokenizer, packed_batches, pretrain, write_jsonl


@dataclass(frozen=True)
class Scale:
    """A model's shape and its pre-training. `start` is the spread of the initial weights."""

    shape: dict
    vocabulary: int
    steps: int
    rows: int
    length: int
    lr: float
    start: float


# every in_features is divisible by 64, so that every quantizer's groups fit
SCALES = {
    "full": Scale(
        dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
             num_key_value_heads=4),
        vocabulary=1024, steps=3000, rows=32, length=512, lr=8e-4, start=0.02,
    ),
    "small": Scale(
        dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2),
        vocabulary=768, steps=300, rows=16, length=128, lr=2e-3, start=0.06,
    ),
}  # fmt: skip


@dataclass
class Pretrain:
    output_dir: str = flag("output/mini", "folder that is made")
    overwrite: bool = flag(False, "replace what is in --output_dir")
    scale: str = flag("full", "77 million parameters, or 1 million", choices=tuple(SCALES))
    seed: int = flag(0, "seed of weights, text and problems", minimum=0)
    steps: int = flag(0, "pre-training steps; 0: those of --scale", minimum=0)
    test_samples: int = flag(500, "problems that are only ever asked at the end", minimum=1)
    validation_samples: int = flag(200, "problems that learning rates are chosen on", minimum=1)
    train_samples: int = flag(30_000, "problems to fine-tune on", minimum=1)
    device: str = flag("auto", "where to compute", choices=("auto", "cuda", "cpu"))

    def errors(self):
        return []


class PackedText(Dataset):
    """Batch k of the pre-training text, `[rows, length]` ids: a function of seed and k, so workers change nothing."""

    def __init__(self, tokenizer, *, scale: Scale, steps: int, seed: int):
        self.tokenizer, self.scale, self.steps, self.seed = tokenizer, scale, steps, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> torch.Tensor:
        texts = pretraining_texts(seed=f"{self.seed}:{step}")
        return next(packed_batches(texts, self.tokenizer, rows=self.scale.rows, length=self.scale.length))


def make_model(tokenizer, scale: Scale) -> LlamaForCausalLM:
    """A Llama with random weights."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            initializer_range=scale.start,
            **scale.shape,
            **ids,
        )
    )


def pretrained(tokenizer, scale: Scale, *, steps: int, seed: int, device: torch.device) -> LlamaForCausalLM:
    """The base model, in bf16."""
    on_gpu = device.type == "cuda"
    torch.manual_seed(seed)
    model = make_model(tokenizer, scale).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps of {scale.rows} x {scale.length}")
    text = PackedText(tokenizer, scale=scale, steps=steps, seed=seed)
    workers = min(12, len(os.sched_getaffinity(0)) - 1) if on_gpu else 0  # on a GPU, making text would be the slow part
    batches = iter(DataLoader(text, batch_size=None, num_workers=workers))
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext():
            pretrain(torch.compile(model) if on_gpu else model, batches, steps, lr=scale.lr)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    return model.to(torch.bfloat16)


def main(args: Pretrain) -> None:
    scale, device = SCALES[args.scale], pick_device(args.device)
    sizes = dict(test=args.test_samples, validation=args.validation_samples, train=args.train_samples)
    asked = islice(problems(seed=f"vocabulary {args.seed}"), 3000)  # not those of the sets
    vocabulary = [PROMPT.format(**problem.row) + problem.answer for problem in asked]
    vocabulary += islice(pretraining_texts(seed=args.seed), 5000)
    tokenizer = make_tokenizer(vocabulary, vocab_size=scale.vocabulary)
    with (
        new_folder(args.output_dir, overwrite=args.overwrite, mark="model/config.json") as folder,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart,
    ):
        sets = apart.submit(splits, seed=args.seed, **sizes)  # half a minute, while the GPU works
        model = pretrained(tokenizer, scale, steps=args.steps or scale.steps, seed=args.seed, device=device)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        for name, found in sets.result().items():
            write_jsonl(folder / f"{name}.jsonl", [problem.row for problem in found])
        print(f"base {fingerprint(CheckpointReader(folder / 'model'))[:12]}")


if __name__ == "__main__":
    try:
        main(parse(Pretrain, prog="pretrain.py", description=__doc__))
    except UserError as error:
        fail(error)
