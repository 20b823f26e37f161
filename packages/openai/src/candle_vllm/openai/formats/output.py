# SPDX-License-Identifier: MIT
"""Turns the text and tool calls that a parser finds in one message into events (step 10 of a request's life)."""

from __future__ import annotations

import itertools
import logging
import re
import secrets
import string
from collections.abc import Callable, Mapping
from typing import Any, Literal

from candle_vllm.openai.formats.events import CallArguments, CallEnd, CallStart, Event, TextPiece
from candle_vllm.openai.formats.reader import SPACE, SPECIAL, nowhere
from candle_vllm.openai.formats.values import escaped

Schemas = Mapping[str, Mapping[str, Any]]  # tool name -> JSON schema of its arguments
MakeId = Callable[[int], str]

_NAME = re.compile(r"[A-Za-z_][\w.\-:/]{0,255}")  # of a function that the request does not offer
_ID = re.compile(r"[A-Za-z0-9_.:\-]{1,128}")

logger = logging.getLogger(__name__)


def call_id(_: int) -> str:
    """Return a call id in OpenAI's form."""
    return "call_" + secrets.token_hex(12)


def mistral_id(_: int) -> str:
    """Return a call id in Mistral's form: nine letters and digits. Mistral's templates refuse other ids."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class CallSink:
    """The calls of one message, as events.

    Args:
        tools: tools of the request, by name.
        make_id: call index -> id, for calls whose id is missing, invalid or repeated.
        most: maximum number of calls; further calls are left out. None means no limit.
        names: character that stands for a special token in the parser's input (see `layout`) -> text in arguments.

    Attributes:
        count: number of calls that have begun, including those left out.
        between: receives a JSON object that is no call, between or behind calls (`JsonCalls`).
        may_begin: called before the next call begins; if it returns false, `CallBegins` is raised.
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
        self._parts: list[str] = []  # arguments of the current call that are not emitted yet
        self._shown = False
        self.tools = tools
        self.count = 0
        self.between: Callable[[str], object] = nowhere
        self.may_begin: Callable[[], bool] | None = None

    def is_name(self, name: str) -> bool:
        """Whether a text can be the name of a function: of an offered tool, or of one that the model invented."""
        return name in self.tools or _NAME.fullmatch(name) is not None

    def begin(self, name: str, given_id: str = "") -> None:
        """Begin a call of `name`; `given_id` is the id that the model wrote."""
        if self.may_begin is not None and not self.may_begin():
            raise CallBegins(name)
        self.may_begin = None  # only the first call is checked
        index = self.count
        self.count += 1
        usable = _ID.fullmatch(given_id) is not None and given_id not in self._ids
        own = given_id if usable else self._make_id(index)
        self._ids.add(own)
        self._shown = self._most is None or self.count <= self._most
        if self._most not in (None, 1) and index == self._most:  # with a limit of 1 the request asked for one call
            logger.warning("an answer has more than %s tool calls: the rest are left out", self._most)
        if self._shown:
            self._emit(CallStart(index, own, name))

    def arguments(self, text: str) -> None:
        if self._shown:
            self._parts.append(text)

    def end(self, whole: bool = True) -> None:
        self.flush()
        if self._shown:
            self._emit(CallEnd(self.count - 1, whole))

    def flush(self) -> None:
        """Emit the arguments that were added since the last flush."""
        if not self._parts:
            return
        text = "".join(self._parts)
        self._parts.clear()
        if text := _named(text, self._names):
            self._emit(CallArguments(self.count - 1, text))


class CallBegins(Exception):
    """Raised by `CallSink.begin` if `may_begin` refuses the call; also in `elsewhere`, if a text is not only calls."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Output:
    """Collects the parts of a message as events, until they are fetched.

    White space around reasoning, and between content and calls, is left out. If content continues after calls or
    reasoning, both parts are joined by the white space before the calls or the reasoning, or else by a line break.

    Args:
        tools: tools of the request, by name.
        make_id, most_calls: see `make_id` and `most` of `CallSink`.
        shown: as `names` of `CallSink`, for the special tokens that the client wants to see in content and reasoning.
        names: see `CallSink`; also for marks that prove to be plain text.

    Attributes:
        thinking: whether the parser is inside the reasoning.
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
        self.calls.between = self._between_calls

    @property
    def in_content(self) -> bool:
        """Whether there is content since the current part began."""
        return self._content.begun

    def content(self, text: str) -> None:
        self._content.add(_named(text, self._shown))

    def reasoning(self, text: str) -> None:
        self._reasoning.add(_named(text, self._shown))

    def spelt(self, text: str, but: str = "") -> str:
        """Return a text with the names of special tokens in place of their characters, except the ones in `but`."""
        return text if text.isascii() else SPECIAL.sub(lambda one: self._spelt(one.group(), but), text)

    def _spelt(self, character: str, but: str) -> str:
        return character if character in but else self._names.get(character, character)

    def _between_calls(self, text: str) -> None:
        self.part_ends()
        self.content(text)
        self.part_ends()

    def part_ends(self) -> None:
        """End the current part; the next part may be of any kind."""
        self._content.separate()
        self._reasoning.separate()

    def end(self) -> None:
        """End the message; white space at the end of content belongs to it."""
        self._content.flush()

    def fetch(self) -> list[Event]:
        """Return the events since the last fetch; consecutive texts of a kind are joined."""
        self.calls.flush()
        if len(self._events) < 2:
            events, self._events = self._events, []
            return events
        events: list[Event] = []
        for kind, run in itertools.groupby(
            self._events, lambda event: event.kind if isinstance(event, TextPiece) else None
        ):
            alike = list(run)
            texts = (event.text for event in alike if isinstance(event, TextPiece))
            events += [TextPiece(kind, "".join(texts))] if kind else alike
        self._events.clear()
        return events

    def _piece(self, kind: Literal["content", "reasoning"]) -> Callable[[str], None]:
        return lambda text: self._events.append(TextPiece(kind, text))


def _named(text: str, names: Mapping[str, str]) -> str:
    """Return a text with the names of special tokens in place of their characters; without a name they are left out."""
    return text if text.isascii() else SPECIAL.sub(lambda match: names.get(match.group(), ""), text)


class _Text:
    """Text whose trailing white space is held back; after a separation, leading white space is dropped.

    Args:
        joined: inserted between two parts; white space at the end of the first part replaces it, unless it is "".
    """

    def __init__(self, emit: Callable[[str], None], joined: str = "") -> None:
        self._emit = emit
        self._joined = joined
        self._held: list[str] = []
        self._lead = False  # nothing of the current part was emitted, so its leading white space is dropped
        self._between = ""  # inserted before the next part
        self._empty = True  # nothing was emitted

    @property
    def begun(self) -> bool:
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
