# SPDX-License-Identifier: MIT
"""The convolution with a state on a GPU (step 6 of a request's life).

A program computes some channels of some tokens in parallel, because a token depends on inputs alone. States and kept
rows are overwritten only after they were read: by the same program if every sequence has one token, otherwise by a
second launch, in which a program handles some channels of a sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.states import TABLES
from candle_vllm.core.kernels.triton_build import OPTIONS, cdiv, next_power_of_2

if TYPE_CHECKING:
    from candle_vllm.core.kernels.states import StateCache, StateRows

_ROWS = 128  # sequences that a program compares at a time to find the sequence of a token


@triton.jit
def _row(x, gate, row, there, channel, x_stride, gate_stride):
    """Load rows of the step [TOKENS, BLOCK], fp32, and apply the gate if it exists."""
    value = tl.load(x + row * x_stride + channel, mask=there, other=0.0)
    if gate is not None:
        factor = tl.load(gate + row * gate_stride + channel, mask=there, other=0.0)
        value = (value.to(tl.float32) * factor.to(tl.float32)).to(value.dtype)
    return value.to(tl.float32)


@triton.jit
def _input(sequence, number, there, channel, C: tl.constexpr, BEFORE: tl.constexpr):
    """Load an input of a sequence [TOKENS, BLOCK], fp32: from the step, an accepted kept row, or the state.

    `sequence` is a tuple: x, gate, states, the first kept row, the first token (an index in the step), replays, source,
    and strides of x, gates, slots and kept rows. `number` is the index of the input, 0 for the first token. What can
    differ between tokens is [TOKENS, 1], `channel` [1, BLOCK].
    """
    x, gate, states, kept, begin, replays, source, x_stride, gate_stride, slot_stride, kept_row = sequence
    there = there & (channel < C)
    behind = replays + number
    now = _row(x, gate, begin + number, there & (number >= 0), channel, x_stride, gate_stride)
    drafted = tl.load(kept + behind * kept_row + channel, mask=there & (number < 0) & (behind >= 0), other=0.0)
    at = states + source * slot_stride + (BEFORE + behind) * C + channel
    earlier = tl.load(at, mask=there & (behind < 0) & (source >= 0), other=0.0).to(tl.float32)
    return tl.where(number >= 0, now, tl.where(behind >= 0, drafted, earlier))


@triton.jit
def _store_state(slot, sequence, number, there, channel, inside, C: tl.constexpr, BEFORE: tl.constexpr):
    """Write a sequence's state after the input `number`, this input and the BEFORE - 1 before it, where `inside`.

    `slot` points at the state; the other arguments are those of `_input`.
    """
    for tap in tl.static_range(BEFORE):
        value = _input(sequence, number - BEFORE + 1 + tap, there, channel, C, BEFORE)
        tl.debug_barrier()  # all threads must have read the state before one overwrites it
        tl.store(slot + tap * C + channel, value.to(slot.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "sequences"], do_not_specialize_on_alignment=TABLES)
def conv_kernel(
    x,  # [T, C]
    gate_in,  # [T, C], or None
    gate_out,
    weight,  # [C, TAPS] contiguous
    bias,  # [C], or None
    y,  # [T, C] contiguous
    states,  # [slots, BEFORE, C], slots of any stride
    kept,  # [slots, drafts, C], fp32, of any strides but the last
    query_start,  # [R + 1]
    slots,  # [R]
    sources,
    replays,
    stores,  # [T]
    keeps,
    tokens,
    sequences,
    x_stride,
    gate_stride,
    slot_stride,
    kept_slot,
    kept_row,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    SINGLE: tl.constexpr,  # sequence t has exactly token t in this step, and states are written
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    BEFORE: tl.constexpr = TAPS - 1
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    there = token < tokens
    if SINGLE:
        row = token
        number = token * 0
    else:
        row = token * 0
        for base in range(0, sequences, ROWS):
            index = base + tl.arange(0, ROWS)[None, :]
            ends = tl.load(query_start + 1 + index, mask=index < sequences, other=tokens).to(tl.int32)
            row += tl.sum(((ends <= token) & (index < sequences)).to(tl.int32), axis=1)[:, None]
        there = there & (row < sequences)
        number = token - tl.load(query_start + row, mask=there, other=0).to(tl.int32)
    slot = tl.load(slots + row, mask=there, other=0).to(tl.int64)
    source = tl.load(sources + row, mask=there, other=-1).to(tl.int64)
    replayed = tl.load(replays + row, mask=there, other=0).to(tl.int64)
    begin = (token - number).to(tl.int64)
    taken = kept + slot * kept_slot
    number = number.to(tl.int64)
    sequence = (
        x, gate_in, states, taken, begin, replayed, source, x_stride, gate_stride, slot_stride, kept_row
    )  # fmt: skip
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    if bias is not None:
        total += tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS):
        factor = tl.load(weight + channel * TAPS + tap, mask=channel < C, other=0.0).to(tl.float32)
        seen = number - BEFORE + tap
        total += factor * _input(sequence, seen, there, channel, C, BEFORE)
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    inside = there & (channel < C)
    if gate_out is not None:
        at = gate_out + token.to(tl.int64) * gate_stride + channel
        total = total * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token.to(tl.int64) * C + channel, total.to(y.dtype.element_ty), mask=inside)
    if SINGLE:
        to = tl.load(stores + token, mask=there, other=-1).to(tl.int64)
        place = tl.load(keeps + token, mask=there, other=-1).to(tl.int64)
        _store_state(states + to * slot_stride, sequence, number, there, channel, inside & (to >= 0), C, BEFORE)
        value = _row(x, gate_in, begin + number, inside, channel, x_stride, gate_stride)
        tl.debug_barrier()
        tl.store(taken + place * kept_row + channel, value, mask=inside & (place >= 0))


@triton.jit(do_not_specialize_on_alignment=TABLES)
def store_kernel(
    x,  # all as above
    gate_in,
    states,
    kept,
    query_start,
    slots,
    sources,
    replays,
    stores,
    keeps,
    x_stride,
    gate_stride,
    slot_stride,
    kept_slot,
    kept_row,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write states and kept rows of a sequence, in the order of its tokens."""
    BEFORE: tl.constexpr = TAPS - 1
    row = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    start = tl.load(query_start + row).to(tl.int32)
    end = tl.load(query_start + row + 1).to(tl.int32)
    slot = tl.load(slots + row).to(tl.int64)
    nothing = tl.zeros([1, 1], tl.int64)
    source = nothing + tl.load(sources + row)
    replayed = nothing + tl.load(replays + row)
    begin = nothing + start.to(tl.int64)
    taken = kept + slot * kept_slot
    sequence = (
        x, gate_in, states, taken, begin, replayed, source, x_stride, gate_stride, slot_stride, kept_row
    )  # fmt: skip
    every = channel >= 0
    for base in range(start, end, ROWS):
        index = base + tl.arange(0, ROWS)
        asked = tl.load(stores + index, mask=index < end, other=-1).to(tl.int32)
        asked = tl.maximum(asked, tl.load(keeps + index, mask=index < end, other=-1).to(tl.int32))
        wanted = tl.sum((asked >= 0).to(tl.int32))
        token = base
        while wanted > 0:
            to = tl.load(stores + token).to(tl.int64)
            place = tl.load(keeps + token).to(tl.int64)
            number = nothing + (token - start)
            if to >= 0:
                _store_state(states + to * slot_stride, sequence, number, every, channel, channel < C, C, BEFORE)
            if place >= 0:
                value = _row(x, gate_in, begin + number, channel < C, channel, x_stride, gate_stride)
                tl.debug_barrier()
                tl.store(taken + place * kept_row + channel, value, mask=channel < C)
            if (to >= 0) | (place >= 0):
                wanted -= 1
            token += 1


def short_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    cache: StateCache,
    rows: StateRows,
    *,
    silu: bool = False,
    gates: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """See the contract in the package."""
    (tokens, channels), taps, sequences = x.shape, weight.shape[1], len(rows.slots)
    states, kept = cache
    gate_in, gate_out = (None, None) if gates is None else gates
    gate_stride = 0 if gate_in is None else gate_in.stride(0)
    assert x.stride(1) == 1
    assert gates is None or all(gate.stride() == (gate_stride, 1) for gate in gates)
    assert tokens <= sequences or not rows.single  # padding tokens are sequences of their own
    assert weight.is_contiguous()
    assert bias is None or bias.is_contiguous()
    assert states.stride()[1:] == (channels, 1) or not states.numel()
    assert kept.dtype == torch.float32
    assert kept.stride(2) == 1 or not kept.numel()
    tables = rows.tables.values()
    assert all(table.is_contiguous() for table in tables)
    assert all(one.device == x.device for one in (weight, states, kept, *tables))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    constants = _constants(channels, taps, single=rows.single)
    strides = x.stride(0), gate_stride, states.stride(0), *kept.stride()[:2]
    grid = (cdiv(tokens, constants["TOKENS"]), cdiv(channels, constants["BLOCK"]))
    given, launch = (x, gate_in, gate_out, weight, bias, y, states, kept), {"num_warps": 4, **OPTIONS}
    conv_kernel[grid](*given, *tables, tokens, sequences, *strides, SILU=silu, **constants, **launch)
    if not rows.single:
        constants = _store_constants(channels, taps)
        grid = (sequences, cdiv(channels, constants["BLOCK"]))
        store_kernel[grid](x, gate_in, states, kept, *tables, *strides, **constants, **launch)
    return y


def _constants(channels: int, taps: int, *, single: bool) -> dict[str, Any]:
    """Return constants of `conv_kernel`: eight elements for each thread, up to four with `single`; not measured yet."""
    block = min(next_power_of_2(channels), 512 if single else 128)
    return {
        "C": channels,
        "TAPS": taps,
        "SINGLE": single,
        "TOKENS": 1 if single else max(1, 1024 // block),
        "BLOCK": block,
        "ROWS": _ROWS,
    }


def _store_constants(channels: int, taps: int) -> dict[str, Any]:
    return {"C": channels, "TAPS": taps, "BLOCK": min(next_power_of_2(channels), 512), "ROWS": _ROWS}
