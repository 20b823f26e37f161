# SPDX-License-Identifier: MIT
"""What a parser has found of one message so far, its texts and its tool calls, put together as events (step 10)."""

from __future__ import annotations

import logging
import re
import secrets
import string
from collections.abc import Callable, Mapping
from typing import Any, Literal

from candle_vllm.openai.formats.events import CallArguments, CallEnd, CallStart, Event, TextPiece
from candle_vllm.openai.formats.reader import SPACE
from candle_vllm.openai.formats.values import escaped

Schemas = Mapping[str, Mapping[str, Any]]  # tool name -> JSON schema of its arguments
MakeId = Callable[[int], str]

NAME = re.compile(r"[A-Za-z_][\w.\-:/]{0,255}")  # what can be a function's name, of whatever model
_ID = re.compile(r"[A-Za-z0-9_.:\-]{1,128}")
_SPECIAL = re.compile("[\ud800-\udfff]")

logger = logging.getLogger(__name__)


def call_id(_: int) -> str:
    """OpenAI's form."""
    return "call_" + secrets.token_hex(12)


def mistral_id(_: int) -> str:
    """Mistral's form: nine letters and digits; its templates refuse others."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class CallSink:
    """The calls of one message, as events.

    Args:
        emit: takes an event.
        tools: what the request offers, by name.
        make_id: makes ids of calls that bring none.
        most: further calls are left out; None is no limit.
        names: texts of special tokens by their characters (see `layout`): in a string they are what they read like.

    Attributes:
        tools: what the request offers, by name.
        count: calls begun.
        may_begin: asked before the next call begins; `CallBegins` is raised where it may not.
    """

    def __init__(
        self,
        emit: Callable[[Event], object],
        tools: Schemas,
        make_id: MakeId,
        most: int | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self._emit = emit
        self._names = {one: escaped(name) for one, name in (names or {}).items()}
        self._make_id = make_id
        self._most = most
        self._ids: set[str] = set()
        self._parts: list[str] = []  # of the present call's arguments, not given away yet
        self._shown = False
        self.tools = tools
        self.count = 0
        self.may_begin: Callable[[], bool] | None = None

    def begin(self, name: str, given_id: str = "") -> None:
        """The next call is of `name`; `given_id` is the id that the model gave it."""
        if self.may_begin is not None and not self.may_begin():
            raise CallBegins(name)
        self.may_begin = None  # the calls behind it have its form
        index = self.count
        self.count += 1
        usable = _ID.fullmatch(given_id) is not None and given_id not in self._ids
        own = given_id if usable else self._make_id(index)
        self._ids.add(own)
        self._shown = self._most is None or self.count <= self._most
        if self._most not in (None, 1) and index == self._most:  # at 1 the request asked for one call
            logger.warning("an answer has more than %s tool calls: those behind them are left out", self._most)
        if self._shown:
            self._emit(CallStart(index, own, name))

    def arguments(self, text: str) -> None:
        """More of the present call's arguments."""
        if self._shown:
            self._parts.append(text)

    def end(self, whole: bool = True) -> None:
        """The present call is over."""
        self.flush()
        if self._shown:
            self._emit(CallEnd(self.count - 1, whole))

    def flush(self) -> None:
        """Gives away the arguments that have come since the last time."""
        if not self._parts:
            return
        text = "".join(self._parts)
        self._parts.clear()
        if text := _named(text, self._names):
            self._emit(CallArguments(self.count - 1, text))


class CallBegins(Exception):
    """A call begins where one was looked for, or where none may."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Output:
    """Takes what is found and keeps events until they are fetched.

    White space around reasoning, and between content and calls, separates them and is part of neither. Where content
    goes on behind them, that before them stays in it, or else a line break.

    Args:
        tools: what the request offers, by name.
        make_id: makes ids of calls.
        most_calls: further calls are left out; None is no limit.
        shown: texts of the special tokens that are to be shown, by their characters here (see `layout`); the others
            are left out.
        names: texts of special tokens by their characters, for the strings in arguments and what is text after all.

    Attributes:
        calls: where calls go.
        thinking: what is read now is reasoning.
    """

    def __init__(
        self,
        tools: Schemas,
        make_id: MakeId,
        most_calls: int | None,
        shown: Mapping[str, str],
        names: Mapping[str, str] | None = None,
    ) -> None:
        self._events: list[Event] = []
        self._shown = shown
        self._names = names or {}
        self.thinking = False
        self._reasoning = _Text(self._piece("reasoning"))
        self._content = _Text(self._piece("content"), joined="\n")
        self._reasoning.separate()
        self.calls = CallSink(lambda event: self._events.append(event), tools, make_id, most_calls, names)

    @property
    def in_content(self) -> bool:
        """There is content since the last part began."""
        return self._content.begun

    def content(self, text: str) -> None:
        """Text of the answer."""
        self._content.add(_named(text, self._shown))

    def reasoning(self, text: str) -> None:
        """Text of the thoughts."""
        self._reasoning.add(_named(text, self._shown))

    def spelt(self, text: str, but: str = "") -> str:
        """A text with the names of special tokens in it, but for those characters in `but`."""
        return text if text.isascii() else _SPECIAL.sub(lambda one: self._spelt(one.group(), but), text)

    def _spelt(self, character: str, but: str) -> str:
        return character if character in but else self._names.get(character, character)

    def part_ends(self) -> None:
        """What comes next is something else."""
        self._content.separate()
        self._reasoning.separate()

    def end(self) -> None:
        """The message is over; content keeps the white space at its end."""
        self._content.flush()

    def fetch(self) -> list[Event]:
        """The events since the last time, pieces of a kind joined."""
        self.calls.flush()
        if len(self._events) < 2:
            events, self._events = self._events, []
            return events
        events: list[Event] = []
        run: list[str] = []  # texts that are joined to the last event's
        for event in self._events:
            last = events[-1] if events else None
            if isinstance(event, TextPiece) and isinstance(last, TextPiece) and event.kind == last.kind:
                run.append(event.text)
                continue
            _join(events, run)
            events.append(event)
        _join(events, run)
        self._events.clear()
        return events

    def _piece(self, kind: Literal["content", "reasoning"]) -> Callable[[str], None]:
        return lambda text: self._events.append(TextPiece(kind, text))


def _named(text: str, names: Mapping[str, str]) -> str:
    """A text with the names of the special tokens in it; those without one are left out."""
    return text if text.isascii() else _SPECIAL.sub(lambda match: names.get(match.group(), ""), text)


def _join(events: list[Event], run: list[str]) -> None:
    """Puts the texts of a run behind that of the last event."""
    if run:
        last = events[-1]
        assert isinstance(last, TextPiece)
        events[-1] = TextPiece(last.kind, last.text + "".join(run))
        run.clear()


class _Text:
    """Text whose white space at either end is held back.

    Args:
        emit: takes the text.
        joined: stands between two parts where the first ends without white space; "" joins them as they are.
    """

    def __init__(self, emit: Callable[[str], None], joined: str = "") -> None:
        self._emit = emit
        self._joined = joined
        self._held: list[str] = []
        self._lead = False  # nothing of the present part was emitted; white space at its beginning is dropped
        self._between = ""  # stands before the next part
        self._empty = True  # nothing was emitted

    @property
    def begun(self) -> bool:
        """Something of the present part was emitted."""
        return not (self._lead or self._empty)

    def add(self, text: str) -> None:
        if self._lead:
            text = text.lstrip(SPACE)
        kept = text.rstrip(SPACE)
        if kept:
            self._emit("".join([self._between, *self._held, kept]))
            self._held.clear()
            self._lead = self._empty = False
            self._between = ""
        if len(kept) < len(text):
            self._held.append(text[len(kept) :])

    def separate(self) -> None:
        if self.begun and self._joined:
            self._between = "".join(self._held) or self._joined
        self._held.clear()
        self._lead = True

    def flush(self) -> None:
        if self._held:
            self._emit("".join(self._held))
            self._held.clear()
