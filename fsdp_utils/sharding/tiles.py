"""Feed-forward layers of long rows, so many tokens at a time (--tile_tokens): what is inside them is several times as
wide as the hidden states, and never exists for a whole row (as in ALST, arXiv:2506.13996).

Backward runs each tile forward again and then backward, so that a layer keeps its input alone. A block that recomputes
does not run it a third time: nothing behind that input is asked for, unless the family normalises what comes out.
"""

import inspect

import torch
from torch import nn

from fsdp_utils.core.errors import UserError
from methods.dropout import SeededDropout
from methods.quantizers.experts import is_experts
from methods.targets import family_dropout, has_linears

Tensor = torch.Tensor


class Tiled:
    """The forward of a module that treats every token alike, `[..., L, width] -> [..., L, width]`, by tiles.

    Args:
        tokens: of a tile.

    Attributes:
        forward: of a tile, `[1, tokens, width]`; compiled code may take its place.
    """

    def __init__(self, module: nn.Module, tokens: int):
        self.module, self.tokens, self.forward = module, tokens, module.forward
        self.dropouts = [m for m in module.modules() if isinstance(m, SeededDropout)]

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() // x.shape[-1] <= self.tokens:
            return self.tile(x, first=0)
        if not torch.is_grad_enabled():
            return self.forward_by_tiles(x)
        return _End.apply(_Begin.apply(x, self, *self.trained()), self, x.detach())

    def trained(self) -> list[Tensor]:
        return [p for p in self.module.parameters() if p.requires_grad]

    def tiles(self, x: Tensor):
        """The first token of each tile, and the place of the tile in flat rows."""
        return [(first, slice(first, first + self.tokens)) for first in range(0, x[..., 0].numel(), self.tokens)]

    def tile(self, x: Tensor, *, first: int) -> Tensor:
        """Forward of the tile that begins with token `first`."""
        for dropout in self.dropouts:  # what is dropped depends on an element's place in the whole
            dropout.first = torch.full((), first, dtype=torch.int32, device=x.device)
        return self.forward(x)

    def forward_by_tiles(self, x: Tensor) -> Tensor:
        flat, out = x.reshape(1, -1, x.shape[-1]), None
        for first, place in self.tiles(x):
            found = self.tile(flat[:, place], first=first)
            if not isinstance(found, Tensor):
                raise UserError(f"--tile_tokens: {type(self.module).__name__} gives more than one tensor; pass 0")
            out = found.new_empty(1, flat.shape[1], found.shape[-1]) if out is None else out
            out[:, place] = found
        return out.view(*x.shape[:-1], -1)


class _Begin(torch.autograd.Function):
    """Keeps the input, before anything is computed: a recomputation ends with the last tensor that was kept."""

    @staticmethod
    def forward(ctx, x: Tensor, tiled: Tiled, *trained: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tiled, device = tiled, x.device.type
        ctx.autocast = dict(dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))
        return x.new_zeros(()).expand(x.shape)  # takes no memory; only its gradient counts

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,), tiled = ctx.saved_tensors, ctx.tiled
        trained, width = tiled.trained(), x.shape[-1]
        flat, grad, grad_x = x.reshape(1, -1, width), grad.reshape(1, -1, width), torch.empty_like(x)
        by_tile = grad_x.view(1, -1, width)
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in trained]
        for first, place in tiled.tiles(x):
            with torch.enable_grad(), torch.autocast(x.device.type, **ctx.autocast):
                piece = flat[:, place].detach().requires_grad_()
                out = tiled.tile(piece, first=first)
            found = torch.autograd.grad(out, [piece, *trained], grad[:, place], allow_unused=True)
            by_tile[:, place] = found[0]
            for total, gradient in zip(sums, found[1:], strict=True):
                if gradient is not None:
                    total += gradient
        return grad_x, None, *(total.to(p.dtype) for total, p in zip(sums, trained, strict=True))


class _End(torch.autograd.Function):
    """Computes, and leaves the gradient to `_Begin`."""

    @staticmethod
    def forward(ctx, begun: Tensor, tiled: Tiled, x: Tensor) -> Tensor:
        return tiled.forward_by_tiles(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None, None


def give(model: nn.Module, tokens: int) -> None:
    """Makes tiles of so many tokens."""
    for module in model.modules():
        if isinstance(module.forward, Tiled):
            module.forward.tokens = tokens


def _has_weights(module: nn.Module) -> bool:
    """Whether a layer has linears or experts inside."""
    return has_linears(module) or any(map(is_experts, module.modules()))


def _wants_more(forward) -> bool:
    """Whether a forward cannot be called with hidden states alone."""
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = [p for p in inspect.signature(forward).parameters.values() if p.kind in places]
    return sum(p.default is p.empty for p in taken) > 1


def install(model: nn.Module, blocks: dict[str, nn.Module], config) -> None:
    """Makes feed-forward layers run by tiles.

    Raises:
        UserError: a block has none, or drops something otherwise than by layers.
    """
    given, kind = f"--tile_tokens {config.tile_tokens}", model.config.model_type
    if dropped := family_dropout(model):
        raise UserError(f"{given}: {kind} models drop ({min(dropped)}), which a tile cannot find again; pass 0")
    for path, block in blocks.items():
        layers = {n: m for n, m in block.named_children() if _has_weights(m) and not hasattr(m, "in_features")}
        found = [layer for name, layer in layers.items() if "att" not in name.lower()]
        if not found:
            raise UserError(f"{given}: {path} of {kind} models has no feed-forward layer that is a module; pass 0")
        for layer in found:
            if _wants_more(layer.forward):
                raise UserError(f"{given}: {type(layer).__name__} takes more than hidden states; pass 0")
            layer.forward = Tiled(layer, config.tile_tokens)
