"""Fine-tune a language model that is too big for your GPUs.

    torchrun --nproc_per_node 2 train.py --model_name demo --dataset demo --train_type bnb_dora --save_model true
    python train.py --help

Every flag is declared in fsdp_utils/config.py, every train type in methods/__init__.py.
"""

from fsdp_utils.config import TrainConfig
from fsdp_utils.core.flags import as_dict, parse_or_fail

if __name__ == "__main__":  # before the libraries, which take seconds: --help and a wrong flag are answered at once
    CONFIG = parse_or_fail(TrainConfig, prog="train.py", description=__doc__)

from contextlib import nullcontext
from pathlib import Path

import torch

from fsdp_utils.core import devices, processes
from fsdp_utils.core.errors import Diverged, naming
from fsdp_utils.core.ranks import rank, say, world_size
from fsdp_utils.data.batches import accumulation_for
from fsdp_utils.data.chats import give_template
from fsdp_utils.data.layouts import Reading
from fsdp_utils.data.prepare import hold_out, make_batches, prepare_data
from fsdp_utils.data.show import in_colour, shown
from fsdp_utils.folders import checkpoints, saving
from fsdp_utils.folders.describe import going_on
from fsdp_utils.folders.opening import closing, opening
from fsdp_utils.folders.session import Session
from fsdp_utils.folders.upload import check_upload, upload
from fsdp_utils.memory.budget import out_of_memory
from fsdp_utils.model.assemble import load, plan
from fsdp_utils.model.build import read_model_config, read_tokenizer, refuse_missing_expansion
from fsdp_utils.model.compiling import cannot_compile, compiler
from fsdp_utils.model.prequantized import check_flags
from fsdp_utils.planning import report as planning
from fsdp_utils.planning.machines import machine_of
from fsdp_utils.report import page as report
from fsdp_utils.sharding.mesh import mesh_for
from fsdp_utils.tasks import task_for
from fsdp_utils.training import checks, metrics
from fsdp_utils.training.clock import Clock
from fsdp_utils.training.flops import meter_of
from fsdp_utils.training.optim import schedule_factor
from fsdp_utils.training.step import TrainStep
from fsdp_utils.training.stopping import Stopping
from fsdp_utils.training.validation import Validation


def main(config: TrainConfig) -> None:
    """A run: from here on a signal ends it in good order."""
    with Stopping(config) as stopping:
        tell(config, stopping)


def tell(config: TrainConfig, stopping: Stopping) -> None:
    """The story of a run up to the first weight that is read: every check comes before."""
    device = devices.pick_device(config.device)
    if config.deterministic:
        devices.repeat_exactly()
    refuse_missing_expansion(config.llama_pro_path)
    looks = config.plan or config.show_rows
    if not looks:  # which logs nothing
        metrics.check_sink(config)
        check_upload(config.push_to_hub)
    processes.start(device, alone=config.use_cpu_offload)
    if looks:
        return look(config, device)
    if config.resume == "auto" and processes.from_main(lambda: saving.has_ended(config)):
        say(f"{config.output_dir}: this run has ended; nothing is left to do")
        return
    checkpoint = checkpoints.find(config)
    goes_on = checkpoints.is_own(checkpoint, config)
    saving.check_output(config, resumes=goes_on)
    for note in (*config.notes(), *saving.replaced(config, resumes=goes_on)):
        say(f"note: {note}")
    if config.verbose:
        say(as_dict(config))
    torch.manual_seed(config.seed + rank())  # dropout differs between processes, as between samples
    task, model_config, tokenizer, data = read_inputs(config)
    data, held_out = hold_out(config, data, tokenizer, model_config, task=task)
    split_global_batch(config, checkpoint)
    for note in saving.other_batch(config) if not checkpoint else ():
        say(note)
    batches = make_batches(config, data, tokenizer, model_config, task=task)
    batches.check()
    validation = Validation(config, batches, held_out) if held_out else None
    planned = plan(config, task=task, device=device)
    begins = dict(stopping=stopping, checkpoint=checkpoint, validation=validation)
    session = Session(config, planned, tokenizer, batches, **begins)
    mesh = mesh_for(config, device)
    with report.at_end(config), session.begun():  # a page is of a run whose end is known
        carry_out(session, mesh=mesh, device=device)
    upload(Path(config.output_dir), config.push_to_hub)


def read_inputs(config: TrainConfig):
    """What the model is for, its configuration, its tokenizer, and the samples to train on."""
    with naming("--llama_pro_path" if config.llama_pro_path else "--model_name"):
        task, said = task_for(config)
        trusted = dict(trust_remote_code=config.trust_remote_code)
        model_config = read_model_config(config.source, task=task, **trusted)
        tokenizer = read_tokenizer(config.source, **trusted)
    check_flags(config, model_config)
    if said:
        say(said)
    config.task = task.name
    task.check(config, model_config)
    task = going_on(task, config.init_adapter)
    give_template(tokenizer, config.chat_template)
    data = prepare_data(config, tokenizer, model_config, task=task)
    config.longest_sample = int(max(data.lengths, default=0))
    task = task.given(data.labels, tokenizer, model_config)
    config.prompt_template = Reading.of(config).template  # its text: the file may be another when the result is saved
    tokenizer.learned_ends = data.report.ends  # saved with the result: servers are to stop there
    say(data.report)
    return task, model_config, tokenizer, data


def look(config: TrainConfig, device) -> None:
    """Instead of a run: what one would take, from the configuration alone (--plan), or samples as the model sees them
    (--show_rows)."""
    for note in config.notes():
        say(f"note: {note}")
    if config.plan:
        return say(*planning.lines(config, machine_of(config.plan_gpus, device=device)), sep="\n")
    task, _, tokenizer, data = read_inputs(config)
    say(shown(data, tokenizer, as_learned=task.shown, count=config.show_rows, colour=in_colour()))


def carry_out(session: Session, *, mesh, device) -> None:
    """Loads what was planned, trains and saves it."""
    config, planned = session.config, session.planned
    data = session.batches.data
    prepared = load(planned, config, mesh=mesh, device=device, compile_block=compiler(config, device), data=data)
    if config.verbose:
        say(prepared.model)
    try:
        checks.try_out(prepared, config)
        train(prepared, session)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(prepared, config, error) from None
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise cannot_compile(error) from None
    if config.save_model:
        saving.save(prepared.model, session.tokenizer, planned, config)
        say(f"saved to {config.output_dir}")
    prepared.close()


def train(prepared, session: Session) -> None:
    """The loop: one optimizer step after another, metrics after each."""
    config, task, total = session.config, session.planned.task, session.total_steps
    say(*opening(session, prepared), sep="\n")
    step = TrainStep(prepared, config, task=task)
    start = session.begin(step)
    logger = metrics.make_logger(config, total=total, start=start, run_ids=session.run_ids)
    session.run_ids = logger.run_ids
    clock = Clock(prepared.device, steps=total - start, meter=meter_of(prepared, config, task=task))
    logged = dict(device=prepared.device, profile_memory=config.profile_memory)
    stepped = start > 0
    with metrics.make_profiler(config, prepared.device) or nullcontext() as profiler:
        batches = step.batches(session.batches).first(total, start=start)
        for number, micro_batches in enumerate(clock.timed(batches), start + 1):
            factor = schedule_factor(config.lr_scheduler, number - 1, total=total, warmup_ratio=config.lr_warmup_ratio)
            lr = config.lr * factor
            with session.explaining(number, lr=lr):
                result = step(micro_batches, lr=lr, votes=session.votes())
            stepped = stepped or result.stepped
            timed = clock.step(micro_batches, compiled=result.compiled)
            logger.log(metrics.row_of(number, result, lr=lr, timed=timed, **logged))
            if profiler:
                profiler.step()
            if session.after(number, result.votes, logger=logger):
                break
    logger.close()
    step.close()
    session.end()
    if not stepped:
        raise Diverged(f"all {total} steps overflowed in fp16 and were skipped; use --precision bf16 or fp32")
    say(*closing(prepared, clock), sep="\n")


def split_global_batch(config, checkpoint) -> None:
    """Sets the accumulation from --global_batch_size, or so that a resumed run has the rows a step that it had."""
    rows, named = config.global_batch_size, "--global_batch_size"
    if checkpoint and rows < 1:
        rows, named = checkpoints.read_state(checkpoint)["rows_per_step"], f"--resume {checkpoint}"
    if rows > 0:
        config.gradient_accumulation_steps = accumulation_for(rows, config, processes=world_size(), named=named)


if __name__ == "__main__":
    processes.launch(main, CONFIG)
