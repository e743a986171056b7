"""Blocks as they are compiled for a GPU, without the code generator: traced, split into forward and backward by what a
policy keeps, and run operator by operator. What is saved between the two, and how it lies in memory, shows here too."""

from functools import partial

import pytest
import torch
from runs import make_config, perturb

from fsdp_utils import sharding
from fsdp_utils.losses import CausalLMLoss, with_targets
from fsdp_utils.model import load, plan

CPU, BLOCKS, TOKENS = torch.device("cpu"), 3, 24
as_compiled = partial(torch.compile, backend="aot_eager_decomp_partition")


def gradients(flags: dict, *, compile_block) -> list[torch.Tensor]:
    """Of every trained parameter, over two micro-batches."""
    config = make_config(**flags)
    planned = plan(config, device=CPU)
    model = load(planned, config, mesh=None, device=CPU, compile_block=compile_block)
    perturb(model)
    planned.method.after_step(model, device=CPU)
    loss, generator = CausalLMLoss(model.train(), fused=True), torch.Generator().manual_seed(0)
    for _ in range(2):
        ids = torch.randint(0, 250, (2, TOKENS), generator=generator)
        loss(with_targets(dict(input_ids=ids, labels=ids))).backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


@pytest.fixture
def base(tiny):
    """Blocks whose MLP is more than twice as wide as the hidden states, as real ones are."""
    return tiny("llama", num_hidden_layers=BLOCKS, intermediate_size=192)


# not every train type under every policy: tracing takes seconds a case
CASES = [("bnb_dora", None), *(("bnb_dora", policy) for policy in sharding.POLICIES), ("custom_qlora", "narrow")]


@pytest.mark.parametrize(("train_type", "policy"), CASES)
def test_compiled_blocks_equal_plain_ones(base, hostly, monkeypatch, train_type, policy):
    """Every policy, its states offloaded, gives the gradients of blocks that keep everything; so do compiled blocks
    without checkpointing. What leaves is counted."""
    torch._dynamo.reset()
    flags = dict(model_name=base, train_type=train_type)
    plain = gradients({**flags, "use_gradient_checkpointing": False}, compile_block=None)
    monkeypatch.setattr(sharding, "InputOffloader", lambda: hostly)
    monkeypatch.setattr(sharding, "pick_device", lambda name: torch.device("cuda"))
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
