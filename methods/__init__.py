"""The tables of train types: how the base is stored, what is trained on it, and how an adapter begins.

They name their classes, which are imported on use: --help and a wrong flag must not wait for torch.
"""

from typing import NamedTuple

from fsdp_utils.core.classes import load_class


class TrainType(NamedTuple):
    quantizer: str
    method: str
    help: str


TRAIN_TYPES = {
    "full": TrainType("none", "full", "every weight"),
    "lora": TrainType("none", "peft_lora", "PEFT's LoRA on the 16-bit base"),
    "qlora": TrainType("bnb", "peft_lora", "PEFT's LoRA on a 4-bit base"),
    "custom_lora": TrainType("none", "lora", "LoRA, fused with the base's product, on the 16-bit base"),
    "custom_qlora": TrainType("bnb", "lora", "LoRA, fused with the base's product, on a 4-bit base"),
    "hqq_lora": TrainType("hqq", "lora", "LoRA, fused with the base's product, on an HQQ base of 1 to 8 bits"),
    "dora": TrainType("none", "dora", "DoRA on the 16-bit base"),
    "bnb_dora": TrainType("bnb", "dora", "DoRA on a 4-bit base (QDoRA)"),
    "hqq_dora": TrainType("hqq", "dora", "DoRA on an HQQ base"),
    "llama_pro": TrainType("none", "llama_pro", "expanded blocks of a 16-bit model"),
    "bnb_llama_pro": TrainType("bnb", "llama_pro", "16-bit expanded blocks in a 4-bit model"),
    "hqq_llama_pro": TrainType("hqq", "llama_pro", "16-bit expanded blocks in an HQQ model"),
}


class QuantizerRow(NamedTuple):
    """A quantizer and the values of the flags that it takes; none of a flag that means nothing to it."""

    target: str | None
    bits: tuple[int, ...] = ()
    scales: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()


QUANTIZERS = {
    "none": QuantizerRow(None),
    "bnb": QuantizerRow(
        "methods.quantizers.bnb:Bnb4bit", bits=(4,), scales=("auto", "bf16", "fp32", "double"), codes=("nf4", "fp4")
    ),
    "hqq": QuantizerRow("methods.quantizers.hqq:HQQ", bits=(8, 4, 3, 2, 1), scales=("auto", "bf16", "fp32")),
}


GROUP_SIZES = (32, 64, 128, 256)


def group_sizes_for(*widths: int) -> list[int]:
    """Those that divide rows of all these widths."""
    return [size for size in GROUP_SIZES if not any(width % size for width in widths)]


class MethodRow(NamedTuple):
    """A method; `adapts`: it adds adapters, which the flags lora_* describe; `starts`: the values of --lora_init;
    `fused`: it multiplies by the base itself, also by a dense one."""

    target: str
    adapts: bool = False
    starts: tuple[str, ...] = ("default",)
    fused: bool = False


# how A and B begin (--lora_init)
STARTS = {
    "default": "methods.adapter:Start",
    "pissa": "methods.pissa:PiSSA",
    "pissa_niter_16": "methods.pissa:FastPiSSA",
    "qera": "methods.qera:QERA",
}
# those that correct the rounding of a quantized base, which stays as it is, by samples of the data (--init_samples)
CORRECTING = ("qera",)
# what B A is multiplied by (--use_rslora)
SCALINGS = {False: "methods.adapter:Scaling", True: "methods.rslora:RankStabilized"}


class Rounding(NamedTuple):
    """A value of --train_for: the quantizer whose train types can have it, that of the base in their place, whose
    `served` takes the flags, the --infer_type that stores it, and whether that packs experts."""

    quantizer: str
    target: str
    infer_type: str
    packs_experts: bool = False


# exports that keep what was learned because the adapter learned on their rounding (methods/folded.py)
FOLDED = "methods.folded:Folded"
ROUNDINGS = {
    "none": None,
    "nf4": Rounding("bnb", "methods.quantizers.bnb:Bnb4bit", "bnb_nf4"),
    "w4a16": Rounding("hqq", "methods.quantizers.int4:Int4", "w4a16", packs_experts=True),
}
METHODS = {
    "full": MethodRow("methods.full:Full"),
    "peft_lora": MethodRow("methods.peft_lora:PeftLoRA", adapts=True, starts=("default", *CORRECTING)),
    "lora": MethodRow("methods.lora:LoRA", adapts=True, starts=tuple(STARTS), fused=True),
    "dora": MethodRow("methods.dora:DoRA", adapts=True, starts=tuple(STARTS), fused=True),
    "llama_pro": MethodRow("methods.llama_pro:LlamaPro"),
}


def quantizer_of(train_type: str):
    """The quantizer class of a train type; None where the base stays as it is in the checkpoint."""
    target = QUANTIZERS[TRAIN_TYPES[train_type].quantizer].target
    return load_class(target) if target else None


def method_of(train_type: str):
    """The method class of a train type."""
    return load_class(METHODS[TRAIN_TYPES[train_type].method].target)


def make_quantizer(train_type: str, config, *, checkpoint_dtype):
    """The quantizer that the flags describe, or None: see `methods.packed.Quantizer`."""
    rounding = ROUNDINGS[config.train_for]
    if rounding:
        return load_class(rounding.target).served(config)
    cls = quantizer_of(train_type)
    return cls.from_config(config, checkpoint_dtype=checkpoint_dtype) if cls else None
