# SPDX-License-Identifier: MIT
"""Ranks: processes that each run a part of the model, told every step by the first of them.

The first rank is the engine's own process: it schedules, tells the others what to run in one message each, runs its own
part, and draws. A line that ends, ends the rank at its other end; a rank that ends, ends all others and the engine.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import logging
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.engine.adapters import Adapter
from candle_vllm.core.engine.batch import AdapterRows, Batch, Ints, StepMemory
from candle_vllm.core.engine.model_runner import Launched, ModelRunner, StepwiseRunner
from candle_vllm.core.engine.rank_line import (
    AdapterLoaded,
    Adapters,
    Begin,
    Failed,
    ForgetAdapters,
    Forward,
    FromRank,
    Go,
    Land,
    Line,
    LoadAdapter,
    Ready,
    Score,
    Sleep,
    ToRank,
    WakeUp,
    as_bytes,
)
from candle_vllm.core.errors import AdapterError, CandleVllmError, ConfigError, EngineDeadError, ModelLoadError
from candle_vllm.core.kernels.collectives import Collective, ProcessGroup
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.sampling.sampler import Drawn
from candle_vllm.core.sampling.state import SamplingState
from candle_vllm.core.threads import default_threads, ending

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

PATIENCE = 60.0  # seconds that a rank waits for the others in the midst of a step
_LAST_WORDS = 0.5  # seconds that what a rank says before it ends may take to get here
_ENDING = 5.0  # seconds that a rank may take to end
_RANK = (sys.executable, "-P", "-m", "candle_vllm.core.engine.rank")


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
        self.size = config.ranks
        if config.device not in ("auto", "cpu", "cuda") and "," not in config.device:
            raise ConfigError(
                f"device names one GPU, {config.device}, and {self.size} ranks are asked for (tensor_parallel_size, "
                "pipeline_parallel_size): name as many, or set device='cuda' for the first ones",
                "device",
            )
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
        level = logging.getLogger("candle_vllm").getEffectiveLevel()
        self._lines[-1].send(Begin(rank_config(config, rank).plain(), rank, self.size, str(self._folder), level))

    @property
    def collective(self) -> Collective:
        """What the ranks do together; made when they are all there."""
        if self._collective is None:
            self._wait(0)
            stages = self.config.pipeline_parallel_size
            self._collective = meet(0, self.size, self.config.device, self._folder, stages)
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

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Around making an engine: where that fails, the others are ended, and what one of them said is raised."""
        try:
            yield
        except BaseException as error:
            blamed = None if isinstance(error, CandleVllmError) else self._blamed()
            self.close()
            if blamed is None:
                raise
            raise blamed from error

    def _blamed(self) -> CandleVllmError | None:
        for line in self._lines:
            line.socket.settimeout(_LAST_WORDS)
            with contextlib.suppress(EOFError, OSError):
                said: FromRank = line.receive(FromRank)
                if isinstance(said, Failed):
                    return ConfigError(said.message, said.setting)
        gone = self._gone()
        return None if gone is None else ModelLoadError(f"the model cannot be divided: {gone}")

    def dead(self) -> EngineDeadError:
        """All are ended, for one has gone; who it was, and how."""
        with self._lock:
            if self._failure is None:
                gone = self._gone()
                self._failure = gone or "a step over several ranks failed"
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
        return ending(process.returncode)

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


def meet(rank: int, size: int, device: str, folder: Path, stages: int = 1) -> ProcessGroup:
    """The ranks, which find each other by files; all of them call it. Those of a stage stand beside each other."""
    stage, number = divmod(rank, size // stages)
    line = None
    if stages > 1:
        line = ProcessGroup(stage, stages, device, folder / f"line{number}", patience=PATIENCE)
    return ProcessGroup(number, size // stages, device, folder / f"store{stage}", patience=PATIENCE, stages=line)


def rank_config(config: EngineConfig, rank: int) -> EngineConfig:
    """What a rank is configured by: a device of its own, on the CPU a share of the threads."""
    devices = config.device.split(",")
    if devices == ["cpu"]:
        threads = config.threads or max(1, default_threads() // config.ranks)
        return dataclasses.replace(config, threads=threads)
    if len(devices) == 1:
        devices = [f"cuda:{number}" for number in range(config.ranks)]
    return dataclasses.replace(config, device=devices[rank])


class _InFlight(NamedTuple):
    """See `Launched`."""

    land: Callable[[Sequence[SamplingState]], Sequence[Drawn]]
    states: Sequence[SamplingState]

    def tokens(self) -> Sequence[Drawn]:
        """See `Launched`."""
        return self.land(self.states)


class RankedRunner:
    """The first rank's runner, which has the others run their parts of each step; see `ModelRunner`.

    Whatever fails in a step is the end of the engine: nobody knows where the other ranks are.

    Attributes:
        own: what runs the first rank's part.
    """

    overlaps = False

    def __init__(self, runner: ModelRunner, ranks: Ranks) -> None:
        self.own = self._runner = runner
        self.in_flight = runner.in_flight
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
        """See `ModelRunner`. Where several steps are in flight, this one's tokens are drawn when they are taken."""
        return _InFlight(self._land, states) if self.in_flight > 1 else self._runner.draw(states)

    def land(self) -> None:
        """See `ModelRunner`; it is part of taking the tokens."""

    def _land(self, states: Sequence[SamplingState]) -> Sequence[Drawn]:
        """What the step that was begun first draws, once it is over."""
        self._together(Land() if self._ranks.config.tensor_parallel_size > 1 else None, self._runner.land)
        return self._runner.draw(states).tokens()

    def score(self, rows: Ints) -> Value:
        """See `ModelRunner`."""
        return self._together(Score(as_bytes(rows)), lambda: self._runner.score(rows))

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
            as_bytes(adapters.rows),
            np.ascontiguousarray(adapters.scales, np.float32).tobytes(),
            as_bytes(adapters.starts),
            as_bytes(adapters.sources),
            tuple(self._numbers[each.serial] for each in adapters.adapters),
        )

    def sleep(self, asked: int | frozenset[str]) -> None:
        """Has the others sleep at a level, or wake by tags."""
        self._ranks.tell(Sleep(asked) if isinstance(asked, int) else WakeUp(asked))

    def close(self) -> None:
        """See `ModelRunner`."""
        self._ranks.close()
        self._runner.close()

    def _together(self, message: ToRank | None, own: Callable[[], _Result]) -> _Result:
        if message is not None:
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
            as_bytes(batch.tokens),
            as_bytes(batch.query_start),
            as_bytes(batch.context_lens),
            as_bytes(batch.drawn_rows),
            batch.num_decodes,
            None if known else as_bytes(batch.block_tables),
            None if batch.ahead is None else as_bytes(batch.ahead),
            self._told(batch.adapters),
        )
