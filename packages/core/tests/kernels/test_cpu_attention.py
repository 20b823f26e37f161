# SPDX-License-Identifier: MIT
"""Paged attention and cache writes on the CPU, against the torch references on the same bfloat16 numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.common_run import few

pytest.importorskip("numba")

from numba import njit

from candle_vllm.core.config import CACHE_TYPES
from candle_vllm.core.engine.runners import key_fit
from candle_vllm.core.kernels.attention import reference as attention_reference
from candle_vllm.core.kernels.attention.cpu_cache import (
    BF16,
    LEVELS,
    PLAIN,
    CacheKind,
    code_bytes,
    key_bytes,
    key_cache_shape,
    scratch_bytes,
    stretch_step,
    supported,
    value_cache_shape,
)
from candle_vllm.core.kernels.attention.cpu_record import LOG2E, AttendArguments, attend_operation, merge_operation
from candle_vllm.core.kernels.attention.cpu_tiles import emit_exp2
from candle_vllm.core.kernels.attention.rows import AttentionRows
from candle_vllm.core.kernels.cpu_runtime.emit import F32, Emitter, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.level import LANES, Isa, host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, operation, plan_row
from candle_vllm.core.kernels.cpu_runtime.recorder import MeasuredKeys
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.kv_write import WriteArguments, rotate_and_write_operation
from candle_vllm.core.kernels.rotary import reference as rotary_reference

# A probability is rounded to bfloat16, at most 2^-9 off, and the sum uses the rounded ones; the errors of different
# keys are independent, as the values are, so the ratio stays near 2^-9 / sqrt(3) = 1.1e-3 whatever the number of keys.
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def teams() -> Iterator[dict[int, ThreadTeam]]:
    made = {threads: ThreadTeam(threads) for threads in (1, 2, 3)}
    yield made
    for team in made.values():
        team.close()


def plan_of(numbers: np.ndarray, *rows: tuple[int, tuple[Any, ...]]) -> np.ndarray:
    words = []
    for address, arguments in rows:
        words += plan_row(address, address_of(numbers), arguments, barrier=True)
    return np.array(words, np.int64)


def to_bf16(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """RMS(error) / RMS(wanted)."""
    return float((got.double() - wanted.double()).square().mean().sqrt() / wanted.double().square().mean().sqrt())


def turned(x: torch.Tensor) -> torch.Tensor:
    """Rows times the Hadamard matrix of the largest power of two that divides D, in parts of that size."""
    size = x.shape[-1] & -x.shape[-1]
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (x.double().unflatten(-1, (-1, size)) @ (matrix / size**0.5)).flatten(-2).float()


def meaning(codes: np.ndarray, kind: CacheKind) -> np.ndarray:
    """The factors of a block's scale that codes stand for."""
    return np.array(LEVELS, np.float32)[codes] if kind.has_levels else codes.astype(np.float32) - kind.bias


def decoded_keys(cache: np.ndarray, dim: int, kind: CacheKind) -> torch.Tensor:
    """Keys [stretches, K, blocks, strips, W, D] of a layer's strips of bytes."""
    places, strip = cache.shape[:-1], cache.shape[-1] // key_bytes(kind, dim)
    codes, scales = np.split(cache, [strip * code_bytes(kind, dim)], -1)
    codes = codes.reshape(*places, -1, strip, 4).swapaxes(-3, -2)  # [..., W, words, 4]
    halves = scales.copy().view(np.float16).reshape(*places, -1, strip, 2).swapaxes(-3, -2).astype(np.float32)
    if kind.has_halves:
        words = codes.reshape(*places, strip, dim // 32, -1, 4)  # a block has a further word for each plane
        codes = np.zeros((*words.shape[:-2], 4, 2, 4), np.uint8)  # [..., W, blocks, 4, half, 4]
        if kind.low:
            codes = np.stack([words[..., :4, :] & 15, words[..., :4, :] >> 4], -2)
        codes = codes.reshape(*words.shape[:-2], 8, 4)
        for bit, at in zip(range(kind.low, kind.bits), range(-kind.planes, 0)):
            codes |= (words[..., at, :][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1) << bit
    codes = meaning(codes.reshape(*places, strip, -1, 32), kind)
    if kind.has_minima:
        numbers = codes * halves[..., :1] + halves[..., 1:]
    else:
        numbers = codes * halves.reshape(*places, strip, -1, 1)[..., : dim // 32, :]
    return torch.from_numpy(numbers.reshape(*places, strip, dim))


def decoded_values(cache: np.ndarray, dim: int, kind: CacheKind) -> torch.Tensor:
    """Values [stretches, K, blocks, tiles, 16, D] of a layer's tiles of bytes."""
    places = cache.shape[:-1]
    codes, scales = np.split(cache, [16 * code_bytes(kind, dim)], -1)
    halves = scales.copy().view(np.float16).reshape(*places, dim // 32, -1, 16, 1).astype(np.float32)
    codes = codes.reshape(*places, dim // 32, -1)
    codes, *planes = np.split(codes, range(256 * (kind.low > 0), codes.shape[-1], 64), -1) if kind.planes else [codes]
    codes = (codes if kind.low else np.zeros((*codes.shape[:-1], 256), np.uint8)).reshape(*places, dim // 32, 4, -1, 4)
    if kind.has_halves:
        codes = np.concatenate([codes & 15, codes >> 4], -2)
    codes = codes.swapaxes(-1, -2).reshape(*places, dim // 32, 16, 32)
    for n, bits in enumerate(planes):
        codes = codes | np.unpackbits(bits, axis=-1, bitorder="little").reshape(codes.shape) << kind.low + n
    numbers = meaning(codes, kind) * halves[..., 0, :, :]
    if kind.has_minima:
        numbers += halves[..., 1, :, :]
    return torch.from_numpy(np.moveaxis(numbers, -3, -2).reshape(*places, 16, dim))


@dataclasses.dataclass
class Model:
    """One layer's shapes and its cache; the cache starts as NaN where `poison` says so."""

    heads: int = 3
    kv_heads: int = 1
    dim: int = 64
    block: int = 16
    blocks: int = 160
    window: int = 0
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    slopes: torch.Tensor | None = None
    profiles: torch.Tensor | None = None
    rotary: int = -1
    isa: Isa = dataclasses.field(default_factory=host_isa)
    threads: int = 1
    kinds: tuple[CacheKind, CacheKind] = PLAIN
    fit: np.ndarray | None = None
    sums: np.ndarray | None = None  # what `key_fit` needs of the keys and queries of all steps
    poison: bool = True

    def __post_init__(self) -> None:
        shape = (self.blocks, self.block, 1, self.kv_heads, self.dim)
        self.keys, self.values = (
            np.full(shape_of(*shape, kind), *(0x7F if kind.is_quantised else 0x7FC0, kind.dtype))
            for shape_of, kind in zip((key_cache_shape, value_cache_shape), self.kinds)
        )
        if not self.poison:
            self.keys[:], self.values[:] = 0, 0
        self.rotary = self.dim if self.rotary < 0 else self.rotary
        angles = torch.arange(8192).unsqueeze(1) / 10000.0 ** (
            torch.arange(self.rotary // 2) / max(self.rotary // 2, 1)
        )
        self.cos, self.sin = angles.cos().contiguous(), angles.sin().contiguous()
        self.scale = self.dim**-0.5 * math.log2(math.e)

    def plain_cache(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The caches as [B, S, K, D]; what is rotated in them is rotated back."""
        keys, values = self.keys[:, 0].copy(), self.values[:, 0].copy()
        if self.kinds[0] == BF16:
            plain_keys = torch.from_numpy(keys).view(torch.bfloat16).permute(0, 2, 3, 5, 1, 4, 6)
        else:
            plain_keys = decoded_keys(keys, self.dim, self.kinds[0]).permute(0, 2, 3, 4, 1, 5)
        if self.kinds[1] == BF16:
            plain_values = torch.from_numpy(values).view(torch.bfloat16).permute(0, 2, 3, 5, 1, 4)
        else:
            plain_values = decoded_values(values, self.dim, self.kinds[1]).permute(0, 2, 3, 4, 1, 5)
        shape = (-1, self.block, self.kv_heads, self.dim)
        plain = [x.reshape(shape)[: self.blocks] for x in (plain_keys, plain_values)]
        plain_keys, plain_values = (x if kind == BF16 else turned(x) for x, kind in zip(plain, self.kinds))
        if self.kinds[0] != BF16:
            offset, factor, _ = torch.from_numpy(self.kept_fit).unbind(1)
            plain_keys = plain_keys / factor + offset
        return plain_keys, plain_values

    @property
    def kept_fit(self) -> np.ndarray:
        """[K, 3, D] of a cache whose keys are fitted, or not."""
        if self.fit is None:
            self.fit = np.ones((self.kv_heads, 3, self.dim), np.float32)
            self.fit[:, 0] = 0
        return self.fit

    def plain_queries(self, q: np.ndarray) -> torch.Tensor:
        """Queries [T, H, D] as numbers."""
        if self.kinds[0] == BF16:
            return torch.from_numpy(q).view(torch.bfloat16)
        rows, d = q.view(np.uint8), self.dim
        scales = rows[..., d : d + d // 8].copy().view(np.float32).repeat(32, -1)
        codes = rows[..., :d].view(np.int8)
        sums = rows[..., d + d // 8 : d + d // 4].copy().view(np.int32)
        assert (sums == codes.reshape(*codes.shape[:2], -1, 32).sum(-1)).all()
        factor = torch.from_numpy(self.kept_fit[:, 2]).repeat_interleave(self.heads // self.kv_heads, 0)
        return turned(torch.from_numpy(scales * codes)) / factor


@dataclasses.dataclass
class Step:
    """One step's rows: for each sequence its table, its length before the step, and q, k, v of its new tokens; and how
    many positions behind its own each token sees."""

    tables: list[list[int]]
    before: list[int]
    qkv: list[torch.Tensor]
    ahead: np.ndarray | None = None

    def run(
        self, model: Model, team: ThreadTeam, max_context: int = 0, *, attends: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the three operations; returns the result [T, H, D] and the bfloat16 queries [T, H, D].

        `max_context` is what the scratch memory is made for; 0 is the longest context of the step. The result is NaN
        if only the cache is written (`attends`).
        """
        lengths = [len(rows) for rows in self.qkv]
        starts = np.cumsum([0, *lengths]).astype(np.int64)
        contexts = np.array([n + b for n, b in zip(lengths, self.before)], np.int64)
        width = max(len(table) for table in self.tables) + 1
        tables = np.full((len(lengths), width), 1 << 40, np.int64)  # reading the tail of a table would crash
        for row, table in enumerate(self.tables):
            tables[row, : len(table)] = table
        positions = np.concatenate([np.arange(b, b + n) for b, n in zip(self.before, lengths)]).astype(np.int64)
        slots = np.concatenate(
            [
                np.array([table[p // model.block] * model.block + p % model.block for p in range(b, b + n)])
                for table, b, n in zip(self.tables, self.before, lengths)
            ]
        ).astype(np.int64)
        qkv = torch.cat(self.qkv).contiguous()
        tokens, stride = qkv.shape
        q = np.full((tokens, model.heads, model.dim), 0x7FC0, np.int16)
        out = torch.full((tokens, model.heads, model.dim), math.nan)
        size = scratch_bytes(
            max_tokens=tokens,
            max_seqs=len(lengths),
            heads=model.heads,
            head_dim=model.dim,
            max_context=max_context or int(contexts.max()),
            threads=team.threads,
        )
        memory = np.full(size + 128, 0xFF, np.uint8)
        scratch = -(-address_of(memory) // 64) * 64
        memory[: scratch - address_of(memory) + 64] = 0
        numbers = np.zeros(8, np.int64)
        numbers[:2] = tokens, len(lengths)
        k_column = model.heads * model.dim
        sinks = None if model.sinks is None else model.sinks * LOG2E
        slopes = None if model.slopes is None else model.slopes * LOG2E
        states, profiles = self.relative(model) or (torch.zeros(0), torch.zeros(0, 0))
        mirrored = torch.nn.functional.pad(profiles.flip(1) * LOG2E, (LANES, LANES))
        write = WriteArguments(
            qkv=qkv.data_ptr(),
            stride=stride,
            q_column=0,
            k_column=k_column,
            v_column=k_column + model.kv_heads * model.dim,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.dim,
            stretch_step=stretch_step(model.keys[:, 0].strides, model.dim, model.kinds[0]),
            block_shift=model.block.bit_length() - 1,
            half=model.rotary // 2,
            cos=model.cos.data_ptr(),
            sin=model.sin.data_ptr(),
            positions=address_of(positions),
            slots=address_of(slots),
            q=address_of(q),
            key_cache=address_of(model.keys),
            value_cache=address_of(model.values),
            scale=model.scale,
            fit=address_of(model.kept_fit),
            group=model.heads // model.kv_heads,
        )
        attend = AttendArguments(
            q=address_of(q),
            out=out.data_ptr(),
            key_cache=address_of(model.keys),
            value_cache=address_of(model.values),
            query_start=address_of(starts),
            context_lens=address_of(contexts),
            block_tables=address_of(tables),
            table_stride=width,
            stretch_step=stretch_step(model.keys[:, 0].strides, model.dim, model.kinds[0]),
            block_shift=model.block.bit_length() - 1,
            heads=model.heads,
            kv_heads=model.kv_heads,
            scratch=scratch,
            scratch_size=size,
            window=model.window,
            cap=(model.softcap or 0) * LOG2E,
            sinks=0 if sinks is None else sinks.data_ptr(),
            ahead=0 if self.ahead is None else address_of(self.ahead),
            slopes=0 if slopes is None else slopes.data_ptr(),
            relative=0 if model.profiles is None else states.data_ptr(),
            relative_stride=0 if model.profiles is None else states.stride(0),
            profiles=mirrored.data_ptr(),
            profile_count=len(profiles),
            profile_size=mirrored.shape[1],
        )
        written = rotate_and_write_operation(*model.kinds), write
        if not attends:
            team.run(plan_of(numbers, written), 1)
            return out, model.plain_queries(q)
        attend_address = attend_operation(model.dim, model.isa, *model.kinds, model.profiles is not None)
        operations = attend_address, merge_operation(model.dim, model.kinds[1])
        both = [(each, attend) for each in operations]
        team.run(plan_of(numbers, written, *both, *both), 5)  # the second pass: a reset
        if model.sums is not None:
            team.run(
                plan_of(numbers, (operation("kv_write.cpu:measure"), write._replace(fit=address_of(model.sums)))), 1
            )
        assert memory[scratch - address_of(memory)] == 0
        assert (memory[scratch - address_of(memory) + size :] == 0xFF).all()
        return out, model.plain_queries(q)

    def relative(self, model: Model) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Relative logits: states [T, H, P] that depend on the token alone, among other columns, and the profiles."""
        if model.profiles is None:
            return None
        count = len(model.profiles)
        states = torch.cat(self.qkv)[:, : model.heads * count + 5].clone()
        return states[:, 5:].unflatten(1, (model.heads, count)), model.profiles

    def wanted(self, model: Model, q: torch.Tensor) -> torch.Tensor:
        """The reference's result for these queries and what the cache now holds."""
        keys, values = model.plain_cache()
        lengths = [len(rows) for rows in self.qkv]
        width = max(len(table) for table in self.tables)
        rows = AttentionRows(
            tuple(int(n) for n in np.cumsum([0, *lengths])),
            tuple(n + b for n, b in zip(lengths, self.before)),
            torch.tensor([table + [0] * (width - len(table)) for table in self.tables]),
            None if self.ahead is None else torch.from_numpy(self.ahead),
        )
        window = model.window or None
        scale = 1 / math.log2(math.e)
        options: dict[str, Any] = {"scale": scale, "window": window, "softcap": model.softcap, "sinks": model.sinks}
        options |= {"slopes": model.slopes, "relative": self.relative(model)}
        return attention_reference.paged_attention(q.float(), keys.float(), values.float(), rows, **options)


class Pages:
    """Hands out blocks in scattered order, so that neighbours in a sequence are not neighbours in memory."""

    def __init__(self, model: Model, seed: int = 0) -> None:
        self.block = model.block
        self.free = np.random.default_rng(seed).permutation(model.blocks).tolist()

    def table(self, tokens: int) -> list[int]:
        return [self.free.pop() for _ in range(-(-tokens // self.block))]


def random_qkv(model: Model, tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, (model.heads + 2 * model.kv_heads) * model.dim, generator=generator)


def check(model: Model, team: ThreadTeam, contexts: list[int], new: list[int], seed: int = 0) -> None:
    """Fills the caches with all but the new tokens, runs them, and compares."""
    pages = Pages(model, seed)
    tables = [pages.table(context) for context in contexts]
    rows = [random_qkv(model, context, 100 * seed + r) for r, context in enumerate(contexts)]
    old = [(t, x[:-n]) for t, x, n in zip(tables, rows, new) if len(x) > n]
    if old:
        Step([t for t, _ in old], [0] * len(old), [x for _, x in old]).run(model, team)
    step = Step(tables, [c - n for c, n in zip(contexts, new)], [x[-n:] for x, n in zip(rows, new)])
    got, q = step.run(model, team)
    assert error(got, step.wanted(model, q)) < TOLERANCE


@pytest.mark.parametrize("context", [1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 2305])
@pytest.mark.parametrize("threads", [1, 2])
def test_one_token_at_every_odd_depth(teams: dict[int, ThreadTeam], context: int, threads: int) -> None:
    check(Model(), teams[threads], [context], [1])


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (14, 2), (65, 1), (5, 5)])
@pytest.mark.parametrize("threads", [1, 2])
def test_head_ratios(teams: dict[int, ThreadTeam], heads: tuple[int, int], threads: int) -> None:
    model = Model(heads=heads[0], kv_heads=heads[1], block=32)
    check(model, teams[threads], [33, 300, 70], [1, 40, 70])


@pytest.mark.parametrize("dim", few([16, 18, 32, 64, 72, 80, 96, 112, 128, 160, 256, 512], 64, 72))
def test_head_sizes(teams: dict[int, ThreadTeam], dim: int) -> None:
    check(Model(dim=dim, heads=4, kv_heads=2), teams[2], [130, 41], [1, 23])


@pytest.mark.parametrize("dim", few([16, 72, 80], 72))
def test_odd_heads_change_no_bit_however_they_are_computed(teams: dict[int, ThreadTeam], dim: int) -> None:
    model = Model(dim=dim, heads=4, kv_heads=2, blocks=80)
    table, qkv = Pages(model).table(700), random_qkv(model, 700, 5)
    whole, _ = Step([table], [0], [qkv]).run(model, teams[1])
    for cut, threads in ((1, 2), (37, 3), (300, 1)):
        last, _ = Step([table], [700 - cut], [qkv[-cut:]]).run(model, teams[threads])
        assert torch.equal(last, whole[-cut:])


@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("softcap", [0.4, 5.0, 50.0])
def test_soft_caps(teams: dict[int, ThreadTeam], softcap: float, window: int) -> None:
    """Down to caps that squeeze every score, in chunks of every size, split among threads and not."""
    check(Model(softcap=softcap, heads=6, kv_heads=2, window=window), teams[2], [700, 41, 90], [1, 41, 30])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [0, 16])
def test_sinks(teams: dict[int, ThreadTeam], window: int, softcap: float | None, threads: int) -> None:
    """Sinks far below every score, among them, and far above, which leaves almost nothing of the values."""
    sinks = torch.tensor([-200.0, -1.0, 0.0, 0.7, 3.0, 9.0])
    model = Model(sinks=sinks, softcap=softcap, heads=6, kv_heads=2, window=window)
    check(model, teams[threads], [700, 41, 90], [1, 41, 30])


SLOPES = torch.tensor([0.5, 0.0, 0.03, 0.7, 0.001, 0.2])


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("isa", few([Isa.GENERIC, host_isa() & ~Isa.AMX, host_isa()], host_isa()))
def test_scores_fall_with_distance(teams: dict[int, ThreadTeam], isa: Isa, softcap: float | None) -> None:
    """By a slope of each head, of rows in any place of a tile, split among threads and not."""
    model = Model(slopes=SLOPES, softcap=softcap, heads=6, kv_heads=2, isa=isa)
    check(model, teams[2], [700, 41, 90], [1, 41, 30])


@pytest.mark.parametrize("extent", [1, 16, 37, 900])
@pytest.mark.parametrize("isa", few([Isa.GENERIC, host_isa() & ~Isa.AMX, host_isa()], host_isa()))
def test_relative_logits(teams: dict[int, ThreadTeam], isa: Isa, extent: int) -> None:
    """Distances within the profiles and beyond, before a window's first key, and after a row's own position."""
    profiles = torch.randn(3, extent, generator=torch.Generator().manual_seed(extent))
    for window, softcap in ((0, None), (50, 5.0)):
        model = Model(profiles=profiles, heads=6, kv_heads=2, isa=isa, window=window, softcap=softcap)
        check(model, teams[2], [700, 41, 90], [1, 41, 30])


def test_attention_without_relative_logits_has_no_code_for_them() -> None:
    """It is another operation, in which the address of relative states is the constant 0."""
    plain, relative = (attend_operation(64, host_isa(), BF16, BF16, each) for each in (False, True))
    assert plain == attend_operation(64, host_isa(), BF16, BF16) != relative


def test_a_sink_beyond_every_score_takes_all(teams: dict[int, ThreadTeam]) -> None:
    model = Model(sinks=torch.tensor([500.0, -500.0, 0.0]))
    table, qkv = Pages(model).table(90), random_qkv(model, 90, 5)
    got, _ = Step([table], [0], [qkv]).run(model, teams[2])
    model.sinks = None
    plain, _ = Step([table], [0], [qkv]).run(model, teams[2])
    assert (got[:, 0] == 0).all()
    assert torch.equal(got[:, 1], plain[:, 1])
    assert (got[:, 2].norm(dim=-1) < plain[:, 2].norm(dim=-1)).all()


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("isa", sorted({Isa.GENERIC, Isa.VNNI, host_isa() & ~Isa.AMX, host_isa()}), ids=repr)
@pytest.mark.parametrize("window", [0, 50])
def test_instruction_sets(teams: dict[int, ThreadTeam], isa: Isa, window: int) -> None:
    check(Model(isa=isa, window=window), teams[2], [700, 90], [30, 1])


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 100, 600, 5000, -1, -17, -64, -129, -5000])
def test_windows(teams: dict[int, ThreadTeam], window: int) -> None:
    check(Model(window=window, heads=6, kv_heads=2), teams[2], [1, 700, 650, 131, 17], [1, 1, 150, 131, 2])


def looking_ahead(count: int, spans: list[tuple[int, int]]) -> np.ndarray:
    """Rows of a step, of which those of a span see each other."""
    ahead = np.zeros(count, np.int64)
    for first, behind in spans:
        ahead[first:behind] = np.arange(behind - first)[::-1]
    return ahead


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("window", [0, 5, 60, -48])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kinds", [PLAIN, (CacheKind.of(8), CacheKind.of(8))])
def test_tokens_of_a_picture_see_each_other(
    teams: dict[int, ThreadTeam], window: int, threads: int, kinds: tuple[CacheKind, CacheKind]
) -> None:
    """Across tiles of queries and chunks of keys, and where a sequence is shared among threads."""
    for new, contexts, spans in (
        ([90, 40], [700, 40], [(3, 70), (90, 130)]),
        ([300], [420], [(0, 256), (260, 299)]),
        ([1, 17], [80, 17], [(2, 3), (9, 18)]),
    ):
        model = Model(heads=6, kv_heads=2, window=window, kinds=kinds)
        pages, rows = Pages(model), [random_qkv(model, context, context) for context in contexts]
        tables = [pages.table(context) for context in contexts]
        before = [context - count for context, count in zip(contexts, new)]
        for table, count, x in zip(tables, before, rows):
            if count:
                Step([table], [0], [x[:count]]).run(model, teams[1])
        step = Step(tables, before, [x[-n:] for x, n in zip(rows, new)], looking_ahead(sum(new), spans))
        got, q = step.run(model, teams[threads])
        assert error(got, step.wanted(model, q)) < TOLERANCE


def test_a_picture_has_the_same_bits_whatever_else_is_in_the_step(teams: dict[int, ThreadTeam]) -> None:
    model = Model(heads=6, kv_heads=2, window=50, blocks=400)
    table, qkv = Pages(model).table(600), random_qkv(model, 600, 5)
    whole, _ = Step([table], [0], [qkv], looking_ahead(600, [(100, 356), (400, 440)])).run(model, teams[1])
    plain, _ = Step([table], [0], [qkv]).run(model, teams[1])
    assert torch.equal(whole[:100], plain[:100])
    assert not torch.equal(whole[100:355], plain[100:355])
    for threads in (1, 2, 3):
        for first, spans in ((100, [(0, 256), (300, 340)]), (200, [(0, 156), (200, 240)]), (380, [(20, 60)])):
            step = Step([table], [first], [qkv[first:]], looking_ahead(600 - first, spans))
            last, _ = step.run(model, teams[threads])
            assert torch.equal(last, whole[first:])


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 90)), min_size=1, max_size=6),
    window=st.sampled_from([0, 0, 33, 128, -96]),
    threads=st.sampled_from([1, 2, 3]),
    block=st.sampled_from([16, 32, 64, 128]),
    seed=st.integers(0, 99),
)
def test_mixed_batches(
    teams: dict[int, ThreadTeam], rows: list[tuple[int, int]], window: int, threads: int, block: int, seed: int
) -> None:
    model = Model(heads=6, kv_heads=2, window=window, block=block, blocks=2560 // block)
    check(model, teams[threads], [c for c, _ in rows], [min(c, n) for c, n in rows], seed)


def test_large_scores_and_equal_values(teams: dict[int, ThreadTeam]) -> None:
    """A row whose scores span hundreds keeps its softmax; equal values come back as they are."""
    model = Model(rotary=0)
    qkv = random_qkv(model, 300, 1)
    qkv[:, : model.dim * (model.heads + 1)] *= 6
    qkv[:, -model.dim :] = to_bf16(torch.linspace(-3, 3, model.dim)).float()
    got, _ = Step([Pages(model).table(300)], [0], [qkv]).run(model, teams[2])
    assert (got - qkv[:, None, -model.dim :]).abs().max() < 3e-6


@pytest.mark.parametrize(("kv_heads", "window"), [(1, 0), (3, 0), (3, 70), (3, -70)])
def test_same_bits_however_it_is_computed(teams: dict[int, ThreadTeam], kv_heads: int, window: int) -> None:
    """A token decoded alone, in a batch, as the last of a chunk, on one thread or more: equal to the bit."""
    contexts = 1100
    model = Model(heads=3 * kv_heads, kv_heads=kv_heads, window=window, blocks=400)
    pages = Pages(model)
    table, qkv = pages.table(contexts), random_qkv(model, contexts, 5)
    whole, _ = Step([table], [0], [qkv]).run(model, teams[1])
    assert not whole.isnan().any()

    for cut in (1, 2, 16, 37, 300, 1099):  # as the end of a chunk of this length
        for threads in (1, 2, 3):
            last, _ = Step([table], [contexts - cut], [qkv[-cut:]]).run(model, teams[threads])
            assert torch.equal(last, whole[-cut:])

    start = 0
    for length in (1, 15, 200, 64, 1, 319, 500):
        piece, _ = Step([table], [start], [qkv[start : start + length]]).run(model, teams[2])
        assert torch.equal(piece, whole[start : start + length])
        start += length

    others = [(pages.table(n), random_qkv(model, n, n)) for n in range(20, 82, 2)]
    Step([t for t, _ in others], [0] * 31, [x for _, x in others]).run(model, teams[2])
    for place in (0, 17, 31):  # among 31 other decoding sequences
        entries = [(t, len(x) - 1, x[-1:]) for t, x in others]
        entries.insert(place, (table, contexts - 1, qkv[-1:]))
        batch, _ = Step(*(list(column) for column in zip(*entries))).run(model, teams[2])
        assert torch.equal(batch[place], whole[-1])


def test_sequences_that_do_not_fit_in_scratch_memory_are_not_split(teams: dict[int, ThreadTeam]) -> None:
    """Two long sequences and memory for the partial results of one, or of none: the same bits."""
    model = Model()
    pages = Pages(model)
    tables, rows = [pages.table(900), pages.table(900)], [random_qkv(model, 900, seed) for seed in (3, 4)]
    whole, _ = Step(tables, [0, 0], rows).run(model, teams[1])
    last = Step(tables, [899, 899], [x[-1:] for x in rows])
    for max_context in (900, 450, 1):
        got, _ = last.run(model, teams[2], max_context)
        assert torch.equal(got, whole[[899, 1799]])


@pytest.mark.parametrize("rotary", [0, 2, 16, 20, 32, 64])
@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("threads", [1, 2])
def test_rotate_and_write(teams: dict[int, ThreadTeam], rotary: int, block: int, threads: int) -> None:
    model = Model(heads=5, kv_heads=5, rotary=rotary, block=block)
    table, qkv = Pages(model).table(77), random_qkv(model, 77, 4)
    step = Step([table], [0], [qkv])
    _, q = step.run(model, teams[threads])
    wide = qkv.view(77, 15, 64)
    at = torch.arange(77)
    rotated = rotary_reference.rotary(wide[:, :10], at, model.cos, model.sin)
    assert torch.equal(q, to_bf16(rotated[:, :5] * torch.tensor(model.scale, dtype=torch.float32)))
    keys, values = (cache[table].flatten(0, 1) for cache in model.plain_cache())
    assert torch.equal(keys[:77], to_bf16(rotated[:, 5:]))
    assert torch.equal(values[:77], to_bf16(wide[:, 10:]))
    assert keys[77:].isnan().all()
    assert values[77:].isnan().all()


@emitted
def exp2_lanes(e: Emitter, address: Int) -> None:
    """2^x of 16 floats, in place."""
    e.store(address, emit_exp2(e, e.load(address, vector(F32))))


@njit
def exp2_all(address: int, count: int) -> None:
    for n in range(0, count, 16):
        exp2_lanes(address + 4 * n)


def test_exp2() -> None:
    exponents = np.concatenate([np.linspace(-126, 0, 160_001)[:160_000], [0.0] * 15, [-126.0]]).astype(np.float32)
    got = exponents.copy()
    exp2_all(address_of(got), got.size)
    assert np.abs(got / np.exp2(exponents.astype(np.float64)) - 1).max() < 3e-7
    edges = np.array([0.0, -0.0, -127.5, -1000.0, -1e30, -np.inf] + [-1.0] * 10, np.float32)
    exp2_all(address_of(edges), edges.size)
    assert edges.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0] + [0.5] * 10


def test_supported() -> None:
    assert all(supported(dim, 16) for dim in (16, 18, 72, 80, 96, 128, 256, 512))
    assert not any(supported(dim, 16) for dim in (0, 8, 17, 514))
    assert [supported(64, block) for block in (8, 16, 24, 32, 1024)] == [False, True, False, True, True]


# ---- quantised keys and values ---------------------------------------------------------------------------------------

KINDS = {
    name: CacheKind.of(row.bits, row.minima, row.levels) for name, row in CACHE_TYPES.items() if row.device != "cuda"
}
QUANTISED = [(kind, kind) for kind in KINDS.values() if kind.is_quantised]
OTHERS = [(CacheKind.of(bits, minima),) * 2 for bits, minima in ((7, False), (3, False), (2, True))]  # without a name
MIXED = [(keys, values) for keys in KINDS.values() for values in KINDS.values() if keys != values]
USUAL = [(KINDS["q8_0"], BF16), (KINDS["q8_0"], KINDS["q5_1"])]
COMMON = [(KINDS[name],) * 2 for name in ("q8_0", "q5_1", "q4_0", "iq4_nl")]
READERS = [Isa.GENERIC, *([Isa.AVX_VNNI, Isa.AVX2] if host_isa() & Isa.VNNI else [])]  # besides this CPU's own


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize(("keys", "values"), few([*QUANTISED, *MIXED, *OTHERS], *COMMON))
@pytest.mark.parametrize("dim", few([32, 64, 96, 128, 256, 512], 64))
def test_quantised_caches(teams: dict[int, ThreadTeam], keys: CacheKind, values: CacheKind, dim: int) -> None:
    """Of what the caches hold nothing is lost but the rounding of weights, in chunks of every size, split and not."""
    for block in (16, 64):
        model = Model(dim=dim, heads=6, kv_heads=2, kinds=(keys, values), block=block)
        check(model, teams[2], [700, 41, 90], [1, 41, 30])


@pytest.mark.parametrize(("keys", "values"), few(QUANTISED, (KINDS["q5_1"],) * 2))
def test_quantised_windows_caps_and_sinks(teams: dict[int, ThreadTeam], keys: CacheKind, values: CacheKind) -> None:
    sinks = torch.tensor([-200.0, -1.0, 0.0, 0.7, 3.0, 9.0])
    model = Model(heads=6, kv_heads=2, kinds=(keys, values), window=50, softcap=5.0, sinks=sinks)
    check(model, teams[2], [700, 41, 90], [1, 41, 30])
    check(dataclasses.replace(model, slopes=SLOPES), teams[2], [700, 41, 90], [1, 41, 30])
    check(dataclasses.replace(model, profiles=torch.eye(2, 20)), teams[2], [700, 41, 90], [1, 41, 30])


@pytest.mark.parametrize("isa", few([host_isa(), *READERS], host_isa()))
@pytest.mark.parametrize(("keys", "values"), few([*QUANTISED, *USUAL, *OTHERS], *COMMON))
def test_no_bit_of_a_quantised_cache_depends_on_how_it_is_read(
    teams: dict[int, ThreadTeam], keys: CacheKind, values: CacheKind, isa: Isa
) -> None:
    """Not on how a prompt is cut, on threads, on neighbours, or on the CPU's instructions."""
    kinds = keys, values
    model = Model(kinds=kinds, heads=6, kv_heads=2)
    pages = Pages(model)
    table, other, qkv = pages.table(700), pages.table(300), random_qkv(model, 700, 5)
    whole, _ = Step([table], [0], [qkv]).run(model, teams[1])
    kept = model.keys.copy(), model.values.copy()
    beside = random_qkv(model, 300, 6)
    model.isa = host_isa() if BF16 in kinds else isa  # bfloat16 is summed otherwise by other instructions
    for cut, threads in ((1, 2), (37, 3), (300, 1)):
        last, _ = Step([other, table], [0, 700 - cut], [beside, qkv[-cut:]]).run(model, teams[threads])
        assert torch.equal(last[300:], whole[-cut:])
        rows, _ = Step([table], [0], [qkv[: 700 - cut]]).run(model, teams[threads])
        assert torch.equal(rows, whole[: 700 - cut])
    fresh = Model(kinds=kinds, heads=6, kv_heads=2)
    for start in range(0, 700, 123):
        Step([table], [start], [qkv[start : start + 123]]).run(fresh, teams[2])
    assert np.array_equal(fresh.keys, kept[0])
    assert np.array_equal(fresh.values, kept[1])


@pytest.mark.parametrize("rotary", [0, 64])
def test_keys_and_queries_are_measured(teams: dict[int, ThreadTeam], rotary: int) -> None:
    model = Model(heads=6, kv_heads=2, rotary=rotary, poison=False)
    model.sums = np.zeros((2, 3, 64))
    qkv = random_qkv(model, 33, 4)
    Step([Pages(model).table(33)], [0], [qkv]).run(model, teams[2])
    every = qkv[:, : 8 * 64].unflatten(-1, (8, 64)).double()
    if rotary:
        first, second = every.chunk(2, -1)
        cos, sin = model.cos[:33, None], model.sin[:33, None]
        every = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    keys, queries = every[:, 6:], every[:, :6].unflatten(1, (2, 3))
    wanted = torch.stack([keys.sum(0), keys.square().sum(0), queries.square().sum((0, 2))], 1)
    assert np.allclose(model.sums, wanted.numpy(), rtol=1e-5, atol=1e-4)


def test_keys_are_fitted_to_any_number_of_tokens() -> None:
    fit = np.ones((2, 3, 64), np.float32)
    key_fit.fit(MeasuredKeys(fit, np.zeros((2, 3, 64)), 3, True), 0)
    assert (fit == 1).all()
    keys = np.random.default_rng(1).standard_normal((2, 64))
    key_fit.fit(MeasuredKeys(fit, np.stack([keys, keys**2, np.full_like(keys, 3 * 4.0)], 1), 3, True), 1)
    assert np.allclose(fit[:, 0], keys)
    assert (fit[:, 1] < 2).all(), "one token does not tell how far keys are from each other"


@pytest.mark.parametrize("kinds", QUANTISED)
def test_what_all_keys_have_in_common_is_not_rounded(
    teams: dict[int, ThreadTeam], kinds: tuple[CacheKind, CacheKind]
) -> None:
    """Keys have a bias a hundred times what tells them apart, and one dimension a thousand times the others."""
    model = Model(kinds=kinds, heads=6, kv_heads=2, rotary=0)
    bias = 100 * np.random.default_rng(1).standard_normal(2 * 64).astype(np.float32)
    table, qkv = Pages(model).table(300), random_qkv(model, 300, 5)
    q, k = qkv[:, : 6 * 64], qkv[:, 6 * 64 : 8 * 64]
    q[:, 5::64] /= 1000
    k[:, 5::64] *= 1000
    k += torch.from_numpy(bias)
    step, off = Step([table], [0], [qkv]), []
    for fits in (False, True):
        if fits:
            model.sums = np.zeros((2, 3, 64))
            step.run(model, teams[2])
            key_fit.fit(MeasuredKeys(model.kept_fit, model.sums, 3, True), 300)
            model.sums = None
        got, queries = step.run(model, teams[2])
        if fits:
            assert error(got, step.wanted(model, queries)) < TOLERANCE
        keys = model.plain_cache()[0][table].flatten(0, 1)[:300].flatten(1)
        small = torch.arange(2 * 64) % 64 != 5
        off.append(error(keys[:, small], k[:, small]))
        fit = model.kept_fit
    assert off[1] < 0.03 * off[0]
    assert np.allclose(fit[:, 1] * fit[:, 2], 1, rtol=1e-6)
    unmoved = fit.copy()
    key_fit.fit(MeasuredKeys(unmoved, np.ones((2, 3, 64)), 3, False), 1)
    assert not unmoved[:, 0].any()


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("kind", [kind for kind, _ in (*QUANTISED, *OTHERS)])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_what_is_written_is_within_half_a_step(teams: dict[int, ThreadTeam], kind: CacheKind, block: int) -> None:
    """Of the numbers as they are: blocks of zeros, of one number far from the others, and of large ones too."""
    model = Model(heads=5, kv_heads=5, rotary=32, block=block, dim=96, kinds=(kind, kind))
    table, qkv = Pages(model).table(77), random_qkv(model, 77, 4)
    wide = qkv.view(77, 15, 96)
    # A scale and a minimum are halves, which end at 65504.
    wide[3], wide[5, :, ::7], wide[6] = 0, 40, wide[6] * (1e4 if kind.has_minima or kind.bits == 3 else 1e5)
    _, q = Step([table], [0], [qkv]).run(model, teams[2], attends=False)
    rotated = rotary_reference.rotary(wide[:, :10], torch.arange(77), model.cos, model.sin)
    queries = rotated[:, :5] * torch.tensor(model.scale, dtype=torch.float32)
    kept = [cache[table].flatten(0, 1)[:77] for cache in model.plain_cache()]
    for got, wanted, steps in ((q, queries, 127), (kept[0], rotated[:, 5:], 0), (kept[1], wide[:, 10:], 0)):
        got, wanted = turned(got), turned(wanted)
        top = wanted.unflatten(-1, (3, 32)).abs().amax(-1, keepdim=True)
        reach = steps or (2**kind.bits - 1 if kind.has_minima else 2**kind.bits - 2 * (not kind.has_halves)) / 2
        off = (got - wanted).unflatten(-1, (3, 32)).abs() / (top + 1e-30)
        # A number as far from 0 as the farthest, on the other side, has no code of its own in q4_0.
        lacks = kind.has_halves and not kind.has_minima and not steps
        assert off.square().mean().sqrt() < 0.35 / reach
        if kind.bits == 4 and not kind.has_minima and not steps:  # the best of several scales, also smaller ones
            blocks, fit = wanted.unflatten(-1, (3, 32)), (got - wanted).unflatten(-1, (3, 32)).square().sum(-1)
            ends = torch.stack([blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)])
            levels = torch.tensor(LEVELS if kind.has_levels else range(-8, 8)).float()
            largest = (ends.gather(0, ends.abs().argmax(0, keepdim=True))[0] / levels[0]).half().float()
            nearest = ((blocks / (largest + 1e-30))[..., None] - levels).abs().argmin(-1)
            plain = levels[nearest] * largest
            assert (fit <= 1.01 * (plain - blocks).square().sum(-1) + 1e-9 * top[..., 0] ** 2).all()
            assert fit.sum() < 0.95 * (plain - blocks).square().sum()
        else:
            assert off.max() <= (1.01 + kind.bias / 2048 if lacks else 0.51) / reach  # a half is off by up to 1/2048
