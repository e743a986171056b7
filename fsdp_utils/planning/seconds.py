"""How long a step takes: products at a measured share of a card's peak, and what crosses the bus."""

from fsdp_utils.model.assemble import Plan
from fsdp_utils.planning.forecast import OFFLOADED, Forecast
from fsdp_utils.planning.machines import Machine
from fsdp_utils.training.flops import model_cost, peak_of, recomputed_cost, unlike_others
from methods.targets import decoder_blocks

REACHED = 0.55  # of the peak, with recomputation counted: 0.54 to 0.58 on an H200 and an H100, compiled
EAGER = 0.73  # of that without compilation
SHARDED = 0.95  # of that, each of several GPUs
BUS = 11e9  # bytes a second that parameters cross between host and GPU, as measured beside the computation


def seconds_a_step(planned: Plan, config, machine: Machine, found: Forecast) -> float | None:
    """Of full rows; None where the card's peak is not known.

    Args:
        found: what is forecast for this machine.
    """
    speed, model = peak_of(machine.card), planned.model
    if speed is None or unlike_others(model):
        return None
    blocks = decoder_blocks(model)
    listed, length = list(blocks.values()), config.context_length
    pairs = (length + 1) / 2 if planned.task.causal else length
    each = [model_cost(model, listed), recomputed_cost(model, listed[: found.recomputed], config)]
    tokens = config.batch_size * config.gradient_accumulation_steps * length / config.context_parallel
    work = tokens * sum(cost.token + cost.predicting * planned.task.writes + cost.pair * pairs for cost in each)
    reached = speed * REACHED * (1 if config.compile else EAGER) * (SHARDED if machine.gpus > 1 else 1)
    # with CPU offload every row comes for forward and for backward, of each micro-batch
    crossing = 2 * config.gradient_accumulation_steps * found.host.get(OFFLOADED, 0)
    return work / reached + crossing / BUS
