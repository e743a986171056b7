"""The 2024 question on a real model, and the recipe questions of 2025: one JSON line for each run.

    python experiments/gsm8k/run.py --model MODEL --train gsm8k_train.jsonl --test gsm8k_test.jsonl
    python experiments/gsm8k/run.py --model MODEL --train train.jsonl --test test.jsonl --only QLoRA,full --processes 8

Every method is trained with the same rows and steps at each of its seven rates (seed 0); the loss on `--held_out` rows
of the training file, which no run trains on, chooses. The chosen rate is then run with further seeds, and those alone
are reported: the loss on the answers of the test file, and how many answers are right. So no figure is of a run that
was picked for it. results.jsonl only grows; what is in it is not run again.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.runs import (
    RESULTS,
    carry_out,
    evaluate_once,
    export_once,
    in_its_place,
    logged,
    train_flags,
    train_once,
)
from fsdp_utils.core.devices import pick_device
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import flag, parse
from fsdp_utils.core.folders import read_rows
from fsdp_utils.core.ranks import fail
from fsdp_utils.training.scores import wilson_interval
from scripts.block_expansion import Expansion, expand
from scripts.make_demo import write_jsonl

ADAPTER_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
NEAR = ADAPTER_RATES[3:6]  # where rows of the same kind were best
FULL_RATES = (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)  # a tenth
EIGHT = dict(compute="fp8", precision="bf16")  # whatever the study computes in
NF4 = " + NF4"  # of a row: the trained weights, read again through NF4
NO_RATE = 1e-12  # one step of it leaves the model as it is
REPORTED = 200  # answers of the test file in the report of an export
SERVED = ("bnb_nf4", "w4a16")
NEW_BLOCKS = 3  # of 30: --expansion_rate 0.1, as in 2024
COMMON = dict(context_length=512, lora_dropout=0.0, wd=0.0, lr_scheduler="cosine", use_cpu_offload=False,
              cuda_graphs=False, use_gradient_checkpointing=False)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One row.

    Args:
        flags: of train.py.
        rates: that are tried.
        nf4: whether the result is read a second time, with its blocks quantized to NF4: the row `… + NF4`.
        exports: of prepare_weights.py's formats, what becomes of it: `exported` of a row has the report of each.
    """

    flags: dict = field(default_factory=dict)
    rates: tuple[float, ...] = ADAPTER_RATES
    nf4: bool = False
    exports: tuple[str, ...] = ()


def adapted(
    train_type: str = "custom_lora", *, rates: tuple[float, ...] = ADAPTER_RATES, exports=(), **flags
) -> Method:
    """Rank 64, alpha 16 on q, k, v, gate, up and down, as in 2024, unless `flags` say otherwise."""
    return Method(dict(train_type=train_type) | flags, rates, exports=exports)


def untrained(train_type: str, **flags) -> Method:
    """The base, quantized as `train_type` quantizes it: its adapter begins at zero and stays there."""
    return Method(dict(train_type=train_type, max_steps=1) | flags, (NO_RATE,))


METHODS = {
    "base": untrained("custom_lora"),
    "base, NF4": untrained("custom_qlora"),
    "base, HQQ 4 bits": untrained("hqq_lora", n_bits=4),
    "base, HQQ 2 bits": untrained("hqq_lora", n_bits=2),
    "full": Method(dict(train_type="full"), FULL_RATES, nf4=True),
    "LoRA": adapted(exports=SERVED),
    "QLoRA": adapted("custom_qlora", exports=SERVED),
    "QLoRA for NF4": adapted("custom_qlora", rates=NEAR, train_for="nf4", exports=SERVED[:1]),
    "QDoRA": adapted("bnb_dora", exports=SERVED),
    "QDoRA for NF4": adapted("bnb_dora", rates=NEAR, train_for="nf4", exports=SERVED[:1]),
    "LoRA for w4a16": adapted("hqq_lora", rates=NEAR, train_for="w4a16", exports=SERVED[1:]),
    "DoRA for w4a16": adapted("hqq_dora", rates=NEAR, train_for="w4a16", exports=SERVED[1:]),
    "Llama-Pro": Method(dict(train_type="bnb_llama_pro"), FULL_RATES),
    "HQQ 4 bits LoRA": adapted("hqq_lora", n_bits=4),
    "HQQ 2 bits LoRA": adapted("hqq_lora", n_bits=2),
    "HQQ 2 bits DoRA": adapted("hqq_dora", n_bits=2),
    "HQQ 3 bits LoRA": adapted("hqq_lora", rates=NEAR, n_bits=3),
    **{
        f"HQQ {bits} bits LoRA, QERA": adapted("hqq_lora", rates=NEAR, n_bits=bits, lora_init="qera")
        for bits in (2, 3, 4)
    },
    "HQQ 2 bits DoRA, QERA": adapted("hqq_dora", rates=NEAR, n_bits=2, lora_init="qera"),
    "QLoRA, QERA": adapted("custom_qlora", rates=NEAR, lora_init="qera"),
    "LoRA, 8-bit products": adapted(rates=NEAR, **EIGHT),
    "QLoRA, 8-bit products": adapted("custom_qlora", rates=NEAR, **EIGHT),
    "QDoRA, 8-bit products": adapted("bnb_dora", rates=NEAR, **EIGHT),
    "LoRA, o_proj too": adapted(lora_target_modules="all_linear"),
    "LoRA, rank 8": adapted(lora_rank=8),
    "LoRA, rank 256": adapted(lora_rank=256),
    "LoRA, rank 256, rsLoRA": adapted(lora_rank=256, use_rslora=True),
    "LoRA, alpha 128": adapted(lora_alpha=128),
    "LoRA, PiSSA": adapted(lora_init="pissa_niter_16", lora_alpha=64, rates=FULL_RATES),
}


@dataclass
class Study:
    """What to run."""

    model: str = flag("", "folder of a small real model")
    train: str = flag("", "file to train on: question, answer")
    test: str = flag("", "file to report on")
    output_dir: str = flag("output/gsm8k", "where results.jsonl and the logs go")
    only: str = flag("", "rows to make, separated by semicolons; all if empty")
    seeds: int = flag(3, "runs at the chosen rate", minimum=1)
    steps: int = flag(150, "optimizer steps of a run", minimum=1)
    batch_size: int = flag(16, "rows of a step", minimum=1)
    held_out: int = flag(400, "last rows of --train that choose the rate", minimum=1)
    questions: int = flag(1319, "of --test that are asked", minimum=1)
    max_new_tokens: int = flag(300, "longest answer in tokens", minimum=1)
    precision: str = flag("bf16", "of train.py", choices=("bf16", "fp32"))
    processes: int = flag(1, "runs at a time", minimum=1)
    budget_minutes: float = flag(0.0, "start no further run after this time; 0: no limit", minimum=0.0)
    device: str = flag("auto", "where to compute", choices=("auto", "cuda", "cpu"))

    def errors(self) -> list[str]:
        found = [f"--{name}: name it; see --help" for name in ("model", "train", "test") if not getattr(self, name)]
        unknown = [name for name in self.names if name not in METHODS]
        return found + [f"--only {name}: no such row; there are {'; '.join(METHODS)}" for name in unknown]

    @property
    def names(self) -> list[str]:
        return [name.strip() for name in self.only.split(";") if name.strip()] or list(METHODS)

    def file(self, name: str) -> Path:
        return Path(self.output_dir) / f"{name}.jsonl"

    @property
    def expanded(self) -> Path:
        return Path(self.output_dir) / "base_pro"


class Job(NamedTuple):
    """One training; seed 0 chooses the rate, the others are reported."""

    method: str
    lr: float
    seed: int

    def __str__(self) -> str:
        return "".join(c if c.isalnum() else "_" for c in f"{self.method} {self.lr:g} {self.seed}")


def best_rate(rows: list[dict], name: str) -> float | None:
    """The rate with the lowest loss on the held-out rows, once all are there; the lowest of equals."""
    tried = {row["lr"]: row["eval_loss"] for row in rows if row["method"] == name and row["seed"] == 0}
    if set(tried) < set(METHODS[name].rates):
        return None
    found = {lr: loss for lr, loss in tried.items() if loss is not None}
    return min(found, key=lambda lr: (found[lr], lr)) if found else None


def jobs_of(study: Study, rows: list[dict]) -> Iterator[Job]:
    """Rates of all methods first, then further seeds of those that are chosen."""
    several = [name for name in study.names if len(METHODS[name].rates) > 1]
    yield from (Job(name, lr, 0) for name in several for lr in METHODS[name].rates)
    yield from (Job(name, NO_RATE, 1) for name in study.names if name not in several)
    chosen = {name: best_rate(rows, name) for name in several}
    yield from (Job(n, lr, seed) for seed in range(1, study.seeds + 1) for n, lr in chosen.items() if lr)


def flags_of(job: Job, study: Study) -> dict:
    """The flags of train.py."""
    flags = dict(
        model_name=study.model,
        dataset=study.file("train"),
        eval_dataset=study.file("test" if job.seed else "held_out"),
        output_dir=Path(study.output_dir) / "work" / str(job),
        batch_size=study.batch_size,
        max_steps=study.steps,
        lr=job.lr,
        seed=job.seed,
        precision=study.precision,
        device=study.device,
        compile=False,
        save_model=bool(job.seed),
        overwrite=True,
    )
    flags |= COMMON | METHODS[job.method].flags
    return flags | (dict(llama_pro_path=study.expanded) if flags["train_type"].endswith("llama_pro") else {})


def exam(folder: Path, study: Study, device, *, eval_type: str = "auto") -> dict:
    """How many of the questions the saved model answers right."""
    flags = dict(model=folder, dataset=study.file("test"), samples=study.questions, eval_type=eval_type)
    flags |= dict(batch_size=330, max_new_tokens=study.max_new_tokens)
    result = evaluate_once(flags, device, output=folder.with_name(f"{folder.name}_{eval_type}.json"))
    right = sum(row["correct"] for row in result["results"])
    asked = len(result["results"])
    return dict(exact_match=right / asked, interval_95=wilson_interval(right, asked), asked=asked)


def exported(folder: Path, study: Study, device, *, infer_type: str) -> dict:
    """What prepare_weights.py reports of an export: perplexities of base, trained and exported model, and the share of
    the gain that is kept."""
    flags = dict(model=folder, save_dir=folder.with_name(f"{folder.name}_{infer_type}"), infer_type=infer_type)
    flags |= dict(fidelity_data=study.file("test"), fidelity_samples=min(study.questions, REPORTED))
    flags |= dict(group_size=64) if infer_type == "w4a16" else {}
    found = export_once(flags, device)
    return {name: found[name] for name in ("base", "trained", "exported")}


def outcome(job: Job, study: Study) -> list[dict]:
    """The row of one job, and that of its second reading."""
    flags, device, method = flags_of(job, study), pick_device(study.device), METHODS[job.method]
    settings = {name: getattr(study, name) for name in ("steps", "batch_size", "precision", "held_out")}
    row = job._asdict() | dict(settings=settings)
    try:
        row |= train_once(train_flags(flags), device)
    except FloatingPointError as error:
        return [row | dict(eval_loss=None, error=str(error))]
    if not job.seed:
        return [row]
    folder = Path(flags["output_dir"])
    if "compute" in flags:  # the last validation computed as training did, and those who use the adapter do not
        plain = {name: value for name, value in flags.items() if name != "compute"}
        plain |= dict(init_adapter=folder, lr=NO_RATE, max_steps=1, save_model=False, output_dir=folder / "again")
        row["eval_loss_in_16_bits"] = train_once(train_flags(plain), device)["eval_loss"]
    if method.exports:
        row["exported"] = {name: exported(folder, study, device, infer_type=name) for name in method.exports}
    rows = [row | exam(folder, study, device)]
    if method.nf4:
        again = flags | METHODS["base, NF4"].flags | dict(model_name=folder, lr=NO_RATE, save_model=False)
        again |= dict(output_dir=folder / "nf4")
        read = train_once(train_flags(again), device)
        score = exam(folder, study, device, eval_type="full_post_quantized")
        named = dict(method=job.method + NF4, eval_loss=read["eval_loss"], eval_perplexity=read["eval_perplexity"])
        rows.append(row | named | score)
    return rows


def execute(job: Job, study: Study) -> list[dict]:
    """`outcome`, with what train.py and evaluate.py say in the job's log; leaves no weights behind."""
    with in_its_place(job, Path(study.output_dir)):
        return outcome(job, study)


def prepare(study: Study) -> None:
    """The files, and the expanded base for Llama-Pro."""
    Path(study.output_dir).mkdir(parents=True, exist_ok=True)
    rows, test = read_rows(Path(study.train)), read_rows(Path(study.test))
    if len(rows) <= study.held_out or not test:
        raise UserError(f"--train {study.train}, --test {study.test}: {len(rows)} and {len(test)} rows are too few")
    write_jsonl(study.file("train"), rows[: -study.held_out])
    write_jsonl(study.file("held_out"), rows[-study.held_out :])
    write_jsonl(study.file("test"), test[: study.questions])
    if "Llama-Pro" in study.names:
        with logged(Path(study.output_dir) / "logs" / "expansion.log"):
            expand(Expansion(study.model, str(study.expanded), num_new_blocks=NEW_BLOCKS, overwrite=True))


def announce(row: dict) -> None:
    said = {name: round(row[name], 4) for name in ("eval_loss", "exact_match", "train_seconds") if row.get(name)}
    print(row["method"], f"{row['lr']:g}", row["seed"], said or row.get("error"), flush=True)


def main(study: Study) -> None:
    path = Path(study.output_dir) / RESULTS
    prepare(study)
    deadline = time.monotonic() + 60 * study.budget_minutes if study.budget_minutes else float("inf")

    def left() -> list[Job]:
        rows = read_rows(path)
        done = {Job(row["method"], row["lr"], row["seed"]) for row in rows}
        return [job for job in jobs_of(study, rows) if job not in done]

    carry_out(
        left, partial(execute, study=study), path, processes=study.processes, announce=announce, deadline=deadline
    )
    if missing := left():
        why = "the time was over" if time.monotonic() > deadline else f"{path.parent / 'logs'} says why"
        raise UserError(f"{len(missing)} runs are left: {why}; the same command goes on")


if __name__ == "__main__":
    try:
        main(parse(Study, prog="run.py", description=__doc__))
    except UserError as error:
        fail(error)
