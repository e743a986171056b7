"""Does it fit: peak GPU and host memory of a model on capped GPUs, and the longest sequence that trains.

    torchrun --nproc_per_node 2 benchmarks/memory.py --shape 70b --cap_gib 24 --rows 2x2048 --extra use_cpu_offload=true
    python benchmarks/memory.py --shape 8b --cap_gib 24 --rows 1x16384,1x32768,1x65536 \\
        --extra use_activation_cpu_offload=true,quantize_lm_head=true
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil
import torch

from benchmarks.common import MIXTURES, SHAPES, Run, make_config, write_config, write_results
from benchmarks.throughput import parse_row
from fsdp_utils.core import processes
from fsdp_utils.core.devices import pick_device
from fsdp_utils.core.ranks import say


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="70b", choices=[*SHAPES, *MIXTURES])
    parser.add_argument("--train_type", default="bnb_dora")
    parser.add_argument("--cap_gib", type=float, help="memory this process may take of its GPU")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--rows", default="2x2048")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--extra", default="")
    parser.add_argument("--json")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    device = pick_device("cuda")
    if args.cap_gib:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(args.cap_gib * 2**30 / total, device)
    extra = dict(pair.split("=") for pair in args.extra.split(",") if pair)
    rows = {row: parse_row(row) for row in args.rows.split(",")}
    batch, length, _ = max(rows.values(), key=lambda row: row[0] * row[1])  # what `auto` plans for
    flags = dict(train_type=args.train_type, batch_size=batch, context_length=length) | extra
    run = Run(make_config(write_config(args.shape, tempfile.mkdtemp(), layers=args.layers), **flags))
    loaded = torch.cuda.max_memory_allocated() / 2**30
    results = []
    for row, (batch, length, _) in rows.items():
        try:
            measured = run.measure(batch, length, steps=args.steps, warmup=1)
        except torch.OutOfMemoryError as error:
            say(f"{args.shape} {args.train_type} {row}: does not fit ({str(error).splitlines()[0]})")
            break
        host = psutil.Process().memory_info().rss / 2**30
        results.append(dict(shape=args.shape, train_type=args.train_type, row=row, host_gib=round(host, 1), **measured))
        say(
            f"{args.shape} {args.train_type} {row}: step {measured['step_s']:.2f} s, {measured['tokens_s']} tokens/s "
            f"per process, peak {measured['peak_gib']:.2f} GiB (loading {loaded:.2f}), host {host:.1f} GiB "
            f"per process, load {measured['load_s']} s"
        )
    run.close()
    write_results(args.json, [{**r, "cap_gib": args.cap_gib, "extra": extra} for r in results])


if __name__ == "__main__":
    processes.run(main, parse_arguments())
