"""What the benchmarks share: model shapes, the floor, one measured run, tables."""

import gc
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.distributed import ReduceOp
from transformers import LlamaConfig

from fsdp_utils.config import TrainConfig
from fsdp_utils.core import processes
from fsdp_utils.core.devices import pick_device, synchronize
from fsdp_utils.core.flags import parse
from fsdp_utils.core.ranks import is_main
from fsdp_utils.data.batches import with_targets
from fsdp_utils.data.parts import Part
from fsdp_utils.model.assemble import load, plan
from fsdp_utils.model.compiling import compiler
from fsdp_utils.sharding.mesh import mesh_for
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from fsdp_utils.training.step import TrainStep

SHAPES = {
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=1024),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256),
    "70b": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                num_key_value_heads=8, vocab_size=128256),
    "405b": dict(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
                 num_key_value_heads=8, vocab_size=128256),
}  # fmt: skip


def write_config(shape: str, folder: str | Path, **more) -> Path:
    """A folder with only the configuration of a Llama of that shape; weights are dummies."""
    settings = {**SHAPES[shape], "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, **more}
    config = LlamaConfig(**settings, max_position_embeddings=131072, tie_word_embeddings=False, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return Path(folder)


def make_config(folder, **flags) -> TrainConfig:
    """A run's settings with what the benchmarks have in common."""
    if "llama_pro" in flags.get("train_type", ""):
        (Path(folder) / "expanded_layers.json").write_text('{"expanded_layers": [1]}')
        flags["llama_pro_path"] = folder
    common = dict(
        model_name=folder,
        load_format="dummy",
        lora_dropout=0.0,
        use_cpu_offload=False,
        optimizer="fused_adamw",
        lora_rank=64,
    )
    return parse(TrainConfig, [f"--{k}={v}" for k, v in {**common, **flags}.items()], prog="benchmark")


def seconds(fn, *, device: torch.device, repeat: int = 10, warmup: int = 3, at_least: float = 0.0) -> float:
    """Mean wall time of `fn` on the device, over `repeat` calls and as many more as `at_least` seconds take."""
    for _ in range(warmup):
        fn()
    synchronize(device)
    calls, start = 0, time.perf_counter()
    while not calls or time.perf_counter() - start < at_least:
        for _ in range(repeat):
            fn()
        synchronize(device)
        calls += repeat
    return (time.perf_counter() - start) / calls


def floor_seconds(
    shape: str, *, batch: int, length: int, checkpointing: bool, device: torch.device, at_least: float = 0.0
) -> float:
    """Seconds of one step's work on the device that no implementation avoids: the frozen model's matrix products
    (forward, again when recomputed, gradient of the input), attention and the head, each timed alone.

    Args:
        at_least: seconds that each is kept up. A GPU that was idle takes a few tenths of a second to come down to the
            clock rate that its power allows, and a step is never that short of rest.
    """
    s = SHAPES[shape]
    hidden, mlp, tokens = s["hidden_size"], s["intermediate_size"], batch * length
    heads, kv = s["num_attention_heads"], s["num_key_value_heads"]
    size = hidden // heads
    new = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)
    shapes = [(hidden, hidden), (kv * size, hidden), (kv * size, hidden), (hidden, hidden)]
    shapes += [(mlp, hidden), (mlp, hidden), (hidden, mlp)]
    weights = [new(*shape) for shape in shapes]
    inputs = {width: new(tokens, width) for width in (hidden, mlp)}
    grads = {width: new(tokens, width) for width in (hidden, kv * size, mlp)}
    forwards = 2 if checkpointing else 1

    def linears():
        for _ in range(forwards):
            for w in weights:
                inputs[w.shape[1]] @ w.T
        for w in weights:
            grads[w.shape[0]] @ w

    q, k, v = (new(batch, n, length, size).requires_grad_() for n in (heads, kv, kv))

    def attention():
        for _ in range(forwards):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out.backward(out.detach())

    states, head = new(tokens, hidden), new(s["vocab_size"], hidden)
    timed = partial(seconds, device=device, at_least=at_least)
    return s["num_hidden_layers"] * (timed(linears) + timed(attention)) + timed(lambda: (states @ head.T) @ head)


def median_step(
    step: Callable[[int, int], None], *, batch: int, length: int, device: torch.device, steps: int, warmup: int
) -> dict:
    """Median seconds of `step(batch, length)` after `warmup` steps, in the slowest process, and its tokens per second;
    peak GiB of all steps on a GPU (None on a CPU); the first step's seconds separately."""
    on_gpu, times = device.type == "cuda", []
    if on_gpu:  # before warm-up: what a CUDA graph holds is only counted when it is captured
        torch.cuda.reset_peak_memory_stats()
    for _ in range(warmup + steps):
        synchronize(device)
        start = time.perf_counter()
        step(batch, length)
        synchronize(device)
        times.append(time.perf_counter() - start)
    median = processes.all_reduce(sorted(times[warmup:])[steps // 2], device, op=ReduceOp.MAX)
    return dict(
        step_s=round(median, 4),
        tokens_s=round(batch * length / median),
        peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        first_step_s=round(times[0], 1),
    )


def random_batch(vocabulary: int, batch: int, length: int) -> dict[str, torch.Tensor]:
    """A micro-batch of random tokens, all but each row's first in the loss."""
    ids = torch.randint(0, vocabulary, (batch, length))
    return dict(input_ids=ids, labels=ids)


class Run:
    """A prepared model that takes optimizer steps; sharded over the processes, or whole in each."""

    def __init__(self, config, *, alone: bool = False):
        self.config = config
        self.device = pick_device(config.device)
        processes.start(self.device, alone=config.use_cpu_offload)
        mesh = None if alone else mesh_for(config, self.device)
        self.plan = plan(config, task=CAUSAL_LM, device=self.device)
        start = time.perf_counter()
        compile_block = compiler(config, self.device)
        self.prepared = load(self.plan, config, mesh=mesh, device=self.device, compile_block=compile_block)
        self.load_s = time.perf_counter() - start
        self.model = self.prepared.model
        self.train_step = TrainStep(self.prepared, config, task=CAUSAL_LM)
        shares = config.context_parallel > 1
        self.part = Part.of_rows(config, self.model.config) if shares else lambda batch: batch

    def step(self, batch: int, length: int) -> None:
        """One optimizer step on micro-batches of `batch` rows of `length` random tokens, all of them in the loss, or on
        this process's part of such rows."""
        multiple = self.train_step.micro_step.targets_multiple
        batches = lambda: with_targets(random_batch(self.model.config.vocab_size, batch, length), multiple=multiple)
        accumulation = range(self.config.gradient_accumulation_steps)
        self.train_step([self.part(batches()) for _ in accumulation], lr=self.config.lr)

    def step_on(self, batch: dict[str, torch.Tensor]) -> None:
        """One optimizer step on a micro-batch of the data pipeline."""
        self.train_step([batch], lr=self.config.lr)

    def measure(self, batch: int, length: int, *, steps: int = 6, warmup: int = 3) -> dict:
        """What `median_step` says of this run, of this process's tokens, and the seconds that loading took."""
        timed = median_step(self.step, batch=batch, length=length, device=self.device, steps=steps, warmup=warmup)
        timed["tokens_s"] *= self.config.gradient_accumulation_steps
        timed["tokens_s"] //= self.config.context_parallel
        return dict(**timed, load_s=round(self.load_s, 1))

    def close(self) -> None:
        """Gives the memory back."""
        self.train_step.close()
        self.prepared.close()
        self.__dict__.clear()
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def write_results(path: str | None, rows: list[dict]) -> None:
    """Appends the rows to a JSON-lines file."""
    if path and is_main():
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
