"""Sequence classification: one label, several, or a score for a text or a pair of texts, by a head of its own."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForSequenceClassification

from fsdp_utils.core.errors import UserError
from fsdp_utils.data.batches import IGNORED, at_least, pad_rows, width_of
from fsdp_utils.data.coded import EndPooledRows, LabelledRows
from fsdp_utils.data.labels import REGRESSION, SINGLE, Labels
from fsdp_utils.tasks.base import Task, is_encoder
from fsdp_utils.training.scores import SCORES

POOLERS = ("pooler", "head")  # modules of an encoder that its pretraining may not have had


def reads_shifted(model_config) -> bool:
    """Of an encoder-decoder: whether it classifies by the last token of the text, shifted to the right, as T5Gemma
    does. The others take the end-of-sequence token's place."""
    return model_config.is_encoder_decoder and model_config.model_type.startswith("t5gemma")


def summed_loss(logits: torch.Tensor, targets: torch.Tensor, problem: str) -> torch.Tensor:
    """The loss of `problem` over all targets that are asked for, fp32 scalar: transformers' mean times their number.

    Args:
        logits: `[rows, outputs]`.
        targets: int64 `[rows]`, -100 where none is asked for; or fp32 `[rows, outputs]`, NaN there.
    """
    logits = logits.float()
    if problem == SINGLE:
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    asked = ~targets.isnan()
    wanted = torch.where(asked, targets, 0)
    each = F.mse_loss if problem == REGRESSION else F.binary_cross_entropy_with_logits
    return torch.where(asked, each(logits, wanted, reduction="none"), 0).sum()


class ClassificationLoss:
    """Sums the losses of a micro-batch; fp32 scalar. `fused` means nothing here: the head's logits are few."""

    def __init__(self, model: nn.Module, *, fused: bool):
        self.model = model

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return summed_loss(self.logits(batch), batch["targets"], self.model.config.problem_type)

    def logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """`[rows, outputs]`."""
        return self.model(**{name: tensor for name, tensor in batch.items() if name != "targets"}).logits

    def look(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, and the sums of `training.scores`, fp64 `[n]`."""
        logits, targets, problem = self.logits(batch), batch["targets"], self.model.config.problem_type
        score = SCORES[problem]
        sums = score.sums(score.predicted(logits), targets, outputs=logits.shape[1])
        return summed_loss(logits, targets, problem), sums


@dataclass(frozen=True)
class SequenceClassification(Task):
    """One label, several, or a score for each row.

    Args:
        room: columns of padding behind the longest row. Without one, T5Gemma shifts that row's last token out and
            classifies by the one before, so that what comes out depends on the other rows.
    """

    room: int = 0

    name = "sequence_classification"
    auto_class = AutoModelForSequenceClassification
    noun = "model that transformers classifies sequences with"
    peft_type = "SEQ_CLS"
    coder = LabelledRows
    loss = ClassificationLoss
    writes = False
    forbidden: ClassVar = dict(
        packing="--task sequence_classification has one label for each row; pass --packing false",
        eval_generate="--task sequence_classification generates no text; its validation counts what is right anyway",
    )
    idle: ClassVar = dict(
        train_on="--task sequence_classification has no turns",
        fused_loss="--task sequence_classification has few logits",
    )

    def can_expand(self, model_config):
        return not is_encoder(model_config)

    def coder_for(self, model_config):
        ends = model_config.is_encoder_decoder and not reads_shifted(model_config)
        return EndPooledRows if ends else self.coder

    def shown(self, row):
        ids, label = np.asarray(row["input_ids"]), self.labels.named(np.asarray(row["labels"]))
        said = f"{label:g}" if isinstance(label, float) else label if isinstance(label, str) else ", ".join(label)
        return ids, np.zeros(len(ids), dtype=bool), said

    def given(self, labels, tokenizer, model_config):
        known = (model_config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
        pad = next((i for i in known if i is not None), None)
        return replace(self, labels=labels, pad=pad, room=int(reads_shifted(model_config)))

    def record(self):
        return super().record() | dict(room=self.room)

    @classmethod
    def of_record(cls, record):
        return replace(super().of_record(record), room=record.get("room", 0))

    def adapt(self, model_config):
        for name, value in (self.labels.config() if self.labels else {}).items():
            setattr(model_config, name, value)
        if model_config.pad_token_id is None:
            model_config.pad_token_id = self.pad

    def assumed(self, model_config):
        named = "id2label" in model_config.to_diff_dict()
        by = "by config.json" if named else "as config.json names no labels"
        return [f"note: a head of {model_config.num_labels} outputs, {by}; a run has one for each label of its rows"]

    def described(self, model_config):
        names = ("num_labels", "id2label", "label2id", "problem_type", "pad_token_id")
        found = {name: getattr(model_config, name) for name in names[1:]}
        return found | dict(architectures=[self.auto_class._model_mapping[type(model_config)].__name__])

    def known_labels(self, model_config):
        named = any(name.endswith("ForSequenceClassification") for name in model_config.architectures or [])
        return Labels.of(model_config) if named else None

    def is_new(self, name, *, prefix):
        return not name.startswith(prefix) or any(part in POOLERS for part in name.split("."))

    def is_dropped(self, name, *, prefix):
        return not name.startswith(prefix) or "pooler" in name.split(".")

    def trained_whole(self, model, new):
        inside = f"{model.base_model_prefix}."
        heads = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
        poolers = {name.rpartition(".")[0] for name in new if name.startswith(inside)}
        return [*(name for name in heads if name != model.base_model_prefix), *sorted(poolers)]

    def pad_token_id(self, tokenizer, model_config, *, largest):
        if self.pad is None:  # by which a decoder finds the end of a row
            raise UserError(f"{model_config.model_type}: neither the model nor its tokenizer has a padding token")
        return self.pad

    def collate(self, rows, *, packing, targets_multiple, pad_token_id, multiple, context_length, fewest=1):
        """`input_ids`, `attention_mask`, perhaps `token_type_ids`: int64 `[rows, longest]`; `targets` as of
        `summed_loss`."""
        single = self.labels.problem == SINGLE
        nothing = [IGNORED] if single else [float("nan")] * self.labels.outputs
        types = [np.zeros(1)] if rows and len(rows[0]) > 2 else []
        rows = at_least(rows, fewest, (np.array([pad_token_id]), nothing, *types))
        ids, labels = ([row[i] for row in rows] for i in range(2))
        width = width_of(ids, multiple=multiple, context_length=context_length, room=self.room)
        batch = dict(
            input_ids=pad_rows(ids, fill=pad_token_id, width=width),
            attention_mask=pad_rows([np.ones(len(row)) for row in ids], fill=0, width=width),
            targets=torch.tensor(np.array(labels), dtype=torch.int64 if single else torch.float32),
        )
        batch["targets"] = batch["targets"][:, 0] if single else batch["targets"]
        if types:
            batch["token_type_ids"] = pad_rows([row[2] for row in rows], fill=0, width=width)
        return batch

    def predictions(self, model, ids, labels, *types):
        """Of several labels, each is a choice between two."""
        names, room = ("input_ids", "attention_mask", "token_type_ids"), (0, self.room)
        mask = F.pad(torch.ones_like(ids), room)
        inputs = zip(names, (F.pad(ids, room, value=self.pad), mask, *types), strict=False)
        logits = model(**{name: tensor.unsqueeze(0) for name, tensor in inputs}).logits.float()
        if self.labels.problem == SINGLE:
            return logits.log_softmax(-1), labels.long()
        return F.logsigmoid(torch.stack([-logits[0], logits[0]], dim=1)), labels.long()

    def metrics(self, sums):
        return SCORES[self.labels.problem].metrics(sums)

    def measured(self, embedded, *, packing):
        return dict(inputs_embeds=embedded, attention_mask=torch.ones(embedded.shape[:2], dtype=torch.int64))
