# SPDX-License-Identifier: MIT
"""Draws from rows of logits of which each rank has a part, without putting the rows together.

For each row the ranks tell each other their largest logits and sums, and each knows from that what is drawn:

  - greedy, top_k, min_p and top_p draw from the largest logits. A rank tells so many of its own, and the least of these
    bounds what it did not tell. Where that bound leaves open what is kept, the row is *lacking*, and must be put
    together (`Shares.whole`); what is drawn never depends on a guess.
  - top_p needs the mass of the whole row besides, which is the sum of the ranks' masses.
  - temperature alone draws from all tokens, in the order of their ids: from the ranks' masses follows in whose part the
    row's random number falls, and that rank tells which token it is.
  - a token's log-probability needs its logit and the logarithm of the row's mass at temperature 1.

The rules are those of `draw` and `stand` in the package, with the weights of the merged logits in float64. Which way a
row goes, and what comes of it, follows from the row alone: neither other rows nor the number of logits that are told
for them change a bit of it.

Shapes: R rows, S ranks, K logits that a rank tells of each row, V vocabulary.
"""

from __future__ import annotations

import enum
import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels import sampling
from candle_vllm.core.kernels.collectives import VocabularyShare
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, c_function
from candle_vllm.core.kernels.sampling.contract import Control, Standing, workspace_bytes

if TYPE_CHECKING:
    import torch

MOST_TOLD = 128
"""Logits that a rank tells of a row at most."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Wish(enum.IntEnum):
    """The columns behind those of `Control` that say what is asked of a row; together [R, 7] float64."""

    LOGPROBS = 5  # how many of the likeliest tokens are to be named, -1 where no log-probabilities are wanted
    TOLD = 6  # how many logits each rank tells, see `told`; 0 for a row that is put together


def told(control: tuple[float, ...], logprobs: int | None) -> int:
    """How many logits each rank tells of a row that is drawn so; 0 where they are not enough in any case."""
    temperature, min_p, top_k, top_p = control[:4]
    named = max(logprobs or 0, 1)
    if temperature == 0 or not (min_p > 0 or top_k > 0 or top_p < 1):
        return named
    if top_k > 0:
        most = max(int(top_k) + 1, named)  # one more shows where the cut is
        return most if most <= MOST_TOLD else 0
    return MOST_TOLD


def is_plain(wishes: Floats) -> NDArray[np.bool_]:
    """[R] which rows are drawn from by temperature alone."""
    uncut = (wishes[:, Control.MIN_P] == 0) & (wishes[:, Control.TOP_K] == 0) & (wishes[:, Control.TOP_P] >= 1)
    return uncut & (wishes[:, Control.TEMPERATURE] > 0) & (wishes[:, Wish.TOLD] > 0)


def is_weighed(wishes: Floats) -> NDArray[np.bool_]:
    """[R] of which rows the mass is asked for."""
    limited = (wishes[:, Control.TOP_K] > 0) | (wishes[:, Control.MIN_P] > 0)
    return (wishes[:, Control.TEMPERATURE] > 0) & ~limited & (wishes[:, Wish.TOLD] > 0)


class Shares:
    """Rows of which this rank has some columns. All ranks make them of the same rows, and call the same in turn.

    Attributes:
        wishes: [R, 7] see `Wish`.
        ids: [R] what was drawn; -1 for a row that is put together, or lacks something.
        largest: [R] float32 the largest logits, NaN for a row that holds one.
        lacking: rows that must be put together, though it was not known beforehand.

    Args:
        own: [R, up to V] float32, contiguous, on the CPU.
        share: which columns these are.
        wishes: see above; the same on all ranks.
    """

    def __init__(self, own: torch.Tensor, share: VocabularyShare, wishes: Floats) -> None:
        self._own, self._share, self.wishes = own, share, wishes
        rows = len(wishes)
        self.ids, self.largest = np.full(rows, -1), np.zeros(rows, np.float32)
        self._offsets, self._ranks = np.zeros(rows), np.zeros(rows, np.int64)
        self._logits = np.zeros(rows, np.float32)  # of what was drawn
        self._top_ids = np.full((rows, max(int(wishes[:, Wish.LOGPROBS].max(initial=0)), 0)), -1)
        self._top_logits = np.full(self._top_ids.shape, -np.inf, np.float32)
        self._lacks = np.zeros(rows, bool)
        near = np.flatnonzero(wishes[:, Wish.TOLD] > 0)
        self._gathered: torch.Tensor | None = None
        if len(near):
            with np.errstate(all="ignore"):  # rows of a broken model
                self._draw(near)
        if len(near) < rows:
            self._gathered = self.whole(self.apart)

    @property
    def apart(self) -> Ints:
        """Rows that are put together in any case."""
        return np.flatnonzero(self.wishes[:, Wish.TOLD] == 0)

    @property
    def gathered(self) -> torch.Tensor:
        """[len(apart), V] these rows."""
        assert self._gathered is not None
        return self._gathered

    @property
    def lacking(self) -> Ints:
        """See the class."""
        return np.flatnonzero(self._lacks)

    def whole(self, rows: Ints) -> torch.Tensor:
        """Puts rows together, [len(rows), V]; all ranks do."""
        return self._share.whole(self._own[rows])

    def standing(self, rows: Ints) -> tuple[Standing, NDArray[np.float32], NDArray[np.float32]]:
        """Where the drawn tokens of rows stand that ask for log-probabilities, their logits, and those of `top_ids`."""
        found = Standing(self._offsets[rows], self._ranks[rows], self._top_ids[rows])
        return found, self._logits[rows], self._top_logits[rows]

    def _draw(self, near: Ints) -> None:
        wishes = self.wishes[near]
        temperature, asked, plain = wishes[:, Control.TEMPERATURE], wishes[:, Wish.LOGPROBS], is_plain(wishes)
        cut = (temperature > 0) & ~plain
        parts = self._told(near)
        firsts, each = parts["values"][:, :, 0], np.arange(len(near))  # [R, S], [R]
        best = firsts.argmax(1)  # the first of equals, or one that is NaN
        largest = firsts[each, best]
        sound = np.isfinite(largest)
        merged = _Merged(parts, wishes, self._share) if cut.any() or (asked > 0).any() else None
        ids, logits = parts["ids"][each, best, 0].astype(np.int64), largest.copy()
        ranks, lacks = np.ones(len(near), np.int64), np.zeros(len(near), bool)
        some = np.flatnonzero(cut & sound)
        if merged is not None and len(some):
            masses, _ = _masses(parts[some], temperature[some])
            place, lacks[some] = merged.draw(some, wishes[some], masses.cumsum(1)[:, -1])
            ids[some], logits[some] = merged.ids[some, place], merged.values[some, place]
            ranks[some] = 1 + place
        some = np.flatnonzero(plain)
        if len(some):
            ids[some], logits[some] = self._found(near[some], parts[some])
            behind = some[asked[some] >= 0]
            if len(behind):
                ranks[behind] = self._rank(near[behind], ids[behind], logits[behind])
        self._lacks[near] = lacks
        self.largest[near], self._logits[near], self._ranks[near] = largest, logits, ranks
        self.ids[near] = np.where(sound & ~lacks, ids, -1)
        if (asked >= 0).any():
            self._offsets[near] = _log_sum(parts["offset"])
            if merged is not None and self._top_ids.shape[1]:
                most = min(self._top_ids.shape[1], merged.ids.shape[1])
                kept = (np.arange(most) < asked[:, None]) & (merged.values[:, :most] > -np.inf)
                self._top_ids[near, :most] = np.where(kept, merged.ids[:, :most], -1)
                self._top_logits[near, :most] = merged.values[:, :most]

    # ---- what ranks tell each other ----------------------------------------------------------------------------------

    def _told(self, near: Ints) -> NDArray[Any]:
        """[R, S] of each of these rows what each rank tells: its largest logits with their ids, and its sums."""
        wishes, width = self.wishes, int(self.wishes[:, Wish.TOLD].max())
        asked = np.empty((len(wishes), 3))
        asked[:, 0] = wishes[:, Wish.TOLD]
        asked[:, 1] = is_weighed(wishes) * wishes[:, Control.TEMPERATURE]
        asked[:, 2] = (wishes[:, Wish.LOGPROBS] >= 0) & (asked[:, 0] > 0)
        said = np.empty(len(wishes), told_type(width))
        ids, said["values"], said["mass"], said["offset"] = tell(self._own, asked, width)
        said["ids"] = np.where(ids >= 0, ids + self._share.first, -1)
        return self._exchanged(said[near])

    def _found(self, rows: Ints, parts: NDArray[Any]) -> tuple[Ints, NDArray[np.float32]]:
        """Tokens of rows without a cut, and their logits, from the rank in whose part each is; `parts` were told."""
        temperature, uniform = self.wishes[rows, Control.TEMPERATURE], self.wishes[rows, Control.UNIFORM]
        masses, scales = _masses(parts, temperature)
        behind = masses.cumsum(1)
        target = uniform * behind[:, -1]
        last = masses.shape[1] - 1 - (masses[:, ::-1] > 0).argmax(1)  # rounding may lift the target to the whole mass
        owner = np.minimum((behind <= target[:, None]).sum(1), last)
        each = np.arange(len(rows))
        wanted = np.maximum(target - (behind - masses)[each, owner], 0.0) / scales[each, owner]
        mine = (owner == self._share.collective.rank) & np.isfinite(wanted)
        hot, targets = self.wishes[:, Control.TEMPERATURE], np.full(len(self.wishes), -1.0)
        targets[rows[mine]] = wanted[mine]
        ids = pick(self._own, hot, targets)[rows]
        said = np.zeros(len(rows), FOUND)
        said["id"] = np.where(mine, self._share.first + ids, -1)
        said["logit"] = np.asarray(self._own)[rows, np.maximum(ids, 0)]
        found = self._exchanged(said)[each, owner]
        return found["id"].astype(np.int64), found["logit"].copy()

    def _rank(self, rows: Ints, ids: Ints, logits: NDArray[np.float32]) -> Ints:
        """Where tokens stand in their rows, from 1 on."""
        said = np.zeros(len(rows), np.int64)
        logits_here = np.asarray(self._own)
        for place, (row, token, logit) in enumerate(zip(rows, ids.tolist(), logits)):
            own = logits_here[row]
            before = min(max(token - self._share.first, 0), len(own))
            said[place] = np.count_nonzero(own > logit) + np.count_nonzero(own[:before] == logit)
        return 1 + self._exchanged(said).sum(1)

    def _exchanged(self, said: NDArray[Any]) -> NDArray[Any]:
        """[R, S] what all ranks say, of [R]."""
        import torch

        rows, size = len(said), said.dtype.itemsize
        whole = self._share.collective.gather(torch.from_numpy(said.view(np.uint8).reshape(rows, size)), size)
        return whole.contiguous().numpy().view(said.dtype)


@functools.cache
def told_type(width: int) -> np.dtype[Any]:
    """What a rank tells of a row.

    The mass at the row's temperature where the rank's largest logit weighs 1, the logarithm of its mass at temperature
    1, and its largest logits, the lower id first among equals; ids of -1 behind the last.
    """
    return np.dtype([("mass", "f8"), ("offset", "f8"), ("ids", "i4", (width,)), ("values", "f4", (width,))])


FOUND = np.dtype([("id", "i4"), ("logit", "f4")])
"""What is told of a token that was found in a rank's part."""


def _masses(parts: NDArray[Any], temperature: Floats) -> tuple[Floats, Floats]:
    """[R, S] the ranks' masses where the largest logit of the row weighs 1, and what each rank's largest weighs."""
    firsts = parts["values"][:, :, 0].astype(np.float64)
    scales = np.exp((firsts - firsts.max(1)[:, None]) / temperature[:, None])
    return parts["mass"] * scales, scales


def _log_sum(offsets: Floats) -> Floats:
    """[R] logarithms of sums, of [R, S] those of their parts."""
    most = offsets.max(1)
    return most + np.log(np.exp(offsets - most[:, None]).cumsum(1)[:, -1])


class _Merged:
    """The logits that ranks have told, in falling order, the lower id first among equals.

    Attributes:
        ids, values: [R, S * K] int32 and float32; -1 and -inf behind the last.
    """

    def __init__(self, parts: NDArray[Any], wishes: Floats, share: VocabularyShare) -> None:
        (rows, size), width, each = parts.shape, parts.dtype["ids"].shape[0], np.arange(len(parts))
        asked, ids, values = wishes[:, Wish.TOLD].astype(np.int64), parts["ids"], parts["values"]  # [R], [R, S, K]
        if (asked < width).any():  # of each row what is asked for it, whatever others ask
            there = np.arange(width) < asked[:, None, None]
            ids, values = np.where(there, ids, -1), np.where(there, values, np.float32(-np.inf))
        ends, floors = ids[each, :, asked - 1], values[each, :, asked - 1]  # [R, S]
        columns = np.minimum(share.most, share.total - share.most * np.arange(size))
        floors[(ends < 0) | (columns <= asked[:, None])] = -np.inf  # such a rank has told all it has
        self._bound = floors.max(1)
        # Of those that equal the bound, ranks behind the first that may have more of them come too late.
        late, bound = np.arange(size) > floors.argmax(1)[:, None], self._bound[:, None, None]
        sure = np.where(late[:, :, None], values > bound, values >= bound)
        self._sure = np.where(bound > -np.inf, sure, ids >= 0).sum((1, 2))
        order = np.argsort(-values.reshape(rows, -1), axis=1, kind="stable")  # ranks' ids rise
        order += each[:, None] * (size * width)
        self.ids, self.values = ids.ravel().take(order), values.ravel().take(order)

    def draw(self, rows: Ints, wishes: Floats, masses: Floats) -> tuple[Ints, NDArray[np.bool_]]:
        """Draws from rows that are cut.

        Args:
            rows: which ones.
            wishes: theirs.
            masses: of the whole rows where there is no top_k, the largest logit weighing 1.

        Returns:
            Where each token stands, and whether that is open, as more would have to be known.
        """
        sure, bound, each = self._sure[rows], self._bound[rows], np.arange(len(rows))
        most = sure.max()  # behind it nothing is known
        values, ids = self.values[rows, :most], self.ids[rows, :most]
        temperature, min_p, top_k, top_p, uniform = wishes[:, : len(Control)].T
        limited, floored, narrow = top_k > 0, min_p > 0, top_p < 1
        wide = values.astype(np.float64)
        weights = np.exp((wide - wide[:, :1]) / temperature[:, None])
        weights[np.arange(most) >= sure[:, None]] = 0.0
        open_ = np.zeros(len(rows), bool)
        ends = bound > -np.inf  # there are logits that nobody told
        if limited.any():
            least = values[each, np.clip(top_k.astype(np.int64), 1, sure) - 1]
            open_ |= limited & ends & ((top_k > sure) | (least <= bound))
            weights[(values < least[:, None]) & limited[:, None]] = 0.0
        if floored.any():
            lightest = np.exp((bound - wide[:, 0]) / temperature)
            open_ |= floored & ends & ~limited & (lightest >= min_p)
            weights[weights < min_p[:, None]] = 0.0
        if narrow.any():
            kept, by_mass = weights.cumsum(1), ends & ~(limited | floored)
            limit = top_p * np.where(by_mass, masses, kept[:, -1])
            open_ |= narrow & by_mass & (kept[:, -1] < limit)
            dropped = (kept - weights >= limit[:, None]) & narrow[:, None]
            dropped[:, 0] = False
            weights[dropped] = 0.0
        most = max(weights.any(0).sum(), 1)  # what is kept stands at the front
        by_id = np.argsort(ids[:, :most], axis=1, kind="stable")
        cumulated = weights[each[:, None], by_id].cumsum(1)
        total = cumulated[:, -1:]
        last = (cumulated < total).sum(1)
        chosen = np.minimum((cumulated <= uniform[:, None] * total).sum(1), last)
        return by_id[each, chosen], open_


# ---- what a rank does with its own part ------------------------------------------------------------------------------

_TELL, _PICK = ("sampling.cpu:tell_rows", 11), ("sampling.cpu:pick_rows", 8)


def prepare() -> None:
    """As `sampling.prepare`, with what draws over ranks need besides."""
    sampling.prepare()
    if sampling.compiled():
        for function in (_TELL, _PICK):
            c_function(*function)


def tell(own: torch.Tensor, asked: Floats, most: int) -> tuple[Ints, NDArray[np.float32], Floats, Floats]:
    """What a rank tells of its part of rows, see `told_type`.

    Args:
        own: [R, up to V] float32, contiguous.
        asked: [R, 3] how many logits; the temperature of a mass that is asked for, or 0; whether an offset is.
        most: logits that are told of a row at most.

    Returns:
        [R, most] places and logits, -1 and -inf behind the last; [R] masses and offsets. Of a broken row the largest
        logit, without a place.
    """
    host = sampling.host_rows(own)
    if host is None:
        from candle_vllm.core.kernels.sampling import reference

        return reference.tell(own, asked, most)
    rows = len(asked)
    ids, values = np.empty((rows, most), np.int64), np.empty((rows, most), np.float32)
    masses, offsets = np.empty(rows), np.empty(rows)
    _call(_TELL, host, address_of(asked), most, ids, values, masses, offsets)
    return ids, values, masses, offsets


def pick(own: torch.Tensor, temperatures: Floats, targets: Floats) -> Ints:
    """[R] the first places at which the cumulated weights of rows exceed targets; -1 where a target is below 0."""
    host = sampling.host_rows(own)
    if host is None:
        from candle_vllm.core.kernels.sampling import reference

        return reference.pick(own, temperatures, targets)
    chosen = np.empty(len(own), np.int64)
    temperatures, targets = np.ascontiguousarray(temperatures), np.ascontiguousarray(targets)
    _call(_PICK, host, address_of(temperatures), address_of(targets), chosen)
    return chosen


def _call(function: tuple[str, int], host: NDArray[np.float32], first: int, second: int, *to: NDArray[Any]) -> None:
    rows, size = host.shape
    work = np.empty(workspace_bytes(size), np.uint8)
    written = map(address_of, (work, *to))
    c_function(*function)(address_of(host), host.strides[0], rows, size, first, second, *written)
