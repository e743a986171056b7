"""evaluate.py --server: the answers of a server are scored as those of the model in this process."""

import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from test_chats import CHATML
from texts import questions, write_jsonl
from tiny import make_model

import evaluate
from evaluate import EvalConfig
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import parse
from fsdp_utils.folders.describe import describe, tokenizer_of
from fsdp_utils.inference.generation import HFGenerator
from fsdp_utils.inference.load import load_for_inference
from fsdp_utils.inference.scoring import NEXT_PROMPTS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that knows a chat template."""
    made = make_model(tmp_path_factory.mktemp("model") / "tiny")
    tokenizer = tokenizer_of(describe(made))
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(made)
    return made


class Answering:
    """What stands behind the address: a model, and what was asked of it.

    Args:
        reply: body -> (status, reply); the model answers where it is None.
    """

    def __init__(self, folder, *, names=("served",), reply=None):
        run = describe(folder)
        self.model, self.tokenizer = load_for_inference(run, device=CPU), tokenizer_of(run)
        self.names, self.reply, self.asked, self.lock = names, reply, [], threading.Lock()

    def answer(self, path, body):
        with self.lock:  # the requests come from several threads
            self.asked.append((path, body))
            if self.reply:
                return self.reply(body)
            chat = path.endswith("/chat/completions")
            ids = self.rendered(body) if chat else body["prompt"]
            settings = {name: body[name] for name in ("temperature", "seed")}
            ended = dict(ends=body.get("stop_token_ids", ()), stops=body.get("stop", ()))
            answering = HFGenerator(self.model, self.tokenizer, max_new_tokens=body["max_tokens"], **settings, **ended)
            (given,) = answering.answers([(0, ids)], batch_size=1)
        choice = dict(message=dict(content=given.text)) if chat else dict(text=given.text)
        return 200, dict(choices=[choice], usage=dict(completion_tokens=given.tokens))

    def rendered(self, body):
        return self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)["input_ids"]


@contextmanager
def serving(behind):
    """The address of a server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send(200, dict(data=[dict(id=name) for name in behind.names]))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send(*behind.answer(self.path, body))

        def send(self, status, reply):
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://localhost:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def config(folder, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", questions(7))
    given = dict(
        model=str(folder), dataset=str(rows), samples=6, n_shots=1, batch_size=3, max_new_tokens=8, device="cpu"
    )
    return EvalConfig(**given, output_file=str(tmp_path / "here.json"), world_size=1)


def result_of(config, name):
    config = replace(config, output_file=str(config.output_file).replace("here", name))
    evaluate.main(config)
    with open(config.output_file) as file:
        return json.load(file)


def answers(result):
    return [{key: row[key] for key in ("question", "prediction", "tokens", "correct")} for row in result["results"]]


@pytest.mark.parametrize("prompt", ["plain", "chat"])
def test_a_server_answers_as_the_model_does(config, folder, capsys, prompt):
    """Greedy answers are the same, by ids and by messages; memory, which is not known, is not printed."""
    config, behind = replace(config, prompt=prompt), Answering(folder)
    expected = result_of(config, "here")
    capsys.readouterr()
    with serving(behind) as url:
        found = result_of(replace(config, server=url + "/v1/"), "there")
    assert answers(found) == answers(expected)
    assert (expected["peak_memory_gib"] > 0, found["peak_memory_gib"]) == (True, None)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("score ") and "GiB" not in last
    endpoint = dict(plain="/v1/completions", chat="/v1/chat/completions")[prompt]
    assert {path for path, _ in behind.asked} == {endpoint} and len(behind.asked) == 6


def test_what_a_server_is_told(config, folder):
    """Length, temperature, a seed of its own for each question, what ends an answer, and that nothing else applies."""
    behind = Answering(folder)
    with serving(behind) as url:
        asking = replace(config, server=url, temperature=0.5, seed=10)
        first = result_of(asking, "there")
        assert answers(first) == answers(result_of(replace(asking, batch_size=1), "again"))
        plain = [body for _, body in behind.asked[:6]]
        result_of(replace(asking, prompt="chat"), "chat")
        chat = behind.asked[-1][1]
    assert sorted(body["seed"] for body in plain) == list(range(10, 16))
    for body in (*plain, chat):
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("served", 8, 0.5)
        assert (body["top_p"], body["top_k"], body["repetition_penalty"]) == (1.0, -1, 1.0)
    assert plain[0]["stop"] == list(NEXT_PROMPTS) and "stop" not in chat
    assert [message["role"] for message in chat["messages"]] == ["user", "assistant", "user"]


def test_several_questions_at_a_time(config, folder):
    """As many as --batch_size: the server waits for that many before it answers one."""
    together = threading.Barrier(3, timeout=20)
    behind = Answering(folder)

    def answer(path, body):
        together.wait()
        return 200, dict(choices=[dict(text="4")], usage=dict(completion_tokens=1))

    behind.answer = answer
    with serving(behind) as url:
        assert result_of(replace(config, server=url), "there")["total"] == 6


REPLIES = {
    "answers 400: prompt too long": lambda body: (400, dict(error=dict(message="prompt\ntoo long"))),
    "answers 404: no such model": lambda body: (404, dict(message="no such model")),
    "answers 500: broken": lambda body: (500, b"broken"),
    "is no OpenAI-compatible server": lambda body: (200, b"<html>"),
    "replies with no answer, or no usage": lambda body: (200, dict(choices=[])),
}


@pytest.mark.parametrize("message", REPLIES)
def test_errors_of_a_server(config, folder, message):
    """Each is one line that names the address, and ends the evaluation at once; what was answered is kept."""
    behind = Answering(folder)
    behind.reply = lambda body: (
        REPLIES[message](body)
        if len(behind.asked) > 2
        else (200, dict(choices=[dict(text="4")], usage=dict(completion_tokens=1)))
    )
    with serving(behind) as url:
        with pytest.raises(UserError, match=f"--server {url}: {message}") as error:
            result_of(replace(config, server=url, batch_size=1), "there")
        assert "\n" not in str(error.value)
        assert len(behind.asked) == 3
        behind.reply = None
        assert result_of(replace(config, server=url), "there")["total"] == 6


def test_no_server(config, folder):
    """Nobody at the address; several models, or not the one that is wanted."""
    with pytest.raises(UserError, match=r"--server http://localhost:9: no connection \(.*refused"):
        result_of(replace(config, server="http://localhost:9"), "there")
    with serving(Answering(folder, names=("base", "adapter"))) as url:
        with pytest.raises(UserError, match="serves base, adapter; name one by --served_model_name"):
            result_of(replace(config, server=url), "there")
        with pytest.raises(UserError, match=r"--served_model_name other: .* serves base, adapter"):
            result_of(replace(config, server=url, served_model_name="other"), "there")
        assert result_of(replace(config, server=url, served_model_name="adapter"), "there")["total"] == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--server=localhost:8000"], "--server localhost:8000: is no address"),
        (["--server=http://a", "--backend=vllm"], "--server with --backend vllm"),
        (["--server=http://a", "--world_size=2"], "--server: is asked by one process"),
        (["--server=http://a", "--eval_type=full"], "--eval_type full: a --server has its weights"),
        (["--served_model_name=a"], "--served_model_name: is of a --server"),
        (["--max_model_len=100"], "--max_model_len 100: is of --backend vllm"),
        (["--gpu_memory_utilization=0.5"], "--gpu_memory_utilization 0.5: is of --backend vllm"),
        (["--gpu_memory_utilization=1.5", "--backend=vllm"], "--gpu_memory_utilization 1.5: must be at most 1"),
    ],
)
def test_flags_that_do_not_fit(flags, message, monkeypatch):
    """They are refused before anything is read."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match=message):
        parse(EvalConfig, flags, prog="evaluate.py")
