# SPDX-License-Identifier: MIT
"""Child processes in groups of their own: started, watched and ended with everything that they started."""

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

GRACE = 2.0  # seconds between the end of its input, SIGTERM and SIGKILL
_KILLED = 0.5  # seconds for SIGKILL to be done; dead members that nobody waits for are in the group for ever
_POLL = 0.01
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")
_CREDENTIALS = re.compile(r"(?:[a-zA-Z0-9+.-]{1,20}://)?([^/?#]*)@")
_T = TypeVar("_T")


def inherited_environment() -> dict[str, str]:
    """What a program gets of this process's environment: the SDK's few variables, and the way to the network.

    Without its proxy and its certificates, a program that fetches itself first (`npx`, `uvx`) would not even start
    where there are such.
    """
    names = (*_PROXIES, *map(str.lower, _PROXIES), *_CERTIFICATES)
    found = {name: os.environ[name] for name in names if name in os.environ}
    return get_default_environment() | {name: value for name, value in found.items() if not value.startswith("()")}


def inherited_secrets() -> list[str]:
    """Credentials in the addresses of proxies, which programs are given and may print."""
    environment = inherited_environment()
    proxies = [environment.get(name, "") for name in (*_PROXIES, *map(str.lower, _PROXIES))]
    credentials = [match[1] for value in proxies if (match := _CREDENTIALS.match(value))]
    return credentials + [one.partition(":")[2] for one in credentials]


async def to_the_end(work: Coroutine[Any, Any, _T]) -> _T:
    """Awaits what must not be left half done; a cancellation meanwhile is raised when it is done."""
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
            task.exception()  # it was looked at
        raise cancelled
    return task.result()


async def start_process(
    command: str, arguments: Sequence[str], *, environment: Mapping[str, str], folder: str | None
) -> Process:
    """A process with three pipes, in a group and session of its own. Nothing is left of it when this is cancelled.

    Raises:
        OSError: it cannot be started.
        ValueError: a NUL in the command, an argument or the environment.
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
    """Ends what may not have been started yet; whoever waits for `spawning` by itself would cancel that as well."""
    await end_process(await spawning, grace=0.0)


async def end_process(process: Process, *, grace: float | None = None) -> None:
    """Closes its input, waits, and ends its whole group: SIGTERM, and SIGKILL for what is still there.

    A descendant that left the group (`setsid`) is not reached, which is what leaving it means.
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
    """Ends a process and its group at once, without waiting."""
    if sys.platform == "win32":
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    else:
        _signal_group(process.pid, signal.SIGKILL)
    _close_pipes(process)


async def exited(process: Process, seconds: float) -> None:
    """Waits for its end by looking: `wait()` also waits for the ends of its pipes, which a descendant may hold."""
    deadline = asyncio.get_running_loop().time() + seconds
    while process.returncode is None and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(_POLL)


def _close_pipes(process: Process) -> None:
    """Where a descendant outside the group holds a pipe's end, asyncio would keep the transport open for ever.

    Its `close` waits until what was written has been read: nobody reads the input any more.
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
    """Whether the group had somebody left to signal."""
    assert sys.platform != "win32"
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # zombies of another user, or on macOS of one's own
        return number == 0
    return True
