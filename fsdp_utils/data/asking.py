"""Asking: rows become questions to a chat, and these the ids and messages that a model is asked with."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from fsdp_utils.core.errors import DataError
from fsdp_utils.data.chats import Chat, Template, pick_chat, words_of
from fsdp_utils.data.encode import TextEncoder
from fsdp_utils.data.files import Row
from fsdp_utils.data.layouts import SWITCHES, BadRow, Form
from fsdp_utils.data.sources import Examples, no_answer
from fsdp_utils.data.turns import ANSWERS

SYSTEM = ("system", "developer")  # who speaks before the first turn
READ_BY_SERVERS = ("tools", "documents")  # fields of a request; other variables go to the template by name


@dataclass(frozen=True)
class ChatQuestion:
    """A chat up to the answer that is asked for.

    Args:
        messages: all before that answer; the last is no answer itself.
        variables: what else the template may read.
        question: what the messages say, which tells one task from another.
        answer: what is expected.
        where: the row's place, for messages.
    """

    messages: list[dict]
    question: str
    answer: str
    variables: dict = field(default_factory=dict)
    where: str = ""

    def after(self, shots: Sequence["ChatQuestion"]) -> list[dict]:
        """The messages with solved questions as earlier turns, behind what the system says of this one."""
        first = next((i for i, message in enumerate(self.messages) if message["role"] not in SYSTEM), 0)
        turns = [message for shot in shots for message in shot.solved if message["role"] not in SYSTEM]
        return [*self.messages[:first], *turns, *self.messages[first:]]

    @property
    def solved(self) -> list[dict]:
        """The messages with their answer."""
        return [*self.messages, dict(role=ANSWERS, content=self.answer)]


def chat_questions_of(examples: Examples) -> list[ChatQuestion]:
    """Every row as a chat: of chats what stands before the last answer, of others one turn of the user.

    Raises:
        DataError: a row that cannot be read, that asks nothing, or that has no answer.
    """
    return [_chat_question(row, form) for row, form in examples]


def _chat_question(row: Row, form: Form) -> ChatQuestion:
    if form.layout != "messages" and not form.has_answer:
        raise no_answer(row, form)
    try:
        if row.problem:
            raise BadRow(row.problem)
        read = _of_chat if form.layout == "messages" else _of_fields
        return read(row, form)
    except BadRow as error:
        raise DataError(f"{row.where}: {error}; correct or remove the row") from None


def _of_fields(row: Row, form: Form) -> ChatQuestion:
    form.unread(row.value)
    picked = form.fields(row.value)
    messages = [dict(role="user", content=form.user_turn(picked))]
    return ChatQuestion(messages, form.question(picked), form.split(picked)[1], where=row.where)


def _of_chat(row: Row, form: Form) -> ChatQuestion:
    messages, variables = pick_chat(row.value, form)
    last = max((i for i, message in enumerate(messages) if message["role"] == ANSWERS), default=0)
    if not last:
        raise BadRow("no message of the assistant follows a question")
    given = [{name: value for name, value in message.items() if name not in SWITCHES} for message in messages]
    said = ["\n".join(words_of(message.get("content"))) for message in messages]
    return ChatQuestion(given[:last], "\n".join(said[:last]), said[last], variables, row.where)


@dataclass(frozen=True)
class Prompt:
    """What one question is asked with.

    Args:
        ids: that generation starts from.
        body: of a request to a server that comes to the same ids.
    """

    ids: list[int]
    body: dict


def plain_prompts(questions: Sequence, tokenizer, *, shots: Sequence = ()) -> list[Prompt]:
    """Questions of `sources`, each in the prompt of its layout behind the solved ones: the ids that training had."""
    before = "".join(f"{shot.prompt}{shot.answer}\n\n" for shot in shots)
    ids = TextEncoder(tokenizer).prompts([before + question.prompt for question in questions])
    return [Prompt(prompt, dict(prompt=prompt)) for prompt in ids]


def chat_prompts(questions: Sequence[ChatQuestion], tokenizer, *, shots: Sequence = ()) -> list[Prompt]:
    """Chats as the tokenizer's template writes them, with the header that asks for an answer: what a server's chat
    endpoint makes of the messages.

    Raises:
        DataError: the tokenizer has no template, or the template fails or leaves out what an answer may depend on.
    """
    template, texts, bodies = Template(tokenizer, source=questions[0].where), [], []
    for question in questions:
        messages = question.after(shots)
        chat = Chat(messages, question.variables, template)
        try:
            chat.unread()
            texts.append(chat.asked())
        except BadRow as error:
            raise DataError(f"{question.where}: {error}; correct or remove the row") from None
        bodies.append(_request(messages, chat.variables))
    rows = TextEncoder(tokenizer).rows(texts)
    return [Prompt(ids.tolist(), body) for (ids, _), body in zip(rows, bodies, strict=True)]


def _request(messages: list[dict], variables: dict) -> dict:
    """The body of a request to a chat endpoint. Tools are described to the model; their calls stay text."""
    body = dict(messages=messages) | {name: variables[name] for name in READ_BY_SERVERS if name in variables}
    others = {name: value for name, value in variables.items() if name not in READ_BY_SERVERS}
    if "tools" in body:
        body["tool_choice"] = "none"
    return body | (dict(chat_template_kwargs=others) if others else {})


def turn_ends(questions: Sequence[ChatQuestion], tokenizer) -> list[int]:
    """Ids of the special token that ends an answer in the tokenizer's template; none where text or EOS ends it."""
    with suppress(BadRow):
        first = questions[0]
        chat = Chat(first.solved, first.variables, Template(tokenizer, source=first.where), train_on="last")
        _, token = chat.text()
        return [] if token is None else [tokenizer.convert_tokens_to_ids(token)]
    return []
