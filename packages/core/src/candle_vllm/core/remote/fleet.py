# SPDX-License-Identifier: MIT
"""Fleet: several engine processes with the same model, used as one engine (steps 3 to 10 of a request's life).

Each replica is a `RemoteEngine` with a thread of its own in this process. The fleet routes requests, gives all replicas
the same adapters, restarts replicas that have died, and aggregates statistics.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from struct import pack
from typing import Any, Final, Unpack

from msgspec.structs import fields, replace

from candle_vllm.core.assembly.encoder import is_encoder
from candle_vllm.core.assembly.placement import resolve_ranks
from candle_vllm.core.config import EngineConfig, EngineSettings, config_of
from candle_vllm.core.devices import means_gpus
from candle_vllm.core.engine.adapters.adapter_store import MAX_LOOSE_NAMES, AdapterCall
from candle_vllm.core.engine.model_info import AdapterInfo, ModelInfo
from candle_vllm.core.engine.requests import AdapterUse, GenerationRequest
from candle_vllm.core.engine.runners.sleeping import TAGS
from candle_vllm.core.engine.stats import EngineStats, ReplicaStats, combined, ended
from candle_vllm.core.engine.step.sequence import PlacedImage, block_hashes
from candle_vllm.core.engine.step.thread import Sink
from candle_vllm.core.engine_front import EngineFront, Texts, shut_down
from candle_vllm.core.errors import CandleVllmError, EngineDeadError, InvalidParameterError
from candle_vllm.core.loading.source import model_files
from candle_vllm.core.remote.engine import RemoteEngine
from candle_vllm.core.remote.payloads import Payload, RequestWriter
from candle_vllm.core.remote.process import EngineProcess
from candle_vllm.core.remote.routing import Room, Router
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.threads import default_threads
from candle_vllm.core.vision.fetching import ImageSources

logger = logging.getLogger(__name__)

MAX_DEATHS: Final = 5
"""Maximum number of deaths and failed starts within `DEATH_WINDOW` seconds after which a replica is restarted."""
DEATH_WINDOW: Final = 300.0
_PAUSE: Final = 1.0  # seconds; doubled for each recent death or failed start, the pause before the next attempt
_CPU_SHARE: Final = 0.4  # kv_fraction's default on the CPU
_STATES = ("ready", "loading", "cold", "failed")  # an adapter's states; the first that any replica has is reported


def replica_configs(config: EngineConfig) -> list[EngineConfig]:
    """Return the configuration of each replica: its GPUs, its share of the threads, on the CPU of the cache memory.

    `kv_cache_memory`, and the memory share of a GPU, are per replica; on the CPU `kv_fraction` is for all replicas.
    Raises as `resolve_ranks` and `model_files`.
    """
    config = resolve_ranks(config)
    count, gpus = config.data_parallel_size, means_gpus(config.device)
    devices, ranks = config.device.split(","), config.ranks
    shares = not gpus and config.kv_cache_memory is None and not is_encoder(model_files(config))
    if gpus and len(devices) == 1:
        devices = [f"cuda:{number}" for number in range(count * ranks)]
    threads = default_threads() if config.threads is None else config.threads
    if not gpus and threads < count:
        logger.warning("%d replicas share %d threads: fewer replicas would be faster", count, threads)
    made = []
    for number in range(count):
        changes: dict[str, Any] = {"data_parallel_size": 1, "device": "cpu"}
        if gpus:
            changes["device"] = ",".join(devices[number * ranks : (number + 1) * ranks])
        changes["threads"] = max(1, threads // count + (number < threads % count))
        if shares:
            changes["kv_fraction"] = (config.kv_fraction or _CPU_SHARE) / count
        made.append(dataclasses.replace(config, **changes))
    return made


class Replica(RemoteEngine):
    """One engine of a fleet, in a `process` that was started with this configuration; raises as `RemoteEngine`."""

    def __init__(self, config: EngineConfig, process: EngineProcess) -> None:  # processes load in parallel
        self._load(config, process)

    @property
    def room(self) -> Room:
        """The replica's capacity, for the router."""
        stats = self._link.stats()
        blocks = stats.num_blocks if self.config.enable_prefix_caching else 0
        return Room(blocks, stats.block_size, self.model_info.max_num_seqs)

    @property
    def max_step_tokens(self) -> int:
        """Maximum number of tokens of one step."""
        return self._link.max_step_tokens

    def submit(self, prepared: Sequence[Payload], sink: Sink) -> None:
        self._running_thread().submit(prepared, sink)

    def drop(self, request_id: str, sink: Sink | None) -> None:
        self._thread.abort(request_id, sink)

    def writer(self, info: ModelInfo) -> RequestWriter:
        """Return the writer that checks requests to the fleet."""
        return RequestWriter(info, self._require()[1].tokenizer, self._pooling_plan, self.config.seed)

    def follow(self, begun: Callable[[str], None], over: Callable[[str], None]) -> None:
        """Set `on_begun` and `on_over` of `RemoteLink`; call it before the first request."""
        self._link.on_begun, self._link.on_over = begun, over

    def last_stats(self) -> EngineStats:
        """Return the last statistics that the replica sent, even if it has died since."""
        return self._link.stats()


class Fleet:
    """Replicas of one model, all loaded when the constructor returns.

    Args:
        config: the configuration of all replicas; see `replica_configs`.

    Attributes:
        info: information about the model; bytes and `max_num_seqs` are sums over all replicas.
        texts: the model's tokenizer, template and image processing.
        max_model_len, max_step_tokens: the replicas' minimum, and their sum; see `Engine`.

    Raises:
        ConfigError, ModelNotFoundError, ModelLoadError: a replica cannot be loaded.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._configs = replica_configs(config)
        self._most = config.max_queued_requests
        self._lock = threading.RLock()  # guards the replicas' state and their statistics
        self._closed = threading.Event()
        self._dead: str | None = None  # the message of the error
        self._callbacks: list[Callable[[], None]] = []
        self._deaths: list[list[float]] = [[] for _ in self._configs]
        self._restarts = [0] * len(self._configs)
        self._up = [True] * len(self._configs)
        self._starting: dict[threading.Thread, EngineProcess | None] = {}
        self._past: EngineStats | None = None
        self._changing = threading.RLock()  # serialises changes of adapters and of sleep in all replicas
        self._level = 0
        self._woken: frozenset[str] = frozenset()
        self._added: dict[str, AdapterUse] = {}
        self._pinned: set[str] = set()
        self._loose: OrderedDict[str, str] = OrderedDict()  # by adapter name: paths in requests, without add_lora
        self._replicas = self._load_all()
        infos = [replica.model_info for replica in self._replicas]
        self.max_model_len = min(info.max_model_len for info in infos)
        self.max_step_tokens = sum(replica.max_step_tokens for replica in self._replicas)
        self.texts = self._replicas[0]._require()[1]
        self.info: ModelInfo = replace(
            infos[0],
            max_model_len=self.max_model_len,
            device=",".join(dict.fromkeys(info.device for info in infos)),
            weight_bytes=sum(info.weight_bytes for info in infos),
            max_num_seqs=sum(info.max_num_seqs for info in infos),
            kv_cache_bytes=sum(info.kv_cache_bytes for info in infos),
            state_bytes=sum(info.state_bytes for info in infos),
            index_bytes=sum(info.index_bytes for info in infos),
        )
        self._writer = self._replicas[0].writer(self.info)
        self._router = Router([replica.room for replica in self._replicas])
        self._block_size = self._replicas[0].room.block_size if self._replicas[0].room.num_blocks else 0
        for number, replica in enumerate(self._replicas):
            replica.follow(self._router.begun, self._router.over)
            self._watch(number, replica)

    def _load_all(self) -> list[Replica]:
        """Start all processes, which load in parallel, and wait for each."""
        processes: list[EngineProcess] = []
        replicas: list[Replica] = []
        try:
            for each in self._configs:
                processes.append(EngineProcess(each))
            for each, process in zip(self._configs, processes, strict=True):
                replicas.append(Replica(each, process))
        except BaseException:  # also an interrupt
            for process in processes[len(replicas) :]:
                process.close(kill=True)
            for replica in replicas:
                replica.close()
            raise
        return replicas

    # ---- state -------------------------------------------------------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        """False once the fleet is closed or the last replica has died."""
        return self._dead is None and not self._closed.is_set()

    @property
    def pids(self) -> list[int]:
        """Process ids of the replicas."""
        return [replica.pid for replica in self._replicas]

    def stats(self) -> EngineStats:
        """Return the statistics aggregated over all replicas, and those of each replica."""
        with self._lock:
            each = [replica.last_stats() if up else None for replica, up in zip(self._replicas, self._up)]
            told = tuple(_of_replica(stats, restarts) for stats, restarts in zip(each, self._restarts))
            alive = [stats for stats in each if stats is not None]
            past = [] if self._past is None else [self._past]
            return replace(combined(alive + past or [ended(self._replicas[0].last_stats())]), replicas=told)

    def add_death_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, when the last replica has died; at once if no replica is left."""
        with self._lock:
            waits = self._dead is None
            if waits:
                self._callbacks.append(callback)
        if not waits and not self._closed.is_set():
            callback()

    # ---- requests ----------------------------------------------------------------------------------------------------

    def prepare(self, request: GenerationRequest) -> Sequence[Payload]:
        """See `RequestWriter.prepare`; adapters get their paths, so that any replica can load them."""
        if request.adapters:
            request = replace(request, adapters=tuple(self._located(use) for use in request.adapters))
        return self._writer.prepare(request)

    def submit(self, prepared: Sequence[Payload], sink: Sink) -> None:
        """See `EngineThread.submit`; the router chooses the replica."""
        request = prepared[0].request
        name, count = request.request_id, len(prepared)
        hashes, refused = self._hashes(request), set[int]()
        while True:
            number = self._router.give(name, hashes, len(request.prompt_token_ids), count, refused, self._most)
            if number is None:
                raise EngineDeadError(self._dead or "the engine is closed")
            try:
                self._replicas[number].submit(prepared, sink)
                return
            except EngineDeadError:  # the router is notified of a death a moment later
                self._router.over(name)
                refused.add(number)
            except BaseException:
                self._router.over(name)
                raise

    def abort(self, request_id: str, sink: Sink | None = None) -> None:
        number = self._router.place_of(request_id)
        if number is not None:
            self._replicas[number].drop(request_id, sink)

    def reset_prefix_cache(self) -> None:
        self._router.forget_prefixes()
        self._each(RemoteEngine.reset_prefix_cache)

    def check_structured_outputs(self, params: StructuredOutputsParams) -> None:
        """See `RemoteEngine.check_structured_outputs`; one replica checks."""
        for replica in self._living():
            try:
                return replica.check_structured_outputs(params)
            except EngineDeadError:
                continue
        raise EngineDeadError(self._dead or "the engine is closed")

    # ---- sleep -------------------------------------------------------------------------------------------------------

    @property
    def is_sleeping(self) -> bool:
        """Whether any replica is asleep."""
        return any(replica.is_sleeping for replica in self._living())

    def sleep(self, level: int, mode: str) -> None:
        """See `EngineThread.sleep`; if a replica cannot sleep, the others wake up again."""
        with self._changing:
            try:
                self._each(lambda replica: replica.sleep(level, mode))
            except CandleVllmError:
                if not self._level:
                    self._each(RemoteEngine.wake_up)
                raise
            self._level, self._woken = level, frozenset()
            self._router.forget_prefixes()

    def wake_up(self, tags: frozenset[str]) -> None:
        with self._changing:
            self._each(lambda replica: replica.wake_up(sorted(tags)))
            self._woken |= tags
            if self._woken >= TAGS:
                self._level, self._woken = 0, frozenset()

    def _hashes(self, request: GenerationRequest) -> list[bytes]:
        """Return hashes of a prompt's full blocks, for the router; adapters, images and the salt change them."""
        size = self._block_size
        if not size or len(request.prompt_token_ids) < size:
            return []
        marks: dict[int, bytes] = {}
        for use in request.adapters:  # marks[0] changes the hashes of all blocks, even if the adapter activates later
            if use.scale:
                marks[0] = marks.get(0, b"") + use.name.encode() + b"\0" + pack("<d", use.scale)
        if request.images and self.texts.vision is not None:
            for image, places in zip(
                request.images, self.texts.vision.places(request.prompt_token_ids, request.images), strict=True
            ):
                for block, mark in PlacedImage(image, places.tolist()).marks(size):
                    marks[block] = marks.get(block, b"") + mark
        return block_hashes(request.prompt_token_ids, size, request.params.cache_salt, marks=marks)

    # ---- adapters ----------------------------------------------------------------------------------------------------

    def call_adapters(self, call: AdapterCall) -> tuple[AdapterInfo, ...]:
        """See `AdapterStore.call`; all replicas run it. If one fails to add a new adapter, all remove it."""
        if call.what == "list":
            return _merged(self._each(lambda replica: replica.call_adapters(call)))
        assert call.adapter is not None
        name = call.adapter.name
        with self._changing:
            known, loose = name in self._added or name in self._loose, self._loose.get(name)
            if loose and call.what != "remove" and not call.adapter.path:  # only replicas with a request for it know it
                self._each(lambda replica: replica.call_adapters(AdapterCall("add", AdapterUse(name=name, path=loose))))
            try:
                infos = _merged(self._each(lambda replica: replica.call_adapters(call)))
            except CandleVllmError:
                for replica in self._living() if call.what == "add" and not known else ():
                    with suppress(CandleVllmError):  # it may have ended, or not know the name
                        replica.remove_lora(name)  # also where it still loads
                raise
            if call.what == "remove":
                self._added.pop(name, None)
                self._loose.pop(name, None)
                self._pinned.discard(name)
            else:
                self._added[name] = AdapterUse(name=name, path=infos[0].path)
                self._loose.pop(name, None)
                if call.what == "pin":
                    self._pinned.add(name)
            return infos

    def _located(self, use: AdapterUse) -> AdapterUse:
        """Add the known path: a replica without an earlier request for this adapter does not know its name."""
        if use.load_inplace:
            raise InvalidParameterError(
                f"load_inplace would reload the adapter in only one of {len(self._replicas)} replicas: reload "
                f"{use.name!r:.80} in all of them with add_lora",
                "lora_request",
            )
        added = self._added.get(use.name)
        known = self._loose.get(use.name, "") if added is None else added.path
        if use.path and known and use.path != known and (added is not None or not self._has_failed(use.name)):
            raise InvalidParameterError(
                f"adapter {use.name!r:.80} was loaded from other files than the request names: send the request with "
                "its name only, or add the request's files with add_lora and load_inplace=True",
                "lora_request",
            )
        if use.path and added is None:
            self._loose.pop(use.name, None)  # the name becomes the last one
            self._loose[use.name] = use.path
            while len(self._loose) > MAX_LOOSE_NAMES:
                self._loose.popitem(last=False)
        return replace(use, path=known) if known and not use.path else use

    def _has_failed(self, name: str) -> bool:
        """Whether no replica has loaded an adapter; files that were never loaded do not occupy a name."""
        found = self.call_adapters(AdapterCall("list"))
        return all(info.state == "failed" and not info.digest for info in found if info.name == name)

    # ---- life and death ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End all processes. Closing twice is fine."""
        with self._lock:
            self._closed.set()
            starting = dict(self._starting)
        for process in starting.values():
            if process is not None:
                process.kill()  # the starting thread waits for it and cleans up
        with suppress(RuntimeError), ThreadPoolExecutor(len(self._replicas)) as workers:
            list(workers.map(RemoteEngine.close, self._replicas))
        for replica in self._replicas:  # where no thread could start, because the interpreter ends
            replica.close()
        for thread in starting:
            if thread is not threading.current_thread():
                thread.join()

    def _living(self) -> list[Replica]:
        with self._lock:
            return [replica for replica, up in zip(self._replicas, self._up) if up]

    def _each(self, work: Callable[[Replica], Any]) -> list[Any]:
        """Call `work` for all living replicas in parallel; return the results, without replicas that die meanwhile.
        Raises EngineDeadError if no replica is left, or a replica's CandleVllmError after all replicas have answered.
        """
        living = self._living()
        said: list[Any] = []
        if living and not self._closed.is_set():
            with ThreadPoolExecutor(len(living)) as workers:
                answers = [workers.submit(work, replica) for replica in living]
            said = [answer for answer in answers if not isinstance(answer.exception(), EngineDeadError)]
        if not said:
            raise EngineDeadError(self._dead or "the engine is closed")
        return [answer.result() for answer in said]

    def _watch(self, number: int, replica: Replica) -> None:
        replica.add_death_callback(lambda: self._died(number))

    def _died(self, number: int) -> None:
        """Handle the death of a replica's process, after its requests have failed; see `add_death_callback`."""
        with self._lock:
            if self._closed.is_set() or not self._up[number]:
                return
            last = ended(self._replicas[number].last_stats())
            self._past = last if self._past is None else combined([self._past, last])
            self._up[number] = False
            self._router.lost(number)
            callbacks: list[Callable[[], None]] = []
            if not any(self._up):
                self._dead = f"all {len(self._up)} engine processes have ended"
                callbacks, self._callbacks = self._callbacks, []
            else:
                thread = threading.Thread(target=self._restart, args=(number,), name=f"replica-{number}", daemon=True)
                self._starting[thread] = None
                thread.start()
        for callback in callbacks:
            callback()

    def _restart(self, number: int) -> None:
        """Restart a replica, in a thread of its own, unless it dies too often."""
        this, deaths = threading.current_thread(), self._deaths[number]
        self._replicas[number].close()
        try:
            while self.is_alive:
                now = time.monotonic()
                deaths[:] = [*(then for then in deaths if now - then < DEATH_WINDOW), now]
                if len(deaths) > MAX_DEATHS:
                    logger.error("replica %d died or failed to start %d times: it stays down", number, len(deaths))
                    return
                logger.warning("replica %d has died and is restarted; the other replicas continue", number)
                try:
                    self._bring_back(number, this)
                    return
                except Exception as error:  # such as an OSError: a process cannot be started without memory
                    if self.is_alive:
                        unknown = not isinstance(error, CandleVllmError)
                        logger.error("replica %d could not be started: %s", number, error, exc_info=unknown)
                self._closed.wait(_PAUSE * 2 ** len(deaths))
        finally:
            with self._lock:
                del self._starting[this]

    def _bring_back(self, number: int, thread: threading.Thread) -> None:
        process = EngineProcess(self._configs[number])
        with self._lock:
            self._starting[thread] = process
            closed = self._closed.is_set()
        if closed:
            process.close(kill=True)
            return
        replica = Replica(self._configs[number], process)
        replica.follow(self._router.begun, self._router.over)
        with self._changing:  # adds the adapters of the other replicas, and sets their sleep level
            for name, use in self._added.items():
                try:
                    replica.call_adapters(AdapterCall("add", use))
                    if name in self._pinned:
                        replica.call_adapters(AdapterCall("pin", AdapterUse(name=name)))
                except CandleVllmError as error:
                    logger.warning("replica %d has no adapter %r any more: %s", number, name, error)
            if self._level:
                replica.sleep(self._level)
                if self._woken:
                    replica.wake_up(sorted(self._woken))
            with self._lock:
                stays = self.is_alive
                if stays:
                    self._replicas[number] = replica
                    self._up[number] = True
                    self._restarts[number] += 1
                    self._router.back(number, replica.room)
        if not stays:
            replica.close()
            return
        self._watch(number, replica)
        logger.info("replica %d is ready again", number)


# ---- aggregation -----------------------------------------------------------------------------------------------------


def _of_replica(stats: EngineStats | None, restarts: int) -> ReplicaStats:
    if stats is None:
        return ReplicaStats(alive=False, restarts=restarts)
    same = (each.name for each in fields(ReplicaStats) if each.name not in ("alive", "restarts"))
    return ReplicaStats(alive=True, restarts=restarts, **{name: getattr(stats, name) for name in same})


def _merged(each: Iterable[tuple[AdapterInfo, ...]]) -> tuple[AdapterInfo, ...]:
    """Merge the adapters of several replicas by name; the most advanced state of each adapter counts."""
    best: dict[str, AdapterInfo] = {}
    for info in (info for infos in each for info in infos):
        known = best.get(info.name)
        if known is None or _STATES.index(info.state) < _STATES.index(known.state):
            best[info.name] = info
    return tuple(best.values())


class ReplicatedEngine(EngineFront):
    """A model in `data_parallel_size` processes (replicas), each with a copy; a router chooses one for each request.

    Args:
        model: a Hugging Face id, a folder, a `.gguf` file, or a whole `EngineConfig`.
        settings: fields of `EngineConfig`, if `model` is not an `EngineConfig`.

    Raises:
        ConfigError, ModelNotFoundError, ModelLoadError: the model cannot be served with these settings.

    A request goes to the replica with the least work before its answer: the one that has its prefix cached, unless
    waiting there takes longer than computing the prefix in another replica. Answers do not depend on the replica, as
    far as answers of one engine do not depend on the rest of the batch. When a process ends, its requests fail with an
    `EngineDeadError`, the others go on, and it is restarted unless it ends too often. With the last, the engine ends.
    """

    def __init__(self, model: str | Path | EngineConfig, **settings: Unpack[EngineSettings]) -> None:
        config = config_of(model, settings)
        self.config = config
        self.image_sources = ImageSources.of(config)
        self._owner = os.getpid()
        self._fleet: Fleet | None = Fleet(config)
        self._info = self._fleet.info
        self._finalizer = weakref.finalize(self, shut_down, self._owner, self._fleet)

    @property
    def pids(self) -> list[int]:
        """Process ids of the replicas; for a replica that has died, the id of its last process."""
        return self._require()[0].pids

    @property
    def is_alive(self) -> bool:
        """False if the engine is closed, or all of its processes have ended."""
        return self._fleet is not None and self._fleet.is_alive and not self._is_elsewhere

    def add_death_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, when the last process has ended without `close`; see `RemoteEngine`."""
        self._require()[0].add_death_callback(callback)

    def check_structured_outputs(self, params: StructuredOutputsParams) -> None:
        self._check_generates()
        self._running_thread().check_structured_outputs(params)

    def call_adapters(self, call: AdapterCall) -> tuple[AdapterInfo, ...]:
        return self._running_thread().call_adapters(call)

    def close(self) -> None:
        """Abort running requests and end the processes, by force after 10 s. Closing twice is fine."""
        if self._is_elsewhere:  # the processes belong to the parent of this fork
            self._finalizer.detach()
        else:
            self._finalizer()
        self._fleet = None

    def _require(self) -> tuple[Fleet, Texts]:
        if self._fleet is None:
            raise EngineDeadError("the engine is closed")
        return self._fleet, self._fleet.texts

    def _running_thread(self) -> Fleet:
        self._working()
        return self._require()[0]
