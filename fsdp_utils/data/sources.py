"""Data: a named dataset or a local file becomes rows of prompt and completion."""

import difflib
import hashlib
import itertools
import json
import os
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from fsdp_utils.core.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[2]
# part of every cache key: rows read by an older version of the code are not taken back
CODE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Layouts: which columns a row has, and what they mean
# ---------------------------------------------------------------------------------------------------------------------

QUESTION_PROMPT = "###Question:\n{question}\n###Answer:\n"
SQL_PROMPT = "###Context:\n{context}\n###Question:\n{question}\n###Answer:\n"
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_INPUT_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ASSISTANT = "### Assistant: "


def _alpaca(row: dict) -> tuple[str, str]:
    return (ALPACA_INPUT_PROMPT if row["input"] else ALPACA_PROMPT).format_map(row), row["output"]


def _guanaco(row: dict) -> tuple[str, str]:
    head, assistant, completion = row["text"].rpartition(ASSISTANT)
    return head + assistant, completion


@dataclass(frozen=True)
class Layout:
    """Columns of one kind of row.

    Args:
        columns: those a row must have, strings (`messages`: a list of role and content).
        split: row -> (prompt, completion); None where the tokenizer's chat template does it.
        question: the columns that tell one task from another.
        optional: columns that may be missing or null, then "".
        found_in_files: whether a local file with these columns is read this way.
    """

    columns: tuple[str, ...]
    split: Callable[[dict], tuple[str, str]] | None
    question: tuple[str, ...]
    optional: tuple[str, ...] = ()
    found_in_files: bool = True


# where a file has the columns of several, the first is taken
LAYOUTS = {
    "messages": Layout(("messages",), None, ("messages",)),
    "question": Layout(("question", "answer"), lambda r: (QUESTION_PROMPT.format_map(r), r["answer"]), ("question",)),
    "alpaca": Layout(("instruction", "output"), _alpaca, ("instruction", "input"), optional=("input",)),
    "completion": Layout(("prompt", "completion"), lambda r: (r["prompt"], r["completion"]), ("prompt",)),
    "text": Layout(("text",), lambda r: ("", r["text"]), ("text",)),
    "guanaco": Layout(("text",), _guanaco, ("text",), found_in_files=False),
    "sql": Layout(
        ("context", "question", "answer"),
        lambda r: (SQL_PROMPT.format_map(r), r["answer"]),
        ("context", "question"),
        found_in_files=False,
    ),
}


def find_layout(columns, *, source: str) -> str:
    """The name of the layout of a row with these columns.

    Raises:
        DataError: no layout fits; lists what was found and what is accepted.
    """
    for name, layout in LAYOUTS.items():
        if layout.found_in_files and set(layout.columns) <= set(columns):
            return name
    accepted = "; ".join(", ".join(layout.columns) for layout in LAYOUTS.values() if layout.found_in_files)
    raise DataError(
        f"{source}: unknown columns {', '.join(sorted(columns)) or '(none)'}; rename them to one of: {accepted}"
    )


def pick_fields(row: dict, *, layout: str, where: str) -> dict:
    """The fields of `row` that `layout` reads, checked.

    Raises:
        DataError: a field is missing or not a string; names the row (`where`) and the field.
    """
    if layout == "messages":
        return {"messages": _pick_messages(row.get("messages"), where=where)}
    spec = LAYOUTS[layout]
    picked = {name: row.get(name) for name in spec.columns}
    picked |= {name: "" if row.get(name) is None else row[name] for name in spec.optional}
    for name, value in picked.items():
        if not isinstance(value, str):
            found = "missing or null" if value is None else f"{type(value).__name__}, not a string"
            raise DataError(f"{where}: field {name!r} is {found}; correct or remove the row")
    return picked


def _pick_messages(messages, *, where: str) -> list[dict]:
    """Role and content of each message of a chat, checked."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: field 'messages' is not a list of messages; correct or remove the row")
    for number, message in enumerate(messages, start=1):
        fields = [message.get("role"), message.get("content")] if isinstance(message, dict) else [None]
        if not all(isinstance(value, str) for value in fields):
            raise DataError(
                f"{where}: message {number} needs 'role' and 'content' as strings; correct or remove the row"
            )
        if message.get("tool_calls"):
            raise DataError(f"{where}: message {number} has 'tool_calls', which are not supported; remove the row")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


# ---------------------------------------------------------------------------------------------------------------------
# Sources: where rows come from
# ---------------------------------------------------------------------------------------------------------------------


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    """(where, value) of each row of JSON lines or of one JSON array, whatever the file is called."""
    with open(path, "rb") as file:
        if file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            file.seek(0)
            values = _parse(file.read(), path=path, line=1)
            yield from ((f"{path}, row {i}", value) for i, value in enumerate(values, start=1))
            return
        file.seek(0)
        for line, text in enumerate(file, start=1):
            if text.strip():
                # the newline away, or an unfinished row would be reported on the next line
                yield f"{path}, line {line}", _parse(text.rstrip(), path=path, line=line)


def _parse(text: bytes, *, path: Path, line: int) -> object:
    """A JSON value; `line` is the file's line where `text` starts."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at, why = line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except (UnicodeDecodeError, RecursionError) as error:
        at, why = line, f"{type(error).__name__}"
    raise DataError(f"{path}, line {at}: malformed JSON ({why}); correct or remove it")


def _checked_rows(path: str, code: str, size: int, modified: int) -> Iterator[dict]:
    """Rows of a JSON file. The arguments beside `path` only make the cache key."""
    layout = None
    for where, row in _json_rows(Path(path)):
        if not isinstance(row, dict):
            raise DataError(f"{where}: a {type(row).__name__}, not an object; write one JSON object a row")
        layout = layout or find_layout(row, source=where)
        yield pick_fields(row, layout=layout, where=where)
    if layout is None:
        raise DataError(f"{path}: the file has no rows; give one with at least one global batch")


def _read_json(path: Path) -> Dataset:
    stat = path.stat()
    key = {"code": CODE, "size": stat.st_size, "modified": stat.st_mtime_ns}
    return Dataset.from_generator(_checked_rows, gen_kwargs={"path": str(path), **key})


def _read_folder(path: Path) -> Dataset:
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, Dataset):
        return loaded
    if "train" not in loaded:
        raise DataError(f"{path}: splits {', '.join(loaded)}, but no 'train'; give the folder of one split")
    return loaded["train"]


READERS = {".jsonl": _read_json, ".json": _read_json, ".parquet": lambda path: Dataset.from_parquet(str(path))}


def read_local(path: str | Path) -> Dataset:
    """Rows of a local file or saved dataset folder, as written there.

    Raises:
        DataError: the file is missing, malformed (names the line), empty, or of an unknown kind or layout.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(
            f"--dataset {path}: no such file or folder; check the path, or give one of {', '.join(DATASETS)}"
        )
    reader = _read_folder if path.is_dir() else READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"--dataset {path}: unknown kind of file; give {', '.join(READERS)} or a saved dataset folder")
    try:
        loaded = reader(path.resolve())
    except DataError:
        raise
    except Exception as error:  # pyarrow and datasets raise many types for a broken file
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        if isinstance(cause, DataError):
            raise cause from None
        raise DataError(f"{path}: cannot be read ({one_line(cause)}); write the file again") from error
    if len(loaded) == 0:
        raise DataError(f"{path}: the file has no rows; give one with at least one global batch")
    find_layout(loaded.column_names, source=str(path))
    return loaded


def one_line(error: BaseException) -> str:
    """Type and message of an error of another library."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _hub(path: str, split: str = "train") -> Dataset:
    """A split from the hub or its local cache."""
    try:
        return datasets.load_dataset(path, split=split)
    except Exception as error:  # no network, no such name, no access, a broken cache: each has its own type
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


def _dummy_rows(samples: int, code: str) -> Iterator[dict]:
    for _ in range(samples):
        yield {"instruction": "instruction", "input": "", "output": "output" * 10_000}


def _dummy(config) -> Dataset:
    return Dataset.from_generator(_dummy_rows, gen_kwargs={"samples": config.dataset_samples, "code": CODE})


def _demo(name: str) -> Dataset:
    path = REPOSITORY / "demo" / f"{name}.jsonl"
    if not path.exists():
        raise DataError(f"--dataset demo: {path} is missing; make it with `python scripts/make_demo.py`")
    return read_local(path)


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
    train: Callable[..., Dataset]
    validation: Callable[[], Dataset] | None = None
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


def check_name(name: str) -> None:
    """Raises DataError where `name` is neither in DATASETS nor a path."""
    if name in DATASETS or Path(name).exists() or Path(name).suffix or os.sep in name:
        return
    near = difflib.get_close_matches(name, DATASETS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise DataError(f"--dataset {name}: {hint}give one of {', '.join(DATASETS)}, or a local file or folder")


def layout_of(name: str, examples: Dataset) -> str:
    """The key in LAYOUTS of a named dataset, or of what a local one holds.

    Raises:
        DataError: no layout fits.
    """
    spec = DATASETS.get(name)
    return spec.layout if spec else find_layout(examples.column_names, source=name)


def load_examples(config) -> Dataset:
    """The raw rows to train on, capped to `config.dataset_samples` where that applies.

    Raises:
        DataError: unknown name, file missing, malformed, empty or of unknown columns, hub not reachable.
    """
    check_name(config.dataset)
    spec = DATASETS.get(config.dataset)
    examples = spec.train(config) if spec else read_local(config.dataset)
    if (spec and spec.capped) or "dataset_samples" in config.explicit_flags:
        examples = examples.select(range(min(config.dataset_samples, len(examples))))
    return examples


def held_out_rows(name: str) -> Dataset:
    """The raw rows of a dataset's validation set, or of a local file or folder.

    Raises:
        DataError: as `load_examples`; no validation set.
    """
    check_name(name)
    spec = DATASETS.get(name)
    if spec and not spec.validation:
        having = ", ".join(key for key, value in DATASETS.items() if value.validation)
        raise DataError(f"--dataset {name}: has no validation set; give one of {having}, or a local file")
    return spec.validation() if spec else read_local(name)


def validation_examples(name: str, *, samples: int | None = None) -> Dataset:
    """Held-out rows with string columns `prompt` (as in training), `question` and `answer`.

    Args:
        name: dataset with a validation set, or a local file or folder, which is read whole.
        samples: only the first so many.

    Raises:
        DataError: as `held_out_rows`; chats or plain text, which have no one answer.
    """
    examples = held_out_rows(name)
    layout = layout_of(name, examples)
    if layout in ("messages", "text"):
        raise DataError(f"--dataset {name}: rows of {layout} have no answer to compare with; give question and answer")
    found = []
    for number, row in enumerate(itertools.islice(examples, samples), start=1):
        row = pick_fields(row, layout=layout, where=f"{name}, row {number}")
        prompt, answer = LAYOUTS[layout].split(row)
        found.append({"prompt": prompt, "question": _question(row, layout), "answer": answer})
    return Dataset.from_list(found)


def _question(row: dict, layout: str) -> str:
    """The text that tells one task from another."""
    if layout == "messages":
        return next((m["content"] for m in row["messages"] or [] if m["role"] == "user"), "")
    return "\n".join(row[name] for name in LAYOUTS[layout].question if row.get(name))


def drop_overlap(train: Dataset, validation: Dataset) -> tuple[Dataset, int]:
    """`train` without the rows whose question is in `validation`, and how many those were.

    Questions are compared without regard to case, spacing and Unicode form.
    """

    def keys(examples):
        layout = find_layout(examples.column_names, source="--dataset")
        wanted = [c for c in examples.column_names if c in LAYOUTS[layout].question]
        texts = (_question(row, layout) for row in examples.select_columns(wanted))
        return [" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts]

    held_out = set(keys(validation))
    kept = [i for i, key in enumerate(keys(train)) if key not in held_out]
    return (train.select(kept) if len(kept) < len(train) else train), len(train) - len(kept)
