"""Processes: how they start, which device they own, the mesh they form, and how they end together."""

import os
import re
import sys
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import parse

FAIL_GRACE_SECONDS = 15.0
SHARING: list = []  # what reads other processes' memory, or lets them read its own: `disconnect` and `free` end it


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def is_main() -> bool:
    return rank() == 0


def say(*words, sep: str = " ") -> None:
    """Prints on process 0 only."""
    if is_main():
        print(*words, sep=sep, flush=True)


def barrier() -> None:
    """Waits for all processes; does nothing in a single one."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce(value: float, device: torch.device, *, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> float:
    """The sum of a number over all processes, or what `op` makes of it."""
    if not dist.is_initialized():
        return value
    reduced = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(reduced, op=op)
    return reduced.item()


def synchronize(device: torch.device) -> None:
    """Waits for the work queued on a GPU; on a CPU none is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stop_sharing() -> None:
    """Ends what `SHARING` holds, in the order that torch asks for: no process frees, or ends with, memory that another
    still maps. Collective."""
    for sharing in SHARING:
        sharing.disconnect()
    if SHARING:
        barrier()
    for sharing in SHARING:
        sharing.free()
    SHARING.clear()


def first_host(node_list: str) -> str:
    """The first host of a SLURM node list such as `gpu[03-05,9],login1`."""
    first = re.match(r"(?:\[[^\]]*\]|[^\[,])+", node_list).group()  # up to a comma outside brackets
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)


def read_slurm_environment(master_addr: str, master_port: str) -> None:
    """Sets torchrun's variables from srun's. Values that are already set win."""
    env = os.environ
    if "RANK" in env or "SLURM_PROCID" not in env or int(env.get("SLURM_NTASKS", 1)) < 2:
        return
    per_node = re.match(r"\d+", env.get("SLURM_NTASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "1"))).group()
    if master_addr == "localhost":
        master_addr = first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "localhost")))
    env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=env["SLURM_NTASKS"], LOCAL_RANK=env.get("SLURM_LOCALID", "0"))
    for name, value in (("LOCAL_WORLD_SIZE", per_node), ("MASTER_ADDR", master_addr), ("MASTER_PORT", master_port)):
        env.setdefault(name, value)


def pick_device(wanted: str) -> torch.device:
    """The device of this process.

    Raises:
        UserError: CUDA was asked for and is missing, or there are more processes than GPUs.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible; use --device cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    visible, count = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    own = visible == 1 and "SLURM_GPUS_PER_TASK" in os.environ  # SLURM shows each task its own GPU as the only one
    if count > visible and not own:  # on every process: those that have a GPU would wait for the others
        raise UserError(
            f"--nproc_per_node {count}: {count} processes but {visible} visible GPU(s); "
            "start one process per GPU or pass --device cpu"
        )
    device = torch.device("cuda", 0 if own else local_rank())
    torch.cuda.set_device(device)
    return device


def start(device: torch.device, *, alone: bool = False) -> None:
    """Joins the process group when there are several processes; gloo serves tensors in host memory.

    A single process makes a group of its own if `alone`: FSDP2's CPU offload needs one.
    """
    if dist.is_initialized() or (world_size() == 1 and not alone):
        return
    on_gpu = device.type == "cuda"
    settings = dict(store=dist.HashStore(), rank=0, world_size=1) if world_size() == 1 else {}
    settings["timeout"] = timedelta(hours=2)  # the others wait while process 0 tokenizes or writes
    device_id = device if on_gpu else None
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", device_id=device_id, **settings)


def make_mesh(strategy: str, device: torch.device, *, hybrid_shard_size: int = -1) -> DeviceMesh:
    """The mesh to shard over: 1-D for full_shard and shard_grad_op, (replicas, shards) for the others.

    `ddp` is the mesh whose shard dimension has one member.

    Raises:
        UserError: the shard size does not divide the number of processes.
    """
    total = world_size()
    if strategy in ("full_shard", "shard_grad_op"):
        return init_device_mesh(device.type, (total,), mesh_dim_names=("shard",))
    size = 1
    if strategy != "ddp":
        size = hybrid_shard_size if hybrid_shard_size > 0 else int(os.environ.get("LOCAL_WORLD_SIZE", total))
    if total % size:
        raise UserError(f"--hybrid_shard_size {size}: does not divide {total} processes")
    return init_device_mesh(device.type, (total // size, size), mesh_dim_names=("replicate", "shard"))


def mesh_for(config, device: torch.device) -> DeviceMesh | None:
    """The mesh of a run, or None where one process holds the whole model and nothing is offloaded."""
    if world_size() == 1 and not config.use_cpu_offload:
        return None
    return make_mesh(config.sharding_strategy, device, hybrid_shard_size=config.hybrid_shard_size)


def shard_group(mesh: DeviceMesh):
    """The processes that together hold one copy of the model."""
    return (mesh["shard"] if mesh.ndim > 1 else mesh).get_group()


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
    os.environ.setdefault("MASTER_ADDR", config.master_addr)
    os.environ.setdefault("MASTER_PORT", config.master_port)
    started = None
    try:
        started = torch.multiprocessing.spawn(_spawned, args=(function, count, config), nprocs=count, join=False)
        while not started.join():
            pass
    except KeyboardInterrupt:  # sent to this process alone: those that it started would go on, and it would wait
        for process in started.processes if started else ():
            process.terminate()
        os._exit(130)
    except torch.multiprocessing.ProcessExitedException as error:
        if error.signal_name:
            memory = "; the machine may have run out of memory" if error.signal_name == "SIGKILL" else ""
            print(f"error: process {error.error_index} was ended by {error.signal_name}{memory}", file=sys.stderr)
            sys.exit(1)
        sys.exit(error.exit_code or 1)  # the process has already said why


def fail(error: UserError) -> None:
    """Shows bad input as its message alone, once per node, and exits with 2.

    A launcher ends all processes when the first exits. So the others leave that to process 0, which says it; where
    process 0 does not fail, they speak for themselves.
    """
    if local_rank() != 0:
        time.sleep(FAIL_GRACE_SECONDS)
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # not sys.exit: leaving through a process group that waits for another process can hang
    os._exit(2)


def parse_or_fail(config, **options):
    """`core.flags.parse`, where a wrong flag ends every process with one line and exit code 2."""
    try:
        return parse(config, **options)
    except UserError as error:
        fail(error)


def run(function, config) -> None:
    """Runs `function(config)` in this process; any exception ends the process at once, so that the others end too."""
    try:
        function(config)
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # as a shell reports it
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    if dist.is_initialized():
        stop_sharing()
        dist.destroy_process_group()
