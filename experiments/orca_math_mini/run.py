"""Fine-tunes and evaluates every method of the comparison; one JSON line per result.

    python experiments/orca_math_mini/run.py --base output/mini --output_dir output/mini_runs
    python experiments/orca_math_mini/run.py --base output/mini --only qlora,qdora --sizes 3000 --budget_minutes 8

results.jsonl only grows: what is in it is not run again, so the work may be split over several calls, and the file may
be carried to another machine. Stages: `rates` tries each method's learning rates, `seeds` repeats the one that did best
on the validation problems, `ranks` varies LoRA's rank and alpha; both begin for a method when its rates are done.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from experiments.runs import RESULTS, carry_out, evaluate_once, in_its_place, logged, train_flags, train_once
from fsdp_utils.config import TrainConfig
from fsdp_utils.core.devices import pick_device
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import flag, parse
from fsdp_utils.core.folders import read_rows
from fsdp_utils.core.ranks import fail
from fsdp_utils.core.safetensors_io import CheckpointReader
from fsdp_utils.folders.describe import describe
from fsdp_utils.inference.load import load_for_inference
from fsdp_utils.model.assemble import plan
from fsdp_utils.model.weights import fingerprint
from fsdp_utils.options import PRECISIONS
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from fsdp_utils.training.scores import wilson_interval
from methods.dora import DoRALinear
from scripts.block_expansion import Expansion, expand
from scripts.make_demo import write_jsonl

SHOTS = 5
RANK, ALPHA = 64, 16
RANKS = ((2, 4), (4, 8), (8, 16), (64, 16))
RANKED_METHODS = ("qlora", "qdora")
PRETRAIN = "experiments/orca_math_mini/pretrain.py"
SPLITS = ("test", "validation", "train")


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Args:
        train_type: of train.py; None: the base model as it is.
        factors: of --shared_lr, the learning rates that are tried.
        flags: of train.py.
        shots: solved problems before each question.
        also: further results of the same run: their names, and evaluate.py's --eval_type.
        main: whether its best learning rate is repeated with further seeds.
        new_blocks: of Llama-Pro; the rate of 2024, a tenth, makes one of this base.
    """

    train_type: str | None
    factors: tuple[float, ...] = (1, 2, 4)
    flags: dict = field(default_factory=dict)
    shots: int = 0
    also: dict[str, str] = field(default_factory=dict)
    main: bool = False
    new_blocks: int = 0

    @property
    def adapter(self) -> bool:
        return self.train_type is not None and self.train_type.endswith(("lora", "dora"))


METHODS = {
    "zero_shot": Method(None),
    "five_shot": Method(None, shots=SHOTS),
    "full": Method("full", (0.3, 1, 3), also={"full_nf4": "full_post_quantized"}, main=True),
    "qlora": Method("custom_qlora", main=True),
    "qdora": Method("bnb_dora", main=True),
    "llama_pro": Method("bnb_llama_pro", (0.3, 1, 3), new_blocks=1),
    "llama_pro_4": Method("bnb_llama_pro", (0.3, 1, 3), main=True, new_blocks=4),
    "hqq4_lora": Method("hqq_lora", flags={"n_bits": 4}),
    "hqq4_dora": Method("hqq_dora", flags={"n_bits": 4}),
    "hqq2_lora": Method("hqq_lora", flags={"n_bits": 2}),
    "hqq2_dora": Method("hqq_dora", flags={"n_bits": 2}),
    "lora": Method("custom_lora"),
    "dora": Method("dora"),
}
# every name in the results, and the method whose run it is
OWNERS = {name: owner for owner, method in METHODS.items() for name in (owner, *method.also)}


@dataclass
class RunConfig:
    base: str = flag("output/mini", "folder that pretrain.py made")
    output_dir: str = flag("output/mini_runs", "where results.jsonl and the logs go")
    only: str = flag(",".join(METHODS), "methods to run")
    sizes: str = flag("3000,30000", "training problems of a run")
    epochs: str = flag("4,1", "passes over the problems, one number for each of --sizes")
    stages: str = flag("rates,seeds,ranks", "what to do")
    seeds: int = flag(3, "runs at the best learning rate", minimum=1)
    shared_lr: float = flag(1e-3, "the learning rate that every method tries", above=0.0)
    tune: bool = flag(True, "try two more learning rates per method")
    batch_size: int = flag(32, "problems per optimizer step", minimum=1)
    max_new_tokens: int = flag(112, "longest answer in tokens; worked answers have up to 85", minimum=1)
    precision: str = flag("auto", "of train.py; auto: bf16 on a GPU, else fp32", choices=("auto", *PRECISIONS))
    stochastic_rounding: bool = flag(False, "of train.py; the results of docs/quality.md are older than it")
    compile: bool = flag(False, "compile decoder blocks; short runs are over before it pays")
    device: str = flag("auto", "where to compute", choices=("auto", "cuda", "cpu"))
    processes: int = flag(1, "runs at a time on the one device", minimum=1)
    budget_minutes: float = flag(0.0, "start no further run after this time; 0: no limit", minimum=0.0)

    def errors(self) -> list[str]:
        found = []
        for name, known in (("only", METHODS), ("stages", STAGES)):
            unknown = [word for word in getattr(self, name).split(",") if word not in known]
            found += [f"--{name} {word}: choose from {', '.join(known)}" for word in unknown]
        for name, example in (("sizes", "3000,30000"), ("epochs", "4,1")):
            value = getattr(self, name)
            if not all(number.isdecimal() and int(number) for number in value.split(",")):
                found.append(f"--{name} {value}: give whole numbers with commas between them, as {example}")
        if self.epochs.count(",") != self.sizes.count(","):
            found.append(f"--epochs {self.epochs}: give one number for each of --sizes {self.sizes}")
        return found

    @property
    def methods(self) -> dict[str, Method]:
        return {name: METHODS[name] for name in self.only.split(",")}

    @property
    def numbers(self) -> list[int]:
        return [int(size) for size in self.sizes.split(",")]

    def epochs_of(self, samples: int) -> int:
        return dict(zip(self.numbers, map(int, self.epochs.split(",")), strict=True))[samples]

    @property
    def heldout(self) -> Path:
        return Path(self.output_dir) / "heldout.jsonl"

    def expanded(self, method: Method) -> Path:
        return Path(self.output_dir) / f"base_pro_{method.new_blocks}"


class Job(NamedTuple):
    """One training with its evaluation; of a base model only the evaluation, and then the rest is zero."""

    method: str
    samples: int = 0
    lr: float = 0.0
    seed: int = 0
    rank: int = 0
    alpha: int = 0

    def __str__(self) -> str:
        return "_".join(map(str, self))


# ---------------------------------------------------------------------------------------------------------------------
# What to run
# ---------------------------------------------------------------------------------------------------------------------


def job_of(name: str, samples: int, lr: float, *, seed: int = 0, rank: int = RANK, alpha: int = ALPHA) -> Job:
    """The job; rank and alpha are zero where there is no adapter, so that no two names mean the same run."""
    method = METHODS[name]
    if method.train_type is None:
        return Job(name)
    return Job(name, samples, float(f"{lr:.3g}"), seed, *((rank, alpha) if method.adapter else (0, 0)))


def rates_of(config: RunConfig, name: str, samples: int) -> list[Job]:
    """A method at each of its learning rates."""
    factors = METHODS[name].factors if config.tune else (1,)
    return [job_of(name, samples, factor * config.shared_lr) for factor in factors]


def rate_jobs(config: RunConfig, rows: list[dict]) -> Iterator[Job]:
    """Each method at each of its learning rates."""
    for samples in config.numbers:
        for name in config.methods:
            yield from rates_of(config, name, samples)


def best_rate(rows: list[dict], name: str, samples: int) -> float | None:
    """The learning rate with the best validation score at seed 0 and the main rank; the lowest of equals."""
    main = job_of(name, samples, 0.0)
    tried = [r for r in rows if Job(r["method"], r["samples"], 0.0, r["seed"], r["rank"], r["alpha"]) == main]
    scored = [row for row in tried if row["validation"] is not None]
    return min(scored, key=lambda row: (-row["validation"], row["lr"]))["lr"] if scored else None


def chosen_rate(config: RunConfig, rows: list[dict], name: str, samples: int) -> float | None:
    """`best_rate`, once no rate is left to try."""
    untried = "rates" in config.stages.split(",") and remaining(rates_of(config, name, samples), rows)
    return None if untried else best_rate(rows, name, samples)


def seed_jobs(config: RunConfig, rows: list[dict]) -> Iterator[Job]:
    """The best learning rate of the main rows at further seeds."""
    for samples in config.numbers:
        for name, method in config.methods.items():
            best = chosen_rate(config, rows, name, samples)
            if best and method.main:
                yield from (job_of(name, samples, best, seed=seed) for seed in range(1, config.seeds))


def rank_jobs(config: RunConfig, rows: list[dict]) -> Iterator[Job]:
    """Ranks and alphas at the largest size and the main rank's best learning rate."""
    samples = max(config.numbers)
    for name in RANKED_METHODS:
        best = chosen_rate(config, rows, name, samples)
        if best and name in config.methods:
            yield from (job_of(name, samples, best, rank=rank, alpha=alpha) for rank, alpha in RANKS)


STAGES = {"rates": rate_jobs, "seeds": seed_jobs, "ranks": rank_jobs}


def remaining(jobs: Iterable[Job], rows: list[dict]) -> list[Job]:
    """The jobs without a result, each once."""
    done = {Job(*(row[name] for name in Job._fields)) for row in rows}
    return [job for job in dict.fromkeys(jobs) if job not in done]


# ---------------------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------------------


def train_config(job: Job, config: RunConfig) -> TrainConfig:
    """The flags of train.py, as a user would give them."""
    method, device = METHODS[job.method], pick_device(config.device)
    on_gpu = device.type == "cuda"
    flags = dict(
        train_type=method.train_type,
        model_name=Path(config.base) / "model",
        dataset=Path(config.base) / "train.jsonl",
        dataset_samples=job.samples,
        num_epochs=config.epochs_of(job.samples),
        context_length=512,
        lora_dropout=0.0,
        batch_size=config.batch_size,
        lr=job.lr,
        lr_scheduler="cosine",
        wd=0.0,
        optimizer="fused_adamw" if on_gpu else "adamw",
        precision=("bf16" if on_gpu else "fp32") if config.precision == "auto" else config.precision,
        stochastic_rounding=config.stochastic_rounding,
        seed=job.seed,
        device=device.type,
        use_cpu_offload=False,
        use_gradient_checkpointing=False,
        compile=config.compile,
        save_model=True,
        overwrite=True,
        output_dir=Path(config.output_dir) / "work" / str(job),
        **method.flags,
    )
    if method.adapter:
        flags.update(lora_rank=job.rank, lora_alpha=job.alpha)
    if method.new_blocks:
        flags.update(llama_pro_path=config.expanded(method))
    return train_flags(flags)


def trained_parameters(flags: TrainConfig) -> dict:
    """How many parameters train, and their share of the base's; built on meta."""
    planned = plan(flags, task=CAUSAL_LM, device=torch.device("cpu"))
    trained = sum(p.numel() for p in planned.model.parameters() if p.requires_grad)
    base = sum(prod(planned.weights.shape(name)) for name in planned.weights.names())
    return dict(trained=trained, trained_share=trained / base)


def magnitude_change(folder: Path, device: torch.device) -> dict:
    """How far DoRA's magnitudes are from where they started: mean and largest |m / m0 - 1|."""
    model = load_for_inference(describe(folder), device=device)
    layers = [module for module in model.modules() if isinstance(module, DoRALinear)]
    # a row of zeros has no direction to scale
    starts, deltas = ([getattr(m, name).float() for m in layers] for name in ("initial_magnitude", "magnitude_delta"))
    moved = torch.cat([(delta / start)[start > 0].abs() for start, delta in zip(starts, deltas, strict=True)])
    return dict(magnitude_change=dict(mean=moved.mean().item(), largest=moved.max().item(), rows=len(moved)))


def score(model: Path, config: RunConfig, device: torch.device, *, eval_type: str = "auto", shots: int = 0) -> dict:
    """Exact match on the test problems with its interval, and on the validation problems."""
    test, validation = (len(read_rows(Path(config.base) / f"{name}.jsonl")) for name in SPLITS[:2])
    flags = dict(
        model=model,
        eval_type=eval_type,
        dataset=config.heldout,
        samples=test + validation,
        n_shots=shots,
        batch_size=1024 if device.type == "cuda" else 32,
        max_new_tokens=config.max_new_tokens,
    )
    output = Path(config.output_dir) / "work" / f"{model.name}_{eval_type}_{shots}.json"
    result = evaluate_once(flags, device, output=output)
    right = [row["correct"] for row in result["results"]]  # in the order of the file: test problems first
    return dict(
        exact_match=sum(right[:test]) / test,
        interval_95=wilson_interval(sum(right[:test]), test),
        test_problems=test,
        validation=sum(right[test:]) / validation,
        eval_seconds=round(result["seconds"], 2),
        eval_peak_gib=round(result["peak_memory_gib"], 4),
    )


def outcome(job: Job, config: RunConfig) -> list[dict]:
    """The rows of one job: its own, and one for each further reading of what it trained."""
    method, device, folder = METHODS[job.method], pick_device(config.device), Path(config.base) / "model"
    readings = {job.method: "auto", **method.also}
    common = dict(base=base_of(config), device=device_name(device), processes=config.processes)
    common.update(shared_lr=config.shared_lr, settings=settings_of(config, job.samples))
    if method.train_type:
        flags = train_config(job, config)
        folder = Path(flags.output_dir)
        common |= trained_parameters(flags)
        try:
            common |= train_once(flags, device)
        except FloatingPointError as error:
            common.update(exact_match=None, validation=None, error=str(error))
            return [row_of(job, name, **common) for name in readings]
        if method.train_type.endswith("dora"):
            common |= magnitude_change(folder, device)
    return [
        row_of(job, name, **common, **score(folder, config, device, eval_type=eval_type, shots=method.shots))
        for name, eval_type in readings.items()
    ]


def settings_of(config: RunConfig, samples: int) -> dict:
    """What is not in a Job and yet changes its result."""
    names = ("batch_size", "precision", "stochastic_rounding", "max_new_tokens")
    return {name: getattr(config, name) for name in names} | {"epochs": config.epochs_of(samples) if samples else 0}


def check_settings(config: RunConfig, rows: list[dict]) -> None:
    """Raises UserError if a row that counts as done was made with other settings."""
    for row in rows:
        if row["samples"] not in (0, *config.numbers):
            continue
        for name, value in settings_of(config, row["samples"]).items():
            # a row older than a flag has its default
            before = row["settings"].get(name, getattr(RunConfig, name, None))
            if before != value:
                made = f"{config.output_dir}/{RESULTS} was made with {before}"
                raise UserError(f"--{name}: {made}, now it is {value}; choose another --output_dir")


def base_of(config: RunConfig) -> str:
    """Tells one pre-trained base from another."""
    return fingerprint(CheckpointReader(Path(config.base) / "model"))[:12]


def row_of(job: Job, name: str, **values) -> dict:
    return job._asdict() | values | {"method": name}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def execute(job: Job, config: RunConfig) -> list[dict]:
    """`outcome`, with what train.py and evaluate.py say in the job's log; leaves no weights behind."""
    with in_its_place(job, Path(config.output_dir)):
        return outcome(job, config)


# ---------------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------------


def pending(config: RunConfig, rows: list[dict]) -> list[Job]:
    """The jobs of all stages that have no result and need none that is missing: readings of the base, then the longest
    first, so that those that end last are short and the other processes wait least."""
    jobs = remaining((job for stage in config.stages.split(",") for job in STAGES[stage](config, rows)), rows)
    length = lambda job: job.samples * config.epochs_of(job.samples) if job.samples else float("inf")
    return sorted(jobs, key=length, reverse=True)


def prepare(config: RunConfig) -> None:
    """Folders, the file of questions, and the expanded bases for Llama-Pro.

    Raises:
        UserError: --base is not what pretrain.py makes.
    """
    base, out = Path(config.base), Path(config.output_dir)
    missing = [name for name in ("model", *(f"{split}.jsonl" for split in SPLITS)) if not (base / name).exists()]
    if missing:
        raise UserError(
            f"--base {base}: has no {', '.join(missing)}; make it with experiments/orca_math_mini/pretrain.py"
        )
    test, validation, train_rows = (read_rows(base / f"{split}.jsonl") for split in SPLITS)
    if max(config.numbers) > len(train_rows):
        raise UserError(f"--sizes {config.sizes}: {base} has {len(train_rows)} training problems")
    (out / "work").mkdir(parents=True, exist_ok=True)
    write_jsonl(config.heldout, test + validation + train_rows[:SHOTS])  # shots are what is not asked
    with logged(out / "logs" / "expansion.log"):
        for method in filter(lambda method: method.new_blocks, config.methods.values()):
            source, target = str(base / "model"), str(config.expanded(method))
            expand(Expansion(source, target, num_new_blocks=method.new_blocks, overwrite=True))


def announce(row: dict) -> None:
    job = Job(*(row[name] for name in Job._fields))
    if row["exact_match"] is None:
        print(f"{job}: {row['error']}", flush=True)
        return
    low, high = row["interval_95"]
    trained = f", {row['train_seconds']:.0f} s, {row['train_peak_gib']:.2f} GiB" if "steps" in row else ""
    print(f"{job}: {row['exact_match']:.1%} ({low:.1%} to {high:.1%}), validation {row['validation']:.1%}{trained}")


def main(config: RunConfig) -> None:
    out = Path(config.output_dir)
    path = out / RESULTS
    found_before = read_rows(path)
    check_settings(config, found_before)
    prepare(config)
    others = {row["base"] for row in found_before} - {base_of(config)}
    if others:
        print(f"note: {path} has results of other bases ({', '.join(sorted(others))}); they are kept and not run again")
    deadline = time.monotonic() + 60 * config.budget_minutes if config.budget_minutes else float("inf")
    left = lambda: pending(config, read_rows(path))
    print(f"{len(left())} runs to do; those at the best learning rates follow", flush=True)
    how = dict(processes=config.processes, announce=announce, deadline=deadline)
    carry_out(left, partial(execute, config=config), path, **how)
    missing = len(left())
    if missing and time.monotonic() > deadline:
        print(f"{missing} runs left when the time was over; start the same command again", flush=True)
    elif missing:
        raise UserError(f"{missing} runs failed; {out / 'logs'} says why, the same command tries again")


if __name__ == "__main__":
    try:
        main(parse(RunConfig, prog="run.py", description=__doc__))
    except UserError as error:
        fail(error)
