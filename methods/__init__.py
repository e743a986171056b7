"""The table of train types: how the base is stored, and what is trained on it."""

from importlib import import_module
from typing import NamedTuple


class TrainType(NamedTuple):
    quantizer: str
    method: str
    help: str


TRAIN_TYPES = {
    "full": TrainType("none", "full", "every weight"),
    "lora": TrainType("none", "peft_lora", "PEFT's LoRA on the 16-bit base"),
    "qlora": TrainType("bnb", "peft_lora", "PEFT's LoRA on a 4-bit base"),
    "custom_lora": TrainType("none", "lora", "our LoRA on the 16-bit base"),
    "custom_qlora": TrainType("bnb", "lora", "our LoRA on a 4-bit base"),
    "hqq_lora": TrainType("hqq", "lora", "our LoRA on an HQQ base of 1 to 8 bits"),
    "dora": TrainType("none", "dora", "DoRA on the 16-bit base"),
    "bnb_dora": TrainType("bnb", "dora", "DoRA on a 4-bit base (QDoRA)"),
    "hqq_dora": TrainType("hqq", "dora", "DoRA on an HQQ base"),
    "llama_pro": TrainType("none", "llama_pro", "expanded blocks of a 16-bit model"),
    "bnb_llama_pro": TrainType("bnb", "llama_pro", "16-bit expanded blocks in a 4-bit model"),
    "hqq_llama_pro": TrainType("hqq", "llama_pro", "16-bit expanded blocks in an HQQ model"),
}

# imported on use: --help and flag errors must not wait for bitsandbytes or PEFT
_QUANTIZERS = {
    "none": "methods.quantizers.none:Unquantized",
    "bnb": "methods.quantizers.bnb:Bnb4bit",
    "hqq": "methods.quantizers.hqq:HQQ",
}
_METHODS = {
    "full": "methods.full:Full",
    "peft_lora": "methods.peft_lora:PeftLoRA",
    "lora": "methods.lora:LoRA",
    "dora": "methods.dora:DoRA",
    "llama_pro": "methods.llama_pro:LlamaPro",
}


def _load(target: str):
    module, name = target.split(":")
    return getattr(import_module(module), name)


def quantizer_of(train_type: str):
    """The quantizer class of a train type."""
    return _load(_QUANTIZERS[TRAIN_TYPES[train_type].quantizer])


def method_of(train_type: str):
    """The method class of a train type."""
    return _load(_METHODS[TRAIN_TYPES[train_type].method])
