"""Which modules of a model are decoder blocks, which linears are quantized, and which get adapters."""

from collections.abc import Callable

from torch import nn
from transformers.pytorch_utils import Conv1D

from fsdp_utils.core.errors import UserError
from methods.quantizers.experts import expert_stacks, is_experts
from methods.quantizers.linear import QuantizedLinear

ATTENTION_OUTPUTS = ("o_proj", "out_proj", "out_lin", "dense", "c_proj", "wo", "o")


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Path and module of each block, in order, of an encoder and of a decoder.

    A block is a member of a list of modules that is in no other such list and holds linears; where the family's own
    `_no_split_modules` names members of some of these lists, of those (others belong to towers for pictures and sound).
    Must run before fully_shard, which renames classes.
    """
    lists: list[str] = []
    for path, module in model.named_modules():
        inside = path.startswith(tuple(f"{other}." for other in lists))
        if isinstance(module, nn.ModuleList) and not inside and any(map(has_linears, module)):
            lists.append(path)
    named = set(model._no_split_modules or ())
    members = {path: list(model.get_submodule(path).named_children()) for path in lists}
    chosen = [path for path in lists if any(type(member).__name__ in named for _, member in members[path])] or lists
    blocks = {f"{path}.{name}": member for path in chosen for name, member in members[path]}
    if not blocks:
        raise UserError(f"{type(model).__name__} has no list of blocks with linears, so the model is not supported")
    return blocks


def has_linears(module: nn.Module) -> bool:
    """Whether there are linears inside a module, which is none itself."""
    kinds = (nn.Linear, QuantizedLinear, Conv1D)
    return not isinstance(module, kinds) and any(isinstance(m, kinds) for m in module.modules())


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Path and module of every linear, quantized or not, inside a decoder block; lm_head and embeddings are outside,
    and what weighs experts beside a router."""
    return {
        f"{block_path}.{path}": m
        for block_path, block in decoder_blocks(model).items()
        for path, m in block.named_modules()
        if isinstance(m, (nn.Linear, QuantizedLinear)) and not _routes(block.get_submodule(path.rpartition(".")[0]))
    }


def weights_in_blocks(model: nn.Module) -> list[str]:
    """Paths of all that can be packed in decoder blocks: linears, and stacks of experts."""
    return [*block_linears(model), *expert_stacks(model)]


def _routes(module: nn.Module) -> bool:
    """Whether a module hands tokens to experts."""
    return any(map(is_experts, module.children()))


def routers(model: nn.Module) -> list[str]:
    """Paths of the modules that choose experts: beside these, neither a feed-forward layer nor what weighs a shared
    one."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for experts in filter(is_experts, module.children())
        for name, child in module.named_children()
        if not is_experts(child) and not has_linears(child) and _chooses(child, among=experts.num_experts)
    ]


def _chooses(module: nn.Module, *, among: int) -> bool:
    return any(p.shape[:1] == (among,) and p.dim() == 2 for p in module.parameters(recurse=False))


def learned_positions(model: nn.Module) -> int | None:
    """How many positions a model has a trained embedding for; None where positions are computed (rotary, alibi)."""
    tokens = model.get_input_embeddings()
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", 0)
    others = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings != tokens.num_embeddings]
    found = [m for m in others if m.num_embeddings >= limit > 0]
    if not found:
        return None
    # RoBERTa counts positions from behind the padding id
    return limit - max(0 if m.padding_idx is None else m.padding_idx + 1 for m in found)


def family_dropout(model: nn.Module) -> set[str]:
    """The dropout rates above zero that a family's configuration names, such as `attention_dropout`."""
    settings = model.config.get_text_config().to_dict().items()
    return {name for name, value in settings if "drop" in name and isinstance(value, (int, float)) and value > 0}


def refuse_experts(model: nn.Module) -> None:
    """Raises UserError for stacks of expert weights that are not built as transformers builds them now: replacing
    nn.Linear would leave them in 16 bits (bitsandbytes#1849). Other weights of three dimensions, as those of
    convolutions, are small and may stay so."""
    known = set(expert_stacks(model))
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            where = f"{path}.{name}"
            if parameter.dim() == 3 and where not in known and "expert" in f"{where} {type(module).__name__}".lower():
                what = f"{where} {tuple(parameter.shape)}"
                raise UserError(f"{type(model).__name__}: {what} holds experts in a way that is not supported")


def refuse_in_place(model: nn.Module) -> None:
    """Raises UserError for a family that adds to results of linears in place, where these were packed or adapted:
    their gradients need the results as they were."""
    replaced = any(isinstance(m, QuantizedLinear) or hasattr(m, "plain_forward") for m in model.modules())
    if replaced and model.config.model_type == "falcon":
        raise UserError("falcon models change results of linears in place; use --train_type full or lora")


def _is_attention_output(path: str) -> bool:
    *parents, name = path.lower().split(".")
    within = ".".join(parents[-2:] if parents[-1:] == ["output"] else parents[-1:])  # BERT: attention.output.dense
    return name in ATTENTION_OUTPUTS and ("attn" in within or "attention" in within)


def _by_structure(keep: Callable[[str], bool]):
    return lambda model, linears: [path for path in linears if keep(path)]


def _peft_default(model, linears):
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

    kind = model.config.model_type
    if kind not in known:
        raise UserError(f"--lora_target_modules default: PEFT has no default for {kind} models; use all or names")
    return _named(known[kind], linears)


def _named(names, linears):
    chosen = []
    for name in names:
        found = [path for path in linears if path == name or path.endswith("." + name)]
        if not found:
            offered = ", ".join(sorted({path.split(".")[-1] for path in linears}))
            raise UserError(f"--lora_target_modules {name}: matches no linear of a decoder block; there are {offered}")
        chosen += found
    return [path for path in linears if path in set(chosen)]


# the 2024 script's `all` is q,k,v,gate,up,down: every linear but the attention's output projection
_RULES = {
    "all": _by_structure(lambda path: not _is_attention_output(path)),
    "all_linear": _by_structure(lambda path: True),
    "default": _peft_default,
}


def adapter_targets(model: nn.Module, spec: str) -> list[str]:
    """Paths of the linears that get an adapter.

    Args:
        spec: `all`, `all_linear`, `default`, or module names separated by commas.

    Raises:
        UserError: a name that matches nothing.
    """
    linears = block_linears(model)
    rule = _RULES.get(spec)
    chosen = rule(model, linears) if rule else _named([n.strip() for n in spec.split(",") if n.strip()], linears)
    if not chosen:
        offered = ", ".join(sorted({path.split(".")[-1] for path in linears})) or "none"
        raise UserError(f"--lora_target_modules {spec}: matches no linear of a decoder block; there are {offered}")
    return chosen


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
