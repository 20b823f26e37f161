# SPDX-License-Identifier: MIT
"""One incremental parser for reasoning and tool calls of every format (step 10).

It reads a model's text in pieces and holds back only what may be the beginning of a mark. However the text is cut, the
pieces that it gives add up to one message.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping

from candle_vllm.openai.formats.events import Event
from candle_vllm.openai.formats.layout import Layout, ToolFormat
from candle_vllm.openai.formats.output import MakeId, Output, Schemas
from candle_vllm.openai.formats.reader import Reader
from candle_vllm.openai.formats.text_flow import TextFlow


class OutputParser:
    """Parses one message.

    Args:
        layout: what it may hold.
        tools: what the request offers: name -> schema of the arguments; None where calls are not looked for.
        in_reasoning: the prompt has opened the thoughts already, with the layout's first pair of marks.
        behind_reasoning: the prompt has closed them already; white space at the beginning belongs to it.
        held: calls are held to their form by a grammar.
        lazy: it begins with the call; what it does not hold is no call.
        most_calls: further calls are left out; None is no limit.
        make_id: makes ids of calls that bring none; None is the format's own way.
        shown: texts of special tokens that are shown as text, by their characters.
        names: texts of special tokens by their characters: within the strings of arguments they are kept.
    """

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
        """Calls begun so far."""
        return self._output.calls.count

    @property
    def in_reasoning(self) -> bool:
        """Whether what comes next is reasoning, as far as is known."""
        return self._output.thinking

    def feed(self, text: str) -> list[Event]:
        """Takes more text; what is certain now."""
        if not text:
            return []
        if self._run is not None:
            self._reader.feed(text)
            self._advance()
        return self._output.fetch()

    def finish(self, whole: bool) -> list[Event]:
        """The text has ended; what was held back.

        Args:
            whole: the model was done. A text that was cut is taken as it is; of one that is whole, arguments that lack
                nothing but closing brackets are closed.
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
