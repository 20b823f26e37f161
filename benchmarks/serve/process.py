# SPDX-License-Identifier: MIT
"""A server process: started, watched, asked for library rounds, ended."""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

HERE = Path(__file__).resolve().parent
START_SECONDS = 300.0  # a model may have to be compiled for
END_SECONDS = 20.0


class ServerProcess:
    """A process that answers at `address`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._watched = psutil.Process(process.pid)
        self._unread = b""
        self.address = self._read_address()

    def _read_address(self) -> tuple[str, int]:
        address = ("", 0)
        while line := self._line(START_SECONDS):
            if line.startswith("address"):
                url = urlsplit(line.split()[1])
                assert url.hostname is not None
                assert url.port is not None
                address = (url.hostname, url.port)
            if line.startswith("Ctrl+C"):
                return address
        raise RuntimeError("the server did not start; see what it wrote above")

    def _line(self, seconds: float) -> str:
        """The next line of its output; "" at its end."""
        assert self._process.stdout is not None
        output = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            if not select.select([output], [], [], seconds)[0]:
                raise TimeoutError(f"the server said nothing for {seconds:.0f} s")
            data = os.read(output, 1 << 16)
            if not data:
                return ""
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def library(self, how: str, prompts: list[str], max_tokens: int, seconds: float) -> dict[str, Any]:
        """One round without HTTP: its seconds, its CPU seconds and its tokens."""
        assert self._process.stdin is not None
        todo = {"how": how, "prompts": prompts, "max_tokens": max_tokens}
        self._process.stdin.write(json.dumps(todo).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(self._line(seconds))

    def cpu_seconds(self) -> float:
        """Of the process and its children, since the start."""
        return sum(sum(one.cpu_times()[:2]) for one in self._all())

    def resident_mb(self) -> float:
        """Resident memory of the process and its children."""
        return round(sum(one.memory_info().rss for one in self._all()) / (1 << 20), 1)

    def _all(self) -> list[psutil.Process]:
        return [self._watched, *self._watched.children(recursive=True)]


@contextmanager
def server(what: str, *arguments: str) -> Iterator[ServerProcess]:
    """A server in a process of its own, which ends with the block."""
    _allow_many_files()
    command = [sys.executable, str(HERE / "server.py"), what, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        try:
            yield ServerProcess(process)
        finally:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _allow_many_files() -> None:
    """A connection is a file; the limit is handed on to the server."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def cpu_per_thousand(before: float, after: float, tokens: int) -> Mapping[str, float]:
    """CPU seconds of the server for a thousand tokens."""
    return {"server_cpu_s_per_1000_tokens": round((after - before) / max(tokens, 1) * 1e3, 4)}
