# SPDX-License-Identifier: MIT
"""Tokens divided among ranks that have whole experts, and sent to the ranks of their experts; inside step 6.

From attention's sum to the end of a layer a rank has its share of a step's T tokens alone:

1. behind attention the ranks' results are added up, each rank's own rows there alone (reduce-scatter);
2. it norms and routes them, and multiplies them by what all tokens share, which is whole on each rank;
3. each row goes once to every rank that has one of its experts, with their numbers and weights (all to all), behind
   the counts;
4. a rank multiplies what came by its experts, and the sums go back;
5. their owner adds them up in the order of the ranks, then what all tokens share; all ranks get all rows (all-gather).

In the place of that, every rank may have all T rows all the way, and what is added up are all rows, twice. Both add the
same numbers in the same order, that of the ranks, but on GPUs, where the library's sums have orders of their own; and
nothing depends on who owns a token, which changes with what else is in a step.

Source: Lepikhin et al., 2020, arXiv:2006.16668 (all to all); Korthikanti et al., 2022, arXiv:2205.05198 (sums and norms
of a share of the rows).

Letters: T tokens, t of them this rank's, n ranks, k experts of a token, E hidden size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch

from candle_vllm.core.kernels.collectives import Collective, added_up
from candle_vllm.core.kernels.moe import Pairs

LEAST_SAVED = 4 << 20  # bytes that a rank must save in a layer, for three exchanges more and the host's wait
MOST_SHARE = 0.75  # of the bytes of sums: below it an exchange of uneven parts may be slower than a sum, and yet win


def rows_sent(held: Sequence[int], top_k: int) -> tuple[float, float]:
    """Rows of E that a rank sends in a layer for each token of a step: with sums of all rows, and with exchanges.

    A sum of all rows is, for whoever counts bytes, a reduce-scatter and an all-gather. Of exchanges, a token's row goes
    to each other rank that has one of its experts, and a sum comes back from there; experts are thought to be chosen
    alike.

    Args:
        held: how many experts each rank has.
        top_k: k.
    """
    total, others = sum(held), (len(held) - 1) / len(held)
    wanted = sum(1 - math.comb(total - own, top_k) / math.comb(total, top_k) for own in held)  # ranks of a token
    return 4 * others, 2 * others + 2 * others * wanted / len(held)


def least_step(held: Sequence[int], top_k: int) -> float:
    """Bytes of a step's rows [T, E] from which on it is better divided, by bytes alone; infinity where none is."""
    sums, exchanges = rows_sent(held, top_k)
    return LEAST_SAVED / (sums - exchanges) if exchanges <= MOST_SHARE * sums else math.inf


class TokenShares:
    """What a rank's layers know of the tokens of a step; all layers of a model have the same one.

    Args:
        collective: the ranks.
        held: how many experts each has, one rank's behind the other's.
        least: bytes of a step's rows from which on it is divided, where it may be and has a row for each rank.
    """

    def __init__(self, collective: Collective, held: Sequence[int], least: float) -> None:
        self._collective, self._held, self._least = collective, held, least
        self._borders: torch.Tensor | None = None  # between the ranks' experts
        self._may_divide = self._apart = False
        self._counts = [0] * collective.size

    def begin(self, tokens: int, *, may_divide: bool) -> None:
        """Of a step with so many tokens, on every rank alike.

        Args:
            may_divide: not where shapes must not depend on what is chosen, as in captured steps, or where adapters know
                a token by its row.
        """
        each, more = divmod(tokens, self._collective.size)
        self._counts = [each + (rank < more) for rank in range(self._collective.size)]
        self._may_divide, self._apart = may_divide, False

    @property
    def _own(self) -> slice:
        """This rank's rows among all."""
        first = sum(self._counts[: self._collective.rank])
        return slice(first, first + self._counts[self._collective.rank])

    def sum(self, y: torch.Tensor) -> torch.Tensor:
        """y [T, E] of all ranks added up: this rank's rows [t, E] alone in a divided step."""
        assert len(y) == sum(self._counts)
        self._apart = self._may_divide and y.nbytes >= self._least and self._counts[-1] > 0
        if not self._apart:
            return self._collective.sum(y)
        own = self._counts[self._collective.rank]
        parts = self._collective.exchange(y, self._counts, [own] * self._collective.size)
        return added_up(parts.unflatten(0, (-1, own)))

    def of(self, residual: torch.Tensor) -> torch.Tensor:
        """The rows of what `sum` gave, of a residual [T, E]."""
        return residual[self._own] if self._apart else residual

    def experts(
        self, x: torch.Tensor, pairs: Pairs, compute: Callable[[torch.Tensor, Pairs], torch.Tensor]
    ) -> torch.Tensor:
        """What experts make of x [t, E], or of all rows [T, E] where the step is not divided.

        Args:
            x: behind `sum`.
            pairs: x's tokens and their experts among all ranks'.
            compute: what this rank's experts make of rows [R, E], of whatever tokens, and 0 where they have none.
        """
        if not self._apart:
            return self._collective.sum(compute(x, pairs))
        size, own = self._collective.size, len(x)
        if self._borders is None:
            between = list(itertools.accumulate(self._held))[:-1]
            self._borders = torch.tensor(between, dtype=pairs.experts.dtype, device=x.device)
        owners = torch.bucketize(pairs.experts, self._borders, right=True)
        wanted = torch.zeros(own, size, dtype=torch.bool, device=x.device).scatter_(1, owners, True)
        counts = wanted.sum(0)[:, None]
        theirs = self._collective.exchange(counts, [1] * size, [1] * size)
        sent, received = torch.cat([counts, theirs], 1).T.tolist()  # the host waits here, once a layer
        places = wanted.T.flatten().to(torch.uint8).sort(descending=True, stable=True).indices[: sum(sent)]
        tokens = places % own  # by ranks, and of each in their order
        packed = _side_by_side(x[tokens], pairs.experts[tokens], pairs.weights[tokens])
        came = self._collective.exchange(packed, sent, received)
        rows, experts, weights = _parted(came, (x, pairs.experts, pairs.weights))
        if len(rows):
            rows = compute(rows, Pairs(weights, experts, pairs.count))
        parts = x.new_zeros(size * own, x.shape[1])
        parts[places] = self._collective.exchange(rows, received, sent)
        return added_up(parts.unflatten(0, (size, own)))

    def whole(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A layer's two summands, which become one of all ranks' rows [T, E] in a divided step."""
        if not self._apart:
            return x, residual
        self._apart = False
        total = x if residual is None else residual + x
        most, width = self._counts[0], x.shape[1]
        rows = self._collective.gather(total.reshape(1, -1), most * width).view(-1, most, width)
        full = self._counts.count(most)  # ranks; the others have a row less
        if full == len(rows):
            return rows.flatten(0, 1), None
        return torch.cat([rows[:full].flatten(0, 1), rows[full:, :-1].flatten(0, 1)]), None


def _side_by_side(*each: torch.Tensor) -> torch.Tensor:
    """Rows of several tensors as bytes beside each other, so that they are sent together."""
    return torch.cat([part.view(torch.uint8) for part in each], 1)


def _parted(packed: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same taken apart: as many columns, and of such types, as these have."""
    sizes = [each.shape[1] * each.itemsize for each in like]
    parts = zip(packed.split(sizes, 1), like, strict=True)
    return [part.contiguous().view(each.dtype) for part, each in parts]
