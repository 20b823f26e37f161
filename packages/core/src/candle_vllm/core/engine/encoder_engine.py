"""EncoderEngine: `Engine`'s place for a model that reads texts whole and generates nothing (steps 4 to 8).

There is no cache and nothing that goes on from step to step: a step takes the waiting texts that its budget of tokens
holds, runs them together, and every one of them ends with its vector or score. `EngineThread` drives it as it drives
`Engine`.
"""

from __future__ import annotations

import dataclasses
import heapq
import logging
import time
from array import array
from collections import Counter
from collections.abc import Sequence as Seq

import msgspec
import torch

from candle_vllm.core.engine.admission import check_encoder_task, check_pooling_request
from candle_vllm.core.engine.pooler import Pooler, as_array
from candle_vllm.core.engine.request import (
    EngineStats,
    FinishReason,
    GenerationRequest,
    PoolingRequest,
    RequestMetrics,
    TokenOutput,
)
from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.models.family import Encoder
from candle_vllm.core.pooling import ModelPooling, PoolingPlan

logger = logging.getLogger(__name__)


class EncoderRunner:
    """Runs an encoder over texts that lie behind each other."""

    def __init__(self, encoder: Encoder, device: torch.device) -> None:
        self.encoder = encoder
        self.device = device

    @torch.inference_mode()
    def run(self, texts: Seq[PoolingRequest]) -> list[torch.Tensor]:
        """Hidden states [L, E] of each text, in fp32."""
        lengths = [len(text.prompt_token_ids) for text in texts]
        ids = [token for text in texts for token in text.prompt_token_ids]
        types = [kind for text, length in zip(texts, lengths) for kind in text.token_type_ids or [0] * length]
        positions = [place for length in lengths for place in range(length)]
        token_ids, places, kinds = (
            torch.tensor(numbers, dtype=torch.int64, device=self.device) for numbers in (ids, positions, types)
        )
        return list(self.encoder.forward(token_ids, places, kinds, lengths).split(lengths))

    @torch.inference_mode()
    def scores(self, first: torch.Tensor) -> torch.Tensor:
        """Scores [R] of the hidden states [R, E] of first tokens."""
        return self.encoder.scores(first)

    def close(self) -> None:
        """Nothing runs beside the caller's thread."""


@dataclasses.dataclass
class EncodedText:
    """One text from admission to its end.

    Attributes:
        request: what was asked for.
        plan: how its vector is made; None where a score is asked for.
        order: number of arrival.
    """

    request: PoolingRequest
    plan: PoolingPlan | None
    order: int = -1

    @property
    def rank(self) -> tuple[int, int]:
        """Sort key: lower runs first."""
        return self.request.priority, self.order

    @property
    def length(self) -> int:
        """Tokens of the text."""
        return len(self.request.prompt_token_ids)


class EncoderEngine:
    """The waiting texts, and what runs them.

    Args:
        runner: the model.
        name: its name, for messages.
        pooling: how its vectors are made; None for a cross-encoder.
        max_model_len: longest text, in tokens.
        max_sequences, max_tokens: of one step; a text that is longer than that alone is run by itself.
    """

    def __init__(
        self,
        runner: EncoderRunner,
        name: str,
        pooling: ModelPooling | None,
        max_model_len: int,
        max_sequences: int,
        max_tokens: int,
    ) -> None:
        self.runner = runner
        self.name = name
        self.pooling = pooling
        self.max_model_len = max_model_len
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self._waiting: dict[str, EncodedText] = {}
        self._arrivals = 0
        self._counts: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()

    cache_bytes = 0  # it has no KV cache

    @property
    def max_num_seqs(self) -> int:
        """Most texts of one step."""
        return self.max_sequences

    @property
    def max_step_tokens(self) -> int:
        """Most tokens of one step, but for a text that is longer."""
        return self.max_tokens

    @property
    def has_work(self) -> bool:
        """True while a text waits."""
        return bool(self._waiting)

    def prepare(self, request: GenerationRequest) -> list[EncodedText]:
        """Checks a request. Thread-safe.

        Raises:
            InvalidParameterError, PromptTooLongError: the model does something else, or cannot take this text.
        """
        config = self.runner.encoder.config
        wanted = request.task if isinstance(request, PoolingRequest) else "generate"
        check_encoder_task(self.name, wanted, scores=self.pooling is None)
        assert isinstance(request, PoolingRequest)
        check_pooling_request(request, config.vocab_size, self.max_model_len)
        if config.token_types == 1:  # it tells no texts of a pair apart, whatever its tokenizer says
            request = msgspec.structs.replace(request, token_type_ids=None)
        if any(not 0 <= kind < config.token_types for kind in request.token_type_ids or ()):
            raise InvalidParameterError(
                f"token_type_ids must be 0 to {config.token_types - 1} for this model", "token_type_ids"
            )
        return [EncodedText(request, None if self.pooling is None else self.pooling.plan(request.pooling))]

    def add(self, prepared: Seq[EncodedText]) -> None:
        """Queues a prepared request; its id must not be in use."""
        (text,) = prepared
        if text.request.request_id in self._waiting:
            raise InvalidParameterError(f"request id {text.request.request_id!r} is in use", "request_id")
        text.order = self._arrivals
        self._arrivals += 1
        self._waiting[text.request.request_id] = text

    def abort(self, request_id: str) -> list[TokenOutput]:
        """Ends a request that has not been run; unknown ids are ignored."""
        text = self._waiting.pop(request_id, None)
        return [] if text is None else [self._end(text, FinishReason.ABORT)]

    def step(self) -> list[TokenOutput]:
        """Runs the next texts; every one of them ends."""
        texts = self._take()
        if not texts:
            return []
        began = time.monotonic()
        self._counts["steps"] += 1
        try:
            hidden = self.runner.run([text.request for text in texts])
            results = self._vectors(texts, hidden) if self.pooling is not None else self._scores(hidden)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            logger.exception("a step of %d texts failed", len(texts))
            results = [error] * len(texts)
        return [self._finish(text, result, began) for text, result in zip(texts, results, strict=True)]

    def stats(self) -> EngineStats:
        """Counters and gauges of now; there is no cache."""
        return EngineStats(
            num_running=0,
            num_waiting=len(self._waiting),
            num_blocks=0,
            num_free_blocks=0,
            block_size=1,
            prompt_tokens=self._counts["prompt"],
            cached_prompt_tokens=0,
            generation_tokens=0,
            finished=dict(self._finished),
            preemptions=0,
            steps=self._counts["steps"],
        )

    def _take(self) -> list[EncodedText]:
        """The next texts in order of priority and arrival, as far as the budget goes; those of one length together."""
        taken: list[EncodedText] = []
        room = self.max_tokens
        for text in heapq.nsmallest(self.max_sequences, self._waiting.values(), key=lambda text: text.rank):
            if taken and text.length > room:
                break
            taken.append(text)
            room -= text.length
        for text in taken:
            del self._waiting[text.request.request_id]
        return sorted(taken, key=lambda text: text.length)

    def _vectors(self, texts: Seq[EncodedText], hidden: Seq[torch.Tensor]) -> list[array[float] | Exception]:
        """The vector of each text, or why there is none."""
        made: list[array[float] | Exception] = []
        for text, states in zip(texts, hidden, strict=True):
            assert text.plan is not None
            pooler = Pooler(text.plan, text.length)
            wanted = pooler.wanted(0, text.length)
            pooler.add(states[wanted.start : wanted.stop])
            try:
                made.append(pooler.vector())
            except Exception as error:  # of this text alone
                made.append(error)
        return made

    def _scores(self, hidden: Seq[torch.Tensor]) -> list[array[float] | Exception]:
        made: list[array[float] | Exception] = []
        for score in self.runner.scores(torch.stack([states[0] for states in hidden])):
            try:
                made.append(as_array(score[None]))
            except Exception as error:
                made.append(error)
        return made

    def _finish(self, text: EncodedText, result: array[float] | Exception, began: float) -> TokenOutput:
        if isinstance(result, Exception):
            message = f"the engine failed on this request: {type(result).__name__}: {result}"
            return self._end(text, FinishReason.ERROR, began, error=message)
        self._counts["prompt"] += text.length
        return self._end(text, FinishReason.STOP, began, pooled=result)

    def _end(
        self,
        text: EncodedText,
        reason: FinishReason,
        began: float | None = None,
        *,
        pooled: array[float] | None = None,
        error: str | None = None,
    ) -> TokenOutput:
        self._finished[reason.value] += 1
        times = RequestMetrics(
            arrival_time=text.request.arrival_time, first_scheduled_time=began, finished_time=time.monotonic()
        )
        return TokenOutput(
            request_id=text.request.request_id,
            finish_reason=reason,
            num_prompt_tokens=text.length,
            metrics=times,
            error=error,
            error_kind=None if error is None else "engine",
            pooled=pooled,
        )
