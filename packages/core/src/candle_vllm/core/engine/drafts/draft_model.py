# SPDX-License-Identifier: MIT
"""Draft tokens from a draft model with the target's vocabulary, run only if it saves time (after a step's commit).

The draft model's cache has the target's block numbers: both use the same block table of a sequence. Draft tokens are
compared with the tokens that the target samples, so the contents of this cache decide how many draft tokens are
accepted, and never change an answer.

The model reads a prompt in chunks when its sequence decodes, and only if the answer is likely to be so long that this
saves time. Then it reads the tokens that were appended, and generates draft tokens one after the other; each of its
steps runs all sequences that want drafts. It samples with the request's temperature, cutoffs and random number for that
position, because similar distributions mostly give the same token for the same random number.

The chance that a draft token is accepted follows from the probability that the draft model gives it, and from how many
earlier draft tokens of that probability were accepted. A further token is generated while it is likely to save more
time than the draft model's step and one more row of the target's step take, by the step times measured so far.
"""

from __future__ import annotations

import bisect
import math
import time
from array import array
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.config import SpeculativeConfig
from candle_vllm.core.engine.runners.model_runner import HeadRunner, StepwiseRunner
from candle_vllm.core.engine.step.batch import Batch, BatchBuilder
from candle_vllm.core.engine.step.live import LiveSequence
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.engine.step.sequence import Run
from candle_vllm.core.kernels import sampling as kernels
from candle_vllm.core.kernels.recorded import Value

Offer = tuple[list[int], list[float]]
"""Draft tokens, and for each the probability that it and all before it are accepted."""

# For draft tokens of every source:
FADING = 256.0  # number of tries after which earlier tries count half
OWN_WEIGHT = 6.0  # number of a sequence's tries that have as much weight as the tries of all other sequences
SURE = 0.98  # upper bound of an estimated acceptance probability
FIXED = 5.7  # assumption: reading the weights takes as long as this many rows

_EDGES = (0.3, 0.5, 0.65, 0.8, 0.9, 0.96, 0.99)  # edges of the buckets of the draft model's own probability
_LIKELY = (0.2, 0.4, 0.55, 0.7, 0.8, 0.88, 0.94, 0.97)  # assumed acceptance chance of each bucket at the start
_PRIOR = 8.0  # weight of the assumed chances, in tries
_NEAR = 16  # maximum unread tokens that the first draft step reads too; more are read in chunks before it
_CHUNK = 64  # prompt rows that are read between two target steps while other sequences wait
_IDLE = 4  # value of `Own.idle` at which a model that reads every target step pauses for the sequence
_PAUSE = 256  # tokens of the first pause of a sequence whose drafts save no time; the next is four times as long


Seconds = Callable[[int], float]
"""Function from a number of rows to the seconds of a step; 0 if nothing was measured."""


class OwnTimes:
    """Seconds of a draft model's step by its number of rows, from measured steps; 0 before the first."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float]] = {}  # (rows, seconds) by the rows' bit length

    def note(self, rows: int, seconds: float) -> None:
        """Record the duration of a step; an outlier, such as a step on a busy machine, has little influence."""
        digits = rows.bit_length()
        old, before = self._seen.get(digits, (float(rows), seconds))
        expected = before * (FIXED + rows) / (FIXED + old)
        change = min(max(seconds / expected, 0.5), 1.5) if expected else 1.0
        self._seen[digits] = old + 0.2 * (rows - old), before + 0.2 * (expected * change - before)

    def relax(self) -> None:
        """Lower all times by a tenth, because a model that seems too slow is not run, and so is not measured again."""
        self._seen = {digits: (rows, 0.9 * seconds) for digits, (rows, seconds) in self._seen.items()}

    def __call__(self, rows: int) -> float:
        """Return the seconds of a step, scaled from the nearest number of rows that was measured."""
        if not self._seen:
            return 0.0
        digits = rows.bit_length()
        seen, seconds = self._seen[min(self._seen, key=lambda other: abs(other - digits))]
        return seconds * (FIXED + rows) / (FIXED + seen)


class Own:
    """State of one sequence in the drafter.

    Attributes:
        table: the sequence's block table. A different object means that the sequence was admitted again.
        done: number of its tokens with keys and values in the draft model's cache; below 0 if no row is valid.
        full: number of its blocks that the draft model has filled.
        base, candidates, buckets, rows: the last drafts: length of the sequence before them, the tokens, the
            probability bucket of each, and the length of the sequence with the rows written for them.
        hits, expected, tries: fading counts of its draft tokens: accepted, expected to be accepted, all judged.
        idle: steps in which no draft of the model promised to save time, since a pause or a better draft.
        pause, until: length of the next pause in tokens, and the sequence length at which the current pause ends.
    """

    __slots__ = (
        "base", "buckets", "candidates", "done", "expected", "full", "hits", "idle", "pause", "rows", "table", "tries",
        "until",
    )  # fmt: skip

    def __init__(self) -> None:
        self.table: array[int] | None = None
        self.done = self.full = self.base = self.rows = self.until = self.idle = 0
        self.candidates: list[int] = []
        self.buckets: list[int] = []
        self.hits = self.expected = self.tries = 0.0
        self.pause = _PAUSE


class Asked:
    """A sequence that the model drafts for: `candidates`, their `chances` (see `Offer`), `worth` (see `_best`)."""

    __slots__ = ("candidates", "chance", "chances", "live", "most", "own", "worth")

    def __init__(self, live: LiveSequence, own: Own, most: int, worth: float) -> None:
        self.live, self.own, self.most, self.worth = live, own, most, worth
        self.candidates: list[int] = []
        self.chances: list[float] = []
        self.chance = 1.0


class DraftModel:
    """Proposes draft tokens by a draft model.

    Attributes:
        times: measured times of the draft model's steps.
        hopeless: whether no draft token saves time in target steps like the last; the drafter sets it.
        reads_states: whether `ran` must be called after every step of the target.

    Args:
        runner: runs the draft model, in a cache with as many blocks as the target's.
        config: speculative decoding settings.
        scheduler: the target's scheduler; it reserves blocks for draft tokens.
        words: vocabulary sizes of the target and of the draft model.
        longest: the draft model's context length.
        most_rows: maximum number of rows of a draft model's step.
        cost: assumed time of a step relative to a target step, until times were measured.
    """

    reads_states = False

    def __init__(
        self,
        runner: StepwiseRunner | HeadRunner,
        config: SpeculativeConfig,
        scheduler: Scheduler,
        words: tuple[int, int],
        longest: int,
        most_rows: int,
        cost: float,
    ) -> None:
        self.times, self.hopeless = OwnTimes(), False
        self._runner, self._config, self._scheduler = runner, config, scheduler
        self._target_words, self._words = words
        self._vocab_size = words[1]
        self._longest, self._most_rows, self._cost = longest, most_rows, cost
        size = scheduler.blocks.block_size
        self._size = size
        self._batches = BatchBuilder(size, runner.step_memory, images=False, adapters=False)
        self._owns: dict[LiveSequence, Own] = {}
        self._reserved: list[LiveSequence] = []
        self._full: dict[int, bytes] = {}  # by block whose rows are all valid, the hash of its tokens
        # Accepted draft tokens and tries by bucket, first of greedy requests, then of sampling requests.
        self._hits = [[_PRIOR * likely for likely in _LIKELY] for _ in range(2)]
        self._tries = [[_PRIOR] * len(_LIKELY) for _ in range(2)]
        self._common = [(6.0, 8.0), (4.8, 8.0)]  # (accepted, tries) over all buckets

    # ---- called by the drafter ---------------------------------------------------------------------------------------

    def improve(
        self, offers: Sequence[tuple[LiveSequence, Offer | None]], lives: int, target: Seconds, room: int
    ) -> list[tuple[LiveSequence, list[int], list[float]]]:
        """Run the draft model if it saves time; return each sequence's better draft, from `offers` or from the model.

        Args:
            offers: the sequences of the next step that may have drafts, with the draft found without the model.
            lives: number of sequences of that step.
            target: seconds of the target's steps.
            room: maximum number of draft tokens of one sequence in a step.
        """
        asked = self._worth_asking(offers, lives, target, room)
        made = self._generate(asked, target, lives) if asked else {}
        better: list[tuple[LiveSequence, list[int], list[float]]] = []
        for live, offer in offers:
            own = made.get(live)
            if own is not None and own.candidates and (offer is None or sum(own.chances) > sum(offer[1])):
                better.append((live, own.candidates, own.chances))
            elif offer is not None:
                better.append((live, *offer))
        return better

    def ran(self, batch: Batch, lives: Sequence[LiveSequence | None]) -> None:
        """See `DraftingHead`; a draft model without `reads_states` ignores it."""

    def release(self) -> None:
        """Free reserved blocks that the drafts chosen for the next step do not need."""
        for live in self._reserved:
            self._scheduler.give_back(live.sequence)
        self._reserved = []

    def forget(self, live: LiveSequence) -> None:
        """Drop the state of an ended sequence, and move the common counts a little towards their defaults."""
        if (own := self._owns.pop(live, None)) is None or not own.tries:
            return
        for kind, (hits, tries) in enumerate(((6.0, 8.0), (4.8, 8.0))):
            right, all_ = self._common[kind]
            self._common[kind] = right * 0.98 + hits * 0.02, all_ * 0.98 + tries * 0.02

    def reset(self) -> None:
        """Forget what the cache contains, after it was dropped or a step failed, and free the reserved blocks."""
        self._owns.clear()
        self._full.clear()
        self.release()

    def close(self) -> None:
        """End the runner's threads."""
        self._runner.close()

    # ---- costs and gains ---------------------------------------------------------------------------------------------

    def _worth_asking(
        self, offers: Sequence[tuple[LiveSequence, Offer | None]], lives: int, target: Seconds, room: int
    ) -> list[Asked]:
        """Return the sequences for which drafts of the model are likely to save more time than they take."""
        if not offers or not target(lives):
            return []
        rate, prices = lives / target(lives), self._prices(lives, lives, len(offers), target)
        asked: list[Asked] = []
        for live, offer in offers:
            sequence = live.sequence
            own = self._follow(live)
            length = len(sequence.tokens)
            wanted = min(self._config.num_speculative_tokens, live.state.params.num_speculative_tokens)
            most = min(wanted, room, sequence.max_length - length - 1, self._longest - length)
            if most < max(1, self._config.draft_min) or length < own.until:
                continue
            saved, cost, gain = _best(1.0, self._typical(own, live), prices[:most], 1.0)
            free = 0.0 if offer is None else sum(offer[1]) - rate * (target(lives + len(offer[1])) - target(lives))
            if gain <= max(free, 0.0):
                own.idle = own.idle + 1 if gain <= 0 else 0
                # Pause if the sequence's own tries show it, or if the model has read its steps without a draft.
                if gain <= 0 and (own.tries > 4 or (self.reads_states and own.idle == _IDLE)):
                    if own.tries <= 4:
                        self.times.relax()
                    own.until, own.pause = length + own.pause, 4 * own.pause
                    own.hits, own.expected, own.tries = own.hits * 0.25, own.expected * 0.25, own.tries * 0.25
                    own.idle = 0
                continue
            behind = self._behind(own, length)
            if behind > _NEAR:
                ahead = min(sequence.max_length - length, 64 + length - sequence.num_prompt_tokens)
                if ahead / (1 + saved) * gain < self._step(behind, target) * rate:
                    continue
            if self._scheduler.reserve(sequence, length) == length:
                most = self._scheduler.reserve(sequence, length + most - 1) - length + 1
                self._reserved.append(live)
                asked.append(Asked(live, own, most, (1 + saved) / (1 + cost)))
        return asked

    def _behind(self, own: Own, length: int) -> int:
        """Return how many tokens of a sequence the draft model must read before its first draft token."""
        return length - own.done

    def _prices(self, lives: int, rows: int, active: int, target: Seconds) -> list[float]:
        """Return the costs of further draft tokens (draft step, target row), in tokens of plain steps in the same time.

        Args:
            lives: number of sequences of the next step.
            rows: rows that the step has already.
            active: number of sequences that get drafts.
        """
        rate, step = lives / target(lives), self._step(active, target)
        most = self._config.num_speculative_tokens
        times = [target(rows + active * count) for count in range(most + 1)]
        return [rate * (times[count + 1] - times[count] + step) / active for count in range(most)]

    def _step(self, rows: int, target: Seconds) -> float:
        return self.times(rows) or self._cost * target(1) * (FIXED + rows) / (FIXED + 1)

    def _typical(self, own: Own, live: LiveSequence) -> float:
        """Return the chance that the next draft token of a sequence is accepted, before it is generated."""
        hits, tries = self._common[_kind(live)]
        return min((own.hits + OWN_WEIGHT * hits / tries) / (own.tries + OWN_WEIGHT), SURE)

    # ---- acceptance --------------------------------------------------------------------------------------------------

    def _follow(self, live: LiveSequence) -> Own:
        """Compare a sequence's last draft tokens with its new tokens, and update how many of its tokens are cached."""
        own = self._owns.get(live)
        if own is None:
            own = self._owns[live] = Own()
        sequence, tokens, right = live.sequence, live.sequence.tokens, 0
        for candidate, bucket in zip(own.candidates, own.buckets):
            if own.base + right >= len(tokens):
                break
            hit = tokens[own.base + right] == candidate
            self._judge(own, _kind(live), bucket, hit)
            if not hit:
                break
            right += 1
        if own.candidates:
            self._judged(own, right, len(tokens))
            own.candidates, own.buckets = [], []
        if own.table is not sequence.block_table:  # it was admitted, for the first time or again
            own.table = sequence.block_table
            self._begin(own, live)
        return own

    def _judged(self, own: Own, right: int, length: int) -> None:
        """Reduce `Own.done` to the rows of accepted draft tokens."""
        own.done = min(own.base + right, own.rows, length - 1)  # the last row's block may have been freed

    def _begin(self, own: Own, live: LiveSequence) -> None:
        """Count the blocks of a newly admitted sequence that are in the draft model's cache."""
        sequence, own.done, own.full = live.sequence, 0, 0
        if self._scheduler.blocks.enable_prefix_caching:
            hashes = sequence.hashes(self._size)[: (len(sequence.tokens) - 1) // self._size]
            for block, digest in zip(sequence.block_table, hashes):
                if self._full.get(block) != digest:
                    break
                own.full += 1
            own.done = own.full * self._size

    def _judge(self, own: Own, kind: int, bucket: int, hit: bool) -> None:
        hits, tries = self._hits[kind], self._tries[kind]
        own.expected = own.expected * 0.95 + hits[bucket] / tries[bucket]
        own.tries, own.hits = own.tries * 0.95 + 1, own.hits * 0.95 + hit
        right, all_ = self._common[kind]
        if all_ >= FADING:
            right, all_ = right / 2, all_ / 2
        self._common[kind] = right + hit, all_ + 1
        if tries[bucket] >= FADING:
            hits[bucket], tries[bucket] = hits[bucket] / 2, tries[bucket] / 2
        tries[bucket] += 1
        hits[bucket] += hit

    def _chance(self, own: Own, kind: int, bucket: int) -> float:
        """Return the chance that a generated draft token of this probability bucket is accepted."""
        common = self._hits[kind][bucket] / self._tries[kind][bucket]
        return min(common * (own.hits + OWN_WEIGHT) / (own.expected + OWN_WEIGHT), SURE)

    # ---- the model's steps -------------------------------------------------------------------------------------------

    def _generate(self, asked: list[Asked], target: Seconds, lives: int) -> dict[LiveSequence, Asked]:
        """Generate draft tokens while they save time for some sequence; return them by sequence."""
        runs, ready = self._catch_up(asked, lives)
        made = {each.live: each for each in ready}
        while runs:
            ids, sure = self._run(runs, ready)
            onward: list[Asked] = []
            for each, token, probability in zip(ready, ids, sure):
                if self._take(each, token, probability) and len(each.candidates) < each.most:
                    onward.append(each)
            ready = onward
            if ready:
                rows = lives + sum([len(each.candidates) for each in made.values()])
                prices = self._prices(lives, rows, len(ready), target)
                ready = [each for each in ready if self._pays(each, prices)]
            runs = [self._next(each) for each in ready]
        least = self._config.draft_min
        for each in made.values():
            own, length = each.own, len(each.live.sequence.tokens)
            own.candidates = list(each.candidates)
            own.rows = length + max(0, len(own.candidates) - 1)
            grammar = each.live.state.grammar
            legal = len(each.candidates) if grammar is None else grammar.legal(each.candidates)
            if legal < max(least, 1):
                legal = 0
            each.candidates, each.chances = each.candidates[:legal], each.chances[:legal]
        return made

    def _pays(self, each: Asked, prices: list[float]) -> bool:
        """Return whether further draft tokens of a sequence are likely to save more than they cost."""
        left = prices[: each.most - len(each.candidates)]
        return _best(each.chance, self._typical(each.own, each.live), left, each.worth)[2] > 0

    def _catch_up(self, asked: list[Asked], lives: int) -> tuple[list[Run], list[Asked]]:
        """Return the runs that read the last unread tokens, and their sequences; for the others, read a chunk now."""
        room = self._most_rows - len(asked)
        runs: list[Run] = []
        ready: list[Asked] = []
        partial: list[Run] = []
        for each in asked:
            own, sequence = each.own, each.live.sequence
            behind = len(sequence.tokens) - own.done
            chunk = _CHUNK if lives > 1 and behind > _NEAR else behind
            count = min(behind, chunk, room + 1)
            room -= count - 1
            for place in range(own.done // self._size, len(sequence.block_table)):
                self._full.pop(sequence.block_table[place], None)
            ends = count == behind
            run = Run(sequence, own.done, count, int(ends), sequence.num_admissions, False)
            if ends:
                own.base = len(sequence.tokens)
                ready.append(each)
                runs.append(run)
            else:
                partial.append(run)
            own.done += count
        if partial:
            self._run(partial, [])
        for each in asked:
            self._note_full(each.live, each.own)
        return runs, ready

    def _next(self, each: Asked) -> Run:
        """Return a run of the last draft token's row, whose logits give the next one."""
        sequence = each.live.sequence
        start = len(sequence.tokens) + len(each.candidates) - 1
        return Run(sequence, start, 1, 1, sequence.num_admissions, False, (each.candidates[-1],))

    def _note_full(self, live: LiveSequence, own: Own) -> None:
        """Register blocks that the model has filled, for later sequences with the same prefix."""
        sequence = live.sequence
        full = own.done // self._size
        if full > own.full and self._scheduler.blocks.enable_prefix_caching:
            hashes = sequence.hashes(self._size)
            full = min(full, len(hashes))
            for place in range(own.full, full):
                self._full[sequence.block_table[place]] = hashes[place]
            own.full = full

    def _run(self, runs: list[Run], ready: list[Asked]) -> tuple[list[int], list[float]]:
        """Run one step of the draft model; return the draft token of each `ready` sequence and its probability.

        If any logits are not finite, all tokens are -1.
        """
        began = time.perf_counter()
        batch = self._batches.build(runs)
        logits = self._logits(batch, ready)
        ids: list[int] = []
        sure: list[float] = []
        if ready:
            drawn, largest = self._runner.draw_rows(logits, np.array([self._controls(each) for each in ready]))
            ids = np.where(np.isfinite(largest), drawn, -1).tolist()
            if -1 in ids:  # logits that cannot be sampled: no draft token at all
                ids, sure = [-1] * len(ids), [0.0] * len(ids)
            else:
                tokens = np.array(ids, np.int64)
                offsets = kernels.stand(logits, tokens, np.zeros_like(tokens)).offsets.tolist()
                sure = [
                    math.exp(min(0.0, float(logits[row, token]) - offset))
                    for row, (token, offset) in enumerate(zip(ids, offsets))
                ]
                ids = self._meant(tokens)
        self.times.note(batch.tokens.shape[1], time.perf_counter() - began)
        return ids, sure

    def _logits(self, batch: Batch, ready: list[Asked]) -> Value:
        """Run the batch; return the logits of its wanted rows, one for each `ready` sequence."""
        del ready
        if self._words < self._target_words:
            np.minimum(batch.tokens[0], self._words - 1, out=batch.tokens[0])
        assert isinstance(self._runner, StepwiseRunner)
        return self._runner.run(batch)

    def _meant(self, tokens: NDArray[np.int64]) -> list[int]:
        """Map the draft model's token ids to the target's."""
        return tokens.tolist()

    def _controls(self, each: Asked) -> tuple[float, ...]:
        """Return the request's sampling controls at the next draft token's position, without penalties and bias."""
        state, ahead = each.live.state, len(each.candidates)
        temperature, min_p, top_k, top_p = state.controls
        uniform = 0.5 if state.params.greedy else state.uniforms(ahead + 1)[ahead]
        return temperature, min_p, top_k if top_k < self._vocab_size else 0, top_p, uniform

    def _take(self, each: Asked, token: int, probability: float) -> bool:
        """Append a draft token, unless it is no token or too unlikely; return whether another may follow it."""
        if not 0 <= token < self._target_words or probability < self._config.draft_p_min:
            return False
        own, bucket = each.own, bisect.bisect(_EDGES, probability)
        each.chance *= self._chance(own, _kind(each.live), bucket)
        each.candidates.append(token)
        each.chances.append(each.chance)
        own.buckets.append(bucket)
        return token not in each.live.eos_token_ids


def _kind(live: LiveSequence) -> int:
    """Return 0 for a greedy request and 1 for a sampling one, because their acceptance differs."""
    return 0 if live.state.params.greedy else 1


def _best(chance: float, typical: float, prices: list[float], worth: float) -> tuple[float, float, float]:
    """Choose the best number of further draft tokens: return the tokens they save, their cost, and the gain.

    Args:
        chance: the chance that all draft tokens before them are accepted.
        typical: the acceptance chance of each further draft token.
        prices: the cost of each further draft token, see `_prices`.
        worth: factor of the prices.
    """
    saved = cost = 0.0
    best = (0.0, 0.0, 0.0)
    for price in prices:
        chance *= typical
        saved, cost = saved + chance, cost + price
        if saved - worth * cost > best[2]:
            best = saved, cost, saved - worth * cost
    return best
