# SPDX-License-Identifier: MIT
"""Messages that consist of blocks, each with a mark for its kind (Inkling)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

from candle_vllm.openai.formats.json_calls import JsonCalls
from candle_vllm.openai.formats.layout import CALL, THOUGHTS, Body
from candle_vllm.openai.formats.output import Output
from candle_vllm.openai.formats.reader import Need, Reader, markers

_NAME = re.compile(r"[\w.\-:/]*")
_ENDS = ("<|end_message|>", "<|content_model_end_sampling|>")
_CALL = JsonCalls(arguments_key="args", closers=_ENDS)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Inkling's format: `<|message_model|>f<|content_invoke_tool_json|>{"name": "f", "args": {"a": 1}}<|end_message|>`.

    The prompt ends with the first block's `start`. A name may precede the mark of the block's kind; it is not part of
    the text. A block without such a mark is text of the answer. Source: vLLM, `vllm/parser/inkling.py`.

    Attributes:
        start: the mark before a block.
        thoughts, call: marks of reasoning and of calls.
        texts: marks of text; templates write the first of them.
        ends: marks after a block; grammars write the first between blocks, the second after calls.
        body: format of a call.
    """

    start: str = "<|message_model|>"
    thoughts: str = "<|content_thinking|>"
    call: str = "<|content_invoke_tool_json|>"
    texts: tuple[str, ...] = ("<|content_text|>", "<|content_invoke_tool_text|>", "<|content_tool_error|>")
    ends: tuple[str, ...] = _ENDS
    body: Body = _CALL

    def states(self, tools: Collection[str]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        kinds = {**dict.fromkeys(self.texts, ""), self.thoughts: THOUGHTS, self.call: CALL if tools else ""}
        within = {**dict.fromkeys(self.ends, ""), self.start: "header"}
        return {"": {**kinds, **within}, "header": kinds, THOUGHTS: within, CALL: within}, {}

    def run(self, reader: Reader, output: Output, *, tools: bool, in_reasoning: bool = False) -> Need[None]:
        kind = self.thoughts if in_reasoning else (yield from self._header(reader, output))
        while kind:
            if kind == self.call and tools:
                yield from self._call(reader, output)
            else:
                output.thinking = kind == self.thoughts
                yield from self._text(reader, output)
                output.thinking = False
            if not (yield from reader.peek()):
                return
            output.part_ends()
            kind = yield from self._header(reader, output)

    @property
    def _kinds(self) -> tuple[str, ...]:
        return (self.thoughts, self.call, *self.texts)

    def _text(self, reader: Reader, output: Output) -> Need[None]:
        """Parse a block's text and the end mark after it; any other mark is not consumed."""
        sink = output.reasoning if output.thinking else output.content
        mark = yield from reader.until(markers(self.start, *self._kinds, *self.ends), sink)
        reader.put_back("" if mark in self.ends else mark)

    def _call(self, reader: Reader, output: Output) -> Need[None]:
        reader.mark()
        yield from reader.skip_space()
        called = yield from self.body.read(reader, output.calls)
        if not called and not reader.cut:
            reader.unread()
        reader.forget()
        if not called:
            yield from self._text(reader, output)

    def _header(self, reader: Reader, output: Output) -> Need[str]:
        """Parse the header of the next block and return the mark of its kind; "" at the end of the text."""
        while (yield from reader.take(self.start, *self.ends)):
            pass
        name: list[str] = []
        yield from reader.match(_NAME, name.append)
        text = "".join(name)
        kind = yield from reader.take(*self._kinds)
        if kind:
            return kind
        begun = reader.drop_begun(self.start, *self._kinds, *self.ends) or reader.cut
        if not (begun and any(tool.startswith(text) for tool in ("", *output.calls.tools))):
            output.content(text)
        return self.texts[0] if (yield from reader.peek()) else ""
