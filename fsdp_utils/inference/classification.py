"""Sequence classification: the outputs of a head for rows of text, and what they are worth."""

import json
import time
from typing import NamedTuple

import torch
from torch import nn

from fsdp_utils.core.devices import peak_memory_gib
from fsdp_utils.core.errors import UserError
from fsdp_utils.data.labels import REGRESSION, SINGLE
from fsdp_utils.inference.coded import read_coded
from fsdp_utils.inference.exam import OF_PROMPTS, Exam, in_file, told
from fsdp_utils.inference.generation import Batched
from fsdp_utils.inference.load import load_for_inference
from fsdp_utils.inference.questions import stored_dtype
from fsdp_utils.model.build import read_raw_config
from fsdp_utils.training.scores import SCORES


class Text(NamedTuple):
    """A row: its texts, and its label as `Labels.named` gives it."""

    question: str
    answer: str | list[str] | float


class Outputs(NamedTuple):
    """Of one row.

    Args:
        index: of the row.
        logits: one for each output of the head.
        tokens: that the model has read.
        seconds: its share of its batch's time.
        peak_memory_gib: of this process so far.
    """

    index: int
    logits: list[float]
    tokens: int
    seconds: float
    peak_memory_gib: float | None = None


class Classifier(Batched):
    """One forward pass for each batch of rows, padded on the right as in training.

    Args:
        samples: by index, columns as the task's coder names them, tensors `[n]`.
    """

    way_out = "give shorter rows"

    def __init__(self, model: nn.Module, samples: list, *, task):
        self.model, self.samples, self.task = model, samples, task
        self.device = next(model.parameters()).device
        if model.config.pad_token_id is None:  # by which a decoder finds the end of a row
            model.config.pad_token_id = task.pad

    @torch.inference_mode()
    def answer(self, batch):
        begun = time.perf_counter()
        shape = dict(packing=False, targets_multiple=1, multiple=1, context_length=0)
        rows = [self.samples[index] for index, _ in batch]
        made = self.task.collate(rows, pad_token_id=self.task.pad, **shape)
        inputs = {name: tensor.to(self.device) for name, tensor in made.items() if name != "targets"}
        logits = self.model(**inputs).logits.float().tolist()
        seconds = (time.perf_counter() - begun) / len(batch)
        peak = peak_memory_gib(self.device)
        return [
            Outputs(index, outputs, len(ids), seconds, peak)
            for (index, ids), outputs in zip(batch, logits, strict=True)
        ]


class Rows(Exam):
    unused = (*OF_PROMPTS, "max_new_tokens", "temperature", "seed")

    def __init__(self, config, run, tokenizer, *, task):
        if task.labels is None:
            head = "a run of train.py, or a model whose config.json names a ForSequenceClassification"
            raise UserError(f"{run.folder}: has no head that classifies; give {head}")
        if task.pad is None:  # no run of ours
            model_config = read_raw_config(str(run.base), trust_remote_code=run.trust_remote_code)
            task = task.given(task.labels, tokenizer, model_config)
            task.pad_token_id(tokenizer, model_config, largest=0)  # refuses a model that has none
        self.config, self.labels, self.task = config, task.labels, task
        examples, self.samples = read_coded(config, run, tokenizer, task=task)
        self.questions = [self._text(*row, sample) for row, sample in zip(examples, self.samples, strict=True)]
        self.inputs = [sample[0].tolist() for sample in self.samples]

    def _text(self, row, form, sample) -> Text:
        picked = form.fields(row.value)
        return Text(
            "\n".join(filter(None, (picked["text"], picked["text_pair"]))), self.labels.named(sample[1].tolist())
        )

    def answerer(self, run, *, device):
        config = self.config
        model = load_for_inference(run, device=device, dtype=stored_dtype(config), eval_type=config.reading)
        return Classifier(model, self.samples, task=self.task)

    def judged(self, question, output):
        """With the probability of each label, in the order of `labels`."""
        logits, problem = torch.tensor([output.logits]), self.labels.problem
        predicted = SCORES[problem].predicted(logits)[0]
        prediction = self.labels.named(predicted.reshape(-1).tolist())
        if problem == REGRESSION:
            return dict(prediction=prediction)
        chances = logits[0].softmax(0) if problem == SINGLE else logits[0].sigmoid()
        return dict(prediction=prediction, probabilities=chances.tolist(), correct=prediction == question.answer)

    def result(self, rows):
        score = SCORES[self.labels.problem]
        predicted, wanted = (self._numbers([row[name] for row in rows]) for name in ("prediction", "answer"))
        metrics = in_file(score.of_rows(predicted, wanted, outputs=self.labels.outputs))
        first = "pearson" if self.labels.problem == REGRESSION else "accuracy"
        found = dict(score=metrics.pop(first), interval_95=metrics.pop(f"{first}_interval_95", None))
        if self.labels.names:
            found |= dict(correct=sum(row["correct"] for row in rows), labels=self.labels.names)
        return found | dict(metrics=metrics)

    def _numbers(self, values: list) -> torch.Tensor:
        """Named labels as `training.scores` takes them: int64 `[rows]`, or fp64 `[rows, outputs]`."""
        if self.labels.problem == SINGLE:
            return torch.tensor([self.labels.names.index(value) for value in values])
        return torch.tensor([self.labels.numbers(json.dumps(value)) for value in values], dtype=torch.float64)

    def said(self, result):
        if self.labels.names:
            return super().said(result)
        if result["score"] is None:
            return "Pearson's correlation is not defined: one side is always the same" + told(result["metrics"])
        interval = "(95 % interval {:.3f} to {:.3f})".format(*result["interval_95"]) if result["interval_95"] else ""
        return f"Pearson's correlation {result['score']:.3f} {interval}".rstrip() + told(result["metrics"])
