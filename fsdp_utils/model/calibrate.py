"""What linears are given when a model sees samples, block by block: one block at a time needs its weights."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call
from tqdm import tqdm

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.processes import sum_over_processes
from fsdp_utils.core.ranks import is_main, rank, world_size
from methods.base import Seen
from methods.targets import decoder_blocks

Tensor = torch.Tensor


class _Recorded(Exception):
    """Ends a pass that has told all that is asked of it."""


@torch.no_grad()
def record(run: Callable[[Tensor], None], blocks: list[nn.Module], rows: Iterable[Tensor]) -> list[dict]:
    """For each sample the state that the first block gets, on the CPU, under `state`, and what else a block is given,
    under its number: positions and masks, which a family may make for each block anew.

    Args:
        run: passes ids `[1, tokens]` through the model. Only the first block computes; the others pass theirs on.
        rows: ids `[tokens]` of each sample.

    Raises:
        UserError: something else than the result of a block comes to the next one.
    """
    found, handed, last = [], {}, len(blocks) - 1

    def keep(module, args, kwargs, *, number):
        if number == 0:
            found[-1]["state"] = args[0].cpu()  # 128 samples of 2,048 tokens of an 8B are 2 GiB
        elif not args or args[0] is not handed["state"]:
            raise UserError(f"{type(module).__name__}: its inputs are not what the block before it gives")
        found[-1][number] = args[1:], kwargs
        if number == last:
            raise _Recorded

    def note(module, args, result):
        handed["as tuple"] = isinstance(result, tuple)
        handed["state"] = _state_of(result)

    hand_on = lambda state, *args, **kwargs: (state,) if handed["as tuple"] else state
    hooks = [b.register_forward_pre_hook(partial(keep, number=n), with_kwargs=True) for n, b in enumerate(blocks)]
    hooks.append(blocks[0].register_forward_hook(note))
    for block in blocks[1:]:
        block.forward = hand_on
    try:
        for ids in tqdm(rows, desc="calibrating", unit="sample", disable=not is_main()):
            found.append({})
            try:
                run(ids.unsqueeze(0))
            except _Recorded:
                continue
    finally:
        for hook in hooks:
            hook.remove()
        for block in blocks[1:]:
            del block.forward  # the class's own again
    return found


def through(block: Callable, state: Tensor, given: tuple[tuple, dict], *, device: torch.device) -> Tensor:
    """What a block makes of a sample's state, with what else `record` found that it is given; state and result are on
    the CPU, `device` has the block."""
    args, kwargs = given
    return _state_of(block(state.to(device), *args, **kwargs)).cpu()


def _state_of(result) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@contextmanager
def grams(linears: dict[str, nn.Module], *, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """`X X^T` of all inputs that each linear gets until the block ends, fp32 `[in, in]`."""
    sums = {path: torch.zeros(m.in_features, m.in_features, device=device) for path, m in linears.items()}

    inputs = product = None

    def add(module, args, *, path):
        nonlocal inputs, product
        if args[0] is not inputs:  # several linears in a row may be given the same
            product = None  # is as large as the new one, a gigabyte of the widest
            inputs, rows = args[0], args[0].flatten(0, -2).float()
            product = rows.T @ rows
        sums[path] += product

    hooks = [module.register_forward_pre_hook(partial(add, path=path)) for path, module in linears.items()]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def linears_seen(
    model: nn.Module, weights, rows: list[Tensor], paths: Collection[str], *, device: torch.device
) -> Iterator[list[Seen]]:
    """What the linears at these paths see of all samples: a list for each block, emptied before the next. Collective:
    each process runs its share of the samples, and reads its share of a block's weights.

    Args:
        model: dense and on meta, where it stays; `device` holds the weights of one block while that runs.
        weights: of the model (`model.checkpoint.Checkpoint`).
        rows: ids `[tokens]` of samples.

    Raises:
        UserError: as `record`.
    """
    model.eval()
    for module in model.modules():
        module._buffers.update({name: b.to(device) for name, b in module._buffers.items() if b is not None})
    blocks = decoder_blocks(model)
    samples = _recorded(model, weights, blocks, rows[rank() :: world_size()], device=device)
    states = [sample.pop("state") for sample in samples]
    for number, (prefix, block) in enumerate(tqdm(blocks.items(), unit="block", disable=not is_main())):
        stored = _read(weights, [f"{prefix}.{name}" for name, _ in block.named_parameters()], device=device)
        values = {name.removeprefix(f"{prefix}."): value for name, value in _as_computed(model, stored).items()}
        filled = lambda *args, block=block, values=values, **kwargs: functional_call(block, values, args, kwargs)
        linears = {path: model.get_submodule(path) for path in paths if path.startswith(f"{prefix}.")}
        with grams(linears, device=device) as sums:
            pairs = zip(states, samples, strict=True)
            states = [through(filled, state, sample[number], device=device) for state, sample in pairs]
        seen = [Seen(path, stored[f"{path}.weight"], sum_over_processes(sums.pop(path))) for path in linears]
        yield seen
        seen.clear()  # before the next block needs as much


def _recorded(model: nn.Module, weights, blocks: dict[str, nn.Module], rows: list[Tensor], *, device) -> list[dict]:
    """`record` of a model on meta."""
    others = tuple(f"{path}." for path in blocks)[1:]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    after = {id(p) for p in head.parameters()} - {id(embedding.weight)} if head else set()  # no sample comes so far
    needed = [n for n, p in model.named_parameters() if not n.startswith(others) and id(p) not in after]
    values = _as_computed(model, _read(weights, needed, device=device))
    run = lambda ids: functional_call(model, values, kwargs=dict(input_ids=ids.to(device)))
    return record(run, list(blocks.values()), rows)


def _read(weights, names: list[str], *, device: torch.device) -> dict[str, Tensor]:
    """Whole tensors as they are in the checkpoint: each is read by one process, which tells the others."""
    found = {}
    for number, name in enumerate(names):
        shape, owner = weights.shape(name), number % world_size()
        if owner == rank():
            found[name] = weights.rows(name, 0, shape[0] if shape else 1).to(device).contiguous()
        else:
            found[name] = torch.empty(shape, dtype=weights.dtype(name), device=device)
        if world_size() > 1:
            dist.broadcast(found[name].view(-1).view(torch.uint8), owner)
    return found


def _as_computed(model: nn.Module, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """In the dtypes that the model computes with."""
    return {name: tensor.to(model.get_parameter(name).dtype) for name, tensor in stored.items()}
