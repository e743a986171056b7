"""Llama-Pro block expansion: adds decoder blocks that change nothing until `train.py --train_type bnb_llama_pro` does.

    python scripts/block_expansion.py --model_name meta-llama/Llama-2-7b-hf --output_dir llama_pro --expansion_rate 0.1
    python scripts/block_expansion.py --model_name demo --output_dir demo_pro --num_new_blocks 2

A new block is a copy of the one before it whose attention output and MLP down projections are zero, so both of its
residual branches add nothing (LLaMA Pro, arXiv:2401.02415). Tensors are copied one at a time.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fsdp_utils.core.flags import flag, parse_or_fail
from fsdp_utils.core.folders import OF_A_MODEL, TEMPLATES, model_folder, new_folder, parse_size, size_errors


@dataclass
class Expansion:
    model_name: str = flag("", "local folder or hub name of the model to expand; demo: the built-in one")
    output_dir: str = flag("", "folder that is made")
    expansion_rate: float = flag(0.1, "share of new blocks, rounded down, at least one", above=0, maximum=1)
    num_new_blocks: int = flag(0, "number of new blocks; 0: taken from --expansion_rate", minimum=0)
    max_shard_size: str = flag("5GB", "largest size of one weight file")
    overwrite: bool = flag(False, "replace what is in --output_dir")
    trust_remote_code: bool = flag(False, "run the code that its folder brings (auto_map in its documents)")

    def errors(self):
        found = [f"--{name}: required" for name in ("model_name", "output_dir") if not getattr(self, name)]
        found += size_errors(self.max_shard_size, flag="max_shard_size")
        if "WORLD_SIZE" in os.environ:
            found.append("torchrun: an expansion is one process; start it with plain python")
        return found


if __name__ == "__main__":  # before the libraries, which take seconds: --help and a wrong flag are answered at once
    CONFIG = parse_or_fail(Expansion, prog="block_expansion.py", description=__doc__)

import json
import shutil
from itertools import chain

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from fsdp_utils.core.errors import CheckpointError, UserError, naming
from fsdp_utils.core.ranks import fail
from fsdp_utils.core.safetensors_io import INDEX_NAME, CheckpointReader, StreamingWriter
from fsdp_utils.model.build import read_model_config, resolve_model
from fsdp_utils.model.prequantized import settings_of
from fsdp_utils.tasks import task_of_model
from fsdp_utils.tasks.causal_lm import CAUSAL_LM

LAYERS_NAME = "expanded_layers.json"
FITTING = "choose a model whose blocks are built as Llama's, of Mistral, Qwen, Gemma or Phi-3"
OF_THE_SOURCE = (INDEX_NAME, LAYERS_NAME, "run.json", "fidelity.json")


def expanded_layout(depth, n_new):
    """[(source layer, is new)] for each layer of the result: a new block after each of n_new even groups."""
    if not 1 <= n_new <= depth:
        raise UserError(f"--num_new_blocks {n_new}: must be from 1 to the model's {depth} layers")
    group_ends = {(i + 1) * depth // n_new - 1 for i in range(n_new)}
    return [(layer, new) for layer in range(depth) for new in ((False, True) if layer in group_ends else (False,))]


def find_blocks(config, *, trust_remote_code=False):
    """(name of the list of decoder blocks, names of the two linears of a block that write to the residual stream)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    decoders = set(model._no_split_modules or ())
    lists = {
        name: blocks
        for name, blocks in model.named_modules()
        if isinstance(blocks, nn.ModuleList) and len(blocks) and all(type(b).__name__ in decoders for b in blocks)
    }
    depth = getattr(config, "num_hidden_layers", None)
    if [len(blocks) for blocks in lists.values()] != [depth]:
        found = ", ".join(f"{name} ({len(blocks)})" for name, blocks in lists.items()) or "none"
        raise UserError(f"{config.model_type}: expected one list of {depth} decoder blocks, found {found}")
    ((name, blocks),) = lists.items()
    outputs = {tuple(residual_outputs(block, config.model_type)) for block in blocks}
    if len(outputs) > 1:
        raise UserError(f"{config.model_type}: its blocks differ in structure")
    return name, outputs.pop()


def residual_outputs(block, family):
    """Names of the attention output and MLP down projections; raises UserError if zeroing them may not be enough."""
    outputs = sorted(
        name
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-1] in ("o_proj", "down_proj")
    )
    branches = {name.split(".")[0] for name in outputs}
    if sorted(name.split(".")[-1] for name in outputs) != ["down_proj", "o_proj"] or len(branches) != 2:
        found = ", ".join(outputs) or "neither"
        raise UserError(f"{family}: expected one o_proj and one down_proj in {type(block).__name__}, found {found}")
    for name, tensor in chain(block.named_parameters(), block.named_buffers()):
        # 3-D experts bypass down_proj; a scale or matrix outside both branches acts even when they are zero
        outside = name.split(".")[0] not in branches and (tensor.dim() > 1 or "." not in name)
        if outside or tensor.dim() > 2:
            raise UserError(f"{family}: {type(block).__name__} holds {name}, which block expansion does not understand")
    return outputs


def expanded_config(folder, config, layout):
    """config.json of the result: its depth, and every list that has an entry for each layer."""
    result = json.loads((folder / "config.json").read_text())
    depth = config.num_hidden_layers
    # the class fills lists that an old config.json lacks, from patterns that would not survive the renumbering
    for key, value in config.to_dict().items():
        per_layer = isinstance(value, (list, tuple)) and key != "architectures" and not key.endswith("_token_id")
        if per_layer and len(value) == depth:
            result[key] = [value[source] for source, _ in layout]
        elif per_layer and value and "layer" in key:
            differ = f"{key} has {len(value)} entries for {depth} layers"
            raise UserError(f"{folder}/config.json: {differ}; put the original back")
    if "max_window_layers" in result:
        result["max_window_layers"] = sum(source < result["max_window_layers"] for source, _ in layout)
    return result | {"num_hidden_layers": len(layout)}


def plan_tensors(reader, blocks, outputs, layout):
    """[(new name, source name, is zero)] of every tensor of the result."""
    layers, plan = {}, []
    for name in reader.names():
        if name.startswith(f"{blocks}."):
            number, _, rest = name.removeprefix(f"{blocks}.").partition(".")
            layers.setdefault(int(number), []).append(rest)
        else:
            plan.append((name, name, False))
    depth = 1 + max(source for source, _ in layout)
    if sorted(layers) != list(range(depth)):
        differ = f"config.json has {depth} layers, the weights {len(layers)} under {blocks}"
        raise UserError(f"{reader.folder}: {differ}; put the files of one model together")
    for source, rests in layers.items():
        for missing in {f"{output}.weight" for output in outputs} - set(rests):
            raise UserError(f"{reader.folder}: {blocks}.{source}.{missing} is missing; put the original weights back")
    for target, (source, is_new) in enumerate(layout):
        for rest in layers[source]:
            zero = is_new and rest.rpartition(".")[0] in outputs
            plan.append((f"{blocks}.{target}.{rest}", f"{blocks}.{source}.{rest}", zero))
    return plan


def write_weights(reader, plan, folder, max_shard_bytes):
    specs = {new: (reader.dtype(source), reader.shape(source)) for new, source, _ in plan}
    writer = StreamingWriter(folder, specs, max_shard_bytes)
    for new, source, zero in tqdm(plan, desc="tensors"):
        tensor = reader.tensor(source)
        writer.write(new, torch.zeros_like(tensor) if zero else tensor)
    writer.finish()


def copy_rest(source, target):
    """Tokenizer, chat templates and generation config; not what says how the source was made."""
    for path in source.iterdir():
        if path.suffix.removeprefix(".") in OF_A_MODEL[1:] and path.name not in OF_THE_SOURCE:
            shutil.copyfile(path, target / path.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES)


def opened(name, *, trust_remote_code=False):
    """Folder, weights and configuration of the model to expand."""
    try:
        source = model_folder(resolve_model(name))
    except CheckpointError as error:
        raise UserError(f"--model_name {error}; give a local folder, a name of the hub, or demo") from None
    with naming("--model_name"):
        config = read_model_config(name, task=CAUSAL_LM, trust_remote_code=trust_remote_code)
        if task_of_model(config) != "causal_lm":
            raise UserError(f"{name}: {config.model_type} models of this kind have an encoder; {FITTING}")
        if settings_of(config):
            raise UserError(f"{name}: its weights are quantized already; give the 16-bit model")
        return source, CheckpointReader(source), config


def expand(args):
    max_shard_bytes = parse_size(args.max_shard_size)
    trusted = dict(trust_remote_code=args.trust_remote_code)
    source, reader, config = opened(args.model_name, **trusted)
    try:
        blocks, outputs = find_blocks(config, **trusted)
    except UserError as error:
        raise UserError(f"--model_name {args.model_name}: {error}; {FITTING}") from None
    depth = config.num_hidden_layers
    # 1e-9: 0.29 * 100 is 28.999…
    layout = expanded_layout(depth, args.num_new_blocks or max(1, int(depth * args.expansion_rate + 1e-9)))
    new_layers = [layer for layer, (_, is_new) in enumerate(layout) if is_new]
    with naming("--model_name"):
        plan, new_config = plan_tensors(reader, blocks, outputs, layout), expanded_config(source, config, layout)
    print(f"{depth} -> {len(layout)} layers; new: {new_layers}, copies of {[layout[layer][0] for layer in new_layers]}")
    with new_folder(args.output_dir, overwrite=args.overwrite, sources=[source]) as folder:
        copy_rest(source, folder)
        (folder / "config.json").write_text(json.dumps(new_config, indent=2) + "\n")
        (folder / LAYERS_NAME).write_text(json.dumps({"expanded_layers": new_layers}) + "\n")
        write_weights(reader, plan, folder, max_shard_bytes)


if __name__ == "__main__":
    try:
        expand(CONFIG)
    except UserError as error:
        fail(error)
