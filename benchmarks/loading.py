"""Seconds to load and quantize a model from safetensors in the page cache, and from the quantized cache.

    torchrun --nproc_per_node 2 benchmarks/loading.py --shape 8b --folder /tmp/8b

Writes a random model of the shape to --folder first if there is none; the files are read once to warm the page cache.
"""

import argparse
import gc
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil
import torch

from benchmarks.common import SHAPES, make_config, write_config, write_results
from fsdp_utils.core import processes
from fsdp_utils.core.devices import pick_device, synchronize
from fsdp_utils.core.processes import barrier
from fsdp_utils.core.ranks import is_main, say, world_size
from fsdp_utils.core.safetensors_io import StreamingWriter
from fsdp_utils.model.assemble import load, plan
from fsdp_utils.model.build import build_on_meta, read_model_config, read_tokenizer
from fsdp_utils.model.weights import open_weights
from fsdp_utils.sharding.mesh import mesh_for
from fsdp_utils.tasks.causal_lm import CAUSAL_LM


def write_model(shape: str, folder: Path, *, device: torch.device) -> None:
    """A complete folder with random bf16 weights, in shards of 5 GB, and the demo's tokenizer."""
    write_config(shape, folder)
    read_tokenizer("demo").save_pretrained(folder)
    model = build_on_meta(read_model_config(str(folder), task=CAUSAL_LM), task=CAUSAL_LM, dtype=torch.bfloat16)
    how = dict(task=CAUSAL_LM, load_format="dummy", dtype=torch.bfloat16, device=device, seed=0)
    weights = open_weights(model, str(folder), **how)
    writer = StreamingWriter(folder, {name: (torch.bfloat16, weights.shape(name)) for name in weights.names()})
    for name in weights.names():
        writer.write(name, weights.rows(name, 0, weights.shape(name)[0]))
    writer.finish()


def timed_load(config, *, device: torch.device) -> float:
    """Seconds from the flags to a filled, sharded model, on the slowest process."""
    barrier()
    start = time.perf_counter()
    prepared = load(plan(config, task=CAUSAL_LM, device=device), config, mesh=mesh_for(config, device), device=device)
    synchronize(device)
    barrier()
    took = time.perf_counter() - start
    prepared.close()
    del prepared
    gc.collect()
    torch.cuda.empty_cache()
    return took


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--train_type", default="bnb_dora")
    parser.add_argument("--json")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    device = pick_device("auto")
    processes.start(device)
    folder = Path(args.folder)
    if is_main() and not (folder / "config.json").exists():
        write_model(args.shape, folder, device=device)
    barrier()
    if is_main():
        for path in folder.glob("*.safetensors"):
            shutil.copyfile(path, "/dev/null")
    barrier()
    settings = dict(train_type=args.train_type, load_format="safetensors")
    plain = make_config(args.folder, **settings)
    cached = make_config(args.folder, quantized_cache=f"{args.folder}/quantized", **settings)
    rows = []
    for what, config in (
        ("load and quantize", plain),
        ("again", plain),
        ("load, quantize, write the cache", cached),
        ("load from the cache", cached),
        ("again", cached),
    ):
        took = timed_load(config, device=device)
        rows.append(dict(what=what, seconds=round(took, 2), processes=world_size(), shape=args.shape))
        say(f"{what:34} {took:7.2f} s   host memory {psutil.Process().memory_info().rss / 2**30:.1f} GiB")
    write_results(args.json, rows)


if __name__ == "__main__":
    processes.run(main, parse_arguments())
