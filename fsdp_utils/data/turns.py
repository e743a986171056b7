"""Turns: where in a rendered chat the answers stand, told by what the template writes around them."""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from fsdp_utils.data.encode import last_of
from fsdp_utils.data.layouts import BadRow, has_value

UNLIKELY = "\u241e\u241f\u241e"  # symbols that no chat template has a use for
ANSWERS = "assistant"


@dataclass(frozen=True)
class Span:
    """Where in a rendered chat a turn that is learned stands, from what the model is to write first to what ends it."""

    start: int
    end: int


@dataclass(frozen=True)
class Turns:
    """The turns of one chat.

    Args:
        messages: of the chat.
        full: what the template writes of them.
        render: what it writes of other messages, with the header that asks for an answer or without.
        special: the special tokens of the tokenizer.
    """

    messages: list[dict]
    full: str
    render: Callable[..., str]
    special: tuple[str, ...]

    def span(self, i: int) -> Span:
        """Where message i, an answer, stands: from the header that asks for it to what the template puts behind it."""
        start = self._start(i)
        alone = self.full if i == len(self.messages) - 1 else self.render(self.messages[: i + 1])
        written = alone[: self._visible_end(i, alone)]
        if self.full.startswith(written) and len(written) >= start:
            return Span(start, len(written))
        try:
            return self._rewritten(i, start)
        except BadRow:
            if span := self._ended_before_the_next(i, start, alone):
                return span
            raise

    def _visible_end(self, i: int, alone: str) -> int:
        """Where a chat that ends with answer i ends, without the white space that the template puts there."""
        content = self.messages[i].get("content")
        if isinstance(content, str) and content != content.rstrip():
            with suppress(BadRow):
                after = self._around(self.messages[: i + 1], i)[1]
                if alone.endswith(after):
                    return len(alone) - len(after) + len(after.rstrip())
        return len(alone.rstrip())

    def _start(self, i: int) -> int:
        """Where answer i begins: behind the header that a server puts before it."""
        history = self.messages[:i]
        asked = self.render(history, header=True) if history else None
        if asked is not None and self.full.startswith(asked):
            return len(asked)
        before = self._around(self.messages, i)[0]
        if not self.full.startswith(before):
            raise BadRow(f"the chat template rewrites what stands before message {i + 1}, so its place is not known")
        if asked is None:  # no header asks for a first message
            return len(before)
        told = len(_common(asked, self.render(history)))
        shared = len(_common(asked, self.full))
        if shared > told and (kept := _whole(asked[told:shared])):
            # the header goes on with what this chat has not, as the start of a thought
            return min(told + len(kept), len(before))
        header = asked[told:]
        found = before.rfind(header) if header.strip() else -1
        if found < 0 and any(has_value(v) for name, v in self.messages[i].items() if name not in ("role", "content")):
            raise BadRow(f"the chat template writes no header before message {i + 1}, so its place is not known")
        return len(before) if found < 0 else found + len(header)

    def _around(self, messages: list[dict], i: int) -> tuple[str, str]:
        """What the template writes before and after the content of message i, whatever that is.

        Raises:
            BadRow: the content is not written once and by itself.
        """
        parts = [{"type": "text", "text": UNLIKELY}]  # some templates write nothing of a string
        content = parts if isinstance(messages[i].get("content"), list) else UNLIKELY
        rendered = self.render([*messages[:i], {**messages[i], "content": content}, *messages[i + 1 :]])
        before, found, after = rendered.partition(UNLIKELY)
        if not found or UNLIKELY in after:
            raise BadRow(f"the chat template does not write message {i + 1} once, so its place is not known")
        return before, after

    def _rewritten(self, i: int, start: int) -> Span:
        """The place of an answer that is written otherwise, or ended otherwise, than where it is the last message:
        without its thoughts, without the end of the chat."""
        before, after = self._around(self.messages, i)
        if not self.full.startswith(before) or not self.full.endswith(after):
            raise BadRow(f"the chat template rewrites message {i + 1}, so its place is not known")
        content_end = len(self.full) - len(after)
        tail = self._around(self.messages[: i + 1], i)[1].rstrip()
        if tail and after.startswith(tail):
            return Span(start, content_end + len(tail))
        ending = _whole(_common(after, tail)).rstrip() or self._end_of_any(after, i)
        return Span(start, content_end + len(ending))

    def _ended_before_the_next(self, i: int, start: int, alone: str) -> Span | None:
        """The place of an answer whose content cannot stand in for another, as of a tool call without any: it ends
        with the token that ends it where it is the last message."""
        token = last_of(alone.rstrip(), self.special)
        following = self._around(self.messages, i + 1)[0]
        found = self.full.rfind(token, start, len(following)) if token and self.full.startswith(following) else -1
        return None if found < 0 else Span(start, found + len(token))

    def _end_of_any(self, after: str, i: int) -> str:
        """The first special token behind an answer, if it ends messages of other roles too: otherwise it begins the
        next message."""
        found = first_of(after, self.special)
        if not found:
            return ""
        ending, roles = after[: found[1]], [message["role"] for message in self.messages]
        others = [j for j in range(i) if roles[j] != ANSWERS and roles[j + 1] != roles[i + 1]]
        return ending if any(self._around(self.messages, j)[1].startswith(ending) for j in others) else ""

    def ending(self, i: int, span: Span) -> str:
        """What ends a turn, at the end of its span."""
        with suppress(BadRow):
            after = self._around(self.messages, i)[1]
            if self.full.endswith(after):
                return self.full[max(span.start, len(self.full) - len(after)) : span.end]
        text = self.full[span.start : span.end].rstrip()  # as of a tool call without content: what it ends with
        return last_of(text, self.special)


def _common(a: str, b: str) -> str:
    """What two texts begin with."""
    ends = (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return a[: next(ends, min(len(a), len(b)))]


def first_of(text: str, tokens: tuple[str, ...]) -> tuple[str, int] | None:
    """The first of these tokens in a text, and where it ends."""
    places = [(text.find(token), -len(token), token) for token in tokens if token in text]
    if not places:
        return None
    at, _, token = min(places)
    return token, at + len(token)


def _whole(text: str) -> str:
    """What two texts share, up to where a mark ends in it: they may share the beginning of the next mark too."""
    found = re.match(r".*[>\])}\s]", text, re.DOTALL)
    return found.group() if found else ""
