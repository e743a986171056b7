"""Implementations at equal loss: ours, PEFT with bitsandbytes, and torchtune on the same model, rows and start.

    python benchmarks/implementations.py --model MODEL --data gsm8k_train.jsonl --train_type custom_qlora --steps 50
    python benchmarks/implementations.py --train_type custom_lora --extra precision=fp32 --steps 8

Every implementation takes the same optimizer steps on the same micro-batches, from the same base and the same A: loss
curve, tokens/s (median step after the first five) and peak memory, in one table. Adapters are on q, k, v, gate, up and
down. torchtune is asked where it is installed (0.6.1 needs torchao 0.10): it has LoRA and DoRA for Llama's shapes, and
quantizes with its own NF4.
"""

import argparse
import gc
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.common import write_results
from fsdp_utils.config import TrainConfig
from fsdp_utils.core import processes
from fsdp_utils.core.devices import pick_device, synchronize
from fsdp_utils.core.errors import UserError, first_line
from fsdp_utils.core.flags import parse
from fsdp_utils.core.ranks import say
from fsdp_utils.core.safetensors_io import CheckpointReader
from fsdp_utils.data.batches import tokens_in
from fsdp_utils.data.prepare import make_batches, prepare_data
from fsdp_utils.model.assemble import Dtypes, load, plan
from fsdp_utils.model.build import read_model_config, read_tokenizer, resolve_model
from fsdp_utils.model.compiling import compiler
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from fsdp_utils.training.optim import stock_optimizer
from fsdp_utils.training.step import TrainStep

Batch = dict[str, torch.Tensor]
Start = dict[str, torch.Tensor]  # A and B as PEFT names them, without its prefix
WARM_UP = 5  # steps that are not timed


class Ours:
    """`train.py`'s own step."""

    name, package = "ours", "torch"

    def __init__(self, config: TrainConfig, start: Start | None, *, device: torch.device):
        planned = plan(config, task=CAUSAL_LM, device=device)
        compiled = compiler(config, device)
        self.prepared = load(planned, config, mesh=None, device=device, compile_block=compiled)
        self.train_step, self.lr = TrainStep(self.prepared, config, task=CAUSAL_LM), config.lr
        tensors = dict(planned.method.tensors(self.prepared.model))
        self.start = {name: stored.whole().float().cpu().clone() for name, stored in tensors.items()}

    def step(self, batch: Batch) -> float:
        return self.train_step([batch], lr=self.lr).loss


class _Other:
    """Another library's model; the loss is the mean over the tokens that predict, from whole logits."""

    def __init__(self, config: TrainConfig, start: Start, *, device: torch.device):
        self.device, self.dtype = device, Dtypes.of(config.precision).stored
        self.model = self.build(config, start).to(device).train()
        self.optimizer = stock_optimizer(config, [p for p in self.model.parameters() if p.requires_grad])

    def step(self, batch: Batch) -> float:
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        logits = self.logits(batch["input_ids"]).flatten(0, 1)[batch["positions"]]
        loss = F.cross_entropy(logits.float(), batch["targets"])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Peft(_Other):
    """PEFT on transformers' model, its base quantized by bitsandbytes."""

    name, package = "PEFT + bitsandbytes", "peft"

    def build(self, config: TrainConfig, start: Start) -> nn.Module:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
        from peft.tuners.lora import torchao

        torchao.is_torchao_available = lambda: False  # PEFT refuses the version that torchtune needs
        how = {}
        if config.quantizer == "bnb":
            settings = dict(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=self.dtype)
            how = dict(quantization_config=BitsAndBytesConfig(load_in_4bit=True, **settings))
        source = resolve_model(config.source)
        base = AutoModelForCausalLM.from_pretrained(source, dtype=self.dtype, device_map={"": self.device}, **how)
        base.config.use_cache = False
        paths = sorted({name.rpartition(".lora_")[0] for name in start})
        settings = dict(r=config.lora_rank, lora_alpha=config.lora_alpha, use_dora=config.method == "dora")
        model = get_peft_model(base, LoraConfig(target_modules=paths, task_type="CAUSAL_LM", **settings))
        pairs = {f"base_model.model.{n}": t for n, t in start.items() if "magnitude" not in n}
        set_peft_model_state_dict(model, pairs)
        if config.use_gradient_checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(self.dtype)
        return model

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids).logits


class Torchtune(_Other):
    """torchtune's Llama with its LoRA or DoRA, and torchao's NF4."""

    name, package = "torchtune", "torchtune"
    PLACES: ClassVar = {"self_attn.": "attn.", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3", "model.": ""}

    def build(self, config: TrainConfig, start: Start) -> nn.Module:
        from torchtune.models.convert_weights import hf_to_tune
        from torchtune.models.llama3 import lora_llama3
        from torchtune.modules import TransformerSelfAttentionLayer
        from torchtune.modules.peft import set_trainable_params
        from torchtune.training import set_activation_checkpointing

        shape = read_model_config(config.source, task=CAUSAL_LM)
        heads = dict(num_heads=shape.num_attention_heads, num_kv_heads=shape.num_key_value_heads)
        with self.device:
            model = lora_llama3(
                lora_attn_modules=["q_proj", "k_proj", "v_proj"],
                apply_lora_to_mlp=True,
                vocab_size=shape.vocab_size,
                num_layers=shape.num_hidden_layers,
                embed_dim=shape.hidden_size,
                intermediate_dim=shape.intermediate_size,
                max_seq_len=shape.max_position_embeddings,
                norm_eps=shape.rms_norm_eps,
                rope_base=int(shape.rope_parameters["rope_theta"]),
                lora_rank=config.lora_rank,
                lora_alpha=config.lora_alpha,
                use_dora=config.method == "dora",
                quantize_base=config.quantizer == "bnb",
                **heads,
            ).to(self.dtype)
        reader = CheckpointReader(Path(resolve_model(config.source)))
        stored = {name: reader.tensor(name).to(self.dtype) for name in reader.names()}
        stored.setdefault("lm_head.weight", stored["model.embed_tokens.weight"])
        weights = hf_to_tune(stored, dim=shape.hidden_size, head_dim=shape.head_dim, **heads)
        # q and k are turned for torchtune's order of rotary pairs; B is zero at the start, so A alone is taken over
        weights |= {self._place(name): t.to(self.dtype) for name, t in start.items() if "lora_A" in name}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or any("lora_b" not in name and "magnitude" not in name for name in missing):
            raise UserError(f"{config.source}: torchtune has no place for {(unexpected or missing)[0]}")
        for module in model.modules():
            if hasattr(module, "initialize_dora_magnitude"):
                module.initialize_dora_magnitude()
        trained = {name for name, _ in model.named_parameters() if "lora_" in name or "magnitude" in name}
        set_trainable_params(model, trained)
        if config.use_gradient_checkpointing:
            set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
        return model

    def _place(self, name: str) -> str:
        for ours, theirs in self.PLACES.items():
            name = name.replace(ours, theirs)
        return name.replace("lora_A", "lora_a")

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids)


IMPLEMENTATIONS = (Ours, Peft, Torchtune)


def measured(implementation, config: TrainConfig, start, batches: list[Batch], *, device: torch.device) -> dict:
    """Loss of every step, tokens per second and peak GiB (None on a CPU); and the start of ours."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run = implementation(config, start, device=device)
    losses, speeds = [], []
    for batch in batches:
        synchronize(device)
        begun = time.perf_counter()
        losses.append(run.step(batch))
        synchronize(device)
        speeds.append(tokens_in(batch) / (time.perf_counter() - begun))
    timed = sorted(speeds[WARM_UP:] or speeds)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    found = dict(losses=losses, tokens_s=timed[len(timed) // 2], peak_gib=peak, start=getattr(run, "start", None))
    del run
    gc.collect()
    torch.cuda.empty_cache()
    return found


def compared(config: TrainConfig, *, steps: int, device: torch.device) -> list[dict]:
    """One row for each implementation that is installed; ours is the first, and gives the others their start."""
    tokenizer = read_tokenizer(config.source)
    model_config = read_model_config(config.source, task=CAUSAL_LM)
    data = prepare_data(config, tokenizer, model_config, task=CAUSAL_LM)
    batches = [batch for (batch,) in make_batches(config, data, tokenizer, model_config, task=CAUSAL_LM).first(steps)]
    rows, start = [], None
    for implementation in IMPLEMENTATIONS:
        row = dict(implementation=implementation.name)
        if find_spec(implementation.package) is None:
            rows.append(row | dict(failed=f"{implementation.package} is not installed"))
            continue
        try:
            found = measured(implementation, config, start, batches, device=device)
        except (AssertionError, AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
            if start is None:
                raise
            rows.append(row | dict(failed=first_line(error)))
            continue
        start = start or found["start"]
        rows.append(row | {name: value for name, value in found.items() if name != "start"})
    return rows


def table(rows: list[dict]) -> str:
    """Markdown; `apart`: the largest difference of a step's loss from ours."""
    lines = ["| implementation | first loss | mean of the last 10 | apart | tokens/s | peak GiB |", "|---" * 6 + "|"]
    ours = rows[0]["losses"]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['implementation']} | {row['failed']} | | | | |")
            continue
        losses = row["losses"]
        apart = max(abs(a - b) for a, b in zip(losses, ours, strict=True))
        last, peak = sum(losses[-10:]) / len(losses[-10:]), "–" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
        figures = f"{losses[0]:.4f} | {last:.4f} | {apart:.1e} | {row['tokens_s']:,.0f} | {peak}"
        lines.append(f"| {row['implementation']} | {figures} |")
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="folder of a Llama, or demo")
    parser.add_argument("--data", default="demo")
    types = ("custom_lora", "custom_qlora", "dora", "bnb_dora")
    parser.add_argument("--train_type", default="custom_qlora", choices=types)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--extra", default="", help="flags of train.py: batch_size=4,context_length=1024")
    parser.add_argument("--json")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    given = dict(model_name=args.model, dataset=args.data, train_type=args.train_type, lora_dropout=0, lr=1e-4)
    given |= dict(use_cpu_offload=False, stochastic_rounding=False, batch_size=4, wd=0)
    given |= dict(part.split("=", 1) for part in args.extra.split(",") if part)
    config = parse(TrainConfig, [f"--{name}={value}" for name, value in given.items()], prog="implementations.py")
    device = pick_device(config.device)
    processes.start(device, alone=True)
    rows = compared(config, steps=args.steps, device=device)
    say(table(rows))
    write_results(args.json, [vars(args) | row for row in rows])


if __name__ == "__main__":
    processes.run(main, parse_arguments())
