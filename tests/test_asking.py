"""How a model is asked: as a chat it gets what a server renders, which is what training had before the answer."""

import json

import pytest
from test_chats import CHAT, CHATML, CHATML_MARKED, LLAMA2, STYLES, ZEPHYR, styled
from texts import KINDS, as_tokenizer, of_kind, prepared, questions, write_jsonl
from tiny import make_model

from fsdp_utils.core.errors import DataError, UserError
from fsdp_utils.folders.describe import describe, tokenizer_of
from fsdp_utils.inference.asking import make_asking
from fsdp_utils.inference.config import EvalConfig

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("own_cache")]

TURNS = [("user", "a b"), ("assistant", "yes"), ("user", "c"), ("assistant", "no maybe")]
TEMPLATES = dict(chatml=CHATML, marked=CHATML_MARKED, zephyr=ZEPHYR, llama2=LLAMA2)
PLAIN_CHAT = [dict(role=role, content=content) for role, content in TURNS]


@pytest.fixture
def run(tiny):
    return describe(tiny())


@pytest.fixture
def asked(tmp_path, run):
    """`asked(tokenizer, *rows, **flags)`: what evaluate.py makes of these rows."""

    def get(tokenizer, *rows, **flags):
        path = write_jsonl(tmp_path / "asked.jsonl", rows)
        return make_asking(EvalConfig(dataset=str(path), **flags), run, tokenizer)

    return get


def before_the_last_answer(found) -> list[int]:
    """The ids of a training row in front of its last learned span."""
    row = found.dataset[0]
    labels = row["labels"].tolist()
    last = max(i for i, label in enumerate(labels) if label != -100)
    first = max((i for i in range(last) if labels[i] == -100), default=-1) + 1
    return row["input_ids"].tolist()[:first]


def served(tokenizer, messages, **more) -> list[int]:
    """The ids that a chat endpoint renders."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **more)["input_ids"]


@pytest.mark.parametrize(
    "template", [CHATML, CHATML_MARKED, ZEPHYR, LLAMA2], ids=["chatml", "marked", "zephyr", "llama2"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_is_asked_as_it_was_trained(tmp_path, asked, kind, template):
    """For every kind of tokenizer: the ids in front of the last answer of the training row, and those of a server."""
    tokenizer = as_tokenizer(of_kind(kind))
    tokenizer.chat_template = template
    made = asked(tokenizer, {"messages": PLAIN_CHAT})
    assert made.prompts[0].ids == before_the_last_answer(prepared(tmp_path, tokenizer, {"messages": PLAIN_CHAT}))
    assert made.prompts[0].ids == served(tokenizer, PLAIN_CHAT[:-1])
    assert made.questions[0].answer == "no maybe"


# whose headers say what no chat holds: a server writes it, training could not
ASKS_FOR_MORE = ["deepseek_r1"]


@pytest.mark.parametrize("name", STYLES)
def test_styles_are_asked_as_they_were_trained(tmp_path, asked, name):
    """Templates as those of real models; the token that ends a turn ends the answer."""
    tokenizer = styled(name)
    made = asked(tokenizer, {"messages": CHAT})
    assert made.prompts[0].ids == served(tokenizer, CHAT[:-1])
    trained = before_the_last_answer(prepared(tmp_path, tokenizer, {"messages": CHAT}))
    assert made.prompts[0].ids[: len(trained)] == trained
    assert (made.prompts[0].ids == trained) == (name not in ASKS_FOR_MORE)
    assert made.ends == [tokenizer.convert_tokens_to_ids(STYLES[name][2])]


def test_the_template_gets_what_training_gave_it(tmp_path, asked):
    """Variables of the row and tools; weights of messages and what follows the last answer are no part of a prompt."""
    tokenizer = styled("llama3")
    tokenizer.chat_template = "{{ tools | tojson if tools }}{{ mood }}" + tokenizer.chat_template
    row = dict(messages=[*CHAT[:4], CHAT[4] | dict(weight=1), dict(role="user", content="Thanks.")], mood="glad")
    row["tools"] = [dict(type="function", function=dict(name="add", parameters={}))]
    made = asked(tokenizer, row)
    assert made.prompts[0].ids == before_the_last_answer(prepared(tmp_path, tokenizer, row))
    assert made.prompts[0].ids == served(tokenizer, CHAT[:-1], tools=row["tools"], mood="glad")
    body = made.prompts[0].body
    assert body == dict(
        messages=CHAT[:-1], tools=row["tools"], tool_choice="none", chat_template_kwargs=dict(mood="glad")
    )


def test_questions_become_a_turn_of_the_user(asked):
    """Without the words of the layout's own prompt; shots are earlier turns, behind the system's message."""
    tokenizer = styled("llama3")
    user, assistant = (lambda said, role=role: dict(role=role, content=said) for role in ("user", "assistant"))
    rows = questions(3)
    made = asked(tokenizer, *rows, samples=2, n_shots=1, prompt="chat")
    shot = [user(rows[2]["question"]), assistant(rows[2]["answer"])]
    for prompt, row in zip(made.prompts, rows, strict=False):
        assert prompt.ids == served(tokenizer, [*shot, user(row["question"])])
    made = asked(tokenizer, {"messages": CHAT}, {"messages": [CHAT[0], *PLAIN_CHAT]}, samples=1, n_shots=1)
    assert made.prompts[0].ids == served(tokenizer, [CHAT[0], *PLAIN_CHAT, *CHAT[1:-1]])
    alpaca = dict(instruction="Add.", input="1 and 2", output="3")
    assert asked(tokenizer, alpaca, prompt="chat").prompts[0].body["messages"] == [user("Add.\n1 and 2")]
    row, given = dict(question="Who?", context="Ann came.", answer="Ann"), "{context} {question}"
    made = asked(tokenizer, row, prompt="chat", prompt_template=given)
    assert made.prompts[0].body["messages"] == [user("Ann came. Who?")]
    with pytest.raises(DataError, match="line 1: column 'context' is read by nothing"):
        asked(tokenizer, row, prompt="chat")


def test_auto_asks_as_it_was_trained(tmp_path, save_run):
    """Chats are chats; questions are plain, unless the run was given chats or a chat template."""
    folder = make_model(tmp_path / "base")
    tokenizer = tokenizer_of(describe(folder))
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": PLAIN_CHAT}])
    shared = write_jsonl(tmp_path / "shared.jsonl", [{"conversations": PLAIN_CHAT}])
    (tmp_path / "template").write_text(CHATML)
    rows = write_jsonl(tmp_path / "rows.jsonl", questions(2))

    def style(asked, **flags):
        run = describe(save_run(folder, "custom_lora", **flags)[0])
        made = make_asking(EvalConfig(dataset=str(asked)), run, tokenizer_of(run))
        return "chat" if "messages" in made.prompts[0].body else "plain"

    assert style(rows) == "plain"
    assert style(chats) == "chat"
    assert style(rows, dataset=chats) == "chat"
    assert style(rows, dataset=shared, columns="messages=conversations") == "chat"
    assert style(rows, chat_template=tmp_path / "template") == "chat"
    assert style(rows, dataset=tmp_path / "gone.jsonl") == "plain"


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        (dict(messages=PLAIN_CHAT), dict(prompt="plain"), "--prompt plain: .*holds chats"),
        (dict(messages=PLAIN_CHAT[:1]), {}, "line 1: no message of the assistant follows a question"),
        (dict(messages=PLAIN_CHAT[1:2]), {}, "line 1: no message of the assistant follows a question"),
        (dict(messages=[PLAIN_CHAT[0], dict(role="assistant", content=" ")]), {}, "row 1: has no answer"),
        (dict(messages=PLAIN_CHAT, context="c"), {}, "line 1: column 'context' is not written by the chat template"),
        (dict(text="t"), dict(prompt="chat"), "line 1: rows of text have no answer to compare"),
    ],
)
def test_what_cannot_be_asked(asked, row, flags, message):
    """Each is one line that names the row or the flag."""
    with pytest.raises(UserError, match=message) as error:
        asked(styled("llama3"), row, **flags)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_template(asked):
    """Chats cannot be asked, questions are asked plainly unless a chat is wanted; several templates are none."""
    tokenizer = as_tokenizer(of_kind("byte_level"))
    assert asked(tokenizer, *questions(1)).prompts[0].body.keys() == {"prompt"}
    for rows, flags in (([{"messages": PLAIN_CHAT}], {}), (questions(1), dict(prompt="chat"))):
        with pytest.raises(UserError, match="has no chat template"):
            asked(tokenizer, *rows, **flags)
    tokenizer.chat_template = dict(one=CHATML, other=ZEPHYR)
    with pytest.raises(DataError, match=r"--dataset .*asked\.jsonl.*: chats need one chat template"):
        asked(tokenizer, *questions(1), prompt="chat")


def test_plain_prompts_are_those_of_training(tmp_path, asked):
    """The ids in front of the learned answer."""
    tokenizer = as_tokenizer(of_kind("sentencepiece_first"))
    made = asked(tokenizer, *questions(1))
    assert made.prompts[0].ids == before_the_last_answer(prepared(tmp_path, tokenizer, *questions(1)))
    assert json.loads(json.dumps(made.prompts[0].body)) == dict(prompt=made.prompts[0].ids)
