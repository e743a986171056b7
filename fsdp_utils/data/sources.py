"""Sources: a name, a file, a folder, a set of the hub, or several with weights, become raw rows with their form."""

import bisect
import difflib
import glob
import hashlib
import math
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset

from fsdp_utils.core.errors import DataError
from fsdp_utils.core.folders import HUB_NAME
from fsdp_utils.data.files import (
    SUFFIXES,
    Records,
    Row,
    Table,
    cache_folder,
    is_data_file,
    is_saved_dataset,
    one_line,
    read_file,
    read_saved,
    suffixes,
)
from fsdp_utils.data.layouts import BadRow, Form, Reading, find_form, has_value, with_template

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLED = 100  # rows whose columns say how a source is read
TRAIN = "train"


# ---------------------------------------------------------------------------------------------------------------------
# Rows with their forms
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Some rows of one source, in order.

    Args:
        rows: of `data.files`: `read`, `name`, `digest`.
        form: how they are read.
        indices: which of them.
    """

    rows: object
    form: Form
    indices: Sequence[int]


@dataclass(frozen=True)
class Examples:
    """Raw rows of one source, or of several one after the other.

    Args:
        parts: what they are made of.
        name: the value of the flag that named them.
        taken: of a mixture, how many rows are of which source.
    """

    parts: tuple[Part, ...]
    name: str
    taken: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(len(part.indices) for part in self.parts)

    def read(self, indices: Sequence[int]) -> list[tuple[Row, Form]]:
        """The rows at these places, and how each is read."""
        starts, found = np.cumsum([0, *(len(part.indices) for part in self.parts)]).tolist(), []
        for which, places in _runs(indices, starts):
            part = self.parts[which]
            rows = part.rows.read([int(part.indices[i]) for i in places])
            found += [(row, part.form) for row in rows]
        return found

    def __iter__(self) -> Iterator[tuple[Row, Form]]:
        for start in range(0, len(self), 1000):
            yield from self.read(range(start, min(start + 1000, len(self))))

    def select(self, indices: Sequence[int]) -> "Examples":
        """Those at these places, which are in rising order."""
        starts = np.cumsum([0, *(len(part.indices) for part in self.parts)]).tolist()
        parts = [
            replace(self.parts[which], indices=[self.parts[which].indices[i] for i in places])
            for which, places in _runs(indices, starts)
        ]
        return replace(self, parts=tuple(parts))

    @property
    def chats(self) -> bool:
        """Whether some of them are chats."""
        return any(part.form.layout == "messages" for part in self.parts)

    def first(self, count: int) -> "Examples":
        return self if count >= len(self) else self.select(range(count))

    @property
    def digest(self) -> str:
        """Tells these rows, as they are read, from others."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(f"{part.rows.name} {part.rows.digest} {part.form}".encode())
            digest.update(np.asarray(part.indices, dtype=np.int64).tobytes())
        return digest.hexdigest()


def _runs(indices: Sequence[int], starts: list[int]) -> list[tuple[int, list[int]]]:
    """Neighbouring indices of the same part: which part, and their places in it."""
    found: list[tuple[int, list[int]]] = []
    for i in indices:
        which = bisect.bisect_right(starts, i) - 1
        if not found or found[-1][0] != which:
            found.append((which, []))
        found[-1][1].append(i - starts[which])
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Sets with a name
# ---------------------------------------------------------------------------------------------------------------------


def _hub(path: str, *, split: str = TRAIN, name: str | None = None) -> Dataset:
    """A split from the hub or its local cache."""
    try:
        return datasets.load_dataset(path, name, split=split)
    except Exception as error:  # no network, no such name, no access, a broken cache: each has its own type
        cache_folder()  # which may be what failed
        raise DataError(
            f"--dataset: {path} is neither in the cache nor can it be loaded ({one_line(error)}); "
            "connect to the hub, or give a local file"
        ) from error


ORCA_MATH = "microsoft/orca-math-word-problems-200k"
ORCA_HELD_OUT = 5_000  # the last rows after the shuffle are for validation and are never trained on


def _orca_math(config) -> Dataset:
    shuffled = _hub(ORCA_MATH).shuffle(seed=42)
    return shuffled.select(range(len(shuffled) - ORCA_HELD_OUT))


def _orca_math_validation() -> Dataset:
    shuffled = _hub(ORCA_MATH).shuffle(seed=42)
    return shuffled.select(range(len(shuffled) - ORCA_HELD_OUT, len(shuffled)))


def _sql(config) -> Dataset:
    shuffled = _hub("knowrohit07/know_sql", split="validation").shuffle(seed=config.seed)
    return shuffled.select(range(1000, len(shuffled)))


def _dummy(config):
    row = {"instruction": "instruction", "input": "", "output": "output" * 10_000}
    return Records([row] * config.dataset_samples, name="dummy", digest="dummy")


def _demo(name: str):
    path = REPOSITORY / "demo" / f"{name}.jsonl"
    if not path.exists():
        raise DataError(f"--dataset demo: {path} is missing; make it with `python scripts/make_demo.py`")
    return read_file(path, name=str(path))


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset with a name.

    Args:
        layout: key of LAYOUTS.
        train: config -> rows to train on.
        validation: () -> rows never trained on.
        capped: `dataset_samples` applies even where the user did not give it.
    """

    layout: str
    train: Callable[..., object]
    validation: Callable[[], object] | None = None
    capped: bool = False


DATASETS = {
    "alpaca": DatasetSpec("alpaca", lambda config: _hub("yahma/alpaca-cleaned")),
    "alpaca_sample": DatasetSpec("alpaca", lambda config: _hub("yahma/alpaca-cleaned"), capped=True),
    "guanaco": DatasetSpec("guanaco", lambda config: _hub("timdettmers/openassistant-guanaco")),
    "sql": DatasetSpec("sql", _sql),
    "orca_math": DatasetSpec("question", _orca_math, _orca_math_validation, capped=True),
    "dummy": DatasetSpec("alpaca", _dummy, capped=True),
    "demo": DatasetSpec("question", lambda config: _demo("train"), lambda: _demo("validation")),
}


def _named(name: str, rows, reading: Reading) -> Examples:
    """The rows of a set with a name."""
    if isinstance(rows, Dataset):
        rows = Table(rows, name=name, digest=rows._fingerprint)
    form = Form(DATASETS[name].layout, checked=False)
    columns = {key for row in rows.read(range(min(1, len(rows)))) for key in row.value}
    form = with_template(form, reading, columns=columns, source=name)
    return Examples((Part(rows, form, range(len(rows))),), name)


# ---------------------------------------------------------------------------------------------------------------------
# Anything else
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where rows are taken from, beside the name: some of the flags of a program.

    Args:
        dataset_split: of a set or folder that has several.
        dataset_config: of a set of the hub that has several configurations.
        sole: whether the only split of a set is taken, whatever it is called.
    """

    dataset_split: str = TRAIN
    dataset_config: str | None = None
    sole: bool = False

    @classmethod
    def of(cls, config) -> "Place":
        names = ("dataset_split", "dataset_config")
        return cls(**{name: getattr(config, name) for name in names if hasattr(config, name)})

    def choose(self, splits: Sequence[str], *, source: str) -> str:
        """The split to take of these.

        Raises:
            DataError: there is no such one.
        """
        if self.dataset_split in splits:
            return self.dataset_split
        if self.sole and len(splits) == 1:
            return splits[0]
        raise DataError(
            f"{source}: has no split {self.dataset_split!r}, but {', '.join(map(str, splits))}; "
            "name one by --dataset_split"
        )


def check_name(name: str, *, flag: str = "dataset") -> None:
    """Raises DataError where `name` can be none of the things that a dataset is named by."""
    for part, _ in _sources(name, flag=flag):
        known = part in DATASETS or Path(part).exists() or glob.has_magic(part) or HUB_NAME.fullmatch(part)
        if not known and not is_data_file(part) and os.sep not in part and not suffixes(part)[0]:
            near = difflib.get_close_matches(part, DATASETS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise DataError(
                f"--{flag} {part}: {hint}give one of {', '.join(DATASETS)}, a name of the hub (org/name), "
                "or a local file or folder"
            )


def _sources(text: str, *, flag: str) -> list[tuple[str, float | None]]:
    """The sources of `a.jsonl:0.7,org/b:0.3`, with their weights.

    Raises:
        DataError: some have a weight and some have none, or one is no number above zero.
    """
    if text in DATASETS or Path(text).exists():
        return [(text, None)]
    found = [_weighted(part.strip(), named=f"--{flag} {text}") for part in text.split(",")]
    weights = [weight for _, weight in found]
    if len(found) == 1:
        if weights[0] is not None:
            raise DataError(f"--{flag} {text}: a weight has a meaning beside other sources only; leave it away")
        return found
    if None in weights and any(weight is not None for weight in weights):
        raise DataError(f"--{flag} {text}: give every source a weight, or none")
    return found


def places_of(text: str | None) -> list[str]:
    """The files and folders that a value of --dataset or --eval_dataset names, and what may be one."""
    names = [name for name, _ in _sources(text, flag="dataset")] if text else []
    return [place for name in names for place in (glob.glob(name, recursive=True) or [name])]


def _weighted(part: str, *, named: str) -> tuple[str, float | None]:
    """A source and its weight, as in `a.jsonl:0.7`."""
    name, colon, said = part.rpartition(":")
    if not part or (colon and not name):
        raise DataError(f"{named}: an empty source; write name:weight,name:weight")
    if not colon or Path(part).exists():
        return part, None
    try:
        weight = float(said)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise DataError(
            f"{named}: the weight {said!r} of {name} is no number above 0; leave the source away, or correct it"
        )
    return name, weight


def open_source(name: str, *, place: Place, reading: Reading, flag: str = "dataset") -> Examples:
    """The rows of one file, folder, glob or set of the hub.

    Raises:
        DataError: missing, unreadable, empty, or of unknown columns.
    """
    if Path(name).is_dir():
        found = _folder(Path(name), place=place)
    elif Path(name).exists() or not (glob.has_magic(name) or _is_hub_name(name)):
        found = [_file(Path(name), flag=flag)]
    elif glob.has_magic(name):
        found = [_file(Path(path), flag=flag) for path in sorted(glob.glob(name, recursive=True))]
        if not found:
            raise DataError(f"--{flag} {name}: no file is called so; check the pattern")
    else:
        found = [_from_hub(name, place=place)]
    parts = [Part(rows, _form_of(rows, reading), range(len(rows))) for rows in found]
    _refuse_doubles(parts, named=f"--{flag} {name}")
    return Examples(tuple(parts), name)


def _refuse_doubles(parts: Sequence[Part], *, named: str) -> None:
    """Raises DataError where two parts are the same rows."""
    known = {}
    for part in parts:
        if part.rows.digest in known:
            both = f"{known[part.rows.digest]} and {part.rows.name}"
            raise DataError(f"{named}: holds the same rows twice, as {both}; each can be taken once an epoch")
        known[part.rows.digest] = part.rows.name


def _is_hub_name(name: str) -> bool:
    return bool(HUB_NAME.fullmatch(name)) and not is_data_file(name) and not name.startswith(".")


def _form_of(rows, reading: Reading) -> Form:
    """How rows are read: by the columns of the first."""
    columns, first = {}, rows.read(range(min(SAMPLED, len(rows))))
    for row in first:
        for name, value in (row.value or {}).items():  # the first that says something: others may be null
            columns[name] = columns[name] if has_value(columns.get(name)) else value
    if not columns and first[0].problem:
        raise DataError(f"{first[0].where}: {first[0].problem}; correct the file")
    return find_form(columns, reading, source=rows.name)


def _file(path: Path, *, flag: str):
    if not path.exists():
        raise DataError(
            f"--{flag} {path}: no such file or folder; check the path, or give one of {', '.join(DATASETS)}"
        )
    return read_file(path.absolute(), name=str(path))


def _folder(folder: Path, *, place: Place) -> list:
    """What a folder holds: what `save_to_disk` wrote, or the files of a split, as of a clone of a set of the hub."""
    if is_saved_dataset(folder):
        return [read_saved(folder, choose=lambda splits: place.choose(splits, source=str(folder)))]
    there = sorted(path for path in folder.rglob("*") if is_data_file(path) and not _is_hidden(path, folder))
    if not there:
        raise DataError(f"{folder}: holds no data; give a folder of {SUFFIXES}, or one that save_to_disk wrote")
    try:
        builder = datasets.load_dataset_builder(str(folder), place.dataset_config)
    except Exception as error:  # pyarrow, YAML and datasets raise many types for what they cannot read
        cache_folder()  # which may be what failed
        way_out = "name one by --dataset_config" if "onfig" in type(error).__name__ + str(error) else "name its files"
        raise DataError(f"{folder}: cannot be read as a dataset ({one_line(error)}); {way_out}") from None
    splits = {str(split): [Path(path) for path in files] for split, files in builder.config.data_files.items()}
    read = {path.resolve() for files in splits.values() for path in files}
    left = [path for path in there if path.resolve() not in read]
    if left and place.dataset_config is None and len(builder.builder_configs) < 2:
        raise DataError(f"{left[0]} (of {len(left)}): belongs to no split of {folder}; name the files by a pattern")
    chosen = place.choose(list(splits), source=str(folder))
    return [read_file(path, name=str(path)) for path in sorted(splits[chosen])]


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)


def _from_hub(name: str, *, place: Place) -> Table:
    split = place.dataset_split
    if place.sole:
        try:
            splits = datasets.get_dataset_split_names(name, place.dataset_config)
        except Exception:  # as many types as of `_hub`, which says what is wrong
            splits = [split]
        split = place.choose(splits, source=name)
    loaded = _hub(name, split=split, name=place.dataset_config)
    return Table(loaded, name=name, digest=loaded._fingerprint)


# ---------------------------------------------------------------------------------------------------------------------
# What a run is given
# ---------------------------------------------------------------------------------------------------------------------


def load_examples(config) -> Examples:
    """The raw rows to train on, capped to `config.dataset_samples` where that applies.

    Raises:
        DataError: unknown name, file missing, malformed, empty or of unknown columns, hub not reachable.
    """
    return divide(config)[0]


def first_columns(config) -> set[str]:
    """The columns of the first rows of what a user brings, under the names that --columns gives them; none of sets with
    a name, or where rows cannot be read so."""
    if config.dataset in DATASETS:
        return set()
    try:
        examples = load_examples(config)
    except DataError:
        return set()
    rows = [(row, form) for row, form in examples.first(SAMPLED) if not row.problem]
    return {name for row, form in rows for name, value in form.named(row.value).items() if has_value(value)}


def divide(config) -> tuple[Examples, Examples]:
    """The raw rows to train on, as `load_examples`, and those of the same sources that are left unused."""
    check_name(config.dataset)
    reading, place = Reading.of(config), Place.of(config)
    spec, limit = DATASETS.get(config.dataset), config.dataset_samples
    capped = (spec and spec.capped) or "dataset_samples" in config.explicit_flags
    sources = _sources(config.dataset, flag="dataset")
    found = [_opened(name, config, place=place, reading=reading) for name, _ in sources]
    check_columns_found(found, reading)
    if len(found) == 1:
        (examples,) = found
        border = min(limit, len(examples)) if capped else len(examples)
        return examples.first(border), examples.select(range(border, len(examples)))
    weights = [weight for _, weight in sources]
    return _mixed(found, weights, limit=limit if capped else None, seed=config.seed, name=config.dataset)


def _opened(name: str, config, *, place: Place, reading: Reading) -> Examples:
    spec = DATASETS.get(name)
    return _named(name, spec.train(config), reading) if spec else open_source(name, place=place, reading=reading)


def check_columns_found(found: list[Examples], reading: Reading) -> None:
    """Raises DataError where --columns names what no source has: it would have no effect."""
    used = {name for examples in found for part in examples.parts for name in part.form.paths}
    for name, path in reading.paths.items():
        if name not in used:
            where = ", ".join(examples.name for examples in found)
            has_none = f"{where} has no column {path!r}, or no field {name!r} that it would fill"
            raise DataError(f"--columns {name}={path}: has no effect: {has_none}")


def _mixed(
    found: list[Examples], weights: list, *, limit: int | None, seed: int, name: str
) -> tuple[Examples, Examples]:
    """Several sources as one: as many rows as the weights allow without taking one twice, drawn at random; and those
    that were not drawn."""
    _refuse_doubles([part for examples in found for part in examples.parts], named=f"--dataset {name}")
    sizes = [len(examples) for examples in found]
    shares = np.array(sizes if weights[0] is None else weights, dtype=np.float64)
    shares /= shares.sum()
    total = min(size / share for size, share in zip(sizes, shares, strict=True))
    total = min(total, limit) if limit else total
    chosen, left, taken = [], [], []
    for number, (examples, count) in enumerate(zip(found, _counts(total, shares), strict=True)):
        if not count:
            raise DataError(f"--dataset {name}: takes no row of {examples.name}; raise its weight, or leave it away")
        if count < len(examples):
            drawn = np.random.default_rng([seed, number]).permutation(len(examples))
            chosen += examples.select(np.sort(drawn[:count]).tolist()).parts
            left += examples.select(np.sort(drawn[count:]).tolist()).parts
        else:
            chosen += examples.parts
        taken.append(f"{count:,} of {len(examples):,} rows of {examples.name}")
    return Examples(tuple(chosen), name, tuple(taken)), Examples(tuple(left), name)


def _counts(total: float, shares: np.ndarray) -> list[int]:
    """Whole numbers in these shares, of `total` together: largest remainders."""
    exact = total * shares
    counts = np.floor(exact + 1e-9).astype(int)
    left = int(total + 1e-9) - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[: max(left, 0)]] += 1
    return counts.tolist()


def held_out_rows(name: str, *, place: Place, reading: Reading, flag: str = "dataset") -> Examples:
    """The raw rows of a dataset's validation set, or of a local file or folder.

    Raises:
        DataError: as `load_examples`; no validation set.
    """
    check_name(name, flag=flag)
    spec = DATASETS.get(name)
    if spec and not spec.validation:
        having = ", ".join(key for key, value in DATASETS.items() if value.validation)
        raise DataError(f"--{flag} {name}: has no validation set; give one of {having}, or a local file")
    if spec:
        return _named(name, spec.validation(), reading)
    (source, *others) = [source for source, _ in _sources(name, flag=flag)]
    if others:
        raise DataError(f"--{flag} {name}: names several sources; give one")
    return open_source(source, place=place, reading=reading, flag=flag)


@dataclass(frozen=True)
class Question:
    """One task with its answer; `prompt` as in training."""

    prompt: str
    question: str
    answer: str


def questions_of(examples: Examples) -> list[Question]:
    """Every row as a task.

    Raises:
        DataError: a row that cannot be read; chats or plain text, which have no one answer.
    """
    return [_question(row, form) for row, form in examples]


def no_answer(row: Row, form: Form) -> DataError:
    """Says that rows of this form cannot be scored."""
    return DataError(f"{row.where}: rows of {form.layout} have no answer to compare with; give question and answer")


def _question(row: Row, form: Form) -> Question:
    if not form.has_answer:
        raise no_answer(row, form)
    try:
        if row.problem:
            raise BadRow(row.problem)
        form.unread(row.value)
        picked = form.fields(row.value)
    except BadRow as error:
        raise DataError(f"{row.where}: {error}; correct or remove the row") from None
    prompt, answer = form.split(picked)
    return Question(prompt, form.question(picked), answer)


def drop_overlap(train: list, held_out: list) -> tuple[list, int]:
    """`train` without the tasks whose `question` is held out, and how many those were.

    Questions are compared without regard to case, spacing and Unicode form.
    """

    def key(row) -> str:
        return " ".join(unicodedata.normalize("NFKC", row.question).casefold().split())

    known = {key(row) for row in held_out}
    kept = [row for row in train if key(row) not in known]
    return kept, len(train) - len(kept)
