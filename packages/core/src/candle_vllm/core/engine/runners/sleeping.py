# SPDX-License-Identifier: MIT
"""Engine sleep: free memory, and later fill it again with the same contents.

Level 1 frees the KV cache; weights on a GPU are moved to host memory, weights on the CPU stay. Level 2 also drops the
weights, which are read from the model's files again. At both levels the engine keeps adapters and the objects that
prepare requests. On the CPU memory keeps its addresses, because recorded plans contain them; on a GPU steps are
captured again.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from candle_vllm.core.assembly.encoder import LoadedEncoder, load_any_model
from candle_vllm.core.assembly.model import LoadedModel
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.devices import give_back
from candle_vllm.core.engine.runners.model_runner import CacheRunner
from candle_vllm.core.errors import CandleVllmError, EngineSleepingError, InvalidParameterError
from candle_vllm.core.kernels.collectives import Collective
from candle_vllm.core.kernels.cpu_runtime.weight_memory import can_drop_pages
from candle_vllm.core.loading.source import files_mark
from candle_vllm.core.threads import LOADING_THREADS

if TYPE_CHECKING:
    from candle_vllm.core.kernels.offloading import OffloadedWeights

logger = logging.getLogger(__name__)

WEIGHTS: Final = "weights"
KV_CACHE: Final = "kv_cache"
TAGS: Final = frozenset({WEIGHTS, KV_CACHE})
LEVELS: Final = (1, 2)
MODES: Final = ("abort", "wait")


def read_tags(tags: Sequence[str] | None) -> frozenset[str]:
    """Return the tags to wake up, all for None or an empty list; raises InvalidParameterError for an unknown tag."""
    if tags is None:
        return TAGS
    if isinstance(tags, str) or not TAGS.issuperset(tags):
        raise InvalidParameterError(f"tags {tags!r:.100}: a list of {' and '.join(sorted(TAGS))} is possible", "tags")
    return frozenset(tags) or TAGS


def check_sleep(level: int, mode: str) -> None:
    """Raise `InvalidParameterError` if the level or mode does not exist."""
    if type(level) is not int or level not in LEVELS:  # 1.0 and True equal a level
        raise InvalidParameterError(f"level {level!r:.40}: 1 (keep the weights in memory) or 2 (drop them)", "level")
    if mode not in MODES:
        raise InvalidParameterError(
            f"mode {mode!r:.40}: abort (requests that run or wait end now) or wait (they end first)", "mode"
        )


class Sleeper:
    """Frees an engine's memory and fills it again; used in the engine's thread only.

    Args:
        loaded: the engine's model, before a runner has prepared it.
        ranks: the ranks among which the model is divided; None for a whole model.

    Attributes:
        broadcast: sends a sleep level, or the tags to wake up, to the other ranks before this rank sleeps or wakes up.
        asleep: tags of freed memory.
        level: the sleep level; 0 while awake.
        runners: the runners of the model and of its draft model, which have the caches.
    """

    def __init__(
        self, config: EngineConfig, loaded: LoadedModel | LoadedEncoder, ranks: Collective | None = None
    ) -> None:
        self.asleep: frozenset[str] = frozenset()
        self.level = 0
        self.runners: Sequence[CacheRunner] = ()
        self.broadcast: Callable[[int | frozenset[str]], object] = lambda _: None
        self._config, self._loaded, self._ranks = _as_split(config, loaded), loaded, ranks
        self._mark = ""
        self._tensors: OffloadedWeights | None = None
        if not loaded.placement.recorded:
            from candle_vllm.core.kernels.offloading import OffloadedWeights, tensors_in

            bus = None if loaded.split is None else loaded.split.bus
            self._tensors = OffloadedWeights(tensors_in(*_layers(loaded)), bus)

    def check(self, level: int) -> None:
        """Raise `CandleVllmError` if this engine cannot sleep at this level; before level 2, record the files' hash."""
        if (self._tensors is None or (level == 2 and self._loaded.memories)) and not can_drop_pages():
            raise CandleVllmError(
                "on the CPU, sleeping is supported on Linux only: close the engine, or unload the model"
            )
        if level == 2 and not self._loaded.files:
            raise CandleVllmError("random weights cannot be read again: sleep at level 1, or unload the model")
        if level == 2 and (self.level < 2 or WEIGHTS not in self.asleep):
            self._mark = self._marked()

    def sleep(self, level: int) -> None:
        """Free memory at a checked level; no request may run, and no block may be published.

        Raises:
            EngineSleepingError: it failed, and so did waking up again: all memory counts as freed.
            CandleVllmError: it failed, for example for lack of main memory; what was awake is awake again.
        """
        if self.asleep == TAGS and level <= self.level:
            return
        level = max(level, self.level if WEIGHTS in self.asleep else 0)
        began, awake = time.perf_counter(), TAGS - self.asleep
        try:
            self._free(level)
        except (RuntimeError, MemoryError, OSError) as error:
            try:
                self.wake_up(awake)
            except Exception as second:
                both = f"the engine can neither sleep ({error}) nor wake up ({second}): it stays asleep"
                raise EngineSleepingError(both) from error
            raise CandleVllmError(f"the engine cannot sleep, and has restored its memory: {error}") from error
        logger.info("asleep at level %d after %.2f s", level, time.perf_counter() - began)

    def _free(self, level: int) -> None:
        """Free all memory of a level, on all ranks, whatever is freed already."""
        self.broadcast(level)
        self.asleep, self.level = TAGS, level
        for runner in self.runners:
            runner.drop_cache()
        if level == 2:
            if self._tensors is not None:
                self._tensors.drop()
            for memory in self._loaded.memories:
                memory.drop()
        elif self._tensors is not None and self._loaded.placement.device.type != "cpu":
            self._tensors.to_host()
        give_back()

    def wake_up(self, tags: Iterable[str]) -> None:
        """Restore the freed memory of these tags; if that fails, raise CandleVllmError, with all tags asleep."""
        began, asked = time.perf_counter(), self.asleep.intersection(tags)
        if not asked:
            return
        self.broadcast(asked)
        try:
            self._restore(asked)
        except Exception as error:
            _forget_frames(error)
            self._free(self.level)
            if isinstance(error, CandleVllmError):
                raise
            raise CandleVllmError(f"the engine cannot wake up, and stays asleep: {error}") from error
        if not self.asleep:
            logger.info("awake after %.2f s", time.perf_counter() - began)

    def _restore(self, asked: frozenset[str]) -> None:
        if WEIGHTS in asked:
            if self.level == 2:
                self._load_again()
            elif self._tensors is not None:
                self._tensors.to_device()
                give_back()  # the pinned copies
            self.asleep -= {WEIGHTS}
        if KV_CACHE in asked:
            for runner in self.runners:
                runner.restore_cache()
            self.asleep -= {KV_CACHE}
        if not self.asleep:
            for runner in self.runners:
                runner.wake_up()
            self.level = 0

    def _marked(self) -> str:
        try:
            return files_mark(self._loaded.files)
        except OSError as error:
            raise CandleVllmError(f"the files of {self._loaded.name} cannot be read again: {error}") from error

    def _load_again(self) -> None:
        loaded = self._loaded
        if self._marked() != self._mark:
            raise CandleVllmError(f"the files of {loaded.name} have changed since it went to sleep: unload the model")
        LOADING_THREADS.set(self._config.threads)  # in the engine's thread
        nothing: Callable[[int, int], object] = lambda *_: None  # noqa: E731
        fresh = load_any_model(self._config, loaded.placement.device, nothing, loaded.memories, self._ranks)
        if self._tensors is not None:
            from candle_vllm.core.kernels.offloading import tensors_in

            self._tensors.adopt(tensors_in(*_layers(fresh)), None if fresh.split is None else fresh.split.bus)


def _as_split(config: EngineConfig, loaded: LoadedModel | LoadedEncoder) -> EngineConfig:
    """Return settings with which the same part of the model is placed in main memory again, however full a GPU is."""
    if isinstance(loaded, LoadedEncoder) or loaded.placement.device.type == "cpu":
        return config
    split = loaded.split
    if split is None:
        return dataclasses.replace(config, cpu_experts=0, cpu_offload_gb=0, gpu_layers=None)
    return dataclasses.replace(config, cpu_experts=split.experts, cpu_offload_gb=None, gpu_layers=split.layers)


def _layers(loaded: LoadedModel | LoadedEncoder) -> list[Any]:
    """Return all modules with weights: model, vision tower and draft model."""
    if isinstance(loaded, LoadedEncoder):
        return [loaded.encoder]
    draft = loaded.draft
    drafts = [] if draft is None else [draft.decoder if isinstance(draft, LoadedModel) else draft.head]
    return [loaded.decoder, *([] if loaded.tower is None else [loaded.tower.tower]), *drafts]


def _forget_frames(error: BaseException | None) -> None:
    """Drop the local variables of an error's frames and of its causes' frames, which refer to tensors."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
