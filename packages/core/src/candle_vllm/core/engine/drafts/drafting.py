# SPDX-License-Identifier: MIT
"""Find draft tokens without a draft model, and choose those that a step tries (after a step's commit).

A step reads the weights once for all of its rows, so checking a few draft tokens costs little more than a plain step,
and each accepted token saves a step. Draft tokens are tokens that a grammar forces, and the text that followed the same
suffix earlier: in the prompt, the answer, a past answer or a predicted output. They are run as rows after the
sequence's last token, and accepted up to the first that differs from the sampled token, so answers do not change.

The probability of acceptance is estimated from earlier drafts, by the length of the match and by sequence. Drafts are
compared with the answer whether they were tried or not. A step tries the number of draft tokens that saves the most
time, by the measured times of steps with that number; if no number saves time, it is a plain step.

With several sequences, a balance is measured for each class of batch sizes (`StepTimes.balance`): the time that drafts
saved, minus the time that drafts and the search for them took, in plain steps. If it is negative, there is no search,
and each plain step adds `StepTimes.SHARE` to the balance: useless drafts cost about one per cent of the time, which
includes what a search costs the steps around it. A single sequence has no balance, because it gains most, and a few
slow steps at its start would end its drafts.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from candle_vllm.core.config import LONGEST_MATCH, PAST, SpeculativeConfig
from candle_vllm.core.engine.drafts.draft_model import FADING, FIXED, OWN_WEIGHT, SURE, DraftModel
from candle_vllm.core.engine.drafts.repeats import SEPARATOR, Past, Text
from candle_vllm.core.engine.step.live import LiveSequence, Prediction

if TYPE_CHECKING:
    from candle_vllm.core.engine.step.batch import Batch
    from candle_vllm.core.sampling.grammar import GrammarState

_OPENING = 12  # the beginning of a predicted output is treated as a match of this length
_COUNTS = (1, 2, 4, 8, 16)  # numbers of draft tokens for which it is checked whether they can save time
_LEAST_REST, _TIMED = 64, 8  # minimum steps of a rest, and the number of steps at its end that are timed
_PATIENCE = 16  # steps for which no draft was worth trying, after which measured step times are relaxed
_SLOW = 0.003  # maximum seconds per step for a sequence's grammar calls; above it the sequence gets no drafts
_LOOKED = 1024  # prompt and prediction tokens that one step indexes, so that a long text does not delay it
_SHORT, _MARK_WEIGHT = 2, 1.5  # longest match that is judged by its last token (`mark`), too; tries of its prior
_TIMED_ROWS = 32  # length of `EngineStats.step_seconds`
_FORM = 1  # length of a match by `_Record.behind`, which only sequences with a grammar have

# Bucket of each match length, and assumed (accepted, tries) of its next token at the start.
_BUCKETS = (0, 8, 1, 2, 3, 4, 4, 5, 5, 5, *[6] * 6, *[7] * (LONGEST_MATCH - 15))
# Short matches begin too low to be tried. Untried drafts are judged as well, so better acceptance is soon known.
_PRIOR = ((7.6, 8.0), (0.8, 8.0), (1.2, 8.0), (2.0, 8.0), (3.2, 8.0), (4.4, 8.0), (5.6, 8.0), (6.8, 8.0),
          (4.0, 8.0))  # fmt: skip


@dataclass(eq=False, repr=False, slots=True)
class _Match:
    """A possible continuation of a sequence: where its end occurred before, or tokens that a grammar forces.

    Attributes:
        tokens, place: the text that contains it, and the index of its next token there.
        length: number of matching tokens before it; `_OPENING` at the start of a prediction, 0 for forced tokens.
        mark: with a grammar, the last token of a short match until its first draft token is judged; else None.
        end, then: the index at which another match takes over, and that match; None without one.
    """

    tokens: list[int]
    place: int
    length: int
    mark: int | None = None
    end: int | None = None
    then: _Match | None = None

    @property
    def rest(self) -> _Match | None:
        """The match to continue with: itself; `then`, which may be None, if this match is used up."""
        over = self.place == self.end or (not self.length and self.place >= len(self.tokens))
        return self.then if over else self

    def upcoming(self, count: int) -> list[int]:
        """Return the next `count` tokens; a match at the end of the sequence itself is continued periodically."""
        drafts = self.tokens[self.place : self.place + count]
        if drafts and len(drafts) < count and self.length and self.tokens[-1] != SEPARATOR:
            period = len(drafts)
            drafts += [drafts[i % period] for i in range(count - period)]
        if SEPARATOR in drafts:
            del drafts[drafts.index(SEPARATOR) :]
        return drafts


class _Record:
    """Drafting state of one sequence."""

    __slots__ = ("behind", "by_mark", "hits", "known", "match", "prediction", "seconds", "spent", "text", "tries")

    def __init__(self, live: LiveSequence, prompt: Text, prediction: Text | None) -> None:
        self.text = Text(live.sequence.tokens, prompt)
        self.known = len(live.sequence.tokens)  # length of the sequence when `match` was judged
        self.match: _Match | None = None
        self.behind: dict[int, int] = {}  # with a grammar: index after each token's last position in the answer
        self.by_mark: dict[int, tuple[float, float]] = {}  # short matches by their `mark`: (accepted, tries)
        self.prediction = prediction
        if prediction is not None:
            self.known, self.match = live.sequence.num_prompt_tokens, _Match(prediction.tokens, 0, _OPENING)
        self.hits = self.tries = 0.0
        self.spent = self.seconds = 0.0  # seconds of grammar calls: in this step, and smoothed over steps

    def note(self) -> None:
        """Add the step's grammar seconds to the smoothed value, so that one slow step has little influence."""
        self.seconds += 0.5 * (self.spent - self.seconds)
        self.spent = 0.0


def _asks(live: LiveSequence) -> bool:
    """Return whether a sequence may have drafts; with a grammar, only without logprobs and other edits of its logits.

    A draft that exceeds a limit of the grammar fails in a copy, and does not change the sequence's own state."""
    state = live.state
    grammar = state.grammar
    if live.is_over or not state.params.num_speculative_tokens:
        return False
    return grammar is None or (grammar.looks_ahead and state.only_masks and state.params.logprobs is None)


class StepTimes:
    """Measured times of steps with a class of batch sizes, and whether drafts have saved time in them.

    Times of plain steps are in seconds, by the number of sequences. Times of steps with drafts are in units of a
    plain step with as many sequences. They follow the lower median of the last few measured times, so that one slow
    step has no influence; the first two steps with a number of drafts have little influence. If no draft is tried for
    a while, slow times approach their assumed values, so that drafts are tried again.

    Args:
        lives: a number of sequences of the class, for the assumed times.
        most: maximum number of draft tokens of a step.

    Attributes:
        balance: plain steps that drafts have saved, minus the plain steps that drafts and their search have cost.
        leaving: extra time of the plain step after a step with drafts: its arrays must be built again, and states
            replay their accepted inputs.
    """

    GAIN = 1.05  # speedup that a step with drafts must promise
    LEAVING = 0.15  # `leaving` before any was measured
    SHARE = 0.0072  # share of a plain step that the search may take
    BOUNDS = -8.0, 4.0  # bounds of the balance, so that it can follow a change of the text
    UNPLAIN = 64  # steps with drafts after which two plain steps are timed again
    LONGEST = 8.0  # maximum time that is recorded for one step, in plain steps
    FEW = 1.05  # maximum factor by which the first two steps with a number of drafts change its time

    def __init__(self, lives: int, most: int) -> None:
        self.balance, self.leaving = 1.0, self.LEAVING
        self._known = [1 + drafts / (FIXED + lives) for drafts in range(most + 1)]
        self._curve = self._known[:]
        self._plain: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=9))
        self._drafted: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=5))  # by drafts; 0: plain, after them
        self._drafted[0] = deque([1 + self.LEAVING] * 2, maxlen=9)  # rare steps: a few slow ones must not decide

    def plain(self, lives: int) -> float:
        """Return the seconds of a plain step with this number of sequences; 0 before three were measured."""
        seen = self._plain.get(lives, ())
        return _lower_median(seen) if len(seen) > 2 else 0.0

    def __call__(self, drafts: int) -> float:
        """Return the time of a step with this number of draft tokens, in plain steps."""
        return self._curve[min(drafts, len(self._curve) - 1)]

    def seconds(self, lives: int, rows: int) -> float:
        """Return the seconds of a step with these sequences and rows; each has one row, the others are draft tokens."""
        share = self(rows - lives) if rows >= lives else (FIXED + rows) / (FIXED + lives)
        return self.plain(lives) * share

    def note_plain(self, lives: int, seconds: float) -> None:
        """Record a plain step that followed a plain step of the same sequences."""
        self._plain[lives].append(seconds)

    def note(self, lives: int, drafts: int, seconds: float, saved: float) -> None:
        """Record a step with drafts, or with 0 drafts the plain step after it, and how many plain steps it saved."""
        if not (plain := self.plain(lives)):
            return
        seen = self._drafted[drafts]
        seen.append(min(seconds / plain, self.LONGEST))
        usual = _lower_median(seen)
        self.pay(1 + saved - min(seen[-1], 2 * usual))
        if not drafts:
            self.leaving = max(0.0, usual - 1)
            return
        step = 1.4 if len(seen) > 2 else self.FEW
        change = min(max(usual / self(drafts), 1 / step), step) - 1
        for near in range(1, min(len(self._curve), drafts + 8)):
            time, known = self._curve[near] * (1 + change / (1 + 0.5 * abs(near - drafts))), self._known[near]
            self._curve[near] = min(max(time, 0.25 * known), self.LONGEST * known)

    def pay(self, steps: float) -> None:
        """Add to the balance."""
        least, most = self.BOUNDS
        self.balance = min(max(self.balance + steps, least), most)

    def relax(self) -> None:
        """Let slow times approach the assumed ones, because no draft was tried for a while."""
        self._curve = [
            time if time < known else time + 0.05 * (known - time)
            for time, known in zip(self._curve, self._known, strict=True)
        ]


def _lower_median(seen: Sequence[float] | deque[float]) -> float:
    return sorted(seen)[(len(seen) - 1) // 2]


class Drafter:
    """Proposes draft tokens for an engine's sequences, and writes the tokens to try to `Sequence.drafts`.

    Args:
        config: speculative decoding settings.
        rows: maximum number of draft tokens of a step.
        model: proposes draft tokens if they are more likely to be accepted than the found ones; None without a model.
    """

    def __init__(self, config: SpeculativeConfig, rows: int, model: DraftModel | None = None) -> None:
        self._counts = Counter(drafts=0, draft_tokens=0, accepted_draft_tokens=0)
        self._accepted_per_position = [0] * config.num_speculative_tokens
        self.model = model
        self._config, self._rows = config, rows
        keeps = PAST in config.sources and config.suffix_decoding_max_cached_requests > 0
        self._past = Past(answers=config.suffix_decoding_max_cached_requests) if keeps else None
        self._records: dict[LiveSequence, _Record] = {}
        self._predictions = WeakKeyDictionary[Prediction, Text]()
        self._prompts = WeakValueDictionary[str, Text]()  # by request id
        self._left = 0  # prompt and prediction tokens that this step may still index
        self._idle = 0
        self._seen: dict[int, StepTimes] = {}  # by the bit length of the number of sequences
        self._before = 0, False  # the last step: its sequences (0 if it had a prompt), and whether it had drafts
        self._rest = self._rested = self._resting = 0  # current rest: steps left, all steps, number of sequences
        self._unplain = 0  # steps since two plain steps in a row
        self._right: list[int] = []  # number of accepted draft tokens of each sequence in the last step
        self._hits = [hits for hits, _ in _PRIOR]
        self._tries = [tries for _, tries in _PRIOR]

    def times(self, lives: int) -> StepTimes:
        """Return the measured step times for a number of sequences."""
        digits = lives.bit_length()
        if digits not in self._seen:
            self._seen[digits] = StepTimes(lives, self._rows)
        return self._seen[digits]

    def stepped(self, lives: int, drafts: int, seconds: float) -> None:
        """Record a step that is over; call `propose` afterwards.

        Args:
            lives: its number of sequences; 0 for a step with prompts, which is not comparable.
            drafts: draft tokens that it tried.
        """
        right, self._right = self._right, []
        (before, touched), self._before = self._before, (lives, drafts > 0)
        if drafts or touched:
            if lives:
                common = min(right) if len(right) == lives else 0
                # A token that only some sequences gain saves one row of a later step, not the step.
                saved = common + (sum(right) - common * lives) / (FIXED + lives)
                self.times(lives).note(lives, drafts, seconds, saved)
            self._unplain += 1
        elif lives and lives == before:
            self.times(lives).note_plain(lives, seconds)
            self._unplain = 0

    def rests(self, lives: int) -> bool:
        """Return whether drafting rests: the next step is a plain one, and there is no search.

        The engine checks this first, as it is cheap. In the last steps of a rest it is False, because they are timed.
        """
        if not self._rest:
            return False
        self._rest -= 1
        if lives == self._resting and self._rest >= _TIMED:
            return True
        if not self._rest or lives != self._resting:
            times = self.times(self._resting)
            times.pay(times.SHARE * (self._rested - self._rest))
            self._rest = 0
        return False

    def _begin_rest(self, lives: Sequence[LiveSequence], times: StepTimes) -> None:
        if self._before[1]:
            times.pay(-times.leaving)
        self._before, self._resting = (0, False), len(lives)
        self._rest = self._rested = max(_LEAST_REST, math.ceil(-times.balance / times.SHARE))
        for live in lives:
            if live.state.grammar is not None:
                live.state.grammar.waits = False
                live.state.grammar.begin()

    def tried(self, drafts: int, right: int) -> None:
        """Count one sequence's draft tokens in a step, and how many of them were accepted."""
        self._right.append(right)
        counts = self._counts
        counts["drafts"] += 1
        counts["draft_tokens"] += drafts
        counts["accepted_draft_tokens"] += right
        for place in range(right):
            self._accepted_per_position[place] += 1

    def stats(self) -> dict[str, Any]:
        """Return the statistics of drafts, by field of `EngineStats`."""
        seconds = list(map(self.times(1), range(_TIMED_ROWS)))
        return {**self._counts, "accepted_per_position": self._accepted_per_position, "step_seconds": seconds}

    def close(self) -> None:
        """End the draft model's threads."""
        if self.model is not None:
            self.model.close()

    def reset(self) -> None:
        """Forget what the draft model's cache contains; see `DraftModel.reset`."""
        if self.model is not None:
            self.model.reset()

    def forget(self, live: LiveSequence) -> None:
        """Drop the state of an ended sequence, and store its answer for later matches."""
        if self.model is not None:
            self.model.forget(live)
        record = self._records.pop(live, None)
        salted = live.sequence.request.params.cache_salt is not None  # a salted answer is never shared
        if record is not None and self._past is not None and not salted:
            self._past.add(live.sequence.tokens[live.sequence.num_prompt_tokens :])

    @property
    def reads_states(self) -> bool:
        """Whether `propose` needs the batch of the step that is over."""
        return self.model is not None and self.model.reads_states

    def propose(self, lives: Sequence[LiveSequence], batch: Batch | None = None, ran: Sequence[object] = ()) -> bool:
        """Choose the drafts of the next step; return whether there are any.

        Args:
            lives: the sequences of the next step, which each have a token to run.
            batch: the step that is over, if a head reads its hidden states.
            ran: the sequence of each run of that step; None for a sequence that has ended.
        """
        began, count, found = time.perf_counter(), len(lives), False
        times = self.times(count)
        if self._before[1]:
            for live in lives:
                live.sequence.drafts = ()
        if count > 1 and times.balance < 0:  # one sequence has no balance: see the module
            if not self._rest:
                self._begin_rest(lives, times)
            return False
        if self.model is not None and batch is not None:
            self.model.ran(batch, [live if isinstance(live, LiveSequence) and _asks(live) else None for live in ran])
        plain = times.plain(count)
        if plain and self._unplain < times.UNPLAIN:
            found = self._propose(lives, times)
        if self.model is not None:
            self.model.release()
        if plain and self._before[0]:  # a step with a prompt is not charged: indexing the prompt happens once
            times.pay(times.SHARE - min((time.perf_counter() - began) / plain, times.LONGEST))
        for live in lives:
            grammar = live.state.grammar
            if grammar is not None:
                grammar.waits = True  # forced tokens are now looked up before the mask is computed
                if not live.sequence.drafts:  # with drafts, the masks of all their positions are computed together
                    grammar.begin()
        return found

    def _propose(self, lives: Sequence[LiveSequence], times: StepTimes) -> bool:
        rows, left = len(lives), times.leaving
        # The minimum mean acceptance probability of draft tokens with which a step saves time.
        least = min(rows * (times.GAIN * (times(count) + left) - 1) / count for count in _COUNTS if count <= self._rows)
        if self.model is not None:
            self.model.hopeless = least > SURE
        if least > SURE:
            self._count_idle(times)
            return False  # continuations are judged when drafts may save time again
        self._left = _LOOKED
        offers: list[tuple[LiveSequence, tuple[list[int], list[float]] | None]] = []
        for live in lives:
            live.sequence.drafts = ()
            if not _asks(live):
                continue
            record = self._records.get(live)
            if record is None:
                record = _Record(live, self._prompt(live), self._predicted(live.prediction))
                self._records[live] = record
            if record.seconds > _SLOW:
                continue
            match = self._current(live, record)
            offers.append((live, None if match is None else self._offer(live, record, match, least)))
            record.note()
        if self.model is None:
            candidates = [(live, *offer) for live, offer in offers if offer is not None]
        else:
            candidates = self.model.improve(offers, rows, lambda count: times.seconds(rows, count), self._rows)
        chosen = bool(candidates) and self._choose(candidates, rows, times)
        if chosen:
            self._idle = 0
        elif candidates:
            self._count_idle(times)
        return chosen

    def _count_idle(self, times: StepTimes) -> None:
        """Count a step for which no draft was worth trying."""
        self._idle += 1
        if self._idle % _PATIENCE == 0:
            times.relax()

    def _predicted(self, prediction: Prediction | None) -> Text | None:
        """Return the `Text` of a predicted output, which all sequences of the request share."""
        if prediction is None:
            return None
        text = self._predictions.get(prediction)
        if text is None:
            text = self._predictions[prediction] = Text([*prediction.tokens, SEPARATOR])
        return text

    def _prompt(self, live: LiveSequence) -> Text:
        """Return the `Text` of a prompt, which all sequences of the request share."""
        sequence, request_id = live.sequence, live.request.request_id
        text = self._prompts.get(request_id)
        if text is None:
            text = self._prompts[request_id] = Text(sequence.tokens, size=sequence.num_prompt_tokens)
        return text

    def _current(self, live: LiveSequence, record: _Record) -> _Match | None:
        """Judge the last match by the new tokens, then return the current match."""
        tokens, match, grammar = live.sequence.tokens, record.match, live.state.grammar
        for place in range(record.known, len(tokens)):
            if grammar is not None and place > live.sequence.num_prompt_tokens:
                record.behind[tokens[place - 1]] = place
            if match is None:
                continue
            if match.place >= len(match.tokens) or match.tokens[match.place] == SEPARATOR:
                match = None
                continue
            right = match.tokens[match.place] == tokens[place]
            self._judge(record, match, right)
            if not right:
                match = None
                continue
            match.place += 1
            if match.length > _FORM:
                match.length = min(match.length + 1, LONGEST_MATCH)
            elif not match.length and match.place == len(match.tokens):
                record.behind[SEPARATOR] = place + 1
            match = match.rest
        record.known = len(tokens)
        self._left -= record.text.follow(self._left)
        if record.prediction is not None:
            self._left -= record.prediction.follow(self._left)
        if grammar is not None and (match is None or match.length):
            began = time.thread_time()
            if forced := grammar.forced():
                match = match or self._found(live, record)
                if match is None or not self._is_better(record, match, grammar):
                    match = _Match(forced, 0, 0)
            record.spent += time.thread_time() - began
        record.match = match or self._found(live, record) or self._behind(record, tokens[-1])
        return record.match

    def _is_better(self, record: _Record, match: _Match, grammar: GrammarState) -> bool:
        """Return whether a match is more likely than the tokenizer's tokens of the forced text.

        A model that has once written the same text in different tokens mostly does so again."""
        is_likelier = self._probability(record, match.length, match.mark) > self._probability(record, 0)
        return is_likelier and bool(grammar.legal(match.upcoming(1)))

    def _behind(self, record: _Record, token: int) -> _Match | None:
        """Return the match after the token's last occurrence in the answer; for `SEPARATOR`, after forced tokens."""
        place = record.behind.get(token)
        if place is None or place >= len(record.text.tokens):
            return None
        return _Match(record.text.tokens, place, _FORM, token)

    def _found(self, live: LiveSequence, record: _Record) -> _Match | None:
        text, prediction = record.text, record.prediction
        least, most = self._config.prompt_lookup_min, self._config.prompt_lookup_max
        place, length = text.find(text.tokens, least, most)
        tokens = text.tokens
        if self._past is not None and length < most and live.sequence.request.params.cache_salt is None:
            other, there, longer = self._past.find(text.tokens, least, most)
            if longer > length:
                tokens, place, length = other, there, longer
        if prediction is not None:
            there, longer = prediction.find(text.tokens, least, most)
            if longer and longer >= length:
                tokens, place, length = prediction.tokens, there, longer
        mark = None if live.state.grammar is None or length > _SHORT else text.tokens[-1]
        return _Match(tokens, place, length, mark) if length else None

    def _judge(self, record: _Record, match: _Match, right: bool) -> None:
        bucket = _BUCKETS[match.length]
        if match.mark is not None:
            hits, tries = record.by_mark.get(match.mark, (0.0, 0.0))
            record.by_mark[match.mark], match.mark = (hits + right, tries + 1), None
        if self._tries[bucket] >= FADING:
            self._tries[bucket] *= 0.5
            self._hits[bucket] *= 0.5
        self._tries[bucket] += 1
        record.tries = record.tries * 0.95 + 1
        record.hits *= 0.95
        if right:
            self._hits[bucket] += 1
            record.hits += 1

    def _offer(
        self, live: LiveSequence, record: _Record, match: _Match, least: float
    ) -> tuple[list[int], list[float]] | None:
        """Return draft tokens with the probabilities that each and all before it are accepted; None without tokens."""
        config, sequence = self._config, live.sequence
        asked = min(config.num_speculative_tokens, live.state.params.num_speculative_tokens)
        most = min(asked, self._rows, sequence.max_length - len(sequence.tokens) - 1)
        if config.suffix_decoding_max_spec_factor is not None and match.length:
            most = min(most, int(match.length * config.suffix_decoding_max_spec_factor))
        least = max(least, config.suffix_decoding_min_token_prob)
        grammar = live.state.grammar
        if grammar is None:
            chances = self._chances(record, match, 1.0, least, most)
            drafts = match.upcoming(len(chances))
            return (drafts, chances[: len(drafts)]) if drafts else None
        began = time.thread_time()
        found = self._in_form(grammar, record, match, least, most)
        record.spent += time.thread_time() - began
        return found if found[0] else None

    def _in_form(
        self, grammar: GrammarState, record: _Record, match: _Match, least: float, most: int
    ) -> tuple[list[int], list[float]]:
        """Return draft tokens that the grammar accepts, with their probabilities; a match that ends is continued."""
        drafts, chances = list[int](), list[float]()
        scout = None
        while True:
            more = self._chances(record, match, chances[-1] if chances else 1.0, least, most - len(drafts))
            least = self._config.suffix_decoding_min_token_prob
            tokens = match.upcoming(len(more))
            if match.length:
                tokens = tokens[: (scout or grammar).legal(tokens)]
                ended = len(tokens) < len(more)
            else:
                ended = match.place + len(tokens) == len(match.tokens)
            drafts += tokens
            chances += more[: len(tokens)]
            match.end = match.then = None
            if not ended or not tokens or len(drafts) >= most:
                return drafts, chances
            scout = scout or grammar.ahead()
            if scout is None or not all(map(scout.accept, tokens)):
                return drafts, chances
            match.end = match.place + len(tokens)
            forced = scout.ff_tokens() if match.length else []
            then = _Match(forced, 0, 0) if forced else self._behind(record, drafts[-1] if match.length else SEPARATOR)
            if then is None:
                return drafts, chances
            match.then = match = then

    def _probability(self, record: _Record, length: int, mark: int | None = None) -> float:
        """Return the probability that the next token of a match is accepted."""
        probability = self._hits[_BUCKETS[length]] / self._tries[_BUCKETS[length]]
        if length:
            probability = (record.hits + OWN_WEIGHT * probability) / (record.tries + OWN_WEIGHT)
        if mark is not None:
            hits, tries = record.by_mark.get(mark, (0.0, 0.0))
            probability = (hits + _MARK_WEIGHT * probability) / (tries + _MARK_WEIGHT)
        return min(probability, SURE)

    def _chances(self, record: _Record, match: _Match, chance: float, least: float, most: int) -> list[float]:
        """Return the probability that each next token and all before it are accepted; the first is at least `least`."""
        chances, length, mark = list[float](), match.length, match.mark
        for _ in range(most):
            chance *= self._probability(record, length, mark)
            mark = None
            if chance < least:
                break
            least = self._config.suffix_decoding_min_token_prob
            chances.append(chance)
            if length > _FORM:
                length = min(length + 1, LONGEST_MATCH)
        return chances

    def _choose(
        self, candidates: list[tuple[LiveSequence, list[int], list[float]]], rows: int, times: StepTimes
    ) -> bool:
        """Assign the drafts that save the most time to the next step; return False if no draft saves time."""
        offers = [(chance, place) for place, (_, _, chances) in enumerate(candidates) for chance in chances]
        if len(candidates) > 1:
            offers.sort(reverse=True)
        best, rate = 0, times.GAIN
        more, total = [0.0] * len(candidates), 0.0
        for count, (chance, place) in enumerate(offers[: self._rows], 1):
            more[place] += chance
            total += chance
            common = min(more) if len(more) == rows else 0.0
            tokens = 1 + common + (total - common * rows) / (FIXED + rows)  # see `stepped`
            if tokens > rate * (times(count) + times.leaving):
                best, rate = count, tokens / (times(count) + times.leaving)
        counts = [0] * len(candidates)
        for _, place in offers[:best]:
            counts[place] += 1
        for (live, drafts, _), count in zip(candidates, counts, strict=True):
            live.sequence.drafts = tuple(drafts[:count])
        return best > 0
