# SPDX-License-Identifier: MIT
"""Incremental parser of reasoning and tool calls, for all formats (step 10 of a request's life).

It receives a model's text in parts, and holds back text whose meaning depends on what follows. However the text is
split, the events add up to the same message.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

from candle_vllm.openai.formats.events import Event
from candle_vllm.openai.formats.layout import Layout, ToolFormat
from candle_vllm.openai.formats.output import MakeId, Output, Schemas
from candle_vllm.openai.formats.reader import Reader
from candle_vllm.openai.formats.text_flow import TextFlow


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
        """Number of calls that have begun."""
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
