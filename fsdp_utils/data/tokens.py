"""Tokens: rows of prompt and completion become token ids with labels, once a machine."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher

from fsdp_utils.core.errors import DataError
from fsdp_utils.data.batches import IGNORED
from fsdp_utils.data.sources import CODE as DATA_CODE
from fsdp_utils.data.sources import LAYOUTS, layout_of, load_examples, one_line, pick_fields

# part of every cache key: rows tokenized by an older version of the code are not taken back
CODE = hashlib.sha256(Path(__file__).read_bytes() + DATA_CODE.encode()).hexdigest()[:16]

UNLIKELY = "\u241e\u241f\u241e"  # symbols that no chat template has a use for
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
        dataset: columns `input_ids` and `labels`, int32 [tokens] a row; label -100 where there is no loss, as of the
            first token, which nothing predicts.
        lengths: tokens of each row, int64 [samples].
        rows: number of each among the raw rows, int64 [samples].
        report: what became of the raw rows.
        name: the value of --dataset, for messages.
    """

    dataset: Dataset
    lengths: np.ndarray
    rows: np.ndarray
    report: DataReport
    name: str

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

    def digest(self) -> str:
        """Tells these samples, in this order, from others; reads them all."""
        found = hashlib.sha256(self.lengths.tobytes())
        for batch in self.dataset.with_format("arrow").iter(batch_size=10_000):
            for column in ("input_ids", "labels"):
                found.update(batch[column].combine_chunks().flatten().to_numpy().tobytes())
        return found.hexdigest()


def special_prefix(tokenizer) -> list[int]:
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


class _Renders:
    """What a tokenizer's chat template writes of the first messages of a chat."""

    def __init__(self, messages: list[dict], tokenizer):
        self.messages, self.tokenizer = messages, tokenizer
        self.full = self.upto(len(messages))

    def upto(self, count: int, *, header: bool = False) -> str:
        """The first `count` messages, with the header that asks for an answer or without."""
        return self.tokenizer.apply_chat_template(self.messages[:count], tokenize=False, add_generation_prompt=header)

    def before(self, i: int) -> str:
        """What stands before the answer that is message i, its header included."""
        if i:
            return self.upto(i, header=True)
        # no header asks for a first message; its own text may also be in what stands before it
        unlikely = [{**self.messages[0], "content": UNLIKELY}]
        rendered = self.tokenizer.apply_chat_template(unlikely, tokenize=False)
        return rendered[: max(0, rendered.find(UNLIKELY))]

    def turn(self, i: int) -> tuple[int, int]:
        """Where in `full` the answer that is message i begins and ends, its end-of-turn token included.

        Raises:
            ValueError: the template writes it differently once others follow, so its place cannot be told.
        """
        before, after = self.before(i), self.upto(i + 1)
        if not self.full.startswith(before) or not after.startswith(before):
            raise ValueError(f"it rewrites what stands before message {i + 1}")
        end = len(after.rstrip())
        if self.full.startswith(after[:end]):
            return len(before), end
        return len(before), self._rewritten_end(i, after, start=len(before))

    def _rewritten_end(self, i: int, after: str, *, start: int) -> int:
        """Qwen3 drops the empty thoughts of all turns but the last: the content is then looked for."""
        content = self.messages[i]["content"].strip()
        found = self.full.find(content, start)
        tail = after[after.find(content, start) + len(content) :].rstrip()  # the end of the turn
        end = found + len(content) + len(tail)
        if found < 0 or self.full[end - len(tail) : end] != tail:
            raise ValueError(f"it rewrites message {i + 1}")
        return end


def _chat_segments(messages: list[dict], *, tokenizer) -> list[tuple[str, bool]]:
    """The chat as the template writes it, cut into (text, is the assistant's) for a template without generation marks.

    A turn runs from the header that asks for it to the last visible character that its message adds, so the
    end-of-turn token is learned and the header is not.

    Raises:
        ValueError: the place of a turn cannot be told.
    """
    renders, segments, cursor = _Renders(messages, tokenizer), [], 0
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in answers:
        start, end = renders.turn(i)
        segments += [(renders.full[cursor:start], False), (renders.full[start:end], True)]
        cursor = end
    rest = renders.full[cursor:]
    if answers and not rest.strip() and tokenizer.eos_token:
        content = messages[answers[-1]]["content"].strip()
        if content and renders.full[:cursor].endswith(content):
            return [*segments, (tokenizer.eos_token, True)]  # without an end of turn, stopping would not be learned
    return [*segments, (rest, False)]


def _encode_chats(picked: list[dict], *, tokenizer, where: list[str]) -> list[tuple[list[int], list[bool]]]:
    """(ids, is trained) of each chat; special tokens come from the template alone."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(f"{where[0]}: chats need a tokenizer with one chat template ({one_line(error)})") from None
    marked = tokenizer.is_fast and GENERATION_MARK.search(template)
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
                f"{place}: the tokenizer's chat template fails ({one_line(error)}); "
                "correct the row, or give a template with {% generation %} marks"
            ) from error
    return encoded


def _join(segments: list[tuple[str, bool]], *, tokenizer) -> tuple[list[int], list[bool]]:
    """(ids, is trained) of a text in pieces. What overlaps a trained piece is trained.

    A fast tokenizer takes the text whole: many put a space before whatever they begin with. A slow one cannot say where
    its tokens come from, so the pieces are tokenized apart.
    """
    if tokenizer.is_fast:
        return _join_whole(segments, tokenizer=tokenizer)
    of = _tokenize([text for text, _ in segments], tokenizer)
    ids = [token for text, _ in segments for token in of[text]]
    return ids, [trained for text, trained in segments for _ in of[text]]


def _join_whole(segments: list[tuple[str, bool]], *, tokenizer) -> tuple[list[int], list[bool]]:
    text, spans = "", []
    for piece, trained in segments:
        spans += [(len(text), len(text) + len(piece))] if trained else []
        text += piece
    out = tokenizer(text, add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False)
    inside = [any(end > a and start < b for a, b in spans) for start, end in out["offset_mapping"]]
    return out["input_ids"], inside


def _encode_texts(picked: list[dict], *, layout: str, tokenizer) -> list[tuple[list[int], list[bool]]]:
    """(ids, is trained) of each row: special prefix, prompt, completion, EOS.

    Prompt and completion are tokenized apart: tokenized together, a token may span the boundary, and then the prompt
    that is trained on is not the prompt that generation starts from.
    """
    split = [LAYOUTS[layout].split(row) for row in picked]
    of = _tokenize([text for pair in split for text in pair], tokenizer)
    prefix = special_prefix(tokenizer)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = []
    for prompt, completion in split:
        asked, answered = prefix + of[prompt], of[completion] + eos
        encoded.append((asked + answered, [False] * len(asked) + [True] * len(answered)))
    return encoded


def tokenize_batch(
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
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    first = int(os.environ.get("LOCAL_RANK", torch.distributed.get_rank() if several else 0)) == 0
    if several and not first:
        torch.distributed.barrier()
    try:
        yield
    finally:
        if several and first:
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


def prepare_dataset(config, tokenizer, *, load: Callable = load_examples) -> TokenizedData:
    """Tokenizes the rows of `config.dataset`, once a machine: the result is kept in the cache of `datasets`.

    Every process must call it.

    Args:
        load: from the flags to the rows of `config.dataset`.

    Raises:
        DataError: as `load_examples`; a row of the wrong type; chats without a chat template; no row with a label.
    """
    with main_process_first():
        examples = load(config)
        layout = layout_of(config.dataset, examples)
        if layout == "messages" and not tokenizer.chat_template:
            raise DataError(f"--dataset {config.dataset}: has messages, but the model's tokenizer has no chat template")
        settings = {"layout": layout, "context_length": config.context_length}
        key = _cache_key(examples, tokenizer, **settings)
        cache = Path(datasets.config.HF_DATASETS_CACHE) / "fsdp_utils"
        cache.mkdir(parents=True, exist_ok=True)
        tokenized = examples.map(
            tokenize_batch,
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
    rows = np.flatnonzero(keep)
    return TokenizedData(dataset=columns, lengths=lengths[keep], rows=rows, report=report, name=config.dataset)
