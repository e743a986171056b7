"""Processes: how they start, what they sum, and how they end together."""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from fsdp_utils.core.errors import PREEMPTED, Ended, UserError
from fsdp_utils.core.ranks import fail, read_slurm_environment, world_size

T = TypeVar("T")


def barrier() -> None:
    """Waits for all processes; does nothing in a single one."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce(value: float, device: torch.device, *, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> float:
    """The sum of a number over all processes, or what `op` makes of it."""
    return all_reduce_each([value], device, op=op)[0]


def start(device: torch.device, *, alone: bool = False) -> None:
    """Joins the process group when there are several processes; gloo serves tensors in host memory.

    A single process makes a group of its own if `alone`: FSDP2's CPU offload needs one.
    """
    if dist.is_initialized() or (world_size() == 1 and not alone):
        return
    on_gpu = device.type == "cuda"
    settings = dict(store=dist.HashStore(), rank=0, world_size=1) if world_size() == 1 else _of_a_restart()
    settings["timeout"] = timedelta(hours=2)  # the others wait while process 0 tokenizes or writes
    device_id = device if on_gpu else None
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", device_id=device_id, **settings)


def _of_a_restart() -> dict:
    """torchrun keeps its store when it starts processes again, in which the addresses of those that ended still stand.

    Of one host only: the counts of several differ.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store, number, count = next(rendezvous("env://"))
    return dict(store=dist.PrefixStore(f"start-{restarts}", store), rank=number, world_size=count)


def all_reduce_each(
    values: list[float], device: torch.device, *, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> list[float]:
    """`all_reduce` of each number, by one collective."""
    if not dist.is_initialized():
        return values
    reduced = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(reduced, op=op)
    return reduced.tolist()


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """In place; the host does not wait for a GPU."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather_objects(mine) -> list:
    """What every process gave, in their order."""
    if not dist.is_initialized():
        return [mine]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def from_main(make: Callable[[], T]) -> T:
    """What `make` gives in process 0, to all; the others do not call it. What costs a look at a disk that all share, or
    is long, is so said once, not by every process to every other.

    Raises:
        UserError: `make` raised it; in all of them, since none would get what it waits for.
    """
    if not dist.is_initialized():
        return make()
    said = [None]
    if dist.get_rank() == 0:
        try:
            said = [(make(), None)]
        except UserError as error:
            said = [(None, error)]
    dist.broadcast_object_list(said, src=0)
    value, error = said[0]
    if error:
        raise error
    return value


def command(script: str | Path, *, processes: int) -> list[str]:
    """How a command line of a script that calls `launch` begins, for so many processes of this host; several take any
    free port. One is said to be one: by itself, a script starts a process for each GPU."""
    if processes == 1:
        return [sys.executable, str(script), "--world_size=1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*torchrun, str(script)]


def _spawned(index: int, function, count: int, config) -> None:
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    run(function, config)


def launch(function, config) -> None:
    """Runs `function(config)` once in each process of the run, however it was started.

    Under torchrun or srun this process is one of them. Under plain `python` it starts one per visible GPU, or
    `config.world_size` of them; one on a CPU.
    """
    read_slurm_environment(config.master_addr, config.master_port)
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    count = 1 if "RANK" in os.environ else config.world_size
    if count < 1:
        count = max(torch.cuda.device_count(), 1) if on_gpu else 1
    if on_gpu and "RANK" not in os.environ and count > torch.cuda.device_count():
        fail(UserError(f"--world_size {count}: only {torch.cuda.device_count()} GPU(s) are visible"))
    if count == 1:
        run(function, config)
        return
    if "MASTER_PORT" not in os.environ and listens(int(config.master_port)):
        fail(UserError(f"--master_port {config.master_port}: is in use, as by another run on this host; pass another"))
    os.environ.setdefault("MASTER_ADDR", config.master_addr)
    os.environ.setdefault("MASTER_PORT", config.master_port)
    told = []
    try:
        started = torch.multiprocessing.spawn(_spawned, args=(function, count, config), nprocs=count, join=False)
        _pass_signals_on(started.processes, told)
        while not started.join():
            pass
    except torch.multiprocessing.ProcessExitedException as error:
        if told and error.signal_name:  # before it could listen
            sys.exit(PREEMPTED)
        if error.signal_name:
            memory = "; the machine may have run out of memory" if error.signal_name == "SIGKILL" else ""
            print(f"error: process {error.error_index} was ended by {error.signal_name}{memory}", file=sys.stderr)
            sys.exit(1)
        sys.exit(error.exit_code or 1)  # the process has already said why


def listens(port: int) -> bool:
    """Whether something of this host listens there."""
    with socket.socket() as asking:
        return asking.connect_ex(("localhost", port)) == 0


def _pass_signals_on(children: list, told: list[int]) -> None:
    """What tells this process to stop tells those that it started, once; a second time ends them all. `told` grows by
    each signal."""

    def tell(number, frame):
        for child in children:
            child.kill() if told else child.terminate()
        if told:
            os._exit(PREEMPTED)
        told.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, tell)


def run(function, config) -> None:
    """Runs `function(config)` in this process; any exception ends the process at once, so that the others end too."""
    try:
        function(config)
    except UserError as error:
        fail(error)
    except Ended as end:
        sys.stdout.flush()
        if end.code:  # not sys.exit, which would wait for the other processes
            os._exit(end.code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # as a shell reports it
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()
