"""Frozen weights copied out of the neighbours' memory: what FSDP2 would gather, when, and where it falls back."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from runs import first_step, make_config, packed_bytes, prepared
from safetensors.torch import load_file
from test_parity import assert_close, assert_learns
from torch.distributed.tensor import DTensor

import train
from fsdp_utils import distributed, peer_gather
from fsdp_utils.losses import with_targets
from fsdp_utils.memory import remedies
from fsdp_utils.micro_step import micro_step
from methods import TRAIN_TYPES
from methods.errors import UserError

CPU = torch.device("cpu")
TOGETHER, APART = 1e9, 0.0  # of the frozen bytes, for peer_gather.LITTLE: the tiny models' adapters are not little


def with_little(little: float, function, *args):
    """Calls a function with what trains in one group, or in one for each block."""
    with patch.object(peer_gather, "LITTLE", little):
        return function(*args)


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_two_processes_equal_one(pair, one_process, flags, train_type):
    """Loss and gradients of every train type, whose frozen weights no collective gathers."""
    alone = one_process(flags(train_type=train_type))
    assert_learns(alone)
    settings = {**flags(train_type=train_type, peer_gather=True), "batch_size": 4}
    for step in pair.run(with_little, TOGETHER, first_step, settings):
        assert_close(step, alone, relative=1e-5)


@pytest.mark.parametrize(("train_type", "little"), [("bnb_dora", TOGETHER), ("bnb_dora", APART), ("llama_pro", APART)])
@pytest.mark.parametrize(
    "more",
    [
        dict(sharding_strategy="shard_grad_op"),
        dict(sharding_strategy="hybrid_full_shard"),
        dict(sharding_strategy="ddp"),
        dict(use_gradient_checkpointing=False),
        dict(reentrant_checkpointing=True),
        dict(checkpoint_policy="narrow"),
        dict(fused_loss=False),
        dict(batch_size=2, gradient_accumulation_steps=2, no_sync=False),
        dict(batch_size=2, gradient_accumulation_steps=2, no_sync=True),
    ],
    ids=str,
)
def test_with_everything_else(pair, one_process, flags, train_type, little, more):
    """The same beside every option that decides when a block runs, is whole, or is reduced."""
    alone = one_process(flags(train_type=train_type))
    settings = flags(train_type=train_type, peer_gather=True) | dict(batch_size=4) | more
    for step in pair.run(with_little, little, first_step, settings):
        assert_close(step, alone, relative=1e-5)


def test_rows_that_do_not_divide(trio, flags):
    """Three processes hold 22, 22 and 20 of 64 rows; FSDP2's gathering is the reference."""
    settings = {**flags(train_type="bnb_dora"), "batch_size": 1}
    theirs, ours = (
        trio.run(with_little, TOGETHER, first_step, {**settings, "peer_gather": on}) for on in (False, True)
    )
    for got, want in zip(ours, theirs, strict=True):
        assert_learns(want)
        assert_close(got, want, relative=1e-5)


@pytest.mark.parametrize("train_type", ["bnb_dora", "hqq_lora", "custom_lora"])
def test_the_same_rows_as_fsdp2(pair, flags, train_type):
    """Every process holds the same bytes, and as many, as where FSDP2 shards the frozen weights."""
    theirs, ours = (pair.run(packed_bytes, flags(train_type=train_type, peer_gather=on)) for on in (False, True))
    for their, our in zip(theirs, ours, strict=True):
        assert their.keys() == our.keys() and len(their) > 10
        assert all(torch.equal(our[name], bytes_) for name, bytes_ in their.items())


def trained(flags: dict) -> tuple[list[float], dict[str, torch.Tensor]]:
    """A run of several steps: its losses, and the adapters it saved."""
    config = make_config(**flags)
    train.main(config)
    distributed.barrier()
    folder = Path(config.output_dir)
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return losses, load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("train_type", ["custom_qlora", "bnb_dora"])
def test_a_run_is_the_same(pair, flags, tmp_path, train_type, packing):
    """Several optimizer steps, with gathering at the end of each, learn and save what they do through FSDP2."""
    settings = flags(train_type=train_type, save_model=True, num_epochs=2, lr=1e-2, packing=packing, optimizer="sgd")
    settings |= dict(batch_size=2)
    results = []
    for on in (False, True):
        more = dict(peer_gather=on, output_dir=tmp_path / str(on))
        results.append(pair.run(with_little, TOGETHER, trained, settings | more)[0])
    (their_losses, theirs), (our_losses, ours) = results
    assert len(our_losses) > 3 and our_losses[0] != our_losses[-1]
    assert our_losses == pytest.approx(their_losses, rel=1e-5)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)


def fetches(flags: dict, steps: int) -> tuple[list[list[int]], bool, bool]:
    """The blocks fetched in each step, whether weights are rows again afterwards, whether what trains is one group."""
    config, fetched, fetch = make_config(**flags), [], peer_gather.PeerGather._fetch

    def counted(self, number):
        if self.slots[number % self.count].holds != number:
            fetched[-1].append(number)
        fetch(self, number)

    with patch.object(peer_gather.PeerGather, "_fetch", counted):
        model, _, mesh, device = prepared(config)
        run = micro_step(model, config, mesh=mesh, device=device)
        ids = torch.arange(8)[None]
        for _ in range(steps):
            fetched.append([])
            run(with_targets(dict(input_ids=ids, labels=ids)), 1.0)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return fetched, all(isinstance(p, DTensor) for p in frozen), model.gathered_ahead


def test_what_is_fetched_when(pair, tiny, flags):
    """Two slots: the last two blocks of forward are still there when backward begins, and the first two when the next
    step does. Without resharding each block is fetched once in a run. Blocks that train are reduced one by one."""
    model = tiny("llama", num_hidden_layers=5)
    settings = {**flags(train_type="bnb_dora", peer_gather=True), "model_name": model}
    (found, sharded, together), _ = pair.run(with_little, TOGETHER, fetches, settings, 3)
    assert found == [[0, 1, 2, 3, 4, 2, 1, 0], [2, 3, 4, 2, 1, 0], [2, 3, 4, 2, 1, 0]]
    assert sharded and together
    (found, sharded, _), _ = pair.run(fetches, {**settings, "sharding_strategy": "shard_grad_op"}, 2)
    assert found == [[0, 1, 2, 3, 4], []] and sharded
    (_, _, together), _ = pair.run(fetches, flags(train_type="bnb_llama_pro", peer_gather=True), 1)
    assert not together


def cannot(flags: dict, where: int) -> tuple[bool, str]:
    """What `auto` and `true` do when one process cannot map the others' memory."""
    fails = patch.object(peer_gather, "mapped", side_effect=RuntimeError("peer access is not supported"))
    config = make_config(**flags)
    mesh = distributed.mesh_for(config, CPU)
    if distributed.rank() == where:
        fails.start()
    try:
        reached = peer_gather.reachable(mesh, CPU)
        prepared(config)
    except UserError as error:
        return reached, str(error)
    finally:
        patch.stopall()


@pytest.mark.parametrize("where", [0, 1])
def test_memory_out_of_reach(pair, flags, where):
    """If one process cannot, none does; and who insists on it gets one line, in every process."""
    settings = flags(train_type="bnb_dora", peer_gather=True)
    for reached, message in pair.run(cannot, settings, where):
        assert not reached
        assert "--peer_gather true" in message and "pass auto or false" in message and "\n" not in message
    assert all(pair.run(_reachable, settings))


def _reachable(flags: dict) -> bool:
    return peer_gather.reachable(distributed.mesh_for(make_config(**flags), CPU), CPU)


def test_where_it_has_no_place(tiny):
    """With CPU offload it is refused by name; on a CPU only who asks for it gets it."""
    with pytest.raises(UserError, match=r"--peer_gather true: .* --use_cpu_offload false"):
        make_config(model_name=tiny("llama"), peer_gather=True, use_cpu_offload=True)
    config = make_config(model_name=tiny("llama"), train_type="bnb_dora")
    assert config.peer_gather == "auto" and peer_gather.choose({}, config, mesh=object(), device=CPU) is None


def test_memory_is_freed_when_nobody_maps_it(monkeypatch):
    """At the end of a run every process lets go of the others' memory before any gives its own back."""
    events = []

    class Sharing:
        def disconnect(self):
            events.append("disconnect")

        def free(self):
            events.append("free")

    monkeypatch.setattr(distributed, "SHARING", [Sharing(), Sharing()])
    monkeypatch.setattr(distributed, "barrier", lambda: events.append("barrier"))
    for _ in range(2):
        distributed.stop_sharing()
    assert events == ["disconnect", "disconnect", "barrier", "free", "free"]


def test_out_of_memory_offers_to_leave_it():
    """Adapters that stay whole are what it costs."""
    for whole in (False, True):
        assert ("--peer_gather false" in remedies(make_config(), whole=whole)) is whole
