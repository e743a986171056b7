"""The real commands, in processes of their own."""

import json
import os
import socket
import subprocess
from pathlib import Path

from forks import Command

REPOSITORY = Path(__file__).parent.parent
TRAIN = str(REPOSITORY / "train.py")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def clean_environment(**environment) -> dict[str, str]:
    """Without torchrun's variables, which this test process may have set."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC_"))}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        clean.pop(name, None)
    return clean | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", **environment)


def start(command: list, **environment) -> subprocess.CompletedProcess:
    """A command in a clean environment, to its end."""
    settings = dict(text=True, env=clean_environment(**environment), timeout=120, cwd=REPOSITORY)
    return subprocess.run([str(word) for word in command], capture_output=True, **settings)


def forked(words: list, scratch: Path, *, folder: Path = REPOSITORY, **environment) -> subprocess.CompletedProcess:
    """As `start` of `python WORDS`, in a process that has imported train.py already, in `folder`; its words go through
    `scratch`."""
    said = dict(said=scratch / "forked.out", errors=scratch / "forked.err")
    for path in said.values():
        path.write_text("")
    command = Command(words, environment=clean_environment(**environment), folder=folder, **said)
    try:
        code = command.wait(timeout=120)
    finally:
        command.kill()
    return subprocess.CompletedProcess(words, code, *(path.read_text() for path in said.values()))


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def torchrun(*words, scratch: Path, anew: bool = False, **environment) -> subprocess.CompletedProcess:
    """Two processes; `anew`: of the real command, which import everything again."""
    command = ["-m", "torch.distributed.run"] if anew else ["torchrun"]
    return forked([*command, "--nproc_per_node=2", f"--master_port={free_port()}", *words], scratch, **environment)


def error_lines(stderr: str) -> list[str]:
    """What our program said; progress bars stand on the same stream."""
    return [line for line in stderr.splitlines() if line.startswith("error:")]
