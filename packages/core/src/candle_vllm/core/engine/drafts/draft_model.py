# SPDX-License-Identifier: MIT
"""Drafts by a small model of the same vocabulary: its guesses, and when asking it pays (behind step 9).

The model's cache has the same blocks as the target's, at the same numbers: a sequence's block table is that of both. A
guess is compared with what the target draws, so what stands in this cache decides how many guesses are right, and never
what an answer is.

The model reads a prompt when its sequence decodes, in chunks, and only where the answer is likely to go on for long
enough to be worth it. Then it takes the tokens that came since, and guesses one token after the other, of all sequences
that want some in one step. It guesses as the request draws: with its temperature, its cuts and its own random number of
that position, where two distributions that are alike most often agree.

How likely a guess is right follows from how probable the model itself held it, judged by how guesses of that
probability fared. Another one is asked for while what it is likely to save is more than its own step and its row in the
target's step take, by the times of steps seen so far.
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
"""Guesses, and for each how likely it and all before it are right."""

# Of every guess, whoever makes it:
FADING = 256.0  # tries after which old ones count half
OWN_WEIGHT = 6.0  # tries of a sequence's own that count as much as all others'
SURE = 0.98  # most that is believed of any guess
FIXED = 5.7  # reading the weights takes as long as so many rows, before anything was measured

_EDGES = (0.3, 0.5, 0.65, 0.8, 0.9, 0.96, 0.99)  # of the buckets of the model's own probability
_LIKELY = (0.2, 0.4, 0.55, 0.7, 0.8, 0.88, 0.94, 0.97)  # what is believed of each before any was judged
_PRIOR = 8.0  # tries that this counts as
_NEAR = 16  # tokens that are taken with a guess's first step; more are read before
_CHUNK = 64  # rows of a prompt that are read between two steps, where others wait
_IDLE = 4  # steps in which a model that reads every step of the target does so for nothing, before it pauses
_PAUSE = 256  # tokens without guesses, once a sequence's were not worth it; four times as many each time


Seconds = Callable[[int], float]
"""How long a step of so many rows takes; 0 where nothing is known."""


class OwnTimes:
    """How long a step of the model of so many rows takes, by the steps that were seen; 0 before any was."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float]] = {}  # rows and seconds, by the digits of the rows

    def note(self, rows: int, seconds: float) -> None:
        """A step took so long; a machine that did something else meanwhile counts little."""
        digits = rows.bit_length()
        old, before = self._seen.get(digits, (float(rows), seconds))
        expected = before * (FIXED + rows) / (FIXED + old)
        change = min(max(seconds / expected, 0.5), 1.5) if expected else 1.0
        self._seen[digits] = old + 0.2 * (rows - old), before + 0.2 * (expected * change - before)

    def relax(self) -> None:
        """It was not tried for a while, for it seemed to take too long: it is believed to take less."""
        self._seen = {digits: (rows, 0.9 * seconds) for digits, (rows, seconds) in self._seen.items()}

    def __call__(self, rows: int) -> float:
        """Seconds; of a number that was not seen, by the nearest one that was."""
        if not self._seen:
            return 0.0
        digits = rows.bit_length()
        seen, seconds = self._seen[min(self._seen, key=lambda other: abs(other - digits))]
        return seconds * (FIXED + rows) / (FIXED + seen)


class Own:
    """What is known of one sequence.

    Attributes:
        table: its block table, the very object: where it has another one it began anew.
        done: tokens of its own whose keys and values are in the model's cache; below 0 where they begin anew.
        full: blocks of them that are known to be full.
        base, guesses, buckets, rows: tokens it had when it was guessed for last, what was guessed, how sure each was,
            and rows that were written then.
        hits, expected, tries: of its own guesses, fading: those that were right, that were to be right, and all.
        idle: steps in a row in which its guesses were not worth their time.
        pause, until: how long the next pause is, and at how many tokens the present one ends.
    """

    __slots__ = (
        "base", "buckets", "done", "expected", "full", "guesses", "hits", "idle", "pause", "rows", "table", "tries",
        "until",
    )  # fmt: skip

    def __init__(self) -> None:
        self.table: array[int] | None = None
        self.done = self.full = self.base = self.rows = self.until = self.idle = 0
        self.guesses: list[int] = []
        self.buckets: list[int] = []
        self.hits = self.expected = self.tries = 0.0
        self.pause = _PAUSE


class Asked:
    """A sequence that the model guesses for in this step: its guesses so far, most that it may have, and how much a
    second is worth, of what it is in plain steps."""

    __slots__ = ("chance", "chances", "guesses", "live", "most", "own", "worth")

    def __init__(self, live: LiveSequence, own: Own, most: int, worth: float) -> None:
        self.live, self.own, self.most, self.worth = live, own, most, worth
        self.guesses: list[int] = []
        self.chances: list[float] = []
        self.chance = 1.0


class DraftModel:
    """Asks a model for guesses.

    Attributes:
        times: of the model's own steps.
        seconds, steps: what it took since the start, and its steps.
        hopeless: no guess pays in steps like the last; whoever calls says so.
        reads_states: it is told of every step of the target.

    Args:
        runner: runs the model, in a cache of as many blocks as the target's.
        config: how.
        scheduler: of the sequences; gives them blocks for guesses.
        words: tokens of the target, and of the model.
        longest: tokens that the model has positions for.
        most_rows: of a step of the model.
        cost: what a step takes of a step of the target, before any was seen.
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
        self.times = OwnTimes()
        self.seconds, self.steps, self.hopeless = 0.0, 0, False
        self._runner, self._config, self._scheduler = runner, config, scheduler
        self._target_words, self._words = words
        self._drawn_words = words[1]
        self._longest, self._most_rows, self._cost = longest, most_rows, cost
        size = scheduler.blocks.block_size
        self._size = size
        self._batches = BatchBuilder(size, runner.step_memory, images=False)
        self._owns: dict[LiveSequence, Own] = {}
        self._reserved: list[LiveSequence] = []
        self._full: dict[int, bytes] = {}  # blocks of which every row is right, and what they hold
        # Of guesses by arg max and of random ones, by bucket: right ones, of tries.
        self._hits = [[_PRIOR * likely for likely in _LIKELY] for _ in range(2)]
        self._tries = [[_PRIOR] * len(_LIKELY) for _ in range(2)]
        self._common = [(6.0, 8.0), (4.8, 8.0)]  # all of a kind together

    # ---- what the drafter calls --------------------------------------------------------------------------------------

    def improve(
        self, offers: Sequence[tuple[LiveSequence, Offer | None]], lives: int, target: Seconds, room: int
    ) -> list[tuple[LiveSequence, list[int], list[float]]]:
        """The better of what was found without the model and of its own guesses, which are made here.

        Args:
            offers: the sequences of the next step that may have guesses, and what was found for them.
            lives: sequences of that step.
            target: how long its steps take.
            room: most guesses of a sequence that a step tries.
        """
        asked = self._worth_asking(offers, lives, target, room)
        made = self._guess(asked, target, lives) if asked else {}
        better: list[tuple[LiveSequence, list[int], list[float]]] = []
        for live, offer in offers:
            own = made.get(live)
            if own is not None and own.guesses and (offer is None or sum(own.chances) > sum(offer[1])):
                better.append((live, own.guesses, own.chances))
            elif offer is not None:
                better.append((live, *offer))
        return better

    def ran(self, batch: Batch, lives: Sequence[LiveSequence | None]) -> None:
        """See `DraftingHead`; where `reads_states` is not set, there is nothing to be told."""

    def settle(self) -> None:
        """What is tried in the next step is known: blocks that only other guesses needed are free again."""
        for live in self._reserved:
            self._scheduler.give_back(live.sequence)
        self._reserved = []

    def forget(self, live: LiveSequence) -> None:
        """The sequence has ended. What was learnt fades a little, so that a bad hour is not for ever."""
        if (own := self._owns.pop(live, None)) is None or not own.tries:
            return
        for kind, (hits, tries) in enumerate(((6.0, 8.0), (4.8, 8.0))):
            right, all_ = self._common[kind]
            self._common[kind] = right * 0.98 + hits * 0.02, all_ * 0.98 + tries * 0.02

    def close(self) -> None:
        """Ends what runs beside the caller's thread."""
        self._runner.close()

    # ---- what pays ---------------------------------------------------------------------------------------------------

    def _worth_asking(
        self, offers: Sequence[tuple[LiveSequence, Offer | None]], lives: int, target: Seconds, room: int
    ) -> list[Asked]:
        """The sequences that the model is likely to save more for than it takes."""
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
            typical = self._typical(own, live)
            saved, cost, gain = _best(1.0, typical, prices[:most], 1.0)
            free = 0.0 if offer is None else sum(offer[1]) - rate * (target(lives + len(offer[1])) - target(lives))
            if gain <= max(free, 0.0):
                own.idle = own.idle + 1 if gain <= 0 else 0
                # By its own tries, and not by what is believed of any; or the model has read it for nothing.
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
        """Tokens of a sequence that the model would read before it guesses, beside those of any step."""
        return length - own.done

    def _prices(self, lives: int, rows: int, active: int, target: Seconds) -> list[float]:
        """What each further guess for a sequence costs, in tokens of plain steps: the model's step, the target's row.

        Args:
            lives: sequences of the next step.
            rows: that it has already.
            active: sequences that are guessed for.
            target: see `improve`.
        """
        rate, step = lives / target(lives), self._step(active, target)
        most = self._config.num_speculative_tokens
        times = [target(rows + active * count) for count in range(most + 1)]
        return [rate * (times[count + 1] - times[count] + step) / active for count in range(most)]

    def _step(self, rows: int, target: Seconds) -> float:
        return self.times(rows) or self._cost * target(1) * (FIXED + rows) / (FIXED + 1)

    def _typical(self, own: Own, live: LiveSequence) -> float:
        """How likely the next guess for a sequence is right, before it is made."""
        hits, tries = self._common[_kind(live)]
        return min((own.hits + OWN_WEIGHT * hits / tries) / (own.tries + OWN_WEIGHT), SURE)

    # ---- how guesses fared -------------------------------------------------------------------------------------------

    def _follow(self, live: LiveSequence) -> Own:
        """Judges the last guesses for a sequence by what came, and finds how much of it is in the model's cache."""
        own = self._owns.get(live)
        if own is None:
            own = self._owns[live] = Own()
        sequence, tokens, right = live.sequence, live.sequence.tokens, 0
        for guess, bucket in zip(own.guesses, own.buckets):
            if own.base + right >= len(tokens):
                break
            hit = tokens[own.base + right] == guess
            self._judge(own, _kind(live), bucket, hit)
            if not hit:
                break
            right += 1
        if own.guesses:
            self._judged(own, right, len(tokens))
            own.guesses, own.buckets = [], []
        if own.table is not sequence.block_table:  # it began to run, for the first time or again
            own.table = sequence.block_table
            self._begin(own, live)
        return own

    def _judged(self, own: Own, right: int, length: int) -> None:
        """So many of a sequence's guesses were right: what else was written for them is none of its tokens'."""
        own.done = min(own.base + right, own.rows, length - 1)  # of the last row the block may have gone

    def _begin(self, own: Own, live: LiveSequence) -> None:
        """Finds what of a sequence that began to run is in the model's cache."""
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
        """How likely a guess is right that was made."""
        common = self._hits[kind][bucket] / self._tries[kind][bucket]
        return min(common * (own.hits + OWN_WEIGHT) / (own.expected + OWN_WEIGHT), SURE)

    # ---- the model's steps -------------------------------------------------------------------------------------------

    def _guess(self, asked: list[Asked], target: Seconds, lives: int) -> dict[LiveSequence, Asked]:
        """Has the model guess, until it pays for none any more; what it guessed by sequence."""
        runs, ready = self._catch_up(asked, lives)
        made = {each.live: each for each in ready}
        while runs:
            ids, sure = self._run(runs, ready)
            onward: list[Asked] = []
            for each, token, probability in zip(ready, ids, sure):
                if self._take(each, token, probability) and len(each.guesses) < each.most:
                    onward.append(each)
            ready = onward
            if ready:
                rows = lives + sum([len(each.guesses) for each in made.values()])
                prices = self._prices(lives, rows, len(ready), target)
                ready = [each for each in ready if self._pays(each, prices)]
            runs = [self._next(each) for each in ready]
        least = self._config.draft_min
        for each in made.values():
            own, length = each.own, len(each.live.sequence.tokens)
            own.guesses = list(each.guesses)
            own.rows = length + max(0, len(own.guesses) - 1)
            grammar = each.live.state.grammar
            legal = len(each.guesses) if grammar is None else grammar.legal(each.guesses)
            if legal < max(least, 1):
                legal = 0
            each.guesses, each.chances = each.guesses[:legal], each.chances[:legal]
        return made

    def _pays(self, each: Asked, prices: list[float]) -> bool:
        """Whether further guesses for a sequence are likely to save more than they cost."""
        left = prices[: each.most - len(each.guesses)]
        return _best(each.chance, self._typical(each.own, each.live), left, each.worth)[2] > 0

    def _catch_up(self, asked: list[Asked], lives: int) -> tuple[list[Run], list[Asked]]:
        """The first step's runs: what the model has not seen of each sequence; and whose guesses follow from it."""
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
        """The row of the last guess, which leads to the next one."""
        sequence = each.live.sequence
        start = len(sequence.tokens) + len(each.guesses) - 1
        return Run(sequence, start, 1, 1, sequence.num_admissions, False, (each.guesses[-1],))

    def _note_full(self, live: LiveSequence, own: Own) -> None:
        """Blocks that the model has filled with a sequence's own tokens serve prompts that begin alike."""
        sequence = live.sequence
        full = own.done // self._size
        if full > own.full and self._scheduler.blocks.enable_prefix_caching:
            hashes = sequence.hashes(self._size)
            full = min(full, len(hashes))
            for place in range(own.full, full):
                self._full[sequence.block_table[place]] = hashes[place]
            own.full = full

    def _run(self, runs: list[Run], ready: list[Asked]) -> tuple[list[int], list[float]]:
        """A step of the model: of each of `ready` the token that it guesses, and the probability it gives that.

        A token of -1 is none.
        """
        began = time.perf_counter()
        batch = self._batches.build(runs)
        logits = self._logits(batch, ready)
        ids: list[int] = []
        sure: list[float] = []
        if ready:
            controls = np.array([self._controls(each) for each in ready])
            drawn, largest = self._runner.draw_rows(logits, controls)
            ids = np.where(np.isfinite(largest), drawn, -1).tolist()
            if -1 in ids:  # numbers that cannot be drawn from: nothing is guessed
                ids, sure = [-1] * len(ids), [0.0] * len(ids)
            else:
                tokens = np.array(ids, np.int64)
                offsets = kernels.stand(logits, tokens, np.zeros_like(tokens)).offsets.tolist()
                sure = [
                    math.exp(min(0.0, float(logits[row, token]) - offset))
                    for row, (token, offset) in enumerate(zip(ids, offsets))
                ]
                ids = self._meant(tokens)
        seconds = time.perf_counter() - began
        self.times.note(batch.tokens.shape[1], seconds)
        self.seconds += seconds
        self.steps += 1
        return ids, sure

    def _logits(self, batch: Batch, ready: list[Asked]) -> Value:
        """What the model says of the tokens behind the rows that are wanted, those of `ready`."""
        del ready
        if self._words < self._target_words:
            np.minimum(batch.tokens[0], self._words - 1, out=batch.tokens[0])
        assert isinstance(self._runner, StepwiseRunner)
        return self._runner.run(batch)

    def _meant(self, tokens: NDArray[np.int64]) -> list[int]:
        """The target's tokens of the model's."""
        return tokens.tolist()

    def _controls(self, each: Asked) -> tuple[float, ...]:
        """How the request draws its token at that position, as far as that follows from the position alone."""
        state, ahead = each.live.state, len(each.guesses)
        temperature, min_p, top_k, top_p = state.controls
        uniform = 0.5 if state.params.greedy else state.uniforms(ahead + 1)[ahead]
        return temperature, min_p, top_k if top_k < self._drawn_words else 0, top_p, uniform

    def _take(self, each: Asked, token: int, probability: float) -> bool:
        """Adds a guess; whether there may be another behind it."""
        if not 0 <= token < self._target_words or probability < self._config.draft_p_min:
            return False
        own, bucket = each.own, bisect.bisect(_EDGES, probability)
        each.chance *= self._chance(own, _kind(each.live), bucket)
        each.guesses.append(token)
        each.chances.append(each.chance)
        own.buckets.append(bucket)
        return token not in each.live.eos_token_ids


def _kind(live: LiveSequence) -> int:
    """Guesses by arg max and random ones fare differently."""
    return 0 if live.state.params.greedy else 1


def _best(chance: float, typical: float, prices: list[float], worth: float) -> tuple[float, float, float]:
    """The best number of further guesses: tokens that they save, what they cost, and by how much that pays.

    Args:
        chance: how likely all before them are right.
        typical: how likely each of them is.
        prices: of each, in tokens.
        worth: of a token's time, in tokens.
    """
    saved = cost = 0.0
    best = (0.0, 0.0, 0.0)
    for price in prices:
        chance *= typical
        saved, cost = saved + chance, cost + price
        if saved - worth * cost > best[2]:
            best = saved, cost, saved - worth * cost
    return best
