"""The model card of a result: what the hub reads, what a person wants to know, and nothing of this machine."""

import json
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from real_run import make_config

import train
from fsdp_utils.folders.card import OURS, Told, write_card
from fsdp_utils.folders.names import RUN_FILE


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.fixture(scope="module")
def run(tiny, tiny_data, tmp_path_factory):
    """A whole run of train.py on a base that has a license."""
    base = shutil.copytree(tiny(), tmp_path_factory.mktemp("places") / "my-base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlicense_link: LICENSE\n---\n# Base\n")
    out = base.parent / "my-run"
    flags = dict(model_name=base, dataset=tiny_data, train_type="bnb_dora", lora_rank=4, lr=0.001, max_steps=3)
    flags |= dict(context_length=128)  # holds every row
    train.main(make_config(**flags, save_model=True, output_dir=out, eval_samples=4, entity="secret-team"))
    return out


def refuse_places(text: str, *folders: Path) -> None:
    """No path of this machine stands in a text."""
    for folder in (*folders, Path.home()):
        assert str(folder) not in text
    assert os.sep + "tmp" + os.sep not in text


def test_card_of_a_run(run, tiny_data):
    """Base, data, train type, given flags, losses and license; places and accounts are not told."""
    text, data = (run / "README.md").read_text(), card_of(run).data.to_dict()
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [row["loss"] for row in logged if "loss" in row][-1]
    validation = [row["eval_loss"] for row in logged if "eval_loss" in row][-1]
    wanted = (
        "# my-run", "| base | my-base |", f"| data | {tiny_data.name}, 12 samples |", "| train type | bnb_dora |",
        "--lora_rank 4", "--lr 0.001", "--max_steps 3", "--eval_samples 4", f"| final training loss | {training:.4g} |",
        f"| final validation loss | {validation:.4g} |",
    )  # fmt: skip
    for line in wanted:
        assert line in text
    assert data["license"] == "apache-2.0" and data["library_name"] == "peft" and "bnb_dora" in data["tags"]
    assert "base_model" not in data and "datasets" not in data  # neither is of the hub
    refuse_places(text, run.parent, tiny_data.parent)
    assert "secret-team" not in text and "wd" not in text and "--dataset" not in text


@pytest.mark.parametrize("infer_type, flags", [("merged", {}), ("w4a16", dict(group_size=32)), ("bnb_dora", {})])
def test_card_of_an_export(run, export, tmp_path, infer_type, flags):
    """The same with the format, and the numbers of fidelity.json."""
    folder = export(run, infer_type, fidelity_samples=2, **flags)
    text, data = (folder / "README.md").read_text(), card_of(folder).data.to_dict()
    scores = json.loads((folder / "fidelity.json").read_text())
    assert f"{scores['exported']['perplexity']:.4f} | {scores['exported']['kl']:.1e} |" in text
    assert f"on {scores['texts']} texts of" in text and f"keeps: {scores['exported']['gain_kept']:.1%}." in text
    typed = "".join(f" --{name} {value}" for name, value in flags.items())
    assert f"| format | `--infer_type {infer_type}{typed}` |" in text and "| train type | bnb_dora |" in text
    assert data["license"] == "apache-2.0" and data["library_name"] == "transformers"
    refuse_places(text, tmp_path, run.parent)


def test_names_of_the_hub(tmp_path):
    """They are what the front matter links to, also where the folder of a cache was named; a mixture has several."""
    run = tmp_path / "run"
    run.mkdir()
    snapshot = "/somewhere/hub/models--org--name/snapshots/0123abc"
    flags = dict(model_name=snapshot, dataset="org/rows:0.5,some/where/b.jsonl:0.2,alpaca:0.3", train_type="qlora")
    (run / "run.json").write_text(json.dumps(dict(flags=flags)))
    write_card(run, Told(run, "not asked", None, "bnb_nf4"))
    data, text = card_of(run).data.to_dict(), (run / "README.md").read_text()
    assert (data["base_model"], data["base_model_relation"]) == ("org/name", "quantized")
    assert data["datasets"] == ["org/rows", "yahma/alpaca-cleaned"]
    assert "| data | org/rows, b.jsonl, alpaca |" in text and "somewhere" not in text and "some/where" not in text


@pytest.mark.parametrize(
    "readme", [None, "# no front matter\n", "---\nlicense: [a, b\n---\n", "---\nlicense: other\n---\n"]
)
def test_no_license(tmp_path, readme):
    """A base that names none leaves the field to be filled in, and the card says so."""
    base = tmp_path / "base"
    base.mkdir()
    if readme:
        (base / "README.md").write_text(readme)
    run = tmp_path / "run"
    run.mkdir()
    write_card(run, Told(run, str(base), base))
    assert card_of(run).data.license == "other"
    assert "Fill in `license:` above" in (run / "README.md").read_text()


def test_what_somebody_wrote_stays(run, export):
    """A card without our line is left alone, by a new run and by an export over it; one of ours is replaced."""
    folder = export(run, "merged")
    assert OURS in (folder / "README.md").read_text()
    (folder / "README.md").write_text("mine\n")
    write_card(folder, Told(run, "base", None))
    export(run, "bnb_nf4", overwrite=True)
    assert (folder / "README.md").read_text() == "mine\n"
    (folder / "README.md").write_text(f"an older one\n{OURS}\n")
    export(run, "merged", overwrite=True)
    assert "an older one" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("room", [0, 1])
def test_card_of_a_model_that_needs_room(tmp_path, room):
    """That its batches have to be padded by one more is said where it is so."""
    (tmp_path / RUN_FILE).write_text(json.dumps(dict(flags={}, task=dict(name="sequence_classification", room=room))))
    write_card(tmp_path, Told(tmp_path, base="google/t5gemma", base_folder=None))
    assert ("Pad every batch by one token more" in (tmp_path / "README.md").read_text()) == bool(room)
