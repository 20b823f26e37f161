# SPDX-License-Identifier: MIT
"""Python processes that begin with the server's modules imported, which takes a new process 1.5 s of CPU.

A process of this module imports them once and forks for each program. A program whose imports are
tested, or that changes what an import does, needs a new process: `subprocess`.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).parents[3])
IMPORTED = """
import os, sys
sys.path.insert(0, {root!r})
import rich.markdown, rich.syntax, prompt_toolkit
from packages.server.tests import forks, server_fakes
from candle_vllm.responses.mcp import link
from candle_vllm.server import app, cli, interrupts, serve
from candle_vllm.server.commands import agent, chat, interactive
program = forks.next_program(int(sys.argv[1]))
if program is not None:
    del sys.argv[1:]
    exec(compile(program, "<string>", "exec"), {{"__name__": "__main__"}})
"""


class Forked:
    """A running program, with the interface of `subprocess.Popen`.

    Attributes:
        pid: id of its process, which leads a session; if standard input is a terminal, it is the session's.
        returncode: its exit status, the negative number of the signal that ended it, or None.
    """

    def __init__(
        self, program: str, streams: tuple[int, int, int], folder: Path, environment: Mapping[str, str]
    ) -> None:
        self._ours, theirs = socket.socketpair()
        asked = {"program": program, "folder": str(folder), "environment": dict(environment)}
        with theirs, _server().makefile("wb") as server:
            socket.send_fds(_server(), [b"."], [theirs.fileno(), *streams])
            server.write(json.dumps(asked).encode() + b"\n")
        self._said = self._ours.makefile("rb")
        self.pid = int(self._said.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status; None while the program runs."""
        if self.returncode is None:
            self._ours.setblocking(False)
            try:
                line = self._said.readline()
            finally:
                self._ours.setblocking(True)
            if line:
                self.returncode = int(line)
                self._said.close()
                self._ours.close()
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        """Wait for the end of the program and return its exit status."""
        limit = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > limit:
                raise subprocess.TimeoutExpired("a forked program", timeout)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


@functools.cache
def _server() -> socket.socket:
    """A connection to the process that forks; it ends with this one."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", IMPORTED.format(root=ROOT), str(theirs.fileno())],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


# ---- in the process that forks ---------------------------------------------------------------------------------------


def next_program(descriptor: int) -> str | None:
    """Fork for each requested program. Return the program in the fork, and None at the end in this process."""
    requests = socket.socket(fileno=descriptor)
    while True:
        _, given, _, _ = socket.recv_fds(requests, 1, 4)
        if not given:
            return None
        line = b""
        while not line.endswith(b"\n"):
            line += requests.recv(1 << 16)
        watcher = os.fork()
        if watcher == 0:
            requests.close()
            return _watched(json.loads(line), given[0], given[1:])
        for each in given:
            os.close(each)
        _reap()


def _reap() -> None:
    """Forget processes that have ended."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return


def _watched(asked: dict[str, Any], said: int, streams: list[int]) -> str:
    """Return the program in a new process; this process reports its id and its exit status."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid:
        for each in streams:
            os.close(each)
        os.close(reads)
        os.write(said, b"%d\n" % pid)
        os.close(writes)  # the program may begin
        _, status = os.waitpid(pid, 0)
        os.write(said, b"%d\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    os.close(said)
    os.close(writes)
    os.read(reads, 1)
    os.close(reads)
    _take(streams)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    return str(asked["program"])


def _take(streams: list[int]) -> None:
    """Make these the standard streams. A terminal is the process's own, so that Ctrl+C typed there is heard."""
    os.setsid()
    for number, each in enumerate(streams):
        os.dup2(each, number)
        os.close(each)
    if os.isatty(0):
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    # The earlier objects belong to other streams.
    line = 1 if os.isatty(1) else -1
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=line, closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
