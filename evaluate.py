"""Ask a model the questions of a validation set and score its answers by exact match.

    python evaluate.py --model output --dataset orca_math
    torchrun --nproc_per_node 8 evaluate.py --model meta-llama/Llama-2-7b-hf --n_shots 5 --batch_size 64
    python evaluate.py --model demo --dataset demo --samples 100 --max_new_tokens 64
    python evaluate.py --model output --dataset chats.jsonl --prompt chat --server http://localhost:8000

--model is a base model, a full, merged or Llama-Pro folder, an adapter folder, or what prepare_weights.py wrote; which
of these is read from the folder. It is asked as it was trained: in the prompt of its rows, or as a chat (--prompt). An
evaluation that was interrupted goes on where it stopped when it is started again.
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

import torch

from fsdp_utils.core import processes
from fsdp_utils.core.devices import pick_device
from fsdp_utils.core.errors import UserError, naming
from fsdp_utils.core.folders import refuse_file_above, write_json
from fsdp_utils.core.ranks import is_main, rank, say, world_size
from fsdp_utils.data.asking import Prompt
from fsdp_utils.folders.describe import Run, describe, tokenizer_of
from fsdp_utils.inference.asking import Asking, Style, make_asking
from fsdp_utils.inference.engine import VLLMGenerator, check_vllm
from fsdp_utils.inference.generation import HFGenerator, Output
from fsdp_utils.inference.load import check_eval_type, load_for_inference
from fsdp_utils.inference.partial import Partial
from fsdp_utils.inference.scoring import compare, cut_at, wilson_interval
from fsdp_utils.inference.server import Server, ServerGenerator
from fsdp_utils.inference.whole import whole
from fsdp_utils.options import DTYPES

NOT_SETTINGS = ("batch_size", "output_file", "overwrite", "device", "world_size", "master_addr", "master_port")


def settings_key(config: EvalConfig, run: Run, questions: list[list[str]], prompts: list[Prompt]) -> str:
    """A hash of what decides the result: flags, questions with their answers, prompts, and which weights these are."""
    settings = {name: value for name, value in as_dict(config).items() if name not in NOT_SETTINGS}
    files = sorted({*run.folder.glob("*.safetensors"), *run.base.glob("*.safetensors")})
    weights = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    given = [settings, weights, questions, [prompt.ids for prompt in prompts]]
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()[:16]


def scored(question, output: Output, *, style: Style) -> dict:
    """One line of the result."""
    prediction = cut_at(style.stops, output.text)
    found, expected, correct = compare(prediction, question.answer)
    return dict(
        index=output.index,
        question=question.question,
        answer=question.answer,
        prediction=prediction,
        extracted=[found, expected],
        correct=correct,
        **{name: getattr(output, name) for name in ("tokens", "seconds", "peak_memory_gib")},
    )


def summary(config: EvalConfig, run: Run, rows: list[dict]) -> dict:
    """The content of the output file. Seconds are those of generation; peak memory is per process, null where another
    process computes."""
    correct, tokens = sum(row["correct"] for row in rows), sum(row["tokens"] for row in rows)
    seconds = sum(row["seconds"] for row in rows) / world_size()
    peaks = [row["peak_memory_gib"] for row in rows if row["peak_memory_gib"] is not None]
    return dict(
        score=correct / len(rows),
        interval_95=wilson_interval(correct, len(rows)),
        correct=correct,
        total=len(rows),
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        peak_memory_gib=max(peaks, default=None),
        kind=run.kind,
        train_type=run.train_type,
        settings=as_dict(config),
        results=sorted(rows, key=lambda row: row["index"]),
    )


def make_generator(config: EvalConfig, run: Run, tokenizer, asking: Asking, *, device: torch.device):
    """What answers: a server, or a backend with the model loaded."""
    settings = dict(max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=config.seed)
    settings |= dict(ends=asking.ends, stops=asking.style.stops)
    if config.server:
        server, bodies = Server(config.server), [prompt.body for prompt in asking.prompts]
        named = dict(model=server.model(config.served_model_name), endpoint=asking.style.endpoint)
        return ServerGenerator(server, bodies=bodies, **named, **settings)
    if config.backend == "vllm":
        room = dict(max_model_len=config.max_model_len, gpu_memory_utilization=config.gpu_memory_utilization)
        return VLLMGenerator(run, dtype=DTYPES.get(config.dtype, "auto"), **room, **settings)
    dtype = None if config.dtype == "auto" else getattr(torch, DTYPES[config.dtype])
    model = load_for_inference(run, device=device, dtype=dtype, eval_type=config.reading)
    return HFGenerator(model, tokenizer, **settings)


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
    check_eval_type(run, config.reading)
    if config.backend == "vllm":
        check_vllm(run, config.reading)
    processes.start(device)
    if not config.server:
        run = whole(run, device=device)
    tokenizer = tokenizer_of(run)
    asking = make_asking(config, run, tokenizer)
    asked = [[question.question, question.answer] for question in asking.questions]
    partial = Partial(output, key=settings_key(config, run, asked, asking.prompts))
    with partial.claimed() if is_main() else nullcontext():
        answer(config, run, tokenizer, partial, asking=asking, device=device)


def answer(config: EvalConfig, run: Run, tokenizer, partial: Partial, *, asking: Asking, device) -> None:
    """Generates the answers that are missing, and finishes."""
    if is_main():
        partial.resume(overwrite=config.overwrite)
    processes.barrier()
    done, questions = partial.done(), asking.questions
    before = f", {len(done)} answered before" if done else ""
    say(f"{run}, {len(questions)} questions{before}")
    processes.barrier()  # nobody appends before all have read
    mine = [(i, prompt.ids) for i, prompt in enumerate(asking.prompts) if i not in done][rank() :: world_size()]
    if len(done) < len(questions):
        generator = make_generator(config, run, tokenizer, asking, device=device)
        with partial.appending() as append:
            for given in generator.answers(mine, batch_size=config.batch_size):
                append(scored(questions[given.index], given, style=asking.style))
    processes.barrier()
    if is_main():
        finish(config, run, partial, asked=len(questions))


def finish(config: EvalConfig, run: Run, partial: Partial, *, asked: int) -> None:
    """Writes the output file whole, then removes the partial one.

    Raises:
        UserError: answers are missing.
    """
    rows = [{name: value for name, value in row.items() if name != "key"} for row in partial.rows()]
    if len(rows) != asked:
        raise UserError(
            f"{partial.main}: holds {len(rows)} of {asked} answers; all processes must see this disk, and nobody may "
            "remove it; start again with another --output_file"
        )
    result = summary(config, run, rows)
    temporary = Path(f"{config.output_file}.tmp")
    write_json(temporary, result)
    os.replace(temporary, config.output_file)
    partial.remove()
    low, high = result["interval_95"]
    first = rows[0]
    say(f"for example: {first['question']}\n  answered: {first['prediction'].strip()}\n  expected: {first['answer']}")
    peak = "" if result["peak_memory_gib"] is None else f", {result['peak_memory_gib']:.2f} GiB"
    say(
        f"score {result['correct']}/{result['total']} = {result['score']:.1%} (95 % interval {low:.1%} to {high:.1%}), "
        f"{result['seconds']:.1f} s, {result['tokens_per_s']:.0f} tokens/s{peak}; written to {config.output_file}"
    )


if __name__ == "__main__":
    processes.launch(main, CONFIG)
