"""Data: a named or local dataset becomes prompts and completions, then token rows with labels."""

import difflib
import hashlib
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from fsdp_utils.packing import IGNORED, epoch_rows
from methods.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
# part of every cache key: rows tokenized by an older version of the code are not read back
CODE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


class DataError(UserError):
    """Bad data. The message is one line: the flag or file, the value, the way out."""


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
        raise DataError(f"{path}: cannot be read ({_one_line(cause)}); write the file again") from error
    if len(loaded) == 0:
        raise DataError(f"{path}: the file has no rows; give one with at least one global batch")
    find_layout(loaded.column_names, source=str(path))
    return loaded


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _hub(path: str, split: str = "train") -> Dataset:
    """A split from the hub or its local cache."""
    try:
        return datasets.load_dataset(path, split=split)
    except Exception as error:  # no network, no such name, no access, a broken cache: each has its own type
        raise DataError(
            f"--dataset: {path} is neither in the cache nor can it be loaded ({_one_line(error)}); "
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


def _check_name(name: str) -> None:
    """Raises DataError where `name` is neither in DATASETS nor a path."""
    if name in DATASETS or Path(name).exists() or Path(name).suffix or os.sep in name:
        return
    near = difflib.get_close_matches(name, DATASETS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise DataError(f"--dataset {name}: {hint}give one of {', '.join(DATASETS)}, or a local file or folder")


def load_examples(config) -> Dataset:
    """The raw rows to train on, capped to `config.dataset_samples` where that applies.

    Raises:
        DataError: unknown name, file missing, malformed, empty or of unknown columns, hub not reachable.
    """
    _check_name(config.dataset)
    spec = DATASETS.get(config.dataset)
    examples = spec.train(config) if spec else read_local(config.dataset)
    if (spec and spec.capped) or "dataset_samples" in config.explicit_flags:
        examples = examples.select(range(min(config.dataset_samples, len(examples))))
    return examples


def validation_examples(name: str, *, samples: int | None = None) -> Dataset:
    """Held-out rows with string columns `prompt` (as in training), `question` and `answer`.

    Args:
        name: dataset with a validation set, or a local file or folder, which is read whole.
        samples: only the first so many.

    Raises:
        DataError: as `load_examples`; no validation set; chats or plain text, which have no one answer.
    """
    _check_name(name)
    spec = DATASETS.get(name)
    if spec and not spec.validation:
        having = ", ".join(key for key, value in DATASETS.items() if value.validation)
        raise DataError(f"--dataset {name}: has no validation set; give one of {having}, or a local file")
    examples = spec.validation() if spec else read_local(name)
    layout = spec.layout if spec else find_layout(examples.column_names, source=name)
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


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
FEATURES = datasets.Features(
    {
        "input_ids": datasets.Sequence(datasets.Value("int32")),
        "labels": datasets.Sequence(datasets.Value("int32")),
        "labelled": datasets.Value("int32"),
        "truncated": datasets.Value("bool"),
        "max_token_id": datasets.Value("int32"),
    }
)


@dataclass(frozen=True)
class DataReport:
    """What became of the rows.

    Args:
        samples: rows to train on.
        dropped: rows left out because no token of theirs has a label.
        truncated: how many of `samples` were cut to `context_length`.
        tokens: of all samples; `label_tokens` of them count in the loss.
        max_token_id: the largest id, which the embedding must hold.
        has_eos: whether samples end with an end-of-sequence token.
    """

    samples: int
    dropped: int
    truncated: int
    tokens: int
    label_tokens: int
    max_token_id: int
    context_length: int
    has_eos: bool = True

    def __str__(self) -> str:
        text = (
            f"{self.samples:,} samples, {self.tokens:,} tokens, {self.label_tokens:,} of them in the loss; "
            f"{self.truncated:,} truncated to {self.context_length:,} tokens, {self.dropped:,} dropped without labels"
        )
        return text if self.has_eos else f"{text}; the tokenizer has no end-of-sequence token, so no end is learned"


@dataclass(frozen=True)
class TokenizedData:
    """Token rows, ready to batch.

    Args:
        dataset: columns `input_ids` and `labels`, int32 [tokens] a row; label -100 where there is no loss.
        lengths: tokens of each row, int64 [samples].
        report: what became of the raw rows.
        name: the value of --dataset, for messages.
    """

    dataset: Dataset
    lengths: np.ndarray
    report: DataReport
    name: str

    def __len__(self) -> int:
        return len(self.lengths)


def _special_prefix(tokenizer) -> list[int]:
    """The ids a tokenizer puts before a text, as [BOS] or []; what it puts behind would end the prompt too early."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = [i for i in range(len(full)) if full[i : i + len(plain)] == plain]
    return full[: starts[0]] if starts else []


def _tokenize(texts: list[str], tokenizer) -> dict[str, list[int]]:
    """Ids of each distinct text, without special tokens."""
    distinct = list(dict.fromkeys(texts))
    encoded = tokenizer(
        distinct, add_special_tokens=False, truncation=False, return_attention_mask=False, verbose=False
    )
    return dict(zip(distinct, encoded["input_ids"], strict=True))


def _chat_segments(messages: list[dict], *, tokenizer) -> list[tuple[str, bool]]:
    """The chat as the template writes it, cut into (text, is the assistant's) for a template without generation marks.

    A turn runs from the header that asks for it to the last visible character that its message adds, so the
    end-of-turn token is learned and the header is not.

    Raises:
        ValueError: the template writes a turn differently once others follow, so its place cannot be told.
    """

    def render(upto: int, *, header: bool = False) -> str:
        return tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=header)

    full, segments, cursor = render(len(messages)), [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        content = message["content"].strip()
        before = render(i, header=True) if i else full[: max(0, full.find(content))]
        after = render(i + 1)
        if not full.startswith(before) or not after.startswith(before):
            raise ValueError(f"it rewrites what stands before message {i + 1}")
        end = len(after.rstrip())
        if not full.startswith(after[:end]):  # Qwen3 drops the empty thoughts of all turns but the last
            start = full.find(content, len(before))
            tail = after[after.find(content, len(before)) + len(content) :].rstrip()
            end = start + len(content) + len(tail)
            if start < 0 or full[end - len(tail) : end] != tail:
                raise ValueError(f"it rewrites message {i + 1}")
        segments += [(full[cursor : len(before)], False), (full[len(before) : end], True)]
        cursor = end
    if segments and not full[cursor:].strip() and content and full[:cursor].endswith(content) and tokenizer.eos_token:
        return [*segments, (tokenizer.eos_token, True)]  # a template without end-of-turn would never teach to stop
    return [*segments, (full[cursor:], False)]


def _encode_chats(picked: list[dict], *, tokenizer, where: list[str]) -> list[tuple[list[int], list[bool]]]:
    """(ids, is trained) of each chat; special tokens come from the template alone."""
    marked = tokenizer.is_fast and GENERATION_MARK.search(tokenizer.get_chat_template())
    encoded = []
    for row, place in zip(picked, where, strict=True):
        try:
            if marked:
                out = tokenizer.apply_chat_template(
                    row["messages"], return_dict=True, return_assistant_tokens_mask=True
                )
                encoded.append((out["input_ids"], [bool(m) for m in out["assistant_masks"]]))
            else:
                encoded.append(_join(_chat_segments(row["messages"], tokenizer=tokenizer), tokenizer=tokenizer))
        except Exception as error:  # templates raise their own types, as for roles that do not alternate
            raise DataError(
                f"{place}: the tokenizer's chat template fails ({_one_line(error)}); "
                "correct the row, or give a template with {% generation %} marks"
            ) from error
    return encoded


def _join(segments: list[tuple[str, bool]], *, tokenizer) -> tuple[list[int], list[bool]]:
    """(ids, is trained) of texts that are tokenized apart, so no token spans a boundary."""
    of = _tokenize([text for text, _ in segments], tokenizer)
    ids = [token for text, _ in segments for token in of[text]]
    return ids, [trained for text, trained in segments for _ in of[text]]


def _encode_texts(picked: list[dict], *, layout: str, tokenizer) -> list[tuple[list[int], list[bool]]]:
    """(ids, is trained) of each row: special prefix, prompt, completion, EOS.

    Prompt and completion are tokenized apart: tokenized together, a token may span the boundary, and then the prompt
    that is trained on is not the prompt that generation starts from.
    """
    split = [LAYOUTS[layout].split(row) for row in picked]
    of = _tokenize([text for pair in split for text in pair], tokenizer)
    prefix = _special_prefix(tokenizer)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = []
    for prompt, completion in split:
        asked, answered = prefix + of[prompt], of[completion] + eos
        encoded.append((asked + answered, [False] * len(asked) + [True] * len(answered)))
    return encoded


def _tokenize_batch(
    batch: dict, indices: list[int], *, layout: str, tokenizer, context_length: int, source: str
) -> dict:
    """Token rows of a batch of raw rows: the columns of FEATURES."""
    where = [f"{source}, row {i + 1}" for i in indices]
    raw = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    picked = [pick_fields(row, layout=layout, where=place) for row, place in zip(raw, where, strict=True)]
    if layout == "messages":
        encoded = _encode_chats(picked, tokenizer=tokenizer, where=where)
    else:
        encoded = _encode_texts(picked, layout=layout, tokenizer=tokenizer)
    columns = {name: [] for name in FEATURES}
    for ids, trained in encoded:
        cut = ids[:context_length]
        # which labels count never depends on an id: EOS may be the padding token too (trl#1623)
        labels = [token if learn else IGNORED for token, learn in zip(cut, trained, strict=False)]
        labels[:1] = [IGNORED] * len(labels[:1])  # nothing predicts the first token
        columns["input_ids"].append(cut)
        columns["labels"].append(labels)
        columns["labelled"].append(sum(label != IGNORED for label in labels))
        columns["truncated"].append(len(ids) > context_length)
        columns["max_token_id"].append(max(cut, default=-1))
    return columns


@contextmanager
def main_process_first():
    """Process 0 of each node runs the body first; the others then find its cache.

    Its failure lets the others go on too, so that each raises the same error instead of waiting for it.
    """
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    first = int(os.environ.get("LOCAL_RANK", torch.distributed.get_rank() if together else 0)) == 0
    if together and not first:
        torch.distributed.barrier()
    try:
        yield
    finally:
        if together and first:
            torch.distributed.barrier()


def _cache_key(examples: Dataset, tokenizer, **settings) -> str:
    """Equal in every process for equal rows, tokenizer, settings and code."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if backend is not None:
        # earlier calls of the tokenizer leave these behind, and then a cache would be missed
        state = {key: value for key, value in state.items() if key not in ("truncation", "padding")}
    special = (tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.bos_token_id)
    return Hasher.hash(
        (CODE, examples._fingerprint, type(tokenizer).__name__, state, special, sorted(settings.items()))
    )


def _processes(samples: int) -> int | None:
    """Worker processes that are worth their start."""
    wanted = min(os.cpu_count() or 1, samples // 5_000, 32)
    return wanted if wanted > 1 else None


def prepare_dataset(config, tokenizer, *, examples: Dataset | None = None) -> TokenizedData:
    """Tokenizes the rows of `config.dataset`, once a machine: the result is kept in the cache of `datasets`.

    Every process must call it.

    Args:
        examples: rows to use instead of `load_examples(config)`, of the same layout.

    Raises:
        DataError: as `load_examples`; a row of the wrong type; chats without a chat template; no row with a label.
    """
    with main_process_first():
        examples = load_examples(config) if examples is None else examples
        spec = DATASETS.get(config.dataset)
        layout = spec.layout if spec else find_layout(examples.column_names, source=config.dataset)
        if layout == "messages" and not tokenizer.chat_template:
            raise DataError(
                f"--dataset {config.dataset}: has messages, but the tokenizer of --model_name has no chat template"
            )
        settings = {"layout": layout, "context_length": config.context_length}
        key = _cache_key(examples, tokenizer, **settings)
        cache = Path(datasets.config.HF_DATASETS_CACHE) / "fsdp_utils"
        cache.mkdir(parents=True, exist_ok=True)
        tokenized = examples.map(
            _tokenize_batch,
            batched=True,
            with_indices=True,
            fn_kwargs={"tokenizer": tokenizer, "source": config.dataset, **settings},
            remove_columns=examples.column_names,
            features=FEATURES,
            num_proc=_processes(len(examples)),
            new_fingerprint=key,
            cache_file_name=str(cache / f"{key}.arrow"),  # never beside the user's own files
            desc="Tokenizing",
        )
    return _without_unlabelled(tokenized, config, has_eos=layout == "messages" or tokenizer.eos_token_id is not None)


def _without_unlabelled(tokenized: Dataset, config, *, has_eos: bool) -> TokenizedData:
    """Drops rows without labels, and counts."""
    table = tokenized.data
    lengths = table.column("input_ids").combine_chunks().value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    labelled, truncated, largest = (table.column(c).to_numpy() for c in ("labelled", "truncated", "max_token_id"))
    keep = labelled > 0
    if not keep.any():
        raise DataError(
            f"--dataset {config.dataset}: no label is left in any of its {len(keep):,} samples with "
            f"--context_length {config.context_length}; raise it, or shorten the prompts"
        )
    report = DataReport(
        samples=int(keep.sum()),
        dropped=int((~keep).sum()),
        truncated=int(truncated[keep].sum()),
        tokens=int(lengths[keep].sum()),
        label_tokens=int(labelled.sum()),
        max_token_id=int(largest[keep].max()),
        context_length=config.context_length,
        has_eos=has_eos,
    )
    kept = tokenized if keep.all() else tokenized.select(np.flatnonzero(keep))
    columns = kept.select_columns(["input_ids", "labels"]).with_format("numpy")
    return TokenizedData(dataset=columns, lengths=lengths[keep], report=report, name=config.dataset)


def check_global_batch(data: TokenizedData, config, *, world_size: int) -> None:
    """Raises DataError where `data` does not fill one global batch."""
    rows, _ = epoch_rows(
        data.lengths, seed=config.seed, epoch=0, context_length=config.context_length, packing=config.packing
    )
    needed = config.batch_size * config.gradient_accumulation_steps * world_size
    if len(rows) < needed:
        kind = f"packs of {config.context_length} tokens" if config.packing else "samples"
        raise DataError(
            f"--dataset {data.name}: {len(rows)} {kind} do not fill one global batch of {needed} (batch_size "
            f"{config.batch_size} x gradient_accumulation_steps {config.gradient_accumulation_steps} x {world_size} "
            "processes); lower one of these or give more data"
        )
