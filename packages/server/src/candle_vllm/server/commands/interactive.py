# SPDX-License-Identifier: MIT
"""Terminal features of the commands: line editor with history, progress spinner and colour.

They run before step 2 of a request's life and after step 10. prompt_toolkit and rich are imported only for a terminal.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from candle_vllm.server.commands.terminal import MAX_TEXT, Display, read_line
from candle_vllm.server.settings.options import UsageError

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output
    from rich.console import Console

HISTORY_FILE = ".candle-vllm/chat_history"
MAX_HISTORY = 1 << 20  # maximum bytes of the history file; of a larger file, the newest 512 KiB are left at startup
_MAX_ENTRY = 1 << 16  # maximum characters of an entry; longer entries are not stored
_WITH_PATH = ("/image", "/load", "/model", "/save")
_QUOTES = '"""'

_PATIENCE = 0.15  # seconds before the spinner is shown; most answers begin earlier

ReadLine = Callable[[], str | None]


def _console(stream: TextIO) -> Console | None:
    """Return a console for a stream that is a capable terminal; otherwise None."""
    if not stream.isatty():
        return None
    from candle_vllm.server.commands.markdown import colour_console

    console = colour_console(stream)
    return None if console.is_dumb_terminal else console


def answer_display() -> Display:
    """Return the display of answers: Markdown on capable terminals, coloured unless NO_COLOR is set."""
    if (console := _console(sys.stdout)) is None:
        return Display()
    from candle_vllm.server.commands.markdown import MarkdownDisplay

    return MarkdownDisplay(console)


def has_colour(stream: TextIO) -> bool:
    """Whether a stream is a terminal with colour and NO_COLOR is not set."""
    console = _console(stream)
    return console is not None and console.is_terminal and not console.no_color


@contextlib.contextmanager
def sign_of_life() -> Iterator[Callable[[], None]]:
    """Context manager with a spinner, until the caller calls the yielded function because the answer begins."""
    if (console := _console(sys.stdout)) is None:
        yield lambda: None
        return
    status = console.status("reading", spinner="line" if console.options.ascii_only else "dots")
    shown = asyncio.get_running_loop().call_later(_PATIENCE, status.start)

    def end() -> None:
        shown.cancel()
        status.stop()

    try:
        yield end
    finally:
        end()


@contextlib.contextmanager
def keys_unseen() -> Iterator[None]:
    """Context manager without the echo of typed keys, which would mix with the answer; Ctrl+Z restores the echo."""
    if sys.platform == "win32":  # a console echoes keys only when they are read
        yield
        return
    import termios

    if not sys.stdin.isatty() or threading.current_thread() is not threading.main_thread():
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    shown = termios.ECHO | termios.ECHONL

    def put(echo: bool) -> None:
        if os.tcgetpgrp(descriptor) == os.getpgrp():  # a background process must not change the terminal
            now = termios.tcgetattr(descriptor)
            now[3] = now[3] & ~shown | (before[3] & shown if echo else 0)
            termios.tcsetattr(descriptor, termios.TCSANOW, now)  # preserves typed input

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - signature of a signal handler
        put(echo=True)
        if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
            os.write(1, b"\x1b[?25h")  # show the cursor, which live drawing hides
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, stop)

    handlers = {signal.SIGTSTP: stop, signal.SIGCONT: lambda *_: put(echo=False)}
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        put(echo=False)
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        put(echo=True)


def line_reader(home: Path, commands: Sequence[str] = ()) -> ReadLine:
    """Return a function that reads a text, or None at the end of input (without an editor also on Ctrl+C).

    The history is in `home`; Tab completes.
    """
    if not sys.stdin.isatty():
        return _next_text
    if not sys.stdout.isatty():
        return _asked_text
    return editor(home / HISTORY_FILE, commands=commands)


def editor(
    history: Path, source: Input | None = None, output: Output | None = None, commands: Sequence[str] = ()
) -> ReadLine:
    """Return a line editor for a terminal: pasted lines, and lines between triple quotes, are one text.

    Ctrl+C clears the input, Ctrl+D on an empty line is the end of input.
    """
    from prompt_toolkit import PromptSession, print_formatted_text
    from prompt_toolkit.filters import Condition

    session: PromptSession[str] = PromptSession(
        "> ",
        history=private_history(history),
        multiline=Condition(lambda: _is_open(session.default_buffer.text)),
        prompt_continuation="... ",
        input=source,
        output=output,
        enable_suspend=True,
        completer=completer(commands),
        complete_while_typing=False,
    )

    def read() -> str | None:
        while True:
            try:
                return _unquoted(session.prompt().encode(errors="replace").decode())  # replaces invalid UTF-8
            except KeyboardInterrupt:
                if not session.default_buffer.text:
                    print_formatted_text("(Ctrl+D or /exit leaves)", output=session.output)
            except EOFError:
                return None

    return read


def completer(commands: Sequence[str]) -> Completer:
    """Return a completer of commands, and of paths after commands that take one."""
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class Commands(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            word, blank, rest = document.text_before_cursor.partition(" ")
            if not blank and word.startswith("/"):
                yield from (Completion(name, -len(word)) for name in commands if name.startswith(word))
            elif blank and word in _WITH_PATH:
                yield from paths.get_completions(Document(rest.lstrip()), complete_event)

    return Commands()


def private_history(path: Path) -> History:
    """Return the input history: in a file that only its owner can read, or in memory if the file is not writable."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Kept(FileHistory):
        def store_string(self, string: str) -> None:
            if len(string) <= _MAX_ENTRY:
                with contextlib.suppress(OSError):
                    super().store_string(string)

    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            path.chmod(0o600)
            if file.seek(0, os.SEEK_END) > MAX_HISTORY:
                file.seek(-MAX_HISTORY // 2, os.SEEK_END)
                newer = file.read()
                file.seek(0)
                file.truncate()
                file.write(newer[newer.find(b"\n# ") :])  # start of the next entry; lines of texts begin with "+"
    except OSError:
        return InMemoryHistory()
    return Kept(path)


def _is_open(text: str) -> bool:
    """Whether a text begins with triple quotes that are not closed."""
    begun = text.lstrip()
    return begun.startswith(_QUOTES) and not (begun.rstrip().endswith(_QUOTES) and len(begun.rstrip()) >= 6)


def _unquoted(text: str) -> str:
    """Remove triple quotes; a "/" at the start is escaped as "//", so that the chat does not take it for a command."""
    text = text.strip()
    if not text.startswith(_QUOTES) or _is_open(text):
        return text
    text = text[3:-3].strip("\n")
    return f"/{text}" if text.startswith("/") else text


def _next_text() -> str | None:
    """Read the next line of standard input, or a text in triple quotes; None at the end of input or on Ctrl+C."""
    text, size = "", 0
    try:
        while line := read_line("message"):
            text += line
            size += len(line.encode())
            if size > MAX_TEXT:
                raise UsageError(f"a message on standard input is larger than {MAX_TEXT >> 20} MB")
            if (text == line or line.rstrip().endswith(_QUOTES)) and not _is_open(text):
                return _unquoted(text)
    except KeyboardInterrupt:
        return None
    if text:
        raise UsageError(f"standard input ended before the {_QUOTES} that closes a message")
    return None


def _asked_text() -> str | None:
    """Read a text from the terminal while standard output is redirected."""
    sys.stderr.write("> ")
    sys.stderr.flush()
    if (text := _next_text()) is None:
        sys.stderr.write("\n")
    return text
