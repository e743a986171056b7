"""Sequence to sequence: a decoder writes the target, one token after another, of the source that an encoder read."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from transformers import AutoModelForSeq2SeqLM

from fsdp_utils.data.batches import IGNORED, at_least, model_inputs, pad_rows, width_of
from fsdp_utils.data.coded import SourceTargetRows
from fsdp_utils.tasks.base import Task
from fsdp_utils.training.loss import CausalLMLoss


class Seq2SeqLoss(CausalLMLoss):
    """Sums the cross entropies of the decoder's tokens; fp32 scalar."""

    def inputs(self, batch):
        # the family's own: where the decoder starts, and what it reads in place of labels that are not asked for
        shifted = self.model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        given = {name: tensor for name, tensor in model_inputs(batch).items() if name != "labels"}
        return given | dict(decoder_input_ids=shifted, use_cache=False)


@dataclass(frozen=True)
class Seq2SeqLM(Task):
    name = "seq2seq_lm"
    auto_class = AutoModelForSeq2SeqLM
    noun = "sequence-to-sequence model"
    peft_type = "SEQ_2_SEQ_LM"
    coder = SourceTargetRows
    loss = Seq2SeqLoss
    forbidden: ClassVar = dict(
        packing="an encoder sees all samples of a row; pass --packing false",
    )
    idle: ClassVar = dict(train_on="--task seq2seq_lm has no turns")

    def can_expand(self, model_config):
        return False

    def shown(self, row):
        source, target = np.asarray(row["input_ids"]), np.asarray(row["labels"])
        return np.concatenate([source, target]), np.arange(len(source) + len(target)) >= len(source), ""

    def pad_token_id(self, tokenizer, model_config, *, largest):
        return model_config.pad_token_id

    def collate(self, rows, *, packing, targets_multiple, pad_token_id, multiple, context_length, fewest=1):
        """`input_ids`, `attention_mask`: int64 `[rows, longest source]`; `labels` `[rows, longest target]`, -100 as
        padding; `positions` and `targets` `[n]`: the flat places of the decoder that predict, and what."""
        rows = at_least(rows, fewest, (np.array([pad_token_id]), np.array([IGNORED])))
        ids, labels = ([row[i] for row in rows] for i in range(2))
        shape = dict(multiple=multiple, context_length=context_length)
        sources, targets = width_of(ids, **shape), width_of(labels, **shape)
        wanted = pad_rows(labels, fill=IGNORED, width=targets)
        places = (wanted.flatten() != IGNORED).nonzero()[:, 0]
        return dict(
            input_ids=pad_rows(ids, fill=pad_token_id, width=sources),
            attention_mask=pad_rows([np.ones(len(row)) for row in ids], fill=0, width=sources),
            labels=wanted,
            positions=places,
            targets=wanted.flatten()[places],
        )

    def measured(self, embedded, *, packing):
        mask = torch.ones(embedded.shape[:2], dtype=torch.int64)
        return dict(inputs_embeds=embedded, decoder_inputs_embeds=embedded, attention_mask=mask, use_cache=False)

    def predictions(self, model, ids, labels):
        shifted = model.prepare_decoder_input_ids_from_labels(labels=labels.unsqueeze(0))
        logits = model(input_ids=ids.unsqueeze(0), decoder_input_ids=shifted, use_cache=False).logits[0]
        return logits.float().log_softmax(-1), labels
