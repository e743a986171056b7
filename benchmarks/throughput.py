"""Training speed against the floor and against PEFT, in one run.

python benchmarks/throughput.py --shape 8b --rows 4x2048:ckpt,1x2048:none,1x512:ckpt
torchrun --nproc_per_node 2 benchmarks/throughput.py --train_types bnb_dora
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.common import SHAPES, Run, floor_seconds, make_config, write_config, write_results
from fsdp_utils import distributed
from fsdp_utils.distributed import say


def parse_row(text: str) -> tuple[int, int, bool]:
    """`4x2048:ckpt` to (4, 2048, True)."""
    size, _, mode = text.partition(":")
    batch, length = map(int, size.split("x"))
    return batch, length, mode != "none"


def profile(run: Run, batch: int, length: int, *, rows: int = 40) -> None:
    """Prints where one step's GPU time goes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run.step(batch, length)
        torch.cuda.synchronize()
    say(profiled.key_averages().table(sort_by="self_cuda_time_total", row_limit=rows, max_name_column_width=70))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has; the floor is scaled alike")
    parser.add_argument("--train_types", default="custom_qlora,bnb_dora")
    parser.add_argument("--rows", default="4x2048:ckpt,1x2048:none,1x512:ckpt")
    parser.add_argument("--extra", default="", help="more flags of train.py, such as 'compile=false,quant_scales=fp32'")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.layers:
        SHAPES[args.shape]["num_hidden_layers"] = args.layers
    extra = dict(pair.split("=") for pair in args.extra.split(",") if pair)
    folder = write_config(args.shape, tempfile.mkdtemp())
    results = []
    say(f"{'train type':14} {'rows':>12} {'floor s':>8} {'step s':>8} {'tokens/s':>9} {'peak GiB':>9} {'of floor':>9}")
    for row in args.rows.split(","):
        batch, length, checkpointing = parse_row(row)
        distributed.pick_device("auto")
        floor = floor_seconds(args.shape, batch=batch, length=length, checkpointing=checkpointing)
        for train_type in args.train_types.split(","):
            run = Run(make_config(folder, train_type=train_type, use_gradient_checkpointing=checkpointing, **extra))
            measured = run.measure(batch, length)
            result = dict(train_type=train_type, rows=row, floor_s=round(floor, 4), **measured)
            result.update(
                of_floor=round(floor / measured["step_s"], 3), processes=distributed.world_size(), extra=extra
            )
            results.append(result)
            say(
                f"{train_type:14} {row:>12} {floor:8.4f} {measured['step_s']:8.4f} {measured['tokens_s']:9} "
                f"{measured['peak_gib']:9.2f} {result['of_floor']:9.3f}   first step {measured['first_step_s']} s, "
                f"load {measured['load_s']} s"
            )
            if args.profile:
                profile(run, batch, length)
            run.close()
    write_results(args.json, results)


if __name__ == "__main__":
    main()
