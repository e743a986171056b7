"""Packed weights on disk, so that the next run reads a quarter of the bytes and quantizes nothing.

One folder per base checkpoint and quantizer inside `--quantized_cache DIR`, named by their hash. Rows are stored whole,
so a cache written by any number of processes serves any other.
"""

import hashlib
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.folders import new_folder
from fsdp_utils.core.processes import all_reduce, barrier
from fsdp_utils.core.ranks import is_main, say, world_size
from fsdp_utils.core.rows import gather, row_range
from fsdp_utils.core.safetensors_io import CheckpointReader, StreamingWriter
from methods.packed import as_bytes
from methods.quantizers.linear import QuantizedWeight


def packed_modules(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Checkpoint path and module of every packed weight; tied ones once."""
    found, seen = {}, set()
    for path, module in model.named_modules():
        if isinstance(module, QuantizedWeight) and id(module.packed()[0]) not in seen:
            seen.add(id(module.packed()[0]))
            found[path.replace(".base_layer", "")] = module
    return found


def cache_folder(root: str, model: nn.Module, *, base: str) -> Path:
    """Where the packed weights of this base under this quantizer belong."""
    layout = [f"{path} {module.spec} {module.shape}" for path, module in packed_modules(model).items()]
    digest = hashlib.sha256("\n".join([base, *layout]).encode()).hexdigest()
    return Path(root) / digest[:32]


def check_cache_root(root: str) -> None:
    """Raises UserError if `--quantized_cache` is no folder that can be written to."""
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--quantized_cache {root}: {error.strerror}; name a folder that can be written to") from None


class QuantizedCache:
    """Reads packed rows; `reader` is None where nothing was written yet. Every process of a run must make one: it is
    read only if all of them see it, so that they take part in the same collectives."""

    def __init__(self, folder: Path, *, device: torch.device):
        self.folder, self.device = folder, device
        self.holders = int(all_reduce(float(folder.is_dir()), device))
        self.reader = CheckpointReader(folder) if self.holders == world_size() else None
        if 0 < self.holders < world_size():
            say(
                f"note: --quantized_cache {folder.parent}: {self.holders} of {world_size()} processes see what was "
                "written, so it is not read; put it on a disk that all share"
            )

    def __contains__(self, path: str) -> bool:
        return self.reader is not None and f"{path}.codes" in self.reader

    def packed_rows(self, path: str, module: QuantizedWeight, *, device: torch.device) -> tuple[torch.Tensor, ...]:
        """This process's rows of every packed parameter of a module, on `device`."""
        start, stop = row_range(module.packed()[0])
        return tuple(self.reader.rows(f"{path}.{name}", start, stop).to(device) for name in module.packed_names)

    def write(self, model: nn.Module) -> None:
        """Gathers and writes every packed weight. Collective; process 0 writes, and renames the folder at the end.
        Where another run writes the same cache, or has just done so, nothing is written."""
        if self.holders:
            return
        with ExitStack() as stack:
            folder = self._begin(stack) if is_main() else None
            if all_reduce(float(folder is not None), self.device):
                self._write(model, folder)
        barrier()

    def _begin(self, stack: ExitStack) -> Path | None:
        """The folder to write into until the stack ends, or None."""
        try:
            return stack.enter_context(new_folder(self.folder))
        except UserError as error:  # another run writes it, or has just done so, or nobody may
            say(f"note: --quantized_cache {self.folder.parent}: not written ({error})")
            return None

    def _write(self, model: nn.Module, folder: Path | None) -> None:
        sources = {
            f"{path}.{name}": parameter
            for path, module in packed_modules(model).items()
            for name, parameter in zip(module.packed_names, module.packed(), strict=True)
        }
        specs = {name: (_stored(p), tuple(p.shape)) for name, p in sources.items()}
        writer = StreamingWriter(folder, specs) if folder else None
        for name, parameter in sources.items():
            whole = gather(parameter.detach())
            if writer:
                writer.write(name, _plain(whole))
        if writer:
            writer.finish()


def _stored(parameter: torch.Tensor) -> torch.dtype:
    return torch.uint8 if parameter.element_size() == 1 else parameter.dtype


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes as uint8, whatever dtype stands in for them in memory."""
    return as_bytes(tensor) if tensor.element_size() == 1 else tensor
