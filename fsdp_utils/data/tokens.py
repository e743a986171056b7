"""Tokens: raw rows become token ids with labels, once a machine."""

import gc
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher

from fsdp_utils.core.errors import DataError
from fsdp_utils.data import chats, coded, encode, files, layouts, turns
from fsdp_utils.data.batches import IGNORED
from fsdp_utils.data.chats import Chat, Template, pick_chat
from fsdp_utils.data.coded import ABOUT, IDS, NONE, one_line
from fsdp_utils.data.encode import Parts, Piece, Text, TextEncoder, joined
from fsdp_utils.data.files import Row, cache_folder, writing_cache
from fsdp_utils.data.labels import Labels
from fsdp_utils.data.layouts import BadRow, Form, Reading, is_learned
from fsdp_utils.data.sources import Examples, load_examples

# part of every cache key: rows tokenized by an older version of the code are not taken back
MODULES = (Path(module.__file__) for module in (chats, coded, encode, files, layouts, turns))
CODE = hashlib.sha256(b"".join(path.read_bytes() for path in (Path(__file__), *MODULES))).hexdigest()[:16]

BATCH = 1000  # rows that are tokenized together
SHOWN = 3  # refused rows that are told
COMPARED = 64  # rows whose ids are decoded again, to see whether they hold the text
FEATURES = datasets.Features({"input_ids": IDS, "labels": IDS, **ABOUT})


@dataclass(frozen=True)
class DataReport:
    """What became of the rows.

    Args:
        samples: rows to train on.
        dropped: rows left out because no token of theirs has a label.
        off: rows left out because their `weight` or `train` says so.
        truncated: how many of `samples` were cut to `context_length`.
        tokens: of all samples; `label_tokens` of them count in the loss.
        max_token_id: the largest id, which the embedding must hold.
        has_eos: whether samples end with an end-of-sequence token.
        refused: rows left out because they cannot be read, with --skip_bad_rows.
        first_refused: what the first of them have.
        unread: columns that nothing reads, and in how many rows.
        ends: ids of special tokens that end a learned turn.
        notes: what else is to be known of them.
        chats: whether some of the rows are chats.
    """

    samples: int
    dropped: int
    off: int
    truncated: int
    tokens: int
    label_tokens: int
    max_token_id: int
    context_length: int
    has_eos: bool = True
    refused: int = 0
    first_refused: tuple[str, ...] = ()
    unread: dict[str, int] = field(default_factory=dict)
    ends: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    chats: bool = False

    def __str__(self) -> str:
        lines = [
            f"{self.samples:,} samples, {self.tokens:,} tokens, {self.label_tokens:,} of them in the loss; "
            f"{self.truncated:,} truncated to {self.context_length:,} tokens, {self.dropped:,} dropped without labels"
        ]
        if self.off:
            lines[0] += f", {self.off:,} left out by their weight or train"
        if not self.has_eos:
            lines[0] += "; the tokenizer has no end-of-sequence token, so no end is learned"
        if self.refused:
            lines.append(f"{self.refused:,} rows left out: {'; '.join(self.first_refused)}")
        if self.unread:
            counts = ", ".join(f"{name} ({count:,} rows)" for name, count in self.unread.items())
            lines.append(f"not read: {counts}")
        return "\n".join([*self.notes, *lines])


@dataclass(frozen=True)
class TokenizedData:
    """Token rows, ready to batch.

    Args:
        dataset: columns `input_ids` and `labels`, in this order, int32 [tokens] a row; label -100 where there is no
            loss, as of the first token, which nothing predicts. Of other tasks as `data.coded` says.
        lengths: tokens of each row, int64 [samples].
        rows: number of each among the raw rows, int64 [samples].
        report: what became of the raw rows.
        name: the value of --dataset, for messages.
        sources: digests of the files or sets that the rows are of.
        labels: what rows are classified as; None where they are not.
    """

    dataset: Dataset
    lengths: np.ndarray
    rows: np.ndarray
    report: DataReport
    name: str
    sources: tuple[str, ...] = ()
    labels: Labels | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def split(self, held_out: int, *, seed: int) -> tuple["TokenizedData", "TokenizedData"]:
        """Other samples, and so many drawn at random, both in their order.

        Raises:
            DataError: nothing would be left to train on.
        """
        if held_out >= len(self):
            raise DataError(f"--eval_samples {held_out}: --dataset {self.name} has {len(self)} samples; hold out fewer")
        held = np.zeros(len(self), dtype=bool)
        held[np.random.default_rng([seed, held_out]).permutation(len(self))[:held_out]] = True
        return self._select(~held), self._select(held)

    def _select(self, keep: np.ndarray) -> "TokenizedData":
        kept = self.dataset.select(np.flatnonzero(keep))
        return replace(self, dataset=kept, lengths=self.lengths[keep], rows=self.rows[keep])

    def spread(self, count: int) -> list[torch.Tensor]:
        """Ids `[tokens]` of so many samples, evenly over all; of all where there are no more."""
        chosen = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        return [torch.tensor(self.dataset[int(place)]["input_ids"]) for place in chosen]

    def digest(self) -> str:
        """Tells these samples, in this order, from others; reads them all."""
        found = hashlib.sha256(self.lengths.tobytes())
        for batch in self._batches():
            for column in ("input_ids", "labels"):
                found.update(batch[column].combine_chunks().flatten().to_numpy().tobytes())
        return found.hexdigest()

    def shared_with(self, others: "TokenizedData") -> int:
        """How many of these samples are among others, too."""
        mine = Counter(self.digests())
        return sum(mine.pop(sample, 0) for sample in others.digests())

    def digests(self) -> Iterator[bytes]:
        """A digest of the ids of each sample."""
        for batch in self._batches():
            rows = batch["input_ids"].combine_chunks()
            ends = np.cumsum(rows.value_lengths().to_numpy(zero_copy_only=False))
            for ids in np.split(rows.flatten().to_numpy(), ends[:-1]):
                yield digest_of(ids)

    def _batches(self) -> Iterator[pa.Table]:
        return self.dataset.with_format("arrow").iter(batch_size=10_000)


def digest_of(ids: np.ndarray) -> bytes:
    """Equal for samples of equal ids."""
    return hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=16).digest()


@dataclass
class Encoded:
    """One row as ids.

    Args:
        parts: its ids; none for a row that is refused.
        end: id of the special token that ends its last answer, or NONE.
        off: whether its `weight` or `train` leaves it unlearned.
        refused: why it cannot be trained on, with its place; "" if it can.
        unread: columns that nothing reads.
        noted: what else is to be known of it.
        text: what the ids are to decode to, special tokens that were added left out.
    """

    parts: Parts = ()
    end: int = NONE
    off: bool = False
    refused: str = ""
    unread: Sequence[str] = ()
    noted: Sequence[str] = ()
    text: str = ""


class RowEncoder:
    """Raw rows to ids.

    Args:
        tokenizer: of transformers.
        reading: how the user says that rows are to be read.
        source: the value of --dataset, for messages.
        context_length: of `table`: longer rows are cut.
    """

    features = FEATURES

    def __init__(self, tokenizer, *, reading: Reading, source: str, context_length: int = 0):
        self.context_length = context_length
        self.texts, self.reading, self.source, self.template = TextEncoder(tokenizer), reading, source, None
        self.ids_of = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        self.eos = tokenizer.eos_token

    def check(self, examples: Examples) -> None:
        """Raises DataError for chats without a chat template, and rows that are no text."""
        if examples.chats:
            Template(self.texts.tokenizer, source=self.source)

    def table(self, rows: Sequence[tuple[Row, Form]]) -> pa.Table:
        """The columns of `features`."""
        return as_table(self(rows), context_length=self.context_length)

    @staticmethod
    def lengths(table) -> np.ndarray:
        """Tokens of each row, int64 `[rows]`."""
        return pc.list_value_length(table.column("input_ids")).to_numpy().astype(np.int64)

    def notes(self, examples: Examples) -> tuple[str, ...]:
        """What else is to be known of the rows."""
        return _changed_texts(examples.first(COMPARED), self)

    @staticmethod
    def finished(kept: Dataset, rows: np.ndarray, examples: Examples, *, labels=None) -> tuple[Dataset, None]:
        """What of the table is a sample."""
        return kept.select_columns(["input_ids", "labels"]).with_format("numpy"), None

    def __call__(self, rows: Sequence[tuple[Row, Form]]) -> list[Encoded]:
        """The rows in order, those that cannot be read as refused."""
        found, texts, places = [], [], []
        for row, form in rows:
            encoded = Encoded()
            try:
                if row.problem:
                    raise BadRow(row.problem)
                texts.append(self._text(row.value, form, encoded))
                places.append(encoded)
            except BadRow as error:
                encoded.refused = f"{row.where}: {error}"
            found.append(encoded)
        for encoded, text, parts in zip(places, texts, self.texts.parts(texts), strict=True):
            encoded.parts = parts
            encoded.text = "".join(piece.text for piece in text.pieces)
        return found

    def _text(self, row: dict, form: Form, encoded: Encoded) -> Text:
        if form.layout == "messages":
            return self._chat(row, form, encoded)
        encoded.unread = form.unread(row)
        prompt, completion = form.split(form.fields(row))
        encoded.off = not is_learned(form.named(row))
        has_end = bool(self.eos) and completion.rstrip().endswith(self.eos)
        learned = not encoded.off and bool(prompt or completion)  # nothing at all teaches only to end
        return Text([Piece(prompt, False), Piece(completion, learned)], ended=learned and not has_end)

    def _chat(self, row: dict, form: Form, encoded: Encoded) -> Text:
        self.template = self.template or Template(self.texts.tokenizer, source=self.source)
        chat = Chat(*pick_chat(row, form), self.template, train_on=self.reading.train_on)
        encoded.unread = [*chat.unread(), *form.beside(row)]
        text, end = chat.text()
        encoded.end, encoded.noted = self.ids_of.get(end, NONE), chat.notes()
        encoded.off = not is_learned(form.named(row))
        if encoded.off:
            return text._replace(pieces=[piece._replace(trained=False) for piece in text.pieces], ended=False)
        return text


def as_table(rows: list[Encoded], *, context_length: int) -> pa.Table:
    """The columns of FEATURES. All rows at once: a row is worth few microseconds."""
    parts = [part for row in rows for part in row.parts]
    sizes = np.array([len(ids) for ids, _ in parts], dtype=np.int64)
    row_of = np.repeat(np.arange(len(rows)), [len(row.parts) for row in rows])
    lengths = np.bincount(row_of, weights=sizes, minlength=len(rows)).astype(np.int64)
    place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # of a token in its row
    kept = place < context_length
    ids = np.concatenate([ids for ids, _ in parts] or [np.zeros(0, dtype=np.int32)])[kept]
    # nothing predicts the first token. Which labels count never depends on an id: EOS may be padding too (trl#1623)
    trained = (np.repeat(np.array([trained for _, trained in parts], dtype=bool), sizes) & (place > 0))[kept]
    offsets = np.concatenate([[0], np.cumsum(np.minimum(lengths, context_length))]).astype(np.int32)
    sums, full = np.concatenate([[0], np.cumsum(trained)]), np.diff(offsets) > 0
    largest = np.full(len(rows), NONE, dtype=np.int32)
    largest[full] = np.maximum.reduceat(ids, offsets[:-1][full]) if full.any() else NONE
    lists = lambda values: pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, type=pa.int32()))
    truncated = lengths > context_length
    columns = dict(
        input_ids=lists(ids),
        labels=lists(np.where(trained, ids, IGNORED).astype(np.int32)),
        labelled=pa.array((sums[offsets[1:]] - sums[offsets[:-1]]).astype(np.int32)),
        off=pa.array([row.off for row in rows]),
        truncated=pa.array(truncated),
        max_token_id=pa.array(largest),
        end=pa.array(np.where(truncated, NONE, [row.end for row in rows]).astype(np.int32)),
        refused=pa.array([row.refused for row in rows]),
        unread=pa.array(["\n".join(map(one_line, row.unread)) for row in rows]),
        noted=pa.array(["\n".join(row.noted) for row in rows]),
    )
    return pa.table(columns, schema=FEATURES.arrow_schema)


def tokenize(
    examples: Examples, tokenizer, *, reading: Reading, source: str, context_length: int, coder=RowEncoder, labels=None
) -> tuple[list[tuple[torch.Tensor, ...]], int]:
    """The samples of few rows, without a cache: `input_ids`, `labels` and what else the coder makes; int64 or fp32. And
    how many rows were cut.

    Raises:
        DataError: rows of another kind, or one that cannot be read.
    """
    coded = coder(tokenizer, reading=reading, source=source, context_length=context_length)
    coded.check(examples)
    table = coded.table(examples.read(range(len(examples))))
    for refused in table["refused"].to_pylist():
        if refused:
            raise DataError(f"{refused}; correct or remove the row")
    found, _ = coded.finished(Dataset(table), np.arange(len(examples)), examples, labels=labels)
    wide = lambda values: values if values.is_floating_point() else values.long()
    samples = [tuple(wide(torch.as_tensor(column)) for column in row.values()) for row in found]
    return samples, sum(table["truncated"].to_pylist())


def _tokenize(batch: dict, *, examples: Examples, coder) -> pa.Table:
    return coder.table(examples.read(batch["index"]))


@contextmanager
def main_process_first():
    """Process 0 of each node runs the body first; the others then find its cache.

    Its failure lets the others go on too, so that each raises the same error instead of waiting for it.
    """
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    first = int(os.environ.get("LOCAL_RANK", torch.distributed.get_rank() if several else 0)) == 0
    if several and not first:
        torch.distributed.barrier()
    try:
        yield
    finally:
        if several and first:
            torch.distributed.barrier()


def _cache_key(examples: Examples, tokenizer, **settings) -> str:
    """Equal in every process for equal rows, tokenizer, settings and code."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if backend is not None:
        # earlier calls of the tokenizer leave these behind, and then a cache would be missed
        state = {key: value for key, value in state.items() if key not in ("truncation", "padding")}
    special = (tokenizer.chat_template, sorted(tokenizer.special_tokens_map.items(), key=str))
    return Hasher.hash((CODE, examples.digest, type(tokenizer).__name__, state, special, sorted(settings.items())))


def _processes(samples: int) -> int | None:
    """Worker processes that are worth their start."""
    wanted = min(os.cpu_count() or 1, samples // 5_000, 32)
    return wanted if wanted > 1 else None


def prepare_dataset(
    config, tokenizer, *, load: Callable = load_examples, coder=RowEncoder, labels: Labels | None = None
) -> TokenizedData:
    """Tokenizes the rows of `config.dataset`, once a machine: the result is kept in the cache of `datasets`.

    Every process must call it.

    Args:
        load: from the flags to the rows of `config.dataset`.
        coder: class that makes ids of rows: `RowEncoder`, or one of `data.coded`.
        labels: what rows are classified as, where that is known already.

    Raises:
        DataError: as `load_examples`; a row that cannot be read, without --skip_bad_rows; chats without a chat
            template; no row with a label; a cache that cannot be written.
    """
    with main_process_first():
        examples, reading = load(config), Reading.of(config)
        encoder = coder(tokenizer, reading=reading, source=config.dataset, context_length=config.context_length)
        encoder.check(examples)
        how = dict(context_length=config.context_length, train_on=reading.train_on, coder=coder.__name__)
        key = _cache_key(examples, tokenizer, **how)
        path = cache_folder() / f"{key}.arrow"  # never beside the user's own files
        workers = _processes(len(examples))
        if workers:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not outlive a fork
        gc.freeze()  # or each collection, of which there are many, looks at all that was imported
        with writing_cache():
            tokenized = Dataset.from_dict({"index": np.arange(len(examples))}).map(
                _tokenize,
                batched=True,
                batch_size=BATCH,
                fn_kwargs=dict(examples=examples, coder=encoder),
                remove_columns=["index"],
                features=coder.features,
                num_proc=workers,
                new_fingerprint=key,
                cache_file_name=str(path),
                desc="Tokenizing",
            )
        gc.unfreeze()
    ends = tokenizer.eos_token_id is not None or "label" in encoder.features  # a classifier learns no end
    keep, report = _kept(tokenized, encoder, config, has_eos=ends)
    rows = np.flatnonzero(keep)
    dataset, labels = encoder.finished(
        tokenized if keep.all() else tokenized.select(rows), rows, examples, labels=labels
    )
    mixture = (f"mixture: {', '.join(examples.taken)}",) if examples.taken else ()
    said = (f"labels: {labels}",) if labels else ()
    notes = (*mixture, *report.notes, *encoder.notes(examples), *said)
    return TokenizedData(
        dataset=dataset,
        lengths=encoder.lengths(tokenized.data)[keep],
        rows=rows,
        report=replace(report, notes=notes, chats=examples.chats),
        name=config.dataset,
        sources=tuple(part.rows.digest for part in examples.parts),
        labels=labels,
    )


def training_samples(config, tokenizer, **how) -> TokenizedData:
    """`prepare_dataset` without what `--eval_samples` holds out."""
    data = prepare_dataset(config, tokenizer, **how)
    return data.split(config.eval_samples, seed=config.seed)[0] if config.eval_samples else data


def _changed_texts(examples: Examples, encoder: RowEncoder) -> tuple[str, ...]:
    """Says where the ids of a row decode to another text: a tokenizer may drop or change characters."""
    tokenizer = encoder.texts.tokenizer
    special = re.compile("|".join(map(re.escape, sorted(tokenizer.all_special_tokens, key=len, reverse=True))) or "$^")
    changed, rows = [], list(examples)
    for (row, _), encoded in zip(rows, encoder(rows), strict=True):
        wanted, found = (special.sub("", text) for text in (encoded.text, tokenizer.decode(joined(encoded.parts)[0])))
        if found.strip(" ") != wanted.strip(" "):  # one that begins with a space puts it behind BOS too
            at = next((i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), 0)
            changed.append(f"{row.where}: {wanted[at : at + 20]!r} is read as {found[at : at + 20]!r}")
    if not changed:
        return ()
    return (f"note: the tokenizer changes the text of {len(changed)} of the first {len(rows)} rows; {changed[0]}",)


def _kept(tokenized: Dataset, encoder, config, *, has_eos: bool) -> tuple[np.ndarray, DataReport]:
    """Which rows are samples: those that were not refused and have a label; and what became of all."""
    table = tokenized.data
    lengths = encoder.lengths(table)
    names = ("labelled", "off", "truncated", "max_token_id", "end")
    labelled, off, truncated, largest, ends = (table.column(c).to_numpy() for c in names)
    good = pc.binary_length(table.column("refused")).to_numpy() == 0
    refused = _refused(table, np.flatnonzero(~good), config)
    keep = labelled > 0
    if not good.any():
        raise DataError(f"--dataset {config.dataset}: none of its {len(good):,} rows can be read; {refused[0]}")
    if off.sum() == good.sum():
        raise DataError(
            f"--dataset {config.dataset}: all of its {good.sum():,} samples are left out by their weight or train; "
            "write 1 where a row is to be learned"
        )
    if not keep.any():
        raise DataError(
            f"--dataset {config.dataset}: no label is left in any of its {good.sum():,} samples with "
            f"--context_length {config.context_length}; raise it, or shorten the prompts"
        )
    unread, noted = _counted(table.column("unread")), _counted(table.column("noted"))
    report = DataReport(
        samples=int(keep.sum()),
        dropped=int((good & ~keep & ~off).sum()),
        off=int(off.sum()),
        truncated=int(truncated[keep].sum()),
        tokens=int(lengths[keep].sum()),
        label_tokens=int(labelled.sum()),
        max_token_id=int(largest[keep].max()),
        context_length=config.context_length,
        has_eos=has_eos or bool((ends[keep] != NONE).any()),
        refused=int((~good).sum()),
        first_refused=refused,
        unread=unread,
        notes=tuple(f"note: {said} ({count:,} rows)" for said, count in noted.items()),
        ends=tuple(sorted(set(ends[keep].tolist()) - {NONE})),
    )
    return keep, report


def _counted(column: pa.ChunkedArray) -> dict[str, int]:
    """In how many rows each line of a column of texts is."""
    counts = Counter()
    for found in column.value_counts().to_pylist():
        counts.update({line: found["counts"] for line in found["values"].split("\n") if line})
    return dict(counts)


def _refused(table, places: np.ndarray, config) -> tuple[str, ...]:
    """What the first refused rows have.

    Raises:
        DataError: there are some, and --skip_bad_rows is not given.
    """
    first = tuple(table.column("refused").take(places[:SHOWN]).to_pylist())
    if first and not getattr(config, "skip_bad_rows", False):
        way_out = "" if ";" in first[0] else "; correct or remove the row"
        more = f" ({len(places):,} such rows of {len(table):,})" if len(places) > 1 else ""
        raise DataError(f"{first[0]}{way_out}{more}, or leave such rows out by --skip_bad_rows true")
    return first
