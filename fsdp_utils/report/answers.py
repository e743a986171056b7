"""What evaluate.py wrote, as samples beside one another."""

import json
from contextlib import suppress
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.folders import METRICS_FILE
from fsdp_utils.report.runs import Run

SHOWN = 12


class Evaluation(NamedTuple):
    """One output file of evaluate.py; `answers`: its rows by question."""

    name: str
    score: str
    answers: dict[str, dict]

    @classmethod
    def read(cls, path: str | Path, *, name: str = "") -> "Evaluation":
        """Raises UserError: it is none."""
        try:
            found = json.loads(Path(path).read_text())
            low, high = found["interval_95"]
            score = f"{found['score']:.3g} (95 % interval {low:.3g} to {high:.3g}), {found['total']} questions"
            answers = {row["question"]: row for row in found["results"]}
            return cls(name or Path(found["settings"]["model"]).name, score, answers)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); name a file that evaluate.py wrote") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: is no output file of evaluate.py; name one") from None


def evaluations_of(runs: list[Run], named: list[str]) -> list[Evaluation]:
    """The named files, or those that lie in the runs' folders as `evaluation*.json` and are newer than the run.

    Raises:
        UserError: a named one is none.
    """
    if named:
        return [Evaluation.read(path) for path in named]
    newer = lambda run, path: path.stat().st_mtime >= (run.folder / METRICS_FILE).stat().st_mtime
    found = []
    for run in runs:
        for path in sorted(run.folder.glob("evaluation*.json")):
            with suppress(UserError):  # somebody else's file of that name
                found += [Evaluation.read(path, name=run.name)] if newer(run, path) else []
    return found


def samples(evaluations: list[Evaluation]) -> list[str]:
    """Questions to show: in turn one that all answer rightly, that only the first does, and so on."""
    groups: dict[tuple, list[str]] = {}
    for question in evaluations[0].answers:
        verdicts = tuple(bool(e.answers.get(question, {}).get("correct")) for e in evaluations)
        groups.setdefault(verdicts, []).append(question)
    in_turn = chain.from_iterable(zip_longest(*groups.values()))
    return [question for question in in_turn if question is not None][:SHOWN]
