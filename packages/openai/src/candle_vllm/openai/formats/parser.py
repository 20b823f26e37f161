# SPDX-License-Identifier: MIT
"""Incremental parser of reasoning and tool calls, for all formats (step 10 of a request's life).

It receives a model's text in parts, and holds back text whose meaning depends on what follows. However the text is
split, the events add up to the same message. Marks in quotes and code are text (see `_until_mark`).
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence

from candle_vllm.openai.formats.elsewhere import Way, read_elsewhere, ways_beside
from candle_vllm.openai.formats.events import Event
from candle_vllm.openai.formats.layout import Body, Layout, ToolFormat
from candle_vllm.openai.formats.output import CallBegins, CallSink, MakeId, Output, Schemas, call_id
from candle_vllm.openai.formats.reader import SPACES, CodeSpans, Markers, Need, Reader, Sink, markers, nowhere


class OutputParser:
    """Parses one message.

    Args:
        layout: what the message may contain.
        tools: tools of the request: name -> schema of the arguments; None if calls are not parsed.
        in_reasoning: whether the prompt has opened the reasoning, with the layout's first pair of marks.
        behind_reasoning: whether the prompt has closed the reasoning; leading white space is then left out.
        held: whether a grammar constrains calls.
        lazy: whether the grammar applies only from the beginning of a call; text outside the grammar is then no call.
        most_calls: maximum number of calls; further calls are left out. None means no limit.
        make_id: see `CallSink`; None uses the format's function.
        shown, names: see `Output`.

    Attributes:
        thoughts: whether each part of the last call of `feed` begins or ends within the reasoning.
    """

    thoughts: Sequence[bool] = ()

    def __init__(
        self,
        layout: Layout,
        *,
        tools: Schemas | None = None,
        in_reasoning: bool = False,
        behind_reasoning: bool = False,
        held: bool = False,
        lazy: bool = False,
        most_calls: int | None = None,
        make_id: MakeId | None = None,
        shown: Mapping[str, str] | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self._reader = Reader()
        form = layout.tools if tools is not None else None
        default = (form or ToolFormat("none")).make_id
        self._output = Output(tools or {}, make_id or default, most_calls, shown or {}, names)
        if behind_reasoning:
            self._output.part_ends()
        flow = (layout.tools and layout.tools.flow) or (layout.reasoning and layout.reasoning.flow)
        if flow:
            run = flow.run(self._reader, self._output, tools=form is not None, in_reasoning=in_reasoning)
        else:
            run = TextFlow(
                layout, form, self._reader, self._output, in_reasoning=in_reasoning, held=held, lazy=lazy
            ).run()
        self._run: Generator[None, None, None] | None = run
        self._advance()

    @property
    def num_calls(self) -> int:
        return self._output.calls.count

    def feed(self, *parts: str) -> list[Event]:
        """Parse more text, given in parts, and return the events that are certain now."""
        self.thoughts = []
        for text in parts:
            before = self._output.thinking
            if text and self._run is not None:
                self._reader.feed(text)
                self._advance()
            self.thoughts.append(before or self._output.thinking)
        return self._output.fetch()

    def finish(self, whole: bool) -> list[Event]:
        """End the text, and return the events that were held back.

        `whole` tells whether the model had finished: finished text gets missing closing brackets of arguments,
        truncated text does not.
        """
        self._reader.end(whole)
        while self._run is not None:
            self._advance()
        self._output.end()
        return self._output.fetch()

    def _advance(self) -> None:
        if self._run is not None:
            try:
                next(self._run)
            except StopIteration:
                self._run = None


FENCE = "```json"
_QUOTES = "`\"'"
# Beginnings of calls that a grammar writes without a mark (`grammars/bodies.py`, `grammars/literals.py`).
_HELD = re.compile(
    r"""[ \n]{0,4}(?:\[[ \n]{0,4})?\{[ \n]{0,4}(?:"type":[ ]?"function",[ ]?)?"name":[ \n]{0,4}"[^"]*","""
    r"""[ \n]{0,4}"(?:arguments|parameters)":\s*|[ \n]{0,4}\[[\w.\-:/]+\("""
)
_MOST_AGAIN = 1 << 16  # characters of a message that are parsed again because they were not calls


def _lead(form: ToolFormat) -> str:
    """Return the text with which calls begin in a grammar, which writes the first body."""
    body = form.bodies[0] if form.bodies else None
    return getattr(body, "name_open", "") or next(iter(getattr(body, "before_name", ())), "")


def is_special(mark: str) -> bool:
    """Whether a mark begins with a special token, which text cannot spell."""
    return "\ud800" <= mark[0] <= "\udfff"


class TextFlow:
    """Parser of a message that is text with marks."""

    def __init__(
        self,
        layout: Layout,
        form: ToolFormat | None,
        reader: Reader,
        output: Output,
        *,
        in_reasoning: bool,
        held: bool = False,
        lazy: bool = False,
    ) -> None:
        """
        Args:
            layout, in_reasoning: as in `OutputParser`.
            form: tool-call format; None if calls are not parsed.
            reader: has the text.
            output: receives reasoning, content and calls.
            held: whether a grammar constrains calls; a call's mark without special tokens then ends no reasoning.
            lazy: whether it does so only from the beginning of a call; an unmarked call must begin as in the grammar.
        """
        self._reader = reader
        self._output = output
        self._form = form
        self._pairs = layout.reasoning.pairs if layout.reasoning else {}
        fences = (FENCE,) if form and form.fenced else ()
        names = [mark for mark in form.names if not lazy or _lead(form).startswith(mark)] if form else ()
        self._opens = frozenset((*form.opens, *names, *fences)) if form else frozenset()
        strays = (*(form.strays if form else ()), *(layout.reasoning.strays if layout.reasoning else ()))
        self._strays = frozenset(strays)
        answers = (*(form.answer if form else ()), *(layout.reasoning.answer if layout.reasoning else ()))
        self._answers = frozenset(begin for begin, _ in answers)
        self._marks = markers(*sorted({*self._pairs, *self._pairs.values(), *self._opens, *strays}))
        tags = (*form.opens, *form.names, *form.strays) if form and form.ends_thoughts and not held else ()
        self._tags = frozenset(tag for tag in tags if not is_special(tag))  # ordinary marks that may end reasoning
        opens = "".join(self._opens)
        others = "".join((*self._pairs, *self._pairs.values(), *strays, *self._answers))
        self._silent = "".join(
            set(others).difference(opens)
        )  # special tokens of marks that calls do not use; they are left out where a mark is text
        self._in_reasoning = in_reasoning
        ways = ways_beside(form, layout.elsewhere) if form and not (held or lazy) else ()
        own = {*form.opens, *form.names} if form else set[str]()
        self._ways = tuple(way for way in ways if way[0] not in own)
        self._later = tuple(way for way in ways if way[0] in own)  # tried if the mark begins no call of the model's own
        self._lazy = lazy
        self._code = CodeSpans()
        self._spelt = False  # a mark began no call: special tokens are text up to the next part
        self._unclosed = False  # the reasoning ended without its closing mark
        self._again = 0  # characters that were parsed again

    def run(self) -> Need[None]:
        if self._in_reasoning and self._pairs:
            yield from self._reasoning(next(iter(self._pairs)))
        fresh = True
        while True:
            if fresh and ((yield from self._bare()) or (yield from self._elsewhere(self._ways))):
                continue
            mark = yield from self._until_mark(self._marks, self._content, self._code)
            if not mark:
                return
            fresh = mark in self._pairs and (is_special(mark) or self._code.at_line_start)
            if fresh:
                self._part_ends()
                yield from self._reasoning(mark)
            elif mark in self._opens and self._in_line(mark):
                self._text(mark)
            elif mark in self._opens:
                fresh = yield from self._calls(mark)
            elif mark not in self._strays:
                fresh = self._is_end(mark)

    def _is_end(self, mark: str) -> bool:
        """Whether a mark ends a part: if special, or the end of unopened or unclosed reasoning. Else it is text."""
        if is_special(mark) or (mark not in self._pairs and (self._unclosed or not self._output.in_content)):
            self._unclosed = False
            self._part_ends()
            return True
        self._text(mark)
        return False

    def _in_line(self, mark: str) -> bool:
        """Whether a mark is an ordinary word here; a mark that a grammar has recognised is not."""
        apart = is_special(mark) or self._lazy or self._code.at_line_start
        return not apart and self._form is not None and self._form.line_start

    def _text(self, text: str) -> None:
        self._code.add(text)
        self._content(text)

    def _content(self, text: str) -> None:
        self._output.content(self._output.spelt(text, self._silent) if self._spelt else text)

    def _part_ends(self) -> None:
        self._output.part_ends()
        self._code.end_line()
        self._spelt = False

    def _no_calls(self, read: int, text: str = "") -> None:
        """Treat as text the characters that were wrongly taken for calls.

        Marks are searched again in the `read` characters that are unread now, up to a limit: otherwise a text that
        consists of beginnings of calls would be parsed to its end from each of them.
        """
        self._again += read
        text += self._reader.next(read) if self._again > _MOST_AGAIN else ""
        if text:
            self._text(text)

    def _bare(self) -> Need[bool]:
        """Parse calls without a mark at the beginning of a part; return whether there were any."""
        form, reader = self._form, self._reader
        body = None if form is None else form.bare or (None if self._lazy else form.unmarked)
        if form is None or body is None:
            return False
        reader.mark()
        yield from reader.skip_space()
        start = yield from reader.peek()
        if start and start in form.bare_starts and (yield from self._read(body)):
            reader.forget()
            self._part_ends()
            return True
        read = reader.unread()
        reader.forget()
        self._no_calls(read)
        return False

    def _elsewhere(self, ways: tuple[Way, ...]) -> Need[bool]:
        """Parse calls in the formats of other models at the beginning of the answer; return whether there were any."""
        if not ways:
            return False
        read = yield from read_elsewhere(self._reader, self._output.calls, ways)
        if read < 0:
            self._part_ends()
            return True
        self._no_calls(read)
        return False

    def _calls(self, mark: str) -> Need[bool]:
        """Parse calls after a mark (without a call it is text); return whether they had another model's format."""
        form, reader, calls = self._form, self._reader, self._output.calls
        assert form is not None
        if mark in form.names:
            reader.put_back(mark)
            text = ""
        else:
            text = yield from self._repeated(mark)
        reader.mark()
        before, most, cut = calls.count, 0, False
        for body in self._bodies(mark):
            yield from reader.skip_space()
            if (yield from self._read(body)) or calls.count > before:
                reader.forget()
                self._part_ends()
                return False
            cut = cut or reader.cut
            most = max(most, reader.unread())
        reader.forget()
        if cut and self._behind_calls:
            reader.next(most)
            return False
        reader.put_back(text)
        if self._later and not self._output.in_content and (yield from self._elsewhere(self._later)):
            return True
        text = reader.next(len(text or mark))
        self._spelt = True
        self._no_calls(max(0, most - len(mark)) if mark in form.names else most, text)
        return False

    @property
    def _behind_calls(self) -> bool:
        """Whether only white space follows calls, so that truncated text is the beginning of another call."""
        return self._output.calls.count > 0 and not self._output.in_content

    def _read(self, body: Body) -> Need[bool]:
        """Parse calls, if there are any; with a lazy grammar, calls without marks must begin as in the grammar."""
        calls = self._output.calls
        named = self._form is not None and body is self._form.named  # the grammar recognises its mark
        if self._lazy and not named and getattr(body, "known_only", False):
            calls.may_begin = lambda: _HELD.fullmatch(self._reader.since_mark()) is not None
        try:
            return (yield from body.read(self._reader, calls))
        except CallBegins:
            return False
        finally:
            calls.may_begin = None

    def _bodies(self, mark: str) -> tuple[Body, ...]:
        form = self._form
        assert form is not None
        if mark == FENCE and form.fenced:
            return (form.fenced,)
        return (form.named,) if mark in form.names and form.named else form.bodies

    def _repeated(self, *marks: str) -> Need[str]:
        """Consume the marks that follow `marks[0]`, and return all as text; models may repeat an opening mark."""
        reader, parts = self._reader, [marks[0]]
        while True:
            spaces: list[str] = []
            yield from reader.match(SPACES, spaces.append)
            again = yield from reader.take(*marks)
            if not again:
                reader.put_back("".join(spaces))
                return "".join(parts)
            parts += [*spaces, again]

    def _reasoning(self, opened: str) -> Need[None]:
        """Parse reasoning up to its closing mark, or up to a call or an answer's mark, before which models omit it."""
        reader, output, code = self._reader, self._output, CodeSpans()
        output.thinking = True
        yield from reader.skip_space()
        yield from reader.take(opened)  # repeated by models although the prompt contains it
        close = self._pairs[opened]
        calls = self._opens if self._form and self._form.ends_thoughts else frozenset[str]()
        ends = {close, *filter(is_special, calls | self._answers)}
        marks = markers(*sorted(ends | self._tags))
        while True:
            mark = yield from self._until_mark(marks, self._thought, code, close)
            text = "" if mark in ends else (yield from self._no_call_in_thoughts(mark, code))
            if not text:
                break
            code.add(text)
            self._thought(text)
        output.thinking = False
        self._part_ends()
        self._unclosed = mark != close
        if self._unclosed:
            self._code = CodeSpans()
            reader.put_back(mark if mark in ends else "")

    def _thought(self, text: str) -> None:
        self._output.reasoning(self._output.spelt(text, self._silent))

    def _no_call_in_thoughts(self, mark: str, code: CodeSpans) -> Need[str]:
        """Return a mark as text; "" for none, or if it begins a call of an offered tool, which is then not consumed."""
        form, reader = self._form, self._reader
        if not mark or form is None:
            return ""
        text = mark if mark in form.names else (yield from self._repeated(mark, *self._tags.difference(form.names)))
        opened = any(one in text for one in (*form.opens, *form.names))
        most = 0
        if opened and (code.at_line_start or not form.on_lines):
            begun = mark if mark in form.names else ""
            reader.put_back(begun)
            reader.mark()
            for body in self._bodies(mark):
                name = yield from self._name(body)
                most = max(most, reader.unread() - len(begun))
                if name in self._output.calls.tools:
                    reader.forget()
                    reader.put_back(text if not begun else "")
                    return ""
            reader.forget()
            yield from reader.take(begun)
        self._again += most
        return text + (reader.next(most) if self._again > _MOST_AGAIN else "")

    def _name(self, body: Body) -> Need[str]:
        """Return the name of the call that begins here; "" without a call."""
        yield from self._reader.skip_space()
        probe = CallSink(nowhere, self._output.calls.tools, call_id)
        probe.may_begin = lambda: False
        try:
            yield from body.read(self._reader, probe)
        except CallBegins as call:
            return call.name
        return ""

    def _until_mark(self, marks: Markers, sink: Sink, code: CodeSpans, always: str = "") -> Need[str]:
        """Parse text up to a special token or a mark outside of quotes and code; in code, `always` and fences count."""
        reader = self._reader
        last = ""

        def text(part: str) -> None:
            nonlocal last
            last = part[-1:]
            code.add(part)
            sink(part)

        while True:
            mark = yield from reader.until(marks, text, inside=True)
            if not mark and not always and not self._behind_calls:
                text(reader.begun)
            if not mark or is_special(mark):
                return mark
            quoted = last != "" and last in _QUOTES and (yield from reader.peek()) == last
            if not quoted and (mark == always or not code.inside or mark.startswith("`")):
                return mark
            text(mark)
