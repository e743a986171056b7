"""Is it right here? The first blocks of your model on this machine: several processes against one, fast code against
plain, what is saved against what was trained, memory against the plan. A table of what passes, in minutes.

    python scripts/self_test.py --model demo --device cpu
    python scripts/self_test.py --model meta-llama/Llama-3.1-8B --processes 2 --train_type bnb_dora

Each check is a train.py of its own on the model's own weights, cut to `--blocks` blocks; run it before a week of GPUs
is rented, and after torch or a driver has changed. It ends with 1 if a check fails.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fsdp_utils.core.flags import flag, parse_or_fail
from methods import TRAIN_TYPES


@dataclass
class SelfTest:
    """What to try."""

    model: str = flag("demo", "hub name or local folder; `demo` is the built-in model")
    train_type: str = flag("bnb_dora", "how it is adapted", choices=tuple(TRAIN_TYPES))
    processes: int = flag(0, "processes to compare with one; 0: as many as there are GPUs, at least 2", minimum=0)
    blocks: int = flag(2, "of the model, from the first", minimum=1)
    context_length: int = flag(256, "longest row in tokens", minimum=16)
    device: str = flag("auto", "where to compute", choices=("auto", "cuda", "cpu"))

    def errors(self) -> list[str]:
        pro = TRAIN_TYPES[self.train_type].method == "llama_pro"
        return [
            *([f"--train_type {self.train_type}: needs an expanded model; try custom_qlora or full"] if pro else []),
            *(["--processes 1: one is compared with several; pass 2 or more, or 0"] if self.processes == 1 else []),
        ]


if __name__ == "__main__":  # before the libraries, which take seconds: --help and a wrong flag are answered at once
    CONFIG = parse_or_fail(SelfTest, prog="self_test.py", description=__doc__)

import torch
from safetensors.torch import save_file

from fsdp_utils.core.devices import pick_device
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.folders import model_folder
from fsdp_utils.core.processes import command
from fsdp_utils.core.ranks import fail, say
from fsdp_utils.core.safetensors_io import CheckpointReader
from fsdp_utils.folders.opening import PLANNED
from fsdp_utils.model.build import read_raw_config, resolve_model
from fsdp_utils.tasks import named_task, task_of_model

ROOT = Path(__file__).resolve().parents[1]
STEPS, TOLERANCE = 4, 1e-4
OF_MEMORY, SMALL = 0.05, 0.1  # how far a plan may be off: of what was measured, or GiB, whichever is more
COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "encoder_layers", "decoder_layers")


class Check(NamedTuple):
    """A line of the table; `passed`: None where it could not be tried."""

    name: str
    passed: bool | None
    found: str


def cut(model: str, blocks: int, folder: Path) -> Path:
    """A folder with the first blocks of a model, with its embedding, head and tokenizer. Nothing is dropped in it:
    processes draw numbers of their own.

    Raises:
        UserError: no weights are there, or it is a classifier.
    """
    source = model_folder(resolve_model(model))
    if not any(source.glob("*.safetensors")):
        raise UserError(f"--model {model}: has no safetensors to test with; name a model with weights, or demo")
    task = task_of_model(read_raw_config(str(source)))
    if not named_task(task).writes:
        raise UserError(f"--model {model}: is for {task}, and what is tried here are models that write")
    shutil.copytree(
        source, folder, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*", "*.pth", "*.gguf", ".git")
    )
    config = json.loads((folder / "config.json").read_text())
    for shape in (config, config.get("text_config") or {}):
        shape.update({name: min(shape[name], blocks) for name in COUNTS if shape.get(name)})
        shape.update({name: 0.0 for name, value in shape.items() if "drop" in name and isinstance(value, float)})
        if shape.get("layer_types"):
            shape["layer_types"] = shape["layer_types"][:blocks]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    reader = CheckpointReader(source)
    number = lambda name: int((re.search(r"\.(\d+)\.", name) or [0, 0])[1])
    tensors = {name: reader.tensor(name).clone() for name in reader.names() if number(name) < blocks}
    save_file(tensors, folder / "model.safetensors", metadata=dict(format="pt"))
    return folder


def launched(words: list[str], *, processes: int) -> subprocess.CompletedProcess:
    """A train.py, by torchrun if there are several processes."""
    return subprocess.run([*command(ROOT / "train.py", processes=processes), *words], capture_output=True, text=True)


class Runs:
    """Runs of train.py on the cut model; each in a folder of its own."""

    def __init__(self, config: SelfTest, folder: Path, *, processes: int):
        self.folder, self.processes, model = folder, processes, cut(config.model, config.blocks, folder / "model")
        self.common = dict(model_name=model, dataset="demo", train_type=config.train_type, device=config.device)
        self.common |= dict(context_length=config.context_length, max_steps=STEPS, lora_dropout=0, lr=1e-4, seed=1)
        self.common |= dict(use_cpu_offload=False, eval_samples=16, precision="fp32", overwrite=True)

    def __call__(self, name: str, *, processes: int = 1, **flags) -> tuple[list[dict], str]:
        """The rows of metrics.jsonl, and what was said.

        Raises:
            UserError: it failed; with its error, or the end of what it said.
        """
        output = self.folder / name
        flags = self.common | dict(batch_size=2 * self.processes // processes, output_dir=output) | flags
        words = [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in flags.items()]
        done = launched(words, processes=processes)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")][-1:]
            raise UserError(
                f"{name}: train.py ended with {done.returncode}: " + "\n".join(said or lines[-25:] or ["no word"])
            )
        return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()], done.stdout


def numbers(rows: list[dict]) -> list[float]:
    """Losses and gradient norms of the steps, and the loss of the validation."""
    return [row[name] for row in rows for name in ("loss", "grad_norm", "eval_loss") if name in row]


def alike(name: str, ours: list[float], theirs: list[float]) -> Check:
    """Whether the numbers of two runs differ by less than TOLERANCE of each."""
    apart = max(abs(a - b) / max(abs(a), 1e-9) for a, b in zip(ours, theirs, strict=True))
    return Check(name, apart <= TOLERANCE, f"{apart:.1e} apart (at most {TOLERANCE:.0e})")


def checks(config: SelfTest, runs: Runs):
    """Each as soon as it is known."""
    one, _ = runs("one", save_model=True)
    several, _ = runs("several", processes=runs.processes)
    yield alike(f"1 process and {runs.processes}", numbers(one), numbers(several))
    plain, _ = runs("plain", fused_kernels=False, fused_loss=False, compile=False, cuda_graphs=False)
    yield alike("fast and plain code", numbers(one), numbers(plain))
    full = TRAIN_TYPES[config.train_type].method == "full"
    source = dict(model_name=runs.folder / "one") if full else dict(init_adapter=runs.folder / "one")
    # one step that moves nothing: the loss of what was saved, on the same rows
    saved, _ = runs("saved", max_steps=1, lr=1e-12, **source)
    ends = [[row["eval_loss"] for row in rows if "eval_loss" in row][-1] for rows in (one, saved)]
    yield alike("in memory and saved", ends[:1], ends[1:])
    yield memory(runs)


def memory(runs: Runs) -> Check:
    """The planned peak against that of full rows in bf16; GPUs only."""
    name = "memory and plan"
    if pick_device(runs.common["device"]).type != "cuda":
        return Check(name, None, "there is no GPU to measure")
    _, said = runs("memory", precision="bf16", packing=True)
    found = PLANNED.search(said)
    if not found:
        return Check(name, None, "the run told no plan")
    planned, measured = map(float, found.groups())
    off = planned / measured - 1
    return Check(
        name,
        abs(planned - measured) <= max(OF_MEMORY * measured, SMALL),
        f"{planned:.2f} and {measured:.2f} GiB, {off:+.1%} (at most {OF_MEMORY:.0%} or {SMALL} GiB)",
    )


def main(config: SelfTest) -> None:
    begun, failed = time.perf_counter(), 0
    processes = config.processes or max(torch.cuda.device_count() if config.device != "cpu" else 0, 2)
    folder = Path(tempfile.mkdtemp(prefix="self_test_"))
    try:
        runs = Runs(config, folder, processes=processes)
        say(f"{config.model}, {config.train_type}, {config.blocks} blocks, {STEPS} steps of {2 * processes} rows")
        for check in checks(config, runs):
            word = {True: "pass", False: "FAIL", None: "skip"}[check.passed]
            say(f"{word}  {check.name:24s} {check.found}")
            failed += check.passed is False
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    say(f"{time.perf_counter() - begun:.0f} s")
    if failed:
        raise UserError(f"{failed} of the checks failed; do not trust a run on this machine before you know why")


if __name__ == "__main__":
    try:
        main(CONFIG)
    except UserError as error:
        fail(error)
