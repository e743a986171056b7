"""Which weights bear fewer bits: packs one block at a time, sees what that does to the loss on a few samples, and
writes the best plan that fits, which `train.py --bits_plan` takes.

    python scripts/plan_bits.py --model demo --data demo --budget_gib 0.0006 --out plan.json
    python scripts/plan_bits.py --model meta-llama/Llama-3.1-8B --data train.jsonl --budget_gib 4.5 --bits 4,3,2

The budget is that of the whole frozen base, as `train.py` tells it: embedding, head and norms count too. The dense
model has to fit the device. What a plan costs is predicted as the sum of what each block costs alone, and measured at
the end.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fsdp_utils.core.flags import flag, parse_or_fail
from methods import GROUP_SIZES, QUANTIZERS

PACKED_BY = "hqq"  # the quantizer that has several widths


@dataclass
class BitsConfig:
    """What to measure, and how much room there is."""

    model: str = flag("demo", "hub name or local folder; `demo` is the built-in model")
    data: str = flag("demo", "name, file or folder as --dataset of train.py takes it")
    budget_gib: float = flag(0.0, "GiB that the frozen base may take; required", minimum=0.0)
    bits: str = flag("4,3,2", "widths to choose from, with commas between them", several=True)
    by: str = flag("block", "what gets a width of its own", choices=("block", "projection"))
    group_size: int = flag(64, "weights that share one scale", choices=GROUP_SIZES)
    samples: int = flag(16, "rows of the data that the loss is taken on", minimum=1)
    context_length: int = flag(512, "longest sample in tokens", minimum=2)
    precision: str = flag("bf16", "of what is not packed", choices=("bf16", "fp32"))
    device: str = flag("auto", "where to compute", choices=("auto", "cuda", "cpu"))
    out: str = flag("plan.json", "file that is written")
    overwrite: bool = flag(False, "replace a file that is there")
    trust_remote_code: bool = flag(False, "run the code that the model's folder brings (auto_map in its documents)")

    def errors(self) -> list[str]:
        offered = QUANTIZERS[PACKED_BY].bits
        wrong = [word for word in self.bits.split(",") if word.strip() not in map(str, offered)]
        table = (
            (not self.budget_gib, "--budget_gib: required, as 4.5"),
            (wrong, f"--bits {self.bits}: {PACKED_BY} offers {', '.join(map(str, offered))}"),
            (Path(self.out).is_dir(), f"--out {self.out}: is a folder; name a file"),
            (Path(self.out).is_file() and not self.overwrite,
             f"--out {self.out}: is there already; choose another or pass --overwrite true"),
            (not Path(self.out).absolute().parent.is_dir(), f"--out {self.out}: is in no folder; make that first"),
        )  # fmt: skip
        return [line for holds, line in table if holds]

    @property
    def widths(self) -> list[int]:
        """Each once, the widest first."""
        return sorted({int(word) for word in self.bits.split(",")}, reverse=True)


if __name__ == "__main__":  # before the libraries, which take seconds: --help and a wrong flag are answered at once
    CONFIG = parse_or_fail(BitsConfig, prog="plan_bits.py", description=__doc__)

from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from fsdp_utils.config import TrainConfig
from fsdp_utils.core.devices import GIB, pick_device
from fsdp_utils.core.errors import UserError, naming
from fsdp_utils.core.folders import write_json
from fsdp_utils.core.ranks import fail, say
from fsdp_utils.data import sources
from fsdp_utils.data.batches import IGNORED
from fsdp_utils.data.layouts import Reading
from fsdp_utils.data.tokens import tokenize
from fsdp_utils.folders.describe import Run, describe, task_of, tokenizer_of
from fsdp_utils.inference.load import load_for_inference
from fsdp_utils.model.assemble import Dtypes
from methods import method_of
from methods.quantizers.hqq import HQQ
from methods.targets import decoder_blocks

TRAIN_TYPE = "hqq_lora"  # one of those that pack every linear of every block


class Unit(NamedTuple):
    """What gets one width: the linears at these paths, which `pattern` matches in a plan."""

    pattern: str
    paths: list[str]


class Option(NamedTuple):
    """A width of a unit: what it takes, and by how much the loss changes when the unit alone has it."""

    bits: int
    nbytes: int
    change: float


class Choice(NamedTuple):
    """An option for each unit so far; `before`: those of the units before the last."""

    nbytes: int
    change: float
    option: Option | None = None
    before: "Choice | None" = None

    def options(self) -> list[Option]:
        """One for each unit, in order."""
        return [] if self.option is None else [*self.before.options(), self.option]


def best_choice(table: list[list[Option]], room: int) -> Choice | None:
    """Of each unit one option, with the smallest sum of changes whose bytes fit; None where nothing does.

    Exact: of all choices for the first units those are kept that no other beats in both bytes and change. Units are
    alike, so their bytes add up to few different sums, and few choices are kept.
    """
    least = [min(option.nbytes for option in options) for options in table]
    kept = [Choice(0, 0.0)]
    for number, options in enumerate(table):
        left = room - sum(least[number + 1 :])
        grown = [Choice(c.nbytes + o.nbytes, c.change + o.change, o, c) for c in kept for o in options]
        kept = []
        for choice in sorted(grown, key=lambda c: (c.nbytes, c.change)):
            if choice.nbytes <= left and (not kept or choice.change < kept[-1].change):
                kept.append(choice)
    return kept[-1] if kept else None


def units_of(model: nn.Module, by: str) -> list[Unit]:
    """The linears of the decoder blocks, in order.

    Raises:
        UserError: there are none, or stacks of experts beside them.
    """
    paths = method_of(TRAIN_TYPE)(TrainConfig(train_type=TRAIN_TYPE)).packed_in_blocks(model)
    modules = dict(model.named_modules())
    others = [path for path in paths if not isinstance(modules.get(path), nn.Linear)]
    if others or not paths:
        what = f"{others[0]} is no linear" if others else "its blocks have no linears"
        raise UserError(f"{what}, and only those are measured; write a plan by hand")
    if by == "projection":
        return [Unit(path, [path]) for path in paths]
    inside = {block: [path for path in paths if path.startswith(f"{block}.")] for block in decoder_blocks(model)}
    return [Unit(f"{block}.*", paths) for block, paths in inside.items() if paths]


def samples_of(config: BitsConfig, run: Run) -> list[tuple[torch.Tensor, ...]]:
    """Rows that say something, each as the task has it: ids and labels `[tokens]`.

    Raises:
        UserError: data that cannot be read, or without an answer within the context.
    """
    task, place = task_of(run), sources.Place(dataset_split="validation", sole=True)
    if task.labels:
        raise UserError(f"--model {config.model}: is a {task.noun}; give the language model that it is made from")
    examples = sources.held_out_rows(config.data, place=place, reading=Reading(), flag="data")
    shape = dict(reading=Reading(), source=config.data, context_length=config.context_length, coder=task.coder)
    rows, _ = tokenize(examples.first(config.samples), tokenizer_of(run), **shape)
    told = [row for row in rows if (row[1][1:] != IGNORED).any()]
    if not told:
        raise UserError(f"--data {config.data}: no row has an answer within {config.context_length} tokens")
    return told


class Measured:
    """A dense model, of which some linears are packed for a while.

    Args:
        rows: as of `samples_of`.
        quantizers: by width.
    """

    def __init__(self, model: nn.Module, rows: list, *, task, quantizers: dict[int, HQQ]):
        self.model, self.rows, self.task, self.quantizers = model, rows, task, quantizers
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def loss(self) -> float:
        """The mean over all tokens that are learned."""
        total, tokens = 0.0, 0
        for row in self.rows:
            found, wanted = self.task.predictions(self.model, *(tensor.to(self.device) for tensor in row))
            total -= found.gather(1, wanted.unsqueeze(1)).sum().item()
            tokens += len(wanted)
        return total / tokens

    @contextmanager
    @torch.no_grad()
    def packed(self, unit: Unit, bits: int):
        """The unit's weights are what is left of them in so many bits, until the block ends."""
        weights = [self.model.get_submodule(path).weight for path in unit.paths]
        dense = [weight.detach().clone() for weight in weights]
        quantizer = self.quantizers[bits]
        for weight in weights:
            codes = quantizer.quantize(weight)
            weight.copy_(quantizer.dequantize(codes, in_features=weight.shape[1], dtype=weight.dtype))
        try:
            yield
        finally:
            for weight, before in zip(weights, dense, strict=True):
                weight.copy_(before)

    def nbytes(self, unit: Unit, bits: int) -> int:
        """Of the unit's packed weights."""
        shapes = [tuple(self.model.get_submodule(path).weight.shape) for path in unit.paths]
        parts = [part for shape in shapes for part in self.quantizers[bits].layout(*shape).values()]
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in parts)

    def rest(self, units: list[Unit]) -> int:
        """Bytes of what no unit packs: embedding, head, norms, biases."""
        linears = [self.model.get_submodule(path).weight for unit in units for path in unit.paths]
        return sum(p.nbytes for p in self.model.parameters()) - sum(p.nbytes for p in linears)

    def options(self, units: list[Unit], dense_loss: float) -> list[list[Option]]:
        """For each unit what each width takes and costs, by one pass over the rows each."""
        found = [[] for _ in units]
        with tqdm(total=len(units) * len(self.quantizers), desc="measuring", unit="pass") as bar:
            for unit, options in zip(units, found, strict=True):
                for bits in self.quantizers:
                    with self.packed(unit, bits):
                        options.append(Option(bits, self.nbytes(unit, bits), self.loss() - dense_loss))
                    bar.update()
        return found

    def loss_with(self, units: list[Unit], chosen: list[Option]) -> float:
        """Of a whole plan."""
        with ExitStack() as stack:
            for unit, option in zip(units, chosen, strict=True):
                stack.enter_context(self.packed(unit, option.bits))
            return self.loss()


def refuse_widths(model: nn.Module, units: list[Unit], group_size: int) -> None:
    """Raises UserError where a group would cross rows."""
    for path in (path for unit in units for path in unit.paths):
        width = model.get_submodule(path).in_features
        if width % group_size:
            fitting = ", ".join(str(size) for size in GROUP_SIZES if width % size == 0) or "another model"
            raise UserError(f"--group_size {group_size}: does not divide the {width} inputs of {path}; use {fitting}")


def table_lines(units: list[Unit], table: list[list[Option]], chosen: list[Option]) -> list[str]:
    """What each width costs each unit, and which it gets."""
    names = [unit.pattern.removesuffix(".*") for unit in units]
    wide = max(map(len, names))
    costs = "".join(f"{f'{option.bits} bits':>11}" for option in table[0])
    lines = [f"{'change of the loss':{wide}}{costs}{'chosen':>9}{'MiB':>10}"]
    for name, options, option in zip(names, table, chosen, strict=True):
        changes = "".join(f"{o.change:>+11.5f}" for o in options)
        lines.append(f"{name:{wide}}{changes}{option.bits:>9}{option.nbytes / 2**20:>10.2f}")
    return lines


def sums_lines(table: list[list[Option]], rest: int, dense_loss: float) -> list[str]:
    """What one width for all would take, beside which a plan has to be better."""
    lines = []
    for options in zip(*table, strict=True):
        size, change = rest + sum(o.nbytes for o in options), sum(o.change for o in options)
        told = f"{size / GIB:.4f} GiB, predicted loss {dense_loss + change:.4f} ({change:+.4f})"
        lines.append(f"all at {options[0].bits} bits: {told}")
    if change < 0:
        lines.append(
            "note: fewer bits lower the loss on these rows, which the model does not know; give others by --data"
        )
    return lines


def main(config: BitsConfig) -> None:
    device, dtype = pick_device(config.device), Dtypes.of(config.precision).stored
    with naming("--model"):
        run = describe(config.model, trust_remote_code=config.trust_remote_code)
        if run.adapter or run.kind.startswith("stock"):
            raise UserError(f"{run}; name the 16-bit model under it")
    rows = samples_of(config, run)
    model = load_for_inference(run, device=device, dtype=dtype)
    with naming(f"--model {config.model}:"):
        units = units_of(model, config.by)
    refuse_widths(model, units, config.group_size)
    flags = {bits: TrainConfig(n_bits=bits, quant_group_size=config.group_size) for bits in config.widths}
    quantizers = {bits: HQQ.from_config(given, checkpoint_dtype=dtype) for bits, given in flags.items()}
    measured = Measured(model, rows, task=task_of(run), quantizers=quantizers)
    rest = measured.rest(units)
    least = rest + sum(measured.nbytes(unit, config.widths[-1]) for unit in units)
    if least > config.budget_gib * GIB:  # before the minutes that measuring takes
        raise UserError(
            f"--budget_gib {config.budget_gib:g}: {least / GIB:.4f} GiB are the least, {rest / GIB:.4f} of them not "
            "packed; give more, or smaller --bits"
        )
    dense_loss = measured.loss()
    table = measured.options(units, dense_loss)
    best = best_choice(table, int(config.budget_gib * GIB) - rest)
    chosen = best.options()
    settings = dict(group_size=config.group_size, quantizer=PACKED_BY)
    write_json(config.out, {u.pattern: dict(bits=o.bits, **settings) for u, o in zip(units, chosen, strict=True)})
    predicted, real = dense_loss + best.change, measured.loss_with(units, chosen)
    say(
        *table_lines(units, table, chosen),
        *sums_lines(table, rest, dense_loss),
        f"plan: {(rest + best.nbytes) / GIB:.4f} of {config.budget_gib:g} GiB, {rest / GIB:.4f} of them not packed",
        f"loss on {len(rows)} rows: {dense_loss:.4f} dense, {predicted:.4f} predicted with the plan "
        f"({best.change:+.4f}), {real:.4f} measured ({real - dense_loss:+.4f})",
        f"{config.out}: written; train with --train_type hqq_dora --bits_plan {config.out}",
        sep="\n",
    )


if __name__ == "__main__":
    try:
        main(CONFIG)
    except UserError as error:
        fail(error)
