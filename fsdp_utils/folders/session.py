"""A run between its start and its end: where it begins, what it keeps on the way, when it stops."""

from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

from fsdp_utils.core.errors import Diverged, Ended, UserError, naming
from fsdp_utils.core.folders import write_json
from fsdp_utils.core.processes import barrier, from_main
from fsdp_utils.core.ranks import is_main, say
from fsdp_utils.core.safetensors_io import CheckpointReader
from fsdp_utils.folders import checkpoints, saving
from fsdp_utils.folders.describe import adapter_tensors, check_adapter, describe
from fsdp_utils.folders.names import DIVERGED_FILE
from fsdp_utils.model.assemble import parameter_counts, round_again
from fsdp_utils.model.weights import fingerprint
from fsdp_utils.training.flops import device_name
from fsdp_utils.training.stopping import announce
from methods import CORRECTING
from methods.adapter import flags_of, scaling_factor

STOPPING_VOTES = 2  # of the votes of a step, those of `Stopping` come first


class Session:
    """What of a run outlives its process.

    Args:
        validation: a `Validation`, or None.
        checkpoint: the folder to go on from, or None.

    Raises:
        UserError: a checkpoint of another run, or an adapter that does not fit.
        Ended: the run had ended already.
    """

    def __init__(self, config, planned, tokenizer, batches, *, stopping, checkpoint: Path | None, validation):
        self.config, self.planned, self.tokenizer, self.batches = config, planned, tokenizer, batches
        self.stopping, self.checkpoint, self.validation = stopping, checkpoint, validation
        self.root = checkpoints.root_of(config)
        epochs = range(config.num_epochs)
        self.total_steps = config.max_steps if config.max_steps > 0 else sum(map(batches.count, epochs))
        self.state = checkpoints.read_state(checkpoint) if checkpoint else None
        self.run_ids = self.state.get("run_ids", {}) if checkpoint else {}  # older ones have none
        if checkpoint:
            self._go_on_validating()
            self._check_same()
        elif not config.save_model and not checkpoints.keeps_checkpoints(config):
            say("note: neither --save_model nor --save_every_steps is given, so no weights of this run will be kept")
        self.adapter = self._starting_adapter()

    # --- before a weight is read --------------------------------------------------------------------------------------

    def _check_same(self) -> None:
        found = from_main(lambda: checkpoints.differences(self.state, self.config, facts=self.facts))
        if found:
            raise UserError(f"--resume {self.checkpoint}: is of another run: {'; '.join(found)}")
        done, total = self.state["step"], self.total_steps
        if done > total:
            more = "give more by --max_steps or --num_epochs"
            raise UserError(f"--resume {self.checkpoint}: {done} steps are done, and this run has {total}; {more}")
        if done == total and from_main(lambda: saving.is_finished(self.config.output_dir)):
            say(f"{self.config.output_dir}: the run has ended after its {total} steps; nothing is left to do")
            raise Ended(0)
        if done < total != self.state["total_steps"] and self.config.lr_scheduler != "constant":
            say(f"note: the learning rate now runs over {total} steps; until here over {self.state['total_steps']}")

    def _go_on_validating(self) -> None:
        """What earlier validations said counts only beside later ones of the same samples."""
        if not self.validation or not self.state["validation"]:
            return
        if from_main(lambda: self.state["validation_data"] != self.validation_data):
            say("note: validation is of other samples than before; the lowest loss so far does not count")
            return
        self.validation.load_state_dict(self.state["validation"])
        if self.validation.exhausted:
            self.total_steps = self.state["step"]

    @cached_property
    def validation_data(self) -> str | None:
        """Process 0 knows it."""
        return self.validation.batches.data.digest() if self.validation and is_main() else None

    @cached_property
    def facts(self) -> dict:
        """What must be the same when the run goes on, beside its flags. Process 0 knows it."""
        return dict(
            base=self.planned.base_fingerprint,
            data=self.batches.data.digest() if is_main() else None,
            rows_per_step=self.batches.rows_per_step,
        )

    def _starting_adapter(self) -> dict | None:
        """Tensors of the adapter that training begins or goes on with: the base must become theirs while it is read."""
        method = self.planned.method
        if method.saves != "adapter":
            if self.config.init_adapter:
                raise UserError(f"--init_adapter: --train_type {self.config.train_type} trains no adapter; drop it")
            return None
        if self.checkpoint:
            if self.config.init_adapter:
                say(f"note: --init_adapter is not read again: the run goes on from {self.checkpoint}")
            tensors = adapter_tensors(self.checkpoint)
            kept = checkpoints.whole_tensors(self.checkpoint, method.kept(self.planned.model))
        elif self.config.init_adapter:
            with naming("--init_adapter"):
                tensors, kept = _fitting_adapter(self.config, self.planned), {}
        else:
            return None
        method.begin_as(tensors, kept)
        return tensors

    @contextmanager
    def begun(self):
        """Holds the output folder, which is unfinished until the block ends well."""
        goes_on = checkpoints.is_own(self.checkpoint, self.config)
        self.told = dict(samples=len(self.batches.data), chats=self.batches.data.report.chats, steps=self.total_steps)
        with saving.begun(self.planned, self.config, resumes=goes_on, data=self.told):
            if goes_on and is_main():
                checkpoints.remove_after(self.root, self.state["step"])
            keeps = checkpoints.keeps_checkpoints(self.config)
            for known in ("facts", "validation_data") if keeps else ():
                getattr(self, known)  # reads all data: now, not while all wait for the first checkpoint
            self.keeper = checkpoints.Keeper(self.config, self.root, self._take, keeps=keeps)
            if goes_on and self._best() and keeps:
                self.keeper.writer.best = self._best().name
            yield

    # --- while it trains ----------------------------------------------------------------------------------------------

    def begin(self, step) -> int:
        """Gives a new TrainStep the state that the run begins or goes on with; the steps that are done."""
        self.step = step
        self._tell_plan(step.prepared)
        if is_main() and not checkpoints.is_own(self.checkpoint, self.config):
            checkpoints.remove_after(self.root, -1)  # of an older run: only now does this one have something to train
        if self.checkpoint:
            checkpoints.restore(step, self.checkpoint)
            say(f"goes on after step {step.taken} of {self.total_steps}, from {self.checkpoint}")
        elif self.adapter:
            self.planned.method.fill(step.model, self.adapter, device=step.device)
        self.adapter = None
        return step.taken

    def _tell_plan(self, prepared) -> None:
        """Writes into run.json what the report holds against what is measured."""
        trained, total = parameter_counts(prepared.model)
        counts = dict(trained_parameters=trained, parameters=total)
        self.told |= counts | dict(device=device_name(prepared.device), memory_plan=prepared.sizes)
        saving.write_run(self.config, self.planned, finished=False, data=self.told)

    def votes(self) -> list[float]:
        """What this process adds to the sums of the next step."""
        return [*self.stopping.votes(), *self.keeper.votes()]

    def after(self, number: int, votes: list[float], *, logger) -> bool:
        """After step `number`, with the sums of `votes`: rounds, validates and keeps; whether it was the last step.

        Raises:
            Ended: a signal or a flag ends the run here.
        """
        last = number == self.total_steps
        due = self.validation and self.validation.due(number, last=last)
        # before a validation too: what is judged, and kept as the best, is what an export of it computes
        if self.config.train_for != "none" and (last or due or number % self.config.round_every == 0):
            round_again(self.planned, self.step.prepared)
        if due:
            last = self._validate(number, logger=logger) or last
        stop = self.stopping.after(number, votes[:STOPPING_VOTES])
        self.keeper.after(number, votes[STOPPING_VOTES:], last=last)
        if stop and not (last and stop.code == 0):
            kept = self.keeper.keep(number)
            announce(stop, number, kept)
            logger.close()
            barrier()
            raise Ended(stop.code if kept or stop.code else 1)
        return last

    def _validate(self, number: int, *, logger) -> bool:
        """Whether it ends the run."""
        row = self.validation(self.step)
        logger.log(dict(step=number, **row))
        if self.validation.judge(row["eval_loss"], number) and self.config.save_best:
            self.keeper.keep_best(number)
        if self.validation.exhausted:
            say(f"stopped after step {number}: {self.validation.judgement.since} validations without a lower loss")
        return self.validation.exhausted

    def _best(self) -> Path | None:
        """The checkpoint of the lowest validation loss, if it is to be kept."""
        best = self.validation and self.config.save_best and self.validation.judgement.best
        return checkpoints.folder_of(self.root, best.step) if best else None

    @contextmanager
    def explaining(self, number: int, *, lr: float):
        """Writes `diverged.json` where step `number` comes to no number: which samples it was, by their places in the
        data (0-based)."""
        try:
            yield
        except Diverged:
            self.keeper.close()  # the one that is being written is the last good one
            if is_main():
                rows = self.batches.data.rows[self.batches.samples_of(number - 1)].tolist()
                write_json(Path(self.config.output_dir) / DIVERGED_FILE, dict(step=number, lr=lr, samples=rows))
            raise

    def end(self) -> None:
        """Waits for what is being written; makes the best what is saved. Collective."""
        self.keeper.close()
        folder, best = self._best(), self.validation and self.validation.judgement.best
        if not folder:
            return
        if best.step != self.step.taken:
            if why := from_main(lambda: checkpoints.problem(folder)):
                raise UserError(f"--save_best true: {folder} is no valid checkpoint ({why}); the last one stays")
            checkpoints.restore_parameters(self.step.model, folder)
            self.planned.method.after_step(self.step.model, device=self.step.device)
        say(f"the result is that of step {best.step}, which has the lowest validation loss, {best.loss:.6g}")

    def _take(self, number: int) -> checkpoints.Snapshot:
        """The checkpoint of step `number`, in host memory. Collective."""
        model, config = self.step.model, self.config
        documents = partial(saving.describe_checkpoint, model, self.tokenizer, self.planned, config, number=number)
        epoch, done = self.batches.epoch_of(number)
        state = self.facts | dict(
            flags=saving.lasting_values(config),
            epoch=epoch,
            step_of_epoch=done,
            total_steps=self.total_steps,
            run_ids=self.run_ids,
            validation=self.validation.state_dict() if self.validation else None,
            validation_data=self.validation_data,
        )
        return checkpoints.take(self.step, self.planned, describe=documents, state=state)


def _fitting_adapter(config, planned) -> dict:
    """The tensors of `--init_adapter`.

    Raises:
        UserError: it is none, or of another base, kind, rank, scaling or set of layers.
    """
    run = describe(config.init_adapter)
    if run.kind != "adapter":
        raise UserError(f"{run}; name the folder of an adapter")
    wanted = planned.method.peft_config(planned.model)
    if run.dora != wanted["use_dora"]:
        kind = "DoRA" if run.dora else "LoRA"
        raise UserError(f"{run.folder}: is a {kind} adapter, which --train_type {config.train_type} does not train")
    if run.rank != wanted["r"]:
        raise UserError(f"{run.folder}: has rank {run.rank}, and --lora_rank {config.lora_rank} gives {wanted['r']}")
    has, gives = scaling_factor(run.adapter), scaling_factor(wanted)
    if has != gives:
        way_out = " ".join(f"--{name} {str(value).lower()}" for name, value in flags_of(run.adapter).items())
        raise UserError(f"{run.folder}: is scaled by {has:g}, and the flags give {gives:g}; pass {way_out}")
    _check_same_base(run, config, planned)
    tensors = adapter_tensors(run.adapter_folder)
    check_adapter(run, tensors, dict(planned.method.tensors(planned.model)))
    quantizer = asdict(planned.quantizer) if planned.quantizer else None
    began = run.config.lora_init if run.config else "default"
    if began in CORRECTING and began != config.lora_init:
        why = "is for a rounded base alone, which it corrects"
        raise UserError(f"{run.folder}: {why}; pass --lora_init {began}, so that the new adapter is told to be one too")
    if began in CORRECTING and run.quantizer != quantizer:
        how = ", ".join(f"{name} {value}" for name, value in (run.quantizer or {}).items())
        raise UserError(f"{run.folder}: corrects the rounding of a base with {how}; give this run the same")
    if run.config and run.quantizer != quantizer:
        say(f"note: {run.folder} was trained on a base quantized as {run.quantizer}; this run's is {quantizer}")
    return tensors


def _check_same_base(run, config, planned) -> None:
    known = run.base_fingerprint or fingerprint(CheckpointReader(run.base))  # trained elsewhere: as the folder is now
    if known != planned.base_fingerprint:
        raise UserError(f"{run.folder}: was trained on {run.base}, which is not --model_name {config.model_name}")
