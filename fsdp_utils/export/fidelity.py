"""How close an exported model is to the trained one on held-out text: KL divergence, top-1 agreement, perplexity, and
the share of what training gained that it keeps."""

import gc
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from fsdp_utils.core.errors import CheckpointError, UserError
from fsdp_utils.core.folders import model_folder
from fsdp_utils.core.safetensors_io import CheckpointReader
from fsdp_utils.data.batches import IGNORED
from fsdp_utils.export.held_out import HeldOut
from fsdp_utils.folders.describe import Run, describe, task_of
from fsdp_utils.inference.load import default_dtype, load_for_inference, load_stock
from fsdp_utils.model.build import resolve_model
from fsdp_utils.model.weights import fingerprint
from fsdp_utils.tasks.causal_lm import CAUSAL_LM

LEAST_GAIN = 0.01  # nats per token; a share of less is noise
LOUD = 0.9  # of the gain


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
        `{"trained": {"perplexity": …}, "exported": {"perplexity", "kl", "top1_agreement"}, "base": …}`; natural log;
        and `"gain_kept"` of `exported` where it is known.
    """
    base, trusted = base_folder(run), dict(trust_remote_code=run.trust_remote_code)
    models = {
        "trained": lambda: load_for_inference(run, device=device),
        "exported": lambda: load_stock(describe(exported, **trusted), device=device, dtype=dtype),
    }
    task = task_of(run)
    if base is not None and not task.labels:
        trained_in = default_dtype(run)
        models["base"] = lambda: load_for_inference(describe(base, **trusted), device=device, dtype=trained_in)
    scores = compare(models, text.rows, task=task, device=device, scratch=exported.parent)
    if task.labels:  # of which a base knows nothing
        scores["base"] = {"perplexity": task.labels.by_chance}
    if text.unseen and "base" in scores:
        scores["exported"]["gain_kept"] = gain_kept(*(scores[n]["perplexity"] for n in ("trained", "exported", "base")))
    return scores


def gain_kept(trained: float, exported: float, base: float) -> float | None:
    """Of three perplexities: the share of the fall of the loss from base to trained that is there in the exported
    model. None where training gained next to nothing on this text."""
    gain = math.log(base / trained)
    return math.log(base / exported) / gain if gain > LEAST_GAIN else None


def compare(
    models: dict[str, Callable[[], nn.Module]], rows, *, task=CAUSAL_LM, device: torch.device, scratch: Path
) -> dict:
    """Scores each model; the first is the reference, whose log-probabilities wait in a file in `scratch`."""
    scores = {}
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".fidelity") as folder:
        reference = _Reference(Path(folder) / "log_probs", rows, task=task)
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

    def __init__(self, path: Path, rows, *, task):
        self.path, self.task, self.stored = path, task, None
        self.tokens = sum(int((row[1] != IGNORED).sum()) for row in rows)

    @torch.no_grad()
    def score(self, model: nn.Module, rows, *, device: torch.device, name: str) -> dict:
        first, start, loss, divergence, agreed = self.stored is None, 0, 0.0, 0.0, 0
        for row in tqdm(rows, desc=f"scoring {name}", unit="text", leave=False):
            found, targets = self.task.predictions(model, *(tensor.to(device) for tensor in row))  # [n, vocabulary]
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


def verdict(scores: dict, text: HeldOut, *, infer_type: str, better: str) -> str:
    """One line: what is kept of the gain, or why that is not known; loud where it is too little."""
    if not text.unseen:
        return "share of the gain kept: not known, the run left no text that it did not train on; give --fidelity_data"
    if "base" not in scores:
        return "share of the gain kept: not known, the model that training started from is not there"
    share = scores["exported"]["gain_kept"]
    if share is None:
        return "share of the gain kept: not known, on this text training gained next to nothing; give --fidelity_data"
    if share >= LOUD:
        return f"share of the gain kept: {share:.1%}"
    return f"WARNING: --infer_type {infer_type} keeps {share:.1%} of what training gained on this text; use {better}"


def table(scores: dict) -> str:
    """The report as text."""
    lines = [f"{'':10}{'perplexity':>12}{'KL to trained':>16}{'same top-1':>12}"]
    for name, score in scores.items():
        line = f"{name:10}{score['perplexity']:>12.4f}"
        if "kl" in score:
            line += f"{score['kl']:>16.2e}{score['top1_agreement']:>12.2%}"
        lines.append(line)
    return "\n".join(lines)
