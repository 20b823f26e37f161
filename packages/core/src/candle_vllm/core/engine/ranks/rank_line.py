# SPDX-License-Identifier: MIT
"""Messages between the first rank and the others: frames of a few types, prefixed with their length.

Each other rank has two connections. Over its line it gets steps and other work, in order. Messages on its side line are
outside of this order: heartbeats of both ends, requests to the rendezvous store, and reading of offloaded blocks.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import hmac
import itertools
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.engine.runners.model_runner import ModelRunner
from candle_vllm.core.engine.step.batch import AdapterRows, Batch, EmbeddedRows, Ints, RotaryPositions
from candle_vllm.core.errors import EngineDeadError
from candle_vllm.core.kernels.states import StateRows

logger = logging.getLogger(__name__)

MOST_BYTES = 1 << 28  # maximum bytes of a frame
_PIECE = 1 << 20  # bytes of a frame that are allocated before they arrive
_TAG_BYTES = 16  # bytes of the signature after each frame between machines
TICK = 1.0  # seconds between two heartbeats
SILENCE = 8  # ticks without a heartbeat after which a rank that has started counts as gone
_GRACE = 1.0  # seconds that a rank has to end cleanly when the first rank has gone
_FINDING = 120.0  # seconds that a rank waits for a key of the rendezvous store


class Begin(msgspec.Struct, tag=True, frozen=True):
    """The first message to a rank.

    Attributes:
        host: the address at which other ranks reach this one; "" for the address of its line.
        kept_in_redis: whether a rank that joined over the network offloads blocks to Redis; it does not get the URL.
    """

    config: dict[str, Any]
    rank: int
    size: int
    host: str
    log: tuple[int, str]
    kept_in_redis: bool = False


class Go(msgspec.Struct, tag=True, frozen=True):
    """All ranks have reached this stage of starting, and may continue."""


class Adapters(msgspec.Struct, frozen=True):
    """The adapters of a step's rows: an `AdapterRows` with the numbers of its adapters."""

    rows: Ints
    scales: NDArray[np.float32]
    starts: Ints
    numbers: tuple[int, ...]
    sources: Ints


class Seen(msgspec.Struct, frozen=True):
    """The image rows of a step, and the number of elements of each row's vectors, which only the first rank has."""

    rows: Ints
    width: int


class LoadAdapter(msgspec.Struct, tag=True, frozen=True):
    """Load this rank's part of the adapter at a path, while steps run."""

    number: int
    path: str


class ForgetAdapters(msgspec.Struct, tag=True, frozen=True):
    """Drop adapters that no later step uses."""

    numbers: tuple[int, ...]


class Pages(msgspec.Struct, tag=True, frozen=True):
    """Changed page table entries, for later messages: indices into the flat `page_of`, and pages."""

    places: Ints
    pages: Ints


class Forward(msgspec.Struct, tag=True, frozen=True):
    """A step: the arrays of a `Batch`; `tables` is None if the block tables have not changed.

    `states` are the arrays of `StateRows`; None if no layer keeps a state.
    """

    tokens: Ints
    query_start: Ints
    context_lens: Ints
    sampled_rows: Ints
    num_decodes: int
    tables: Ints | None
    ahead: Ints | None
    adapters: Adapters | None
    seen: Seen | None = None
    turned: RotaryPositions | None = None
    states: tuple[Ints, ...] | None = None


class Next(msgspec.Struct, tag=True, frozen=True):
    """A step with the next token of each sequence of the step that was sent last; see `Batch.begun`."""

    token_ids: Ints
    begun: tuple[tuple[int, int, int], ...]
    states: tuple[Ints, ...] | None = None


class Collect(msgspec.Struct, tag=True, frozen=True):
    """On the ranks of the first stage, collect the oldest step in flight; see `ModelRunner.collect`."""


class Score(msgspec.Struct, tag=True, frozen=True):
    """Compute logits of rows of the last step."""

    rows: Ints


class Sleep(msgspec.Struct, tag=True, frozen=True):
    """Free memory; see `Sleeper`."""

    level: int


class WakeUp(msgspec.Struct, tag=True, frozen=True):
    """Restore freed memory; see `Sleeper`."""

    tags: frozenset[str]


class KeepBlocks(msgspec.Struct, tag=True, frozen=True):
    """Offload this rank's parts of blocks; see `BlockParts.offer`."""

    blocks: Ints
    digests: tuple[bytes, ...]


class BringBlocks(msgspec.Struct, tag=True, frozen=True):
    """Copy the next parts of a reading to these blocks of the cache; see `BlockParts.bring`."""

    reading: int
    blocks: Ints


class ForgetBlocks(msgspec.Struct, tag=True, frozen=True):
    """Delete all offloaded parts of blocks."""


class CloseBlocks(msgspec.Struct, tag=True, frozen=True):
    """Write the remaining parts of blocks; the answer is `BlocksClosed`."""


ToRank: TypeAlias = (
    Begin | Go | Pages | Forward | Next | Collect | Score | Sleep | WakeUp | LoadAdapter | ForgetAdapters
    | KeepBlocks | BringBlocks | ForgetBlocks | CloseBlocks
)  # fmt: skip


class Ready(msgspec.Struct, tag=True, frozen=True):
    """A rank has reached a stage: 0 joined, 1 weights loaded, with the hash of its files if they are its own."""

    stage: int
    files: str | None = None


class Failed(msgspec.Struct, tag=True, frozen=True):
    """A rank cannot start; `setting` is the setting that caused the failure, if any."""

    message: str
    setting: str | None = None


class AdapterLoaded(msgspec.Struct, tag=True, frozen=True):
    """A rank's part of an adapter was loaded from files with this digest; or `failure` is the reason why not."""

    number: int
    digest: bytes
    failure: str | None = None


FromRank: TypeAlias = Ready | Failed | AdapterLoaded


class Alive(msgspec.Struct, tag=True, frozen=True):
    """Heartbeat, which both ends send in each tick."""


class Write(msgspec.Struct, tag=True, frozen=True):
    """Set a key of the rendezvous store."""

    key: str
    value: bytes


class Read(msgspec.Struct, tag=True, frozen=True):
    """Get a key of the rendezvous store; wait until it is set, unless `wait` is False."""

    number: int
    key: str
    wait: bool = True


class Add(msgspec.Struct, tag=True, frozen=True):
    """Add to a number in the rendezvous store; the answer is the sum, in decimal."""

    number: int
    key: str
    amount: int


class Found(msgspec.Struct, tag=True, frozen=True):
    """The answer to a `Read` or an `Add`; `value` is None if the key is not set."""

    number: int
    value: bytes | None


class ReadBlocks(msgspec.Struct, tag=True, frozen=True):
    """Begin to read parts of blocks, while steps run; see `BlockParts.read`."""

    reading: int
    digests: tuple[bytes, ...]


class EndReading(msgspec.Struct, tag=True, frozen=True):
    """End a reading of which `brought` blocks in total are copied; see `BlockParts.end`."""

    reading: int
    brought: int


class BlockRead(msgspec.Struct, tag=True, frozen=True):
    """The result for the next block of a reading; see `BlockParts`."""

    reading: int
    found: bool
    failed: bool


class BlocksClosed(msgspec.Struct, tag=True, frozen=True):
    """The remaining parts of blocks were written, except parts that could not be written."""


FromSide: TypeAlias = Alive | Write | Read | Add | BlockRead | BlocksClosed
ToSide: TypeAlias = Alive | Found | ReadBlocks | EndReading
_Message = TypeVar("_Message")


class Line:
    """One end of a connection between the first rank and another one.

    Args:
        keys: keys that sign sent frames and received frames; None within one machine. Signatures include the frame's
            number, so a dropped, repeated or changed frame is detected; frames are not encrypted.
    """

    def __init__(self, end: socket.socket, keys: tuple[bytes, bytes] | None = None) -> None:
        self.socket = end
        self._keys, self._sent, self._received = keys, itertools.count(), itertools.count()
        self._sending = threading.Lock()  # steps and adapters have threads of their own

    def send(self, message: ToRank | FromRank | FromSide | ToSide) -> None:
        """Send a message; raises ConnectionError if the other end has gone, ValueError if the message is too long."""
        self.send_encoded(encoded(message))

    def send_encoded(self, data: bytes) -> None:
        """Send a message from `encoded`, which may be sent over several connections."""
        with self._sending:
            tag = b"" if self._keys is None else _tag(self._keys[0], next(self._sent), data)
            try:
                self.socket.sendall(len(data).to_bytes(4, "little") + data + tag)
            except OSError as error:  # see `read_exactly`
                raise ConnectionError(*error.args) from None

    def receive(self, kind: type[_Message] | Any) -> _Message:
        """Wait for a message; raises EOFError if the other end has gone, and ValueError if the received bytes are no
        such message or have a wrong signature."""
        size = int.from_bytes(read_exactly(self.socket, 4), "little")
        if size > MOST_BYTES:
            raise ValueError(f"a message of {size} bytes is announced; at most {MOST_BYTES} are read")
        data = read_exactly(self.socket, size)
        if self._keys is not None:
            tag = read_exactly(self.socket, _TAG_BYTES)
            if not hmac.compare_digest(tag, _tag(self._keys[1], next(self._received), data)):
                raise ValueError("a frame has a wrong signature")
        return decoder(kind).decode(data)

    def end(self) -> None:
        """Shut the connection down, and end waits for it in this process; arrived messages can still be received."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


def encoded(message: ToRank | FromRank | FromSide | ToSide) -> bytes:
    """Serialise a message; raises ValueError if it is too long."""
    data = msgspec.msgpack.encode(message, enc_hook=_array_bytes)
    if len(data) > MOST_BYTES:
        raise ValueError(f"a message of {len(data)} bytes; at most {MOST_BYTES} are sent")
    return data


@functools.cache
def decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """Return the decoder for messages of these types; cached, because making it takes longer than decoding."""
    return msgspec.msgpack.Decoder(kind, dec_hook=_array)


def _array_bytes(array: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(array, np.float32 if array.dtype == np.float32 else np.int64).tobytes()


def _array(kind: Any, data: bytes) -> NDArray[Any]:
    """Return a field of type `NDArray[...]`, as a flat array."""
    (dtype,) = get_args(get_args(kind)[1])
    return np.frombuffer(data, dtype).copy()


def read_exactly(end: socket.socket, count: int, until: float | None = None) -> bytearray:
    """Read `count` bytes; memory is allocated as they arrive.

    Raises EOFError if the other end has gone or the connection has failed, and TimeoutError if not all bytes have
    arrived at `until`, by `time.monotonic`.
    """
    data, done = bytearray(), 0
    while done < count:
        if done == len(data):
            data.extend(bytes(min(_PIECE, count - done)))
        if until is not None:
            end.settimeout(time_left(until))
        with memoryview(data) as view:
            try:
                got = end.recv_into(view[done:])
            except OSError as error:  # a network may break by ETIMEDOUT or EHOSTUNREACH, too
                if until is not None and not isinstance(error, ConnectionError):
                    raise
                got = 0
        if not got:
            raise EOFError("the other end of the line has gone")
        done += got
    return data


def time_left(until: float) -> float:
    """Return the seconds until the deadline, more than 0; raises TimeoutError when the deadline has passed."""
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("it took too long")
    return left


def _tag(key: bytes, number: int, data: bytes | bytearray) -> bytes:
    digest = hashlib.blake2b(number.to_bytes(8, "little"), key=key, digest_size=_TAG_BYTES)
    digest.update(data)
    return digest.digest()


class RendezvousStore:
    """The rendezvous store, by which ranks find each other's addresses: values by key, in the first rank."""

    def __init__(self) -> None:
        self._found: dict[str, bytes] = {}
        self._waiting: dict[str, list[Callable[[bytes], object]]] = collections.defaultdict(list)
        self._changed = threading.Condition()
        self._closed = False

    def set(self, key: str, value: bytes) -> None:
        with self._changed:
            self._found[key] = value
            callbacks = self._waiting.pop(key, ())
            self._changed.notify_all()
        for each in callbacks:
            each(value)

    def get(self, key: str) -> bytes:
        """Return a value once its key is set; raises EngineDeadError if the ranks have ended, or after a timeout."""
        with self._changed:
            there = self._changed.wait_for(lambda: self._closed or key in self._found, _FINDING)
            if self._closed or not there:
                raise EngineDeadError("the ranks did not find each other")
            return self._found[key]

    def has(self, key: str) -> bool:
        with self._changed:
            return key in self._found

    def add(self, key: str, amount: int) -> int:
        """Add to a number, which is 0 at first; return the sum."""
        with self._changed:
            total = int(self._found.get(key, b"0")) + amount
            self.set(key, str(total).encode())
            return total

    def answer(self, asked: Write | Read | Add, side: Line) -> None:
        """Handle another rank's request."""
        if isinstance(asked, Write):
            self.set(asked.key, asked.value)
            return
        number = asked.number
        if isinstance(asked, Add):
            found: bytes | None = str(self.add(asked.key, asked.amount)).encode()
        else:
            with self._changed:
                found = self._found.get(asked.key)
                if found is None and asked.wait:
                    self._waiting[asked.key].append(lambda value: _reply(side, Found(number, value)))
                    return
        _reply(side, Found(number, found))

    def close(self) -> None:
        """End all waits in this process."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _reply(side: Line, found: Found) -> None:
    with contextlib.suppress(OSError):  # the asking rank has gone
        side.send(found)


class Side:
    """A rank's end of its side line: heartbeats, the `RendezvousStore`, and reading of offloaded blocks.

    When the first rank has gone, it ends this process.

    Args:
        steps: the line over which the rank gets steps; it is closed together with the side line.
        silence: ticks without a heartbeat after which the first rank counts as gone; None for no limit.
    """

    def __init__(self, line: Line, steps: Line, silence: int | None) -> None:
        self._line, self._steps, self._silence = line, steps, silence
        self._quiet = 0
        self._numbers = itertools.count()
        self._asked: dict[int, queue.SimpleQueue[bytes | None]] = {}
        self._reads: Callable[[ReadBlocks | EndReading], object] | None = None
        self._early: list[ReadBlocks | EndReading] = []  # messages that arrive before `read_by`
        self._reading = threading.Lock()
        for work in (self._listen, self._beat):
            threading.Thread(target=work, name="candle-vllm-rank-side", daemon=True).start()

    def _listen(self) -> None:
        try:
            while (said := self._heard()) is not None:
                self._quiet = 0
                if isinstance(said, Found) and said.number in self._asked:
                    self._asked.pop(said.number).put(said.value)
                elif isinstance(said, ReadBlocks | EndReading):
                    with self._reading:
                        if self._reads is None:
                            self._early.append(said)
                        else:
                            self._reads(said)
        except Exception:  # `_reads` failed: if this rank stayed alive, the first rank would wait for its blocks
            logger.exception("a rank ends, since it can no longer be asked for blocks")
        self._end()

    def _heard(self) -> ToSide | None:
        """Return the first rank's next message; None when it has gone."""
        try:
            return self._line.receive(ToSide)
        except (EOFError, OSError, ValueError):
            return None

    def _beat(self) -> None:
        with contextlib.suppress(OSError):
            while self._silence is None or self._quiet < self._silence:
                self._line.send(Alive())
                time.sleep(TICK)
                self._quiet += 1  # in ticks of this process, which may have been stopped itself
        self._end()

    def _end(self) -> None:
        self._line.end()
        self._steps.end()
        time.sleep(_GRACE)
        os._exit(0)  # a thread that waits within a step would wait for ever

    def _ask(self, make: Callable[[int], Read | Add]) -> bytes | None:
        number, answer = next(self._numbers), queue.SimpleQueue[bytes | None]()
        self._asked[number] = answer
        self._line.send(make(number))
        try:
            return answer.get(timeout=_FINDING)
        except queue.Empty:
            raise EngineDeadError("the ranks did not find each other") from None

    def tell(self, message: BlockRead | BlocksClosed) -> None:
        """Send a message to the first rank, unless it has gone."""
        with contextlib.suppress(OSError):
            self._line.send(message)

    def read_by(self, reads: Callable[[ReadBlocks | EndReading], object]) -> None:
        """Set the function that begins and ends readings of blocks; call it for earlier messages. It must not block."""
        with self._reading:
            for each in self._early:
                reads(each)
            self._reads, self._early = reads, []

    def set(self, key: str, value: bytes) -> None:
        self._line.send(Write(key, value))

    def get(self, key: str) -> bytes:
        found = self._ask(lambda number: Read(number, key))
        assert found is not None
        return found

    def has(self, key: str) -> bool:
        return self._ask(lambda number: Read(number, key, wait=False)) is not None

    def add(self, key: str, amount: int) -> int:
        return int(self._ask(lambda number: Add(number, key, amount)) or 0)


_ONE_ON = np.array([[0], [1], [1], [0]])  # increments of the planes of `Batch.tokens`


class Batches:
    """Makes a rank's batches from messages; `adapters` are the loaded adapters by number. Only the first rank has the
    runs of a batch."""

    def __init__(self) -> None:
        self.adapters: dict[int, Any] = {}
        self._tables, self._version = np.zeros((0, 0), np.int64), object()
        self._width = 0  # used columns of the tables
        self._last: Batch | None = None

    def batch(self, message: Forward | Next) -> Batch:
        """Return the batch of a step; raises ValueError for a `Next` that does not fit the previous step."""
        self._last = batch = self._next(message) if isinstance(message, Next) else self._forward(message)
        return batch

    def run(self, runner: ModelRunner, message: ToRank) -> bool:
        """Run a rank's part of a message that belongs to a step; return False for any other message."""
        if isinstance(message, Forward | Next):
            runner.forward(self.batch(message), ())
        elif isinstance(message, Pages):
            _find_pages(runner, message)
        elif isinstance(message, Collect):
            runner.collect()
        elif isinstance(message, Score):
            runner.score(message.rows)
        else:
            return False
        return True

    def _next(self, message: Next) -> Batch:
        last, ids = self._last, message.token_ids
        if last is None or not len(ids) == len(last.context_lens) == last.tokens.shape[1]:
            raise ValueError(f"`Next` for {len(ids)} sequences does not follow a decoding step of {len(ids)} sequences")
        tokens = last.tokens + _ONE_ON
        tokens[0], tokens[3] = ids, -1
        for row, column, block in message.begun:
            if not (0 <= row < len(ids) and 0 < column <= self._width):
                raise ValueError(f"block {column} of sequence {row} begins; the tables are [{len(ids)}, {self._width}]")
            if column == self._tables.shape[1]:
                wider = np.zeros((len(ids), 2 * column), np.int64)
                wider[:, :column] = self._tables
                self._tables = wider
            self._tables[row, column] = block
            tokens[2, row] = block * (tokens[1, row] // column)  # the block size is position // column
            self._width = max(self._width, column + 1)
            self._version = object()
        return msgspec.structs.replace(
            last,
            tokens=tokens,
            context_lens=last.context_lens + 1,
            block_tables=self._tables[:, : self._width],
            tables_version=self._version,
            embedded=None,  # such a step only decodes
            ahead=None,
            states=_states(message),
        )

    def _forward(self, message: Forward) -> Batch:
        contexts, seen, turned = message.context_lens, message.seen, message.turned
        if message.tables is not None:
            self._tables, self._version = message.tables.reshape(len(contexts), -1), object()
            self._width = self._tables.shape[1]
        return Batch(
            tokens=message.tokens.reshape(4, -1),
            query_start=message.query_start,
            context_lens=contexts,
            block_tables=self._tables[:, : self._width],
            tables_version=self._version,
            num_decodes=message.num_decodes,
            runs=(),
            drawing=(),
            drafted=False,
            sampled_rows=message.sampled_rows,
            ahead=message.ahead,
            adapters=None if message.adapters is None else self._rows(message.adapters),
            embedded=None
            if seen is None
            else EmbeddedRows(seen.rows, np.zeros((len(seen.rows), seen.width), np.float32)),
            turned=turned and msgspec.structs.replace(turned, places=turned.places.reshape(-1, 4)),
            states=_states(message),
        )

    def _rows(self, message: Adapters) -> AdapterRows:
        adapters = [self.adapters[number] for number in message.numbers]
        return AdapterRows(message.rows, message.scales, message.starts, adapters, message.sources)


def _find_pages(runner: Any, message: Pages) -> None:
    """Set page table entries; raises ValueError if the rank has no such blocks."""
    places, page_of = message.places, runner.page_of.reshape(-1)
    if len(places) and not 0 <= places.min() <= places.max() < len(page_of):
        raise ValueError(f"page table indices are outside the {len(page_of)} blocks of all pools")
    page_of[places] = message.pages


def _states(message: Forward | Next) -> StateRows | None:
    return None if message.states is None else StateRows(*message.states)
