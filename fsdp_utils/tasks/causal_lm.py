"""Causal language models: every token is predicted from those before it."""

from dataclasses import dataclass

from transformers import AutoModelForCausalLM

from fsdp_utils.core.errors import UserError
from fsdp_utils.data.batches import IGNORED, collate, packed_inputs
from fsdp_utils.data.tokens import RowEncoder
from fsdp_utils.tasks.base import Task, goes_on, is_encoder
from fsdp_utils.training.loss import CausalLMLoss


@dataclass(frozen=True)
class CausalLM(Task):
    name = "causal_lm"
    auto_class = AutoModelForCausalLM
    noun = "causal language model"
    peft_type = "CAUSAL_LM"
    coder = RowEncoder
    loss = CausalLMLoss
    causal = True

    def check(self, config, model_config):
        super().check(config, model_config)
        if is_encoder(model_config) and not goes_on(model_config):
            raise UserError(
                f"--task causal_lm: {model_config.model_type} models see their whole text, also what they would have "
                "to predict; pass --task sequence_classification, or choose a decoder"
            )

    def pad_token_id(self, tokenizer, model_config, *, largest):
        # padding is told by its place: any id does that the embedding has, and a tokenizer's own may lie beyond it
        return min(tokenizer.pad_token_id or 0, largest)

    def collate(self, rows, **shape):
        return collate(rows, **shape)

    def measured(self, embedded, *, packing):
        packed = packed_inputs(*embedded.shape[:2]) if packing else {}
        return dict(inputs_embeds=embedded, use_cache=False) | packed

    def predictions(self, model, ids, labels):
        logits = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, :-1]  # [tokens - 1, vocabulary]
        asked = labels[1:] != IGNORED
        return logits[asked].float().log_softmax(-1), labels[1:][asked]


CAUSAL_LM = CausalLM()
