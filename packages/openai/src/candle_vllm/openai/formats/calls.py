"""Where parsers put the tool calls that they find (step 10)."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Mapping
from typing import Any

from candle_vllm.openai.formats.events import CallArguments, CallEnd, CallStart, Event

Schemas = Mapping[str, Mapping[str, Any]]  # tool name -> JSON schema of its arguments
MakeId = Callable[[int], str]

NAME = re.compile(r"[A-Za-z_][\w.\-:/]{0,255}")  # what can be a function's name, of whatever model
_ID = re.compile(r"[A-Za-z0-9_.:\-]{1,128}")
_SPECIAL = re.compile("[\ud800-\udfff]")


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
        names: texts of special tokens by their characters (see `binding`): in a string they are what they read like.

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
        self._names = {one: json.dumps(name, ensure_ascii=False)[1:-1] for one, name in (names or {}).items()}
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
        if not text.isascii():
            text = _SPECIAL.sub(lambda match: self._names.get(match.group(), ""), text)
        if text:
            self._emit(CallArguments(self.count - 1, text))


class CallBegins(Exception):
    """A call begins where one was looked for, or where none may."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class CallProbe(CallSink):
    """Takes no calls: the first that begins ends the reading, with `CallBegins`."""

    def __init__(self, tools: Schemas) -> None:
        super().__init__(_ignore, tools, call_id)

    def begin(self, name: str, given_id: str = "") -> None:
        """Raises `CallBegins`."""
        del given_id
        raise CallBegins(name)


def _ignore(_: Event) -> None:
    pass
