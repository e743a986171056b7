"""What a run has learned that it can use on samples that it does not train on."""

import math
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch

from fsdp_utils.core.processes import all_reduce_each
from fsdp_utils.core.ranks import rank, world_size
from fsdp_utils.data.batches import Batches


class Best(NamedTuple):
    loss: float
    step: int


@dataclass
class Judgement:
    """What validations have said so far: part of a run's state."""

    best: Best | None = None
    since: int = 0  # validations without a lower loss


class Validation:
    """Validations of a run, at intervals and at its end.

    Args:
        config: the flags of the run.
        batches: those of training, for their shape.
        data: the held-out samples.
    """

    def __init__(self, config, batches: Batches, data):
        self.batches = replace(batches, data=data, accumulation=1)
        self.every, self.questions = config.eval_every_steps, min(config.eval_generate, len(data))
        self.patience, self.judgement = config.early_stopping_patience, Judgement()

    def due(self, number: int, *, last: bool) -> bool:
        return last or bool(self.every and number % self.every == 0)

    def __call__(self, step) -> dict[str, float]:
        """What is logged: the mean loss of all tokens, whatever their batches, its perplexity where the task writes
        text, and the task's metrics. Collective."""
        found = step.loss_over(batch for (batch,) in step.batches(self.batches).steps(0))
        row = dict(eval_loss=found.mean)
        if step.task.writes:
            row["eval_perplexity"] = math.exp(found.mean) if found.mean < 700 else math.inf
        row["eval_tokens"] = found.tokens
        row |= {f"eval_{name}": value for name, value in step.task.metrics(found.sums).items()}
        return row | (dict(eval_exact_match=self._exact_match(step)) if self.questions else {})

    def _exact_match(self, step) -> float:
        """The share of the first questions that greedy decoding answers token for token.

        Decoding comes to a label if and only if the most likely token is the label at each of its places, given those
        before it: one forward pass tells what generation would take one for each token to tell.
        """
        right = 0
        for first in range(0, self.questions, world_size()):
            mine = first + rank()
            row = self.batches.data.dataset[min(mine, self.questions - 1)]  # all take part in every forward pass
            ids, labels = (torch.as_tensor(row[name]).long() for name in ("input_ids", "labels"))
            predicted, wanted = step.predictions(ids, labels)
            right += mine < self.questions and bool((predicted.argmax(-1) == wanted).all())
        return all_reduce_each([right], step.device)[0] / self.questions

    def judge(self, loss: float, number: int) -> bool:
        """Whether the loss after step `number` is the lowest so far."""
        best = self.judgement.best
        lower = loss < (best.loss if best else math.inf)
        self.judgement = Judgement(Best(loss, number)) if lower else Judgement(best, self.judgement.since + 1)
        return lower

    @property
    def exhausted(self) -> bool:
        """Whether --early_stopping_patience ends the run."""
        return bool(self.patience) and self.judgement.since >= self.patience

    def state_dict(self) -> dict:
        return asdict(self.judgement)

    def load_state_dict(self, state: dict) -> None:
        best = state["best"] and Best(*state["best"])
        self.judgement = Judgement(best, state["since"])
