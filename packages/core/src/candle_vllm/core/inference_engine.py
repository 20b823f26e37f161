# SPDX-License-Identifier: MIT
"""InferenceEngine: the library's main class. It loads a model, owns the engine thread, and accepts prompts."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Unpack

from candle_vllm.core.arguments import ExplainedAttributes, explained
from candle_vllm.core.assembly.encoder import LoadedEncoder, load_any_model
from candle_vllm.core.assembly.model import LoadedModel
from candle_vllm.core.assembly.placement import resolve_ranks
from candle_vllm.core.config import EngineConfig, EngineSettings, config_of, require_one
from candle_vllm.core.devices import choose_device, give_back
from candle_vllm.core.engine.adapters.adapter_store import AdapterCall
from candle_vllm.core.engine.build import build_engine, model_info
from candle_vllm.core.engine.model_info import AdapterInfo
from candle_vllm.core.engine.outputs import TokenOutput
from candle_vllm.core.engine.ranks.ranks import Ranks
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.engine.step.pooled import Reader, ScoredText
from candle_vllm.core.engine.step.preparation import check_pooling_request
from candle_vllm.core.engine.step.request_watchers import TextOptions
from candle_vllm.core.engine.step.stream import raise_failure
from candle_vllm.core.engine.step.thread import SLEEPS, EngineThread
from candle_vllm.core.engine_front import EngineFront, shut_down
from candle_vllm.core.errors import EngineDeadError, EngineSleepingError, InvalidParameterError
from candle_vllm.core.kernels.cpu_runtime.operation import use_level
from candle_vllm.core.memory import room_for
from candle_vllm.core.progress import progress_bar, tell
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.text.prompts import Prompt
from candle_vllm.core.threads import LOADING_THREADS
from candle_vllm.core.vision.fetching import ImageSources

_LOADING = 1.0  # maximum seconds that a step without other work waits for adapters


class InferenceEngine(ExplainedAttributes, EngineFront):
    """Inference engine with a loaded model, which continues many prompts concurrently.

    Args:
        model: a Hugging Face id, a folder, a `.gguf` file, "demo", or an `EngineConfig`.
        on_progress: called with loaded and total bytes while weights are loaded; None shows a bar on a terminal.
        settings: fields of `EngineConfig`, unless `model` is an `EngineConfig`.

    Raises:
        ConfigError, ModelNotFoundError, ModelLoadError: the model cannot be served with these settings.

    The engine runs in its own thread from the first request on. `close` (or leaving the `with` block) ends the thread
    and releases the memory. A loop of your own calls `add_request`, `step` and `abort`; `generate` is then refused.
    """

    def __init__(
        self,
        model: str | Path | EngineConfig,
        *,
        on_progress: Callable[[int, int], object] | None = None,
        **settings: Unpack[EngineSettings],
    ) -> None:
        config = config_of(model, settings)
        require_one(config)
        self.config = config
        self.image_sources = ImageSources.of(config)
        self._owner = os.getpid()
        config = resolve_ranks(config)
        ranks = None if config.ranks == 1 else Ranks(config)
        with nullcontext() if ranks is None else ranks.starting():
            self._load(config if ranks is None else ranks.config, ranks, on_progress)

    def _load(
        self, config: EngineConfig, ranks: Ranks | None, on_progress: Callable[[int, int], object] | None
    ) -> None:
        device = choose_device(config.device)
        LOADING_THREADS.set(config.threads)
        use_level(config.cpu_level)

        def weights(done: int, total: int) -> None:
            tell("loading the weights", done, total)
            if on_progress is not None:
                on_progress(done, total)

        with nullcontext() if on_progress is not None else progress_bar():
            tell("reading the model's files")
            loaded = load_any_model(config, device, weights, ranks=None if ranks is None else ranks.collective)
            if ranks is not None:
                ranks.all_loaded(loaded.files)
            self._loaded: LoadedModel | LoadedEncoder | None = loaded
            tell("preparing the steps")
            self._engine: Engine | None = build_engine(config, loaded, ranks)
        self._thread: EngineThread | None = None
        self._manual, self._ranks = False, ranks
        self._ended: list[TokenOutput] = []  # outputs that the next `step` returns first
        self._lock = threading.Lock()  # guards the choice of the thread or of `step`, and closing
        self._finalizer = weakref.finalize(self, shut_down, self._owner, self._engine)
        self._info = model_info(loaded, self._engine)

    @property
    def is_alive(self) -> bool:
        alive = self._engine is not None and (self._thread is None or self._thread.is_alive)
        return alive and not self._is_elsewhere and not (self._ranks is not None and self._ranks.is_dead)

    def add_death_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, from another thread, when one of several ranks dies; at once if one is already dead.

        If the thread of an engine with one rank fails, only `is_alive` shows it.
        """
        if self._ranks is not None:
            self._ranks.add_death_callback(callback)

    def check_structured_outputs(self, params: StructuredOutputsParams) -> None:
        self._check_generates()
        self._working()
        self._require()[0].check_structured_outputs(params)

    async def compile_form(self, params: SamplingParams | None) -> None:
        if isinstance(params, SamplingParams) and params.structured_outputs is not None:
            await asyncio.to_thread(self.check_structured_outputs, params.structured_outputs)

    # ---- a loop of your own ------------------------------------------------------------------------------------------

    @explained(SamplingParams=SamplingParams.__struct_fields__)
    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        **call: Unpack[TextOptions],
    ) -> str:
        """Queue a prompt for `step`; return its request id."""
        engine = self._own_loop()
        request = self._request(prompt, sampling_params, **call)
        if engine.is_sleeping:
            raise EngineSleepingError(SLEEPS)
        engine.add(engine.prepare(request))
        return request.request_id

    def step(self) -> list[TokenOutput]:
        """Run one step of the requests added with `add_request`; return an empty list without work.

        Outputs that `abort`, `sleep` or `read_logits` left come first. If steps overlap (on a GPU), a call launches a
        step before it waits for the previous one, and returns the outputs of the previous step.
        """
        engine = self._own_loop()
        if not self._ended:
            engine.wait(_LOADING)
        ended, self._ended = self._ended, []
        return ended + engine.step()

    def read_logits(self, token_ids: Sequence[int], read: Reader | None, first: int = 0) -> None:
        """Run a text as `step` does; `read` gets the logits after its tokens from index `first` on, as arrays [n, V].

        `read` must copy what it keeps. The next `step` returns the outputs of other requests. Raises RequestError for a
        wrong text, CandleVllmError if the engine sleeps or fails on the text, or if `read` raises.
        """
        self._check_generates()
        engine, text = self._own_loop(), ScoredText(token_ids, read, first)
        check_pooling_request(text.request, self._info.vocab_size, self._info.max_model_len)  # type: ignore[arg-type]
        if engine.is_sleeping:
            raise EngineSleepingError(SLEEPS)
        engine.add([text])
        outputs: list[TokenOutput] = []
        while not text.is_over:
            outputs += engine.step()
        self._ended += [output for output in outputs if output.request_id != text.request.request_id]
        for output in outputs:
            if output.request_id == text.request.request_id:
                raise_failure(output)

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether `step` has work."""
        self._working()
        return bool(self._ended) or self._require()[0].has_work

    def abort(self, request_id: str) -> None:
        self._working()
        if self._thread is not None:
            self._thread.abort(request_id)
        else:
            self._ended += self._require()[0].abort(request_id)

    def reset_prefix_cache(self) -> None:
        self._working()
        (self._thread or self._require()[0]).reset_prefix_cache()

    @property
    def is_sleeping(self) -> bool:
        self._working()
        return (self._thread or self._require()[0]).is_sleeping

    def _sleep(self, level: int, mode: str) -> None:
        if not self._manual:
            super()._sleep(level, mode)
            return
        engine = self._own_loop()
        if mode == "wait" and engine.has_work:
            raise InvalidParameterError("mode 'wait': call step until nothing is unfinished, then sleep", "mode")
        self._ended += engine.sleep(level)

    def _wake_up(self, tags: frozenset[str]) -> None:
        if not self._manual:
            super()._wake_up(tags)
        else:
            self._own_loop().wake_up(sorted(tags))

    def call_adapters(self, call: AdapterCall) -> tuple[AdapterInfo, ...]:
        self._working()
        return self._require()[0].call_adapters(call)

    # ---- lifetime ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        if self._is_elsewhere:  # in a forked process, which lacks the threads and must not wait for the lock
            self._finalizer.detach()
            self._engine = self._loaded = self._thread = None
            return
        with self._lock:
            self._finalizer()
            for memory in () if self._loaded is None else self._loaded.memories:
                memory.end_writer()
            self._engine = self._loaded = self._thread = None
        gc.collect()
        give_back()

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _require(self) -> tuple[Engine, LoadedModel | LoadedEncoder]:
        if self._engine is None or self._loaded is None:
            raise EngineDeadError("the engine is closed")
        return self._engine, self._loaded

    def _running_thread(self) -> EngineThread:
        self._working()  # before the lock, which may be locked after a fork
        with self._lock:
            engine = self._require()[0]
            if self._manual:
                raise EngineDeadError("this engine is driven by add_request and step: use those, or another engine")
            if self._thread is None:
                with room_for("the engine", 0):
                    self._thread = self._make_thread(engine)
                if self._ranks is not None:
                    self._ranks.fail = self._thread.fail
                if engine.adapters is not None:
                    engine.adapters.on_change = self._thread.wake
                self._finalizer.detach()
                self._finalizer = weakref.finalize(self, shut_down, self._owner, self._thread, engine)
            return self._thread

    def _make_thread(self, engine: Engine) -> EngineThread:
        return EngineThread(engine, self.config.max_queued_requests, stream_interval=self.config.stream_interval)

    def _own_loop(self) -> Engine:
        self._working()
        with self._lock:
            if self._thread is not None:
                raise EngineDeadError("this engine runs in its own thread: use generate or stream, or another engine")
            self._manual = True
            return self._require()[0]
