# SPDX-License-Identifier: MIT
"""The gated delta rule, Mamba 1 and 2 on a GPU: checks, launches, and kept rows (step 6 of a request's life).

All programs of a key head read the kept rows (inputs of draft tokens, see `kernels/states.py`), so a second launch
writes the new kept rows, if the step can have draft tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.delta_rule.layout import DeltaGates
from candle_vllm.core.kernels.delta_rule.triton_chunks import in_chunks, scan_chunks
from candle_vllm.core.kernels.delta_rule.triton_scan import CACHE_STRIDES, STRIDES, Form, scan_tokens
from candle_vllm.core.kernels.states import TABLES
from candle_vllm.core.kernels.triton_build import OPTIONS, cdiv

if TYPE_CHECKING:
    from candle_vllm.core.kernels.states import StateCache, StateRows

_ROWS = 128  # sequences that a program compares at a time to find the sequence of its token
_PART = 1024  # elements of a kept row that a program copies


@triton.jit(do_not_specialize=["sequences"], do_not_specialize_on_alignment=TABLES)
def keep_kernel(
    k,  # all as in `triton_scan.scan_kernel`
    v,
    a,
    b,
    kept,
    query_start,
    slots,
    keeps,
    sequences,
    k_token,
    k_head,
    v_token,
    v_head,
    a_token,
    b_token,
    kept_slot,
    kept_row,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
):
    """Write a part of a token's kept row, if the token has one."""
    HK: tl.constexpr = FORM.HK
    HV: tl.constexpr = FORM.HV
    DK: tl.constexpr = FORM.DK
    DV: tl.constexpr = FORM.DV
    EACH: tl.constexpr = FORM.EACH
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(keeps + token).to(tl.int64)
    if place >= 0:
        sequence = 0
        for base in range(0, sequences, ROWS):
            index = base + tl.arange(0, ROWS)
            ends = tl.load(query_start + 1 + index, mask=index < sequences, other=0)
            sequence += tl.sum(((index < sequences) & (ends <= token)).to(tl.int32))
        to = kept + tl.load(slots + sequence).to(tl.int64) * kept_slot + place * kept_row
        at = tl.program_id(1) * PART + tl.arange(0, PART)
        here = at < HK * DK
        value = tl.load(k + token * k_token + at // DK * k_head + at % DK, mask=here, other=0.0)
        tl.store(to + at, value.to(tl.float32), mask=here)
        number = at - HK * DK
        here = (number >= 0) & (number < HV * DV)
        value = tl.load(v + token * v_token + number // DV * v_head + number % DV, mask=here, other=0.0)
        tl.store(to + at, value.to(tl.float32), mask=here)
        number -= HV * DV
        here = (number >= 0) & (number < HV * (EACH or DV))
        value = tl.load(a + token * a_token + number, mask=here, other=0.0)
        tl.store(to + at, value.to(tl.float32), mask=here)
        if EACH > 0:  # Mamba 1 has no b
            number -= HV * EACH
            here = (number >= 0) & (number < HV)
            value = tl.load(b + token * b_token + number, mask=here, other=0.0)
            tl.store(to + at, value.to(tl.float32), mask=here)


def delta_rule(
    inputs: Sequence[torch.Tensor], gates: DeltaGates, cache: StateCache, rows: StateRows, *, scale: float, normed: bool
) -> torch.Tensor:
    """See the contract in the package; the inputs are q, k, v, a and b."""
    q, k, v, a, b = inputs
    tokens, heads, value_dim = v.shape
    key_heads, key_dim = k.shape[1:]
    states, kept = cache
    assert states.dtype == kept.dtype == gates.decay.dtype == gates.bias.dtype == torch.float32
    assert all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (q, k, v, a, b))
    assert states.numel() == 0 or states[0].is_contiguous()
    assert kept.numel() == 0 or kept.stride(2) == 1
    tables = rows.tables
    assert all(table.is_contiguous() for table in tables.values())
    assert all(x.device == q.device for x in (k, v, a, b, states, kept, *gates[:2], *tables.values()))
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if not out.numel():
        return out
    strides = dict(zip(STRIDES, (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], a.stride(0), b.stride(0))))
    strides |= dict(zip(CACHE_STRIDES, (states.stride(0), *kept.stride()[:2])))
    keeps = tables.pop("keeps")
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "a": a, "b": b, "decay": gates.decay, "bias": gates.bias}
    given |= {"out": out, "states": states, "kept": kept, **tables, "skip": gates.skip}
    given |= {"most": gates.strength, "scale": scale, **strides}
    each = gates.decay.numel() // heads if gates.decay.dim() == 1 else 0
    form = Form(key_heads, heads, key_dim, value_dim, normed, gates.skip is None, each, gates.least)
    if each and in_chunks(q, rows.positions, normed=normed):
        assert rows.positions.is_contiguous()
        scan_chunks(len(rows.slots), given, rows.positions, form)
    else:
        scan_tokens(len(rows.slots), given, form)
    if kept.shape[1]:
        asked = ("k", "v", "a", "b", "kept", "query_start", "slots", *STRIDES[2:], *CACHE_STRIDES[1:])
        keep_kernel[(tokens, cdiv(kept.shape[2], _PART))](
            **{name: given[name] for name in asked},
            keeps=keeps,
            sequences=len(rows.slots),
            FORM=form,
            ROWS=_ROWS,
            PART=_PART,
            num_warps=4,
            **OPTIONS,
        )
    return out
