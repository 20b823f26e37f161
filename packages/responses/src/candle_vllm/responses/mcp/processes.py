# SPDX-License-Identifier: MIT
"""Child processes in process groups of their own: started, watched, and ended with their group."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import anyio
from mcp.client.stdio import get_default_environment

GRACE = 2.0  # seconds from closing stdin to SIGTERM, and from SIGTERM to SIGKILL
_KILLED = 0.5  # seconds to wait after SIGKILL; zombies that nobody reaps stay in the group
_POLL = 0.01
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")
_CREDENTIALS = re.compile(r"(?:[a-zA-Z0-9+.-]{1,20}://)?([^/?#]*)@")
_T = TypeVar("_T")


def inherited_environment() -> dict[str, str]:
    """Return an MCP server's environment: the MCP SDK's variables, and those with which `npx` downloads by a proxy."""
    names = (*_PROXIES, *map(str.lower, _PROXIES), *_CERTIFICATES)
    found = {name: os.environ[name] for name in names if name in os.environ}
    return get_default_environment() | {name: value for name, value in found.items() if not value.startswith("()")}


def inherited_secrets() -> list[str]:
    """Return the credentials in proxy addresses, which programs inherit and may print."""
    environment = inherited_environment()
    proxies = [environment.get(name, "") for name in (*_PROXIES, *map(str.lower, _PROXIES))]
    credentials = [match[1] for value in proxies if (match := _CREDENTIALS.match(value))]
    return credentials + [one.partition(":")[2] for one in credentials]


async def to_the_end(work: Coroutine[Any, Any, _T]) -> _T:
    """Await work that must not be interrupted; a cancellation that arrives in the meantime is raised afterwards."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # marks it as retrieved
        raise cancelled
    return task.result()


async def start_process(
    command: str, arguments: Sequence[str], *, environment: Mapping[str, str], folder: str | None
) -> Process:
    """Start a process with three pipes, in its own group and session. A cancelled call ends the process.

    Raises OSError if the command cannot be started, and ValueError if it, an argument or the environment has NUL.
    """
    spawning = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            command,
            *arguments,
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            env=dict(environment),
            cwd=folder,
            start_new_session=sys.platform != "win32",
        )
    )
    try:
        return await asyncio.shield(spawning)
    except asyncio.CancelledError:
        with contextlib.suppress(OSError, ValueError):
            await to_the_end(_end_spawned(spawning))
        raise


async def _end_spawned(spawning: asyncio.Future[Process]) -> None:
    """End a process that may not have started yet; a second cancellation must not reach `spawning`."""
    await end_process(await spawning, grace=0.0)


async def end_process(process: Process, *, grace: float | None = None) -> None:
    """Close the process's input, wait up to `grace` seconds (None: `GRACE`), and end its group: SIGTERM, then SIGKILL.

    A descendant that left the group (`setsid`) is not ended; on Windows, only the process itself is.
    """
    grace = GRACE if grace is None else grace
    if process.stdin is not None:
        process.stdin.close()
    await exited(process, grace)
    if sys.platform == "win32":
        if process.returncode is None:
            process.kill()
    elif _signal_group(process.pid, signal.SIGTERM):
        await _gone(process, grace or 0.2)
        if _signal_group(process.pid, signal.SIGKILL):
            await _gone(process, _KILLED)
    await exited(process, GRACE)
    _close_pipes(process)


def kill_group(process: Process) -> None:
    """Kill a process and its group at once, without waiting."""
    if sys.platform == "win32":
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    else:
        _signal_group(process.pid, signal.SIGKILL)
    _close_pipes(process)


async def exited(process: Process, seconds: float) -> None:
    """Poll for the end of a process: `wait()` also waits until its pipes close, which a descendant may hold open."""
    deadline = asyncio.get_running_loop().time() + seconds
    while process.returncode is None and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(_POLL)


def _close_pipes(process: Process) -> None:
    """Close the pipes; if a descendant outside the group holds one, asyncio would never close the transport.

    The `close` of the input would wait until its data is read, but nobody reads it any more.
    """
    if process.stdin is not None and process.stdin.transport.get_write_buffer_size():
        process.stdin.transport.abort()
    transport = getattr(process, "_transport", None)
    if transport is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            transport.close()


async def _gone(process: Process, seconds: float) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while _signal_group(process.pid, 0) and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(_POLL)


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to a group; return whether it had a member."""
    assert sys.platform != "win32"
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's zombies; on macOS this user's, too
        return number == 0
    return True
