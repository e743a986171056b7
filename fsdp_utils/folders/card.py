"""The model card of a result: README.md with what the hub reads of it and what a person wants to know."""

import json
import re
import shlex
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path

from huggingface_hub import ModelCardData, metadata_load

from fsdp_utils.config import TrainConfig
from fsdp_utils.core.flags import flags
from fsdp_utils.core.folders import HUB_NAME
from fsdp_utils.folders.documents import read_json
from fsdp_utils.folders.names import ADAPTER_CONFIG, CARD, METRICS_FILE, RUN_FILE
from methods import CORRECTING

OURS = "<!-- written with the result and replaced with it; a card without this line is left alone -->"
SNAPSHOT = re.compile(r"models--(.+?)--(.+)")  # how the hub's cache calls the folder of a model
OF_DATA = {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".zst"}
HUB_SETS = {
    "alpaca": "yahma/alpaca-cleaned",
    "alpaca_sample": "yahma/alpaca-cleaned",
    "guanaco": "timdettmers/openassistant-guanaco",
    "sql": "knowrohit07/know_sql",
    "orca_math": "microsoft/orca-math-word-problems-200k",
}
LICENSE_KEYS = ("license", "license_name", "license_link")
CORRECTS = (
    "The adapter makes up for the rounding of the base that it was trained on. On weights in 16 bits it is wrong; for "
    "these, `prepare_weights.py --infer_type merged` makes a model of the two."
)
NO_LICENSE = "license: other: the base names none. Fill in `license:` above before you share this model."
# sections of flags that say how a run was started, not what it learned, or name places and accounts
NOT_TOLD = ("_files", "_sharding", "_checkpoints", "_output", "_launch", "_profiling")
NEITHER = {"model_name", "llama_pro_path", "dataset", "prompt_template", "chat_template", "trust_remote_code"}


@dataclass(frozen=True)
class Told:
    """What a card is made of.

    Args:
        run_folder: where run.json and metrics.jsonl of the training lie, if anywhere.
        base: name or folder of the base, for models that were trained elsewhere.
        base_folder: whose README.md says the license; None for weights that were never there.
        infer_type: of an export.
        settings: of the export, by flag.
        scores: of the export (`export.fidelity.fidelity`).
    """

    run_folder: Path
    base: str
    base_folder: Path | None
    infer_type: str | None = None
    settings: dict = field(default_factory=dict)
    scores: dict | None = None


ROOM = (
    "Pad every batch by one token more than its longest row, also a single row: transformers takes the place behind a "
    "row's last token, where this model was trained and evaluated, and has none there for the longest."
)


def is_users(folder: Path) -> bool:
    """Whether a README.md lies there that no card of ours may replace."""
    path = folder / CARD
    return path.exists() and OURS not in path.read_text(errors="replace")


def keep_card(folder: Path, new: Path) -> None:
    """Takes what somebody wrote along into the folder that replaces theirs."""
    if is_users(folder):
        shutil.copyfile(folder / CARD, new / CARD)


def write_card(folder: Path, told: Told) -> None:
    """Writes README.md, unless there is one that somebody wrote.

    It holds no path of this machine: what is local is told by its last part.
    """
    if is_users(folder):
        return
    record = read_json(told.run_folder / RUN_FILE)
    trained = record.get("flags") or {}
    base = _base_name(trained.get("llama_pro_path") or trained.get("model_name") or told.base)
    licenses = _license(told.base_folder)
    data = _data(folder, told, trained, base=base, licenses=licenses)
    rows = [("base", base), *_training(record, trained), *_losses(told.run_folder / METRICS_FILE, trained)]
    if told.infer_type:
        rows += [("format", _command({"infer_type": told.infer_type} | told.settings))]
    blocks = [f"# {folder.name}", _table(("", ""), rows)]
    blocks += [_scores(told.scores)] if told.scores else []
    blocks += [CORRECTS] if trained.get("lora_init") in CORRECTING and not told.infer_type else []
    blocks += [ROOM] if (record.get("task") or {}).get("room") else []
    blocks += [] if licenses else [NO_LICENSE]
    (folder / CARD).write_text(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join([*blocks, OURS]) + "\n")


def _data(folder: Path, told: Told, trained: dict, *, base: str, licenses: dict) -> ModelCardData:
    """What the hub reads."""
    is_adapter = (folder / ADAPTER_CONFIG).exists()
    relation = "adapter" if is_adapter else "finetune" if told.infer_type in (None, "merged") else "quantized"
    on_hub = dict(base_model=base, base_model_relation=relation) if HUB_NAME.fullmatch(base) else {}
    sets = [name for name in map(_on_hub, _parts(trained.get("dataset") or "")) if name]
    return ModelCardData(
        **(licenses or dict(license="other")),
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        datasets=sets or None,
        tags=[tag for tag in ("fsdp-qlora", trained.get("train_type"), told.infer_type) if tag],
        **on_hub,
    )


def _license(folder: Path | None) -> dict:
    """What the card of the base says of it; empty if it says nothing."""
    path = folder / CARD if folder else None
    try:
        found = metadata_load(path) or {} if path and path.exists() else {}
    except Exception:  # the libraries below raise what they like at a card that is not what they expect
        return {}
    known = {key: found[key] for key in LICENSE_KEYS if isinstance(found.get(key), str)}
    return {} if known.get("license", "other") == "other" and "license_name" not in known else known


# ---------------------------------------------------------------------------------------------------------------------
# Names without places
# ---------------------------------------------------------------------------------------------------------------------


def _base_name(name: str) -> str:
    """A name of the hub as it is, also of a folder in its cache; of another folder its last part."""
    for part in Path(name).parts:
        if match := SNAPSHOT.fullmatch(part):
            return "/".join(match.groups())
    return _without_place(name)


def _without_place(name: str) -> str:
    on_hub = HUB_NAME.fullmatch(name) and not name.startswith((".", "~")) and not Path(name).exists()
    return name if on_hub and not OF_DATA & set(Path(name).suffixes) else Path(name).name


def _parts(dataset: str) -> list[str]:
    """The sources of a mixture, without their weights."""
    parts = [dataset] if Path(dataset).exists() else dataset.split(",")
    return [_without_place(re.sub(r":[\d.]+$", "", part.strip())) for part in parts]


def _on_hub(name: str) -> str | None:
    """What the hub calls a set, if it has it."""
    return HUB_SETS.get(name) or (name if HUB_NAME.fullmatch(name) else None)


# ---------------------------------------------------------------------------------------------------------------------
# What a person reads
# ---------------------------------------------------------------------------------------------------------------------


def _training(record: dict, trained: dict) -> list[tuple[str, str]]:
    if not trained:
        return []
    samples = f", {record['samples']:,} samples" if record.get("samples") else ""
    given = {name: trained[name] for name in _telling() if name in record.get("explicit", ()) and name in trained}
    rows = [("data", ", ".join(_parts(trained["dataset"])) + samples), ("train type", trained["train_type"])]
    return rows + ([("flags", _command(given))] if given else [])


def _telling() -> list[str]:
    """Flags of a run that are told, in order."""
    names, told = {f.name for f in flags(TrainConfig)} - NEITHER - {"train_type"}, []
    section = None
    for f in fields(TrainConfig):
        section = f.name if f.metadata.get("section") else section
        told += [f.name] if f.name in names and section not in NOT_TOLD else []
    return told


def _command(given: dict) -> str:
    """Flags as they are typed."""
    as_typed = lambda value: str(value).lower() if isinstance(value, bool) else shlex.quote(_placeless(str(value)))
    return "`" + " ".join(f"--{name} {as_typed(value)}" for name, value in given.items()) + "`"


def _placeless(value: str) -> str:
    return ",".join(_parts(value)) if "/" in value else value


def _losses(path: Path, trained: dict) -> list[tuple[str, str]]:
    """The last losses of a run; the lowest validation loss where that one was saved."""
    logged = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    training = [row["loss"] for row in logged if "loss" in row]
    validation = [row["eval_loss"] for row in logged if "eval_loss" in row]
    rows = [("final training loss", f"{training[-1]:.4g}")] if training else []
    if validation:
        best = trained.get("save_best")
        value = min(validation) if best else validation[-1]
        rows.append((f"{'lowest' if best else 'final'} validation loss", f"{value:.4g}"))
    return rows


def _scores(scores: dict) -> str:
    """fidelity.json as a table."""
    models = {name: score for name, score in scores.items() if isinstance(score, dict) and "perplexity" in score}
    number = lambda score, key, form: format(score[key], form) if key in score else ""
    rows = [
        (name, number(score, "perplexity", ".4f"), number(score, "kl", ".1e"), number(score, "top1_agreement", ".1%"))
        for name, score in models.items()
    ]
    name, opened, which = str(scores.get("data", "")).partition(" (")
    data = ", ".join(_parts(name)) + opened + which
    said = f"Compared on {scores['texts']} texts of {data}, {scores['tokens']} tokens:" if "texts" in scores else ""
    share = models.get("exported", {}).get("gain_kept")
    kept = "" if share is None else f"Share of what training gained on them that this model keeps: {share:.1%}."
    return "\n\n".join([said, _table(("", "perplexity", "KL to trained", "same top-1"), rows), kept]).strip()


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
