"""Faults of a run that keeps checkpoints: torn files, full disks, folders that are gone. By real processes."""

import errno
import itertools
import json
import os
import pickle
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import error_lines
from faulty_runs import (
    KEPT,
    PREEMPTED,
    STEPS,
    assert_same,
    fault,
    fill,
    looks_finished,
    remount,
    steps_of,
)

from fsdp_utils.core.ranks import rank
from fsdp_utils.folders import checkpoints, saving

pytest_plugins = ["faulty_runs"]  # its fixtures

# ---------------------------------------------------------------------------------------------------------------------
# Torn, flipped, or of someone else
# ---------------------------------------------------------------------------------------------------------------------


def _truncate(folder: Path, name: str = "optimizer.safetensors") -> None:
    os.truncate(folder / name, (folder / name).stat().st_size - 1)


def _flip(folder: Path, name: str = "optimizer.safetensors") -> None:
    content = bytearray((folder / name).read_bytes())
    content[-5] ^= 0b100
    (folder / name).write_bytes(content)


def _link_outside(folder: Path, name: str = "optimizer.safetensors") -> None:
    elsewhere = folder.parent.parent / "elsewhere"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)


def _link_folder_outside(folder: Path) -> None:
    elsewhere = folder.parent.parent / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(folder / "state.json", elsewhere)
    (folder / "linked").symlink_to(elsewhere)
    _rename("state.json", "linked/state.json", keep=True)(folder)


def _rename(old: str, new: str, *, keep: bool = False):
    """Of an entry in the manifest, with its true size and checksum."""

    def change(folder: Path) -> None:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        files[new] = files[old] if keep else files.pop(old)
        (folder / "manifest.json").write_text(json.dumps(dict(files=files)))

    return change


def _outside(folder: Path) -> None:
    shutil.copy(folder / "state.json", folder.parent / "state.json")
    _rename("state.json", "../state.json", keep=True)(folder)


def _absolute(folder: Path) -> None:
    _rename("state.json", str(folder / "state.json"), keep=True)(folder)


def _forget(name: str):
    def change(folder: Path) -> None:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        del files[name]
        (folder / "manifest.json").write_text(json.dumps(dict(files=files)))

    return change


def _write_manifest(text: str):
    return lambda folder: (folder / "manifest.json").write_text(text)


DAMAGES = {
    "torn": (_truncate, "optimizer.safetensors has"),
    "flipped": (_flip, "optimizer.safetensors is damaged"),
    "flipped state": (partial(_flip, name="state.json"), "state.json is damaged"),
    "gone": (lambda folder: (folder / "process-00001.safetensors").unlink(), "process-00001.safetensors is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (lambda folder: os.truncate(folder / "manifest.json", 200), "manifest.json is .*damaged"),
    "empty manifest": (_write_manifest(""), "manifest.json is .*damaged"),
    "manifest of a list": (_write_manifest('{"files": ["state.json"]}'), "manifest.json is .*damaged"),
    "manifest without sizes": (_write_manifest('{"files": {"state.json": {}}}'), "manifest.json is .*damaged"),
    "manifest of nothing": (_write_manifest('{"files": {}}'), "state.json"),
    "outside": (_outside, "outside the folder"),
    "absolute": (_absolute, "outside the folder"),
    "link outside": (_link_outside, "outside the folder"),
    "linked folder outside": (_link_folder_outside, "outside the folder"),
    "no name": (_rename("run.json", "a\0b", keep=True), "manifest.json"),
    "too long a name": (_rename("run.json", "x" * 300, keep=True), "manifest.json"),
    **{f"{name} not named": (_forget(name), name) for name in (
        "state.json", "optimizer.safetensors", "trained.safetensors", "adapter_model.safetensors",
        "process-00001.safetensors",
    )},
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged(copy_until, capsys, damage):
    """Whatever a run would read from a checkpoint must be named, whole, and inside its folder; if not, the reason is
    told and the checkpoint before is taken."""
    change, reason = DAMAGES[damage]
    folder = copy_until(8)
    root = folder / "checkpoints"
    newest = root / "step-000008"
    change(newest)
    assert checkpoints.newest(root).name == "step-000006"
    assert re.search(reason, checkpoints.problem(newest))
    if damage != "no manifest":  # without one it is none, and nothing is said of it
        assert f"{newest} is no valid checkpoint ({checkpoints.problem(newest)})" in capsys.readouterr().out


class _Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def test_torn_checkpoint_is_passed_over(begin, whole, copy_until, tmp_path):
    """A real run names the torn file, goes on from the checkpoint before, and reads no file that no manifest names."""
    folder, mark = copy_until(6), tmp_path / "unpickled"
    _truncate(folder / "checkpoints" / "step-000006")
    for name in ("optimizer.pt", "process-00000.pt", "trained.bin", "pytorch_model.bin"):
        (folder / "checkpoints" / "step-000004" / name).write_bytes(pickle.dumps(_Trap(mark)))
    run = begin(folder)
    assert run.ends() == 0, run.said
    assert "step-000006 is no valid checkpoint (optimizer.safetensors has" in run.said
    assert f"goes on after step 4 of {STEPS}" in run.said
    assert not mark.exists()
    assert_same(folder, whole)


def test_flipped_checkpoint_by_name_is_refused(begin, copy_until, tmp_path):
    """`--resume PATH` to a checkpoint with a flipped bit: one line, exit code not 0, nothing is trained."""
    checkpoint = copy_until(6) / "checkpoints" / "step-000006"
    _flip(checkpoint)
    run = begin(tmp_path / "new", resume=checkpoint)
    assert run.ends() == 2, run.said
    (line,) = error_lines(run.said)
    assert str(checkpoint) in line and "optimizer.safetensors is damaged" in line
    assert "Traceback" not in run.said and not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------------------------
# How many are kept
# ---------------------------------------------------------------------------------------------------------------------

ATTEMPTS = itertools.count(1000, 1000)  # marks of writers in the same processes must not meet


def _snapshot(number: int) -> checkpoints.Snapshot:
    """Two rows of each process."""
    rows = [(("a", 2 * rank()), torch.full((2, 3), float(number)))]
    names = ("optimizer.safetensors", "trained.safetensors", "adapter_model.safetensors")
    specs = {name: {"a": (torch.float32, (4, 3))} for name in names}
    describe = lambda folder: (folder / "run.json").write_text("{}")
    own = {"random/cpu": torch.get_rng_state()}
    return checkpoints.Snapshot(
        number, specs, dict.fromkeys(names, rows), own, describe, dict(step=number, processes=2)
    )


def _valid(root: Path) -> list[int]:
    return sorted(map(checkpoints.number_of, filter(lambda f: not checkpoints.problem(f), root.glob("step-*"))))


def _no_room(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def write_some(root: Path, *, keep: int, attempt: int, failing: str) -> dict:
    """Writes the checkpoints of steps 2, 4 and 6, the last of which fails on process 1 or before its manifest; which
    were valid when the manifest of each was about to be written, which are at last, and the reasons."""
    writer, seen, errors = checkpoints.CheckpointWriter(root, keep=keep), [], []
    writer.attempt = attempt
    original = dict(write_manifest=checkpoints.write_manifest, write_rows=checkpoints.write_rows)
    try:
        checkpoints.write_manifest = lambda f: (seen.append(_valid(root)), original["write_manifest"](f))
        for number in (2, 4, 6):
            if number == 6 and (failing == "write_manifest" or rank() == 1):
                setattr(checkpoints, failing, _no_room)
            writer.start(_snapshot(number))
            errors.append(writer.finish())
    finally:
        for name, function in original.items():
            setattr(checkpoints, name, function)
    return dict(seen=seen, valid=_valid(root), errors=errors, left=sorted(p.name for p in root.glob(".*")))


@pytest.mark.parametrize("failing", ["write_rows", "write_manifest"])
@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_valid_one_stays(pair, tmp_path, keep, failing):
    """Older ones go only after the newer one is whole: while it is written, and when it fails, they stay."""
    root = tmp_path / "checkpoints"
    found, other = pair.run(write_some, root, keep=keep, attempt=next(ATTEMPTS), failing=failing)
    assert found["seen"] == [[], [2]]
    assert found["valid"] == [2, 4][-keep:]
    assert found["errors"] == other["errors"] and found["errors"][:2] == [None, None]
    assert "No space left on device" in found["errors"][2]
    assert not found["left"]


# ---------------------------------------------------------------------------------------------------------------------
# Disks
# ---------------------------------------------------------------------------------------------------------------------


def test_full_disk(begin, disk, tmp_path):
    """Without room for a checkpoint, nor for metrics, the run says so and goes on; the checkpoint before stays valid;
    with room again the next is written. Without room for the result, it ends with an error, and can save it later."""
    place = disk(tmp_path / "disk")
    folder, flags = place / "out", dict(max_steps=50, save_every_steps=10, keep_checkpoints=1)
    holds = (
        fault("step", "hold", 12, at="full"),
        fault("step", "hold", 39, at="free"),
        fault("save", "hold", at="end"),
    )
    run = begin(folder, *holds, pause=0.02, **flags)
    run.held("full")
    filled = fill(place)
    run.let_go("full")
    run.held("free")
    assert steps_of(folder) == [10]
    for number in (20, 30):
        assert f"WARNING: the checkpoint of step {number} could not be written" in run.said
    filled.unlink()
    run.let_go("free")
    run.held("end")
    assert steps_of(folder) == [50]
    filled = fill(place)
    run.let_go("end")
    assert run.ends() not in (0, PREEMPTED), run.said
    assert not looks_finished(folder) and steps_of(folder) == [50]
    filled.unlink()
    again = begin(folder, **flags)
    assert again.ends() == 0, again.said
    assert saving.is_finished(folder) and (folder / "adapter_model.safetensors").exists()


def test_read_only_disk(begin, whole, disk, copy_until):
    """A disk that becomes read-only while the run goes on is as a full one: the checkpoint before stays, the run goes
    on, and the next is written when it can be."""
    folder = copy_until(0)
    disk(folder / "checkpoints")
    holds = [fault("step", "hold", number, at=f"at-{number}") for number in (3, 7)]
    run = begin(folder, *holds, pause=0.05)
    run.held("at-3")
    assert steps_of(folder) == [2]
    remount(folder / "checkpoints", "ro")
    run.let_go("at-3")
    run.held("at-7")
    assert steps_of(folder) == [2]
    assert "WARNING: the checkpoint of step 4 could not be written" in run.said
    remount(folder / "checkpoints", "rw")
    run.let_go("at-7")
    assert run.ends() == 0, run.said
    assert steps_of(folder) == [2, *KEPT[3:]]
    assert_same(folder, whole)


def test_removed_folder(begin, whole, tmp_path):
    """An output folder that someone removes while the run goes on ends no run: later checkpoints are valid, or it says
    that they could not be written, and the result is saved."""
    folder = tmp_path / "out"
    run = begin(folder, fault("step", "hold", 3, at="removed"), pause=0.05)
    run.held("removed")
    shutil.rmtree(folder)
    run.let_go("removed")
    assert run.ends() == 0, run.said
    said = {n for n in KEPT[1:] if f"WARNING: the checkpoint of step {n} could not be written" in run.said}
    assert said | set(steps_of(folder)) == {*KEPT[1:]}
    assert saving.is_finished(folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == (whole[0] / "adapter_model.safetensors").read_bytes()
