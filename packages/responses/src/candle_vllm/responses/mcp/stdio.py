# SPDX-License-Identifier: MIT
"""The stdio transport: a server as a child process, with JSON-RPC messages as lines on its pipes.

The SDK's own client reads lines of any length, needs a file for standard error, and does not end the server's
descendants if the server exits by itself. Here, lines are limited, standard error is logged, and the process group is
ended. Specification: https://modelcontextprotocol.io/specification/2025-11-25/basic/transports#stdio
"""

from __future__ import annotations

import asyncio
import json
import re
from asyncio.subprocess import Process
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

import anyio
from mcp.shared.message import SessionMessage
from mcp_types import INTERNAL_ERROR, ErrorData, JSONRPCError, JSONRPCMessage, jsonrpc_message_adapter

from candle_vllm.responses.mcp import processes
from candle_vllm.responses.mcp.peer import Peer

MAX_MESSAGE = 10 * 1024 * 1024  # bytes of one message
_MAX_SKIPPED = 100 * 1024 * 1024  # bytes of one line that are read and discarded before the server is ended
_CHUNK = 1 << 16
_ERROR_CHUNK = 1 << 12
_LINES_PER_SECOND = 5000  # lines of standard error; a program that writes more is delayed
_BLANK_PER_SECOND = 1_000_000  # bytes of blank lines on standard output
_BLANK_LINES = re.compile(rb"\n{2,}")
_LOOK = 0.25  # seconds between checks whether the program runs
_EXIT = 2.0  # seconds that a program may take from the end of its output to its exit
_KEPT = 256  # bytes that are held of an oversized line's head and tail
_FLUSH = 0.5  # seconds to flush accepted messages to the pipe at the end
_LAST_LINES = 20  # lines of standard error that are searched for its error
_WORDS = 300  # characters of the line that reports the error
_ERROR = re.compile(r"error|exception|fatal|panic|cannot|could not|failed", re.IGNORECASE)
_GROUP = re.compile(r"\A\s+[|+] ?")  # before each line of a Python exception group's traceback
_NUMBER_OR_TEXT = rb'(-?(?:0|[1-9]\d{0,17})|"[ !#-\[\]-~]{1,100}")'
_VERSION = rb'(?:"jsonrpc"\s*:\s*"2\.0"\s*,\s*)?'
_RESPONSE = re.compile(rb'\s*\{\s*"(?:result|error)"')  # a response whose id comes last
_ID_AT_START = re.compile(  # of a response
    rb"\s*\{\s*" + _VERSION + rb'"id"\s*:\s*' + _NUMBER_OR_TEXT + rb"\s*,\s*" + _VERSION + rb'"(?:result|error)"'
)
_ID_AT_END = re.compile(rb',\s*"jsonrpc"\s*:\s*"2\.0"\s*,\s*"id"\s*:\s*' + _NUMBER_OR_TEXT + rb"\s*\}\s*$")


class StdioServer:
    """One run of a server's program; the peer's log gets each line of its standard error."""

    def __init__(self, peer: Peer) -> None:
        self._config = peer.config
        self._log = peer.log
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)  # last lines of its standard error
        self._exit_status: int | None = None  # set if it exited by itself; negative for a signal
        self._fault: str | None = None  # why this process ended it

    def ending(self) -> str | None:
        """Return how the program ended, or why it was ended; None while it runs."""
        status = self._exit_status
        if self._fault or status is None:
            return self._fault
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"its program {how}{self.last_words()}"

    def last_words(self) -> str:
        """Return what standard error says about a failure, to be appended to a sentence; "" without lines.

        The result is the last unindented line that reports an error, because Node ends with its version and a traceback
        has indented frames; without such a line, it is the last line.
        """
        lines = [text for line in self._last_lines if (text := _GROUP.sub("", line))]
        telling = [line for line in lines if not line[0].isspace() and _ERROR.search(line)] or lines
        if not telling:
            return ""
        line = " ".join(telling[-1].split())
        return f"; it wrote: {line if len(line) <= _WORDS else line[: _WORDS - 1] + '…'}"

    @asynccontextmanager
    async def transport(self) -> AsyncGenerator[tuple[Any, Any], None]:
        """Run the program, and yield the two streams that the SDK's `Client` needs."""
        config = self._config
        assert config.command is not None
        process = await processes.start_process(
            config.command,
            config.args,
            environment=processes.inherited_environment() | dict(config.env),
            folder=str(config.cwd) if config.cwd is not None else None,
        )
        to_session, received = anyio.create_memory_object_stream[SessionMessage | Exception](0)
        sent, from_session = anyio.create_memory_object_stream[SessionMessage](0)
        errors = asyncio.ensure_future(self._read_errors(process))
        reader = asyncio.ensure_future(self._read(process, to_session, errors))
        writer = asyncio.ensure_future(self._write(process, from_session, to_session, reader))
        watcher = asyncio.ensure_future(self._watch(process, reader))
        try:
            yield received, sent
        finally:
            for stream in (received, sent):
                stream.close()
            try:
                await processes.to_the_end(self._close(process, (reader, writer, errors, watcher)))
            except asyncio.CancelledError:
                processes.kill_group(process)  # if the event loop itself ends, nothing awaits the steps above
                raise
            for stream in (to_session, from_session):
                stream.close()

    async def _close(self, process: Process, tasks: Sequence[asyncio.Task[None]]) -> None:
        _, writer, errors, watcher = tasks
        watcher.cancel()
        await asyncio.wait({writer}, timeout=_FLUSH)
        await processes.end_process(process)
        await asyncio.wait({errors}, timeout=_FLUSH)  # its last lines are already in the pipe
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, process: Process, session: Any, errors: asyncio.Task[None]) -> None:
        """Pass messages to the session, and end it when the pipe ends or the server has failed."""
        assert process.stdout is not None
        splitter = LineSplitter(MAX_MESSAGE)
        async with session:
            with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError):
                while chunk := await process.stdout.read(_CHUNK):
                    filled = _BLANK_LINES.sub(b"\n", chunk)
                    await asyncio.sleep((len(chunk) - len(filled)) / _BLANK_PER_SECOND)
                    for line in splitter.feed(filled):
                        for message in filter(None, map(self._message, _members(line))):
                            await session.send(message)
                    if splitter.pending > _MAX_SKIPPED:
                        self._fault = f"it wrote a line of more than {_MAX_SKIPPED} bytes"
                    if self._fault:
                        break
                else:
                    await processes.exited(process, _EXIT)
                    await asyncio.wait({errors}, timeout=_EXIT)  # the last lines that it wrote
                    self._exit_status = process.returncode
        while await process.stdout.read(_CHUNK):
            pass  # a server whose pipe is full could not exit, so its output is discarded

    async def _watch(self, process: Process, reader: asyncio.Task[None]) -> None:
        """End the session of a program that has exited while a descendant holds its pipe open."""
        while process.returncode is None:
            await asyncio.sleep(_LOOK)
        self._exit_status = process.returncode
        await asyncio.wait({reader}, timeout=_EXIT)  # its last output may still be in the pipe
        reader.cancel()

    def _message(self, line: bytes | OversizedLine) -> SessionMessage | Exception | None:
        if isinstance(line, OversizedLine):
            refused = self._refused(line, f"the reply has {line.size} bytes; at most {MAX_MESSAGE} are read")
            if refused is None:
                self._fault = f"it sent a message of {line.size} bytes; at most {MAX_MESSAGE} are read"
            return refused
        if not line.strip():
            return None
        try:
            return SessionMessage(_parsed(line))
        except (ValueError, RecursionError):
            told = f"on standard output: {line[:200].decode(errors='replace')}"
            whole = OversizedLine(line[:_KEPT], line[-_KEPT:], len(line))
            return self._refused(whole, f"not a message of the protocol: {told}") or ValueError(told)

    def _refused(self, line: OversizedLine, why: str) -> SessionMessage | None:
        """Convert a response that cannot be read to an error of its request; None if its id is not found."""
        found = _ID_AT_START.match(line.head) or (_RESPONSE.match(line.head) and _ID_AT_END.search(line.tail))
        if found is None:
            return None
        self._log(why)
        error = ErrorData(code=INTERNAL_ERROR, message=why)
        return SessionMessage(JSONRPCError(jsonrpc="2.0", id=json.loads(found[1]), error=error))

    async def _read_errors(self, process: Process) -> None:
        assert process.stderr is not None
        splitter = LineSplitter(4 * _CHUNK)
        while chunk := await process.stderr.read(_ERROR_CHUNK):
            self._log_all(splitter.feed(chunk))
            await asyncio.sleep(chunk.count(b"\n") / _LINES_PER_SECOND)
        self._log_all(splitter.feed(b"\n"))

    def _log_all(self, lines: Iterable[bytes | OversizedLine]) -> None:
        for line in lines:
            kept = self._log((line.head if isinstance(line, OversizedLine) else line).decode(errors="replace"))
            if kept.strip():
                self._last_lines.append(kept)

    async def _write(self, process: Process, outgoing: Any, session: Any, reader: asyncio.Task[None]) -> None:
        assert process.stdin is not None
        with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError, OSError, ValueError):
            async with outgoing:
                async for message in outgoing:
                    text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                    process.stdin.write(text.encode() + b"\n")
                    await process.stdin.drain()
                return
        await asyncio.wait({reader}, timeout=_EXIT)  # most programs that stop reading are exiting, and report why
        session.close()  # the pipe is broken: no response will come


def _members(line: bytes | OversizedLine) -> Iterable[bytes | OversizedLine]:
    """Return the messages of a line, which is a batch in the protocol of 2025-03-26, or one message."""
    if isinstance(line, bytes) and line.lstrip().startswith(b"["):
        with suppress(ValueError, RecursionError):
            members = json.loads(line.decode(errors="replace")) or [[]]  # an empty batch is no message
            return (json.dumps(member).encode() for member in members)
    return [line]


def _parsed(line: bytes) -> JSONRPCMessage:
    """Parse a message; bytes that are not UTF-8 and halves of surrogate pairs, as of a cut text, are replaced."""
    try:
        return jsonrpc_message_adapter.validate_json(line, by_name=False)
    except ValueError:
        text = json.dumps(json.loads(line.decode("utf-8-sig", "replace")), ensure_ascii=False)
        return jsonrpc_message_adapter.validate_json(text.encode("utf-8", "replace"), by_name=False)


class OversizedLine(NamedTuple):
    """The head and tail of a line that exceeds the limit or is no message, and its size."""

    head: bytes
    tail: bytes
    size: int


class LineSplitter:
    """Splits chunks at their line feeds; of a line of more than `limit` bytes, only head and tail are held."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[bytes] = []
        self._head = b""
        self._tail = b""
        self.pending = 0  # bytes of the line that has not ended yet

    def feed(self, chunk: bytes) -> Iterator[bytes | OversizedLine]:
        """Yield the lines that end within a chunk."""
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            self._add(piece)
            yield self._take()
        self._add(rest)

    def _add(self, piece: bytes) -> None:
        self.pending += len(piece)
        if self.pending <= self._limit:
            self._parts.append(piece)
            return
        whole = b"".join([*self._parts, piece])
        self._parts.clear()
        self._head = (self._head + whole[:_KEPT])[:_KEPT]
        self._tail = (self._tail + whole[-_KEPT:])[-_KEPT:]

    def _take(self) -> bytes | OversizedLine:
        line = OversizedLine(self._head, self._tail, self.pending) if self._head else b"".join(self._parts)
        self._parts.clear()
        self._head = self._tail = b""
        self.pending = 0
        return line
