"""Chats: messages, what a tokenizer's template writes of them, and what it leaves out."""

import inspect
import json
import re
from contextlib import contextmanager, suppress
from functools import cached_property, lru_cache
from pathlib import Path

from jinja2 import Environment, TemplateRuntimeError, TemplateSyntaxError, meta, nodes
from transformers.utils.chat_template_utils import render_jinja_template

from fsdp_utils.core.errors import DataError
from fsdp_utils.data.encode import Piece, Text
from fsdp_utils.data.files import one_line
from fsdp_utils.data.layouts import MATTERS, SWITCHES, BadRow, Form, has_value, is_learned, is_text
from fsdp_utils.data.turns import ANSWERS, UNLIKELY, Span, Turns, first_of

GENERATION_MARK = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # which only transformers knows
READ_BY_TRANSFORMERS = ("tools", "documents")
# who speaks in chats of the ShareGPT kind, whose messages have `from` and `value`
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model"), ANSWERS),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}


def give_template(tokenizer, path: str | None) -> None:
    """Puts the chat template of a file in place of the tokenizer's own; it is saved with the result.

    Raises:
        DataError: no such file, or no Jinja template.
    """
    if not path:
        return
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        with suppress(TemplateRuntimeError):  # as for a chat without a system message
            tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False, chat_template=text)
        if not text.strip():
            raise TemplateSyntaxError("the file is empty", 1)
    except (OSError, UnicodeDecodeError, TemplateSyntaxError) as error:
        raise DataError(f"--chat_template {path}: {one_line(error)}; give a file with a Jinja template") from None
    tokenizer.chat_template = tokenizer.given_chat_template = text


@contextmanager
def _failing_as_row():
    """Makes whatever a template raises a BadRow."""
    try:
        yield
    except Exception as error:  # templates raise their own types, as for roles that do not alternate
        raise BadRow(f"the chat template fails ({one_line(error)})") from None


class Template:
    """The chat template of a tokenizer.

    Raises:
        DataError: it has none, or none that is meant for every chat.
    """

    def __init__(self, tokenizer, *, source: str):
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise DataError(
                f"--dataset {source}: has messages, but the model's tokenizer has no chat template; "
                "give one by --chat_template FILE"
            )
        try:
            tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(f"--dataset {source}: chats need one chat template ({one_line(error)})") from None
        self.special = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self.any_special = re.compile("|".join(map(re.escape, self.special)) or "$^")
        callables = (tokenizer.apply_chat_template, render_jinja_template)
        names = {name for f in callables for name in inspect.signature(f).parameters}
        self.taken = {"messages", *names} - {*READ_BY_TRANSFORMERS}

    def source(self, variables: dict) -> str:
        """The template's text, for a chat with these variables."""
        return self.tokenizer.get_chat_template(tools=variables.get("tools"))

    def reads(self, name: str, variables: dict) -> bool:
        """Whether the template reads a variable of this name."""
        return name in _variables(self.source(variables))

    def knows_field(self, name: str, variables: dict) -> bool:
        """Whether the template reads a field of this name of some message."""
        return name in _fields(self.source(variables))

    def render(self, messages: list[dict], variables: dict, *, header: bool = False) -> str:
        """What the template writes, with the header that asks for an answer or without.

        Raises:
            BadRow: the template fails.
        """
        with _failing_as_row():
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=header, **variables
            )

    def marked(self, messages: list[dict], variables: dict) -> tuple[str, list[tuple[int, int]]] | None:
        """What the template writes, and what of it its marks say is generated; None for one without marks."""
        source = self.source(variables)
        if not GENERATION_MARK.search(source):
            return None
        names = {**self.tokenizer.special_tokens_map, **variables, "chat_template": source}
        with _failing_as_row():
            (text,), (spans,) = render_jinja_template([messages], return_assistant_tokens_mask=True, **names)
        return (text, [tuple(span) for span in spans]) if spans else None  # a mark that is never reached is none


def pick_chat(row: dict, form: Form) -> tuple[list[dict], dict]:
    """The messages of a row, and its other columns, which are variables of the template.

    Raises:
        BadRow: no list of messages with a role and text.
    """
    row = form.named(row)
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRow("field 'messages' is not a list of messages")
    messages = [_as_said(message, f"message {number}") for number, message in enumerate(messages, start=1)]
    read = {"messages", *(path.split(".")[0] for path in form.paths.values())}
    variables = {name: value for name, value in row.items() if name not in read and has_value(value)}
    for name in ("tools", "chat_template_kwargs"):
        if isinstance(variables.get(name), str):  # a table holds them so: its columns cannot hold any object
            with suppress(ValueError):
                variables[name] = json.loads(variables[name])
    more = variables.pop("chat_template_kwargs", {})  # as TRL names them
    if not isinstance(more, dict):
        raise BadRow("chat_template_kwargs is no object")
    return messages, variables | more


def _as_said(message, named: str) -> dict:
    """A message with a role and content, checked."""
    if isinstance(message, dict) and "from" in message and "value" in message and "role" not in message:
        if message["from"] not in SPEAKERS:
            raise BadRow(f"{named} is from {message['from']!r}; known are {', '.join(SPEAKERS)}")
        others = {name: value for name, value in message.items() if name not in ("from", "value")}
        if "content" in others:
            raise BadRow(f"{named} has both 'value' and 'content'")
        message = dict(role=SPEAKERS[message["from"]], content=message["value"]) | others
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRow(f"{named} needs 'role' and 'content'")
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise BadRow(f"{named} has content of type {kind!r}; only text can be read")
    others = any(has_value(value) for name, value in message.items() if name not in ("role", "content", *SWITCHES))
    if not isinstance(content, str | list) and not (content is None and others):
        raise BadRow(f"{named} needs 'content' as a string")
    return message


def _with_objects(messages: list[dict]) -> list[dict]:
    """The messages with what tool calls are called with as objects, where it is given as their JSON."""
    found = []
    for message in messages:
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            message = {**message, "tool_calls": [_with_object(call) for call in calls]}
        found.append(message)
    return found


def _with_object(call):
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    with suppress(ValueError):
        arguments = json.loads(function["arguments"])
        if isinstance(arguments, dict):
            return {**call, "function": {**function, "arguments": arguments}}
    return call


def _escaped_arguments(messages: list[dict], rendered: str) -> bool:
    """Whether a template wrote the JSON of a call's arguments as a JSON string: it is meant for objects, as servers
    pass them."""
    for message in messages:
        for call in message.get("tool_calls") or []:
            function = call.get("function") if isinstance(call, dict) else None
            given = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(given, str) and '"' in given and json.dumps(given, ensure_ascii=False) in rendered:
                return True
    return False


class Chat:
    """One chat as a template writes it.

    Args:
        train_on: "all" turns of the assistant, or the "last".
    """

    def __init__(self, messages: list[dict], variables: dict, template: Template, *, train_on: str = "all"):
        self.messages, self.template, self.train_on = messages, template, train_on
        self.noted: list[str] = []
        self.ignored = [name for name in variables if name in template.taken]
        self.variables = {name: value for name, value in variables.items() if name not in template.taken}

    @cached_property
    def _marked(self):
        return self.template.marked(self.messages, self.variables)

    @cached_property
    def _plain(self) -> str:
        """What the template writes of the messages as they were given."""
        return self._render(self.messages)

    @cached_property
    def full(self) -> str:
        """The whole chat.

        Raises:
            BadRow: the template fails, or writes what is no text.
        """
        text = self._marked[0] if self._marked else self._plain
        if _escaped_arguments(self.messages, text):
            self.messages = _with_objects(self.messages)
            self.__dict__.pop("_marked", None)
            text = self._marked[0] if self._marked else self._render(self.messages)
        if not is_text(text):
            raise BadRow("a message holds half of a surrogate pair, which is no character")
        self._check_contents(text)
        return text

    def _check_contents(self, text: str) -> None:
        """Raises BadRow where the content of a message is not written, or as Python writes a list."""
        at = 0
        for words in (words for message in self.messages for words in words_of(message.get("content"))):
            found = text.find(words.strip(), at)
            if found < 0:  # changed, in another order, or not written at all
                self._refuse_unwritten()
                break
            at = found + len(words.strip())
        if "{'type':" in text and any(isinstance(message.get("content"), list) for message in self.messages):
            raise BadRow("the chat template writes content in parts as a Python list; give it as a string")

    def _refuse_unwritten(self) -> None:
        """Raises BadRow for the first content whose end is not written."""
        marked = [_with_marks(message, f"{UNLIKELY}{i}") for i, message in enumerate(self.messages)]
        rendered = self._render([message for message, _ in marked])
        for i, (_, marks) in enumerate(marked, start=1):
            if not all(mark in rendered for mark in marks):
                raise BadRow(f"the content of message {i} is not written by the chat template")

    def _render(self, messages: list[dict], *, header: bool = False) -> str:
        return self.template.render(messages, self.variables, header=header)

    # --- what is read

    def unread(self) -> list[str]:
        """Columns and fields of messages with a value that the template does not write.

        Raises:
            BadRow: an answer may depend on one of them.
        """
        given = [name for name in self.variables if name not in SWITCHES]
        found = [*self.ignored, *(name for name in given if not self._writes_variable(name))]
        matters = [f"column {name!r}" for name in found if name in MATTERS]
        for name in self._more_fields():
            if self._writes_field(name):
                continue
            found.append(f"{name} of messages")
            if name in MATTERS and not self._is_history(name):
                matters.append(f"{name!r} of message {self._carriers(name)[0] + 1}")
        if matters:
            raise BadRow(
                f"{matters[0]} is not written by the chat template, though the answer may depend on it; "
                "give a --chat_template that does, or remove it"
            )
        if any(m["role"] != ANSWERS and m.get("train") is True for m in self.messages):
            found.append("train of other roles than assistant")
        return list(dict.fromkeys(found))

    def _more_fields(self) -> list[str]:
        """The fields of messages beside role and content that say something."""
        names = dict.fromkeys(name for message in self.messages for name in message)
        return [name for name in names if name not in ("role", "content", *SWITCHES) and self._carriers(name)]

    def _carriers(self, name: str) -> list[int]:
        """The messages in which a field says something."""
        return [i for i, message in enumerate(self.messages) if has_value(message.get(name))]

    def _is_history(self, name: str) -> bool:
        """Whether a template may leave a field out on purpose: thoughts before the last question."""
        asked = max((i for i, message in enumerate(self.messages) if message["role"] == "user"), default=-1)
        return self.template.knows_field(name, self.variables) and self._carriers(name)[-1] < asked

    def _writes_variable(self, name: str) -> bool:
        if self.template.reads(name, self.variables):
            return True
        fewer = {key: value for key, value in self.variables.items() if key != name}
        return self.template.render(self.messages, fewer) != self._plain

    def _writes_field(self, name: str) -> bool:
        """Whether the chat is another without the field, in whatever messages."""
        fewer = [{key: value for key, value in message.items() if key != name} for message in self.messages]
        try:
            return self._render(fewer) != self._plain
        except BadRow:  # it cannot be written without
            return True

    # --- what is learned

    def learned(self) -> list[int]:
        """The messages that are answers to learn.

        Raises:
            BadRow: a weight that cannot be trained.
        """
        answers = [i for i, message in enumerate(self.messages) if message["role"] == ANSWERS]
        return [i for i in (answers if self.train_on == "all" else answers[-1:]) if is_learned(self.messages[i])]

    def text(self) -> tuple[Text, str | None]:
        """The chat in pieces, and the special token that ends its answers, if one does.

        Raises:
            BadRow: the place of an answer cannot be told.
        """
        learned = self.learned()
        full = self.full  # first: it may read the messages otherwise
        turns = Turns(self.messages, full, self._render, self.template.special)
        spans = self._marked_spans(learned) if self._marked else [turns.span(i) for i in learned]
        pieces, cursor = [], 0
        for span in spans:
            if span.start < cursor:
                raise BadRow("the chat template writes two answers into one another")
            pieces += [Piece(full[cursor : span.start], False), Piece(full[span.start : span.end], True)]
            cursor = span.end
        rest = full[cursor:]
        if not spans:
            return Text([Piece(rest, False)], bare=True), None
        ending = turns.ending(learned[-1], spans[-1])
        if not rest.strip() and not ending.strip() and self.template.tokenizer.eos_token:
            return Text(pieces, ended=True, bare=True), None  # without an end of turn, stopping would not be learned
        token = first_of(ending, self.template.special)
        if not token and ending.strip():
            self.noted.append(f"answers end in {ending.strip()!r}, which is no special token: no server stops there")
        return Text([*pieces, Piece(rest, False)], bare=True), token and token[0]

    def asked(self) -> Text:
        """What a server makes of these messages to have them answered: the chat, and the header that asks.

        Raises:
            BadRow: the template fails, or leaves a content out.
        """
        _ = self.full  # first: it checks the messages, and may read them otherwise
        return Text([Piece(self._render(self.messages, header=True), False)], bare=True)

    def notes(self) -> list[str]:
        """What is to be known of the chat, after `text`."""
        words = [words for i in self.learned() for words in words_of(self.messages[i].get("content"))]
        if any(self.template.any_special.search(said) for said in words):
            self.noted.append("answers hold special tokens in their own words, which are learned as such")
        return self.noted

    def _marked_spans(self, learned: list[int]) -> list[Span]:
        """The places that the template's own marks say."""
        answers = [i for i, message in enumerate(self.messages) if message["role"] == ANSWERS]
        spans = self._marked[1]
        if len(learned) < len(answers):
            if len(spans) != len(answers):
                raise BadRow("the chat template marks no single place for each answer, so none can be left out")
            spans = [span for i, span in zip(answers, spans, strict=True) if i in learned]
        return [Span(*span) for span in spans]


def _with_marks(message: dict, mark: str) -> tuple[dict, list[str]]:
    """A message with a mark at the end of each text of its content, and the marks."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": f"{content}{mark};"}, [f"{mark};"]
    if not isinstance(content, list):
        return message, []
    marks = [f"{mark}.{k};" for k in range(len(content))]
    parts = [{**part, "text": part.get("text", "") + end} for part, end in zip(content, marks, strict=True)]
    return {**message, "content": parts}, marks


def words_of(content) -> list[str]:
    """The texts of a content, a string or parts."""
    if isinstance(content, list):
        return [part.get("text", "") for part in content]
    return [content] if isinstance(content, str) else []


@lru_cache(maxsize=16)
def _variables(template: str) -> frozenset[str]:
    """The variables that a template reads, but what it sets itself."""
    return frozenset(meta.find_undeclared_variables(_parsed(template)))


@lru_cache(maxsize=16)
def _fields(template: str) -> frozenset[str]:
    """The names of attributes and keys that a template reads."""
    attributes = {node.attr for node in _parsed(template).find_all(nodes.Getattr)}
    return frozenset(attributes | {node.value for node in _parsed(template).find_all(nodes.Const)})


def _parsed(template: str) -> nodes.Template:
    return Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION_MARK.sub("", template))
