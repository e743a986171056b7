"""One optimizer step of a real run, in this process: what the parity tests compare."""

import json

import torch

import train
from fsdp_utils.config import TrainConfig
from fsdp_utils.core import processes
from fsdp_utils.core.flags import parse
from fsdp_utils.core.rows import gather, local
from fsdp_utils.folders import saving
from fsdp_utils.model.assemble import compiler, load, plan
from fsdp_utils.model.build import read_tokenizer
from fsdp_utils.training.step import micro_step
from methods.quantizers.linear import QuantizedLinear, weight_rows


def make_config(**flags) -> TrainConfig:
    """A parsed command line; defaults suit a tiny model on a CPU."""
    defaults = dict(
        precision="fp32", lora_rank=8, lora_dropout=0.0, device="cpu", use_cpu_offload=False, context_length=64
    )
    argv = [f"--{name}={value}" for name, value in {**defaults, **flags}.items()]
    return parse(TrainConfig, argv, prog="train.py")


def prepared(config):
    """`(model, plan, mesh, device)` of a run, loaded and sharded."""
    device = processes.pick_device(config.device)
    processes.start(device, alone=config.use_cpu_offload)
    planned = plan(config, device=device)
    mesh = processes.mesh_for(config, device)
    model = load(planned, config, mesh=mesh, device=device, compile_block=compiler(config, device))
    return model, planned, mesh, device


def perturb(model, seed: int = 1) -> None:
    """Moves every trained parameter off its start, alike for any number of processes: LoRA's B begins at zero."""
    from fsdp_utils.core.rows import fill

    for i, (_, parameter) in enumerate(sorted(model.named_parameters())):
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(seed * 1000 + i)
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            fill(parameter, (gather(parameter.detach()).cpu().float() + noise).to(parameter.dtype))


def save_trained(config):
    """Saves the run of `config` with changed weights, as finished; returns the model it had in memory."""
    model, planned, _, device = prepared(config)
    perturb(model)
    planned.method.after_step(model, device=device)
    saving.save(model, read_tokenizer(config.source), planned.method, config)
    facts = dict(base_fingerprint=planned.base_fingerprint, quantizer=planned.quantizer)
    saving.write_run(config, **facts, finished=True)
    return model.eval()


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


def set_json(path, **values) -> None:
    """Changes values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def first_step(flags: dict, *, perturbed: bool = True) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gathered gradients of the first optimizer step of `make_config(**flags)`."""
    config = make_config(**flags)
    model, planned, mesh, device = prepared(config)
    if perturbed:
        perturb(model)
        planned.method.after_step(model, device=device)
    tokenizer = read_tokenizer(config.source)
    tokenized = train.prepare_data(config, tokenizer, model.config)
    steps = train.steps_of(config, tokenized, tokenizer, total=1)
    model.train()
    run = micro_step(model, config, mesh=mesh, device=device)
    loss = train.mean_loss(*train.backward(model, run, next(iter(steps)), config, device=device, scale=1.0))
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = {name: gather(p.grad).detach().cpu() for name, p in names.items()}
    return loss, gradients


def packed_bytes(flags: dict) -> dict[str, torch.Tensor]:
    """The gathered bytes of every frozen parameter, and under `*shard` this process's share of all bytes."""
    model, *_ = prepared(make_config(**flags))
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    whole = {name: gather(p).contiguous().view(torch.uint8) for name, p in frozen.items()}
    whole["*shard"] = torch.tensor(sum(local(p).nbytes for p in frozen.values()))
    return whole
