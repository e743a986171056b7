"""What an export is compared on was not trained on, or is said to be; the share of the gain that it keeps."""

import json

import pytest
from real_run import make_config, tokenized

from fsdp_utils.data.prepare import hold_out
from fsdp_utils.data.sources import divide
from fsdp_utils.export.fidelity import gain_kept, verdict
from fsdp_utils.export.held_out import HeldOut, held_out
from fsdp_utils.folders.describe import describe, tokenizer_of
from fsdp_utils.tasks.causal_lm import CAUSAL_LM


@pytest.fixture
def lines(tmp_path):
    """`lines("name", range(…))`: a file with one question and answer for each number."""

    def write(name, numbers):
        rows = [json.dumps(dict(question=f"What is {n}?", answer=f"It is {n}.")) for n in numbers]
        (tmp_path / name).write_text("\n".join(rows) + "\n")
        return tmp_path / name

    return write


def texts(run, name=None, samples=3):
    """Source, decoded rows, and whether they are unseen."""
    described = describe(run)
    tokenizer = tokenizer_of(described)
    found = held_out(described, tokenizer, name=name and str(name), samples=samples)
    return found.source, [tokenizer.decode(ids) for ids, _ in found.rows], found.unseen


def numbers_of(found) -> list[int]:
    return [int(text.split("It is ")[1].split(".")[0]) for text in found]


def test_rows_that_the_run_left_unused(tiny, lines, save_run):
    run, _ = save_run(tiny(), "custom_lora", dataset=lines("a.jsonl", range(10)), dataset_samples=6)
    source, found, unseen = texts(run)
    assert unseen and "left unused" in source and numbers_of(found) == [6, 7, 8]


def test_unused_rows_that_are_trained_on_too(tiny, lines, save_run):
    """A row that stands in the file twice is not unseen."""
    run, _ = save_run(tiny(), "custom_lora", dataset=lines("a.jsonl", [0, 1, 2, 1, 5, 0, 6]), dataset_samples=3)
    assert numbers_of(texts(run)[1]) == [5, 6]


def test_a_run_that_left_none(tiny, lines, save_run):
    """The rows that it trained on, said to be that; of another file, those that are not among them."""
    run, _ = save_run(tiny(), "custom_lora", dataset=lines("a.jsonl", range(4)))
    source, found, unseen = texts(run)
    assert not unseen and "trained on" in source and numbers_of(found) == [0, 1, 2]
    assert numbers_of(texts(run, lines("b.jsonl", range(2, 7)))[1]) == [4, 5, 6]
    assert texts(run, lines("c.jsonl", range(3)))[2] is False


def test_what_the_run_validated_with(tiny, lines, save_run):
    data = lines("a.jsonl", range(10))
    run, _ = save_run(tiny(), "custom_lora", dataset=data, eval_dataset=lines("v.jsonl", range(20, 25)))
    assert numbers_of(texts(run)[1]) == [20, 21, 22]
    run, _ = save_run(tiny(), "custom_lora", dataset=data, eval_samples=4)
    config = make_config(model_name=tiny(), dataset=data, eval_samples=4)
    _, kept = hold_out(config, tokenized(config), None, None, task=CAUSAL_LM)
    tokenizer = tokenizer_of(describe(run))
    wanted = [tokenizer.decode(ids) for ids in kept.dataset["input_ids"]]
    assert texts(run, samples=9)[1] == wanted and len(wanted) == 4


def test_rows_that_are_written_otherwise(tiny, lines, save_run, tmp_path):
    """Keys in another order and another column make no other sample."""
    run, _ = save_run(tiny(), "custom_lora", dataset=lines("a.jsonl", range(4)))
    rows = [json.dumps(dict(id=n, answer=f"It is {n}.", question=f"What is {n}?")) for n in range(6)]
    (tmp_path / "other.jsonl").write_text("\n".join(rows) + "\n")
    assert numbers_of(texts(run, tmp_path / "other.jsonl")[1]) == [4, 5]


def test_held_out_rows_that_stand_in_the_file_again(tiny, lines, save_run, capsys):
    """Of samples held out, those that are trained on too do not count as unseen; the run says so."""
    data = lines("a.jsonl", [0, 1, 2, 3] * 3 + [7])
    run, _ = save_run(tiny(), "custom_lora", dataset=data, eval_samples=4)
    assert texts(run)[2] is False or set(numbers_of(texts(run)[1])) <= {7}
    config = make_config(model_name=tiny(), dataset=data, eval_samples=4)
    _, kept = hold_out(config, tokenized(config), None, None, task=CAUSAL_LM)
    again = sum("It is 7" not in tokenizer_of(describe(run)).decode(ids) for ids in kept.dataset["input_ids"])
    assert f"note: {again} of them are trained on too" in capsys.readouterr().out


def test_what_an_earlier_run_was_trained_on(tiny, lines, save_run):
    """A run that went on from an adapter has seen the rows of both."""
    first, _ = save_run(tiny(), "custom_lora", dataset=lines("a.jsonl", range(4)))
    run, _ = save_run(tiny(), "custom_lora", dataset=lines("b.jsonl", range(10, 14)), init_adapter=first)
    assert numbers_of(texts(run, lines("c.jsonl", [1, 11, 20]))[1]) == [20]
    (first / "run.json").unlink()
    source, _, unseen = texts(run, lines("d.jsonl", [1, 11, 20]))
    assert not unseen and "--init_adapter" in source


def test_what_a_mixture_left(lines):
    """No row is in both parts, and none is lost."""
    mixed = f"{lines('a.jsonl', range(20))}:0.5,{lines('b.jsonl', range(100, 105))}:0.5"
    used, left = divide(make_config(dataset=mixed))
    of = lambda examples: sorted(int(row.value["answer"][6:-1]) for row, _ in examples)
    assert len(used) == 10 and sorted(of(used) + of(left)) == [*range(20), *range(100, 105)]


@pytest.mark.parametrize("exported, kept", [(2.0, 1.0), (4.0, 0.0), (8.0, -1.0), (8**0.5, 0.5), (2.0 * 2**0.05, 0.95)])
def test_share_of_the_gain(exported, kept):
    """Of the loss: half of the way from 4 to 2 is the root of 8."""
    assert gain_kept(2.0, exported, 4.0) == pytest.approx(kept)
    scores = dict(exported=dict(gain_kept=gain_kept(2.0, exported, 4.0)), base={})
    said = verdict(scores, HeldOut("x", [], True), infer_type="w4a16", better="--infer_type merged")
    assert said.startswith("WARNING") == (kept < 0.9)
    assert ("--infer_type merged" in said) == (kept < 0.9)


def test_no_share_without_a_gain_or_text():
    assert gain_kept(3.99, 3.99, 4.0) is None and gain_kept(5.0, 5.0, 4.0) is None
    how = dict(infer_type="merged", better="")
    assert "training gained next to nothing" in verdict(
        dict(exported=dict(gain_kept=None), base={}), HeldOut("x", [], True), **how
    )
    assert "left no text" in verdict(dict(exported={}, base={}), HeldOut("x", [], False), **how)
    assert "not there" in verdict(dict(exported={}), HeldOut("x", [], True), **how)
