"""Training speed against the floor and against the peer a user would pick instead, in one run.

    python benchmarks/throughput.py --shape 8b --rows 4x2048:ckpt,1x2048:none,1x512:ckpt --peer peft,liger
    torchrun --nproc_per_node 2 benchmarks/throughput.py --train_types bnb_dora --peer alone
    python benchmarks/throughput.py --shape tiny --rows 2x64:ckpt --peer peft

Two floors: "of floor" is against products timed in a short burst, "sustained" against the same products kept up until
the GPU runs at the clock rate that its power allows, as it does in a step.

Peers train LoRA and DoRA in one process, on a bf16 base or NF4 in groups of 64; other train types get no row of theirs.
Of --extra they follow lora_*, optimizer, lr, wd and seed. `--peer alone`, under torchrun, is our own run without
sharding, in every process at the same time: two GPUs of one kind differ by as much as sharding costs. The slowest
process counts. A CPU runs the tiny shape, to try the script.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import MIXTURES, SHAPES, Run, floor_seconds, make_config, write_config, write_results
from benchmarks.peer import ALONE, PEERS, PeerRun, has_peer, parse_peers
from fsdp_utils.core import processes
from fsdp_utils.core.devices import pick_device, synchronize
from fsdp_utils.core.ranks import say, world_size


def parse_row(text: str) -> tuple[int, int, bool]:
    """`4x2048:ckpt` to (4, 2048, True)."""
    size, _, mode = text.partition(":")
    batch, length = map(int, size.split("x"))
    return batch, length, mode != "none"


def profile(run: Run | PeerRun, batch: int, length: int, *, rows: int = 40) -> None:
    """Prints where one step's GPU time goes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run.step(batch, length)
        synchronize(run.device)
    say(profiled.key_averages().table(sort_by="self_cuda_time_total", row_limit=rows, max_name_column_width=70))


HEADER = (
    f"{'train type':14} {'peer':>6} {'rows':>12} {'floor s':>8} {'step s':>8} {'tokens/s':>9} {'peak GiB':>9} "
    f"{'of floor':>9} {'sustained':>9}"
)


def table_line(result: dict) -> str:
    """A result under HEADER; a CPU has no peak."""
    peak = "-" if result["peak_gib"] is None else f"{result['peak_gib']:.2f}"
    return (
        f"{result['train_type']:14} {result['peer'] or '-':>6} {result['rows']:>12} {result['floor_s']:8.4f} "
        f"{result['step_s']:8.4f} {result['tokens_s']:9} {peak:>9} {result['of_floor']:9.3f} "
        f"{result['of_sustained']:9.3f}   "
        f"first step {result['first_step_s']} s, load {result['load_s']} s"
    )


def measured(run: Run | PeerRun, *, row: str, floor: float, sustained: float, **labels) -> dict:
    """One row of the table: ours or a peer's, measured alike; its speed as a share of both floors."""
    batch, length, _ = parse_row(row)
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    timed = run.measure(batch, length, steps=6, warmup=3)
    floors = dict(floor_s=round(floor, 4), sustained_floor_s=round(sustained, 4))
    shares = dict(of_floor=round(floor / timed["step_s"], 3), of_sustained=round(sustained / timed["step_s"], 3))
    return dict(**labels, rows=row, trained=trained, **floors, **timed, **shares)


def ratio_lines(results: list[dict]) -> list[str]:
    """Ours ÷ peer in tokens per second (above 1: faster) and in peak memory (below 1: smaller), for each peer's row."""
    ours = {(r["train_type"], r["rows"]): r for r in results if not r["peer"]}
    lines = []
    for peer in (r for r in results if r["peer"]):
        mine = ours[peer["train_type"], peer["rows"]]
        line = f"{peer['train_type']:14} {peer['rows']:>12} ours ÷ {peer['peer']}: "
        line += f"{mine['tokens_s'] / peer['tokens_s']:.2f} in tokens/s"
        if peer["peak_gib"]:
            line += f", {mine['peak_gib'] / peer['peak_gib']:.2f} in peak memory"
        lines.append(line)
    return lines


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, from the command line if `argv` is None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=[*SHAPES, *MIXTURES])
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--train_types", default="custom_qlora,bnb_dora")
    parser.add_argument("--rows", default="4x2048:ckpt,1x2048:none,1x512:ckpt")
    parser.add_argument("--peer", default="", help=f"whom to measure beside ours, of {','.join((*PEERS, ALONE))}")
    parser.add_argument("--extra", default="", help="more flags of train.py, such as 'compile=false,quant_scales=fp32'")
    parser.add_argument("--sustained", type=float, default=1.0, help="seconds of each part of the sustained floor")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    extra = dict(pair.split("=") for pair in args.extra.split(",") if pair)
    device = pick_device(extra.get("device", "auto"))
    peers = parse_peers(args.peer, device=device)
    folder = write_config(args.shape, tempfile.mkdtemp(), layers=args.layers)
    common = dict(processes=world_size(), extra=extra)
    results = []
    say(HEADER)
    for row in args.rows.split(","):
        batch, length, checkpointing = parse_row(row)
        floor_of = partial(floor_seconds, folder, batch=batch, length=length, checkpointing=checkpointing)
        several = int(extra.get("context_parallel", 1))  # who share the work on a row
        timed = dict(floor=floor_of(device=device), sustained=floor_of(device=device, at_least=args.sustained))
        floors = {name: seconds / several for name, seconds in timed.items()}
        for train_type in args.train_types.split(","):
            flags = dict(batch_size=batch, context_length=length, use_gradient_checkpointing=checkpointing)
            config = make_config(folder, train_type=train_type, **flags | extra)
            for peer in (None, *(peer for peer in peers if has_peer(train_type, peer))):
                ours = peer in (None, ALONE)
                run = Run(config, alone=peer == ALONE) if ours else PeerRun(config, peer=peer)
                results.append(measured(run, row=row, **floors, train_type=train_type, peer=peer, **common))
                say(table_line(results[-1]))
                write_results(args.json, results[-1:])
                if args.profile:
                    profile(run, batch, length)
                run.close()
    for line in ratio_lines(results):
        say(line)


if __name__ == "__main__":
    processes.run(main, parse_arguments())
