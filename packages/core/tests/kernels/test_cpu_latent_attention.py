# SPDX-License-Identifier: MIT
"""Recorded steps of latent attention on the CPU, against the same layer in torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from packages.core.tests.kernels.latent_layer import EPS, SIZES, Layer, error

pytest.importorskip("numba")

from candle_vllm.core.kernels.attention.cpu_cache import HEADER
from candle_vllm.core.kernels.cpu_runtime.level import Isa, host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of
from candle_vllm.core.kernels.cpu_runtime.recorder import Recorder, StepLimits
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.latent_attention.cpu_record import Place, record_latent
from candle_vllm.core.kernels.latent_attention.layout import LatentParts, cache_shape
from candle_vllm.core.kernels.plain_linear import PlainKind, PlainMatrix, pack
from candle_vllm.core.kernels.torch_numbers import DTYPES

# Queries, cache rows and probabilities are rounded to bfloat16 on the CPU.
TOLERANCE = 5e-3
BLOCK = 16


@pytest.fixture(scope="module")
def teams() -> Iterator[dict[int, ThreadTeam]]:
    made = {threads: ThreadTeam(threads) for threads in (1, 2, 3)}
    yield made
    for team in made.values():
        team.close()


def packed(weight: torch.Tensor, kind: PlainKind) -> tuple[PlainMatrix, ...]:
    raw = weight.to(DTYPES[kind.name]).contiguous().view(torch.uint8).numpy().reshape(len(weight), -1)
    return tuple(pack(row, kind.name, *weight.shape[1:], kind=kind) for row in raw)


class Recorded:
    """A recorded layer with its cache, whose numbers nothing was written to are NaN."""

    def __init__(
        self,
        layer: Layer,
        *,
        tokens: int = 200,
        blocks: int = 96,
        kind: PlainKind = PlainKind.BF16,
        values_kind: PlainKind | None = None,
        isa: Isa | None = None,
        threads: int = 1,
        chosen: np.ndarray | None = None,
        pool: int = 1,
    ) -> None:
        s = layer.sizes
        self.layer, self.blocks = layer, blocks
        limits = StepLimits(tokens, 16, 1, blocks, BLOCK, threads)
        self.recorder = Recorder(limits, host_isa() if isa is None else isa)
        self.cache = np.full(cache_shape(blocks, BLOCK, 2, s.rope + s.latent), 0x7FC0, np.int16)
        self.q = np.full((tokens, s.heads * (s.nope + s.rope) + 8), np.nan, np.float32)
        self.kv = np.full((tokens, s.latent + s.rope + 24), np.nan, np.float32)
        self.out = np.full((tokens, s.heads * s.value + 16), np.nan, np.float32)
        keys, values = packed(layer.k_b, kind), packed(layer.v_b, kind if values_kind is None else values_kind)
        parts = LatentParts(s, layer.norm, EPS, layer.cos, layer.sin, keys, values, chosen, pool)
        q, kv, out = (Place(address_of(x), x.shape[1]) for x in (self.q, self.kv, self.out))
        record_latent(self.recorder, q, kv, parts, self.cache[:, 1], out, scale=layer.scale)
        self.plan = np.array(self.recorder.plan, np.int64)

    def run(self, team: ThreadTeam, step: list[tuple[list[int], int, torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """A step of (table, tokens before, q, kv) for each sequence: [T, H * V]."""
        arrays = self.recorder.arrays
        counts = [len(q) for _, _, q, _ in step]
        starts = list(itertools.accumulate(counts, initial=0))
        for row, (table, before, q, kv) in enumerate(step):
            here = slice(starts[row], starts[row + 1])
            positions = np.arange(before, before + len(q))
            arrays.block_tables[row] = 1 << 40  # reading the tail of a table would crash
            arrays.block_tables[row, : len(table)] = table
            arrays.positions[here] = positions
            arrays.slots[here] = np.array(table)[positions // BLOCK] * BLOCK + positions % BLOCK
            self.q[here, : q.shape[1]], self.kv[here, : kv.shape[1]] = q, kv
            arrays.context_lens[row] = before + len(q)
        arrays.query_start[: len(starts)] = starts
        arrays.numbers[StepNumber.TOKENS], arrays.numbers[StepNumber.SEQUENCES] = starts[-1], len(step)
        self.out[:] = np.nan
        scratch = self.recorder._scratch
        assert scratch is not None
        scratch.view(np.float32)[HEADER // 4 :] = np.nan
        team.run(self.plan, self.recorder.num_rows)
        assert np.isnan(self.out[starts[-1] :]).all()
        return torch.from_numpy(self.out[: starts[-1], : self.layer.sizes.heads * self.layer.sizes.value].copy())

    def prompt(self, team: ThreadTeam, tokens: int, seed: int, cuts: list[int], table: list[int]) -> torch.Tensor:
        """A sequence in chunks that end at `cuts`."""
        q, kv = self.layer.inputs(tokens, seed)
        parts = [(a, b) for a, b in itertools.pairwise([0, *cuts, tokens]) if b > a]
        return torch.cat([self.run(team, [(table, a, q[a:b], kv[a:b])]) for a, b in parts])


def rounded(layer: Layer) -> Layer:
    """The same layer with weights that bfloat16 holds."""
    layer.k_b, layer.v_b = (x.bfloat16().float() for x in (layer.k_b, layer.v_b))
    return layer


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize(
    ("name", "isa"),
    [
        ("small", Isa.GENERIC),
        pytest.param("odd", Isa.GENERIC, marks=pytest.mark.every_case),
        ("odd", None),
        ("many heads", None),
        ("unrotated", None),
        ("lite", None),
    ],
)
def test_a_recorded_layer_is_attention(name: str, isa: Isa | None, teams: dict[int, ThreadTeam]) -> None:
    layer = rounded(Layer(SIZES[name]))
    recorded = Recorded(layer, isa=isa, threads=2)
    order = np.random.default_rng(0).permutation(recorded.blocks).tolist()
    got = recorded.prompt(teams[2], 150, 11, [1, 8, 100], order)
    assert error(got, layer.naive(*layer.inputs(150, 11)).flatten(1)) < TOLERANCE


@pytest.mark.parametrize("values_kind", [PlainKind.F32, PlainKind.F16, PlainKind.BF16])
def test_plain_float32_matrices(values_kind: PlainKind, teams: dict[int, ThreadTeam]) -> None:
    layer = rounded(Layer(SIZES["odd"]))
    recorded = Recorded(layer, kind=PlainKind.F32, values_kind=values_kind)
    got = recorded.prompt(teams[1], 50, 11, [20], list(range(9)))
    assert error(got, layer.naive(*layer.inputs(50, 11)).flatten(1)) < TOLERANCE


@pytest.mark.parametrize("name", ["odd", "many heads"])
def test_nothing_around_a_sequence_changes_a_bit(name: str, teams: dict[int, ThreadTeam]) -> None:
    """Chunks, threads, neighbours and the blocks in which it lies; long enough to be split among threads."""
    layer = Layer(SIZES[name])
    alone = Recorded(layer, tokens=700, threads=1).prompt(teams[1], 700, 5, [], list(range(44)))
    for threads, cuts in ((3, [60, 65, 250, 262, 699]), (2, [699]), (2, list(range(650, 700)))):
        recorded = Recorded(layer, tokens=700, threads=threads)
        order = np.random.default_rng(1).permutation(recorded.blocks).tolist()
        assert torch.equal(recorded.prompt(teams[threads], 700, 5, cuts, order), alone), (threads, cuts)
    recorded = Recorded(layer, tokens=1000, blocks=200, threads=2)
    tables = [list(range(60, 104)), list(range(110, 130)), list(range(50))]
    (q1, kv1), (q2, kv2) = layer.inputs(300, 21), layer.inputs(610, 31)
    recorded.run(teams[2], [(tables[1], 0, q1[:299], kv1[:299]), (tables[2], 0, q2[:600], kv2[:600])])
    q, kv = layer.inputs(700, 5)
    recorded.run(teams[2], [(tables[0], 0, q[:690], kv[:690])])
    step = [
        (tables[1], 299, q1[299:], kv1[299:]),
        (tables[0], 690, q[690:], kv[690:]),
        (tables[2], 600, q2[600:], kv2[600:]),
    ]
    assert torch.equal(recorded.run(teams[2], step)[1:11], alone[690:])
    step = [(tables[0], 699, q[699:], kv[699:])]
    assert torch.equal(recorded.run(teams[2], step), alone[699:])


def test_what_is_not_finite_stays_with_its_token(teams: dict[int, ThreadTeam]) -> None:
    """A later token that is infinite does not reach earlier ones of the same step."""
    layer = Layer(SIZES["odd"])
    q, kv = layer.inputs(40, 7)
    table = list(range(5))
    good = Recorded(layer).run(teams[1], [(table, 0, q, kv)])
    kv[39] = math.inf
    bad = Recorded(layer).run(teams[1], [(table, 0, q, kv)])
    assert torch.equal(good[:39], bad[:39])
    assert not bad[39].isfinite().all()
