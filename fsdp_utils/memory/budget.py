"""One model of GPU memory: what a step holds in this process, by purpose, from a model on meta.

The same numbers choose how many blocks recompute (`memory.recompute`) and make the message that ends a run that ran out
of memory.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from fsdp_utils.core.devices import GIB
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.ranks import world_size
from fsdp_utils.memory.activations import Kept
from fsdp_utils.options import OPTIMIZERS, STRATEGIES
from fsdp_utils.sharding.peer_gather import unread_parameters
from fsdp_utils.sharding.prepared import Prepared
from methods.kernels.cross_entropy import LOGITS_BYTES


class OutOfMemory(UserError):
    """The GPU is full; the message says of what, and which flags lower it."""


class Resident(NamedTuple):
    """Bytes in this process that are no activations."""

    base: int  # frozen rows, and the slots that peer gathering fills
    learned: int  # trained rows and their gradients; whole ones too where they are whole during a step
    optimizer: int
    gathered: int  # what FSDP2 makes whole, and the buffers that gradients are reduced in


def optimizer_bytes(optimizer: str, elements: int, element_size: int, *, columns: int = 256) -> int:
    """Bytes that an optimizer keeps for trained elements of so many bytes each, in rows of `columns`."""
    row = OPTIMIZERS[optimizer]
    own = elements * (2 * element_size if row.state_bytes is None else row.state_bytes)
    return own + elements // columns * -(-columns // 256) * row.scale_bytes


def _gradient_bytes(model: nn.Module, blocks: dict[str, nn.Module], config, *, shards: int) -> int:
    """Of trained rows: of all, or where each steps at once, of the largest group: a block, embedding or head, the rest.

    Where gradients are averaged over copies of the model, FSDP2 holds what it reduced until backward ends.
    """
    nbytes = lambda parameters: sum(_row_bytes(p, shards)[1] for p in parameters if p.requires_grad)
    if not config.optimizer_in_backward or STRATEGIES[config.sharding_strategy].copies != "one":
        return nbytes(model.parameters())
    ends = {id(m): m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    groups = [list(m.parameters()) for m in (*blocks.values(), *ends.values())]
    inside = {id(p) for group in groups for p in group}
    return max(map(nbytes, [*groups, [p for p in model.parameters() if id(p) not in inside]]))


def _row_bytes(parameter: torch.Tensor, shards: int) -> tuple[int, int]:
    """Elements and bytes of a parameter in the process that holds most of its rows."""
    elements = -(-parameter.shape[0] // shards) * (parameter.numel() // parameter.shape[0])
    return elements, elements * parameter.element_size()


def resident(
    model: nn.Module,
    blocks: dict[str, nn.Module],
    config,
    *,
    mesh,
    on_host: dict[str, nn.Parameter],
    gathered_with_root: bool = False,
    slot_bytes: int = 0,
) -> Resident:
    """From the model on meta, before FSDP2 shards it over `mesh`.

    Args:
        on_host: parameters of the embedding that stay in host memory, whole.
        gathered_with_root: as `fsdp.shard` takes it.
        slot_bytes: of peer gathering.
    """
    shards = 1 if mesh is None else mesh.size(mesh.ndim - 1)  # the last dimension of a mesh is the one that shards
    offloaded = mesh is not None and config.use_cpu_offload
    away = {id(p) for p in on_host.values()}
    frozen = trained = states = 0
    for p in model.parameters() if not offloaded else ():
        elements, nbytes = _row_bytes(p, shards)
        if p.requires_grad:
            trained += nbytes
            columns = p.shape[1:].numel()
            states += optimizer_bytes(config.optimizer, elements, p.element_size(), columns=columns)
        elif id(p) not in away:
            frozen += nbytes
    gradients = 0 if offloaded else _gradient_bytes(model, blocks, config, shards=shards)
    learned, whole, buffers = trained + gradients, 0, 0
    if mesh is not None:
        whole, buffers = _gathered(model, blocks, config, away=away, gathered_with_root=gathered_with_root)
    if gathered_with_root:  # a step holds weights and gradients whole, and at its end the rows of gradients
        extra = 2 * sum(p.nbytes for block in blocks.values() for p in block.parameters() if p.requires_grad)
        learned, whole, buffers = trained + extra, whole - extra, buffers + trained
    return Resident(frozen + slot_bytes, learned, states, max(whole - slot_bytes, 0) + buffers)


def _gathered(model: nn.Module, blocks: dict, config, *, away: set[int], gathered_with_root: bool) -> tuple[int, int]:
    """Bytes of what FSDP2 makes whole at the worst moment, gradients of it included, and of the fp32 buffers that
    gradients are reduced in."""
    away = away | {id(p) for p in unread_parameters(model)}
    in_blocks = [[p for p in block.parameters() if id(p) not in away] for block in blocks.values()]
    inside = {id(p) for parameters in in_blocks for p in parameters} | away
    root = [p for p in model.parameters() if id(p) not in inside or (gathered_with_root and p.requires_grad)]
    whole = lambda parameters: sum(p.nbytes for p in parameters)
    gradients = lambda parameters: sum(p.nbytes for p in parameters if p.requires_grad)
    buffers = lambda parameters: sum(4 * p.numel() for p in parameters if p.requires_grad)
    largest = max(in_blocks, key=whole)
    if STRATEGIES[config.sharding_strategy].resharded:
        gathered = 3 * whole(largest)  # the block that runs, the next one, and the buffer that it arrives in
    else:
        gathered = sum(map(whole, in_blocks)) + whole(largest)
    reduced = buffers(root) + 2 * buffers(largest)
    if config.no_sync and config.gradient_accumulation_steps > 1:
        reduced += buffers(model.parameters())
    return gathered + whole(root) + gradients(root) + 2 * gradients(largest), reduced


def at_loss(model: nn.Module, config, kept: Kept, *, dtype, autocast) -> int:
    """Bytes besides `kept.outside` while head and loss run."""
    shape = model.config.get_text_config()
    tokens, width = config.batch_size * config.context_length, dtype.itemsize
    head = model.get_output_embeddings()
    if head is None:  # a few numbers a row
        return 0
    if not kept.fused_loss:  # whole logits, their fp32 copy, probabilities, and the gradients of these
        return tokens * shape.vocab_size * (2 * width + 12)
    size = shape.vocab_size * shape.hidden_size
    trains = any(p.requires_grad for p in head.parameters())
    # a packed or autocast head as a matrix; hidden states of the predicting tokens and their gradient
    dense = 0 if isinstance(head, nn.Linear) and not autocast else size * (autocast or dtype).itemsize
    return LOGITS_BYTES + dense + size * (4 + width) * trains + 2 * tokens * shape.hidden_size * width


def per_recomputed(config, kept: Kept, *, compiled: bool) -> int:
    """Bytes that a block that recomputes keeps on the GPU. In eager code only its input can be offloaded."""
    if not config.use_activation_cpu_offload:
        return kept.input + kept.by_policy
    return kept.by_policy - (kept.states_by_policy if compiled else 0)


def in_backward(blocks: dict[str, nn.Module], kept: Kept, *, dtype: torch.dtype) -> int:
    """Bytes inside a block in backward: gradients, and a base weight dequantized and its copy."""
    linears = [m for block in blocks.values() for m in block.modules() if hasattr(m, "in_features")]
    weight = max((m.in_features * m.out_features * dtype.itemsize for m in linears), default=0)
    return kept.block + 2 * weight


def peak_activations(
    recomputed: int, *, blocks: int, per_block: int, per_recomputed: int, in_backward: int, at_loss: int
) -> int:
    """Bytes of activations at the worst moment when the first `recomputed` of `blocks` recompute.

    Either the others hold everything, while the loss is computed or the last block is in backward; or they are done,
    and one block holds what it has recomputed.
    """
    held = (blocks - recomputed) * per_block + max(at_loss, in_backward)
    return recomputed * per_recomputed + max(held, per_block + in_backward if recomputed else 0)


def sizes(config, held: Resident, kept: Kept | None, **activations) -> dict[str, int]:
    """Bytes in this process by purpose.

    Args:
        kept: None where it could not be measured.
        activations: arguments of `peak_activations`, with `recomputed`.
    """
    learned = "weights and gradients" if config.method == "full" else "adapters and gradients"
    found = {"base": held.base, learned: held.learned, "optimizer": held.optimizer}
    if held.gathered:
        found["gathered"] = held.gathered
    if kept is not None:
        found["activations"] = kept.outside + peak_activations(**activations | dict(at_loss=0))
        found["logits"] = activations["at_loss"]
    return found


def host_activations(config, kept: Kept | None, recomputed: int, *, compiled: bool) -> int:
    """Bytes of page-locked host memory that `--use_activation_cpu_offload` takes in this process. The last block that
    recomputes keeps what it saves."""
    if kept is None or not config.use_activation_cpu_offload:
        return 0
    return max(recomputed - 1, 0) * (kept.input + (kept.states_by_policy if compiled else 0))


def _can_step_in_backward(config) -> bool:
    """Whether no other flag forbids what is not in use yet."""
    return not config.optimizer_in_backward and not replace(config, optimizer_in_backward=True).in_backward_errors()


def remedies(config, *, gathered_with_root: bool = False) -> list[str]:
    """Flags that lower memory and are not in use, cheapest first; `gathered_with_root` as `fsdp.shard` takes it."""
    offered = (
        (config.use_gradient_checkpointing is not True, "--use_gradient_checkpointing true"),  # auto estimates
        (config.checkpoint_policy != "full", "--checkpoint_policy full"),
        (not config.fused_loss, "--fused_loss true"),
        (config.batch_size > 1, "a smaller --batch_size with more --gradient_accumulation_steps"),
        (config.quantizer == "none" and config.method != "full", "a quantized --train_type such as bnb_dora"),
        (config.quantizer == "bnb" and config.quant_scales != "double", "--quant_scales double"),
        (config.quantizer != "none" and not config.quantize_lm_head, "--quantize_lm_head true"),
        (world_size() > 1 and config.sharding_strategy != "full_shard", "--sharding_strategy full_shard"),
        (gathered_with_root, "--peer_gather false"),
        (config.method == "full" and _can_step_in_backward(config), "--optimizer_in_backward true"),
        (optimizer_bytes(config.optimizer, 1, 2) > optimizer_bytes("adamw_8bit", 1, 2), "--optimizer adamw_8bit"),
        (not config.use_activation_cpu_offload, "--use_activation_cpu_offload true"),
        (not config.use_cpu_offload, "--use_cpu_offload true"),
        (config.context_length > 256, "a shorter --context_length"),
    )
    return [flag for missing, flag in offered if missing]


def out_of_memory(prepared: Prepared, config, error: Exception) -> OutOfMemory:
    """The error to raise in place of torch's: one message, parts first, then the flags that would help."""
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in prepared.sizes.items())
    first = str(error).splitlines()[0]
    helpful = remedies(config, gathered_with_root=prepared.gathered_with_root)
    return OutOfMemory(
        f"out of GPU memory ({first}). GiB by purpose: {parts}. Would help, in order: {'; '.join(helpful)}"
    )
