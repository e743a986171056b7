"""What each component costs and saves alone, against one baseline of adapters and one of full fine-tuning, in one run.

python benchmarks/components.py --json components.jsonl
python benchmarks/components.py --shape tiny --full_shape tiny --rows 1x64 --only optimizer
"""

import argparse
import gc
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.common import SHAPES, Run, make_config, write_config, write_results
from benchmarks.throughput import parse_row
from fsdp_utils.core import processes
from fsdp_utils.core.errors import first_line
from fsdp_utils.core.ranks import say
from fsdp_utils.options import OPTIMIZERS, POLICIES


class Component(NamedTuple):
    """`flags` besides the baseline's; `one_row`: measured with one row, beside a baseline of its own."""

    flags: dict
    one_row: bool = False

    def __str__(self) -> str:
        said = [f"`--{name} {str(value).lower()}`" for name, value in self.flags.items()] or ["baseline"]
        return " ".join(said) + (" (one row)" if self.one_row else "")


def each(*pairs: tuple[str, tuple]) -> list[Component]:
    return [Component({name: value}) for name, values in pairs for value in values]


PRECISION = {True: "bf16_autocast", False: "bf16"}  # fp32 weights only where an optimizer needs them
OPTIMIZERS_ALONE = [Component(dict(optimizer=n, precision=PRECISION[row.needs_fp32])) for n, row in OPTIMIZERS.items()]
ADAPTERS = [
    Component({}),
    *each(("precision", ("bf16_autocast",)), ("checkpoint_policy", [*POLICIES][1:])),
    *each(("use_activation_cpu_offload", (True,)), ("gradient_accumulation_steps", (4,))),
    Component(dict(use_activation_cpu_offload=True, checkpoint_policy="narrow")),  # as the README recommends
    *each(("train_type", ("lora", "custom_lora", "qlora", "bnb_dora"))),
    *[Component(dict(train_type="hqq_lora", n_bits=bits)) for bits in (4, 2)],
    *each(("quant_scales", ("double",)), ("quantize_lm_head", (True,)), ("optimizer", ("adamw_8bit", "adamw_int8"))),
    *each(*((name, (False,)) for name in ("fused_loss", "fused_kernels", "compile", "embedding_on_host"))),
    *each(("use_cpu_offload", (True,))),
    *[Component(flags, one_row=True) for flags in ({}, {"use_gradient_checkpointing": False}, {"cuda_graphs": False})],
]
FULL = [
    Component({}),
    *each(("precision", ("bf16_autocast",))),
    *OPTIMIZERS_ALONE,
    *[Component({**component.flags, "optimizer_in_backward": True}) for component in OPTIMIZERS_ALONE],
    *each(("use_cpu_offload", (True,))),
]


def measured(folder: Path, component: Component, baseline: dict, *, row: str) -> dict:
    """What `Run.measure` says, or `failed`: why in one line."""
    batch, length, _ = parse_row(row)
    batch, run = 1 if component.one_row else batch, None
    try:
        run = Run(make_config(folder, **baseline | dict(batch_size=batch, context_length=length) | component.flags))
        return run.measure(batch, length, steps=5, warmup=3)
    except Exception as error:  # the table goes on
        return dict(failed=first_line(error))
    finally:
        if run:
            run.close()
        gc.collect()  # of a run that did not come to be
        torch.cuda.empty_cache()


def table(name: str, components: list[Component], baseline: dict, args, *, shape: str) -> None:
    """Prints each row as soon as it is measured."""
    folder, row = write_config(shape, tempfile.mkdtemp()), args.rows
    say(f"\n{name}: {shape}, {row}, {' '.join(f'--{k} {v}' for k, v in baseline.items())}\n")
    say("| component | peak GiB | tokens/s | GiB of baseline | speed of baseline |\n|---|---|---|---|---|")
    first = {}  # the baseline of as many rows
    for component in components:
        if args.only and component.flags and not any(args.only in flag for flag in component.flags):
            continue
        found = measured(folder, component, baseline, row=row)
        write_results(args.json, [dict(table=name, component=str(component), shape=shape, rows=row, **found)])
        if "failed" in found:
            say(f"| {component} | {found['failed']} | | | |")
            continue
        base = first.setdefault(component.one_row, found)
        peak, speed = found["peak_gib"], found["tokens_s"] / base["tokens_s"]
        held, share = (f"{peak:.2f}", f"{peak / base['peak_gib']:.2f}") if peak else ("–", "–")  # a CPU has none
        say(f"| {component} | {held} | {found['tokens_s']:,} | {share} | {speed:.2f} |")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=SHAPES, help="of the model with adapters")
    parser.add_argument("--full_shape", default="1b", choices=SHAPES, help="of the model that trains whole")
    parser.add_argument("--rows", default="4x2048")
    parser.add_argument("--only", default="", help="components one of whose flags has this in its name")
    parser.add_argument("--tables", default="adapters,full")
    parser.add_argument("--json")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    tables = dict(adapters=(ADAPTERS, "custom_qlora", args.shape), full=(FULL, "full", args.full_shape))
    for name in args.tables.split(","):
        components, train_type, shape = tables[name]
        table(name, components, dict(train_type=train_type), args, shape=shape)


if __name__ == "__main__":
    processes.run(main, parse_arguments())
