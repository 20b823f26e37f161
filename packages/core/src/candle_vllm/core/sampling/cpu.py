"""Drawing tokens on the CPU without sorting the vocabulary: the rules of `dense.py`, a pass or two over memory
(step 7 of ten).

Each function is a pure numeric primitive that a compiled kernel can replace. Two things hold for all of them:

  - A row's result is bitwise the same whatever the other rows are. Sums are therefore taken over fixed blocks of a
    row or cumulated one after the other, where a zero more or less changes nothing; never by a reduction whose order
    depends on the shape of the batch or the number of threads.
  - Rows have a finite largest logit; the caller has sorted out the others.

Shapes: R rows, V vocabulary, B block, C candidates of the row that has most.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.sampling.controls import Controls

SUM_BLOCK = 512  # logits whose weights are summed in float32; block sums are cumulated in float64
CHUNK = 1 << 19  # logits whose weights are held at a time: 2 MB, so that the passes over them stay in cache
STRIDES = 64  # logits per block in the search for the largest k
FEW = 4096  # up to this many candidates a row's weights are sorted together with those of other rows

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]


def argmax(logits: torch.Tensor) -> Indices:
    """[R] int64: place of the largest of [R, V] float32, the lowest where several are equal; of a NaN if there is one.

    NumPy's is vectorised; torch's takes ten times as long on the CPU.
    """
    return logits.numpy().argmax(axis=1)


def draw_plain(logits: torch.Tensor, largest: torch.Tensor, controls: Controls) -> Indices:
    """Draws from the whole vocabulary, or what min_p leaves of it.

    Args:
        logits: [R, V] float32; not changed.
        largest: [R] float32, of each row.
        controls: `top_k` and `top_p` unused in every row.

    Returns:
        [R] int64.
    """
    ids = np.empty(len(logits), np.int64)
    for part, weights in _weight_chunks(logits, largest, controls.temperature):
        floor = controls.min_p[part]
        if floor.any():
            weights.masked_fill_(weights < torch.from_numpy(floor.astype(np.float32)).unsqueeze(1), 0.0)
        ids[part] = _pick_blocked(weights.numpy(), _block_sums(weights), controls.uniform[part])
    return ids


def draw_top_p(logits: torch.Tensor, largest: torch.Tensor, controls: Controls) -> Indices:
    """Draws with top_p and without top_k.

    All tokens lighter than (1 - top_p) * mass / V weigh less than 1 - top_p of the mass together, so the tokens
    that top_p keeps are among the others: usually few, found by one comparison.

    Args and result: as `draw_plain`, with `top_p` below 1.
    """
    ids = np.empty(len(logits), np.int64)
    for part, weights in _weight_chunks(logits, largest, controls.temperature):
        mine = controls.rows(part)
        mass = _block_sums(weights).sum(axis=1, dtype=np.float64)
        # Half the bound makes up for the rounding of the mass. With min_p, the mass is what min_p leaves.
        floor = np.where(mine.min_p > 0, mine.min_p, 0.5 * (1 - mine.top_p) * mass / logits.shape[1])
        mass[mine.min_p > 0] = 0
        flat = weights.numpy()
        kept = np.flatnonzero(flat >= np.maximum(floor, np.finfo(np.float32).tiny).astype(np.float32)[:, None])
        ids[part] = _pick_from(kept, flat.reshape(-1)[kept].astype(np.float64), flat.shape, mine, mass)
    return ids


def draw_top_k(logits: torch.Tensor, largest: torch.Tensor, controls: Controls) -> Indices:
    """Draws with top_k, and top_p where it is below 1.

    Args and result: as `draw_plain`, with `top_k` above 0.
    """
    rows, vocabulary = logits.shape
    ids = np.empty(rows, np.int64)
    step = max(1, (1 << 22) // vocabulary)  # bounds the memory where ties make every token a candidate
    for start in range(0, rows, step):
        part = slice(start, start + step)
        mine, chunk = controls.rows(part), logits[part]
        flat = np.ascontiguousarray(chunk.numpy()).reshape(-1)
        places = largest_places(chunk, mine.top_k)
        owners = places // vocabulary
        scores = (flat[places].astype(np.float64) - largest[part].numpy()[owners]) / mine.temperature[owners]
        weights = np.exp(scores)
        weights[weights < mine.min_p[owners]] = 0.0
        ids[part] = _pick_from(places, weights, chunk.shape, mine, np.zeros(len(chunk)))
    return ids


def largest_places(logits: torch.Tensor, top_k: Indices) -> Indices:
    """Where the `top_k` largest values of each row stand, ties at the last of them included and -inf left out.

    Args:
        logits: [R, V] float32 without NaN.
        top_k: [R] int64, 1 to V.

    Returns:
        [N] int64 places in the flattened [R * V], rising.
    """
    rows, vocabulary = logits.shape
    flat = logits.numpy().reshape(-1)
    lowest = np.finfo(np.float32).min
    blocks = vocabulary // STRIDES
    if 2 * int(top_k.max()) > blocks:
        ranked = logits.topk(int(top_k.max()), dim=1, sorted=True).values.numpy()
        bound = np.maximum(ranked[np.arange(rows), top_k - 1], lowest)
        return np.flatnonzero(logits.numpy() >= bound[:, None])
    # The k-th largest of the blocks' maxima is a lower bound of the k-th largest value.
    maxima = _strided_maxima(logits, blocks)  # [R, blocks]
    ranked = maxima.topk(int(top_k.max()), dim=1, sorted=True).values.numpy()
    bound = np.maximum(ranked[np.arange(rows), top_k - 1], lowest)
    hot_rows, hot_blocks = np.nonzero(maxima.numpy() >= bound[:, None])
    ids = hot_blocks[:, None] + blocks * np.arange(-(-vocabulary // blocks))  # [hot blocks, members]
    places = hot_rows[:, None] * vocabulary + np.minimum(ids, vocabulary - 1)
    places = places[(ids < vocabulary) & (flat[places] >= bound[hot_rows][:, None])]
    places.sort()
    owners = places // vocabulary
    values, _ = _padded(places, flat[places], rows, vocabulary, -np.inf)
    # A row with fewer candidates than its k keeps them all: the padding is below every one.
    exact = -np.sort(-values, axis=1)[np.arange(rows), np.minimum(top_k, values.shape[1]) - 1]
    return places[flat[places] >= np.maximum(exact, lowest)[owners]]


def log_masses(logits: torch.Tensor, largest: torch.Tensor) -> Doubles:
    """[R] float64: logarithm of the sum over [R, V] logits of exp(logit - largest), `largest` being the row's."""
    masses = np.empty(len(logits))
    for part, weights in _weight_chunks(logits, largest, np.ones(len(logits))):
        masses[part] = _block_sums(weights).sum(axis=1, dtype=np.float64)
    return np.log(masses)


def _strided_maxima(logits: torch.Tensor, blocks: int) -> torch.Tensor:
    """[R, blocks]: block j holds the ids j, j + blocks, j + 2 * blocks ...; strides let the maximum vectorise."""
    full = logits.shape[1] // blocks
    maxima = logits[:, : full * blocks].unflatten(1, (full, blocks)).amax(1)
    rest = logits[:, full * blocks :]
    if rest.shape[1]:
        torch.maximum(maxima[:, : rest.shape[1]], rest, out=maxima[:, : rest.shape[1]])
    return maxima


def _weight_chunks(
    logits: torch.Tensor, largest: torch.Tensor, temperature: Doubles
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Weights [rows, V padded with zeros to whole blocks] float32 of some rows at a time, in one reused buffer."""
    rows, vocabulary = logits.shape
    width = -(-vocabulary // SUM_BLOCK) * SUM_BLOCK
    step = min(rows, max(1, CHUNK // width))
    buffer = torch.empty(step, width)
    scale = torch.from_numpy((1 / temperature).astype(np.float32)).unsqueeze(1)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        weights = buffer[: part.stop - start]
        torch.sub(logits[part], largest[part].unsqueeze(1), out=weights[:, :vocabulary])
        weights[:, vocabulary:] = -torch.inf
        if (temperature[part] != 1).any():
            weights.mul_(scale[part])
        yield part, weights.exp_()


def _block_sums(weights: torch.Tensor) -> Floats:
    """[R, V / B] float32 sums of SUM_BLOCK neighbours."""
    return weights.unflatten(1, (-1, SUM_BLOCK)).sum(2).numpy()


def _pick_blocked(weights: Floats, sums: Floats, uniform: Doubles) -> Indices:
    """[R] int64: the token at which the cumulated weight exceeds `uniform` of the mass: first its block, then it."""
    row = np.arange(len(weights))
    cumulated = sums.cumsum(axis=1, dtype=np.float64)
    target = uniform * cumulated[:, -1]
    block = _first_above(cumulated, target)
    inside = weights.reshape(len(weights), -1, SUM_BLOCK)[row, block].cumsum(axis=1, dtype=np.float64)
    # Block sums are rounded: carry over the share of the block, not the difference of the masses.
    share = (target - (cumulated[row, block] - sums[row, block])) / sums[row, block]
    return block * SUM_BLOCK + _first_above(inside, share * inside[:, -1])


def _first_above(cumulated: Doubles, target: Doubles) -> Indices:
    """[R]: first place of [R, C] above `target`, at most the last at which `cumulated` grows: never one of weight 0."""
    last = np.count_nonzero(cumulated < cumulated[:, -1:], axis=1)
    first = np.count_nonzero(cumulated <= np.maximum(target, 0.0)[:, None], axis=1)
    return np.minimum(first, last)


def _pick_from(places: Indices, weights: Doubles, shape: tuple[int, ...], controls: Controls, mass: Doubles) -> Indices:
    """Applies top_p to candidates and draws among them.

    Args:
        places: [N] rising places of candidates in the flattened [R * V]; at least one per row.
        weights: [N] float64, of the candidates.
        shape: (R, V).
        controls: of the R rows.
        mass: [R] float64, what `top_p` is a share of, or 0 for the sum of the row's candidates.

    Returns:
        [R] int64 token ids.
    """
    rows, vocabulary = shape
    counts = np.bincount(places // vocabulary, minlength=rows)
    ends = counts.cumsum()
    ids = np.empty(rows, np.int64)
    few = np.flatnonzero(counts <= FEW)
    if len(few):
        mine = np.isin(places // vocabulary, few) if len(few) < rows else slice(None)
        table, starts = _padded(places[mine], weights[mine], rows, vocabulary, 0.0)
        ids[few] = _pick_few(table[few], controls.rows(few), mass[few])
        ids[few] = places[mine][starts[few] + ids[few]] % vocabulary
    for row in np.flatnonzero(counts > FEW):
        own = slice(ends[row] - counts[row], ends[row])
        kept = _nucleus(weights[own], controls.top_p[row], mass[row])
        cumulated = kept.cumsum()[None]
        first = _first_above(cumulated, controls.uniform[row : row + 1] * cumulated[:, -1])
        ids[row] = places[own][first[0]] % vocabulary
    return ids


def _pick_few(weights: Doubles, controls: Controls, mass: Doubles) -> Indices:
    """[R] int64 columns of [R, C] weights (0 where there is no candidate) after top_p."""
    if (controls.top_p < 1).any():
        falling = -np.sort(-weights, axis=1)
        before = falling.cumsum(axis=1)
        limit = controls.top_p * np.where(mass > 0, mass, before[:, -1])
        kept = 1 + np.count_nonzero(before[:, :-1] < limit[:, None], axis=1)
        kept[controls.top_p >= 1] = weights.shape[1]
        weights = _keep_heaviest(weights, falling[np.arange(len(weights)), kept - 1], kept)
    cumulated = weights.cumsum(axis=1)
    return _first_above(cumulated, controls.uniform * cumulated[:, -1])


def _keep_heaviest(weights: Doubles, smallest: Doubles, count: Indices) -> Doubles:
    """[R, C] weights with all but the `count` heaviest set to 0, given the lightest kept; lower ids first."""
    heavier, equal = weights > smallest[:, None], weights == smallest[:, None]
    room = count - np.count_nonzero(heavier, axis=1)
    return np.where(heavier | (equal & (equal.cumsum(axis=1) <= room[:, None])), weights, 0.0)


def _nucleus(weights: Doubles, top_p: float, mass: float) -> Doubles:
    """[C] weights of one row with all that top_p drops set to 0, in linear time.

    A histogram over the leading bits of the weights (for positive floats, the order of the bits is the order of the
    numbers) finds the narrow range in which the cut lies; only that range is sorted.
    """
    if top_p >= 1:
        return weights
    bins = weights.astype(np.float32).view(np.uint32) >> 16  # sign 0, exponent, 7 bits of mantissa
    bins -= bins.min()
    masses = np.bincount(bins, weights)
    above = masses[::-1].cumsum()[::-1]  # of this bin and all heavier ones
    limit = top_p * (mass if mass > 0 else above[0])
    edge = max(int(np.count_nonzero(above >= limit)) - 1, 0)  # the bin in which the kept mass reaches the limit
    heavier, inside = bins > edge, np.flatnonzero(bins == edge)
    start = above[edge + 1] if edge + 1 < len(above) else 0.0
    falling = -np.sort(-weights[inside])
    before = start + np.concatenate(([0.0], falling.cumsum()[:-1]))
    count = max(int(np.count_nonzero(before < limit)), 0 if heavier.any() else 1)
    kept = np.where(heavier, weights, 0.0)
    if count:
        smallest = falling[count - 1 : count]
        kept[inside] = _keep_heaviest(weights[inside][None], smallest, np.array([count]))[0]
    return kept


def _padded(places: Indices, values: NDArray, rows: int, vocabulary: int, fill: float) -> tuple[NDArray, Indices]:
    """Values as a table [R, C] filled up with `fill`, and [R] where each row starts in `values`."""
    owners = places // vocabulary
    counts = np.bincount(owners, minlength=rows)
    starts = counts.cumsum() - counts
    table = np.full((rows, int(counts.max(initial=0))), fill, values.dtype)
    table[owners, np.arange(len(values)) - starts[owners]] = values
    return table, starts
