"""The peer a user would pick instead: PEFT on bitsandbytes and transformers, alone or with Liger's kernels. And what
several processes are measured against: each of them by itself."""

import gc
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.common import median_step
from fsdp_utils.core.devices import pick_device
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.ranks import world_size
from fsdp_utils.model.build import build_on_meta, read_model_config
from fsdp_utils.model.weights import open_weights
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from fsdp_utils.training.optim import stock_optimizer
from methods import TRAIN_TYPES
from methods.targets import adapter_targets, block_linears, replace_module

USE_DORA = {"peft_lora": False, "lora": False, "dora": True}  # of our methods, those that PEFT has too
QUANTIZERS = ("none", "bnb")


@contextmanager
def liger_kernels(model: nn.Module):
    """Liger's RoPE, RMSNorm, SwiGLU and fused loss in a Llama, until the end of the block."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    # Liger patches the module beside the model: our own rows, which run the same code, would get its kernels too
    before = dict(vars(modeling_llama))
    apply_liger_kernel_to_llama(model=model)
    try:
        yield
    finally:
        vars(modeling_llama).update(before)


class Peer(NamedTuple):
    """`modules` must import; `kernels(model)` is a context around the peer's life."""

    modules: tuple[str, ...]
    kernels: Callable
    needs_gpu: bool


PEERS = {
    "peft": Peer(("peft", "bitsandbytes"), nullcontext, needs_gpu=False),
    "liger": Peer(("peft", "bitsandbytes", "liger_kernel.transformers"), liger_kernels, needs_gpu=True),
}


ALONE = "alone"  # no peer: our run in every process by itself, all at the same time; tells what sharding costs


def parse_peers(text: str, *, device: torch.device) -> list[str]:
    """`peft,liger` to the names of peers that can run here.

    Raises:
        UserError: with one line for each that cannot: unknown, not installed, without a GPU, in several processes, or
            (`alone`) in one.
    """
    names = [name for name in text.split(",") if name]
    if wrong := [line for name in names if (line := _error_of(name, device))]:
        raise UserError("\n".join(wrong))
    return names


def _error_of(name: str, device: torch.device) -> str | None:
    if name == ALONE:
        return None if world_size() > 1 else f"--peer {ALONE}: is for several processes; start torchrun"
    if name not in PEERS:
        return f"--peer {name}: choose from {', '.join((*PEERS, ALONE))}"
    if world_size() > 1:
        return f"--peer {name}: trains in one process; start this without torchrun"
    if PEERS[name].needs_gpu and device.type != "cuda":
        return f"--peer {name}: its kernels need a GPU; leave it out"
    for module in PEERS[name].modules:
        try:
            import_module(module)
        except ImportError as error:
            package = module.partition(".")[0].replace("_", "-")
            return f"--peer {name}: {str(error).splitlines()[0]}; `pip install {package}`, or leave it out"
    return None


def has_peer(train_type: str, name: str) -> bool:
    """Whether the peer trains the same thing; PEFT does with LoRA or DoRA on a 16-bit or NF4 base."""
    row = TRAIN_TYPES[train_type]
    return name == ALONE or (row.method in USE_DORA and row.quantizer in QUANTIZERS)


def linear_4bit(weight: torch.Tensor) -> nn.Module:
    """bitsandbytes' layer with an NF4 copy of `weight` `[out, in]`, bf16, on its device."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    out_features, in_features = weight.shape
    settings = dict(quant_type="nf4", compress_statistics=False)
    linear = Linear4bit(in_features, out_features, bias=False, compute_dtype=torch.bfloat16, device="meta", **settings)
    linear.weight = Params4bit(weight, module=linear, **settings).to(weight.device)  # this quantizes
    return linear


def dummy_base(config, *, device: torch.device) -> nn.Module:
    """transformers' frozen model in bf16 with the random weights that our rows get; a `bnb` base has NF4 block linears.

    It is filled tensor by tensor: no more than one matrix is in 16 bits beside the result.
    """
    settings = dict(dtype=torch.bfloat16, device=device, seed=config.seed)
    model = build_on_meta(read_model_config(config.source, task=CAUSAL_LM), task=CAUSAL_LM, dtype=torch.bfloat16)
    weights = open_weights(model, config.source, task=CAUSAL_LM, load_format="dummy", **settings)
    model.is_loaded_in_4bit = config.quantizer == "bnb"  # without it PEFT takes Linear4bit for a plain linear
    packed = block_linears(model) if model.is_loaded_in_4bit else {}
    for name in weights.names():
        path, _, kind = name.rpartition(".")
        values = weights.rows(name, 0, weights.shape(name)[0])
        if path in packed:
            replace_module(model, path, linear_4bit(values))
        else:
            setattr(model.get_submodule(path), kind, nn.Parameter(values, requires_grad=False))
    return model.to(device)  # the buffers


def with_adapters(base: nn.Module, config) -> nn.Module:
    """PEFT's LoRA or DoRA on the targets of our run, trained in bf16 as ours, with non-reentrant checkpointing."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_dora=USE_DORA[config.method],
        target_modules=adapter_targets(base, config.lora_target_modules),
        task_type="CAUSAL_LM",
    )
    # the random start of A takes seconds on the host; transformers 5.23 warns of the names that PEFT and 5.17 know
    with base.device, warnings.catch_warnings(action="ignore", category=FutureWarning):
        model = get_peft_model(base, lora)
        if config.use_gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)  # PEFT makes them fp32
    return model


class PeerRun:
    """What `benchmarks.common.Run` is for us: the peer's model, which can take optimizer steps on random tokens."""

    def __init__(self, config, *, peer: str):
        self.device = pick_device(config.device)
        self.patches = ExitStack()
        start = time.perf_counter()
        base = dummy_base(config, device=self.device)
        self.patches.enter_context(PEERS[peer].kernels(base))
        self.model = with_adapters(base, config).train()
        self.load_s = time.perf_counter() - start
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = stock_optimizer(config, trained)

    def step(self, batch: int, length: int) -> None:
        """One optimizer step on `batch` rows of `length` random tokens, all of them in the loss."""
        ids = torch.randint(0, self.model.config.vocab_size, (batch, length)).to(self.device)
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measure(self, batch: int, length: int, *, steps: int, warmup: int) -> dict:
        """What `median_step` says of this run, and the seconds that loading took."""
        timed = median_step(self.step, batch=batch, length=length, device=self.device, steps=steps, warmup=warmup)
        return dict(**timed, load_s=round(self.load_s, 1))

    def close(self) -> None:
        """Takes the peer's patches back, and gives the memory back."""
        self.patches.close()
        self.__dict__.clear()
        gc.collect()
        torch.cuda.empty_cache()
