"""How a model lays out a message: what its reasoning and its calls look like. The table of them is `table`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

from candle_vllm.openai.formats.calls import CallSink, call_id
from candle_vllm.openai.formats.output import Output
from candle_vllm.openai.formats.reader import Need, Reader


class Body(Protocol):
    """A way to write calls."""

    def read(self, reader: Reader, calls: CallSink) -> Need[bool]:
        """Reads what follows the opening mark; False where that is no call, and nothing was made of it."""
        ...


class Flow(Protocol):
    """A way to write whole messages, where they are not text with marks in it."""

    def run(self, reader: Reader, output: Output, *, tools: bool) -> Need[None]:
        """Reads a message to its end; calls are text unless `tools`."""
        ...


@dataclasses.dataclass(frozen=True)
class ReasoningFormat:
    """Thoughts between two marks.

    Attributes:
        name: of the format.
        open, close: the marks.
        others: further pairs that mean the same.
        strays: marks that mean nothing where they stand alone, and are left out.
        answer: strays that stand before and behind the text of an answer.
        flow: for messages that are no text with marks in it.
        aliases: names that others know it by.
        hints: texts in a chat template that tell of the format where the template writes no thoughts itself.
        model_types: of models that write it, as `config.json` and GGUF files name them.
    """

    name: str
    open: str = "<think>"
    close: str = "</think>"
    others: tuple[tuple[str, str], ...] = ()
    strays: tuple[str, ...] = ()
    answer: tuple[tuple[str, str], ...] = ()
    flow: Flow | None = None
    aliases: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()

    @property
    def pairs(self) -> dict[str, str]:
        """Opening mark -> closing mark."""
        return {self.open: self.close, **dict(self.others)} if self.flow is None else {}


@dataclasses.dataclass(frozen=True)
class ToolFormat:
    """Calls in a message.

    Attributes:
        name: of the format.
        opens: marks that begin calls.
        bodies: what may follow such a mark; the first that fits counts.
        names: marks that begin calls and are the beginning of the body too, as a function's tag without the tag around.
        named: what follows those, where it is not the `bodies`: a text may well name such a tag.
        ends_thoughts: models call within thoughts that they have not closed; a call of a tool that is offered ends
            them.
        line_start: marks in `opens` that are text begin calls only at a line's beginning.
        on_lines: in thoughts, a call begins only at a line's beginning.
        bare: what calls without a mark look like; only at the beginning of a message.
        unmarked: the same, where no grammar writes them: models leave the mark out by mistake.
        bare_starts: the characters that those begin with.
        fenced: what calls look like that some models write into a block of JSON code instead.
        strays: marks that mean nothing where they stand alone, and are left out.
        answer: strays that stand before and behind the text of an answer.
        flow: for messages that are no text with marks in it.
        make_id: makes the ids of calls that bring none.
        aliases: names that others know it by.
        hints: texts in a chat template that tell of the format where the template writes no calls itself.
        model_types: of models that write it, as `config.json` and GGUF files name them.
    """

    name: str
    opens: tuple[str, ...] = ()
    bodies: tuple[Body, ...] = ()
    names: tuple[str, ...] = ()
    named: Body | None = None
    ends_thoughts: bool = False
    line_start: bool = False
    on_lines: bool = False
    bare: Body | None = None
    unmarked: Body | None = None
    bare_starts: str = ""
    fenced: Body | None = None
    strays: tuple[str, ...] = ()
    answer: tuple[tuple[str, str], ...] = ()
    flow: Flow | None = None
    make_id: Callable[[int], str] = call_id
    aliases: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a message may hold; either may be None.

    Attributes:
        reasoning, tools: the formats.
    """

    reasoning: ReasoningFormat | None = None
    tools: ToolFormat | None = None
