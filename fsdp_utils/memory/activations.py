"""What a micro-batch keeps for backward, measured without memory.

It is not worked out from the layers: one forward pass of the model on fake tensors (shapes without memory) tells it for
every family, adapter, dropout, attention and precision, where a formula would have to repeat them all. `block` is what
eager code keeps; compiled blocks keep what backward reads of `outputs`, and work the rest out again.
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
from methods import METHODS


class Outputs(NamedTuple):
    """Bytes of the results of a block's matrix products and attention."""

    all: int
    by_policy: int  # what --checkpoint_policy keeps of a block that recomputes
    states: int  # of these, what is as large as the hidden states, and can be offloaded
    idle: int  # of the last product, where it is only added to the hidden states: backward does not ask for it
    idle_by_policy: int
    idle_states: int
    fed: int  # the largest input of a product


class Kept(NamedTuple):
    """Bytes kept for backward; the largest of all blocks."""

    block: int  # by a block, in eager code
    input: int  # of a block
    outputs: Outputs  # of its products
    outside: int  # by what is not in a block
    fused_loss: bool  # whether the head can compute the loss: some families change its logits
    fused_adapters: bool  # whether base product and adapter are one operator, or there is no adapter


# what may come after a block's last product so that backward does not ask for its result: hidden states are added to it
ADDING = ("add", "view", "_unsafe_view", "reshape", "clone", "detach", "alias", "_to_copy", "device")


class _Outputs(TorchDispatchMode):
    """Sums the results of products, of the block that runs."""

    def __init__(self, policy: str, *, elements: int, dtype: torch.dtype):
        super().__init__()
        self.rule, self.state, self.adapted = POLICIES[policy], dict(elements=elements, dtype=dtype), False
        self.begin()

    def begin(self) -> None:
        """A block begins."""
        self.sums, self.last, self.fed, self.only_added = Counter(), Counter(), 0, False

    def end(self) -> Outputs:
        """Those of the block that has run."""
        sums, idle = self.sums, self.last if self.only_added else Counter()
        kept = (sums["all"], sums["by_policy"], sums["states"], idle["all"], idle["by_policy"], idle["states"])
        return Outputs(*kept, self.fed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        product = product_of(func, args)
        if product is None:
            self.only_added &= func.__name__.partition(".")[0] in ADDING
            return out
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        found = [self._bytes(t, kept=self.rule(product)) for t in made]
        self.adapted |= product.adapted and args[1] is not None
        self.last, self.only_added = found[0], not product.factor  # whose gradient reads the result
        self.fed = max(self.fed, made[0].nbytes // product.out * product.width)
        self.sums.update(sum(found, Counter()))
        return out

    def _bytes(self, tensor: torch.Tensor, *, kept: bool) -> Counter:
        state = kept and InputOffloader.is_state(tensor, **self.state)
        return Counter(all=tensor.nbytes, by_policy=tensor.nbytes * kept, states=tensor.nbytes * state)


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


def _fake_state(model: nn.Module, blocks: dict[str, nn.Module], kinds: list[tuple]) -> dict[str, torch.Tensor]:
    """A fake tensor for each parameter that is run with: of blocks, one of each kind. They are on the CPU, whose
    attention keeps what the GPU's kernels do (query, key, value, output and a number per row), so that the answer
    depends on no device."""
    others = [block for i, block in enumerate(blocks.values()) if kinds[i] in kinds[:i]]
    idle = {id(p) for block in others for p in block.parameters()}
    return {
        name: torch.empty(p.shape, dtype=p.dtype, requires_grad=p.requires_grad)
        for name, p in model.named_parameters()
        if id(p) not in idle
    }


def kinds_of(blocks: dict[str, nn.Module]) -> list[tuple]:
    """What makes a block keep what it keeps: its class, its parameters, and which kind of layer it says it is."""
    kinds = []
    for block in blocks.values():
        parameters = [(n, p.shape, p.dtype, p.requires_grad) for n, p in block.named_parameters()]
        said = [
            getattr(m, name, None)
            for m in block.modules()
            for name in ("layer_type", "attention_type", "sliding_window")
        ]
        kinds.append((type(block), tuple(parameters), tuple(map(str, said))))
    return kinds


@contextmanager
def _watched(blocks: dict, kinds: list[tuple], ledger: _Ledger, *, fake: FakeTensorMode, products: _Outputs):
    """Runs one block of each kind on fake tensors while the context lasts, which answers for the others; yields the
    bytes of each such block's input, and its `Outputs`.

    Only what meets a weight is fake. Positions and masks outside of blocks are real, because transformers looks at
    their values: so attention takes the way that it takes in training.
    """
    inputs, outputs, known = [], [], {}

    def watching(path, forward, kind):
        def run(*args, **kwargs):
            if kind in known:
                return known[kind]
            as_fake = lambda t: t if isinstance(t, FakeTensor) else fake.from_tensor(t)
            args, kwargs = tree_map_only(torch.Tensor, as_fake, (args, kwargs))
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            ledger.ignore(t for t in tensors if not t.requires_grad)
            inputs.append(sum(t.nbytes for t in tensors if t.requires_grad))
            ledger.inside = path
            products.begin()
            with fake, products:
                out = forward(*args, **kwargs)
            ledger.inside = None
            outputs.append(products.end())
            known[kind] = out
            return out

        return run

    for (path, block), kind in zip(blocks.items(), kinds, strict=True):
        block.forward = watching(path, block.forward, kind)
    try:
        yield inputs, outputs
    finally:
        for block in blocks.values():
            del block.forward


@contextmanager
def _in_silence(name: str):
    """Without what a logger says."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def measure(model: nn.Module, blocks: dict[str, nn.Module], config, *, task, dtype, autocast) -> Kept:
    """What a micro-batch of `batch_size` rows of `row_tokens` tokens keeps, from one forward pass on meta.

    Args:
        task: knows how the model is called.
        dtype, autocast: of hidden states and of the products.

    Raises:
        UserError: the model looks at values, or takes no embeddings.
    """
    fake, ledger, logits = FakeTensorMode(allow_non_fake_inputs=True), _Ledger(), []
    kinds = kinds_of(blocks)
    shape = (config.batch_size, config.row_tokens, model.config.get_text_config().hidden_size)
    with fake:
        state = _fake_state(model, blocks, kinds)
        embedded = torch.empty(shape, dtype=dtype, requires_grad=True)
    ledger.ignore(state.values())
    products = _Outputs(config.checkpoint_policy, elements=embedded.numel(), dtype=dtype)
    arguments = task.measured(embedded, packing=config.packing)
    compute = torch.autocast("cpu", autocast) if autocast else nullcontext()
    ends = [head for head in (model.get_output_embeddings(),) if head is not None]
    hooks = [head.register_forward_hook(lambda module, args, out: logits.append(out)) for head in ends]
    try:
        with (
            _watched(blocks, kinds, ledger, fake=fake, products=products) as (inputs, outputs),
            saved_tensors_hooks(ledger.pack, lambda packed: packed),
            compute,
            _in_silence("transformers.modeling_layers"),  # embeddings do not show padding, it says: there is none
            _in_silence("torch._subclasses.fake_tensor"),  # says at length what is said below in a line
        ):
            out = functional_call(model, state, (), arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"cannot measure {type(model).__name__} ({str(error).partition(chr(10))[0]})") from error
    finally:
        for hook in hooks:
            hook.remove()
    fused = config.fused_loss and bool(logits) and out.logits is logits[0]
    one_operator = products.adapted or not METHODS[config.method].adapts
    return Kept(max(ledger.of_block.values()), max(inputs), max(outputs), ledger.outside, fused, one_operator)
