"""Flags from a file: recipes, --config, --save_config and run.json mean what a command line with their flags does."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from commands import REPOSITORY, TRAIN, error_lines, losses, start

import train
from benchmarks.published import PUBLISHED, folders_of
from fsdp_utils.config import TrainConfig
from fsdp_utils.core.flags import ConfigError, as_dict, flags, parse, parse_or_fail, save
from fsdp_utils.folders.names import RUN_FILE
from fsdp_utils.folders.saving import other_batch

RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))
OF_A_RUN = [f.name for f in flags(TrainConfig) if f.metadata["belongs"] == "run"]
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


def read(*argv) -> TrainConfig:
    return parse(TrainConfig, [str(word) for word in argv], prog="train.py")


def wrong(path, *argv) -> list[str]:
    with pytest.raises(ConfigError) as error:
        read("--config", path, *argv)
    return str(error.value).splitlines()


@pytest.fixture
def file(tmp_path):
    """`file(text)`: a YAML file that holds it."""

    def write(text: str, name: str = "flags.yaml") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


# ---------------------------------------------------------------------------------------------------------------------
# Recipes
# ---------------------------------------------------------------------------------------------------------------------


@each_recipe
def test_what_a_recipe_says(recipe):
    """It is read without a note, saves what it trains where no other does, and its header has its command, for as many
    processes as its name says, and its figures."""
    config, text = read("--config", recipe), recipe.read_text()
    assert config.notes() == []
    assert config.save_model and config.output_dir == f"output/{recipe.stem}"
    header = text[: text.index("\n\n")]
    assert f"train.py --config recipes/{recipe.name}\n" in header
    assert re.search(r"^# measured: ", header, re.MULTILINE)
    processes = re.search(r"(\d+)x", recipe.stem)
    assert not processes or f"--nproc_per_node {processes[1]} " in header
    assert all(line.startswith("#") for line in header.splitlines())
    assert max(map(len, text.splitlines())) <= 120


def test_all_recipes_are_there():
    """Those that were promised."""
    assert {path.stem for path in RECIPES} == {
        *("demo", "orca_math_2024", "7b_24gb", "8b_80gb", "70b_2x24gb", "70b_4x80gb", "405b_4x141gb", "chat"),
        *("continued_pretraining", "llama_pro", "classification", "flan_t5", "2bit", "long_context_24gb"),
    }


@each_recipe
def test_a_recipe_is_planned(recipe, tmp_path, capsys):
    """From the public shape of its model, as `train.py --config RECIPE --plan true` does; it fits the cards that it is
    named after, or one of 24 GiB."""
    config = read("--config", recipe)
    argv = ["--config", recipe, "--plan", "true", "--device", "cpu"]
    if config.model_name in PUBLISHED:
        named = {name: value for name, value in as_dict(config).items() if value is not None}
        argv += [f"--{name}={path}" for name, path in folders_of(named, tmp_path).items()]
    cards = re.search(r"(?:(\d+)x)?(\d+)gb$", recipe.stem)
    argv += ["--plan_gpus", f"{cards[1] or 1}x{cards[2]}" if cards else "1x24"]
    train.main(read(*argv))
    said = capsys.readouterr().out
    assert re.search(r"^trainable params: [1-9][\d,]+ \|\| all params: ", said, re.MULTILINE)
    assert "it fits" in said and "TOO MUCH" not in said


def test_the_setting_of_2024():
    """The command of Answer.AI's article on QDoRA, flag by flag, and the table of what it left to defaults."""
    said = """--train_type bnb_dora --model_name meta-llama/Llama-2-7b-hf --dataset orca_math --dataset_samples 10000
        --batch_size 4 --context_length 2048 --gradient_accumulation_steps 2 --sharding_strategy full_shard
        --use_gradient_checkpointing true --reentrant_checkpointing true --use_cpu_offload false
        --use_activation_cpu_offload false --log_to wandb --project_name fsdp-quantized-ft-exps --save_model true"""
    recipe = REPOSITORY / "recipes/orca_math_2024.yaml"
    then, now = read(*said.split(), "--output_dir", "output/orca_math_2024"), read("--config", recipe)
    assert as_dict(now) == as_dict(then) | dict(config=str(recipe))
    table = dict(num_epochs=1, precision="bf16", optimizer="adamw", lr=1e-5, lr_scheduler="constant", wd=0.1)
    assert {name: getattr(now, name) for name in table} == table


# ---------------------------------------------------------------------------------------------------------------------
# --config
# ---------------------------------------------------------------------------------------------------------------------


def test_values_are_those_of_a_command_line(file):
    """What YAML reads as words, numbers or dates is what the parser of flags makes of it; null is no flag."""
    path = file(
        "lr: 1e-4\nwd: .5\nbatch_size: 1_0\npacking: yes\nsave_model: True\nuse_cpu_offload: 'false'\n"
        "use_gradient_checkpointing: auto\npeer_gather: false\nmaster_port: 012355\ndataset: 2024-11-22\n"
        "lora_target_modules: [q_proj,\n  v_proj]\ncolumns:\n  - question=q\n  - answer=a.0\neval_dataset: ~\n"
        "quantized_cache: ~/packed\nname: 'null'\nprompt_template: |\n  {question}: # no comment\n\n"
    )
    words = ["--lr=1e-4", "--wd=.5", "--batch_size=10", "--packing", "--save_model=true", "--use_cpu_offload=false"]
    words += ["--use_gradient_checkpointing=auto", "--peer_gather=false", "--master_port=012355"]
    words += ["--dataset=2024-11-22", "--lora_target_modules=q_proj,v_proj", "--columns=question=q,answer=a.0"]
    words += [f"--quantized_cache={Path.home() / 'packed'}", "--name=null"]
    words += ["--prompt_template={question}: # no comment\n"]
    assert read("--config", path) == read(*words)


def test_the_command_line_wins(file):
    """Over the file, wherever --config stands, and the file over defaults; what it gives counts as given."""
    path = file("lr: 1e-3\nbatch_size: 4\nn_bits: 4\n")
    config = read("--lr", "2e-3", "--config", path, "--wd", "0")
    assert (config.lr, config.batch_size, config.wd, config.lora_rank) == (2e-3, 4, 0, 64)
    assert config.explicit_flags == {"lr", "batch_size", "n_bits", "wd"}
    (note,) = read("--config", path, "--train_type", "lora").notes()
    assert note.startswith("--n_bits has no effect")
    # a wrong value is refused all the same, but one that only others make wrong is not
    assert wrong(file("n_bits: 3\n", "bits.yaml"))
    assert read("--config", file("n_bits: 3\n", "bits.yaml"), "--train_type", "hqq_lora").n_bits == 3


WRONG = {
    "unknown": ("lr: 1\nbach_size: 2\n", ["line 2: bach_size: unknown flag; did you mean batch_size?"]),
    "far from any": ("qqq: 2\n", ["line 1: qqq: unknown flag; see --help"]),
    "with dashes": ("--batch-size: 2\n", ["did you mean batch_size?"]),
    "twice": ("lr: 1\nwd: 2\nlr: 3\n", ["line 3: lr: stands there twice"]),
    "nested": ("lr:\n  peak: 1\n", ["line 1: lr: holds flags or lists of its own"]),
    "list of lists": ("columns: [[a]]\n", ["line 1: columns: holds"]),
    "list": ("batch_size: [1, 2]\n", ["line 1: batch_size: takes one value, not a list"]),
    "null": ("\nlr:\n", ["line 2: lr: has no value"]),
    "config": ("config: other.yaml\n", ["line 1: config: is for command lines"]),
    "save_config": ("save_config: other.yaml\n", ["line 1: save_config: is for command lines"]),
    "type": ("lr: 1e-4\nlora_rank: 4.5\n", ["line 2: --lora_rank: invalid int value: '4.5'"]),
    "boolean": ("packing: maybe\n", ["line 1: --packing: maybe: expected true or false"]),
    "choice": ("# which\ntrain_type: bnb_lora\n", ["line 2: --train_type bnb_lora: did you mean bnb_dora?"]),
    "bound": ("lr: -1\n", ["line 1: --lr -1.0: must be above 0.0"]),
    "beside others": ("n_bits: 3\n", ["line 1: --n_bits 3: bnb offers 4"]),
    "several": ("lrr: 1\nbach_size: 1\n", ["line 1: lrr: ", "line 2: bach_size: "]),
    "empty": ("", ["--config ", "is empty; write a flag a line, as `lr: 1e-4`"]),
    "only comments": ("# lr: 1\n", ["is empty"]),
    "no mapping": ("- lr\n", ["holds no flags"]),
    "no space": ("lr:1e-4\n", ["holds no flags"]),
    "no YAML": ("lr: 1\nwd: 'x\n", ["line 3: is no YAML", "unexpected end"]),
    "two documents": ("lr: 1\n---\nwd: 1\n", ["line 2: is no YAML"]),
    "no text": ("lr: \0", ["is no YAML"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files(file, case):
    """One line for each thing that is wrong, with the file, the line where there is one, and the way out."""
    text, words = WRONG[case]
    path, told = file(text), wrong(file(text))
    assert len(told) == (2 if case == "several" else 1)
    assert all(str(path) in line for line in told)
    for word in words:
        assert word in "\n".join(told)


def test_files_that_cannot_be_read(tmp_path):
    """A missing file, a folder, and bytes that are no text."""
    (tmp_path / "bytes.yaml").write_bytes(b"lr: \xff\xfe")
    for path, why in (("none.yaml", "No such file"), (".", "Is a directory"), ("bytes.yaml", "utf-8")):
        (line,) = wrong(tmp_path / path)
        assert line.startswith(f"--config {tmp_path / path}: ") and why in line and "name a YAML file" in line


def test_a_wrong_file_is_one_line_of_the_real_command(file):
    """With exit code 2, before any library is there."""
    done = start([sys.executable, TRAIN, "--config", file("lr: 1\nbach_size: 2\n")])
    assert done.returncode == 2 and done.stdout == ""
    assert len(error_lines(done.stderr)) == 1 and "did you mean batch_size?" in done.stderr


def test_help_waits_for_no_yaml():
    """Nor does a command line without a file."""
    script = "import sys; from fsdp_utils.core.flags import parse; from fsdp_utils.config import TrainConfig; "
    script += "parse(TrainConfig, [], prog='train.py'); sys.exit('yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# --save_config and run.json
# ---------------------------------------------------------------------------------------------------------------------


@each_recipe
def test_what_is_saved_is_the_same_run(recipe, tmp_path):
    """parse(save(parse(x))) is parse(x), through --save_config and through run.json; the saved file says why, too."""
    config, saved, run = read("--config", recipe), tmp_path / "new" / "saved.yaml", tmp_path / RUN_FILE
    save(config, saved)
    assert read("--config", saved) == config
    run.write_text(json.dumps(dict(flags=as_dict(config), explicit=sorted(config.explicit_flags))))
    again = read("--config", run)
    assert {name: getattr(again, name) for name in OF_A_RUN} == {name: getattr(config, name) for name in OF_A_RUN}
    assert again.explicit_flags == config.explicit_flags.intersection(OF_A_RUN)
    names = re.findall(r"^(\w+):", saved.read_text(), re.MULTILINE)
    order = [f.name for f in flags(TrainConfig)]
    assert names == sorted(names, key=order.index)
    assert set(names) == config.explicit_flags
    assert "# --- what is trained ---" in saved.read_text() and "# how the model is adapted" in saved.read_text()


def test_texts_that_yaml_would_change(tmp_path):
    """Strings come back as they were: with colons, quotes, line breaks, or words that YAML takes for something else."""
    for number, text in enumerate(
        ("a: b", "'\"", "{q}\n\n  x\n", "null", "true", "1e-4", "#", " ", "naïve 🙂", "~", "[a")
    ):
        config = read(f"--name={text}", "--dataset_samples=512", f"--lr={3 * 10.0**-number}")
        save(config, tmp_path / f"{number}.yaml")
        assert read("--config", tmp_path / f"{number}.yaml") == config


def test_what_no_file_keeps(tmp_path):
    """Flags of the command alone are not saved, those of a machine or folder not handed on by run.json."""
    of_a_command = ["--plan", "true", "--show_rows", "3", "--overwrite", "true"]
    of_a_place = ["--output_dir", "x", "--resume", "auto", "--world_size", "2", "--push_to_hub", "a/b", "--save_model"]
    config = read("--lr", "1e-3", *of_a_command, *of_a_place)
    save(config, tmp_path / "saved.yaml")
    assert read("--config", tmp_path / "saved.yaml") == read("--lr", "1e-3", *of_a_place)
    run = tmp_path / RUN_FILE
    run.write_text(json.dumps(dict(flags=as_dict(config), explicit=sorted(config.explicit_flags))))
    assert read("--config", run) == read("--lr", "1e-3", "--save_model")
    with pytest.raises(ConfigError, match="all flags are as by default"):
        save(read(), tmp_path / "none.yaml")


def test_saving_leaves_other_files_alone(tmp_path):
    """The same again is no other; what cannot be written is one line."""
    path = tmp_path / "saved.yaml"
    for _ in range(2):
        save(read("--lr", "1e-3"), path)
    first = path.read_text()
    with pytest.raises(ConfigError, match=r"saved\.yaml: is there, and another; .* --overwrite true"):
        save(read("--lr", "2e-3"), path)
    assert path.read_text() == first
    save(read("--lr", "2e-3", "--overwrite", "true"), path)
    assert read("--config", path).lr == 2e-3
    for bad, words in ((tmp_path, "cannot be written"), (path / "x.yaml", "cannot be written"), ("x.json", "x.yaml")):
        with pytest.raises(ConfigError, match=words):
            save(read("--lr", "1e-3"), str(bad))
    assert [other.name for other in tmp_path.iterdir()] == ["saved.yaml"]


def test_records_that_are_none(file):
    """A run.json of something else, and one that is damaged."""
    for text, words in (("{", "is no JSON"), ("[]", "no flags of a run"), ('{"lr": 1}', "no flags of a run")):
        (line,) = wrong(file(text, RUN_FILE))
        assert words in line
    (line,) = wrong(file('{"flags": {"lr": 1, "bach_size": 2}}', RUN_FILE))
    assert line.endswith("run.json: bach_size: unknown flag; did you mean batch_size?")
    old = read("--config", file('{"flags": {"lr": 1, "batch_size": 1, "eval_dataset": null}}', RUN_FILE))
    assert old.explicit_flags == {"lr"}  # written before there was `explicit`


def trained(*argv) -> None:
    train.main(read(*argv))


def test_the_demo_trains(pair, tmp_path, monkeypatch):
    """Two steps on two processes, from the recipe; then the same from the run.json that they left."""
    recipe, steps = REPOSITORY / "recipes/demo.yaml", ("--max_steps", "2", "--device", "cpu")
    pair.run(trained, "--config", recipe, *steps, "--output_dir", tmp_path / "first")
    pair.run(trained, "--config", tmp_path / "first" / RUN_FILE, "--device", "cpu", "--output_dir", tmp_path / "again")
    assert len(losses(tmp_path / "first")) == 2
    assert losses(tmp_path / "first") == losses(tmp_path / "again")
    first, again = (json.loads((tmp_path / name / RUN_FILE).read_text()) for name in ("first", "again"))
    kept = lambda record: {name: record["flags"][name] for name in OF_A_RUN}
    assert kept(first) == kept(again)
    assert first["flags"]["config"] == str(recipe)


def test_save_config_of_the_command(tmp_path, monkeypatch, capsys):
    """Process 0 writes the file and says so; a file that is in the way ends the run before it begins."""
    path, argv = tmp_path / "saved.yaml", ["--config", str(REPOSITORY / "recipes/demo.yaml"), "--lr", "1e-3"]
    command = partial(parse_or_fail, TrainConfig, argv=[*argv, "--save_config", str(path)], prog="train.py")
    with monkeypatch.context() as other:
        other.setenv("RANK", "1")
        assert command() == read(*argv)
    assert not path.exists() and capsys.readouterr().out == ""
    assert command() == read(*argv) == read("--config", path)
    assert capsys.readouterr().out == f"--save_config {path}: written\n"
    path.write_text("lr: 1\n")
    done = start([sys.executable, TRAIN, "--save_config", path, "--lr", "2"])
    assert done.returncode == 2 and done.stdout == ""
    (line,) = error_lines(done.stderr)
    assert line.startswith(f"error: --save_config {path}: is there, and another; ")


def test_another_number_of_processes_is_said(file, monkeypatch):
    """A record is made again with the batch of its micro-batches; where that is another, how to keep it is said."""
    record = dict(processes=2, flags=dict(batch_size=8, gradient_accumulation_steps=1, model_name="demo"))
    path = file(json.dumps(record), RUN_FILE)
    (note,) = other_batch(read("--config", path))
    assert "2 processes and 16 samples a step, this one has 8; --global_batch_size 16 keeps them" in note
    assert other_batch(read("--config", path, "--global_batch_size", "16")) == []
    assert other_batch(read("--config", path, "--gradient_accumulation_steps", "2")) == []
    assert other_batch(read()) == []
    early = file(json.dumps(record | dict(flags=dict(batch_size=8))), RUN_FILE)  # it had fewer flags
    assert "16 samples a step" in other_batch(read("--config", early))[0]
