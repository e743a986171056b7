"""w4a16 calibrated with GPTQ (arXiv:2210.17323) by llm-compressor, on samples the run was trained on.

Written against llm-compressor's documented `oneshot`; not tested here, where it cannot be installed.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

from fsdp_utils.core.errors import UserError
from fsdp_utils.data.tokens import prepare_dataset
from fsdp_utils.export.formats import Merged, write_rest, write_weights
from fsdp_utils.export.w4a16 import W4A16, scheme
from fsdp_utils.folders.documents import describe_tokenizer
from fsdp_utils.training.task import CAUSAL_LM


def check_gptq(run) -> None:
    """Raises UserError where llm-compressor or the run's training samples are missing."""
    if not find_spec("llmcompressor"):
        raise UserError("--gptq true: needs llm-compressor, which is not installed; pip install llmcompressor")
    if run.config is None:
        raise UserError(f"--gptq true: {run.folder} does not say what it was trained on; give the run itself")


def write_gptq(chosen: W4A16, tokenizer, folder: Path, *, samples: int, max_shard_bytes: int) -> None:
    """Merges into a temporary folder, calibrates on the first training samples, and writes packed weights."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    run, temporary = chosen.trained.run, folder / ".merged"
    temporary.mkdir()
    merged = Merged(chosen.trained, chosen.options)
    write_weights(merged, temporary, max_shard_bytes=max_shard_bytes)
    write_rest(merged, tokenizer, temporary, target=temporary)
    model = CAUSAL_LM.auto_class.from_pretrained(temporary, dtype=chosen.dtype, trust_remote_code=run.trust_remote_code)
    rows = prepare_dataset(run.config, tokenizer).dataset.select_columns(["input_ids"])
    rows = rows.select(range(min(samples, len(rows)))).map(lambda row: {"attention_mask": [1] * len(row["input_ids"])})
    weights = scheme(symmetric=chosen.symmetric, group_size=chosen.group_size)
    oneshot(
        model=model,
        dataset=rows,
        recipe=GPTQModifier(
            ignore=chosen.unpacked_linears(), config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}
        ),
        max_seq_length=run.config.context_length,
        num_calibration_samples=len(rows),
    )
    model.save_pretrained(folder, save_compressed=True)
    describe_tokenizer(folder, temporary, tokenizer=tokenizer)
    shutil.rmtree(temporary)
