# SPDX-License-Identifier: MIT
"""Sampler: logits of a batch to one token per sequence (step 7 of ten).

    raw log-probabilities -> processors (masks, bias, penalties) -> greedy, or temperature, min_p, top_k, top_p, draw

Where a request asks for a sampler of llama.cpp's, that chain comes before the draw, with top_k, top_p and min_p in it.

The order and the meanings are vLLM's; `kernels/sampling` states the rules to the letter. A feature that a row does not
use costs it nothing, and a row's token never depends on its neighbours.

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
from candle_vllm.core.sampling.processors import apply_processors, mask_rows
from candle_vllm.core.sampling.state import SamplingState, uniforms_ahead


class LogprobRow(msgspec.Struct, frozen=True):
    """The log-probabilities of one position.

    Attributes:
        token_id: the token that stands there.
        logprob: natural logarithm of its probability, at most 0.
        rank: 1 for the likeliest token; among equals the lower id comes first, as in `top_ids`.
        top_ids: the likeliest tokens in falling order, as many as asked for; tokens of probability 0 are left out.
        top_logprobs: their log-probabilities.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]

    @classmethod
    def of(cls, token_id: int, logit: float, offset: float, rank: int, top: Iterable[tuple[int, float]]) -> LogprobRow:
        """An entry from logits.

        Args:
            token_id, logit, rank: of the token that stands there.
            offset: what is taken off a logit to make it a logarithm.
            top: ids and logits of the likeliest; an id below 0 is none.
        """
        named = [(token, value) for token, value in top if token >= 0]
        # The offset is rounded: that must not make a probability greater than 1.
        return cls(
            token_id,
            min(logit - offset, 0.0),
            rank,
            [token for token, _ in named],
            [min(value - offset, 0.0) for _, value in named],
        )


def logprob_rows(logits: Value, token_ids: Sequence[int], tops: Sequence[int]) -> list[LogprobRow]:
    """One entry per row.

    Args:
        logits: [R, V] float32, an array or a tensor, each row contiguous and with a finite largest value; not changed.
            On a GPU this waits for it, and only what is named comes back.
        token_ids: [R] ids below V.
        tops: [R] how many of the likeliest tokens to report.
    """
    if not isinstance(logits, np.ndarray) and logits.is_cuda:
        return _rows_on_gpu(logits, token_ids, tops)
    standing = kernels.stand(logits, np.asarray(token_ids, np.int64), np.asarray(tops, np.int64))
    table = np.asarray(logits)
    return [
        LogprobRow.of(token, float(table[at, token]), float(offset), rank, ((i, float(table[at, i])) for i in ids))
        for at, (token, offset, rank, ids) in enumerate(
            zip(token_ids, standing.offsets, standing.ranks.tolist(), standing.top_ids.tolist())
        )
    ]


def _rows_on_gpu(logits: Value, token_ids: Sequence[int], tops: Sequence[int]) -> list[LogprobRow]:
    import torch

    with torch.cuda.device(logits.device):  # the engine's thread has a device of its own
        ids, asked = (torch.tensor(numbers, device=logits.device) for numbers in (token_ids, tops))
        found = kernels.stand_tensors(logits, ids, asked, max(tops))
        columns = (found.logits, found.offsets, found.ranks, found.top_ids, found.top_logits)
        rows = zip(token_ids, *(column.tolist() for column in columns))
    return [
        LogprobRow.of(token, logit, offset, rank, zip(top, values)) for token, logit, offset, rank, top, values in rows
    ]


LOGPROB_CHUNK = 1 << 22  # logits worked on at a time for prompt_logprobs: 16 MB
_BROKEN = "the model gave NaN or infinite logits for this sequence; its files or its data type may be at fault"
_NOTHING = (
    "no token may be chosen: together, allowed_token_ids, bad_words, min_tokens and any grammar forbid every token; "
    "relax one of them"
)


class SampledToken(msgspec.Struct, frozen=True, gc=False):
    """The token chosen for one sequence.

    Attributes:
        token_id: the token, or -1 where there is an error.
        logprobs: where `params.logprobs` asks for them.
        error: why this sequence cannot go on, or None. Its neighbours are not affected.
        by_request: the error follows from the request's own parameters.
    """

    token_id: int
    logprobs: LogprobRow | None = None
    error: str | None = None
    by_request: bool = False

    @classmethod
    def of(cls, token: Token) -> SampledToken:
        """A token, with what there is to be said of it."""
        return cls(token) if isinstance(token, int) else token


Draw = Callable[[Any, NDArray[np.float64]], tuple[NDArray[np.int64], NDArray[np.float32]]]

Token: TypeAlias = int | SampledToken
"""A token that was drawn, and no more than its id where there is nothing else to be said of it."""

Drawn: TypeAlias = Token | tuple[Token, ...]
"""What was drawn for one run of a sequence; in a step with drafts, of each run the tokens that follow each other. Where
the last has an error, nothing can."""


class Sampler:
    """Chooses tokens. What must last is in each `SamplingState`; rows' parameters are kept as long as the rows are.

    Args:
        draw: as `kernels.draw`, which it is where nothing else is given.
        controls: [most, 5] where the parameters of the rows that are drawn next are to stand; None for anywhere.
        run_controls: the same where the rows are those of runs.
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
        """Compiles or loads what sampling needs on a device, so that the first request does not wait for it."""
        if device.type == "cpu":
            kernels.prepare()

    def only_draws(self, states: Sequence[SamplingState], *, goes_on: bool) -> bool:
        """Whether rows are drawn from as they are, and nothing is asked of them; if so, `controls` are theirs now.

        Args:
            states: one per row.
            goes_on: this was said of the same rows when each was at the position before.
        """
        if not goes_on:
            self._rows_of(states)
        elif self._rows.only_draws:
            self._rows.go_on()
        return self._rows.only_draws

    def only_draws_runs(self, states: Sequence[SamplingState], drafts: Sequence[Sequence[int]]) -> bool:
        """As `only_draws`, of the rows of runs, see `sample_runs`; if so, `run_controls` are theirs now."""
        if self._run_controls is None or not _at_once(states) or any(state.only_masks for state in states):
            return False
        controls = run_controls(states, drafts)
        self._run_controls[: len(controls)] = controls
        return True

    def _rows_of(self, states: Sequence[SamplingState]) -> _Rows:
        """What these rows ask for at their present positions."""
        if self._rows.states == states:
            self._rows.move_on()
        else:
            self._rows = _Rows(states, self._controls)
        return self._rows

    def sample(self, logits: Value, states: Sequence[SamplingState]) -> list[Token]:
        """Chooses the next token of each sequence. The caller appends it to the state.

        Args:
            logits: [R, V] float32, an array or a tensor on any device; may be overwritten.
            states: one per row.

        Returns:
            One entry per row. A row with NaN or +inf, and a row in which every token is forbidden, has an `error`.
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
            tokens = drawn_tokens(ids.tolist(), largest.tolist())
            if rows.settling:
                settle_drawn(tokens, logits, rows.settling, states)
            if raw is not None:
                _add_logprobs(tokens, raw, rows.asking, states)
            return tokens

    def sample_runs(
        self, logits: Value, states: Sequence[SamplingState], drafts: Sequence[Sequence[int]]
    ) -> list[tuple[Token, ...]]:
        """Chooses the next tokens of each sequence, as far as its drafts are right: those of `sample`, one at a time.

        A row counts where the draft in it is what was drawn before it. So the tokens, and the random numbers behind
        them, are those of as many steps.

        Args:
            logits: [sum of 1 + drafts, V] as for `sample`; the rows of each sequence behind each other.
            states: one per sequence; as they were when this returns.
            drafts: of each sequence, what is in its rows behind the first.
        """
        if _at_once(states):
            return self._draw_runs(logits, states, drafts)
        if any(state.grammar is not None and own for state, own in zip(states, drafts, strict=True)):
            return self._sample_apart(logits, states, drafts)
        return self._sample_in_turn(logits, states, drafts)

    def _sample_in_turn(
        self, logits: Value, states: Sequence[SamplingState], drafts: Sequence[Sequence[int]]
    ) -> list[tuple[Token, ...]]:
        """As `sample_runs`, where what a row may give follows from what the row before it gave."""
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
        """As `sample_runs`: those that can be drawn at once, and then the others."""
        first = np.cumsum([0, *(1 + len(own) for own in drafts)])
        drawn: list[tuple[Token, ...]] = [()] * len(states)
        apart = [_at_once([state]) for state in states]
        for at_once in (True, False):
            group = [run for run, each in enumerate(apart) if each is at_once]
            rows = [row for run in group for row in range(first[run], first[run + 1])]
            mine = [states[run] for run in group], [drafts[run] for run in group]
            sample = self._draw_runs if at_once else self._sample_in_turn
            for run, tokens in zip(group, sample(logits[rows], *mine) if group else (), strict=True):
                drawn[run] = tokens
        return drawn

    def _draw_runs(
        self, logits: Value, states: Sequence[SamplingState], drafts: Sequence[Sequence[int]]
    ) -> list[tuple[Token, ...]]:
        """As `sample_runs`, where nothing but a grammar changes rows: all at once, no row waits for another."""
        with _without_gradients(logits):
            logits = _in_one_piece(logits)
            counted = _mask_runs(logits, states, drafts)
            ids, largest = self._draw(logits, np.array(run_controls(states, drafts)))
            return right_runs(drawn_tokens(ids.tolist(), largest.tolist()), drafts, counted)

    @staticmethod
    def look_ahead(states: Sequence[SamplingState], drafts: Sequence[Sequence[int]]) -> None:
        """Begins what `sample_runs` of these needs, while their logits are made."""
        for state, own in zip(states, drafts, strict=True):
            if own and state.grammar is not None and _at_once([state]):
                state.grammar.look_ahead(own)

    @staticmethod
    def prompt_logprobs(logits: Value, next_token_ids: Sequence[int], top: int) -> list[LogprobRow]:
        """Log-probabilities of the tokens of a prompt, in bounded memory.

        Args:
            logits: [T, V] float32, an array or a tensor on any device, one row per position; not changed.
            next_token_ids: [T] the prompt's token after each position, below V.
            top: how many of the likeliest tokens to report.

        Raises:
            RequestError: a row holds NaN or +inf.
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
    """Whether each row of a run can be drawn from before it is known what the row before it gave."""
    return not any(
        state.params.logprobs is not None or ((state.may_edit or state.reads_tokens) and not state.only_masks)
        for state in states
    )


def run_controls(states: Sequence[SamplingState], drafts: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
    """Parameters of the rows of runs, see `kernels.Control`."""
    rows: list[tuple[float, ...]] = []
    for state, own in zip(states, drafts, strict=True):
        count = 1 + len(own)
        if state.params.greedy:
            rows += [(*state.controls, 0.5)] * count
        else:
            rows += [(*state.controls, number) for number in state.uniforms(count)]
    return rows


def right_runs(
    tokens: Sequence[Token], drafts: Sequence[Sequence[int]], counted: Sequence[int] | None = None
) -> list[tuple[Token, ...]]:
    """What was drawn for each of some runs: as far as its drafts are right, and one token more.

    Args:
        tokens: what was drawn from the rows of all runs.
        drafts: of each run, what is in its rows behind the first.
        counted: how many drafts of each may be right; None for all.
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
    """Has the grammars' masks applied to the rows of runs; of each, the place of its last row that counts."""
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
    """What the same rows ask for, step after step.

    Attributes:
        states: one per row.
        vocab_size: V of all of them.
        asking: rows that want log-probabilities.
        may_edit: there may be masks, bias or penalties.
        settling: rows whose draw has consequences, see `settle_drawn`.
        only_draws: neither is the case.
        controls: [R, 5] of their present positions.

    Args:
        states: one per row.
        controls: see `Sampler`.
    """

    def __init__(self, states: Sequence[SamplingState], place: NDArray[np.float64] | None = None) -> None:
        self.states = list(states)
        sizes = {state.vocab_size for state in states}
        assert len(sizes) <= 1
        self.vocab_size = max(sizes, default=0)
        self.asking = [row for row, state in enumerate(states) if state.params.logprobs is not None]
        self.may_edit = any(state.may_edit for state in states)
        self.settling = [row for row, state in enumerate(states) if settles(state)]
        self.only_draws = not (self.asking or self.may_edit)
        self.controls = controls(states)
        if place is not None:
            place[: len(states)] = self.controls
            self.controls = place[: len(states)]
        self._random = [(row, state) for row, state in enumerate(states) if not state.params.greedy]
        # Random numbers of the next positions, the first of these, and where they go: without numpy, see `go_on`.
        self._ahead, self._begin = memoryview(b""), 0
        self._column = self.controls.reshape(-1).data[Control.UNIFORM :: len(Control)]

    def move_on(self) -> None:
        """The rows are at other positions: random numbers are all that changes."""
        for row, state in self._random:
            self.controls[row, Control.UNIFORM] = state.uniform()
        self._ahead = memoryview(b"")

    def go_on(self) -> None:
        """The same where each row is at the position behind that of the last time: a copy of numbers made before."""
        if not self._random:
            return
        count, position = len(self.states), self._random[0][1].position
        place = (position - self._begin) * count
        if not 0 <= place < len(self._ahead):
            self._ahead, self._begin, place = uniforms_ahead(self.states).reshape(-1).data, position, 0
        self._column[:] = self._ahead[place : place + count]


def _in_one_piece(logits: Value, *, fetched: bool = False) -> Value:
    """Logits whose rows are in one piece: an array where compiled functions read them, else a tensor; on the CPU where
    they are to be fetched."""
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
    """[R, 5] parameters of these sequences at their present positions, see `kernels.Control`."""
    return np.array([(*state.controls, 0.5 if state.params.greedy else state.uniform()) for state in states])


def drawn_tokens(token_ids: Sequence[int], largest: Sequence[float]) -> list[Token]:
    """The tokens that were drawn from rows with these largest logits, or why there is none."""
    if math.isfinite(sum(largest)):  # as all of them are then
        return list(token_ids)
    return [_drawn_token(token, peak) for token, peak in zip(token_ids, largest, strict=True)]


def settles(state: SamplingState) -> bool:
    """Whether something must be done behind each draw of a sequence."""
    return state.params.mirostat > 0 or bool(state.params.logits_processors)


def settle_drawn(tokens: list[Token], logits: Value, rows: Sequence[int], states: Sequence[SamplingState]) -> None:
    """Tells mirostat what was drawn, and puts an error where a processor has failed."""
    for row in rows:
        state, token = states[row], tokens[row]
        if state.failure is not None:
            tokens[row] = SampledToken(-1, error=state.failure, by_request=True)
        elif state.params.mirostat and isinstance(token, int):
            bits = surprise(np.asarray(logits[row]), token, state.controls[0])
            state.note_surprise(bits, state.position)


def _drawn_token(token_id: int, largest: float) -> Token:
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
    for (_, row, token), entry in zip(sound, logprob_rows(raw, [token for _, _, token in sound], asked)):
        tokens[row] = SampledToken(token, entry)
