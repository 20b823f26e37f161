# SPDX-License-Identifier: MIT
"""An engine's process and its parent: the start message, limits of the sockets, and a bell that wakes their threads.

Both processes use this module. The start message, sent over the child's standard input, has the address of the parent
and the settings. None of this is on a command line, which other users of the machine can read.
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

CONTROL, STEPS = b"c", b"s"  # the child's two sockets: for requests and answers; for outputs of steps
END = b"e"
MAX_START: Final = 1 << 24  # bytes
TOKEN_BYTES: Final = 32


class Bell:
    """Wakes a thread that polls descriptors (self-pipe). It is a socket pair, because Windows cannot poll a pipe.

    `descriptor` is readable after `ring`. Call `clear` before checking for events, or a ring may be lost.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # reentrant: a finaliser may abort a stream at any point
        self._closed = False
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self.descriptor = self._read.fileno()

    def ring(self) -> None:
        """Make the descriptor readable. Thread-safe; does nothing after `close`."""
        with self._lock, contextlib.suppress(BlockingIOError):  # a full socket is already readable
            if not self._closed:
                self._write.send(b"\0")

    def clear(self) -> None:
        """Make the descriptor unreadable; call this before checking for events."""
        with contextlib.suppress(BlockingIOError):
            self._read.recv(4096)

    def close(self) -> None:
        """Close the sockets; no thread may poll them after that. Closing twice is fine."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._read.close()
                self._write.close()


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """The start message, over the child's standard input.

    Attributes:
        token: shared secret of the two processes.
        address: address on which the parent listens.
        folder: folder of the parent's socket, "" on Windows; the child removes it if the parent has exited.
        alive: descriptor that the child holds open while it runs; None on Windows.
        log: `log_style()` of the parent.
        config: fields of `EngineConfig`.
    """

    token: bytes
    address: str
    folder: str
    alive: int | None
    log: tuple[int, str]
    config: dict[str, Any]


def write_start(config: EngineConfig, token: bytes, address: str, folder: str, alive: int | None) -> bytes:
    """Serialise the start message, prefixed with its length; raises ConfigError if a setting cannot be serialised, or
    the message has more than `MAX_START` bytes."""
    start = Start(token=token, address=address, folder=folder, alive=alive, log=log_style(), config=config.plain())
    try:
        data = msgspec.msgpack.encode(start)
    except (UnicodeEncodeError, TypeError) as error:
        raise ConfigError(f"a setting cannot be handed to another process: {error}") from None
    if len(data) > MAX_START:
        raise ConfigError(f"the settings have {len(data)} bytes, and {MAX_START} can be handed to another process")
    return len(data).to_bytes(4, "little") + data


def read_start(descriptor: int) -> Start:
    """Read the start message; raises ValueError if the bytes are not a start message, and EOFError if the parent has
    exited."""
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
    """Set the limits of a socket: message size, queue lengths and timeouts."""
    end.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
    end.setsockopt(zmq.SNDHWM, MAX_QUEUED)
    end.setsockopt(zmq.RCVHWM, MAX_QUEUED)
    end.setsockopt(zmq.SNDTIMEO, int(PATIENCE * 1000))
    end.setsockopt(zmq.LINGER, 0)
