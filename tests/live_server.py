# SPDX-License-Identifier: MIT
"""Servers for the end-to-end tests, in a process of their own or in a thread of this one, and clients for them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai

from candle_vllm.server import Settings
from candle_vllm.server.app import ServedEngine, create_app
from candle_vllm.server.serve import bind, make_server
from tests.trusted import trusted
from tests.waiting import wait_for

COMMAND = Path(sys.executable).with_name("candle-vllm")
PATIENCE = 120  # seconds; a busy machine is slow to import torch


def clean_environment(home: Path) -> dict[str, str]:
    """Return this process's environment without settings of candle-vllm, and without network access for models.

    Caches stay where they are, so that each process finds the kernels that earlier ones compiled.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CANDLE_VLLM_", "HF_"))}
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return kept | {"HOME": str(home), "XDG_CACHE_HOME": cache, "HF_HUB_OFFLINE": "1"}


def run_command(folder: Path, *arguments: str, text: str = "") -> str:
    """Run `candle-vllm` in `folder` to its end and return its standard output; fail if the exit status is not 0."""
    done = subprocess.run(
        [COMMAND, *arguments],
        input=text,
        capture_output=True,
        text=True,
        cwd=folder,
        env=clean_environment(folder),
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def openai_client(url: str) -> Iterator[openai.OpenAI]:
    """Return the official client, without retries and without the machine's proxy settings."""
    http = openai.DefaultHttpxClient(trust_env=False, verify=trusted())
    with openai.OpenAI(
        base_url=url + "/v1", api_key="none", max_retries=0, timeout=PATIENCE, http_client=http
    ) as client:
        yield client


@contextlib.contextmanager
def serving(engine: ServedEngine, **given: Any) -> Iterator[str]:
    """Serve an engine in a thread of this process; yield the server's URL."""
    settings = Settings(port=0, shutdown_timeout=1, **given)
    server, listener = make_server(create_app(engine, settings), settings), bind(settings.address)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


class ServerProcess:
    """`candle-vllm` serving in a process of its own, on a port that the system chose.

    Args:
        folder: its working folder, also for logs, and its home, so that no settings of this machine apply.
        flags: added to `command`.
        command: the command line without the flags.
    """

    def __init__(self, folder: Path, *flags: str, command: Sequence[str | Path] = (COMMAND,)) -> None:
        self.banner: list[str] = []
        self._told = False
        with (folder / "server.log").open("w") as log:
            self._process = subprocess.Popen(
                [*command, "--p", "0", *flags],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=folder,
                env=clean_environment(folder),
            )
        reader = threading.Thread(target=self._read_banner, daemon=True)
        reader.start()
        reader.join(PATIENCE)
        addresses = [line.split()[1] for line in self.banner if line.startswith("address")]
        if not addresses:
            kind = TimeoutError if reader.is_alive() else AssertionError  # a busy machine, or the server has ended
            self.stop()
            raise kind(f"the server did not start: {(folder / 'server.log').read_text()}")
        self.url = addresses[0]

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def cpu_seconds(self) -> float:
        """CPU time that the server has used, from /proc."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def terminate(self) -> None:
        """Send SIGTERM once: the process may no longer handle a second one."""
        if not self._told:
            self._told = True
            self._process.terminate()

    def stop(self) -> int:
        """Send SIGTERM if that has not happened, and return the exit status; a server that hangs is killed (-9)."""
        self.terminate()
        try:
            return self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
        finally:
            assert self._process.stdout is not None
            self._process.stdout.close()

    def _read_banner(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.banner.append(line)
            if line.startswith("Ctrl+C"):  # the last line
                return
