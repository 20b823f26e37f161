# SPDX-License-Identifier: MIT
"""ReplicatedEngine: several engines with one model, used as one engine with the methods of `InferenceEngine`."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Unpack, cast

from candle_vllm.core.config import EngineConfig, EngineSettings
from candle_vllm.core.engine.adapters.adapter_store import AdapterCall
from candle_vllm.core.engine.model_info import AdapterInfo
from candle_vllm.core.engine_front import EngineFront, Texts
from candle_vllm.core.errors import ConfigError, EngineDeadError
from candle_vllm.core.remote.fleet import Fleet
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.vision.fetching import ImageSources


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
        config = model if isinstance(model, EngineConfig) else EngineConfig(model=cast("str", model), **settings)
        if isinstance(model, EngineConfig) and settings:
            raise ConfigError(f"pass an EngineConfig or settings, not both: {', '.join(settings)}")
        self.config = config
        self.image_sources = ImageSources.of(config)
        self._owner = os.getpid()
        self._fleet: Fleet | None = Fleet(config)
        self._info = self._fleet.info
        self._finalizer = weakref.finalize(self, _shut_down, self._fleet, self._owner)

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


def _shut_down(fleet: Fleet, owner: int) -> None:
    if os.getpid() == owner:
        fleet.close()
