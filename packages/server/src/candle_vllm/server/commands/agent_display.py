"""How `candle-vllm agent` shows what happens: the answer on standard output, everything else on standard error."""

from __future__ import annotations

import sys

from candle_vllm.responses.conversation.events import (
    ConversationFinished,
    Event,
    ReasoningDelta,
    TextDelta,
    ToolFinished,
    ToolProgressed,
    ToolStarted,
    TurnFinished,
)
from candle_vllm.responses.tools.tool import ToolProgress
from candle_vllm.server.commands.terminal import Display, Said

_MOST = 300  # characters of arguments and of a result on one line

_ENDS = {
    "length": "the answer was cut at its token limit (--max-tokens, or the model's context)",
    "max_turns": "the model has had all its turns (--max-turns)",
    "loop": "the model asked for the same again and again",
    "timeout": "the time was over",
}


class AgentDisplay:
    """Shows the events of one conversation."""

    def __init__(self) -> None:
        self._text = Display()
        self._line_open = False

    def show(self, event: Event) -> None:
        """Writes what the event has for a person."""
        if isinstance(event, TextDelta):
            self._say(Said(event.text))
        elif isinstance(event, ReasoningDelta):
            self._say(Said(event.text, thought=True))
        elif isinstance(event, TurnFinished):
            self._end_line()
        elif isinstance(event, ToolStarted):
            note(f"-> {event.call.name} {short(event.call.arguments)}")
        elif isinstance(event, ToolProgressed):
            note(f"   {_progress(event.progress)}")
        elif isinstance(event, ToolFinished):
            result = event.result
            how = "" if result.status == "completed" else f" {result.status.replace('_', ' ')}:"
            note(f"<- {result.call.name}{how} {short(result.text)}")
        elif isinstance(event, ConversationFinished):
            self._end_line()
            if not event.result.completed:
                reason = event.result.stop_reason
                note(f"not finished: {_ENDS.get(reason, reason)}")

    def _say(self, said: Said) -> None:
        if said.text:
            self._text.show(said)
            self._line_open = not said.thought or sys.stdout.isatty()

    def _end_line(self) -> None:
        if self._line_open:
            sys.stdout.write("\n")
            sys.stdout.flush()
            self._line_open = False


def note(text: str) -> None:
    """Writes a line to standard error, without what could move a terminal's cursor."""
    sys.stderr.write("".join(char if char.isprintable() else " " for char in text) + "\n")
    sys.stderr.flush()


def short(text: str, most: int = _MOST) -> str:
    """The beginning of a text on one line; where it is cut, its end says of how much."""
    line = " ".join(text[: 2 * most].split())
    if len(line) <= most and len(text) <= 2 * most:
        return line
    return f"{line[:most]} ... ({len(text)} characters in all)"


def _progress(progress: ToolProgress) -> str:
    of = "" if progress.total is None else f" of {progress.total:g}"
    return f"{progress.progress:g}{of} {short(progress.message or '')}".rstrip()
