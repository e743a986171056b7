"""Decoder blocks as compiled code: one for all blocks and lengths, kept from run to run."""

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from fsdp_utils.core.errors import UserError

# the sizes of a block's inputs that differ from batch to batch, by how many dimensions they have: where samples of a
# packed row begin; positions; hidden states and rotations `[rows, tokens, features]`; masks `[rows, 1, tokens, tokens]`
BOUNDARIES = (0,)
VARYING = {0: (), 1: BOUNDARIES, 2: (1,), 3: (1,), 4: (2, 3)}
CACHE = "TORCHINDUCTOR_CACHE_DIR"  # also of what Triton makes


def cannot_compile(error: Exception) -> UserError:
    """The error to raise in place of the compiler's, which has already printed the code that it could not compile."""
    cause = error.inner_exception
    what = f"{type(cause).__name__}: {cause}".splitlines()[0]
    return UserError(f"--compile true: the compiler failed ({what}); pass --compile false")


def compiler(config, device: torch.device) -> Callable | None:
    """What compiles a decoder block's forward here, or None: compiled code needs CUDA and Triton."""
    if not config.compile or device.type != "cuda" or not torch.utils._triton.has_triton():
        return None
    keep_between_runs()
    return partial(compiled, lengths_vary=not config.packing)


def compiled(forward: Callable, *, lengths_vary: bool = True, **options) -> Callable:
    """A forward as compiled code.

    Args:
        lengths_vary: the code is for rows of any number of tokens, so that no later batch waits for code of its own.
        options: of torch.compile.
    """
    # all blocks share one code object; what differs between them, as new blocks of Llama-Pro, takes code of its own
    torch._dynamo.config.recompile_limit = 64
    run = torch.compile(forward, **options)

    def run_marked(*args, **kwargs):
        mark((args, kwargs), lengths_vary=lengths_vary)
        return run(*args, **kwargs)

    return run_marked


def mark(inputs, *, lengths_vary: bool) -> None:
    """Tells torch which sizes differ from batch to batch, before it has seen a second one.

    `dynamic=True` would do it for all sizes, and take a minute longer: it reasons about each by itself.
    """
    tensors = [value for value in tree_leaves(inputs) if isinstance(value, torch.Tensor)]
    for tensor in tensors:
        for dim in VARYING[tensor.dim()] if lengths_vary else BOUNDARIES if tensor.dim() == 1 else ():
            torch._dynamo.maybe_mark_dynamic(tensor, dim)


def keep_between_runs() -> None:
    """torch keeps code in the folder for temporary files, which is often gone with the machine's next start."""
    if CACHE in os.environ:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch" / "inductor"
    with suppress(OSError):  # a home that cannot be written: as torch does
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[CACHE] = str(folder)
