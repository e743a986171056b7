"""Decoder blocks as compiled code: one for all blocks and lengths, kept from run to run."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.ranks import say

# which sizes of a block's inputs differ from batch to batch, by how many dimensions they have: where samples of packed
# rows begin; positions; hidden states and rotations `[rows, tokens, features]`; masks `[rows, 1, tokens, tokens]`
BOUNDARIES = {1: (0,)}
VARYING = {**BOUNDARIES, 2: (1,), 3: (1,), 4: (2, 3)}
MOST_LENGTHS = 8  # with code of their own, which takes seconds each
CACHE = "TORCHINDUCTOR_CACHE_DIR"  # also of what Triton makes
# attention that is run again in backward: torch before 2.13 keeps no code that has it, and compiles it at each start
ATTENTION_AGAIN = "torch.ops.higher_order.graphsafe_run_with_rng_state"


def cannot_compile(error: Exception) -> UserError:
    """The error to raise in place of the compiler's, which has already printed the code that it could not compile."""
    return UserError(f"--compile true: the compiler failed ({cause(error)}); pass --compile false")


def cause(error: Exception) -> str:
    inner = error.inner_exception
    return f"{type(inner).__name__}: {inner}".splitlines()[0]


def compiler(config, device: torch.device) -> Callable | None:
    """What compiles a decoder block's forward here, or None: compiled code needs CUDA and Triton."""
    if not config.compile or device.type != "cuda" or not torch.utils._triton.has_triton():
        return None
    keep_between_runs()
    return Compiler(lengths_vary=not config.packing)


class Compiler:
    """Compiles the forwards of a model's blocks.

    Args:
        lengths_vary: code is for rows of any number of tokens, so that no later batch waits for code of its own. Where
            torch cannot make it, that is said, and the first lengths get their own.
        options: of torch.compile.
    """

    def __init__(self, *, lengths_vary: bool = True, **options):
        self.lengths_vary, self.options, self.failed, self.sizes = lengths_vary, options, False, set()
        # all blocks share one code object; what differs between them, as new blocks of Llama-Pro, takes code of its own
        torch._dynamo.config.recompile_limit = 64

    def __call__(self, forward: Callable) -> Callable:
        code, code_of_a_length = (torch.compile(forward, dynamic=dynamic, **self.options) for dynamic in (None, False))

        def run(*args, **kwargs):
            if not self.failed:
                mark((args, kwargs), VARYING if self.lengths_vary else BOUNDARIES)
                try:
                    return code(*args, **kwargs)
                except torch._dynamo.exc.BackendCompilerFailed as error:
                    if not self.lengths_vary:
                        raise
                    self.failed = True
                    each = f"the first {MOST_LENGTHS} get their own, blocks run plain with others"
                    say(f"note: code for all lengths of rows failed ({cause(error)}); {each}")
            if not self._has_own((args, kwargs)):
                return forward(*args, **kwargs)
            args, kwargs = tree_map_only(torch.Tensor, unmarked, (args, kwargs))
            return code_of_a_length(*args, **kwargs)

        return run

    def _has_own(self, inputs) -> bool:
        """Whether inputs of these sizes have code of their own, or get it now."""
        sizes = tuple(tensor.shape for tensor in tree_leaves(inputs) if isinstance(tensor, torch.Tensor))
        if len(self.sizes) < MOST_LENGTHS:
            self.sizes.add(sizes)
        return sizes in self.sizes


def mark(inputs, varying: dict[int, tuple[int, ...]]) -> None:
    """Tells torch which sizes differ from batch to batch, before it has seen a second one.

    `dynamic=True` would do it for all sizes, and take a minute longer: it reasons about each by itself.
    """
    for tensor in tree_leaves(inputs):
        for dim in varying.get(tensor.dim(), ()) if isinstance(tensor, torch.Tensor) else ():
            torch._dynamo.maybe_mark_dynamic(tensor, dim)


def unmarked(tensor: torch.Tensor) -> torch.Tensor:
    """The same, as another object: a mark cannot be taken back."""
    return tensor.view_as(tensor)


def keep_between_runs() -> None:
    """torch keeps code in the folder for temporary files, which is often gone with the machine's next start."""
    torch._inductor.config.unsafe_marked_cacheable_functions[ATTENTION_AGAIN] = "1"
    if CACHE in os.environ:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch" / "inductor"
    with suppress(OSError):  # a home that cannot be written: as torch does
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[CACHE] = str(folder)
