"""--use_gradient_checkpointing auto: what a block keeps, what is free, who recomputes, and that no gradient changes."""

from types import SimpleNamespace

import pytest
import torch
from real_run import first_step, make_config, plan, prepared
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from fsdp_utils.config import TrainConfig
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import as_dict
from fsdp_utils.core.ranks import rank
from fsdp_utils.core.rows import local
from fsdp_utils.data.batches import with_targets
from fsdp_utils.memory import recompute
from fsdp_utils.memory.activations import measure
from fsdp_utils.memory.budget import Block, Resident, at_loss, optimizer_bytes, peak_activations, remedies, resident
from fsdp_utils.memory.graphs import graph_tokens
from fsdp_utils.memory.recompute import blocks_to_recompute, free_memory, lay_out
from fsdp_utils.model import attention
from fsdp_utils.options import OWN_ATTENTION
from fsdp_utils.sharding import offload, wrapping
from fsdp_utils.sharding.mesh import mesh_for
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from fsdp_utils.training.loss import CausalLMLoss
from methods.targets import decoder_blocks

CPU = torch.device("cpu")
BLOCKS = 3
BLOCK = Block(whole=100, recomputing=10, again=90, within=50, leaving=0)
SIZES = dict(block=BLOCK, at_loss=60)


@pytest.mark.parametrize(("free", "expected"), [
    (4 * 100 + 60, 0),  # all four keep everything while the loss runs
    (4 * 100 + 59, 1),
    (10 + 3 * 100 + 60, 1),
    (10 + 3 * 100 + 59, 2),
    (3 * 10 + 100 + 60, 3),
    (3 * 10 + 100 + 59, 4),  # nothing fits: all
    (-1, 4),
])  # fmt: skip
def test_as_few_blocks_as_fit(free, expected):
    """Each block that keeps everything costs its bytes; where nothing fits, all recompute."""
    assert blocks_to_recompute(free=free, blocks=4, **SIZES) == expected


def peak_by_hand(recomputed: set[int], *, blocks, block, at_loss, gradients=0, of_head=0) -> tuple[int, int]:
    """The peaks of a step, walked block by block; each block makes an equal part of the gradients."""
    cost = [block.recomputing if i in recomputed else block.whole for i in range(blocks)]
    held, backward = sum(cost), []
    begun = held + at_loss + block.leaving - gradients
    for i in reversed(range(blocks)):
        to_come = (gradients - of_head) * i // blocks
        backward.append(held + block.within + (block.again if i in recomputed else 0) - to_come)
        held -= cost[i]
    return begun, max(backward)


@pytest.mark.parametrize("gradients", [dict(), dict(gradients=30, of_head=10), dict(gradients=700, of_head=0)], ids=str)
@pytest.mark.parametrize("at_loss", [0, 60, 500])
@pytest.mark.parametrize("recomputed", range(6))
def test_peak(recomputed, at_loss, gradients):
    """The formula is the step walked by hand, and recomputing the first blocks peaks no higher than the last ones."""
    sizes = {**SIZES, "at_loss": at_loss, "blocks": 5, **gradients}
    first = peak_by_hand(set(range(recomputed)), **sizes)
    assert peak_activations(recomputed, **sizes) == first
    assert gradients or max(first) <= max(peak_by_hand(set(range(5 - recomputed, 5)), **sizes))


def planned_and_kept(config, *, attention_name=None):
    planned = plan(config)
    if attention_name:
        planned.model.config.get_text_config()._attn_implementation = attention_name
    dtypes = dict(dtype=planned.dtypes.stored, autocast=planned.dtypes.autocast)
    return planned, measure(planned.model, decoder_blocks(planned.model), config, task=CAUSAL_LM, **dtypes)


def kept_by_real_blocks(config) -> tuple[int, int]:
    """Largest bytes that a block of the loaded model saves for backward in a real step, and those of its input.

    Neither parameters nor what is there once for all blocks (masks, rotary tables) count.
    """
    run = prepared(config)
    loaded = run.model.train()
    shared = {p.untyped_storage().data_ptr() for p in loaded.parameters()}
    totals, inputs = [], []

    def watched(forward):
        def run(*args, **kwargs):
            saved, known = {}, set(shared)
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            known |= {t.untyped_storage().data_ptr() for t in tensors if not t.requires_grad}

            def pack(tensor):
                if tensor.untyped_storage().data_ptr() not in known:
                    saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with saved_tensors_hooks(pack, lambda tensor: tensor):
                out = forward(*args, **kwargs)
            totals.append(sum(saved.values()))
            inputs.append(sum(t.nbytes for t in tensors if t.requires_grad))
            return out

        return run

    for block in decoder_blocks(loaded).values():
        block.forward = watched(block.forward)
    rows, length = config.batch_size, config.context_length
    ids = torch.randint(0, 250, (rows, length), generator=torch.Generator().manual_seed(0))
    batch = dict(input_ids=ids, labels=ids)
    if config.packing:
        batch["position_ids"] = (torch.arange(length) % 20).repeat(rows, 1)
    with torch.autocast("cpu", run.autocast or torch.bfloat16, enabled=run.autocast is not None):
        CausalLMLoss(loaded, fused=run.fused_loss)(
            with_targets(batch)
        )  # the graph stays alive: no storage is used twice
    return max(totals), max(inputs)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gemma2", "phi3"])
@pytest.mark.parametrize("train_type", ["bnb_dora", "qlora", "custom_lora", "hqq_lora", "full"])
def test_measured_is_what_a_block_keeps(tiny, family, train_type):
    """The bytes measured on fake tensors are those that a block of the real model saves."""
    config = make_config(model_name=tiny(family), train_type=train_type, batch_size=2, use_gradient_checkpointing=False)
    kept = planned_and_kept(config)[1]
    real, real_input = kept_by_real_blocks(config)
    assert real <= kept.block <= 1.01 * real
    assert (kept.input, kept.outputs.by_policy) == (real_input, 0)


@pytest.mark.parametrize(
    "how",
    [
        dict(precision="bf16"),
        dict(precision="bf16_autocast"),
        dict(packing=True),
        dict(lora_dropout=0.1),
        dict(fused_kernels=False),
        dict(attn_implementation="eager"),
        dict(quantize_lm_head=True),
    ],
    ids=str,
)
def test_measured_with_other_flags(tiny, how):
    """Precision, packing, dropout and attention change what is kept; the measurement follows."""
    config = make_config(model_name=tiny("llama"), train_type="bnb_dora", batch_size=2, **how)
    kept = planned_and_kept(config)[1]
    real, _ = kept_by_real_blocks(make_config(**{**given(config), "use_gradient_checkpointing": False}))
    assert real <= kept.block <= 1.01 * real


def given(config) -> dict:
    return {name: value for name, value in as_dict(config).items() if value is not None}


def test_attention_of_the_gpu(tiny):
    """The attention that runs on a GPU, whole rows or packed, is measured where there is none, and keeps no mask."""
    flags = dict(model_name=tiny("llama"), train_type="bnb_dora", batch_size=2, precision="bf16")
    plain = planned_and_kept(make_config(**flags))[1].block
    for packing in (False, True):
        config = make_config(**flags, packing=packing)
        assert planned_and_kept(config, attention_name=attention.NAME)[1].block == pytest.approx(plain, rel=0.01)


WIDTHS = dict(q=64, k=32, v=32, o=64, gate=128, up=128, down=64)  # of a tiny Llama's outputs; hidden size 64
ATTENDED, HIDDEN = 64 + 4, 6 * 8  # output and a number per head; A x of rank 8 in all but o


@pytest.mark.parametrize(
    ("train_type", "policy", "elements"),
    [
        ("bnb_dora", "full", 0),
        ("custom_qlora", "adapters", HIDDEN),
        ("bnb_dora", "adapters", HIDDEN + sum(WIDTHS[name] for name in ("k", "v", "down"))),
        ("bnb_dora", "narrow", HIDDEN + ATTENDED + sum(WIDTHS[name] for name in ("q", "k", "v", "o", "down"))),
        ("bnb_dora", "products", HIDDEN + ATTENDED + sum(WIDTHS.values())),
    ],
)
def test_what_a_policy_keeps(tiny, train_type, policy, elements):
    """Elements per token, by hand for a Llama block."""
    config = make_config(model_name=tiny("llama"), train_type=train_type, batch_size=2, checkpoint_policy=policy)
    assert planned_and_kept(config)[1].outputs.by_policy == 2 * 64 * 4 * elements


@pytest.mark.parametrize("packed", [False, True])
def test_an_embedding_on_the_host_takes_no_room(tiny, packed):
    """Only on one GPU, and only if it is frozen."""
    embedding = lambda planned: sum(p.nbytes for p in planned.model.get_input_embeddings().parameters())
    held = []
    for on_host in (True, False):
        flags = dict(train_type="bnb_dora", embedding_on_host=on_host, quantize_lm_head=packed)
        config = make_config(model_name=tiny("llama"), **flags)
        planned = plan(config)
        held.append(held_by(planned, config, on_host=offload.embedding_for_host(planned.model, config)))
    assert held[1] - held[0] == embedding(planned) > 0
    config = make_config(model_name=tiny("llama"), train_type="full")
    planned = plan(config)
    total = sum(p.nbytes for p in planned.model.parameters())
    assert held_by(planned, config) >= 2 * total


def test_families_that_change_logits_hold_all_of_them(tiny):
    """Gemma 2 caps its logits after the head, which the fused loss cannot do."""
    for family, fused in (("llama", True), ("gemma2", False)):
        config = make_config(model_name=tiny(family), train_type="bnb_dora", batch_size=2)
        planned, kept = planned_and_kept(config)
        assert kept.fused_loss is fused
        needed = at_loss(planned.model, config, kept, dtype=torch.float32, autocast=None)
        assert fused or needed > 128 * 300 * 4 * 3  # logits, probabilities, gradient


def test_measuring_leaves_the_model_as_it_was(tiny):
    """Parameters stay on meta, and blocks have their own forward."""
    config = make_config(model_name=tiny("llama"), train_type="bnb_dora")
    planned, _ = planned_and_kept(config)
    assert all(p.is_meta for p in planned.model.parameters())
    assert not any("forward" in vars(block) for block in decoder_blocks(planned.model).values())


def test_a_model_that_cannot_be_measured(tiny, monkeypatch):
    """One line names the flag, the reason and the way out; with true or false the run goes on without an estimate."""
    planned = plan(make_config(model_name=tiny("llama")))

    def looks_at_values(*args, inputs_embeds, **kwargs):
        return bool(inputs_embeds.sum() > 0)

    planned.model.forward = looks_at_values
    settings = dict(mesh=None, device=CPU, task=CAUSAL_LM, dtype=torch.float32, autocast=None, compiled=False)
    settings |= dict(available=2**40, slack=0)
    blocks = decoder_blocks(planned.model)
    decide = lambda value: lay_out(
        planned.model, blocks, make_config(use_gradient_checkpointing=value), Resident(1, 2, 3, 0), **settings
    )
    with pytest.raises(UserError) as error:
        decide("auto")
    assert "--use_gradient_checkpointing auto" in str(error.value) and len(str(error.value).splitlines()) == 1
    for value, expected in ((True, 2), (False, 0)):
        found = decide(value)
        assert found.recomputed == expected and not found.fused_loss and "activations" not in found.sizes


def held_by(planned, config, *, mesh=None, on_host=None) -> int:
    """All bytes of `budget.resident`."""
    blocks = decoder_blocks(planned.model)
    return resident(planned.model, blocks, config, mesh=mesh, on_host=on_host or {}, device=CPU).total


@pytest.mark.parametrize("train_type", ["bnb_dora", "full"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adamw_8bit"])
def test_resident_bytes(tiny, train_type, optimizer):
    """From the model on meta: the loaded parameters, a gradient of each that trains, the optimizer's numbers."""
    config = make_config(model_name=tiny("qwen2"), train_type=train_type, optimizer=optimizer)
    planned = plan(config)
    expected = held_by(planned, config)
    loaded = prepared(config).model
    trained = [p for p in loaded.parameters() if p.requires_grad]
    states = {"adamw": 8, "sgd": 0, "adamw_8bit": 2}[optimizer] * sum(p.numel() for p in trained)
    assert expected == sum(p.nbytes for p in loaded.parameters()) + sum(p.nbytes for p in trained) + states


def resident_and_real(flags: dict) -> tuple[int, int, int]:
    """`resident`, what of it FSDP2 gathers, and the bytes of the real rows, their gradients and states."""
    config = make_config(**flags)
    planned = plan(config)
    mesh = mesh_for(config, CPU)
    expected = held_by(planned, config, mesh=mesh)
    offloaded = make_config(**{**flags, "use_cpu_offload": True})
    gathered = held_by(planned, offloaded, mesh=mesh)
    loaded = prepared(config).model
    rows = [(local(p), p.requires_grad) for p in loaded.parameters()]
    states = sum(optimizer_bytes(config.optimizer, p.numel(), p.element_size()) for p, trains in rows if trains)
    return expected, gathered, sum(p.nbytes * (1 + trains) for p, trains in rows) + states


@pytest.mark.parametrize("strategy", ["full_shard", "shard_grad_op", "ddp"])
def test_resident_bytes_of_two_processes(pair, tiny, strategy):
    """Each process counts its rows; what is gathered is whole blocks, more of them where they are not resharded."""
    shape = dict(num_hidden_layers=8)
    flags = dict(model_name=tiny("llama", **shape), train_type="bnb_dora", sharding_strategy=strategy)
    flags |= dict(embedding_on_host=False)  # CPUs hold it as any other weight
    for expected, gathered, rows in pair.run(resident_and_real, flags):
        assert rows <= expected - gathered <= 1.01 * rows
    if strategy != "full_shard":
        assert gathered > pair.run(resident_and_real, {**flags, "sharding_strategy": "full_shard"})[0][1]


def test_free_memory(monkeypatch):
    """Free on the device and cached by torch, but never beyond this process's share of the GPU; None on a CPU."""
    answers = dict(mem_get_info=(50, 100), memory_allocated=10, memory_reserved=30)
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    for share, expected in ((1.0, 70), (0.5, 40), (0.05, -5)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device, share=share: share)
        assert free_memory(torch.device("cuda", 0)) == expected
    assert free_memory(CPU) is None


@pytest.mark.parametrize(("free", "recomputed"), [(None, BLOCKS), (2**40, 0), (0, BLOCKS)])
def test_auto_says_what_it_does(tiny, monkeypatch, capsys, free, recomputed):
    """One line: how many blocks recompute, and why; on a CPU all do."""
    monkeypatch.setattr(recompute, "free_memory", lambda device: free)
    folder = tiny("llama", num_hidden_layers=BLOCKS)
    config = make_config(model_name=folder, train_type="bnb_dora", use_gradient_checkpointing="auto", batch_size=4)
    assert prepared(config).recomputed == recomputed
    (line,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("activation checkpointing")]
    assert f"{recomputed} of {BLOCKS} blocks recompute" in line
    assert ("CPU" in line) if free is None else ("4 x 64 tokens" in line and "GiB free" in line)


@pytest.mark.parametrize(("name", "recorded"), [(OWN_ATTENTION, True), ("sdpa", False), ("eager", False)])
def test_no_graph_of_masks_that_transformers_makes(tiny, name, recorded):
    """Where batches need none it makes them while a graph is recorded, so that blocks would be compiled again there: on
    GPUs runs in fp32 ended so."""
    config = make_config(model_name=tiny("llama"), train_type="bnb_dora")
    model = plan(config).model
    model.config.get_text_config()._attn_implementation = name
    assert (graph_tokens(model, config, mesh=None, device=torch.device("cuda")) > 0) is recorded


def test_graphs_leave_less(tiny, monkeypatch):
    """CUDA graphs hold the activations of small batches for good: less is free for blocks."""
    chosen = {}
    folder = tiny("llama", num_hidden_layers=BLOCKS)
    flags = dict(model_name=folder, train_type="bnb_dora", use_gradient_checkpointing="auto", batch_size=4)
    sizes = lambda **given: chosen.update(given) or 0
    monkeypatch.setattr(recompute, "free_memory", lambda device: 2**40)
    monkeypatch.setattr(recompute, "blocks_to_recompute", sizes)
    monkeypatch.setattr(recompute, "graph_tokens", lambda model, config, **_: 10**9 * config.cuda_graphs)
    free = []
    for graphs in (False, True):
        prepared(make_config(**flags, cuda_graphs=graphs))
        free.append(chosen["free"])
    assert free[1] == pytest.approx(free[0] / 2)


def decided(flags: dict, free: list[int]) -> int:
    """How many blocks recompute in this process when process i has `free[i]` bytes."""
    original = recompute.free_memory
    recompute.free_memory = lambda device: free[rank()]
    try:
        return prepared(make_config(**flags)).recomputed
    finally:
        recompute.free_memory = original


def test_processes_decide_alike(pair, tiny):
    """The process with the least memory decides for all."""
    folder = tiny("llama", num_hidden_layers=BLOCKS)
    flags = dict(model_name=folder, train_type="bnb_dora", use_gradient_checkpointing="auto")
    for free, expected in (([2**40, 2**40], 0), ([2**40, 0], BLOCKS), ([0, 2**40], BLOCKS)):
        assert pair.run(decided, flags, free) == [expected] * 2


def step_with(flags: dict, recomputed: int):
    """`first_step` where `auto` decides that so many blocks recompute."""
    original = recompute.free_memory, recompute.blocks_to_recompute
    recompute.free_memory = lambda device: 2**40
    recompute.blocks_to_recompute = lambda **sizes: recomputed
    try:
        return first_step({**flags, "use_gradient_checkpointing": "auto"})
    finally:
        recompute.free_memory, recompute.blocks_to_recompute = original


@pytest.mark.parametrize(
    ("train_type", "how"),
    [
        ("bnb_dora", dict()),
        ("bnb_dora", dict(checkpoint_policy="products")),
        ("qlora", dict(reentrant_checkpointing=True)),
        ("full", dict()),
        ("full", dict(reentrant_checkpointing=True)),
    ],
    ids=str,
)
def test_gradients_of_a_mix(pair, tiny, tiny_data, train_type, how):
    """Loss and gradients are those of all blocks recomputed, however many do, on one process and two."""
    flags = dict(model_name=tiny("llama", num_hidden_layers=BLOCKS), dataset=tiny_data, train_type=train_type, **how)
    one, two = {**flags, "batch_size": 4}, {**flags, "batch_size": 2}
    all_loss, all_gradients = first_step(one)
    both_loss, both_gradients = pair.run(first_step, two)[0]
    for recomputed in (1, 2):
        loss, gradients = step_with(one, recomputed)
        assert loss == pytest.approx(all_loss, rel=1e-6)
        for name, expected in all_gradients.items():
            torch.testing.assert_close(gradients[name], expected, rtol=1e-6, atol=1e-8)
    pair_loss, pair_gradients = pair.run(step_with, two, 2)[0]
    assert pair_loss == pytest.approx(both_loss, rel=1e-6)
    for name, expected in both_gradients.items():
        torch.testing.assert_close(pair_gradients[name], expected, rtol=1e-6, atol=1e-8)


HOW = [dict(), dict(reentrant_checkpointing=True), dict(checkpoint_policy="narrow"), dict(fused_kernels=False)]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize(
    ("train_type", "family", "adapters"),
    [("custom_lora", 0.3, 0), ("bnb_dora", 0, 0.3), ("custom_qlora", 0, 0.3), ("qlora", 0, 0.3)],
)
def test_dropout_is_replayed(tiny, tiny_data, train_type, family, adapters, how):
    """A recomputed block drops what it dropped before: the family's own dropout, and that of adapters, which the fused
    operator and the plain one draw alike."""
    flags = dict(model_name=tiny("llama", attention_dropout=family), dataset=tiny_data, batch_size=4)
    flags |= dict(train_type=train_type, lora_dropout=adapters)
    steps = []
    for more in (dict(use_gradient_checkpointing=False), how):
        torch.manual_seed(0)
        steps.append(first_step({**flags, **more}))
    (plain_loss, plain), (loss, gradients) = steps
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    for name, expected in plain.items():
        if "fused_kernels" in how:  # another order of sums: single entries near zero are mostly rounding
            assert (gradients[name] - expected).norm() <= 1e-5 * expected.norm(), name
        else:
            torch.testing.assert_close(gradients[name], expected, rtol=1e-5, atol=1e-7)


def test_dropped_attention_is_not_kept(tiny):
    """On CUDA, where attention draws its own random numbers, policies that keep it are refused; without any they go."""
    cuda = torch.device("cuda")
    for rate, policy in ((0.3, "narrow"), (0.3, "products"), (0.3, "full"), (0, "narrow")):
        config = make_config(model_name=tiny("llama", attention_dropout=rate), checkpoint_policy=policy)
        planned = plan(config).model
        if rate and policy != "full":
            with pytest.raises(UserError, match=f"--checkpoint_policy {policy}: .*attention_dropout"):
                wrapping.check_policy(planned, config, device=cuda)
        else:
            wrapping.check_policy(planned, config, device=cuda)


@pytest.mark.parametrize("recomputed", range(BLOCKS + 1))
def test_the_first_blocks_recompute(tiny, monkeypatch, recomputed):
    """Backward runs the first blocks again and no other."""
    monkeypatch.setattr(recompute, "free_memory", lambda device: 2**40)
    monkeypatch.setattr(recompute, "blocks_to_recompute", lambda **sizes: recomputed)
    folder = tiny("llama", num_hidden_layers=BLOCKS)
    loaded = prepared(make_config(model_name=folder, train_type="bnb_dora", use_gradient_checkpointing="auto")).model
    calls = [0] * BLOCKS

    def count(number):
        def hook(*args):
            calls[number] += 1

        return hook

    for number, block in enumerate(decoder_blocks(loaded).values()):
        block.input_layernorm.register_forward_hook(count(number))
    ids = torch.randint(0, 250, (2, 16))
    CausalLMLoss(loaded, fused=True)(with_targets(dict(input_ids=ids, labels=ids))).backward()
    assert calls == [2] * recomputed + [1] * (BLOCKS - recomputed)


def test_only_inputs_of_recomputed_blocks_are_offloaded(tiny):
    """A block that keeps everything keeps it on the GPU."""
    wrapped = []
    offloader = SimpleNamespace(wrap=lambda forward: wrapped.append(forward) or forward)
    config = make_config(
        model_name=tiny("llama", num_hidden_layers=BLOCKS),
        use_activation_cpu_offload=True,
        use_gradient_checkpointing="auto",
    )
    planned = plan(config)
    blocks = decoder_blocks(planned.model)
    wrapping.wrap_blocks(planned.model, blocks, config, recomputed=2, compiled=None, offloader=offloader)
    assert len(wrapped) == 2


def test_out_of_memory_with_auto(tiny, monkeypatch):
    """The first way out is to recompute every block; the breakdown knows how many did."""
    monkeypatch.setattr(recompute, "free_memory", lambda device: 2**40)
    assert remedies(make_config(use_gradient_checkpointing="auto"))[0] == "--use_gradient_checkpointing true"
    assert "--use_gradient_checkpointing true" not in remedies(make_config())
    flags = dict(model_name=tiny("llama"), train_type="bnb_dora")
    activations = {}
    for value in (True, False, "auto"):
        config = make_config(**flags, use_gradient_checkpointing=value)
        activations[value] = prepared(config).sizes["activations"]
    assert activations["auto"] == activations[False] > activations[True]


def test_values_of_the_flag():
    """true and false mean what they did, on a command line, in Python and in run.json; auto is the only other one."""
    values = {"true": True, "t": True, "False": False, "0": False, "auto": "auto", True: True, False: False}
    for given, expected in values.items():
        assert make_config(use_gradient_checkpointing=given).use_gradient_checkpointing == expected
        assert TrainConfig(use_gradient_checkpointing=given).use_gradient_checkpointing == expected
    assert TrainConfig().use_gradient_checkpointing is True
    with pytest.raises(UserError, match="--use_gradient_checkpointing maybe: choose from True, False, auto"):
        make_config(use_gradient_checkpointing="maybe")
