"""Arguments of calls that stand alone behind the name: an object, or text that is a tool's one argument, as code is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from candle_vllm.openai.formats.calls import NAME, CallSink
from candle_vllm.openai.formats.json_calls import skip_closers
from candle_vllm.openai.formats.json_value import read_value
from candle_vllm.openai.formats.reader import Markers, Need, Reader, markers
from candle_vllm.openai.formats.values import argument_types

CODE_TOOLS = ("python", "ipython", "code_interpreter")


class RawArgument:
    """Takes the text of a call that is no object, and makes arguments of it.

    It is the value of the argument that `text_argument` names. Where there is none, the text is passed on as it is:
    the caller sees what the model wrote. Without text there are no arguments.
    """

    def __init__(self, calls: CallSink, key: str) -> None:
        self._emit = calls.arguments
        self._key = key
        self._empty = True

    def add(self, text: str) -> None:
        """More of the text."""
        if self._empty and self._key:
            self._emit("{" + json.dumps(self._key, ensure_ascii=False) + ': "')
        self._empty = False
        self._emit(json.dumps(text, ensure_ascii=False)[1:-1] if self._key else text)

    def end(self) -> None:
        """There is no more."""
        if self._empty:
            self._emit("{}")
        elif self._key:
            self._emit('"}')


def text_argument(name: str, schema: Mapping[str, Any]) -> str:
    """The argument of a tool that takes nothing but a text, or code; "" where the tool does not."""
    properties = schema.get("properties")
    keys = list(properties) if isinstance(properties, Mapping) else []
    if len(keys) == 1 and "string" in (argument_types(schema, keys[0]) or ("string",)):
        return keys[0]
    return "code" if name in CODE_TOOLS else ""


def read_arguments(reader: Reader, calls: CallSink, name: str, stops: Markers) -> Need[None]:
    """A call's arguments up to a mark, which is not read."""
    yield from reader.skip_space()
    start = yield from reader.peek()
    if NAME.fullmatch(name) is not None and (start or reader.whole):
        calls.begin(name)
        if start == "{":
            calls.end((yield from read_value(reader, calls.arguments, stops)))
        else:
            calls.end((yield from _read_raw(reader, calls, text_argument(name, calls.tools.get(name, {})), stops)))
    reader.put_back((yield from reader.until(stops, _ignore)))


def _read_raw(reader: Reader, calls: CallSink, key: str, stops: Markers) -> Need[bool]:
    """Text up to a mark, which is not read; False when it was cut."""
    raw = RawArgument(calls, key)
    mark = yield from reader.until(stops, raw.add, inside=True)
    reader.put_back(mark)
    closed = bool(mark) or reader.whole
    if closed:
        raw.end()
    return closed


@dataclasses.dataclass(frozen=True)
class RawCode:
    """Code that is the argument of a tool which runs it, without its name: Llama 3's `<|python_tag|>print(1)`.

    Attributes:
        names: of such tools; the first that the request offers is called.
        closers: what ends the code.
    """

    names: tuple[str, ...] = CODE_TOOLS
    closers: tuple[str, ...] = ()

    def read(self, reader: Reader, calls: CallSink) -> Need[bool]:
        """Reads what follows the opening mark; False where no such tool is offered, or what follows is no code.

        A text that was cut before it was clear that it is no other way to call a function is none.
        """
        name = next((name for name in self.names if name in calls.tools), "")
        unclear = reader.ended and not reader.whole
        yield from reader.skip_space()
        start = yield from reader.peek()
        if not name or unclear or not start or start in "{<":
            return False
        calls.begin(name)
        key = text_argument(name, calls.tools[name]) or "code"
        calls.end((yield from _read_raw(reader, calls, key, markers(*self.closers))))
        yield from skip_closers(reader, self.closers)
        return True


def _ignore(_: str) -> None:
    pass
