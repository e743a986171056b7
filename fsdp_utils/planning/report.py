"""A plan in lines: does it fit, what does it take, how long."""

import math
from pathlib import Path

from fsdp_utils.core.devices import GIB
from fsdp_utils.core.errors import UserError, naming
from fsdp_utils.data.parts import readers
from fsdp_utils.memory.budget import remedies
from fsdp_utils.model.assemble import Plan, is_local, plan_only, quantizers_report, trainable_report
from fsdp_utils.model.build import read_raw_config
from fsdp_utils.model.prequantized import settings_of
from fsdp_utils.planning.forecast import CONTEXT, Forecast, forecast, split_for
from fsdp_utils.planning.machines import WITHOUT_FP8, Machine
from fsdp_utils.planning.seconds import seconds_a_step
from fsdp_utils.tasks import named_task, task_of_model


def planned_for(config, machine: Machine) -> Plan:
    """A model on meta, from its configuration alone.

    Raises:
        UserError: as `model.assemble.plan`; and for what a task or a card refuses.
    """
    with naming("--llama_pro_path" if config.llama_pro_path else "--model_name"):
        model_config = read_raw_config(config.source)
    task = named_task(config.task if config.task != "auto" else task_of_model(model_config))
    task.check(config, model_config)
    if config.compute == "fp8" and machine.card in WITHOUT_FP8:
        raise UserError(f"--compute fp8: an {machine.card} has no products of 8-bit floats; drop it")
    return plan_only(config, task=task, device=machine.device)


def lines(config, machine: Machine) -> list[str]:
    """What a run with these flags would take on a machine."""
    config = split_for(config, machine)
    planned = planned_for(config, machine)
    found = forecast(planned, config, machine)
    return [
        *planned.task.assumed(planned.model.config),
        trainable_report(planned.model),
        *([f"quantized weights: {quantizers_report(planned.model)}"] if config.bits_plan else []),
        f"plan for {machine}, in the process that takes most:",
        f"  {_memory(planned, found, config, machine)}",
        *(f"  {line}" for line in (_host(found, machine), *_disk(planned, config))),
        *(f"  {line}" for line in _time(planned, config, machine, found)),
    ]


def gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < 100 * GIB else f"{size / GIB:.0f}"


def parts(sizes: dict[str, int]) -> str:
    return ", ".join(f"{purpose} {gib(size)}" for purpose, size in sizes.items() if size >= 0.005 * GIB)


def _memory(planned: Plan, found: Forecast, config, machine: Machine) -> str:
    held = f"{gib(found.peak)} GiB ({parts(found.sizes)})"
    again = f"; {found.recomputed} of {found.blocks} blocks recompute"
    if machine.memory is None:
        return f"memory: {held}{again}"
    said = f"GPU memory: {held} and about {gib(CONTEXT)} for CUDA, of {gib(machine.memory)}{again}: "
    if found.fits(machine) and not found.measured:
        return said + "whether it fits is NOT KNOWN, as activations are not counted"
    helpful = "; ".join(remedies(config, planned.model.config))
    return said + ("it fits" if found.fits(machine) else f"TOO MUCH. Would help, in order: {helpful}")


def _host(found: Forecast, machine: Machine) -> str:
    total = sum(found.host.values())
    several = f", {gib(total * machine.gpus)} in all" if machine.gpus > 1 else ""
    return f"host memory: {gib(total)} GiB in each process{several} ({parts(found.host)})"


def _disk(planned: Plan, config) -> list[str]:
    """What is written, and what would be downloaded."""
    trained = sum(p.nbytes for p in planned.model.parameters() if p.requires_grad)
    dense = sum(math.prod(planned.weights.shape(name)) for name in planned.weights.names()) * planned.dtype.itemsize
    frozen = sum(p.nbytes for p in planned.model.parameters() if not p.requires_grad)
    as_it_comes = bool(settings_of(planned.model.config))
    table = (
        (config.save_model, "result", trained if planned.method.saves == "adapter" else dense),
        (config.save_every_steps or config.save_every_minutes, f"{config.keep_checkpoints} checkpoints",
         config.keep_checkpoints * 3 * trained),
        (config.quantized_cache and planned.quantizer and not as_it_comes, "--quantized_cache", frozen),
    )  # fmt: skip
    written = {name: size for holds, name, size in table if holds}
    said = parts(written)
    found = [f"disk: {said} GiB" if said else "disk: next to nothing"]
    if is_local(config) or config.load_format == "dummy":
        return found
    read = frozen if as_it_comes else dense
    if Path(config.source).is_dir():
        found.append(f"weights: {config.source} holds none; a run reads about {gib(read)} GiB of them")
    else:
        found.append(f"download: about {gib(read)} GiB of weights from {config.source}, unless they are there already")
    return found


def _time(planned: Plan, config, machine: Machine, found: Forecast) -> list[str]:
    rows = config.batch_size * readers(config, machine.gpus) * config.gradient_accumulation_steps
    steps = config.max_steps if config.max_steps > 0 else None
    length = f"; {steps:,} steps of them: {steps * rows:,} rows" if steps else "; as many steps as the data make"
    said = [f"step: {rows:,} rows, at most {rows * config.context_length:,} tokens{length}"]
    seconds = seconds_a_step(planned, config, machine, found)
    if seconds is not None:
        whole = f", {steps * seconds / 3600:.1f} hours for {steps:,}" if steps else ""
        each = f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"
        said.append(f"time: about {each} s a full step on {machine.card}{whole} (an estimate: docs/planning.md)")
    return said
