"""Ask a model the questions of a validation set and score its answers.

    python evaluate.py --model output --dataset orca_math
    torchrun --nproc_per_node 8 evaluate.py --model meta-llama/Llama-2-7b-hf --n_shots 5 --batch_size 64
    python evaluate.py --model demo --dataset demo --samples 100 --max_new_tokens 64
    python evaluate.py --model output --dataset chats.jsonl --prompt chat --server http://localhost:8000
    python evaluate.py --model classifier --dataset reviews.jsonl

--model is a base model, a full, merged or Llama-Pro folder, an adapter folder, or what prepare_weights.py wrote; which
of these is read from the folder, and what it is for. A language model is asked as it was trained: in the prompt of its
rows, or as a chat (--prompt); what it answers is scored by exact match, beside that a sequence-to-sequence model's by
ROUGE and BLEU. A classifier is scored by accuracy, F1 and Matthews' or Pearson's correlation. An evaluation that was
interrupted goes on where it stopped when it is started again.
"""

from fsdp_utils.core.flags import as_dict, parse_or_fail
from fsdp_utils.inference.config import EvalConfig

if __name__ == "__main__":  # before the libraries, which take seconds: --help and a wrong flag are answered at once
    CONFIG = parse_or_fail(EvalConfig, prog="evaluate.py", description=__doc__)

import hashlib
import json
import os
from contextlib import nullcontext
from pathlib import Path

from fsdp_utils.core import processes
from fsdp_utils.core.devices import pick_device
from fsdp_utils.core.errors import UserError, naming
from fsdp_utils.core.folders import refuse_file_above, write_json
from fsdp_utils.core.ranks import is_main, rank, say, world_size
from fsdp_utils.folders.describe import Run, describe, tokenizer_of
from fsdp_utils.inference.engine import check_vllm
from fsdp_utils.inference.exam import Exam, exam_of
from fsdp_utils.inference.load import check_eval_type
from fsdp_utils.inference.partial import Partial
from fsdp_utils.inference.whole import whole

NOT_SETTINGS = ("batch_size", "output_file", "overwrite", "device", "world_size", "master_addr", "master_port")


def settings_key(config: EvalConfig, run: Run, exam: Exam) -> str:
    """A hash of what decides the result: flags, questions with their answers, inputs, and which weights these are."""
    settings = {name: value for name, value in as_dict(config).items() if name not in NOT_SETTINGS}
    files = sorted({*run.folder.glob("*.safetensors"), *run.base.glob("*.safetensors")})
    weights = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    asked = [[question.question, question.answer] for question in exam.questions]
    given = [settings, weights, asked, exam.inputs]
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()[:16]


def scored(question, output, *, exam: Exam) -> dict:
    """One line of the result."""
    return dict(
        index=output.index,
        question=question.question,
        answer=question.answer,
        **exam.judged(question, output),
        **{name: getattr(output, name) for name in ("tokens", "seconds", "peak_memory_gib")},
    )


def summary(config: EvalConfig, run: Run, exam: Exam, rows: list[dict]) -> dict:
    """The content of the output file. Seconds are those of answering; peak memory is per process, null where another
    process computes."""
    seconds, tokens = sum(row["seconds"] for row in rows) / world_size(), sum(row["tokens"] for row in rows)
    peaks = [row["peak_memory_gib"] for row in rows if row["peak_memory_gib"] is not None]
    rows = sorted(rows, key=lambda row: row["index"])
    return dict(
        **exam.result(rows),
        total=len(rows),
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        peak_memory_gib=max(peaks, default=None),
        kind=run.kind,
        train_type=run.train_type,
        settings=as_dict(config),
        results=rows,
    )


def main(config: EvalConfig) -> None:
    """The story of an evaluation; every check comes before the first weight is read."""
    device = pick_device(config.device)
    output = Path(config.output_file)
    refuse_file_above(output, flag="output_file")
    if output.exists() and not output.is_file():
        raise UserError(f"--output_file {output}: is no file; name one")
    if output.exists() and not config.overwrite:
        raise UserError(f"--output_file {output}: exists; choose another or pass --overwrite true")
    with naming("--model"):
        run = describe(config.model, trust_remote_code=config.trust_remote_code)
    make_exam = exam_of(config, run)
    check_eval_type(run, config.reading)
    if config.backend == "vllm":
        check_vllm(run, config.reading)
    processes.start(device)
    if not config.server:
        run = whole(run, device=device)
    exam = make_exam(run, tokenizer_of(run))
    partial = Partial(output, key=settings_key(config, run, exam))
    with partial.claimed() if is_main() else nullcontext():
        answer(config, run, exam, partial, device=device)


def answer(config: EvalConfig, run: Run, exam: Exam, partial: Partial, *, device) -> None:
    """Finds the answers that are missing, and finishes."""
    if is_main():
        partial.resume(overwrite=config.overwrite)
    processes.barrier()
    done, questions = partial.done(), exam.questions
    before = f", {len(done)} answered before" if done else ""
    say(f"{run}, {len(questions)} questions{before}")
    processes.barrier()  # nobody appends before all have read
    mine = [(i, given) for i, given in enumerate(exam.inputs) if i not in done][rank() :: world_size()]
    if len(done) < len(questions):
        answerer = exam.answerer(run, device=device)
        with partial.appending() as append:
            for given in answerer.answers(mine, batch_size=config.batch_size):
                append(scored(questions[given.index], given, exam=exam))
    processes.barrier()
    if is_main():
        finish(config, run, exam, partial)


def finish(config: EvalConfig, run: Run, exam: Exam, partial: Partial) -> None:
    """Writes the output file whole, then removes the partial one.

    Raises:
        UserError: answers are missing.
    """
    rows, asked = [{n: v for n, v in row.items() if n != "key"} for row in partial.rows()], len(exam.questions)
    if len(rows) != asked:
        raise UserError(
            f"{partial.main}: holds {len(rows)} of {asked} answers; all processes must see this disk, and nobody may "
            "remove it; start again with another --output_file"
        )
    result = summary(config, run, exam, rows)
    temporary = Path(f"{config.output_file}.tmp")
    write_json(temporary, result)
    os.replace(temporary, config.output_file)
    partial.remove()
    first = rows[0]
    answered = str(first["prediction"]).strip()
    say(f"for example: {first['question']}\n  answered: {answered}\n  expected: {first['answer']}")
    peak = "" if result["peak_memory_gib"] is None else f", {result['peak_memory_gib']:.2f} GiB"
    say(
        f"{exam.said(result)}, {result['seconds']:.1f} s, {result['tokens_per_s']:.0f} tokens/s{peak}; "
        f"written to {config.output_file}"
    )


if __name__ == "__main__":
    processes.launch(main, CONFIG)
