# SPDX-License-Identifier: MIT
"""`candle-vllm agent`: answers one request on the terminal, with the tools of MCP servers.

The answer goes to standard output, tool calls and questions for approval to standard error; with `--json`, answer and
calls are events on standard output. Each turn enters the life of a request at step 2, or is sent to `--base-url`.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import msgspec

from candle_vllm.core.engine.outputs import FinishReason
from candle_vllm.core.errors import CandleVllmError, ConfigError
from candle_vllm.openai import to_json_bytes
from candle_vllm.responses import ConversationOptions, ResponsesSession
from candle_vllm.responses.conversation import events
from candle_vllm.responses.conversation.chat_model import ModelSource
from candle_vllm.responses.mcp.config import load_mcp_config
from candle_vllm.responses.tools.approval import Approval
from candle_vllm.responses.tools.names import SEPARATOR, matches
from candle_vllm.responses.tools.tool import ToolCall, ToolDefinition
from candle_vllm.server.commands.interactive import answer_display, has_colour
from candle_vllm.server.commands.terminal import Said, conversation, read_stdin, unfinished
from candle_vllm.server.settings.derived import adapter_of, in_flags, load_engine
from candle_vllm.server.settings.options import UsageError
from candle_vllm.server.settings.table import AgentOptions

EXIT_UNFINISHED = 1
EXIT_TERMINATED = 143  # the status that a shell reports for a program that SIGTERM ended


def agent(
    settings: AgentOptions,
    prompt: str,
    base_url: str | None = None,
    api_key: str | None = None,
    yes: bool = False,
    approve: tuple[str, ...] = (),
    max_turns: int = 16,
    system: str | None = None,
    max_tokens: int | None = None,
    as_json: bool = False,
) -> int:
    """Answer `prompt` ("-" reads it from standard input); return 0 if the model gave a whole answer, else 1."""
    if api_key is not None and base_url is None:
        raise UsageError("--api-key needs --base-url: a model of this process has no keys")
    text = read_stdin("request") if prompt == "-" else prompt
    if not text:
        raise UsageError("the request is empty")
    servers = load_mcp_config(settings.mcp_config)
    request: dict[str, Any] = dict(settings.default_sampling)
    if max_tokens is not None:
        request["max_completion_tokens"] = max_tokens
    approval = "never" if yes else TerminalApproval(approve)
    options = ConversationOptions(max_turns=max_turns, approval=approval, request=request)
    with contextlib.ExitStack() as stack:
        model: ModelSource | None = base_url
        if model is None:
            model = adapter_of(stack.enter_context(load_engine(settings)), settings, tool_parser=settings.tool_parser)
        name = settings.model if base_url is not None else None
        session = ResponsesSession(model, mcp_servers=servers, api_key=api_key, model_name=name)
        with contextlib.suppress(asyncio.CancelledError):
            return asyncio.run(_carry_out(session, conversation(system, text), options, approve, as_json))
        return EXIT_TERMINATED


async def _carry_out(
    session: ResponsesSession, messages: list[dict[str, str]], options: ConversationOptions, approve: tuple[str, ...],
    as_json: bool
) -> int:  # fmt: skip
    if sys.platform != "win32" and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:  # `nohup` ignores SIGHUP
                asyncio.get_running_loop().add_signal_handler(number, cast(Any, asyncio.current_task()).cancel)
    async with session, contextlib.AsyncExitStack() as stack:
        display = AgentDisplay()
        stack.callback(display.close)
        _introduce(session, approve)
        try:
            async with contextlib.aclosing(session.stream_conversation(messages, options)) as told:
                async for event in told:
                    if as_json:
                        sys.stdout.write(to_json_bytes(event, str).decode() + "\n")
                        sys.stdout.flush()
                    else:
                        display.show(event)
                    if isinstance(event, events.ConversationFinished):
                        if event.result.completed and not event.result.final_message.strip():
                            note("not finished: the model's answer is empty")
                            return EXIT_UNFINISHED
                        return 0 if event.result.completed else EXIT_UNFINISHED
        except ConfigError:
            raise
        except CandleVllmError as error:
            display.close()
            note(f"error: {in_flags(str(error))}")
    return EXIT_UNFINISHED


def _introduce(session: ResponsesSession, approve: tuple[str, ...]) -> None:
    """Print the MCP servers that are ready, the number of tools, the servers' errors, and approved names of no tool."""
    fleet = session.fleet
    statuses, known = ([], []) if fleet is None else (fleet.status(), fleet.registry.definitions())
    ready = [status.name for status in statuses if status.state == "ready"]
    told = f"MCP servers: {', '.join(ready)}; tools: {len(known)}" if ready else "no MCP server is ready"
    note(told if statuses else "no MCP servers: name a file with --mcp-config, or put an mcp.json into this folder")
    for status in statuses:
        if status.error is not None:
            note(f"{status.name} is not available: {status.error}")
    for name in approve:
        if not any(matches([name], one.name if SEPARATOR in name else one.original_name) for one in known):
            note(f"--approve {name}: there is no such tool")


QUESTION = "may it run? [y]es, [a]lways for this tool, [n]o: "
_COLOURS = {"+": "32", "-": "31"}
MAX_SHOWN = 4000  # maximum characters of the arguments that are shown before approval
_NOBODY = "is not allowed, because standard input is no terminal to ask on: --approve it, or pass --yes"

ReadLine = Callable[[str], Awaitable[str | None]]


class TerminalApproval:
    """An approval callback: asks the user about calls that are not approved already; without a terminal it denies them.

    Args:
        approved: names of tools that are approved in advance, with their server (`files__read`) or without (`read`);
            "*" matches any characters.
        read_line: shows a question and returns the user's line, or None at the end of input. By default standard input
            is used, if it is a terminal.
    """

    def __init__(self, approved: Iterable[str] = (), read_line: ReadLine | None = None) -> None:
        names = set(approved)
        self._full_names = {name for name in names if SEPARATOR in name}
        self._own_names = names - self._full_names
        self._always: set[str] = set()
        self._read_line = read_line

    async def __call__(self, call: ToolCall, definition: ToolDefinition) -> Approval:
        # A server chooses `original_name`, so it is not compared with full names.
        full, own = definition.name, definition.original_name
        if full in self._always or matches(self._full_names, full) or matches(self._own_names, own):
            return Approval.ALLOW
        is_terminal = sys.stdin is not None and sys.stdin.isatty()  # None if it is closed
        read_line = self._read_line or (read_terminal_line if is_terminal else None)
        if read_line is None:
            note(f"{call.name} {_NOBODY}")
            return Approval.DENY
        note(f"{call.name} {short(call.arguments, MAX_SHOWN)}")
        for line in changes(call, definition):
            note(f"  {line}", colour=_COLOURS.get(line[:1], ""))
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


async def read_terminal_line(question: str) -> str | None:
    """Return the line that is typed after the question, or None at the end of input."""
    if sys.platform == "win32":
        return await _read_console_line(question)
    import termios

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
    line = os.read(descriptor, 4096)  # a terminal returns one line per read
    return line.decode("utf-8", "replace") if line else None


async def _read_console_line(question: str) -> str | None:
    """As `read_terminal_line` on Windows, whose event loop cannot wait for a console: reads in a daemon thread."""
    if sys.platform == "win32":
        import msvcrt

        while msvcrt.kbhit():
            msvcrt.getwch()
    sys.stderr.write(question)
    sys.stderr.flush()
    loop, found = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def read() -> None:
        line = sys.stdin.readline()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(lambda: found.done() or found.set_result(line or None))

    threading.Thread(target=read, name="console", daemon=True).start()
    return await found


_MOST = 300  # characters of arguments or of a result on one line

_ENDS = {
    "max_turns": "the maximum number of turns is reached (--max-turns)",
    "loop": "the model repeated the same calls",
}


class AgentDisplay:
    """Shows the events of one conversation."""

    def __init__(self) -> None:
        self._text = answer_display()
        self._line_open = False
        self._began = 0.0

    def show(self, event: events.Event) -> None:
        if isinstance(event, events.TextDelta):
            self._say(Said(event.text))
        elif isinstance(event, events.ReasoningDelta):
            self._say(Said(event.text, thought=True))
        elif isinstance(event, events.TurnFinished):
            if self._line_open:
                self._text.tell_rate(event.usage.completion_tokens, time.perf_counter() - self._began)
            self._end_line()
        elif isinstance(event, events.ToolStarted):
            note(f"-> {event.call.name} {short(event.call.arguments)}")
        elif isinstance(event, events.ToolProgressed):
            now = event.progress
            of = "" if now.total is None else f" of {now.total:g}"
            note(f"   {now.progress:g}{of} {short(now.message or '')}".rstrip())
        elif isinstance(event, events.ToolFinished):
            result = event.result
            how = "" if result.status == "completed" else f" {result.status.replace('_', ' ')}:"
            note(f"<- {result.call.name}{how} {short(result.text)}")
        elif isinstance(event, events.ResultsShortened):
            note(f"   the context is too small: the model sees at most {event.characters} characters of each result")
        elif isinstance(event, events.ConversationFinished):
            self._end_line()
            if not event.result.completed:
                reason = event.result.stop_reason
                cut = isinstance(reason, FinishReason)
                note(unfinished(reason) if cut else f"not finished: {_ENDS.get(reason, reason)}")

    def close(self) -> None:
        """On a terminal, end the current output line, if the conversation ended within it."""
        if sys.stdout.isatty():
            self._end_line()

    def _say(self, said: Said) -> None:
        if said.text:
            if not self._line_open:
                self._began = time.perf_counter()
            self._text.show(said)
            self._line_open |= not said.thought or sys.stdout.isatty()

    def _end_line(self) -> None:
        if self._line_open:
            self._text.close()
            self._line_open = False


def note(text: str, colour: str = "") -> None:
    """Write a line to standard error, without characters that could move a terminal's cursor.

    `colour` is the ANSI code of its colour, for terminals with colour.
    """
    plain = "".join(char if char.isprintable() else " " for char in text)
    sys.stderr.write((f"\x1b[{colour}m{plain}\x1b[0m" if colour and has_colour(sys.stderr) else plain) + "\n")
    sys.stderr.flush()


def short(text: str, most: int = _MOST) -> str:
    """Shorten a text to one line; a truncated text ends with its whole length."""
    line = " ".join(text[: 2 * most].split())
    if len(line) <= most and len(text) <= 2 * most:
        return line
    return f"{line[:most]} ... ({len(text)} characters in all)"


# ---- preview of the changes that a call would make -------------------------------------------------------------------
# Tools that write files take a path and a text, or a text and its replacement, under the names below. For other tools,
# the user only sees the arguments.

_PATHS = ("path", "file_path", "filepath", "filename", "file")
_TEXTS = ("content", "contents", "text", "file_text", "new_content")
_OLD = ("old_string", "old_str", "old_text", "oldText", "search")
_NEW = ("new_string", "new_str", "new_text", "newText", "replace")
_MAX_FILE = 1 << 18  # maximum bytes of a file that is compared
_MAX_COMPARED = 1000  # lines of each side; the time for a comparison grows with their product
_MAX_LINES = 200  # maximum number of shown lines
_MAX_WIDTH = 500  # maximum characters of a line


def changes(call: ToolCall, definition: ToolDefinition) -> list[str]:
    """Return the diff lines of a call, "-" before removed and "+" before added lines; empty if they are unknown.

    A file's new text is compared with the file on this machine, which may differ from the tool's. Long output is cut.
    """
    if definition.read_only:
        return []
    try:
        arguments: Any = msgspec.json.decode(call.arguments)
    except (msgspec.DecodeError, RecursionError):
        return []
    if not isinstance(arguments, dict):
        return []
    lines = list(_lines(cast(dict[str, Any], arguments)))
    more = len(lines) - _MAX_LINES
    shown = [line if len(line) <= _MAX_WIDTH else f"{line[:_MAX_WIDTH]} ... (cut)" for line in lines[:_MAX_LINES]]
    return [*shown, f"... ({more} more lines)"] if more > 0 else shown


def _lines(arguments: Mapping[str, Any]) -> Iterator[str]:
    path = _text(arguments, _PATHS)
    edits: Any = arguments.get("edits")
    for edit in (arguments, *(edits if isinstance(edits, list) else ())):
        old, new = (_text(edit, names) if isinstance(edit, dict) else None for names in (_OLD, _NEW))
        if old is not None and new is not None:
            yield from _difference(old, new, f"in {path}:" if path else "in a text:")
    text = _text(arguments, _TEXTS)
    if path and text is not None and _text(arguments, _OLD) is None:
        before, state = _file(path)
        yield from _difference(before, text, f"{path} ({state}):")


def _difference(old: str, new: str, title: str) -> Iterator[str]:
    before, after = old.splitlines(), new.splitlines()
    yield title
    if max(len(before), len(after)) > _MAX_COMPARED:
        yield f"{len(before)} lines become {len(after)}: too many to compare; the new lines are"
        yield from (f"+{line}" for line in after)
    else:
        same = "(nothing changes)" if old == new else "(line ends change, and nothing else)"
        yield from list(difflib.unified_diff(before, after, lineterm="", n=2))[2:] or (same,)


def _file(path: str) -> tuple[str, str]:
    """Return the text of a local file, and a remark about it."""
    try:
        waiting = 0 if sys.platform == "win32" else os.O_NONBLOCK  # opening a pipe would block
        descriptor = os.open(os.path.expanduser(path), os.O_RDONLY | waiting)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return "", "no regular file here"
            data = file.read(_MAX_FILE + 1)
        if len(data) > _MAX_FILE:
            return "", "too large to compare"
        return data.decode("utf-8"), "compared with the file here"
    except (OSError, ValueError):
        return "", "no text file here"


def _text(arguments: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((arguments[name] for name in names if isinstance(arguments.get(name), str)), None)
