# SPDX-License-Identifier: MIT
"""Ranks: processes that each run a part of the model; the first rank sends every step to the others.

The first rank is the engine's own process: it schedules, sends each step to the others in one message, runs its own
part, and samples. If a connection ends, the rank at its other end ends; if a rank ends, all ranks and the engine end.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import logging
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.engine.ranks import rank_line
from candle_vllm.core.engine.ranks.message_ring import MessageRing, made_ring
from candle_vllm.core.engine.ranks.nodes import RANK, RankListener, rank_device
from candle_vllm.core.engine.runners.model_runner import Launched, ModelRunner, StepwiseRunner
from candle_vllm.core.engine.step.batch import AdapterRows, Batch, Ints
from candle_vllm.core.errors import AdapterError, CandleVllmError, ConfigError, EngineDeadError, ModelLoadError
from candle_vllm.core.kernels.collectives import Collective, Notes, ProcessGroup, shared_memory
from candle_vllm.core.kernels.lora import PackedAdapter
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.loading.source import files_mark
from candle_vllm.core.sampling.sampler import SampledTokens
from candle_vllm.core.sampling.state import SamplingState
from candle_vllm.core.shown import log_style
from candle_vllm.core.threads import ending, process_state

if TYPE_CHECKING:
    from candle_vllm.core.engine.ranks.ray_ranks import RayRanks

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

PATIENCE = 60.0  # seconds that a rank waits for the others within a step
_FATE_SECONDS = 3.0  # seconds until it counts as unknown which rank has ended
_LAST_WORDS = 0.5  # seconds that the last messages of an ended rank may take to arrive
_ENDING = 5.0  # seconds that all ranks together may take to end
_LOADING = 30  # as `SILENCE`, while a rank loads: one operation may hold the GIL for long
_SECRETS: dict[str, Any] = {"hf_token": None, "cluster_key": None, "prompt_cache_url": None}  # not in a remote `Begin`
_LOOK = 0.1  # seconds between two checks of whether all ranks live
_STOPPED = "Tt"  # states of a process that was stopped, by a signal or a debugger
_COMPUTES = 0.1  # seconds of CPU time per second from which a process counts as computing


class _Other:
    """The first rank's view of another rank.

    Attributes:
        line: the connection over which it gets steps.
        side: the connection for heartbeats and other messages outside of steps.
        process: its process; None for a rank that joined over the network (`RankListener`).
        where: the address from which it joined; "" for a rank that this process started.
        quiet: ticks since its last heartbeat, or since the last tick in which it computed while it loaded.
        gone: why it counts as ended; None while it lives, or if `process` shows how it ended.
    """

    def __init__(
        self, line: rank_line.Line, side: rank_line.Line, process: subprocess.Popen[bytes] | None, where: str = ""
    ) -> None:
        self.line, self.side, self.process, self.where = line, side, process, where
        self.quiet = 0
        self.gone: str | None = None
        self._computed = 0.0

    def limit(self) -> int:
        """Return the ticks without a heartbeat that are allowed while it loads; ticks of computing do not count.

        Its heartbeats need the GIL, which importing a library or packing a matrix may hold. For a process of this
        machine, /proc shows whether it computes.
        """
        seen = None if self.process is None else process_state(self.process.pid)
        if seen is None:
            return _LOADING
        state, computed = seen
        if computed - self._computed >= _COMPUTES * rank_line.TICK:  # less may just be threads that wait for the GIL
            self.quiet = 0
        self._computed = computed
        return rank_line.SILENCE if state in _STOPPED else _LOADING

    def fate(self) -> str | None:
        """Return how it ended; None while it lives."""
        if self.gone is None and self.process is not None and self.process.poll() is not None:
            return ending(self.process.returncode)
        return self.gone


class Ranks:
    """The first rank's view of all other ranks, which load their parts of the model while this process loads its part.

    Attributes:
        config: this rank's configuration.
        fail: ends the engine; called when a rank has died.
        on_blocks: called in any thread with a rank's number and its message about offloaded blocks.

    Raises:
        ConfigError: several ranks cannot run here, or this is not the first node; see also `RayRanks`, `RankListener`.
    """

    def __init__(self, config: EngineConfig) -> None:
        if not hasattr(socket, "AF_UNIX") or sys.platform == "win32":
            raise ConfigError("several ranks are not implemented on Windows: leave tensor_parallel_size out")
        if config.node_rank:
            raise ConfigError(
                f"this is node {config.node_rank} of {config.nnodes}, which runs ranks and no engine: `candle-vllm "
                "serve` with node_rank runs them, and the engine is on node 0",
                "node_rank",
            )
        self.size, here = config.ranks, config.ranks // config.nnodes
        self._collective: ProcessGroup | None = None
        self._failure: str | None = None
        self._lock = threading.Lock()
        self._closing = False
        self._loading = True
        self.fail: Callable[[EngineDeadError], object] = lambda _: None
        self._callbacks: list[Callable[[], None]] = []
        self.on_blocks: Callable[[int, rank_line.BlockRead | rank_line.BlocksClosed], object] = lambda *_: None
        self._rendezvous = rank_line.RendezvousStore()
        self._others: dict[int, _Other] = {}
        self._listener: RankListener | None = None
        self._placed: RayRanks | None = None
        self._ring: MessageRing | None = None
        self._memory: BinaryIO | None = None
        self._settings = config.plain() | {"mmproj": None}  # only the first rank has the vision tower
        try:
            if config.distributed_executor_backend == "ray":
                from candle_vllm.core.engine.ranks.ray_ranks import RayRanks

                self._placed = RayRanks(config)
                self.config, self._listener, here = self._placed.config, self._placed.listener, 1
            else:
                self.config = dataclasses.replace(config, **rank_device(config, 0))
            if config.nnodes > 1:
                assert config.cluster_key is not None
                where, missing = (config.master_addr, config.master_port), range(here, self.size)
                self._listener = RankListener(*where, config.cluster_key, missing, self.size, config.nnodes)
            self._host = "127.0.0.1" if self._listener is None else self._listener.host
            if config.device == "cpu" and here == self.size:
                self._memory = shared_memory(self.size)
            if here > 1:
                self._ring = made_ring(here - 1)
            for rank in range(1, here):
                self._start(config, rank)
            threading.Thread(target=self._watch, name="candle-vllm-ranks", daemon=True).start()
        except BaseException:
            self.close()
            raise

    def _start(self, config: EngineConfig, rank: int) -> None:
        (near, far), (near_side, far_side) = socket.socketpair(), socket.socketpair()
        with far, far_side:
            ring = None if self._ring is None else self._ring.memory
            given = [None if each is None else each.fileno() for each in (far, far_side, ring, self._memory)]
            process = subprocess.Popen(
                (*RANK, ",".join("" if each is None else str(each) for each in given)),
                stdin=subprocess.DEVNULL,
                pass_fds=[each for each in given if each is not None],
                start_new_session=True,
            )
        other = _Other(rank_line.Line(near), rank_line.Line(near_side), process)
        self._begin(rank, other, rank_device(config, rank), self._host)

    def _begin(self, rank: int, other: _Other, own: dict[str, Any], host: str, *, kept_in_redis: bool = False) -> None:
        self._others[rank] = other
        threading.Thread(target=self._attend, args=(rank, other), name="candle-vllm-rank", daemon=True).start()
        with contextlib.suppress(OSError):  # it has ended, which `_watch` notices
            other.line.send(rank_line.Begin(self._settings | own, rank, self.size, host, log_style(), kept_in_redis))

    def _attend(self, rank: int, other: _Other) -> None:
        """Receive a rank's messages outside of steps, until it has gone."""
        with contextlib.suppress(EOFError, OSError, ValueError):
            while True:
                said: rank_line.FromSide = other.side.receive(rank_line.FromSide)
                other.quiet = 0
                if isinstance(said, rank_line.BlockRead | rank_line.BlocksClosed):
                    self.on_blocks(rank, said)
                elif not isinstance(said, rank_line.Alive):
                    self._rendezvous.answer(said, other.side)
        if other.process is None:  # no exit status can be read
            other.gone = other.gone or "its connection has ended"

    @property
    def collective(self) -> Collective:
        """The collective operations of the ranks; created when all ranks have joined."""
        if self._collective is None:
            if self._listener is not None:
                for rank, (line, side, where) in self._listener.everyone().items():
                    kept = self.config.prompt_cache_url is not None
                    self._begin(rank, _Other(line, side, None, where), _SECRETS, "", kept_in_redis=kept)
            self._wait(0)
            stages = self.config.pipeline_parallel_size
            self._collective = meet(
                0, self.size, self.config.device, self._rendezvous, self._host, stages, self._memory
            )
        return self._collective

    def all_loaded(self, files: Sequence[Path]) -> None:
        """Wait until every rank has loaded its weights, this one from `files`. Raises CandleVllmError if a rank cannot
        load its weights (the rank's error), or nodes have different files."""
        marks = [said.files for said in self._wait(1) if said.files is not None]
        others = [path for path in files if path != self.config.mmproj]
        if marks and set(marks) != {files_mark(others, times=False)}:
            raise ModelLoadError(
                "the nodes have different files of the model: use the same revision or the same folder on each"
            )

    def _wait(self, stage: int) -> list[rank_line.Ready]:
        """Wait until all ranks have reached a stage of starting, then let them continue together."""
        found: list[rank_line.Ready] = []
        for number, other in self._others.items():
            try:
                said: rank_line.FromRank = other.line.receive(rank_line.FromRank)
            except (EOFError, OSError):  # all connections end when one rank has gone, maybe another one
                raise self._last_error() or ModelLoadError(
                    f"{self._failure or self._gone() or f'rank {number} has ended'} while it loaded its part of the "
                    "model; the log has its last output. If memory is short, the system kills it"
                ) from None
            if isinstance(said, rank_line.Failed):
                raise ConfigError(_error_prefix(number, other) + said.message, said.setting)
            if not isinstance(said, rank_line.Ready) or said.stage != stage:
                raise ModelLoadError(f"rank {number} sent {type(said).__name__} instead of reporting that it is ready")
            found.append(said)
        self.broadcast(rank_line.Go())
        return found

    def broadcast(self, message: rank_line.ToRank) -> None:
        """Broadcast to all other ranks: over the shared ring on this machine, if there is one, else over connections.
        Raises EngineDeadError if a rank has gone, or has not read in time."""
        data = rank_line.encoded(message)
        try:
            if self._ring is not None:
                self._ring.write(data, PATIENCE)
            for other in self._others.values():
                if self._ring is None or other.process is None:
                    other.line.send_encoded(data)
        except OSError as error:
            raise self.dead(str(error)) from None

    def broadcast_beside(self, message: rank_line.ToSide) -> None:
        """Broadcast to all other ranks outside of steps; ignore ranks that have gone."""
        for other in self._others.values():
            with contextlib.suppress(OSError):
                other.side.send(message)

    @property
    def is_dead(self) -> bool:
        """Whether all ranks were ended, because one has gone or a step has failed."""
        return self._failure is not None

    def adapters_loaded(self, number: int) -> list[rank_line.AdapterLoaded]:
        """Wait until the other ranks have loaded an adapter or failed; raises EngineDeadError if a rank has gone.
        Called in one thread, for one adapter at a time."""
        found: list[rank_line.AdapterLoaded] = []
        for other in self._others.values():
            try:
                said: rank_line.FromRank = other.line.receive(rank_line.FromRank)
            except (EOFError, OSError):
                raise self.dead() from None
            assert isinstance(said, rank_line.AdapterLoaded)
            assert said.number == number
            found.append(said)
        return found

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Return a context for building an engine. On failure it ends the other ranks. An error that does not
        name the cause (`EngineDeadError`, or no `CandleVllmError`) is replaced by the error of the rank to blame."""
        try:
            yield
            self._loading = False
        except BaseException as error:
            known = isinstance(error, CandleVllmError) and not isinstance(error, EngineDeadError)
            blamed = None if known else self._blamed()
            self.close()
            if blamed is None:
                raise
            raise blamed from error

    def _blamed(self) -> CandleVllmError | None:
        gone = self._last_error() or self._failure or self._gone()
        return ModelLoadError(f"the model cannot be divided: {gone}") if isinstance(gone, str) else gone

    def _last_error(self) -> ConfigError | None:
        """Return the unread error that a rank sent before it ended."""
        for number, other in self._others.items():
            other.line.socket.settimeout(_LAST_WORDS)
            with contextlib.suppress(EOFError, OSError, ValueError):
                said: rank_line.FromRank = other.line.receive(rank_line.FromRank)
                if isinstance(said, rank_line.Failed):
                    return ConfigError(_error_prefix(number, other) + said.message, said.setting)
        return None

    def dead(self, here: str = "") -> EngineDeadError:
        """End all other ranks, because one has gone or a step has failed; return an error that names the cause. If no
        rank is known to have gone, the cause is `here`, this rank's failure in the step."""
        with self._lock:
            if self._failure is None:
                self._failure = self._gone() or "a step over several ranks failed" + (here and f": {here}")
                self._end()
        return EngineDeadError(f"the engine has stopped: {self._failure}")

    def _end(self) -> None:
        """End all other ranks at once, and all waits for them in this process."""
        for other in list(self._others.values()):  # others may join at the same time
            if other.process is not None:
                other.process.kill()
        self._hang_up()
        if self._collective is not None:
            self._collective.abort()

    def _hang_up(self) -> None:
        for other in list(self._others.values()):
            other.line.end()
            other.side.end()
        if self._ring is not None:
            self._ring.end()
        if self._listener is not None:
            self._listener.close()
        self._rendezvous.close()

    def _gone(self) -> str | None:
        """Return which rank has ended, and how; None if no rank is known to have ended after `_FATE_SECONDS`.

        Collective operations fail at once when a rank has ended, but its end may be known later: over a network, or on
        a busy machine.
        """
        until = time.monotonic() + _FATE_SECONDS
        while time.monotonic() < until:
            for number, other in list(self._others.items()):
                fate = other.fate()
                if fate is not None:
                    where = f" at {other.where}" if other.where else ""
                    return f"rank {number}{where} has ended ({fate})"
            time.sleep(0.01)
        return None

    def add_death_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, when the ranks have been ended (`dead`); at once if they already are."""
        with self._lock:
            if self._failure is None:
                self._callbacks.append(callback)
                return
        callback()

    def _watch(self) -> None:
        """Send heartbeats, and wait until another rank has gone."""
        while not self._closing:
            others = list(self._others.values())
            for other in others:
                with contextlib.suppress(OSError):
                    other.side.send(rank_line.Alive())
            until = time.monotonic() + rank_line.TICK
            while time.monotonic() < until:
                if self._closing or any(other.fate() is not None for other in others):
                    break
                time.sleep(_LOOK)
            for other in others:  # counted in ticks of this process, which may have been stopped itself
                other.quiet += 1
                limit = other.limit() if self._loading else rank_line.SILENCE
                if other.gone is None and other.quiet >= limit:
                    other.gone = f"it has not responded for {other.quiet * rank_line.TICK:.0f} s"
            if not self._closing and any(other.fate() is not None for other in others):
                self._report_death()
                return

    def _report_death(self) -> None:
        if self._loading:
            time.sleep(_LAST_WORDS)  # gives `_wait` time to read the rank's own error
        if self._closing:
            return
        self.fail(self.dead())
        with self._lock:
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def close(self) -> None:
        """End the other ranks, and wait for the processes that this one started."""
        self._closing = True
        self._hang_up()
        if self._collective is not None:
            self._collective.close()
        until = time.monotonic() + _ENDING
        for other in self._others.values():
            if other.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    other.process.wait(max(0.0, until - time.monotonic()))
                other.process.kill()
                other.process.wait()
            other.line.socket.close()
            other.side.socket.close()
        if self._ring is not None:
            self._ring.close()
        if self._memory is not None:
            self._memory.close()
        if self._placed is not None:
            self._placed.close()


def _error_prefix(number: int, other: _Other) -> str:
    """Return a prefix for the error of a rank that joined over the network; "" for one that this process started."""
    return f"rank {number} at {other.where}: " if other.where else ""


def meet(
    rank: int, size: int, device: str, notes: Notes, host: str, stages: int = 1, memory: BinaryIO | None = None
) -> ProcessGroup:
    """Create the collective operations over the rendezvous store `notes`; all ranks call this."""
    beside = size // stages
    stage, number = divmod(rank, beside)
    line = None
    if stages > 1:
        line = ProcessGroup(stage, stages, device, notes, f"line{number}", patience=PATIENCE, host=host, ring=True)
    return ProcessGroup(
        number, beside, device, notes, f"stage{stage}",
        patience=PATIENCE, host=host, stages=line, memory=memory, first=stage * beside,
    )  # fmt: skip


class RankedParts:
    """The `BlockParts` of the other ranks, numbered from 1 to `count`, each with its own store; called through
    messages.

    They report progress to `OffloadedBlocks.heard`. The death of a rank raises no error here: it ends the engine. For
    `broadcast_pages` see `RankedRunner`.
    """

    def __init__(self, ranks: Ranks, broadcast_pages: Callable[[], None]) -> None:
        self._ranks, self.count, self._broadcast_pages = ranks, ranks.size - 1, broadcast_pages
        self._closed: set[int] = set()

    def listen(self, heard: Callable[[int, int, bool, bool], None]) -> None:
        """Set `heard`: it is called in any thread with a rank's number and the arguments of `BlockParts.report`."""

        def said(rank: int, message: rank_line.BlockRead | rank_line.BlocksClosed) -> None:
            if isinstance(message, rank_line.BlockRead):
                heard(rank, message.reading, message.found, message.failed)
            else:
                self._closed.add(rank)

        self._ranks.on_blocks = said

    def offer(self, blocks: Sequence[tuple[int, bytes]]) -> None:
        numbers, digests = zip(*blocks, strict=True)
        self._broadcast(rank_line.KeepBlocks(np.array(numbers), digests))

    def read(self, number: int, digests: Sequence[bytes]) -> None:
        """See `BlockParts`; sent at once, outside of steps."""
        self._ranks.broadcast_beside(rank_line.ReadBlocks(number, tuple(digests)))

    def bring(self, number: int, blocks: Sequence[int]) -> None:
        """See `BlockParts`; sent in order with the steps."""
        with contextlib.suppress(EngineDeadError):
            self._broadcast_pages()
        self._broadcast(rank_line.BringBlocks(number, np.array(blocks)))

    def end(self, number: int, brought: int) -> None:
        self._ranks.broadcast_beside(rank_line.EndReading(number, brought))

    def clear(self) -> None:
        self._broadcast(rank_line.ForgetBlocks())

    def close(self) -> None:
        """Make the ranks write their unwritten blocks and then close; does not wait for them."""
        self._broadcast(rank_line.CloseBlocks())

    def closed(self) -> bool:
        """Whether all ranks have closed, or have died."""
        return self._ranks.is_dead or len(self._closed) == self.count

    def _broadcast(self, message: rank_line.ToRank) -> None:
        with contextlib.suppress(EngineDeadError):  # the engine ends anyway
            self._ranks.broadcast(message)


class _InFlight(NamedTuple):
    """See `Launched`."""

    collect: Callable[[Sequence[SamplingState]], Sequence[SampledTokens]]
    states: Sequence[SamplingState]

    def tokens(self) -> Sequence[SampledTokens]:
        return self.collect(self.states)


class RankedRunner:
    """The first rank's runner: `own` runs its part of each step, and the other ranks run theirs; see `ModelRunner`.

    Any failure in a step ends the engine, because the state of the other ranks is then unknown.
    """

    overlaps = False

    def __init__(self, runner: ModelRunner, ranks: Ranks) -> None:
        self.own, self.in_flight, self.step_memory = runner, runner.in_flight, runner.step_memory
        self.hidden_sum = runner.hidden_sum  # the first rank has the whole hidden states
        # The other ranks get these calls by `sleep`.
        self.drop_cache, self.restore_cache, self.wake_up = runner.drop_cache, runner.restore_cache, runner.wake_up
        self._ranks = ranks
        self._numbers: dict[int, int] = {}  # numbers of adapters in memory, by their serial numbers
        self._adapters = itertools.count(1)
        self._forgotten: collections.deque[int] = collections.deque()
        self.fatal = (*runner.fatal, EngineDeadError)
        pages: Any = runner
        self._page_of: Ints = getattr(pages, "page_of", np.zeros((0, 0), np.int64)).reshape(-1)
        self._broadcast_page_of = self._page_of.copy()
        self._tables_version: object = None
        self._sent: Batch | None = None  # the step that was sent last
        self._place = 0  # position of its first row

    def forward(self, batch: Batch, states: Sequence[SamplingState]) -> None:
        message = self._message(batch)
        self.broadcast_pages()
        self._together(message, lambda: self.own.forward(batch, states))

    def draw(self, states: Sequence[SamplingState]) -> Launched:
        """See `ModelRunner`. With several steps in flight, tokens are sampled only when `Launched.tokens` is called."""
        if self.in_flight > 1:
            return _InFlight(self._collect, states)
        return self.own.draw(states)

    def collect(self) -> None:
        """See `ModelRunner`; does nothing, because `Launched.tokens` collects the step."""

    def _collect(self, states: Sequence[SamplingState]) -> Sequence[SampledTokens]:
        """Collect the oldest step in flight, and return its sampled tokens."""
        self._together(rank_line.Collect() if self._ranks.config.tensor_parallel_size > 1 else None, self.own.collect)
        return self.own.draw(states).tokens()

    def score(self, rows: Ints) -> Value:
        return self._together(rank_line.Score(rows), lambda: self.own.score(rows))

    def hidden_rows(self, rows: Ints) -> NDArray[np.float32]:
        assert isinstance(self.own, StepwiseRunner)
        return self.own.hidden_rows(rows)

    def load_adapter(self, path: Path) -> int:
        """Make the other ranks begin to load an adapter, while steps run; return its number. Called in one thread."""
        self._report_forgotten()  # without steps in between, the others would keep every adapter
        number = next(self._adapters)
        self._ranks.broadcast(rank_line.LoadAdapter(number, str(path)))
        return number

    def adapter_is_loaded(self, number: int, packed: PackedAdapter | None) -> None:
        """Wait until the other ranks have loaded an adapter; `packed` is None if the first rank has failed to load it.
        Raises AdapterError if another rank could not load it or found other files, and EngineDeadError if a rank has
        gone."""
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

    def _report_forgotten(self) -> None:
        """Report the adapters that no step needs any more; steps that are not sent yet keep references to theirs."""
        gone = list[int]()
        with contextlib.suppress(IndexError):
            while True:
                gone.append(self._forgotten.popleft())
        if gone:
            self._ranks.broadcast(rank_line.ForgetAdapters(tuple(gone)))

    def _numbered(self, adapters: AdapterRows | None) -> rank_line.Adapters | None:
        if adapters is None:
            return None
        return rank_line.Adapters(
            adapters.rows,
            adapters.scales,
            adapters.starts,
            tuple(self._numbers[each.serial] for each in adapters.adapters),
            adapters.sources,
        )

    def broadcast_pages(self) -> None:
        """Broadcast changed page table entries, before a step or a block copy needs them."""
        if len(changed := np.flatnonzero(self._page_of != self._broadcast_page_of)):
            self._broadcast_page_of[changed] = self._page_of[changed]
            self._ranks.broadcast(rank_line.Pages(changed, self._page_of[changed]))

    def sleep(self, asked: int | frozenset[str]) -> None:
        """Make the other ranks sleep at a level, or wake up tags."""
        self._ranks.broadcast(rank_line.Sleep(asked) if isinstance(asked, int) else rank_line.WakeUp(asked))

    def close(self) -> None:
        self._ranks.close()
        self.own.close()

    def _together(self, message: rank_line.ToRank | None, own: Callable[[], _Result]) -> _Result:
        if message is not None:
            self._ranks.broadcast(message)
        try:
            return own()
        except Exception as error:
            logger.debug("a step over ranks failed", exc_info=error)
            raise self._ranks.dead(f"{type(error).__name__}: {error}") from error

    def _message(self, batch: Batch) -> rank_line.Forward | rank_line.Next:
        if self._forgotten:
            self._report_forgotten()
        sent, place = self._sent, self._place
        self._sent, self._place = batch, batch.runs[0].start
        behind = sent is not None and batch.tokens is sent.tokens and self._place == place + 1
        if behind and batch.goes_on:
            self._tables_version = batch.tables_version
            return rank_line.Next(batch.token_ids, tuple(batch.begun), _states(batch))
        if batch.drafted and not isinstance(self.own, StepwiseRunner):
            from candle_vllm.core.engine.runners.device_inputs import by_rows

            batch = by_rows(batch)  # the first rank's runner does the same
        known, seen = batch.tables_version is self._tables_version, batch.embedded
        self._tables_version = batch.tables_version
        return rank_line.Forward(
            batch.tokens,
            batch.query_start,
            batch.context_lens,
            batch.sampled_rows,
            batch.num_decodes,
            None if known else batch.block_tables,
            batch.ahead,
            self._numbered(batch.adapters),
            None if seen is None else rank_line.Seen(seen.rows, seen.vectors.shape[1]),
            batch.turned,
            _states(batch),
        )


def _states(batch: Batch) -> tuple[Ints, ...] | None:
    return None if batch.states is None else tuple(batch.states.tables.values())
