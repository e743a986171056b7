"""The device of this process, and what its memory holds."""

import os
from pathlib import Path

import torch

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.ranks import local_rank, world_size

GIB = 2**30


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


def synchronize(device: torch.device) -> None:
    """Waits for the work queued on a GPU; on a CPU none is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_gib(device: torch.device) -> float:
    """Peak of allocated GPU memory since the last reset, or of this process's resident memory on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def memory_now(device: torch.device) -> dict[str, float]:
    """GiB allocated and reserved on the GPU at this moment; on a CPU, resident in this process."""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return dict(allocated_gib=allocated / GIB, reserved_gib=reserved / GIB)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return dict(resident_gib=pages * os.sysconf("SC_PAGE_SIZE") / GIB)


def repeat_exactly() -> None:
    """From now on only kernels that add in a fixed order run; one that has no such form raises RuntimeError.

    The backward pass of flash attention adds as its blocks come. The kernels of this project repeat anyway.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)  # warn_only would leave attention as it is
    # without it Inductor may still time two block sizes of a reduction in each process, and take the faster one:
    # pytorch/pytorch#189121
    from torch._inductor import config as inductor  # here: it takes a second

    inductor.deterministic = True
    torch.utils.deterministic.fill_uninitialized_memory = False  # we fill what we read
