# SPDX-License-Identifier: MIT
"""An engine that has one token for every stream at every tick of a clock, and writes into the token when that was.

It is a `ScriptedEngine` whose streams run through the real engine's thread and inbox, so that what a token costs on its
way out is what it costs with a model, and nothing else is measured. The text of a token is its time in microseconds of
`time.monotonic()`, which all processes of a machine share; that of a stream's first one begins with the time at which
the engine got the request.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from candle_vllm.core.engine.outputs import FinishReason, RequestMetrics, TokenOutput
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.stats import EngineStats
from candle_vllm.core.engine.step.thread import EngineThread
from candle_vllm.core.engine_front import EngineFront
from candle_vllm.core.testing import ScriptedEngine

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

    stream = EngineFront.stream

    def _require(self) -> tuple[Any, Any]:
        return self._paced, self

    def _running_thread(self) -> EngineThread:
        return self._engine_thread

    def stats(self) -> EngineStats:
        return self._paced.stats()

    def close(self) -> None:
        self._engine_thread.close()
