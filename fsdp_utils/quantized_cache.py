"""Packed weights on disk, so that the next run reads a quarter of the bytes and quantizes nothing.

One folder per base checkpoint and quantizer inside `--quantized_cache DIR`, named by their hash. Rows are stored whole,
so a cache written by any number of processes serves any other.
"""

import hashlib
from pathlib import Path

import torch
from torch import nn

from fsdp_utils.distributed import barrier, is_main
from fsdp_utils.safetensors_io import CheckpointReader, StreamingWriter, new_folder
from methods.quantizers.linear import QuantizedWeight, as_bytes
from methods.rows import gather, row_range


def packed_modules(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Checkpoint path and module of every packed weight; tied ones once."""
    found, seen = {}, set()
    for path, module in model.named_modules():
        if isinstance(module, QuantizedWeight) and id(module.packed()[0]) not in seen:
            seen.add(id(module.packed()[0]))
            found[path.replace(".base_layer", "")] = module
    return found


def cache_folder(root: str, model: nn.Module, *, fingerprint: str) -> Path:
    """Where the packed weights of this base under this quantizer belong."""
    layout = [f"{path} {module.spec} {module.out_features}" for path, module in packed_modules(model).items()]
    digest = hashlib.sha256("\n".join([fingerprint, *layout]).encode()).hexdigest()
    return Path(root) / digest[:32]


class QuantizedCache:
    """Reads packed rows; `reader` is None until the cache has been written."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.reader = CheckpointReader(folder) if folder.is_dir() else None

    def __contains__(self, path: str) -> bool:
        return self.reader is not None and f"{path}.codes" in self.reader

    def packed_rows(self, path: str, module: QuantizedWeight, *, device: torch.device) -> tuple[torch.Tensor, ...]:
        """This process's rows of every packed parameter of a module, on `device`."""
        start, stop = row_range(module.packed()[0])
        return tuple(self.reader.rows(f"{path}.{name}", start, stop).to(device) for name in module.packed_names)

    def write(self, model: nn.Module) -> None:
        """Gathers and writes every packed weight. Collective; process 0 writes, and renames the folder at the end."""
        if self.reader is not None:
            return
        sources = {
            f"{path}.{name}": parameter
            for path, module in packed_modules(model).items()
            for name, parameter in zip(module.packed_names, module.packed(), strict=True)
        }
        if is_main():
            with new_folder(self.folder, overwrite=True) as folder:
                writer = StreamingWriter(folder, {name: (_stored(p), tuple(p.shape)) for name, p in sources.items()})
                for name, parameter in sources.items():
                    writer.write(name, _plain(gather(parameter.detach())))
                writer.finish()
        else:
            for parameter in sources.values():
                gather(parameter.detach())
        barrier()


def _stored(parameter: torch.Tensor) -> torch.dtype:
    return torch.uint8 if parameter.element_size() == 1 else parameter.dtype


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes as uint8, whatever dtype stands in for them in memory."""
    return as_bytes(tensor) if tensor.element_size() == 1 else tensor
