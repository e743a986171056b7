"""What a packed weight is: codes and scales laid out row by row, and the quantizer that reads them."""

import json
from dataclasses import asdict
from functools import lru_cache
from typing import Protocol

import torch

from fsdp_utils.core.classes import load_class

# fully_shard of torch 2.11 refuses frozen integer parameters, so bytes are stored under a 1-byte float dtype.
# They are only ever viewed as uint8, copied and gathered; no arithmetic touches the float view.
STORED_BYTES = torch.float8_e4m3fn


class Quantizer(Protocol):
    """What a backend provides: a frozen dataclass whose fields are JSON values, and a row of `methods.QUANTIZERS`.

    `packed` is a tuple of two or three tensors in the order of `layout`, each with a row for each row of the weight.

    Attributes:
        bits: of a code.
        group_size: weights of a row that share a scale; it divides the row.
    """

    bits: int
    group_size: int

    @classmethod
    def from_config(cls, config, *, checkpoint_dtype: torch.dtype) -> "Quantizer": ...

    def at(self, path: str) -> "Quantizer":
        """How the module at a path is stored: one quantizer does it alike for all, `methods.bits.Mixed` do not."""
        return self

    def layout(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of each parameter; dim 0 is always `rows`."""

    def quantize(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`[n, in]` in any float dtype to packed tensors with n rows. Rows must not influence one another."""

    def dequantize(self, packed, *, in_features: int, dtype: torch.dtype, row_factor=None, out=None) -> torch.Tensor:
        """`[n, in_features]` in `dtype`, exactly as the forward pass uses it.

        Args:
            packed: tuple of tensors with n rows.
            row_factor: fp32 `[n]`, what each row is multiplied by, or None.
            out: where to write, `[n, in_features]` with any row stride, or None for a new tensor.
        """

    def row_peaks(self, packed) -> torch.Tensor:
        """What no weight of a row is larger than, fp32 `[n]`, from the scales alone."""

    def row_norms(self, packed, weight_norm, lora_a, lora_b, scaling: float) -> torch.Tensor | None:
        """`methods.dora.row_norms` straight from packed rows, or None where there is no such way: the default."""
        return None


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The uint8 view of stored bytes."""
    return tensor.view(torch.uint8)


def spec_of(quantizer: Quantizer) -> str:
    """A quantizer as JSON: its class, then its fields. An operator of torch takes strings, but no such objects."""
    cls = type(quantizer)
    return json.dumps({"quantizer": f"{cls.__module__}:{cls.__name__}", **asdict(quantizer)})


@lru_cache
def parse_quantizer(spec: str) -> Quantizer:
    """Inverse of `spec_of`."""
    fields = json.loads(spec)
    return load_class(fields.pop("quantizer"))(**fields)
