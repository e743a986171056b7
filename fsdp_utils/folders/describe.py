"""What a folder is: base, model, adapter, Llama-Pro, or quantized for stock software."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from fsdp_utils.config import TrainConfig
from fsdp_utils.core.errors import CheckpointError, UserError, naming
from fsdp_utils.core.flags import flags
from fsdp_utils.core.folders import model_folder, refuse_gguf
from fsdp_utils.core.safetensors_io import read_header
from fsdp_utils.data.labels import PREFIX, REGRESSION, SINGLE, Labels
from fsdp_utils.folders.documents import is_tokenizer_file, read_json
from fsdp_utils.folders.names import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    CHECKPOINTS,
    GENERATION_CONFIG,
    GGUF_FILE,
    MANIFEST,
    RUN_FILE,
    TRAINED_FILE,
)
from fsdp_utils.model.build import read_raw_config, read_tokenizer, resolve_model
from fsdp_utils.tasks import Task, named_task, peft_task, recorded_task, task_of_model
from methods import TRAIN_TYPES
from methods.adapter import KEY_PREFIX, LORA_A, LORA_B, MAGNITUDE, peft_scaling_keys
from methods.llama_pro import EXPANDED_LAYERS_FILE

TITLES = {
    "base": "model",
    "model": "fine-tuned model",
    "llama_pro": "Llama-Pro model",
    "adapter": "adapter",
    "stock": "quantized model",
    "stock_adapter": "quantized model with adapter",
    "checkpoint": "checkpoint of new blocks",
}
# the settings of a PEFT adapter that the layers here compute, or that only matter while it trains
PEFT_READ = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("use_dora", "eva_config"),
}
# ways to start A and B; PEFT's others (pissa, olora, corda, loftq, …) change the base when an adapter is loaded
PEFT_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Run:
    """What is known of a folder without reading a weight.

    Args:
        folder: the folder itself (of a hub name: its snapshot).
        kind: "base" (no run.json), "model" (full fine-tune), "llama_pro", "adapter",
            "stock" (quantized in a format that transformers reads), "stock_adapter" (an adapter on one of those that
            was not trained here) or "checkpoint" (new blocks only: `inference.whole` makes a model of it).
        base: folder or hub name of the weights under an adapter; of the other kinds the folder.
        config: the flags it was trained with, `model_name` being `base`; None without run.json.
        quantizer: fields of the quantizer it was trained with; None if there was none or it is not known.
        base_fingerprint: `fingerprint` of the base it was trained on; None without run.json.
        adapter: content of adapter_config.json; None unless it is an adapter.
        adapter_folder: where adapter_config.json lies; None unless it is an adapter.
        trust_remote_code: code that the folder brings may run.
        chats: whether it was trained on chats; None if that is not known.
        task: `tasks.Task.record`; None if that is not known.
    """

    folder: Path
    kind: str
    base: Path
    config: TrainConfig | None = None
    quantizer: dict | None = None
    base_fingerprint: str | None = None
    adapter: dict | None = None
    adapter_folder: Path | None = None
    trust_remote_code: bool = False
    chats: bool | None = None
    task: dict | None = None

    def __str__(self) -> str:
        return f"{self.folder}: {TITLES[self.kind]}" + (f" ({self.train_type})" if self.train_type else "")

    @property
    def train_type(self) -> str | None:
        return self.config.train_type if self.config else None

    @property
    def rank(self) -> int:
        return self.adapter["r"]

    @property
    def dora(self) -> bool:
        return bool(self.adapter and self.adapter.get("use_dora"))


# ---------------------------------------------------------------------------------------------------------------------
# What a folder is
# ---------------------------------------------------------------------------------------------------------------------


def describe(name: str | Path, *, trust_remote_code: bool = False) -> Run:
    """Says what a folder, a hub name or `demo` is; reads headers and JSON files, no weights.

    Raises:
        UserError: no model in it, a run that did not finish or saved nothing, an adapter without its base or weights,
            tensors that do not fit adapter_config.json, a Llama-Pro folder without the ids of its new blocks.
    """
    return replace(_described(model_folder(resolve_model(str(name)))), trust_remote_code=trust_remote_code)


def _described(folder: Path) -> Run:
    record = _read_run(folder)
    if (folder / ADAPTER_CONFIG).exists():
        return _describe_adapter(folder, record)
    if record and (folder / TRAINED_FILE).exists():
        known = _known_from(record, base=None)
        return Run(folder, "checkpoint", Path(resolve_model(known["config"].source)), **known)
    if not (folder / "config.json").exists():
        if (folder / GGUF_FILE).exists():
            return Run(folder, "stock", folder)
        refuse_gguf(folder)
        raise UserError(f"{folder}: holds neither a model (config.json) nor an adapter ({ADAPTER_CONFIG})")
    if (folder / ADAPTER_FOLDER / ADAPTER_CONFIG).exists():
        adapter = _read_adapter_config(folder / ADAPTER_FOLDER)
        return Run(folder, "stock_adapter", folder, adapter=adapter, adapter_folder=folder / ADAPTER_FOLDER)
    if _quantization(folder):
        return Run(folder, "stock", folder)
    return Run(folder, _model_kind(folder, record), folder, **_known_from(record, base=None))


def _read_run(folder: Path) -> dict | None:
    """run.json of a finished run; None if there is no such file."""
    path = folder / RUN_FILE
    if not path.exists():
        return None
    record = read_json(path)
    if not record.get("finished"):
        kept = any((folder / CHECKPOINTS).glob(f"*/{MANIFEST}"))
        way_out = "finish it by --resume auto" if kept else "train it again with --overwrite true"
        raise UserError(f"{folder}: its training did not finish ({RUN_FILE}); {way_out}")
    if not record.get("saved"):
        raise UserError(f"{folder}: was trained without --save_model true and holds no weights")
    flags_of_run = record.get("flags")
    if not isinstance(flags_of_run, dict) or flags_of_run.get("train_type") not in TRAIN_TYPES:
        raise UserError(f"{path}: names no known train_type; the file is damaged or of another version")
    return record


def _known_from(record: dict | None, *, base: Path | None) -> dict:
    """The fields of `Run` that run.json knows."""
    if record is None:
        return {}
    names = {f.name for f in flags(TrainConfig)}
    config = TrainConfig(**{name: value for name, value in record["flags"].items() if name in names})
    if base is not None:
        config = replace(config, model_name=str(base))
    # --dataset_samples caps some datasets only where it was given; old records say no more than the values
    changed = [f.name for f in flags(TrainConfig) if getattr(config, f.name) != f.default]
    config.explicit_flags = frozenset(record.get("explicit", changed))
    known = {name: record.get(name) for name in ("quantizer", "base_fingerprint", "chats", "task")}
    return dict(config=config, **known)


def _model_kind(folder: Path, record: dict | None) -> str:
    has_ids = (folder / EXPANDED_LAYERS_FILE).exists()
    if record and TRAIN_TYPES[record["flags"]["train_type"]].method == "llama_pro" and not has_ids:
        source = record["flags"].get("llama_pro_path")
        raise UserError(f"{folder}: no {EXPANDED_LAYERS_FILE}, so its new blocks are not known; copy it from {source}")
    return "llama_pro" if has_ids else "model" if record else "base"


def _quantization(folder: Path) -> dict:
    """How stock software is told to read the weights; empty for a folder in 16 or 32 bits, or without a model."""
    return read_json(folder / "config.json").get("quantization_config") or {}


def _describe_adapter(folder: Path, record: dict | None) -> Run:
    adapter = _read_adapter_config(folder)
    base = _find_base(folder, adapter, record)
    kind = "stock_adapter" if _quantization(base) and record is None else "adapter"
    return Run(folder, kind, base, **_known_from(record, base=base), adapter=adapter, adapter_folder=folder)


def _read_adapter_config(folder: Path) -> dict:
    """adapter_config.json, checked against the shapes of the tensors beside it.

    Raises:
        UserError: no tensors, features of PEFT that we do not compute, or tensors of another rank or kind.
    """
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    if not (folder / RUN_FILE).exists():  # trained elsewhere
        _refuse_peft_features(path, config)
    if not config.get("r") or "lora_alpha" not in config:
        raise UserError(f"{path}: names no r and lora_alpha; the file is damaged")
    if not (folder / ADAPTER_WEIGHTS).exists():
        raise UserError(f"{folder}: {ADAPTER_CONFIG} without {ADAPTER_WEIGHTS}; the folder is incomplete")
    header = read_header(folder / ADAPTER_WEIGHTS)
    for name, entry in header.items():
        ranks = {LORA_A: entry["shape"][:1], LORA_B: entry["shape"][-1:]}
        of_stack = config.get("target_parameters") and len(entry["shape"]) == 2  # which have r for each expert
        for suffix, (found, *_) in ranks.items():
            fits = found == config["r"] or (of_stack and found % config["r"] == 0)
            if name.endswith(suffix) and not fits:
                says = f"{ADAPTER_CONFIG} says r = {config['r']}"
                raise UserError(f"{folder}: {name} has shape {entry['shape']}, but {says}")
    if not any(name.endswith(LORA_A) for name in header):
        raise UserError(f"{folder / ADAPTER_WEIGHTS}: holds no LoRA weights")
    if any(name.endswith(MAGNITUDE) for name in header) != bool(config.get("use_dora")):
        raise UserError(f"{folder}: use_dora {config.get('use_dora', False)} does not fit its tensors")
    return config


def _refuse_peft_features(path: Path, config: dict) -> None:
    """Raises UserError for a setting that makes the adapter compute something else than the layers here do."""
    from peft import LoraConfig

    plain = LoraConfig().to_dict()
    for key, value in config.items():
        if key == "modules_to_save" and config.get("task_type") == "SEQ_CLS":  # heads
            continue
        if key in PEFT_READ | peft_scaling_keys() or (key == "init_lora_weights" and value in PEFT_STARTS):
            continue
        if (value or None) != (plain.get(key) or None):
            raise UserError(f"{path}: {key} {value} is not supported; load and merge it with PEFT")


def _find_base(folder: Path, adapter: dict, record: dict | None) -> Path:
    """The base's folder: as adapter_config.json names it, beside the adapter, as the run named it, or on the hub.

    Raises:
        UserError: none of these exists.
    """
    name = str(adapter.get("base_model_name_or_path") or "")
    trained_on = resolve_model(record["flags"]["model_name"]) if record else name
    for candidate in (Path(name), folder / name, Path(trained_on)):
        if name and candidate.is_dir():
            return candidate
    try:
        return model_folder(name)
    except CheckpointError:
        raise UserError(
            f"{folder}: its base {name or '(not named)'} is gone; put it back, "
            f"or write its place into base_model_name_or_path of {ADAPTER_CONFIG}"
        ) from None


# ---------------------------------------------------------------------------------------------------------------------
# For export: the pieces of a run
# ---------------------------------------------------------------------------------------------------------------------


def adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter on the CPU, `<module path>.lora_A.weight` and so on, without PEFT's prefix."""
    stored = load_file(folder / ADAPTER_WEIGHTS)
    return {name.removeprefix(KEY_PREFIX): tensor for name, tensor in stored.items()}


def check_adapter(run: Run, stored: dict, expected: dict) -> None:
    """Raises UserError for a tensor that is missing, of another shape, or has no place in the model."""
    for name in sorted(expected.keys() | stored.keys()):
        if name not in stored:
            raise UserError(f"{run.folder}: {name} is missing from {ADAPTER_WEIGHTS}")
        if name not in expected:
            asked = "; was it trained with other --lora_target_modules, or --train_router?"
            raise UserError(f"{run.folder}: {name} of {ADAPTER_WEIGHTS} has no place in {run.base}{asked}")
        if stored[name].shape != expected[name].shape:
            shapes = f"{tuple(stored[name].shape)}, the model wants {tuple(expected[name].shape)}"
            raise UserError(f"{run.folder}: {name} has shape {shapes}")


def check_base(run: Run, fingerprint: str) -> None:
    """Refuses weights that are not those the run was trained on: the result would be quietly wrong (peft#2321).

    Raises:
        UserError: naming both folders and the way out.
    """
    if run.base_fingerprint and fingerprint != run.base_fingerprint:
        raise UserError(
            f"{run.folder}: {run.base} is not the base it was trained on (fingerprint {fingerprint[:12]}, "
            f"trained on {run.base_fingerprint[:12]}); put the original back"
        )


def task_of(run: Run) -> Task:
    """What a run is for: as it was trained, or as its documents say."""
    if run.task:
        return recorded_task(run.task)
    if run.config:  # of a version that knew one task
        return named_task("causal_lm")
    if (run.base / GGUF_FILE).exists():  # which the configuration is inside of
        return named_task("causal_lm")
    model_config = read_raw_config(str(run.base), trust_remote_code=run.trust_remote_code)
    name = peft_task(run.adapter.get("task_type")) if run.adapter else task_of_model(model_config)
    return named_task(name, named_task(name).known_labels(model_config) or _labels_of_head(run, name))


def going_on(task: Task, adapter: str | None) -> Task:
    """The task with the labels of `--init_adapter`, whose head is trained on, if there is one.

    Raises:
        UserError: as `describe`.
    """
    if not adapter:
        return task
    with naming("--init_adapter"):
        return replace(task, labels=task_of(describe(adapter)).labels)


def _labels_of_head(run: Run, name: str) -> Labels | None:
    """The labels of a head that an adapter brings: as many as it has rows, without names."""
    if name != "sequence_classification" or not run.adapter_folder:
        return None
    shapes = [e["shape"] for n, e in read_header(run.adapter_folder / ADAPTER_WEIGHTS).items() if ".lora_" not in n]
    count = min((shape[0] for shape in shapes if len(shape) == 2), default=0)
    return Labels(SINGLE, tuple(f"{PREFIX}{i}" for i in range(count))) if count > 1 else Labels(REGRESSION)


def tokenizer_folder(run: Run) -> Path:
    """The run's folder if a tokenizer was saved in it, else its base's."""
    return run.folder if any(is_tokenizer_file(path.name) for path in run.folder.iterdir()) else run.base


def generation_folder(run: Run) -> Path:
    """Where it stands what ends an answer: in the run's folder, if training added to it, else in its base's."""
    return run.folder if (run.folder / GENERATION_CONFIG).exists() else run.base


def tokenizer_of(run: Run):
    """The tokenizer saved with the run, else that of its base."""
    return read_tokenizer(str(tokenizer_folder(run)), trust_remote_code=run.trust_remote_code)
