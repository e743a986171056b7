"""Tests of fsdp_utils.data.sources, files and layouts: what lies on a disk or the hub becomes rows of a known form."""

import gzip
import json
import os
import sys

import datasets
import numpy as np
import pytest
import zstandard
from texts import as_tokenizer, make_config, of_kind, prepared, questions, trained_text, write_jsonl

from fsdp_utils.core.errors import DataError
from fsdp_utils.data import layouts, sources
from fsdp_utils.data.layouts import QUESTION_PROMPT, Form, Reading
from fsdp_utils.data.sources import DATASETS, Place, drop_overlap, held_out_rows, load_examples, questions_of
from fsdp_utils.data.tokens import prepare_dataset

pytestmark = pytest.mark.usefixtures("own_cache")
WHOLE = Place(dataset_split="validation", sole=True)


@pytest.fixture(scope="module")
def tokenizer():
    return as_tokenizer(of_kind("byte_level"))


def values(examples) -> list[dict]:
    """The raw rows."""
    return [row.value for row, _ in examples]


def held_out(name, **reading):
    return questions_of(held_out_rows(str(name), place=WHOLE, reading=Reading(**reading)))


# --- layouts


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"question": "q?", "answer": "a"}, "###Question:\nq?\n###Answer:\n", "a"),
        ({"prompt": "p ", "completion": "c"}, "p ", "c"),
        ({"text": "t t"}, "", "t t"),
        ({"instruction": "i", "output": "o"}, layouts.ALPACA_PROMPT.format(instruction="i"), "o"),
        (
            {"instruction": "i", "input": "{x}", "output": "o"},
            layouts.ALPACA_INPUT_PROMPT.format(instruction="i", input="{x}"),
            "o",
        ),
    ],
)
def test_layouts(tmp_path, tokenizer, row, prompt, completion):
    """A row is <s>, the prompt, the completion and </s>; the labels are the last two, without the first token."""
    found = prepared(tmp_path, tokenizer, row)
    ids = found.dataset[0]["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids) == f"<s>{prompt}{completion}</s>"
    assert trained_text(found, tokenizer) == f"{completion}</s>"
    assert ids[: len(tokenizer(prompt)["input_ids"])].tolist() == tokenizer(prompt)["input_ids"]


def test_guanaco_prompt_ends_at_the_last_assistant():
    """Guanaco trains on what follows the last `### Assistant: ` only."""
    text = "### Human: a### Assistant: b### Human: c### Assistant: d"
    prompt, completion = Form("guanaco").split({"text": text})
    assert (prompt, completion) == ("### Human: a### Assistant: b### Human: c### Assistant: ", "d")


def test_every_named_dataset_has_a_layout():
    """Each row of DATASETS names a layout that exists."""
    assert all(spec.layout in layouts.LAYOUTS for spec in DATASETS.values())


@pytest.mark.parametrize("name", ["context", "system", "tools", "history", "images"])
def test_a_column_that_answers_depend_on_is_refused(tmp_path, tokenizer, name):
    """Where it has a value; an empty one says nothing."""
    rows = [{"question": "q", "answer": "a", name: ""}, {"question": "q", "answer": "a", name: "x"}]
    assert prepared(tmp_path, tokenizer, rows[0]).report.unread == {}
    with pytest.raises(DataError, match=f"line 2: column '{name}' is read by nothing.*--prompt_template"):
        prepared(tmp_path, tokenizer, *rows)


def test_other_columns_are_named_and_counted(tmp_path, tokenizer):
    """An id is no part of the answer: it is said once, with the number of rows that have it."""
    rows = [{"question": "q", "answer": "a", "id": i, "note": "n" if i else None} for i in range(3)]
    report = prepared(tmp_path, tokenizer, *rows).report
    assert report.unread == {"id": 3, "note": 2}
    assert "not read: id (3 rows), note (2 rows)" in str(report)


def test_columns_with_other_names(tmp_path, tokenizer):
    """--columns, into lists and objects too; a spelling that no row has is refused, and what is read is not unread."""
    row = {"ask": "q", "choices": [{"text": "a"}, {"text": "b"}], "meta": {"k": "v"}}
    found = prepared(tmp_path, tokenizer, row, columns="question=ask,answer=choices.1.text")
    assert trained_text(found, tokenizer) == "b</s>" and found.report.unread == {"meta": 1}
    want = prepared(tmp_path, tokenizer, {"question": "q", "answer": "b"}).dataset[0]["input_ids"]
    assert found.dataset[0]["input_ids"].tolist() == want.tolist()
    for columns, message in (
        ("question=ask,answer=reply", "unknown columns .*--columns question=prompt"),
        ("question", "'question' is not field=column"),
        ("question=ask,question=meta", "names a field twice"),
        ("question=ask,answer=choices.0.text,input=no", "input=no: .* has no column 'no'"),
    ):
        with pytest.raises(DataError, match=message):
            prepared(tmp_path, tokenizer, row, columns=columns)


def test_prompt_template(tmp_path, tokenizer):
    """The prompt is the file's, with any column; a column it names is read, and the answer may not stand in it."""
    path = tmp_path / "template.txt"
    path.write_text("{context} {{x}}\nQ: {question}\nA: ")
    row = {"question": "q", "answer": "a", "context": "c"}
    for template in (str(path), path.read_text()):
        found = prepared(tmp_path, tokenizer, row, prompt_template=template)
        assert tokenizer.decode(found.dataset[0]["input_ids"]) == "<s>c {x}\nQ: q\nA: a</s>"
    name = write_jsonl(tmp_path / "held_out.jsonl", [row])
    assert held_out(name, prompt_template=str(path))[0].prompt == "c {x}\nQ: q\nA: "
    for text, message in (
        ("{question} {answer}", "holds {answer}"),
        ("{nothing}", "has no column 'nothing', but answer, context, question"),
        ("{question[0]}", "names no column"),
        ("{question", "expected '}'"),
        ("{}", "names no column"),
    ):
        with pytest.raises(DataError, match=f"--prompt_template .*{message}"):
            prepared(tmp_path, tokenizer, row, prompt_template=text)
    with pytest.raises(DataError, match=r"none\.txt: cannot be read"):
        prepared(tmp_path, tokenizer, row, prompt_template=str(tmp_path / "none.txt"))
    with pytest.raises(DataError, match="rows of text, which have no question"):
        prepared(tmp_path, tokenizer, {"text": "t"}, prompt_template=str(path))


def test_rows_that_are_switched_off(tmp_path, tokenizer):
    """weight 0 and train false: read, not learned, and so dropped where nothing else is."""
    rows = [{"question": "q", "answer": "a", **more} for more in ({}, {"weight": 0}, {"train": False}, {"weight": 1})]
    assert prepared(tmp_path, tokenizer, *rows).rows.tolist() == [0, 3]
    with pytest.raises(DataError, match=r"line 1: weight 0\.5: only 0"):
        prepared(tmp_path, tokenizer, {"question": "q", "answer": "a", "weight": 0.5})


# --- files


def write_as(kind, path, rows):
    if kind.startswith("jsonl"):
        write_jsonl(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind.startswith("csv"):
        datasets.Dataset.from_list(rows).to_csv(path, index=False)
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif kind == "splits":
        other = datasets.Dataset.from_list(rows[:1])
        datasets.DatasetDict(test=other, train=datasets.Dataset.from_list(rows)).save_to_disk(path)
    elif kind == "clone":
        (path / "data").mkdir(parents=True)
        (path / "README.md").write_text("---\nlicense: mit\n---\n")
        datasets.Dataset.from_list(rows[:3]).to_parquet(path / "data/train-00000-of-00002.parquet")
        datasets.Dataset.from_list(rows[3:]).to_parquet(path / "data/train-00001-of-00002.parquet")
        datasets.Dataset.from_list(rows[:1]).to_parquet(path / "data/test-00000-of-00001.parquet")
    elif kind == "folder":
        path.mkdir()
        write_jsonl(path / "a.jsonl", rows[:2])
        write_jsonl(path / "b.jsonl", rows[2:])
    if kind.endswith((".gz", ".zst")):
        pack = gzip.compress if kind.endswith(".gz") else zstandard.ZstdCompressor().compress
        path.write_bytes(pack(path.read_bytes()))
    return path


KINDS = ["jsonl", "json", "parquet", "csv", "jsonl.gz", "jsonl.zst", "csv.gz", "saved", "splits", "clone", "folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    """With quotes, line ends and characters of other scripts in them."""
    rows = [*questions(6), {"question": 'a "quoted", one\nand two', "answer": "é 漢字 \u2028"}]
    path = write_as(kind, tmp_path / f"rows.{kind}", rows)
    assert values(load_examples(make_config(path))) == rows


def test_glob(tmp_path):
    """Files in the order of their names; a pattern that nothing fits is refused."""
    for i in (1, 0):
        write_jsonl(tmp_path / f"part-{i}.jsonl", questions(3)[i : i + 1])
    assert values(load_examples(make_config(tmp_path / "part-*.jsonl"))) == questions(2)
    with pytest.raises(DataError, match="no file is called so"):
        load_examples(make_config(tmp_path / "other-*.jsonl"))


def test_splits(tmp_path):
    """--dataset_split of saved folders and of folders of files; a wrong one is told those that exist."""
    for kind in ("splits", "clone"):
        path = write_as(kind, tmp_path / kind, questions(6))
        assert values(load_examples(make_config(path, dataset_split="test"))) == questions(1)
        with pytest.raises(DataError, match=r"has no split 'dev', but (train, test|test, train); .*--dataset_split"):
            load_examples(make_config(path, dataset_split="dev"))


def test_a_file_of_no_split_is_not_left_out(tmp_path):
    """A folder in which a file would be ignored is refused."""
    path = write_as("folder", tmp_path / "rows", questions(4))
    datasets.Dataset.from_list(questions(1)).to_parquet(path / "more.parquet")
    with pytest.raises(DataError, match=r"more\.parquet .* belongs to no split of .*; name the files by a pattern"):
        load_examples(make_config(path))


def test_fields_that_a_table_fills_up_are_not_there(tmp_path, tokenizer):
    """Arrow gives every struct the keys of all: nulls of another row's keys reach no template."""
    tokenizer.chat_template = "{% for m in messages %}{{ m.keys() | list }}{% endfor %}"
    rows = [
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": "a", "name": "n"}]},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    found = values(load_examples(make_config(tmp_path / "rows.parquet")))
    assert found == rows


def hub(monkeypatch, rows):
    """Replaces the hub by `rows` for every name; returns the names asked for."""
    asked = []

    def load(path, name=None, split=None):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_any_set_of_the_hub(monkeypatch):
    """By its name, configuration and split."""
    asked = hub(monkeypatch, questions(3))
    found = load_examples(make_config("some/set", dataset_split="dev", dataset_config="main"))
    assert values(found) == questions(3) and asked == [("some/set", "main", "dev")]


def test_orca_math_never_trains_on_its_validation_set(monkeypatch):
    """The last 5,000 of the rows shuffled with seed 42 are for validation; all others may be trained on."""
    rows = questions(6000)
    asked = hub(monkeypatch, rows)
    train = values(load_examples(make_config("orca_math", dataset_samples=10_000)))
    validation = held_out("orca_math")
    reference = list(datasets.Dataset.from_list(rows).shuffle(seed=42)["question"])
    assert [row["question"] for row in train] == reference[:1000]
    assert [row.question for row in validation] == reference[1000:]
    assert validation[0].prompt == QUESTION_PROMPT.format(question=validation[0].question)
    assert asked == [(sources.ORCA_MATH, None, "train")] * 2
    assert len(load_examples(make_config("orca_math", dataset_samples=64))) == 64


def test_sql_skips_the_first_thousand(monkeypatch):
    """know_sql is its validation split, shuffled with the run's seed, from row 1000 on."""
    rows = [{"context": f"c{i}", "question": "q", "answer": "a"} for i in range(1010)]
    asked = hub(monkeypatch, rows)
    found = values(load_examples(make_config("sql", seed=5)))
    reference = list(datasets.Dataset.from_list(rows).shuffle(seed=5)["context"])[1000:]
    assert [row["context"] for row in found] == reference
    assert asked == [("knowrohit07/know_sql", None, "validation")]
    assert Form("sql").split(found[0])[0].startswith("###Context:\nc")


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
    found = prepare_dataset(make_config("dummy", dataset_samples=3, context_length=5000), tokenizer)
    assert found.lengths.tolist() == [5000] * 3


def test_hub_failure_is_one_line(monkeypatch):
    """A hub that does not answer is a DataError that names the dataset and the way out."""

    def fail(path, name=None, split=None):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"yahma/alpaca-cleaned.*ConnectionError: no route.*local file"):
        load_examples(make_config("alpaca"))


# --- mixtures


def test_mixture(tmp_path, tokenizer):
    """As many rows as the weights allow with none taken twice, the same ones every time, and said."""
    a = write_jsonl(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(100)])
    b = write_jsonl(tmp_path / "b.jsonl", [{"prompt": f"b{i}", "completion": "x"} for i in range(60)])
    name = f"{a}:0.75,{b}:0.25"
    found, again = (load_examples(make_config(name)) for _ in range(2))
    texts = [next(iter(row.values())) for row in values(found)]
    assert len(texts) == len(set(texts)) == 133  # all of a and a third as many of b
    assert sum(text[0] == "b" for text in texts) == 33
    assert values(again) == values(found) != values(load_examples(make_config(name, seed=4)))
    report = prepare_dataset(make_config(name), tokenizer).report
    assert f"mixture: 100 of 100 rows of {a}, 33 of 60 rows of {b}" in str(report)
    few = load_examples(make_config(name, dataset_samples=40, explicit_flags={"dataset_samples"}))
    assert [row["text"][0] if "text" in row else "b" for row in values(few)].count("b") == 10 and len(few) == 40
    assert len(load_examples(make_config(f"{a},{b}"))) == 160


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a}:0.5,{b}", "give every source a weight, or none"),
        ("{a}:0,{b}:1", "the weight '0' of .* is no number above 0"),
        ("{a}:1,{a}:1", "holds the same rows twice"),
        ("{a}:1e-9,{b}:1", r"takes no row of .*a\.jsonl"),
        ("{a}:1e-1,{b}:nan", "the weight 'nan' of"),
        ("{a}:1", "beside other sources only"),
        ("{a}:1,,{b}:1", "an empty source"),
        ("{a}:1,none.jsonl:1", "none.jsonl: no such file"),
    ],
)
def test_mixtures_that_mean_nothing(tmp_path, text, message):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(3)])
    with pytest.raises(DataError, match=message):
        load_examples(make_config(text.format(a=tmp_path / "a.jsonl", b=tmp_path / "b.jsonl")))


# --- what cannot be read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ("\n \n", "has no rows"),
        ('{"question": "q", "answer": "a"}\n\n{"question": \n', r"rows.jsonl, line 3: malformed JSON"),
        ('[{"question": "q", "answer": "a"},\n {"question": }]', r"rows.jsonl, line 2: malformed JSON"),
        ("[]", "has no rows"),
        ("3\n", "line 1: a int, not an object"),
        ('{"a": "b", "c": 1}\n', r"unknown columns a, c; .*--columns .*question, answer.*|.*messages"),
        (
            '{"question": "q", "answer": "a"}\n{"question": "q", "answer": null}\n',
            "line 2: field 'answer' is missing or null",
        ),
        ('{"question": "q", "answer": "a"}\n{"question": 3, "answer": "a"}\n', "line 2: field 'question' is int"),
        (
            '{"question": "q", "answer": "a"}\n{"question": "q", "answer": "\\ud800"}\n',
            "line 2: field 'answer' holds half of a surrogate pair",
        ),
        ('{"messages": []}\n', "line 1: field 'messages'"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}\n', "line 1: message 2 needs"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}\n', "line 1: .* half of a surrogate pair"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n', "message 1 has content of type 'image'"),
        (b'{"question": "q", "answer": "\xff"}\n', "line 1: malformed JSON"),
    ],
)
def test_bad_json_names_file_and_line(tmp_path, tokenizer, content, message):
    """A bad JSON file ends with one line that names the file, the line and what is wrong."""
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        prepare_dataset(make_config(path), tokenizer)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_bad_rows_are_counted_and_left_out_when_asked(tmp_path, tokenizer):
    """Without --skip_bad_rows the first is named, with how many there are; with it the others are as without them."""
    good = questions(5)
    path = write_jsonl(tmp_path / "good.jsonl", good)
    want = prepare_dataset(make_config(path), tokenizer).dataset.to_list()
    lines = [json.dumps(row) for row in good]
    lines[2:2] = ['{"question": "q"}', "no json", '{"question": "q", "answer": "a", "context": "c"}', "[1]"]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"line 3: field 'answer' .* \(4 such rows of 9\), or .*--skip_bad_rows true"):
        prepare_dataset(make_config(path), tokenizer)
    found = prepare_dataset(make_config(path, skip_bad_rows=True), tokenizer)
    assert found.dataset.to_list() == want and found.rows.tolist() == [0, 1, 6, 7, 8]
    assert "4 rows left out: " in str(found.report) and "mixed.jsonl, line 4: malformed JSON" in str(found.report)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("question,answer\nq,a\nq\n", "row 2: 1 cells, but the header has 2 .line 3"),
        ("question,question\nq,a\n", "its header names a column twice"),
        ('question,answer\n"q,a\n', "unexpected end of data"),
        ("question,answer\n", "has no rows"),
    ],
)
def test_bad_csv(tmp_path, tokenizer, content, message):
    (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(DataError, match=f"rows.csv.*{message}"):
        prepare_dataset(make_config(tmp_path / "rows.csv"), tokenizer)


def test_bad_files_of_other_kinds(tmp_path, tokenizer):
    """A missing file, an unknown kind, broken files, folders without data, and a null in parquet."""
    (tmp_path / "rows.xlsx").write_text("a,b")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no parquet")
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "broken.jsonl.zst").write_bytes(b"no zstandard")
    (tmp_path / "folder").mkdir()
    datasets.Dataset.from_list([*questions(2), {"question": "q", "answer": None}]).to_parquet(tmp_path / "null.parquet")
    for name, message in (
        ("none.jsonl", "no such file"),
        ("rows.xlsx", "unknown kind of file; give .jsonl, .json, .csv, .parquet"),
        ("broken.parquet", "cannot be read"),
        ("broken.jsonl.gz", "cannot be unpacked"),
        ("broken.jsonl.zst", "cannot be unpacked"),
        ("folder", "holds no data"),
        ("null.parquet", "null.parquet, row 3: field 'answer' is missing or null"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            prepare_dataset(make_config(tmp_path / name), tokenizer)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "saved", "csv", "clone"])
def test_an_unwritable_cache_is_named(tmp_path, tokenizer, monkeypatch, kind):
    """Not the data (huggingface_hub#2797)."""
    path = write_as(kind, tmp_path / f"rows.{kind}", questions(5))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/none")
    with pytest.raises(DataError, match=r"the cache of datasets, /proc/none, cannot be written .*HF_DATASETS_CACHE"):
        prepare_dataset(make_config(path), tokenizer)


def test_zstandard_that_is_missing_is_named(tmp_path, tokenizer, monkeypatch):
    path = write_as("jsonl.zst", tmp_path / "rows.jsonl.zst", questions(2))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match="pip install zstandard"):
        prepare_dataset(make_config(path), tokenizer)


def test_misspelled_name_suggests_the_nearest():
    """An unknown name names the nearest known one."""
    with pytest.raises(DataError, match="did you mean orca_math"):
        load_examples(make_config("orca_mat"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "jsonl.gz", "saved"])
def test_the_cache_is_keyed_by_content(tmp_path, tokenizer, kind):
    """Another file of the same name, size and time is another file."""
    times = []
    for answer in ("one", "two"):
        path = tmp_path / f"rows.{kind}"
        if path.is_dir():
            for old in path.iterdir():
                old.unlink()
            path.rmdir()
        write_as(kind, path, [{"question": "q", "answer": answer}])
        for file in path.iterdir() if path.is_dir() else [path]:
            os.utime(file, ns=(10**18, 10**18))
        times.append(path.stat().st_size)
        assert trained_text(prepare_dataset(make_config(path), tokenizer), tokenizer) == f"{answer}</s>"
    assert kind == "parquet" or times[0] == times[1]


# --- validation


def test_validation_rows(tmp_path):
    """A local file gives prompt, question and answer; a set without answers or validation rows is refused."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "i", "output": "o"}] * 3)
    found = held_out(path)
    want = sources.Question(layouts.ALPACA_PROMPT.format(instruction="i"), "i", "o")
    assert found == [want] * 3
    with pytest.raises(DataError, match="no validation set; give one of orca_math, demo"):
        held_out("alpaca")
    with pytest.raises(DataError, match="no answer to compare"):
        held_out(write_jsonl(tmp_path / "text.jsonl", [{"text": "t"}]))


def test_drop_overlap_ignores_case_and_spacing(tmp_path):
    """Rows whose question is in the validation set are dropped, whatever their case and spacing, and counted."""
    rows = [*questions(5), {"question": " how MUCH is 9\nand 9?", "answer": "x"}]
    train = held_out(write_jsonl(tmp_path / "train.jsonl", rows))
    validation = held_out(write_jsonl(tmp_path / "validation.jsonl", questions(10)[7:] + questions(1)))
    kept, dropped = drop_overlap(train, validation)
    assert dropped == 2 and kept == train[1:5]


def test_lines_are_read_where_they_stand(tmp_path):
    """Any order, empty lines, a byte-order mark, no end of line at the end; each under its number in the file."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n   \n{"text": "b"}\n{"text": "c"}')
    rows = sources.open_source(str(path), place=Place(), reading=Reading()).parts[0].rows
    read = rows.read(np.array([2, 0, 1]))
    assert [row.value["text"] for row in read] == ["c", "a", "b"]
    assert [row.where.rsplit(" ", 1)[1] for row in read] == ["5", "1", "4"]


# --- what a newcomer's data hold


@pytest.mark.parametrize(
    ("weight", "learned"),
    [("0", 0), ("1", 1), ("0.0", 0), ("true", 1), ("False", 0), ("", 1), (0, 0), (1.0, 1), (None, 1)],
)
def test_switches_of_any_type(tmp_path, tokenizer, weight, learned):
    """Text too, as in a table of text, and under another name; what is neither on nor off is refused."""
    rows = [{"question": "q", "answer": "a"}, {"question": "r", "answer": "a"}]
    for name in ("weight", "train"):
        assert len(prepared(tmp_path, tokenizer, {**rows[0], name: weight}, rows[1])) == 1 + learned
        assert len(prepared(tmp_path, tokenizer, {**rows[0], "w": weight}, rows[1], columns=f"{name}=w")) == 1 + learned
    for wrong in ("heavy", 0.5, [1]):
        with pytest.raises(DataError, match=r"line 1: weight .*: only 0"):
            prepared(tmp_path, tokenizer, {**rows[0], "weight": wrong}, rows[1])


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        (
            {"question": "q", "answer": "a", "context": "c"},
            dict(columns="context=context"),
            "context=context: has no effect",
        ),
        ({"question": "q", "answer": "a", "x": "c"}, dict(columns="foo=x"), "foo=x: has no effect"),
        ({"d": {"q": "q", "a": "a", "context": "c"}}, dict(columns="question=d.q,answer=d.a"), r"column 'd\.context'"),
        ({"instruction": "i", "input": "x", "output": "o"}, dict(prompt_template="{instruction}"), "column 'input'"),
        ({"question": "q", "answer": "a", "c": None}, dict(prompt_template="{question}{c}"), "field 'c' is missing"),
        ({"question": "q", "answer": "a"}, dict(prompt_template="{question:>9}"), "names no column"),
        ({"question": "q", "answer": "a"}, dict(prompt_template="{question!r}"), "names no column"),
    ],
)
def test_nothing_is_left_out_in_silence(tmp_path, tokenizer, row, flags, message):
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, tokenizer, row, **flags)


def test_what_stands_beside_a_part_is_named(tmp_path, tokenizer):
    row = {"d": {"q": "q", "a": "a", "id": 3}}
    assert prepared(tmp_path, tokenizer, row, columns="question=d.q,answer=d.a").report.unread == {"d.id": 1}


def test_the_first_row_need_not_have_every_column(tmp_path, tokenizer):
    """Columns are those of the first rows together: one that is null in the first is there."""
    rows = [{"question": "q", "answer": "wrong", "alt": None}, {"question": "q", "answer": "wrong", "alt": "right"}]
    found = prepared(tmp_path, tokenizer, *rows, columns="answer=alt", skip_bad_rows=True)
    assert found.report.refused == 1 and trained_text(found, tokenizer) == "right</s>"


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_a_packed_file_that_ends_too_early(tmp_path, tokenizer, kind):
    """Also where the cut falls between two rows; files of several packed parts are whole."""
    pack = gzip.compress if kind.endswith("gz") else zstandard.ZstdCompressor().compress
    lines = b"".join(json.dumps({"text": os.urandom(20).hex()}).encode() + b"\n" for _ in range(4000))
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(pack(lines)[:-3000])
    with pytest.raises(DataError, match="cannot be unpacked"):
        prepare_dataset(make_config(path), tokenizer)
    path.write_bytes(pack(lines[: lines.index(b"\n") + 1]) + pack(lines[lines.index(b"\n") + 1 :]))
    assert len(load_examples(make_config(path))) == 4000


def test_the_same_rows_twice_are_refused(tmp_path, tokenizer):
    """A copy in a folder or pattern, packed or not; a file about files is none of the data."""
    folder = write_as("folder", tmp_path / "rows", questions(4))
    (folder / "dataset_infos.json").write_text("{}")
    assert len(load_examples(make_config(folder))) == 4
    (folder / "copy.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    for name in (f"{folder}/*.jsonl*", folder):
        with pytest.raises(DataError, match=r"the same rows twice, as .*a\.jsonl|belongs to no split"):
            load_examples(make_config(name))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a", "id": ' + b"1" * 5000 + b"}\n", "line 1: malformed JSON"),
        ('{"text": "a"}\n'.encode("utf-16"), "line 1: malformed JSON"),
        ('{"text": "é"}\n'.encode("latin-1"), "line 1: malformed JSON: it is not UTF-8"),
        (b'{\n "data": [1]\n}\n', "one object over several lines"),
    ],
)
def test_other_bad_files(tmp_path, tokenizer, content, message):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare_dataset(make_config(tmp_path / "rows.jsonl"), tokenizer)


def test_tables_that_cannot_be_read(tmp_path, tokenizer):
    """Columns of a type that is not known, or of the same name; a wide cell is no error."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    twice = pa.table([["q"], ["a"], ["b"]], names=["question", "answer", "answer"])
    odd = pa.table({"text": ["a"], "m": pa.array([[("k", 1)]], type=pa.map_(pa.string(), pa.int64()))})
    for name, table, message in (("twice", twice, "names a column twice"), ("odd", odd, "leave that column away")):
        pq.write_table(table, tmp_path / f"{name}.parquet")
        with pytest.raises(DataError, match=message):
            prepare_dataset(make_config(tmp_path / f"{name}.parquet"), tokenizer)
    (tmp_path / "wide.CSV").write_text(f"question,answer\nq,{'a' * 200_000}\n")
    assert len(load_examples(make_config(tmp_path / "wide.CSV"))) == 1


def test_none_of_the_rows_can_be_read(tmp_path, tokenizer):
    """Is not blamed on --context_length."""
    with pytest.raises(DataError, match=r"none of its 2 rows can be read; .*line 1: field 'answer'"):
        prepared(
            tmp_path, tokenizer, {"question": "q", "answer": 1}, {"question": "r", "answer": 2}, skip_bad_rows=True
        )


def test_dataset_samples_of_a_mixture(tmp_path):
    """Exactly so many."""
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(30)])
    name = f"{tmp_path}/a.jsonl:0.5,{tmp_path}/b.jsonl:0.5"
    assert len(load_examples(make_config(name, dataset_samples=7, explicit_flags={"dataset_samples"}))) == 7


def test_rows_within_a_file_of_another_shape(tmp_path, tokenizer):
    (tmp_path / "rows.json").write_text(json.dumps([{"version": 1, "data": questions(2)}]))
    with pytest.raises(DataError, match="if the rows are those under 'data'"):
        prepare_dataset(make_config(tmp_path / "rows.json"), tokenizer)


def test_configurations_of_a_clone(tmp_path):
    """--dataset_config names one; a wrong name is told those that exist."""
    clone = tmp_path / "clone"
    for name, rows in (("main", questions(2)), ("other", questions(3))):
        (clone / name).mkdir(parents=True)
        write_jsonl(clone / name / "train.jsonl", rows)
    files = "".join(f"- config_name: {n}\n  data_files: {n}/train.jsonl\n" for n in ("main", "other"))
    (clone / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    assert len(load_examples(make_config(clone, dataset_config="other"))) == 3
    for config in ("none", None):
        with pytest.raises(DataError, match=r"main.*other.*name one by --dataset_config"):
            load_examples(make_config(clone, dataset_config=config))


def test_a_validation_set_of_the_hub(monkeypatch):
    """Its split is --eval_split, or the only one that there is."""
    asked = hub(monkeypatch, questions(3))
    splits = ["train", "validation"]
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: splits)
    assert len(held_out("some/set")) == 3
    splits = ["test"]
    held_out("some/set")
    splits = ["train", "test"]
    with pytest.raises(DataError, match="has no split 'validation', but train, test"):
        held_out("some/set")
    assert [split for _, _, split in asked] == ["validation", "test"]


def test_a_clone_whose_files_are_links(tmp_path):
    """As a cache keeps them; a file that belongs to no split is named as it stands in the folder."""
    kept = write_as("clone", tmp_path / "kept", questions(6))
    (tmp_path / "clone/data").mkdir(parents=True)
    for path in (kept / "data").iterdir():
        (tmp_path / "clone/data" / path.name).symlink_to(path)
    assert len(load_examples(make_config(tmp_path / "clone"))) == 6
    (tmp_path / "clone/other.jsonl").symlink_to(write_jsonl(tmp_path / "rows.jsonl", questions(1)))
    with pytest.raises(DataError, match=r"clone/other\.jsonl .* belongs to no split"):
        load_examples(make_config(tmp_path / "clone"))
