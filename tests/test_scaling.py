"""What one process does of a run of 8, 64 or 512: counted in a process group that moves nothing."""

import pickle
from collections import deque
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from real_run import make_config, plan
from torch.distributed.tensor import debug
from torch.testing._internal.distributed.fake_pg import FakeStore

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.processes import all_gather_objects, from_main
from fsdp_utils.core.safetensors_io import CheckpointReader
from fsdp_utils.folders import checkpoints
from fsdp_utils.model.assemble import load
from fsdp_utils.sharding.mesh import mesh_for

CPU, MANY = torch.device("cpu"), (8, 64, 512)


class Counted:
    """What goes through this process: bytes of objects that it gets from others, bytes of tensors that it reads."""

    def __init__(self):
        self.objects = self.read = 0


def forget_rank() -> None:
    """What DTensor remembers of an operator's result has the rows of the rank that this process was."""
    debug._clear_sharding_prop_cache()
    getattr(debug, "_clear_fast_path_sharding_prop_cache", lambda: None)()  # torch 2.11 has one cache


@pytest.fixture
def process(monkeypatch):
    """`process(rank, of=N)`: within it this is one of so many, and is counted. What process 0 says to all is known to
    the others if they come after it."""
    said = {}

    @contextmanager
    def one(rank: int, *, of: int):
        counted, heard = Counted(), deque(said.get(of, ()))

        def gather(everyone, mine, group=None):
            counted.objects += len(pickle.dumps(mine)) * of
            everyone[:] = [mine] * of

        def broadcast(objects, src, **_):
            if rank == 0:
                said.setdefault(of, []).append(pickle.dumps(objects))
            else:
                objects[:] = pickle.loads(heard.popleft())
            counted.objects += len(pickle.dumps(objects))

        def rows(reader, name, start, stop, real=CheckpointReader.rows):
            found = real(reader, name, start, stop)
            counted.read += found.nbytes
            return found

        with monkeypatch.context() as here:
            for name, value in dict(RANK=rank, WORLD_SIZE=of, LOCAL_RANK=rank % 8, LOCAL_WORLD_SIZE=8).items():
                here.setenv(name, str(value))
            here.setattr(dist, "all_gather_object", gather)
            here.setattr(dist, "broadcast_object_list", broadcast)
            here.setattr(CheckpointReader, "rows", rows)
            dist.init_process_group("fake", rank=rank, world_size=of, store=FakeStore())
            try:
                yield counted
            finally:
                dist.destroy_process_group()
                forget_rank()

    return one


@pytest.fixture
def start(tiny, process):
    """`start(rank, of=N)`: counts a process from its configuration to a model that is filled."""
    base = tiny("llama", hidden_size=128, intermediate_size=512, vocab_size=4096)

    def begun(rank: int, *, of: int, **flags) -> Counted:
        with process(rank, of=of) as counted:
            config = make_config(model_name=base, train_type="custom_qlora", **flags)
            planned = plan(config)
            load(planned, config, mesh=mesh_for(config, CPU), device=CPU).close()
        return counted

    return begun


@pytest.mark.parametrize("more", [dict(), dict(sharding_strategy="hybrid_full_shard")], ids=["full", "hybrid"])
def test_what_a_process_reads(start, more):
    """Its share of the weights, and nothing to tell one checkpoint from another: process 0 does that for all."""
    read = {}
    for processes in MANY:
        start(0, of=processes, **more)
        read[processes] = start(3, of=processes, **more).read
    shares = dict.fromkeys(MANY, 8) if more else dict(zip(MANY, MANY, strict=True))
    whole = read[8] * 8
    for processes, share in shares.items():
        assert read[processes] <= whole / share + 8192, read  # a share is rounded up to a row of each tensor


def test_what_a_process_is_told(start):
    """Once what process 0 knows, and from each other process less than a line."""
    for processes in MANY:
        for rank in (0, processes - 1):
            told = start(rank, of=processes).objects
            assert told < 1024 + 64 * processes, (processes, rank, told)


def test_a_checkpoint_is_agreed_on_in_few_words(process):
    """Not by each process's list of all tensors to each: 1,000 tensors of which a process may hold no row."""
    specs = {f"exp_avg/blocks.{i}.A": (torch.bfloat16, (64, 4096)) for i in range(1000)}
    for processes in MANY:
        for rank in (0, 5):
            held = specs if rank == 0 else dict(list(specs.items())[:700])
            with process(rank, of=processes) as counted:
                found = checkpoints._agreed(SimpleNamespace(specs=held, scalars={"A": 1}, own={}))
            assert {name: spec for mine, _, _ in found for name, spec in mine.items()} == specs
            assert counted.objects < len(pickle.dumps(specs)) + 1024 + 64 * processes


def test_what_only_another_holds_is_not_lost(pair):
    """A tensor of which process 0 has no row is in the list of all."""
    for agreed in pair.run(_agreed_of_two):
        assert agreed == {"first": 1, "both": 2, "second": 3}


def _agreed_of_two() -> dict:
    held = {"first": 1, "both": 2} if dist.get_rank() == 0 else {"both": 2, "second": 3}
    found = checkpoints._agreed(SimpleNamespace(specs=held, scalars={}, own={}))
    return {name: spec for mine, _, _ in found for name, spec in mine.items()}


def test_from_main(pair):
    """Process 0 makes it, all have it; what is wrong there ends all of them."""
    assert pair.run(_told) == [(0, ["no such file"], [0, 1])] * 2


def _told():
    number, errors = from_main(dist.get_rank), []
    try:
        from_main(_refuse)
    except UserError as error:
        errors.append(str(error))
    return number, errors, all_gather_objects(dist.get_rank())


def _refuse():
    assert dist.get_rank() == 0
    raise UserError("no such file")
