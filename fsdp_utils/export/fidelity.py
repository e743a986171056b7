"""How close an exported model is to the trained one on held-out text: KL divergence, top-1 agreement, perplexity."""

import gc
import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from fsdp_utils.core.errors import CheckpointError, UserError
from fsdp_utils.core.folders import model_folder
from fsdp_utils.core.safetensors_io import CheckpointReader
from fsdp_utils.data import sources
from fsdp_utils.data.batches import IGNORED
from fsdp_utils.data.layouts import Reading
from fsdp_utils.data.tokens import tokenize
from fsdp_utils.folders.describe import Run, describe
from fsdp_utils.inference.load import default_dtype, load_for_inference, load_stock
from fsdp_utils.model.build import resolve_model
from fsdp_utils.model.weights import fingerprint
from fsdp_utils.training.task import CAUSAL_LM

MOST_TOKENS = 4096  # their log-probabilities go to disk: 2 GB with a vocabulary of 128k
CONTEXT = 2048


@dataclass(frozen=True)
class HeldOut:
    """Text to compare on.

    Args:
        source: the dataset, and which part of it.
        rows: (ids `[tokens]`, labels `[tokens]`, -100 where no token is asked for), int64.
    """

    source: str
    rows: list[tuple[torch.Tensor, torch.Tensor]]


def held_out(run: Run, tokenizer, *, name: str | None, samples: int) -> HeldOut:
    """The first `samples` rows of a validation set or local file; by default of what the run held out.

    Raises:
        UserError: it is not known what the run was trained on; as `sources.load_examples`.
    """
    reading = Reading.of(run.config) if run.config else Reading()
    source, examples = _named(name, reading) if name else _of_run(run, reading)
    context = run.config.context_length if run.config else CONTEXT
    table = tokenize(examples.first(samples), tokenizer, reading=reading, source=source, context_length=context)
    rows, left = [], MOST_TOKENS
    for ids, labels in zip(table["input_ids"].to_pylist(), table["labels"].to_pylist(), strict=True):
        asked = sum(label != IGNORED for label in labels)
        if 0 < asked <= left:
            rows.append((torch.tensor(ids), torch.tensor(labels)))
            left -= asked
    if not rows:
        raise UserError(f"--fidelity_data {source}: no row has an answer within {context} tokens; give other text")
    return HeldOut(source, rows)


def _named(name: str, reading: Reading) -> tuple[str, sources.Examples]:
    place = sources.Place(dataset_split="validation", sole=True)
    return name, sources.held_out_rows(name, place=place, reading=reading, flag="fidelity_data")


def _of_run(run: Run, reading: Reading) -> tuple[str, sources.Examples]:
    """The validation set of the run's dataset, else rows beyond those trained on, else its last rows."""
    if run.config is None:
        raise UserError(
            f"--fidelity_data: {run.folder} does not say what it was trained on; give a dataset or local file "
            "to compare on, or --fidelity_samples 0 for no report"
        )
    config = run.config
    spec = sources.DATASETS.get(config.dataset)
    if spec and spec.validation:
        held_out = sources.held_out_rows(config.dataset, place=sources.Place.of(config), reading=reading)
        return f"{config.dataset} (validation)", held_out
    if spec and spec.capped:
        examples = sources.load_examples(replace(config, dataset_samples=sys.maxsize))
        if len(examples) > config.dataset_samples:
            unseen = examples.select(range(config.dataset_samples, len(examples)))
            return f"{config.dataset} (rows beyond those trained on)", unseen
    return f"{config.dataset} (trained on: it has no validation set)", sources.load_examples(config)


def base_folder(run: Run) -> Path | None:
    """The model that training started from; None if that is not known or gone."""
    if run.kind == "adapter" or run.config is None:
        return run.base if run.kind == "adapter" else None
    try:
        folder = model_folder(resolve_model(run.config.source))
        same = run.base_fingerprint in (None, fingerprint(CheckpointReader(folder)))
    except CheckpointError:
        return None
    return folder if same else None  # another model may have taken its place


def fidelity(run: Run, exported: Path, text: HeldOut, *, device: torch.device, dtype: torch.dtype) -> dict:
    """Compares the trained model, what stock software (transformers, PEFT) makes of `exported`, and the base.

    One model is loaded at a time.

    Returns:
        `{"trained": {"perplexity": …}, "exported": {"perplexity", "kl", "top1_agreement"}, "base": …}`; natural log.
    """
    base, trusted = base_folder(run), dict(trust_remote_code=run.trust_remote_code)
    models = {
        "trained": lambda: load_for_inference(run, device=device),
        "exported": lambda: load_stock(describe(exported, **trusted), device=device, dtype=dtype),
    }
    if base is not None:
        trained_in = default_dtype(run)
        models["base"] = lambda: load_for_inference(describe(base, **trusted), device=device, dtype=trained_in)
    return compare(models, text.rows, device=device, scratch=exported.parent)


def compare(models: dict[str, Callable[[], nn.Module]], rows, *, device: torch.device, scratch: Path) -> dict:
    """Scores each model; the first is the reference, whose log-probabilities wait in a file in `scratch`."""
    scores = {}
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".fidelity") as folder:
        reference = _Reference(Path(folder) / "log_probs", rows)
        for name, load in models.items():
            model = load()
            scores[name] = reference.score(model, rows, device=device, name=name)
            del model
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return scores


class _Reference:
    """Log-probabilities of the first model scored, fp32 `[tokens, vocabulary]`, in a mapped file."""

    def __init__(self, path: Path, rows):
        self.path, self.tokens, self.stored = path, sum(int((labels != IGNORED).sum()) for _, labels in rows), None

    @torch.no_grad()
    def score(self, model: nn.Module, rows, *, device: torch.device, name: str) -> dict:
        first, start, loss, divergence, agreed = self.stored is None, 0, 0.0, 0.0, 0
        for row in tqdm(rows, desc=f"scoring {name}", unit="text", leave=False):
            found, targets = CAUSAL_LM.predictions(model, *(tensor.to(device) for tensor in row))  # [n, vocabulary]
            if self.stored is None:
                self._create(found.shape[1])
            stop = start + len(targets)
            if first:
                self.stored[start:stop] = found
            wanted, start = self.stored[start:stop].to(device), stop
            loss -= found.gather(1, targets.unsqueeze(1)).sum().item()
            divergence += (wanted.exp() * (wanted - found)).sum().item()
            agreed += (wanted.argmax(1) == found.argmax(1)).sum().item()
        perplexity = {"perplexity": math.exp(min(loss / self.tokens, 700.0))}
        if first:
            return perplexity
        return perplexity | {"kl": divergence / self.tokens, "top1_agreement": agreed / self.tokens}

    def _create(self, vocabulary: int) -> None:
        size, free = 4 * self.tokens * vocabulary, shutil.disk_usage(self.path.parent).free
        if size > free:  # a mapped file that does not fit ends the process without a word
            raise UserError(
                f"{self.path.parent.parent}: the fidelity report needs {size / 1e9:.2f} GB there, "
                f"{free / 1e9:.2f} GB are free; lower --fidelity_samples"
            )
        flat = torch.from_file(str(self.path), shared=True, size=self.tokens * vocabulary, dtype=torch.float32)
        self.stored = flat.view(self.tokens, vocabulary)


def table(scores: dict) -> str:
    """The report as text."""
    lines = [f"{'':10}{'perplexity':>12}{'KL to trained':>16}{'same top-1':>12}"]
    for name, score in scores.items():
        line = f"{name:10}{score['perplexity']:>12.4f}"
        if "kl" in score:
            line += f"{score['kl']:>16.2e}{score['top1_agreement']:>12.2%}"
        lines.append(line)
    return "\n".join(lines)
