"""What a run says before its first step, and after its last: what it is, plans and leaves; what it took."""

import re

from fsdp_utils.core.devices import GIB, peak_memory_gib
from fsdp_utils.data.prepare import batch_arithmetic
from fsdp_utils.folders.session import Session
from fsdp_utils.model.assemble import size_report
from fsdp_utils.sharding.prepared import Prepared
from fsdp_utils.training.clock import Clock
from fsdp_utils.training.flops import device_name, peak_of, unknown
from methods import METHODS, TRAIN_TYPES


def opening(session: Session, prepared: Prepared) -> list[str]:
    """The lines."""
    config, planned = session.config, session.planned
    return [
        _model(config, planned, blocks=len(prepared.blocks)),
        _method(config),
        *size_report(prepared.model),
        batch_arithmetic(session.batches, steps=session.total_steps),
        *_memory(prepared),
        _device(prepared),
        f"keeps in {config.output_dir}: {', '.join(_kept(config, planned))}",
    ]


def _model(config, planned, *, blocks: int) -> str:
    shape = planned.model.config
    width = shape.get_text_config().hidden_size
    return f"model: {config.source} ({shape.model_type}, {blocks} blocks of width {width}), {planned.task.noun}"


def _method(config) -> str:
    adapters = f"; rank {config.lora_rank}, alpha {config.lora_alpha}" if METHODS[config.method].adapts else ""
    rate = f"--optimizer {config.optimizer} --lr {config.lr:g} --lr_scheduler {config.lr_scheduler}"
    return f"method: {config.train_type}, {TRAIN_TYPES[config.train_type].help}{adapters}; {rate}"


def _memory(prepared: Prepared) -> list[str]:
    sizes = prepared.sizes | dict(together=sum(prepared.sizes.values()))
    parts = ", ".join(f"{name} {size / GIB:.3f}" for name, size in sizes.items())
    lines = [f"memory plan, GiB in each process: {parts}"]
    if prepared.host_activations:
        host = f"{prepared.host_activations / GIB:.1f}"
        lines.append(f"activations: about {host} GiB of host memory in each process")
    return lines


def _device(prepared: Prepared) -> str:
    name, why = device_name(prepared.device), unknown(prepared)
    return f"device: {name}; " + (f"no MFU: {why}" if why else f"MFU is of {peak_of(name) / 1e12:g} TFLOP/s")


def _kept(config, planned) -> list[str]:
    often = [f"{config.save_every_steps} steps"] if config.save_every_steps else []
    often += [f"{config.save_every_minutes:g} minutes"] if config.save_every_minutes else []
    some = f"checkpoints every {' and '.join(often)}, the newest {config.keep_checkpoints}" if often else ""
    table = (
        (config.save_model, f"the {planned.method.saves}"),
        (often, some),
        (config.stop_at_step or config.stop_after_minutes, "a checkpoint where it stops"),
        (config.save_best, "the checkpoint of the lowest validation loss"),
    )
    return [what for holds, what in table if holds] + ["metrics.jsonl", "report.html"]


PLANNED = re.compile(r"memory: planned ([\d.]+) GiB, measured ([\d.]+)")  # of `closing`, to find it in what was said


def closing(prepared: Prepared, clock: Clock) -> list[str]:
    """The last lines: how fast it was, and of process 0 the planned memory beside what was measured."""
    peak = peak_memory_gib(prepared.device)
    lines = [clock.said(peak)]
    if prepared.device.type == "cuda" and "activations" in prepared.sizes:
        planned = sum(prepared.sizes.values()) / GIB
        lines.append(f"memory: planned {planned:.2f} GiB, measured {peak:.2f} ({planned / peak - 1:+.1%})")
    return lines
