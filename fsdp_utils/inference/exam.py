"""What of an evaluation depends on the task: what is asked, what answers, how answers are scored."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from fsdp_utils.core.classes import load_class
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import flags
from fsdp_utils.core.ranks import say
from fsdp_utils.folders.describe import Run, task_of
from fsdp_utils.inference.config import EvalConfig
from fsdp_utils.inference.scoring import compare, cut_at
from fsdp_utils.training.scores import Metrics, wilson_interval

# a row for each of `options.TASKS`
EXAMS = {
    "causal_lm": "fsdp_utils.inference.questions:Questions",
    "seq2seq_lm": "fsdp_utils.inference.seq2seq:Sources",
    "sequence_classification": "fsdp_utils.inference.classification:Rows",
}


# flags that only language models know, which answer prompts
OF_PROMPTS = (
    *("backend", "max_model_len", "gpu_memory_utilization", "server", "served_model_name", "prompt", "n_shots"),
)


class Exam(ABC):
    """One evaluation. Making it reads the questions, no weight.

    Args:
        config: the flags of evaluate.py.
        run: what is evaluated.
        tokenizer: of the run.
        task: `task_of(run)`.

    Attributes:
        questions: each with `question` and `answer`.
        inputs: what decides the answers to them, beside weights and flags: ids.
        unused: flags that mean nothing here.

    Raises:
        UserError: no such data, a row that cannot be asked or scored, a model that cannot answer.
    """

    questions: list
    inputs: list
    unused: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __init__(self, config: EvalConfig, run: Run, tokenizer, *, task): ...

    @abstractmethod
    def answerer(self, run: Run, *, device: torch.device):
        """What answers, loaded: `answers([(index, input), …], batch_size=…)` gives `generation.Output` and its like."""

    @abstractmethod
    def judged(self, question, output) -> dict:
        """What the result says of an answer."""

    @abstractmethod
    def result(self, rows: list[dict]) -> dict:
        """`score`, `interval_95` and what else follows from all answers, each as `judged`."""

    def said(self, result: dict) -> str:
        """`result` in one line, with the number of rows as `total`."""
        low, high = result["interval_95"]
        share = f"{result['correct']}/{result['total']} = {result['score']:.1%}"
        return f"score {share} (95 % interval {low:.1%} to {high:.1%})" + told(result.get("metrics", {}))


def told(metrics: dict) -> str:
    """Scores in one line; their intervals and settings are in the file."""
    return "".join(f", {name} {value:.4g}" for name, value in metrics.items() if isinstance(value, float))


def in_file(metrics: Metrics) -> dict:
    """Metrics as the output file names them, null where one is not defined."""
    known = lambda value: None if isinstance(value, float) and not math.isfinite(value) else value
    return {name.replace("_interval", "_interval_95"): known(value) for name, value in metrics.items()}


class Written(Exam):
    """Answers that are texts, scored by exact match.

    Attributes:
        stops: texts at which an answer ends.
    """

    stops: Sequence[str] = ()

    def judged(self, question, output):
        prediction = cut_at(self.stops, output.text)
        found, expected, correct = compare(prediction, question.answer)
        return dict(prediction=prediction, extracted=[found, expected], correct=correct)

    def result(self, rows):
        return share_of_correct(rows)


def share_of_correct(rows: list[dict]) -> dict:
    """`score`, its interval and the number of correct rows."""
    correct = sum(row["correct"] for row in rows)
    return dict(score=correct / len(rows), interval_95=wilson_interval(correct, len(rows)), correct=correct)


def exam_of(config: EvalConfig, run: Run):
    """Of a run: the class of its exam, with what its task is given already; makes an `Exam` of a tokenizer.

    Raises:
        UserError: flags that mean nothing there.
    """
    task = task_of(run)
    kind = load_class(EXAMS[task.name])
    given = {f.name: (getattr(config, f.name), f.default) for f in flags(config) if f.name in kind.unused}
    refused = [f"--{name} {value}" for name, (value, default) in given.items() if value != default]
    if refused:
        raise UserError(f"{', '.join(refused)}: means nothing to a {task.noun}, as {run.folder} is; leave it away")
    idle = [f"--{name}" for name in given if name in config.explicit_flags]
    if idle:
        say(f"note: {', '.join(idle)}: without effect on a {task.noun}")
    return lambda run, tokenizer: kind(config, run, tokenizer, task=task)
