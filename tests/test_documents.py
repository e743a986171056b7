"""README.md and docs/: every command is run here, or a comment over it says why not, and its flags are there.

A block is run by bash, where each program is a recorder, so that what a loop or variable makes of it is known. Our
scripts are then called with those words, in this process or, for torchrun, in two; a few flags shorten them.
"""

import re
import stat
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import REPOSITORY, clean_environment, forked

import evaluate
import prepare_weights
import train
from fsdp_utils.config import TrainConfig
from fsdp_utils.core.flags import parse
from fsdp_utils.export.config import ExportConfig
from fsdp_utils.inference.config import EvalConfig
from scripts.block_expansion import Expansion
from scripts.serving_check import Check


class Block(NamedTuple):
    """Commands of one document; `why_not`: the reason why they are not run."""

    name: str
    text: str
    why_not: str | None


RUNS = {  # script -> its flags, what runs it, and what makes it short
    "train.py": (TrainConfig, train.main, ["--max_steps=2", "--device=cpu"]),
    "evaluate.py": (EvalConfig, evaluate.main, ["--samples=2", "--device=cpu"]),
    "prepare_weights.py": (ExportConfig, prepare_weights.main, ["--fidelity_samples=2", "--device=cpu"]),
}
FLAGS = {name: config for name, (config, *_) in RUNS.items()}
FLAGS |= {"scripts/block_expansion.py": Expansion, "scripts/serving_check.py": Check}
PROGRAMS = ("python", "python3", "pip", "torchrun", "srun", "scontrol", "vllm", "llama-cli", "ruff", "lint-imports")
RECORDER = """#!/bin/bash
case "$1" in -|-c) exec {python} "$@" ;; esac
printf '%s\\x1f' "${{0##*/}}" "$@" >> {record}
printf '\\n' >> {record}
"""


def blocks_of(path: Path) -> list[Block]:
    """The blocks of a document."""
    found = re.finditer(r"((?:<!--.*-->\n)*)```bash\n(.*?)```", path.read_text(), re.DOTALL)
    why = lambda comments: re.search(r"<!-- not run: (.+?) -->", comments)
    return [
        Block(f"{path.name}-{number}", match[2], why(match[1]) and why(match[1])[1])
        for number, match in enumerate(found, 1)
    ]


def header_of(path: Path) -> Block:
    """The commands of a recipe."""
    return Block(path.name, "\n".join(re.findall(r"^#   (.+)", path.read_text(), re.MULTILINE)), "needs its model")


DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
BLOCKS = [block for path in DOCUMENTS for block in blocks_of(path)]
HEADERS = [header_of(path) for path in sorted((REPOSITORY / "recipes").glob("*.yaml"))]
named = lambda blocks: pytest.mark.parametrize("block", blocks, ids=lambda block: block.name)


@pytest.fixture
def recorded(tmp_path):
    """`recorded(text)`: the words of every command that bash would start, in a copy of the repository made of links."""
    for entry in REPOSITORY.iterdir():
        if entry.name not in ("output", ".venv"):
            (tmp_path / entry.name).symlink_to(entry)
    bin, record = tmp_path / ".venv" / "bin", tmp_path / ".record"
    bin.mkdir(parents=True)
    (bin / "activate").touch()
    for name in PROGRAMS:
        (bin / name).write_text(RECORDER.format(python=sys.executable, record=record))
        (bin / name).chmod(stat.S_IRWXU)

    def commands(text: str) -> list[list[str]]:
        record.touch()
        there = clean_environment(PATH=f"{bin}:/usr/bin:/bin")
        done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, env=there, cwd=tmp_path, timeout=60)
        assert "command not found" not in done.stderr
        return [line.split("\x1f")[:-1] for line in record.read_text().splitlines()]

    return commands


def script_of(words: list[str]) -> tuple[str | None, list[str]]:
    """The script of ours that a command starts, and its flags."""
    place = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
    return (None, []) if place is None else (words[place], words[place + 1 :])


@named([block for block in [*BLOCKS, *HEADERS] if block.why_not])
def test_flags_are_there(block, recorded):
    """Of what is not run: the script is there, and knows the flags."""
    commands = recorded(block.text)
    assert commands
    for words in commands:
        script, argv = script_of(words)
        if script in FLAGS:
            with chdir(REPOSITORY):
                parse(FLAGS[script], argv, prog=script)
        elif script:
            source = (REPOSITORY / script).read_text()
            for name in re.findall(r"--(\w+)", " ".join(argv)):
                assert f'"--{name}"' in source or re.search(rf"^    {name}: ", source, re.MULTILINE), (script, name)


def call(folder: str, script: str, argv: list[str]) -> None:
    """A script of ours, in this process if it is one of the three that many commands start."""
    if script not in RUNS:
        done = forked([script, *argv], Path(folder), folder=Path(folder))
        assert done.returncode == 0, done.stderr
        return
    config, main, short = RUNS[script]
    if {"bnb_nf4", "w4a16", "w4a16_dora"} & set(argv):
        short = [*short, "--gptq_samples=2"]
    with chdir(folder):
        main(parse(config, [*argv, *short], prog=script))


@named([block for block in BLOCKS if not block.why_not])
def test_commands_run(block, recorded, pair, tmp_path):
    """What stands there works, one command after the other."""
    for words in recorded(block.text):
        script, argv = script_of(words)
        if script:
            run = pair.run if words[0] == "torchrun" else lambda function, *args: function(*args)
            run(call, str(tmp_path), script, argv)
        else:  # the packages are installed already
            assert words[0] in ("pip", "python3"), words
