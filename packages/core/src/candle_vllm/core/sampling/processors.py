# SPDX-License-Identifier: MIT
"""Edits of logits before sampling: processors, masks, bias, penalties, llama.cpp's chain (step 7 of a request's life).

The order: the request's own logits_processors first, so that they cannot undo a mask; then, in vLLM's order:
structured_outputs, thoughts, allowed_token_ids, bad_words, min_tokens, logit_bias, the penalties for repetition,
frequency and presence; then, in llama.cpp's order: DRY and the sampler chain (`kernels/sampling/chain.py`). A feature
that no row uses costs one test per row.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels import sampling as kernels
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.sampling.state import SamplingState, narrow_row, process_row


def _limits() -> NDArray[np.void]:
    flags = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    table = np.where(flags, np.float32(np.inf), np.float32(-np.inf)).view("V32").ravel()
    table.flags.writeable = False
    return table


_LIMITS = _limits()  # for each byte of a mask, the upper limits of its 8 logits as one element of 32 bytes


def mask_row(row: NDArray[np.float32], bits: NDArray[np.int32]) -> None:
    """Set the logits of tokens that are not allowed to -inf, in place.

    Args:
        row: [V], contiguous. A row with NaN or +inf has a NaN afterwards, so that a broken model is always detected.
        bits: [ceil(V / 32)], bit i % 32 of word i // 32 is 1 if token i is allowed.
    """
    broken = not row.max() < np.inf
    limits = _LIMITS.take(bits.view(np.uint8)).view(np.float32)
    np.minimum(row, limits[: len(row)], out=row)
    if broken:
        row[0] = np.nan


def mask_rows(logits: Value, masks: Mapping[int, NDArray[np.int32]]) -> None:
    """Apply `mask_row` to rows of logits [R, V], by row number; an array or a tensor on any device."""
    table = kernels.host_rows(logits)
    if table is not None:
        for row, bits in masks.items():
            mask_row(table[row], bits)
    elif masks:
        from candle_vllm.core.sampling.device_edits import mask_in_torch

        mask_in_torch(logits, masks)


_NO_IDS, _NO_COUNTS = np.zeros(0, np.int64), np.zeros(0, np.float32)


def apply_processors(logits: Value, states: Sequence[SamplingState]) -> None:
    """Apply every processor, mask, bias, penalty and chain in place; on the CPU row by row.

    Args:
        logits: [R, V] float32, an array or a tensor, each row contiguous; on other devices the whole is contiguous. A
            row with NaN or +inf has one of them afterwards, even at a masked token, to show that the model is broken.
    """
    table = kernels.host_rows(logits)
    if table is not None:
        for row, state in enumerate(states):
            if state.params.logits_processors:
                process_row(table[row], state)
            if (state.grammar is not None or state.is_due) and (bits := state.mask_bits()) is not None:
                mask_row(table[row], bits)
            if state.masks_tokens or len(state.bias_ids) or state.counts is not None:
                kernels.adjust(table[row], _adjustment(state))
            narrow_row(table[row], state)
        return
    from candle_vllm.core.sampling.device_edits import apply_in_torch

    apply_in_torch(logits, states)


def _adjustment(state: SamplingState) -> kernels.Adjustment:
    params, counts, masked = state.params, state.counts, state.masks_tokens
    return kernels.Adjustment(
        masked=masked,
        allowed=state.allowed if masked and state.grammar is None and not state.is_due else None,  # else in `mask_bits`
        forbidden=state.forbidden_ids() if masked else _NO_IDS,
        bias_ids=state.bias_ids,
        bias=state.bias_values,
        seen_ids=_NO_IDS if counts is None else counts.ids,
        counts=_NO_COUNTS if counts is None else counts.counts,
        penalties=(params.repetition_penalty, params.frequency_penalty, params.presence_penalty),
    )
