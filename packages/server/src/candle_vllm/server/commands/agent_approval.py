"""Asking in the terminal whether a tool may run."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Iterable

from candle_vllm.responses.tools.approval import Approval
from candle_vllm.responses.tools.names import SEPARATOR, matches
from candle_vllm.responses.tools.tool import ToolCall, ToolDefinition
from candle_vllm.server.commands.agent_display import note, short

QUESTION = "may it run? [y]es, [a]lways, [n]o: "
MAX_SHOWN = 4000  # characters of the arguments that a person sees before agreeing
_NOBODY = "is not allowed, because standard input is no terminal to ask on: --approve it, or pass --yes"

ReadLine = Callable[[str], Awaitable[str | None]]


class TerminalApproval:
    """An approval callback that asks a person; without a terminal the answer is no.

    Args:
        approved: names of tools that need no asking, with their server's (`files__read`) or without (`read`); "*" is
            any characters.
        read_line: asks a question and gives the line that answers it, None at the end of input. None asks on standard
            input, if that is a terminal.
    """

    def __init__(self, approved: Iterable[str] = (), read_line: ReadLine | None = None) -> None:
        names = set(approved)
        self._full_names = {name for name in names if SEPARATOR in name}
        self._own_names = names - self._full_names
        self._always: set[str] = set()
        self._read_line = read_line

    async def __call__(self, call: ToolCall, definition: ToolDefinition) -> Approval:
        if self._is_approved(definition):
            return Approval.ALLOW
        is_terminal = sys.stdin is not None and sys.stdin.isatty()  # closed by who started us: None
        read_line = self._read_line or (read_terminal_line if is_terminal else None)
        if read_line is None:
            note(f"{call.name} {_NOBODY}")
            return Approval.DENY
        note(f"{call.name} {short(call.arguments, MAX_SHOWN)}")
        while (line := await read_line(QUESTION)) is not None:
            answer = line.strip().lower()
            if answer in ("y", "yes"):
                return Approval.ALLOW
            if answer in ("a", "always"):
                self._always.add(call.name)
                return Approval.ALLOW
            if answer in ("n", "no"):
                break
        return Approval.DENY

    def _is_approved(self, definition: ToolDefinition) -> bool:
        """A server can call a tool of its own as another server's is called in full: such a name is no agreement."""
        return (
            definition.name in self._always
            or matches(self._full_names, definition.name)
            or matches(self._own_names, definition.original_name)
        )


async def read_terminal_line(question: str) -> str | None:
    """A line from the terminal, None at the end of input; the event loop goes on, and Ctrl+C ends the waiting.

    What was typed before the question is no answer to it, and is thrown away.
    """
    import termios  # not on every system, and neither is the waiting below

    descriptor = sys.stdin.fileno()
    termios.tcflush(descriptor, termios.TCIFLUSH)
    sys.stderr.write(question)
    sys.stderr.flush()
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)
    line = os.read(descriptor, 4096)  # a terminal gives one line at a time
    return line.decode("utf-8", "replace") if line else None
