"""What GPU memory goes to, worked out from shapes, and the message that ends a run that ran out of it."""

from torch import nn

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.processes import world_size
from fsdp_utils.core.rows import local
from methods.kernels.cross_entropy import LOGITS_BYTES

GIB = 2**30

# bytes of optimizer state per trained element; the others keep two numbers in the parameter's dtype
STATE_BYTES = {"sgd": 0, "adamw_8bit": 2}

# what checkpointed blocks keep of a token beside their input, by policy, about: hidden and intermediate widths
KEPT_WIDTHS = {"full": (0, 0), "adapters": (1, 0), "narrow": (5, 0), "products": (5, 2)}


class OutOfMemory(UserError):
    """The GPU is full; the message says of what, and which flags lower it."""


def optimizer_bytes(optimizer: str, elements: int, element_size: int) -> int:
    """Bytes that an optimizer keeps for trained elements of so many bytes each."""
    return elements * STATE_BYTES.get(optimizer, 2 * element_size)


def _states(model: nn.Module, config) -> tuple[int, int]:
    """How many blocks recompute, and the bytes of one hidden state of the largest micro-batch."""
    recomputed = sum(getattr(module, "recomputes", False) for module in model.modules())
    width = 4 if config.precision == "fp32" else 2
    hidden = model.config.get_text_config().hidden_size
    return recomputed, config.batch_size * config.context_length * hidden * width


def breakdown(model: nn.Module, config) -> dict[str, float]:
    """GiB in this process by purpose, largest micro-batch assumed: `batch_size` rows of `context_length` tokens.

    Of a sharded model that is not in a step: whole parameters would be taken for rows.
    """
    shape = model.config.get_text_config()
    embedding = model.get_input_embeddings()
    away = sum(p.nbytes for p in embedding.parameters()) if getattr(embedding, "on_host", False) else 0
    frozen = sum(local(p).nbytes for p in model.parameters() if not p.requires_grad) - away
    rows = [local(p) for p in model.parameters() if p.requires_grad]
    trained = sum(p.nbytes for p in rows)
    whole = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    learned = trained + 2 * whole if model.trained_together else 2 * trained
    states = sum(optimizer_bytes(config.optimizer, p.numel(), p.element_size()) for p in rows)
    tokens, width = config.batch_size * config.context_length, 4 if config.precision == "fp32" else 2
    (recomputed, state), layers = _states(model, config), shape.num_hidden_layers
    # the input of the widest linear: families name their intermediate width in many ways
    middle = tokens * width * max((m.in_features for m in model.modules() if hasattr(m, "in_features")), default=0)
    inside = 6 * state + 4 * middle  # what one block keeps for backward, about
    # the last blocks keep everything; when they are done, one at a time of the first holds what it recomputes
    narrow, wide = KEPT_WIDTHS[config.checkpoint_policy]
    narrow = 0 if config.use_activation_cpu_offload else 1 + narrow
    kept = recomputed * (narrow * state + wide * middle)
    kept += max(layers - recomputed, min(recomputed, 1)) * inside
    logits = LOGITS_BYTES if config.fused_loss else tokens * shape.vocab_size * (width + 8)
    on_host = config.use_cpu_offload
    sizes = {
        "base": 0 if on_host else frozen + model.slot_bytes,
        "weights and gradients" if config.method == "full" else "adapters and gradients": 0 if on_host else learned,
        "optimizer": 0 if on_host else states,
        "activations": kept,
        "logits": logits,
    }
    return {name: size / GIB for name, size in sizes.items()}


def host_activations(model: nn.Module, config) -> float:
    """GiB of page-locked host memory that `--use_activation_cpu_offload` takes in this process, about; the largest
    micro-batch assumed. The last block that recomputes keeps what it saves."""
    recomputed, state = _states(model, config)
    return max(recomputed - 1, 0) * (1 + KEPT_WIDTHS[config.checkpoint_policy][0]) * state / GIB


def remedies(config, *, together: bool = False) -> list[str]:
    """Flags that lower memory and are not in use, cheapest first; `together` as `sharding.fsdp.shard` takes it."""
    offered = (
        (config.use_gradient_checkpointing is not True, "--use_gradient_checkpointing true"),  # auto estimates
        (config.checkpoint_policy != "full", "--checkpoint_policy full"),
        (not config.fused_loss, "--fused_loss true"),
        (config.batch_size > 1, "a smaller --batch_size with more --gradient_accumulation_steps"),
        (config.quantizer == "none" and config.method != "full", "a quantized --train_type such as bnb_dora"),
        (config.quantizer == "bnb" and config.quant_scales != "double", "--quant_scales double"),
        (config.quantizer != "none" and not config.quantize_lm_head, "--quantize_lm_head true"),
        (world_size() > 1 and config.sharding_strategy != "full_shard", "--sharding_strategy full_shard"),
        (together, "--peer_gather false"),
        (config.optimizer != "adamw_8bit", "--optimizer adamw_8bit"),
        (not config.use_activation_cpu_offload, "--use_activation_cpu_offload true"),
        (not config.use_cpu_offload, "--use_cpu_offload true"),
        (config.context_length > 256, "a shorter --context_length"),
    )
    return [flag for missing, flag in offered if missing]


def out_of_memory(sizes: dict[str, float], config, error: Exception, *, together: bool) -> OutOfMemory:
    """The error to raise in place of torch's: one message, parts first, then the flags that would help.

    Args:
        sizes: from `breakdown`, before the first step.
    """
    parts = ", ".join(f"{name} {size:.2f}" for name, size in sizes.items())
    first = str(error).splitlines()[0]
    helpful = remedies(config, together=together)
    return OutOfMemory(
        f"out of GPU memory ({first}). GiB by purpose: {parts}. Would help, in order: {'; '.join(helpful)}"
    )
