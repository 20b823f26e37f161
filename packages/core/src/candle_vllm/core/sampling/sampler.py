# SPDX-License-Identifier: MIT
"""Sampler: sample one token per sequence from the logits of a batch (step 7 of a request's life).

    raw log-probabilities -> processors (masks, bias, penalties) -> greedy, or temperature, min_p, top_k, top_p, sample

If a request uses one of llama.cpp's samplers, that chain runs before the token is sampled; it includes top_k, top_p
and min_p. Otherwise order and meaning are as in vLLM; `kernels/sampling` defines the exact rules. A row's token never
depends on other rows.

Shapes: R rows, V vocabulary, T positions of a prompt.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.devices import Device
from candle_vllm.core.errors import RequestError
from candle_vllm.core.kernels import sampling as kernels
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.sampling.chain import surprise
from candle_vllm.core.kernels.sampling.contract import Control
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.processors import apply_processors, mask_rows
from candle_vllm.core.sampling.state import SamplingState, uniforms_ahead


class LogprobRow(msgspec.Struct, frozen=True):
    """The log-probabilities of one position.

    Attributes:
        token_id: the token at this position.
        logprob: natural logarithm of its probability, at most 0.
        rank: 1 for the likeliest token; among equals the lower id comes first, as in `top_ids`.
        top_ids: the requested number of likeliest tokens, descending, without probability 0; or the `named_tokens`.
        top_logprobs: their log-probabilities.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]

    @classmethod
    def of(cls, token_id: int, logit: float, offset: float, rank: int, top: Iterable[tuple[int, float]]) -> LogprobRow:
        """Make an entry from logits.

        Args:
            token_id, logit, rank: the sampled token or the prompt's token at this position, its logit and rank.
            offset: subtracted from a logit to get its log-probability.
            top: ids and logits for `top_ids`; a negative id is padding.
        """
        named = [(token, value) for token, value in top if token >= 0]
        # The offset is rounded, which must not make a probability greater than 1.
        return cls(
            token_id,
            min(logit - offset, 0.0),
            rank,
            [token for token, _ in named],
            [min(value - offset, 0.0) for _, value in named],
        )


def named_tokens(params: SamplingParams, token_id: int) -> list[int]:
    """Return the sampled token and the tokens of `logprob_token_ids`; empty for a request without this list."""
    return list(dict.fromkeys((token_id, *params.logprob_token_ids))) if params.logprob_token_ids else []


def logprob_rows(
    logits: Value, token_ids: Sequence[int], tops: Sequence[int], named: Sequence[Sequence[int]] | None = None
) -> list[LogprobRow]:
    """Compute the log-probabilities of one token per row, and of the row's likeliest tokens.

    Args:
        logits: [R, V] float32, an array or a tensor, each row contiguous and with a finite largest value; not changed.
            On a GPU this waits for the device; only the reported values are copied to the host.
        token_ids: [R] ids below V.
        tops: [R] how many of the likeliest tokens to report.
        named: [R] ids to report instead of the likeliest tokens; empty for the likeliest.
    """
    named = named or [()] * len(token_ids)
    if not isinstance(logits, np.ndarray) and logits.is_cuda:
        return _rows_on_gpu(logits, token_ids, tops, named)
    standing = kernels.stand(logits, np.asarray(token_ids, np.int64), np.asarray(tops, np.int64))
    table = np.asarray(logits)
    return [
        LogprobRow.of(
            token, float(table[at, token]), float(offset), rank, ((i, float(table[at, i])) for i in named[at] or ids)
        )
        for at, (token, offset, rank, ids) in enumerate(
            zip(token_ids, standing.offsets, standing.ranks.tolist(), standing.top_ids.tolist())
        )
    ]


def _rows_on_gpu(
    logits: Value, token_ids: Sequence[int], tops: Sequence[int], named: Sequence[Sequence[int]]
) -> list[LogprobRow]:
    import torch

    with torch.cuda.device(logits.device):  # each thread has its own current device
        ids, asked = (torch.tensor(numbers, device=logits.device) for numbers in (token_ids, tops))
        found = kernels.stand_tensors(logits, ids, asked, max(tops))
        columns = (found.logits, found.offsets, found.ranks, found.top_ids, found.top_logits)
        rows = zip(token_ids, *(column.tolist() for column in columns))
        given = [zip(own, logits[at, list(own)].tolist()) if own else None for at, own in enumerate(named)]
    return [
        LogprobRow.of(token, logit, offset, rank, own or zip(top, values))
        for own, (token, logit, offset, rank, top, values) in zip(given, rows)
    ]


LOGPROB_CHUNK = 1 << 22  # number of logits of a chunk for prompt_logprobs: 16 MB
_BROKEN = "the model gave NaN or infinite logits for this sequence; its files or its data type may be at fault"
_NOTHING = (
    "no token may be chosen: together, allowed_token_ids, bad_words, min_tokens, logits_processors and any grammar "
    "forbid every token; relax one of them"
)


class SampledToken(msgspec.Struct, frozen=True, gc=False):
    """Token sampled for one sequence, with log-probabilities or an error.

    Attributes:
        token_id: the token, or -1 with an error.
        logprobs: log-probabilities if `params.logprobs` asks for them, otherwise None.
        error: why this sequence cannot continue, or None. Other sequences are not affected.
        by_request: whether the request's own parameters caused the error.
    """

    token_id: int
    logprobs: LogprobRow | None = None
    error: str | None = None
    by_request: bool = False

    @classmethod
    def of(cls, token: Token) -> SampledToken:
        """Wrap a plain token id."""
        return cls(token) if isinstance(token, int) else token


Draw = Callable[[Any, NDArray[np.float64]], tuple[NDArray[np.int64], NDArray[np.float32]]]

Token: TypeAlias = int | SampledToken
"""A sampled token: a plain id if it has neither log-probabilities nor an error."""

SampledTokens: TypeAlias = Token | tuple[Token, ...]
"""Result of a run: a token, or with drafts the accepted tokens and the next one; only the last can have an error."""


class Sampler:
    """Sampler of a batch. Each sequence has its `SamplingState`; a batch's parameters are reused while its rows stay.

    Args:
        draw: function that samples; `kernels.draw` by default.
        controls: [maximum rows, 5] memory for the parameters of the next rows; None to allocate it.
        run_controls: memory that `only_samples_runs` writes; None if it always returns False.
    """

    def __init__(
        self,
        draw: Draw | None = None,
        controls: NDArray[np.float64] | None = None,
        run_controls: NDArray[np.float64] | None = None,
    ) -> None:
        self._draw = kernels.draw if draw is None else draw
        self._controls, self._run_controls = controls, run_controls
        self._rows = _Rows([])

    @staticmethod
    def prepare(device: Device) -> None:
        """On the CPU, compile or load the sampling kernels, so that the first request does not wait for them."""
        if device.type == "cpu":
            kernels.prepare()

    def only_samples(self, states: Sequence[SamplingState], *, goes_on: bool) -> bool:
        """Return whether the rows need neither edits nor log-probabilities; if so, write their parameters to controls.

        `goes_on` says whether this method was called for the same rows one position before.
        """
        if not goes_on:
            self._rows_of(states)
        elif self._rows.only_samples:
            self._rows.go_on()
        return self._rows.only_samples

    def only_samples_runs(self, states: Sequence[SamplingState], drafts: Sequence[Sequence[int]]) -> bool:
        """Do what `only_samples` does for the rows of `sample_runs`; their parameters are written to `run_controls`."""
        if self._run_controls is None or not _at_once(states) or any(state.only_masks for state in states):
            return False
        controls = run_controls(states, drafts)
        self._run_controls[: len(controls)] = controls
        return True

    def _rows_of(self, states: Sequence[SamplingState]) -> _Rows:
        """Return the parameters of these rows at their current positions."""
        if self._rows.states == states:
            self._rows.move_on()
        else:
            self._rows = _Rows(states, self._controls)
        return self._rows

    def sample(self, logits: Value, states: Sequence[SamplingState]) -> list[Token]:
        """Sample the next token of each sequence. The caller appends the tokens to the states.

        `logits`, [R, V] float32, are an array or a tensor on any device, and may be overwritten. Returns an entry per
        row, with an `error` if the row has NaN or +inf, no allowed token, or a processor that failed.
        """
        if not states:
            return []
        rows = self._rows_of(states)
        assert logits.shape == (len(states), rows.vocab_size)
        with _without_gradients(logits):
            logits = _in_one_piece(logits)
            raw = _in_one_piece(logits[rows.asking], fetched=True) if rows.asking else None
            if rows.may_edit:
                apply_processors(logits, states)
            ids, largest = self._draw(logits, rows.controls)
            tokens = sampled_tokens(ids.tolist(), largest.tolist())
            if rows.settling:
                commit_sampled(tokens, logits, rows.settling, states)
            if raw is not None:
                _add_logprobs(tokens, raw, rows.asking, states)
            return tokens

    def sample_runs(
        self, logits: Value, states: Sequence[SamplingState], drafts: Sequence[Sequence[int]]
    ) -> list[tuple[Token, ...]]:
        """Verify draft tokens: sample each row, and accept drafts while they equal the sampled tokens.

        The tokens and their random numbers are the same as those of `sample` called once per token.

        Args:
            logits: [sum of 1 + drafts, V] as for `sample`; the rows of each sequence are consecutive.
            states: one per sequence; unchanged when this returns.
            drafts: draft tokens of each sequence: the inputs of its rows after the first.
        """
        if _at_once(states):
            return self._sample_runs(logits, states, drafts)
        if any(state.grammar is not None and own for state, own in zip(states, drafts, strict=True)):
            return self._sample_apart(logits, states, drafts)
        return self._sample_in_turn(logits, states, drafts)

    def _sample_in_turn(
        self, logits: Value, states: Sequence[SamplingState], drafts: Sequence[Sequence[int]]
    ) -> list[tuple[Token, ...]]:
        """Do what `sample_runs` does for sequences whose edits of logits depend on the token of the row before."""
        drawn: list[list[Token]] = [[] for _ in states]
        first = np.cumsum([0, *(1 + len(own) for own in drafts)])
        taken = [0] * len(states)
        thoughts = [copy.copy(state.thoughts) for state in states]
        depth, going = 0, list(range(len(states)))
        while going:
            tokens = self.sample(logits[[first[run] + depth for run in going]], [states[run] for run in going])
            onward = []
            for run, token in zip(going, tokens):
                drawn[run].append(token)
                state, own = states[run], drafts[run]
                drafted = depth < len(own) and SampledToken.of(token).token_id == own[depth]
                if drafted and state.may_take(own[depth]):
                    state.append(own[depth])
                    taken[run] += 1
                    if state.grammar is None or not state.grammar.exhausted:
                        onward.append(run)
            depth, going = depth + 1, onward
        for state, count, before in zip(states, taken, thoughts):
            state.rollback(count, before)
        return [tuple(tokens) for tokens in drawn]

    def _sample_apart(
        self, logits: Value, states: Sequence[SamplingState], drafts: Sequence[Sequence[int]]
    ) -> list[tuple[Token, ...]]:
        """Do what `sample_runs` does: first all sequences whose rows are independent, then the others row by row."""
        first = np.cumsum([0, *(1 + len(own) for own in drafts)])
        drawn: list[tuple[Token, ...]] = [()] * len(states)
        apart = [_at_once([state]) for state in states]
        for at_once in (True, False):
            group = [run for run, each in enumerate(apart) if each is at_once]
            rows = [row for run in group for row in range(first[run], first[run + 1])]
            mine = [states[run] for run in group], [drafts[run] for run in group]
            sample = self._sample_runs if at_once else self._sample_in_turn
            for run, tokens in zip(group, sample(logits[rows], *mine) if group else (), strict=True):
                drawn[run] = tokens
        return drawn

    def _sample_runs(
        self, logits: Value, states: Sequence[SamplingState], drafts: Sequence[Sequence[int]]
    ) -> list[tuple[Token, ...]]:
        """Do what `sample_runs` does for sequences whose logits nothing or only a grammar edits: all rows at once."""
        with _without_gradients(logits):
            logits = _in_one_piece(logits)
            counted = _mask_runs(logits, states, drafts)
            ids, largest = self._draw(logits, np.array(run_controls(states, drafts)))
            return right_runs(sampled_tokens(ids.tolist(), largest.tolist()), drafts, counted)

    @staticmethod
    def look_ahead(states: Sequence[SamplingState], drafts: Sequence[Sequence[int]]) -> None:
        """Begin to compute the grammars' masks for `sample_runs` while the logits are computed."""
        for state, own in zip(states, drafts, strict=True):
            if own and state.grammar is not None and _at_once([state]):
                state.grammar.look_ahead(own)

    @staticmethod
    def prompt_logprobs(logits: Value, next_token_ids: Sequence[int], top: int) -> list[LogprobRow]:
        """Compute the log-probabilities of a prompt's tokens in bounded memory.

        Args:
            logits: [T, V] float32, an array or a tensor on any device, one row per position; not changed.
            next_token_ids: [T] the prompt's token after each position, below V.
            top: number of likeliest tokens to report.

        Raises:
            RequestError: a row holds NaN or +inf, or only -inf.
        """
        assert len(logits) == len(next_token_ids)
        rows: list[LogprobRow] = []
        step = max(1, LOGPROB_CHUNK // max(1, logits.shape[1]))
        for start in range(0, len(logits), step):
            chunk = _in_one_piece(logits[start : start + step])
            largest = chunk.max(1) if isinstance(chunk, np.ndarray) else chunk.amax(1).cpu()
            if not np.isfinite(largest).all():
                raise RequestError(_BROKEN, "prompt_logprobs")
            ids = next_token_ids[start : start + step]
            rows += logprob_rows(chunk, ids, [top] * len(ids))
        return rows


def _at_once(states: Sequence[SamplingState]) -> bool:
    """Return whether all rows of a run can be sampled at once: no edit depends on the token of the row before."""
    return not any(
        state.params.logprobs is not None or ((state.may_edit or state.reads_tokens) and not state.only_masks)
        for state in states
    )


def run_controls(states: Sequence[SamplingState], drafts: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
    """Return the parameters of the rows of runs, see `kernels.Control`."""
    rows: list[tuple[float, ...]] = []
    for state, own in zip(states, drafts, strict=True):
        numbers = [0.5] * (1 + len(own)) if state.params.greedy else state.uniforms(1 + len(own))
        rows += [(*state.controls, number) for number in numbers]
    return rows


def right_runs(
    tokens: Sequence[Token], drafts: Sequence[Sequence[int]], counted: Sequence[int] | None = None
) -> list[tuple[Token, ...]]:
    """Return the tokens of each run: its accepted drafts and the token after them.

    `tokens` are those of the rows of all runs; `counted` bounds the accepted drafts of each run, None does not.
    """
    drawn: list[tuple[Token, ...]] = []
    first = 0
    for run, own in enumerate(drafts):
        right, last = 0, len(own) if counted is None else counted[run]
        while right < last and tokens[first + right] == own[right]:
            right += 1
        drawn.append(tuple(tokens[first : first + right + 1]))
        first += 1 + len(own)
    return drawn


def _mask_runs(logits: Value, states: Sequence[SamplingState], drafts: Sequence[Sequence[int]]) -> list[int]:
    """Apply the grammars' masks to the rows of runs; return how many drafts of each run may be accepted."""
    counted, first = [len(own) for own in drafts], 0
    masked: dict[int, NDArray[np.int32]] = {}
    for run, (state, own) in enumerate(zip(states, drafts, strict=True)):
        if state.grammar is not None:
            masks = state.grammar.masks_ahead() if own else []
            masked |= dict(enumerate([state.grammar.bits(), *masks], first))
            counted[run] = len(masks)
        first += 1 + len(own)
    mask_rows(logits, masked)
    return counted


class _Rows:
    """Sampling parameters of the rows of a batch, reused while the batch stays the same.

    Attributes:
        asking: rows with log-probabilities.
        settling: rows that need `commit_sampled` after sampling.
        only_samples: whether no row has log-probabilities or edits.
        controls: [R, 5] parameters at the current positions.
    """

    def __init__(self, states: Sequence[SamplingState], place: NDArray[np.float64] | None = None) -> None:
        self.states = list(states)
        (self.vocab_size,) = {state.vocab_size for state in states} or {0}
        self.asking = [row for row, state in enumerate(states) if state.params.logprobs is not None]
        self.may_edit = any(state.may_edit for state in states)
        params = [state.params for state in states]
        self.settling = [row for row, each in enumerate(params) if each.mirostat or each.logits_processors]
        self.only_samples = not (self.asking or self.may_edit)
        self.controls = controls(states)
        if place is not None:
            place[: len(states)] = self.controls
            self.controls = place[: len(states)]
        self._random = [(row, state) for row, state in enumerate(states) if not state.params.greedy]
        # Random numbers of the next positions, the first position, and their column in `controls`: see `go_on`.
        self._ahead, self._begin = memoryview(b""), 0
        self._column = self.controls.reshape(-1).data[Control.UNIFORM :: len(Control)]

    def move_on(self) -> None:
        """Update the random numbers for other positions of the same rows; the other parameters stay."""
        for row, state in self._random:
            self.controls[row, Control.UNIFORM] = state.uniform()
        self._ahead = memoryview(b"")

    def go_on(self) -> None:
        """Move each row to the next position: copy random numbers that were computed ahead."""
        if not self._random:
            return
        count, position = len(self.states), self._random[0][1].position
        place = (position - self._begin) * count
        if not 0 <= place < len(self._ahead):
            self._ahead, self._begin, place = uniforms_ahead(self.states).reshape(-1).data, position, 0
        self._column[:] = self._ahead[place : place + count]


def _in_one_piece(logits: Value, *, fetched: bool = False) -> Value:
    """Return logits with contiguous rows: an array for CPU functions, otherwise a tensor (on the CPU if `fetched`)."""
    host = kernels.host_rows(logits)
    if host is not None:
        return host if host.strides[1] == host.itemsize else np.ascontiguousarray(host)
    assert logits.is_floating_point()
    assert logits.itemsize == 4
    return (logits.cpu() if fetched else logits).contiguous()


def _without_gradients(logits: Value) -> AbstractContextManager[object]:
    if isinstance(logits, np.ndarray):
        return contextlib.nullcontext()
    import torch

    return torch.inference_mode()


def controls(states: Sequence[SamplingState]) -> NDArray[np.float64]:
    """Return the parameters [R, 5] of these sequences at their current positions, see `kernels.Control`."""
    return np.array([(*state.controls, 0.5 if state.params.greedy else state.uniform()) for state in states])


def sampled_tokens(token_ids: Sequence[int], largest: Sequence[float]) -> list[Token]:
    """Return the sampled tokens, or an error for a row whose largest logit is not finite."""
    if math.isfinite(sum(largest)):  # then all of them are finite
        return list(token_ids)
    return [_sampled_token(token, peak) for token, peak in zip(token_ids, largest, strict=True)]


def commit_sampled(tokens: list[Token], logits: Value, rows: Sequence[int], states: Sequence[SamplingState]) -> None:
    """Pass the tokens' surprise to mirostat; replace the tokens of rows whose logits processor failed by errors."""
    for row in rows:
        state, token = states[row], tokens[row]
        if state.failure is not None:
            tokens[row] = SampledToken(-1, error=state.failure, by_request=True)
        elif state.params.mirostat and isinstance(token, int):
            bits = surprise(np.asarray(logits[row]), token, state.controls[0])
            state.note_surprise(bits, state.position)


def _sampled_token(token_id: int, largest: float) -> Token:
    if largest == -math.inf:
        return SampledToken(-1, error=_NOTHING, by_request=True)
    if not math.isfinite(largest):
        return SampledToken(-1, error=_BROKEN)
    return token_id


def _add_logprobs(tokens: list[Token], raw: Value, asking: list[int], states: Sequence[SamplingState]) -> None:
    sound = [(place, row, token) for place, row in enumerate(asking) if isinstance(token := tokens[row], int)]
    if not sound:
        return
    if len(sound) < len(asking):
        raw = raw[[place for place, _, _ in sound]]
    asked = [states[row].params.logprobs or 0 for _, row, _ in sound]
    named = [named_tokens(states[row].params, token) for _, row, token in sound]
    for (_, row, token), entry in zip(sound, logprob_rows(raw, [token for _, _, token in sound], asked, named)):
        tokens[row] = SampledToken(token, entry)
