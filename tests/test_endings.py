"""How runs that keep checkpoints end: killed processes, signals, NaN, two hosts. By real processes."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from commands import error_lines, free_port, losses
from faulty_runs import FLAGS, PREEMPTED, SECRETS, STEPS, Run, assert_same, fault, looks_finished, metrics_of, steps_of
from real_run import make_config

from fsdp_utils.folders import checkpoints, saving

pytest_plugins = ["faulty_runs"]  # its fixtures

# ---------------------------------------------------------------------------------------------------------------------
# Killed
# ---------------------------------------------------------------------------------------------------------------------


def test_killed_thrice(begin, whole, tmp_path):
    """SIGKILL in a step, while a checkpoint is written, and before its manifest: the others end too, what is not whole
    counts as nothing, and the run comes to the bytes that it has without."""
    folder = tmp_path / "out"
    for start, killed in (
        (None, fault("update", "kill", 4, rank=1)),
        (2, fault("write optimizer.safetensors", "kill", 4, rank=1)),
        (2, fault("manifest", "kill", 4)),
    ):
        run = begin(folder, killed, pause=0.05)
        assert run.ends() not in (0, PREEMPTED), run.said
        assert ("goes on after step 2" in run.said) == bool(start)
        assert steps_of(folder) == [2] and not looks_finished(folder)
        assert checkpoints.newest(folder / "checkpoints").name == "step-000002"
    run = begin(folder)
    assert run.ends() == 0, run.said
    assert f"goes on after step 2 of {STEPS}" in run.said
    assert_same(folder, whole)
    assert not list((folder / "checkpoints").glob(".*")), "something half-written was left"


def test_killed_before_the_first_checkpoint_while_saving(tmp_path):
    """What a run without checkpoints leaves when it is killed while it saves does not keep it from starting anew."""
    folder = tmp_path / "out"
    (folder / ".saving").mkdir(parents=True)
    (folder / "run.json").write_text('{"finished": false}')
    (folder / "metrics.jsonl").touch()
    saving.check_output(
        make_config(model_name="demo", dataset="demo", output_dir=folder, save_model=True, resume="auto")
    )


@pytest.mark.parametrize("meeting", ["static", "standalone"])
def test_torchrun_restarts(begin, whole, tmp_path, meeting):
    """torchrun starts a run again of which a process was killed, and it goes on by itself, to the same bytes."""
    place = dict(static=f"--master_port={free_port()}", standalone="--standalone")[meeting]
    launcher = ("torchrun", "--nproc_per_node=2", "--max_restarts=2", place)
    run = begin(tmp_path / "out", fault("step", "kill_once", 4, rank=1, at="killed"), launcher=launcher, pause=0.05)
    assert run.ends() == 0, run.said
    assert run.said.count(f"goes on after step 2 of {STEPS}") == 1
    assert_same(tmp_path / "out", whole)


# ---------------------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------------------


def _signalled(begin, folder: Path, number: int, how: signal.Signals, *, rank: int | None) -> Run:
    """A run to its end: in step `number` one process gets a signal, or the one that started them."""
    run = begin(folder, fault("step", "hold", number, rank=rank or 0, at="here"), pause=0.05)
    pid = run.held("here")
    os.kill(run.process.pid if rank is None else pid, how)
    time.sleep(1 if rank is None else 0.3)  # until it is passed on
    run.let_go("here")
    assert run.ends() == PREEMPTED, run.said
    return run


def test_signals(begin, whole, tmp_path):
    """A signal to one process, or to the parent of both: all end after the same step, with a checkpoint of it, from
    which the run goes on to the same bytes. A signal while the result is saved lets that end."""
    folder = tmp_path / "out"
    signals = ((signal.SIGTERM, 1), (signal.SIGUSR1, 0), (signal.SIGINT, 1), (signal.SIGTERM, None))
    for number, (how, who) in zip((2, 5, 8, 11), signals, strict=True):
        run = _signalled(begin, folder, number, how, rank=who)
        assert metrics_of(folder)[-1] == number + 1  # what step `number` sums had been given before the signal came
        assert f"after step {number + 1}; --resume auto goes on from" in run.said and "Traceback" not in run.said
        assert number + 1 in steps_of(folder) and not looks_finished(folder)
    run = begin(folder, fault("move", "hold", at="saving"))
    os.kill(run.held("saving"), signal.SIGTERM)
    run.let_go("saving")
    assert run.ends() == 0, run.said
    assert_same(folder, whole)


def test_signal_while_loading(begin, tmp_path):
    """Before the first step there is nothing to keep: the run ends at once, and what lies there looks unfinished."""
    run = begin(tmp_path / "out", fault("load", "hold", rank=1, at="loading"), pause=0.01)
    os.kill(run.held("loading"), signal.SIGTERM)  # it is not let go
    assert run.ends() == PREEMPTED, run.said
    assert not looks_finished(tmp_path / "out") and "Traceback" not in run.said
    assert not (tmp_path / "out" / "checkpoints").exists() or not steps_of(tmp_path / "out")


@pytest.mark.parametrize("waiting", [False, True], ids=["in a step", "in a collective"])
def test_second_signal(begin, copy_until, waiting):
    """Who sends a signal again, more than a second later, does not want to wait for the step: the process ends at
    once, also while it waits for the other, and the checkpoint before stays."""
    folder = copy_until(2)
    run = begin(folder, fault("step", "hold", 4, rank=1, at="long"), pause=0.01, save_every_steps=0)
    pid = run.held("long")
    both = {process.pid: process for process in run.below()}
    if waiting:
        (pid,) = both.keys() - {pid}
        time.sleep(0.5)  # it has come to the sum in which it waits
    for pause in (1.3, 0):
        os.kill(pid, signal.SIGTERM)
        time.sleep(pause)
    alive = psutil.wait_procs([both[pid]], timeout=10)[1]
    run.let_go("long")
    assert not alive, f"the step was waited for\n{run.said}"
    assert run.ends() == PREEMPTED, run.said
    assert "ended by SIGTERM" in run.said
    assert steps_of(folder) == [2] and not looks_finished(folder)


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong in a step
# ---------------------------------------------------------------------------------------------------------------------


def test_nan_on_one_process(begin, copy_until):
    """A loss that is no number on one process: both end before that step is taken, in one clear line, and
    diverged.json tells where; the last checkpoint stays."""
    folder = copy_until(2)
    run = begin(folder, fault("step", "poison", 5, rank=1), pause=0.05)
    assert run.ends() not in (0, PREEMPTED), run.said
    (line,) = error_lines(run.said)
    assert "step 5" in line and "nan" in line and "Traceback" not in run.said
    told = json.loads((folder / "diverged.json").read_text())
    assert told["step"] == 5 and told["lr"] == FLAGS["lr"]
    assert len(told["samples"]) == 2 * FLAGS["batch_size"] and all(0 <= sample < 16 for sample in told["samples"])
    assert metrics_of(folder) == [1, 2, 3, 4] and steps_of(folder) == [2, 4] and not looks_finished(folder)


def test_one_process_fails_to_read(begin, copy_until):
    """Data that one process cannot read ends both, with its reason."""
    folder = copy_until(2)
    run = begin(folder, fault("read", "fail", 4, rank=1), pause=0.01)
    assert run.ends() not in (0, PREEMPTED), run.said
    assert "the data went away" in run.said
    assert steps_of(folder) == [2] and not looks_finished(folder)


def test_no_secret_is_told(whole):
    """Tokens and passwords of the environment are in no file of a run, nor in what it says, with --verbose too."""
    folder, said = whole
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {"run.json", "metrics.jsonl", "manifest.json", "state.json"} <= {path.name for path in files}
    assert "keep_checkpoints" in said
    for secret in SECRETS.values():
        assert secret not in said
        assert [path for path, content in files.items() if secret.encode() in content] == []


# ---------------------------------------------------------------------------------------------------------------------
# Two hosts
# ---------------------------------------------------------------------------------------------------------------------


def _on_two_hosts(begin, folder: Path, **flags) -> str:
    """A run of two agents with a process each, to its end; what the first said."""
    port = free_port()
    agent = ("torchrun", "--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1")
    runs = [begin(folder, launcher=(*agent, f"--master_port={port}", f"--node_rank={i}"), **flags) for i in (0, 1)]
    for run in runs:
        assert run.ends() == 0, "\n".join(r.said for r in runs)
    return runs[0].said


@pytest.mark.parametrize("strategy", ["full_shard", "hybrid_full_shard"])
def test_two_hosts(begin, whole, tmp_path, strategy):
    """Two hosts train, write checkpoints together and go on from them, to the result of one host with two processes;
    with a copy of the model on each host, up to the order in which numbers are added."""
    folder, flags = tmp_path / "out", dict(sharding_strategy=strategy)
    _on_two_hosts(begin, folder, **flags, stop_at_step=3)
    assert 3 in steps_of(folder) and not looks_finished(folder)
    assert f"goes on after step 3 of {STEPS}" in _on_two_hosts(begin, folder, **flags)
    if strategy == "full_shard":
        assert_same(folder, whole)
    assert saving.is_finished(folder) and metrics_of(folder) == list(range(1, STEPS + 1))
    assert losses(folder) == pytest.approx(losses(whole[0]), rel=1e-4)
