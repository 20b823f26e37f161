# SPDX-License-Identifier: MIT
"""Gated delta rules and Mamba 2 for prompts on a GPU: whole chunks of 64 tokens at once, other tokens one by one.

For a chunk's tokens i and j <= i, D[i, j] is the product of the decays of tokens j + 1 .. i, P[i] that of the decays up
to token i, and E[i] that of the decays after token i. B is the diagonal matrix of the strengths, S the state before the
chunk. The corrections of the tokens are the rows of

    U = inverse(I + tril(B K K^T D, -1)) B (V - P K S)

The results and the state after the chunk are

    Y = P Q S + tril(Q K^T D) U               S = P[63] S + (E K)^T U

In Mamba 2, B is the diagonal matrix of the step sizes and U = B V; then `skip` times V is added to Y. In Kimi delta
attention, where each row of S has its own decay, P and E are matrices like K, of which P K S becomes (P * K) S,
and K K^T D and Q K^T D become sums over the rows of S (`_row_scores`).

`chunk_kernel` computes inverse(..) B (except for Mamba 2), tril(Q K^T D), P and E, for each value head of all chunks in
parallel. The inverse is computed row by row, which stays accurate for similar keys; the log of each product of decays
is a sum of its own, not a difference of sums. `chunks_kernel` then works as `triton_scan.scan_kernel`, but on whole
chunks. Tokens of a chunk within which a state is stored are processed one by one. Sources: Yang et al., 2024,
arXiv:2406.06484, section 3; Dao and Gu, 2024, arXiv:2405.21060, section 6; Kimi Team, 2025, arXiv:2510.26692.

Products with q and k use their 16-bit elements unchanged, except in Kimi delta attention; norms are applied to the
result. A float32 factor of a product is split into the sum of two 16-bit floats, which is closer to float32 than TF32.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.delta_rule.layout import EPS
from candle_vllm.core.kernels.delta_rule.triton_scan import (
    STRIDES,
    Form,
    gates_of,
    log_decay,
    scan_rows,
    state_before,
    step_size,
    strength_of,
    tile_places,
)
from candle_vllm.core.kernels.states import TABLES
from candle_vllm.core.kernels.triton_build import OPTIONS, TENSOR_CORES, capability, cdiv

CHUNK = 64
"""Tokens of a chunk."""

_CHUNK, _EPS = tl.constexpr(CHUNK), tl.constexpr(EPS)
_BLOCK_K = 64  # columns of q and k that are multiplied at a time
_PART = tl.constexpr(16)  # tokens of a part of a chunk, within which decays of rows of S are multiplied pair by pair
_BLOCK_V = 16  # columns of a program: the maximum without register spills


@triton.jit
def _rows_of(x, first, token_stride, column, D: tl.constexpr):
    """Load the rows [CHUNK, ...] of a head for tokens from `first` on."""
    row = (first + tl.arange(0, _CHUNK)).to(tl.int64)
    return tl.load(x + row[:, None] * token_stride + column[None, :], mask=(column < D)[None, :], other=0.0)


@triton.jit
def _squares(x):
    """Return the sum of squares of each row [CHUNK]."""
    x = x.to(tl.float32)
    return tl.sum(x * x, axis=1)


@triton.jit
def _norms(squares, NORMED: tl.constexpr):
    """Return the factor that norms each row [CHUNK]."""
    if NORMED:
        return 1.0 / tl.sqrt(squares + _EPS)
    return squares * 0.0 + 1.0


@triton.jit
def _halves(x, kind):
    """Return two 16-bit floats for each float32 element, whose sum is close to the element."""
    upper = x.to(kind)
    return upper, (x - upper.to(tl.float32)).to(kind)


@triton.jit
def _times(x, y):
    """Multiply a matrix of 16-bit floats by a float32 matrix."""
    upper, lower = _halves(y, x.dtype)
    return tl.dot(x, lower, tl.dot(x, upper))


@triton.jit
def _both(x, y, result):
    """Multiply two float32 matrices, and add the product to `result`."""
    upper, lower = _halves(x, tl.bfloat16)
    more, less = _halves(y, tl.bfloat16)
    return tl.dot(upper, more, tl.dot(upper, less, tl.dot(lower, more, result)))


@triton.jit
def _line(x, line):
    """Return x [CHUNK, ..] with each row replaced by row `line` of its part; zeros if there is no such row."""
    parts: tl.constexpr = _CHUNK // _PART
    split = tl.reshape(x, (parts, _PART, x.shape[1]))
    here = tl.arange(0, _PART)[None, :, None] == line
    found = tl.sum(tl.where(here, split, 0.0), axis=1)
    return tl.reshape(tl.broadcast_to(found[:, None, :], split.shape), x.shape)


@triton.jit
def _row_scores(alike, found, keys, queries, gates):
    """Add K K^T D and Q K^T D of some rows of S with the log decays `gates` [CHUNK, ..] to `alike` and `found`.

    The log of each product of decays is a sum of its own: within a part of a chunk it grows token by token, between two
    parts it is the sum up to the beginning of the query's part, and from there to the query.
    """
    keys, queries = keys.to(tl.float32), queries.to(tl.float32)
    each = tl.arange(0, _CHUNK)
    place = each % _PART
    decays = gates * 0.0
    for step in range(_PART):
        line = _PART - 1 - step
        decays = tl.where((place > line)[:, None], decays + _line(gates, line + 1), 0.0)
        decayed = tl.exp(decays) * _line(keys, line)
        here = (each[None, :] == (each - place + line)[:, None]) & (place >= line)[:, None]
        alike += tl.where(here, tl.sum(keys * decayed, axis=1)[:, None], 0.0)
        found += tl.where(here, tl.sum(queries * decayed, axis=1)[:, None], 0.0)
    for part in range(1, _CHUNK // _PART):
        first = part * _PART
        inside = ((each >= first) & (each < first + _PART))[:, None]
        before = (each < first)[:, None]
        since = tl.where(inside, tl.exp(tl.cumsum(tl.where(inside, gates, 0.0), 0)), 0.0)
        earlier = tl.where(before, gates, 0.0)
        until = tl.where(before, tl.exp(tl.cumsum(earlier, 0, reverse=True) - earlier), 0.0)
        turned = tl.trans(keys * until)
        alike = _both(keys * since, turned, alike)
        found = _both(queries * since, turned, found)
    return alike, found


@triton.jit
def _store_halves(at, x, SIZE: tl.constexpr):
    upper, lower = _halves(x, tl.bfloat16)
    tl.store(at, upper)
    tl.store(at + SIZE, lower)


@triton.jit
def _product(at, y, SIZE: tl.constexpr):
    """Multiply a float32 matrix that `_store_halves` has written by a float32 matrix."""
    more, less = _halves(y, tl.bfloat16)
    upper = tl.load(at)
    result = tl.dot(upper, less, tl.dot(upper, more))
    return tl.dot(tl.load(at + SIZE), more, result)


@triton.jit(do_not_specialize=["tokens", "most", "scale"], do_not_specialize_on_alignment=["positions"])
def chunk_kernel(
    q,  # [T, HK, DK]
    k,
    a,  # [T, HV * EACH]
    b,
    decay,  # [HV * EACH] fp32
    bias,
    # Results, at index i for the chunk that begins within the step's tokens CHUNK * i .. CHUNK * i + CHUNK - 1:
    matrices,  # [cdiv(T, CHUNK), HV, 1 + CORRECTS, 2, CHUNK, CHUNK] bf16: scores, then the inverse, each as two halves
    factors,  # [.., HV, FACTORS] fp32: factors of rows of K for P K, of Q for P Q, of U for E K^T U, [3, CHUNK];
    # then P [CHUNK], or P[63] [DKP] if EACH > 1, where the factors lack P and E
    scaled,  # [.., HV, 3, 2, CHUNK, DKP] bf16: P * K, P * Q and E * K without norms, as halves; used if EACH > 1
    positions,  # [T]
    tokens,
    most,
    scale,
    q_token,
    q_head,
    k_token,
    k_head,
    a_token,
    b_token,
    FORM: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    CHUNK: tl.constexpr = _CHUNK
    HV: tl.constexpr = FORM.HV
    DK: tl.constexpr = FORM.DK
    DKP: tl.constexpr = FORM.DKP
    CORRECTS: tl.constexpr = FORM.CORRECTS
    EACH: tl.constexpr = FORM.EACH
    SIZE: tl.constexpr = CHUNK * CHUNK
    ROOM: tl.constexpr = 4 * SIZE if CORRECTS else 2 * SIZE
    FACTORS: tl.constexpr = 3 * CHUNK + (DKP if EACH > 1 else CHUNK)
    place = tl.program_id(0)
    head = tl.program_id(1)
    key_head = head // (HV // FORM.HK)
    each = tl.arange(0, CHUNK)
    token = place * CHUNK + each
    there = token + CHUNK <= tokens
    # If several chunks begin in this range, take the last: another sequence begins within each of the earlier ones. If
    # the last chunk has tokens of several sequences, `chunks_kernel` does not read the results.
    begins = there & (tl.load(positions + token, mask=there, other=1) % CHUNK == 0)
    first = tl.max(tl.where(begins, token, -1))
    if first >= 0:
        row = (first + each).to(tl.int64)
        of_keys, of_queries = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
        alike, found = tl.zeros([CHUNK, CHUNK], tl.float32), tl.zeros([CHUNK, CHUNK], tl.float32)
        for base in range(0, DKP, BLOCK_K):
            column = base + tl.arange(0, BLOCK_K)
            keys = _rows_of(k + key_head * k_head, first, k_token, column, DK)
            queries = _rows_of(q + key_head * q_head, first, q_token, column, DK)
            of_keys += _squares(keys)
            of_queries += _squares(queries)
            if EACH > 1:
                gates = _row_gates(a, decay, bias, first, a_token, head, column, FORM)
                alike, found = _row_scores(alike, found, keys, queries, gates)
                wide = scaled + (place * HV + head).to(tl.int64) * (6 * CHUNK * DKP)
                _store_scaled(wide + each[:, None] * DKP + column[None, :], keys, queries, gates, CHUNK * DKP)
                ends = factors + (place * HV + head).to(tl.int64) * FACTORS + 3 * CHUNK
                tl.store(ends + column, tl.exp(tl.sum(gates, axis=0)))
            else:
                if CORRECTS:
                    alike = tl.dot(keys, tl.trans(keys), alike)
                found = tl.dot(queries, tl.trans(keys), found)
        norms = _norms(of_keys, FORM.NORMED)
        read = _norms(of_queries, FORM.NORMED) * scale
        to = factors + (place * HV + head).to(tl.int64) * FACTORS + each
        given, shift = norms, 0.0  # used if not CORRECTS
        if EACH > 1:
            tl.store(to, norms)
            tl.store(to + CHUNK, read)
            tl.store(to + 2 * CHUNK, norms)
            decays = tl.where(each[:, None] >= each[None, :], norms[None, :], 0.0)
        else:
            factor = tl.load(decay + head)
            shift = tl.load(bias + head)
            given = tl.load(a + row * a_token + head)
            gates = log_decay(given, shift, factor)
            following = tl.load(a + (row + 1) * a_token + head, mask=each < CHUNK - 1, other=0.0)
            following = tl.where(each < CHUNK - 1, log_decay(following, shift, factor), 0.0)
            before = tl.exp(tl.cumsum(gates, 0))
            tl.store(to, before * norms)
            tl.store(to + CHUNK, before * read)
            after = tl.exp(tl.cumsum(following, 0, reverse=True)) * norms
            tl.store(to + 2 * CHUNK, after if CORRECTS else after * step_size(given, shift))
            tl.store(to + 3 * CHUNK, before)
            decays = tl.exp(tl.cumsum(tl.where(each[:, None] > each[None, :], gates[:, None], 0.0), 0))
            decays = tl.where(each[:, None] >= each[None, :], decays, 0.0) * norms[None, :]
        to = matrices + (place * HV + head).to(tl.int64) * ROOM + each[:, None] * CHUNK + each[None, :]
        scores = found * read[:, None] * decays
        _store_halves(to, scores if CORRECTS else scores * step_size(given, shift)[None, :], SIZE)
        if CORRECTS:
            strengths = strength_of(tl.load(b + row * b_token + head), most)
            _store_halves(to + 2 * SIZE, _inverse(alike, decays, norms, strengths), SIZE)


@triton.jit
def _store_scaled(at, keys, queries, gates, SIZE: tl.constexpr):
    """Write the columns of P * K, P * Q and E * K that belong to some rows of S."""
    keys = keys.to(tl.float32)
    decays = tl.exp(tl.cumsum(gates, 0))
    _store_halves(at, keys * decays, SIZE)
    _store_halves(at + 2 * SIZE, queries.to(tl.float32) * decays, SIZE)
    _store_halves(at + 4 * SIZE, keys * tl.exp(tl.cumsum(gates, 0, reverse=True) - gates), SIZE)


@triton.jit
def _row_gates(a, decay, bias, first, a_token, head, column, FORM: tl.constexpr):
    """Return the log decays [CHUNK, ..] of rows `column` of S for the tokens from `first` on; zeros beyond DK."""
    DK: tl.constexpr = FORM.DK
    given = _rows_of(a + head * DK, first, a_token, column, DK)
    shift = tl.load(bias + head * DK + column, mask=column < DK, other=0.0)
    factor = tl.load(decay + head * DK + column, mask=column < DK, other=0.0)
    return log_decay(given, shift[None, :], factor[None, :], FORM.LEAST)


@triton.jit
def _inverse(alike, decays, norms, strengths):
    """Return inverse(I + tril(B K K^T D, -1)) B; `decays` is D with the norms of its columns' keys."""
    each = tl.arange(0, _CHUNK)
    lower = tl.where(each[:, None] > each[None, :], alike * (norms * strengths)[:, None] * decays, 0.0)
    inverse = tl.where(each[:, None] == each[None, :], 1.0, 0.0)
    for line in range(1, _CHUNK):
        here = (each == line)[:, None]
        row_factors = tl.sum(tl.where(here, lower, 0.0), axis=0)
        others = tl.sum(row_factors[:, None] * inverse, axis=0)
        inverse = tl.where(here, inverse - others[None, :], inverse)
    return inverse * strengths[None, :]


@triton.jit
def _take_chunk(state, first, pointers, strides, matrices, factors, scaled, skip, row, column, FORM: tl.constexpr):
    """Write the results of a whole chunk; return the state after the chunk.

    pointers, strides, row, column: as in `triton_scan.scan_rows`. skip: used if not CORRECTS.
    matrices, factors, scaled: of the chunk and value head; `scaled` is used if EACH > 1.
    """
    q, k, v, _a, _b, out = pointers
    q_token, k_token, v_token, _a_token, _b_token = strides
    CHUNK: tl.constexpr = _CHUNK
    DK: tl.constexpr = FORM.DK
    DV: tl.constexpr = FORM.DV
    DKP: tl.constexpr = FORM.DKP
    CORRECTS: tl.constexpr = FORM.CORRECTS
    EACH: tl.constexpr = FORM.EACH
    SIZE: tl.constexpr = CHUNK * CHUNK
    WIDE: tl.constexpr = CHUNK * DKP
    each = tl.arange(0, CHUNK)
    at = matrices + each[:, None] * CHUNK + each[None, :]
    values = _rows_of(v, first, v_token, column, DV).to(tl.float32)
    corrections = values  # in Mamba 2, whose scores and factors contain B
    remembered = values  # used if CORRECTS
    if EACH > 1:
        rows = scaled + each[:, None] * DKP + row[None, :]
        remembered = _product(rows, state, WIDE)
        result = _product(rows + 2 * WIDE, state, WIDE)
    else:
        if CORRECTS:
            remembered = _times(_rows_of(k, first, k_token, row, DK), state)
        result = _times(_rows_of(q, first, q_token, row, DK), state)
    if CORRECTS:
        corrections = _product(at + 2 * SIZE, values - tl.load(factors + each)[:, None] * remembered, SIZE)
    result *= tl.load(factors + CHUNK + each)[:, None]
    result += _product(at, corrections, SIZE)
    if not CORRECTS:
        result += skip * values
    to = out + (first + each).to(tl.int64)[:, None] * (FORM.HV * DV) + column[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=(column < DV)[None, :])
    corrections *= tl.load(factors + 2 * CHUNK + each)[:, None]
    if EACH > 1:
        decays = tl.load(factors + 3 * CHUNK + row)
        added = _product(scaled + 4 * WIDE + row[:, None] + each[None, :] * DKP, corrections, WIDE)
        state = state * decays[:, None] + added
    else:
        turned = tl.trans(_rows_of(k, first, k_token, row, DK))
        state = state * tl.load(factors + 4 * CHUNK - 1) + _times(turned, corrections)
    return state


@triton.jit(do_not_specialize=["most", "scale"], do_not_specialize_on_alignment=(*TABLES, "positions"))
def chunks_kernel(
    q,  # all as in `triton_scan.scan_kernel`
    k,
    v,
    a,
    b,
    decay,
    bias,
    out,
    states,
    kept,
    query_start,
    slots,
    sources,
    replays,
    stores,
    positions,  # [T]
    matrices,  # as above
    factors,
    scaled,
    skip,  # [HV] fp32, read if not CORRECTS
    most,
    scale,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    a_token,
    b_token,
    slot_stride,
    kept_slot,
    kept_row,
    FORM: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    CHUNK: tl.constexpr = _CHUNK
    HV: tl.constexpr = FORM.HV
    DK: tl.constexpr = FORM.DK
    DKP: tl.constexpr = FORM.DKP
    CORRECTS: tl.constexpr = FORM.CORRECTS
    EACH: tl.constexpr = FORM.EACH
    FACTORS: tl.constexpr = 3 * CHUNK + (DKP if EACH > 1 else CHUNK)
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    key_head = head // (HV // FORM.HK)
    row = tl.arange(0, DKP)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    factor = gates_of(decay + head * EACH, row, column, FORM)
    shift = gates_of(bias + head * EACH, row, column, FORM)
    past = 0.0
    if not CORRECTS:
        past = tl.load(skip + head)
    states += head * (FORM.FILLED * DK)
    q, k = q + key_head * q_head, k + key_head * k_head
    pointers = (q, k, v + head * v_head, a + head * EACH, b + head, out + head * FORM.DV)
    strides, memory = (q_token, k_token, v_token, a_token, b_token), (states, stores, slot_stride)
    kept += tl.load(slots + sequence).to(tl.int64) * kept_slot
    begins = (tl.load(sources + sequence), tl.load(replays + sequence))
    gates = (factor, shift, most)
    state = state_before(states, slot_stride, kept, kept_row, begins, gates, head, key_head, row, column, FORM)
    start = tl.load(query_start + sequence).to(tl.int32)
    end = tl.load(query_start + sequence + 1).to(tl.int32)
    if start < end:
        # The pieces: the tokens before the first chunk that begins in this step, the chunks, the remaining tokens.
        position = tl.load(positions + start).to(tl.int32)
        begin = tl.minimum(start + (CHUNK - position % CHUNK) % CHUNK, end)
        chunks = (end - begin) // CHUNK
        each = tl.arange(0, CHUNK)
        for piece in range(chunks + 2):
            first = tl.where(piece == 0, start, begin + (piece - 1) * CHUNK)
            last = tl.where(piece == 0, begin, tl.minimum(first + CHUNK, end))
            whole = (piece > 0) & (last - first == CHUNK)
            if whole:
                asked = tl.load(stores + first + each, mask=each < CHUNK - 1, other=-1)
                whole = tl.max(asked.to(tl.int32)) < 0
            if whole:
                at = ((first // CHUNK) * HV + head).to(tl.int64) * CHUNK
                wide = matrices
                if EACH > 1:
                    wide = scaled + at * (6 * DKP)
                results = matrices + at * (4 * CHUNK if CORRECTS else 2 * CHUNK)
                scales = factors + at // CHUNK * FACTORS
                state = _take_chunk(state, first, pointers, strides, results, scales, wide, past, row, column, FORM)
                slot = tl.load(stores + last - 1).to(tl.int64)
                if slot >= 0:
                    inside = (row < DK)[:, None] & (column < FORM.FILLED)[None, :]
                    tl.store(states + slot * slot_stride + tile_places(row, column, DK), state, mask=inside)
            else:
                state = scan_rows(state, first, last, pointers, strides, memory, gates, scale, past, row, column, FORM)


def scan_chunks(sequences: int, given: dict[str, Any], positions: torch.Tensor, form: Form) -> None:
    """Launch both kernels; see `triton.delta_rule`."""
    q, tokens, each, wide = given["q"], len(given["q"]), form.EACH, form.DKP
    chunks, on = (cdiv(tokens, CHUNK), form.HV), q.device
    scaled = torch.empty((*chunks, 6, CHUNK, wide), dtype=torch.bfloat16, device=on) if each > 1 else None
    given = given | {
        "positions": positions,
        "matrices": torch.empty((*chunks, 4 if form.CORRECTS else 2, CHUNK, CHUNK), dtype=torch.bfloat16, device=on),
        "factors": torch.empty((*chunks, 3 * CHUNK + (wide if each > 1 else CHUNK)), dtype=torch.float32, device=on),
        "scaled": scaled,
    }
    asked = {name: given[name] for name in _chunk_names()} | {"tokens": tokens}
    chunk_kernel[chunks](**asked, FORM=form, BLOCK_K=_block_k(form), **_HOW, **OPTIONS)
    grid = sequences, form.HV, cdiv(form.DV, _BLOCK_V)
    chunks_kernel[grid](**given, FORM=form, BLOCK_V=_BLOCK_V, **_HOW, **OPTIONS)


_HOW = MappingProxyType({"num_warps": 8, "num_stages": 1})  # not measured yet


def in_chunks(q: torch.Tensor, positions: torch.Tensor | None, *, normed: bool = True) -> bool:
    """Return whether the kernels for whole chunks are used in a step.

    States of q and k that are not normed may exceed float16, and halves of a state have the type of q.
    """
    kinds = (torch.bfloat16, torch.float16) if normed else (torch.bfloat16,)
    return positions is not None and len(q) >= CHUNK and q.dtype in kinds and capability(q.device) >= TENSOR_CORES


def _block_k(form: Form) -> int:
    return min(form.DKP, _BLOCK_K if form.EACH == 1 else _BLOCK_K // 2)  # without register spills


def _chunk_names() -> tuple[str, ...]:
    """Return the names of the arguments that `chunk_kernel` shares with `chunks_kernel`."""
    tensors = ("q", "k", "a", "b", "decay", "bias", "matrices", "factors", "scaled", "positions")
    return *tensors, "most", "scale", *(name for name in STRIDES if not name.startswith("v"))
