"""The causal-language-model loss, summed over this process's unmasked tokens."""

import torch
import torch.nn.functional as F

IGNORED = -100


def label_tokens(batch: dict[str, torch.Tensor]) -> int:
    """How many predictions of a batch count: each label predicts from the token before it."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """`[b, L]` labels moved so that position i holds the token that follows it; the last one has none."""
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def causal_lm_loss_sum(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of the cross entropies of a batch, fp32 scalar.

    Args:
        batch: `input_ids`, `labels` `[b, L]` and either `attention_mask` or, for packed rows, `position_ids`.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    # use_cache=True would make transformers ignore the sequence boundaries in position_ids
    logits = model(**inputs, use_cache=False).logits  # [b, L, vocabulary]
    labels = shifted(batch["labels"])
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
