"""LoRA or QLoRA? Accuracy, memory and time of a classifier by method and rank, and what a T5 takes.

    python experiments/lora_or_qlora/run.py --model MODEL --train ag_news_train.jsonl --eval ag_news_eval.jsonl
    python experiments/lora_or_qlora/run.py --study shape --model MODEL --train ag_news_train.jsonl
    python experiments/lora_or_qlora/run.py --study t5 --model MODEL --train gsm8k_train.jsonl

accuracy  every method on the real model, at several seeds, `--processes` at a time
shape     every method on RoBERTa-base with random weights, one at a time: memory and seconds
t5        flan-t5-small with random weights: memory of full fine-tuning and LoRA at batch 32, and gradient norms of
          rank 8 at alpha 4, 8, 16 and 32

The figures of a run are a line of results.jsonl, and a run that has its line is not made again. report.py makes the
tables. RoBERTa and T5 take the tokenizer of --model: their own need a network.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from transformers import AutoTokenizer, RobertaConfig, T5Config

from experiments.runs import RESULTS, carry_out, in_its_place, train_flags, train_once
from fsdp_utils.core.devices import pick_device
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import flag, parse
from fsdp_utils.core.folders import read_rows
from fsdp_utils.core.ranks import fail

COMMON = dict(use_cpu_offload=False, lora_dropout=0, wd=0.01, lr_scheduler="linear", context_length=256)
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
        for alpha in (4, 8, 16, 32)
    },
}


@dataclass
class Study:
    """What to run."""

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
    compile: bool = flag(False, "compile blocks; short runs are over before it pays")
    device: str = flag("auto", "where to compute", choices=("auto", "cuda", "cpu"))

    def errors(self) -> list[str]:
        needed = ("model", "train", "eval") if self.study == "accuracy" else ("model", "train")
        return [f"--{name}: name it; see --help" for name in needed if not getattr(self, name)]

    @property
    def table(self) -> dict[str, dict]:
        return T5_ROWS if self.study == "t5" else METHODS

    @property
    def at_once(self) -> int:
        """Time and memory are of a run that has the GPU for itself."""
        return self.processes if self.study == "accuracy" else 1

    @property
    def shape(self) -> Path:
        return Path(self.output_dir) / f"shape_{self.study}"


class Job(NamedTuple):
    study: str
    row: str
    seed: int

    def __str__(self) -> str:
        return "".join(c if c.isalnum() else "_" for c in f"{self.study} {self.row} {self.seed}")


def write_shape(study: Study) -> None:
    """A folder with the configuration of RoBERTa-base or flan-t5-small, and the tokenizer of --model."""
    tokenizer = AutoTokenizer.from_pretrained(study.model)
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
    config.save_pretrained(study.shape)
    tokenizer.save_pretrained(study.shape)


def jobs_of(study: Study) -> list[Job]:
    wanted = [name.strip() for name in study.only.split(",") if name.strip()] or list(study.table)
    if unknown := [name for name in wanted if name not in study.table]:
        raise UserError(f"--only {unknown[0]}: no such row; there are {', '.join(study.table)}")
    seeds = range(study.seeds if study.study == "accuracy" else 1)
    return [Job(study.study, name, seed) for seed in seeds for name in study.table if name in wanted]


def flags_of(job: Job, study: Study) -> dict:
    """The flags of train.py."""
    flags = dict(dataset=study.train, model_name=study.model, device=study.device, batch_size=study.batch_size)
    flags |= dict(task="seq2seq_lm" if job.study == "t5" else "sequence_classification", max_steps=study.steps)
    flags |= dict(output_dir=Path(study.output_dir) / "work" / str(job), overwrite=True, compile=study.compile)
    if job.study == "accuracy":
        flags |= dict(eval_dataset=study.eval, use_gradient_checkpointing=False, cuda_graphs=False)
    else:
        flags |= dict(model_name=study.shape, load_format="dummy")
        flags |= {} if study.steps > 0 else dict(max_steps=100)
    return flags | COMMON | dict(seed=job.seed) | study.table[job.row]


def execute(job: Job, study: Study) -> list[dict]:
    """The row of one job."""
    with in_its_place(job, Path(study.output_dir)):
        return [job._asdict() | train_once(train_flags(flags_of(job, study)), pick_device(study.device))]


def announce(row: dict) -> None:
    shown = {name: round(value, 4) for name, value in row.items() if isinstance(value, float)}
    print(row["row"], row["seed"], shown, flush=True)


def main(study: Study) -> None:
    path, jobs = Path(study.output_dir) / RESULTS, jobs_of(study)
    done = lambda: {Job(row["study"], row["row"], row["seed"]) for row in read_rows(path)}
    left = lambda: [job for job in jobs if job not in done()]
    if study.study != "accuracy":
        write_shape(study)
    how = dict(processes=study.at_once, announce=announce, deadline=float("inf"))
    carry_out(left, partial(execute, study=study), path, **how)
    if missing := left():
        raise UserError(f"{len(missing)} runs failed; {path.parent / 'logs'} says why, the same command tries again")


if __name__ == "__main__":
    try:
        main(parse(Study, prog="run.py", description=__doc__))
    except UserError as error:
        fail(error)
