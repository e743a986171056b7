"""Labels: what rows are classified as, and the numbers that a loss and a head have for it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from fsdp_utils.core.errors import UserError
from fsdp_utils.data.layouts import BadRow

# transformers' words, which config.json has
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PREFIX = "LABEL_"  # transformers' names of classes that have only a number


class BadLabel(BadRow):
    """A label that does not fit the others. `label`: as `written`."""

    def __init__(self, message: str, label: str):
        super().__init__(message)
        self.label = label


@dataclass(frozen=True)
class Labels:
    """What a head tells apart.

    Args:
        problem: SINGLE, MULTI or REGRESSION.
        names: of the classes in their order; none of a regression.
    """

    problem: str
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.problem == REGRESSION:
            return "a score"
        shown = ", ".join(self.names[:8]) + (", …" if len(self.names) > 8 else "")
        return f"{len(self.names)} {'labels, any of them' if self.problem == MULTI else 'classes'}: {shown}"

    @property
    def outputs(self) -> int:
        """How many numbers the head gives for a row."""
        return len(self.names) or 1

    @property
    def by_chance(self) -> float:
        """The perplexity of who knows nothing."""
        return 2.0 if self.problem == MULTI else float(self.outputs)

    @property
    def dtype(self) -> str:
        """Of `numbers`, as pyarrow and NumPy call it."""
        return "int32" if self.problem == SINGLE else "float32"

    def numbers(self, label: str) -> list:
        """What the loss is given for a label as `written`: the number of a class; 0.0 or 1.0 of each class;
        or the score.

        Raises:
            BadLabel: it is none of these.
        """
        value = json.loads(label)
        if self.problem == REGRESSION:
            return [float(value)]
        if isinstance(value, list) != (self.problem == MULTI):
            known = "lists of labels" if self.problem == MULTI else "one label a row"
            raise BadLabel(f"label {value!r}: what is learned has {known}", label)
        if self.problem == SINGLE:
            return [self._number(value, label)]
        holds = {self._number(one, label) for one in value}
        return [float(number in holds) for number in range(len(self.names))]

    def named(self, numbers) -> str | list[str] | float:
        """What `numbers` are called: the name of a class, the names of those that hold, or a score."""
        if self.problem == SINGLE:
            return self.names[int(numbers[0])]
        if self.problem == MULTI:
            return [name for name, holds in zip(self.names, numbers, strict=True) if holds]
        return float(f"{float(numbers[0]):.7g}")  # kept in fp32: 4.1 is 4.1, not 4.099999904632568

    def _number(self, value, label: str) -> int:
        if str(value) in self.names:
            return self.names.index(str(value))
        if is_number(value) and f"{PREFIX}{value}" in self.names:
            return self.names.index(f"{PREFIX}{value}")
        if is_number(value) and self.has_words and 0 <= int(value) < len(self.names):
            return int(value)
        raise BadLabel(f"label {value!r} is not known; there are {', '.join(self.names)}", label)

    @property
    def has_words(self) -> bool:
        """Whether classes have names that are no numbers."""
        return not any(is_number(name.removeprefix(PREFIX)) for name in self.names)

    def config(self) -> dict:
        """What config.json says of it."""
        names = self.names or (f"{PREFIX}0",)
        return dict(
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)},
            problem_type=self.problem,
        )

    @classmethod
    def of(cls, model_config) -> "Labels":
        """Those of a model that has a head."""
        names = tuple(name for _, name in sorted(model_config.id2label.items(), key=lambda pair: int(pair[0])))
        problem = model_config.problem_type or (SINGLE if len(names) > 1 else REGRESSION)
        return cls(problem, () if problem == REGRESSION else names)


def written(row: dict, column: str) -> str:
    """The label of a raw row as JSON: a whole number, a name, a list of these, or of a `score` a number.

    Raises:
        BadRow: it is missing, or something else.
    """
    value = row.get(column)
    if value is None or value == "":
        raise BadRow(f"field {column!r} is missing or null")
    if column == "score":
        return json.dumps(_score(value))
    if isinstance(value, list):
        if len(value) > len(set(map(str, value))) and {0, 1}.issuperset(map(_class, value)):
            raise BadRow(f"label {value!r} says 0 or 1 of every label; list those that hold, by number or name")
        return json.dumps(sorted({_class(one) for one in value}, key=lambda one: (isinstance(one, str), one)))
    return json.dumps(_class(value))


def _score(value) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise BadRow(f"score {value!r} is no number") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise BadRow(f"score {value!r} is no number that can be learned")
    return number


def _class(value) -> int | str:
    if isinstance(value, (bool, int)):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, float):
        raise BadRow(f"label {value!r} is no class; a number that is to be predicted goes into the column score")
    raise BadRow(f"label {value!r} is neither a number nor a name")


def is_number(value: int | str) -> bool:
    """Whether a class is a number; in a table of text that is text. With zeros before it, it is a name."""
    digits = str(value).removeprefix("-")
    return digits.isdecimal() and str(int(digits)) == digits


def find_labels(found: Iterable[str], *, scored: bool) -> Labels:
    """The labels of a data set, from the different ones of its rows as `written`.

    Raises:
        BadLabel: names beside numbers, lists beside single ones, names that are hardly two, or a number below zero.
        UserError: the same label, or list, in all rows.
    """
    if scored:
        return Labels(REGRESSION)
    values = {label: json.loads(label) for label in found}
    lists = {label for label, value in values.items() if isinstance(value, list)}
    if lists and len(lists) < len(values):
        rarer = min(lists, values.keys() - lists, key=len)
        raise BadLabel("some labels are lists and others are not", min(rarer))
    classes = {one: label for label, value in values.items() for one in (value if label in lists else [value])}
    numbers, names = ({c: label for c, label in classes.items() if is_number(c) is n} for n in (True, False))
    if names and any(isinstance(c, int) for c in numbers):
        label = min((numbers, names), key=len).popitem()[1]
        raise BadLabel("labels are numbers in some rows and names in others", label)
    _refuse_twins(names)
    if below := [c for c in numbers if not names and int(c) < 0]:
        said = f"label {below[0]}: in many sets it stands for a row without label; leave such rows out"
        raise BadLabel(said, numbers[below[0]])
    order = sorted({int(c) for c in numbers}) if not names else sorted(map(str, classes))
    if len(values) < 2:
        raise UserError(f"all rows have the label {next(iter(values.values()))!r}; there is nothing to tell apart")
    counted = not names and order == list(range(len(order)))
    return Labels(MULTI if lists else SINGLE, tuple(f"{PREFIX}{c}" if counted else str(c) for c in order))


def _refuse_twins(names: dict[str, str]) -> None:
    """Raises BadLabel for two names that differ in case or white space alone: they would be two classes.

    Args:
        names: of classes, with the label as `written` that each is in.
    """
    first: dict[str, str] = {}
    for name, label in names.items():
        other = first.setdefault(" ".join(name.casefold().split()), name)
        if other != name:
            said = f"label {name!r} is {other!r} in another row, and case or white space makes no other class"
            raise BadLabel(f"{said} (if two are meant, rename one)", label)
