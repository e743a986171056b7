"""Processes that fork from one that has imported train.py: the import takes longer than most of what tests start."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from functools import cache, partial
from multiprocessing import forkserver
from pathlib import Path

import torch
from torch.distributed import run as torchrun
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


@cache
def server():
    """The context of processes that fork from a server. No test has run in it, so all of them begin alike.

    With CUDA, which a process must not have touched before it forks, they start anew instead.
    """
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context, before = multiprocessing.get_context("forkserver"), dict(os.environ)
    context.set_forkserver_preload(["train"])
    os.environ.update(PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1")  # Python 3.11 forgets its path there
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _run(words: list[str]) -> None:
    """What `python WORDS` does."""
    sys.argv, sys.path[:0] = words, [str(Path(words[0]).parent)]
    runpy.run_path(words[0], run_name="__main__")


def _forking(config: LaunchConfig, entrypoint: str):
    """torchrun's agent, which starts our script by a fork instead of `python -u`."""
    config.start_method = "fork"
    return lambda unbuffered, *words: elastic_launch(config, _run)(list(words))


def _become(words: list[str], environment: dict[str, str], folder: Path, said: Path, errors: Path) -> None:
    """What `python WORDS` does, or torchrun, in this process; the processes that are started in turn fork from it."""
    os.setsid()
    os.chdir(folder)
    for path, stream in ((said, sys.stdout), (errors, sys.stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream.fileno())
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
    torch.multiprocessing.spawn = partial(torch.multiprocessing.start_processes, start_method="fork")
    if words[0] == "torchrun":
        torchrun.elastic_launch = _forking
        torchrun.main(words[1:])
    elif words[0] == "-m":
        sys.argv, sys.path[:0] = words[1:], [str(folder)]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        _run(words)


class Command:
    """`python WORDS` or `torchrun WORDS`, as `subprocess.Popen` has it. stdout and stderr are files."""

    def __init__(self, words: list, *, environment: dict, folder: Path, said: Path, errors: Path | None = None):
        words = [str(word) for word in words]
        self.process = server().Process(target=_become, args=(words, environment, folder, said, errors or said))
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    def poll(self) -> int | None:
        return self.process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        return self.returncode
