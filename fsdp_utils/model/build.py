"""From a name to a model on meta: configuration, tokenizer, structure, packed modules without values."""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig
from transformers.core_model_loading import build_glob_alternation
from transformers.initialization import no_init_weights

from fsdp_utils.core.errors import UserError, first_line, refuse_code
from fsdp_utils.core.folders import refuse_cache, refuse_gguf, refuse_missing_folder
from fsdp_utils.model.prequantized import refuse_unknown
from fsdp_utils.model.tokenizer import load_tokenizer
from methods import GROUP_SIZES, group_sizes_for
from methods.adapter import ADAPTER_CONFIG
from methods.packed import Quantizer
from methods.quantizers.experts import expert_stacks, pack_stack
from methods.quantizers.linear import quantized
from methods.targets import replace_module

DEMO_MODEL = Path(__file__).parents[2] / "demo" / "model"


def resolve_model(name: str) -> str:
    """The folder behind a model name: `demo` is the built-in model."""
    return str(DEMO_MODEL) if name == "demo" else name


def read_raw_config(name: str, *, trust_remote_code: bool = False):
    """The model's configuration as it is, from a local folder or the hub.

    Raises:
        UserError: there is none, or the folder holds something else.
    """
    folder = resolve_model(name)
    refuse_missing_folder(folder)
    _refuse_adapter(name, Path(folder))
    refuse_gguf(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except StrictDataclassError as error:
        raise UserError(f"{name}: config.json: {first_line(error.__cause__ or error)}") from None
    except (ImportError, OSError, ValueError) as error:
        refuse_cache(error, folder=folder)
        refuse_code(error, named=name)
        if "couldn't connect" in str(error):
            why = "no folder here, nothing in the cache, and the hub does not answer"
            raise UserError(f"{name}: {why}; name a local folder with a config.json") from None
        raise UserError(f"{name}: {first_line(error)}") from None


def refuse_missing_expansion(folder: str | None) -> None:
    """Raises UserError: --llama_pro_path names none."""
    if folder and not Path(folder).is_dir():
        raise UserError(f"--llama_pro_path {folder}: no such folder; scripts/block_expansion.py writes it")


def read_model_config(name: str, *, task, attn_implementation: str = "auto", trust_remote_code: bool = False):
    """The model's configuration, made ready for a task.

    Args:
        task: what the model is for (`tasks`): its class of transformers must know the model.

    Raises:
        UserError: as `read_raw_config`, or it is not of that class, or quantized in a way that cannot be read.
    """
    config = read_raw_config(name, trust_remote_code=trust_remote_code)
    own_code = trust_remote_code and task.auto_class.__name__ in getattr(config, "auto_map", {})
    if not task.takes(config) and not own_code:
        raise UserError(f"{name}: {config.model_type} is not a {task.noun}")
    task.adapt(config)
    refuse_unknown(config, named=name)
    if attn_implementation != "auto":
        config._attn_implementation = attn_implementation
    config.use_cache = False
    return config


def _refuse_adapter(name: str, folder: Path) -> None:
    """transformers would load the adapter's base, whatever else the folder holds."""
    if (folder / ADAPTER_CONFIG).exists():
        raise UserError(
            f"{name}: holds an adapter ({ADAPTER_CONFIG}); name its base, and the adapter by --init_adapter to go on "
            "training it, or merge it with prepare_weights.py"
        )


def read_tokenizer(name: str, *, trust_remote_code: bool = False):
    """The model's tokenizer.

    Raises:
        UserError: as `load_tokenizer`.
    """
    refuse_missing_folder(resolve_model(name))
    return load_tokenizer(resolve_model(name), named=name, trust_remote_code=trust_remote_code)


def build_on_meta(model_config, *, task, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The frozen model as `from_pretrained` begins it: parameters on meta, tied as the configuration says; buffers real
    and on the CPU, with the values they have where a checkpoint holds none."""
    with no_init_weights(), init_empty_weights(include_buffers=False):
        try:
            model = task.auto_class.from_config(model_config, dtype=dtype, trust_remote_code=trust_remote_code)
        except (RuntimeError, ArithmeticError, IndexError) as error:  # sizes below zero, heads that do not divide
            raise UserError(
                f"config.json of {model_config.model_type}: builds no model ({first_line(error)})"
            ) from error
    _keep_in_fp32(model, dtype=dtype)
    _compute_buffers(model)
    model.tie_weights()  # no_init_weights also skips this
    return model.requires_grad_(False)


def _keep_in_fp32(model: nn.Module, *, dtype: torch.dtype) -> None:
    """Widens the parameters and saved buffers that a family keeps in fp32 under any dtype."""
    plan = model._get_dtype_plan(dtype)
    kept = build_glob_alternation(list(plan))[0] if plan else None
    for name, tensor in model.state_dict(keep_vars=True).items() if kept else ():
        if kept.search(name):
            tensor.data = tensor.data.float()


def _compute_buffers(model: nn.Module) -> None:
    """Gives buffers their values again: those of the constructor were computed in the dtype of the parameters, whereas
    `from_pretrained` has the family's own function compute them in fp32."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # on meta, to be loaded: left alone
    model.initialize_weights()


def quantize_on_meta(model: nn.Module, quantizers: dict[str, Quantizer]) -> None:
    """Replaces the linears, embeddings and stacks of experts at these paths by packed modules without values; tied ones
    stay tied.

    Raises:
        UserError: the group size does not divide a row, so groups would cross rows and could not be sharded.
    """
    made = {}
    stacks = set(expert_stacks(model))
    for path, quantizer in quantizers.items():
        module = None if path in stacks else model.get_submodule(path)
        packed = quantized(module, quantizer) if module else pack_stack(model, path, quantizer)
        if packed.in_features % quantizer.group_size:
            fitting = group_sizes_for(packed.in_features)
            way_out = f"use {fitting[-1]}" if fitting else f"none of {', '.join(map(str, GROUP_SIZES))} does"
            raise UserError(
                f"--quant_group_size {quantizer.group_size}: does not divide in_features {packed.in_features} of "
                f"{path}; {way_out}"
            )
        if module is None:
            continue
        first = made.setdefault(id(module.weight), packed)
        for name in packed.packed_names:
            setattr(packed, name, getattr(first, name))
        replace_module(model, path, packed)
