"""Layouts: which columns a row has, and what they mean."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from string import Formatter

from fsdp_utils.core.errors import DataError

QUESTION_PROMPT = "###Question:\n{question}\n###Answer:\n"
SQL_PROMPT = "###Context:\n{context}\n###Question:\n{question}\n###Answer:\n"
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_INPUT_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ASSISTANT = "### Assistant: "
# columns, and fields of a message, that an answer may depend on: a row whose prompt leaves them out is refused. Others
# (ids, sources, scores) are named once
MATTERS = frozenset({
    *("system", "system_prompt", "context", "contexts", "passage", "document", "documents", "background"),
    *("input", "inputs", "history", "choices", "options", "image", "images", "audio", "video"),
    *("tools", "functions", "function_call", "tool_calls", "reasoning_content", "reasoning", "thinking"),
})  # fmt: skip
SWITCHES = ("weight", "train")  # of a message or a row: whether it is learned


class BadRow(ValueError):
    """A row that cannot be trained on; the message says why, without the place."""


def _alpaca(row: dict) -> str:
    return (ALPACA_INPUT_PROMPT if row["input"] else ALPACA_PROMPT).format_map(row)


def _guanaco(row: dict) -> tuple[str, str]:
    head, assistant, completion = row["text"].rpartition(ASSISTANT)
    return head + assistant, completion


@dataclass(frozen=True)
class Layout:
    """Columns of one kind of row.

    Args:
        columns: those a row must have, strings (`messages`: a list of messages).
        prompt: row -> what is asked; None where there is no question.
        answer: the column that is learned.
        optional: columns that may be missing or null, then "".
        question: the columns that tell one task from another.
        split: row -> (prompt, completion), where one column holds both.
        label: the column that says what a row is, which need not be a string.
        tasks: what such rows are for, keys of `options.TASKS`.
        found_in_files: whether a local file with these columns is read this way.
    """

    columns: tuple[str, ...]
    prompt: Callable[[dict], str] | None = None
    answer: str = ""
    optional: tuple[str, ...] = ()
    question: tuple[str, ...] = ()
    split: Callable[[dict], tuple[str, str]] | None = None
    found_in_files: bool = True
    label: str = ""
    tasks: tuple[str, ...] = ("causal_lm",)


# where a file has the columns of several, the first is taken
ANSWERED = ("causal_lm", "seq2seq_lm")
CLASSIFIED = dict(optional=("text_pair",), question=("text",), tasks=("sequence_classification",))
LAYOUTS = {
    "messages": Layout(("messages",)),
    "source": Layout(
        ("source", "target"), lambda row: row["source"], "target", question=("source",), tasks=("seq2seq_lm",)
    ),
    "labelled": Layout(("text",), label="label", **CLASSIFIED),
    "scored": Layout(("text",), label="score", **CLASSIFIED),
    "question": Layout(
        ("question", "answer"), QUESTION_PROMPT.format_map, "answer", question=("question",), tasks=ANSWERED
    ),
    "alpaca": Layout(
        ("instruction", "output"), _alpaca, "output", ("input",), question=("instruction", "input"), tasks=ANSWERED
    ),
    "completion": Layout(
        ("prompt", "completion"), lambda row: row["prompt"], "completion", question=("prompt",), tasks=ANSWERED
    ),
    "text": Layout(("text",), answer="text", question=("text",)),
    "guanaco": Layout(("text",), answer="text", question=("text",), split=_guanaco, found_in_files=False),
    "sql": Layout(
        ("context", "question", "answer"), SQL_PROMPT.format_map, "answer",
        question=("context", "question"), found_in_files=False, tasks=ANSWERED,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """How the user says that rows are to be read: some of the flags of a program, which it may lack.

    Args:
        columns: --columns, `field=path,field=path`.
        prompt_template: --prompt_template, a file, or the text itself, which has braces.
        train_on: --train_on, "all" assistant turns or the "last".
        task: --task, what the rows are for; auto: text to go on with.
    """

    columns: str | None = None
    prompt_template: str | None = None
    train_on: str = "all"
    task: str = "causal_lm"

    @classmethod
    def of(cls, config) -> "Reading":
        """That of a run or evaluation."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls) if hasattr(config, f.name)})

    @property
    def paths(self) -> dict[str, str]:
        """Field of a layout -> the column that holds it, as `answer` or, inside one, `choices.0.text`.

        Raises:
            DataError: a part that is no `field=path`, or a field twice.
        """
        found = {}
        for part in filter(None, (self.columns or "").split(",")):
            name, equals, path = (text.strip() for text in part.partition("="))
            if not (name and equals and path) or name in found:
                raise DataError(f"--columns {self.columns}: {part!r} is not field=column, or names a field twice")
            found[name] = path
        return found

    @property
    def template(self) -> str | None:
        """The text of --prompt_template; run.json keeps it, so that a result needs no file.

        Raises:
            DataError: no such file, or no text that names columns in braces.
        """
        text = self.prompt_template or None
        if text and "{" not in text:
            try:
                text = Path(text).read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"--prompt_template {self.prompt_template}: cannot be read ({error})") from None
        if text is not None:
            _placeholders(text, named=self.named)
        return text

    @property
    def named(self) -> str:
        """How messages call the template."""
        return f"--prompt_template {' '.join((self.prompt_template or '').split())[:80]}"


@lru_cache
def _placeholders(template: str, *, named: str) -> list[str]:
    """The columns that a template names.

    Raises:
        DataError: braces that are not those of a column, or no column at all.
    """
    try:
        parsed = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise DataError(f"{named}: {error}; name a column as {{question}}, and double braces that stay") from None
    names = [name for _, name, _, _ in parsed]
    wrong = [name for _, name, spec, how in parsed if not name.isidentifier() or spec or how]
    if not names or wrong:
        why = f"{{{wrong[0]}…}} names no column" if wrong else "names no column"
        raise DataError(f"{named}: {why}; name one as {{question}}, and double braces that stay")
    return names


def _at(row: dict, path: str):
    """The value of a column, or of `a.0.b` inside one; None if it is not there."""
    if path in row:
        return row[path]
    value = row
    for key in path.split("."):
        if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, dict) and key in value:
            value = value[key]
        else:
            return None
    return value


@dataclass(frozen=True)
class Form:
    """How the rows of one source are read.

    Args:
        layout: key of LAYOUTS.
        paths: fields of the layout that have another name in the rows.
        template: the prompt, with columns in braces; None for the layout's own.
        checked: whether a column that nothing reads is looked for: in what users bring, not in sets with a name.
    """

    layout: str
    paths: dict[str, str] = field(default_factory=dict)
    template: str | None = None
    checked: bool = True

    @property
    def has_answer(self) -> bool:
        """Whether a row is one question with one answer."""
        return LAYOUTS[self.layout].prompt is not None

    def named(self, row: dict) -> dict:
        """A raw row under the layout's names."""
        return row | {name: _at(row, path) for name, path in self.paths.items()}

    @cached_property
    def _read(self) -> dict[str, bool]:
        """The fields that are read, and which may be missing."""
        spec = LAYOUTS[self.layout]
        names = (*spec.columns, *spec.optional) if self.template is None else (*self._in_template, spec.answer)
        return {name: name in spec.optional for name in names}

    @cached_property
    def _known(self) -> frozenset[str]:
        """Every column that is read, or that holds what is."""
        return frozenset({*self._read, LAYOUTS[self.layout].label, *SWITCHES, *self.paths.values(), *self._inside})

    @cached_property
    def _inside(self) -> dict[str, set[str]]:
        """Columns of which only a part is read, and which keys of it. A list counts as read."""
        found: dict[str, set[str]] = {}
        for path in self.paths.values():
            root, _, rest = path.partition(".")
            if rest:
                found.setdefault(root, set()).add(rest.split(".")[0])
        return found

    def beside(self, row: dict) -> list[str]:
        """What has a value beside the part of a column that is read."""
        parts = [(root, row[root], keys) for root, keys in self._inside.items() if isinstance(row.get(root), dict)]
        return [
            f"{root}.{key}"
            for root, part, keys in parts
            for key, value in part.items()
            if key not in keys and has_value(value)
        ]

    def fields(self, row: dict) -> dict[str, str]:
        """What the layout reads of a raw row, and the other columns that the prompt names.

        Raises:
            BadRow: a field is missing or not a string.
        """
        row, picked = self.named(row) if self.paths else row, {}
        for name, optional in self._read.items():
            value = row.get(name)
            if value is None and optional:
                value = ""
            if not isinstance(value, str):
                found = "missing or null" if value is None else f"{type(value).__name__}, not a string"
                raise BadRow(f"field {name!r} is {found}")
            if not is_text(value):
                raise BadRow(f"field {name!r} holds half of a surrogate pair, which is no character")
            picked[name] = value
        return picked

    def split(self, picked: dict[str, str]) -> tuple[str, str]:
        """(prompt, completion) of `fields`."""
        spec = LAYOUTS[self.layout]
        if self.template is not None:
            return self.template.format_map(picked), picked[spec.answer]
        if spec.split:
            return spec.split(picked)
        return (spec.prompt(picked) if spec.prompt else ""), picked[spec.answer]

    def user_turn(self, picked: dict[str, str]) -> str:
        """The question as a user says it in a chat: by the user's template, else without the layout's own words."""
        return self.question(picked) if self.template is None else self.template.format_map(picked)

    def question(self, picked: dict[str, str]) -> str:
        """The text that tells one task from another."""
        return "\n".join(picked[name] for name in LAYOUTS[self.layout].question if picked[name])

    def unread(self, row: dict) -> list[str]:
        """Columns with a value that nothing reads.

        Raises:
            BadRow: the answer may depend on one of them.
        """
        if not self.checked:
            return []
        found = [name for name, value in row.items() if name not in self._known and has_value(value)]
        found += self.beside(row)
        for name in found:
            if name.rpartition(".")[2] in MATTERS:
                raise BadRow(
                    f"column {name!r} is read by nothing, though the answer may depend on it; "
                    "name it in a --prompt_template, or remove it"
                )
        return found

    @property
    def _in_template(self) -> list[str]:
        return [] if self.template is None else _placeholders(self.template, named="--prompt_template")


def has_value(value) -> bool:
    """Whether a column or field says anything."""
    return value is not None and value != "" and value != [] and value != {}


def is_text(text: str) -> bool:
    """Whether a string is made of characters: JSON can write half of one."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_learned(switched: dict) -> bool:
    """Whether `weight` and `train` of a message or row leave it to be learned.

    Raises:
        BadRow: one that is neither on nor off.
    """
    return all(_is_on(name, switched[name]) for name in SWITCHES if has_value(switched.get(name)))


def _is_on(name: str, value) -> bool:
    """A switch, which in a table of text is text."""
    text = str(value).strip().lower()
    if text in ("true", "false"):
        return text == "true"
    with suppress(ValueError):
        if float(text) in (0, 1):
            return bool(float(text))
    raise BadRow(f"{name} {value!r}: only 0 (read, not learned) and 1 can be trained; write one of them, or rename it")


def find_form(row: dict, reading: Reading, *, source: str) -> Form:
    """How rows like this one are read.

    Raises:
        DataError: no layout fits; lists what was found and what is accepted.
    """
    paths = {name: path for name, path in reading.paths.items() if path in row or _at(row, path) is not None}
    names = {*row, *paths}
    task = "causal_lm" if reading.task == "auto" else reading.task
    offered = {name: row for name, row in LAYOUTS.items() if row.found_in_files and task in row.tasks}
    for name, layout in offered.items():
        if _needed(layout) <= names:
            return _with_fields(with_template(Form(name, paths), reading, columns=names, source=source))
    within = [name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    wrapped = f"; or, if the rows are those under {within[0]!r}, write them alone" if len(within) == 1 else ""
    accepted = "; ".join(", ".join(sorted(_needed(layout), reverse=True)) for layout in offered.values())
    raise DataError(
        f"{source}: unknown columns {', '.join(sorted(names)) or '(none)'}; say which is which by --columns, as in "
        f"--columns question=prompt,answer=response, or rename them to one of: {accepted}{wrapped}"
    )


def _needed(layout: Layout) -> set[str]:
    return {*layout.columns, *filter(None, [layout.label])}


def _with_fields(form: Form) -> Form:
    """`form` without the fields that nothing reads: --columns would be said to have had an effect."""
    if form.layout == "messages":  # whose others are variables of the template
        return form
    read = {*form._read, LAYOUTS[form.layout].label, *SWITCHES}
    return replace(form, paths={name: path for name, path in form.paths.items() if name in read})


def with_template(form: Form, reading: Reading, *, columns, source: str) -> Form:
    """`form` with the user's prompt.

    Raises:
        DataError: the rows ask no question, or the prompt holds the answer or what is no column.
    """
    template = reading.template
    if template is None:
        return form
    named = reading.named
    if not form.has_answer:
        raise DataError(f"{named}: {source} has rows of {form.layout}, which have no question; leave it away")
    answer, placeholders = LAYOUTS[form.layout].answer, _placeholders(template, named=named)
    if answer in placeholders:
        raise DataError(f"{named}: holds {{{answer}}}, which is the answer; only the prompt goes there")
    for name in placeholders:
        if name not in columns and name not in LAYOUTS[form.layout].optional:
            raise DataError(f"{named}: {source} has no column {name!r}, but {', '.join(sorted(columns))}")
    return replace(form, template=template)
