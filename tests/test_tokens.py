"""Tests of fsdp_utils.data.tokens and encode: ids that hold the text, and which of them are learned."""

import itertools

import datasets
import numpy as np
import pytest
import torch
from texts import (
    KINDS,
    as_tokenizer,
    make_config,
    of_kind,
    prepared,
    questions,
    stripping,
    trained_text,
    write_jsonl,
)
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from fsdp_utils.core.errors import DataError
from fsdp_utils.data import tokens as tokens_module
from fsdp_utils.data.encode import Piece, Text, TextEncoder, exact
from fsdp_utils.data.show import histogram, in_colour, marked, shown
from fsdp_utils.data.tokens import prepare_dataset
from fsdp_utils.tasks.causal_lm import CAUSAL_LM

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("own_cache")]


@pytest.fixture(scope="module")
def backend():
    return of_kind("byte_level")


@pytest.fixture
def tokenizer(backend):
    return as_tokenizer(backend)


# --- ids hold the text

PROMPTS = ["x=", "x= ", "x=\n", "yes", "a  b ", "<|user|>\n", "Two </s>", "q<|word|>", "q <|right|>", "<|left|>", " x="]
ANSWERS = ["42", " 42", "\n42", "  42 ", "42\n\n", "", " ", "é漢", "42</s>", "yes no"]
ANSWERS += ["<|word|> 42", " <|left|>42", "<|right|> 42"]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return as_tokenizer(stripping(of_kind(request.param)))


def test_the_learned_part_is_the_answer(tmp_path, kind):
    """For every kind of tokenizer, and white space and added tokens on both sides of the border: what is learned
    decodes to the answer and one end, what stands before it is what generation starts from, and BOS and EOS are there
    once."""
    pairs = list(itertools.product(PROMPTS, ANSWERS))
    rows = [Text([Piece(p, False), Piece(a, True)], ended=not a.rstrip().endswith("</s>")) for p, a in pairs]
    encoder = TextEncoder(kind)
    asked = encoder.prompts([prompt for prompt, _ in pairs])
    for (prompt, answer), (ids, trained), start in zip(pairs, encoder.rows(rows), asked, strict=True):
        assert ids[~trained].tolist() == start, (prompt, answer)
        assert start == kind(prompt)["input_ids"]
        assert ids[: len(start)].tolist() == start
        learned = ids[trained].tolist()
        body = learned if answer.endswith("</s>") else learned[:-1]
        context = kind.convert_tokens_to_ids("=")  # many decoders drop a space that they begin with
        assert kind.decode([context, *body]) == "=" + answer, (prompt, answer)
        assert (learned or [kind.eos_token_id])[-1] == kind.eos_token_id or answer.rstrip() != answer
        assert learned.count(kind.eos_token_id) == 1 and start.count(kind.bos_token_id) == 1


def test_a_row_decodes_to_its_text(tmp_path, kind):
    """Where the tokenizer itself gives back what it is given."""
    for prompt, answer in itertools.product(PROMPTS, ANSWERS):
        if "<|" not in prompt + answer and "</s>" not in prompt:
            found = prepared(tmp_path, kind, {"prompt": prompt, "completion": answer})
            (ids,) = (row["input_ids"].tolist() for row in found.dataset)
            text = kind.decode(ids[1:]).removesuffix("</s>")
            alone = kind.decode(kind(prompt)["input_ids"][1:])
            assert text == alone + answer.removesuffix("</s>")


@pytest.mark.parametrize(
    "row",
    [
        {"text": "<s>[INST] yes [/INST] no</s>"},
        {"prompt": "<s>[INST] yes [/INST]", "completion": " no</s>"},
        {"prompt": "<s>[INST] yes [/INST]", "completion": " no</s>\n"},
        {"prompt": "[INST] yes [/INST]", "completion": " no"},
    ],
)
def test_special_tokens_that_the_text_has_are_not_doubled(tmp_path, kind, row):
    """Rows that a chat template rendered already (trl#1400)."""
    (ids,) = (found["input_ids"].tolist() for found in prepared(tmp_path, kind, row).dataset)
    assert ids.count(kind.bos_token_id) == ids.count(kind.eos_token_id) == 1
    assert ids[0] == kind.bos_token_id


def test_what_adds_no_space_is_used_as_it_is(backend):
    """A copy of a large vocabulary takes seconds; one is made only where it differs."""
    assert exact(backend) is backend
    assert exact(of_kind("sentencepiece_never")).to_str() == of_kind("sentencepiece_never").to_str()


def test_a_text_that_ids_cannot_hold_is_told(tmp_path, kind):
    """A tokenizer that drops white space says so once, with the first row."""
    report = prepared(tmp_path, kind, {"text": "yes <|left|>no"}, {"text": "yes"}).report
    assert "note: the tokenizer changes the text of 1 of the first 2 rows; " in str(report) and "line 1" in str(report)
    assert "note" not in str(prepared(tmp_path, kind, {"text": "yes  no"}).report)


def test_slow_tokenizers_go_on_without_a_space(kind):
    """One without a backend gives, through a joint, what the backend gives."""

    class Slow:
        is_fast = False
        added_tokens_decoder, eos_token_id = kind.added_tokens_decoder, kind.eos_token_id

        def __call__(self, texts, **how):
            return kind(texts, **how)

    texts = ["42", " 42", "yes no"]
    fast, slow = (encoder._encode_going_on(texts) for encoder in (TextEncoder(kind), TextEncoder(Slow())))
    assert slow == fast


def test_texts_that_repeat_are_tokenized_once(kind, monkeypatch):
    """And give the same ids, also when the memo is full."""
    encoder, calls = TextEncoder(kind), []
    real = encoder._encode_going_on
    monkeypatch.setattr(encoder, "_encode_going_on", lambda texts: calls.append(list(texts)) or real(texts))
    monkeypatch.setattr("fsdp_utils.data.encode.MEMO", 2)
    rows = [Text([Piece("x=", False), Piece(a, True)]) for a in ("a", "b", "a", "c", "d")]
    first, again = ([ids.tolist() for ids, _ in encoder.rows(rows)] for _ in range(2))
    assert first == again and calls[0] == ["a", "b", "c", "d"] and len(calls) == 1


# --- rows that are shown


def test_marked_rows(kind):
    """The text between the marks is what is learned, with the space that it begins with."""
    pieces = [Piece("x=", False), Piece(" 42", True), Piece(" yes", False)]
    ((ids, trained),) = TextEncoder(kind).rows([Text(pieces)])
    text = marked(ids.tolist(), trained.tolist(), kind, marks=("[", "]"))
    assert text.replace("<s> ", "<s>") == "<s>x=[ 42] yes"


def test_colour_where_there_is_one(tmp_path, kind, monkeypatch):
    """On a terminal that has not asked for none (no-color.org); brackets elsewhere."""
    found = prepared(tmp_path, kind, {"prompt": "x=", "completion": "42"})
    assert "\033[30;42m42" in shown(found, kind, as_learned=CAUSAL_LM.shown, count=1, colour=True)
    assert "⟦42" in shown(found, kind, as_learned=CAUSAL_LM.shown, count=1, colour=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert in_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not in_colour()


def test_histogram():
    lines = histogram(np.array([1, 2, 2, 20])).splitlines()
    assert len(lines) == 10 and "1 to        2 tokens:         3 " in lines[0] and lines[9].count("█") == 13


# --- labels, counts, the cache


def test_truncation_and_drops_are_counted(tmp_path, tokenizer):
    """Cut rows are counted, rows whose prompt fills the context are dropped and counted, the rest is exact."""
    rows = [
        {"prompt": "p", "completion": "c"},
        {"prompt": "p", "completion": "0123456789" * 4},
        {"prompt": "0123456789" * 4, "completion": "c"},
    ]
    prepared = prepare_dataset(make_config(write_jsonl(tmp_path / "rows.jsonl", rows), context_length=20), tokenizer)
    report = prepared.report
    assert (report.samples, report.dropped, report.truncated) == (2, 1, 1)
    assert prepared.lengths.tolist() == [4, 20]
    assert (report.tokens, report.label_tokens) == (24, 2 + 18)
    assert report.max_token_id == max(max(row["input_ids"]) for row in prepared.dataset)
    assert prepared.dataset.column_names == ["input_ids", "labels"]
    assert "1 truncated to 20 tokens, 1 dropped" in str(report)
    assert "\n" not in str(report)


def test_rows_switched_off_are_counted_as_such(tmp_path, tokenizer):
    """Beside those that a long prompt leaves without a label, of texts and of chats; where all are, it is said."""
    off = dict(prompt="p", completion="c", weight=0)
    rows = [off | dict(weight=1), off, off | dict(train=False), dict(prompt="0123456789" * 4, completion="c")]
    report = prepared(tmp_path, tokenizer, *rows, context_length=20).report
    assert (report.samples, report.off, report.dropped) == (1, 2, 1)
    assert "1 dropped without labels, 2 left out by their weight or train" in str(report)
    with pytest.raises(DataError, match="all of its 2 samples are left out by their weight or train; write 1"):
        prepared(tmp_path, tokenizer, off, off)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    said = dict(role="user", content="a"), dict(role="assistant", content="b")
    report = prepared(tmp_path, tokenizer, dict(messages=said), dict(messages=said, weight=0)).report
    assert (report.samples, report.off, report.dropped) == (1, 1, 0)


def test_no_label_left_is_an_error(tmp_path, tokenizer):
    """A context that every prompt fills is an error that names --context_length."""
    path = write_jsonl(tmp_path / "rows.jsonl", questions(4))
    with pytest.raises(DataError, match="in any of its 4 samples with --context_length 5"):
        prepare_dataset(make_config(path, context_length=5), tokenizer)


def test_tokenizer_without_eos_or_pad(tmp_path, backend):
    """Without an end-of-sequence token none is added, and the report says so."""
    plain = PreTrainedTokenizerFast(tokenizer_object=backend)
    found = prepared(tmp_path, plain, *questions(1))
    assert trained_text(found, plain) == "It is 0."
    assert "no end-of-sequence token" in str(found.report)


def test_special_token_behind_does_not_end_the_prompt(tmp_path, backend):
    """A tokenizer that puts </s> behind every text does not put it between prompt and completion."""
    both = Tokenizer.from_str(backend.to_str())
    both.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=both, bos_token="<s>", eos_token="</s>")
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": "c"}])
    prepared = prepare_dataset(make_config(path), tokenizer)
    assert tokenizer.decode(prepared.dataset[0]["input_ids"]) == "<s>pc</s>"


def test_cache_is_shared_by_processes_and_missed_after_changes(tmp_path, tokenizer, monkeypatch):
    """A second run with the same inputs tokenizes nothing; another context length or tokenizer does."""
    path = write_jsonl(tmp_path / "rows.jsonl", questions(4))
    first = prepare_dataset(make_config(path), tokenizer)
    tokenizer("a", padding="max_length", truncation=True, max_length=8)  # leaves its state in the tokenizer
    calls = []
    real = tokens_module.as_table
    monkeypatch.setattr(tokens_module, "as_table", lambda *a, **k: calls.append(1) or real(*a, **k))
    assert prepare_dataset(make_config(path), tokenizer).dataset.to_list() == first.dataset.to_list()
    assert not calls
    prepare_dataset(make_config(path, context_length=100), tokenizer)
    tokenizer.eos_token = "<|im_end|>"
    prepare_dataset(make_config(path), tokenizer)
    assert len(calls) == 2


def test_worker_processes_give_the_same_rows(tmp_path, tokenizer, monkeypatch):
    """Two worker processes give the rows of one, in order, and pass on a DataError that names its row."""
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(questions(40)).to_parquet(path)
    alone = prepare_dataset(make_config(path), tokenizer)
    monkeypatch.setattr(tokens_module, "_processes", lambda samples: 2)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    together = prepare_dataset(make_config(path), tokenizer)
    assert together.dataset.to_list() == alone.dataset.to_list()
    datasets.Dataset.from_list([*questions(40), {"question": None, "answer": "a"}]).to_parquet(path)
    with pytest.raises(DataError, match="row 41: field 'question'"):
        prepare_dataset(make_config(path), tokenizer)


@pytest.mark.parametrize("local_rank", [0, 1])
def test_main_process_goes_first_even_if_it_fails(monkeypatch, local_rank):
    """Process 0 meets the others behind its work, they meet it before theirs, also where the work raises."""
    events = []
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: local_rank)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: events.append("barrier"))
    with pytest.raises(DataError), tokens_module.main_process_first():
        events.append("work")
        raise DataError("bad")
    assert events == (["work", "barrier"] if local_rank == 0 else ["barrier", "work"])
