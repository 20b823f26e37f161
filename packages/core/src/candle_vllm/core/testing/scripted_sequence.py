# SPDX-License-Identifier: MIT
"""Sequences of a `ScriptedEngine`, which follow the real engine's contract."""

from __future__ import annotations

import codecs
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from msgspec.structs import replace

from candle_vllm.core.engine.outputs import (
    FinishReason,
    PositionLogprobs,
    PromptProgress,
    RequestMetrics,
    TokenLogprob,
    TokenOutput,
)
from candle_vllm.core.engine.requests import GenerationRequest

TokenBytes = Callable[[int], bytes]


def made_up_logprobs(
    token_id: int, top: int, token_bytes: TokenBytes, named: Sequence[int] | None = None
) -> PositionLogprobs:
    """Return log-probabilities that depend on the id modulo 16 and fall with the rank; the probabilities sum to < 1."""
    chosen = 0.5 + (token_id % 16) / 64
    others = [one for one in named if one != token_id] if named else [(token_id + rank) % 256 for rank in range(1, top)]
    tokens = [(token_id, chosen)] + [(one, (1 - chosen) * 0.5**rank) for rank, one in enumerate(others, 1)]
    entries = tuple(
        TokenLogprob(
            token, math.log(probability), rank, token_bytes(token).decode("utf-8", "replace"), token_bytes(token)
        )
        for rank, (token, probability) in enumerate(tokens, 1)
    )
    return PositionLogprobs(entries[0], entries if named else entries[:top])


class ScriptedSequence:
    """Produces `steps`, each a list of token ids, then the end token; with `ignore_eos` it begins again.

    Text is held back while it ends inside a character, or might be the beginning of a stop string.
    """

    def __init__(
        self,
        request: GenerationRequest,
        index: int,
        steps: Sequence[Sequence[int]],
        *,
        eos_token_id: int,
        token_bytes: TokenBytes,
        max_tokens: int,
        num_cached_tokens: int = 0,
        special_tokens: Iterable[str] = (),
    ) -> None:
        self._request = request
        self._index = index
        self._script = steps
        self._steps = deque(steps)
        self._eos = eos_token_id
        self._token_bytes = token_bytes
        self._max_tokens = max_tokens
        self._num_cached = num_cached_tokens
        self._num_tokens = 0
        self._stops = request.params.stop_scanner(special_tokens)
        self._text = ""
        self._length = 0  # characters decoded
        self._special: list[tuple[int, int]] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        if request.params.continues_prompt:
            self._decoder.decode(b"".join(map(token_bytes, request.prompt_token_ids[-3:])))
        self._finish: FinishReason | None = None
        self._stop_reason: str | int | None = None

    def next_piece(self, prompt_logprobs: tuple[PositionLogprobs | None, ...] | None) -> TokenOutput:
        """Return the output of the next step."""
        taken: list[int] = []
        for token in self._next_step():
            taken.append(token)
            self._take(token)
            if self._finish is not None:
                break
        count, named = self._request.params.logprobs, self._request.params.logprob_token_ids
        return self._output(
            text=self._taken_text(),
            token_ids=tuple(taken),
            logprobs=None
            if count is None
            else tuple(made_up_logprobs(token, count, self._token_bytes, named) for token in taken),
            prompt_logprobs=prompt_logprobs,
        )

    def progress(self) -> list[TokenOutput]:
        """Return two outputs with `PromptProgress`, before and after the prompt is computed; seconds are made up."""
        tokens = len(self._request.prompt_token_ids)
        reports = PromptProgress(self._num_cached, 0.0), PromptProgress(tokens, 0.25)
        return [replace(self._output(), progress=report) for report in reports]

    def failed(self, message: str, kind: Literal["request", "engine"]) -> TokenOutput:
        """Return the last output of a sequence that fails."""
        self._finish = FinishReason.ERROR
        return replace(self._output(), error=message, error_kind=kind)

    def _next_step(self) -> Sequence[int]:
        if self._steps:
            return self._steps.popleft()
        if self._request.params.ignore_eos:
            self._steps.extend(self._script)
        return [self._eos]

    def _take(self, token: int) -> None:
        params = self._request.params
        self._num_tokens += 1
        may_stop = self._num_tokens > params.min_tokens
        ends = token == self._eos and not params.ignore_eos
        stops = token in (params.stop_token_ids or ())
        if may_stop and (ends or stops):
            self._finish, self._stop_reason = FinishReason.STOP, token if stops else None
        silent = (self._finish and not params.include_stop_str_in_output) or (
            token >= 256 and params.skip_special_tokens
        )
        name = self._token_bytes(token).decode() if token >= 256 else ""
        if silent:
            self._stops.feed("", special=name)
        else:
            text = self._decoder.decode(self._token_bytes(token))
            self._text += self._stops.feed(text, armed=may_stop, special=name)
            self._length += len(text)
            if token >= 256:
                self._special.append((self._length - len(name), token))
        if self._finish is None and self._stops.found is not None:
            self._finish, self._stop_reason = FinishReason.STOP, self._stops.found
            self._decoder.reset()
        if self._finish is None and self._num_tokens >= self._max_tokens:
            self._finish = FinishReason.LENGTH

    def _taken_text(self) -> str:
        """Return the text that can be shown now; at the end of the sequence, all of it."""
        text, self._text = self._text, ""
        if self._finish is not None:
            before = self._stops.found
            text += self._stops.feed(self._decoder.decode(b"", final=True), armed=False) + self._stops.flush()
            if before is None and self._stops.found is not None:
                self._finish, self._stop_reason = FinishReason.STOP, self._stops.found
        return text

    def _output(
        self,
        *,
        text: str = "",
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[PositionLogprobs, ...] | None = None,
        prompt_logprobs: tuple[PositionLogprobs | None, ...] | None = None,
    ) -> TokenOutput:
        arrival = self._request.arrival_time
        special, self._special = tuple(self._special), []
        times = RequestMetrics(arrival, arrival, arrival + 0.25, arrival + 1.0)  # seconds, made up
        return TokenOutput(
            request_id=self._request.request_id,
            index=self._index,
            text=text,
            token_ids=token_ids,
            special_tokens=special,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=self._finish,
            stop_reason=self._stop_reason,
            num_prompt_tokens=len(self._request.prompt_token_ids),
            num_cached_tokens=self._num_cached,
            metrics=times if self._finish is not None else None,
        )
