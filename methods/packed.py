"""What a packed weight is: bytes and scales laid out row by row, and the quantizer that reads them."""

from dataclasses import astuple, fields
from functools import lru_cache
from importlib import import_module
from typing import Protocol

import torch

# fully_shard of torch 2.11 refuses frozen integer parameters, so bytes are stored under a 1-byte float dtype.
# They are only ever viewed as uint8, copied and gathered; no arithmetic touches the float view.
STORED_BYTES = torch.float8_e4m3fn


class Quantizer(Protocol):
    """What a backend provides. `packed` is a tuple of tensors in the order of `layout`."""

    bits: int

    @staticmethod
    def flag_errors(config) -> list[str]: ...

    @classmethod
    def from_config(cls, config, *, checkpoint_dtype: torch.dtype) -> "Quantizer": ...

    def layout(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of each parameter; dim 0 is always `out_features`."""

    def quantize(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`[n, in]` in any float dtype to packed tensors with n rows. Rows must not influence one another."""

    def dequantize(self, packed, *, in_features: int, dtype: torch.dtype, row_factor=None, out=None) -> torch.Tensor:
        """`[n, in_features]` in `dtype`, exactly as the forward pass uses it.

        Args:
            packed: tuple of tensors with n rows.
            row_factor: fp32 `[n]`, what each row is multiplied by, or None.
            out: where to write, `[n, in_features]` with any row stride, or None for a new tensor.
        """


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The uint8 view of stored bytes."""
    return tensor.view(torch.uint8)


@lru_cache
def parse_quantizer(spec: str) -> Quantizer:
    """The quantizer that `Quantizer.spec` wrote: its module and class, then its fields."""
    target, *values = spec.split(":")
    module, name = target.rsplit(".", 1)
    cls = getattr(import_module(module), name)
    return cls(*(field.type(value) for field, value in zip(fields(cls), values, strict=True)))


def spec_of(quantizer: Quantizer) -> str:
    """Inverse of `parse_quantizer`."""
    cls = type(quantizer)
    return ":".join([f"{cls.__module__}.{cls.__name__}", *(str(v) for v in astuple(quantizer))])
