# SPDX-License-Identifier: MIT
"""Paged attention of the GPU against the reference: scattered pages, NaN wherever nothing may be read."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch

from candle_vllm.core.errors import ConfigError
from candle_vllm.core.kernels.attention import reference, triton_decode, triton_prefill
from candle_vllm.core.kernels.attention.backend import AttentionNeeds, Backend
from candle_vllm.core.kernels.attention.backends import choose
from candle_vllm.core.kernels.attention.rows import AttentionRows, DeviceRows
from candle_vllm.core.kernels.attention.triton import paged_attention
from candle_vllm.core.kernels.attention.triton_relative import relative_logits
from candle_vllm.core.kernels.kv_write.scaled_rows import SCALE, codes_and_scales, write_rows
from tests.common_run import few

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """RMS(error) / RMS(wanted)."""
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass(frozen=True)
class Step:
    """A cache with some sequences, and queries for their last tokens."""

    q: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    rows: AttentionRows


def make_step(
    device: torch.device,
    contexts: tuple[int, ...],
    queries: tuple[int, ...],
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    spare: int = 0,
    shuffle: int = 1,
) -> Step:
    """Sequence i of a given length always holds the same numbers, wherever its blocks and its neighbours are."""
    blocks = [-(-context // size) for context in contexts]
    order = torch.randperm(sum(blocks) + 3, generator=torch.Generator().manual_seed(shuffle))
    shape = (sum(blocks) + 3, size, kv_heads, dim)
    caches = [torch.full(shape, math.nan, dtype=dtype) for _ in range(2)]
    tables = torch.full((len(contexts), max(blocks) + spare), 10**6)
    q, used = [], 0
    for row, context in enumerate(contexts):
        tables[row, : blocks[row]] = order[used : used + blocks[row]]
        used += blocks[row]
        at = torch.arange(context)
        slots = tables[row, at // size] * size + at % size
        for n, cache in enumerate(caches):
            cache.flatten(0, 1)[slots] = random(context, kv_heads, dim, dtype=dtype, seed=2 * context + n)
        q.append(random(context, heads, dim, dtype=dtype, seed=3 * context)[context - queries[row] :])
    starts = tuple(itertools.accumulate(queries, initial=0))
    fused = torch.cat([torch.cat(q), torch.full((starts[-1], 2 * kv_heads, dim), math.nan, dtype=dtype)], 1).to(device)
    rows = AttentionRows(starts, contexts, tables.to(device))
    return Step(fused[:, :heads], caches[0].to(device), caches[1].to(device), rows)


def run(step: Step, rows: DeviceRows | None = None, **options) -> torch.Tensor:
    options = {"scale": step.q.shape[2] ** -0.5, **options}
    return paged_attention(step.q, step.key_cache, step.value_cache, rows or step.rows.on_device(), **options)


def check(step: Step, decodes: int | None = None, **options) -> torch.Tensor:
    """Compare with the reference, and return what the kernels wrote."""
    rows = step.rows.on_device()
    got = run(step, rows if decodes is None else replace(rows, decodes=decodes), **options)
    options = {"scale": step.q.shape[2] ** -0.5, **options}
    wanted = reference.paged_attention(step.q, step.key_cache, step.value_cache, step.rows, **options)
    assert got.dtype == step.q.dtype
    assert error(got, wanted) < TOLERANCE[step.q.dtype]
    return got


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 64), (6, 2, 80), (4, 2, 8), (5, 1, 16), (8, 1, 512)])
def test_a_mixed_step(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    """Decodes, a whole prompt, chunks with context before them, and the last token of a prompt."""
    shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "dtype": dtype}
    step = make_step(device, (1, 260, 40, 45, 69, 17), (1, 1, 40, 4, 33, 1), **shape)
    assert step.rows.on_device().decodes == 2
    check(step)
    check(step, decodes=0)


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.float16), (80, torch.float32), (256, torch.float16)])
@pytest.mark.usefixtures("turing")
def test_without_tensor_cores(device: torch.device, dim: int, dtype: torch.dtype) -> None:
    step = make_step(device, (1, 290, 40, 45, 17), (1, 1, 40, 4, 1), heads=6, kv_heads=2, dim=dim, dtype=dtype)
    check(step)
    check(step, window=33)


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("size", [16, 32, 64, 256])
@pytest.mark.parametrize("dim", [96, 256])
def test_block_sizes(device: torch.device, size: int, dim: int) -> None:
    step = make_step(device, (257, 100), (1, 40), heads=2, kv_heads=1, dim=dim, size=size, dtype=torch.float16)
    check(step)


@pytest.mark.one_of_each(4)
@pytest.mark.parametrize("window", [1, 5, 64, 1000, -1, -30])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_window_and_soft_cap(device: torch.device, window: int, softcap: float | None) -> None:
    step = make_step(device, (200, 300, 150, 140), (1, 1, 150, 30), heads=4, kv_heads=2, dim=32, dtype=torch.float16)
    check(step, window=window, softcap=softcap)


@pytest.mark.one_of_each(2)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # a sink above all scores is meant to become inf
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (16, None), (None, 2.0)])
@pytest.mark.parametrize("decodes", [None, 0])
def test_sinks(device: torch.device, decodes: int | None, window: int | None, softcap: float | None) -> None:
    """Below every score, among them, above all of them; in decodes of one split and of several, and in prompts."""
    sinks = torch.tensor([-300.0, 0.0, 2.0, 300.0], device=device)
    step = make_step(device, (200, 300, 1, 40, 60), (1, 1, 1, 40, 30), heads=4, kv_heads=2, dim=32)
    got = check(step, decodes=decodes, sinks=sinks, window=window, softcap=softcap)
    assert (got[:, 3] == 0).all()
    without = check(step, decodes=decodes, window=window, softcap=softcap)
    assert torch.equal(got[:, 0], without[:, 0])


@pytest.mark.one_of_each
@pytest.mark.parametrize("options", [{}, {"window": 30, "softcap": 2.0}])
@pytest.mark.parametrize("kind", [None, "int8"])
def test_scores_fall_with_distance(device: torch.device, kind: str | None, options: dict) -> None:
    """By a slope of each head, in decodes of one split and of several, and in prompts."""
    shape = {"heads": 6, "kv_heads": 2, "dim": 32, "dtype": torch.float16}
    step = make_step(device, (200, 300, 1, 40, 60), (1, 1, 1, 40, 30), **shape)
    step = step if kind is None else scaled(step, SCALED[kind])
    slopes = torch.tensor([0.5, 0.0, 0.03, 0.7, 0.001, 0.2], device=device)
    check(step, slopes=slopes, **options)
    check(step, decodes=0, slopes=slopes, **options)


@pytest.mark.one_of_each
@pytest.mark.parametrize("options", [{}, {"window": 30, "softcap": 2.0}])
@pytest.mark.parametrize(("kind", "dtype"), [(None, torch.float32), (None, torch.float16), ("int8", torch.float16)])
def test_relative_logits(device: torch.device, kind: str | None, dtype: torch.dtype, options: dict) -> None:
    """Of distances within the profiles and beyond, in decodes of one split and of several, and in prompts."""
    shape = {"heads": 6, "kv_heads": 2, "dim": 32, "dtype": dtype}
    step = make_step(device, (200, 300, 1, 40, 60), (1, 1, 1, 40, 30), **shape)
    step = step if kind is None else scaled(step, SCALED[kind])
    relative = random(73, 6, 5, dtype=dtype, seed=1).to(device), random(5, 70, seed=2).to(device)
    check(step, relative=relative, **options)
    check(step, decodes=0, relative=relative, **options)
    some, whole = relative_logits(relative[0][40:43], relative[1]), relative_logits(*relative)[40:43]
    if device.type == "cuda":
        assert torch.equal(some, whole), "they depend on their own token alone"
    torch.testing.assert_close(some, whole, rtol=1e-5, atol=1e-5)  # numpy's products depend on the tile


def test_a_single_token_as_a_prompt(device: torch.device) -> None:
    """The other rows of its tile, behind the last token, have no key in their window."""
    check(make_step(device, (100,), (1,), heads=2, kv_heads=1, dim=16), decodes=0, window=5)


def test_long_contexts_are_split_and_merged(device: torch.device) -> None:
    step = make_step(device, (3, 256, 257, 600), (1, 1, 1, 1), heads=4, kv_heads=2, dim=16)
    got = check(step)
    check(step, window=400)
    narrow = replace(step, rows=replace(step.rows, block_tables=step.rows.block_tables.to(torch.int32)))
    assert torch.equal(run(narrow), got)


@pytest.mark.parametrize("context", few([511, 512, 513, 700], 512, 513))
def test_splits_grow_where_their_number_ends(
    device: torch.device, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_decode, "splits", lambda *_: triton_decode.Splits(16, 16, 4, 3, 2))
    monkeypatch.setattr(triton_decode, "_CHUNK", 32)
    check(make_step(device, (context,), (1,), heads=2, kv_heads=1, dim=16))


def test_fp8_cache(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs compute capability 8.9")
    step = make_step(device, (270, 60), (1, 30), heads=4, kv_heads=2, dim=32, dtype=torch.float16)
    caches = [cache.to(torch.float8_e4m3fn) for cache in (step.key_cache, step.value_cache)]
    scales = tuple(torch.tensor([value], device=device) for value in (0.5, 3.0))
    check(replace(step, key_cache=caches[0], value_cache=caches[1]), cache_scales=scales, softcap=5.0)


@pytest.mark.one_of_each
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("decodes", [1, 0])
def test_every_number_of_an_fp8_cache_is_read_exactly(device: torch.device, dtype: torch.dtype, decodes: int) -> None:
    """All 256 codes as the values, and as the keys, of a sequence of one token, whose softmax is 1."""
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs compute capability 8.9")
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    cache = torch.zeros(1, 16, 16, 16).to(torch.float8_e4m3fn)
    cache[0, 0] = codes.view(16, 16)
    q = torch.zeros(1, 16, 16, dtype=dtype, device=device)
    rows = AttentionRows((0, 1), (1,), torch.zeros(1, 1, dtype=torch.int64, device=device)).on_device()
    keys, scales = torch.zeros_like(cache).to(device), (torch.ones(1, device=device), torch.ones(1, device=device))
    got = paged_attention(
        q, keys, cache.to(device), replace(rows, decodes=decodes), scale=1.0, cache_scales=scales
    ).cpu()
    assert torch.equal(got.float().nan_to_num(1000), codes.float().view(1, 16, 16).nan_to_num(1000))


SCALED = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn, "bits of e4m3": torch.uint8}


def scaled(step: Step, kind: torch.dtype) -> Step:
    """The step over caches whose rows have scales of their own; where nothing was written they are NaN."""
    if kind == torch.float8_e4m3fn and step.q.is_cuda and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs compute capability 8.9")
    caches = []
    for cache in (step.key_cache, step.value_cache):
        blocks, size, heads, dim = cache.shape
        small = torch.zeros(blocks, size, heads, dim + SCALE, dtype=torch.uint8, device=cache.device).view(kind)
        write_rows(cache.flatten(0, 1), small, torch.arange(blocks * size, device=cache.device))
        caches.append(small)
    return replace(step, key_cache=caches[0], value_cache=caches[1])


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "size"), [(6, 2, 80, 16), (2, 2, 64, 32)])
def test_rows_with_scales(
    device: torch.device, dtype: torch.dtype, kind: str, heads: int, kv_heads: int, dim: int, size: int
) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "size": size, "dtype": dtype}
    step = scaled(make_step(device, (1, 260, 40, 45, 69, 17), (1, 1, 40, 4, 33, 1), **shape), SCALED[kind])
    check(step)
    check(step, decodes=0)


@pytest.mark.one_of_each
@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize(
    "options", [{"window": 5}, {"window": 64, "softcap": 2.0}, {"softcap": 2.0, "sinks": torch.ones(4)}]
)
def test_rows_with_scales_under_windows_caps_and_sinks(device: torch.device, kind: str, options: dict) -> None:
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    shape = {"heads": 4, "kv_heads": 2, "dim": 32, "dtype": torch.float16}
    check(scaled(make_step(device, (200, 300, 150, 140), (1, 1, 150, 30), **shape), SCALED[kind]), **options)


@pytest.mark.parametrize("kind", ["int8", "bits of e4m3"])
@pytest.mark.usefixtures("turing")
def test_rows_with_scales_without_tensor_cores(device: torch.device, kind: str) -> None:
    shape = {"heads": 6, "kv_heads": 2, "dim": 64, "dtype": torch.float16}
    check(scaled(make_step(device, (1, 290, 40, 45, 17), (1, 1, 40, 4, 1), **shape), SCALED[kind]))


@pytest.mark.one_of_each
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("decodes", [1, 0])
def test_every_code_is_read_exactly(device: torch.device, dtype: torch.dtype, kind: str, decodes: int) -> None:
    """All codes as the values of a sequence of one token, whose softmax is 1, beside scales of 1."""
    codes = torch.arange(256, dtype=torch.uint8)
    if kind != "int8":
        codes = torch.where(codes & 127 == 127, 0, codes)  # NaN is never written
    values = codes.view(torch.int8).float() if kind == "int8" else codes.view(torch.float8_e4m3fn).float()
    zeros = torch.zeros(1, 16, 16, 16, device=device)
    rows = AttentionRows((0, 1), (1,), torch.zeros(1, 1, dtype=torch.int64, device=device))
    step = scaled(Step(torch.zeros(1, 16, 16, dtype=dtype, device=device), zeros, zeros, rows), SCALED[kind])
    stored, scales = codes_and_scales(step.value_cache)
    stored[0, 0], scales[0] = codes.view(16, 16).to(device).view(stored.dtype), 1.0
    got = run(step, replace(rows.on_device(), decodes=decodes))
    assert torch.equal(got.float().cpu(), values.view(1, 16, 16))


@pytest.mark.parametrize("window", few([None, 70, -70], 70))
def test_a_sequence_does_not_notice_its_neighbours(device: torch.device, window: int | None) -> None:
    """The same sequences alone and in company, elsewhere in the cache: the same bits."""
    shape = {"heads": 4, "kv_heads": 2, "dim": 32, "dtype": torch.bfloat16}
    company = make_step(device, (40, 700, 1, 90, 150), (1, 1, 1, 90, 33), **shape)
    got = run(company, window=window)
    for row, (context, count) in enumerate(zip((40, 700, 1, 90, 150), (1, 1, 1, 90, 33))):
        alone = make_step(device, (context,), (count,), **shape, shuffle=7, spare=3)
        start = company.rows.query_start[row]
        assert torch.equal(run(alone, window=window), got[start : start + count]), row


@pytest.mark.parametrize("window", few([None, 33, -33], 33))
def test_chunks_do_not_change_a_prompt(device: torch.device, window: int | None) -> None:
    shape = {"heads": 4, "kv_heads": 2, "dim": 32, "dtype": torch.bfloat16}
    whole = run(make_step(device, (150,), (150,), **shape), window=window)
    step = make_step(device, (150,), (150,), **shape)
    for start, end in itertools.pairwise((0, 1, 47, 100, 149, 150)):
        starts, contexts = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, end - start], [end]))
        rows = DeviceRows(starts, contexts, step.rows.block_tables, 0)
        assert torch.equal(run(replace(step, q=step.q[start:end]), rows, window=window), whole[start:end])


def test_fillers_of_a_captured_batch_get_zeros(device: torch.device) -> None:
    step = make_step(device, (300, 20, 5), (1, 1, 1), heads=2, kv_heads=1, dim=16)
    rows = step.rows.on_device()
    lens = torch.tensor([300, 20, 0], dtype=torch.int64, device=device)
    got = run(step, replace(rows, context_lens=lens))
    assert torch.equal(got[:2], run(step)[:2])
    assert torch.equal(got[2], torch.zeros_like(got[2]))
    got = run(step, replace(rows, context_lens=lens), sinks=torch.ones(2, device=device))
    assert torch.equal(got[2], torch.zeros_like(got[2]))


def test_a_captured_step_serves_other_lengths(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    shape = {"heads": 4, "kv_heads": 2, "dim": 64, "dtype": torch.bfloat16}
    step = make_step(device, (700, 40), (1, 1), **shape)
    rows = step.rows.on_device()
    run(step, rows)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(step, rows)
    for lens in ([700, 40], [300, 1], [17, 33]):
        rows.context_lens.copy_(torch.tensor(lens))
        graph.replay()
        assert torch.equal(captured, run(step, rows))


def test_more_sequences_than_a_program_looks_at(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_decode, "_ROWS", 4)
    monkeypatch.setattr(triton_prefill, "_ROWS", 4)
    step = make_step(device, (7, 300, 1, 2, 3, 20, 9, 8, 30), (1,) * 8 + (20,), heads=1, kv_heads=1, dim=16)
    assert step.rows.on_device().decodes == 8
    check(step)
    check(step, decodes=0)


def captured(step: Step, decoding: int, most: int, rows: int, tokens: int) -> tuple[Step, DeviceRows]:
    """A step as a captured launch sees it: fillers behind its sequences and tokens, and `decoding` on the device.

    Fillers' tables and queries hold what nothing may use.
    """
    device, real = step.q.device, len(step.rows.context_lens)
    starts = torch.tensor(step.rows.query_start + step.rows.query_start[-1:] * (rows - real), dtype=torch.int32)
    contexts = torch.tensor(step.rows.context_lens + (0,) * (rows - real), dtype=torch.int32)
    tables = torch.full((rows, step.rows.block_tables.shape[1]), 10**6, device=device)
    tables[:real] = step.rows.block_tables
    q = torch.full((tokens, *step.q.shape[1:]), math.nan, dtype=step.q.dtype, device=device)
    q[: len(step.q)] = step.q
    number = torch.tensor([99, decoding], dtype=torch.int32, device=device)[1:]  # anywhere in a table
    return replace(step, q=q), DeviceRows(starts.to(device), contexts.to(device), tables, most, decoding=number)


MIXES = {
    "no decodes": ((40, 45, 17), (40, 4, 1), 0, 3),
    "all decode": ((1, 300, 17), (1, 1, 1), 3, 3),
    "some of each": ((1, 300, 40, 45, 69, 17), (1, 1, 40, 4, 33, 1), 2, 2),
    "fewer than the launch is made for": ((1, 300, 40, 45, 69, 17), (1, 1, 40, 4, 33, 1), 2, 6),
    "one prompt of one token": ((1,), (1,), 0, 1),
    "prompts of one token behind decodes": ((300, 20, 5, 1), (1, 1, 1, 1), 2, 4),
}


@pytest.mark.one_of_each(4)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("fillers", [(0, 0), (3, 21)])
@pytest.mark.parametrize("options", [{}, {"window": 30, "softcap": 2.0, "sinks": torch.ones(2)}])
def test_how_many_decode_is_a_number_on_the_device(
    device: torch.device, mix: str, fillers: tuple[int, int], options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of launches that are told on the host, with fillers behind sequences and tokens."""
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    contexts, queries, decoding, most = MIXES[mix]
    step = make_step(device, contexts, queries, heads=2, kv_heads=1, dim=16)
    wanted = run(step, replace(step.rows.on_device(), decodes=decoding), **options)
    for rows in (256, 2):  # of a launch
        monkeypatch.setattr(triton_decode, "_ROWS", rows)
        monkeypatch.setattr(triton_prefill, "_ROWS", rows)
        given = captured(step, decoding, most + min(fillers), len(contexts) + fillers[0], len(step.q) + fillers[1])
        assert torch.equal(run(*given, **options)[: len(step.q)], wanted)


def test_the_decode_kernels_write_nothing_for_others(device: torch.device) -> None:
    """One split, several, and none, each of which is written by another kernel."""
    step = make_step(device, (20, 20, 600, 1), (1, 1, 1, 1), heads=2, kv_heads=1, dim=16)
    contexts = torch.tensor([20, 20, 600, 0], dtype=torch.int32, device=device)

    def decoded(decoding: torch.Tensor | None) -> torch.Tensor:
        out = torch.full_like(step.q, math.nan, memory_format=torch.contiguous_format)
        caches = (step.key_cache, step.value_cache)
        rows = replace(step.rows.on_device(), context_lens=contexts, decoding=decoding)
        triton_decode.decode(step.q, *caches, out, rows, None, {"scale": 0.25})
        return out

    wanted = decoded(None)
    assert not wanted.isnan().any()
    for count in range(5):
        got = decoded(torch.tensor([count], dtype=torch.int32, device=device))
        assert torch.equal(got[:count], wanted[:count])
        assert got[count:].isnan().all()


def test_one_captured_launch_serves_every_mix(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    shape = {"heads": 4, "kv_heads": 2, "dim": 64, "dtype": torch.bfloat16}
    mixes = [captured(make_step(device, c, q, **shape), n, 6, 8, 128) for c, q, n, _ in MIXES.values()]
    blocks, width = max(len(s.key_cache) for s, _ in mixes), max(r.block_tables.shape[1] for _, r in mixes)
    q = torch.empty_like(mixes[0][0].q)
    caches = [torch.empty(blocks, 16, 2, 64, dtype=torch.bfloat16, device=device) for _ in range(2)]
    held = replace(mixes[0][1], block_tables=torch.zeros(8, width, dtype=torch.int64, device=device))

    def fill(step: Step, rows: DeviceRows) -> None:
        q.copy_(step.q)
        for cache, source in zip(caches, (step.key_cache, step.value_cache)):
            cache[: len(source)] = source
        held.block_tables[:, : rows.block_tables.shape[1]] = rows.block_tables
        for name in ("query_start", "context_lens", "decoding"):
            getattr(held, name).copy_(getattr(rows, name).clone())

    fill(*mixes[0])
    held_step = Step(q, caches[0], caches[1], AttentionRows((), (), held.block_tables))
    run(held_step, held)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(held_step, held)
    for (contexts, queries, decoding, _), given in zip(MIXES.values(), mixes):
        fill(*given)
        graph.replay()
        step = make_step(device, contexts, queries, **shape)
        wanted = run(step, replace(step.rows.on_device(), decodes=decoding))
        assert torch.equal(got[: len(wanted)], wanted)


def test_host_and_device_rows_are_the_same(device: torch.device) -> None:
    rows = AttentionRows((0, 1, 2, 7, 8), (9, 1, 5, 3), torch.zeros(4, 1, dtype=torch.int64, device=device))
    moved = rows.on_device()
    assert (moved.decodes, moved.most_tokens, moved.most_context) == (2, 5, 9)
    assert moved.on_host() is rows
    read = replace(moved, host=None).on_host()
    assert (read.query_start, read.context_lens) == (rows.query_start, rows.context_lens)


def test_what_the_kernels_do_not_read_is_refused(device: torch.device) -> None:
    step = make_step(device, (20,), (1,), heads=2, kv_heads=1, dim=16, size=8)
    with pytest.raises(AssertionError, match="power of two"):
        run(step)


# ---- every backend ---------------------------------------------------------------------------------------------------


def backend_for(name: str, device: torch.device, needs: AttentionNeeds) -> Backend:
    """The backend on this machine, or a skip that says why there is none."""
    capability = torch.cuda.get_device_capability() if device.type == "cuda" else (9, 0)
    if device.type != "cuda" and name in ("torch_flash", "flash_attn"):
        pytest.skip("FlashAttention needs a GPU")
    try:
        return choose(name, replace(needs, capability=capability))
    except ConfigError as error:
        pytest.skip(str(error))


def made_for(backend: Backend, step: Step) -> Step:
    """Where a backend wants a finite cache, zeros stand wherever nothing was written."""
    if not backend.finite_cache:
        return step
    return replace(step, key_cache=step.key_cache.nan_to_num(), value_cache=step.value_cache.nan_to_num())


BACKENDS = ("triton", "torch_flash", "flash_attn", "torch")


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("size", [16, 64, 256])
@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "dim", "window", "softcap"),
    [
        (torch.bfloat16, 8, 2, 128, None, None),
        (torch.float16, 4, 4, 64, 33, None),
        (torch.bfloat16, 4, 2, 256, None, None),
        (torch.bfloat16, 6, 2, 64, 300, 2.0),
    ],
)
def test_every_backend(
    device: torch.device,
    name: str,
    size: int,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    dim: int,
    window: int | None,
    softcap: float | None,
) -> None:
    """A mixed step; the same with bounds from the shapes alone; its first two tokens as a step of their own."""
    if device.type != "cuda" and name == "triton":
        pytest.skip("the interpreter is slow, and the kernels have tests of their own")
    needs = AttentionNeeds(
        capability=None,
        dtype=dtype,
        head_dim=dim,
        block_size=size,
        soft_caps=softcap is not None,
    )
    backend = backend_for(name, device, needs)
    shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "dtype": dtype, "size": size}
    step = made_for(backend, make_step(device, (1, 460, 140, 45, 269, 17), (1, 1, 140, 4, 133, 1), **shape))
    options = {"scale": dim**-0.5, "window": window, "softcap": softcap}
    wanted = reference.paged_attention(step.q, step.key_cache, step.value_cache, step.rows, **options)
    rows = step.rows.on_device()
    narrow = replace(rows, block_tables=rows.block_tables.to(torch.int32))
    bare = replace(narrow, most_tokens=None, most_context=None, host=None)
    for given in (rows, narrow, bare, replace(narrow, decodes=0), replace(bare, decodes=1)):
        got = backend.attend(step.q, step.key_cache, step.value_cache, given, **options)
        assert error(got, wanted) < TOLERANCE[dtype]
    first = DeviceRows(rows.query_start[:3], rows.context_lens[:2], rows.block_tables[:2], 2)
    got = backend.attend(step.q[:2], step.key_cache, step.value_cache, first, **options)
    assert error(got, wanted[:2]) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("window", [None, 100])
def test_every_backend_in_a_captured_step(device: torch.device, name: str, size: int, window: int | None) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    needs = AttentionNeeds(capability=None, dtype=torch.bfloat16, head_dim=64, block_size=size)
    backend = backend_for(name, device, needs)
    if not backend.capturable:
        pytest.skip("it cannot be captured")
    shape = {"heads": 4, "kv_heads": 2, "dim": 64, "dtype": torch.bfloat16, "size": size}
    step = made_for(backend, make_step(device, (700, 40, 300), (1, 1, 1), **shape))
    starts, contexts = step.rows.on_device().query_start, step.rows.on_device().context_lens
    rows = DeviceRows(starts, contexts, step.rows.block_tables.to(torch.int32), 3, most_tokens=1, most_context=1024)
    options = {"scale": 0.125, "window": window}
    backend.attend(step.q, step.key_cache, step.value_cache, rows, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backend.attend(step.q, step.key_cache, step.value_cache, rows, **options)
    for lens in ((700, 40, 300), (300, 1, 17), (17, 33, 0)):
        contexts.copy_(torch.tensor(lens))
        graph.replay()
        used = sum(length > 0 for length in lens)
        host = AttentionRows(tuple(range(used + 1)), lens[:used], step.rows.block_tables)
        wanted = reference.paged_attention(step.q[:used], step.key_cache, step.value_cache, host, **options)
        assert error(captured[:used], wanted) < TOLERANCE[torch.bfloat16]
        assert torch.equal(captured[used:], torch.zeros_like(captured[used:]))
