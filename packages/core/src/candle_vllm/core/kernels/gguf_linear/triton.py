"""Linear layers and embedding rows with quantised weights on a GPU (step 6 of a request's life).

Few rows (decoding): a program takes some rows of the matrix and a stretch of K, reads their codes once through
asynchronous copies, and multiplies them on the tensor cores as exact numbers; scales are applied to the sums of a
group. magic + code is what is multiplied (see `triton_codes.py`), so the sum of x over the group times magic is taken
off again; that sum comes from the tensor cores too, by a product with ones. K is cut by the matrix's shape alone, and
the stretches are added in one order by a second kernel.

Many rows (prefill): a tile of weights is scaled, rounded to x's dtype in registers, and multiplied with a tile of x.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.gguf_linear.layout import PLANES, GgufMatrix, Planes
from candle_vllm.core.kernels.gguf_linear.triton_codes import (
    float_code,
    high_words,
    pair_tile,
    scale_of,
    scale_words,
    spread,
)
from candle_vllm.core.kernels.packed_linear.layout import PackedKind
from candle_vllm.core.kernels.triton_build import CAPABILITIES, OPTIONS, Build

# Tile shapes; chosen by counting instructions and registers of the compiled code, not yet measured on a GPU.
# By tokens: rows of the matrix in a program, and warps. With so few, Hopper too uses the plain tensor instructions,
# whose results do not depend on the tile. One warp needs no barriers; with more tokens x is worth sharing.
SMALL_TILES = MappingProxyType({8: (32, 1), 16: (64, 2)})
SMALL_STAGES = 4
PROGRAMS = 2048  # 16 warps for each SM of the largest GPUs: K is cut until there are so many
CUT_ROWS = 32  # of a program, where they are counted
LEAST_STEPS = 4  # of a program
LARGE_ROWS = 128
LARGE_TOKENS = 128
LARGE_WARPS = 8
LARGE_STAGES = 3
TOGETHER = 8  # row tiles that are taken with each other, so that their x stays in the cache


@triton.jit(do_not_specialize=["T"])
def small_kernel(
    x,  # [T, K]
    low,  # [steps, N, 16]
    high,  # [steps, or half of them, N, 16]
    scales,  # [steps, WORDS, N]
    supers,  # [K / 256, N]
    bias,  # [N]
    out,  # [T, N], or partial sums fp32 [splits, T, N]
    T,
    N,
    K,
    x_stride,
    steps,
    split_steps,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    NESTED: tl.constexpr,
    MINIMUM: tl.constexpr,
    ZERO: tl.constexpr,
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    G: tl.constexpr = 2 if LOW == 8 else 4
    STEP: tl.constexpr = G * 32
    E: tl.constexpr = WIDTH // 2  # elements that meet x at a time
    dtype: tl.constexpr = x.dtype.element_ty
    MAGIC: tl.constexpr = 128 if dtype == tl.bfloat16 else 1024
    OFFSET: tl.constexpr = MAGIC * 17 if LOW == 8 else MAGIC
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    row64 = row.to(tl.int64)
    height = tl.cast(N, tl.int64)
    token = tl.arange(0, TOKENS)
    asked = (token < T)[None, :]
    element = tl.arange(0, E)
    column = tl.arange(0, WIDTH)
    x_at = x + token[None, :].to(tl.int64) * x_stride + column[:, None]
    ones = tl.full((ROWS, WIDTH), 1.0, dtype)
    zeros = tl.zeros((ROWS, TOKENS), tl.float32)
    total = zeros
    first = tl.program_id(1) * split_steps
    last = tl.minimum(first + split_steps, steps)
    # Triton fetches ahead only what a dot product takes, so a step's scales are asked for during the one before.
    n0, n1, n2, n3, next_above = scale_words(scales, supers, first, row64, inside, height, NESTED, WORDS)
    for step in tl.range(first, last):
        w0, w1, w2, w3, above = n0, n1, n2, n3, next_above
        after = tl.minimum(step + 1, last - 1)
        n0, n1, n2, n3, next_above = scale_words(scales, supers, after, row64, inside, height, NESTED, WORDS)
        for part in tl.static_range(32 // WIDTH):
            elements = (part * E + element)[None, :]
            place = (step * height + row64)[:, None] * 16 + elements
            lows = spread(tl.load(low + place, mask=inside[:, None], other=0), LOW)
            highs = lows
            if HIGH > 0:
                highs = high_words(high, step, height, row64[:, None], elements, inside[:, None], HIGH)
                highs = spread(highs, HIGH)
            for g in tl.static_range(G):
                scale, minimum = scale_of(w0, w1, w2, w3, above, g, part, NESTED, MINIMUM, WIDTH, ZERO)
                k = step * STEP + g * 32 + part * WIDTH
                wanted = asked
                if PADDED:
                    wanted = asked & (k + column < K)[:, None]
                tile = tl.load(x_at + k, mask=wanted, other=0.0)
                sums = tl.dot(ones, tile, zeros)
                dots = tl.dot(pair_tile(lows, highs, 0, g, LOW, HIGH, dtype, ROWS, WIDTH), tile, zeros)
                if LOW == 8:  # the upper four bits
                    dots += tl.dot(pair_tile(lows, highs, 4, g, LOW, HIGH, dtype, ROWS, WIDTH), tile, zeros) * 16
                minimum -= scale * OFFSET
                total += dots * scale[:, None]
                total += sums * minimum[:, None]
    stored = inside[:, None] & asked
    if SPLIT:
        out += tl.program_id(1).to(tl.int64) * T * N
    elif BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    tl.store(out + token[None, :].to(tl.int64) * N + row64[:, None], total.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["T"])
def merge_kernel(
    partial,  # [splits, T, N] fp32
    bias,  # [N]
    out,  # [T, N]
    T,
    N,
    splits,
    BIAS: tl.constexpr,
    MOST: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64)
    split = tl.arange(0, MOST)
    at = (split[:, None].to(tl.int64) * T + token) * N + row[None, :]
    parts = tl.load(partial + at, mask=(split < splits)[:, None] & (row < N)[None, :], other=0.0)
    total = tl.sum(parts, 0)
    if BIAS:
        total += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
    tl.store(out + token * N + row, total.to(out.dtype.element_ty), mask=row < N)


@triton.jit(do_not_specialize=["T"])
def large_kernel(
    x,  # [T, K]
    low,
    high,
    scales,
    supers,
    bias,  # [N]
    out,  # [T, N]
    T,
    N,
    K,
    x_stride,
    steps,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    NESTED: tl.constexpr,
    MINIMUM: tl.constexpr,
    ZERO: tl.constexpr,
    PADDED: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    G: tl.constexpr = 2 if LOW == 8 else 4
    STEP: tl.constexpr = G * 32
    # Programs that run at the same time share a few tiles of rows and of tokens.
    row_tiles = tl.cdiv(N, ROWS)
    token_tiles = tl.cdiv(T, TOKENS)
    bunch = tl.program_id(0) // (TOGETHER * token_tiles)
    inner = tl.program_id(0) % (TOGETHER * token_tiles)
    bunch_tiles = tl.minimum(row_tiles - bunch * TOGETHER, TOGETHER)
    row = (bunch * TOGETHER + inner % bunch_tiles) * ROWS + tl.arange(0, ROWS)
    token = (inner // bunch_tiles) * TOKENS + tl.arange(0, TOKENS)
    inside = row < N
    row64 = row.to(tl.int64)
    height = tl.cast(N, tl.int64)
    asked = (token < T)[None, :]
    element = tl.arange(0, 16)
    column = tl.arange(0, 32)
    x_at = x + token[None, :].to(tl.int64) * x_stride + column[:, None]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, steps):
        w0, w1, w2, w3, above = scale_words(scales, supers, step, row64, inside, height, NESTED, WORDS)
        place = (step * height + row64)[:, None] * 16 + element[None, :]
        lows = tl.load(low + place, mask=inside[:, None], other=0)
        highs = lows
        if HIGH > 0:
            highs = high_words(high, step, height, row64[:, None], element[None, :], inside[:, None], HIGH)
        for g in tl.static_range(G):
            scale, minimum = scale_of(w0, w1, w2, w3, above, g, 0, NESTED, MINIMUM, WIDTH, ZERO)
            scale = scale[:, None]
            shift = minimum[:, None] - scale * 2048.0
            if WIDTH == 16:
                scale_2, minimum_2 = scale_of(w0, w1, w2, w3, above, g, 1, NESTED, MINIMUM, WIDTH, ZERO)
                second = (element >= 8)[None, :]
                shift = tl.where(second, (minimum_2 - scale_2 * 2048.0)[:, None], shift)
                scale = tl.where(second, scale_2[:, None], scale)
            even = float_code(lows, highs, g, 0, G, LOW, HIGH) * scale + shift
            odd = float_code(lows, highs, g, 1, G, LOW, HIGH) * scale + shift
            weights = tl.reshape(tl.join(even, odd), (ROWS, 32)).to(x.dtype.element_ty)
            k = step * STEP + g * 32
            wanted = asked
            if PADDED:
                wanted = asked & (k + column < K)[:, None]
            total = tl.dot(weights, tl.load(x_at + k, mask=wanted, other=0.0), total)
    if BIAS:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    stored = inside[:, None] & asked
    tl.store(out + token[None, :].to(tl.int64) * N + row64[:, None], total.to(out.dtype.element_ty), mask=stored)


@triton.jit
def embedding_kernel(
    token_ids,  # [T]
    low,
    high,
    scales,
    supers,
    out,  # [T, K]
    N,
    K,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    WORDS: tl.constexpr,
    WIDTH: tl.constexpr,
    NESTED: tl.constexpr,
    MINIMUM: tl.constexpr,
    ZERO: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One step of one token in a program."""
    G: tl.constexpr = 2 if LOW == 8 else 4
    step = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(token_ids + token + tl.arange(0, 1)).to(tl.int64)
    inside = (row >= 0) & (row < N)
    height = tl.cast(N, tl.int64)
    w0, w1, w2, w3, above = scale_words(scales, supers, step, row, inside, height, NESTED, WORDS)
    element = tl.arange(0, 16)
    place = (step * height + row) * 16 + element
    lows = tl.load(low + place, mask=inside, other=0)
    highs = lows
    if HIGH > 0:
        highs = high_words(high, step, height, row, element, inside, HIGH)
    for g in tl.static_range(G):
        scale, minimum = scale_of(w0, w1, w2, w3, above, g, 0, NESTED, MINIMUM, WIDTH, ZERO)
        if WIDTH == 16:
            scale_2, minimum_2 = scale_of(w0, w1, w2, w3, above, g, 1, NESTED, MINIMUM, WIDTH, ZERO)
            scale = tl.where(element >= 8, scale_2, scale)
            minimum = tl.where(element >= 8, minimum_2, minimum)
        even = (float_code(lows, highs, g, 0, G, LOW, HIGH) - 2048.0) * scale + minimum
        odd = (float_code(lows, highs, g, 1, G, LOW, HIGH) - 2048.0) * scale + minimum
        k = (step * G + g) * 32 + tl.arange(0, 32)
        values = tl.reshape(tl.join(even, odd), (32,)).to(out.dtype.element_ty)
        tl.store(out + token * K + k, values, mask=(k < K) if PADDED else None)


def linear_small(x: torch.Tensor, matrix: GgufMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """For up to 16 rows; see the contract in the package. Two launches where K is cut, else one."""
    tokens = _checked(x, matrix, bias)
    assert tokens <= 16, "more rows are for `linear`"
    out = torch.empty((tokens, matrix.rows), dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    steps = matrix.planes.steps(matrix.columns)
    split_steps = _split_steps(steps, matrix.rows)
    splits = triton.cdiv(steps, split_steps)
    partial = torch.empty((splits, *out.shape), dtype=torch.float32, device=x.device) if splits > 1 else out
    constants = _small_constants(matrix.planes, matrix.columns, splits > 1, bias is not None, tokens)
    small_kernel[(triton.cdiv(matrix.rows, constants["ROWS"]), splits)](
        x,
        *_planes_of(matrix),
        bias,
        partial,
        tokens,
        matrix.rows,
        matrix.columns,
        x.stride(0),
        steps,
        split_steps,
        **constants,
        num_warps=SMALL_TILES[constants["TOKENS"]][1],
        num_stages=SMALL_STAGES,
        **OPTIONS,
    )
    if splits > 1:
        merge_kernel[(triton.cdiv(matrix.rows, _MERGE_ROWS), tokens)](
            partial,
            bias,
            out,
            tokens,
            matrix.rows,
            splits,
            BIAS=bias is not None,
            MOST=triton.next_power_of_2(splits),
            ROWS=_MERGE_ROWS,
            num_warps=4,
            **OPTIONS,
        )
    return out


def linear(x: torch.Tensor, matrix: GgufMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """For any number of rows; see the contract in the package."""
    tokens = _checked(x, matrix, bias)
    out = torch.empty((tokens, matrix.rows), dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    constants = _large_constants(matrix.planes, matrix.columns, bias is not None, tokens)
    tiles = triton.cdiv(matrix.rows, constants["ROWS"]) * triton.cdiv(tokens, constants["TOKENS"])
    large_kernel[(tiles,)](
        x,
        *_planes_of(matrix),
        bias,
        out,
        tokens,
        matrix.rows,
        matrix.columns,
        x.stride(0),
        matrix.planes.steps(matrix.columns),
        **constants,
        num_warps=LARGE_WARPS,
        num_stages=LARGE_STAGES,
        **OPTIONS,
    )
    return out


def embedding(token_ids: torch.Tensor, matrix: GgufMatrix, dtype: torch.dtype) -> torch.Tensor:
    """See the contract in the package."""
    assert token_ids.dim() == 1
    assert token_ids.is_contiguous()
    assert token_ids.dtype in (torch.int32, torch.int64)
    assert token_ids.device == matrix.device
    out = torch.empty((len(token_ids), matrix.columns), dtype=dtype, device=matrix.device)
    if len(token_ids):
        embedding_kernel[(len(token_ids), matrix.planes.steps(matrix.columns))](
            token_ids,
            *_planes_of(matrix),
            out,
            matrix.rows,
            matrix.columns,
            **_constants(matrix.planes, matrix.columns),
            num_warps=1,
            **OPTIONS,
        )
    return out


_MERGE_ROWS = 256


def _checked(x: torch.Tensor, matrix: GgufMatrix, bias: torch.Tensor | None) -> int:
    """The number of rows."""
    assert x.dtype in (torch.bfloat16, torch.float16)
    assert x.stride(1) == 1, "the numbers of a row lie behind each other"
    assert x.shape[1] == matrix.columns
    assert x.device == matrix.device
    if bias is not None:
        assert bias.shape == (matrix.rows,)
        assert bias.is_contiguous()
        assert bias.device == x.device
    return len(x)


def _planes_of(matrix: GgufMatrix) -> tuple[torch.Tensor | None, ...]:
    return matrix.low, matrix.high, matrix.scales, matrix.supers


def _split_steps(steps: int, rows: int) -> int:
    """Steps of K that a program takes: by the matrix's shape alone, never by the number of rows of x."""
    wanted = max(PROGRAMS // triton.cdiv(rows, CUT_ROWS), 1)
    return max(triton.cdiv(steps, wanted), min(LEAST_STEPS, steps))


def _constants(planes: Planes, columns: int) -> dict[str, Any]:
    layout = planes.layout
    return {
        "LOW": planes.low,
        "HIGH": planes.high,
        "WORDS": planes.words,
        "WIDTH": layout.width,
        "NESTED": layout.nested,
        "MINIMUM": layout.minimum,
        "ZERO": layout.zero,
        "PADDED": columns % planes.step != 0,
    }


def _small_constants(planes: Planes, columns: int, split: bool, bias: bool, tokens: int) -> dict[str, Any]:
    wide = 8 if tokens <= 8 else 16
    found = _constants(planes, columns)
    return {**found, "SPLIT": split, "BIAS": bias, "ROWS": SMALL_TILES[wide][0], "TOKENS": wide}


def _large_constants(planes: Planes, columns: int, bias: bool, tokens: int) -> dict[str, Any]:
    found = _constants(planes, columns)
    wide = 32 if tokens <= 32 else 64 if tokens <= 64 else LARGE_TOKENS
    return {**found, "BIAS": bias, "ROWS": LARGE_ROWS, "TOKENS": wide, "TOGETHER": TOGETHER}


def _build(kernel: Any, kind: PackedKind, dtype: str, constants: dict[str, Any], **options: Any) -> Build:
    planes = PLANES[kind]
    elements = {1: "*i16", 2: "*i16", 4: "*i32", 8: "*i32"}
    types = dict.fromkeys(("T", "N", "K", "x_stride", "steps", "split_steps", "splits"), "i32")
    types |= {"x": f"*{dtype}", "low": elements[planes.low], "scales": "*i32", "token_ids": "*i64", "out": f"*{dtype}"}
    types |= {"partial": "*fp32"}
    if planes.high:
        types["high"] = elements[planes.high]
    if planes.layout.nested:
        types["supers"] = "*i32"
    if constants.get("BIAS"):
        types["bias"] = f"*{dtype}"
    if constants.get("SPLIT"):
        types["out"] = "*fp32"
    arguments = {name: types[name] for name in kernel.arg_names if name in types}
    missing = {name: None for name in ("high", "supers", "bias") if name in kernel.arg_names and name not in types}
    aligned = tuple(name for name in ("N", "K", "x_stride") if name in arguments)
    return Build(
        kernel,
        arguments,
        {**constants, **missing},
        aligned=aligned,
        label="-".join(str(x) for x in (kind.name, dtype, constants.get("TOKENS")) if x),
        **options,
    )


def _small_build(
    kind: PackedKind, dtype: str, columns: int, tokens: int, split: bool, capabilities: tuple[int, ...]
) -> Build:
    constants = _small_constants(PLANES[kind], columns, split, not split, tokens)
    warps = SMALL_TILES[constants["TOKENS"]][1]
    options = {"num_warps": warps, "num_stages": SMALL_STAGES, "capabilities": capabilities}
    return _build(small_kernel, kind, dtype, constants, **options)


def _large_build(kind: PackedKind, dtype: str, columns: int, tokens: int, capabilities: tuple[int, ...]) -> Build:
    constants = _large_constants(PLANES[kind], columns, True, tokens)
    options = {"num_warps": LARGE_WARPS, "num_stages": LARGE_STAGES, "capabilities": capabilities}
    return _build(large_kernel, kind, dtype, constants, **options)


_HOPPER = (90,)

AOT = (
    *(_small_build(kind, "bf16", 4096, 16, True, _HOPPER) for kind in PackedKind),
    *(_small_build(kind, "bf16", 4096, 1, True, CAPABILITIES) for kind in (PackedKind.Q4_K, PackedKind.Q6_K)),
    _small_build(PackedKind.Q3_K, "fp16", 4096, 8, False, CAPABILITIES),
    _small_build(PackedKind.Q5_1, "bf16", 4128, 16, False, CAPABILITIES),
    *(_large_build(kind, "bf16", 4096, 512, _HOPPER) for kind in PackedKind if kind.name.endswith("K")),
    *(_large_build(kind, "bf16", 4096, 512, (80, 100)) for kind in (PackedKind.Q4_K, PackedKind.Q3_K)),
    _large_build(PackedKind.Q8_0, "fp16", 4096, 32, CAPABILITIES),
    _large_build(PackedKind.Q5_1, "bf16", 4128, 64, CAPABILITIES),
    _build(embedding_kernel, PackedKind.Q6_K, "bf16", _constants(PLANES[PackedKind.Q6_K], 4096), num_warps=1),
    _build(merge_kernel, PackedKind.Q4_K, "bf16", {"BIAS": True, "MOST": 16, "ROWS": _MERGE_ROWS}),
)
