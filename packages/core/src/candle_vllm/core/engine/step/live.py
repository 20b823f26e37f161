# SPDX-License-Identifier: MIT
"""Append a sequence's sampled tokens, find its end, and convert tokens to text (steps 8 and 9 of a request's life)."""

from __future__ import annotations

import bisect
import itertools
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection
from collections.abc import Sequence as Seq
from typing import Any

import msgspec
import numpy as np

from candle_vllm.core.engine.outputs import (
    FinishReason,
    PositionLogprobs,
    PromptProgress,
    RequestMetrics,
    TokenLogprob,
    TokenOutput,
)
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners.model_runner import MAX_SCORED_ROWS, ModelRunner
from candle_vllm.core.engine.step.sequence import Run, Sequence
from candle_vllm.core.errors import RequestError
from candle_vllm.core.sampling.sampler import LogprobRow, SampledToken, Sampler, Token
from candle_vllm.core.sampling.state import SamplingState
from candle_vllm.core.text.detokenizer import Detokenizer
from candle_vllm.core.text.tokenizer import Tokenizer


class Live(ABC):
    """One sequence of a request, from its preparation to its last output; `sequence` is the scheduler's view of it."""

    __slots__ = ("first_scheduled_time", "first_token_time", "is_over", "reported", "sequence")

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.is_over = False  # whether the engine has removed it
        self.reported = 0  # tokens of the prompt in the largest report of progress
        self.first_scheduled_time: float | None = None
        self.first_token_time: float | None = None

    @property
    def request(self) -> GenerationRequest:
        """The request of the sequence."""
        return self.sequence.request

    @property
    @abstractmethod
    def reads_rows(self) -> bool:
        """Whether prompt logprobs or hidden states are read from the rows of this sequence."""

    @abstractmethod
    def read_rows(self, run: Run, offset: int, runner: ModelRunner) -> None:
        """Read prompt logprobs or hidden states of the runner's last step (`ModelRunner.score`); only if `reads_rows`.

        `offset` is the index of the run's first row in the step. Raises RequestError if these values cannot be
        computed.
        """

    def progress(self, tokens: int) -> TokenOutput:
        """Return an output that reports progress: `tokens` of the prompt are in the cache."""
        began = self.first_scheduled_time
        self.reported = tokens
        return self._output(progress=PromptProgress(tokens, 0.0 if began is None else time.monotonic() - began))

    def end(self, reason: FinishReason, failure: RequestError | str | None = None) -> TokenOutput:
        """Return the last output of a sequence that ends without a new token; a `str` is a failure of the engine."""
        return self._output(finish_reason=reason, metrics=self._metrics(), **_error_fields(failure))

    def _output(self, **fields: Any) -> TokenOutput:
        """Return an output with these fields and the fields that all outputs of the sequence share."""
        sequence = self.sequence
        return TokenOutput(
            request_id=sequence.request.request_id,
            index=sequence.index,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=sequence.num_cached_tokens or 0,
            **fields,
        )

    def _metrics(self) -> RequestMetrics:
        return RequestMetrics(
            arrival_time=self.request.arrival_time,
            first_scheduled_time=self.first_scheduled_time,
            first_token_time=self.first_token_time,
            finished_time=time.monotonic(),
        )


def _error_fields(failure: RequestError | str | None) -> dict[str, Any]:
    if isinstance(failure, RequestError):
        return {"error": str(failure), "error_kind": "request", "error_param": failure.param}
    return {} if failure is None else {"error": failure, "error_kind": "engine"}


class LiveSequence(Live):
    """One generated sequence, from its preparation to its last output.

    Args:
        sequence, state: the scheduler's view and the sampling state; from now on they share one list of tokens.
        tokenizer: converts tokens to text, also for log-probabilities.
        eos_token_ids: tokens that end the sequence, unless the request sets `ignore_eos` and has no grammar.
        max_length: total length in tokens, prompt included, at which the sequence ends.
        prediction: the request's predicted output; None without one.

    Attributes:
        draft_tokens: draft tokens that were tried.
        accepted_draft_tokens: tokens of the answer that were accepted draft tokens.
    """

    __slots__ = (
        "_empty", "_ends", "_is_plain", "_max_length", "_notes_texts", "_only_appends", "_texts", "_tokens",
        "accepted_draft_tokens", "detokenizer", "draft_tokens", "eos_token_ids", "prediction", "prompt_logprobs",
        "state", "stop_token_ids", "tokenizer",
    )  # fmt: skip

    def __init__(
        self,
        sequence: Sequence,
        state: SamplingState,
        tokenizer: Tokenizer,
        eos_token_ids: Collection[int],
        max_length: int,
        prediction: Prediction | None = None,
    ) -> None:
        super().__init__(sequence)
        params = sequence.request.params
        self.prediction = prediction
        self.draft_tokens = self.accepted_draft_tokens = 0
        sequence.max_length = max_length
        self.state = state
        self.tokenizer = tokenizer
        self._max_length = max_length
        # A grammar accepts no token after an end token, so `ignore_eos` only delays the end token.
        ends = not params.ignore_eos or state.grammar is not None
        self.eos_token_ids = frozenset(eos_token_ids) if ends else frozenset()
        self.stop_token_ids = frozenset(params.stop_token_ids or ())
        # After any token that is not in `_ends`, only the length, a stop string or a grammar can end the sequence.
        self._ends = self.eos_token_ids | self.stop_token_ids if self.stop_token_ids else self.eos_token_ids
        sequence.tokens = state.tokens  # both use the same list
        self._tokens, self._texts = state.tokens, tokenizer.plain_texts
        # `accept` reads these for nearly every token. A step evicts them from the CPU caches, so they are adjacent.
        self._only_appends = False  # whether `SamplingState.append` changes only `tokens`; False before the first token
        self._is_plain = False  # `Detokenizer.is_plain`
        self._notes_texts = not params.skip_special_tokens
        names = tokenizer.special_token_ids if params.stop_marks else ()
        self.detokenizer = Detokenizer(
            tokenizer,
            prompt_token_ids=sequence.request.prompt_token_ids,
            stops=params.stop_scanner(names) if params.stop else None,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
            continues_prompt=params.continues_prompt,
        )
        self.prompt_logprobs: list[PositionLogprobs | None] = [None]

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.sequence.tokens) - self.sequence.num_prompt_tokens

    def accept(self, drawn: Token) -> TokenOutput:
        """Append a sampled token and return the output; the last one has a finish reason. Raises as `state.append`."""
        tokens = self._tokens
        ends = not self._only_appends or len(tokens) + 1 >= self._max_length
        if ends or not isinstance(drawn, int) or drawn in self._ends:
            return self._accept(SampledToken.of(drawn))
        tokens.append(drawn)
        text = self._texts.get(drawn) if self._is_plain else None
        if text is None:
            detokenizer = self.detokenizer
            text, self._is_plain = detokenizer.add(drawn), detokenizer.is_plain
            if detokenizer.stopped_by is not None:
                return self._piece(text, (drawn,), FinishReason.STOP, detokenizer.stopped_by)
            if detokenizer.special_tokens:
                return self._piece(text, (drawn,))
        elif self._notes_texts:
            self.detokenizer.note_plain(text)
        return msgspec.structs.replace(self._empty, text=text, token_ids=(drawn,))

    def _accept(self, sampled: SampledToken) -> TokenOutput:
        """Append a token for which `accept` has no fast path."""
        if sampled.error is not None:
            return self._failed(sampled)
        token = sampled.token_id
        self.state.append(token)
        self.first_token_time = self.first_token_time or time.monotonic()
        prompt_logprobs = tuple(self.prompt_logprobs) if self.reads_rows and self.num_output_tokens == 1 else None
        logprobs = None if sampled.logprobs is None else (self.describe(sampled.logprobs, sampled=True),)
        reason, stop_reason, text = self._ending(token, self.request.params.include_stop_str_in_output)
        self._is_plain, self._only_appends = self.detokenizer.is_plain, not self.state.notes_tokens
        self._empty = self._output()  # an output without a token
        return self._piece(text, (token,), reason, stop_reason, logprobs=logprobs, prompt_logprobs=prompt_logprobs)

    def _failed(self, sampled: SampledToken) -> TokenOutput:
        """Return the last output of a sequence for which no token could be sampled."""
        grammar = self.state.grammar
        failure = None if grammar is None else grammar.failure
        if failure is None and sampled.by_request:
            by_code = self.state.failure is not None or (grammar is None and self.request.params.logits_processors)
            field = "logits_processors" if by_code else "allowed_token_ids" if grammar is None else "structured_outputs"
            failure = RequestError(f"{field}: {sampled.error}", field)
        return self.end(FinishReason.ERROR, failure or sampled.error)

    def end(self, reason: FinishReason, failure: RequestError | str | None = None) -> TokenOutput:
        """See `Live`; the output includes the text that was held back."""
        return msgspec.structs.replace(self._piece(self.detokenizer.finish(), (), reason), **_error_fields(failure))

    def _metrics(self) -> RequestMetrics:
        times = super()._metrics()
        if not self.draft_tokens and self.prediction is None:
            return times
        predicted, found = 0, 0
        if self.prediction is not None:
            predicted = len(self.prediction.tokens)
            found = self.prediction.found_in(self._tokens[self.sequence.num_prompt_tokens :])
        return msgspec.structs.replace(
            times,
            draft_tokens=self.draft_tokens,
            accepted_draft_tokens=self.accepted_draft_tokens,
            predicted_tokens=predicted,
            accepted_predicted_tokens=found,
        )

    @property
    def reads_rows(self) -> bool:
        return self.request.params.prompt_logprobs is not None and not self.sequence.index

    def read_rows(self, run: Run, offset: int, runner: ModelRunner) -> None:
        """See `Live`; reads log-probabilities of the prompt."""
        top = self.request.params.prompt_logprobs
        assert top is not None
        known = len(self.prompt_logprobs) - 1  # after a preemption the first positions are known already
        last = min(run.start + run.count, self.sequence.num_prompt_tokens - 1)
        for first in range(max(run.start, known), last, MAX_SCORED_ROWS):
            end = min(first + MAX_SCORED_ROWS, last)
            rows = np.arange(offset + first - run.start, offset + end - run.start)
            scored = Sampler.prompt_logprobs(runner.score(rows), self.sequence.tokens[first + 1 : end + 1], top)
            self.prompt_logprobs += [self.describe(row) for row in scored]

    def describe(self, row: LogprobRow, *, sampled: bool = False) -> PositionLogprobs:
        """Convert a row of log-probabilities, of the prompt or of a `sampled` token, with its tokens' texts.

        If the request names the tokens of `sampled` rows, only the row's token has a rank.
        """
        named = sampled and self.request.params.logprob_token_ids
        top = tuple(
            self._logprob(token, value, rank if not named else row.rank if token == row.token_id else 0)
            for rank, (token, value) in enumerate(zip(row.top_ids, row.top_logprobs, strict=True), 1)
        )
        return PositionLogprobs(self._logprob(row.token_id, row.logprob, row.rank), top)

    def _ending(self, token: int, include_stop: bool) -> tuple[FinishReason | None, str | int | None, str]:
        """Return finish reason, stop reason and new text after `token`."""
        enough = self.num_output_tokens >= self.request.params.min_tokens
        exhausted = self.state.grammar is not None and self.state.grammar.exhausted
        ends = token in self.eos_token_ids and (enough or exhausted)
        if ends or (enough and token in self.stop_token_ids):
            text = (self.detokenizer.add(token) if include_stop else "") + self.detokenizer.finish()
            stop_reason = token if enough and token in self.stop_token_ids else None
            return FinishReason.STOP, self.detokenizer.stopped_by or stop_reason, text
        text = self.detokenizer.add(token)
        if self.detokenizer.stopped_by is not None:
            return FinishReason.STOP, self.detokenizer.stopped_by, text
        if exhausted or len(self.sequence.tokens) >= self._max_length:
            text += self.detokenizer.finish()
            if self.detokenizer.stopped_by is not None:
                return FinishReason.STOP, self.detokenizer.stopped_by, text
            return FinishReason.STOP if exhausted else FinishReason.LENGTH, None, text
        return None, None, text

    def _piece(
        self,
        text: str,
        token_ids: tuple[int, ...],
        reason: FinishReason | None = None,
        stop_reason: str | int | None = None,
        **logprobs: Any,
    ) -> TokenOutput:
        """Return an output with the special tokens that the detokenizer has found; the last one has metrics."""
        special_tokens = tuple(self.detokenizer.special_tokens)
        self.detokenizer.special_tokens.clear()
        metrics = None if reason is None else self._metrics()
        ending = {"finish_reason": reason, "stop_reason": stop_reason, "metrics": metrics}
        return self._output(text=text, token_ids=token_ids, special_tokens=special_tokens, **ending, **logprobs)

    def _logprob(self, token: int, value: float, rank: int) -> TokenLogprob:
        data = self.tokenizer.token_bytes(token)
        return TokenLogprob(token, value, rank, data.decode("utf-8", "replace"), data)


class Prediction:
    """Predicted output of a request, a source of draft tokens; its sequences share one.

    The predicted tokens that occur in the answer are also counted.
    """

    def __init__(self, tokens: Seq[int]) -> None:
        self.tokens = tuple(tokens)
        self._pairs: dict[tuple[int, int], list[int]] = defaultdict(list)  # positions at which each pair begins
        for place, pair in enumerate(itertools.pairwise(self.tokens)):
            self._pairs[pair].append(place)

    def found_in(self, answer: Seq[int]) -> int:
        """Count the predicted tokens in passages that the answer shares: at both beginnings, or of two tokens or more.

        The answer is matched along the prediction. After a mismatch, matching resumes at the next occurrence of the
        answer's last two tokens in the prediction, or else at their last earlier occurrence.
        """
        prediction, pairs = self.tokens, self._pairs
        seen, upcoming, inside = set[int](), 0, True
        for place, token in enumerate(answer):
            was_inside = inside and place > 0
            inside = inside and upcoming < len(prediction) and prediction[upcoming] == token
            if not inside and place and (places := pairs.get((answer[place - 1], token))):
                upcoming = places[min(bisect.bisect_left(places, upcoming - 1), len(places) - 1)] + 1
                if not was_inside:  # else the token before was counted at another position
                    seen.add(upcoming - 1)
                inside = True
            if inside:
                seen.add(upcoming)
                upcoming += 1
        return len(seen)
