# SPDX-License-Identifier: MIT
"""A command on a terminal of its own: typed input, all output, and the contents of the screen."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyte

from packages.server.tests.forks import Forked

PROGRAM = """
import sys
from packages.server.tests.server_fakes import PacedEngine
from candle_vllm.server import cli
from candle_vllm.server.commands import {command} as module
left = {texts!r}
engine = PacedEngine(lambda _: left.pop(0), pause={pause})
def load(settings, **_):
    if settings.model == "missing":
        from candle_vllm.core.errors import ModelNotFoundError
        raise ModelNotFoundError("there is no model missing")
    if settings.model == "slow":
        import time
        from candle_vllm.core.progress import tell
        print("loading the slow one", flush=True)
        for _ in range(6000):
            tell("loading")
            time.sleep(0.01)
    return engine
module.load_engine = load
sys.exit(cli.main({arguments!r}))
"""


ASKS = b"\x1b[6n"
"""Query of the cursor's position, which the program writes after its output."""


class Terminal:
    """A command with a scripted engine, in a process of its own, on a terminal of `lines` and `columns`."""

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        *texts: str,
        pause: float = 0.0,
        environment: Mapping[str, str] | None = None,
        lines: int = 24,
        columns: int = 80,
    ) -> None:
        code = PROGRAM.format(
            command={"generate": "terminal"}.get(arguments[0], arguments[0]),
            texts=list(texts),
            pause=pause,
            arguments=list(arguments),
        )
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        variables = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        variables |= {"HOME": str(folder), "TERM": "xterm-256color", **(environment or {})}
        self.process = Forked(code, (theirs, theirs, theirs), folder, variables)
        os.close(theirs)
        self.shown = ""
        self._screen = pyte.HistoryScreen(columns, lines, history=10_000)
        self._stream = pyte.ByteStream(self._screen)
        self._rest = b""  # what may be the beginning of `ASKS`

    @property
    def screen(self) -> str:
        """Text on the screen and in the scrollback, without trailing blanks."""
        columns = self._screen.columns
        above = ["".join(line[x].data for x in range(columns)) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self._screen.display]).rstrip()

    def wait_for(self, text: str) -> None:
        """Read until `text` was written or is on the screen."""
        self._wait(lambda: text in self.shown or text in self.screen)

    def wait_for_prompt(self) -> None:
        """Read until the cursor is after an empty prompt."""
        cursor = self._screen.cursor
        self._wait(lambda: cursor.x == 2 and self._screen.display[cursor.y].rstrip() == ">")

    @property
    def echoes(self) -> bool:
        """Whether the terminal echoes input."""
        return bool(termios.tcgetattr(self._ours)[3] & termios.ECHO)

    def set_echo(self) -> None:
        """Make the terminal echo input."""
        now = termios.tcgetattr(self._ours)
        now[3] |= termios.ECHO
        termios.tcsetattr(self._ours, termios.TCSANOW, now)

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Read until a condition holds."""
        self._wait(happened)

    def _wait(self, happened: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not happened():
            late = time.monotonic() > end
            if late or (self._waits() and not self._read() and not happened()):
                self.process.kill()
                self.process.wait()
                raise (TimeoutError if late else AssertionError)(f"{self.screen}\n{self.shown[-2000:]!r}")

    def _read(self) -> bool:
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # the other side is closed
            return False
        self.shown += data.decode("utf-8", "replace")
        *asked, rest = (self._rest + data).split(ASKS)
        for before in asked:
            self._stream.feed(before)
            os.write(self._ours, f"\x1b[{self._screen.cursor.y + 1};{self._screen.cursor.x + 1}R".encode())
        whole = len(rest) - next(size for size in range(len(ASKS) - 1, -1, -1) if rest.endswith(ASKS[:size]))
        self._stream.feed(rest[:whole])
        self._rest = rest[whole:]
        return True

    def type(self, text: str) -> None:
        """Type keys."""
        os.write(self._ours, text.encode())

    def end(self, holds: Callable[[], bool] = lambda: True) -> int:
        """Wait for the command's end, assert that `holds()` is true, and return the exit status."""
        try:
            limit = time.monotonic() + 60
            while time.monotonic() < limit and (self.process.poll() is None or self._waits()):
                if self._waits() and not self._read():
                    break
            status = self.process.wait(max(1.0, limit - time.monotonic()))
            assert holds()
            return status
        finally:
            os.close(self._ours)

    def _waits(self) -> bool:
        return bool(select.select([self._ours], [], [], 0.05)[0])
