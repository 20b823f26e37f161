# SPDX-License-Identifier: MIT
"""The positions that an index chooses, and latent attention to them: torch against a loop, the CPU against torch."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from candle_vllm.core.assembly.placement import recording_obstacle
from candle_vllm.core.kernels.attention.rows import AttentionRows
from candle_vllm.core.kernels.latent_attention import head_linear, latent_attention, latent_write
from candle_vllm.core.kernels.latent_attention.reference import choose, pool_keys
from packages.core.tests.kernels.latent_layer import SIZES, Layer, error, random

pytest.importorskip("numba")

from numba import njit

from candle_vllm.core.kernels.attention.cpu_cache import HEADER, partial_floats
from candle_vllm.core.kernels.cpu_runtime.level import LANES, host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of
from candle_vllm.core.kernels.cpu_runtime.recorder import Recorder, StepLimits
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.latent_attention import cpu
from candle_vllm.core.kernels.latent_attention.cpu_record import Place, record_choice
from candle_vllm.core.kernels.latent_attention.layout import (
    LatentParts,
    cache_shape,
    choice_supported,
    scratch_per_thread,
)
from candle_vllm.core.loading.config import LatentSizes
from packages.core.tests.kernels.test_cpu_latent_attention import BLOCK, TOLERANCE, Recorded, rounded

DIM, TOP = 64, 70


def inputs(heads: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and weights; there are 9 keys alone, so that most scores are equal to others."""
    kinds = torch.randint(9, (tokens,), generator=torch.Generator().manual_seed(seed))
    keys = torch.nn.functional.layer_norm(random(9, DIM, seed=1), (DIM,), eps=1e-6).bfloat16().float()[kinds]
    return random(tokens, heads, DIM, seed=seed).bfloat16().float(), keys, random(tokens, heads, seed=seed + 1)


def by_hand(q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, position: int) -> list[int]:
    scores = ((q @ keys[: position + 1].T).relu() * weights[:, None]).sum(0).tolist()
    return sorted(sorted(range(position + 1), key=lambda j: (-round(scores[j], 3), j))[:TOP])


def test_the_largest_scores_are_chosen_and_of_equal_ones_the_first() -> None:
    q, keys, weights = inputs(32, 300, 5)
    table = torch.randperm(19, generator=torch.Generator().manual_seed(0))[None]
    cache = torch.full((19, 16, 1, DIM), torch.nan)
    places = torch.arange(300)
    cache.flatten(0, 2)[table[0][places // 16] * 16 + places % 16] = keys
    step = q[200:], weights[200:], cache, AttentionRows((0, 100), (300,), table)
    found = choose(*step, TOP)
    assert found is not None
    assert [found[n].tolist() for n in range(0, 100, 9)] == [
        by_hand(q[n], keys, weights[n], n) for n in range(200, 300, 9)
    ]
    assert choose(*step, 300) is None
    early = choose(q[:100], weights[:100], cache, AttentionRows((0, 100), (100,), table), TOP)
    assert early is not None
    assert early[3].tolist() == [0, 1, 2] + [3] * (TOP - 3)


GROUP, GROUPS = 4, 16  # positions of a group, and the groups that a token attends to


def pooled_by_hand(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Keys [groups, D] of the whole groups of rows [T, 2 D]."""
    keys, gates = rows[: len(rows) // GROUP * GROUP].unflatten(0, (-1, GROUP)).chunk(2, -1)
    return torch.stack([sum((gate + places).softmax(0) * key) for key, gate in zip(keys, gates)])  # type: ignore[misc]


def groups_by_hand(q: torch.Tensor, pooled: torch.Tensor, weights: torch.Tensor, position: int) -> list[int]:
    whole = (position + 1) // GROUP
    scores = ((q @ pooled[:whole].T).relu() * weights[:, None]).sum(0)
    best = scores.sort(descending=True, stable=True).indices[:GROUPS].sort().values
    return [*(best[:, None] * GROUP + torch.arange(GROUP)).flatten().tolist(), *range(whole * GROUP, position + 1)]


def pooled_inputs(heads: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, rows of keys and gates, weights, and the vectors of places in a group."""
    q, rows = random(tokens, heads, DIM, seed=5).bfloat16().float(), random(tokens, 2 * DIM, seed=6).bfloat16().float()
    return q, rows, random(tokens, heads, seed=7), random(GROUP, DIM, seed=8)


def test_groups_are_chosen_by_pooled_keys() -> None:
    """In a prompt of two steps, of which the first ends within a group; `top` groups or fewer are all attended to."""
    q, rows, weights, places = pooled_inputs(16, 300)
    table, top = torch.randperm(19, generator=torch.Generator().manual_seed(0)), GROUPS * GROUP + GROUP - 1
    cache, slots = torch.full((19, 16, 1, 2 * DIM), torch.nan), torch.arange(300)
    slots, pooled = table[slots // 16] * 16 + slots % 16, pooled_by_hand(rows, places)
    for start, end in ((0, 201), (201, 300)):
        cache.flatten(0, 2)[slots[start:end]] = rows[start:end]
        pool_keys(cache, slots[start:end], places)
        at = AttentionRows((0, end - start), (end,), table[None])
        found = choose(q[start:end], weights[start:end], cache, at, top, GROUP)
        assert found is not None
        for n in range(start, end):
            wanted = groups_by_hand(q[n], pooled, weights[n], n)
            assert found[n - start, : len(wanted)].tolist() == wanted
            assert (found[n - start] <= n).all()
    assert torch.allclose(cache.flatten(0, 2)[slots[GROUP - 1 :: GROUP], :DIM], pooled, atol=1e-6)
    at = AttentionRows((0, top), (top,), table[None])
    assert choose(q[:top], weights[:top], cache, at, top, GROUP) is None


class Index:
    """A recorded index whose heads do not rotate; with `pool`, its keys are pooled."""

    def __init__(self, heads: int, threads: int, *, pool: torch.Tensor | None = None) -> None:
        tokens, blocks, self.heads, width = 400, 64, heads, DIM if pool is None else 2 * DIM
        self.recorder = Recorder(StepLimits(tokens, 4, 1, 32, BLOCK, threads), host_isa())
        self.cache = np.full(cache_shape(blocks, BLOCK, 2, width), 0x7FC0, np.int16)
        self.q, self.key = np.zeros((tokens, heads * DIM), np.float32), np.zeros((tokens, width), np.float32)
        self.weights, cos = np.zeros((tokens, heads), np.float32), np.ones((512, 8), np.float32)
        sizes = LatentSizes(heads=heads, nope=DIM - 16, rope=16, latent=DIM - 16, value=0)
        parts = LatentParts(sizes, cos[0], 1e-6, cos, 0 * cos, (), ())
        self.inputs, self.top = inputs(heads, 400, 5), TOP
        if pool is not None:
            sizes = LatentSizes(heads=heads, nope=DIM, rope=0, latent=2 * DIM, value=0)
            parts = dataclasses.replace(parts, sizes=sizes, pool=len(pool), places=pool.numpy())
            self.inputs, self.top = pooled_inputs(heads, 400)[:3], GROUPS * GROUP + GROUP - 1
        places = [Place(address_of(x), x.shape[1]) for x in (self.q, self.key, self.weights)]
        self.positions = record_choice(self.recorder, *places, parts, self.cache[:, 1], self.top)
        self.plan = np.array(self.recorder.plan, np.int64)

    def run(self, team: ThreadTeam, step: list[tuple[range, int, int]]) -> np.ndarray:
        """Positions [T, top] for a step of (table, first token, tokens) of sequences of the same inputs."""
        arrays, at = self.recorder.arrays, 0
        q, keys, weights = self.inputs
        for row, (table, start, count) in enumerate(step):
            here, places = slice(at, at + count), np.arange(start, start + count)
            arrays.block_tables[row, : len(table)] = table
            arrays.positions[here] = places
            arrays.slots[here] = np.array(table)[places // BLOCK] * BLOCK + places % BLOCK
            self.q[here], self.key[here] = q[places].flatten(1), keys[places]
            self.weights[here] = weights[places]
            arrays.context_lens[row], arrays.query_start[row + 1] = start + count, at + count
            at += count
        arrays.numbers[StepNumber.TOKENS], arrays.numbers[StepNumber.SEQUENCES] = at, len(step)
        team.run(self.plan, self.recorder.num_rows)
        return self.positions.reshape(-1, self.top)[:at].copy()


@pytest.mark.parametrize("heads", [16, 80])
def test_the_cpu_chooses_the_same(heads: int) -> None:
    """Many tokens, of which each thread scores some; few tokens, which threads share; beside another sequence."""
    (q, keys, weights), team, index = inputs(heads, 400, 5), ThreadTeam(2), Index(heads, 2)
    everything = index.run(team, [(range(25), 0, 400)])
    team.close()
    for n in range(TOP, 400, 7):
        assert everything[n].tolist() == by_hand(q[n], keys, weights[n], n)
    first, second = range(25), range(60, 35, -1)
    for threads in (1, 3):
        team, index = ThreadTeam(threads), Index(heads, threads)
        index.run(team, [(second, 0, 200)])
        found = index.run(team, [(first, 0, 100), (second, 200, 190)])
        assert np.array_equal(found[TOP:100], everything[TOP:100])
        assert np.array_equal(found[100:], everything[200:390])
        found = index.run(team, [(first, 100, 3), (second, 390, 10)])
        assert np.array_equal(found, everything[[*range(100, 103), *range(390, 400)]])
        team.close()


@pytest.mark.parametrize("heads", [16, 80])
def test_the_cpu_chooses_the_same_groups(heads: int) -> None:
    """From the pooled keys in its cache, which are rounded; the same for any cut of a prompt."""
    q, rows, weights, places = pooled_inputs(heads, 400)
    team, index, first, second = ThreadTeam(2), Index(heads, 2, pool=places), range(25), range(60, 35, -1)
    everything = index.run(team, [(first, 0, 400)])
    team.close()
    ends = torch.from_numpy(index.cache[:, 1].reshape(-1, 2 * DIM).copy()).view(torch.bfloat16)[GROUP - 1 : 400 : GROUP]
    pooled = ends[:, :DIM].float()
    assert error(pooled, pooled_by_hand(rows, places)) < 5e-3
    assert torch.equal(ends[:, DIM:].float(), rows[GROUP - 1 :: GROUP, DIM:])
    least = (GROUPS + 1) * GROUP - 1  # the first position before which there are more groups
    for n in range(least, 400):
        wanted = groups_by_hand(q[n], pooled, weights[n], n)
        assert everything[n, : len(wanted)].tolist() == wanted
    for threads in (1, 3):
        team, index = ThreadTeam(threads), Index(heads, threads, pool=places)
        index.run(team, [(second, 0, 203)])
        found = [index.run(team, [(first, 0, 101), (second, 203, 187)])]
        found += [index.run(team, [(first, 101 + n, 1), (second, 390 + n, 1)]) for n in range(10)]
        team.close()
        chosen = [(row, at) for row, at in zip(found[0], (*range(101), *range(203, 390))) if at >= least]
        chosen += [(row, at + n) for n, got in enumerate(found[1:]) for row, at in zip(got, (101, 390))]
        for row, at in chosen:
            count = GROUPS * GROUP + (at + 1) % GROUP
            assert np.array_equal(row[:count], everything[at, :count])


@pytest.mark.parametrize("name", ["odd", "unrotated"])
def test_attention_to_chosen_groups(name: str) -> None:
    """The number of attended positions grows by one within a group, and falls where a group is whole."""
    layer, tokens, top = rounded(Layer(SIZES[name])), 400, 300 * GROUP // 4 + GROUP - 1
    generator, most = torch.Generator().manual_seed(3), top // GROUP
    positions, hidden = torch.zeros(tokens, top, dtype=torch.int64), torch.ones(tokens, tokens, dtype=torch.bool)
    for p in range(tokens):
        groups = torch.randperm((p + 1) // GROUP, generator=generator)[:most].sort().values
        picked = [*(groups[:, None] * GROUP + torch.arange(GROUP)).flatten(), *range((p + 1) // GROUP * GROUP, p + 1)]
        positions[p, : len(picked)] = torch.tensor(picked)
        hidden[p, picked] = False
    q, kv = layer.inputs(tokens, seed=9)
    nope, rope, key, latent = layer.split(q, kv, torch.arange(tokens))
    cache = torch.zeros(25, 16, 1, layer.sizes.rope + layer.sizes.latent)
    latent_write(key, latent, cache, torch.arange(tokens))
    rows, queries = AttentionRows((0, tokens), (tokens,), torch.arange(25)[None]), head_linear(nope, layer.k_b)
    mixed = latent_attention(rope, queries, cache, rows, scale=layer.scale, chosen=positions, pool=GROUP)
    wanted = head_linear(mixed, layer.v_b).flatten(1)
    scores = torch.einsum("qhd,kd->qhk", torch.cat([rope, queries], -1), torch.cat([key, latent], -1)) * layer.scale
    dense = torch.einsum("qhk,kl->qhl", scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1), latent)
    assert error(wanted, head_linear(dense, layer.v_b).flatten(1)) < 1e-5
    found = []
    for threads, cut in ((1, tokens), (3, tokens - 2)):
        team, buffer = ThreadTeam(threads), np.zeros((tokens, top), np.int32)
        recorded = Recorded(layer, tokens=tokens, threads=threads, chosen=buffer, pool=GROUP)
        parts = []
        for start, end in ((0, cut), (cut, tokens)):
            buffer[: end - start] = positions[start:end]
            parts += [recorded.run(team, [([*range(25)], start, q[start:end], kv[start:end])])] if end > start else []
        found.append(torch.cat(parts))
        team.close()
    assert torch.equal(*found)
    assert error(found[0], wanted) < TOLERANCE


@pytest.mark.parametrize("name", ["odd", "many heads"])
def test_attention_to_chosen_positions(name: str) -> None:
    """Several chunks of copied rows; a token's bits depend on no other token and on no thread."""
    layer, top, tokens = rounded(Layer(SIZES[name])), 600, 700
    generator = torch.Generator().manual_seed(3)
    picked = [torch.randperm(p + 1, generator=generator)[:top].sort().values for p in range(tokens)]
    positions = torch.stack([torch.cat([x, x[-1:].expand(top - len(x))]) for x in picked])
    q, kv = layer.inputs(tokens, seed=9)
    nope, rope, key, latent = layer.split(q, kv, torch.arange(tokens))
    cache = torch.zeros(44, 16, 1, layer.sizes.rope + layer.sizes.latent)
    latent_write(key, latent, cache, torch.arange(tokens))
    rows, queries = AttentionRows((0, tokens), (tokens,), torch.arange(44)[None]), head_linear(nope, layer.k_b)
    mixed = latent_attention(rope, queries, cache, rows, scale=layer.scale, chosen=positions)
    wanted, found = head_linear(mixed, layer.v_b).flatten(1), []
    for threads, cut in ((1, tokens), (3, tokens - 2)):
        team, buffer = ThreadTeam(threads), np.zeros((tokens, top), np.int32)
        recorded, table = Recorded(layer, tokens=tokens, threads=threads, chosen=buffer), list(range(44))
        parts = []
        for start, end in ((0, cut), (cut, tokens)):
            buffer[: end - start] = positions[start:end]
            parts += [recorded.run(team, [(table, start, q[start:end], kv[start:end])])] if end > start else []
        found.append(torch.cat(parts))
        team.close()
    assert torch.equal(*found)
    assert error(found[0], wanted) < TOLERANCE
    team = ThreadTeam(1)
    everything = Recorded(layer, tokens=tokens).prompt(team, tokens, 9, [], list(range(44)))
    team.close()
    assert torch.equal(found[0][:top], everything[:top])
    assert error(found[0][top:], everything[top:]) > 10 * TOLERANCE


def test_sizes_with_a_kernel() -> None:
    for heads, nope, rope, latent, has_kernel in (
        (16, 48, 16, 48, True),
        (24, 48, 16, 48, False),
        (16, 40, 16, 40, False),
        (16, 48, 5, 48, False),
        (16, 48, 0, 96, True),
        (16, 40, 0, 80, False),  # pooled keys
    ):
        index = LatentSizes(heads=heads, nope=nope, rope=rope, latent=latent, value=0)
        assert choice_supported(index) is has_kernel, index
        model: Any = mock.Mock(latent=SIZES["small"], index=index, compresses=False, stream_count=0)
        obstacle = recording_obstacle(mock.Mock(tensors={}), model, BLOCK)
        assert obstacle == (None if has_kernel else f"the sparse-attention indexer {index} has no kernel")


def test_scores_of_any_bits() -> None:
    """The largest integers in the order of the bits, of equal ones the first: scores alike, far apart, not finite."""

    @njit
    def choose_in(scores: int, count: int, top: int, to: int) -> None:
        cpu.choose_largest(scores, count, top, to)

    draw = np.random.default_rng(1)
    for n in range(600):
        count = int(draw.integers(2, 300))
        top = int(draw.integers(1, count))
        drawn = draw.normal(size=count)
        scores = [drawn, 10 + 1e-3 * drawn, 0 * drawn + 1, np.round(drawn), -1e-40 * np.abs(drawn)][n % 5]
        bits = scores.astype(np.float32).view(np.int32)
        if n % 6 == 0:
            bits = draw.integers(-(1 << 31), 1 << 31, count).astype(np.int32)
        keys = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int64)
        found, work = np.full(top + 1, -1, np.int32), bits.copy()
        choose_in(address_of(work), count, top, address_of(found))
        assert found[:top].tolist() == sorted(np.argsort(-keys, kind="stable")[:top]), (n, count, top)
        assert found[top] == -1


def test_work_is_split_by_the_chosen_positions() -> None:
    """A short sequence beside a long one that attends to as many positions: threads share both."""
    layer, top, long, threads = rounded(Layer(SIZES["odd"])), 100, 4000, 3
    latent, width = layer.sizes.latent, layer.sizes.rope + layer.sizes.latent
    chosen, found = np.zeros((8, top), np.int32), []
    chosen[:2] = np.arange(0, long - 2, 39)[:top]
    q, kv = layer.inputs(3, seed=9)
    step = [(list(range(250)), long - 2, q[:2], kv[:2]), (list(range(260, 267)), top - 1, q[2:], kv[2:])]
    for count, blocks in ((1, 300), (threads, 300), (threads, 600)):
        recorded = Recorded(layer, tokens=8, blocks=blocks, threads=count, chosen=chosen)
        recorded.cache[:5, 1] = random(5, 64, BLOCK, width).bfloat16().view(torch.int16).numpy()
        team = ThreadTeam(count)
        found.append((recorded.run(team, step), recorded.recorder._scratch))
        team.close()
    (alone, _), (shared, scratch), (_, wider) = found
    assert torch.equal(alone, shared)
    assert scratch is not None
    assert wider is not None
    assert scratch.nbytes == wider.nbytes, "partial results grow with the context"
    partials = scratch[HEADER + threads * scratch_per_thread(latent) :].view(np.float32)
    size, written = partial_floats(latent), 2 * 2 * LANES + 2 * LANES  # of 2 chunks and all heads of 3 tokens
    there = np.isfinite(partials[: size * (written + 1)].reshape(-1, size)[:, :latent]).all(1)
    assert there.tolist() == [True] * written + [False]
