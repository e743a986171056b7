"""How long a step takes: products at a measured share of a card's peak, and what crosses the bus."""

from fsdp_utils.model.assemble import Plan
from fsdp_utils.planning.forecast import mesh_of, offloaded_bytes
from fsdp_utils.planning.machines import Machine, peak
from fsdp_utils.sharding import offload
from fsdp_utils.training.flops import model_cost, recomputed_cost
from methods.targets import decoder_blocks

REACHED = 0.55  # of the peak, with recomputation counted: 0.54 to 0.58 on an H200 and an H100, compiled
EAGER = 0.73  # of that without compilation
SHARDED = 0.95  # of that, each of several GPUs
BUS = 11e9  # bytes a second that parameters cross between host and GPU, as measured beside the computation


def seconds_a_step(planned: Plan, config, machine: Machine, *, recomputed: int) -> float | None:
    """Of full rows; None where the card's peak is not known."""
    speed, model = peak(machine), planned.model
    if speed is None or model.config.is_encoder_decoder:
        return None
    blocks = decoder_blocks(model)
    listed, length = list(blocks.values()), config.context_length
    pairs = (length + 1) / 2 if planned.task.causal else length
    each = [model_cost(model, listed), recomputed_cost(model, listed[:recomputed], config)]
    tokens = config.batch_size * config.gradient_accumulation_steps * length
    work = tokens * sum(cost.token + cost.predicting * planned.task.writes + cost.pair * pairs for cost in each)
    reached = speed * REACHED * (1 if config.compile else EAGER) * (SHARDED if machine.gpus > 1 else 1)
    return work / reached + _bus_bytes(planned, config, machine) / BUS


def _bus_bytes(planned: Plan, config, machine: Machine) -> float:
    """With CPU offload every row comes for forward and for backward, of each micro-batch."""
    mesh = mesh_of(config, machine)
    if mesh is None or not config.use_cpu_offload:
        return 0
    model = planned.model
    on_host = offload.whole_embedding(model, config, device=machine.device)
    blocks = decoder_blocks(model)
    held = offloaded_bytes(model, blocks, config, on_host=on_host, shards=mesh.shards)
    return 2 * config.gradient_accumulation_steps * held
