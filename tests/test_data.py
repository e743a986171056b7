"""Tests of fsdp_utils.data, fsdp_utils.tokens and fsdp_utils.packing."""

import itertools
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fsdp_utils.data import sources as data_module
from fsdp_utils.data import tokens as tokens_module
from fsdp_utils.data.batches import (
    Batches,
    collate,
    collate_packed,
    collate_padded,
    deal,
    epoch_rows,
    pack,
    padding_share,
)
from fsdp_utils.data.sources import (
    DATASETS,
    QUESTION_PROMPT,
    DataError,
    drop_overlap,
    load_examples,
    validation_examples,
)
from fsdp_utils.data.tokens import TokenizedData, prepare_dataset

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as Qwen3: only the last turn keeps its (empty) thoughts
CHATML_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITHOUT_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "Say Four."},
    {"role": "assistant", "content": "Again: Four."},
]


@pytest.fixture(scope="module")
def backend():
    """A byte-level BPE tokenizer that puts <s> in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["###Question:\nTwo and two?\n###Answer:\nFour, I answer."] * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@pytest.fixture
def tokenizer(backend):
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Every test starts with an empty cache, without progress bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def make_config(dataset="unused", **changes):
    settings = {"dataset": str(dataset), "dataset_samples": 512, "context_length": 256, "seed": 3, "batch_size": 2}
    settings |= {"gradient_accumulation_steps": 2, "packing": False, "explicit_flags": frozenset()}
    return SimpleNamespace(**(settings | changes))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(n):
    return [{"question": f"How much is {i} and {i}?", "answer": f"It is {2 * i}."} for i in range(n)]


def trained_text(prepared, tokenizer, row=0):
    """The text of the labels of a row."""
    labels = prepared.dataset[row]["labels"]
    return tokenizer.decode(labels[labels != -100])


def fake_data(lengths):
    """Rows whose ids tell the sample and the position: 1000 * (sample + 1) + position."""
    ids = [[1000 * (i + 1) + p for p in range(n)] for i, n in enumerate(lengths)]
    labels = [[-100, *row[1:]] for row in ids]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}).with_format("numpy")
    return TokenizedData(
        dataset=rows, lengths=np.array(lengths, dtype=np.int64), rows=np.arange(len(lengths)), report=None, name="fake"
    )


def samples_of(batch):
    """The samples in a micro-batch, from their ids."""
    return [int(i) // 1000 - 1 for i in batch["input_ids"].flatten() if i >= 1000 and i % 1000 == 0]


# --- sources and layouts


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"question": "q?", "answer": "a"}, "###Question:\nq?\n###Answer:\n", "a"),
        ({"prompt": "p ", "completion": "c"}, "p ", "c"),
        ({"text": "t t"}, "", "t t"),
        ({"instruction": "i", "output": "o"}, data_module.ALPACA_PROMPT.format(instruction="i"), "o"),
        (
            {"instruction": "i", "input": "{x}", "output": "o"},
            data_module.ALPACA_INPUT_PROMPT.format(instruction="i", input="{x}"),
            "o",
        ),
    ],
)
def test_layouts(tmp_path, tokenizer, row, prompt, completion):
    """A row is <s>, the prompt, the completion and </s>; the labels are the last two, without the first token."""
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    prepared = prepare_dataset(make_config(path), tokenizer)
    ids = prepared.dataset[0]["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids) == f"<s>{prompt}{completion}</s>"
    assert trained_text(prepared, tokenizer) == f"{completion}</s>"
    assert ids[: len(tokenizer(prompt)["input_ids"])].tolist() == tokenizer(prompt)["input_ids"]


def test_guanaco_prompt_ends_at_the_last_assistant():
    """Guanaco trains on what follows the last `### Assistant: ` only."""
    text = "### Human: a### Assistant: b### Human: c### Assistant: d"
    prompt, completion = data_module.LAYOUTS["guanaco"].split({"text": text})
    assert (prompt, completion) == ("### Human: a### Assistant: b### Human: c### Assistant: ", "d")


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder", "dict"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    """jsonl, json array, parquet, saved dataset and saved dict with a train split hold the same rows."""
    rows, path = questions(7), tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind == "folder":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    else:
        datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(path)
    assert load_examples(make_config(path)).to_list() == rows


def hub(monkeypatch, rows):
    """Replaces the hub by `rows` for every name; returns the names asked for."""
    asked = []

    def load(path, split):
        asked.append((path, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_orca_math_never_trains_on_its_validation_set(monkeypatch):
    """The last 5,000 of the rows shuffled with seed 42 are for validation; all others may be trained on."""
    rows = questions(6000)
    asked = hub(monkeypatch, rows)
    train = load_examples(make_config("orca_math", dataset_samples=10_000))
    held_out = validation_examples("orca_math")
    reference = datasets.Dataset.from_list(rows).shuffle(seed=42)["question"]
    assert train["question"] == list(reference)[:1000]
    assert held_out["question"] == list(reference)[1000:]
    assert held_out[0]["prompt"] == QUESTION_PROMPT.format(question=held_out[0]["question"])
    assert asked == [(data_module.ORCA_MATH, "train")] * 2
    assert len(load_examples(make_config("orca_math", dataset_samples=64))) == 64


def test_sql_skips_the_first_thousand(monkeypatch):
    """know_sql is its validation split, shuffled with the run's seed, from row 1000 on."""
    rows = [{"context": f"c{i}", "question": "q", "answer": "a"} for i in range(1010)]
    asked = hub(monkeypatch, rows)
    found = load_examples(make_config("sql", seed=5))
    assert found["context"] == list(datasets.Dataset.from_list(rows).shuffle(seed=5)["context"])[1000:]
    assert asked == [("knowrohit07/know_sql", "validation")]
    assert data_module.LAYOUTS["sql"].split(found[0])[0].startswith("###Context:\nc")


def test_dataset_samples_caps_others_only_when_given(monkeypatch, tmp_path):
    """alpaca_sample is always capped; alpaca and files only where the user passed --dataset_samples."""
    hub(monkeypatch, [{"instruction": "i", "input": "", "output": str(i)} for i in range(20)])
    path = write_jsonl(tmp_path / "rows.jsonl", questions(20))
    for name, expected in (("alpaca_sample", 5), ("alpaca", 20), (path, 20)):
        assert len(load_examples(make_config(name, dataset_samples=5))) == expected
        given = make_config(name, dataset_samples=5, explicit_flags={"dataset_samples"})
        assert len(load_examples(given)) == 5


def test_dummy_fills_the_context(tokenizer):
    """Every row of `dummy` is as long as the context, however long that is."""
    prepared = prepare_dataset(make_config("dummy", dataset_samples=3, context_length=5000), tokenizer)
    assert prepared.lengths.tolist() == [5000] * 3


def test_hub_failure_is_one_line(monkeypatch):
    """A hub that does not answer is a DataError that names the dataset and the way out."""

    def fail(path, split):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"yahma/alpaca-cleaned.*ConnectionError: no route.*local file"):
        load_examples(make_config("alpaca"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("\n \n", "has no rows"),
        ('{"question": "q", "answer": "a"}\n\n{"question": \n', r"rows.jsonl, line 3: malformed JSON"),
        ('[{"question": "q", "answer": "a"},\n {"question": }]', r"rows.jsonl, line 2: malformed JSON"),
        ("[]", "has no rows"),
        ("3\n", "line 1: a int, not an object"),
        (
            '{"a": "b", "c": 1}\n',
            r"unknown columns a, c; .*question, answer.*messages|unknown columns a, c; .*messages",
        ),
        (
            '{"question": "q", "answer": "a"}\n{"question": "q", "answer": null}\n',
            "line 2: field 'answer' is missing or null",
        ),
        ('{"question": "q", "answer": "a"}\n{"question": 3, "answer": "a"}\n', "line 2: field 'question' is int"),
        ('{"question": "q", "answer": "\\ud800"}\n', "rows.jsonl: cannot be read"),
        ('{"messages": []}\n', "line 1: field 'messages'"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}\n', "line 1: message 2 needs"),
        (b'{"question": "q", "answer": "\xff"}\n', "line 1: malformed JSON"),
    ],
)
def test_bad_json_names_file_and_line(tmp_path, content, message):
    """A bad JSON file ends with one line that names the file, the line and what is wrong."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        load_examples(make_config(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_bad_files_of_other_kinds(tmp_path, tokenizer):
    """A missing file, an unknown kind, a broken parquet file, a folder that is no dataset, and a null in parquet."""
    (tmp_path / "rows.csv").write_text("a,b")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no parquet")
    (tmp_path / "folder").mkdir()
    datasets.Dataset.from_list([*questions(2), {"question": "q", "answer": None}]).to_parquet(tmp_path / "null.parquet")
    for name, message in (
        ("none.jsonl", "no such file"),
        ("rows.csv", "unknown kind of file; give .jsonl, .json, .parquet"),
        ("broken.parquet", "cannot be read"),
        ("folder", "cannot be read"),
        ("null.parquet", "null.parquet, row 3: field 'answer' is missing or null"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            prepare_dataset(make_config(tmp_path / name), tokenizer)
        assert "\n" not in str(caught.value)


def test_misspelled_name_suggests_the_nearest():
    """An unknown name names the nearest known one."""
    with pytest.raises(DataError, match="did you mean orca_math"):
        load_examples(make_config("orca_mat"))


def test_changed_file_is_read_again(tmp_path):
    """The cache of a file is not used once the file has changed."""
    path = write_jsonl(tmp_path / "rows.jsonl", questions(3))
    assert len(load_examples(make_config(path))) == 3
    write_jsonl(path, questions(4))
    assert len(load_examples(make_config(path))) == 4


def test_validation_rows(tmp_path):
    """A local file gives prompt, question and answer; a set without answers or validation rows is refused."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "i", "output": "o"}] * 3)
    found = validation_examples(str(path), samples=2).to_list()
    assert found == [{"prompt": data_module.ALPACA_PROMPT.format(instruction="i"), "question": "i", "answer": "o"}] * 2
    with pytest.raises(DataError, match="no validation set; give one of orca_math, demo"):
        validation_examples("alpaca")
    with pytest.raises(DataError, match="no answer to compare"):
        validation_examples(str(write_jsonl(tmp_path / "text.jsonl", [{"text": "t"}])))


def test_drop_overlap_ignores_case_and_spacing():
    """Rows whose question is in the validation set are dropped, whatever their case and spacing, and counted."""
    train = datasets.Dataset.from_list([*questions(5), {"question": " how MUCH is 9\nand 9?", "answer": "x"}])
    kept, dropped = drop_overlap(train, datasets.Dataset.from_list(questions(10)[7:] + questions(1)))
    assert dropped == 2
    assert kept.to_list() == questions(5)[1:]


# --- tokens and labels


def test_eos_label_is_kept_where_pad_is_eos(tmp_path, tokenizer):
    """With pad = eos the end-of-sequence label stays, and padding has none."""
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    path = write_jsonl(tmp_path / "rows.jsonl", [*questions(1), {"question": "q", "answer": "a longer answer " * 3}])
    prepared = prepare_dataset(make_config(path), tokenizer)
    batches = Batches(prepared, collate, batch_size=2, pad_token_id=tokenizer.pad_token_id, context_length=256)
    (batch,) = next(batches.steps(0))
    labels, lengths = labels_of(batch), sorted(prepared.lengths.tolist(), reverse=True)
    for row, end in enumerate(length - 1 for length in lengths):
        assert labels[row, end] == tokenizer.eos_token_id
        assert (labels[row, end + 1 :] == -100).all()
    assert lengths[0] != lengths[1]


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


def test_no_label_left_is_an_error(tmp_path, tokenizer):
    """A context that every prompt fills is an error that names --context_length."""
    path = write_jsonl(tmp_path / "rows.jsonl", questions(4))
    with pytest.raises(DataError, match="in any of its 4 samples with --context_length 5"):
        prepare_dataset(make_config(path, context_length=5), tokenizer)


def test_tokenizer_without_eos_or_pad(tmp_path, backend):
    """Without an end-of-sequence token none is added, and the report says so."""
    plain = PreTrainedTokenizerFast(tokenizer_object=backend)
    prepared = prepare_dataset(make_config(write_jsonl(tmp_path / "rows.jsonl", questions(1))), plain)
    assert trained_text(prepared, plain) == "It is 0."
    assert "no end-of-sequence token" in str(prepared.report)


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
    real = tokens_module.tokenize_batch
    monkeypatch.setattr(tokens_module, "tokenize_batch", lambda *a, **k: calls.append(1) or real(*a, **k))
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


# --- chats


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "Four.<|im_end|>Again: Four.<|im_end|>"),
        (CHATML_MARKED, "Four.<|im_end|>Again: Four.<|im_end|>"),
        (CHATML_THOUGHTS, "Four.<|im_end|><think>\n\n</think>\n\nAgain: Four.<|im_end|>"),
        (WITHOUT_END, "assistant: Four.assistant: Again: Four.</s>"),
    ],
)
def test_chat_trains_on_assistant_turns_only(tmp_path, tokenizer, template, expected):
    """The labels of a chat of two turns are the assistant's words and the ends of its turns."""
    tokenizer.chat_template = template
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": CHAT}])
    prepared = prepare_dataset(make_config(path), tokenizer)
    assert trained_text(prepared, tokenizer) == expected
    whole = tokenizer.decode(prepared.dataset[0]["input_ids"])
    assert whole.removesuffix("</s>").strip() == tokenizer.apply_chat_template(CHAT, tokenize=False).strip()


ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [ZEPHYR, LLAMA2], ids=["zephyr", "llama2"])
@pytest.mark.parametrize("space", ["prepend", "first", "always"])
def test_chat_tokens_are_those_of_the_template(tmp_path, space, template):
    """Tokenizers that put a space before what they begin with (Llama-2, Mistral) do so once, not at every turn."""
    backend = Tokenizer(models.BPE())
    if space == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=space)
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(["[INST] <|user|>\n<|assistant|>\n yes no maybe [/INST] a b c"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    turns = [("user", "a b"), ("assistant", "yes"), ("user", "c"), ("assistant", "no maybe")]
    messages = [dict(role=role, content=content) for role, content in turns]
    prepared = prepare_dataset(make_config(write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}])), tokenizer)
    (row,) = prepared.dataset
    assert list(row["input_ids"]) == tokenizer.apply_chat_template(messages)["input_ids"]
    learned = "".join(tokenizer.convert_ids_to_tokens([i for i in row["labels"] if i != -100]))
    assert learned.replace("▁", "") == "yes</s>nomaybe</s>"


def test_chat_that_the_assistant_opens(tmp_path, tokenizer):
    """The header of the first turn is not learned, though its words hold those of the answer."""
    tokenizer.chat_template = CHATML
    messages = [
        dict(role="assistant", content="a"),
        dict(role="user", content="u"),
        dict(role="assistant", content="b"),
    ]
    prepared = prepare_dataset(make_config(write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}])), tokenizer)
    assert trained_text(prepared, tokenizer) == "a<|im_end|>b<|im_end|>"


def test_chat_errors_name_the_row(tmp_path, tokenizer):
    """No chat template, a template that refuses a row, and one that rewrites earlier turns: each says what to do."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": CHAT}])
    with pytest.raises(DataError, match="no chat template"):
        prepare_dataset(make_config(path), tokenizer)
    for template, message in (
        ("{{ raise_exception('roles must alternate') }}", "row 1: .*roles must alternate"),
        ("{{ messages | length }}" + CHATML, "row 1: .*it rewrites"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(DataError, match=message):
            prepare_dataset(make_config(path), tokenizer)


# --- order, sharding, padding


def batches_of(data, *, batch_size, gradient_accumulation_steps=1, **changes):
    settings = {"seed": 1, "context_length": 64} | changes
    return Batches(data, collate, batch_size=batch_size, accumulation=gradient_accumulation_steps, **settings)


def all_steps(data, *, world_size, epoch=0, start_step=0, **changes):
    """[rank][step] -> micro-batches."""
    ranks = [batches_of(data, world_size=world_size, rank=rank, **changes) for rank in range(world_size)]
    return [list(batches.steps(epoch, start=start_step)) for batches in ranks]


def labels_of(batch):
    """What each token of a micro-batch is learned as, int64 `[b, L]`; -100 where it is not predicted."""
    labels = torch.full(batch["input_ids"].shape, -100)
    predicting = batch["targets"] != -100
    labels.view(-1)[batch["positions"][predicting] + 1] = batch["targets"][predicting]
    return labels


LENGTHS = np.random.default_rng(0).integers(2, 60, size=44).tolist()


@pytest.mark.parametrize("packing", [False, True])
def test_global_batch_does_not_depend_on_the_split(packing):
    """1x8, 2x4, 4 accumulation steps x 2, 2x2x2 and 8x1: step k holds the same samples, and an epoch each one once."""
    data = fake_data(LENGTHS)
    seen = []
    for batch_size, accumulation, world_size in ((8, 1, 1), (4, 1, 2), (2, 4, 1), (2, 2, 2), (1, 1, 8)):
        ranks = all_steps(
            data,
            world_size=world_size,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            packing=packing,
        )
        assert len({len(steps) for steps in ranks}) == 1
        assert all(len(step) == accumulation for steps in ranks for step in steps)
        together = [
            sorted(s for step in steps for batch in step for s in samples_of(batch))
            for steps in zip(*ranks, strict=True)
        ]
        seen.append(together)
        split = dict(batch_size=batch_size, gradient_accumulation_steps=accumulation, world_size=world_size)
        assert batches_of(data, packing=packing, **split).count(0) == len(ranks[0])
    assert all(steps == seen[0] for steps in seen)
    assert sorted(s for step in seen[0] for s in step) == list(range(len(LENGTHS)))


def test_last_batch_keeps_every_rank_busy():
    """9 samples in global batches of 8: the last step holds the ninth, and rows without labels elsewhere."""
    ranks = all_steps(fake_data([5] * 9), world_size=2, batch_size=2, gradient_accumulation_steps=2)
    last = [batch for steps in ranks for batch in steps[1]]
    assert len(last) == 4
    assert sum(len(samples_of(batch)) for batch in last) == 1
    for batch in last:
        if not samples_of(batch):
            assert batch["input_ids"].shape == (1, 1)
            assert not len(batch["targets"])


def test_resume_continues_the_epoch():
    """start_step gives the steps that an epoch from its start gives from there on; another epoch differs."""
    data, shape = fake_data(LENGTHS), {"world_size": 1, "batch_size": 2, "gradient_accumulation_steps": 2}
    whole, resumed = all_steps(data, **shape)[0], all_steps(data, start_step=3, **shape)[0]
    assert len(resumed) == len(whole) - 3
    for step, again in zip(whole[3:], resumed, strict=True):
        for batch, same in zip(step, again, strict=True):
            assert all(torch.equal(batch[key], same[key]) for key in batch)
    other = all_steps(data, epoch=1, **shape)[0]
    assert [samples_of(b) for b in other[0]] != [samples_of(b) for b in whole[0]]


def test_ranks_of_a_micro_step_have_similar_lengths():
    """Dealing by length leaves at most 60 % of the padding and waiting that dealing by order leaves."""
    lengths = np.random.default_rng(1).lognormal(5.5, 0.7, size=32).astype(int)

    def waste(shares):
        """Padded tokens over all ranks, each as wide as the longest of its micro-step."""
        return sum(max(lengths[s].max() for s in step) * 4 * 2 for step in zip(*shares, strict=True)) - lengths.sum()

    dealt = [deal(lengths, micro_batches=4, rank=rank, world_size=4) for rank in range(4)]
    naive = [np.array_split(np.arange(32)[rank::4], 4) for rank in range(4)]
    assert sorted(np.concatenate([s for share in dealt for s in share])) == list(range(32))
    assert waste(dealt) < 0.6 * waste(naive)


def test_padded_micro_batch():
    """Rows are padded on the right to a multiple, and padding predicts nothing; types are int64."""
    ranks = all_steps(
        fake_data([3, 5]),
        world_size=1,
        batch_size=2,
        gradient_accumulation_steps=1,
        multiple=4,
    )
    batch = ranks[0][0][0]
    assert set(batch) == {"input_ids", "positions", "targets"}
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert batch["input_ids"].shape == (2, 8) and batch["positions"].shape == batch["targets"].shape == (4 + 2,)
    assert batch["input_ids"][1].tolist() == [1000, 1001, 1002, 0, 0, 0, 0, 0]
    assert labels_of(batch)[1].tolist() == [-100, 1001, 1002, -100, -100, -100, -100, -100]


def test_small_dataset_is_refused():
    """Fewer samples than one global batch is an error that names both numbers."""
    shape = dict(batch_size=2, gradient_accumulation_steps=2, world_size=2, context_length=256)
    with pytest.raises(DataError, match=r"fake: 7 samples do not fill one global batch of 8 .*2 processes"):
        batches_of(fake_data([3] * 7), **shape).check()
    batches_of(fake_data([3] * 8), **shape).check()
    with pytest.raises(DataError, match="1 packs of 256 tokens do not fill"):
        batches_of(fake_data([3] * 8), packing=True, **shape).check()


# --- packing


def test_packed_rows_equal_their_samples():
    """Cut where positions restart, a packed row gives the ids and labels of each sample, and padding without labels."""
    data = fake_data(LENGTHS)
    found = []
    for step in all_steps(data, world_size=1, batch_size=2, gradient_accumulation_steps=2, packing=True)[0]:
        for batch in step:
            assert set(batch) == {"input_ids", "position_ids", "cu_seq_lens_q", "positions", "targets"}
            assert batch["input_ids"].shape[1] <= 64
            for ids, labels, positions in zip(batch["input_ids"], labels_of(batch), batch["position_ids"], strict=True):
                starts = [*torch.where(positions == 0)[0].tolist(), len(positions)]
                for start, end in itertools.pairwise(starts):
                    assert positions[start:end].tolist() == list(range(end - start))
                    if ids[start] == 0:
                        assert (labels[start:end] == -100).all()
                        continue
                    sample = int(ids[start]) // 1000 - 1
                    found.append(sample)
                    assert ids[start:end].tolist() == data.dataset[sample]["input_ids"].tolist()
                    assert labels[start:end].tolist() == data.dataset[sample]["labels"].tolist()
    assert sorted(found) == list(range(len(LENGTHS)))


@pytest.mark.parametrize("sigma", [0.5, 0.8])
def test_packs_of_math_problems_are_nearly_full(sigma):
    """Lengths as in Orca-Math (lognormal, median 250) in rows of 2048: under 3 % padding, each sample in one pack."""
    lengths = np.random.default_rng(2).lognormal(np.log(250), sigma, size=30_000).astype(int).clip(8, 2048)
    packs = pack(lengths, capacity=2048, rng=np.random.default_rng(0))
    assert sorted(s for p in packs for s in p) == list(range(len(lengths)))
    assert max(lengths[p].sum() for p in packs) <= 2048
    assert padding_share(packs, lengths, capacity=2048) < 0.03


def test_packed_loss_equals_the_loss_of_single_samples():
    """A tiny Llama gives each token of a packed row the loss it has in a row of its own."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()

    def token_losses(batch):
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none")
        return losses[labels[:, 1:].flatten() != -100].double().sum()

    ids = [np.random.default_rng(i).integers(1, 64, size=n) for i, n in enumerate((9, 5, 12, 4, 6))]
    samples = [(row, np.concatenate([[-100] * 2, row[2:]])) for row in ids]
    shape = {"pad_token_id": 0, "multiple": 8, "context_length": 32}
    with torch.no_grad():
        packed = token_losses(collate_packed([samples[:3], samples[3:]], **shape))
        padded = token_losses(collate_padded(samples, **shape))
        alone = sum(token_losses(collate_padded([sample], **shape)) for sample in samples)
    assert torch.allclose(packed, alone, rtol=1e-6)
    assert torch.allclose(padded, alone, rtol=1e-6)


def test_packs_depend_on_seed_and_epoch_only():
    """The same seed and epoch give the same packs; another epoch mixes others together."""
    lengths = np.array(LENGTHS)
    shape = {"context_length": 128, "packing": True}
    first, again = (epoch_rows(lengths, seed=1, epoch=0, **shape)[0] for _ in range(2))
    other = epoch_rows(lengths, seed=1, epoch=1, **shape)[0]
    assert first == again
    assert {frozenset(p) for p in first} != {frozenset(p) for p in other}


def test_pack_refuses_a_sample_longer_than_a_row():
    """A sample that fits no row is an error, not a row that is too long."""
    with pytest.raises(ValueError, match="a sample of 9 tokens does not fit a pack of 8"):
        pack(np.array([3, 9]), capacity=8, rng=np.random.default_rng(0))


def test_every_named_dataset_has_a_layout():
    """Each row of DATASETS names a layout that exists."""
    assert all(spec.layout in data_module.LAYOUTS for spec in DATASETS.values())
