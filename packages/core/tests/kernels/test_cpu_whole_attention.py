# SPDX-License-Identifier: MIT
"""Attention of encoders on the CPU against the reference, and the same bits whatever else is in a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from candle_vllm.core.kernels.cpu_runtime.level import Isa, host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of, operation, plan_row
from candle_vllm.core.kernels.cpu_runtime.recorder import Recorder, StepLimits
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.cpu_runtime.values import buffer_value, step_tokens
from candle_vllm.core.kernels.embedding import AddArguments
from candle_vllm.core.kernels.rotary import Turned
from candle_vllm.core.kernels.whole_attention import whole_attention
from candle_vllm.core.kernels.whole_attention.reference import whole_attention as reference


@pytest.fixture(scope="module")
def teams() -> Iterator[dict[int, ThreadTeam]]:
    made = {threads: ThreadTeam(threads) for threads in (1, 2, 3)}
    yield made
    for team in made.values():
        team.close()


def run(
    team: ThreadTeam,
    threads: int,
    texts: Sequence[np.ndarray],
    heads: int,
    isa: Isa | None = None,
    turned: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    **options: Any,
) -> np.ndarray:
    """The recorded operations, behind a run that leaves NaN wherever it writes; `turned` are places, cos and sin."""
    lengths, width = [len(text) for text in texts], texts[0].shape[1]
    limits = StepLimits(
        tokens=sum(lengths) + 3, sequences=len(texts) + 1, logit_rows=1, table_width=0, block_size=1, threads=threads
    )
    recorder = Recorder(limits, host_isa() if isa is None else isa)
    source = recorder.buffer(width)
    how = None if turned is None else Turned(step_tokens(recorder, recorder.arrays.positions), *turned[1:])
    result = whole_attention(buffer_value(recorder, source), heads, (), how, **options)
    if turned is not None:
        recorder.arrays.positions[: len(turned[0])] = turned[0]
    recorder.arrays.query_start[: len(texts) + 1] = np.cumsum([0, *lengths])
    recorder.arrays.numbers[StepNumber.TOKENS] = sum(lengths)
    recorder.arrays.numbers[StepNumber.SEQUENCES] = len(texts)
    source.array[:] = np.nan
    team.run(np.array(recorder.plan, np.int64), recorder.num_rows)
    assert np.isnan(result.rows(np.arange(sum(lengths)))).all()
    source.array.reshape(-1, source.stride)[: sum(lengths), :width] = np.concatenate(texts)
    team.run(np.array(recorder.plan, np.int64), recorder.num_rows)
    return result.rows(np.arange(sum(lengths)))


def text(length: int, heads: int, dim: int, seed: int = 0) -> np.ndarray:
    numbers = np.random.default_rng([length, dim, seed]).standard_normal((length, 3 * heads * dim))
    return (2 * numbers).astype(np.float32)


def error(got: np.ndarray, wanted: torch.Tensor) -> float:
    return float(np.sqrt(np.square(got - wanted.numpy()).mean() / np.square(wanted.numpy()).mean()))


@pytest.mark.one_of_each(34)
@pytest.mark.parametrize("isa", [None, Isa.GENERIC], ids=["host", "generic"])
@pytest.mark.parametrize("dim", [1, 8, 20, 32, 64, 80, 256])
@pytest.mark.parametrize("lengths", [[1], [7, 8, 9, 1, 16], [33, 17, 100], [545]], ids=str)
def test_equals_the_reference(teams: dict[int, ThreadTeam], lengths: list[int], dim: int, isa: Isa | None) -> None:
    heads = 3
    texts = [text(length, heads, dim, number) for number, length in enumerate(lengths)]
    wanted = reference(torch.from_numpy(np.concatenate(texts)).double(), heads, lengths)
    assert error(run(teams[2], 2, texts, heads, isa), wanted) < 2e-6


@pytest.mark.parametrize(("dim", "turning"), [(16, 16), (64, 64), (20, 8)])
def test_queries_and_keys_turn(teams: dict[int, ThreadTeam], dim: int, turning: int) -> None:
    texts, random = [text(length, 3, dim, length) for length in (17, 40)], np.random.default_rng(0)
    places, angles = random.integers(0, 50, 57), random.uniform(-9, 9, (50, turning // 2))
    cos, sin = (turn(angles).astype(np.float32) for turn in (np.cos, np.sin))
    tables = [torch.from_numpy(table).double() for table in (cos, sin)]
    whole = torch.from_numpy(np.concatenate(texts)).double()
    q, k = (
        literally_turned(part.reshape(57, 3, dim), torch.from_numpy(places), *tables) for part in whole.chunk(3, -1)[:2]
    )
    wanted = reference(torch.cat([q.flatten(1), k.flatten(1), whole.chunk(3, -1)[2]], 1), 3, [17, 40])
    by_torch = reference(
        whole.float(), 3, [17, 40], Turned(torch.from_numpy(places), *map(torch.from_numpy, (cos, sin)))
    )
    assert error(by_torch.numpy(), wanted) < 2e-6
    for threads, team in teams.items():
        assert error(run(team, threads, texts, 3, turned=(places, cos, sin)), wanted) < 2e-6


def literally_turned(x: torch.Tensor, places: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Each pair of a head as a complex number times another."""
    half, y = cos.shape[1], x.clone()
    pairs = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.complex(cos, sin)[places][:, None]
    y[..., :half], y[..., half : 2 * half] = pairs.real, pairs.imag
    return y


@pytest.mark.one_of_each(3)
@pytest.mark.parametrize("isa", [None, Isa.GENERIC], ids=["host", "generic"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("biased", [0, 1, None], ids=["no bias", "one bias", "a bias for each head"])
@pytest.mark.parametrize("window", [None, 0, 3, 64])
def test_windows_biases_and_shared_keys(
    teams: dict[int, ThreadTeam], window: int | None, biased: int | None, heads: int, kv_heads: int, isa: Isa | None
) -> None:
    """Against attention written out key by key; the texts' results are those that they have alone, to the bit."""
    random, lengths, dim, most = np.random.default_rng(0), [5, 70, 33, 1, 199], 16, 210
    texts = [random.standard_normal((n, (heads + 2 * kv_heads) * dim)).astype(np.float32) for n in lengths]
    rows = heads if biased is None else biased
    bias = random.standard_normal((rows, 2 * most - 1)).astype(np.float32) if rows else None
    wanted = [literally(text, heads, kv_heads, bias, window) for text in texts]
    by_torch = reference(
        torch.from_numpy(np.concatenate(texts)), heads, lengths, kv_heads=kv_heads,
        bias=None if bias is None else torch.from_numpy(bias), window=window,
    )  # fmt: skip
    assert error(by_torch.numpy(), torch.from_numpy(np.concatenate(wanted))) < 2e-6
    options: Any = {"kv_heads": kv_heads, "bias": bias, "window": window}
    alone = np.concatenate([run(teams[1], 1, [each], heads, isa, **options) for each in texts])
    assert error(alone, torch.from_numpy(np.concatenate(wanted))) < 2e-6
    assert np.array_equal(run(teams[3], 3, texts, heads, isa, **options), alone)


def literally(text: np.ndarray, heads: int, kv_heads: int, bias: np.ndarray | None, window: int | None) -> np.ndarray:
    """One text, query by query, in float64."""
    parts = text.astype(np.float64).reshape(len(text), heads + 2 * kv_heads, -1)
    result = np.zeros((len(text), heads, parts.shape[2]))
    for head in range(heads):
        key = heads + head // (heads // kv_heads)
        for query in range(len(text)):
            away = np.arange(len(text)) - query
            scores = parts[:, key] @ parts[query, head] / np.sqrt(parts.shape[2])
            if bias is not None:
                scores += bias[head % len(bias), away + bias.shape[1] // 2]
            if window is not None:
                scores[abs(away) > window] = -np.inf
            powers = np.exp(scores - scores.max())
            result[query, head] = powers / powers.sum() @ parts[:, key + kv_heads]
    return result.reshape(len(text), -1)


def test_large_scores_hide_others(teams: dict[int, ThreadTeam]) -> None:
    whole = text(40, 2, 16)
    whole[:, : 2 * 2 * 16] *= 30
    wanted = reference(torch.from_numpy(whole).double(), 2, [40])
    assert error(run(teams[1], 1, [whole], 2), wanted) < 1e-5


def test_bits_depend_on_nothing_else(teams: dict[int, ThreadTeam]) -> None:
    texts = [text(length, 4, 24, 1) for length in (5, 70, 16, 31, 1, 33)]
    alone = [run(teams[1], 1, [each], 4) for each in texts]
    for threads in teams:
        together = run(teams[threads], threads, texts, 4)
        assert np.array_equal(together, np.concatenate(alone))


def test_numbers_that_are_not_finite_stay_in_their_text(teams: dict[int, ThreadTeam]) -> None:
    texts = [text(9, 2, 8), text(40, 2, 8), text(9, 2, 8)]
    texts[1][3] = np.nan
    found = run(teams[2], 2, texts, 2)
    assert np.array_equal(found[:9], found[-9:])
    assert np.isfinite(found[:9]).all()
    assert np.isnan(found[9:49]).all()


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_adding_rows(teams: dict[int, ThreadTeam], rows: int) -> None:
    rng = np.random.default_rng(rows)
    x, target = (rng.standard_normal((rows + 1, columns)).astype(np.float32) for columns in (21, 19))
    wanted = target.copy()
    wanted[:rows, :18] += x[:rows, :18]
    numbers = np.zeros(StepNumber.COUNT, np.int64)
    numbers[StepNumber.TOKENS] = rows
    arguments = AddArguments(address_of(x), 21, 18, address_of(target), 19)
    teams[2].run(np.array(plan_row(operation("embedding.cpu:add"), address_of(numbers), arguments)), 1)
    assert np.array_equal(target, wanted)
