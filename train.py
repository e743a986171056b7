"""Fine-tune a causal language model that is too big for your GPUs.

    torchrun --nproc_per_node 2 train.py --model_name demo --dataset demo --train_type bnb_dora --save_model true
    python train.py --help

Every flag is declared in fsdp_utils/config.py, every train type in methods/__init__.py.
"""

import itertools
import math
from contextlib import nullcontext

import torch

from fsdp_utils.config import TrainConfig
from fsdp_utils.core import processes
from fsdp_utils.core.errors import Diverged, UserError, naming
from fsdp_utils.core.flags import as_dict
from fsdp_utils.core.processes import say, world_size
from fsdp_utils.data.batches import epoch_steps, steps_per_epoch
from fsdp_utils.data.tokens import TokenizedData, check_global_batch, prepare_dataset
from fsdp_utils.folders import saving
from fsdp_utils.memory.budget import breakdown, host_activations, out_of_memory
from fsdp_utils.model.assemble import PRECISIONS, cannot_compile, compiler, load, plan, size_report
from fsdp_utils.model.build import read_model_config, read_tokenizer
from fsdp_utils.sharding import fsdp
from fsdp_utils.training import metrics
from fsdp_utils.training.loss import check_packing, label_tokens, with_targets
from fsdp_utils.training.optim import LocalParameters, LossScaler, clip_, global_norm, make_optimizer, schedule_factor
from fsdp_utils.training.step import micro_step


def prepare_data(config, tokenizer, model_config) -> TokenizedData:
    """The tokenized training set; every rank returns the same one.

    Raises:
        UserError: too few samples for one global batch, or token ids that the embedding has no row for.
    """
    tokenized = prepare_dataset(config, tokenizer)
    check_global_batch(tokenized, config, world_size=world_size())
    rows = model_config.get_text_config().vocab_size
    if tokenized.report.max_token_id >= rows:
        raise UserError(
            f"--model_name {config.source}: the tokenizer yields id {tokenized.report.max_token_id}, but the "
            f"vocabulary of the embedding has {rows} rows; use the model's own tokenizer or resize the embedding"
        )
    return tokenized


def batch_arithmetic(config, tokenized, *, steps: int) -> str:
    """How samples become optimizer steps, in one line."""
    rows = config.batch_size * config.gradient_accumulation_steps * world_size()
    return (
        f"global batch: {config.batch_size} rows x {world_size()} processes x {config.gradient_accumulation_steps} "
        f"accumulation = {rows} {'packs' if config.packing else 'samples'}; {len(tokenized)} samples, {steps} steps"
    )


def steps_of(config, tokenized, tokenizer, *, total: int, pad_to_multiple_of: int = 1):
    """Exactly `total` optimizer steps, epoch after epoch, each a list of this process's micro-batches."""
    # padding is told by its place: any id does that the embedding has, and a tokenizer's own may lie beyond it
    pad = min(tokenizer.pad_token_id or 0, tokenized.report.max_token_id)

    def endless():
        for epoch in itertools.count():
            yield from epoch_steps(
                tokenized,
                batch_size=config.batch_size,
                gradient_accumulation_steps=config.gradient_accumulation_steps,
                rank=processes.rank(),
                world_size=world_size(),
                seed=config.seed,
                epoch=epoch,
                pad_token_id=pad,
                context_length=config.context_length,
                packing=config.packing,
                pad_to_multiple_of=pad_to_multiple_of,
            )

    return itertools.islice(endless(), total)


def steps_of_epochs(config, tokenized) -> int:
    """Optimizer steps of --num_epochs; with packing, epochs may differ by a step."""
    batch = {name: getattr(config, name) for name in ("batch_size", "gradient_accumulation_steps")}
    rows = {name: getattr(config, name) for name in ("packing", "context_length", "seed")}
    return sum(
        steps_per_epoch(tokenized, **batch, **rows, world_size=world_size(), epoch=epoch)
        for epoch in range(config.num_epochs)
    )


def backward(model, run, micro_batches, config, *, device, scale: float) -> tuple[torch.Tensor, int]:
    """Gradients of one optimizer step, by a MicroStep. Returns the summed loss of this process's micro-batches, fp32
    scalar, and the label tokens of the global batch."""
    tokens = int(processes.all_reduce(sum(label_tokens(batch) for batch in micro_batches), device))
    total = torch.zeros((), device=device)
    for i, batch in enumerate(micro_batches, 1):
        fsdp.prepare_backward(model, last=i == len(micro_batches), no_sync=config.no_sync)
        # gradient = d/dp (sum over ranks and micro-batches of loss_sum) / tokens; FSDP2 divides by world_size
        batch = with_targets(batch, multiple=run.targets_multiple)
        total += run(batch, scale * world_size() / max(tokens, 1))
    return total, tokens


def mean_loss(total: torch.Tensor, tokens: int) -> float:
    """Loss per token of the global batch, from what `backward` returned; waits for the GPU."""
    return processes.all_reduce(total.item(), total.device) / max(tokens, 1)


def train(model, method, tokenized, tokenizer, config, *, mesh, device) -> None:
    """The loop: one pass over `micro_batches` per optimizer step, metrics after each."""
    total = config.max_steps if config.max_steps > 0 else steps_of_epochs(config, tokenized)
    say(batch_arithmetic(config, tokenized, steps=total))
    run = micro_step(model, config, mesh=mesh, device=device)
    fsdp.leave_sharded(model)  # check_packing's forward pass may have left it whole
    trained = LocalParameters(model, keep_gradients=run.graphs)
    optimizer = make_optimizer(config, trained)
    scaler = LossScaler(config.precision == "fp16_autocast")
    group = processes.shard_group(mesh) if mesh is not None else None
    logger = metrics.make_logger(config, total=total)
    clock = metrics.Clock(device)
    multiple = 64 if device.type == "cuda" else 1  # compiled blocks and matrix units like few, even shapes
    steps = steps_of(config, tokenized, tokenizer, total=total, pad_to_multiple_of=multiple)
    model.train()
    stepped = False
    with metrics.make_profiler(config, device) or nullcontext() as profiler:
        for step, micro_batches in enumerate(steps):
            clock.begin()
            loss_sum, tokens = backward(model, run, micro_batches, config, device=device, scale=scaler.scale)
            gradients = trained.collect_gradients()
            scaler.unscale_(gradients)
            norm = global_norm(gradients, group=group, device=device)
            finite = not scaler.enabled or bool(norm.isfinite())  # only fp16 waits for the GPU before it steps
            lr = config.lr * schedule_factor(
                config.lr_scheduler, step, total=total, warmup_ratio=config.lr_warmup_ratio
            )
            if finite:
                if config.apply_gradient_clipping:
                    clip_(gradients, norm, config.grad_norm)
                for param_group in optimizer.param_groups:
                    param_group["lr"] = lr
                optimizer.step()
                method.after_step(model, device=device)
                stepped = True
            fsdp.gather_ahead(model)
            loss, norm = mean_loss(loss_sum, tokens), norm.item()
            # too large a scale overflows gradients, never the loss
            if not math.isfinite(loss) or not (scaler.can_shrink or math.isfinite(norm)):
                raise Diverged(f"step {step + 1}: loss {loss}, gradient norm {norm}; lower --lr or check the data")
            scaler.update(finite)
            trained.zero_grad()
            logger.log(
                dict(
                    step=step + 1,
                    loss=loss,
                    lr=lr,
                    grad_norm=norm,
                    tokens=tokens,
                    tokens_per_s=clock.step(sum(b["input_ids"].numel() for b in micro_batches) * world_size()),
                    memory_gib=metrics.peak_memory_gib(device),
                    **(metrics.memory_now(device) if config.profile_memory else {}),
                )
            )
            if profiler:
                profiler.step()
    logger.close()
    fsdp.leave_sharded(model)
    if not stepped:
        raise Diverged(f"all {total} steps overflowed in fp16 and were skipped; use --precision bf16 or fp32")
    mean, peak = clock.mean(), metrics.peak_memory_gib(device)
    say(f"tokens/s: {mean:.0f} ({mean / world_size():.0f} per process), peak {peak:.2f} GiB")


def main(config: TrainConfig) -> None:
    """The story of a run up to the first weight that is read: every check comes before."""
    device = processes.pick_device(config.device)
    saving.check_output(config)
    metrics.check_sink(config)
    processes.start(device, alone=config.use_cpu_offload)
    for note in config.notes():
        say(f"note: {note}")
    if config.verbose:
        say(as_dict(config))
    torch.manual_seed(config.seed + processes.rank())  # dropout differs between processes, as between samples
    with naming("--llama_pro_path" if config.llama_pro_path else "--model_name"):
        model_config = read_model_config(config.source)
        tokenizer = read_tokenizer(config.source)
    tokenized = prepare_data(config, tokenizer, model_config)
    say(tokenized.report)
    planned = plan(config, device=device)
    mesh = processes.mesh_for(config, device)
    with saving.begun(planned, config):
        carry_out(planned, tokenized, tokenizer, config, mesh=mesh, device=device)


def carry_out(planned, tokenized, tokenizer, config, *, mesh, device) -> None:
    """Loads what was planned, trains and saves it."""
    model = load(planned, config, mesh=mesh, device=device, compile_block=compiler(config, device))
    say(*size_report(model, planned.quantizer), sep="\n")
    if config.use_activation_cpu_offload and device.type == "cuda":
        say(f"activations: about {host_activations(model, config):.1f} GiB of host memory in each process")
    if config.verbose:
        say(model)
    sizes = breakdown(model, config)
    try:
        if config.packing:
            check_packing(model, device=device, autocast=PRECISIONS[config.precision][1])
        train(model, planned.method, tokenized, tokenizer, config, mesh=mesh, device=device)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(sizes, config, error, together=model.trained_together) from None
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise cannot_compile(error) from None
    if config.save_model:
        saving.save(model, tokenizer, planned.method, config)
        say(f"saved to {config.output_dir}")


def cli() -> None:
    """What a shell starts."""
    processes.launch(main, processes.parse_or_fail(TrainConfig, prog="train.py", description=__doc__))


if __name__ == "__main__":
    cli()
