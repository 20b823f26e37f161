# SPDX-License-Identifier: MIT
"""Expert parallelism: divide a step's tokens among ranks, and send them to the ranks of their experts.

From attention's sum to the end of a layer, a rank computes only its share of a step's T tokens:

1. after attention a reduce-scatter adds up the ranks' results; each rank gets the sums of its own rows;
2. the rank normalises and routes these rows, and computes the shared expert of these rows;
3. after an exchange of counts, each row is sent once to every rank that has one of the row's experts, with expert
   numbers and weights (all-to-all);
4. a rank computes its experts for the rows that it received, and sends the sums back;
5. the rows' owner adds up sums in the order of the ranks, then the shared expert; an all-gather distributes all rows.

In a step that is not divided, every rank keeps all T rows, and two all-reduces add up all rows. Both ways add the same
numbers in the same order of ranks, except on GPUs, where NCCL has its own order. The owner of a token depends on the
other tokens of a step; no result depends on the owner.

Source: Lepikhin et al., 2020, arXiv:2006.16668 (all to all); Korthikanti et al., 2022, arXiv:2205.05198 (sums, norms).

Letters: T tokens, t of them this rank's, n ranks, k experts of a token, E hidden size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch

from candle_vllm.core.kernels.collectives import Collective, added_up
from candle_vllm.core.kernels.moe import Pairs

LEAST_SAVED = 4 << 20  # bytes that a rank must save in a layer: dividing costs three more exchanges and a host wait
MOST_SHARE = 0.75  # exchanges are slower per byte: they may need at most this share of the all-reduces' bytes


def rows_sent(held: Sequence[int], top_k: int) -> tuple[float, float]:
    """Return the rows of E elements that a rank sends in a layer per token: with all-reduces, and with exchanges.

    An all-reduce counts as a reduce-scatter and an all-gather. With exchanges, a token's row is sent to each other rank
    that has one of its experts, and a sum is sent back; all experts are assumed to be equally likely.

    Args:
        held: number of experts of each rank.
        top_k: k.
    """
    total, others = sum(held), (len(held) - 1) / len(held)
    wanted = sum(1 - math.comb(total - own, top_k) / math.comb(total, top_k) for own in held)  # ranks with its experts
    return 4 * others, 2 * others + 2 * others * wanted / len(held)


def least_step(held: Sequence[int], top_k: int) -> float:
    """Return the minimum bytes of rows [T, E] of a step that should be divided; infinity if never."""
    sums, exchanges = rows_sent(held, top_k)
    return LEAST_SAVED / (sums - exchanges) if exchanges <= MOST_SHARE * sums else math.inf


class TokenShares:
    """A rank's share of the tokens of a step; all layers of a model use the same object.

    Args:
        collective: the ranks.
        held: number of experts of each rank; experts are numbered rank by rank.
        least: minimum bytes of rows of a divided step; `begin` must allow it too, and each rank must get a row.
    """

    def __init__(self, collective: Collective, held: Sequence[int], least: float) -> None:
        self._collective, self._held, self._least = collective, held, least
        self._borders: torch.Tensor | None = None  # first expert of each rank but the first
        self._may_divide = self._apart = False
        self._counts = [0] * collective.size

    def begin(self, tokens: int, *, may_divide: bool) -> None:
        """Begin a step of `tokens` tokens; all ranks must pass the same arguments.

        Args:
            may_divide: False if shapes must not depend on the chosen experts, as in captured steps, or if adapters
                identify a token by its row.
        """
        each, more = divmod(tokens, self._collective.size)
        self._counts = [each + (rank < more) for rank in range(self._collective.size)]
        self._may_divide, self._apart = may_divide, False

    @property
    def _own(self) -> slice:
        """This rank's rows among all rows."""
        first = sum(self._counts[: self._collective.rank])
        return slice(first, first + self._counts[self._collective.rank])

    def sum(self, y: torch.Tensor) -> torch.Tensor:
        """Sum y [T, E] over all ranks; in a divided step return only this rank's rows [t, E]."""
        assert len(y) == sum(self._counts)
        self._apart = self._may_divide and y.nbytes >= self._least and self._counts[-1] > 0
        if not self._apart:
            return self._collective.sum(y)
        own = self._counts[self._collective.rank]
        parts = self._collective.exchange(y, self._counts, [own] * self._collective.size)
        return added_up(parts.unflatten(0, (-1, own)))

    def of(self, residual: torch.Tensor) -> torch.Tensor:
        """Select the rows of a residual [T, E] that `sum` returns."""
        return residual[self._own] if self._apart else residual

    def experts(
        self, x: torch.Tensor, pairs: Pairs, compute: Callable[[torch.Tensor, Pairs], torch.Tensor]
    ) -> torch.Tensor:
        """Compute the experts' result of x [t, E], or of all rows [T, E] in a step that is not divided.

        Args:
            x: rows that `sum` returned.
            pairs: x's tokens and their experts, numbered over all ranks.
            compute: function that computes this rank's experts for rows [R, E]; 0 for a row without such an expert.
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
        tokens = places % own  # sorted by destination rank, then by token
        told = (part[tokens].view(torch.uint8) for part in (x, pairs.experts, pairs.weights))
        came = self._collective.exchange(torch.cat([*told], 1), sent, received)  # as bytes, so that they go together
        rows, experts, weights = _parted(came, (x, pairs.experts, pairs.weights))
        if len(rows):
            rows = compute(rows, Pairs(weights, experts, pairs.count))
        parts = x.new_zeros(size * own, x.shape[1])
        parts[places] = self._collective.exchange(rows, received, sent)
        return added_up(parts.unflatten(0, (size, own)))

    def whole(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return x and residual; in a divided step return their sum, gathered to all rows [T, E], and None."""
        if not self._apart:
            return x, residual
        self._apart = False
        total = x if residual is None else residual + x
        most, width = self._counts[0], x.shape[1]
        rows = self._collective.gather(total.reshape(1, -1), most * width).view(-1, most, width)
        full = self._counts.count(most)  # number of ranks with `most` rows; the others have a row less
        if full == len(rows):
            return rows.flatten(0, 1), None
        return torch.cat([rows[:full].flatten(0, 1), rows[full:, :-1].flatten(0, 1)]), None


def _parted(packed: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Split rows of bytes into tensors with the columns and types of `like`."""
    sizes = [each.shape[1] * each.itemsize for each in like]
    parts = zip(packed.split(sizes, 1), like, strict=True)
    return [part.contiguous().view(each.dtype) for part, each in parts]
