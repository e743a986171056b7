"""Machines to plan for: this one, or `--plan_gpus 2x24`."""

import re
from typing import NamedTuple

import torch

from fsdp_utils.core.devices import GIB
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.ranks import world_size

# GiB of cards that are often asked for, the fastest of each size first
CARDS = {
    "B200": 180, "H200": 141, "H100": 80, "A100": 80, "L40S": 48, "L40": 48, "RTX A6000": 48, "A40": 48, "RTX 5090": 32,
    "RTX 4090": 24, "A10": 24, "L4": 24, "A10G": 24, "RTX 3090": 24, "T4": 16,
}  # fmt: skip


WITHOUT_FP8 = ("A100", "RTX A6000", "A40", "A10", "A10G", "RTX 3090", "T4")  # products of 8-bit floats
MOST = 100_000  # GPUs
NAMES_FROM = 1000  # a 4090 is no card of so many GiB


class Machine(NamedTuple):
    """Processes of one host, each with a GPU.

    Args:
        memory: bytes of a GPU; None where there is none to fill.
        card: what it is, or is taken for, as `peak_of` knows it.
    """

    gpus: int
    memory: int | None
    device: torch.device
    card: str

    def __str__(self) -> str:
        if self.memory is None:
            return f"{self.gpus} process{'es' * (self.gpus > 1)} on a CPU"
        return f"{self.gpus} x {round(self.memory / GIB, 1):g} GiB"


def likely_card(gib: float) -> str:
    """The fastest known card of the smallest size that has so much; the largest where none has."""
    enough = [name for name, size in CARDS.items() if size >= 0.97 * gib]
    return min(enough, key=CARDS.get) if enough else max(CARDS, key=CARDS.get)


def machine_of(text: str | None, *, device: torch.device, flag: str = "plan_gpus") -> Machine:
    """`2x24`: two GPUs of 24 GiB; `4xH100`: four of a known card; None: those of this run. `flag`: where it was given.

    Raises:
        UserError: it is neither.
    """
    if text is None:
        here = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
        return Machine(world_size(), here and here.total_memory, device, here.name if here else "cpu")
    found = re.fullmatch(r"\s*(\d+)\s*x\s*(.+?)\s*", text, re.IGNORECASE)
    count, what = (int(found[1]), found[2]) if found else (0, "")
    size = float(what) if re.fullmatch(r"\d+(\.\d+)?", what) else None
    if size is not None and size < NAMES_FROM:
        gib, card = size, likely_card(size)
    else:
        # whole words: an L4 is no L40S
        card = next((name for name in CARDS if what.lower() in (name.lower(), name.lower().split()[-1])), None)
        gib = CARDS.get(card, 0)
    if not 0 < count <= MOST or not gib:
        known = ", ".join(CARDS)
        raise UserError(f"--{flag} {text}: write how many and how many GiB, as 2x24, or a card, as 4xH100 ({known})")
    return Machine(count, int(gib * GIB), torch.device("cuda", 0), card)
