# SPDX-License-Identifier: MIT
"""Formats in which a message consists of parts, each with a header that names its kind."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Collection
from typing import NamedTuple

from candle_vllm.openai.formats.json_value import read_value
from candle_vllm.openai.formats.layout import CALL, THOUGHTS, Body
from candle_vllm.openai.formats.named_calls import RawArgument, read_arguments, text_argument
from candle_vllm.openai.formats.output import Output
from candle_vllm.openai.formats.reader import SPACE, SPACES, CodeSpans, Markers, Need, Reader, Sink, markers, nowhere

_MOST_HEADER = 512
_TO = "to="
_RECIPIENT = re.compile(rf"\b{_TO}([^\s<\ud800-\udfff]+)")
_ROLE = re.compile(r"\s*([^\s<\ud800-\udfff]*)")
_CHANNEL = re.compile(r"\s*(?:analysis|commentary|final)\b")
_KINDS = ("json", "code")  # kinds of a part's text, as named in headers


class _Header(NamedTuple):
    """Header of a part.

    Attributes:
        text: the header up to `message`, with the marks in it; "" without a header.
        recipient: the function to which the part is addressed; "" without one, and for `people`.
        role: the author of the part; the model's role if it is not given.
        lead: the beginning of the part's text, if the header lacks its end mark and this text was read with it.
    """

    text: str = ""
    recipient: str = ""
    role: str = ""
    lead: str = ""


@dataclasses.dataclass(frozen=True)
class Harmony:
    """OpenAI's harmony: `<|channel|>analysis<|message|>...<|end|><|start|>assistant to=functions.f...<|call|>`.

    The analysis channel is reasoning, other channels are content, and a part that is addressed to a function calls it.
    Parts of other authors than the model are left out.

    Attributes:
        start, channel, message: marks before a part, before its channel ("" without channels), and before its text.
        constrain: the mark before the kind of text, in a header.
        ends: marks after a part; grammars write [0] between parts, [1] after an answer and [-1] after calls.
        reasoning: texts in the header of a reasoning part.
        role: the model's role.
        people: recipients that are not functions; without channels, an answer is addressed to the last of them.
        name_space: prefix of a function's name.
        body: format of a call; None if it is a JSON object of arguments.
        body_open: the mark before `body`.
    """

    start: str = "<|start|>"
    channel: str = "<|channel|>"
    message: str = "<|message|>"
    constrain: str = "<|constrain|>"
    ends: tuple[str, ...] = ("<|end|>", "<|return|>", "<|call|>")
    reasoning: tuple[str, ...] = ("<|channel|>analysis",)
    role: str = "assistant"
    people: tuple[str, ...] = ("user", "assistant", "all")
    name_space: str = "functions."
    body: Body | None = None
    body_open: str = ""

    def states(self, tools: Collection[str]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        people = {f"{one}{self.message}": "" for one in self.people}
        thoughts = {f"{one.removeprefix(self.channel)}{self.message}": THOUGHTS for one in self.reasoning}
        headers = dict.fromkeys(filter(None, (self.start, self.channel)), "header")
        header = {self.message: "", **thoughts, **({_TO: "recipient"} if tools else {})}
        own = {mark.removeprefix(_TO): to for mark, to in thoughts.items() if mark.startswith(_TO)}
        recipient = {self.message: CALL if tools else "", **people, **own}
        within = {**dict.fromkeys(self.ends, ""), **headers}
        states = {"": {**within, self.message: ""}, "header": header, "recipient": recipient}
        return {**states, THOUGHTS: within, CALL: within}, {} if self.channel and not tools else {_TO: "recipient"}

    def run(self, reader: Reader, output: Output, *, tools: bool, in_reasoning: bool = False) -> Need[None]:
        stops = markers(self.start, self.channel, *self.ends)
        opened = _Header(self.reasoning[0], role=self.role) if in_reasoning else None
        while True:
            header = opened or (yield from self._header(reader))
            opened = None
            if not header.role.startswith(self.role):
                yield from self._text(reader, stops, nowhere)
            elif header.recipient and tools:
                yield from self._call(reader, output, header.recipient.removeprefix(self.name_space), stops)
                yield from reader.take(*self.ends)
            else:
                output.thinking = any(mark in header.text for mark in self.reasoning)
                sink = output.reasoning if output.thinking else output.content
                sink(header.lead)
                yield from self._text(reader, stops, sink)
                output.thinking = False
            if not (yield from reader.peek()):
                return
            output.part_ends()

    def _text(self, reader: Reader, stops: Markers, sink: Sink) -> Need[None]:
        """Parse a part's text and the end mark after it; any other mark is not consumed."""
        mark = yield from reader.until(stops, sink)
        reader.put_back("" if mark in self.ends else mark)

    def _call(self, reader: Reader, output: Output, name: str, stops: Markers) -> Need[None]:
        """Parse a part that is addressed to a function, up to the mark after it."""
        if self.body is None:
            yield from read_arguments(reader, output.calls, name, stops)
            return
        reader.mark()
        yield from reader.skip_space()
        if self.body_open:
            yield from reader.take(self.body_open)
        called = yield from self.body.read(reader, output.calls)
        if not called and not reader.cut and not reader.drop_begun(self.body_open):
            reader.unread()
        reader.forget()
        reader.put_back((yield from reader.until(stops, nowhere if called else output.content)))

    def _header(self, reader: Reader) -> Need[_Header]:
        yield from reader.skip_space()
        begins = (self.start, self.message, _TO, *filter(None, (self.channel,)))
        begun = yield from reader.take(*begins)
        if begun in ("", self.message):
            if not begun:
                reader.drop_begun(*begins)
            return _Header(role=self.role)
        text, mark = yield from reader.name(markers(self.message, self.start, *self.ends), _MOST_HEADER)
        if mark == self.message:
            found, role = _RECIPIENT.search(begun + text), _ROLE.match(text if begun == self.start else "")
            recipient = found[1] if found and found[1] not in self.people else ""
            return _Header(begun + text, recipient, role[1] if role and role[1] else self.role)
        reader.put_back(mark)
        if reader.cut:
            return _Header(role=self.role)
        return self._unended(begun, text)

    def _unended(self, begun: str, text: str) -> _Header:
        """Split a text that lacks the mark `message` into a header and its `lead`, the text behind it."""
        if begun == _TO:
            return _Header(role=self.role, lead=begun + text)
        _, channel, rest = (begun + text).rpartition(self.channel or begun)
        if channel in ("", self.start):
            rest = text.lstrip(SPACE).removeprefix(self.role)
        elif match := _CHANNEL.match(rest):
            rest = rest[match.end() :]
        match = re.match(rf"(?:\s*(?:{_RECIPIENT.pattern}|{re.escape(self.constrain)}\s*\w*))*\s*", rest)
        rest = rest[match.end() :] if match else rest
        return _Header(begun + text, role=self.role, lead="" if rest.strip(SPACE) in _KINDS else rest)


@dataclasses.dataclass(frozen=True)
class Headed:
    """Functionary 3.2: parts that begin with `>>>`, a name and a line break; the name `all` marks the answer.

    The prompt ends with the first part's `>>>`. A later part may begin within a line, as templates write it, but not in
    an answer's code. It needs the name `all` or that of an offered tool; within text, a call also needs arguments. The
    format has no reasoning.
    """

    mark: str = ">>>"
    answer: str = "all"

    def states(self, tools: Collection[str]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        heads = {f"{name}\n": CALL for name in tools} | {f"{self.answer}\n": ""}
        marks = {f"{self.mark}{head}": to for head, to in heads.items()}
        return {"": marks, CALL: marks}, heads

    def run(self, reader: Reader, output: Output, *, tools: bool, in_reasoning: bool = False) -> Need[None]:  # noqa: ARG002
        parts = _Parts(self, reader, output, tools)
        name = yield from parts.first()
        while name:
            answer = name == self.answer
            name = yield from parts.until_part(output.content, CodeSpans()) if answer else parts.call(name)
            if name:
                output.part_ends()


class _Parts:
    """Parser of one message's parts; each public method returns the name of the next part, or "" at the end."""

    def __init__(self, shape: Headed, reader: Reader, output: Output, tools: bool) -> None:
        self._shape = shape
        self._reader = reader
        self._output = output
        self._stops = markers(shape.mark)
        offered = output.calls.tools if tools else ()
        self._heads = {f"{name}\n": name for name in (*offered, shape.answer)}

    def first(self) -> Need[str]:
        """Parse the header of the first part; a part without a header is the answer."""
        reader, heads = self._reader, self._heads
        yield from reader.take(self._shape.mark)
        line, end = yield from reader.name(markers("\n"))
        if not end and reader.cut:
            if not any(head.startswith(line.rstrip(SPACE)) for head in heads):
                self._output.content(line)
            return ""
        name = heads.get(line.strip(SPACE) + "\n", "")
        if not name:
            self._output.content(line + end)
        return name or self._shape.answer

    def call(self, name: str) -> Need[str]:
        reader, calls = self._reader, self._output.calls
        yield from reader.skip_space()
        start = yield from reader.peek()
        if not start and not reader.whole:
            return ""
        calls.begin(name)
        if start == "{":
            calls.end((yield from read_value(reader, calls.arguments, self._stops)))
            return (yield from self.until_part(nowhere))
        raw = RawArgument(calls, self._text_argument(name))
        following = yield from self.until_part(raw.add, inside=True)
        closed = bool(following) or reader.whole
        if closed:
            raw.end()
        calls.end(closed)
        return following

    def _text_argument(self, name: str) -> str:
        return text_argument(name, self._output.calls.tools.get(name, {}))

    def until_part(self, sink: Sink, code: CodeSpans | None = None, *, inside: bool = False) -> Need[str]:
        """Parse text up to the next part; in an answer (`code`) or `inside` an argument, a call needs arguments."""
        reader, last = self._reader, ""

        def text(part: str) -> None:
            nonlocal last
            last = (last + part[-3:])[-3:]
            if code:
                code.add(part)
            sink(part)

        while True:
            mark = yield from reader.until(self._stops, text, inside=inside)
            if not mark:
                return ""
            if code and _in_code(code, last):
                text(mark)
                continue
            head = yield from reader.take(*self._heads)
            if not head:
                if reader.drop_begun(*self._heads) or reader.cut:
                    return ""
                text(mark[0])
                reader.put_back(mark[1:])
                continue
            name, spaces = self._heads[head], list[str]()
            if name == self._shape.answer or not (code or inside):
                return name
            yield from reader.match(SPACES, spaces.append)
            start = yield from reader.peek()
            if start == "{" or (start and self._text_argument(name)):
                return name
            if reader.cut:
                return ""
            text(mark + head + "".join(spaces))


def _in_code(code: CodeSpans, last: str) -> bool:
    """Whether a text continues as code after `last`, its last characters, which may close a code block."""
    if code.inside and last in ("```", "~~~"):
        code = copy.copy(code)
        code.end_line()
    return code.inside
