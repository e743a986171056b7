"""Formats that a trained model can be written in; a new one is one class and one row here."""

from fsdp_utils.core.classes import load_class

_BNB_NF4 = "fsdp_utils.export.bnb:BnbNF4"
_MERGED = "fsdp_utils.export.formats:Merged"

# imported on use: --help and flag errors must not wait for bitsandbytes
INFER_TYPES = {
    "merged": _MERGED,
    "merged_bnb_dora": _MERGED,
    "bnb_nf4": _BNB_NF4,
    "full_post_quant": _BNB_NF4,
    "bnb_dora": "fsdp_utils.export.bnb:BnbDoRA",
    "w4a16": "fsdp_utils.export.w4a16:W4A16",
    "w4a16_dora": "fsdp_utils.export.w4a16_dora:W4A16DoRA",
    "gguf": "fsdp_utils.export.gguf:GGUF",
}


def format_of(infer_type: str):
    """The class of an --infer_type: see `fsdp_utils.export.formats.Format`."""
    return load_class(INFER_TYPES[infer_type])
