# SPDX-License-Identifier: MIT
"""Parse complete calls in other models' formats, at the beginning of an answer (step 10 of a request's life)."""

from __future__ import annotations

from collections.abc import Iterable

from candle_vllm.openai.formats.layout import Body, ToolFormat
from candle_vllm.openai.formats.named_calls import NamedJson
from candle_vllm.openai.formats.output import CallBegins, CallSink, Schemas, call_id
from candle_vllm.openai.formats.pythonic import Pythonic
from candle_vllm.openai.formats.reader import SPACE, Need, Reader, nowhere
from candle_vllm.openai.formats.shapes import BARE_JSON, HERMES, MISTRAL, QWEN
from candle_vllm.openai.formats.tagged import Tagged

Way = tuple[str, Body]  # a mark, or "" for a format without a mark, and the format of the calls after it
COMMON: tuple[Way, ...] = (
    ("<tool_call>", HERMES),
    ("<tool_call>", QWEN),
    ("<function=", QWEN),
    ("[TOOL_CALLS]", MISTRAL[0]),
    ("[TOOL_CALLS]", NamedJson(name_end="[ARGS]")),
    ("", BARE_JSON),
    ("", Pythonic(known_only=True)),
)


def ways_beside(form: ToolFormat, ways: Iterable[Way]) -> tuple[Way, ...]:
    """Return the formats in `ways` that are not the model's own."""
    own = dict.fromkeys((*form.opens, *form.names), form.bodies)
    own[""] = tuple(body for body in (form.bare, form.unmarked) if body is not None)
    return tuple(way for way in ways if not any(_alike(way[1], body) for body in own.get(way[0], ())))


def _alike(body: Body, other: Body) -> bool:
    if isinstance(body, Tagged) and isinstance(other, Tagged):
        return body.name_open == other.name_open
    return type(body) is type(other)


class _Kept(CallSink):
    """Keeps the calls of a text until it is certain that the text consists of calls."""

    def __init__(self, tools: Schemas) -> None:
        super().__init__(nowhere, tools, call_id)
        self._calls: list[tuple[str, str, list[str]]] = []
        self._whole = 0  # number of closed calls
        self.between = self.begin  # text between calls raises `CallBegins`, as an unknown name does

    @property
    def complete(self) -> bool:
        return 0 < len(self._calls) == self._whole

    def begin(self, name: str, given_id: str = "") -> None:
        if name not in self.tools:
            raise CallBegins(name)
        self.count += 1
        self._calls.append((name, given_id, []))

    def arguments(self, text: str) -> None:
        self._calls[-1][2].append(text)

    def end(self, whole: bool = True) -> None:
        self._whole += whole

    def give(self, calls: CallSink) -> None:
        for name, given_id, parts in self._calls:
            calls.begin(name, given_id)
            calls.arguments("".join(parts))
            calls.end()


def read_elsewhere(reader: Reader, calls: CallSink, ways: Iterable[Way]) -> Need[int]:
    """Parse calls in one of the formats `ways`.

    Returns:
        -1 if calls were parsed; otherwise nothing was consumed, and the result is the number of characters that were
        examined by the format that examined most.
    """
    reader.mark()
    most = 0
    for mark, body in ways:
        yield from reader.skip_space()
        if not mark or (yield from reader.take(mark)):
            reader.put_back(mark if mark and mark in getattr(body, "names", ())[:1] else "")
            kept = _Kept(calls.tools)
            reader.lenient = False
            try:
                read = yield from body.read(reader, kept)
            except CallBegins:
                read = False
            finally:
                reader.lenient = True
            text = reader.since_mark().strip(SPACE).removeprefix(mark).lstrip(SPACE)
            # A list must end with "]" or a tag; "}" and ")" at its end are ignored.
            closed = not text.startswith("[") or text.rstrip(SPACE + "})").endswith(("]", ">"))
            if read and kept.complete and closed:
                reader.forget()
                kept.give(calls)
                return -1
        most = max(most, reader.unread())
    reader.forget()
    return most
