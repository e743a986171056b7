"""Which process of a run this is, and what it says. Knows no torch: --help and a wrong flag must not wait for it."""

import os
import re
import sys
import time

from fsdp_utils.core.errors import UserError

FAIL_GRACE_SECONDS = 15.0


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
