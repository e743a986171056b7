"""Useful tokens per second: packed rows against padding to the longest of each batch, on lengths like Orca-Math's.

python benchmarks/packing.py --shape 8b
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import datasets
import numpy as np

from benchmarks.common import SHAPES, Run, make_config, write_config, write_results
from fsdp_utils.core.devices import synchronize
from fsdp_utils.data.batches import IGNORED, Batches, epoch_rows, padding_share, predicting_tokens
from fsdp_utils.data.tokens import TokenizedData
from fsdp_utils.tasks.causal_lm import CAUSAL_LM

LENGTH = 2048


def samples(count: int, *, vocabulary: int) -> TokenizedData:
    """Random tokens in lognormal lengths with median 250, all of them in the loss."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(250), 0.6, count).astype(np.int64), 16, LENGTH)
    ids = [rng.integers(0, vocabulary, n).astype(np.int32) for n in lengths]
    labels = [np.concatenate([[IGNORED], row[1:]]) for row in ids]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}).with_format("numpy")
    return TokenizedData(dataset=rows, lengths=lengths, rows=np.arange(len(lengths)), report=None, name="lognormal")


def useful_speed(run: Run, batches: Batches, *, steps: int, warmup: int = 6) -> float:
    """Tokens of samples (not padding) per second."""
    done, start = 0, None
    for i, (micro_batch,) in enumerate(run.train_step.batches(batches).first(warmup + steps)):
        if i == warmup:
            synchronize(run.device)
            start = time.perf_counter()
        done += predicting_tokens(micro_batch) if i >= warmup else 0
        run.step_on(micro_batch)
    synchronize(run.device)
    return done / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--train_type", default="bnb_dora")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json")
    args = parser.parse_args()
    folder = write_config(args.shape, tempfile.mkdtemp())
    data = samples(1500, vocabulary=SHAPES[args.shape]["vocab_size"])
    results = []
    # the same room for tokens in both: 4 rows of the longest against 4 full rows
    for packing, batch in ((False, 4), (False, 16), (True, 4)):
        run = Run(make_config(folder, train_type=args.train_type, packing=packing, context_length=LENGTH))
        shape = dict(batch_size=batch, context_length=LENGTH, packing=packing)
        speed = useful_speed(run, Batches(data, CAUSAL_LM.collate, **shape), steps=args.steps)
        rows, _ = epoch_rows(data.lengths, seed=0, epoch=0, context_length=LENGTH, packing=packing)
        left = padding_share(rows, data.lengths, capacity=LENGTH) if packing else None
        results.append(dict(packing=packing, batch=batch, useful_tokens_s=round(speed), padding=left))
        padding = f", {left:.2%} padding" if packing else ""
        print(f"{'packed' if packing else 'padded'} {batch} rows: {speed:.0f} useful tokens/s{padding}", flush=True)
        run.close()
    packed = results[-1]["useful_tokens_s"]
    for row in results[:-1]:
        print(f"packed / padded with {row['batch']} rows: {packed / row['useful_tokens_s']:.2f}", flush=True)
    write_results(args.json, results)


if __name__ == "__main__":
    main()
