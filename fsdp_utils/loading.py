"""From a folder of safetensors to a sharded, quantized model: built on meta, then streamed row by row."""

import hashlib
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.initialization import no_init_weights

from fsdp_utils.distributed import is_main
from fsdp_utils.safetensors_io import CheckpointError, CheckpointReader, model_folder, refuse_missing_folder
from methods.errors import UserError
from methods.quantizers.linear import QuantizedWeight, quantized
from methods.rows import local, row_range
from methods.targets import replace_module

LARGEST_PIECE = 2**32  # of HostMemory
DEMO_MODEL = Path(__file__).parent.parent / "demo" / "model"


def resolve_model(name: str) -> str:
    """The folder behind a model name: `demo` is the built-in model."""
    return str(DEMO_MODEL) if name == "demo" else name


def read_model_config(name: str, *, attn_implementation: str = "auto"):
    """The model's configuration, from a local folder or the hub.

    Raises:
        UserError: there is none, or it is not a causal language model.
    """
    refuse_missing_folder(resolve_model(name))
    try:
        config = AutoConfig.from_pretrained(resolve_model(name))
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: {str(error).splitlines()[0]}") from None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{name}: {config.model_type} is not a causal language model")
    if getattr(config, "quantization_config", None):
        raise UserError(f"{name}: its weights are quantized already; give the 16-bit model")
    if attn_implementation != "auto":
        config._attn_implementation = attn_implementation
    config.use_cache = False
    return config


def read_tokenizer(name: str):
    """The model's tokenizer.

    Raises:
        UserError: the folder or hub repository has none.
    """
    refuse_missing_folder(resolve_model(name))
    try:
        return AutoTokenizer.from_pretrained(resolve_model(name))
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: no tokenizer ({str(error).splitlines()[0]})") from None


def build_on_meta(model_config, *, dtype: torch.dtype) -> nn.Module:
    """The frozen model, parameters on meta, buffers (rotary frequencies, scales) real and on the CPU."""
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    model.tie_weights()  # no_init_weights also skips this
    return model.requires_grad_(False)


def quantize_on_meta(model: nn.Module, paths: list[str], quantizer) -> None:
    """Replaces the linears and embeddings at `paths` by packed modules without values; tied ones stay tied.

    Raises:
        UserError: the group size does not divide a row, so groups would cross rows and could not be sharded.
    """
    made = {}
    for path in paths:
        module = model.get_submodule(path)
        packed = quantized(module, quantizer)
        if packed.in_features % quantizer.group_size:
            raise UserError(
                f"--quant_group_size {quantizer.group_size}: does not divide in_features {packed.in_features} of {path}"
            )
        first = made.setdefault(id(module.weight), packed)
        for name in packed.packed_names:
            setattr(packed, name, getattr(first, name))
        replace_module(model, path, packed)


class HostMemory:
    """Host memory for many tensors, page-locked if a GPU reads it, in a few large pieces.

    torch's pinned allocator rounds every tensor up to a power of two: 2 GiB per process of a 70B on two. The pieces are
    powers of two themselves, at most LARGEST_PIECE.
    """

    def __init__(self, nbytes: int, *, pinned: bool):
        self.left, self.pinned = nbytes, pinned
        self.pieces: list[torch.Tensor] = []  # what is free of each

    @staticmethod
    def aligned(nbytes: int) -> int:
        return -(-nbytes // 256) * 256

    def empty(self, tensor: torch.Tensor) -> torch.Tensor:
        """Memory for a tensor shaped like this one."""
        size = self.aligned(tensor.nbytes)
        at = next((i for i, piece in enumerate(self.pieces) if len(piece) >= size), None)
        if at is None:
            at = len(self.pieces)
            largest = 1 << (max(self.left, 1).bit_length() - 1)  # the largest power of two that will be used up
            self.pieces.append(self._piece(max(min(largest, LARGEST_PIECE), size)))
        self.left -= size
        mine, self.pieces[at] = self.pieces[at][: tensor.nbytes], self.pieces[at][size:]
        return mine.view(tensor.dtype).view(tensor.shape)

    def _piece(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.pinned)


def _in_host_memory(model: nn.Module, *, pinned: bool):
    """What gives each parameter on meta its place in one HostMemory; everything else is left as it is."""
    rows = {id(p): local(p) for p in model.parameters() if local(p).is_meta}
    memory = HostMemory(sum(HostMemory.aligned(t.nbytes) for t in rows.values()), pinned=pinned)

    def place(tensor):
        if id(tensor) not in rows or not local(tensor).is_meta:  # a tied parameter comes twice
            return tensor
        mine = memory.empty(local(tensor))
        # as FSDP2 does: DTensor.from_local would move the rows to the GPUs of the mesh
        return DTensor(mine, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else mine

    return place


def materialize(model: nn.Module, *, device: torch.device, buffer_device: torch.device) -> None:
    """Gives every parameter on meta (sharded ones: this process's rows) memory without values, moves the buffers."""
    buffers = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    host = device.type == "cpu" and any(isinstance(p, DTensor) for p in model.parameters())
    # swapping keeps each Parameter object: tied weights stay tied, and FSDP2 keeps pointing at what it sharded
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        if host:
            model._apply(_in_host_memory(model, pinned=buffer_device.type == "cuda"))
        else:
            model._apply(lambda tensor: torch.empty_like(tensor, device=device) if local(tensor).is_meta else tensor)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    for module, name, buffer in buffers:
        module._buffers[name] = buffer.to(buffer_device)


class DummyWeights:
    """Random weights without files, for speed and memory measurements; the same for any number of processes."""

    folder = "dummy weights"

    def __init__(self, shapes: dict[str, tuple[int, ...]], *, dtype: torch.dtype, device: torch.device, seed: int):
        self.shapes, self._dtype, self.device, self.seed = shapes, dtype, device, seed

    def names(self) -> list[str]:
        return list(self.shapes)

    def __contains__(self, name) -> bool:
        return name in self.shapes

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


def open_weights(model: nn.Module, name: str, *, load_format: str, dtype: torch.dtype, device: torch.device, seed: int):
    """Where the weights come from: a reader of the checkpoint, or dummies shaped like `model` (before quantization)."""
    if load_format == "dummy":
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        return DummyWeights(shapes, dtype=dtype, device=device, seed=seed)
    return CheckpointReader(model_folder(resolve_model(name)))


def checkpoint_dtype(weights) -> torch.dtype:
    """The dtype most of the checkpoint is in: that of its first matrix."""
    matrices = [n for n in weights.names() if len(weights.shape(n)) == 2]
    if not matrices:
        raise CheckpointError(f"{weights.folder}: holds no weight matrix")
    return weights.dtype(matrices[0])


def fingerprint(weights) -> str:
    """A hash that tells one checkpoint from another: each tensor's name, dtype, shape and up to 16 samples.

    It reads a few kilobytes per tensor; a checkpoint that differs only between the samples would pass.
    """
    digest = hashlib.sha256()
    for name in sorted(weights.names()):
        shape = weights.shape(name)
        digest.update(f"{name} {weights.dtype(name)} {shape}".encode())
        rows = shape[0] if shape else 0
        for row in sorted({i * rows // 16 for i in range(16)} if rows else ()):
            sample = weights.rows(name, row, row + 1).reshape(-1)[:512].contiguous()
            digest.update(sample.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None, torch.Tensor]]:
    """`(checkpoint name, module, parameter name, parameter whose rows say which rows to read)`.

    The parameter name is None for a packed weight. Parameters that a method added are left out; tied ones come once.
    """
    seen = set()
    for path, module in model.named_modules():
        prefix = f"{path}.".replace(".base_layer.", ".") if path else ""
        if isinstance(module, QuantizedWeight) and id(module.packed()[0]) not in seen:
            seen.add(id(module.packed()[0]))
            yield f"{prefix}weight", module, None, module.packed()[0]
        skipped = {*getattr(module, "own_parameters", ()), *getattr(module, "packed_names", ())}
        for name, parameter in module.named_parameters(recurse=False):
            adapter = ".lora_" in f".{path}."  # PEFT keeps its weights in linears of their own
            if name not in skipped and not adapter and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}{name}", module, name, parameter


def _stored_name(weights, name: str, model: nn.Module) -> str:
    """The name a checkpoint uses for a parameter: some are saved without the base model's prefix."""
    prefix = f"{model.base_model_prefix}."
    renamed = name.replace("lm_head.", "embed_out.")  # GPT-NeoX; transformers renames it while it loads
    for candidate in (name, name.removeprefix(prefix), prefix + name, renamed):
        if candidate in weights:
            return candidate
    raise CheckpointError(f"{weights.folder}: no tensor for {name}, which {type(model).__name__} needs")


class Read(NamedTuple):
    """One tensor to read: its name in the model and in the checkpoint, where it goes, which rows."""

    name: str
    stored: str
    module: nn.Module
    parameter_name: str | None
    start: int
    stop: int


def plan_reads(model: nn.Module, weights) -> list[Read]:
    """What to read for this process.

    Raises:
        CheckpointError: a parameter without tensor, a tensor without parameter, or a shape that differs.
    """
    plan = []
    for name, module, parameter_name, parameter in _parameters(model):
        stored = _stored_name(weights, name, model)
        expected = tuple(parameter.shape)
        if parameter_name is None:
            expected = (module.out_features, module.in_features)
        if weights.shape(stored) != expected:
            shape = weights.shape(stored)
            raise CheckpointError(f"{weights.folder}: {stored} has shape {shape}, the model wants {expected}")
        plan.append(Read(name, stored, module, parameter_name, *row_range(parameter)))
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    ignorable = tied | {n for n in weights.names() if n.endswith("inv_freq")}
    unused = set(weights.names()) - {step.stored for step in plan} - ignorable
    if unused:
        raise CheckpointError(f"{weights.folder}: {min(unused)} (of {len(unused)}) loads into nothing in this model")
    return plan


def check_weights(model: nn.Module, weights) -> None:
    """Raises the CheckpointError that `load_weights` would, from names and shapes alone."""
    plan_reads(model, weights)


@torch.no_grad()
def load_weights(model: nn.Module, weights, *, device: torch.device, cache=None, readers: int = 2) -> None:
    """Fills this process's rows of every base parameter: reads them, quantizes them on `device`, drops them.

    Args:
        cache: a QuantizedCache whose packed rows are taken as they are, or None.
        readers: threads that read ahead, one tensor each, so that reading and quantizing overlap.

    Raises:
        CheckpointError: naming the file and the tensor that is missing, superfluous or of another shape.
    """
    plan = plan_reads(model, weights)

    def read(step: Read):
        path = step.name.removesuffix(".weight")
        if step.parameter_name is None and cache is not None and path in cache:
            return cache.packed_rows(path, step.module, device=device), True
        return weights.rows(step.stored, step.start, step.stop).to(device), False

    with ThreadPoolExecutor(max_workers=readers) as pool:
        ahead = deque(pool.submit(read, step) for step in plan[:readers])
        for i, step in enumerate(tqdm(plan, desc="loading", unit="tensor", disable=not is_main())):
            rows, is_packed = ahead.popleft().result()
            if i + readers < len(plan):
                ahead.append(pool.submit(read, plan[i + readers]))
            if step.parameter_name is not None:
                local(getattr(step.module, step.parameter_name)).copy_(rows)
                continue
            for parameter, packed in zip(
                step.module.packed(), rows if is_packed else step.module.quantizer.quantize(rows), strict=True
            ):
                local(parameter).view(torch.uint8).copy_(packed.view(torch.uint8))


def check_loaded(model: nn.Module) -> None:
    """Raises if a parameter stayed on meta: it would train as noise."""
    left = [name for name, p in model.named_parameters() if local(p).is_meta]
    if left:
        raise RuntimeError(f"{left[0]} (of {len(left)}) was never loaded")


def base_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the frozen parameters: `(in this process, of the whole model)`."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return sum(local(p).nbytes for p in frozen), sum(p.numel() * p.element_size() for p in frozen)


def write_json(path: str | Path, content) -> None:
    """Writes readable JSON with a final newline."""
    Path(path).write_text(json.dumps(content, indent=2, default=str) + "\n")
