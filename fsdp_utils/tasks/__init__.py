"""What a model is for: one object a task, which is all that knows it.

`task_for` finds it from the flags, the model's configuration and the data's columns.
"""

from dataclasses import replace

from fsdp_utils.core.classes import load_class
from fsdp_utils.data.labels import Labels
from fsdp_utils.data.sources import first_columns
from fsdp_utils.model.build import read_raw_config
from fsdp_utils.options import TASKS
from fsdp_utils.tasks.base import Task, goes_on, is_encoder


def named_task(name: str, labels: Labels | None = None) -> Task:
    """The task of a name in `options.TASKS`."""
    return load_class(TASKS[name])(labels)


def recorded_task(record: dict) -> Task:
    """The task that `Task.record` told."""
    return load_class(TASKS[record["name"]]).of_record(record)


def peft_task(peft_type: str | None) -> str:
    """The name of PEFT's task."""
    found = (name for name, target in TASKS.items() if load_class(target).peft_type == peft_type)
    return next(found, "causal_lm")


def task_of_model(model_config) -> str:
    """What a model is for, by its architecture: a causal language model where that says nothing else."""
    architectures = model_config.architectures or []
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return "sequence_classification"
    if getattr(model_config, "is_encoder_decoder", False):
        return "seq2seq_lm"
    classifies = named_task("sequence_classification")
    reads = classifies.takes(model_config) and is_encoder(model_config)
    return classifies.name if reads and not goes_on(model_config) else "causal_lm"


def task_for(config) -> tuple[Task, str]:
    """That of `--task`, or the one that model and data are for; and where the second was decided, a line that says so.

    Raises:
        UserError: as `read_raw_config` and `first_columns`.
    """
    if config.task != "auto":
        return named_task(config.task), ""
    found = task_of_model(read_raw_config(config.source, trust_remote_code=config.trust_remote_code))
    columns = first_columns(replace(config, task=found)) if found == "causal_lm" else set()
    if {"text", "label"} <= columns:
        said = "task: sequence_classification, by the columns text and label; --task causal_lm learns the text"
        return named_task("sequence_classification"), said
    return named_task(found), "" if found == "causal_lm" else f"task: {found}, by the model's architecture"
