"""Tests of fsdp_utils.data.chats: what a template writes reaches the model, and exactly the answers are learned."""

import json

import pytest
from texts import as_tokenizer, make_config, of_kind, prepared, trained_text, write_jsonl

from fsdp_utils.core.errors import DataError
from fsdp_utils.data.chats import give_template
from fsdp_utils.data.tokens import prepare_dataset

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("own_cache")]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as Qwen3: only the last turn keeps its (empty) thoughts
CHATML_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITHOUT_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "Say Four."},
    {"role": "assistant", "content": "Again: Four."},
]


@pytest.fixture
def tokenizer():
    return as_tokenizer(of_kind("byte_level"))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "Four.<|im_end|>Again: Four.<|im_end|>"),
        (CHATML_MARKED, "Four.<|im_end|>Again: Four.<|im_end|>"),
        (CHATML_THOUGHTS, "Four.<|im_end|><think>\n\n</think>\n\nAgain: Four.<|im_end|>"),
        (WITHOUT_END, "assistant: Four.assistant: Again: Four.</s>"),
    ],
)
def test_chat_trains_on_assistant_turns_only(tmp_path, tokenizer, template, expected):
    """The labels of a chat of two turns are the assistant's words and the ends of its turns."""
    tokenizer.chat_template = template
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": CHAT}])
    prepared = prepare_dataset(make_config(path), tokenizer)
    assert trained_text(prepared, tokenizer) == expected
    whole = tokenizer.decode(prepared.dataset[0]["input_ids"])
    assert whole.removesuffix("</s>").strip() == tokenizer.apply_chat_template(CHAT, tokenize=False).strip()


ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [ZEPHYR, LLAMA2], ids=["zephyr", "llama2"])
@pytest.mark.parametrize("space", ["prepend", "first", "always"])
def test_chat_tokens_are_those_of_the_template(tmp_path, space, template):
    """Tokenizers that put a space before what they begin with (Llama-2, Mistral) do so once, not at every turn."""
    tokenizer = as_tokenizer(of_kind(f"sentencepiece_{space}"))
    tokenizer.chat_template = template
    turns = [("user", "a b"), ("assistant", "yes"), ("user", "c"), ("assistant", "no maybe")]
    messages = [dict(role=role, content=content) for role, content in turns]
    prepared = prepare_dataset(make_config(write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}])), tokenizer)
    (row,) = prepared.dataset
    assert list(row["input_ids"]) == tokenizer.apply_chat_template(messages)["input_ids"]
    learned = "".join(tokenizer.convert_ids_to_tokens([i for i in row["labels"] if i != -100]))
    assert learned.replace("▁", "") == "yes</s>nomaybe</s>"


def test_chat_that_the_assistant_opens(tmp_path, tokenizer):
    """The header of the first turn is not learned, though its words hold those of the answer."""
    tokenizer.chat_template = CHATML
    messages = [
        dict(role="assistant", content="a"),
        dict(role="user", content="u"),
        dict(role="assistant", content="b"),
    ]
    prepared = prepare_dataset(make_config(write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}])), tokenizer)
    assert trained_text(prepared, tokenizer) == "a<|im_end|>b<|im_end|>"


def test_chat_errors_name_the_row(tmp_path, tokenizer):
    """No chat template, a template that refuses a row, and one that rewrites earlier turns: each says what to do."""
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": CHAT}])
    with pytest.raises(DataError, match="no chat template"):
        prepare_dataset(make_config(path), tokenizer)
    for template, message in (
        ("{{ raise_exception('roles must alternate') }}", "line 1: .*roles must alternate"),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "line 1: .*two answers into one another"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(DataError, match=message):
            prepare_dataset(make_config(path), tokenizer)


# --- templates as those of real models, written short: what of CHAT each is to learn

HEADED = "<|im_start|>{{ m.role }}\n"
STYLES = {
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n{{ m.content | trim }}<|eot|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}",
        "Four.<|eot|>Again: Four.<|eot|>",
        "<|eot|>",
    ),
    "phi3": (  # ends the chat behind the last turn
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "Four.<|end|>Again: Four.<|end|>\n</s>",
        "<|end|>",
    ),
    "gpt_oss": (  # the last turn returns, others end
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
        "{% if loop.last and m.role == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "<|message|>Four.<|end|><|message|>Again: Four.<|return|>",
        "<|return|>",
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}<|start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>model\n{% endif %}",
        "Four.<|end|>Again: Four.<|end|>",
        "<|end|>",
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
        "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
        " Four.</s> Again: Four.</s>",
        "</s>",
    ),
    "qwen3": (  # thoughts in the last turn only
        "{% for m in messages %}" + HEADED + "{% if m.role == 'assistant' and loop.last %}<think>\n"
        "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "Four.<|im_end|><think>\n\n</think>\n\nAgain: Four.<|im_end|>",
        "<|im_end|>",
    ),
    "deepseek_r1": (  # asks for a thought that no chat holds
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}"
        "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
        "Four.<|end|>Again: Four.<|end|>",
        "<|end|>",
    ),
    "vicuna": (  # no special token at all
        "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}{{ eos_token if m.role == 'assistant' else ' ' }}"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        " Four.</s> Again: Four.</s>",
        "</s>",
    ),
    "only_at_the_end": (  # no turn is ended, the chat is
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}",
        "Four.Again: Four.</s>",
        "</s>",
    ),
}
MARKS = ["<|start|>", "<|stop|>", "<|eot|>", "<|end|>", "<|return|>", "<|message|>", "<|user|>", "<|assistant|>"]


def styled(name, *, special=True):
    tokenizer = as_tokenizer(of_kind("byte_level"))
    if special:
        tokenizer.add_special_tokens({"extra_special_tokens": [*MARKS, "<|system|>", "<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = STYLES[name][0]
    return tokenizer


@pytest.mark.parametrize("name", STYLES)
def test_turns_are_found_by_what_the_template_adds(tmp_path, name):
    """Whatever the messages say: the row is what transformers renders, and exactly the answers and ends are learned.
    The token that ends an answer is known, for servers to stop there."""
    tokenizer, (_, expected, end) = styled(name), STYLES[name]
    found = prepared(tmp_path, tokenizer, {"messages": CHAT})
    assert tokenizer.decode(found.dataset[0]["input_ids"]) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert trained_text(found, tokenizer) == expected
    assert found.report.ends == (tokenizer.convert_tokens_to_ids(end),)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize(
    "answers",
    [
        ("assistant\n", "user"),  # words of the headers
        ("Two and two?", "Say Four."),  # those of the questions
        ("", ""),
        ("  spaced  ", "\n\nlines\n"),
        ("x", "x"),
        ("<think>", "]"),
    ],
    ids=str,
)
def test_answers_that_mislead(tmp_path, name, answers, special):
    """The learned part is the same with any answer, but for the answer: what it says decides nothing."""

    def learned(*given):
        messages = [dict(m) for m in CHAT]
        messages[2]["content"], messages[4]["content"] = given
        tokenizer = styled(name, special=special)
        found = prepared(tmp_path, tokenizer, {"messages": messages})
        return trained_text(found, tokenizer)

    want = learned("ANSWER-1", "ANSWER-2")
    trims = "trim" in STYLES[name][0]
    for place, answer in enumerate(answers, 1):
        want = want.replace(f"ANSWER-{place}", answer.strip() if trims else answer)
    assert learned(*answers) == want


def test_only_what_is_switched_on_is_learned(tmp_path):
    """weight 0, train false, --train_on last: the whole chat is read, the turn is not learned."""
    tokenizer, row = styled("llama3"), {"messages": CHAT}
    off = lambda **more: {"messages": [*CHAT[:2], {**CHAT[2], **more}, *CHAT[3:]]}
    for given, flags in ((off(weight=0), {}), (off(train=False), {}), (row, dict(train_on="last"))):
        found = prepared(tmp_path, tokenizer, given, **flags)
        assert trained_text(found, tokenizer) == "Again: Four.<|eot|>"
        assert found.lengths.tolist() == prepared(tmp_path, tokenizer, row).lengths.tolist()
    kept = prepared(tmp_path, tokenizer, off(weight=1, train=True))
    assert trained_text(kept, tokenizer) == STYLES["llama3"][1]
    with pytest.raises(DataError, match=r"line 1: weight 0\.3: only 0"):
        prepared(tmp_path, tokenizer, off(weight=0.3))
    asked = {"messages": [{**CHAT[1], "train": True}, CHAT[2]]}
    assert prepared(tmp_path, tokenizer, asked).report.unread == {"train of other roles than assistant": 1}


def test_marks_of_a_template_can_be_switched_off_too(tmp_path, tokenizer):
    tokenizer.chat_template = CHATML_MARKED
    row = {"messages": [*CHAT[:2], {**CHAT[2], "weight": 0}, *CHAT[3:]]}
    assert trained_text(prepared(tmp_path, tokenizer, row), tokenizer) == "Again: Four.<|im_end|>"


# --- what a chat carries

TOOLS = (
    "{% if tools %}<|start|>{{ tools | tojson }}<|end|>{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>"
    "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CLOCK = {"type": "function", "function": {"name": "clock", "description": "d", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "utc"}}}
CALLS = [
    {"role": "user", "content": "time?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "ask"},
    {"role": "tool", "content": "noon"},
    {"role": "assistant", "content": "Noon."},
]


def test_everything_reaches_the_template(tmp_path):
    """Tools, calls, thoughts and the template's own variables; of a table, tools may be text."""
    tokenizer = styled("llama3")
    tokenizer.chat_template = "{{ greeting }}" + TOOLS
    want = tokenizer.apply_chat_template(CALLS, tools=[CLOCK], greeting="hi", tokenize=False)
    for tools in ([CLOCK], json.dumps([CLOCK])):
        row = {"messages": CALLS, "tools": tools, "greeting": "hi"}
        found = prepared(tmp_path, tokenizer, row)
        assert tokenizer.decode(found.dataset[0]["input_ids"]) == want and not found.report.unread
        called = '<think>ask</think><call>clock {"zone": "utc"}</call><|end|>'
        assert trained_text(found, tokenizer) == f"{called}Noon.<|end|>"


@pytest.mark.parametrize(
    "how", ["| tojson", "if call.function.arguments is string else call.function.arguments | tojson"]
)
def test_arguments_of_calls_are_written_as_servers_do(tmp_path, how):
    """OpenAI's rows hold their JSON as text: a template that makes JSON of objects would escape it."""
    tokenizer = styled("llama3")
    tokenizer.chat_template = TOOLS.replace("arguments | tojson", f"arguments {how}")
    call = {**CALL, "function": {"name": "clock", "arguments": json.dumps(CALL["function"]["arguments"])}}
    row = {"tools": [CLOCK], "messages": [CALLS[0], {**CALLS[1], "tool_calls": [call]}, *CALLS[2:]]}
    found = prepared(tmp_path, tokenizer, row)
    want = tokenizer.apply_chat_template(CALLS, tools=[CLOCK], tokenize=False)
    assert tokenizer.decode(found.dataset[0]["input_ids"]) == want


def test_chats_of_the_sharegpt_kind(tmp_path):
    """`from` and `value`, by --columns; a speaker that is not known is refused."""
    tokenizer = styled("llama3")
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    row = {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in CHAT]}
    found = prepared(tmp_path, tokenizer, row, columns="messages=conversations")
    assert found.dataset.to_list() == prepared(tmp_path, tokenizer, {"messages": CHAT}).dataset.to_list()
    with pytest.raises(DataError, match="message 1 is from 'Ann'"):
        prepared(tmp_path, tokenizer, {"messages": [{"from": "Ann", "value": "x"}]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": [CLOCK], "messages": CHAT}, "column 'tools' is not written by the chat template"),
        ({"documents": [{"title": "t", "text": "x"}], "messages": CHAT}, "column 'documents' is not written"),
        ({"messages": CALLS}, "'tool_calls' of message 2 is not written"),
        ({"messages": [{**CHAT[1], "images": ["x"]}, CHAT[2]]}, "'images' of message 1 is not written"),
        ({"messages": [CHAT[1], {**CHAT[2], "function_call": {"name": "f"}}]}, "'function_call' of message 2"),
    ],
)
def test_what_the_template_leaves_out_is_refused(tmp_path, row, message):
    """An answer that depends on what the model does not see is not learned."""
    tokenizer = styled("llama3")
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content | trim", "(m.content or '') | trim")
    with pytest.raises(DataError, match=f"line 1: {message}.*--chat_template"):
        prepared(tmp_path, tokenizer, row)


def test_fields_that_do_not_matter_are_named(tmp_path):
    """And fields that a template writes because it writes whole messages are read."""
    tokenizer = styled("llama3")
    row = {"id": 7, "messages": [{**CHAT[1], "name": "Ann"}, CHAT[2]]}
    found = prepared(tmp_path, tokenizer, row)
    assert found.report.unread == {"id": 1, "name of messages": 1}
    tokenizer.chat_template = "{% for m in messages %}{{ m | tojson }}{{ eos_token }}{% endfor %}"
    assert prepared(tmp_path, tokenizer, row).report.unread == {"id": 1}


def test_columns_named_as_settings_of_the_renderer(tmp_path):
    """Such a name cannot be a variable, and changes nothing."""
    tokenizer = styled("llama3")
    names = ("conversations", "padding", "tokenize", "add_generation_prompt", "chat_template")
    found = prepared(tmp_path, tokenizer, {"messages": CHAT, **dict.fromkeys(names, "x")})
    assert found.report.unread == dict.fromkeys(names, 1)
    assert trained_text(found, tokenizer) == STYLES["llama3"][1]


# --- a template of the user's


def test_give_template(tmp_path, tokenizer):
    """It takes the place of the tokenizer's; what is no template is refused."""
    path = tmp_path / "template.jinja"
    path.write_text(CHATML)
    give_template(tokenizer, str(path))
    assert tokenizer.apply_chat_template(CHAT, tokenize=False).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert trained_text(prepared(tmp_path, tokenizer, {"messages": CHAT}), tokenizer).startswith("Four.<|im_end|>")
    for text, message in (("{% for %}", "TemplateSyntaxError"), ("", "the file is empty")):
        path.write_text(text)
        with pytest.raises(DataError, match=f"--chat_template {path}: .*{message}"):
            give_template(tokenizer, str(path))
    with pytest.raises(DataError, match=r"none: FileNotFoundError"):
        give_template(tokenizer, str(tmp_path / "none"))


# --- what other templates do

PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}{{ part.text }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_content_that_is_not_written_is_refused(tmp_path):
    """Some templates want content as a list of parts, and write nothing of a string."""
    tokenizer = styled("llama3")
    tokenizer.chat_template = PARTS
    with pytest.raises(DataError, match="line 1: the content of message 1 is not written by the chat template"):
        prepared(tmp_path, tokenizer, {"messages": CHAT})
    listed = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]
    assert (
        trained_text(prepared(tmp_path, tokenizer, {"messages": listed}), tokenizer)
        == "Four.<|end|>Again: Four.<|end|>"
    )


def test_a_call_without_content_whose_thoughts_are_dropped(tmp_path):
    """As Qwen3.5 writes it: history loses thoughts, and content that is not there loses its line end too."""
    tokenizer = styled("llama3")
    tokenizer.chat_template = (
        "{% set last = namespace(at=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set last.at = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.index0 > last.at %}<think>\n</think>\n{% endif %}"
        "{% if m.content %}{{ m.content }}{% if m.tool_calls %}\n\n{% endif %}{% endif %}"
        "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    calls = [{name: v for name, v in m.items() if name != "reasoning_content"} for m in CALLS]
    found = prepared(tmp_path, tokenizer, {"messages": [*calls, *CHAT[1:3]]})
    ends = "<call>clock</call><|im_end|>", "Noon.<|im_end|>", "<think>\n</think>\nFour.<|im_end|>"
    assert trained_text(found, tokenizer) == "".join(ends)


def test_an_end_that_only_some_messages_share(tmp_path):
    """A tool's content is quoted, a user's is not: the end of both is the end of an answer that does not return."""
    tokenizer = styled("gpt_oss")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m.content }}", "{{ m.content | tojson if m.role == 'tool' else m.content }}"
    )
    messages = [CHAT[1], {"role": "tool", "content": "noon"}, *CHAT[2:]]
    assert trained_text(prepared(tmp_path, tokenizer, {"messages": messages}), tokenizer) == STYLES["gpt_oss"][1]


@pytest.mark.parametrize("name", ["system", "context", "history"])
def test_a_column_is_not_read_because_its_name_occurs(tmp_path, name):
    """As a role, a word of a comment, a variable that the template sets."""
    tokenizer = styled("llama3")
    tokenizer.chat_template = (
        "{# context #}{% set history = 1 %}{% if messages[0].role == 'system' %}{% endif %}" + TOOLS
    )
    with pytest.raises(DataError, match=f"line 1: column '{name}' is not written"):
        prepared(tmp_path, tokenizer, {name: "x", "messages": CHAT})
    found = prepared(tmp_path, tokenizer, {"role": "x", "message": "y", "m": "z", "messages": CHAT})
    assert found.report.unread == {"role": 1, "message": 1, "m": 1}


def test_thoughts_that_history_loses_are_named(tmp_path):
    """Those of the last answer are learned, or the row is refused; what a template drops on purpose is counted."""
    tokenizer = styled("qwen3")
    thought = lambda message: {**message, "reasoning_content": "hm"}
    last = prepared(tmp_path, tokenizer, {"messages": [*CHAT[:4], thought(CHAT[4])]})
    assert "<think>\nhm\n</think>" in trained_text(last, tokenizer) and not last.report.unread
    earlier = prepared(tmp_path, tokenizer, {"messages": [*CHAT[:2], thought(CHAT[2]), *CHAT[3:]]})
    assert earlier.report.unread == {"reasoning_content of messages": 1}
    tokenizer.chat_template = tokenizer.chat_template.replace("and loop.last", "and loop.last and enable_thinking")
    with pytest.raises(DataError, match="'reasoning_content' of message 5 is not written"):
        prepared(tmp_path, tokenizer, {"messages": [*CHAT[:4], thought(CHAT[4])]})


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        ("{{ m.content[:3] }}", CHAT),
        ("{{ m.content if m.role != 'system' }}", [{"role": "system", "content": "Four"}, *CHAT[1:]]),
        ("{{ m.content[0].text }}", [{**m, "content": [{"type": "text", "text": t} for t in "xy"]} for m in CHAT]),
        ("{{ m.content }}", [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]),
    ],
    ids=["cut", "dropped, though its words occur", "first part", "as Python's list"],
)
def test_content_that_is_not_all_written(tmp_path, content, messages):
    tokenizer = styled("llama3")
    tokenizer.chat_template = PARTS.replace("{% for part in m.content %}{{ part.text }}{% endfor %}", content)
    refusals = "the content of message .* is not written|the chat template writes content in parts as a Python list"
    with pytest.raises(DataError, match=f"line 1: ({refusals})"):
        prepared(tmp_path, tokenizer, {"messages": messages})


def test_a_mark_that_is_never_reached_is_none(tmp_path, tokenizer):
    tokenizer.chat_template = "{# {% generation %} #}" + CHATML
    assert trained_text(prepared(tmp_path, tokenizer, {"messages": CHAT}), tokenizer).startswith("Four.<|im_end|>")


def test_nested_chats(tmp_path):
    """What stands beside the messages that --columns finds inside a column is not lost."""
    tokenizer, flags = styled("llama3"), dict(columns="messages=d.messages")
    assert prepared(tmp_path, tokenizer, {"d": {"messages": CHAT, "id": 1}}, **flags).report.unread == {"d.id": 1}
    with pytest.raises(DataError, match="'value' and 'content'"):
        prepared(tmp_path, tokenizer, {"messages": [{"from": "human", "value": "x", "content": "y"}]})
    with pytest.raises(DataError, match="chat_template_kwargs is no object"):
        prepared(tmp_path, tokenizer, {"messages": CHAT, "chat_template_kwargs": "x"})


def test_parts_where_the_last_turn_ends_otherwise(tmp_path):
    """Content in parts is found as a string is."""
    tokenizer = styled("phi3")
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m.content }}", "{{ m.content[0].text }}")
    listed = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]
    assert trained_text(prepared(tmp_path, tokenizer, {"messages": listed}), tokenizer) == STYLES["phi3"][1]


def test_an_end_that_is_text_is_told(tmp_path):
    """A template made for another tokenizer: its end is learned letter by letter, and no server knows it."""
    tokenizer = styled("llama3", special=False)
    found = prepared(tmp_path, tokenizer, {"messages": CHAT}, {"messages": CHAT[:3]})
    assert "note: answers end in '<|eot|>', which is no special token: no server stops there (2 rows)" in str(
        found.report
    )
    assert not found.report.ends
    assert "note" not in str(prepared(tmp_path, styled("llama3"), {"messages": CHAT}).report)


def test_special_tokens_in_an_answer_are_told(tmp_path):
    """They are learned as such, as a server would read them; of a question they are not learned."""
    tokenizer = styled("llama3")
    asked = [{**CHAT[1], "content": "say <|eot|>"}, CHAT[2]]
    assert "note" not in str(prepared(tmp_path, tokenizer, {"messages": asked}).report)
    answered = [CHAT[1], {**CHAT[2], "content": "ok <|eot|> done"}]
    said = str(prepared(tmp_path, tokenizer, {"messages": answered}, {"messages": CHAT}).report)
    assert "note: answers hold special tokens in their own words, which are learned as such (1 rows)" in said
