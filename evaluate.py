"""Ask a model the questions of a validation set and score its answers by exact match.

    python evaluate.py --model output --dataset orca_math
    torchrun --nproc_per_node 8 evaluate.py --model meta-llama/Llama-2-7b-hf --n_shots 5 --batch_size 64
    python evaluate.py --model demo --dataset demo --samples 100 --max_new_tokens 64

--model is a base model, a full, merged or Llama-Pro folder, an adapter folder, or what prepare_weights.py wrote; which
of these is read from the folder. An evaluation that was interrupted goes on where it stopped when it is started again.
"""

import hashlib
import json
import os
import random
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fsdp_utils.config import TrainConfig
from fsdp_utils.core import processes
from fsdp_utils.core.errors import UserError, naming
from fsdp_utils.core.flags import as_dict, flag, section
from fsdp_utils.core.folders import refuse_file_above, write_json
from fsdp_utils.core.processes import rank, say, world_size
from fsdp_utils.data import sources
from fsdp_utils.folders.describe import Run, describe, tokenizer_of
from fsdp_utils.inference.generation import HFGenerator, Output, VLLMGenerator, check_vllm, prompt_ids
from fsdp_utils.inference.load import EVAL_TYPES, check_eval_type, load_for_inference
from fsdp_utils.inference.partial import Partial
from fsdp_utils.inference.scoring import compare, cut_at_next_prompt, wilson_interval

DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}
NOT_SETTINGS = ("batch_size", "output_file", "overwrite", "device", "world_size", "master_addr", "master_port")


@dataclass
class EvalConfig:
    """The settings of one evaluation; see `python evaluate.py --help`."""

    _model: str = section("model")
    model: str = flag("demo", "folder or hub name of a base model, run or export; `demo` is the built-in base model")
    eval_type: str = flag("auto", "read --model as this, not as what it is", choices=("auto", *EVAL_TYPES))
    dtype: str = flag("auto", "storage and compute precision; auto: as trained", choices=tuple(DTYPES))
    device: str = flag("auto", "where to compute", choices=("auto", "cuda", "cpu"))
    backend: str = flag("hf", "vllm needs vLLM, and weights it can serve", choices=("hf", "vllm"))

    _questions: str = section("questions")
    dataset: str = flag("orca_math", "orca_math, demo, or a local file with question and answer")
    samples: int = flag(500, "the first so many of the validation set", minimum=1)
    n_shots: int = flag(0, "solved questions of the training split before each question", minimum=0)

    _generation: str = section("generation")
    batch_size: int = flag(32, "questions at a time and process; halved where it does not fit", minimum=1)
    max_new_tokens: int = flag(512, "longest answer in tokens", minimum=1)
    temperature: float = flag(0.0, "0: greedy", minimum=0.0)
    seed: int = flag(42, "of the choice of shots and of sampling", minimum=0, maximum=2**63)

    _output: str = section("output")
    output_file: str = flag("evaluation.json", "settings, score, and every question with its answer")
    overwrite: bool = flag(False, "replace --output_file, and forget an interrupted evaluation")

    _launch: str = section("launch without torchrun")
    world_size: int = flag(-1, "processes when started by plain `python`; -1: one per visible GPU", minimum=-1)
    master_addr: str = flag("localhost", "address of process 0")
    master_port: str = flag("12355", "port of process 0")

    explicit_flags: frozenset = field(default=frozenset(), init=False, repr=False)

    @property
    def reading(self) -> str | None:
        """--eval_type, or None to take the folder as what it is."""
        return None if self.eval_type == "auto" else self.eval_type

    def errors(self) -> list[str]:
        """One line for each flag that cannot work beside the others."""
        found = []
        if 0 < self.temperature < 0.01:
            found.append(f"--temperature {self.temperature}: logits divided by it overflow; pass 0 for greedy answers")
        several = self.world_size > 1 or "WORLD_SIZE" in os.environ
        if self.backend == "vllm" and several:
            found.append("--backend vllm: starts its own processes; run one, without torchrun and --world_size")
        return found


def read_questions(config: EvalConfig) -> tuple[list[dict], str]:
    """The questions to ask, and the solved ones that are put before each.

    Raises:
        UserError: no such dataset, a row without answer, or too few rows to take shots from.
    """
    named = config.dataset in sources.DATASETS
    # a local file has no training split: shots are rows after those that are asked
    rows = sources.validation_examples(config.dataset, samples=config.samples if named else None)
    asked = rows.select(range(min(config.samples, len(rows))))
    for number, row in enumerate(asked, 1):
        if not row["answer"].strip():
            raise UserError(f"{config.dataset}, row {number}: has no answer to compare with; correct or remove the row")
    if not config.n_shots:
        return list(asked), ""
    pool = _training_rows(config) if named else rows.select(range(len(asked), len(rows)))
    pool, _ = sources.drop_overlap(pool, asked) if len(pool) else (pool, 0)
    if len(pool) < config.n_shots:
        raise UserError(
            f"--n_shots {config.n_shots}: {config.dataset} has {len(pool)} rows beside the --samples "
            f"{config.samples} that are asked; lower one of the two"
        )
    chosen = [pool[i] for i in random.Random(config.seed).sample(range(len(pool)), config.n_shots)]
    return list(asked), "".join(f"{row['prompt']}{row['answer']}\n\n" for row in chosen)


def _training_rows(config: EvalConfig):
    """The training split of a named dataset, with prompts."""
    layout = sources.LAYOUTS[sources.DATASETS[config.dataset].layout]
    rows = sources.load_examples(TrainConfig(dataset=config.dataset))
    return rows.map(lambda row: {"prompt": layout.split(row)[0]}, load_from_cache_file=False)


def settings_key(config: EvalConfig, run: Run, questions: list[dict], prompts: list[list[int]]) -> str:
    """A hash of what decides the result: flags, questions with their answers, prompts, and which weights these are."""
    settings = {name: value for name, value in as_dict(config).items() if name not in NOT_SETTINGS}
    files = sorted({*run.folder.glob("*.safetensors"), *run.base.glob("*.safetensors")})
    weights = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps([settings, weights, questions, prompts]).encode()).hexdigest()[:16]


def scored(question: dict, output: Output) -> dict:
    """One line of the result."""
    prediction = cut_at_next_prompt(output.text)
    found, expected, correct = compare(prediction, question["answer"])
    return dict(
        index=output.index,
        question=question["question"],
        answer=question["answer"],
        prediction=prediction,
        extracted=[found, expected],
        correct=correct,
        **{name: getattr(output, name) for name in ("tokens", "seconds", "peak_memory_gib")},
    )


def summary(config: EvalConfig, run: Run, rows: list[dict]) -> dict:
    """The content of the output file. Seconds are those of generation; peak memory is per process."""
    correct, tokens = sum(row["correct"] for row in rows), sum(row["tokens"] for row in rows)
    seconds = sum(row["seconds"] for row in rows) / world_size()
    return dict(
        score=correct / len(rows),
        interval_95=wilson_interval(correct, len(rows)),
        correct=correct,
        total=len(rows),
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        peak_memory_gib=max(row["peak_memory_gib"] for row in rows),
        kind=run.kind,
        train_type=run.train_type,
        settings=as_dict(config),
        results=sorted(rows, key=lambda row: row["index"]),
    )


def make_generator(config: EvalConfig, run: Run, tokenizer, *, device: torch.device):
    """The backend, with the model loaded."""
    settings = dict(max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=config.seed)
    if config.backend == "vllm":
        dtype = {"bf16": "bfloat16", "fp32": "float32"}.get(config.dtype, "auto")
        return VLLMGenerator(run, dtype=dtype, **settings)
    model = load_for_inference(run, device=device, dtype=DTYPES[config.dtype], eval_type=config.reading)
    return HFGenerator(model, tokenizer, **settings)


def main(config: EvalConfig) -> None:
    """The story of an evaluation; every check comes before the first weight is read."""
    device = processes.pick_device(config.device)
    output = Path(config.output_file)
    refuse_file_above(output, flag="output_file")
    if output.exists() and not output.is_file():
        raise UserError(f"--output_file {output}: is no file; name one")
    if output.exists() and not config.overwrite:
        raise UserError(f"--output_file {output}: exists; choose another or pass --overwrite true")
    with naming("--model"):
        run = describe(config.model)
    check_eval_type(run, config.reading)
    if config.backend == "vllm":
        check_vllm(run, config.reading)
    processes.start(device)
    tokenizer = tokenizer_of(run)
    questions, shots = read_questions(config)
    prompts = prompt_ids([shots + question["prompt"] for question in questions], tokenizer)
    partial = Partial(output, key=settings_key(config, run, questions, prompts))
    with partial.claimed() if processes.is_main() else nullcontext():
        answer(config, run, tokenizer, partial, questions=questions, prompts=prompts, device=device)


def answer(config: EvalConfig, run: Run, tokenizer, partial: Partial, *, questions, prompts, device) -> None:
    """Generates the answers that are missing, and finishes."""
    if processes.is_main():
        partial.resume(overwrite=config.overwrite)
    processes.barrier()
    done = partial.done()
    before = f", {len(done)} answered before" if done else ""
    say(f"{run}, {len(questions)} questions{before}")
    processes.barrier()  # nobody appends before all have read
    mine = [(i, ids) for i, ids in enumerate(prompts) if i not in done][rank() :: world_size()]
    if len(done) < len(questions):
        generator = make_generator(config, run, tokenizer, device=device)
        with partial.appending() as append:
            for given in generator.answers(mine, batch_size=config.batch_size):
                append(scored(questions[given.index], given))
    processes.barrier()
    if processes.is_main():
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
    say(
        f"score {result['correct']}/{result['total']} = {result['score']:.1%} (95 % interval {low:.1%} to {high:.1%}), "
        f"{result['seconds']:.1f} s, {result['tokens_per_s']:.0f} tokens/s, {result['peak_memory_gib']:.2f} GiB; "
        f"written to {config.output_file}"
    )


def cli() -> None:
    """What a shell starts."""
    config = processes.parse_or_fail(EvalConfig, prog="evaluate.py", description=__doc__)
    if config.backend == "vllm":
        config.world_size = 1
    processes.launch(main, config)


if __name__ == "__main__":
    cli()
