"""How fast rows become tokens, and how much memory that takes, beside the tokenizers library alone on the same text.

    python benchmarks/data.py --model SMOLLM2 --rows gsm8k_train.jsonl --times 134

One line for rows that are repeated (whose texts are looked up) and one for rows that are all different.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def parsed():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="folder with the tokenizer")
    parser.add_argument("--rows", default=str(REPOSITORY / "demo" / "train.jsonl"), help="question and answer rows")
    parser.add_argument("--times", type=int, default=10, help="how often the rows are repeated")
    parser.add_argument("--distinct", action="store_true", help="give every row a number of its own")
    parser.add_argument("--alone", action="store_true", help="only the tokenizers library, on the same texts")
    return parser.parse_args()


def write_rows(args, path: Path) -> int:
    """The rows, as often as asked for; returns how many."""
    rows, count = [json.loads(line) for line in Path(args.rows).read_text().splitlines()], 0
    with open(path, "w") as file:
        for _ in range(args.times):
            for row in rows:
                extra = f"{count} " if args.distinct else ""
                row = dict(question=extra + row["question"], answer=extra + row["answer"])
                file.write(json.dumps(row) + "\n")
                count += 1
    return count


def by_us(model: str, path: Path) -> None:
    from fsdp_utils.config import TrainConfig
    from fsdp_utils.data.tokens import prepare_dataset
    from fsdp_utils.model.build import read_tokenizer

    tokenizer = read_tokenizer(model)
    prepare_dataset(TrainConfig(dataset=str(path), context_length=2048), tokenizer)


def by_tokenizers(model: str, path: Path) -> None:
    from fsdp_utils.data.layouts import QUESTION_PROMPT
    from fsdp_utils.model.build import read_tokenizer

    backend = read_tokenizer(model).backend_tokenizer
    with open(path) as file:
        while lines := file.readlines(2**20):
            rows = [json.loads(line) for line in lines]
            texts = [QUESTION_PROMPT.format_map(row) for row in rows] + [row["answer"] for row in rows]
            backend.encode_batch_fast(texts, add_special_tokens=False)


def main() -> None:
    args = parsed()
    os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp())
    path = Path(tempfile.mkdtemp()) / "rows.jsonl"
    count = write_rows(args, path)
    run = by_tokenizers if args.alone else by_us
    run(args.model, Path(args.rows))  # imports, and the first batch
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    run(args.model, path)
    seconds, peak = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    sizes = dict(file_mib=path.stat().st_size >> 20, grown_mib=(peak - before) >> 10, largest_worker_mib=worker >> 10)
    print(json.dumps(dict(rows=count, rows_per_s=round(count / seconds), **sizes)))


if __name__ == "__main__":
    main()
