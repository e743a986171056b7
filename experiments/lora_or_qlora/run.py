"""LoRA or QLoRA? Accuracy, memory and time of a classifier by method and rank, and what a T5 takes.

    python experiments/lora_or_qlora/run.py --model MODEL --train ag_news_train.jsonl --eval ag_news_eval.jsonl
    python experiments/lora_or_qlora/run.py --study shape --model MODEL --train ag_news_train.jsonl
    python experiments/lora_or_qlora/run.py --study t5 --model MODEL --train gsm8k_train.jsonl

accuracy  every method on the real model, at several seeds, `--processes` at a time
shape     every method on RoBERTa-base with random weights, one at a time: memory and seconds
t5        flan-t5-small with random weights: memory of full fine-tuning and LoRA at batch 32, and gradient norms of
          rank 8 at alpha 4, 8, 16 and 32

Every run is a `train.py` of its own; its figures are a line of results.jsonl, and a run that has its line is not made
again. report.py makes the tables. RoBERTa and T5 take the tokenizer of --model: their own need a network.
"""

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import AutoTokenizer, RobertaConfig, T5Config

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import flag, parse
from fsdp_utils.core.ranks import fail

ROOT = Path(__file__).resolve().parents[2]
COMMON = dict(use_cpu_offload="false", lora_dropout=0, wd=0.01, lr_scheduler="linear", log_to="stdout")
ALL = "all_linear"


def adapted(train_type: str, rank: int = 8, alpha: int = 16, **more) -> dict:
    return dict(train_type=train_type, lora_rank=rank, lora_alpha=alpha, lora_target_modules=ALL, lr=5e-4) | more


METHODS = {
    **{f"QLoRA {r}-{a}": adapted("custom_qlora", r, a) for r, a in ((2, 4), (4, 8), (8, 16))},
    **{f"LoRA {r}-{a}": adapted("custom_lora", r, a) for r, a in ((2, 4), (4, 8), (8, 16))},
    "DoRA 8-16": adapted("dora"),
    "QDoRA 8-16": adapted("bnb_dora"),
    "HQQ 4 bits 8-16": adapted("hqq_lora", n_bits=4),
    "HQQ 2 bits 8-16": adapted("hqq_lora", n_bits=2, quant_group_size=32),
    "full": dict(train_type="full", lr=3e-5),
}
T5_ROWS = {
    "full, batch 32": dict(train_type="full", batch_size=32, lr=1e-4),
    "LoRA 8-16, batch 32": adapted("lora", batch_size=32, lora_target_modules="q,v"),
    **{
        f"LoRA 8-{alpha}": adapted("lora", 8, alpha, batch_size=32, lora_target_modules="q,v", lr=1e-4)
        for alpha in (4, 8, 32)
    },
}


@dataclass
class Study:
    study: str = flag("accuracy", "which", choices=("accuracy", "shape", "t5"))
    model: str = flag("", "folder of the real model, or of the tokenizer")
    train: str = flag("", "file to train on")
    eval: str = flag("", "file to validate with (accuracy)")
    output_dir: str = flag("output/lora_or_qlora", "where runs and results.jsonl go")
    only: str = flag("", "rows to make, separated by commas; all if empty")
    seeds: int = flag(3, "how many (accuracy)", minimum=1)
    steps: int = flag(-1, "optimizer steps of a run; -1: an epoch", minimum=-1)
    batch_size: int = flag(16, "rows of a step", minimum=1)
    processes: int = flag(1, "runs at a time (accuracy)", minimum=1)
    device: str = flag("auto", "where to compute", choices=("auto", "cuda", "cpu"))

    def errors(self) -> list[str]:
        needed = ("model", "train", "eval") if self.study == "accuracy" else ("model", "train")
        return [f"--{name}: name it; see --help" for name in needed if not getattr(self, name)]


def write_shape(study: Study) -> Path:
    """A folder with the configuration of RoBERTa-base or flan-t5-small, and the tokenizer of --model."""
    folder, tokenizer = Path(study.output_dir) / f"shape_{study.study}", AutoTokenizer.from_pretrained(study.model)
    rows = -(-len(tokenizer) // 64) * 64
    end = tokenizer.eos_token_id
    if study.study == "shape":
        config = RobertaConfig(
            vocab_size=max(rows, 50265), max_position_embeddings=514, pad_token_id=1, eos_token_id=end
        )
        config.architectures = ["RobertaForMaskedLM"]
    else:
        config = T5Config(
            vocab_size=rows, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6, feed_forward_proj="gated-gelu",
            decoder_start_token_id=0, eos_token_id=end, dropout_rate=0.0,
        )  # fmt: skip
        config.architectures = ["T5ForConditionalGeneration"]
    shutil.rmtree(folder, ignore_errors=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def runs_of(study: Study) -> list[dict]:
    """What identifies each run, and its flags."""
    wanted = [name.strip() for name in study.only.split(",") if name.strip()]
    table = T5_ROWS if study.study == "t5" else METHODS
    if unknown := [name for name in wanted if name not in table]:
        raise UserError(f"--only {unknown[0]}: no such row; there are {', '.join(table)}")
    flags = dict(dataset=study.train, model_name=study.model, device=study.device, batch_size=study.batch_size)
    flags |= dict(task="seq2seq_lm" if study.study == "t5" else "sequence_classification", max_steps=study.steps)
    flags |= dict(context_length=256, **COMMON)
    if study.study == "accuracy":
        flags |= dict(eval_dataset=study.eval)
    else:
        flags |= dict(model_name=write_shape(study), load_format="dummy")
        flags |= {} if study.steps > 0 else dict(max_steps=100)
    seeds = range(study.seeds if study.study == "accuracy" else 1)
    return [
        dict(study=study.study, row=name, seed=seed, flags=flags | dict(seed=seed) | table[name])
        for seed in seeds
        for name in table
        if not wanted or name in wanted
    ]


def carry_out(run: dict, folder: Path) -> dict:
    """One `train.py`: the last validation, seconds, peak memory, and every gradient norm."""
    output = folder / "".join(c if c.isalnum() else "_" for c in f"{run['study']} {run['row']} {run['seed']}")
    words = [f"--{name}={value}" for name, value in dict(run["flags"], output_dir=output, overwrite="true").items()]
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, ROOT / "train.py", *words], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{run['row']}: train.py ended with {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps, said = [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]
    return dict(
        **{name: run[name] for name in ("study", "row", "seed")},
        **(said[-1] if said else {}),
        last_loss=sum(row["loss"] for row in steps[-20:]) / len(steps[-20:]),
        grad_norms=[row["grad_norm"] for row in steps],
        tokens_per_s=sorted(row["tokens_per_s"] for row in steps)[len(steps) // 2],
        peak_gib=max(row["memory_gib"] for row in steps),
        seconds=time.perf_counter() - begun,
        steps=len(steps),
    )


def main(study: Study) -> None:
    folder = Path(study.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.jsonl"
    made = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(row["study"], row["row"], row["seed"]) for row in made}
    left = [run for run in runs_of(study) if (run["study"], run["row"], run["seed"]) not in done]
    with ThreadPoolExecutor(study.processes if study.study == "accuracy" else 1) as pool, results.open("a") as file:
        for found in pool.map(lambda run: carry_out(run, folder), left):
            file.write(json.dumps(found) + "\n")
            file.flush()
            shown = {name: round(value, 4) for name, value in found.items() if isinstance(value, float)}
            print(found["row"], found["seed"], shown, flush=True)


if __name__ == "__main__":
    try:
        main(parse(Study, sys.argv[1:], prog="run.py", description=__doc__))
    except UserError as error:
        fail(error)
