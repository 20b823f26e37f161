# SPDX-License-Identifier: MIT
"""The gated delta rule, Mamba 1 and 2 on a GPU, token by token (step 6 of a request's life).

A program holds some columns of a value head's state in registers and processes all tokens of one sequence. Every
program computes norms, decays and strengths itself, which costs less than reading the state.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from candle_vllm.core.kernels.delta_rule.layout import COLUMNS, EPS
from candle_vllm.core.kernels.states import TABLES
from candle_vllm.core.kernels.triton_build import OPTIONS, cdiv, next_power_of_2

STRIDES = ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head", "a_token", "b_token")
CACHE_STRIDES = ("slot_stride", "kept_slot", "kept_row")
_BLOCK_V = 32  # columns of a program; not measured yet


@triton.jit
def step_size(a, bias):
    """Return softplus(a + bias), fp32."""
    time = a.to(tl.float32) + bias
    power = tl.exp(-tl.abs(time))
    above = 1.0 + power  # its rounding is corrected: log(1 + u) = u log(w) / (w - 1) for w near 1 + u
    small = tl.where(above == 1.0, power, tl.log(above) * (power / tl.where(above == 1.0, 1.0, above - 1.0)))
    return tl.maximum(time, 0.0) + small


@triton.jit
def log_decay(a, bias, decay, LEAST: tl.constexpr = 0.0):
    """Return decay * softplus(a + bias), or with a bound LEAST * sigmoid(-decay * (a + bias)), fp32."""
    if LEAST == 0.0:
        return decay * step_size(a, bias)
    return LEAST / (1.0 + tl.exp(decay * (a.to(tl.float32) + bias)))


@triton.jit
def strength_of(b, most):
    """Return most * sigmoid(b), fp32."""
    return most / (1.0 + tl.exp(-b.to(tl.float32)))


@triton.jit
def tile_places(row, column, DK: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the offsets [DKP, BLOCK_V] of elements of S in the tiles of a value head."""
    return (column // COLUMNS)[None, :] * (DK * COLUMNS) + row[:, None] * COLUMNS + (column % COLUMNS)[None, :]


@triton.jit
def gates_of(x, row, column, DK: tl.constexpr, DV: tl.constexpr, EACH: tl.constexpr):
    """Load a value head's a, decay or bias: one element; [DKP, 1] if EACH > 1; for EACH 0, Mamba 1, [1, BLOCK_V]."""
    if EACH == 0:
        found = tl.load(x + column[None, :], mask=(column < DV)[None, :], other=0.0)
    elif EACH > 1:
        found = tl.load(x + row[:, None], mask=(row < DK)[:, None], other=0.0)
    else:
        found = tl.load(x)
    return found


@triton.jit
def take_in(
    state,
    k,
    v,
    a,
    b,
    bias,
    decay,
    most,
    NORMED: tl.constexpr,
    EPS: tl.constexpr,
    CORRECTS: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Return the state [DKP, BLOCK_V] after a token with k [DKP], v [BLOCK_V] and gates a and b, fp32."""
    if NORMED:
        k = k / tl.sqrt(tl.sum(k * k) + EPS)
    state = state * tl.exp(log_decay(a, bias, decay, LEAST))
    if CORRECTS:
        v -= tl.sum(state * k[:, None], axis=0)
        strength = strength_of(b, most)
    else:
        strength = step_size(a, bias)
    return state + k[:, None] * (strength * v[None, :])


@triton.jit
def scan_rows(
    state,
    first,  # first token, an index in the step
    last,  # end of the tokens
    q,  # pointer to the key head
    k,
    v,  # pointer to the value head
    a,
    b,
    out,  # pointer to the value head
    states,  # pointer to the value head in the first slot
    stores,
    decay,
    bias,
    most,
    scale,
    q_token,
    k_token,
    v_token,
    a_token,
    b_token,
    slot_stride,
    row,  # [DKP]
    column,  # [BLOCK_V]
    HV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    FILLED: tl.constexpr,  # DV rounded up to whole tiles
    NORMED: tl.constexpr,
    EPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CORRECTS: tl.constexpr = True,
    skip=0.0,  # used if not CORRECTS
    EACH: tl.constexpr = 1,  # decays of a value head; 0: of each element, Mamba 1
    LEAST: tl.constexpr = 0.0,  # lower bound of the logs of decays, or 0
):
    """Process tokens one by one: write their results and the states to store, return the last state."""
    places = tile_places(row, column, DK, COLUMNS)
    inside = (row < DK)[:, None] & (column < FILLED)[None, :]
    for token in range(first, last):
        at = tl.cast(token, tl.int64)
        key = tl.load(k + at * k_token + row, mask=row < DK, other=0.0).to(tl.float32)
        query = tl.load(q + at * q_token + row, mask=row < DK, other=0.0).to(tl.float32)
        value = tl.load(v + at * v_token + column, mask=column < DV, other=0.0).to(tl.float32)
        given, other = gates_of(a + at * a_token, row, column, DK, DV, EACH), 0.0
        if CORRECTS:
            other = tl.load(b + at * b_token)
        state = take_in(state, key, value, given, other, bias, decay, most, NORMED, EPS, CORRECTS, LEAST)
        if NORMED:
            query = query / tl.sqrt(tl.sum(query * query) + EPS)
        result = tl.sum(state * (query * scale)[:, None], axis=0)
        if not CORRECTS:
            result += skip * value
        tl.store(out + at * (HV * DV) + column, result.to(out.dtype.element_ty), mask=column < DV)
        slot = tl.load(stores + at).to(tl.int64)
        if slot >= 0:
            tl.store(states + slot * slot_stride + places, state, mask=inside)
    return state


@triton.jit
def state_before(
    states,  # pointer to the value head in the first slot
    kept,  # pointer to the first kept row of the sequence
    source,
    replays,
    decay,
    bias,
    most,
    slot_stride,
    kept_row,
    row,
    column,
    head,
    key_head,
    HK: tl.constexpr,
    HV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    FILLED: tl.constexpr,
    NORMED: tl.constexpr,
    EPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CORRECTS: tl.constexpr = True,
    EACH: tl.constexpr = 1,
    LEAST: tl.constexpr = 0.0,
):
    """Return the state [DKP, BLOCK_V] before a sequence's first token of the step."""
    at = states + source.to(tl.int64) * slot_stride + tile_places(row, column, DK, COLUMNS)
    inside = ((row < DK) & (row * 0 + source >= 0))[:, None] & (column < FILLED)[None, :]
    state = tl.load(at, mask=inside, other=0.0)
    tl.debug_barrier()  # threads must have read the slot before other threads of the program write it
    for _ in range(replays):
        key = tl.load(kept + key_head * DK + row, mask=row < DK, other=0.0)
        value = tl.load(kept + HK * DK + head * DV + column, mask=column < DV, other=0.0)
        gates = kept + HK * DK + HV * DV
        given, other = gates_of(gates + head * (EACH or DV), row, column, DK, DV, EACH), 0.0
        if CORRECTS:
            other = tl.load(gates + HV * EACH + head)
        state = take_in(state, key, value, given, other, bias, decay, most, NORMED, EPS, CORRECTS, LEAST)
        kept += kept_row
    return state


@triton.jit(do_not_specialize=["most", "scale"], do_not_specialize_on_alignment=TABLES)
def scan_kernel(
    q,  # [T, HK, DK]
    k,
    v,  # [T, HV, DV]
    a,  # [T, HV * (EACH or DV)]
    b,  # [T, HV], read if CORRECTS
    decay,  # [HV * EACH] fp32, or in the layout of a slot of `states`
    bias,  # [HV * (EACH or DV)] fp32
    out,  # [T, HV, DV] contiguous
    states,  # [slots, HV, tiles, DK, COLUMNS] fp32, slots of any stride
    kept,  # [slots, drafts, inputs] fp32, of any strides but the last
    query_start,  # [R + 1]
    slots,  # [R]
    sources,
    replays,
    stores,  # [T]
    skip,  # [HV] or [HV * DV] fp32, read if not CORRECTS
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
    HK: tl.constexpr,
    HV: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DKP: tl.constexpr,  # DK rounded up to a power of two
    FILLED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NORMED: tl.constexpr,
    EPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LEAST: tl.constexpr,
    CORRECTS: tl.constexpr,
    EACH: tl.constexpr,
):
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    key_head = head // (HV // HK)
    row = tl.arange(0, DKP)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    shift = gates_of(bias + head * (EACH or DV), row, column, DK, DV, EACH)
    past = 0.0
    if EACH == 0:
        inside = (row < DK)[:, None] & (column < FILLED)[None, :]
        places = head * (FILLED * DK) + tile_places(row, column, DK, COLUMNS)
        factor = tl.load(decay + places, mask=inside, other=0.0)
        past = tl.load(skip + head * DV + column, mask=column < DV, other=0.0)
    else:
        factor = gates_of(decay + head * EACH, row, column, DK, DV, EACH)
        if not CORRECTS:
            past = tl.load(skip + head)
    states += head * (FILLED * DK)
    state = state_before(
        states,
        kept + tl.load(slots + sequence).to(tl.int64) * kept_slot,
        tl.load(sources + sequence),
        tl.load(replays + sequence),
        factor,
        shift,
        most,
        slot_stride,
        kept_row,
        row,
        column,
        head,
        key_head,
        HK,
        HV,
        DK,
        DV,
        FILLED,
        NORMED,
        EPS,
        COLUMNS,
        CORRECTS,
        EACH,
        LEAST,
    )
    scan_rows(
        state,
        tl.load(query_start + sequence).to(tl.int32),
        tl.load(query_start + sequence + 1).to(tl.int32),
        q + key_head * q_head,
        k + key_head * k_head,
        v + head * v_head,
        a + head * (EACH or DV),
        b + head,
        out + head * DV,
        states,
        stores,
        factor,
        shift,
        most,
        scale,
        q_token,
        k_token,
        v_token,
        a_token,
        b_token,
        slot_stride,
        row,
        column,
        HV,
        DK,
        DV,
        FILLED,
        NORMED,
        EPS,
        COLUMNS,
        CORRECTS,
        past,
        EACH,
        LEAST,
    )


def scan_tokens(grid: tuple[int, ...], given: dict[str, Any], constants: dict[str, Any]) -> None:
    """Launch the kernel; see `triton.delta_rule`."""
    corrects, decay = given["skip"] is None, given["decay"]
    each = decay.numel() // constants["HV"] if decay.dim() == 1 else 0
    scan_kernel[grid](**given, **constants, CORRECTS=corrects, EACH=each, num_warps=4, **OPTIONS)


def constants_of(
    key_heads: int, heads: int, key_dim: int, value_dim: int, *, normed: bool, least: float = 0.0
) -> dict[str, Any]:
    return {
        "HK": key_heads,
        "HV": heads,
        "DK": key_dim,
        "DV": value_dim,
        "DKP": max(16, next_power_of_2(key_dim)),
        "FILLED": cdiv(value_dim, COLUMNS) * COLUMNS,
        "BLOCK_V": _BLOCK_V if value_dim > COLUMNS else COLUMNS,
        "NORMED": normed,
        "EPS": EPS,
        "COLUMNS": COLUMNS,
        "LEAST": least,
    }
