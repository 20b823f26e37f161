# SPDX-License-Identifier: MIT
"""RemoteEngine: an engine in a process of its own, with the methods of `InferenceEngine`."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Unpack

from candle_vllm.core.config import EngineConfig, EngineSettings, config_of, require_one
from candle_vllm.core.engine.adapters.adapter_store import AdapterCall
from candle_vllm.core.engine.model_info import AdapterInfo
from candle_vllm.core.engine_front import EngineFront, shut_down
from candle_vllm.core.errors import EngineDeadError
from candle_vllm.core.remote.link import RemoteLink, RemoteThread
from candle_vllm.core.remote.payloads import RequestWriter
from candle_vllm.core.remote.process import EngineProcess
from candle_vllm.core.remote.wire import Ready
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.text.chat_template import ChatTemplate
from candle_vllm.core.vision.fetching import ImageSources
from candle_vllm.core.vision.prompts import VisionInput


class RemoteEngine(EngineFront):
    """A model in a process of its own, so that neither process delays the other.

    Args:
        model: a Hugging Face id, a folder, a `.gguf` file, or a whole `EngineConfig`.
        settings: fields of `EngineConfig`, if `model` is not an `EngineConfig`.

    Raises:
        ConfigError, ModelNotFoundError, ModelLoadError: the model cannot be served with these settings.

    Tokenizing and chat templates run in this process and do not wait for the engine. A request that the engine refuses
    (its grammar does not compile) raises when its first output is awaited. When the engine's process ends, for any
    reason, all waiting calls get an `EngineDeadError`; only a new `RemoteEngine` can go on. `close` (or leaving the
    `with` block) ends the process, and so does the end of this process.
    """

    def __init__(self, model: str | Path | EngineConfig, **settings: Unpack[EngineSettings]) -> None:
        config = config_of(model, settings)
        require_one(config)
        self._load(config, EngineProcess(config))

    def _load(self, config: EngineConfig, process: EngineProcess) -> None:
        """Wait until a started process has loaded its model."""
        self.config = config
        self._owner = os.getpid()
        try:
            ready = process.greeting()
            self._texts: _Texts | None = _Texts(ready, config)
            self.image_sources = ImageSources.of(config)
            writer = RequestWriter(ready.info, self._texts.tokenizer, ready.pooling, config.seed)
            self._link = RemoteLink(process, ready, writer)
        except BaseException:  # also an interrupt while it loads
            process.close(kill=True)
            raise
        self._info = ready.info
        self._pooling_plan = ready.pooling
        self._process = process
        self._lock = threading.Lock()  # held by `close`, which two threads may call
        self._thread = RemoteThread(self._link, config.max_queued_requests, process.kill, config.stream_interval)
        self._finalizer = weakref.finalize(self, shut_down, self._owner, self._thread, self._link, process)

    @property
    def pid(self) -> int:
        """Process id of the engine's process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """False if the engine is closed, or its process has ended."""
        return self._texts is not None and self._thread.is_alive and not self._is_elsewhere

    def add_death_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, when the process ends without `close`; at once, in this thread, if it has ended.

        Otherwise the thread that reads outputs calls it: it must not block, and must use `call_soon_threadsafe`.
        """
        self._thread.add_death_callback(callback)

    def check_structured_outputs(self, params: StructuredOutputsParams) -> None:
        """See `EngineFront`; waits for the engine's process, which compiles while its steps run.

        Raises:
            InvalidParameterError: the schema or grammar is wrong or not supported; the message names the part.
            EngineOverloadedError: too many callers wait for checks, or this check takes too long.
            EngineDeadError: the process has ended.
        """
        self._check_generates()
        self._running_thread().check(params)

    def call_adapters(self, call: AdapterCall) -> tuple[AdapterInfo, ...]:
        return self._running_thread().call_adapters(call)

    def close(self) -> None:
        """Abort running requests and end the process, by force after 10 s. Closing twice is fine."""
        if self._is_elsewhere:  # the process belongs to the parent of this fork
            self._finalizer.detach()
            self._texts = None
            return
        with self._lock:
            self._finalizer()
            self._texts = None

    def _require(self) -> tuple[RemoteLink, _Texts]:
        if self._texts is None:
            raise EngineDeadError("the engine is closed")
        return self._link, self._texts

    def _running_thread(self) -> RemoteThread:
        self._working()
        return self._thread


class _Texts:
    """The model's tokenizer, template and image processing, as the engine's process reported them in `Ready`."""

    def __init__(self, ready: Ready, config: EngineConfig) -> None:
        self.tokenizer = ready.tokenizer.tokenizer()
        self.template = None if ready.template is None else ChatTemplate(ready.template, self.tokenizer.special_tokens)
        self.vision: VisionInput | None = None
        if ready.vision is not None:
            from candle_vllm.core.assembly.tower import vision_input_of

            self.vision = vision_input_of(ready.vision, self.tokenizer, config)
