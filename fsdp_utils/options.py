"""The tables that flags choose from: one row an option, with everything that the code asks of it.

Dtypes and classes are named, not imported: --help and a wrong flag must not wait for torch.
"""

import math
from collections.abc import Callable
from typing import NamedTuple


class Precision(NamedTuple):
    """Names of torch dtypes: `stored`, of what is not quantized; `autocast`, of products, None for the stored one."""

    stored: str
    autocast: str | None = None


PRECISIONS = {
    "bf16": Precision("bfloat16"),
    "fp32": Precision("float32"),
    "fp16_autocast": Precision("float32", "float16"),
    "bf16_autocast": Precision("float32", "bfloat16"),
    "bf16_buffers_autocast": Precision("bfloat16", "bfloat16"),
}


# what a model is for
TASKS = {
    "causal_lm": "fsdp_utils.tasks.causal_lm:CausalLM",
    "sequence_classification": "fsdp_utils.tasks.sequence_classification:SequenceClassification",
    "seq2seq_lm": "fsdp_utils.tasks.seq2seq_lm:Seq2SeqLM",
}


class Strategy(NamedTuple):
    """`resharded`: whole weights are dropped after a block's forward; `copies`: of the model, over which gradients are
    averaged: "one", "nodes" (as many as --hybrid_shard_size leaves), or "processes"."""

    resharded: bool
    copies: str


STRATEGIES = {
    "full_shard": Strategy(True, "one"),
    "shard_grad_op": Strategy(False, "one"),
    "ddp": Strategy(False, "processes"),
    "hybrid_full_shard": Strategy(True, "nodes"),
    "hybrid_shard_grad_op": Strategy(False, "nodes"),
}


class Optimizer(NamedTuple):
    """`settings`: besides rate and decay; `state_bytes`: that it keeps per trained element, None for two numbers in the
    parameter's dtype; `rounds`: can round bf16 weights at random (`training.optim.StochasticAdamW`)."""

    target: str
    settings: dict | None = None
    state_bytes: int | None = None
    rounds: bool = False


OPTIMIZERS = {
    "adamw": Optimizer("torch.optim:AdamW", rounds=True),
    "adam": Optimizer("torch.optim:Adam"),
    "sgd": Optimizer("torch.optim:SGD", state_bytes=0),
    "adadelta": Optimizer("torch.optim:Adadelta"),
    "fused_adamw": Optimizer("torch.optim:AdamW", {"fused": True}, rounds=True),
    "fused_adam": Optimizer("torch.optim:Adam", {"fused": True}),
    "adamw_8bit": Optimizer("bitsandbytes.optim:AdamW8bit", state_bytes=2),
}

# factor of the peak learning rate at a share of the steps after warm-up
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.1 + 0.45 * (1 + math.cos(math.pi * share)),  # ends at a tenth, as the 2024 script did
}


class Product(NamedTuple):
    """A matrix product or attention in a block: input and output width, whether it is an adapted linear with its
    low-rank part in one operator, and whether that has a row factor (DoRA)."""

    width: int
    out: int
    adapted: bool = False
    factor: bool = False


# which results a block that recomputes keeps beside its input, each policy more than the one before
POLICIES: dict[str, Callable[[Product], bool]] = {
    "full": lambda product: False,
    # `A x`, and outputs of DoRA's narrowing projections: nothing but the adapters' gradients reads them again, and of
    # their size they are the dearest to compute
    "adapters": lambda p: (p.factor and p.out < p.width) if p.adapted else 8 * p.out <= p.width,
    "narrow": lambda p: p.out <= p.width,
    "products": lambda p: True,
}

# --eval_type: how the base is stored, and what is on it
EVAL_TYPES = (
    "full", "full_post_quantized", "qlora", "bnb_dora", "hqq_lora", "hqq_dora", "bnb_llama_pro", "hqq_llama_pro",
)  # fmt: skip
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}  # --dtype of evaluations and exports
