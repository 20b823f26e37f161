# SPDX-License-Identifier: MIT
"""The line between the processes: the first words to the child, the sockets' limits, and a bell. Both ends use it.

The first words go over the child's standard input: how to reach its parent, and what to load. Nothing of it stands on a
command line, which others on the machine can read. Before step 1 of a request's life.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import Any, Final

import msgspec
import zmq

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.errors import ConfigError
from candle_vllm.core.remote.wire import MAX_FRAME, MAX_QUEUED, PATIENCE
from candle_vllm.core.shown import log_style

CONTROL, STEPS = b"c", b"s"  # the child's two sockets: requests and answers, and what its steps make
END = b"e"
MAX_START: Final = 1 << 24  # bytes
TOKEN_BYTES: Final = 32


class Bell:
    """A line to oneself that holds a byte while something is to be looked at; sockets, for Windows waits for no pipe.

    Attributes:
        descriptor: readable once it was rung. Clear it before looking at what happened, or a ring may be lost.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a stream may be dropped, and so aborted, in the midst of anything
        self._closed = False
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self.descriptor = self._read.fileno()

    def ring(self) -> None:
        """Something happened. Thread-safe; nothing happens once it is closed."""
        with self._lock, contextlib.suppress(BlockingIOError):  # a full line is readable as well
            if not self._closed:
                self._write.send(b"\0")

    def clear(self) -> None:
        """What happened is being looked at."""
        with contextlib.suppress(BlockingIOError):
            self._read.recv(4096)

    def close(self) -> None:
        """Lets go of the line; nobody may wait for it any more. Closing twice is fine."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._read.close()
                self._write.close()


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """The first words, over the child's standard input.

    Attributes:
        token: what both ends know and nobody else.
        address: where this process listens.
        folder: of the sockets, if they are in one; removed by the child where this process has gone without doing so.
        alive: descriptor that the child keeps open as long as it lives; None where it gets none (Windows).
        log: `log_style()` of the parent.
        config: fields of `EngineConfig`.
    """

    token: bytes
    address: str
    folder: str
    alive: int | None
    log: tuple[int, bool]
    config: dict[str, Any]


def write_start(config: EngineConfig, token: bytes, address: str, folder: str, alive: int | None) -> bytes:
    """The words, behind their length.

    Raises:
        ConfigError: a setting cannot be handed over.
    """
    start = Start(token=token, address=address, folder=folder, alive=alive, log=log_style(), config=config.plain())
    try:
        data = msgspec.msgpack.encode(start)
    except (UnicodeEncodeError, TypeError) as error:
        raise ConfigError(f"a setting cannot be handed to another process: {error}") from None
    if len(data) > MAX_START:
        raise ConfigError(f"the settings have {len(data)} bytes, and {MAX_START} can be handed to another process")
    return len(data).to_bytes(4, "little") + data


def read_start(descriptor: int) -> Start:
    """What `write_start` wrote.

    Raises:
        ValueError: it did not write this.
        EOFError: the parent has gone.
    """
    size = int.from_bytes(_read_exactly(descriptor, 4), "little")
    if size > MAX_START:
        raise ValueError(f"the parent announces {size} bytes; at most {MAX_START} are read")
    return msgspec.msgpack.decode(_read_exactly(descriptor, size), type=Start)


def _read_exactly(descriptor: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = os.read(descriptor, count - len(data))
        if not part:
            raise EOFError("the parent has gone")
        data += part
    return data


def set_limits(end: zmq.Socket[bytes]) -> None:
    """Bounds of every socket: sizes, queues and waits."""
    end.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
    end.setsockopt(zmq.SNDHWM, MAX_QUEUED)
    end.setsockopt(zmq.RCVHWM, MAX_QUEUED)
    end.setsockopt(zmq.SNDTIMEO, int(PATIENCE * 1000))
    end.setsockopt(zmq.LINGER, 0)
