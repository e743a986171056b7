"""Fine-tune a causal language model that is too big for your GPUs.

    torchrun --nproc_per_node 2 train.py --model_name demo --dataset demo --train_type bnb_dora --save_model true
    python train.py --help

Every flag is declared in fsdp_utils/config.py, every train type in methods/__init__.py.
"""

from fsdp_utils.config import TrainConfig
from fsdp_utils.core.flags import as_dict, parse_or_fail

if __name__ == "__main__":  # before the libraries, which take seconds: --help and a wrong flag are answered at once
    CONFIG = parse_or_fail(TrainConfig, prog="train.py", description=__doc__)

from contextlib import nullcontext

import torch

from fsdp_utils.core import devices, processes
from fsdp_utils.core.errors import Diverged, UserError, naming
from fsdp_utils.core.ranks import rank, say, world_size
from fsdp_utils.data.batches import Batches
from fsdp_utils.data.tokens import TokenizedData, prepare_dataset
from fsdp_utils.folders import saving
from fsdp_utils.memory.budget import out_of_memory
from fsdp_utils.model.assemble import cannot_compile, compiler, load, plan, size_report
from fsdp_utils.model.build import read_model_config, read_tokenizer
from fsdp_utils.sharding.mesh import mesh_for
from fsdp_utils.training import metrics
from fsdp_utils.training.loss import check_packing
from fsdp_utils.training.optim import schedule_factor
from fsdp_utils.training.step import TrainStep
from fsdp_utils.training.task import CAUSAL_LM


def main(config: TrainConfig) -> None:
    """The story of a run up to the first weight that is read: every check comes before."""
    device = devices.pick_device(config.device)
    saving.check_output(config)
    metrics.check_sink(config)
    processes.start(device, alone=config.use_cpu_offload)
    for note in config.notes():
        say(f"note: {note}")
    if config.verbose:
        say(as_dict(config))
    torch.manual_seed(config.seed + rank())  # dropout differs between processes, as between samples
    task = CAUSAL_LM
    with naming("--llama_pro_path" if config.llama_pro_path else "--model_name"):
        model_config = read_model_config(config.source, task=task)
        tokenizer = read_tokenizer(config.source)
    data = prepare_data(config, tokenizer, model_config)
    say(data.report)
    batches = make_batches(config, data, tokenizer, task=task)
    batches.check()
    planned = plan(config, task=task, device=device)
    mesh = mesh_for(config, device)
    with saving.begun(planned, config):
        carry_out(planned, batches, tokenizer, config, mesh=mesh, device=device)


def carry_out(planned, batches: Batches, tokenizer, config, *, mesh, device) -> None:
    """Loads what was planned, trains and saves it."""
    prepared = load(planned, config, mesh=mesh, device=device, compile_block=compiler(config, device))
    say(*size_report(prepared.model, planned.quantizer), sep="\n")
    if prepared.host_activations:
        say(f"activations: about {prepared.host_activations / devices.GIB:.1f} GiB of host memory in each process")
    if config.verbose:
        say(prepared.model)
    try:
        if config.packing:
            check_packing(prepared.model, device=device, autocast=prepared.autocast)
        train(prepared, batches, config, task=planned.task)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(prepared, config, error) from None
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise cannot_compile(error) from None
    if config.save_model:
        saving.save(prepared.model, tokenizer, planned, config)
        say(f"saved to {config.output_dir}")
    prepared.close()


def train(prepared, batches: Batches, config, *, task) -> None:
    """The loop: one optimizer step after another, metrics after each."""
    total = config.max_steps if config.max_steps > 0 else sum(map(batches.count, range(config.num_epochs)))
    say(batch_arithmetic(batches, steps=total))
    step = TrainStep(prepared, config, task=task)
    logger = metrics.make_logger(config, total=total)
    clock = metrics.Clock(prepared.device)
    stepped = False
    with metrics.make_profiler(config, prepared.device) or nullcontext() as profiler:
        for number, micro_batches in enumerate(step.batches(batches).first(total)):
            clock.begin()
            factor = schedule_factor(config.lr_scheduler, number, total=total, warmup_ratio=config.lr_warmup_ratio)
            result = step(micro_batches, lr=config.lr * factor)
            stepped = stepped or result.stepped
            logger.log(
                dict(
                    step=number + 1,
                    loss=result.loss,
                    lr=config.lr * factor,
                    grad_norm=result.grad_norm,
                    tokens=result.tokens,
                    tokens_per_s=clock.step(sum(b["input_ids"].numel() for b in micro_batches) * world_size()),
                    memory_gib=devices.peak_memory_gib(prepared.device),
                    **(devices.memory_now(prepared.device) if config.profile_memory else {}),
                )
            )
            if profiler:
                profiler.step()
    logger.close()
    step.close()
    if not stepped:
        raise Diverged(f"all {total} steps overflowed in fp16 and were skipped; use --precision bf16 or fp32")
    mean, peak = clock.mean(), devices.peak_memory_gib(prepared.device)
    say(f"tokens/s: {mean:.0f} ({mean / world_size():.0f} per process), peak {peak:.2f} GiB")


def prepare_data(config, tokenizer, model_config) -> TokenizedData:
    """The tokenized training set; every process returns the same one.

    Raises:
        UserError: bad data, or token ids that the embedding has no row for.
    """
    tokenized = prepare_dataset(config, tokenizer)
    rows = model_config.get_text_config().vocab_size
    if tokenized.report.max_token_id >= rows:
        raise UserError(
            f"--model_name {config.source}: the tokenizer yields id {tokenized.report.max_token_id}, but the "
            f"vocabulary of the embedding has {rows} rows; use the model's own tokenizer or resize the embedding"
        )
    return tokenized


def make_batches(config, data: TokenizedData, tokenizer, *, task) -> Batches:
    """How this process's micro-batches are made."""
    # padding is told by its place: any id does that the embedding has, and a tokenizer's own may lie beyond it
    pad = min(tokenizer.pad_token_id or 0, data.report.max_token_id)
    return Batches.of(config, data, collate=task.collate, rank=rank(), world_size=world_size(), pad_token_id=pad)


def batch_arithmetic(batches: Batches, *, steps: int) -> str:
    """How samples become optimizer steps, in one line."""
    return (
        f"global batch: {batches.batch_size} rows x {batches.world_size} processes x {batches.accumulation} "
        f"accumulation = {batches.rows_per_step} {'packs' if batches.packing else 'samples'}; "
        f"{len(batches.data)} samples, {steps} steps"
    )


if __name__ == "__main__":
    processes.launch(main, CONFIG)
