"""When a run ends before its last step: a signal, a step, or a time that was named beforehand.

A signal reaches one process, or all of them at different moments. What each has seen is added to the sum that a step
makes anyway, so all learn it in the same step and end after it.
"""

import os
import signal
import sys
import threading
import time
from typing import NamedTuple

from fsdp_utils.core.errors import PREEMPTED
from fsdp_utils.core.ranks import say

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_SECONDS = 1.0  # a launcher passes on what a terminal or scheduler has sent to the whole group


class Stop(NamedTuple):
    reason: str
    code: int  # exit code of the process


class Stopping:
    """Catches signals while its context lasts, and decides with the other processes when to end.

    Before the first step there is nothing to save: then a signal ends the process at once. So does a second signal.
    """

    def __init__(self, config):
        self.at_step, self.after_seconds = config.stop_at_step, 60 * config.stop_after_minutes
        self.begun, self.steps = time.monotonic(), 0
        self.caught: int | None = None
        self.caught_at = 0.0
        self.before = {}

    def __enter__(self) -> "Stopping":
        # Python runs a handler only between two of its own instructions, not while a collective waits; what is
        # written to this pipe is read at once, by a thread
        listening, told = os.pipe()
        os.set_blocking(told, False)
        self.told, self.told_before = told, signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        self.listener = threading.Thread(target=self._listen, args=(listening,), daemon=True)
        self.listener.start()
        self.before = {number: signal.signal(number, lambda number, frame: None) for number in SIGNALS}
        # a pool that tokenizes ends its forked workers by SIGTERM, which this process would hear through the pipe
        os.register_at_fork(after_in_child=self._let_go)
        return self

    def __exit__(self, *exception) -> None:
        self._let_go()

    def _let_go(self) -> None:
        """Signals do again what they did before; once."""
        before, self.before = self.before, {}
        for number, handler in before.items():
            signal.signal(number, handler)
        if before:
            signal.set_wakeup_fd(self.told_before)
            os.close(self.told)  # the listener reads the end

    def _listen(self, listening: int) -> None:
        while numbers := os.read(listening, 64):
            for number in numbers:
                if number in SIGNALS:
                    self._catch(number)
        os.close(listening)

    def _catch(self, number: int) -> None:
        now = time.monotonic()
        if self.caught is not None and now - self.caught_at < SAME_SECONDS:
            return
        if self.steps == 0 or self.caught is not None:
            print(f"ended by {signal.Signals(number).name}", file=sys.stderr, flush=True)
            os._exit(PREEMPTED)
        self.caught, self.caught_at = number, now

    def votes(self) -> list[float]:
        """What this process adds to the sums of the next step."""
        late = self.after_seconds and time.monotonic() - self.begun > self.after_seconds
        return [float(self.caught is not None), float(bool(late))]

    def after(self, number: int, votes: list[float]) -> Stop | None:
        """Whether the run ends after step `number`, from the sums of `votes`."""
        self.steps += 1
        caught, late = votes
        if caught:
            name = signal.Signals(self.caught).name if self.caught else "a signal to another process"
            return Stop(f"stopped by {name}", PREEMPTED)
        if late:
            return Stop("stopped by --stop_after_minutes", 0)
        if number == self.at_step:
            return Stop("stopped by --stop_at_step", 0)
        return None


def announce(stop: Stop, number: int, kept: str | None) -> None:
    """Says where the run ended and how it goes on."""
    say(f"{stop.reason} after step {number}; " + (f"--resume auto goes on from {kept}" if kept else "nothing was kept"))
