"""Checkpoints that hold only new blocks, made into the model that the run would have saved."""

import shutil
from pathlib import Path

import torch

from fsdp_utils.core.folders import new_folder
from fsdp_utils.core.processes import barrier
from fsdp_utils.core.ranks import is_main, say
from fsdp_utils.folders import checkpoints, saving
from fsdp_utils.folders.describe import Run, check_base, describe, task_of, tokenizer_folder, tokenizer_of
from fsdp_utils.folders.documents import describe_tokenizer
from fsdp_utils.folders.names import GENERATION_CONFIG, RUN_FILE
from fsdp_utils.inference.load import default_dtype, inference_config
from fsdp_utils.model.assemble import attach, build, load_whole

WHOLE = "whole"  # inside the checkpoint, with which it is removed


def whole(run: Run, *, device: torch.device) -> Run:
    """The run itself, unless it is a checkpoint of kind "checkpoint": then the whole model, written beside its new
    blocks once. Every process must call it.

    Raises:
        UserError: another base than in training; no room.
    """
    if run.kind != "checkpoint":
        return run
    target = run.folder / WHOLE
    if is_main() and not target.exists():
        say(f"{run.folder}: writing the whole model to {target}")
        with new_folder(target) as folder:
            _write(run, Path(folder), device=device)
    barrier()
    return describe(target, trust_remote_code=run.trust_remote_code)


def _write(run: Run, folder: Path, *, device: torch.device) -> None:
    config = inference_config(run, dtype=default_dtype(run))
    planned = attach(build(config, task=task_of(run), device=device), config)
    check_base(run, planned.base_fingerprint)
    model = load_whole(planned, config, device=device)
    checkpoints.restore_parameters(model, run.folder)
    tokenizer = tokenizer_of(run)
    describe_tokenizer(folder, tokenizer_folder(run), tokenizer=tokenizer)
    saving.write_weights(model, planned, config, folder)
    saving.describe_whole(model, tokenizer, planned, config, folder)
    for name in (RUN_FILE, GENERATION_CONFIG):  # the second, if training added to it
        if (run.folder / name).exists():
            shutil.copy(run.folder / name, folder / name)
