"""A server that speaks OpenAI's protocol (vLLM, SGLang, llama.cpp), asked several questions at a time."""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from fsdp_utils.core.errors import UserError
from fsdp_utils.inference.generation import Output

TIMEOUT = 3600  # seconds; an answer waits until the server has room for it
# a server fills gaps with what the model's generation_config.json says, as a repetition penalty
NEUTRAL = dict(top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0)


class Server:
    """One address. Every error is a UserError of one line.

    Args:
        url: as `http://localhost:8000`; the `/v1` behind it may be left away.
    """

    def __init__(self, url: str):
        self.named, self.url = f"--server {url}", url.rstrip("/").removesuffix("/v1")

    def get(self, path: str) -> dict:
        """What it says at a path.

        Raises:
            UserError: no connection, an HTTP error, or something else than an object.
        """
        return self._open(Request(f"{self.url}{path}"))

    def post(self, path: str, body: dict) -> dict:
        """Its reply to a request; raises as `get`."""
        headers = {"Content-Type": "application/json"}
        return self._open(Request(f"{self.url}{path}", data=json.dumps(body).encode(), headers=headers))

    def _open(self, request: Request) -> dict:
        try:
            with urlopen(request, timeout=TIMEOUT) as reply:
                found = json.loads(reply.read())
        except HTTPError as error:
            raise UserError(f"{self.named}: answers {error.code}: {_message(error)}") from None
        except (OSError, HTTPException) as error:  # URLError is one; also a connection that breaks
            why = getattr(error, "reason", None) or error or type(error).__name__
            raise UserError(f"{self.named}: no connection ({why}); start the server, or correct the address") from None
        except ValueError:  # no JSON, or no address
            raise UserError(f"{self.named}: is no OpenAI-compatible server; correct the address") from None
        if not isinstance(found, dict):
            raise UserError(f"{self.named}: is no OpenAI-compatible server; correct the address")
        return found

    def model(self, wanted: str | None) -> str:
        """The name of the model to ask: `wanted`, or the only one.

        Raises:
            UserError: it has no such model, or several.
        """
        names = [str(entry.get("id")) for entry in self.get("/v1/models").get("data") or []]
        has = f"{self.named}: serves {', '.join(names) or 'nothing'}"
        if wanted is not None and wanted not in names:
            raise UserError(f"--served_model_name {wanted}: {has}; name one of these")
        if wanted is None and len(names) != 1:
            raise UserError(f"{has}; name one by --served_model_name")
        return wanted or names[0]


def _message(error: HTTPError) -> str:
    """What the body of an error says, in one line."""
    text = error.read().decode(errors="replace")
    try:
        found = json.loads(text)
        said = found.get("error", found)  # vLLM and OpenAI put it inside
        text = said.get("message", text) if isinstance(said, dict) else str(said)
    except (ValueError, AttributeError):
        pass
    return " ".join(str(text).split())[:300] or str(error.reason)


class ServerGenerator:
    """Answers of a server.

    Args:
        model: name of the model there.
        endpoint: path of the questions.
        bodies: of the requests, by index: `prompt` (ids) or `messages`.
        ends: ids that end an answer, beside those that the server knows.
        stops: texts that end an answer.
        seed: of sampling; that of an answer depends on its index alone.
    """

    def __init__(
        self,
        server: Server,
        *,
        model: str,
        endpoint: str,
        bodies: Sequence[dict],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        ends: Sequence[int] = (),
        stops: Sequence[str] = (),
    ):
        self.server, self.endpoint, self.bodies, self.seed = server, endpoint, bodies, seed
        self.settings = dict(model=model, max_tokens=max_new_tokens, temperature=temperature, **NEUTRAL)
        self.settings |= {name: list(given) for name, given in dict(stop=stops, stop_token_ids=ends).items() if given}

    def answers(self, prompts: list[tuple[int, list[int]]], *, batch_size: int) -> Iterator[Output]:
        """The answers to the requests of these indices, `batch_size` at a time, as they come.

        Raises:
            UserError: no connection, an HTTP error, a reply without an answer.
        """
        begun, pool, errors = time.perf_counter(), ThreadPoolExecutor(batch_size), []

        def ask(index: int) -> tuple[int, str, int]:
            """Nothing more once one has failed: whoever waits for it may come to know later than the next is asked."""
            if errors:
                raise errors[0]
            try:
                return self._ask(index)
            except UserError as error:
                errors.append(error)
                raise

        try:
            asked = [pool.submit(ask, index) for index, _ in prompts]
            for done in tqdm(as_completed(asked), total=len(asked), desc="answering", unit="question"):
                index, text, tokens = done.result()
                now = time.perf_counter()  # several are under way: each is given the time since the one before
                yield Output(index, text, tokens, now - begun)
                begun = now
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or an interruption nothing more is asked

    def _ask(self, index: int) -> tuple[int, str, int]:
        reply = self.server.post(self.endpoint, {**self.settings, "seed": self.seed + index, **self.bodies[index]})
        try:
            choice = reply["choices"][0]
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            tokens = reply["usage"]["completion_tokens"]
        except (KeyError, IndexError, TypeError):
            what = "a message of an error" if isinstance(reply, dict) and "error" in reply else "no answer, or no usage"
            raise UserError(f"{self.server.named}: replies with {what} ({str(reply)[:200]})") from None
        return index, text or "", tokens
