"""What fits on these cards, and how fast: sets of flags as commands to paste, the fastest first.

    python scripts/plan.py --model meta-llama/Llama-3.1-8B --gpus 1x24 --context_length 2048 --train_type bnb_dora
    python scripts/plan.py --model Qwen/Qwen3-32B --gpus 2x24 --extra lora_rank=16

Only the model's config.json is read. Speeds are estimates, to compare with; memory is within 5 % (docs/planning.md).
Where nothing fits, it says what would.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fsdp_utils.config import TrainConfig
from fsdp_utils.core.flags import flag, parse, parse_or_fail
from methods import TRAIN_TYPES

NO_PART = ("plan", "plan_gpus", "config", "save_config", "show_rows")  # of a run that is planned


@dataclass
class PlanConfig:
    """What to plan for."""

    model: str = flag("demo", "hub name or local folder; `demo` is the built-in model")
    gpus: str = flag("1x24", "how many cards of how many GiB, as 2x24, or of which name, as 4xH100")
    context_length: int = flag(2048, "longest sample in tokens", minimum=2)
    train_type: str = flag("bnb_dora", "how the model is adapted", choices=tuple(TRAIN_TYPES))
    extra: str = flag("", "other flags of train.py: lora_rank=16,lora_target_modules=all,experts")
    host_gib: float = flag(0.0, "memory of the machine beside its GPUs; 0: as much as it takes", minimum=0.0)
    best: int = flag(5, "how many to show", minimum=1)

    def errors(self) -> list[str]:
        wrong = [part for part in self.given if "=" not in part]
        names = {part: part.partition("=")[0] for part in self.given}
        own = [part for part, name in names.items() if name in ("train_type", "context_length", "model_name")]
        other = [part for part, name in names.items() if name in NO_PART]
        return [
            *(f"--extra {part}: write name=value, with commas between several" for part in wrong),
            *(f"--extra {part}: has a flag of its own; see --help" for part in own),
            *(f"--extra {part}: is no part of what a run takes; leave it away" for part in other),
        ]

    @property
    def given(self) -> list[str]:
        """Each `name=value`; what has no name belongs to the list before it."""
        found = []
        for part in (part.strip() for part in self.extra.split(",") if part.strip()):
            if "=" in part or not found:
                found.append(part)
            else:
                found[-1] += f",{part}"
        return found


if __name__ == "__main__":  # before the libraries, which take seconds: --help and a wrong flag are answered at once
    CONFIG = parse_or_fail(PlanConfig, prog="plan.py", description=__doc__)

import torch

from fsdp_utils.core.devices import GIB
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.ranks import fail, say
from fsdp_utils.planning.machines import Machine, machine_of
from fsdp_utils.planning.report import gib, parts
from fsdp_utils.planning.search import Choice, Search


def train_flags(config: PlanConfig) -> TrainConfig:
    """Those of train.py that are the same in every set."""
    words = [f"--model_name={config.model}", f"--context_length={config.context_length}"]
    words += [f"--train_type={config.train_type}", *(f"--{part}" for part in config.given)]
    return parse(TrainConfig, words, prog="plan.py")


def command(choice: Choice, config: PlanConfig, machine: Machine) -> str:
    """To paste."""
    start = "python" if machine.gpus == 1 else f"torchrun --nproc_per_node {machine.gpus}"
    words = [f"--model_name {config.model}", f"--train_type {config.train_type}"]
    words += [f"--context_length {config.context_length}", *(f"--{part.replace('=', ' ')}" for part in config.given)]
    shown = lambda value: str(value).lower() if isinstance(value, bool) else value
    words += [f"--{name} {shown(value)}" for name, value in choice.flags.items()]
    return f"{start} train.py {' '.join(words)}"


def told(choice: Choice, machine: Machine) -> str:
    """Speed and memory in one line."""
    speed = f"about {choice.tokens_per_s:,.0f} tokens/s, " if choice.tokens_per_s else ""
    host = sum(choice.found.host.values()) * machine.gpus
    of = f"{gib(choice.found.peak)} of {gib(machine.memory)} GiB of each card ({parts(choice.found.sizes)})"
    return f"{speed}{of}, {gib(host)} GiB of host memory"


def main(config: PlanConfig) -> None:
    machine = machine_of(config.gpus, device=torch.device("cpu"), flag="gpus")
    flags = train_flags(config)
    search = Search(flags, machine, host=config.host_gib * GIB or math.inf)
    choices = search.choices()
    if not choices:
        out = list(search.ways_out())
        raise UserError(
            f"--gpus {config.gpus}: nothing fits with rows of {config.context_length} tokens; would fit: "
            + ("; ".join(out) if out else f"none of the known cards up to {machine.gpus} x 180 GiB")
        )
    for note in replace(flags, **choices[0].flags).notes():
        say(f"note: {note}")
    if choices[0].tokens_per_s is None:
        say("note: no speeds are estimated for such a model; those with more room for activations come first")
    for number, choice in enumerate(choices[: config.best], 1):
        say(f"{number}. {told(choice, machine)}", f"   {command(choice, config, machine)}", sep="\n")


if __name__ == "__main__":
    try:
        main(CONFIG)
    except UserError as error:
        fail(error)
