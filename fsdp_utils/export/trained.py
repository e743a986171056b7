"""What a run computes with, read and computed one tensor at a time."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.safetensors_io import CheckpointReader
from fsdp_utils.folders.describe import Run, quantizer_object
from fsdp_utils.folders.names import MAGNITUDE
from fsdp_utils.inference.load import default_dtype, plan_adapter
from fsdp_utils.model.build import build_on_meta, read_model_config
from fsdp_utils.model.quantized_cache import packed_modules
from fsdp_utils.model.weights import plan_reads
from methods.dora import row_norms
from methods.llama_pro import expanded_layers
from methods.targets import block_linears, decoder_blocks


class TrainedWeights:
    """The weights of a trained model, as its forward pass used them.

    Opening checks everything that can be wrong with run and base; weights are read when they are asked for.

    Args:
        device: where weights are quantized, dequantized and merged.

    Attributes:
        shapes: of every parameter by its name in the model; tied ones come once.
        linears: path and `nn.Linear` (on meta) of every linear of the model.
        in_blocks: paths of those in decoder blocks, which quantized formats pack.
        has_conv1d: whether some layers are GPT-2's transposed linears, which are in neither of the two.
        new_blocks: paths of the decoder blocks that block expansion added.
        quantizer: of the base under the adapter, or of the frozen blocks of a Llama-Pro model; None for a dense one.

    Raises:
        UserError: an export of ours, dummy weights, another base than in training, tensors that do not fit.
    """

    def __init__(self, run: Run, *, device: torch.device):
        if run.kind.startswith("stock"):
            raise UserError(f"--model {run.folder}: is quantized for serving already; give the run it was made from")
        if run.config and run.config.load_format == "dummy":
            raise UserError(f"--model {run.folder}: was trained on random weights (--load_format dummy)")
        self.run, self.device = run, device
        self.quantizer, self._trained_dtype, self._adapter = quantizer_object(run), None, {}
        self._last, self._quantized = {}, set()
        if run.kind == "adapter":
            self._trained_dtype = default_dtype(run)
            planned, self._adapter, _ = plan_adapter(run, device=device, dtype=self._trained_dtype)
            self._quantized = set(packed_modules(planned.model))
        self.reader = CheckpointReader(run.base)
        built = build_on_meta(read_model_config(str(run.base)), dtype=torch.float32)
        self._stored = {read.name: read.stored for read in plan_reads(built, self.reader)}
        self.shapes = {name: self.reader.shape(stored) for name, stored in self._stored.items()}
        self.linears = {path: m for path, m in built.named_modules() if isinstance(m, nn.Linear)}
        self.in_blocks = list(block_linears(built))
        self.has_conv1d = any(isinstance(m, Conv1D) for m in built.modules())
        self.new_blocks = self._expanded(list(decoder_blocks(built)))

    def _expanded(self, blocks: list[str]) -> list[str]:
        if self.run.kind != "llama_pro":
            return []
        ids = expanded_layers(self.run.folder)
        if not ids or max(ids) >= len(blocks):
            raise UserError(f"{self.run.folder}: expanded layers {ids} do not fit a model of {len(blocks)} blocks")
        return [blocks[i] for i in ids]

    @property
    def nbytes(self) -> int:
        """Bytes of what is read: the base or model, and the adapter."""
        return sum(map(self.reader.nbytes, self._stored.values())) + sum(t.nbytes for t in self._adapter.values())

    def adapted(self) -> list[str]:
        """Paths of the linears that have an adapter."""
        return [name.removesuffix(".lora_A.weight") for name in self._adapter if name.endswith(".lora_A.weight")]

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter that no adapter changes, in the dtype it was trained in; dequantized if it was quantized."""
        path = name.removesuffix(".weight")
        if path not in self._quantized:
            return self._read(name).to(self._trained_dtype)
        width = self.shapes[name][1]
        return self.quantizer.dequantize(self.packed(path), in_features=width, dtype=self._trained_dtype)

    def packed(self, path: str) -> tuple[torch.Tensor, ...]:
        """The packed weight under the adapters, quantized again exactly as in training."""
        if path not in self._last:  # asked for up to three times in a row; HQQ's solver takes the time of an export
            self._last = {path: self.quantizer.quantize(self._read(f"{path}.weight"))}
        return self._last[path]

    def merged(self, path: str) -> torch.Tensor:
        """The weight of a linear with its adapter folded into the base it was trained on, fp32 `[out, in]`."""
        weight = self.tensor(f"{path}.weight")
        if f"{path}.lora_A.weight" not in self._adapter:
            return weight.float()
        a, b = self.low_rank(path)
        merged = torch.addmm(weight.float(), b.float(), a.float(), alpha=self.run.scaling)
        return merged * self._factor(path, weight).unsqueeze(1)

    def low_rank(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A `[r, in]` and B `[out, r]` of an adapted linear."""
        return tuple(self._adapter[f"{path}.{name}.weight"].to(self.device) for name in ("lora_A", "lora_B"))

    def row_factor(self, path: str) -> torch.Tensor:
        """What training multiplies each output row by, fp32 `[out]`: DoRA's m / n, ones elsewhere."""
        return self._factor(path, self.tensor(f"{path}.weight") if self.run.dora else None)

    def _factor(self, path, weight):
        magnitude = self._adapter.get(f"{path}.{MAGNITUDE}")
        if magnitude is None:
            return torch.ones(self.linears[path].out_features, device=self.device)
        norm = row_norms(weight, weight.float().norm(dim=1), *self.low_rank(path), self.run.scaling)
        return magnitude.to(self.device).float() / norm.clamp_min(torch.finfo(torch.float32).tiny)

    def _read(self, name):
        return self.reader.tensor(self._stored[name]).to(self.device)
