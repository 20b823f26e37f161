# SPDX-License-Identifier: MIT
"""The gated delta rule, Mamba 1 and 2 on a GPU, token by token (step 6 of a request's life).

A program holds some columns of a value head's state in registers and processes all tokens of one sequence. Every
program computes norms, decays and strengths itself, which costs less than reading the state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from candle_vllm.core.kernels.delta_rule.layout import COLUMNS, EPS
from candle_vllm.core.kernels.states import TABLES
from candle_vllm.core.kernels.triton_build import OPTIONS, cdiv, next_power_of_2

STRIDES = ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head", "a_token", "b_token")
CACHE_STRIDES = ("slot_stride", "kept_slot", "kept_row")
_BLOCK_V = 32  # columns of a program; not measured yet
_COLUMNS, _EPS = tl.constexpr(COLUMNS), tl.constexpr(EPS)


@dataclass(frozen=True)
class Form:
    """Sizes and variant of a layer, constants of the kernels.

    Attributes:
        HK, HV, DK, DV: heads of keys and values, and their dimensions.
        NORMED: whether q and k are normalised.
        CORRECTS: whether it is the delta rule; otherwise Mamba.
        EACH: decays of a value head: 1 or DK; 0: of each element, Mamba 1.
        LEAST: lower bound of the logs of decays, or 0.
    """

    HK: int
    HV: int
    DK: int
    DV: int
    NORMED: bool
    CORRECTS: bool
    EACH: int
    LEAST: float = 0.0

    @property
    def DKP(self) -> int:
        """DK rounded up to a power of two."""
        return max(16, next_power_of_2(self.DK))

    @property
    def FILLED(self) -> int:
        """DV rounded up to whole tiles."""
        return cdiv(self.DV, COLUMNS) * COLUMNS

    @property
    def gates(self) -> int:
        """Elements of a value head's `a` and `bias`."""
        return self.EACH or self.DV


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
def tile_places(row, column, DK: tl.constexpr):
    """Return the offsets [DKP, BLOCK_V] of elements of S in the tiles of a value head."""
    return (column // _COLUMNS)[None, :] * (DK * _COLUMNS) + row[:, None] * _COLUMNS + (column % _COLUMNS)[None, :]


@triton.jit
def gates_of(x, row, column, FORM: tl.constexpr):
    """Load a value head's a, decay or bias: one element; [DKP, 1] if EACH > 1; for EACH 0, Mamba 1, [1, BLOCK_V]."""
    if FORM.EACH == 0:
        found = tl.load(x + column[None, :], mask=(column < FORM.DV)[None, :], other=0.0)
    elif FORM.EACH > 1:
        found = tl.load(x + row[:, None], mask=(row < FORM.DK)[:, None], other=0.0)
    else:
        found = tl.load(x)
    return found


@triton.jit
def take_in(state, k, v, a, b, gates, FORM: tl.constexpr):
    """Return the state [DKP, BLOCK_V] after a token with k [DKP], v [BLOCK_V] and gates a and b, fp32.

    `gates` is the tuple of the value head's decay and bias (`gates_of`), and of `DeltaGates.strength`.
    """
    decay, bias, most = gates
    if FORM.NORMED:
        k = k / tl.sqrt(tl.sum(k * k) + _EPS)
    state = state * tl.exp(log_decay(a, bias, decay, FORM.LEAST))
    if FORM.CORRECTS:
        v -= tl.sum(state * k[:, None], axis=0)
        strength = strength_of(b, most)
    else:
        strength = step_size(a, bias)
    return state + k[:, None] * (strength * v[None, :])


@triton.jit
def scan_rows(state, first, last, pointers, strides, memory, gates, scale, skip, row, column, FORM: tl.constexpr):
    """Process tokens one by one: write their results and the states to store, return the last state.

    first, last: the first token, an index in the step, and the end of the tokens.
    pointers: (q, k, v, a, b, out), q and k of the key head, the others of the value head.
    strides: (q_token, k_token, v_token, a_token, b_token).
    memory: (states of the value head from the first slot on, stores, slot_stride).
    gates: see `take_in`. skip: used if not CORRECTS. row, column: [DKP] and [BLOCK_V].
    """
    q, k, v, a, b, out = pointers
    q_token, k_token, v_token, a_token, b_token = strides
    states, stores, slot_stride = memory
    DK: tl.constexpr = FORM.DK
    DV: tl.constexpr = FORM.DV
    places = tile_places(row, column, DK)
    inside = (row < DK)[:, None] & (column < FORM.FILLED)[None, :]
    for token in range(first, last):
        at = tl.cast(token, tl.int64)
        key = tl.load(k + at * k_token + row, mask=row < DK, other=0.0).to(tl.float32)
        query = tl.load(q + at * q_token + row, mask=row < DK, other=0.0).to(tl.float32)
        value = tl.load(v + at * v_token + column, mask=column < DV, other=0.0).to(tl.float32)
        given, other = gates_of(a + at * a_token, row, column, FORM), 0.0
        if FORM.CORRECTS:
            other = tl.load(b + at * b_token)
        state = take_in(state, key, value, given, other, gates, FORM)
        if FORM.NORMED:
            query = query / tl.sqrt(tl.sum(query * query) + _EPS)
        result = tl.sum(state * (query * scale)[:, None], axis=0)
        if not FORM.CORRECTS:
            result += skip * value
        tl.store(out + at * (FORM.HV * DV) + column, result.to(out.dtype.element_ty), mask=column < DV)
        slot = tl.load(stores + at).to(tl.int64)
        if slot >= 0:
            tl.store(states + slot * slot_stride + places, state, mask=inside)
    return state


@triton.jit
def state_before(states, slot_stride, kept, kept_row, sequence, gates, head, key_head, row, column, FORM: tl.constexpr):
    """Return the state [DKP, BLOCK_V] before a sequence's first token of the step.

    states: pointer to the value head in the first slot. kept: pointer to the first kept row of the sequence.
    sequence: the sequence's (source, replays). gates: see `take_in`.
    """
    source, replays = sequence
    KEYS: tl.constexpr = FORM.HK * FORM.DK  # elements of a kept row's keys, and of its values
    VALUES: tl.constexpr = FORM.HV * FORM.DV
    at = states + source.to(tl.int64) * slot_stride + tile_places(row, column, FORM.DK)
    inside = ((row < FORM.DK) & (row * 0 + source >= 0))[:, None] & (column < FORM.FILLED)[None, :]
    state = tl.load(at, mask=inside, other=0.0)
    tl.debug_barrier()  # threads must have read the slot before other threads of the program write it
    for _ in range(replays):
        key = tl.load(kept + key_head * FORM.DK + row, mask=row < FORM.DK, other=0.0)
        value = tl.load(kept + KEYS + head * FORM.DV + column, mask=column < FORM.DV, other=0.0)
        inputs = kept + KEYS + VALUES
        given, other = gates_of(inputs + head * FORM.gates, row, column, FORM), 0.0
        if FORM.CORRECTS:
            other = tl.load(inputs + FORM.HV * FORM.EACH + head)
        state = take_in(state, key, value, given, other, gates, FORM)
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
    FORM: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    key_head = head // (FORM.HV // FORM.HK)
    row = tl.arange(0, FORM.DKP)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    shift = gates_of(bias + head * FORM.gates, row, column, FORM)
    past = 0.0
    if FORM.EACH == 0:
        inside = (row < FORM.DK)[:, None] & (column < FORM.FILLED)[None, :]
        places = head * (FORM.FILLED * FORM.DK) + tile_places(row, column, FORM.DK)
        factor = tl.load(decay + places, mask=inside, other=0.0)
        past = tl.load(skip + head * FORM.DV + column, mask=column < FORM.DV, other=0.0)
    else:
        factor = gates_of(decay + head * FORM.EACH, row, column, FORM)
        if not FORM.CORRECTS:
            past = tl.load(skip + head)
    states += head * (FORM.FILLED * FORM.DK)
    kept += tl.load(slots + sequence).to(tl.int64) * kept_slot
    begins = (tl.load(sources + sequence), tl.load(replays + sequence))
    gates = (factor, shift, most)
    state = state_before(states, slot_stride, kept, kept_row, begins, gates, head, key_head, row, column, FORM)
    first, last = tl.load(query_start + sequence).to(tl.int32), tl.load(query_start + sequence + 1).to(tl.int32)
    q, k = q + key_head * q_head, k + key_head * k_head
    pointers = (q, k, v + head * v_head, a + head * FORM.gates, b + head, out + head * FORM.DV)
    strides, memory = (q_token, k_token, v_token, a_token, b_token), (states, stores, slot_stride)
    scan_rows(state, first, last, pointers, strides, memory, gates, scale, past, row, column, FORM)


def scan_tokens(sequences: int, given: dict[str, Any], form: Form) -> None:
    """Launch the kernel; see `triton.delta_rule`."""
    block = block_of(form)
    grid = sequences, form.HV, cdiv(form.DV, block)
    scan_kernel[grid](**given, FORM=form, BLOCK_V=block, num_warps=4, **OPTIONS)


def block_of(form: Form) -> int:
    """Return the number of columns of a program of `scan_kernel`."""
    return _BLOCK_V if form.DV > COLUMNS else COLUMNS
