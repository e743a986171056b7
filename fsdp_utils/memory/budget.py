"""One model of GPU memory: what a step holds in this process, by purpose, from a model on meta.

The same numbers choose how many blocks recompute (`memory.recompute`) and make the message that ends a run that ran out
of memory.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from fsdp_utils.core.devices import GIB
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.ranks import world_size
from fsdp_utils.core.rows import largest_share
from fsdp_utils.memory.activations import Kept
from fsdp_utils.memory.graphs import graph_tokens
from fsdp_utils.options import OPTIMIZERS, STRATEGIES
from fsdp_utils.sharding.offload import is_shared
from fsdp_utils.sharding.peer_collectives import buffer_bytes
from fsdp_utils.sharding.peer_gather import frozen_weights, unread_parameters
from fsdp_utils.sharding.prepared import Prepared
from methods import CORRECTING
from methods.kernels.cross_entropy import LOGITS_BYTES
from methods.quantizers.linear import QuantizedWeight


class OutOfMemory(UserError):
    """The GPU is full; the message says of what, and which flags lower it."""


class Resident(NamedTuple):
    """Bytes in this process that are no activations."""

    base: int  # frozen rows, and the slots that peer gathering fills
    learned: int  # trained rows and their gradients; whole ones too where they are whole during a step
    optimizer: int
    gathered: int  # what FSDP2 makes whole while a block runs in backward, and what gradients are reduced in
    gradients: int = 0  # of `learned`, those that come into being during backward
    head: int = 0  # of head or embedding, whole while it runs
    reducing: int = 0  # `gathered` when a block is done, and its gradients leave
    beginning: int = 0  # before the first step, where samples pass through the blocks: all of it
    stepping: int = 0  # when backward is over: what gradients are reduced in, what the optimizer makes and drops

    @property
    def total(self) -> int:
        return self.base + self.learned + self.optimizer + self.gathered


def optimizer_bytes(
    optimizer: str, elements: int, element_size: int, *, columns: int = 256, in_block: bool = False
) -> int:
    """Bytes that an optimizer keeps for trained elements of so many bytes each, in rows of `columns`.

    Args:
        in_block: whether they are of a matrix of a decoder block.
    """
    row = OPTIMIZERS[optimizer]
    numbers = row.of_matrices if in_block else 2
    own = elements * (numbers * element_size if row.state_bytes is None else row.state_bytes)
    return own + elements // columns * -(-columns // 256) * row.scale_bytes


def _gradient_bytes(model: nn.Module, blocks: dict[str, nn.Module], config, *, shards: int) -> int:
    """Of trained rows: of all, or where each steps at once, of the largest group: a block, embedding or head, the rest.

    Where gradients are averaged over copies of the model, FSDP2 holds what it reduced until backward ends.
    """
    nbytes = lambda parameters: sum(largest_share(p, shards)[1] for p in parameters if p.requires_grad)
    if not config.optimizer_in_backward or STRATEGIES[config.sharding_strategy].copies != "one":
        return nbytes(model.parameters())
    ends = {id(m): m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    groups = [list(m.parameters()) for m in (*blocks.values(), *ends.values())]
    inside = {id(p) for group in groups for p in group}
    return max(map(nbytes, [*groups, [p for p in model.parameters() if id(p) not in inside]]))


def keeps_gradients(model: nn.Module, config, *, mesh, device: torch.device) -> bool:
    """Whether the memory of gradients stays from step to step: where CUDA graphs found it, or where several backwards
    add to it."""
    graphs = graph_tokens(model, config, mesh=mesh, device=device) > 0
    return graphs or config.gradient_accumulation_steps > 1


def resident(
    model: nn.Module,
    blocks: dict[str, nn.Module],
    config,
    *,
    mesh,
    on_host: dict[str, nn.Parameter],
    gathered_with_root: bool = False,
    reduced_by_peers: bool = False,
    slot_bytes: int = 0,
    device: torch.device,
    offloaded: bool | None = None,
) -> Resident:
    """From the model on meta, before FSDP2 shards it over `mesh`.

    Args:
        device: of the run; it need not be here.
        offloaded: whether its rows are in host memory; None: as the flags say.
        on_host: parameters of the embedding that stay in host memory, whole.
        gathered_with_root, reduced_by_peers: as `fsdp.shard` takes them.
        slot_bytes: of peer gathering.
    """
    shards = 1 if mesh is None else mesh.size(mesh.ndim - 1)  # the last dimension of a mesh is the one that shards
    if offloaded is None:
        offloaded = mesh is not None and config.use_cpu_offload
    away = {id(p) for p in on_host.values()}
    inside = {id(p) for block in blocks.values() for p in block.parameters() if p.dim() == 2}
    frozen = trained = states = 0
    for p in model.parameters() if not offloaded else ():
        elements, nbytes = largest_share(p, shards)
        if p.requires_grad:
            trained += nbytes
            shape = dict(columns=p.shape[1:].numel(), in_block=id(p) in inside)
            states += optimizer_bytes(config.optimizer, elements, p.element_size(), **shape)
        elif id(p) not in away:
            frozen += nbytes
    gradients = 0 if offloaded else _gradient_bytes(model, blocks, config, shards=shards)
    learned, gathered, extra = trained + gradients, Gathered(0, 0, 0, 0), 0
    if mesh is not None:
        by_peers = (
            {id(m._parameters[n]) for b in blocks.values() for m, n in frozen_weights(b)} if slot_bytes else set()
        )
        groups = dict(shards=shards, gathered_with_root=gathered_with_root, reduced_by_peers=reduced_by_peers)
        gathered = _gathered(model, blocks, config, away=away | by_peers, **groups)
    if gathered_with_root:  # a step holds weights and gradients whole, and at its end the rows of gradients
        extra = 2 * sum(p.nbytes for block in blocks.values() for p in block.parameters() if p.requires_grad)
        learned, gradients = trained + extra, extra // 2
    if reduced_by_peers:
        slot_bytes += 2 * buffer_bytes(blocks.values(), shards=shards)
    samples = _of_samples(blocks) if config.lora_init in CORRECTING else 0
    copies = 0 if config.rounds_stochastically or config.optimizer_in_backward else OPTIMIZERS[config.optimizer].copies
    return Resident(
        base=frozen + slot_bytes,
        learned=learned,
        optimizer=states,
        gathered=max(gathered.blocks - extra, 0),
        reducing=max(gathered.reducing - extra, 0),
        gradients=0 if keeps_gradients(model, config, mesh=mesh, device=device) else gradients,
        head=gathered.ends,
        beginning=samples and frozen + slot_bytes + trained + samples,
        stepping=max(copies * trained, gathered.at_end + (trained if gathered_with_root else 0)),
    )


def _of_samples(blocks: dict[str, nn.Module]) -> int:
    """Bytes while samples correct the rounding (`model.calibrate`): a block as its checkpoint has it, in 16 bits, an
    fp32 matrix of the inputs of each linear, and one more as wide as the widest."""

    def of(block: nn.Module) -> int:
        linears = [m for m in block.modules() if isinstance(m, QuantizedWeight)]
        of_inputs = [4 * m.in_features**2 for m in linears]
        return sum(2 * math.prod(m.shape) for m in linears) + sum(of_inputs) + max(of_inputs, default=0)

    return max(map(of, blocks.values()))


class Gathered(NamedTuple):
    """Bytes of what FSDP2 makes whole, gradients of it and the fp32 buffers that these are reduced in included."""

    blocks: int  # while a block runs
    reducing: int  # when it is done, and its gradients leave; they come as what it has recomputed goes
    ends: int  # while head or embedding does
    at_end: int  # when backward is over: buffers of what is whole during a step


def _gathered(
    model: nn.Module,
    blocks: dict,
    config,
    *,
    away: set[int],
    shards: int,
    gathered_with_root: bool,
    reduced_by_peers: bool,
) -> Gathered:
    away = away | {id(p) for p in unread_parameters(model)}
    groups = [] if gathered_with_root else blocks.values()
    in_blocks = [[p for p in block.parameters() if id(p) not in away] for block in groups] or [[]]
    ends = _ends(model, away=away)
    inside = {id(p) for parameters in in_blocks for p in parameters} | away | {id(p) for p in ends}
    root = [p for p in model.parameters() if id(p) not in inside]
    whole = lambda parameters: sum(p.nbytes for p in parameters)
    gradients = lambda parameters: sum(p.nbytes for p in parameters if p.requires_grad)
    buffers = lambda parameters: sum(4 * p.numel() for p in parameters if p.requires_grad)
    of_block = gradients if reduced_by_peers else buffers
    largest, of_root = max(map(whole, in_blocks)), whole(root) + gradients(root)
    if STRATEGIES[config.sharding_strategy].resharded:
        running = reducing = 0
        for before, block, after in zip([[], *in_blocks], in_blocks, [*in_blocks[1:], []], strict=False):
            coming = 2 * whole(before)  # with the buffer that it arrives in
            reduced_in = of_block(block) + of_block(block) // shards
            running = max(running, whole(block) + coming + of_block(after))
            reducing = max(reducing, coming + gradients(block) + max(whole(block) + of_block(after), reduced_in))
    else:
        reducing = sum(map(whole, in_blocks)) + max(map(gradients, in_blocks)) + 2 * max(map(of_block, in_blocks))
        running = reducing + largest
    if config.no_sync and config.gradient_accumulation_steps > 1:
        of_root += buffers(model.parameters())
    # what arrives from others does so in a buffer; meanwhile the last block comes, for backward
    arriving = 2 if shards > 1 else 1
    of_ends = max((arriving * p.nbytes + buffers([p]) for p in ends), default=0) + 2 * largest
    return Gathered(of_root + running, of_root + reducing, of_ends, buffers(root))


def _ends(model: nn.Module, *, away: set[int]) -> list[nn.Parameter]:
    """Parameters of head and embedding where they are groups of their own: see `fsdp.shard`."""
    ends = [m for m in (model.get_output_embeddings(), model.get_input_embeddings()) if m is not None]
    return [p for m in ends if not is_shared(model, m) for p in m.parameters() if id(p) not in away]


def at_loss(model: nn.Module, config, kept: Kept, *, dtype, autocast) -> int:
    """Bytes besides those of the blocks while head and loss run."""
    shape = model.config.get_text_config()
    tokens, width = config.batch_size * config.row_tokens, dtype.itemsize
    head = model.get_output_embeddings()
    if head is None:  # a few numbers a row
        return 0
    if not kept.fused_loss:  # whole logits, in fp32 too, their probabilities, and the gradient of one of these
        return kept.outside + tokens * shape.vocab_size * (2 * width + 8)
    size = shape.vocab_size * shape.hidden_size
    trains = any(p.requires_grad for p in head.parameters())
    compute = (autocast or dtype).itemsize
    # a packed head as a matrix, and in fp32 its gradient, in which products are summed
    packed = 0 if isinstance(head, nn.Linear) else size * compute
    of_weight = packed + size * (4 + compute) * trains
    # hidden states of the predicting tokens and their gradient
    return kept.outside + LOGITS_BYTES + of_weight + 2 * tokens * shape.hidden_size * width


class Block(NamedTuple):
    """Bytes of a decoder block on the GPU besides its weights."""

    whole: int  # kept for backward where it does not recompute
    recomputing: int  # where it does
    again: int  # what it then makes again in backward
    within: int  # in backward: gradients, a weight dequantized and its copy, copies from and to the host
    leaving: int  # of several blocks, what is on its way to the host when the loss begins


def of_head(model: nn.Module, held: Resident) -> int:
    """Bytes of `held.gradients` that the loss makes: those of the head."""
    head = model.get_output_embeddings()
    return min(held.gradients, sum(p.nbytes for p in head.parameters() if p.requires_grad) if head is not None else 0)


def _away(config, kept: Kept, *, compiled: bool) -> int:
    """Bytes of a block that recomputes which wait in host memory. In eager code only its input can."""
    if not config.use_activation_cpu_offload:
        return 0
    return kept.input + (kept.outputs.states - kept.outputs.idle_states if compiled else 0)


def block_bytes(
    blocks: dict[str, nn.Module], kept: Kept, config, *, dtype: torch.dtype, compiled: bool, slack: int = 0
) -> Block:
    """Compiled, a block keeps results of products and works the rest out again; its gradients take the room of what it
    no longer needs, so that beside it are two of the hidden states and two of the widest input (docs/planning.md)."""
    outputs = kept.outputs
    if compiled:
        by_policy, needed = outputs.by_policy - outputs.idle_by_policy, outputs.all - outputs.idle
        within = 2 * (kept.input + outputs.fed) if kept.fused_adapters else needed
    else:
        by_policy, needed = outputs.by_policy, kept.block
        within = kept.input + outputs.fed if kept.fused_adapters else kept.block
    away = _away(config, kept, compiled=compiled)
    linears = [m for block in blocks.values() for m in block.modules() if hasattr(m, "in_features")]
    # a stack of experts is dequantized whole, but not copied together with an adapter
    shapes = (getattr(m, "shape", (m.out_features, m.in_features)) for m in linears)
    weight = max((math.prod(shape) * dtype.itemsize * (2 if len(shape) == 2 else 1) for shape in shapes), default=0)
    whole = kept.input + needed if compiled else needed
    inside = within + weight + 2 * away + (kept.input if away else 0)
    return Block(whole, kept.input + by_policy - away, max(needed - by_policy, 0), inside, leaving=(3 + slack) * away)


class Peak(NamedTuple):
    """Bytes of activations at the two worst moments of a step, less those of gradients that are not there yet."""

    loss: int  # while the loss is computed, before backward
    backward: int  # while a block is in backward


def peak_activations(
    recomputed: int, *, blocks: int, block: Block, at_loss: int, gradients: int = 0, of_head: int = 0
) -> Peak:
    """When the first `recomputed` of `blocks` recompute.

    In backward it is the last block; or the others are done, and one block holds what it has recomputed; or the first
    block, when all gradients are there.

    Args:
        gradients: bytes that come into being during backward; `of_head`: of these, what the loss has made.
    """

    def in_backward(number: int) -> int:
        again, left = number < recomputed, number + 1
        held = min(left, recomputed) * block.recomputing + max(left - recomputed, 0) * block.whole
        to_come = (gradients - of_head) * number // blocks
        return held + block.within + block.again * again - to_come

    begun = recomputed * block.recomputing + (blocks - recomputed) * block.whole + block.leaving + at_loss - gradients
    return Peak(begun, max(map(in_backward, {blocks - 1, max(recomputed - 1, 0), 0})))


SHOWN = ("base", "optimizer", "activations", "logits")  # also where they are nothing


def sizes(config, held: Resident, kept: Kept | None, *, workspace: int = 0, **activations) -> dict[str, int]:
    """Bytes in this process by purpose, at the worst moment of a step.

    Args:
        kept: None where it could not be measured.
        workspace: of libraries.
        activations: arguments of `peak_activations`, with `recomputed`.
    """
    learned = "weights and gradients" if config.method == "full" else "adapters and gradients"
    found = {"base": held.base, learned: held.learned, "optimizer": held.optimizer, "gathered": held.gathered}
    if kept is not None:
        peak = peak_activations(**activations, gradients=held.gradients)
        block = activations["block"]
        over = block.within + block.again * (activations["recomputed"] > 0)  # when the block is done
        gathered = max(held.gathered, held.reducing - over)
        loss, backward = peak.loss + held.head, peak.backward + gathered
        found["gathered"] = held.head if loss > backward else gathered
        found["activations"] = peak.loss - activations["at_loss"] if loss > backward else peak.backward
        found["logits"] = activations["at_loss"] if loss > backward else 0
        if found["activations"] < 0:  # gradients that are not there yet are more
            found[learned] += found["activations"]
            found["activations"] = 0
        found["optimizer"] += max(held.stepping - max(loss, backward), 0)
    found["workspace"] = workspace + max(held.beginning - sum(found.values()), 0)
    return {purpose: size for purpose, size in found.items() if size or purpose in SHOWN}


def host_activations(config, kept: Kept | None, recomputed: int, *, compiled: bool) -> int:
    """Bytes of page-locked host memory that `--use_activation_cpu_offload` takes in this process. The last block that
    recomputes keeps what it saves."""
    if kept is None:
        return 0
    return max(recomputed - 1, 0) * _away(config, kept, compiled=compiled)


def _can_step_in_backward(config) -> bool:
    """Whether no other flag forbids what is not in use yet."""
    return not config.optimizer_in_backward and not replace(config, optimizer_in_backward=True).in_backward_errors()


def remedies(config, model_config=None, *, gathered_with_root: bool = False) -> list[str]:
    """Flags that lower memory and are not in use, cheapest first; `gathered_with_root` as `fsdp.shard` takes it."""
    as_it_comes = bool(getattr(model_config, "quantization_config", None))  # scales are those of the base
    offered = (
        (config.use_gradient_checkpointing is not True, "--use_gradient_checkpointing true"),  # auto estimates
        (config.checkpoint_policy != "full", "--checkpoint_policy full"),
        (not config.fused_loss, "--fused_loss true"),
        (config.batch_size > 1, "a smaller --batch_size with more --gradient_accumulation_steps"),
        (config.quantizer == "none" and config.method != "full", "a quantized --train_type such as bnb_dora"),
        (config.takes_double_scales and config.quant_scales != "double" and not as_it_comes, "--quant_scales double"),
        (config.quantizer != "none" and not config.quantize_lm_head, "--quantize_lm_head true"),
        (world_size() > 1 and config.sharding_strategy != "full_shard", "--sharding_strategy full_shard"),
        (gathered_with_root, "--peer_gather false"),
        (config.method == "full" and _can_step_in_backward(config), "--optimizer_in_backward true"),
        (optimizer_bytes(config.optimizer, 1, 2) > optimizer_bytes("adamw_8bit", 1, 2), "--optimizer adamw_8bit"),
        (not config.use_activation_cpu_offload, "--use_activation_cpu_offload true"),
        (config.batch_size * config.row_tokens > 2**14 and not config.tile_tokens, "--tile_tokens 8192"),
        (not config.use_cpu_offload, "--use_cpu_offload true"),
        (config.context_length > 256, "a shorter --context_length"),
    )
    return [flag for missing, flag in offered if missing]


def out_of_memory(prepared: Prepared, config, error: Exception) -> OutOfMemory:
    """The error to raise in place of torch's: one message, parts first, then the flags that would help."""
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in prepared.sizes.items())
    first = str(error).splitlines()[0]
    helpful = remedies(config, prepared.model.config, gathered_with_root=prepared.gathered_with_root)
    return OutOfMemory(
        f"out of GPU memory ({first}). GiB by purpose: {parts}. Would help, in order: {'; '.join(helpful)}"
    )
