"""Rows with labels and rows with targets, read for an evaluation as training reads them."""

from dataclasses import replace
from typing import NamedTuple

import torch

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.ranks import say
from fsdp_utils.data.layouts import LAYOUTS
from fsdp_utils.data.sources import DATASETS, Examples, Place, check_columns_found, held_out_rows
from fsdp_utils.data.tokens import tokenize
from fsdp_utils.folders.describe import Run
from fsdp_utils.inference.asking import reading_of
from fsdp_utils.model.build import build_on_meta, read_raw_config
from methods.targets import learned_positions


class Coded(NamedTuple):
    """`examples`: the raw rows; `samples`: of each the columns of the task's coder, `input_ids`, `labels` and perhaps
    `token_type_ids`, tensors `[n]`."""

    examples: Examples
    samples: list[tuple[torch.Tensor, ...]]


def read_coded(config, run: Run, tokenizer, *, task) -> Coded:
    """The first --samples rows of --dataset.

    Raises:
        UserError: no such data, rows of another task, a row that cannot be read or whose label the head does not know.
    """
    spec = DATASETS.get(config.dataset)
    if spec and task.name not in LAYOUTS[spec.layout].tasks:
        raise UserError(f"--dataset {config.dataset}: has no rows for a {task.noun}, as {run.folder} is; name others")
    reading = replace(reading_of(config, run), task=task.name)
    place = replace(Place.of(config), sole=True)
    examples = held_out_rows(config.dataset, place=place, reading=reading).first(config.samples)
    if config.columns:
        check_columns_found([examples], reading)
    longest = context_length(run, tokenizer, task=task)
    how = dict(labels=task.labels, reading=reading, source=config.dataset, context_length=longest)
    model_config = read_raw_config(str(run.base), trust_remote_code=run.trust_remote_code)
    samples, cut = tokenize(examples, tokenizer, coder=task.coder_for(model_config), **how)
    if cut:
        say(f"note: {cut} of the {len(examples)} rows are cut to {longest} tokens")
    return Coded(examples, samples)


def context_length(run: Run, tokenizer, *, task) -> int:
    """The most tokens of a row: as trained, else as many as the model has positions for."""
    if run.config:
        return run.config.context_length
    model_config = read_raw_config(str(run.base), trust_remote_code=run.trust_remote_code)
    task.adapt(model_config)
    trusted = dict(trust_remote_code=run.trust_remote_code)
    model = build_on_meta(model_config, task=task, dtype=torch.float32, **trusted)
    computed = getattr(model_config, "max_position_embeddings", None)
    return min(filter(None, (tokenizer.model_max_length, learned_positions(model) or computed)))
