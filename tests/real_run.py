"""A real run in this process: its first optimizer step, what it saves, its bytes."""

import json

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train
from fsdp_utils.config import TrainConfig
from fsdp_utils.core import processes
from fsdp_utils.core.devices import pick_device
from fsdp_utils.core.flags import parse
from fsdp_utils.core.rows import fill, gather, local
from fsdp_utils.folders import saving
from fsdp_utils.folders.describe import describe
from fsdp_utils.inference.load import load_for_inference
from fsdp_utils.model import assemble
from fsdp_utils.model.build import read_model_config, read_tokenizer
from fsdp_utils.model.compiling import compiler
from fsdp_utils.model.weights import packed_name
from fsdp_utils.sharding.mesh import mesh_for
from fsdp_utils.sharding.prepared import Prepared
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from fsdp_utils.training.step import TrainStep
from methods import CORRECTING
from methods.quantizers.linear import QuantizedLinear, QuantizedWeight, weight_rows

CPU = torch.device("cpu")


def make_config(**flags) -> TrainConfig:
    """A parsed command line; defaults suit a tiny model on a CPU."""
    defaults = dict(
        precision="fp32", lora_rank=8, lora_dropout=0.0, device="cpu", use_cpu_offload=False, context_length=64
    )
    argv = [f"--{name}={value}" for name, value in {**defaults, **flags}.items()]
    return parse(TrainConfig, argv, prog="train.py")


def task_in(config):
    """The task of a run, its labels known, if it is none of language models."""
    return CAUSAL_LM if config.task in ("auto", "causal_lm") else train.read_inputs(config)[0]


def plan(config, *, device: torch.device = CPU) -> assemble.Plan:
    """Of a run, on meta."""
    return assemble.plan(config, task=task_in(config), device=device)


def planned_and_prepared(config) -> tuple[assemble.Plan, Prepared]:
    """Of a run, loaded and sharded."""
    device = pick_device(config.device)
    processes.start(device, alone=config.use_cpu_offload)
    planned, mesh = plan(config, device=device), mesh_for(config, device)
    compile_block = compiler(config, device)
    data = tokenized(config) if config.lora_init in CORRECTING else None
    return planned, assemble.load(planned, config, mesh=mesh, device=device, compile_block=compile_block, data=data)


def prepared(config) -> Prepared:
    """A run, loaded and sharded."""
    return planned_and_prepared(config)[1]


def off_zero(run: Prepared) -> Prepared:
    """With every trained parameter moved off its start."""
    perturb(run.model)
    run.method.after_step(run.model, device=run.device)
    return run


def batches_of(config, run: Prepared):
    """The data of a run, as train.py makes it."""
    tokenizer = read_tokenizer(config.source, trust_remote_code=config.trust_remote_code)
    task = task_in(config)
    data = train.prepare_data(config, tokenizer, run.model.config, task=task)
    return train.make_batches(config, data, tokenizer, run.model.config, task=task)


def tokenized(config):
    """The samples of a run."""
    model_config = read_model_config(config.source, task=CAUSAL_LM)
    tokenizer = read_tokenizer(config.source, trust_remote_code=config.trust_remote_code)
    return train.prepare_data(config, tokenizer, model_config, task=CAUSAL_LM)


def perturb(model, seed: int = 1) -> None:
    """Moves every trained parameter off its start, alike for any number of processes and any base: LoRA's B begins at
    zero."""
    trained = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
    for i, (_, parameter) in enumerate(trained):
        generator = torch.Generator().manual_seed(seed * 1000 + i)
        noise = torch.randn(parameter.shape, generator=generator) * 0.02
        fill(parameter, (gather(parameter.detach()).cpu().float() + noise).to(parameter.dtype))


def save_trained(config):
    """Saves the run of `config` with changed weights, as finished; returns the model it had in memory."""
    planned, run = planned_and_prepared(config)
    off_zero(run)
    saving.save(run.model, read_tokenizer(config.source, trust_remote_code=config.trust_remote_code), planned, config)
    saving.write_run(config, planned, finished=True)
    return run.model.eval()


@torch.no_grad()
def logits(model, *, rows: int = 2) -> torch.Tensor:
    """Of fixed random tokens, fp32."""
    ids = torch.randint(0, 250, (rows, 12), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids).logits.float()


def dequantized(model) -> dict[str, torch.Tensor]:
    """The quantized weights of a run's model under their names in the checkpoint."""
    return {
        f"{path.replace('.base_layer', '')}.weight": weight_rows(module, gather, dtype=torch.float32)
        for path, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def dense_of(model) -> dict[str, torch.Tensor]:
    """The quantized weights of a run's model under their names in the model, as the checkpoint has them."""
    return {
        packed_name(path, module): module.as_stored(weight_rows(module, gather, dtype=torch.float32))
        for path, module in model.named_modules()
        if isinstance(module, QuantizedWeight)
    }


def assert_answers_alike(folder, model, *, base, export) -> None:
    """A saved adapter answers as the run did in our loader; merged, in stock transformers, under the names of the
    base's files."""
    want = logits(model)
    torch.testing.assert_close(logits(load_for_inference(describe(folder), device=CPU)), want, atol=1e-5, rtol=0)
    merged = export(folder, "merged", dtype="fp32")
    assert load_file(merged / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    stock = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(stock), want, atol=1e-4, rtol=0)


def set_json(path, **values) -> None:
    """Changes values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def first_step(flags: dict, *, perturbed: bool = True) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gathered gradients of the first optimizer step of `make_config(**flags)`."""
    config = make_config(**flags)
    run = prepared(config)
    if perturbed:
        off_zero(run)
    step = TrainStep(run, config, task=task_in(config))
    (micro_batches,) = step.batches(batches_of(config, run)).first(1)
    loss = step.mean_loss(*step.backward(micro_batches))
    # Pegasus has positions that are computed, and no gradient
    names = {name: p for name, p in run.model.named_parameters() if p.grad is not None}
    gradients = {name: gather(p.grad).detach().cpu() for name, p in names.items()}
    return loss, gradients


def packed_bytes(flags: dict) -> dict[str, torch.Tensor]:
    """The gathered bytes of every frozen parameter, and under `*shard` this process's share of all bytes."""
    model = prepared(make_config(**flags)).model
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    whole = {name: gather(p).contiguous().view(torch.uint8) for name, p in frozen.items()}
    whole["*shard"] = torch.tensor(sum(local(p).nbytes for p in frozen.values()))
    return whole
