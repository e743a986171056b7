"""Blocks as they are compiled for a GPU, without the code generator: traced, split into forward and backward by what a
policy keeps, and run operator by operator. What is saved between the two, and how it lies in memory, shows here too."""

import gc
from functools import partial

import pytest
import torch
from real_run import make_config, off_zero, plan
from torch._dynamo.testing import CompileCounter
from torch.multiprocessing.reductions import StorageWeakRef

from fsdp_utils.data.batches import with_targets
from fsdp_utils.model import assemble, compiling
from fsdp_utils.model.assemble import load
from fsdp_utils.model.compiling import Compiler
from fsdp_utils.options import POLICIES
from fsdp_utils.sharding import offload
from fsdp_utils.training.expert_load import ExpertLoad
from fsdp_utils.training.loss import CausalLMLoss
from methods.dropout import DropoutSeeds

CPU, BLOCKS, TOKENS = torch.device("cpu"), 3, 24
as_compiled = partial(torch.compile, backend="aot_eager_decomp_partition")


def gradients(flags: dict, *, compile_block) -> list[torch.Tensor]:
    """Of every trained parameter, over two micro-batches."""
    config = make_config(**flags)
    ready = off_zero(load(plan(config), config, mesh=None, device=CPU, compile_block=compile_block))
    model = ready.model
    loss, generator = CausalLMLoss(model.train(), fused=ready.fused_loss), torch.Generator().manual_seed(0)
    for _ in range(2):
        ids = torch.randint(0, 250, (2, TOKENS), generator=generator)
        loss(with_targets(dict(input_ids=ids, labels=ids))).backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


@pytest.fixture
def base(tiny):
    """Blocks whose MLP is more than twice as wide as the hidden states, as real ones are."""
    return tiny("llama", num_hidden_layers=BLOCKS, intermediate_size=192)


# not every train type under every policy: tracing takes seconds a case
CASES = [("bnb_dora", None), *(("bnb_dora", policy) for policy in POLICIES), ("custom_qlora", "narrow")]


@pytest.mark.parametrize(("train_type", "policy"), CASES)
def test_compiled_blocks_equal_plain_ones(base, hostly, monkeypatch, train_type, policy):
    """Every policy, its states offloaded, gives the gradients of blocks that keep everything; so do compiled blocks
    without checkpointing. What leaves is counted."""
    torch._dynamo.reset()
    flags = dict(model_name=base, train_type=train_type)
    plain = gradients({**flags, "use_gradient_checkpointing": False}, compile_block=None)
    monkeypatch.setattr(offload, "InputOffloader", lambda **_: hostly)
    monkeypatch.setattr(assemble, "offloads", lambda config, device: config.use_activation_cpu_offload)
    how = dict(checkpoint_policy=policy, use_activation_cpu_offload=True)
    how = how if policy else dict(use_gradient_checkpointing=False)
    ours = gradients({**flags, **how}, compile_block=as_compiled)
    for got, wanted in zip(ours, plain, strict=True):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()
    state = 2 * 2 * TOKENS * 64 * 4  # hidden states of both micro-batches
    # the input; query, attention and its projection; the down projection's output, for the magnitude alone
    tensors = {None: 0, "full": 1, "adapters": 1, "narrow": 4, "products": 4}[policy]
    tensors += train_type.endswith("dora") and policy not in ("full", None)
    assert sum(copy.nbytes for copy in hostly.sent) == (BLOCKS - 1) * tensors * state


def test_parts_of_blocks_that_run_by_tiles(base):
    """Attention, a tile of the MLP and both norms, which would write hidden states in fp32; the gradients are those of
    plain blocks."""
    torch._dynamo.reset()
    compiled, flags = [], dict(model_name=base, train_type="custom_qlora", tile_tokens=20)

    def compile_part(forward):
        compiled.append(type(forward.__self__).__name__)
        return as_compiled(forward)

    ours, plain = (gradients(flags, compile_block=how) for how in (compile_part, None))
    assert sorted(compiled) == sorted(["LlamaAttention", "LlamaMLP", "LlamaRMSNorm", "LlamaRMSNorm"] * BLOCKS)
    for got, wanted in zip(ours, plain, strict=True):
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()


def test_embedded_tokens_are_not_kept(base, hostly, monkeypatch):
    """The input of the first compiled block leaves like every other."""
    monkeypatch.setattr(offload, "InputOffloader", lambda **_: hostly)
    monkeypatch.setattr(assemble, "offloads", lambda config, device: True)
    config = make_config(model_name=base, train_type="custom_qlora")
    ready = off_zero(load(plan(config), config, mesh=None, device=CPU, compile_block=Compiler(backend="eager")))
    embedded, ids = [], torch.zeros((2, TOKENS), dtype=torch.long)
    keep = lambda module, args, out: embedded.append(StorageWeakRef(out.untyped_storage()))
    ready.model.train().get_input_embeddings().register_forward_hook(keep)
    loss = CausalLMLoss(ready.model, fused=True)(with_targets(dict(input_ids=ids, labels=ids)))
    hostly._let_go(before=BLOCKS)
    gc.collect()
    assert embedded[0].expired()
    loss.backward()


@pytest.mark.parametrize(
    ("device", "compile_block"), [(CPU, as_compiled), pytest.param("cuda:0", torch.compile, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize(("train_type", "policy"), [("bnb_dora", "narrow"), ("custom_qlora", "full")])
def test_dropout_in_compiled_blocks(tiny, device, compile_block, train_type, policy):
    """The gradient is that of the loss with the same random numbers: a step along it changes the loss by its square."""
    torch._dynamo.reset()
    # Triton 3.6 cannot compile dropout after the norm of narrower hidden states in fp32 (triton#8257)
    base = tiny("llama", hidden_size=256, num_hidden_layers=BLOCKS, intermediate_size=768)
    how = dict(checkpoint_policy=policy) if policy else dict(use_gradient_checkpointing=False)
    config, device = make_config(model_name=base, train_type=train_type, lora_dropout=0.4, **how), torch.device(device)
    ready = off_zero(load(plan(config, device=device), config, mesh=None, device=device, compile_block=compile_block))
    model = ready.model
    loss_of = CausalLMLoss(model.train(), fused=ready.fused_loss)
    batch = with_targets(dict.fromkeys(("input_ids", "labels"), torch.arange(96, device=device).view(4, 24)))
    trained = [p for p in model.parameters() if p.requires_grad]
    seeds = DropoutSeeds(model, device=device)

    def loss(seed):
        torch.manual_seed(seed)
        seeds.draw()
        return loss_of(batch)

    first = loss(0)
    first.backward()
    assert loss(0).item() == first.item() != loss(1).item()
    gradients = [p.grad.clone() for p in trained]
    squared = sum(g.square().sum() for g in gradients).item()
    step, seen = 0.02 / squared**0.5, []
    for sign in (1, -2):
        with torch.no_grad():
            for p, g in zip(trained, gradients, strict=True):
                p += sign * step * g
        seen.append(loss(0).item())
    assert (seen[0] - seen[1]) / (2 * step) == pytest.approx(squared, rel=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# One code for all
# ---------------------------------------------------------------------------------------------------------------------

LENGTHS = (64, 32, 96, 16, 128)  # 64 is also the hidden size


@pytest.mark.parametrize("more", [
    dict(train_type="bnb_dora"),
    dict(train_type="bnb_dora", packing=True),
    dict(train_type="custom_lora", use_gradient_checkpointing=False),
    dict(train_type="full"),
    dict(train_type="full", model="mixtral"),
    dict(train_type="custom_qlora", model="qwen3_moe"),
])  # fmt: skip
def test_one_code_for_blocks_and_shapes(base, tiny, more):
    """Whatever the block, the length of rows, and the number of samples in packed ones: compiled once, also where sizes
    are equal by chance, and the gradients are those of plain blocks."""
    flags = dict(more)
    mixture = flags.pop("model", None)
    config, generator, counter = (
        make_config(model_name=tiny(mixture) if mixture else base, precision="fp32", **flags),
        torch.Generator(),
        CompileCounter(),
    )
    ready, plain = (
        off_zero(load(plan(config), config, mesh=None, device=CPU, compile_block=compile_block))
        for compile_block in (Compiler(backend=counter, lengths_vary=not config.packing), None)
    )
    load_of_experts = ExpertLoad(ready.model, device=CPU)
    for number, length in enumerate([64] * 5 if config.packing else LENGTHS):
        ids = torch.randint(0, 250, (4, length), generator=generator.manual_seed(number))
        batch = dict(input_ids=ids, labels=ids)
        if config.packing:
            batch["position_ids"] = (torch.arange(length) % (1 + 4 * number)).repeat(4, 1)
        for model in (ready.model.train(), plain.model.train()):
            CausalLMLoss(model, fused=ready.fused_loss)(with_targets(batch)).backward()
    assert counter.frame_count == 1
    assert bool(load_of_experts.take()) == bool(mixture)
    for ours, theirs in zip(ready.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_code_for_all_lengths_that_cannot_be_made(base, capsys, monkeypatch):
    """Is said once; the first lengths then have their own, once for all blocks, others none. The gradients are those of
    plain blocks."""
    made, limit = [], 2
    monkeypatch.setattr(compiling, "MOST_LENGTHS", limit)

    def backend(graph, inputs):
        if any(isinstance(value, torch.SymInt) for value in inputs):
            raise AssertionError("no such node\nmore of it")
        made.append(inputs)
        return graph

    config = make_config(model_name=base, precision="fp32", train_type="custom_lora")
    ready, plain = (
        off_zero(load(plan(config), config, mesh=None, device=CPU, compile_block=compile_block))
        for compile_block in (Compiler(backend=backend), None)
    )
    for length in (24, 16, 24, 32, 16):
        ids = torch.arange(2 * length).view(2, length)
        for model in (ready.model.train(), plain.model.train()):
            CausalLMLoss(model, fused=ready.fused_loss)(with_targets(dict(input_ids=ids, labels=ids))).backward()
    assert len(made) == limit
    assert capsys.readouterr().out.count("code for all lengths of rows failed (AssertionError: no such node)") == 1
    for ours, theirs in zip(ready.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_frozen_blocks_ask_for_no_gradient(flags):
    """Those before the first new block of Llama-Pro take no part in backward, compiled or not."""
    config = make_config(**flags(train_type="bnb_llama_pro", precision="fp32"))
    compile_block = Compiler(backend="eager")
    ready = load(plan(config), config, mesh=None, device=CPU, compile_block=compile_block)
    ids = torch.zeros((2, 8), dtype=torch.long)
    first = next(iter(ready.blocks.values()))
    seen = []
    first.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    CausalLMLoss(ready.model.train(), fused=False)(with_targets(dict(input_ids=ids, labels=ids))).backward()
    assert seen == [False]
