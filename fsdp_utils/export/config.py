"""The flags of prepare_weights.py."""

import os
from dataclasses import dataclass, field

from fsdp_utils.core.flags import flag, section
from fsdp_utils.core.folders import repository_errors, size_errors
from fsdp_utils.export import INFER_TYPES
from fsdp_utils.options import DTYPES

WRITTEN_SO = ("dtype", "rounding", "max_shard_size")
_CALIBRATED = (*WRITTEN_SO, "gptq", "gptq_samples")
FLAGS_OF = {  # those that mean something for a format, where not all do
    "bnb_nf4": _CALIBRATED,
    "full_post_quant": _CALIBRATED,
    "w4a16": (*_CALIBRATED, "symmetric", "group_size"),
    "w4a16_dora": (*_CALIBRATED, "symmetric", "group_size"),
    "gguf": ("rounding", "gguf_type"),
}


@dataclass
class ExportConfig:
    """The settings of one export; see `python prepare_weights.py --help`."""

    _export: str = section("export")
    model: str = flag("", "folder of a run, a merged or a Llama-Pro model")
    trust_remote_code: bool = flag(False, "run the code that its folder brings (auto_map in its documents)")
    save_dir: str = flag("", "folder that is made")
    infer_type: str = flag("merged", "format; see above", choices=tuple(INFER_TYPES))
    dtype: str = flag("bf16", "of what is not packed, and of the arithmetic of 4-bit layers", choices=tuple(DTYPES))
    rounding: str = flag(
        "random", "to 16 bits, of what was trained; nearest loses small changes", choices=("random", "nearest")
    )
    max_shard_size: str = flag("5GB", "largest size of one weight file")
    overwrite: bool = flag(False, "replace the model in --save_dir")
    push_to_hub: str | None = flag(None, "upload the finished folder to this private repository of the hub (org/name)")
    device: str = flag("auto", "where to compute", choices=("auto", "cuda", "cpu"))

    _4bit: str = section("4 bits: w4a16, w4a16_dora, bnb_nf4")
    gptq: str = flag(
        "auto",
        "round by the inputs of the trained model on samples that it was trained on; auto: where it says which",
        choices=("auto", "true", "false"),
    )
    gptq_samples: int = flag(128, "training samples to calibrate on", minimum=1)
    symmetric: bool = flag(True, "w4a16: codes around zero; false: a zero point per group")
    group_size: int = flag(
        128, "w4a16: weights that share one scale; not given: smaller where rows ask for it", choices=(128, 64, 32)
    )

    _gguf: str = section("gguf")
    gguf_type: str = flag(
        "f16",
        "how matrices are stored. f16: three bits finer than bf16, for numbers up to 65504; q8_0: 8 bits, and a scale "
        "for 32 of them",
        choices=("f16", "bf16", "q8_0", "f32"),
    )

    _fidelity: str = section("fidelity report")
    fidelity_data: str | None = flag(None, "dataset or local file to compare on; default: what the run held out")
    fidelity_samples: int = flag(64, "texts to compare on; 0: no report", minimum=0)

    explicit_flags: frozenset = field(default=frozenset(), init=False, repr=False)

    def errors(self) -> list[str]:
        """One line for each flag that cannot work beside the others."""
        found = [f"--{name}: required" for name in ("model", "save_dir") if not getattr(self, name)]
        found += size_errors(self.max_shard_size, flag="max_shard_size")
        found += repository_errors(self.push_to_hub, flag="push_to_hub")
        if "WORLD_SIZE" in os.environ:
            found.append("torchrun: an export is one process; start it with plain python")
        if self.dtype == "fp32" and "rounding" in self.explicit_flags and self.infer_type != "gguf":
            found.append("--rounding: has no meaning for --dtype fp32")
        known = FLAGS_OF.get(self.infer_type, WRITTEN_SO)
        others = {name for names in (WRITTEN_SO, *FLAGS_OF.values()) for name in names} - set(known)
        idle = sorted(others & self.explicit_flags)
        return found + [f"--{name}: has no meaning for --infer_type {self.infer_type}" for name in idle]
