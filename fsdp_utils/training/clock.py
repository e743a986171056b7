"""How fast a run is and how long it still takes, without the steps that compile."""

import time
from collections.abc import Iterable, Iterator

import torch

from fsdp_utils.core.devices import synchronize
from fsdp_utils.core.ranks import say, world_size
from fsdp_utils.data.batches import tokens_in


class Compiling:
    """Counts what is compiled or captured in this process, and says at the first time what is being waited for."""

    def __init__(self):
        self.count = 0
        torch._dynamo.callback_handler.register_start_callback(self.begins)

    def begins(self, _=None) -> None:
        if not self.count:
            say("compiling blocks: the first step takes up to half a minute")
        self.count += 1

    def close(self) -> None:
        if self.begins in torch._dynamo.callback_handler.start_callbacks:  # a reset of the compiler forgets them
            torch._dynamo.callback_handler.remove_start_callback(self.begins)


class Clock:
    """Speed of a run, and the time that it has left. The first step (allocator, lazy initialisation) and steps that
    compile count in neither.

    Args:
        steps: that are still to be taken.
        meter: a `flops.Meter`, or None.
    """

    def __init__(self, device: torch.device, *, steps: int, meter=None):
        self.device, self.steps, self.meter = device, steps, meter
        self.taken = self.counted = self.compiled = self.tokens = 0
        self.seconds = self.between = self.used = 0.0  # of counted steps; after them; of the peak, in seconds
        self.counts = False

    def timed(self, batches: Iterable) -> Iterator:
        """The batches of the steps. What happens before the next is asked for, as a validation, is no part of a step,
        but of the time left."""
        self.begun = time.perf_counter()
        for micro_batches in batches:
            yield micro_batches
            now = time.perf_counter()
            self.between += (now - self.ended) * self.counts
            self.begun = now

    def step(self, micro_batches: list[dict[str, torch.Tensor]], *, compiled: bool) -> dict:
        """What is logged of the step that has been taken: `tokens_per_s` of all processes, `mfu` and `hfu` where they
        are known, `seconds_left`, and `compiled` of a step that did."""
        synchronize(self.device)
        self.ended = time.perf_counter()
        seconds, tokens = self.ended - self.begun, sum(map(tokens_in, micro_batches)) * world_size()
        row = dict(tokens_per_s=tokens / seconds)
        row |= self.meter(micro_batches, seconds) if self.meter else {}
        self.taken += 1
        self.compiled += compiled
        self.counts = self.taken > 1 and not compiled
        if self.counts:
            self.counted, self.tokens, self.seconds = self.counted + 1, self.tokens + tokens, self.seconds + seconds
            self.used += row.get("mfu", 0) * seconds
        if self.counted:
            row["seconds_left"] = (self.steps - self.taken) * (self.seconds + self.between) / self.counted
        return row | (dict(compiled=True) if compiled else {})

    def said(self, peak_gib: float) -> str:
        """The last line of a run."""
        peak = f"peak {peak_gib:.2f} GiB"
        if not self.counted:
            return f"tokens/s: not measured, as the first step and those that compile do not count; {peak}"
        mean = self.tokens / self.seconds
        share = f", MFU {self.used / self.seconds:.1%}" if self.meter else ""
        apart = f"; {self.compiled} of {self.taken} steps compiled and do not count" if self.compiled else ""
        return f"tokens/s: {mean:.0f} ({mean / world_size():.0f} per process){share}, {peak}{apart}"
