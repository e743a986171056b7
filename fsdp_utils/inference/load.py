"""The whole model of a folder, on one device, for inference."""

from dataclasses import asdict, replace

import torch
from torch import nn
from transformers import GenerationConfig

from fsdp_utils.config import TrainConfig
from fsdp_utils.core.errors import UserError, first_line, refuse_code
from fsdp_utils.core.safetensors_io import CheckpointReader
from fsdp_utils.folders.describe import (
    Run,
    _quantization,
    adapter_tensors,
    check_adapter,
    check_base,
    generation_folder,
    task_of,
)
from fsdp_utils.folders.names import GENERATION_CONFIG, GGUF_FILE
from fsdp_utils.model.assemble import Dtypes, Plan, attach, build, load_whole
from fsdp_utils.model.build import build_on_meta, quantize_on_meta, read_model_config
from fsdp_utils.model.checkpoint import match
from fsdp_utils.model.weights import check_loaded, checkpoint_dtype, load_weights, materialize
from methods import CORRECTING, METHODS, TRAIN_TYPES, bits, method_of
from methods.adapter import flags_of
from methods.targets import refuse_experts, weights_in_blocks

PRECISION_OF = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def load_for_inference(
    run: Run, *, device: torch.device, dtype: torch.dtype | None = None, eval_type: str | None = None
) -> nn.Module:
    """The model of a run in eval mode, frozen, on one device.

    Adapters stay unmerged over the quantized base they were trained on. A Llama-Pro run was saved dequantized and
    loads densely; it is then what was trained.

    Args:
        dtype: bfloat16 or float32; None: what it was trained in, else that of its checkpoint.
        eval_type: one of EVAL_TYPES, to read the folder as something other than what it says it is.

    Raises:
        UserError: as `describe`; eval_type or dtype that does not fit the folder; another base than in training.
    """
    check_eval_type(run, eval_type)
    dtype = dtype or default_dtype(run)
    if run.kind.startswith("stock"):
        loaded = load_stock(run, device=device, dtype=dtype)
    else:
        opened = _load_adapter if run.kind == "adapter" else _load_model
        loaded = opened(run, device=device, dtype=dtype, eval_type=eval_type).requires_grad_(False).eval()
    if (generation_folder(run) / GENERATION_CONFIG).exists():  # names end-of-turn tokens that config.json may lack
        loaded.generation_config = GenerationConfig.from_pretrained(generation_folder(run))
    return loaded


def default_dtype(run: Run) -> torch.dtype:
    """What the run computed in; without run.json bfloat16, or float32 where the checkpoint is."""
    if run.config:
        return Dtypes.of(run.config.precision).stored
    if run.kind.startswith("stock"):
        return torch.bfloat16
    stored = checkpoint_dtype(CheckpointReader(run.base))
    return stored if stored in PRECISION_OF else torch.bfloat16


def check_eval_type(run: Run, eval_type: str | None) -> None:
    """Raises UserError if the folder cannot be read as `eval_type`."""
    if eval_type is None or eval_type == run.train_type:
        return
    wanted = "model" if eval_type.startswith("full") else TRAIN_TYPES[eval_type].method
    found = "dora" if run.dora else "lora" if run.adapter else run.kind
    fits = {
        "model": found in ("base", "model", "llama_pro"),
        "llama_pro": found == "llama_pro",
        "dora": found == "dora",
    }.get(wanted, found == "lora")
    if not fits or run.kind.startswith("stock"):
        raise UserError(f"--eval_type {eval_type}: {run.folder} holds {found} ({run.kind}); leave --eval_type away")


def _load_model(run: Run, *, device, dtype, eval_type) -> nn.Module:
    """A dense model, or one whose linears are quantized while they are read."""
    built = build_dense(run, dtype=dtype)
    weights = match(built, CheckpointReader(run.base), task=task_of(run))
    if weights.new:
        raise UserError(f"{run.folder}: no tensor for {weights.new[0]}, which {type(built).__name__} needs")
    quantized = eval_type not in (None, "full", run.train_type)
    if quantized:
        train_type = "qlora" if eval_type == "full_post_quantized" else eval_type
        config = _config_for(run, train_type=train_type)
        quantizer = bits.quantizer_of_flags(config, checkpoint_dtype=checkpoint_dtype(weights))
        if run.kind == "llama_pro" and eval_type != "full_post_quantized":  # its new blocks stay as they are
            quantizers = method_of(train_type)(config).to_quantize(built, quantizer.at)
        else:
            quantizers = {path: quantizer.at(path) for path in weights_in_blocks(built)}
        if not quantizers:
            raise UserError(f"--eval_type {eval_type}: the decoder blocks of {run.folder} have no linears to quantize")
        quantize_on_meta(built, quantizers)
    materialize(built, device=device, buffer_device=device)
    load_weights(built, weights, device=device)
    check_loaded(built)
    return built


def build_dense(run: Run, *, dtype: torch.dtype) -> nn.Module:
    """The dense model of a run's base or model, on meta.

    Raises:
        UserError: as `read_model_config`, or it has experts.
    """
    asked = dict(task=task_of(run), trust_remote_code=run.trust_remote_code)
    built = build_on_meta(read_model_config(str(run.base), **asked), dtype=dtype, **asked)
    refuse_experts(built)
    return built


def _config_for(run: Run, *, train_type: str) -> TrainConfig:
    """The run's flags with another train type; the defaults where it was trained elsewhere."""
    is_pro = TRAIN_TYPES[train_type].method == "llama_pro"
    config = _of_type(run.config or TrainConfig(), train_type)
    return replace(config, llama_pro_path=str(run.folder) if is_pro else None)


def _of_type(config: TrainConfig, train_type: str) -> TrainConfig:
    """The flags with another train type; a plan of bits and a rounding are of the quantizer that they were for."""
    same = TRAIN_TYPES[train_type].quantizer == config.quantizer
    own = {} if same else dict(bits_plan=None, train_for="none")
    return replace(config, train_type=train_type, **own)


def inference_config(run: Run, *, dtype: torch.dtype, eval_type: str | None = None) -> TrainConfig:
    """The flags that build an adapter run's model again, without what only training needs.

    Raises:
        UserError: a dtype that models are not built in.
    """
    if dtype not in PRECISION_OF:
        raise UserError(f"--dtype {dtype}: choose from bf16, fp32")
    config = run.config or _foreign_config(run)
    if eval_type:
        config = _of_type(config, eval_type)
    if config.lora_init not in METHODS[config.method].starts:
        began = f"{run.folder} began with --lora_init {config.lora_init}, which it cannot"
        raise UserError(f"--eval_type {eval_type}: {began}; leave --eval_type away")
    if run.config and run.config.lora_init in CORRECTING and run.config.quantizer != config.quantizer:
        why = f"{run.folder} corrects the rounding of the base it was trained on"
        raise UserError(f"--eval_type {eval_type}: {why}; leave --eval_type away")
    # the attention of packed rows knows no cache, and another one may be missing where there is no GPU; the quantized
    # cache belongs to the machine of the training, and writing it takes all its processes
    others = dict(packing=False, attn_implementation="auto", quantized_cache=None)
    others["trust_remote_code"] = run.trust_remote_code
    return replace(config, precision=PRECISION_OF[dtype], use_gradient_checkpointing=False, **others)


def _foreign_config(run: Run) -> TrainConfig:
    """The flags that would have made a PEFT adapter that was trained elsewhere."""
    paths = {n.rpartition(".lora_")[0] for n in adapter_tensors(run.adapter_folder) if ".lora_" in n}
    return TrainConfig(
        train_type="dora" if run.dora else "custom_lora",
        model_name=str(run.base),
        **flags_of(run.adapter),
        lora_target_modules=",".join(sorted(paths)),
    )


def plan_adapter(run: Run, *, device, dtype, eval_type=None) -> tuple[Plan, dict[str, torch.Tensor], TrainConfig]:
    """The run's model on meta, the saved tensors that fit it, and the flags that build it; no weight is read.

    Raises:
        UserError: another base, or a base quantized in another way than in training; tensors that do not fit.
    """
    config = inference_config(run, dtype=dtype, eval_type=eval_type)
    planned = attach(build(config, task=task_of(run), device=device), config)
    check_base(run, planned.base_fingerprint)
    as_trained = eval_type in (None, run.train_type)
    built = asdict(planned.quantizer) if planned.quantizer else None
    if run.config and as_trained and built != run.quantizer:
        raise UserError(f"{run.folder}: trained on a base quantized as {run.quantizer}, this version makes {built}")
    stored = adapter_tensors(run.adapter_folder)
    check_adapter(run, stored, dict(planned.method.tensors(planned.model)))
    planned.method.begin_as(stored, {})
    return planned, stored, config


def _load_adapter(run: Run, *, device, dtype, eval_type) -> nn.Module:
    """Our model, quantized again from the same base with the same settings, and the saved adapter in it."""
    planned, stored, config = plan_adapter(run, device=device, dtype=dtype, eval_type=eval_type)
    loaded = load_whole(planned, config, device=device)
    planned.method.fill(loaded, stored, device=device)
    return loaded


def load_stock(run: Run, *, device, dtype) -> nn.Module:
    """A folder in a format that transformers reads (bitsandbytes, compressed-tensors, GGUF), with PEFT's adapter on it.

    Raises:
        UserError: the library that reads the format is missing, or transformers cannot read the folder.
    """
    options = dict(trust_remote_code=run.trust_remote_code)
    if _quantization(run.base).get("quant_method") == "compressed-tensors":
        from transformers import CompressedTensorsConfig

        # compressed-tensors 0.20 makes room for unpacked zeros only: asymmetric weights load when they are unpacked
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    if (run.base / GGUF_FILE).exists():
        from transformers import GgufConfig

        options |= dict(gguf_file=GGUF_FILE, quantization_config=GgufConfig(dequantize=True))
    try:
        loaded = task_of(run).auto_class.from_pretrained(run.base, dtype=dtype, device_map={"": device}, **options)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        refuse_code(error, named=str(run.base))
        raise UserError(f"{run.base}: transformers cannot load it ({first_line(error)})") from None
    if run.adapter:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, run.adapter_folder)
    return loaded.requires_grad_(False).eval()
