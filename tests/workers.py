"""A few gloo processes that stay alive and run many cases: starting Python with torch costs seconds."""

import os
import socket
import traceback

import torch
import torch.distributed as dist
from forks import server


def _serve(rank, size, port, jobs, results):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    while (job := jobs.get()) is not None:
        function, args, kwargs = job
        try:
            results.put((rank, True, function(*args, **kwargs)))
        except BaseException:
            results.put((rank, False, traceback.format_exc()))


class Workers:
    """`size` processes; `run(function, ...)` calls it in each and returns the results in rank order."""

    def __init__(self, size: int):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        context = server()
        self.results = context.Queue()
        self.jobs = [context.Queue() for _ in range(size)]
        self.processes = [
            context.Process(target=_serve, args=(rank, size, port, jobs, self.results), daemon=True)
            for rank, jobs in enumerate(self.jobs)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, *args, **kwargs):
        for jobs in self.jobs:
            jobs.put((function, args, kwargs))
        answers = sorted((self.results.get(timeout=300) for _ in self.jobs), key=lambda answer: answer[0])
        for rank, ok, answer in answers:
            assert ok, f"process {rank} failed:\n{answer}"
        return [answer for _, _, answer in answers]

    def close(self):
        for jobs in self.jobs:
            jobs.put(None)
        for process in self.processes:
            process.join(timeout=20)
