"""What a micro-batch keeps for backward, measured without memory.

It is not worked out from the layers: one forward pass of the model on fake tensors (shapes without memory) tells it for
every family, adapter, dropout, attention and precision, where a formula would have to repeat them all. It is what eager
code keeps; compiled blocks keep less.
"""

import logging
from collections import Counter
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fsdp_utils.core.errors import UserError
from fsdp_utils.options import POLICIES
from fsdp_utils.sharding.offload import InputOffloader
from fsdp_utils.sharding.wrapping import product_of


class Kept(NamedTuple):
    """Bytes kept for backward."""

    block: int  # by the block that keeps most
    input: int  # of a block
    by_policy: int  # outputs that --checkpoint_policy keeps of a block that recomputes
    states_by_policy: int  # of these, what is as large as the hidden states, and can be offloaded
    outside: int  # by what is not in a block
    fused_loss: bool  # whether the head can compute the loss: some families change its logits


class _KeptByPolicy(TorchDispatchMode):
    """Sums the outputs that a checkpoint policy keeps, and those as large as the hidden states."""

    def __init__(self, name: str, *, elements: int, dtype: torch.dtype):
        super().__init__()
        self.rule, self.bytes, self.states = POLICIES[name], 0, 0
        self.state = dict(elements=elements, dtype=dtype)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        product = product_of(func, args)
        if product is not None and self.rule(product):
            kept = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.nbytes for t in kept)
            self.states += sum(t.nbytes for t in kept if InputOffloader.is_state(t, **self.state))
        return out


class _Ledger:
    """Which block, or what outside, each saved tensor belongs to; each storage is counted once."""

    def __init__(self):
        self.of_block, self.outside, self.counted, self.inside = Counter(), 0, set(), None

    def ignore(self, tensors) -> None:
        """What is there anyway: weights, and what is made once for all blocks (masks, rotary tables)."""
        self.counted.update(t.untyped_storage() for t in tensors)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage not in self.counted:
            self.counted.add(storage)
            if self.inside is None:
                self.outside += storage.nbytes()
            else:
                self.of_block[self.inside] += storage.nbytes()
        return tensor


def _fake_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A fake tensor for each parameter. They are on the CPU, whose attention keeps what the GPU's kernels do (query,
    key, value, output and a number per row), so that the answer depends on no device."""
    return {
        name: torch.empty(p.shape, dtype=p.dtype, requires_grad=p.requires_grad) for name, p in model.named_parameters()
    }


@contextmanager
def _watched(blocks: dict[str, nn.Module], ledger: _Ledger, *, fake: FakeTensorMode, policy: _KeptByPolicy):
    """Runs each block on fake tensors while the context lasts; yields the bytes of each block's input, and of what the
    policy keeps of it: pairs of all and of states.

    Only what meets a weight is fake. Positions and masks outside of blocks are real, because transformers looks at
    their values: so attention takes the way that it takes in training.
    """
    inputs, by_policy = [], []

    def watching(path, forward):
        def run(*args, **kwargs):
            as_fake = lambda t: t if isinstance(t, FakeTensor) else fake.from_tensor(t)
            args, kwargs = tree_map_only(torch.Tensor, as_fake, (args, kwargs))
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            ledger.ignore(t for t in tensors if not t.requires_grad)
            inputs.append(sum(t.nbytes for t in tensors if t.requires_grad))
            ledger.inside, before = path, (policy.bytes, policy.states)
            with fake, policy:
                out = forward(*args, **kwargs)
            ledger.inside = None
            by_policy.append((policy.bytes - before[0], policy.states - before[1]))
            return out

        return run

    for path, block in blocks.items():
        block.forward = watching(path, block.forward)
    try:
        yield inputs, by_policy
    finally:
        for block in blocks.values():
            del block.forward


@contextmanager
def _in_silence(name: str):
    """Without the warnings of a logger."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def measure(model: nn.Module, blocks: dict[str, nn.Module], config, *, task, dtype, autocast) -> Kept:
    """What a micro-batch of `batch_size` rows of `context_length` tokens keeps, from one forward pass on meta.

    Args:
        task: knows how the model is called.
        dtype, autocast: of hidden states and of the products.

    Raises:
        UserError: the model looks at values, or takes no embeddings.
    """
    fake, ledger, logits = FakeTensorMode(allow_non_fake_inputs=True), _Ledger(), []
    shape = (config.batch_size, config.context_length, model.config.get_text_config().hidden_size)
    with fake:
        state = _fake_state(model)
        embedded = torch.empty(shape, dtype=dtype, requires_grad=True)
    ledger.ignore(state.values())
    policy = _KeptByPolicy(config.checkpoint_policy, elements=embedded.numel(), dtype=dtype)
    arguments = task.measured(embedded, packing=config.packing)
    compute = torch.autocast("cpu", autocast) if autocast else nullcontext()
    ends = [head for head in (model.get_output_embeddings(),) if head is not None]
    hooks = [head.register_forward_hook(lambda module, args, out: logits.append(out)) for head in ends]
    try:
        with (
            _watched(blocks, ledger, fake=fake, policy=policy) as (inputs, by_policy),
            saved_tensors_hooks(ledger.pack, lambda packed: packed),
            compute,
            _in_silence("transformers.modeling_layers"),  # embeddings do not show padding, it says: there is none
        ):
            out = functional_call(model, state, (), arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"cannot measure {type(model).__name__} ({str(error).partition(chr(10))[0]})") from error
    finally:
        for hook in hooks:
            hook.remove()
    most, states = max(by_policy)
    fused = config.fused_loss and bool(logits) and out.logits is logits[0]
    return Kept(max(ledger.of_block.values()), max(inputs), most, states, ledger.outside, fused)
