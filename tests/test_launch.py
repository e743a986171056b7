"""Starting: plain python, torchrun and SLURM give the same run, and a wrong start ends on every process."""

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
import torch
from commands import REPOSITORY, TRAIN, clean_environment, forked, free_port, losses, start
from real_run import make_config

import train
from fsdp_utils.config import TrainConfig
from fsdp_utils.core import processes
from fsdp_utils.core.devices import pick_device
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import as_dict, parse
from fsdp_utils.core.ranks import fail, first_host, local_rank, rank, read_slurm_environment, world_size


def test_plain_python_starts_processes(tiny, tiny_data, tmp_path):
    """`python train.py --world_size 2` trains on two processes, to the losses of one."""
    flags = dict(model_name=tiny(), dataset=tiny_data, train_type="bnb_dora", max_steps=3, lr=0.01)
    config = make_config(**flags, batch_size=4, output_dir=tmp_path / "1")
    train.main(config)
    flags = as_dict(config) | dict(world_size=2, batch_size=2, output_dir=tmp_path / "2", master_port=free_port())
    done = forked([TRAIN, *(f"--{k}={v}" for k, v in flags.items() if v is not None)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "global batch: 2 rows x 2 processes" in done.stdout
    assert done.stdout.count("trainable params") == 1  # process 0 speaks
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
    assert len(losses(tmp_path / "2")) == 3


def test_one_process_on_a_machine_of_many_gpus(monkeypatch):
    """A command line for one process starts no others: plain `python train.py` takes every GPU that it sees, and what
    self_test.py called one process was then two."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.multiprocessing, "spawn", lambda *_, **__: pytest.fail("started others"))
    monkeypatch.delenv("RANK", raising=False)
    _, script, *words = processes.command("train.py", processes=1)
    assert script == "train.py"
    seen = []
    processes.launch(seen.append, parse(TrainConfig, ["--model_name=demo", *words], prog="train.py"))
    assert len(seen) == 1


def test_a_port_that_is_taken(tiny, tiny_data, tmp_path):
    """Two runs on one host: the second says in a line which flag parts them, before it starts a process."""
    flags = dict(model_name=tiny(), dataset=tiny_data, world_size=2, device="cpu", output_dir=tmp_path / "out")
    with socket.create_server(("localhost", 0)) as other:
        flags["master_port"] = other.getsockname()[1]
        done = forked([TRAIN, *(f"--{k}={v}" for k, v in flags.items())], tmp_path)
    said = f"error: --master_port {flags['master_port']}: is in use, as by another run on this host; pass another\n"
    assert done.returncode == 2 and done.stderr.endswith(said) and "Traceback" not in done.stderr


def test_help():
    """--help is a page on stdout, without a traceback, and comes in seconds."""
    begun = time.perf_counter()
    done = start([sys.executable, TRAIN, "--help"])
    assert done.returncode == 0 and done.stderr == ""
    assert "--train_type" in done.stdout and "torchrun" in done.stdout
    assert time.perf_counter() - begun < 30  # a busy machine included


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-05,9],login1", "gpu03"),
        ("gpu[7,9-12]", "gpu7"),
        ("node1,node2", "node1"),
        ("node-a-1", "node-a-1"),
        ("rack[1-2]-ib", "rack1-ib"),
        ("r[1-2]n[3-4]", "r1n3"),
        ("a[1-2],b[3-4]", "a1"),
    ],
)
def test_first_host(nodes, first):
    """The first host of every way in which SLURM writes lists."""
    assert first_host(nodes) == first


@pytest.fixture
def environment(monkeypatch):
    """Sets variables; whatever the test adds is gone after it."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in [*names, *(n for n in os.environ if n.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "")  # registers the name, so that it is restored
        monkeypatch.delenv(name)

    def set_all(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


def test_slurm_environment(environment):
    """srun's variables become torchrun's: two nodes of four tasks, this one the sixth."""
    environment(SLURM_PROCID="5", SLURM_NTASKS="8", SLURM_LOCALID="1", SLURM_TASKS_PER_NODE="4(x2)")
    environment(SLURM_JOB_NODELIST="gpu[03-04]")
    read_slurm_environment("localhost", "12355")
    assert (rank(), world_size(), local_rank()) == (5, 8, 1)
    assert os.environ["LOCAL_WORLD_SIZE"] == "4"
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu03", "12355")


def test_slurm_respects_flags(environment):
    """--master_addr wins over the node list; --ntasks-per-node over its summary."""
    environment(SLURM_PROCID="0", SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="2", SLURM_TASKS_PER_NODE="1(x2)")
    environment(SLURM_STEP_NODELIST="a1", SLURM_JOB_NODELIST="b1")
    read_slurm_environment("10.0.0.7", "555")
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.7", "555")
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"


def test_interrupted_parent_ends_its_processes(tiny, tiny_data, tmp_path):
    """SIGINT that only the first process gets, as from a supervisor: all of them end, without a traceback. The command
    as a person starts it, where other tests fork."""
    flags = dict(model_name=tiny(), dataset=tiny_data, train_type="custom_lora", world_size=2, max_steps=100_000)
    flags |= dict(device="cpu", use_cpu_offload=False, output_dir=tmp_path / "out", master_port=free_port())
    command = [sys.executable, TRAIN, *(f"--{name}={value}" for name, value in flags.items())]
    settings = dict(stderr=subprocess.PIPE, text=True, env=clean_environment(), cwd=REPOSITORY)
    # tests that a shell started in the background ignore SIGINT, and what they start would too
    settings["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, **settings) as parent:
        metrics, patience = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 150
        while not (metrics.exists() and metrics.stat().st_size):
            assert time.monotonic() < patience and parent.poll() is None
            time.sleep(0.2)
        below = psutil.Process(parent.pid).children(recursive=True)
        parent.send_signal(signal.SIGINT)
        _, said = parent.communicate(timeout=30)
    assert parent.returncode == 75 and "Traceback" not in said
    _, alive = psutil.wait_procs(below, timeout=10)
    assert len(below) >= 2 and not alive


@pytest.mark.parametrize("variables", [dict(RANK="1"), dict(SLURM_NTASKS="1"), {}])
def test_slurm_is_left_alone(environment, variables):
    """torchrun's own variables win inside a SLURM job, and a single task or no job is a plain start."""
    if variables:
        environment(**{"SLURM_PROCID": "0", "SLURM_NTASKS": "4", **variables})
    before = dict(os.environ)
    read_slurm_environment("localhost", "12355")
    assert dict(os.environ) == before


@pytest.mark.parametrize("local_rank", [0, 1, 2])
def test_more_processes_than_gpus(environment, monkeypatch, local_rank):
    """Every process of the node refuses, the ones that would have a GPU too: process 0 is the one that says it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    environment(RANK=f"{local_rank}", LOCAL_RANK=f"{local_rank}", WORLD_SIZE="3", LOCAL_WORLD_SIZE="3")
    with pytest.raises(UserError, match=r"3 processes but 2 visible GPU"):
        pick_device("auto")
    assert pick_device("cpu").type == "cpu"


def test_device_that_is_not_there(monkeypatch):
    """--device cuda without CUDA is named."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: no CUDA device"):
        pick_device("cuda")


@pytest.mark.parametrize("local_rank", [0, 1])
def test_failing_waits_for_process_0(environment, monkeypatch, capsys, local_rank):
    """Process 0 speaks at once; another only after it had the time to, because the first to exit ends all."""
    events = []
    monkeypatch.setattr(time, "sleep", lambda seconds: events.append(("sleep", capsys.readouterr().err)))
    monkeypatch.setattr(os, "_exit", lambda code: events.append((code, capsys.readouterr().err)))
    environment(LOCAL_RANK=f"{local_rank}")
    fail(UserError("--lr nan: wrong"))
    waited = [("sleep", "")] if local_rank else []
    assert events == [*waited, (2, "error: --lr nan: wrong\n")]


def test_a_process_that_is_killed(environment, monkeypatch, capsys):
    """A signal gives the process no time to say why it ends; the one that started it does."""

    def spawn(*args, **kwargs):
        ended = dict(error_index=1, error_pid=1, exit_code=-9, signal_name="SIGKILL")
        raise torch.multiprocessing.ProcessExitedException("process 1 terminated", **ended)

    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    with pytest.raises(SystemExit) as ended:
        processes.launch(print, make_config(world_size=2))
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: process 1 was ended by SIGKILL; the machine may have run out")
