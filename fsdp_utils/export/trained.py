"""What a run computes with, read and computed one tensor at a time."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fsdp_utils.core.errors import UserError
from fsdp_utils.folders.describe import Run, task_of
from fsdp_utils.inference.load import build_dense, default_dtype, plan_adapter
from fsdp_utils.model.checkpoint import match
from fsdp_utils.model.prequantized import open_files, stored_codes
from fsdp_utils.model.quantized_cache import packed_modules
from fsdp_utils.model.weights import packed_name, plan_reads, saved_buffers
from methods import quantizer_of
from methods.adapter import Pair
from methods.llama_pro import expanded_layers
from methods.quantizers.experts import expert_stacks
from methods.targets import block_linears, decoder_blocks, routers


class TrainedWeights:
    """The weights of a trained model, as its forward pass used them.

    Opening checks everything that can be wrong with run and base; weights are read when they are asked for.

    Args:
        device: where weights are quantized, dequantized and merged.

    Attributes:
        weights: the tensors of base or model (`model.checkpoint.Checkpoint`).
        model_config: transformers' configuration of it.
        shapes: of every parameter and stored buffer by its name in the model; tied ones come once.
        own_dtypes: of those among them that have the same dtype under any precision.
        linears: path and `nn.Linear` (on meta) of every linear of the model.
        in_blocks: paths of those in decoder blocks, which quantized formats pack.
        never_packed: ends of paths of linears that stock loaders leave alone, as the family wants some in fp32.
        block_paths: of the decoder blocks.
        stacks: paths of the stacks of experts.
        routers: of what chooses among them.
        has_conv1d: whether some layers are GPT-2's transposed linears, which are in neither of the two.
        new_blocks: paths of the decoder blocks that block expansion added.
        quantizer: of the base under the adapter, or of the frozen blocks of a Llama-Pro model; None for a dense one,
            and for one that a plan of bits quantized in several ways.

    Raises:
        UserError: a folder that was exported, dummy weights, another base than in training, tensors that do not fit.
    """

    def __init__(self, run: Run, *, device: torch.device):
        if run.kind.startswith("stock"):
            raise UserError(f"--model {run.folder}: is quantized for serving already; give the run it was made from")
        if run.config and run.config.load_format == "dummy":
            raise UserError(f"--model {run.folder}: was trained on random weights (--load_format dummy)")
        self.run, self.device = run, device
        alike = run.quantizer and not run.config.bits_plan
        self.quantizer = quantizer_of(run.train_type)(**run.quantizer) if alike else None
        self.method, self._trained_dtype = None, None
        self._adapter, self._whole, self._packed, self._last = {}, {}, {}, {}
        if run.kind == "adapter":
            self._trained_dtype = default_dtype(run)
            planned, stored, _ = plan_adapter(run, device=device, dtype=self._trained_dtype)
            self.method, self._adapter = planned.method, planned.method.by_layer(planned.model, stored)
            self._whole = {name: tensor for name, tensor in stored.items() if ".lora_" not in name}
            self._packed = packed_modules(planned.model)
            self.quantizer = planned.quantizer if alike else None  # of a base that comes quantized, that of its format
        built = build_dense(run, dtype=torch.bfloat16)  # in which shows what a family keeps in fp32
        self.weights = match(built, open_files(run.base, built.config), task=task_of(run))
        self._codes = stored_codes(self.weights)
        self.model_config = built.config
        whole = {read.name: read for read in plan_reads(built)} | saved_buffers(built)
        self.shapes = {name: self.weights.shape(name) for name in whole if name in self.weights}
        dtypes = {name: tensor.dtype for name, tensor in built.state_dict().items()}
        self.own_dtypes = {name: dtypes[name] for name in self.shapes if dtypes[name] != torch.bfloat16}
        self.linears = {path: m for path, m in built.named_modules() if isinstance(m, nn.Linear)}
        self.in_blocks, self.block_paths = list(block_linears(built)), list(decoder_blocks(built))
        self.never_packed = tuple(getattr(built, "_keep_in_fp32_modules", None) or ())
        self.stacks, self.routers = expert_stacks(built), routers(built)
        self.has_conv1d = any(isinstance(m, Conv1D) for m in built.modules())
        self.new_blocks = self._expanded(self.block_paths)

    def _expanded(self, blocks: list[str]) -> list[str]:
        if self.run.kind != "llama_pro":
            return []
        ids = expanded_layers(self.run.folder)
        if not ids or max(ids) >= len(blocks):
            raise UserError(f"{self.run.folder}: expanded layers {ids} do not fit a model of {len(blocks)} blocks")
        return [blocks[i] for i in ids]

    @property
    def folded(self) -> bool:
        """Whether the packed base holds the adapter already (--train_for)."""
        return self.method is not None and self.method.start.folds

    @property
    def nbytes(self) -> int:
        """Bytes of what is read: the base or model, and the adapter."""
        adapter = sum(t.nbytes for tensors in self._adapter.values() for t in tensors.values())
        return sum(map(self.weights.nbytes, self.shapes)) + adapter

    def adapted(self) -> list[str]:
        """Paths of the linears that have an adapter."""
        return list(self._adapter)

    def has_changed(self, name: str) -> bool:
        """Whether training may have changed a tensor of the model."""
        if self.run.kind == "llama_pro":
            return name.startswith(tuple(f"{block}." for block in self.new_blocks))
        return self.run.kind != "adapter" or name.removesuffix(".weight") in self._adapter or name in self._whole

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter of the model under the adapters, in the dtype it was trained in; dequantized if it was
        quantized."""
        path = name.removesuffix(".weight")
        if path not in self._packed:
            return self._read(name).to(self.own_dtypes.get(name) or self._trained_dtype)
        module, dtype = self._packed[path], self._trained_dtype
        return module.as_stored(
            module.quantizer.dequantize(self.packed(path), in_features=module.in_features, dtype=dtype)
        )

    def quantizer_at(self, path: str):
        """How the weight of a linear under adapters is quantized; None for one that is not."""
        return self._packed[path].quantizer if path in self._packed else None

    def packed(self, path: str) -> tuple[torch.Tensor, ...]:
        """The packed weight under the adapters, as it came or quantized again exactly as in training."""
        module = self._packed[path]
        if self._codes and path in self._codes:
            return self._codes.packed_rows(path, module, device=self.device)
        if path not in self._last:  # asked for up to three times in a row; HQQ's solver takes the time of an export
            self._last = {path: module.quantizer.quantize(module.as_rows(self._read(packed_name(path, module))))}
        return self._last[path]

    def merged(self, path: str) -> torch.Tensor:
        """The weight of a linear with its adapter folded into the base it was trained on, fp32 `[out, in]`; of an
        adapted stack of experts, as the base's files have it."""
        if path in self.stacks:
            module = self._packed[path]
            weight = module.as_rows(self.tensor(path)).view(module.shape)
            return module.as_stored(self.method.merge(weight, self._tensors(path)))
        weight = self.tensor(f"{path}.weight")
        return self.method.merge(weight, self._tensors(path)) if path in self._adapter else weight.float()

    def low_rank(self, path: str) -> Pair:
        """A `[r, in]` and B `[out, r]` of an adapted linear."""
        return self.method.start.added(self._tensors(path))

    def row_factor(self, path: str) -> torch.Tensor:
        """What training multiplies each output row by, fp32 `[out]`: DoRA's m / n, ones elsewhere."""
        factor = None
        if path in self._adapter and self.run.dora:
            factor = self.method.row_factor(self.tensor(f"{path}.weight"), self._tensors(path))
        return torch.ones(self.linears[path].out_features, device=self.device) if factor is None else factor

    def _tensors(self, path: str) -> dict[str, torch.Tensor]:
        return {suffix: tensor.to(self.device) for suffix, tensor in self._adapter[path].items()}

    def _read(self, name: str) -> torch.Tensor:
        if name in self._whole:
            return self._whole[name].to(self.device)
        rows = self.weights.tensor(name).to(self.device)
        path = name.removesuffix(".weight")
        return self.method.base_rows(path, rows, start=0) if self.method else rows
