"""Sequence to sequence: targets generated from sources, scored by exact match, ROUGE and BLEU."""

from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import torch

from fsdp_utils.core.errors import UserError
from fsdp_utils.folders.describe import tokenizer_of
from fsdp_utils.inference.coded import read_coded
from fsdp_utils.inference.exam import OF_PROMPTS, Written, in_file
from fsdp_utils.inference.generation import HFGenerator
from fsdp_utils.inference.load import load_for_inference
from fsdp_utils.inference.questions import stored_dtype
from fsdp_utils.training.scores import bootstrap

ROUGES = ("rouge1", "rouge2", "rougeL")
# how a family's decoder begins and ends; the rest of a checkpoint's generation_config.json (beams, penalties) is left
STRUCTURAL = ("decoder_start_token_id", "bos_token_id", "forced_bos_token_id", "forced_eos_token_id")


class Source(NamedTuple):
    question: str
    answer: str


class Seq2SeqGenerator(HFGenerator):
    """Batches of targets; sources are padded on the right as in training. Arguments as of `HFGenerator`."""

    way_out = "lower --max_new_tokens"

    def __init__(self, model, tokenizer, **settings):
        begins = {name: self._named(model, name) for name in STRUCTURAL}
        super().__init__(model, tokenizer, stops=(), static_cache=False, **settings)
        self.pad = model.config.pad_token_id if model.config.pad_token_id is not None else self.pad
        model.generation_config.update(**begins, pad_token_id=self.pad)

    @staticmethod
    def _named(model, name: str) -> int | None:
        found = getattr(model.generation_config, name, None)
        return getattr(model.config, name, None) if found is None else found

    def check_length(self, longest):
        limit, new = getattr(self.model.config, "max_position_embeddings", None), self.max_new_tokens
        if limit and new > limit:
            raise UserError(f"--max_new_tokens {new}: the model's decoder has {limit} positions; lower it")

    def _padded(self, prompts):
        width = max(map(len, prompts))
        input_ids, mask = torch.full((len(prompts), width), self.pad), torch.zeros(len(prompts), width).long()
        for row, ids in enumerate(prompts):
            input_ids[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
        return input_ids.to(self.device), mask.to(self.device)

    def _by_generate(self, input_ids, mask, *, seed):
        torch.manual_seed(seed)
        return self.model.generate(input_ids=input_ids, attention_mask=mask)[:, 1:].tolist()  # without the start


class Sources(Written):
    unused = OF_PROMPTS

    def __init__(self, config, run, tokenizer, *, task):
        examples, samples = read_coded(config, run, tokenizer, task=task)
        self.config, self.inputs = config, [ids.tolist() for ids, _ in samples]
        split = [form.split(form.fields(row.value)) for row, form in examples]
        self.questions = [Source(source, target) for source, target in split]

    def answerer(self, run, *, device):
        config = self.config
        model = load_for_inference(run, device=device, dtype=stored_dtype(config), eval_type=config.reading)
        settings = dict(max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=config.seed)
        return Seq2SeqGenerator(model, tokenizer_of(run), **settings)

    def result(self, rows):
        predictions, targets = ([row[name] for row in rows] for name in ("prediction", "answer"))
        return super().result(rows) | dict(metrics=in_file(rouge(predictions, targets) | bleu(predictions, targets)))


def rouge(predictions: list[str], targets: list[str]) -> dict:
    """The mean F of rouge-score's ROUGE-1, -2 and -L (Lin 2004), 0 to 1, without stemming, with intervals; and which
    version."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGES)
    found = [scorer.score(target, prediction) for target, prediction in zip(targets, predictions, strict=True)]
    rows = np.array([[each[name].fmeasure for name in ROUGES] for each in found])
    means = bootstrap(lambda sums: dict(zip(ROUGES, sums.T / len(rows), strict=True)), rows)
    return means | dict(rouge=f"rouge-score {version('rouge-score')}, F, without stemming")


def bleu(predictions: list[str], targets: list[str]) -> dict:
    """sacrebleu's BLEU of all rows together (Post 2018), 0 to 100, with its interval, and its signature."""
    from sacrebleu.metrics import BLEU

    scorer, counter = BLEU(), BLEU(effective_order=True)  # without which sacrebleu warns of each row
    score = scorer.corpus_score(predictions, [targets]).score
    found = [counter.sentence_score(one, [target]) for one, target in zip(predictions, targets, strict=True)]
    rows = np.array([[*each.counts, *each.totals, each.sys_len, each.ref_len] for each in found])  # [rows, 4 + 4 + 2]
    whole = lambda sums: BLEU.compute_bleu(sums[:4], sums[4:8], *sums[8:], smooth_method=scorer.smooth_method).score
    interval = bootstrap(lambda tables: dict(bleu=np.array([whole(sums) for sums in tables])), rows)
    return interval | dict(bleu=score, bleu_signature=str(scorer.get_signature()))
