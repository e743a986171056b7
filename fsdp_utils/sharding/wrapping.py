"""What is put around a decoder block's forward: checkpointing, compilation, offload of what checkpointing keeps."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fsdp_utils.core.errors import UserError
from fsdp_utils.options import POLICIES, Product
from fsdp_utils.sharding.offload import InputOffloader
from fsdp_utils.sharding.tiles import Tiled
from methods.quantizers.linear import QuantizedEmbedding
from methods.targets import family_dropout, has_linears

Forward = Callable


def product_of(op, args) -> Product | None:
    """The matrix product or attention that an operator is, None of anything else."""
    name = str(op)
    if "adapted_linear." in name:
        return Product(args[0].shape[-1], args[2].shape[0], adapted=True, factor=args[8] is not None)
    if "grouped_linear." in name:
        return Product(args[0].shape[-1], len(args[2]) // len(args[1]))
    if "_attention" in name:
        return Product(args[0].shape[-1], args[0].shape[-1])
    if "aten.mm." in name or "aten.addmm." in name:
        return Product(*args[-1].shape)
    return None


def keep(rule: Callable[[Product], bool], ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """A row of `options.POLICIES` as torch's selective checkpointing asks for it."""
    product = product_of(op, args)
    kept = product is not None and rule(product)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


# a policy that keeps nothing is plain checkpointing
CONTEXTS = {
    name: {} if name == "full" else dict(context_fn=partial(create_selective_checkpoint_contexts, partial(keep, rule)))
    for name, rule in POLICIES.items()
}


def check_policy(model: nn.Module, config, *, device: torch.device) -> None:
    """Raises UserError if attention that a policy keeps draws random numbers itself: it is not run again, so on CUDA
    whatever is dropped after it would be dropped otherwise when the block is recomputed."""
    attention = Product(1, 1)  # its output is as wide as its input
    kept = config.use_gradient_checkpointing and POLICIES[config.checkpoint_policy](attention)
    names = [name for name in family_dropout(model) if "att" in name]
    if kept and names and device.type == "cuda":
        given = f"--checkpoint_policy {config.checkpoint_policy}"
        raise UserError(f"{given}: {config.source} drops attention ({names[0]}), which is not replayed; pass full")


def checkpointed(forward: Forward, *, reentrant: bool, preserve_rng: bool, policy: str) -> Forward:
    """Keeps a block's input, and what the policy says, and runs forward again in backward.

    It wraps `forward`, not the module: FSDP2's hooks stay outside the recomputed region, and names do not change.
    """

    def run_checkpointed(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        run = partial(forward, **kwargs)  # re-entrant checkpointing takes no keyword arguments
        return checkpoint(run, *args, use_reentrant=reentrant, preserve_rng_state=preserve_rng, **CONTEXTS[policy])

    return run_checkpointed


def require_input_gradients(model: nn.Module) -> None:
    """Re-entrant checkpointing of a frozen model loses every gradient unless a block's input requires one."""
    held = {id(p) for p in model.get_input_embeddings().parameters()}
    for module in model.modules():  # an encoder and a decoder may have an embedding each, of one weight
        if isinstance(module, (nn.Embedding, QuantizedEmbedding)) and held & set(map(id, module.parameters())):
            module.register_forward_hook(lambda module, args, output: output.requires_grad_(True))


class _AskedFor(torch.autograd.Function):
    """A tensor as it is, whose gradient is computed and dropped. A leaf would stay for as long as the graph, and its
    gradient too: each a gigabyte of 131,072 tokens."""

    @staticmethod
    def forward(ctx, tensor, _):
        return tensor.detach()

    @staticmethod
    def backward(ctx, grad):
        return None, None


def with_gradient(forward: Forward) -> Forward:
    """Asks for the gradient of a block's input also where nobody needs it, as behind a frozen embedding: compiled code
    is made for one or the other, so the first block would have code of its own, and take as long to compile as all
    others together. Without trained parameters in the block, it would go through backward for nothing."""

    def run(*args, **kwargs):
        if args and torch.is_grad_enabled() and not args[0].requires_grad:
            args = (_AskedFor.apply(args[0], torch.empty(0, requires_grad=True)), *args[1:])
        return forward(*args, **kwargs)

    return run


def wrap_blocks(
    model: nn.Module,
    blocks: dict[str, nn.Module],
    config,
    *,
    recomputed: int,
    compiled: Callable[[Forward], Forward] | None,
    offloader: InputOffloader | None,
) -> None:
    """Wraps the forward of each block; the first `recomputed` run again in backward.

    The first, not the last: backward comes to them when the others have already freed all that they keep, so what a
    block recomputes never adds to the peak.

    Args:
        compiled: compiles a forward, or None.
        offloader: sends what recomputed blocks keep to the host, or None.
    """
    reentrant = config.reentrant_checkpointing
    checkpointing = partial(checkpointed, reentrant=reentrant, preserve_rng=bool(family_dropout(model)))
    for number, block in enumerate(blocks.values()):
        if config.tile_tokens and compiled:
            _compile_parts(block, compiled)
        adapted = any(p.requires_grad for p in block.parameters())
        wrappers = wrappers_of(
            number < recomputed,
            reentrant=reentrant,
            checkpointing=partial(checkpointing, policy=config.checkpoint_policy),
            products_only=partial(checkpointing, policy="products"),
            compiled=None if config.tile_tokens else compiled,
            alike=with_gradient if compiled and adapted else None,
            offloaded=offloader and offloader.wrap,
        )
        for wrapper in wrappers:
            block.forward = wrapper(block.forward)
    if recomputed and reentrant:
        require_input_gradients(model)


def weighs(module: nn.Module) -> bool:
    """Whether a part of a block has linears inside, or weights of its own."""
    return has_linears(module) or any(True for _ in module.parameters(recurse=False))


def _compile_parts(block: nn.Module, compiled: Callable[[Forward], Forward]) -> None:
    """Of a block whose feed-forward layers run by tiles, which is more than one graph. Norms too: one operator after
    the other, they write hidden states in fp32, four gigabytes of 131,072 tokens at a time."""
    for child in filter(weighs, block.children()):
        owner = child.forward if isinstance(child.forward, Tiled) else child
        owner.forward = compiled(owner.forward)


def wrappers_of(
    recomputes: bool, *, reentrant: bool, checkpointing, products_only, compiled, alike, offloaded
) -> list[Callable]:
    """What goes around a block, from the inside out.

    Recomputation is inside the compiled region, so that what backward does not need of it is never run (the down
    projection); re-entrant checkpointing cannot be compiled and stays outside, as FSDP2 and the offload of inputs do.
    """
    if reentrant:
        listed = [compiled, checkpointing if recomputes else None]
    elif recomputes:
        listed = [checkpointing, compiled]
    else:  # compiled alone, a block would keep results of elementwise operations as well
        listed = [products_only, compiled] if compiled else []
    return [wrapper for wrapper in (*listed, alike, offloaded if recomputes else None) if wrapper]
