# SPDX-License-Identifier: MIT
"""Ranks: processes that each run a part of the model, told every step by the first of them.

The first rank is the engine's own process: it schedules, tells the others what to run in one message each, runs its own
part, and draws. What comes over a line are frames of one of a few types, behind their length. A line that ends, ends
the rank at its other end; a rank that ends, ends all others and the engine.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import logging
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.engine.adapters import Adapter
from candle_vllm.core.engine.batch import AdapterRows, Batch, Ints, StepMemory
from candle_vllm.core.engine.model_runner import Launched, ModelRunner, StepwiseRunner
from candle_vllm.core.errors import AdapterError, CandleVllmError, ConfigError, EngineDeadError, ModelLoadError
from candle_vllm.core.kernels.collectives import Collective, ProcessGroup
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.sampling.state import SamplingState
from candle_vllm.core.threads import default_threads

logger = logging.getLogger(__name__)

MOST_BYTES = 1 << 28  # of a frame
PATIENCE = 60.0  # seconds that a rank waits for the others in the midst of a step
_ENDING = 5.0  # seconds that a rank may take to end
_RANK = (sys.executable, "-P", "-m", "candle_vllm.core.engine.rank")


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


class Score(msgspec.Struct, tag=True, frozen=True):
    """Logits of rows of the last step."""

    rows: bytes


class Sleep(msgspec.Struct, tag=True, frozen=True):
    """Give memory back; see `Sleeper`."""

    level: int


class WakeUp(msgspec.Struct, tag=True, frozen=True):
    """Fill it again."""

    tags: frozenset[str]


ToRank: TypeAlias = Begin | Go | Forward | Score | Sleep | WakeUp | LoadAdapter | ForgetAdapters


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


class Ranks:
    """The other ranks, as the first one sees them. They load their parts while this process loads its own.

    Args:
        config: of the engine.

    Attributes:
        config: of this rank.
        fail: ends the engine that has them; called when one has died.

    Raises:
        ConfigError: this system cannot have several ranks.
    """

    def __init__(self, config: EngineConfig) -> None:
        if not hasattr(socket, "AF_UNIX") or sys.platform == "win32":
            raise ConfigError("several ranks are not implemented on Windows: leave tensor_parallel_size out")
        self.size = config.tensor_parallel_size
        self.config = rank_config(config, 0)
        self._collective: ProcessGroup | None = None
        self._failure: str | None = None
        self._lock = threading.Lock()
        self._closing = False
        self.fail: Callable[[EngineDeadError], object] = lambda _: None
        self._callbacks: list[Callable[[], None]] = []
        self._folder = Path(tempfile.mkdtemp(prefix="candle-vllm-ranks-"))
        self._lines: list[Line] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(1, self.size):
                self._start(config, rank)
        except BaseException:
            self.close()
            raise

    def _start(self, config: EngineConfig, rank: int) -> None:
        near, far = socket.socketpair()
        with far:
            given = far.fileno()
            process = subprocess.Popen(
                (*_RANK, str(given)), stdin=subprocess.DEVNULL, pass_fds=(given,), start_new_session=True
            )
        self._processes.append(process)
        self._lines.append(Line(near))
        fields = dataclasses.fields(config)
        values = {each.name: getattr(rank_config(config, rank), each.name) for each in fields}
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        level = logging.getLogger("candle_vllm").getEffectiveLevel()
        self._lines[-1].send(Begin(plain, rank, self.size, str(self._folder), level))

    @property
    def collective(self) -> Collective:
        """What the ranks do together; made when they are all there."""
        if self._collective is None:
            self._wait(0)
            self._collective = meet(0, self.size, self.config.device, self._folder)
        return self._collective

    def all_loaded(self) -> None:
        """Waits until every rank has its weights.

        Raises:
            CandleVllmError: one cannot have them; what it said.
        """
        self._wait(1)
        threading.Thread(target=self._watch, name="candle-vllm-ranks", daemon=True).start()

    def _wait(self, stage: int) -> None:
        """Until all have come so far; then they go on together."""
        for number, line in enumerate(self._lines, 1):
            try:
                said: FromRank = line.receive(FromRank)
            except EOFError:
                raise ModelLoadError(
                    f"rank {number} has ended while it loaded its part of the model ({self._fate(number)}); its last "
                    "words are in the log. Where memory is short, the system kills it"
                ) from None
            if isinstance(said, Failed):
                raise ConfigError(said.message, said.setting)
            assert said == Ready(stage)
        self.tell(Go())

    def tell(self, message: ToRank) -> None:
        """Tells all others.

        Raises:
            EngineDeadError: one of them has gone.
        """
        try:
            for line in self._lines:
                line.send(message)
        except OSError:
            raise self.dead() from None

    def adapters_loaded(self, number: int) -> list[AdapterLoaded]:
        """Waits until the others have loaded an adapter or failed to; one is loaded at a time, by one thread.

        Raises:
            EngineDeadError: one of them has gone.
        """
        found: list[AdapterLoaded] = []
        for line in self._lines:
            try:
                said: FromRank = line.receive(FromRank)
            except (EOFError, OSError):
                raise self.dead() from None
            assert isinstance(said, AdapterLoaded)
            assert said.number == number
            found.append(said)
        return found

    def dead(self) -> EngineDeadError:
        """All are ended, for one has gone; who it was, and how."""
        with self._lock:
            if self._failure is None:
                gone = self._gone()
                self._failure = gone or f"a rank did not do its part of a step within {PATIENCE:.0f} s"
                for process in self._processes:
                    process.kill()
        return EngineDeadError(f"the engine has stopped: {self._failure}")

    def _gone(self) -> str | None:
        """Which rank has ended; waits for a moment, for others end because it did."""
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            for number, process in enumerate(self._processes, 1):
                if process.poll() is not None:
                    return f"rank {number} has ended ({self._fate(number)})"
            time.sleep(0.01)
        return None

    def _fate(self, number: int) -> str:
        process = self._processes[number - 1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        status = process.returncode
        if status is None:
            return "it closed its end of the line"
        if status >= 0:
            return f"exit status {status}"
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
        return f"killed by signal {-status}"

    def add_death_callback(self, callback: Callable[[], None]) -> None:
        """Calls it once, when one has died; at once where one has."""
        with self._lock:
            if self._failure is None:
                self._callbacks.append(callback)
                return
        callback()

    def _watch(self) -> None:
        """Waits until one has gone."""
        while not self._closing:
            if any(process.poll() is not None for process in self._processes):
                if not self._closing:
                    self.fail(self.dead())
                    with self._lock:
                        callbacks, self._callbacks = self._callbacks, []
                    for callback in callbacks:
                        callback()
                return
            time.sleep(0.1)

    def close(self) -> None:
        """Ends the other ranks, and waits until they have."""
        self._closing = True
        for line in self._lines:
            line.socket.close()
        if self._collective is not None:
            self._collective.close()
        until = time.monotonic() + _ENDING
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            process.kill()
            process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def meet(rank: int, size: int, device: str, folder: Path) -> ProcessGroup:
    """The ranks, which find each other by a file; all of them call it."""
    return ProcessGroup(rank, size, "cpu" if device == "auto" else device, folder / "store", patience=PATIENCE)


def rank_config(config: EngineConfig, rank: int) -> EngineConfig:
    """What a rank is configured by: a device of its own, on the CPU a share of the threads."""
    devices = config.device.split(",")
    if devices == ["cpu"]:
        threads = config.threads or max(1, default_threads() // config.tensor_parallel_size)
        return dataclasses.replace(config, threads=threads)
    if len(devices) == 1:
        devices = [f"cuda:{number}" for number in range(config.tensor_parallel_size)]
    own = devices[rank]
    return dataclasses.replace(config, device=own)


class RankedRunner:
    """The first rank's runner, which has the others run their parts of each step; see `ModelRunner`.

    Whatever fails in a step is the end of the engine: nobody knows where the other ranks are.

    Attributes:
        own: what runs the first rank's part.
    """

    overlaps = False

    def __init__(self, runner: ModelRunner, ranks: Ranks) -> None:
        self.own = self._runner = runner
        self._ranks = ranks
        self._numbers: dict[int, int] = {}  # of adapters in memory, by their serial numbers
        self._adapters = itertools.count(1)
        self._forgotten: collections.deque[int] = collections.deque()
        self.fatal = (*runner.fatal, EngineDeadError)
        self._tables_version: object = None

    @property
    def step_memory(self) -> StepMemory | None:
        """See `ModelRunner`."""
        return self._runner.step_memory

    def forward(self, batch: Batch, states: Sequence[SamplingState]) -> None:
        """See `ModelRunner`."""
        self._together(self._message(batch), lambda: self._runner.forward(batch, states))

    def draw(self, states: Sequence[SamplingState]) -> Launched:
        """See `ModelRunner`."""
        return self._runner.draw(states)

    def score(self, rows: Ints) -> Value:
        """See `ModelRunner`."""
        return self._together(Score(_bytes(rows)), lambda: self._runner.score(rows))

    def hidden_sum(self, rows: Ints) -> NDArray[np.float64]:
        """See `ModelRunner`; each rank has the hidden states whole."""
        return self._runner.hidden_sum(rows)

    def hidden_rows(self, rows: Ints) -> NDArray[np.float32]:
        """See `StepwiseRunner`."""
        assert isinstance(self._runner, StepwiseRunner)
        return self._runner.hidden_rows(rows)

    def drop_cache(self) -> None:
        """See `ModelRunner`; the others are told by `sleep`."""
        self._runner.drop_cache()

    def restore_cache(self) -> None:
        """See `ModelRunner`."""
        self._runner.restore_cache()

    def wake_up(self) -> None:
        """See `ModelRunner`."""
        self._runner.wake_up()

    def load_adapter(self, path: Path) -> int:
        """Has the others begin to load an adapter; gives its number. In one thread, beside the steps."""
        number = next(self._adapters)
        self._ranks.tell(LoadAdapter(number, str(path)))
        return number

    def adapter_is_loaded(self, number: int, packed: Adapter | None) -> None:
        """Waits until the others have it; None where the first rank could not load it, and nobody is to have it.

        Raises:
            AdapterError: another rank could not load it, or found others files than this one.
        """
        found = self._ranks.adapters_loaded(number)
        if packed is not None:
            self._numbers[packed.serial] = number
            weakref.finalize(packed, self._forget, packed.serial)
            failed = next((each.failure for each in found if each.failure is not None), None)
            if failed is None and any(each.digest != packed.digest for each in found):
                failed = "the files changed while the ranks loaded them"
            if failed is not None:
                raise AdapterError(failed)
        else:
            self._forgotten.append(number)

    def _forget(self, serial: int) -> None:
        self._forgotten.append(self._numbers.pop(serial))

    def _told(self, adapters: AdapterRows | None) -> Adapters | None:
        if self._forgotten:
            gone = [self._forgotten.popleft() for _ in range(len(self._forgotten))]
            self._ranks.tell(ForgetAdapters(tuple(gone)))
        if adapters is None:
            return None
        return Adapters(
            _bytes(adapters.rows),
            np.ascontiguousarray(adapters.scales, np.float32).tobytes(),
            _bytes(adapters.starts),
            _bytes(adapters.sources),
            tuple(self._numbers[each.serial] for each in adapters.adapters),
        )

    def sleep(self, asked: int | frozenset[str]) -> None:
        """Has the others sleep at a level, or wake by tags."""
        self._ranks.tell(Sleep(asked) if isinstance(asked, int) else WakeUp(asked))

    def close(self) -> None:
        """See `ModelRunner`."""
        self._ranks.close()
        self._runner.close()

    def _together(self, message: ToRank, own: Callable[[], _Message]) -> _Message:
        self._ranks.tell(message)
        try:
            return own()
        except Exception as error:
            dead = self._ranks.dead()
            logger.debug("a step over ranks failed", exc_info=error)
            raise EngineDeadError(f"{dead}; here: {type(error).__name__}: {error}") from error

    def _message(self, batch: Batch) -> Forward:
        if batch.drafted and not isinstance(self._runner, StepwiseRunner):
            from candle_vllm.core.engine.device_runner import by_rows

            batch = by_rows(batch)  # as the first rank runs it
        known = batch.tables_version is self._tables_version
        self._tables_version = batch.tables_version
        return Forward(
            _bytes(batch.tokens),
            _bytes(batch.query_start),
            _bytes(batch.context_lens),
            _bytes(batch.drawn_rows),
            batch.num_decodes,
            None if known else _bytes(batch.block_tables),
            None if batch.ahead is None else _bytes(batch.ahead),
            self._told(batch.adapters),
        )


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
        contexts = _ints(told.context_lens)
        if told.tables is not None:
            self._tables, self._version = _ints(told.tables).reshape(len(contexts), -1), object()
        return Batch(
            tokens=_ints(told.tokens).reshape(4, -1),
            query_start=_ints(told.query_start),
            context_lens=contexts,
            block_tables=self._tables,
            tables_version=self._version,
            num_decodes=told.num_decodes,
            runs=(),
            drawing=(),
            drafted=False,
            drawn_rows=_ints(told.drawn_rows),
            ahead=None if told.ahead is None else _ints(told.ahead),
            adapters=None if told.adapters is None else self._rows(told.adapters),
        )

    def _rows(self, told: Adapters) -> AdapterRows:
        scales = np.frombuffer(told.scales, np.float32).copy()
        adapters = [self.adapters[number] for number in told.numbers]
        return AdapterRows(_ints(told.rows), scales, _ints(told.starts), adapters, _ints(told.sources))


def rows_told(message: Score) -> Ints:
    """The rows."""
    return _ints(message.rows)


def _bytes(array: Ints) -> bytes:
    return np.ascontiguousarray(array, np.int64).tobytes()


def _ints(data: bytes) -> Ints:
    return np.frombuffer(data, np.int64).copy()


def said_of(error: CandleVllmError) -> Failed:
    """What a rank says of why it cannot go on."""
    return Failed(str(error), getattr(error, "setting", None))
