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
    """`target`: the library's class; `effect`: what --help says; `settings`: besides rate and decay; `state_bytes`:
    that it keeps per trained element, None for two numbers in the parameter's dtype; `scale_bytes`: per block of 256
    elements of a row, besides; `of_matrices`: numbers kept of an element of a block's matrix, where that is not 2;
    `copies`: of all that trains, which a step makes and drops where it rounds to the nearest; `rounds`: can round bf16
    weights at random; `own`: `module:function` of ours that makes it; `needs_cuda`, `needs_fp32`: a GPU, weights that
    are stored so; `schedules`: that it can follow, None for any."""

    target: str
    effect: str
    settings: dict | None = None
    state_bytes: int | None = None
    scale_bytes: int = 0
    of_matrices: int = 2
    copies: int = 0
    rounds: bool = False
    own: str | None = None
    needs_cuda: bool = False
    needs_fp32: bool = False
    schedules: tuple[str, ...] | None = None


OPTIMIZERS = {
    "adamw": Optimizer("torch.optim:AdamW", "rounds bf16 weights at random", copies=1, rounds=True),
    "adam": Optimizer("torch.optim:Adam", "decays weights through the gradient", copies=1),
    "sgd": Optimizer("torch.optim:SGD", "keeps no state", state_bytes=0),
    "adadelta": Optimizer("torch.optim:Adadelta", "scales its rate by past steps", copies=3),
    "fused_adamw": Optimizer(
        "torch.optim:AdamW", "adamw, of fp32 weights in fewer kernels", {"fused": True}, rounds=True
    ),
    "fused_adam": Optimizer("torch.optim:Adam", "adam in fewer kernels", {"fused": True}),
    "adamw_8bit": Optimizer(
        "bitsandbytes.optim:AdamW8bit", "2 bytes of state per parameter, for a fixed number of processes", state_bytes=2
    ),
    "adamw_int8": Optimizer(
        "bitsandbytes.optim:AdamW8bit",
        "the same bytes, for any number of processes: 8-bit states of our own, rounded at random",
        state_bytes=2,
        scale_bytes=8,
        rounds=True,
        own="fsdp_utils.training.int8:make",
    ),
    "paged_adamw": Optimizer(
        "bitsandbytes.optim:PagedAdamW",
        "fp32 states that leave a full GPU for host memory and come back, page by page",
        state_bytes=8,  # as if they stayed: pages that fit cost no traffic
        needs_cuda=True,
    ),
    "paged_adamw_8bit": Optimizer(
        "bitsandbytes.optim:PagedAdamW8bit", "adamw_8bit whose states do the same", state_bytes=2, needs_cuda=True
    ),
    "muon": Optimizer(
        "torch.optim:Muon",
        "steps of matrices are made orthogonal, at rates of AdamW, which the rest gets (arXiv:2502.16982)",
        of_matrices=1,
        rounds=True,
        own="fsdp_utils.training.muon:make",
    ),
    "schedule_free_adamw": Optimizer(
        "schedulefree:AdamWScheduleFree",
        "the result is an average of all steps, which needs no falling rate (arXiv:2405.15682)",
        copies=1,
        needs_fp32=True,
        schedules=("constant", "constant_with_warmup"),
    ),
}

# factor of the peak learning rate at a share of the steps after warm-up
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "constant_with_warmup": lambda share: 1.0,
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


class Sink(NamedTuple):
    """Where metrics are shown. `target`: its class; `package`: the library that it needs; `naming`: the flags that name
    a run there; `terminal`: it is read where the run was started."""

    target: str
    package: str | None = None
    naming: tuple[str, ...] = ()
    terminal: bool = False


# --log_to
SINKS = {
    "tqdm": Sink("fsdp_utils.training.sinks:Tqdm", terminal=True),
    "stdout": Sink("fsdp_utils.training.sinks:Stdout", terminal=True),
    "wandb": Sink("fsdp_utils.training.sinks:Wandb", "wandb", naming=("project_name", "name", "group", "entity")),
    "tensorboard": Sink("fsdp_utils.training.sinks:TensorBoard", "tensorboard"),
    "trackio": Sink("fsdp_utils.training.sinks:Trackio", "trackio", naming=("project_name", "name", "group")),
    "mlflow": Sink("fsdp_utils.training.sinks:MLflow", "mlflow", naming=("project_name", "name")),
}

# --eval_type: how the base is stored, and what is on it
EVAL_TYPES = (
    "full", "full_post_quantized", "qlora", "bnb_dora", "hqq_lora", "hqq_dora", "bnb_llama_pro", "hqq_llama_pro",
)  # fmt: skip
OWN_ATTENTION = "causal_or_packed"  # ours that takes no mask, in transformers' interface: `model.attention`
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}  # --dtype of evaluations and exports
