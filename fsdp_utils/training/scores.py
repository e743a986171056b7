"""Scores of a classifier: sums that any number of batches and processes add up to, and what follows from the sums.

Intervals are of 95 %. Definitions, also of what is 0/0, are those of scikit-learn.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from fsdp_utils.data.batches import IGNORED
from fsdp_utils.data.labels import MULTI, REGRESSION, SINGLE

Z = 1.959964  # standard deviations of a normal distribution that hold 95 % of it
RESAMPLED, SEED = 1000, 0  # of bootstraps

Metrics = dict[str, float | tuple[float, float]]


def drawn(counts: np.ndarray) -> Iterator[np.ndarray]:
    """How often each kind of row is in a bootstrap's draw of as many rows with replacement, int64 `[kinds]`; RESAMPLED
    times, the same ones each time.

    Args:
        counts: rows of each kind, int64 `[kinds]`.
    """
    kinds, draw = np.repeat(np.arange(len(counts)), counts), np.random.default_rng(SEED)
    for _ in range(RESAMPLED):
        yield np.bincount(kinds[draw.integers(0, len(kinds), len(kinds))], minlength=len(counts))


def with_intervals(scores: dict[str, np.ndarray]) -> Metrics:
    """The first of each score's values `[1 + RESAMPLED]`, and where 95 % of the others lie, which are of draws."""
    found = {}
    for name, (value, *others) in scores.items():
        low, high = np.quantile(others, [0.025, 0.975])
        found |= {name: float(value), f"{name}_interval": (float(low), float(high))}
    return found


def bootstrap(scores: Callable[[np.ndarray], dict[str, np.ndarray]], rows: np.ndarray) -> Metrics:
    """The scores of all rows together, each with its interval: percentiles over draws of the rows (Efron 1979).

    Args:
        scores: from the sums of several draws, `[draws, k]`, to scores by name, `[draws]`.
        rows: what is summed, `[rows, k]`.
    """
    ones = np.ones(len(rows), dtype=np.int64)
    return with_intervals(scores(np.stack([times @ rows for times in (ones, *drawn(ones))])))


class SingleLabel:
    """One of several classes. The sums are the confusion matrix: rows what was wanted, columns what was predicted."""

    def predicted(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `[rows, outputs]` to numbers of classes, int64 `[rows]`."""
        return logits.argmax(-1)

    def sums(self, predicted: torch.Tensor, targets: torch.Tensor, *, outputs: int) -> torch.Tensor:
        """fp64 `[outputs * outputs]`.

        Args:
            targets: int64 `[rows]`, -100 where none is asked for.
        """
        asked = targets != IGNORED
        cells = torch.where(asked, targets * outputs + predicted, 0)
        sums = torch.zeros(outputs * outputs, dtype=torch.float64, device=targets.device)
        return sums.index_add_(0, cells, asked.double())

    def metrics(self, sums: torch.Tensor) -> Metrics:
        """`accuracy`, `macro_f1` (of the classes that occur) and `matthews`, each with its interval: Wilson's, and
        bootstraps of the rows, which to these scores are draws from the confusion matrix."""
        counts = sums.cpu().numpy()
        total, outputs = round(counts.sum()), math.isqrt(len(counts))
        cells = counts.nonzero()[0]
        found = counts[cells].astype(np.int64)
        tables = np.stack([found, *drawn(found)])  # [1 + RESAMPLED, cells]
        rows, columns = cells // outputs, cells % outputs
        wanted, given = (_summed(tables, by=by, outputs=outputs) for by in (rows, columns))
        right = _summed(tables * (rows == columns), by=columns, outputs=outputs)
        count = round(right[0].sum())
        sides = (wanted, given, right)
        drawn_too = with_intervals(dict(macro_f1=macro_f1(*sides), matthews=matthews(*sides)))
        return dict(accuracy=count / total, accuracy_interval=wilson_interval(count, total)) | drawn_too

    def of_rows(self, predicted: torch.Tensor, targets: torch.Tensor, *, outputs: int) -> Metrics:
        """`metrics` of all rows, int64 `[rows]`: to these scores a row is its cell."""
        return self.metrics(self.sums(predicted, targets, outputs=outputs))


def _summed(tables: np.ndarray, *, by: np.ndarray, outputs: int) -> np.ndarray:
    """Columns `[tables, cells]` of the same number in `by` added up, `[tables, outputs]`."""
    order, found = np.argsort(by, kind="stable"), np.zeros((len(tables), outputs))
    present, starts = np.unique(by[order], return_index=True)
    found[:, present] = np.add.reduceat(tables[:, order], starts, axis=1)
    return found


def macro_f1(wanted: np.ndarray, given: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The mean F1 of the classes that are wanted or given, `[tables]`, from counts `[tables, classes]`."""
    either = wanted + given
    f1 = np.divide(2 * right, either, out=np.zeros_like(either), where=either > 0)
    return f1.sum(1) / np.maximum((either > 0).sum(1), 1)


def matthews(wanted: np.ndarray, given: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Matthews' correlation of several classes (Gorodkin 2004), arguments as of `macro_f1`; 0 where one side is always
    the same."""
    total = wanted.sum(1)
    together = right.sum(1) * total - (wanted * given).sum(1)
    square = (total**2 - (wanted**2).sum(1)) * (total**2 - (given**2).sum(1))
    return np.divide(together, np.sqrt(square), out=np.zeros_like(together), where=square > 0)


class _Summed:
    """Scores that follow from sums over rows. Subclasses say of what, and which have no interval of their own: they are
    bootstrapped where all rows are at hand."""

    def rows(self, predicted: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """fp64 `[rows that are asked for, k]`.

        Args:
            targets: `[rows, outputs]`, NaN where none is asked for.
        """
        raise NotImplementedError  # each kind of labels has its own

    def scores(self, tables: np.ndarray) -> dict[str, np.ndarray]:
        """Those without an interval of their own, `[n]`, of several sums `[n, k]`."""
        raise NotImplementedError  # each kind of labels has its own

    def points(self, sums: torch.Tensor) -> Metrics:
        """`scores` of one sum."""
        return {name: float(value) for name, (value,) in self.scores(sums.cpu().numpy()[None]).items()}

    def sums(self, predicted: torch.Tensor, targets: torch.Tensor, *, outputs: int) -> torch.Tensor:
        """fp64 `[k]`; arguments as of `rows`."""
        return self.rows(predicted, targets).sum(0)

    def of_rows(self, predicted: torch.Tensor, targets: torch.Tensor, *, outputs: int) -> Metrics:
        """`metrics` of all rows, `[rows, outputs]`, each with an interval."""
        rows = self.rows(predicted, targets)
        return self.metrics(rows.sum(0)) | bootstrap(self.scores, rows.numpy())


class MultiLabel(_Summed):
    """Any of several labels. Summed are, of each label, whether it is right, given and wanted; whether all labels of
    the row are right, and 1."""

    def predicted(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `[rows, outputs]` to 1.0 or 0.0 each: whether a label's probability is above 1/2."""
        return (logits > 0).float()

    def rows(self, predicted, targets):
        asked = ~targets.isnan().any(1)
        given, wanted = predicted[asked].double(), targets[asked].double()
        exact = (given == wanted).all(1, keepdim=True).double()
        return torch.cat([given * wanted, given, wanted, exact, torch.ones_like(exact)], dim=1)

    def scores(self, tables):
        """`micro_f1` and `macro_f1`, of all labels."""
        right, given, wanted = np.split(tables[:, :-2], 3, axis=1)  # [n, outputs] each
        either = given + wanted
        f1 = np.divide(2 * right, either, out=np.zeros_like(either), where=either > 0)
        return dict(micro_f1=2 * right.sum(1) / np.maximum(either.sum(1), 1), macro_f1=f1.mean(1))

    def metrics(self, sums):
        """`accuracy` (all labels of a row) with Wilson's interval, and `scores`."""
        exact, total = (round(value) for value in sums[-2:].tolist())
        return dict(accuracy=exact / total, accuracy_interval=wilson_interval(exact, total)) | self.points(sums)


class Regression(_Summed):
    """A score. Summed are 1, and of prediction p and score t: p, t, p², t², p t and (p - t)²."""

    def predicted(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `[rows, 1]` as they are, fp32."""
        return logits.float()

    def rows(self, predicted, targets):
        asked = ~targets.isnan()
        p, t = predicted[asked].double(), targets[asked].double()
        return torch.stack([torch.ones_like(p), p, t, p * p, t * t, p * t, (p - t) ** 2], dim=1)

    def scores(self, tables):
        """`rmse`."""
        return dict(rmse=np.sqrt(tables[:, 6] / tables[:, 0]))

    def metrics(self, sums):
        """`pearson` with the interval of Fisher's transformation, and `rmse`; NaN where they are not defined."""
        n, p, t, pp, tt, pt, _ = sums.tolist()
        spread = (pp - p * p / n, tt - t * t / n)
        defined = all(value > 1e-12 * square for value, square in zip(spread, (pp, tt), strict=True))
        pearson = (pt - p * t / n) / math.sqrt(spread[0] * spread[1]) if defined else math.nan
        pearson = max(-1.0, min(1.0, pearson)) if defined else pearson
        interval = dict(pearson_interval=fisher_interval(pearson, n)) if defined and n > 3 else {}
        return dict(pearson=pearson) | interval | self.points(sums)


SCORES = {SINGLE: SingleLabel(), MULTI: MultiLabel(), REGRESSION: Regression()}


def wilson_interval(correct: int, total: int, *, z: float = Z) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson 1927); unlike the normal one it stays within 0 and 1."""
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    center = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def fisher_interval(correlation: float, rows: float, *, z: float = Z) -> tuple[float, float]:
    """The 95 % confidence interval of a correlation (Fisher 1921), of more than three rows."""
    if abs(correlation) == 1:
        return correlation, correlation
    middle, half = math.atanh(correlation), z / math.sqrt(rows - 3)
    return math.tanh(middle - half), math.tanh(middle + half)
