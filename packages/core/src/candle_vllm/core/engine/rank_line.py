# SPDX-License-Identifier: MIT
"""What goes over the lines between the first rank and the others: frames of a few types, behind their length."""

from __future__ import annotations

import socket
import threading
from typing import Any, TypeAlias, TypeVar

import msgspec
import numpy as np

from candle_vllm.core.engine.batch import AdapterRows, Batch, Ints

MOST_BYTES = 1 << 28  # of a frame


class Begin(msgspec.Struct, tag=True, frozen=True):
    """What a rank is: its settings, which one of how many, the folder where the ranks find each other."""

    config: dict[str, Any]
    rank: int
    size: int
    folder: str
    log_level: int


class Go(msgspec.Struct, tag=True, frozen=True):
    """All ranks are where this one is; the next thing is done together."""


class Adapters(msgspec.Struct, frozen=True):
    """Which rows of a step have which adapters: an `AdapterRows` as bytes, and the numbers of its adapters."""

    rows: bytes
    scales: bytes
    starts: bytes
    sources: bytes
    numbers: tuple[int, ...]


class LoadAdapter(msgspec.Struct, tag=True, frozen=True):
    """Load a part of the adapter at a path, beside the steps."""

    number: int
    path: str


class ForgetAdapters(msgspec.Struct, tag=True, frozen=True):
    """No step has these any more."""

    numbers: tuple[int, ...]


class Forward(msgspec.Struct, tag=True, frozen=True):
    """A step: the arrays of a `Batch` as bytes of int64; no tables where they are those of the step before."""

    tokens: bytes
    query_start: bytes
    context_lens: bytes
    drawn_rows: bytes
    num_decodes: int
    tables: bytes | None
    ahead: bytes | None
    adapters: Adapters | None


class Land(msgspec.Struct, tag=True, frozen=True):
    """The step that was begun first: what the last stage made of it comes back to the first one, which has the head."""


class Score(msgspec.Struct, tag=True, frozen=True):
    """Logits of rows of the last step."""

    rows: bytes


class Sleep(msgspec.Struct, tag=True, frozen=True):
    """Give memory back; see `Sleeper`."""

    level: int


class WakeUp(msgspec.Struct, tag=True, frozen=True):
    """Fill it again."""

    tags: frozenset[str]


ToRank: TypeAlias = Begin | Go | Forward | Land | Score | Sleep | WakeUp | LoadAdapter | ForgetAdapters


class Ready(msgspec.Struct, tag=True, frozen=True):
    """A rank has come so far: 0 it is there, 1 its weights are."""

    stage: int


class Failed(msgspec.Struct, tag=True, frozen=True):
    """A rank cannot go on; `setting` is which one is to blame, if any."""

    message: str
    setting: str | None = None


class AdapterLoaded(msgspec.Struct, tag=True, frozen=True):
    """A rank's part of an adapter is there, of files with this digest; or why it is not."""

    number: int
    digest: bytes
    failure: str | None = None


FromRank: TypeAlias = Ready | Failed | AdapterLoaded
_Message = TypeVar("_Message")


class Line:
    """One end of the line between the first rank and another one."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._sending = threading.Lock()  # steps and adapters have threads of their own

    def send(self, message: ToRank | FromRank) -> None:
        """Sends a message; OSError where the other end has gone."""
        data = msgspec.msgpack.encode(message)
        if len(data) > MOST_BYTES:
            raise ValueError(f"a message of {len(data)} bytes; at most {MOST_BYTES} are sent")
        with self._sending:
            self.socket.sendall(len(data).to_bytes(4, "little") + data)

    def receive(self, kind: type[_Message] | Any) -> _Message:
        """Waits for a message.

        Raises:
            EOFError: the other end has gone.
            ValueError: what came is no such message.
        """
        size = int.from_bytes(self._exactly(4), "little")
        if size > MOST_BYTES:
            raise ValueError(f"a message of {size} bytes is announced; at most {MOST_BYTES} are read")
        return msgspec.msgpack.decode(self._exactly(size), type=kind)

    def _exactly(self, count: int) -> bytearray:
        data, done = bytearray(count), 0
        with memoryview(data) as view:
            while done < count:
                try:
                    got = self.socket.recv_into(view[done:])
                except ConnectionError:
                    got = 0
                if not got:
                    raise EOFError("the other end of the line has gone")
                done += got
        return data


class ToldBatches:
    """Makes batches of what another rank is told; their runs are known to the first rank alone.

    Attributes:
        adapters: those that are loaded, by their numbers.
    """

    def __init__(self) -> None:
        self.adapters: dict[int, Any] = {}
        self._tables, self._version = np.zeros((0, 0), np.int64), object()

    def batch(self, told: Forward) -> Batch:
        """The step."""
        contexts = as_ints(told.context_lens)
        if told.tables is not None:
            self._tables, self._version = as_ints(told.tables).reshape(len(contexts), -1), object()
        return Batch(
            tokens=as_ints(told.tokens).reshape(4, -1),
            query_start=as_ints(told.query_start),
            context_lens=contexts,
            block_tables=self._tables,
            tables_version=self._version,
            num_decodes=told.num_decodes,
            runs=(),
            drawing=(),
            drafted=False,
            drawn_rows=as_ints(told.drawn_rows),
            ahead=None if told.ahead is None else as_ints(told.ahead),
            adapters=None if told.adapters is None else self._rows(told.adapters),
        )

    def _rows(self, told: Adapters) -> AdapterRows:
        scales = np.frombuffer(told.scales, np.float32).copy()
        adapters = [self.adapters[number] for number in told.numbers]
        return AdapterRows(as_ints(told.rows), scales, as_ints(told.starts), adapters, as_ints(told.sources))


def as_bytes(array: Ints) -> bytes:
    """Numbers as a message has them."""
    return np.ascontiguousarray(array, np.int64).tobytes()


def as_ints(data: bytes) -> Ints:
    """What `as_bytes` was given."""
    return np.frombuffer(data, np.int64).copy()
