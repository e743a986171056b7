"""Where rows and activations go when they leave the GPU. That results stay the same is in test_gpu and test_parity."""

import weakref
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from fsdp_utils.model.weights import materialize
from fsdp_utils.sharding import host_memory
from fsdp_utils.sharding.host_memory import HostMemory

CPU = torch.device("cpu")


def on_gpus(rows: int, columns: int) -> nn.Parameter:
    """This process's half of a weight that is sharded over two GPUs, on meta; it takes no GPU to describe one."""
    mesh = DeviceMesh("cuda", torch.arange(2), _init_backend=False, _rank=0)
    meta = TensorMeta(torch.Size((2 * rows, columns)), (columns, 1), torch.float32)
    spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=meta)
    mine = torch.empty(rows, columns, device="meta")
    return nn.Parameter(DTensor(mine, spec, requires_grad=False), requires_grad=False)


def test_rows_of_gpus_stay_on_the_host():
    """CPU offload: the rows are made in host memory though the mesh is one of GPUs; no Parameter is replaced."""
    model = nn.Sequential(nn.Linear(4, 6, bias=False, device="meta"), nn.Linear(4, 6, bias=False, device="meta"))
    model[0].weight = model[1].weight = shared = on_gpus(3, 4)
    materialize(model, device=CPU, buffer_device=CPU)
    assert model[0].weight is model[1].weight is shared
    assert shared.device == shared.to_local().device == CPU
    assert shared.shape == (6, 4) and shared.to_local().shape == (3, 4)


def test_host_memory_wastes_little(monkeypatch):
    """Tensors get memory of their own, in pieces that torch's pinned allocator, which takes powers of two, fills."""
    monkeypatch.setattr(host_memory, "LARGEST_PIECE", 2**18)
    wanted = [torch.empty(n, dtype=d, device="meta") for n in (3, 700, 5000) for d in (torch.uint8, torch.float32)] * 50
    memory = HostMemory(sum(HostMemory.aligned(t.nbytes) for t in wanted), pinned=False)
    pieces = []
    monkeypatch.setattr(memory, "_piece", lambda n: pieces.append(n) or torch.empty(n, dtype=torch.uint8))
    got = [memory.empty(tensor) for tensor in wanted]
    assert all(ours.shape == t.shape and ours.dtype == t.dtype for ours, t in zip(got, wanted, strict=True))
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in got)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    rounded = lambda sizes: sum(1 << (n - 1).bit_length() for n in sizes)
    needed = [t.nbytes for t in wanted]
    assert rounded(pieces) < 1.1 * sum(needed)
    assert rounded(needed) > 1.3 * sum(needed)  # one by one


@pytest.mark.parametrize("slack", [0, 1])
def test_nothing_else_holds_what_was_offloaded(hostly, slack):
    """Inputs of all blocks but the last are free once they were copied: neither hooks nor graph keep them, and the
    offloader only those of the block whose copies may be under way."""
    hostly.slack = slack
    weights = [nn.Parameter(torch.randn(8, 8)) for _ in range(4)]
    run = lambda hidden, weight: torch.utils.checkpoint.checkpoint(torch.mm, hidden, weight, use_reentrant=False)
    blocks = [hostly.wrap(partial(run, weight=weight)) for weight in weights]
    start = torch.randn(4, 8, requires_grad=True)
    hidden, inputs = start * 1, []  # as a block's output: not a leaf
    for block in blocks:
        inputs.append(weakref.ref(hidden))
        hidden = block(hidden)
    assert len(hostly.sent) == 3
    assert [gone() is None for gone in inputs] == [True, True, True, False]
    assert [leaving.block for leaving in hostly.leaving] == [2 - slack, 2][-1 - slack :]
    hidden.sum().backward()
    got = [weight.grad.clone() for weight in weights]
    plain = start * 1
    for weight in weights:
        weight.grad, plain = None, plain @ weight
    plain.sum().backward()
    torch.testing.assert_close(got, [weight.grad for weight in weights])


def test_blocks_come_back_one_ahead(hostly):
    """While a block is in backward, what the block before it sent is already under way; each tensor comes once."""
    blocks, seen = [hostly.wrap(lambda hidden: (hidden.sin() * 2).cos()) for _ in range(4)], []
    hidden = torch.randn(4, 8, requires_grad=True)
    for block in blocks:
        hidden = block(hidden)
        hidden.register_hook(lambda grad: seen.append(len(hostly.brought)))
    assert len(hostly.sent) == 6  # two of each block but the last
    hidden.sum().backward()
    assert seen == [0, 2, 4, 6]
    assert len(hostly.brought) == 6
    # a copy is waited for before its source's memory is given back, or before it is read
    assert sorted(hostly.awaited) == sorted(f"{way} {n}" for way in ("out", "back") for n in range(1, 7))


def test_strides_survive(hostly):
    """A saved tensor comes back in the order in which it lay; one with gaps is not sent."""
    pack = partial(hostly.pack, block=0, elements=24, dtype=torch.float32)
    turned = torch.arange(24.0).view(2, 3, 4).transpose(1, 2)
    back = hostly.unpack(pack(turned), block=0)
    assert back.stride() == turned.stride()
    torch.testing.assert_close(back, turned)
    for other in (torch.zeros(4, 12)[:, :6], torch.zeros(24, dtype=torch.float64), nn.Parameter(torch.zeros(24))):
        assert pack(other) is other


def test_what_backward_does_not_ask_for_is_waited_for(hostly):
    """Backward of the last two blocks alone leaves what was fetched ahead; its copy ends before it is dropped."""
    blocks = [hostly.wrap(lambda hidden: hidden.sin()) for _ in range(3)]
    outputs = [torch.randn(4, 8, requires_grad=True)]
    for block in blocks:
        outputs.append(block(outputs[-1]))
    torch.autograd.grad(outputs[3].sum(), outputs[1])
    assert list(hostly.fetched) == [(0, 0)]
    awaited = set(hostly.awaited)
    blocks[0](outputs[0])
    assert set(hostly.awaited) - awaited == {"back 2"} and not hostly.fetched


def test_a_forward_without_backward_is_forgotten(hostly):
    """What it left is dropped when the next one begins, at the first block and only there."""
    weight = nn.Parameter(torch.randn(8, 8))
    blocks = [hostly.wrap(lambda hidden: hidden @ weight) for _ in range(3)]
    for _ in range(2):
        hidden = torch.randn(4, 8, requires_grad=True)
        for block in blocks:
            hidden = block(hidden)
        assert sorted(hostly.away) == [0, 1]
    hidden.sum().backward()
    assert weight.grad is not None
    assert not hostly.away and not hostly.fetched and not hostly.leaving
