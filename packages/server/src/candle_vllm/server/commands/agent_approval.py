"""Asking in the terminal whether a tool may run."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Iterable

from candle_vllm.responses.tools.approval import Approval
from candle_vllm.responses.tools.names import matches
from candle_vllm.responses.tools.tool import ToolCall, ToolDefinition
from candle_vllm.server.commands.agent_display import note, short

QUESTION = "may it run? [y]es, [a]lways, [n]o: "
_NOBODY = "is not allowed, because standard input is no terminal to ask on: --approve it, or pass --yes"

ReadLine = Callable[[str], Awaitable[str | None]]


class TerminalApproval:
    """An approval callback that asks a person; without a terminal the answer is no.

    Args:
        approved: names of tools that need no asking, with or without their server's; "*" stands for any characters.
        read_line: asks a question and gives the line that answers it, None at the end of input. None asks on standard
            input, if that is a terminal.
    """

    def __init__(self, approved: Iterable[str] = (), read_line: ReadLine | None = None) -> None:
        self._approved = set(approved)
        self._read_line = read_line

    async def __call__(self, call: ToolCall, definition: ToolDefinition) -> Approval:
        if matches(self._approved, call.name) or matches(self._approved, definition.original_name):
            return Approval.ALLOW
        read_line = self._read_line or (read_terminal_line if sys.stdin.isatty() else None)
        if read_line is None:
            note(f"{call.name} {_NOBODY}")
            return Approval.DENY
        note(f"{call.name} {short(call.arguments)}")
        while (line := await read_line(QUESTION)) is not None:
            answer = line.strip().lower()
            if answer in ("y", "yes"):
                return Approval.ALLOW
            if answer in ("a", "always"):
                self._approved.add(call.name)
                return Approval.ALLOW
            if answer in ("n", "no"):
                break
        return Approval.DENY


async def read_terminal_line(question: str) -> str | None:
    """A line from the terminal, None at the end of input; the event loop goes on, and Ctrl+C ends the waiting."""
    sys.stderr.write(question)
    sys.stderr.flush()
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    descriptor = sys.stdin.fileno()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)
    line = os.read(descriptor, 4096)  # a terminal gives one line at a time
    return line.decode("utf-8", "replace") if line else None
