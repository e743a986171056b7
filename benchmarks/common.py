"""What the benchmarks share: model shapes, the floor, one measured run, tables."""

import gc
import json
import time
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.distributed import ReduceOp
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Glm4MoeConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from fsdp_utils.config import TrainConfig
from fsdp_utils.core import processes
from fsdp_utils.core.devices import pick_device, synchronize
from fsdp_utils.core.flags import parse
from fsdp_utils.core.ranks import is_main
from fsdp_utils.data.batches import with_targets
from fsdp_utils.data.parts import Part
from fsdp_utils.model.assemble import load, plan
from fsdp_utils.model.compiling import compiler
from fsdp_utils.sharding.mesh import mesh_for
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from fsdp_utils.training.step import TrainStep

SHAPES = {
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=1024),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256),
    "70b": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                num_key_value_heads=8, vocab_size=128256),
    "405b": dict(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
                 num_key_value_heads=8, vocab_size=128256),
}  # fmt: skip

MIXTURES = {
    "qwen3_30b_a3b": lambda: Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
    ),
    "gpt_oss_20b": lambda: GptOssConfig(
        num_hidden_layers=24, num_local_experts=32, tie_word_embeddings=False,
        quantization_config=dict(quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn",
                                 "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]),
    ),
    "mixtral_8x7b": lambda: MixtralConfig(vocab_size=32000, sliding_window=None),
    "glm_4.5_air": lambda: Glm4MoeConfig(
        vocab_size=151552, hidden_size=4096, intermediate_size=10944, num_hidden_layers=46, num_attention_heads=96,
        num_key_value_heads=8, head_dim=128, moe_intermediate_size=1408, n_routed_experts=128, num_experts_per_tok=8,
        n_shared_experts=1, first_k_dense_replace=1, partial_rotary_factor=0.5,
    ),
}  # fmt: skip


def write_config(shape: str, folder: str | Path, *, layers: int | None = None, **more) -> Path:
    """A folder with only the configuration of a Llama or a mixture of that shape, or of fewer layers; weights are
    dummies."""
    more |= dict(num_hidden_layers=layers) if layers else {}
    if shape in MIXTURES:
        config = MIXTURES[shape]()
        config.update(more)
    else:
        rope = {"rope_type": "default", "rope_theta": 500000.0}
        settings = {**SHAPES[shape], "rope_parameters": rope, "max_position_embeddings": 131072, **more}
        config = LlamaConfig(**settings, tie_word_embeddings=False)
    config.dtype = "bfloat16"
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.save_pretrained(folder)
    return Path(folder)


def make_config(folder, **flags) -> TrainConfig:
    """A run's settings with what the benchmarks have in common."""
    if "llama_pro" in flags.get("train_type", ""):
        (Path(folder) / "expanded_layers.json").write_text('{"expanded_layers": [1]}')
        flags["llama_pro_path"] = folder
    common = dict(
        model_name=folder,
        load_format="dummy",
        lora_dropout=0.0,
        use_cpu_offload=False,
        optimizer="fused_adamw",
        lora_rank=64,
    )
    return parse(TrainConfig, [f"--{k}={v}" for k, v in {**common, **flags}.items()], prog="benchmark")


def seconds(fn, *, device: torch.device, repeat: int = 10, warmup: int = 3, at_least: float = 0.0) -> float:
    """Mean wall time of `fn` on the device, over `repeat` calls and as many more as `at_least` seconds take."""
    for _ in range(warmup):
        fn()
    synchronize(device)
    calls, start = 0, time.perf_counter()
    while not calls or time.perf_counter() - start < at_least:
        for _ in range(repeat):
            fn()
        synchronize(device)
        calls += repeat
    return (time.perf_counter() - start) / calls


def matrices_of_blocks(config: PreTrainedConfig) -> Counter[tuple[torch.Size, ...]]:
    """The matrices `[out, in]` and stacks `[experts, out, in]` of a block, and how many blocks have the same."""
    with torch.device("meta"):
        blocks = AutoModelForCausalLM.from_config(config).model.layers
    weights = lambda block: [p for name, p in block.named_parameters() if not name.endswith("bias")]
    return Counter(tuple(p.shape for p in weights(block) if p.dim() > 1) for block in blocks)


def floor_seconds(
    folder: str | Path, *, batch: int, length: int, checkpointing: bool, device: torch.device, at_least: float = 0.0
) -> float:
    """Seconds of one step's work on the device that no implementation avoids: the frozen model's matrix products
    (forward, again when recomputed, gradient of the input), attention and the head, each timed alone.

    Of a stack of experts, tokens meet as many as the model chooses for each, all of them equally often, in one grouped
    product (`torch._grouped_mm`, on GPUs only) with the stack in 16 bits.

    Args:
        folder: with the model's configuration.
        at_least: seconds that each is kept up. A GPU that was idle takes a few tenths of a second to come down to the
            clock rate that its power allows, and a step is never that short of rest.
    """
    config = AutoConfig.from_pretrained(folder)
    hidden, heads, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    size, tokens = getattr(config, "head_dim", None) or hidden // heads, batch * length
    new = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)
    timed = partial(seconds, device=device, at_least=at_least)
    forwards = 2 if checkpointing else 1
    chosen = tokens * getattr(config, "num_experts_per_tok", 1)
    values = cache(new)  # one of a size is enough
    ends_of = cache(lambda n: torch.arange(1, n + 1, device=device, dtype=torch.int32) * (chosen // n))

    def multiply(weight: torch.Tensor) -> None:
        """All tokens with a matrix, or each with its matrices of a stack."""
        if weight.dim() == 2:
            values(tokens, len(weight)) @ weight
        else:
            torch._grouped_mm(values(chosen, weight.shape[1]), weight, offs=ends_of(len(weight)))

    def products(shapes: tuple[torch.Size, ...]) -> float:
        """Of a block."""
        weights = [new(*shape) for shape in shapes]

        def all_of_them():
            for _ in range(forwards):
                for weight in weights:
                    multiply(weight.mT)
            for weight in weights:
                multiply(weight)

        return timed(all_of_them)

    q, k, v = (new(batch, n, length, size).requires_grad_() for n in (heads, kv, kv))

    def attention():
        for _ in range(forwards):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out.backward(out.detach())

    of_blocks = sum(products(shapes) * count for shapes, count in matrices_of_blocks(config).items())
    states, head = new(tokens, hidden), new(config.vocab_size, hidden)
    return of_blocks + config.num_hidden_layers * timed(attention) + timed(lambda: (states @ head.T) @ head)


def median_step(
    step: Callable[[int, int], None], *, batch: int, length: int, device: torch.device, steps: int, warmup: int
) -> dict:
    """Median seconds of `step(batch, length)` after `warmup` steps, in the slowest process, and its tokens per second;
    peak GiB of all steps on a GPU (None on a CPU); the first step's seconds separately."""
    on_gpu, times = device.type == "cuda", []
    if on_gpu:  # before warm-up: what a CUDA graph holds is only counted when it is captured
        torch.cuda.reset_peak_memory_stats()
    for _ in range(warmup + steps):
        synchronize(device)
        start = time.perf_counter()
        step(batch, length)
        synchronize(device)
        times.append(time.perf_counter() - start)
    median = processes.all_reduce(sorted(times[warmup:])[steps // 2], device, op=ReduceOp.MAX)
    return dict(
        step_s=round(median, 4),
        tokens_s=round(batch * length / median),
        peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        first_step_s=round(times[0], 1),
    )


def random_batch(vocabulary: int, batch: int, length: int) -> dict[str, torch.Tensor]:
    """A micro-batch of random tokens, all but each row's first in the loss."""
    ids = torch.randint(0, vocabulary, (batch, length))
    return dict(input_ids=ids, labels=ids)


class Run:
    """A prepared model that takes optimizer steps; sharded over the processes, or whole in each."""

    def __init__(self, config, *, alone: bool = False):
        self.config = config
        self.device = pick_device(config.device)
        processes.start(self.device, alone=config.use_cpu_offload)
        mesh = None if alone else mesh_for(config, self.device)
        self.plan = plan(config, task=CAUSAL_LM, device=self.device)
        start = time.perf_counter()
        compile_block = compiler(config, self.device)
        self.prepared = load(self.plan, config, mesh=mesh, device=self.device, compile_block=compile_block)
        self.load_s = time.perf_counter() - start
        self.model = self.prepared.model
        self.train_step = TrainStep(self.prepared, config, task=CAUSAL_LM)
        shares = config.context_parallel > 1
        self.part = Part.of_rows(config, self.model.config) if shares else lambda batch: batch

    def step(self, batch: int, length: int) -> None:
        """One optimizer step on micro-batches of `batch` rows of `length` random tokens, all of them in the loss, or on
        this process's part of such rows."""
        multiple = self.train_step.micro_step.targets_multiple
        batches = lambda: with_targets(random_batch(self.model.config.vocab_size, batch, length), multiple=multiple)
        accumulation = range(self.config.gradient_accumulation_steps)
        self.train_step([self.part(batches()) for _ in accumulation], lr=self.config.lr)

    def step_on(self, batch: dict[str, torch.Tensor]) -> None:
        """One optimizer step on a micro-batch of the data pipeline."""
        self.train_step([batch], lr=self.config.lr)

    def measure(self, batch: int, length: int, *, steps: int = 6, warmup: int = 3) -> dict:
        """What `median_step` says of this run, of this process's tokens, and the seconds that loading took."""
        timed = median_step(self.step, batch=batch, length=length, device=self.device, steps=steps, warmup=warmup)
        timed["tokens_s"] *= self.config.gradient_accumulation_steps
        timed["tokens_s"] //= self.config.context_parallel
        return dict(**timed, load_s=round(self.load_s, 1))

    def close(self) -> None:
        """Gives the memory back."""
        self.train_step.close()
        self.prepared.close()
        self.__dict__.clear()
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def write_results(path: str | None, rows: list[dict]) -> None:
    """Appends the rows to a JSON-lines file."""
    if path and is_main():
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
