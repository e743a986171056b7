"""The flags of prepare_weights.py."""

import os
from dataclasses import dataclass, field

from fsdp_utils.core.flags import flag, section
from fsdp_utils.core.folders import repository_errors, size_errors
from fsdp_utils.export import INFER_TYPES
from fsdp_utils.options import DTYPES


@dataclass
class ExportConfig:
    """The settings of one export; see `python prepare_weights.py --help`."""

    _export: str = section("export")
    model: str = flag("", "folder of a run, a merged or a Llama-Pro model")
    trust_remote_code: bool = flag(False, "run the code that its folder brings (auto_map in its documents)")
    save_dir: str = flag("", "folder that is made")
    infer_type: str = flag("merged", "format; see above", choices=tuple(INFER_TYPES))
    dtype: str = flag("bf16", "of what is not packed, and of the arithmetic of 4-bit layers", choices=tuple(DTYPES))
    max_shard_size: str = flag("5GB", "largest size of one weight file")
    overwrite: bool = flag(False, "replace the model in --save_dir")
    push_to_hub: str | None = flag(None, "upload the finished folder to this private repository of the hub (org/name)")
    device: str = flag("auto", "where to compute", choices=("auto", "cuda", "cpu"))

    _w4a16: str = section("w4a16")
    symmetric: bool = flag(True, "codes around zero; false: a zero point per group")
    group_size: int = flag(128, "weights that share one scale", choices=(128, 64, 32))
    gptq: bool = flag(False, "calibrate on training samples; needs llm-compressor")
    gptq_samples: int = flag(512, "training samples to calibrate on", minimum=1)

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
        idle = {name for names in self._without_meaning() for name in names} & self.explicit_flags
        found += [f"--{name}: has no meaning for --infer_type {self.infer_type}" for name in sorted(idle)]
        return found

    def _without_meaning(self) -> list[tuple[str, ...]]:
        """Flags that say nothing about the format."""
        table = (
            (self.infer_type != "w4a16", ("symmetric", "group_size", "gptq", "gptq_samples")),
            (self.infer_type != "gguf", ("gguf_type",)),
            (self.infer_type == "gguf", ("dtype", "max_shard_size")),
        )
        return [names for holds, names in table if holds]
