"""What changes logits before a token is chosen: masks, bias and penalties (step 7 of ten).

The order is vLLM's: structured_outputs, allowed_token_ids, bad_words, min_tokens, logit_bias, repetition_penalty,
frequency_penalty, presence_penalty. Each feature touches only the entries it is about, and one that no row uses costs a
test per row.

Shapes: R rows, V vocabulary, N entries over all rows. Entries are addressed by their place in the flattened [R * V].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.kernels import sampling as kernels
from candle_vllm.core.sampling.state import SamplingState


def _limits() -> NDArray[np.void]:
    flags = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    table = np.where(flags, np.float32(np.inf), np.float32(-np.inf)).view("V32").ravel()
    table.flags.writeable = False
    return table


_LIMITS = _limits()  # eight limits as one value, so that they are taken at once


def mask_row(row: NDArray[np.float32], bits: NDArray[np.int32]) -> None:
    """Makes the logits of tokens that are not allowed -inf, in place.

    Args:
        row: [V], contiguous. NaN stays; where +inf was there, the row holds NaN afterwards, so that a broken model
            never passes for a working one.
        bits: [ceil(V / 32)], bit i % 32 of word i // 32 is 1 where token i is allowed.
    """
    broken = not row.max() < np.inf
    limits = _LIMITS.take(bits.view(np.uint8)).view(np.float32)
    np.minimum(row, limits[: len(row)], out=row)
    if broken:
        row[0] = np.nan


def mask_flags(bits: NDArray[np.int32], vocab_size: int) -> NDArray[np.bool_]:
    """[V] whether each token is allowed."""
    return np.unpackbits(bits.view(np.uint8), count=vocab_size, bitorder="little").view(np.bool_)


_INF = float("inf")
_NO_IDS, _NO_COUNTS = np.zeros(0, np.int64), np.zeros(0, np.float32)


def apply_processors(logits: torch.Tensor, states: Sequence[SamplingState]) -> None:
    """Applies every mask, bias and penalty in place: on the CPU one compiled call for each row that has any.

    Args:
        logits: [R, V] float32, each row contiguous; elsewhere than on the CPU the whole. A row that held NaN or +inf
            holds one of them afterwards even where the offending token is masked, so that a broken model never passes
            for a working one.
        states: one per row.
    """
    if logits.device.type == "cpu" and kernels.compiled():
        table = logits.numpy()
        for row, state in enumerate(states):
            if state.grammar is not None and (bits := state.mask_bits()) is not None:
                mask_row(table[row], bits)
            if state.masks_tokens or len(state.bias_ids) or state.counts is not None:
                kernels.adjust(table[row], _adjustment(state))
        return
    apply_in_torch(logits, states)


def _adjustment(state: SamplingState) -> kernels.Adjustment:
    params, counts, masked = state.params, state.counts, state.masks_tokens
    return kernels.Adjustment(
        masked=masked,
        allowed=state.allowed if masked and state.grammar is None else None,  # else it is in the grammar's mask
        forbidden=state.forbidden_ids() if masked else _NO_IDS,
        bias_ids=state.bias_ids,
        bias=state.bias_values,
        seen_ids=_NO_IDS if counts is None else counts.ids,
        counts=_NO_COUNTS if counts is None else counts.counts,
        penalties=(params.repetition_penalty, params.frequency_penalty, params.presence_penalty),
    )


def apply_in_torch(logits: torch.Tensor, states: Sequence[SamplingState]) -> None:
    """As `apply_processors`, on any device: rows and ids are gathered over the batch. The reference of the other."""
    masked = [row for row, state in enumerate(states) if state.masks_tokens]
    if masked:
        broken = ~(logits[masked].amax(1) < _INF)
        _mask(logits, states, masked)
        logits[masked, 0] = torch.where(broken, float("nan"), logits[masked, 0])
    biased = [row for row, state in enumerate(states) if len(state.bias_ids)]
    if biased:
        places = _places(logits, biased, [states[row].bias_ids for row in biased])
        values = torch.from_numpy(np.concatenate([states[row].bias_values for row in biased])).to(logits.device)
        logits.view(-1)[places] += values
    counted = [row for row, state in enumerate(states) if state.counts is not None]
    if counted:
        _penalise(logits, states, counted)


def _mask(logits: torch.Tensor, states: Sequence[SamplingState], rows: list[int]) -> None:
    flat = logits.view(-1)
    for row in rows:
        if states[row].grammar is not None and (bits := states[row].mask_bits()) is not None:
            flags = torch.from_numpy(mask_flags(bits, logits.shape[1])).to(logits.device)
            logits[row].masked_fill_(~flags, -_INF)
    allowed = [(row, ids) for row in rows if (ids := states[row].allowed) is not None]
    if allowed:
        places = _places(logits, [row for row, _ in allowed], [ids for _, ids in allowed])
        kept = flat[places]
        logits[[row for row, _ in allowed]] = -_INF
        flat[places] = kept
    forbidden = [states[row].forbidden_ids() for row in rows]
    if any(map(len, forbidden)):
        flat[_places(logits, rows, forbidden)] = -_INF


def _penalise(logits: torch.Tensor, states: Sequence[SamplingState], rows: list[int]) -> None:
    counts = [tracked for row in rows if (tracked := states[row].counts) is not None]
    lengths = [len(tracked.ids) for tracked in counts]
    places = _places(logits, rows, [tracked.ids for tracked in counts])
    if not len(places):
        return
    params = [states[row].params for row in rows]
    table = np.array([(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params])
    per_entry = torch.from_numpy(np.repeat(table, lengths, axis=0)).to(logits.device)
    occurrences = torch.from_numpy(np.concatenate([tracked.counts for tracked in counts])).to(logits.device)
    flat = logits.view(-1)
    flat[places] = penalised(flat[places], occurrences, *per_entry.unbind(1))


def penalised(
    logits: torch.Tensor,
    counts: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> torch.Tensor:
    """Logits of seen tokens after the three penalties.

    Args:
        logits: [N] float32, of tokens in the prompt or the output.
        counts: [N] float32, occurrences in the output; 0 for a token of the prompt only.
        repetition: [N] float64 above 0: divides positive logits, multiplies the others (Keskar et al., CTRL, 2019).
        frequency: [N] float64, subtracted per occurrence.
        presence: [N] float64, subtracted once where `counts` is above 0.

    Returns:
        [N] float32. The arithmetic is float64. A finite logit stays below +inf, because a repetition penalty close
        to 0 would make it the only candidate of a row that is then undefined; -inf stays -inf.
    """
    wide = logits.double()
    scaled = torch.where(wide > 0, wide / repetition, wide * repetition)
    result = scaled - frequency * counts - presence * (counts > 0)
    return torch.where(wide < _INF, result.clamp(max=torch.finfo(torch.float32).max), wide).float()


def _places(logits: torch.Tensor, rows: Sequence[int], ids: Sequence[NDArray[np.int64]]) -> torch.Tensor:
    """[N] int64: where the entries (row, id) stand in the flattened logits."""
    starts = np.repeat(np.array(rows, np.int64) * logits.shape[1], [len(part) for part in ids])
    return torch.from_numpy(starts + np.concatenate(ids)).to(logits.device)
