"""The samples of a run: tokenized, checked against the model, split, and made into batches."""

from dataclasses import replace

from fsdp_utils.core.errors import DataError, UserError, naming
from fsdp_utils.core.ranks import rank, say, world_size
from fsdp_utils.data.batches import Batches
from fsdp_utils.data.layouts import Reading
from fsdp_utils.data.parts import Part, readers
from fsdp_utils.data.sources import Place, held_out_rows, load_examples
from fsdp_utils.data.tokens import TokenizedData, prepare_dataset


def prepare_data(config, tokenizer, model_config, *, task, load=load_examples) -> TokenizedData:
    """The tokenized samples; every process returns the same ones.

    Raises:
        UserError: bad data, or token ids that the embedding has no row for.
    """
    known = task.labels or task.known_labels(model_config)
    tokenized = prepare_dataset(config, tokenizer, load=load, coder=task.coder_for(model_config), labels=known)
    rows = model_config.get_text_config().vocab_size
    if tokenized.report.max_token_id >= rows:
        raise UserError(
            f"--model_name {config.source}: the tokenizer yields id {tokenized.report.max_token_id}, but the "
            f"vocabulary of the embedding has {rows} rows; use the model's own tokenizer or resize the embedding"
        )
    return tokenized


def hold_out(
    config, data: TokenizedData, tokenizer, model_config, *, task
) -> tuple[TokenizedData, TokenizedData | None]:
    """The samples to train on, and those to validate with."""
    if config.eval_samples:
        data, held_out = data.split(config.eval_samples, seed=config.seed)
        say(f"validation: {len(held_out)} of these samples, held out")
        if shared := held_out.shared_with(data):
            say(f"note: {shared} of them are trained on too: the data hold equal samples several times")
        return data, held_out
    if not config.eval_dataset:
        return data, None
    place = Place(config.eval_split, config.dataset_config, sole=True)
    load = lambda config: held_out_rows(config.dataset, place=place, reading=Reading.of(config))
    with naming("--eval_dataset, as"):
        named = replace(config, dataset=config.eval_dataset)
        held_out = prepare_data(named, tokenizer, model_config, task=task, load=load)
    if set(held_out.sources) & set(data.sources):
        raise DataError(
            f"--eval_dataset {config.eval_dataset}: is what is trained on; hold samples out by --eval_samples"
        )
    shared = held_out.shared_with(data)
    if shared == len(held_out):
        raise DataError(
            f"--eval_dataset {config.eval_dataset}: all of its {shared} samples are trained on; give others"
        )
    if shared:
        say(f"note: {shared} of the {len(held_out)} samples of --eval_dataset are trained on too")
    say(f"validation: {config.eval_dataset}: {held_out.report}")
    return data, held_out


def make_batches(config, data: TokenizedData, tokenizer, model_config, *, task) -> Batches:
    """How this process's micro-batches are made."""
    pad = task.pad_token_id(tokenizer, model_config, largest=data.report.max_token_id)
    readers_of_data = dict(rank=rank() // config.context_parallel, world_size=readers(config, world_size()))
    if config.context_parallel == 1:
        return Batches.of(config, data, collate=task.collate, pad_token_id=pad, **readers_of_data)
    part = Part.of_rows(config, model_config)
    shape = dict(collate=part.collating(task.collate), multiple=part.multiple)
    return Batches.of(config, data, pad_token_id=pad, **shape, **readers_of_data)


def batch_arithmetic(batches: Batches, *, steps: int) -> str:
    """How samples become optimizer steps, in one line."""
    several = world_size() // batches.world_size
    who = "processes" if several == 1 else f"groups (of {several} processes)"
    return (
        f"global batch: {batches.batch_size} rows x {batches.world_size} {who} x {batches.accumulation} "
        f"accumulation = {batches.rows_per_step} {'packs' if batches.packing else 'samples'}; "
        f"{len(batches.data)} samples, {steps} steps"
    )
