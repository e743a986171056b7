"""Packed weights of more than two dimensions: a stack of matrices is only more rows."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fsdp_utils.core.rows import gather, local
from fsdp_utils.core.safetensors_io import CheckpointReader
from fsdp_utils.model.weights import load_weights, materialize
from methods.packed import as_bytes
from methods.quantizers.bnb import Bnb4bit
from methods.quantizers.hqq import HQQ
from methods.quantizers.linear import QuantizedWeight, weight_rows

CPU = torch.device("cpu")
STACK, OUT, IN = 3, 10, 128
QUANTIZERS = [Bnb4bit("nf4", 64, "fp32"), Bnb4bit("nf4", 32, "double"), HQQ(3, 64, "bf16")]


class Experts(nn.Module):
    """What a family's module of stacked matrices comes to."""

    base_model_prefix, all_tied_weights_keys = "model", None

    def __init__(self, quantizer):
        super().__init__()
        self.experts = QuantizedWeight((STACK, OUT, IN), quantizer)


def stack() -> torch.Tensor:
    return torch.randn(STACK, OUT, IN, generator=torch.Generator().manual_seed(0)) * 0.1


def loaded(folder, quantizer) -> tuple[list[torch.Tensor], torch.Tensor, int]:
    """Gathered bytes of every packed parameter of a stack that the loader filled; its weight; rows held here."""
    model = Experts(quantizer)
    if torch.distributed.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    materialize(model, device=CPU, buffer_device=CPU)
    load_weights(model, CheckpointReader(folder), device=CPU)
    packed = [gather(p).contiguous().view(torch.uint8) for p in model.experts.packed()]
    rows = weight_rows(model.experts, gather, dtype=torch.float32)
    return packed, rows.view(model.experts.shape), len(local(model.experts.packed()[0]))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_a_stack_is_its_matrices(pair, tmp_path, quantizer):
    """Loaded whole by one process, and by two whose border lies inside a matrix: the bytes are those of each matrix
    quantized by itself."""
    whole = stack()
    save_file({"experts": whole}, tmp_path / "model.safetensors")
    apart = [quantizer.quantize(matrix) for matrix in whole]
    expected = [
        torch.cat([as_bytes(t.contiguous().view(torch.uint8)) for t in parts]) for parts in zip(*apart, strict=True)
    ]
    weight = torch.stack([quantizer.dequantize(p, in_features=IN, dtype=torch.float32) for p in apart])
    for packed, found, rows in [loaded(tmp_path, quantizer), *pair.run(loaded, tmp_path, quantizer)]:
        assert all(torch.equal(got, want) for got, want in zip(packed, expected, strict=True))
        assert torch.equal(found, weight)
        assert rows in (STACK * OUT, STACK * OUT // 2)
