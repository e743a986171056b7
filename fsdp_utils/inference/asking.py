"""The two ways to ask: in the prompt of a row's layout, or as a chat. A model is asked as it was trained."""

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from fsdp_utils.config import TrainConfig
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.ranks import say
from fsdp_utils.data import asking, sources
from fsdp_utils.data.layouts import Reading
from fsdp_utils.folders.describe import Run
from fsdp_utils.inference.config import EvalConfig
from fsdp_utils.inference.scoring import NEXT_PROMPTS


@dataclass(frozen=True)
class Style:
    """A way to ask.

    Args:
        read: rows -> questions, each with `question` and `answer`.
        prompts: questions, tokenizer, shots=solved ones -> `asking.Prompt` of each.
        ends: questions, tokenizer -> ids that end an answer beside those that the model names.
        endpoint: where a server is asked so.
        stops: texts at which an answer ends, too.
    """

    read: Callable[[sources.Examples], list]
    prompts: Callable[..., list[asking.Prompt]]
    ends: Callable[..., list[int]]
    endpoint: str
    stops: tuple[str, ...] = ()


STYLES = {
    "plain": Style(
        read=sources.questions_of,
        prompts=asking.plain_prompts,
        ends=lambda questions, tokenizer: [],  # EOS, which the tokenizer names
        endpoint="/v1/completions",
        stops=NEXT_PROMPTS,
    ),
    "chat": Style(
        read=asking.chat_questions_of,
        prompts=asking.chat_prompts,
        ends=asking.turn_ends,
        endpoint="/v1/chat/completions",
    ),
}


def choose_style(wanted: str, examples: sources.Examples, run: Run, tokenizer) -> str:
    """The key of STYLES: --prompt; "auto" is "chat" for chats, and for a run that has learned from chats.

    Raises:
        UserError: chats in plain prompts, or a tokenizer without a chat template.
    """
    chats = examples.chats
    if chats and wanted == "plain":
        raise UserError(f"--prompt plain: {examples.name} holds chats, which have no such prompt; pass --prompt chat")
    learned = wanted == "auto" and tokenizer.chat_template and trained_on_chats(run)
    style = "chat" if chats or learned else "plain" if wanted == "auto" else wanted
    if style == "chat" and not tokenizer.chat_template:
        instead = "train with --chat_template FILE" + ("" if chats else ", or pass --prompt plain")
        raise UserError(f"--prompt {wanted}: the tokenizer of {run.folder} has no chat template; {instead}")
    return style


def trained_on_chats(run: Run) -> bool:
    """Whether a run was given a chat template or chats; of old runs as far as flags and files tell that are still
    there."""
    if run.chats is not None or run.config is None:
        return bool(run.chats or (run.config and run.config.chat_template))
    if run.config.chat_template or "messages" in Reading.of(run.config).paths:
        return True
    with suppress(UserError):  # another file by now, or one that is gone
        return Path(run.config.dataset).exists() and sources.load_examples(run.config).chats
    return False


@dataclass(frozen=True)
class Asking:
    """What is asked, and how: `prompts[i]` asks `questions[i]`."""

    style: Style
    questions: list
    prompts: list[asking.Prompt]
    ends: list[int]


def make_asking(config: EvalConfig, run: Run, tokenizer) -> Asking:
    """Reads the questions and writes the prompts.

    Raises:
        UserError: no such dataset, a row that cannot be asked or scored, a --prompt that does not fit.
    """
    reading = reading_of(config, run)
    rows = sources.held_out_rows(config.dataset, place=replace(sources.Place.of(config), sole=True), reading=reading)
    if config.columns:
        sources.check_columns_found([rows], reading)
    name = choose_style(config.prompt, rows, run, tokenizer)
    style = STYLES[name]
    questions, shots = read_questions(config, rows, reading, style)
    if name != config.prompt:
        say(f"prompt: {name}")
    prompts = style.prompts(questions, tokenizer, shots=shots)
    return Asking(style, questions, prompts, style.ends(questions, tokenizer))


def read_questions(config: EvalConfig, rows: sources.Examples, reading: Reading, style: Style) -> tuple[list, list]:
    """The questions to ask, and the solved ones that are put before each.

    Raises:
        UserError: a row without answer, or too few rows to take shots from.
    """
    asked = style.read(rows.first(config.samples))
    for number, row in enumerate(asked, 1):
        if not row.answer.strip():
            raise UserError(f"{config.dataset}, row {number}: has no answer to compare with; correct or remove the row")
    if not config.n_shots:
        return asked, []
    if config.dataset in sources.DATASETS:
        pool = sources.load_examples(TrainConfig(dataset=config.dataset, prompt_template=reading.prompt_template))
    else:  # it has no training split: shots are rows after those that are asked
        pool = rows.select(range(len(asked), len(rows)))
    pool, _ = sources.drop_overlap(style.read(pool), asked)
    if len(pool) < config.n_shots:
        raise UserError(
            f"--n_shots {config.n_shots}: {config.dataset} has {len(pool)} rows beside the --samples "
            f"{config.samples} that are asked; lower one of the two"
        )
    return asked, [pool[i] for i in random.Random(config.seed).sample(range(len(pool)), config.n_shots)]


def reading_of(config: EvalConfig, run: Run) -> Reading:
    """How questions are read: as in training, unless the user says otherwise."""
    reading, trained = Reading.of(config), Reading.of(run.config) if run.config else Reading()
    prompt_template = reading.prompt_template or trained.prompt_template
    return replace(reading, prompt_template=prompt_template, columns=reading.columns or trained.columns)
