"""What a checkpoint costs: the pause of a step, its size, and the time from the command to the first resumed step.

    python benchmarks/checkpoints.py --shape 8b --processes 1

Runs train.py itself, on random weights, with a checkpoint every ten steps; then again, stopped there and resumed. The
resumed run must end in the bytes of the uninterrupted one.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.common import SHAPES, write_config, write_results
from fsdp_utils.model.build import read_tokenizer

TRAIN = Path(__file__).parent.parent / "train.py"
EVERY, STEPS = 10, 40


def command(args: argparse.Namespace, folder: Path, output: str, **flags) -> list[str]:
    given = dict(
        model_name=folder / "model", load_format="dummy", dataset="dummy", dataset_samples=4096, packing=True,
        train_type=args.train_type, lora_rank=64, optimizer="fused_adamw", batch_size=args.rows,
        context_length=args.length, max_steps=STEPS, save_model=True, use_cpu_offload=False, lr=1e-4,
        output_dir=folder / output, log_to="stdout",
    ) | flags  # fmt: skip
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.processes}"]
    return [*start, str(TRAIN), *(f"--{name}={value}" for name, value in given.items()), *args.extra]


def run(words: list[str]) -> dict[int, float]:
    """Runs a command to its end; when each step ended, in seconds from the start."""
    begun, ended, said = time.perf_counter(), {}, []
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            said.append(line)
            if line.startswith("step="):
                ended[int(line.split()[0].removeprefix("step="))] = time.perf_counter() - begun
    if process.returncode:
        sys.exit("".join(said[-40:]))
    return ended


def step_seconds(ended: dict[int, float]) -> dict[int, float]:
    """Seconds from the end of the step before to the end of each, after the first ones, which compile."""
    return {step: at - ended[step - 1] for step, at in ended.items() if step > EVERY + 1}


def copy_seconds(size: int) -> float:
    """What the copy to host memory takes that no checkpoint avoids: so many bytes, to memory that is new."""
    if not torch.cuda.is_available():
        return 0.0
    there = torch.empty(size, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    begun = time.perf_counter()
    there.to("cpu")
    return time.perf_counter() - begun


def measure(args: argparse.Namespace, folder: Path) -> dict:
    write_config(args.shape, folder / "model")
    read_tokenizer("demo").save_pretrained(folder / "model")
    plain = step_seconds(run(command(args, folder, "without")))
    saving = step_seconds(run(command(args, folder, "with", save_every_steps=EVERY, keep_checkpoints=9)))
    run(command(args, folder, "resumed", stop_at_step=EVERY))
    resumed = run(command(args, folder, "resumed", resume="auto"))
    usual = statistics.median(plain.values())
    after = [seconds for step, seconds in saving.items() if step % EVERY == 1]  # a checkpoint comes right before
    beside = [seconds for step, seconds in saving.items() if step % EVERY in (2, 3)]
    checkpoint = folder / f"with/checkpoints/step-{2 * EVERY:06d}"
    state = sum((checkpoint / name).stat().st_size for name in ("trained.safetensors", "optimizer.safetensors"))
    same = all(
        (folder / name / path.name).read_bytes() == path.read_bytes()
        for path in (folder / "without").glob("*.safetensors")
        for name in ("with", "resumed")
    )
    return dict(
        shape=args.shape,
        train_type=args.train_type,
        processes=args.processes,
        step_s=round(usual, 4),
        pause_s=round(statistics.median(after) - usual, 4),
        copy_s=round(copy_seconds(state // args.processes), 4),
        steps_beside_writing=round(statistics.median(beside) / usual, 3),
        checkpoint_mib=round(sum(p.stat().st_size for p in checkpoint.iterdir()) / 2**20, 1),
        command_to_resumed_step_s=round(min(resumed.values()), 1),
        same_bytes=same,
    )


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--train_type", default="bnb_dora")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rows", type=int, default=4, help="per process")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--folder", help="where to write; a temporary one if left away")
    parser.add_argument("--json")
    parser.add_argument("--extra", nargs="*", default=[], help="more flags of train.py, each as --name=value")
    return parser.parse_args(words)


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        row = measure(args, Path(folder))
    print(json.dumps(row))
    if args.json:
        write_results(args.json, [row])


if __name__ == "__main__":
    main(parse_arguments())
