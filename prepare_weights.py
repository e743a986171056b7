"""Turn a run into a model folder that stock software loads, and measure how close it is to what was trained.

    python prepare_weights.py --model output --save_dir merged --infer_type merged
    python prepare_weights.py --model output --save_dir served --infer_type bnb_dora
    python prepare_weights.py --model output --save_dir w4a16 --infer_type w4a16 --group_size 64

merged     16-bit (or fp32) weights, the adapter folded into the dequantized base it was trained on
bnb_nf4    bitsandbytes 4-bit of any run, full fine-tune, merged folder or Llama-Pro model
bnb_dora   QDoRA or QLoRA unmerged and exact: a 4-bit base with scaled rows, and a plain LoRA in its folder adapter/
w4a16      compressed-tensors pack-quantized, for vLLM's Marlin and Machete kernels
w4a16_dora the same of the base alone, and a plain LoRA in its folder adapter/, of an adapter run on any base
gguf       one file for llama.cpp, Ollama and LM Studio, of --gguf_type

Weights are streamed one tensor at a time, and the folder appears when it is complete. fidelity.json compares it, as
transformers (and PEFT) load it, with the trained model on held-out text.
"""

from fsdp_utils.core.flags import as_dict, parse_or_fail
from fsdp_utils.export.config import ExportConfig

if __name__ == "__main__":  # before the libraries, which take seconds: --help and a wrong flag are answered at once
    CONFIG = parse_or_fail(ExportConfig, prog="prepare_weights.py", description=__doc__)

import time
from importlib.util import find_spec
from pathlib import Path

from fsdp_utils.core import processes
from fsdp_utils.core.devices import peak_memory_gib, pick_device
from fsdp_utils.core.errors import UserError, naming
from fsdp_utils.core.folders import check_new_folder, new_folder, parse_size, write_json
from fsdp_utils.core.locks import exclusively
from fsdp_utils.core.ranks import say
from fsdp_utils.data.labels import REGRESSION
from fsdp_utils.data.sources import places_of
from fsdp_utils.export import fidelity, format_of
from fsdp_utils.export.config import FLAGS_OF, WRITTEN_SO
from fsdp_utils.export.formats import Format
from fsdp_utils.export.gptq import trained_model, training_rows
from fsdp_utils.export.held_out import HeldOut, held_out
from fsdp_utils.export.trained import TrainedWeights
from fsdp_utils.folders.card import Told, keep_card, write_card
from fsdp_utils.folders.describe import Run, describe, task_of, tokenizer_of
from fsdp_utils.folders.names import GGUF_FILE
from fsdp_utils.folders.upload import check_upload, upload
from fsdp_utils.inference.whole import whole


def mark_of(folder: str | Path) -> str:
    """The file by which a folder that may be replaced is known."""
    return GGUF_FILE if (Path(folder) / GGUF_FILE).exists() else "config.json"


def check_target(config: ExportConfig, run: Run) -> Path:
    """The absolute path of --save_dir.

    Raises:
        UserError: it holds files and may not be replaced, or the run or its base lies in it.
    """
    read = [run.folder, run.base, *places_of(config.fidelity_data)]
    read += [*places_of(run.config.dataset), *places_of(run.config.eval_dataset)] if run.config else []
    check_new_folder(
        config.save_dir, flag="save_dir", overwrite=config.overwrite, mark=mark_of(config.save_dir), sources=read
    )
    return Path(config.save_dir).resolve()


def check_reader(config: ExportConfig) -> None:
    """Raises UserError if the result could not be loaded here to compare it."""
    reader = format_of(config.infer_type).reader
    if config.fidelity_samples and reader and find_spec(reader) is None:
        package = reader.replace("_", "-")
        raise UserError(
            f"--infer_type {config.infer_type}: comparing the result takes {package}, which is not installed; "
            f"`pip install {package}`, or pass --fidelity_samples 0"
        )


def calibrates(config: ExportConfig, chosen: Format) -> bool:
    """Whether weights are rounded by their inputs on training samples.

    Raises:
        UserError: they are to be, and it is not known what was trained on.
    """
    if not chosen.calibrates or config.gptq == "false":
        return False
    run = chosen.trained.run
    if not task_of(run).causal:
        if config.gptq == "true":
            raise UserError(f"--gptq true: rounds causal language models, and {run.folder} is none")
        return False
    if run.config is None and config.gptq == "true":
        raise UserError(f"--gptq true: {run.folder} does not say what it was trained on; give the run itself")
    if run.config is None:
        say(f"note: {run.folder} does not say what it was trained on, so each weight is rounded to the nearest")
    return run.config is not None


def _not_compared(run: Run) -> str | None:
    """Why a run's answers cannot be compared as probabilities, if they are none."""
    labels = task_of(run).labels
    return "it answers with a score, not with probabilities" if labels and labels.problem == REGRESSION else None


def export(chosen: Format, config: ExportConfig, tokenizer, target: Path, *, device) -> None:
    """Writes the complete folder.

    Raises:
        UserError: the disk is too small.
    """
    begun = time.perf_counter()
    max_shard_bytes = parse_size(config.max_shard_size)
    with new_folder(target, overwrite=config.overwrite, mark=mark_of(target)) as folder:
        keep_card(target, folder)
        chosen.write(tokenizer, folder, target=target, max_shard_bytes=max_shard_bytes)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.suffix in (".safetensors", ".gguf"))
    took, peak, read = time.perf_counter() - begun, peak_memory_gib(device), chosen.trained.nbytes
    say(f"{read / 1e9:.3f} GB read, {size / 1e9:.3f} GB of weights in {target}; {took:.0f} s, {peak:.2f} GiB")


def report(config: ExportConfig, chosen: Format, text: HeldOut, target: Path, *, device) -> dict:
    """Prints the comparison and writes fidelity.json; what is in it."""
    scores = fidelity.fidelity(chosen.trained.run, target, text, device=device, dtype=chosen.dtype)
    said = fidelity.verdict(scores, text, infer_type=config.infer_type, better=chosen.better)
    say(f"{len(text.rows)} texts of {text.source}, {text.tokens} tokens", fidelity.table(scores), said, sep="\n")
    known = dict(data=text.source, unseen=text.unseen, texts=len(text.rows), tokens=text.tokens)
    facts = known | dict(settings=as_dict(config))
    write_json(target / "fidelity.json", scores | facts)
    return scores | facts


def describe_export(config: ExportConfig, run: Run, target: Path, *, scores: dict | None) -> None:
    """Writes the model card."""
    said = config.explicit_flags & {*FLAGS_OF.get(config.infer_type, WRITTEN_SO)}
    settings = {name: value for name, value in as_dict(config).items() if name in said}
    write_card(target, Told(run.folder, str(run.base), run.base, config.infer_type, settings, scores))


def main(config: ExportConfig) -> None:
    """The story of an export; every check but that of the disk comes before the first weight is written.

    Raises:
        UserError: a run that this format cannot store, or another base than in training; as the functions it calls.
    """
    check_upload(config.push_to_hub)
    device = pick_device(config.device)
    with naming("--model"):
        run = whole(describe(config.model, trust_remote_code=config.trust_remote_code), device=device)
    target = check_target(config, run)
    check_reader(config)
    # what else is wrong with the run comes before what its report needs, and before any folder is made
    chosen = format_of(config.infer_type)(TrainedWeights(run, device=device), config)
    tokenizer = tokenizer_of(run)
    rows = training_rows(run, tokenizer, samples=config.gptq_samples) if calibrates(config, chosen) else []
    text, misread = None, chosen.misread() or _not_compared(run)
    if config.fidelity_samples and misread:
        say(f"note: no fidelity report: {misread}")
    elif config.fidelity_samples:
        text = held_out(run, tokenizer, name=config.fidelity_data, samples=config.fidelity_samples)
    say(f"{run} -> {config.infer_type} in {target}")
    # to the end of the report, which reads what was written; new_folder's own lock ends before
    with exclusively(target.with_name(f"{target.name}.export"), named=f"--save_dir {config.save_dir}"):
        if rows:
            chosen.calibrate(trained_model(run, device=device), rows)
        export(chosen, config, tokenizer, target, device=device)
        scores = report(config, chosen, text, target, device=device) if text else None
        describe_export(config, run, target, scores=scores)
    upload(target, config.push_to_hub)


if __name__ == "__main__":
    processes.run(main, CONFIG)
