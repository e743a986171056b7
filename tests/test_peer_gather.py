"""Frozen weights copied out of the neighbours' memory: what FSDP2 would gather, when, and where it falls back."""

import shutil
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from closeness import assert_close, assert_learns
from commands import losses
from real_run import first_step, make_config, packed_bytes, plan, prepared
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from workers import Workers

import train
from fsdp_utils.core import processes
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.ranks import rank
from fsdp_utils.core.rows import local
from fsdp_utils.data.batches import with_targets
from fsdp_utils.memory.budget import remedies, resident
from fsdp_utils.sharding import fsdp, peer_gather
from fsdp_utils.sharding.mesh import mesh_for
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from fsdp_utils.training.step import TrainStep
from methods import TRAIN_TYPES
from methods.adapter import LORA_A
from methods.lora import LoRALinear
from methods.targets import decoder_blocks

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


OPTIONS = [
    dict(sharding_strategy="shard_grad_op"),
    dict(sharding_strategy="hybrid_full_shard"),
    dict(sharding_strategy="ddp"),
    dict(use_gradient_checkpointing=False),
    dict(reentrant_checkpointing=True),
    dict(checkpoint_policy="narrow"),
    dict(fused_loss=False),
    dict(batch_size=2, gradient_accumulation_steps=2, no_sync=False),
    dict(batch_size=2, gradient_accumulation_steps=2, no_sync=True),
]


@pytest.mark.parametrize(
    ("train_type", "little", "more"),
    [
        *(("bnb_dora", TOGETHER, more) for more in OPTIONS),
        *(("bnb_dora", APART, more) for more in OPTIONS[::2]),
        *(("llama_pro", APART, more) for more in OPTIONS[1::2]),
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
    processes.barrier()
    return losses(config.output_dir), load_file(Path(config.output_dir) / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("train_type", "little", "more"),
    [
        ("custom_qlora", TOGETHER, dict()),
        ("bnb_dora", TOGETHER, dict(packing=True)),
        ("bnb_dora", TOGETHER, dict(batch_size=1, gradient_accumulation_steps=2, no_sync=True)),
        ("custom_qlora", TOGETHER, dict(packing=True, sharding_strategy="shard_grad_op")),
        ("custom_qlora", APART, dict(packing=True, sharding_strategy="shard_grad_op")),
    ],
    ids=str,
)
def test_a_run_is_the_same(pair, flags, tmp_path, train_type, little, more):
    """Several optimizer steps, with gathering at the end of each, learn and save what they do through FSDP2."""
    settings = flags(train_type=train_type, save_model=True, num_epochs=2, lr=1e-2, optimizer="sgd")
    settings |= dict(batch_size=2)
    results = []
    for on in (False, True):
        given = settings | more | dict(peer_gather=on, output_dir=tmp_path / str(on))
        results.append(pair.run(with_little, little, trained, given)[0])
    (their_losses, theirs), (our_losses, ours) = results
    assert len(our_losses) > 3 and our_losses[0] != our_losses[-1]
    assert our_losses == pytest.approx(their_losses, rel=1e-5)
    assert theirs.keys() == ours.keys()
    assert all(tensor.any() for name, tensor in ours.items() if "lora_B" in name)  # they begin at zero
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6)


def gathers(flags: dict) -> list[int]:
    """How often FSDP2 gathers in each of three optimizer steps of two micro-batches."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

    counts, gather = [], groups.foreach_all_gather

    def counted(*args, **kwargs):
        counts[-1] += 1
        return gather(*args, **kwargs)

    def begin(*args, **kwargs):
        counts.append(0)
        return backward(*args, **kwargs)

    backward = TrainStep.backward
    with patch.object(groups, "foreach_all_gather", counted), patch.object(TrainStep, "backward", begin):
        train.main(make_config(**flags))
    return counts


def test_adapters_are_gathered_once_a_step(pair, flags, tmp_path):
    """With them the embedding that is the head too; neither blocks, nor again for the second micro-batch."""
    settings = flags("qwen2", train_type="bnb_dora", peer_gather=True, max_steps=3, output_dir=tmp_path)
    settings |= dict(batch_size=1, gradient_accumulation_steps=2)
    assert pair.run(with_little, TOGETHER, gathers, settings)[0] == [2, 1, 1]  # the first step gathers for itself


def fetches(flags: dict, steps: int) -> tuple[list[list[int]], bool, bool]:
    """The blocks fetched in each step, whether weights are rows again afterwards, whether what trains is one group."""
    config, fetched, fetch = make_config(**flags), [], peer_gather.PeerGather._fetch

    def counted(self, number):
        if self._slot(number).holds != number:
            fetched[-1].append(number)
        fetch(self, number)

    with patch.object(peer_gather.PeerGather, "_fetch", counted):
        ready = prepared(config)
        run = TrainStep(ready, config, task=CAUSAL_LM).micro_step
        ids = torch.arange(8)[None]
        for _ in range(steps):
            fetched.append([])
            run(with_targets(dict(input_ids=ids, labels=ids)), 1.0)
    frozen = [p for p in ready.model.parameters() if not p.requires_grad]
    return fetched, all(isinstance(p, DTensor) for p in frozen), ready.gathered_with_root


def test_what_is_fetched_when(pair, tiny, flags):
    """Two slots: the last two blocks of forward are still there when backward begins, and the first two when the next
    step does. Without resharding each block is fetched once in a run."""
    model = tiny("llama", num_hidden_layers=5)
    settings = {**flags(train_type="bnb_dora", peer_gather=True), "model_name": model}
    (found, sharded, together), _ = pair.run(with_little, TOGETHER, fetches, settings, 3)
    assert found == [[0, 1, 2, 3, 4, 2, 1, 0], [2, 3, 4, 2, 1, 0], [2, 3, 4, 2, 1, 0]]
    assert sharded and together
    (found, sharded, _), _ = pair.run(fetches, {**settings, "sharding_strategy": "shard_grad_op"}, 2)
    assert found == [[0, 1, 2, 3, 4], []] and sharded


def test_whole_blocks_are_not_little(pair, tiny, flags, tmp_path):
    """One new block of five: little beside all the frozen bytes, but reduced by itself. Adapters of rank 2 on a base of
    32 bits are little in every block."""
    shape = dict(num_hidden_layers=5)
    expanded = tmp_path / "expanded"
    shutil.copytree(tiny("llama", **shape), expanded)
    (expanded / "expanded_layers.json").write_text('{"expanded_layers": [4]}')
    settings = flags(train_type="llama_pro", peer_gather=True) | dict(model_name=expanded, llama_pro_path=expanded)
    (_, _, together), _ = pair.run(fetches, settings, 1)
    assert not together
    settings = flags(train_type="custom_lora", lora_rank=2, peer_gather=True) | dict(model_name=tiny("llama", **shape))
    (_, _, together), _ = pair.run(fetches, settings, 1)
    assert together


def cannot(flags: dict, where: int) -> tuple[str, str]:
    """Why not, and what `true` says, when one process cannot map the others' memory."""
    fails = patch.object(peer_gather, "mapped", side_effect=RuntimeError("peer access is not supported"))
    config = make_config(**flags)
    mesh = mesh_for(config, CPU)
    if rank() == where:
        fails.start()
    try:
        why = peer_gather.unreachable(mesh, CPU)
        prepared(config)
    except UserError as error:
        return why, str(error)
    finally:
        patch.stopall()


@pytest.mark.parametrize("where", [0, 1])
def test_memory_out_of_reach(pair, flags, where):
    """If one process cannot, none does; and who insists on it gets one line, in every process."""
    settings = flags(train_type="bnb_dora", peer_gather=True)
    for why, message in pair.run(cannot, settings, where):
        assert why == "peer access is not supported" and f"({why})" in message
        assert "--peer_gather true" in message and "pass auto or false" in message and "\n" not in message
    assert pair.run(what_auto_does, settings) == [(None, False)] * 2


def what_auto_does(flags: dict) -> tuple[str | None, bool]:
    """Why memory cannot be reached (it can), and whether `auto` makes anything of that on a CPU."""
    config = make_config(**flags | dict(peer_gather="auto"))
    mesh = mesh_for(config, CPU)
    return peer_gather.unreachable(mesh, CPU), peer_gather.reached(config, mesh=mesh, device=CPU)


def test_where_it_has_no_place(tiny):
    """With CPU offload it is refused by name, and said to do nothing where nothing is sharded."""
    with pytest.raises(UserError, match=r"--peer_gather true: .* --use_cpu_offload false"):
        make_config(model_name=tiny("llama"), peer_gather=True, use_cpu_offload=True)
    config = make_config(model_name=tiny("llama"), peer_gather=True, train_type="bnb_dora", sharding_strategy="ddp")
    assert any("--peer_gather has no effect" in note for note in config.notes())


def estimates(flags: dict) -> tuple[list[int], int, int]:
    """`recompute.resident` before and after frozen weights are sharded here, and with adapters whole; what two slots
    take less than the three blocks that FSDP2 makes whole; and what the rest of the blocks takes more when all of it is
    whole: adapters and gradients, less the rows of gradients, which come when backward is over."""
    config = make_config(**flags)
    planned = plan(config)
    mesh, blocks = mesh_for(config, CPU), decoder_blocks(planned.model)
    placed = dict(mesh=mesh, on_host={}, device=CPU)
    total = lambda **more: resident(planned.model, blocks, config, **placed, **more).total
    found = [total()]
    shards = peer_gather.PeerShards(blocks, mesh=mesh, resharded=True)
    found += [total(gathered_with_root=on, slot_bytes=sum(shards.slot_sizes)) for on in (False, True)]
    apart = {id(m._parameters[n]) for b in blocks.values() for m, n in peer_gather.frozen_weights(b)}
    apart |= {id(p) for p in peer_gather.unread_parameters(planned.model)}
    rest = [[p for p in block.parameters() if id(p) not in apart] for block in blocks.values()]
    trained = [p for block in rest for p in block if p.requires_grad]
    kept = sum(p.nbytes for block in rest for p in block if not p.requires_grad)  # norms, whole with the root
    one, buffers = sum(p.nbytes for p in rest[0]), sum(4 * p.numel() for p in rest[0] if p.requires_grad)
    by_block = max(3 * one, one + buffers)  # of two blocks: the last, before another comes; the first, after another
    frozen = sum(m._parameters[name].nbytes for m, name in peer_gather.frozen_weights(next(iter(blocks.values()))))
    return (
        found,
        3 * frozen - sum(shards.slot_sizes),
        kept - by_block + sum(2 * p.nbytes - p.nbytes // 2 for p in trained),
    )


def test_estimate_for_auto(pair, flags):
    """`--use_gradient_checkpointing auto` counts adapters that are whole, and two slots in place of whole blocks."""
    for (before, sharded, together), less, whole in pair.run(estimates, flags(train_type="bnb_dora")):
        assert before - sharded == less > 0 and together - sharded == whole


def kept_to_be_saved(flags: dict) -> tuple[dict[str, int], bool, int, bool, list]:
    """What memory is said to go to; whether what trains is whole during a step; rows of PiSSA's start in this process,
    by the bytes they take; whether it has only these while FSDP2's groups are whole; and the start as it is saved."""
    run = prepared(make_config(**flags))
    layers = [m for m in run.model.modules() if isinstance(m, LoRALinear)]
    starts = [p for m in layers for name, p in m.named_parameters(recurse=False) if name.startswith("initial_")]
    for module in run.model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    still = [p for m in layers for name, p in m.named_parameters(recurse=False) if name.startswith("initial_")]
    rows_only = all(isinstance(p, DTensor) for p in still)
    fsdp.leave_sharded(run)
    saved = [run.method.layer_tensors(m)[LORA_A].whole().detach().clone() for m in layers]
    return run.sizes, run.gathered_with_root, sum(local(p).nbytes for p in starts), rows_only, saved


@pytest.mark.parametrize("more", [{}, dict(use_cpu_offload=True), dict(sharding_strategy="hybrid_full_shard")], ids=str)
@pytest.mark.parametrize("peer_gather", [False, True])
def test_nobody_gathers_what_is_kept_to_be_saved(pair, flags, peer_gather, more):
    """PiSSA's start is rows in every process, also while its block is whole; it is counted as base, and what else is
    gathered, and how, is what it is without. Saved, it is whole."""
    if peer_gather and "use_cpu_offload" in more:
        pytest.skip("refused together")
    settings = flags(train_type="custom_qlora", lora_rank=2, **more)
    little = 0.5  # of the frozen bytes: adapters are less, with as much again for their start more
    alone = kept_to_be_saved({**settings, "lora_init": "pissa", "use_cpu_offload": False})[-1]
    plain, pissa = (
        pair.run(with_little, little, kept_to_be_saved, settings | dict(lora_init=start, peer_gather=peer_gather))
        for start in ("default", "pissa")
    )
    for (sizes, with_root, _, _, _), (kept, root_now, nbytes, rows_only, saved) in zip(plain, pissa, strict=True):
        assert rows_only and with_root == root_now == peer_gather
        counted = 0 if more.get("use_cpu_offload") else nbytes
        assert kept == sizes | dict(base=sizes["base"] + counted) and nbytes
        assert all(torch.equal(got, want) for got, want in zip(saved, alone, strict=True))


def left_of_sharing(flags: dict) -> tuple[list[str], int, int]:
    """What closing does in which order; copies that a model makes; hooks on its blocks and copies after it."""
    events, ready = [], prepared(make_config(**flags))
    (peers,) = ready.peers
    copies = sum(map(len, peers.copies))
    names = ("_disconnect", "_free")
    told = {name: partial(lambda name, original: (events.append(name), original()), name, getattr(peers, name))
            for name in names}  # fmt: skip
    with patch.multiple(peers, **told), patch.object(peer_gather, "barrier", lambda: events.append("barrier")):
        for _ in range(2):
            ready.close()
    hooks = sum(len(block._forward_pre_hooks) + len(block._forward_hooks) for block in peers.blocks)
    return events, copies, hooks + len(peers.copies)


def test_sharing_ends(pair, flags):
    """At the end of a run every process lets go of the others' memory before any gives its own back, once; no mapping
    and no hook stays."""
    settings = flags(train_type="lora", peer_gather=True)
    for events, copies, left in pair.run(with_little, TOGETHER, left_of_sharing, settings):
        assert events == ["_disconnect", "barrier", "_free"]
        assert copies > 10 and left == 0


def test_two_by_two(flags):
    """Two copies of the model, each sharded over two of four processes: every process reads its own neighbour, frozen
    weights or blocks that train; the reduction over the copies stays FSDP2's."""
    four = Workers(4)
    settings = dict(sharding_strategy="hybrid_full_shard", hybrid_shard_size=2)
    try:
        for train_type in ("bnb_dora", "full"):
            given = flags(train_type=train_type) | settings | dict(batch_size=2)
            run = lambda on, given=given: four.run(with_little, TOGETHER, first_step, {**given, "peer_gather": on})
            theirs, ours = run(False), run(True)
            for got, want in zip(ours, theirs, strict=True):
                assert_learns(want)
                assert_close(got, want, relative=1e-5)
    finally:
        four.close()


def sizes_and_bytes(flags: dict) -> tuple[dict[str, int], dict[str, int]]:
    """What memory is said to go to, and the bytes that are there."""
    config = make_config(**flags)
    ready = prepared(config)
    model = ready.model
    rows = lambda trains: sum(local(p).nbytes for p in model.parameters() if p.requires_grad is trains)
    whole = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    slots = sum(slot.memory.nbytes for slot in ready.peers[0].slots)
    found = dict(frozen=rows(False), trained=rows(True), whole=whole, slots=slots)
    return ready.sizes, found


def test_what_it_takes_is_counted(pair, flags):
    """The out-of-memory message counts two whole blocks, and adapters and gradients whole."""
    settings = flags(train_type="bnb_dora", peer_gather=True)
    for sizes, found in pair.run(with_little, TOGETHER, sizes_and_bytes, settings):
        assert sizes["base"] == pytest.approx(found["frozen"] + found["slots"]) and found["slots"]
        assert sizes["adapters and gradients"] == pytest.approx(found["trained"] + 2 * found["whole"])


def test_out_of_memory_offers_to_leave_it():
    """Adapters that stay whole are what it costs."""
    for whole in (False, True):
        assert ("--peer_gather false" in remedies(make_config(), gathered_with_root=whole)) is whole


@pytest.mark.parametrize(("rates", "notes"), [([340.0, 310.0], 0), ([340.0, 18.0], 1)])
def test_a_slow_link_is_said(monkeypatch, capsys, rates, notes):
    """What each process reads a second is measured; the slowest is named where it is far behind."""
    gather, memory = object.__new__(peer_gather.PeerGather), torch.zeros(2**20, dtype=torch.uint8)
    gather.slots, gather.stream = [peer_gather._Slot(2**20, memory.device)], None
    gather.copies = [[(gather.slots[0].memory, memory)]]
    assert gather._gigabytes_a_second() > 0
    gather.stream = object()
    monkeypatch.setattr(peer_gather.PeerGather, "_gigabytes_a_second", lambda self: 0)
    monkeypatch.setattr(peer_gather, "exchange", lambda mine: rates)
    gather._say(how="once a step", processes=2)
    said = capsys.readouterr().out
    assert f"at {min(rates):.0f} GB/s, what trains is gathered once a step" in said
    assert said.count("note: process 1 reads at 18 GB/s, process 0 at 340 GB/s") == notes
