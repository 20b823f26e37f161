"""Sampler: logits of a batch to one token per sequence (step 7 of ten).

    raw log-probabilities -> processors (masks, bias, penalties) -> greedy, or temperature, min_p, top_k, top_p, draw

The order and the meanings are vLLM's; `dense.draw` states the rules to the letter. Rows are grouped by the cheapest
way to draw them, so that a feature that nobody uses costs nothing, and a row's token never depends on its neighbours.

Shapes: R rows, V vocabulary, T positions of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.errors import RequestError
from candle_vllm.core.sampling import cpu, dense
from candle_vllm.core.sampling.controls import Controls
from candle_vllm.core.sampling.logprobs import LogprobRow, logprob_rows
from candle_vllm.core.sampling.processors import apply_processors
from candle_vllm.core.sampling.state import Drawing, SamplingState

LOGPROB_CHUNK = 1 << 22  # logits worked on at a time for prompt_logprobs: 16 MB
_DRAW = {Drawing.PLAIN: cpu.draw_plain, Drawing.TOP_K: cpu.draw_top_k, Drawing.TOP_P: cpu.draw_top_p}
_BROKEN = "the model gave NaN or infinite logits for this sequence; its files or its data type may be at fault"
_NOTHING = (
    "no token may be chosen: together, allowed_token_ids, bad_words, min_tokens and any grammar forbid every token; "
    "relax one of them"
)


class SampledToken(msgspec.Struct, frozen=True):
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


class Sampler:
    """Chooses tokens. It keeps nothing between calls: what must last is in each `SamplingState`."""

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, states: Sequence[SamplingState]) -> list[SampledToken]:
        """Chooses the next token of each sequence. The caller appends it to the state.

        Args:
            logits: [R, V] float32 on any device; may be overwritten.
            states: one per row.

        Returns:
            One entry per row. A row with NaN or +inf, and a row in which every token is forbidden, has an `error`.
        """
        assert logits.dtype == torch.float32
        assert logits.shape[0] == len(states)
        assert all(state.vocab_size == logits.shape[1] for state in states)
        if not states:
            return []
        logits = logits.contiguous()
        asking = [row for row, state in enumerate(states) if state.params.logprobs is not None]
        raw = logits[asking].cpu() if asking else None
        apply_processors(logits, states)
        ids, largest = (_draw_on_cpu if logits.device.type == "cpu" else _draw_on_device)(logits, states)
        tokens = [_token(token, peak) for token, peak in zip(ids.tolist(), largest.tolist())]
        if raw is not None:
            _add_logprobs(tokens, raw, asking, states)
        return tokens

    @torch.inference_mode()
    def prompt_logprobs(self, logits: torch.Tensor, next_token_ids: Sequence[int], top: int) -> list[LogprobRow]:
        """Log-probabilities of the tokens of a prompt, in bounded memory.

        Args:
            logits: [T, V] float32 on any device, one row per position; not changed.
            next_token_ids: [T] the prompt's token after each position, below V.
            top: how many of the likeliest tokens to report.

        Raises:
            RequestError: a row holds NaN or +inf.
        """
        assert logits.dtype == torch.float32
        assert len(logits) == len(next_token_ids)
        rows: list[LogprobRow] = []
        step = max(1, LOGPROB_CHUNK // max(1, logits.shape[1]))
        for start in range(0, len(logits), step):
            chunk = logits[start : start + step].cpu().contiguous()
            if not bool(chunk.amax(1).isfinite().all()):
                raise RequestError(_BROKEN, "prompt_logprobs")
            ids = next_token_ids[start : start + step]
            rows += logprob_rows(chunk, ids, [top] * len(ids))
        return rows


def _draw_on_cpu(
    logits: torch.Tensor, states: Sequence[SamplingState]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """[R] token ids and [R] largest logits; the id of a row whose largest is not finite means nothing."""
    ids, largest = np.zeros(len(states), np.int64), np.zeros(len(states), np.float32)
    for drawing, rows in _groups(states).items():
        own = logits if len(rows) == len(states) else logits[rows]
        if drawing is Drawing.GREEDY:
            ids[rows] = places = cpu.argmax(own)
            largest[rows] = own.numpy()[np.arange(len(rows)), places]
            continue
        peaks = own.amax(1)
        largest[rows] = peaks.numpy()
        sound = np.isfinite(largest[rows])
        if not sound.all():
            rows = [row for row, good in zip(rows, sound) if good]
            own, peaks = own[torch.from_numpy(sound)], peaks[torch.from_numpy(sound)]
        if rows:
            ids[rows] = _DRAW[drawing](own, peaks, Controls.of([states[row] for row in rows]))
    return ids, largest


def _groups(states: Sequence[SamplingState]) -> dict[Drawing, list[int]]:
    groups: dict[Drawing, list[int]] = {}
    for row, state in enumerate(states):
        groups.setdefault(state.drawing, []).append(row)
    return groups


def _draw_on_device(
    logits: torch.Tensor, states: Sequence[SamplingState]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """As `_draw_on_cpu`, with one wait for the device: the copy of the ids and largest logits."""
    ids = logits.argmax(1)
    rows = [row for row, state in enumerate(states) if state.drawing is not Drawing.GREEDY]
    if rows:
        ids[rows] = dense.draw(logits[rows], Controls.of([states[row] for row in rows]))
    both = torch.stack((ids.double(), logits.amax(1).double())).cpu().numpy()
    return both[0].astype(np.int64), both[1].astype(np.float32)


def _token(token_id: int, largest: float) -> SampledToken:
    if largest == -np.inf:
        return SampledToken(-1, error=_NOTHING, by_request=True)
    if not np.isfinite(largest):
        return SampledToken(-1, error=_BROKEN)
    return SampledToken(token_id)


def _add_logprobs(
    tokens: list[SampledToken], raw: torch.Tensor, asking: list[int], states: Sequence[SamplingState]
) -> None:
    sound = [(place, row) for place, row in enumerate(asking) if tokens[row].error is None]
    if not sound:
        return
    if len(sound) < len(asking):
        raw = raw[[place for place, _ in sound]]
    rows = [row for _, row in sound]
    entries = logprob_rows(
        raw, [tokens[row].token_id for row in rows], [states[row].params.logprobs or 0 for row in rows]
    )
    for row, entry in zip(rows, entries):
        tokens[row] = SampledToken(tokens[row].token_id, entry)
