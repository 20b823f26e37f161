# SPDX-License-Identifier: MIT
"""One step of the engine: schedule, run, sample, commit. Single-threaded; `EngineThread` drives it.

`prepare` and `check_structured_outputs` need no engine state. They, `call_adapters` and `stats` may run in any thread;
all other methods belong to the thread that runs the steps.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any, cast

import msgspec

from candle_vllm.core.engine.adapters.adapter_store import AdapterCall, AdapterStore
from candle_vllm.core.engine.cache.block_tiers import OffloadedBlocks, OffloadedPrefixes
from candle_vllm.core.engine.model_info import AdapterInfo
from candle_vllm.core.engine.outputs import FinishReason, TokenOutput, joined
from candle_vllm.core.engine.runners.images import ImageStore
from candle_vllm.core.engine.runners.model_runner import Launched, ModelRunner
from candle_vllm.core.engine.runners.sleeping import Sleeper
from candle_vllm.core.engine.stats import STATS, EngineStats, Histogram
from candle_vllm.core.engine.step.batch import Batch, BatchBuilder
from candle_vllm.core.engine.step.live import Live, LiveSequence
from candle_vllm.core.engine.step.pooled import PooledText
from candle_vllm.core.engine.step.preparation import Preparation
from candle_vllm.core.engine.step.scheduler import Scheduler, WholeTexts
from candle_vllm.core.engine.step.sequence import Run, Sequence, Step
from candle_vllm.core.errors import CandleVllmError, InvalidParameterError, RequestError
from candle_vllm.core.sampling.sampler import Token
from candle_vllm.core.sampling.state import SamplingState

if TYPE_CHECKING:
    from candle_vllm.core.engine.drafts.drafting import Drafter

logger = logging.getLogger(__name__)
_BLOCK_WAIT = 0.01  # seconds that a step waits for offloaded blocks if nothing else can run
_LOG_INTERVAL = 60.0  # seconds between two log entries for drafting failures of one type


class _Flight(msgspec.Struct, frozen=True, eq=False):
    """A launched, uncommitted step that samples tokens for `lives`; `ahead`: whether `num_ahead` counts the tokens."""

    step: Step
    batch: Batch
    lives: Seq[LiveSequence]
    launched: Launched
    ahead: bool
    began: float  # when the launch began, by `time.monotonic`


@dataclasses.dataclass(eq=False, repr=False)
class Engine:
    """Scheduler, model and the live sequences.

    Args:
        runner: runs the model; with a drafter, only one step may be in flight.
        scheduler: the queues, and the blocks of the cache.
        preparation: turns requests into sequences.
        drafter: proposes draft tokens; None without speculative decoding.
        images: encodes images and holds their embeddings; None for a text-only model.
        offloaded: the offloaded blocks (KV tiers); None without KV offloading.
        sleeper: frees memory and loads it again; None if the model was not loaded from files.

    Attributes:
        adapters: the adapters that requests may name; None without LoRA.
        draft_failures: first message of each exception type that drafting raised; answers continue without drafts.
    """

    runner: ModelRunner
    scheduler: Scheduler | WholeTexts
    preparation: Preparation
    _drafter: Drafter | None = None
    images: ImageStore | None = None
    offloaded: OffloadedBlocks | OffloadedPrefixes | None = None
    sleeper: Sleeper | None = None

    def __post_init__(self) -> None:
        runner, scheduler, preparation = self.runner, self.scheduler, self.preparation
        self.prepare = preparation.prepare
        self.check_structured_outputs = preparation.check_structured_outputs
        self.max_model_len = preparation.max_model_len
        self.adapters: AdapterStore | None = preparation.adapters
        self.cache_bytes = 0  # size of the KV cache, states included; 0 for an encoder
        self.state_bytes = 0  # part of `cache_bytes` for states of layers
        self.index_bytes = 0  # see `CachePlan`
        block_size = scheduler.blocks.block_size if scheduler.blocks.num_blocks else 0
        self._batches = BatchBuilder(
            block_size, runner.step_memory, images=self.images is not None, adapters=self.adapters is not None
        )
        self._sampling: tuple[list[LiveSequence], list[SamplingState]] = ([], [])  # sequences of the last step
        self._max_flights = max(runner.in_flight, 1 + runner.overlaps)  # the step that reaches it collects the oldest
        assert self._drafter is None or self._max_flights == 1
        self._flights: deque[_Flight] = deque()  # in launch order
        self._live: dict[Sequence, Live] = {}
        self._requests: dict[str, list[Live]] = {}
        self._arrivals = 0
        self.draft_failures: dict[type[Exception], str] = {}
        self._last_logged: dict[type[Exception], float] = {}  # when a drafting failure was logged last
        self._counts = Counter(steps=0, prompt_tokens=0, cached_prompt_tokens=0, generation_tokens=0)
        self._step_tokens: Histogram = STATS["step_tokens"].zero.copy()
        self._finished: Counter[str] = Counter()
        self._left: list[TokenOutput] = []  # outputs of a `sleep` that failed, for the next step
        self._waits_since = -1  # `AdapterStore.changes` when all sequences began to wait for adapters; -1 otherwise
        self._changes_seen = -1  # `AdapterStore.changes` when waiting sequences were last checked

    @property
    def max_step_tokens(self) -> int:
        """Maximum number of tokens of one step."""
        return self.scheduler.max_num_batched_tokens

    @property
    def max_num_seqs(self) -> int:
        """Maximum number of sequences of one step."""
        return self.scheduler.max_num_seqs

    @property
    def has_work(self) -> bool:
        """True while any sequence is unfinished, a step is in flight, or outputs are left for the next step."""
        return bool(self._live or self._flights or self._left)

    @property
    def waits(self) -> bool:
        """True while every sequence waits for an adapter to load, so that a step would do nothing."""
        return self.adapters is not None and self._waits_since == self.adapters.changes

    def wait(self, seconds: float) -> None:
        """Wait while `waits` is true, at most `seconds`."""
        if self.adapters is not None and self._waits_since >= 0:
            self.adapters.wait(self._waits_since, seconds)

    def add(self, prepared: Seq[Live]) -> None:
        """Queue a prepared request; its id must not be in use."""
        request_id = prepared[0].request.request_id
        if request_id in self._requests:
            raise InvalidParameterError(f"request id {request_id!r} is in use", "request_id")
        self._requests[request_id] = list(prepared)
        self._waits_since = self._changes_seen = -1
        for live in prepared:
            live.sequence.order = self._arrivals
            self._arrivals += 1
            self._live[live.sequence] = live
            self.scheduler.add(live.sequence)

    def abort(self, request_id: str) -> list[TokenOutput]:
        """End a request now; its blocks are free before the next step. Unknown ids are ignored."""
        lives = [live for live in self._requests.get(request_id, ()) if live.sequence in self._live]
        return [self._finish(live, live.end(FinishReason.ABORT)) for live in lives]

    def reset_prefix_cache(self) -> None:
        """Clear the prefix cache, offloaded blocks included; running sequences keep their blocks."""
        self._forget_prefixes()
        if self.offloaded is not None:
            self.offloaded.reset()

    def _forget_prefixes(self) -> None:
        self.scheduler.blocks.reset_prefix_cache()
        if self.scheduler.states is not None:
            self.scheduler.states.reset()

    def sleep(self, level: int) -> list[TokenOutput]:
        """Free memory; see `Sleeper`. Abort all requests and return their last outputs.

        Raises CandleVllmError if the engine cannot sleep at this level, and no request was aborted; or if memory is too
        small, and the next step returns the last outputs.
        """
        if self.sleeper is None:
            raise CandleVllmError("this engine was not loaded from files, and cannot sleep")
        self.sleeper.check(level)
        for request_id in list(self._requests):
            self._left += self.abort(request_id)
        while self._flights:
            self._left += self._collect()
        self._forget_prefixes()
        if self.offloaded is not None:
            self.offloaded.rest()
        if self._drafter is not None:
            self._drafter.reset()
        self.sleeper.sleep(level)
        outputs, self._left = self._left, []
        return outputs

    @property
    def is_sleeping(self) -> bool:
        """Whether memory that a step needs was freed."""
        return self.sleeper is not None and bool(self.sleeper.asleep)

    def wake_up(self, tags: Seq[str]) -> None:
        """Load freed memory again, see `Sleeper.wake_up`; no request may be added before all of it is loaded."""
        if self.sleeper is not None:
            self.sleeper.wake_up(tags)

    def call_adapters(self, call: AdapterCall) -> tuple[AdapterInfo, ...]:
        """Load, unload, pin or list adapters, from any thread; see `AdapterStore.call`."""
        if self.adapters is None:
            raise InvalidParameterError("adapters are off: load the model with enable_lora=True", "lora_request")
        return self.adapters.call(call)

    def step(self) -> list[TokenOutput]:
        """Run one step; return an output for every sequence that got a token or ended, and reports of prompt progress.

        If steps overlap, it launches a step and commits the previous one, which ran while this one was prepared. If the
        sampling of a token needs the previous token, as with a grammar, the previous step is committed after this
        step's model kernels are launched, and before it samples.

        If several steps may be in flight (pipeline parallelism), it launches one more, and commits the oldest step if
        `in_flight` steps are in flight or no step was launched.
        """
        outputs, self._left = self._left, []
        if self.adapters is not None:
            outputs += self._end_unloadable(self.adapters)
        encodes = self.images is not None and self._encode(self.images, outputs)
        if self.offloaded is not None:
            self.offloaded.take()
        self._waits_since, changes = -1, -1 if self.adapters is None else self.adapters.changes
        began = time.perf_counter()  # in Python 3.11 on Windows, `time.monotonic` counts in units of 16 ms
        flight = self._launch(outputs)
        if flight is not None:
            self._flights.append(flight)
        elif self._live and not self._flights and not outputs:  # a step that failed has outputs
            if self.offloaded is not None and self.offloaded.reads:
                self.offloaded.wait(_BLOCK_WAIT)
            elif not encodes:
                self._waits_since = changes
        if flight is None or len(self._flights) == self._max_flights:
            outputs += self._collect()
        if (drafter := self._drafter) is not None and flight is not None and not drafter.rests(len(flight.lives)):
            self._propose_drafts(drafter, flight, time.perf_counter() - began)
        return outputs

    def _encode(self, images: ImageStore, outputs: list[TokenOutput]) -> bool:
        """Encode a part of an image, if any; append outputs of sequences whose images failed to `outputs`."""
        encodes = images.work(self.scheduler.waiting)
        for sequence in list(self.scheduler.waiting) if images.failures else ():
            if (error := images.failure(sequence)) is not None:
                logger.error("an image could not be encoded", exc_info=error)
                outputs.append(self._fail(sequence, error))
        return encodes

    def _end_unloadable(self, adapters: AdapterStore) -> list[TokenOutput]:
        """End the waiting sequences whose adapters could not be loaded, or do not fit in memory together."""
        if adapters.changes == self._changes_seen:
            return []
        self._changes_seen = adapters.changes
        waiting = [each for each in self.scheduler.waiting if each.entries and not each.adapters]
        refused = [(each, error) for each in waiting if (error := adapters.refusal(each.entries)) is not None]
        return [self._fail(each, error) for each, error in refused]

    def _propose_drafts(self, drafter: Drafter, flight: _Flight, seconds: float) -> None:
        """Propose the drafts of the next step; `seconds` is the duration of this step."""
        assert isinstance(self.scheduler, Scheduler)
        batch, count = flight.batch, len(flight.lives)
        rows = len(batch.sampled_rows)
        drafter.stepped(count if batch.tokens.shape[1] == rows else 0, rows - count, seconds)
        lives = [live for live in flight.lives if not live.is_over]
        try:
            if drafter.reads_states:
                ran = [self._live.get(run.sequence) for run in batch.runs]
                self.scheduler.has_drafts = drafter.propose(lives, batch, ran)
            else:
                self.scheduler.has_drafts = drafter.propose(lives)
        except self.runner.fatal:
            raise
        except Exception as error:  # answers continue without drafts
            now, kind = time.monotonic(), type(error)
            self.draft_failures.setdefault(kind, str(error))
            if now - self._last_logged.get(kind, -math.inf) >= _LOG_INTERVAL:
                self._last_logged[kind] = now
                logger.exception("no drafts for a step of %d sequences", len(lives))
            self.scheduler.has_drafts = False
            for live in lives:
                live.sequence.drafts = ()
            drafter.reset()

    def stats(self) -> EngineStats:
        """Return the current counters and gauges."""
        parts = (self.scheduler, self.offloaded, self.images, self._drafter)
        level = 0 if self.sleeper is None else self.sleeper.level
        own = {**self._counts, "finished": self._finished, "step_tokens": self._step_tokens, "sleep_level": level}
        return EngineStats.snapshot(own, *(part.stats() for part in parts if part is not None))

    def _launch(self, outputs: list[TokenOutput]) -> _Flight | None:
        """Schedule and launch a step; append outputs of failed sequences, and of steps committed here, to `outputs`."""
        scheduled = self.scheduler.schedule()
        if not scheduled:
            return None
        began, several = time.monotonic(), self.runner.in_flight > 1
        before = () if several or not self._flights else self._flights[-1].batch.drawing
        try:
            ends_alone = not scheduled.goes_on and not any(self._live[run.sequence].reads_rows for run in scheduled)
            batch = self._batches.build(scheduled, before, ends_alone=ends_alone)
            if not batch.goes_on:
                lives = cast("list[LiveSequence]", [self._live[item.sequence] for item in batch.drawing])
                self._sampling = lives, [live.state for live in lives]
            lives, states = self._sampling
            self.runner.forward(batch, states)
            if self._flights and not several and any(state.reads_tokens for state in states):
                outputs += self._collect()
            launched = self.runner.draw(states)
        except self.runner.fatal:
            raise
        except Exception as error:
            logger.exception("a step of %d sequences failed", len(scheduled))
            outputs += self._collect()  # the earlier step has not failed
            outputs += [self._fail(item.sequence, error) for item in scheduled if item.sequence in self._live]
            return None
        ahead = self.runner.overlaps or not batch.goes_on  # else the step is committed before the next one is scheduled
        if ahead:
            self.scheduler.launched(scheduled)
            for state in states if self.runner.overlaps else ():
                state.num_ahead += 1
        if batch.num_decodes < len(scheduled) and not several:
            outputs += self._read_prompts(batch, began)
        return _Flight(scheduled, batch, lives, launched, ahead, began)

    def _collect(self) -> list[TokenOutput]:
        """Collect the results of the oldest launched step, if any, and commit it."""
        if not self._flights:
            return []
        flight, outputs = self._flights.popleft(), list[TokenOutput]()
        try:
            sampled = flight.launched.tokens()
        except self.runner.fatal:
            raise
        except Exception as error:
            logger.exception("a step of %d sequences failed", len(flight.batch.runs))
            return [self._fail(item.sequence, error) for item in flight.batch.runs if item.sequence in self._live]
        if self.runner.in_flight > 1 and flight.batch.num_decodes < len(flight.step):
            outputs = self._read_prompts(flight.batch, flight.began)
        return outputs + self._commit(flight, sampled)

    def _commit(self, flight: _Flight, sampled: Seq[Any]) -> list[TokenOutput]:
        """Commit a step: append tokens, find stops, free blocks, publish full blocks.

        `sampled` has a token for each sequence, or in a step with drafts a tuple of tokens.
        """
        self._counts["steps"] += 1
        step, batch = flight.step, flight.batch
        self._step_tokens.observe(sum([run.count for run in step]))
        if flight.ahead:
            for live in flight.lives:
                live.sequence.num_ahead -= 1
                live.state.num_ahead -= self.runner.overlaps
        prompts = step[batch.num_decodes :]
        outputs = self._count_prompts(prompts) if prompts else []
        if batch.drafted:
            self.scheduler.commit([run for run in step if not run.drafts])
            runs = zip(batch.drawing, flight.lives, sampled, strict=True)
            outputs += [self._advance_run(run, live, tokens) for run, live, tokens in runs if not live.is_over]
        else:
            if step.fills or not step.goes_on:
                self.scheduler.commit(step.filling)
            for live, token in zip(flight.lives, sampled, strict=True):
                if live.is_over:  # the sequence has ended since the launch
                    continue
                output = self._accept(live, token)
                outputs.append(output if output.finish_reason is None else self._finish(live, output))
        self._counts["generation_tokens"] += sum([len(output.token_ids) for output in outputs])
        for item in prompts:
            if item.sequence.is_pooled and item.sequence in self._live:
                outputs += self._end_pooled(item)
        return outputs

    def _count_prompts(self, prompts: Seq[Run]) -> list[TokenOutput]:
        """Count the tokens of prompts that a step has completed, and return the reports of progress.

        A prompt recomputed after its first output token does not count. Recomputed tokens are not reported again.
        """
        outputs: list[TokenOutput] = []
        for item in prompts:
            sequence = item.sequence
            live = self._live.get(sequence) if sequence.index == 0 else None
            if live is None or len(sequence.tokens) > sequence.num_prompt_tokens:
                continue
            if item.start + item.count == sequence.num_prompt_tokens:
                self._counts["prompt_tokens"] += sequence.num_prompt_tokens
                self._counts["cached_prompt_tokens"] += sequence.num_cached_tokens or 0
            if sequence.request.params.prompt_progress and item.start + item.count > live.reported:
                outputs.append(live.progress(item.start + item.count))
        return outputs

    def _accept(self, live: LiveSequence, token: Token) -> TokenOutput:
        """Append a token to a sequence; a failure ends only this sequence."""
        try:
            return live.accept(token)
        except Exception as error:
            if not isinstance(error, RequestError):  # as for a grammar that cannot continue
                logger.exception("a token could not be added to its sequence")
            return _failed(live, error)

    def _advance_run(self, run: Run, live: LiveSequence, sampled: Seq[Token]) -> TokenOutput:
        """Append a run's sampled tokens up to the sequence's end; drop the cache rows of the other draft tokens."""
        live.draft_tokens += len(run.drafts)
        outputs: list[TokenOutput] = []
        for token in sampled:
            live.accepted_draft_tokens += bool(outputs)  # a token after the first one follows an accepted draft token
            outputs.append(self._accept(live, token))
            if outputs[-1].finished:
                break
        if run.drafts:
            assert isinstance(self.scheduler, Scheduler)
            self.scheduler.commit_drafts(run)
            if self._drafter is not None:
                self._drafter.tried(len(run.drafts), len(outputs) - 1)
        output = joined(outputs)
        return self._finish(live, output) if output.finished else output

    def _finish(self, live: Live, output: TokenOutput) -> TokenOutput:
        self.scheduler.remove(live.sequence)
        live.is_over = True
        if self._drafter is not None and isinstance(live, LiveSequence):
            self._drafter.forget(live)
        del self._live[live.sequence]
        siblings = self._requests[output.request_id]
        siblings.remove(live)
        if not siblings:
            del self._requests[output.request_id]
        assert output.finish_reason is not None
        self._finished[output.finish_reason.value] += 1
        return output

    def _fail(self, sequence: Sequence, error: Exception) -> TokenOutput:
        live = self._live[sequence]
        return self._finish(live, _failed(live, error))

    def _read_prompts(self, batch: Batch, began: float) -> list[TokenOutput]:
        """Read prompt logprobs and pooled hidden states of a step's rows; return failures and reports of progress."""
        outputs, first = [], batch.num_decodes
        for run, offset in zip(batch.runs[first:], batch.query_start[first:].tolist()):
            live = self._live.get(run.sequence)
            if live is None:  # the sequence ended when an earlier step was committed
                continue
            if live.first_scheduled_time is None:
                if run.sequence.index == 0 and live.request.params.prompt_progress:
                    outputs.append(live.progress(run.start))
                live.first_scheduled_time = began
            if not live.reads_rows:
                continue
            try:
                live.read_rows(run, offset, self.runner)
            except self.runner.fatal:
                raise
            except Exception as error:
                if not isinstance(error, RequestError):
                    logger.exception("prompt logprobs or hidden states of a sequence could not be read")
                outputs.append(self._fail(run.sequence, error))
        return outputs

    def _end_pooled(self, run: Run) -> list[TokenOutput]:
        """Return the output of a pooled text if the step ran its last token."""
        live, sequence = self._live[run.sequence], run.sequence
        if run.start + run.count < sequence.num_prompt_tokens:
            return []
        assert isinstance(live, PooledText)
        try:
            output = live.finish()
        except Exception as error:
            return [self._fail(sequence, error)]
        return [self._finish(live, output)]

    def close(self) -> None:
        """Free the model's caches, and end the threads of the drafter, adapters, KV tiers and grammars."""
        for part in (self._drafter, self.adapters, self.offloaded, self.runner, self.preparation):
            if part is not None:
                part.close()


def _failed(live: Live, error: Exception) -> TokenOutput:
    if isinstance(error, RequestError):
        return live.end(FinishReason.ERROR, error)
    return live.end(FinishReason.ERROR, f"the engine failed on this request: {type(error).__name__}: {error}")
