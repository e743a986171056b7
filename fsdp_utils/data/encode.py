"""Ids: texts become token ids as a tokenizer writes what it begins with, and exactly as they are where they go on."""

import copy
import json
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

MEMO, SHORT = 2**14, 2**12  # how many texts, of so many characters, are kept with their ids: many rows repeat some
JOINT = "\n"  # what a slow tokenizer is given before a text that goes on


class Piece(NamedTuple):
    """A part of a row's text, and whether it is learned."""

    text: str
    trained: bool


class Text(NamedTuple):
    """The text of a row. `ended`: EOS is put behind it; `bare`: it holds its special tokens, none is put before it."""

    pieces: list[Piece]
    ended: bool = False
    bare: bool = False


Parts = list[tuple[np.ndarray, bool]]  # ids, int32, and whether they are trained


def joined(parts: Parts) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32, which are trained) `[tokens]`."""
    ids = np.concatenate([ids for ids, _ in parts] or [np.zeros(0, dtype=np.int32)])
    return ids, np.repeat([trained for _, trained in parts], [len(ids) for ids, _ in parts]).astype(bool)


def last_of(text: str, tokens: tuple[str, ...]) -> str:
    """The longest of these tokens that a text ends with, or ""."""
    if not text.endswith(tokens):
        return ""
    return max((token for token in tokens if text.endswith(token)), key=len)


class TextEncoder:
    """What a tokenizer makes of texts, without the special tokens that it would add.

    Many tokenizers put a space before whatever they begin with, or drop the white space beside an added token. For what
    a row begins with that is right: a prompt is served so. A text that goes on where another ended, as an answer, must
    come to exactly its own characters, or another text is learned (transformers#26273).

    Args:
        tokenizer: of transformers.

    Attributes:
        prefix: the ids that the tokenizer puts before a text, as [BOS] or [].
        eos: [EOS] or [].
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.prefix = special_prefix(tokenizer)
        self.eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._tokens = tuple(token.content for token in tokenizer.added_tokens_decoder.values())
        backend = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
        if backend is not None:
            backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
        self._begins = backend
        self._goes_on = exact(backend) if backend is not None else None
        self._memo: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})

    def __getstate__(self):
        return {**vars(self), "_memo": ({}, {})}

    def prompts(self, texts: list[str]) -> list[list[int]]:
        """Ids that generation starts from: the special prefix, unless a text has it, and the text."""
        return [ids.tolist() for ids, _ in self.rows([Text([Piece(text, False)]) for text in texts])]

    def rows(self, texts: list["Text"]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids int32, which are trained) `[tokens]` of each text."""
        return [joined(parts) for parts in self.parts(texts)]

    def parts(self, texts: list["Text"]) -> list[Parts]:
        """The ids of each text, in parts that are trained or not."""
        cut = [[piece for piece in text.pieces if piece.text] for text in texts]
        keyed = [[(self._anchor(pieces, i), piece) for i, piece in enumerate(pieces)] for pieces in cut]
        given = [key for row in keyed for key in row]
        begins = self._ids([token + piece.text for token, piece in given if token is not None], 0)
        on = self._ids([piece.text for token, piece in given if token is None], 1)
        return [self._row(row, text, begins, on) for row, text in zip(keyed, texts, strict=True)]

    def _anchor(self, pieces: list[Piece], i: int) -> str | None:
        """The added token before piece i, where the tokenizer is given both; "" at the beginning; None where it goes
        on."""
        if i == 0:
            return ""
        return None if pieces[i].trained else last_of(pieces[i - 1].text, self._tokens) or None

    def _row(self, keyed: list[tuple[str | None, Piece]], text: "Text", begins: dict, on: dict) -> Parts:
        found = []
        for token, piece in keyed:
            ids = on[piece.text] if token is None else begins[token + piece.text]
            found.append((ids[1:] if token else ids, piece.trained))  # the token is at the end of the piece before
        n = len(self.prefix)
        if n and not text.bare and (not found or found[0][0][:n].tolist() != self.prefix):
            found.insert(0, (np.array(self.prefix, dtype=np.int32), False))
        if text.ended and self.eos:
            found.append((np.array(self.eos, dtype=np.int32), True))
        return found

    def _ids(self, texts: list[str], which: int) -> dict[str, np.ndarray]:
        """Ids of each distinct text."""
        memo, encode = self._memo[which], (self._encode_beginning, self._encode_going_on)[which]
        distinct = dict.fromkeys(texts)
        missing = [text for text in distinct if text not in memo]
        made = zip(missing, (np.array(ids, dtype=np.int32) for ids in encode(missing)), strict=True) if missing else ()
        found = {text: memo[text] for text in distinct if text in memo} | dict(made)
        if len(memo) > MEMO:
            memo.clear()
        memo.update((text, found[text]) for text in missing if len(text) <= SHORT)
        return found

    def _encode_beginning(self, texts: list[str]) -> list[list[int]]:
        if self._begins is None:
            return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return _encode_all(self._begins, texts)

    def _encode_going_on(self, texts: list[str]) -> list[list[int]]:
        if self._goes_on is not None:
            return _encode_all(self._goes_on, texts)
        joint = self._encode_beginning([JOINT])[0]
        both = zip(self._encode_beginning([JOINT + text for text in texts]), self._encode_beginning(texts), strict=True)
        # where the joint melts into the text, the text alone is the nearest that a slow tokenizer offers
        return [ids[len(joint) :] if ids[: len(joint)] == joint else alone for ids, alone in both]


def _encode_all(backend: Tokenizer, texts: list[str]) -> list[list[int]]:
    backend.no_truncation()  # which earlier calls of the tokenizer leave behind
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def special_prefix(tokenizer) -> list[int]:
    """The ids a tokenizer puts before a text, as [BOS] or []; what it puts behind would end the prompt too early."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = [i for i in range(len(full)) if full[i : i + len(plain)] == plain]
    return full[: starts[0]] if starts else []


def exact(backend: Tokenizer) -> Tokenizer:
    """A tokenizer that adds no space before what it is given and drops none: itself, if it is one."""
    parts = [part for part in (backend.normalizer, backend.pre_tokenizer) if part is not None]
    added = backend.get_added_tokens_decoder().values()
    keeps = not any(token.lstrip or token.rstrip for token in added)
    if keeps and all(_exact(state := json.loads(part.__getstate__())) == state for part in parts):
        return backend
    state = json.loads(backend.to_str())
    for name in ("normalizer", "pre_tokenizer"):
        state[name] = _exact(state[name])
    for token in state["added_tokens"]:
        token.update(lstrip=False, rstrip=False)
    made = Tokenizer.from_str(json.dumps(state))
    made.encode_special_tokens = backend.encode_special_tokens  # which its file does not hold
    return made


def _exact(state: dict | None) -> dict | None:
    """The settings of a normalizer or pre-tokenizer without what adds or drops white space at the ends; None for one
    that does nothing else."""
    if state is None or state["type"] in ("Prepend", "Strip"):
        return None
    state = copy.deepcopy(state)
    for name in ("normalizers", "pretokenizers"):
        if name in state:
            state[name] = [kept for part in state[name] if (kept := _exact(part)) is not None]
    if "prepend_scheme" in state:
        state["prepend_scheme"] = "never"
    if "add_prefix_space" in state:
        state["add_prefix_space"] = False
    return state
