"""Flags that fit a machine: for each way to keep activations the largest batch, the fastest first."""

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from functools import cached_property
from itertools import count, islice, takewhile
from typing import NamedTuple

from tqdm import tqdm

from fsdp_utils.core.errors import DataError, UserError
from fsdp_utils.data.parts import readers
from fsdp_utils.memory.activations import Kept, measure
from fsdp_utils.model.assemble import Plan
from fsdp_utils.model.prequantized import settings_of
from fsdp_utils.planning.forecast import Forecast, forecast, split_for
from fsdp_utils.planning.machines import CARDS, Machine, machine_of
from fsdp_utils.planning.report import planned_for
from fsdp_utils.planning.seconds import seconds_a_step
from fsdp_utils.sharding.wrapping import check_policy

BATCHES = (1, 2, 4, 8, 16, 32, 64)
# how activations are kept, the fastest first where there is room
WAYS = (
    dict(use_gradient_checkpointing=False),
    dict(checkpoint_policy="products"),
    dict(checkpoint_policy="narrow"),
    dict(checkpoint_policy="narrow", use_activation_cpu_offload=True),
    dict(),
    dict(use_activation_cpu_offload=True),
)
# where none of these fits; of families that bear it
TILED = dict(use_activation_cpu_offload=True, tile_tokens=8192)
# where weights are; the next one is tried where nothing fits
SMALLER = dict(quantize_lm_head=True, quant_scales="double")
PLACES = (dict(use_cpu_offload=False), dict(use_cpu_offload=False) | SMALLER, dict(use_cpu_offload=True) | SMALLER)
MOST_GPUS, SHORTEST = 64, 128


def _each(found: Iterable[dict]) -> list[dict]:
    """Once."""
    kept = []
    for flags in found:
        if flags not in kept:
            kept.append(flags)
    return kept


class Choice(NamedTuple):
    """`flags`: besides those that were given; `tokens_per_s`: of the whole machine, None where it is not known."""

    flags: dict
    found: Forecast
    tokens_per_s: float | None


class Unmeasured(Exception):
    """What a model keeps for backward cannot be told. Of a run, whose flags a person chose, that is only noted."""


class Search:
    """Of one model on one machine; each placement is planned once. Flags that were given stay as they are.

    Args:
        host: bytes of memory that the machine has beside its GPUs.
    """

    def __init__(self, config, machine: Machine, *, host: float = math.inf):
        self.config, self.machine, self.host, self.plans, self.kept = config, machine, host, {}, {}
        self.batches = BATCHES if self._free(dict(batch_size=1)) else (config.batch_size,)
        self.ways = _each(self._free(way) for way in WAYS)
        self.tiled = [self._free(TILED)] if config.row_tokens > TILED["tile_tokens"] else []
        split_for(replace(config, **self._free(dict(batch_size=1))), machine)  # refuses what no batch can make

    def _free(self, flags: dict) -> dict:
        """Those that were not given."""
        return {name: value for name, value in flags.items() if name not in self.config.explicit_flags}

    def _planned(self, flags: dict) -> Plan:
        changing = tuple(sorted((name, value) for name, value in flags.items() if name in (*SMALLER, "tile_tokens")))
        if changing not in self.plans:
            with redirect_stdout(None) if self.plans else nullcontext():  # what is noted of a model, once
                self.plans[changing] = planned_for(replace(self.config, **flags), self.machine)
        return self.plans[changing]

    def _measure(self, model, blocks: dict, config, **how) -> Kept:
        """What only these flags of a search change is measured once: it is most of a search's time."""
        asked = id(model), config.batch_size, config.row_tokens, config.checkpoint_policy
        if asked not in self.kept:
            try:
                self.kept[asked] = measure(model, blocks, config, **how)
            except UserError as error:
                raise Unmeasured(f"{self.config.source}: {error}, so what fits is not known") from error
        return self.kept[asked]

    def tried(self, flags: dict, machine: Machine | None = None) -> Choice | None:
        """What these flags make of it, here or on another machine; None where it does not fit, where no number of such
        batches makes `--global_batch_size`, or where flags or family do not go with them."""
        machine = machine or self.machine
        try:
            config = split_for(replace(self.config, **flags), machine)
        except DataError:
            return None
        if config.errors():  # with flags that were given
            return None
        try:
            planned = self._planned(flags)
            with redirect_stdout(None):  # what `auto` decides in each
                found = forecast(planned, config, machine, measure=self._measure)
        except (UserError, Unmeasured) as error:
            if "tile_tokens" in flags:  # a family whose layers cannot be cut into tiles
                return None
            raise UserError(str(error)) from error
        if not found.fits(machine) or sum(found.host.values()) * machine.gpus > self.host:
            return None
        try:
            check_policy(planned.model, config, device=machine.device)
        except UserError:
            return None
        seconds = seconds_a_step(planned, config, machine, found)
        rows = config.batch_size * config.gradient_accumulation_steps * readers(config, machine.gpus)
        tokens = rows * config.context_length
        return Choice(flags, found, seconds and tokens / seconds)

    def _largest(self, flags: dict) -> Choice | None:
        """With the largest batch that fits."""
        best = None
        for batch in self.batches:
            choice = self.tried(flags | self._free(dict(batch_size=batch)))
            if choice is None:
                return best
            best = choice
        return best

    @cached_property
    def places(self) -> list[dict]:
        """Those that mean something for this train type."""
        quantizes = self.config.quantizer != "none"
        double = self.config.takes_double_scales and not settings_of(self._planned({}).model.config)
        meant = lambda name: name not in SMALLER or (quantizes and (name != "quant_scales" or double))
        return _each({name: v for name, v in self._free(place).items() if meant(name)} for place in PLACES)

    def choices(self) -> list[Choice]:
        """Those that fit, the fastest first; of placements the first with any."""
        for place in self.places:
            for ways in (self.ways, self.tiled):
                bar = tqdm(ways, desc="trying", unit="way", leave=False, disable=None)  # long rows take seconds each
                found = [choice for way in bar if (choice := self._largest(place | way))]
                if found:
                    # where speeds are not known, as ways are listed
                    order = lambda choice: (-choice.tokens_per_s, choice.found.peak) if choice.tokens_per_s else (0, 0)
                    return sorted(found, key=order)
        return []

    def ways_out(self) -> Iterator[str]:
        """What would fit where nothing does: shorter rows, more of these cards, larger ones."""
        smallest, machine = self.places[-1] | self.ways[-1] | self._free(dict(batch_size=1)), self.machine
        cards = (machine_of(f"{machine.gpus}x{card}", device=machine.device) for card in sorted(CARDS, key=CARDS.get))
        lengths = takewhile(lambda n: n >= SHORTEST, (self.config.context_length // 2**k for k in count(1)))
        several = takewhile(lambda n: n <= MOST_GPUS, (machine.gpus * 2**k for k in count(1)))
        tries = (
            [(f"--context_length {n}", dict(context_length=n), machine) for n in lengths],
            [(str(machine._replace(gpus=n)), {}, machine._replace(gpus=n)) for n in several],
            [(f"{m.gpus} x {m.card} ({CARDS[m.card]} GiB)", {}, m) for m in cards if m.memory > machine.memory],
        )
        for ways in tries:
            fits = lambda flags, there: any(self.tried(smallest | way | flags, there) for way in ({}, *self.tiled))
            yield from islice((words for words, flags, there in ways if fits(flags, there)), 1)
