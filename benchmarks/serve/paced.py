# SPDX-License-Identifier: MIT
"""An engine that has one token for every stream at every tick of a clock, and writes into the token when that was.

It is a `ScriptedEngine` whose streams run through the real engine's thread and inbox, so that what a token costs on its
way out is what it costs with a model, and nothing else is measured. The text of a token is its time in microseconds of
`time.monotonic()`, which all processes of a machine share; that of a stream's first one begins with the time at which
the engine got the request.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from candle_vllm.core.engine.outputs import FinishReason, RequestMetrics, TokenOutput
from candle_vllm.core.engine.requests import GenerationRequest, LoRARequest
from candle_vllm.core.engine.stats import EngineStats
from candle_vllm.core.engine.step.request_watchers import RequestInfo, RequestWatcher, watched_submit
from candle_vllm.core.engine.step.stream import RequestSink, TokenStream
from candle_vllm.core.engine.step.thread import EngineThread
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.core.text.prompts import read_prompt

MAX_STREAMS = 4096
CONTEXT = 1 << 20  # tokens; a benchmark of ten minutes at 100 tokens/s has 60,000 in a stream


@dataclass
class _Live:
    """A stream that has not ended."""

    request: GenerationRequest
    most: int
    made: int = 0
    since: float = 0.0


class PacedSteps:
    """What `EngineThread` drives: a step waits for the next tick, then makes a token for every stream.

    Args:
        rate: ticks per second.
    """

    def __init__(self, rate: float) -> None:
        self.max_model_len = CONTEXT
        self.max_step_tokens = CONTEXT
        self._pause = 1 / rate
        self._next = 0.0
        self._live: dict[str, _Live] = {}
        self._steps = self._tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    waits = False

    def prepare(self, request: GenerationRequest) -> Sequence[_Live]:
        return [_Live(request, request.params.max_tokens or CONTEXT)]

    def add(self, prepared: Sequence[_Live]) -> None:
        for live in prepared:
            self._live[live.request.request_id] = live

    def abort(self, request_id: str) -> list[TokenOutput]:
        live = self._live.pop(request_id, None)
        return [] if live is None else [TokenOutput(request_id=request_id, finish_reason=FinishReason.ABORT)]

    def reset_prefix_cache(self) -> None: ...

    def sleep(self, level: int) -> list[TokenOutput]:
        raise NotImplementedError

    def wake_up(self, tags: Sequence[str]) -> None:
        raise NotImplementedError

    def step(self) -> list[TokenOutput]:
        now = time.monotonic()
        self._next = max(self._next + self._pause, now - self._pause)  # late ticks are made up for, one of them
        if self._next > now:
            time.sleep(self._next - now)
        now = time.monotonic()
        self._steps += 1
        self._tokens += len(self._live)
        return [self._piece(live, now) for live in list(self._live.values())]

    def _piece(self, live: _Live, now: float) -> TokenOutput:
        live.made += 1
        request, finish, times = live.request, None, None
        text = f" {now * 1e6:.0f}"
        if live.made == 1:
            live.since = now
            text = f" {request.arrival_time * 1e6:.0f}:{now * 1e6:.0f}"
        if live.made == live.most:
            finish = FinishReason.LENGTH
            times = RequestMetrics(request.arrival_time, request.arrival_time, live.since, now)
            del self._live[request.request_id]
        return TokenOutput(
            request_id=request.request_id,
            text=text,
            token_ids=(32,),
            finish_reason=finish,
            num_prompt_tokens=len(request.prompt_token_ids),
            metrics=times,
        )

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._live),
            num_waiting=0,
            num_blocks=0,
            num_free_blocks=0,
            block_size=16,
            prompt_tokens=0,
            cached_prompt_tokens=0,
            generation_tokens=self._tokens,
            finished={},
            preemptions=0,
            steps=self._steps,
        )


class PacedEngine(ScriptedEngine):
    """A model whose streams all keep one rate.

    Args:
        rate: tokens per second of every stream.
    """

    def __init__(self, rate: float) -> None:
        super().__init__(name="paced", max_model_len=CONTEXT)
        self._info = msgspec.structs.replace(self._info, max_num_seqs=MAX_STREAMS)
        self._paced = PacedSteps(rate)
        self._engine_thread = EngineThread(self._paced, MAX_STREAMS)

    @property
    def is_alive(self) -> bool:
        return self._engine_thread.is_alive

    def stream(
        self,
        prompt: str | Sequence[int] | Mapping[str, Any],
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        add_special_tokens: bool = True,
        watcher: RequestWatcher | None = None,
        lora_request: Sequence[tuple[LoRARequest, float]] = (),
    ) -> TokenStream:
        """As `InferenceEngine.stream`."""
        params = sampling_params or SamplingParams()
        request_id = request_id or uuid.uuid4().hex
        text, ids, _ = read_prompt(prompt)
        info = RequestInfo(request_id, "generate", prompt, params, self.detokenize, lora_request)
        with watched_submit(watcher, info) as watch:
            request = GenerationRequest(
                request_id=request_id,
                prompt_token_ids=self.tokenize(text or "", add_special_tokens) if ids is None else ids,
                params=params,
                priority=priority,
                adapters=tuple(adapter.use(scale) for adapter, scale in lora_request),
            )
            thread, loop = self._engine_thread, asyncio.get_running_loop()
            sink = RequestSink(loop, params.n, lambda sink: thread.abort(request_id, sink), watch)
            thread.submit(self._paced.prepare(request), sink)
        return TokenStream(request, sink)

    def stats(self) -> EngineStats:
        return self._paced.stats()

    def close(self) -> None:
        self._engine_thread.close()
