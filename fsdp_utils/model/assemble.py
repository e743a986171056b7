"""Puts a model together: `plan` on meta, where everything that can be wrong is found, then `load`.

plan:  check the hardware -> build -> check what training needs -> attach quantized layers and adapters
load:  peers, memory -> wrap blocks -> shard -> memory for rows -> weights -> what the method adds
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fsdp_utils.core.devices import synchronize
from fsdp_utils.core.errors import UserError, first_line, refuse_code
from fsdp_utils.core.folders import refuse_cache
from fsdp_utils.core.processes import barrier, from_main
from fsdp_utils.core.ranks import say
from fsdp_utils.core.rows import local
from fsdp_utils.data.parts import Part
from fsdp_utils.memory import budget, recompute
from fsdp_utils.model import attention, prequantized
from fsdp_utils.model.build import build_on_meta, quantize_on_meta, read_model_config, resolve_model
from fsdp_utils.model.calibrate import linears_seen
from fsdp_utils.model.quantized_cache import QuantizedCache, cache_folder, check_cache_root
from fsdp_utils.model.weights import (
    base_bytes,
    check_loaded,
    checkpoint_dtype,
    fingerprint,
    load_weights,
    materialize,
    open_weights,
    stamp,
    whole_reader,
)
from fsdp_utils.options import OPTIMIZERS, PRECISIONS
from fsdp_utils.sharding import context_parallel, fsdp, offload, peer_collectives, peer_gather, tiles, wrapping
from fsdp_utils.sharding.mesh import shard_group
from fsdp_utils.sharding.prepared import Prepared
from methods import CORRECTING, METHODS, ROUNDINGS, bits, method_of
from methods.base import Method
from methods.dropout import seed_dropout
from methods.expert_lora import adapters_beside_experts
from methods.kernels import fp8
from methods.quantizers.experts import expert_stacks
from methods.quantizers.linear import QuantizedWeight, compute_in_fp8
from methods.targets import decoder_blocks, learned_positions, refuse_experts, refuse_in_place, routers


class Dtypes(NamedTuple):
    """`stored`: of what is not quantized; `autocast`: of products, or None for that."""

    stored: torch.dtype
    autocast: torch.dtype | None

    @classmethod
    def of(cls, precision: str) -> "Dtypes":
        return cls(*(name and getattr(torch, name) for name in PRECISIONS[precision]))

    @property
    def compute(self) -> torch.dtype:
        return self.autocast or self.stored


@dataclass(frozen=True)
class Built:
    """A dense, frozen model on meta, and where its weights are."""

    model: nn.Module
    task: object
    weights: object
    dtypes: Dtypes
    base_fingerprint: str  # of the checkpoint


@dataclass(frozen=True)
class Plan(Built):
    """A model on meta with quantized layers and adapters; no weight has been read."""

    method: Method
    quantizer: object | None  # `bits.Mixed` where a plan chooses

    @property
    def dtype(self) -> torch.dtype:
        return self.dtypes.stored


def plan(config, *, task, device: torch.device) -> Plan:
    """A model to train.

    Raises:
        UserError: anything about model, checkpoint, targets or group size that cannot work.
    """
    check_hardware(config, device=device)
    return plan_anywhere(config, task=task, device=device)


def plan_anywhere(config, *, task, device: torch.device) -> Plan:
    """`plan` for a device that may not be here."""
    check_optimizer(config, device=device)
    built = build(config, task=task, device=device)
    weights = built.weights
    if weights.new:
        other = f"; {', '.join(weights.dropped[:2])} of the checkpoint is another task's" if weights.dropped else ""
        say(f"note: new, and trained in full: {', '.join(weights.new)}{other}")
    check_trainable(built, config, device=device)
    planned = attach(built, config)
    layers = planned.method.layers(planned.model) if METHODS[config.method].adapts else {}
    for note in adapters_beside_experts(layers) if layers and expert_stacks(planned.model) else ():
        say(f"note: --lora_target_modules {config.lora_target_modules}: {note}")
    for note in prequantized.notes(config, planned.quantizer) if prequantized.settings_of(planned.model.config) else ():
        say(note)
    blocks = decoder_blocks(planned.model)
    if config.tile_tokens:
        tiles.install(planned.model, blocks, config)
    if config.compute == "fp8":
        left = compute_in_fp8(m for block in blocks.values() for m in block.modules())
        if left:
            say(f"note: --compute fp8: {len(left)} linears stay in 16 bits: a side of theirs is no multiple of 16")
    return planned


def check_hardware(config, *, device: torch.device) -> None:
    """Raises UserError for a precision that the GPU lacks, or a cache that cannot be written."""
    if "bfloat16" in PRECISIONS[config.precision] and device.type == "cuda" and not _has_bf16():
        raise UserError(f"--precision {config.precision}: this GPU has no bf16; use fp16_autocast or fp32")
    if config.compute == "fp8" and not fp8.available(device):
        raise UserError("--compute fp8: this GPU has no products of 8-bit floats; drop it")
    if config.quantized_cache:
        check_cache_root(config.quantized_cache)


def check_optimizer(config, *, device: torch.device) -> None:
    """Raises UserError for an optimizer that this device or environment lacks, and for steps in backward where what
    flags alone do not tell makes several forward passes a step."""
    row, given = OPTIMIZERS[config.optimizer], f"--optimizer {config.optimizer}"
    package = row.target.partition(":")[0].partition(".")[0]
    if row.needs_cuda and device.type != "cuda":
        raise UserError(f"{given}: its states are pages of a GPU's memory, and there is none; use adamw_8bit")
    if find_spec(package) is None:
        raise UserError(f"{given}: {package} is not installed; pip install {package}, or use --optimizer adamw")
    if config.optimizer_in_backward and config.gradient_accumulation_steps > 1:
        asked = f"--global_batch_size {config.global_batch_size}" if config.global_batch_size > 0 else "--resume"
        raise UserError(
            f"--optimizer_in_backward true: not with {asked}, which makes {config.gradient_accumulation_steps} forward "
            "passes a step here; raise --batch_size as many times, or pass false"
        )


def _has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def build(config, *, task, device: torch.device) -> Built:
    """The dense model on meta, and its weights, opened.

    Raises:
        UserError: no such model, an attention that it does not know, or weights that cannot be read.
    """
    dtypes = Dtypes.of(config.precision)
    trusted, asked_for = dict(trust_remote_code=config.trust_remote_code), config.attn_implementation
    model_config = read_model_config(config.source, task=task, attn_implementation=asked_for, **trusted)
    prequantized.check_flags(config, model_config)
    try:
        model = build_on_meta(model_config, task=task, dtype=dtypes.stored, **trusted)
    except (ImportError, OSError, ValueError) as error:  # an attention that is unknown, not installed, or not for it
        asked = f" with --attn_implementation {asked_for}" if asked_for != "auto" else ""
        refuse_cache(error, folder=resolve_model(config.source))
        refuse_code(error, named=config.source)
        raise UserError(f"{config.source}{asked}: {first_line(error)}") from None
    refuse_experts(model)
    if task.auto_class.__name__ in (getattr(model_config, "auto_map", None) or {}) and not config.trust_remote_code:
        used = f"transformers' {type(model).__name__} is used"
        say(f"note: {config.source} brings code of its own, which is not run: {used}")
    weights = open_weights(
        model,
        config.source,
        task=task,
        load_format=config.load_format,
        dtype=dtypes.stored,
        device=device,
        seed=config.seed,
    )
    if weights.untied:
        say(f"note: {config.source}: config.json ties head and embedding; the head that is stored differs, and is used")
    return Built(model, task, weights, dtypes, from_main(lambda: fingerprint(weights)))


def check_trainable(built: Built, config, *, device: torch.device) -> None:
    """Raises UserError for what only training cannot do; gives the model the attention that only training can use: it
    knows neither a cache nor padding on the left."""
    model = built.model
    if config.lora_init in CORRECTING and model.config.is_encoder_decoder:
        why = f"looks at one block after the other, and {config.source} has an encoder and a decoder"
        raise UserError(f"--lora_init {config.lora_init}: {why}; drop it")
    wrapping.check_policy(model, config, device=device)
    positions = learned_positions(model)
    if positions and config.context_length > positions:
        given = f"--context_length {config.context_length}"
        raise UserError(f"{given}: {config.source} has learned {positions} positions; lower it")
    made_for = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if made_for and not positions and config.context_length > made_for:
        given = f"note: --context_length {config.context_length}"
        say(f"{given}: {config.source} was made for {made_for} tokens; it has not learned what positions beyond mean")
    chosen = config.attn_implementation == "auto" and built.task.causal
    name, kinds = None, dict(dtype=built.dtypes.compute, device=device)
    if config.context_parallel > 1:
        name = attention.for_shared_rows(model, config, **kinds)
    elif chosen and attention.supported(model, **kinds):
        name = attention.NAME
    if name:
        model.config.get_text_config()._attn_implementation = name


def check_rounding(built: Built, config) -> None:
    """Raises UserError where the export that --train_for is for packs no experts like these."""
    rounding, stacks = ROUNDINGS[config.train_for], expert_stacks(built.model)
    if rounding is None or not stacks:
        return
    if not rounding.packs_experts or any(len(built.weights.pieces(path)) == 1 for path in stacks):
        stored = f"--infer_type {rounding.infer_type} packs no experts like those of {config.source}"
        raise UserError(f"--train_for {config.train_for}: {stored}; drop it, and export by --infer_type merged")


def attach(built: Built, config) -> Plan:
    """Packs what is quantized and adds what trains, on meta.

    Raises:
        UserError: targets or a --bits_plan that match nothing, a group size that does not divide a row, flags that do
            not go with a base that comes quantized.
    """
    model, weights = built.model, built.weights
    comes = prequantized.coming(model, weights)
    check_rounding(built, config)
    if not comes:
        bits.settle(config, list(decoder_blocks(model)))
    method = method_of(config.train_type)(config)
    if comes:
        quantizer = comes.quantizer
        prequantized.check_values(config, quantizer)
        quantize_on_meta(model, comes.chosen(model, method))
    elif quantizer := bits.quantizer_of_flags(config, checkpoint_dtype=checkpoint_dtype(weights)):
        quantizers = method.to_quantize(model, quantizer.at)
        bits.check(config, model, quantizers)
        quantize_on_meta(model, quantizers)
    method.attach(model, dtype=built.dtypes.stored)
    whole = built.task.trained_whole(model, list(weights.new))
    method.train_whole(model, [*whole, *trained_routers(model, config)])
    seed_dropout(model)
    refuse_in_place(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise RuntimeError(f"{config.train_type} left no parameter to train")
    return Plan(**vars(built), method=method, quantizer=quantizer)


def trained_routers(model: nn.Module, config) -> list[str]:
    """Paths of what --train_router asks for.

    Raises:
        UserError: there are none.
    """
    found = routers(model) if config.train_router else []
    if config.train_router and not found:
        raise UserError(f"--train_router true: {config.source} has no experts to choose from; drop it")
    return found


def load(
    planned: Plan, config, *, mesh, device: torch.device, compile_block: Callable | None = None, data=None
) -> Prepared:
    """Shards the planned model over `mesh` (None: one process holds it), fills it, and makes it ready to train.

    Args:
        data: the samples to train on (`data.tokens.TokenizedData`), for a start that looks at them.
    """
    model, method, dtypes = planned.model, planned.method, planned.dtypes
    blocks = decoder_blocks(model)
    near = peer_gather.reached(config, mesh=mesh, device=device)
    shards = peer_gather.choose(blocks, config, mesh=mesh) if near else None
    with_root = bool(shards and shards.trains_little)
    copies = mesh.size() // shard_group(mesh).size() if near else 1
    reduced = near and not with_root and peer_collectives.reduces(blocks.values(), config, copies=copies)
    on_host = offload.whole_embedding(model, config, device=device)
    slot_bytes, slack = sum(shards.slot_sizes) if shards else 0, offload.slack_for(config, peers=bool(shards))
    groups = dict(gathered_with_root=with_root, reduced_by_peers=reduced)
    placed = dict(mesh=mesh, device=device, on_host=on_host, slot_bytes=slot_bytes)
    held = budget.resident(model, blocks, config, **placed, **groups)
    types = dict(dtype=dtypes.stored, autocast=dtypes.autocast)
    compiled = compile_block is not None and not config.tile_tokens  # else attention is, and what is in a tile
    here = dict(mesh=mesh, device=device, compiled=compiled, slack=slack, available=recompute.free_memory(device))
    layout = recompute.lay_out(model, blocks, config, held, task=planned.task, **here, **types)
    offloader = offload.InputOffloader(slack=slack) if offloads(config, device) else None
    wrap = dict(recomputed=layout.recomputed, compiled=compile_block, offloader=offloader)
    wrapping.wrap_blocks(model, blocks, config, **wrap)
    frozen, apart = (shards.parameters if shards else set()), set(on_host.values())
    fsdp.shard(model, blocks, config, mesh=mesh, dtype=dtypes.stored, apart=apart, frozen=frozen, **groups)
    rows_on_host = mesh is not None and config.use_cpu_offload
    _fill(planned, config, on_host=on_host, rows_on_host=rows_on_host, device=device, data=data)
    peers = [peer_gather.PeerGather(shards, device)] if shards else []
    if near and not with_root:
        how = dict(mesh=mesh, ignored=frozen, reduced=reduced, device=device)
        peers.append(peer_collectives.PeerCollectives(model, blocks, **how))
    more = dict(gathered_with_root=with_root, sharing=sharing(config, model, device=device), **layout._asdict())
    return Prepared(model, method, blocks, device, mesh, dtypes.autocast, peers=tuple(peers), **more)


def sharing(config, model: nn.Module, *, device: torch.device) -> dict:
    """What attention is told where processes share rows. Collective."""
    if config.context_parallel == 1:
        return {}
    group = context_parallel.join(config.context_parallel, device)
    return dict(sharing_rows=group, folded_rows=Part.of_rows(config, model.config).folded)


def offloads(config, device: torch.device) -> bool:
    """Whether what checkpointed blocks keep leaves the device."""
    return config.use_activation_cpu_offload and device.type == "cuda"


def load_whole(planned: Plan, config, *, device: torch.device) -> nn.Module:
    """The planned model, filled, on one device: for inference."""
    on_host = offload.whole_embedding(planned.model, config, device=device)
    _fill(planned, config, on_host=on_host, rows_on_host=False, device=device)
    return planned.model


def _fill(planned: Plan, config, *, on_host: dict, rows_on_host: bool, device: torch.device, data=None) -> None:
    """Gives every parameter memory and values."""
    model, method, weights = planned.model, planned.method, planned.weights
    offload.move_embedding_to_host(model, on_host, device=device)
    materialize(model, device=torch.device("cpu") if rows_on_host else device, buffer_device=device)
    method.before_loading(whole_reader(weights, device=device), device=device)
    method.calibrate(model, partial(_seen, planned, config, data, device=device))
    codes, cache = prequantized.stored_codes(weights), None
    if config.quantized_cache and planned.quantizer and not codes:
        # only now does the method know which base it wants; process 0 says for all which files those are
        base = planned.base_fingerprint + method.base_recipe + from_main(lambda: stamp(weights))
        cache = QuantizedCache(cache_folder(config.quantized_cache, model, base=base), device=device)
    load_weights(model, weights, device=device, base_rows=method.base_rows, cache=codes or cache)
    if cache:
        cache.write(model)
    method.initialize(model, device=device)
    check_loaded(model)


def _seen(planned: Plan, config, data, paths, *, device: torch.device):
    """`linears_seen` of the dense model that was planned, with samples of the data."""
    how = dict(task=planned.task, trust_remote_code=config.trust_remote_code)
    model_config = read_model_config(config.source, attn_implementation=config.attn_implementation, **how)
    dense = build_on_meta(model_config, dtype=planned.dtype, **how)
    return linears_seen(dense, planned.weights, data.spread(config.init_samples), paths, device=device)


def round_again(planned: Plan, prepared: Prepared) -> None:
    """Fills the base of adapters that learn on its rounding anew, from the checkpoint and what they have learned.
    Collective, between two steps."""
    fsdp.leave_sharded(prepared)
    synchronize(prepared.device)
    barrier()  # others may be reading this process's rows

    def rewrite(paths) -> None:
        how = dict(device=prepared.device, base_rows=planned.method.base_rows)
        load_weights(prepared.model, planned.weights, only=paths, **how)
        synchronize(prepared.device)
        barrier()

    planned.method.fold(prepared.model, rewrite, device=prepared.device)
    prepared.forget_frozen()


def is_local(config) -> bool:
    """Whether the weights lie in a local folder."""
    return any(Path(resolve_model(config.source)).glob("*.safetensors"))


def plan_only(config, *, task, device: torch.device) -> Plan:
    """A plan from the configuration, and from the weights where they lie in a local folder: nothing is downloaded."""
    stored = config if is_local(config) else replace(config, load_format="dummy")
    return plan_anywhere(stored, task=task, device=device)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """How many numbers train, and how many the model has, packed ones as what they stand for; tied ones count once."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    packed = {id(m.packed()[0]): m for m in model.modules() if isinstance(m, QuantizedWeight)}
    parts = {id(p) for m in packed.values() for p in m.packed()}
    ours = {  # what a method keeps beside the weights
        id(p) for m in model.modules() for n, p in m._parameters.items() if n in getattr(m, "own_parameters", ())
    }
    plain = sum(p.numel() for p in model.parameters() if id(p) not in parts and (p.requires_grad or id(p) not in ours))
    return trained, plain + sum(math.prod(m.shape) for m in packed.values())


def trainable_report(model: nn.Module) -> str:
    """The line that PEFT prints."""
    trained, total = parameter_counts(model)
    return f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"


def quantizers_report(model: nn.Module) -> str:
    """How the packed weights of a model are stored; where that differs, how many are stored so."""
    counts = Counter(str(m.quantizer) for m in model.modules() if isinstance(m, QuantizedWeight))
    return ", ".join(counts if len(counts) == 1 else (f"{count} x {name}" for name, count in counts.most_common()))


def size_report(model: nn.Module) -> list[str]:
    """What the model weighs, in lines for the start of a run."""
    (mine, total), packed = base_bytes(model), quantizers_report(model)
    trained = sum(local(p).nbytes for p in model.parameters() if p.requires_grad)
    return [
        trainable_report(model),
        f"trained: {trained / 2**30:.3f} GiB in this process",
        f"frozen base: {total / 2**30:.3f} GiB, {mine / 2**30:.3f} GiB in this process"
        + (f" ({packed})" if packed else ""),
    ]
