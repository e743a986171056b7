"""What trains in blocks, gathered and reduced out of neighbours' memory: FSDP2's own collectives are the reference."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from commands import losses
from real_run import first_step, make_config, prepared
from safetensors.torch import load_file
from torch import nn

import train
from fsdp_utils.core import processes
from fsdp_utils.core.rows import local
from fsdp_utils.sharding import peer_collectives
from fsdp_utils.sharding.peer_collectives import PeerAllGather, PeerCollectives, PeerReduceScatter, buffer_bytes


def learned(flags: dict) -> tuple[list[float], dict[str, torch.Tensor], tuple[int, int]]:
    """A run of several steps: its losses, what it saved, and how often blocks were gathered and reduced here."""
    config, counts = make_config(**flags), {PeerAllGather: 0, PeerReduceScatter: 0}

    def counted(kind, call):
        def run(self, *args, **kwargs):
            counts[kind] += 1
            return call(self, *args, **kwargs)

        return patch.object(kind, "__call__", run)

    with counted(PeerAllGather, PeerAllGather.__call__), counted(PeerReduceScatter, PeerReduceScatter.__call__):
        train.main(config)
    processes.barrier()
    return losses(config.output_dir), load_file(Path(config.output_dir) / "model.safetensors"), tuple(counts.values())


def both_ways(workers, settings: dict, folder: Path) -> tuple:
    """Through FSDP2, and here."""
    given = settings | dict(save_model=True, max_steps=3, lr=1e-2)
    run = lambda on: workers.run(learned, given | dict(peer_gather=on, output_dir=folder / str(on)))[0]
    return run(False), run(True)


# three blocks, three steps: in forward and in backward
@pytest.mark.parametrize(
    ("more", "gathered", "reduced"),
    [
        (dict(precision="bf16", optimizer="adamw"), 18, 9),
        (dict(precision="bf16", optimizer="adamw", optimizer_in_backward=True, apply_gradient_clipping=False), 18, 9),
        (dict(precision="fp32", sharding_strategy="shard_grad_op"), 9, 9),
        (dict(precision="fp32", sharding_strategy="hybrid_full_shard"), 18, 9),
        (dict(precision="bf16", batch_size=1, gradient_accumulation_steps=2, no_sync=False), 36, 18),
        (dict(precision="bf16", batch_size=1, gradient_accumulation_steps=2, no_sync=True), 36, 0),
    ],
    ids=str,
)
def test_two_processes_learn_the_same_bits(pair, tiny, flags, tmp_path, more, gathered, reduced):
    """Of two addends every order gives the same sum, rounded once either way."""
    model = tiny("llama", num_hidden_layers=3)
    settings = flags(train_type="full") | dict(model_name=model, batch_size=2) | more
    (their_losses, theirs, none), (our_losses, ours, counts) = both_ways(pair, settings, tmp_path)
    assert none == (0, 0) and counts == (gathered, reduced)
    assert our_losses == their_losses and our_losses[0] != our_losses[-1]
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_three_processes_whose_rows_differ(trio, flags, tmp_path):
    """Three processes hold 22, 22 and 20 of 64 rows."""
    settings = flags(train_type="full", precision="fp32") | dict(batch_size=1, optimizer="sgd")
    (their_losses, theirs, _), (our_losses, ours, counts) = both_ways(trio, settings, tmp_path)
    assert min(counts) and our_losses == pytest.approx(their_losses, rel=1e-5)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)


def in_another_order(flags: dict) -> str:
    with patch.object(peer_collectives, "in_order", lambda module: reversed(list(module.parameters()))):
        try:
            first_step(flags)
        except RuntimeError as error:
            return str(error)


def test_an_order_that_is_not_known_is_no_silent_mixture(pair, flags):
    settings = flags(train_type="full", peer_gather=True) | dict(batch_size=4)
    assert all(
        "in an order that peer_collectives does not know" in said for said in pair.run(in_another_order, settings)
    )


def taken(flags: dict) -> tuple[int, int, int, int]:
    """Base as it is said; bytes of frozen rows, and of the two buffers; what is still mapped after closing twice."""
    ready = prepared(make_config(**flags))
    (peers,) = (each for each in ready.peers if isinstance(each, PeerCollectives))
    buffers = sum(b.nbytes for b in peers.reduce.buffers)
    frozen = sum(local(p).nbytes for p in ready.model.parameters() if not p.requires_grad)
    for _ in range(2):
        ready.close()
    return ready.sizes["base"], frozen, buffers, len(peers.gathers) + len(peers.reduce.everyone)


def test_buffers_are_counted_and_let_go(pair, flags):
    for base, frozen, buffers, left in pair.run(taken, flags(train_type="full", peer_gather=True)):
        assert base == pytest.approx(frozen + buffers) and buffers and not left


def test_buffer_of_the_largest_block():
    """Rows of zeros make shards even."""
    small, large = nn.Linear(4, 3, bias=False), nn.Linear(4, 5, bias=True, dtype=torch.bfloat16)
    assert buffer_bytes([small, large], shards=2) == max(4 * 4 * 4, 2 * (6 * 4 + 6))
    assert buffer_bytes([small.requires_grad_(False)], shards=2) == 0
