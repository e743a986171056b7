"""Weights: where they come from, which rows of which tensor go where, and their way there, row by row."""

import hashlib
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from fsdp_utils.core.errors import CheckpointError
from fsdp_utils.core.folders import model_folder
from fsdp_utils.core.ranks import is_main
from fsdp_utils.core.rows import local, row_range
from fsdp_utils.model.build import resolve_model
from fsdp_utils.model.checkpoint import Checkpoint, match
from fsdp_utils.model.prequantized import Prequantized, open_files
from fsdp_utils.sharding.host_memory import in_host_memory
from methods.quantizers.linear import QuantizedWeight


def materialize(model: nn.Module, *, device: torch.device, buffer_device: torch.device) -> None:
    """Gives every parameter on meta (sharded ones: this process's rows) memory without values, moves the buffers."""
    buffers = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    host = device.type == "cpu" and any(isinstance(p, DTensor) for p in model.parameters())
    # swapping keeps each Parameter object: tied weights stay tied, and FSDP2 keeps pointing at what it sharded
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        if host:
            model._apply(in_host_memory(model, pinned=buffer_device.type == "cuda"))
        else:
            model._apply(lambda tensor: torch.empty_like(tensor, device=device) if local(tensor).is_meta else tensor)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    for module, name, buffer in buffers:
        module._buffers[name] = buffer.to(buffer_device)


class DummyWeights:
    """Random weights without files, for speed and memory measurements; the same for any number of processes."""

    folder, untied, new = "dummy weights", False, ()

    def __init__(self, shapes: dict[str, tuple[int, ...]], *, dtype: torch.dtype, device: torch.device, seed: int):
        self.shapes, self._dtype, self.device, self.seed = shapes, dtype, device, seed

    @property
    def recipe(self) -> str:
        """What the values depend on: generators of a CPU and of a GPU, or in another dtype, give other numbers."""
        return f"dummy {self.seed} {self.device.type} {self._dtype}"

    def names(self) -> list[str]:
        return list(self.shapes)

    def __contains__(self, name) -> bool:
        return name in self.shapes

    def pieces(self, name: str) -> dict:
        """As of `Checkpoint`."""
        return {name: lambda whole: whole}

    def shape(self, name) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name) -> torch.dtype:
        return self._dtype

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        shape = self.shapes[name]
        if len(shape) < 2:  # norms and biases
            return torch.full((stop - start,), float(not name.endswith("bias")), dtype=self._dtype, device=self.device)
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:7], "big")
        generator = torch.Generator(self.device).manual_seed(seed)
        whole = torch.empty(shape, dtype=self._dtype, device=self.device).normal_(0, 0.02, generator=generator)
        return whole[start:stop]


def open_weights(
    model: nn.Module, name: str, *, task, load_format: str, dtype: torch.dtype, device: torch.device, seed: int
):
    """Where the weights come from: the checkpoint, or dummies shaped like `model`, which is dense still.

    Args:
        task: knows what a checkpoint may lack, and what it may hold for others.

    Raises:
        CheckpointError: as `CheckpointReader` and `match`.
    """
    if load_format == "dummy":
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        return DummyWeights(shapes, dtype=dtype, device=device, seed=seed)
    return match(model, open_files(model_folder(resolve_model(name)), model.config), task=task, seed=seed)


def checkpoint_dtype(weights) -> torch.dtype:
    """The dtype most of the checkpoint is in: that of its first matrix."""
    matrices = [n for n in weights.names() if len(weights.shape(n)) == 2]
    if not matrices:
        raise CheckpointError(f"{weights.folder}: holds no weight matrix")
    return weights.dtype(matrices[0])


def stamp(weights) -> str:
    """Sizes and times of the files: tells an edited checkpoint from what it was, where `fingerprint` may not."""
    if isinstance(weights, DummyWeights):
        return ""
    files = ((shard, (weights.folder / shard).stat()) for shard in sorted(set(weights.reader.shard_of.values())))
    return str([(shard, stat.st_size, stat.st_mtime_ns) for shard, stat in files])


def fingerprint(weights) -> str:
    """A hash that tells one checkpoint from another: each tensor's name, dtype, shape and up to 16 samples.

    It reads a few kilobytes per tensor; a checkpoint that differs only between the samples would pass. Dummies are what
    they are made from, in words.
    """
    if isinstance(weights, DummyWeights):  # which make the whole tensor anew for each row
        return weights.recipe
    if isinstance(weights, Checkpoint):
        weights = weights.reader
    if isinstance(weights, Prequantized):  # whose values depend on how they are computed
        weights = weights.files
    digest = hashlib.sha256()
    for name in sorted(weights.names()):
        shape = weights.shape(name)
        digest.update(f"{name} {weights.dtype(name)} {shape}".encode())
        rows = shape[0] if shape else 0
        for row in sorted({i * rows // 16 for i in range(16)} if rows else ()):
            sample = weights.beginning(name, row, 512).contiguous()
            digest.update(sample.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def packed_name(path: str, module: QuantizedWeight) -> str:
    """What a checkpoint calls the weight that a module holds packed: a stack of matrices is a parameter itself."""
    path = path.replace(".base_layer", "")
    return path if len(module.shape) > 2 else f"{path}.weight"


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None, torch.Tensor]]:
    """`(checkpoint name, module, parameter name, parameter whose rows say which rows to read)`.

    The parameter name is None for a packed weight. Parameters that a method added are left out; tied ones come once.
    """
    seen = set()
    for path, module in model.named_modules():
        prefix = f"{path}.".replace(".base_layer.", ".") if path else ""
        if isinstance(module, QuantizedWeight) and id(module.packed()[0]) not in seen:
            seen.add(id(module.packed()[0]))
            yield packed_name(path, module), module, None, module.packed()[0]
        skipped = {*getattr(module, "own_parameters", ()), *getattr(module, "packed_names", ())}
        for name, parameter in module.named_parameters(recurse=False):
            adapter = ".lora_" in f".{path}."  # PEFT keeps its weights in linears of their own
            if name not in skipped and not adapter and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}{name}", module, name, parameter


def saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a checkpoint holds, by their name in the model."""
    return {
        f"{path}.{name}".removeprefix(".").replace(".base_layer.", "."): buffer
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


PIECE = 2**25  # numbers that are read and quantized at a time: solvers take some ten times as many bytes


class Read(NamedTuple):
    """One tensor, or a piece of it, to read: its name in the model, where it goes, which rows, and how many of this
    process's rows come before."""

    name: str
    module: nn.Module
    parameter_name: str | None
    start: int
    stop: int
    before: int = 0

    def pieces(self) -> Iterator["Read"]:
        """Of at most PIECE numbers each, if rows are no longer: a whole embedding beside itself, or the fp32 copies
        that quantize it, would be what loading needs most memory for."""
        packed = self.parameter_name is None
        shape = self.module.shape if packed else getattr(self.module, self.parameter_name).shape
        width = shape[-1] if packed else math.prod(shape[1:])
        rows = max(PIECE // max(width, 1), 1)
        if packed and len(shape) > 2 and rows > self.module.out_features:
            rows -= rows % self.module.out_features  # a matrix of a stack is read whole
        for start in range(self.start, max(self.stop, self.start + 1), rows):  # a process without rows asks too
            stop, before = min(start + rows, self.stop), start - self.start
            yield self._replace(start=start, stop=stop, before=before)

    def place(self, parameter: torch.Tensor) -> torch.Tensor:
        """Where in this process's rows of a parameter they go."""
        mine = local(parameter)
        return mine[self.before : self.before + self.stop - self.start] if mine.dim() else mine


def plan_reads(model: nn.Module) -> list[Read]:
    """What to read for this process."""
    return [
        Read(name, module, parameter_name, *row_range(parameter))
        for name, module, parameter_name, parameter in _parameters(model)
    ]


def read_rows(weights, read: Read) -> torch.Tensor:
    """Of a packed weight `[n, in]`, the rows of a stack of matrices below one another; else `[n, ...]` of dim 0."""
    if read.parameter_name is not None or len(read.module.shape) == 2:
        return weights.rows(read.name, read.start, read.stop)
    out = read.module.out_features
    first, last = read.start // out, -(-read.stop // out)  # the matrices that hold them
    stack = read.module.as_rows(weights.rows(read.name, first, last))
    return stack[read.start - first * out : read.stop - first * out]


def whole_reader(weights, *, device: torch.device):
    """What reads the whole weight of the linear at a path, as it is in the checkpoint, onto `device`."""
    rows = lambda name: weights.rows(name, 0, weights.shape(name)[0])
    return lambda path: rows(f"{path}.weight").to(device)


@torch.no_grad()
def load_weights(
    model: nn.Module, weights, *, device: torch.device, base_rows=None, cache=None, only=None, readers: int = 2
) -> None:
    """Fills this process's rows of every base parameter: reads them, quantizes them on `device`, drops them. Buffers
    that are stored are filled whole.

    Args:
        base_rows: `Method.base_rows`, or None to store the checkpoint's own.
        cache: a QuantizedCache or StoredCodes, whose packed rows are taken as they are, or None.
        only: paths of packed weights to fill again, and nothing else; None: all there is.
        readers: threads that read ahead, one tensor each, so that reading and quantizing overlap.
    """
    path_of = lambda step: step.name.removesuffix(".weight")
    plan = plan_reads(model)
    if only is not None:
        plan = [step for step in plan if step.parameter_name is None and path_of(step) in only]

    stored = lambda step: step.parameter_name is None and cache is not None and path_of(step) in cache
    plan = [piece for step in plan for piece in ([step] if stored(step) else step.pieces())]

    def read(step: Read):
        if stored(step):
            return cache.packed_rows(path_of(step), step.module, device=device)
        rows = read_rows(weights, step).to(device)
        return rows if base_rows is None else base_rows(path_of(step), rows, start=step.start)

    with ThreadPoolExecutor(max_workers=readers) as pool:
        ahead = deque(pool.submit(read, step) for step in plan[:readers])
        bar = dict(desc="loading", unit="part", disable=not is_main() or only is not None)
        for i, step in enumerate(tqdm(plan, **bar)):
            rows = ahead.popleft().result()
            if i + readers < len(plan):
                ahead.append(pool.submit(read, plan[i + readers]))
            if step.parameter_name is not None:
                step.place(getattr(step.module, step.parameter_name)).copy_(rows)
                continue
            found = rows if stored(step) else step.module.quantizer.quantize(rows)
            for parameter, packed in zip(step.module.packed(), found, strict=True):
                step.place(parameter).view(torch.uint8).copy_(packed.view(torch.uint8))
    for name, buffer in saved_buffers(model).items() if only is None else ():
        if name in weights:
            buffer.copy_(weights.tensor(name))


def check_loaded(model: nn.Module) -> None:
    """Raises if a parameter stayed on meta: it would train as noise."""
    left = [name for name, p in model.named_parameters() if local(p).is_meta]
    if left:
        raise RuntimeError(f"{left[0]} (of {len(left)}) was never loaded")


def base_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the frozen parameters: `(in this process, of the whole model)`."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return sum(local(p).nbytes for p in frozen), sum(p.numel() * p.element_size() for p in frozen)
