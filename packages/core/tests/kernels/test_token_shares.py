# SPDX-License-Identifier: MIT
"""Tokens divided among ranks, and sent to the ranks of their experts: the bits of ranks that have all tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from candle_vllm.core.kernels.collectives.token_shares import LEAST_SAVED, TokenShares, least_step, rows_sent
from candle_vllm.core.kernels.moe import Pairs
from packages.core.tests.thread_ranks import ThreadRanks, in_threads

WIDTH, K = 16, 2


class Counted:
    """Ranks that count the rows of activations that go to others."""

    def __init__(self, ranks: ThreadRanks) -> None:
        self.rank, self.size, self.sum = ranks.rank, ranks.size, ranks.sum
        self._ranks, self.rows = ranks, 0
        self.exchanges = 0

    def exchange(self, x: Any, sent: Sequence[int], received: Sequence[int]) -> Any:
        self.exchanges += 1
        if x.dtype != torch.int64:  # the counts
            self.rows += sum(sent) - sent[self.rank]
        return self._ranks.exchange(x, sent, received)

    def gather(self, x: Any, width: int) -> Any:
        self.rows += width // WIDTH * (self.size - 1)
        return self._ranks.gather(x, width)


def chosen(case: str, tokens: int, held: Sequence[int]) -> torch.Tensor:
    """Experts [T, k]: any, all tokens' the same first ones, or the last ones of the rank that has most."""
    total, made = sum(held), torch.Generator().manual_seed(tokens)
    if case == "any":
        return torch.rand(tokens, total, generator=made).topk(K).indices.to(torch.int32)
    first = 0 if case == "first" else total - K
    return torch.arange(first, first + K, dtype=torch.int32).expand(tokens, K).contiguous()


def layer(ranks: Any, held: Sequence[int], case: str, tokens: int, *, may_divide: bool) -> torch.Tensor:
    """What is behind a layer, x + its residual: of parts of attention's results, and of experts that scale rows."""
    made = torch.Generator().manual_seed(3)
    parts = torch.randn(ranks.size, tokens, WIDTH, generator=made)
    residual, scales = (torch.randn(rows, WIDTH, generator=made) for rows in (tokens, sum(held)))
    weights = torch.rand(tokens, K, generator=made)
    shares = TokenShares(ranks, held, 0.0)
    shares.begin(tokens, may_divide=may_divide)
    summed = shares.sum(parts[ranks.rank])
    x = summed + shares.of(residual)
    here = slice(sum(held[: ranks.rank]), sum(held[: ranks.rank + 1]))

    def compute(rows: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        assert len(rows) == pairs.tokens > 0
        y = torch.zeros_like(rows)
        for j in range(K):
            expert = pairs.experts[:, j].long()
            inside = (expert >= here.start) & (expert < here.stop)
            y += torch.where(inside, pairs.weights[:, j], 0.0)[:, None] * (rows * scales[expert])
        return y

    own = shares._own if len(x) < tokens else slice(None)
    pairs = Pairs(weights[own], chosen(case, tokens, held)[own], sum(held))
    y = shares.experts(x, pairs, compute)
    assert len(y) == len(x)
    whole, nothing = shares.whole(y, x)
    return whole if nothing is None else whole + nothing


@pytest.mark.parametrize("case", ["any", "first", "last"])
@pytest.mark.parametrize("held", [(2, 2), (3, 2, 2), (2, 2, 2, 2), (3, 2, 2, 2, 2)], ids=str)
def test_bits_are_those_of_ranks_that_have_all_tokens(case: str, held: Sequence[int]) -> None:
    """With as many tokens as ranks, with one more, with many; and with fewer, which are not divided."""
    for tokens in (1, len(held), len(held) + 1, 33, 64):
        given: dict[str, Any] = {"held": held, "case": case, "tokens": tokens}

        def both(ranks: ThreadRanks, given: dict[str, Any] = given) -> tuple[torch.Tensor, torch.Tensor, int]:
            counted = Counted(ranks)
            whole, divided = (layer(counted, may_divide=divide, **given) for divide in (False, True))
            return whole, divided, counted.exchanges

        found = in_threads(len(held), both)
        for whole, divided, exchanges in found:
            assert exchanges == (4 if tokens >= len(held) else 0)
            assert divided.shape == (tokens, WIDTH)
            assert torch.equal(divided, whole)
            assert torch.equal(divided, found[0][1])


@pytest.mark.parametrize("held", [(2, 2, 2, 2), (3, 2, 2)], ids=str)
def test_rows_are_as_many_as_are_reckoned(held: Sequence[int]) -> None:
    tokens = 6000

    def sent(ranks: ThreadRanks) -> int:
        counted = Counted(ranks)
        layer(counted, held, "any", tokens, may_divide=True)
        return counted.rows

    counted = sum(in_threads(len(held), sent)) / len(held)
    assert counted == pytest.approx(rows_sent(held, K)[1] * tokens, rel=0.02)


def test_what_pays() -> None:
    """Of k = 8 of 256 experts eight ranks send 83 % of the bytes, sixteen 70 and 64 ranks 56."""
    shares = {n: [each / 4 / (n - 1) * n for each in rows_sent([256 // n] * n, 8)] for n in (2, 8, 16, 64)}
    assert [whole for whole, _ in shares.values()] == pytest.approx([1] * 4)
    assert [divided for _, divided in shares.values()] == pytest.approx([0.998, 0.831, 0.704, 0.559], abs=1e-3)
    least = [least_step([256 // n] * n, 8) for n in shares]
    assert least[:2] == [math.inf, math.inf]
    assert [each / 7168 / 2 for each in least[2:]] == pytest.approx([263.4, 168.9], abs=0.1)  # tokens
    sums, exchanges = rows_sent([16] * 16, 8)
    assert (sums - exchanges) * least[2] == pytest.approx(LEAST_SAVED)
    assert least_step([1] * 8, 2) < math.inf  # Mixtral's, one on each


def test_only_what_pays_is_divided() -> None:
    """Of a step that may be: where it has a row for each rank and so many bytes."""

    def divided(ranks: ThreadRanks) -> list[bool]:
        found = []
        for tokens, may, least in ((16, True, 1024), (15, True, 1024), (16, False, 0), (2, True, 0), (3, True, 0)):
            shares = TokenShares(ranks, [1] * 3, least)
            shares.begin(tokens, may_divide=may)
            found.append(len(shares.sum(torch.zeros(tokens, WIDTH))) < tokens)
        return found

    assert in_threads(3, divided) == [[True, False, False, False, True]] * 3
