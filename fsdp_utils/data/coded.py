"""Rows that are no text to go on with: a text and its label, or a source and its target."""

import itertools
import json
from collections.abc import Sequence

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fsdp_utils.core.errors import DataError, UserError, naming
from fsdp_utils.core.ranks import say
from fsdp_utils.data.files import Row
from fsdp_utils.data.labels import REGRESSION, BadLabel, Labels, find_labels, is_number, written
from fsdp_utils.data.layouts import LAYOUTS, BadRow, Form, Reading, is_learned
from fsdp_utils.data.sources import Examples

IDS = datasets.List(datasets.Value("int32"))
# what is known of each row beside its ids: see `data.tokens`
ABOUT = {
    "labelled": datasets.Value("int32"),
    "off": datasets.Value("bool"),
    "truncated": datasets.Value("bool"),
    "max_token_id": datasets.Value("int32"),
    "end": datasets.Value("int32"),
    "refused": datasets.Value("string"),
    "unread": datasets.Value("string"),
    "noted": datasets.Value("string"),
}
NONE = -1


def one_line(name: str) -> str:
    """A column's name as one line of text."""
    return " ".join(name.split()).encode(errors="replace").decode()


class _Ids:
    """Texts to ids with the tokenizer's own special tokens, as its model was pretrained on them."""

    def __init__(self, tokenizer, *, context_length: int):
        self.tokenizer, self.longest = tokenizer, context_length

    def __call__(self, texts: list, pairs: list | None = None) -> tuple[dict, list[bool]]:
        """The columns of each text, cut to the longest as the tokenizer would cut, and which were.

        Its own truncation of a text is quadratic in its length: it also makes all that is cut away into rows.
        """
        whole = self.tokenizer(*([texts] if pairs is None else [texts, pairs]), return_special_tokens_mask=True)
        special = whole.pop("special_tokens_mask")
        cut = [len(ids) > self.longest for ids in whole["input_ids"]]
        columns = {name: list(values) for name, values in whole.items()}
        for i in np.flatnonzero(cut):
            own = np.array(special[i], dtype=bool)
            alone = self.tokenizer(texts[i], add_special_tokens=False)["input_ids"]
            stays = staying(own, len(alone), longest=self.longest, left=self.tokenizer.truncation_side == "left")
            for values in columns.values():
                values[i] = np.array(values[i])[stays].tolist()
        return columns, cut


def staying(special: np.ndarray, first: int, *, longest: int, left: bool) -> np.ndarray:
    """Which tokens of a row stay when it is cut, bool `[tokens]`: the special ones that the tokenizer has added, and of
    the longer of its two texts as much as is left, until both are as long (transformers' `longest_first`).

    Args:
        special: which the tokenizer has added, bool `[tokens]`.
        first: tokens of the first text.
        longest: tokens of a row.
        left: whether a text loses its beginning, not its end.
    """
    place = np.cumsum(~special) - 1  # of a token among those of both texts
    second = len(special) - special.sum() - first
    room = max(longest - special.sum(), 0)
    shorter = min(first, second, room // 2)
    shares = (room - shorter, shorter) if first > second else (shorter, room - shorter)
    in_first = place < first
    within, size = np.where(in_first, place, place - first), np.where(in_first, first, second)
    return special | ((size - 1 - within if left else within) < np.where(in_first, *shares))


class _Coder:
    """Rows of one kind as a table. Subclasses say which texts and labels a row has, and what is stored of them."""

    task = ""
    features: datasets.Features

    def __init__(self, tokenizer, *, reading: Reading, source: str, context_length: int):
        self.ids, self.tokenizer, self.source = _Ids(tokenizer, context_length=context_length), tokenizer, source
        self.reading = reading

    def check(self, examples: Examples) -> None:
        """Raises DataError for rows of another kind."""
        for part in examples.parts:
            if self.task not in LAYOUTS[part.form.layout].tasks:
                wanted = "; ".join(
                    ", ".join(filter(None, (*row.columns, row.label)))
                    for row in LAYOUTS.values()
                    if self.task in row.tasks
                )
                raise DataError(
                    f"{part.rows.name}: rows of {part.form.layout} are not for --task {self.task}, which takes {wanted}"
                )

    def table(self, rows: Sequence[tuple[Row, Form]]) -> pa.Table:
        """The columns of `features`."""
        read, about = [], []
        for row, form in rows:
            told = dict(labelled=0, off=False, truncated=False, max_token_id=NONE, end=NONE)
            told |= dict(refused="", unread="", noted="")
            try:
                if row.problem:
                    raise BadRow(row.problem)
                told["unread"] = "\n".join(map(one_line, form.unread(row.value)))
                values = self.read(row.value, form)
                told["off"] = not is_learned(form.named(row.value))
                told["labelled"] = int(not told["off"])
            except BadRow as error:
                told["refused"], values = f"{row.where}: {error}", None
            read.append(values)
            about.append(told)
        columns = self.encode([values for values in read if values is not None])
        count = itertools.count()
        return self._table(columns, about, [None if values is None else next(count) for values in read])

    def _table(self, columns: dict, about: list[dict], places: list[int | None]) -> pa.Table:
        for told, place in zip(about, places, strict=True):
            if place is not None:
                told["truncated"] = bool(columns["truncated"][place])
                told["max_token_id"] = max(max(columns[name][place], default=NONE) for name in self.ids_columns)
                told["labelled"] *= columns["labelled"][place]
        schema = self.features.arrow_schema
        empty = {"label": ""}
        arrays = {
            field.name: pa.array(
                [about[i][field.name] for i in range(len(about))]
                if field.name in ABOUT
                else [empty.get(field.name, []) if p is None else columns[field.name][p] for p in places],
                type=field.type,
            )
            for field in schema
        }
        return pa.table(arrays, schema=schema)

    def lengths(self, table) -> np.ndarray:
        """Tokens of each row, int64 `[rows]`."""
        return sum(pc.list_value_length(table.column(name)).to_numpy().astype(np.int64) for name in self.ids_columns)

    @staticmethod
    def refuse_empty(**fields: str) -> None:
        """Raises BadRow for a field that says nothing."""
        for name, text in fields.items():
            if not text.strip():
                raise BadRow(f"field {name!r} is empty")

    def notes(self, examples: Examples) -> tuple[str, ...]:
        """What else is to be known of the rows."""
        return ()


class LabelledRows(_Coder):
    """Columns `text` (and `text_pair`) with `label`, or with `score`."""

    task = "sequence_classification"
    ids_columns = ("input_ids",)
    features = datasets.Features({"input_ids": IDS, "token_type_ids": IDS, "label": datasets.Value("string"), **ABOUT})

    def check(self, examples):
        super().check(examples)
        columns = {LAYOUTS[part.form.layout].label: part.rows.name for part in examples.parts}
        if len(columns) > 1:
            (one, first), (other, second) = columns.items()
            raise DataError(f"{first} has the column {one}, and {second} {other}; give sources that have the same")

    def read(self, row: dict, form: Form) -> tuple[str, str, str]:
        """Text, second text, and label as `written`."""
        picked = form.fields(row)
        self.refuse_empty(text=picked["text"])
        return picked["text"], picked["text_pair"], written(form.named(row), LAYOUTS[form.layout].label)

    def encode(self, read: list) -> dict:
        texts, pairs, labels = ([row[i] for row in read] for i in range(3))
        paired = any(pairs)
        columns, cut = self.ids(texts, pairs if paired else None) if read else ({"input_ids": []}, [])
        types = columns.get("token_type_ids") if paired else None
        told = dict(input_ids=columns["input_ids"], truncated=cut, labelled=[1] * len(read), label=labels)
        return told | dict(token_type_ids=types or [[]] * len(read))

    def finished(self, kept, rows: np.ndarray, examples: Examples, *, labels: Labels | None):
        """`input_ids`, `labels` and, where texts are pairs, `token_type_ids` of the samples; and the labels.

        Args:
            rows: number of each sample among the rows.
            labels: those that are known already, from training or of a head.

        Raises:
            DataError: naming the row whose label does not fit.
        """
        stored = list(kept["label"])
        scored = LAYOUTS[examples.parts[0].form.layout].label == "score"
        if labels and (labels.problem == REGRESSION) != scored:
            given = "scores" if scored else "labels"
            raise DataError(f"--dataset {self.source}: has {given}, and what is learned is {labels}; give others")
        numbered = any(label[0] != "[" and is_number(json.loads(label)) for label in set(stored))
        if labels and labels.has_words and numbered:
            mapped = ", ".join(f"{i} = {name}" for i, name in enumerate(labels.names[:8]))
            say(f"note: --dataset {self.source}: its labels are numbers, and the head has names: {mapped}")
        try:
            with naming(f"--dataset {self.source}:"):
                labels = labels or find_labels(dict.fromkeys(stored), scored=scored)
            numbers = {label: labels.numbers(label) for label in dict.fromkeys(stored)}
        except (BadLabel, TypeError, ValueError) as error:
            raise self._refused(error, stored, rows, examples) from None
        types = ["token_type_ids"] if any(len(t) for t in kept["token_type_ids"]) else []
        feature = datasets.List(datasets.Value(labels.dtype))
        found = kept.add_column("labels", [numbers[label] for label in stored], feature=feature)
        return found.select_columns(["input_ids", "labels", *types]).with_format("numpy"), labels

    def _refused(self, error: Exception, stored: list, rows, examples: Examples) -> Exception:
        label = getattr(error, "label", None)
        if label is None:
            return error if isinstance(error, UserError) else DataError(f"--dataset {self.source}: {error}")
        ((row, _),) = examples.read([int(rows[stored.index(label)])])
        return DataError(f"{row.where}: {error}; correct the row")


class EndPooledRows(LabelledRows):
    """Of a model that classifies by what it makes of the end-of-sequence token, of which transformers wants as many in
    every row: BART, T5 and their like."""

    def read(self, row, form):
        text, pair, label = super().read(row, form)
        end = self.tokenizer.eos_token
        for name, given in dict(text=text, text_pair=pair).items():
            if end and end in given:
                raise BadRow(f"field {name!r} holds {end}, the token by which this model classifies")
        return text, pair, label


class SourceTargetRows(_Coder):
    """Columns `source` and `target`, or a question and its answer."""

    task = "seq2seq_lm"
    ids_columns = ("input_ids", "labels")
    features = datasets.Features({"input_ids": IDS, "labels": IDS, **ABOUT})

    def read(self, row: dict, form: Form) -> tuple[str, str]:
        picked = form.fields(row)
        source, target = form.split(picked)
        self.refuse_empty(source=source, **{LAYOUTS[form.layout].answer: target})
        return source, target

    def encode(self, read: list) -> dict:
        sources, targets = ([row[i] for row in read] for i in range(2))
        if not read:
            return dict(input_ids=[], labels=[], truncated=[], labelled=[])
        given, cut = self.ids(sources)
        wanted, shortened = self.ids(targets) if self._alike else self._targets(targets)
        labels = wanted["input_ids"]
        truncated = [one or other for one, other in zip(cut, shortened, strict=True)]
        return dict(input_ids=given["input_ids"], labels=labels, truncated=truncated, labelled=list(map(len, labels)))

    @property
    def _alike(self) -> bool:
        """Whether sources and targets are tokenized alike: some translate between two vocabularies."""
        return not hasattr(self.tokenizer, "_switch_to_target_mode")

    def _targets(self, texts: list) -> tuple[dict, list[bool]]:
        self.tokenizer._switch_to_target_mode()
        try:
            return self.ids(texts)
        finally:
            self.tokenizer._switch_to_input_mode()

    def finished(self, kept, rows, examples, *, labels):
        return kept.select_columns(["input_ids", "labels"]).with_format("numpy"), None
