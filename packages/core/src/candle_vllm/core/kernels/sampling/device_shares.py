# SPDX-License-Identifier: MIT
"""`shares.py` where steps are launched: what ranks tell each other never passes through their hosts.

What a rank tells, and whose part a random number falls in, is worked out on the device; exchanges are of fixed sizes,
so that a captured draw holds them. The first rank's host merges what has come when it takes the tokens.

Shapes: R rows, S ranks, K logits that a rank tells of each row, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.kernels import sampling
from candle_vllm.core.kernels.collectives import VocabularyShare
from candle_vllm.core.kernels.device_stream import DeviceStream, Mark, Sent, Work, copy
from candle_vllm.core.kernels.dispatch import on_gpu
from candle_vllm.core.kernels.sampling.contract import CHUNK, Control
from candle_vllm.core.kernels.sampling.shares import (
    FOUND,
    MOST_TOLD,
    Floats,
    Ints,
    Shares,
    Wish,
    is_plain,
    is_weighed,
    pick,
    tell,
    told_type,
)

_PIECES = 2  # steps whose results may be on their way
_UNIT = 2.0**40  # of weights that are added up as integers, in any order


class _Kind(NamedTuple):
    """What the rows of a step need: logits of each, sums, tokens drawn without a cut, and the places of these."""

    width: int
    stands: bool
    weighed: bool
    plain: bool
    ranked: bool

    @classmethod
    def of(cls, wishes: Floats) -> _Kind:
        """The least that has all that rows need."""
        asked, plain = wishes[:, Wish.LOGPROBS] >= 0, is_plain(wishes)
        width, stands = int(wishes[:, Wish.TOLD].max()), bool(asked.any())
        need = cls(width, stands, bool(is_weighed(wishes).any()), bool(plain.any()), bool((plain & asked).any()))
        return next(kind for kind in KINDS if all(has >= wanted for has, wanted in zip(kind, need)))


KINDS = (
    _Kind(1, False, False, False, False),  # greedy
    _Kind(1, False, True, True, False),  # temperature alone
    _Kind(32, True, False, False, False),  # a small top_k, log-probabilities of greedy tokens
    _Kind(MOST_TOLD, True, True, False, False),  # top_p and min_p
    _Kind(MOST_TOLD, True, True, True, True),
)
"""Of each there is a captured draw, few as they are: each takes memory."""


class DeviceShares:
    """Has draws of divided rows launched, on all ranks alike.

    Args:
        stream: where it works.
        share: which columns this rank has.
        own: [most rows, up to V] float32 on the device: where each step's logits are, in its first rows.
        controls: [most rows, 5] float64 on the device, see `Control`; written before each draw.
        graphs: capture draws.
    """

    def __init__(
        self, stream: DeviceStream, share: VocabularyShare, own: torch.Tensor, controls: torch.Tensor, *, graphs: bool
    ) -> None:
        self._stream, self._share, self._own, self._controls = stream, share, own, controls
        self._graphs: dict[tuple[int, _Kind], Work] | None = {} if graphs else None
        rows, size = len(own), share.collective.size
        sizes = rows * size * told_type(MOST_TOLD).itemsize, rows * FOUND.itemsize, rows * size * 8
        self._results = [torch.zeros(each, dtype=torch.uint8, device=stream.device) for each in sizes]
        lands = share.collective.rank == 0
        self._landings = [[stream.staged(each) for each in sizes] for _ in range(_PIECES)] if lands else []
        self._turn = 0

    def launch(self, wishes: Floats, padded: int | None) -> LandingShares | None:
        """Draws for rows 0 to len(wishes); their logits and controls are there when what was given to the stream runs.

        Args:
            wishes: see `Wish`; the same on all ranks.
            padded: rows of a captured draw, at least R, where the step was captured.

        Returns:
            What is on its way to the first rank's host; None on the others.
        """
        apart = np.flatnonzero(wishes[:, Wish.TOLD] == 0)
        rows = len(wishes) if padded is None or self._graphs is None else padded
        kind = _Kind.of(wishes) if len(apart) < len(wishes) else None
        if kind is not None:
            captured = padded is not None and self._graphs is not None
            work = self._captured(rows, kind) if captured else functools.partial(self._draw, rows, kind)
            self._stream.run(work)
        gathered: list[torch.Tensor] = []
        if len(apart):
            self._stream.run(self.putting_together(apart, gathered))
        if not self._landings:
            return None
        self._turn = (self._turn + 1) % _PIECES
        landing = self._landings[self._turn]
        if kind is not None:
            self._stream.run(functools.partial(self._land, rows, kind, landing))
        return LandingShares(self._share, wishes, self._stream.mark(), rows, kind, landing, gathered)

    def putting_together(self, rows: Ints, to: list[torch.Tensor]) -> Work:
        """Work that puts rows of the step's logits together, into the list; all ranks do."""
        wanted = Sent(self._stream, rows)
        return lambda: to.append(self._share.whole(self._own[wanted.there()]))

    def warm_up(self, rows: int) -> None:
        """Runs what draws of `rows` need, so that it is compiled."""
        for kind in KINDS:
            self._stream.run(functools.partial(self._draw, rows, kind))

    def capture(self, rows: int) -> None:
        """Captures draws of `rows`, where that is wanted."""
        if self._graphs is not None:
            for kind in KINDS:
                self._captured(rows, kind)

    def close(self) -> None:
        """Lets go of graphs."""
        self._graphs = None

    def _captured(self, rows: int, kind: _Kind) -> Work:
        assert self._graphs is not None
        if (rows, kind) not in self._graphs:
            self._stream.run(lambda: self._draw(rows, kind))  # compiles; a draw leaves the logits as they are
            self._graphs[rows, kind] = self._stream.capture(lambda: self._draw(rows, kind))
        return self._graphs[rows, kind]

    def _land(self, rows: int, kind: _Kind, landing: list[torch.Tensor]) -> None:
        size = self._share.collective.size
        counts = (
            rows * size * told_type(kind.width).itemsize,
            rows * FOUND.itemsize * kind.plain,
            rows * size * 8 * kind.ranked,
        )
        for target, source, count in zip(landing, self._results, counts):
            copy(target[:count], source[:count])

    # ---- on the device -----------------------------------------------------------------------------------------------

    def _draw(self, rows: int, kind: _Kind) -> None:
        own, controls, first = self._own[:rows], self._controls[:rows], self._share.first
        temperatures = controls[:, Control.TEMPERATURE]
        ids, largest = sampling.draw_tensors(own, controls, random=False)
        none = torch.zeros(rows, dtype=torch.float64, device=own.device)
        masses, offsets = weigh_tensors(own, largest, temperatures) if kind.weighed else none, none
        named, logits = ids.unsqueeze(1), largest.unsqueeze(1)
        if kind.stands:
            tops = torch.full_like(ids, kind.width)
            found = sampling.stand_tensors(own, ids, tops, kind.width)
            named, logits = found.top_ids, found.top_logits
            offsets = torch.where(largest.isfinite(), found.offsets, -torch.inf)  # a part without any mass
            logits[:, 0] = largest  # NaN, where a row is broken
        named = torch.where(named >= 0, named + first, -1).to(torch.int32)
        parts = self._exchanged(torch.cat([_bytes(each) for each in (masses, offsets, named, logits)], 1))
        self._keep(0, parts)
        if kind.plain:
            self._find(own, controls, largest, parts, kind)

    def _find(
        self, own: torch.Tensor, controls: torch.Tensor, largest: torch.Tensor, parts: torch.Tensor, kind: _Kind
    ) -> None:
        """As `Shares._found` and `Shares._rank`, for all rows."""
        ranks, first = self._share.collective, self._share.first
        hot = torch.where(controls[:, Control.TEMPERATURE] > 0, controls[:, Control.TEMPERATURE], 1.0)
        masses = _numbers(parts[:, :, :8], torch.float64)
        begin = told_type(kind.width).fields["values"][1]  # type: ignore[index]
        firsts = _numbers(parts[:, :, begin : begin + 4], torch.float32).double()
        scales = ((firsts - firsts.amax(1, keepdim=True)) / hot.unsqueeze(1)).exp()
        scaled = masses * scales
        behind = scaled.cumsum(1)
        target = controls[:, Control.UNIFORM] * behind[:, -1]
        last = ranks.size - 1 - (masses.flip(1) > 0).int().argmax(1)
        owner = torch.minimum((behind <= target.unsqueeze(1)).sum(1), last).unsqueeze(1)
        before = (behind - scaled).gather(1, owner).squeeze(1)
        wanted = (target - before).clamp(min=0) / scales.gather(1, owner).squeeze(1)
        mine = (owner.squeeze(1) == ranks.rank) & wanted.isfinite()
        places = pick_tensors(own, largest, hot, torch.where(mine, wanted, -1.0))
        logits = own.gather(1, places.clamp(min=0).unsqueeze(1))
        named = torch.where(mine, places + first, -1).to(torch.int32)
        said = self._exchanged(torch.cat([_bytes(named.unsqueeze(1)), _bytes(logits)], 1))
        found = said.gather(1, owner.unsqueeze(2).expand(-1, 1, FOUND.itemsize)).squeeze(1)  # [R, 8]
        self._keep(1, found)
        if kind.ranked:
            token, logit = _numbers(found[:, :4], torch.int32).unsqueeze(1), _numbers(found[:, 4:], torch.float32)
            before = torch.arange(own.shape[1], device=own.device) < token - first
            standing = (own > logit.unsqueeze(1)) | ((own == logit.unsqueeze(1)) & before)
            self._keep(2, self._exchanged(_bytes(standing.sum(1))))

    def _exchanged(self, said: torch.Tensor) -> torch.Tensor:
        """[R, S, N] what all ranks say, of [R, N] bytes."""
        whole = self._share.collective.gather(said, said.shape[1])
        return whole.reshape(len(said), self._share.collective.size, said.shape[1])

    def _keep(self, place: int, result: torch.Tensor) -> None:
        copy(self._results[place][: result.numel()], result.flatten())


class LandingShares:
    """Draws on their way to the first rank's host.

    Attributes:
        apart: the rows that are put together in any case.
        gathered: in it they are, once the stream has come that far.
    """

    def __init__(
        self,
        share: VocabularyShare,
        wishes: Floats,
        mark: Mark,
        rows: int,
        kind: _Kind | None,
        landing: list[torch.Tensor],
        gathered: list[torch.Tensor],
    ) -> None:
        self._share, self._wishes, self._mark, self._rows, self._kind = share, wishes, mark, rows, kind
        self._landing, self.gathered = landing, gathered
        self.apart = np.flatnonzero(wishes[:, Wish.TOLD] == 0).tolist()

    def landed(self) -> Shares:
        """What was drawn; waits for it."""
        self._mark.wait()
        told = found = ranks = np.empty(0, np.uint8)
        if self._kind is not None:
            size, rows = self._share.collective.size, self._rows
            dtype = told_type(self._kind.width)
            told, found, ranks = (each.numpy() for each in self._landing)
            told = told[: rows * size * dtype.itemsize].view(dtype).reshape(rows, size)
            found = found[: rows * FOUND.itemsize].view(FOUND)
            ranks = ranks[: rows * size * 8].view(np.int64).reshape(rows, size)
        return _Landed((told, found, ranks), self.gathered, self._share, self._wishes)


class _Landed(Shares):
    """`Shares` of what the ranks have told each other on their devices."""

    def __init__(
        self, landed: tuple[NDArray[Any], ...], gathered: list[torch.Tensor], share: VocabularyShare, wishes: Floats
    ) -> None:
        self._landed, self._apart = landed, gathered
        super().__init__(torch.empty(0), share, wishes)

    def whole(self, rows: Ints) -> torch.Tensor:
        """Those that were put together with the draw."""
        (gathered,) = self._apart
        assert len(gathered) == len(rows)
        return gathered

    def _told(self, near: Ints) -> NDArray[Any]:
        return self._landed[0][near]

    def _found(self, rows: Ints, parts: NDArray[Any]) -> tuple[Ints, NDArray[np.float32]]:
        del parts  # what follows from them was worked out there
        found = self._landed[1][rows]
        return found["id"].astype(np.int64), found["logit"].copy()

    def _rank(self, rows: Ints, ids: Ints, logits: NDArray[np.float32]) -> Ints:
        del ids, logits
        return 1 + self._landed[2][rows].sum(1)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """[R, N] of numbers [R, ...]."""
    return x.contiguous().view(torch.uint8).view(len(x), -1)


def _numbers(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers [...] of bytes [..., N], one of each."""
    return x.contiguous().view(dtype).squeeze(-1)


def weigh_tensors(own: torch.Tensor, largest: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """Masses as of `shares.tell`, without waiting for the device; `largest` are the rows' largest logits."""
    if on_gpu(own):
        return weigh_in_units(own, largest, temperatures)
    asked = np.zeros((len(own), 3))
    asked[:, 1] = temperatures.numpy()
    return torch.from_numpy(tell(own, asked, 1)[2])


def pick_tensors(
    own: torch.Tensor, largest: torch.Tensor, temperatures: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """As `shares.pick`, without waiting for the device."""
    if on_gpu(own):
        return pick_in_units(own, largest, temperatures, targets)
    return torch.from_numpy(pick(own, temperatures.numpy(), targets.numpy()))


def _units(own: torch.Tensor, largest: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """[R, C, CHUNK] weights as integers, the largest 2^40; behind the last 0."""
    hot = torch.where(temperatures > 0, temperatures, 1.0).float()
    wide = torch.nn.functional.pad(own, (0, -own.shape[1] % CHUNK), value=-torch.inf)
    weights = ((wide - largest.unsqueeze(1)) / hot.unsqueeze(1)).exp()
    return (weights * _UNIT).to(torch.int64).view(len(own), -1, CHUNK)


def weigh_in_units(own: torch.Tensor, largest: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """See `weigh_tensors`; the sums are exact, so that no order of theirs matters."""
    masses = _units(own, largest, temperatures).sum((1, 2)).double() / _UNIT
    return torch.where((temperatures > 0) & largest.isfinite(), masses, 0.0)


def pick_in_units(
    own: torch.Tensor, largest: torch.Tensor, temperatures: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """See `pick_tensors`; `weigh_in_units` says which targets there are."""
    units = _units(own, largest, temperatures)
    sums = units.sum(2)
    behind = sums.cumsum(1)
    target = torch.minimum((targets.clamp(min=0) * _UNIT).to(torch.int64), behind[:, -1] - 1).unsqueeze(1)
    chunk = (behind <= target).sum(1).clamp(max=sums.shape[1] - 1).unsqueeze(1)
    inside = units.gather(1, chunk.unsqueeze(2).expand(-1, 1, CHUNK)).squeeze(1).cumsum(1)
    inside += (behind - sums).gather(1, chunk)
    places = chunk.squeeze(1) * CHUNK + (inside <= target).sum(1)
    return torch.where(targets < 0, -1, places.clamp(max=own.shape[1] - 1))
