"""Scores of a classifier: sums that any number of batches and processes add up to, and what follows from the sums.

Intervals are of 95 %. Definitions, also of what is 0/0, are those of scikit-learn.
"""

import math

import numpy as np
import torch

from fsdp_utils.data.batches import IGNORED
from fsdp_utils.data.labels import MULTI, REGRESSION, SINGLE

Z = 1.959964  # standard deviations of a normal distribution that hold 95 % of it
RESAMPLED, SEED = 1000, 0  # of bootstraps

Metrics = dict[str, float | tuple[float, float]]


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
        draws = np.random.default_rng(SEED).multinomial(total, counts[cells] / total, size=RESAMPLED)
        tables = np.vstack([counts[cells], draws])  # [1 + RESAMPLED, cells]
        rows, columns = cells // outputs, cells % outputs
        wanted, given = (_summed(tables, by=by, outputs=outputs) for by in (rows, columns))
        right = _summed(tables * (rows == columns), by=columns, outputs=outputs)
        count = round(right[0].sum())
        found = dict(accuracy=count / total, accuracy_interval=wilson_interval(count, total))
        for name, values in dict(
            macro_f1=macro_f1(wanted, given, right), matthews=matthews(wanted, given, right)
        ).items():
            low, high = np.quantile(values[1:], [0.025, 0.975])
            found |= {name: float(values[0]), f"{name}_interval": (float(low), float(high))}
        return found


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


class MultiLabel:
    """Any of several labels. The sums are, of each label, how often it was right, given and wanted; the rows of which
    all labels are right, and all rows."""

    def predicted(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `[rows, outputs]` to 1.0 or 0.0 each: whether a label's probability is above 1/2."""
        return (logits > 0).float()

    def sums(self, predicted: torch.Tensor, targets: torch.Tensor, *, outputs: int) -> torch.Tensor:
        """fp64 `[3 * outputs + 2]`.

        Args:
            targets: `[rows, outputs]`, NaN where none is asked for.
        """
        asked = ~targets.isnan().any(1)
        given, wanted = predicted[asked].double(), targets[asked].double()
        exact = (given == wanted).all(1).double().sum()
        rows = torch.full_like(exact, len(wanted))
        return torch.cat([(given * wanted).sum(0), given.sum(0), wanted.sum(0), torch.stack([exact, rows])])

    def metrics(self, sums: torch.Tensor) -> Metrics:
        """`accuracy` (all labels of a row) with Wilson's interval, `micro_f1` and `macro_f1`."""
        *counts, exact, total = sums.tolist()
        right, given, wanted = np.array(counts).reshape(3, -1)
        either = given + wanted
        f1 = np.divide(2 * right, either, out=np.zeros_like(either), where=either > 0)
        return dict(
            accuracy=exact / total,
            accuracy_interval=wilson_interval(round(exact), round(total)),
            micro_f1=float(2 * right.sum() / max(either.sum(), 1)),
            macro_f1=float(f1.mean()),
        )


class Regression:
    """A score. The sums are the number of rows, and of predictions p and scores t those of p, t, p², t², p t and
    (p - t)²."""

    def predicted(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `[rows, 1]` as they are, fp32."""
        return logits.float()

    def sums(self, predicted: torch.Tensor, targets: torch.Tensor, *, outputs: int) -> torch.Tensor:
        """fp64 `[7]`.

        Args:
            targets: `[rows, 1]`, NaN where none is asked for.
        """
        asked = ~targets.isnan()
        p, t = predicted[asked].double(), targets[asked].double()
        return torch.stack([torch.ones_like(p), p, t, p * p, t * t, p * t, (p - t) ** 2]).sum(1)

    def metrics(self, sums: torch.Tensor) -> Metrics:
        """`pearson` with the interval of Fisher's transformation, and `rmse`; NaN where they are not defined."""
        n, p, t, pp, tt, pt, squares = sums.tolist()
        spread = (pp - p * p / n, tt - t * t / n)
        defined = all(value > 1e-12 * square for value, square in zip(spread, (pp, tt), strict=True))
        pearson = (pt - p * t / n) / math.sqrt(spread[0] * spread[1]) if defined else math.nan
        pearson = max(-1.0, min(1.0, pearson)) if defined else pearson
        found = dict(pearson=pearson, rmse=math.sqrt(squares / n))
        return found | (dict(pearson_interval=fisher_interval(pearson, n)) if defined and n > 3 else {})


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
