"""`--use_gradient_checkpointing auto`: how many decoder blocks recompute, from what a block keeps and what is free.

What a block keeps is measured, not worked out from its layers: one forward pass of the model on fake tensors (shapes
without memory) tells it for every family, adapter, dropout, attention and precision, where a formula would have to
repeat them all. It is what eager code keeps; compiled blocks keep less.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import ReduceOp
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.processes import all_reduce, say
from fsdp_utils.memory.budget import GIB, optimizer_bytes
from fsdp_utils.memory.graphs import graph_tokens
from fsdp_utils.model.attention import boundaries
from fsdp_utils.sharding.fsdp import POLICIES, RESHARD_AFTER_FORWARD
from fsdp_utils.sharding.offload import embedding_for_host
from methods.kernels.cross_entropy import LOGITS_BYTES

RESERVE = 0.1  # of the free memory: fragmentation, libraries' workspaces, communication buffers


class Kept(NamedTuple):
    """Bytes kept for backward."""

    block: int  # by the block that keeps most
    input: int  # of a block
    by_policy: int  # outputs that --checkpoint_policy keeps of a block that recomputes
    outside: int  # by what is not in a block
    fused_loss: bool  # whether the head can compute the loss: some families change its logits


def peak_activations(
    recomputed: int, *, blocks: int, per_block: int, per_recomputed: int, in_backward: int, at_loss: int
) -> int:
    """Bytes of activations at the worst moment when the first `recomputed` of `blocks` recompute.

    Either the others hold everything, while the loss is computed or the last block is in backward; or they are done,
    and one block holds what it has recomputed.
    """
    held = (blocks - recomputed) * per_block + max(at_loss, in_backward)
    return recomputed * per_recomputed + max(held, per_block + in_backward if recomputed else 0)


def blocks_to_recompute(*, free: int, blocks: int, **sizes) -> int:
    """The fewest blocks that must recompute for `peak_activations` to fit into `free` bytes; all, if nothing does."""
    fits = lambda recomputed: peak_activations(recomputed, blocks=blocks, **sizes) <= free
    return next(filter(fits, range(blocks + 1)), blocks)


class _KeptByPolicy(TorchDispatchMode):
    """Sums the outputs that a checkpoint policy keeps."""

    def __init__(self, name: str):
        super().__init__()
        contexts = POLICIES[name].get("context_fn")
        self.policy = contexts.args[0] if contexts else None
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.policy and self.policy(None, func, *args, **kwargs) == CheckpointPolicy.MUST_SAVE:
            self.bytes += sum(t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


def _inputs(config) -> dict:
    """What `CausalLMLoss` passes besides the tokens, of a batch of `batch_size` rows of `context_length` tokens."""
    if not config.packing:
        return {}
    length = config.context_length
    position_ids = (torch.arange(length) % max(length // 2, 1)).repeat(config.batch_size, 1)  # two samples a row
    ends = boundaries(position_ids)
    lengths = dict(max_length_q=length, max_length_k=length)
    return dict(position_ids=position_ids, cu_seq_lens_q=ends, cu_seq_lens_k=ends, **lengths)


def measure(model: nn.Module, blocks: dict[str, nn.Module], config, *, dtype, autocast) -> Kept:
    """What a micro-batch keeps for backward, from one forward pass of the model on meta; nothing is allocated.

    Everything that meets a weight is fake. Positions and masks are real, because transformers looks at their values:
    so attention takes the way that it takes in training. Fake tensors are on the CPU, whose attention keeps what the
    GPU's kernels do (query, key, value, output and a number per row), so that the answer depends on no device.
    """
    mode, policy = FakeTensorMode(allow_non_fake_inputs=True), _KeptByPolicy(config.checkpoint_policy)
    kept, seen, inputs, by_policy, current, logits = dict.fromkeys(blocks, 0), set(), [], [], None, []

    def pack(tensor):
        nonlocal outside
        storage = tensor.untyped_storage()
        if storage not in seen:
            seen.add(storage)
            if current:
                kept[current] += storage.nbytes()
            else:
                outside += storage.nbytes()

    def watched(path, forward):
        def run(*args, **kwargs):
            nonlocal current
            fake = lambda t: t if isinstance(t, FakeTensor) else mode.from_tensor(t)
            args, kwargs = tree_map_only(torch.Tensor, fake, (args, kwargs))
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            # masks and rotary tables are there once for all blocks
            seen.update(t.untyped_storage() for t in tensors if not t.requires_grad)
            inputs.append(sum(t.nbytes for t in tensors if t.requires_grad))
            current, before = path, policy.bytes
            with mode, policy:
                out = forward(*args, **kwargs)
            by_policy.append(policy.bytes - before)
            current = None
            return out

        return run

    outside = 0
    with mode:
        state = {
            name: torch.empty(p.shape, dtype=p.dtype, requires_grad=p.requires_grad)
            for name, p in model.named_parameters()
        }
        hidden = model.config.get_text_config().hidden_size
        embedded = torch.empty(config.batch_size, config.context_length, hidden, dtype=dtype, requires_grad=True)
    seen.update(p.untyped_storage() for p in state.values())
    head = model.get_output_embeddings().register_forward_hook(lambda module, args, out: logits.append(out))
    for path, block in blocks.items():
        block.forward = watched(path, block.forward)
    try:
        compute = torch.autocast("cpu", autocast) if autocast else nullcontext()
        with compute, saved_tensors_hooks(pack, lambda packed: packed):
            out = functional_call(model, state, (), dict(inputs_embeds=embedded, use_cache=False, **_inputs(config)))
    except (RuntimeError, TypeError, ValueError) as error:  # code that looks at values, or takes no embeddings
        why = str(error).partition("\n")[0]
        raise UserError(
            f"--use_gradient_checkpointing auto: cannot measure {type(model).__name__} ({why}); pass true or false"
        ) from error
    finally:
        head.remove()
        for block in blocks.values():
            del block.forward
    fused = config.fused_loss and out.logits is logits[0]
    return Kept(max(kept.values()), max(inputs), max(by_policy), outside, fused)


def _rows(parameter: torch.Tensor, shards: int) -> int:
    """Elements of a parameter in the process that holds most of its rows."""
    return -(-parameter.shape[0] // shards) * (parameter.numel() // parameter.shape[0])


def resident(model: nn.Module, blocks: dict[str, nn.Module], config, *, mesh, together: bool = False) -> int:
    """Bytes in this process that are no activations: parameters, gradients, optimizer, and what FSDP2 gathers.

    From the model on meta, before FSDP2 shards it over `mesh`; `together` as `sharding.fsdp.shard` takes it.
    """
    shards = 1 if mesh is None else mesh.size(mesh.ndim - 1)  # the last dimension of a mesh is the one that shards
    on_host = mesh is not None and config.use_cpu_offload
    embedding = embedding_for_host(model, config).values()
    away = {id(p) for p in (model.parameters() if on_host else embedding)}
    held = 0
    for p in (p for p in model.parameters() if id(p) not in away):
        mine, size = _rows(p, shards), p.element_size()
        held += mine * size
        if p.requires_grad:
            held += mine * size + optimizer_bytes(config.optimizer, mine, size)
    if mesh is None:
        return held
    in_blocks = [list(block.parameters()) for block in blocks.values()]
    inside = {id(p) for parameters in (*in_blocks, embedding) for p in parameters}
    root = [p for p in model.parameters() if id(p) not in inside or (together and p.requires_grad)]
    whole = lambda parameters: sum(p.nbytes for p in parameters)
    # gradients before they are reduced, and the fp32 buffer that they are reduced in
    unreduced = lambda parameters: sum(p.numel() * (p.element_size() + 4) for p in parameters if p.requires_grad)
    largest = max(in_blocks, key=whole)
    if RESHARD_AFTER_FORWARD[config.sharding_strategy]:
        gathered = 3 * whole(largest)  # the block that runs, the next one, and the buffer that it arrives in
    else:
        gathered = sum(map(whole, in_blocks)) + whole(largest)
    held += whole(root) + gathered + unreduced(root) + 2 * unreduced(largest)
    if config.no_sync and config.gradient_accumulation_steps > 1:
        held += sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    return held


def at_loss(model: nn.Module, config, kept: Kept, *, dtype, autocast) -> int:
    """Bytes besides `kept.outside` while head and loss run."""
    shape = model.config.get_text_config()
    tokens, width = config.batch_size * config.context_length, dtype.itemsize
    if not kept.fused_loss:  # whole logits, their fp32 copy, probabilities, and the gradients of these
        return tokens * shape.vocab_size * (2 * width + 12)
    head = model.get_output_embeddings()
    size = shape.vocab_size * shape.hidden_size
    trains = any(p.requires_grad for p in head.parameters())
    # a packed or autocast head as a matrix; hidden states of the predicting tokens and their gradient
    dense = 0 if isinstance(head, nn.Linear) and not autocast else size * (autocast or dtype).itemsize
    return LOGITS_BYTES + dense + size * (4 + width) * trains + 2 * tokens * shape.hidden_size * width


def graphs_share(model: nn.Module, config, *, mesh, device: torch.device) -> float:
    """What part of the activations of a batch CUDA graphs hold for good.

    They hold those of the largest batch that was captured, beside those of a batch that runs without a graph.
    """
    most = graph_tokens(model, config, mesh=mesh, device=device)
    return min(1.0, most / (config.batch_size * config.context_length))


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on its GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    cached = torch.cuda.memory_reserved(device) - allocated
    limit = torch.cuda.get_per_process_memory_fraction(device) * total
    return min(free + cached, int(limit) - allocated)


def choose(
    model: nn.Module, blocks: dict[str, nn.Module], config, *, mesh, device, dtype, autocast, together: bool = False
) -> int:
    """How many blocks recompute, the same in every process; with `auto` it says why.

    Runs on the planned model on meta, before blocks are wrapped and sharded. The first blocks are the ones to
    recompute: see `sharding.fsdp.prepare_blocks`.

    Args:
        dtype, autocast: of hidden states and of the products, as in `model.assemble.PRECISIONS`.

    Raises:
        UserError: the model cannot be measured.
    """
    if config.use_gradient_checkpointing != "auto":
        return len(blocks) if config.use_gradient_checkpointing else 0
    available = free_memory(device)
    if available is None:
        say(f"activation checkpointing: {len(blocks)} of {len(blocks)} blocks recompute (auto on a CPU: all)")
        return len(blocks)
    kept = measure(model, blocks, config, dtype=dtype, autocast=autocast)
    linears = [m for block in blocks.values() for m in block.modules() if hasattr(m, "in_features")]
    weight = max((m.in_features * m.out_features * dtype.itemsize for m in linears), default=0)
    taken = resident(model, blocks, config, mesh=mesh, together=together) + kept.outside
    free = int(all_reduce(int(available * (1 - RESERVE)) - taken, device, op=ReduceOp.MIN))
    free = int(free / (1 + graphs_share(model, config, mesh=mesh, device=device)))
    recomputed = blocks_to_recompute(
        free=free,
        blocks=len(blocks),
        per_block=kept.block,
        per_recomputed=kept.by_policy + (0 if config.use_activation_cpu_offload else kept.input),
        in_backward=kept.block + 2 * weight,  # gradients inside a block, a base weight dequantized and its copy
        at_loss=at_loss(model, config, kept, dtype=dtype, autocast=autocast),
    )
    say(
        f"activation checkpointing: {recomputed} of {len(blocks)} blocks recompute ({kept.block / GIB:.2f} GiB a block "
        f"at {config.batch_size} x {config.context_length} tokens, {free / GIB:.1f} GiB free for activations)"
    )
    return recomputed
