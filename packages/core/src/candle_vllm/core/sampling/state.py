# SPDX-License-Identifier: MIT
"""SamplingState: what the sampler remembers of one sequence, from admission to its last token (step 7 of ten).

It is made once, when the sequence is admitted, and outlives preemption: the engine may drop the sequence's cache and
compute it again, the tokens and counts here stay. Everything a step needs is prepared here, so that a step does no
work that could be done once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.kernels.sampling.chain import Link
from candle_vllm.core.sampling.dry import Breakers, DryState
from candle_vllm.core.sampling.grammar import GrammarState
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.random import fresh_seed, seed_words, uniforms
from candle_vllm.core.sampling.thoughts import ThoughtCount

_UNIFORMS = 64  # random numbers of a sequence that are made at a time


class SamplingState:
    """One sequence's parameters, its output tokens, and what follows from both.

    Attributes:
        params: how the tokens are chosen.
        vocab_size: V, the width of the logits.
        index: which of the request's `n` sequences this is.
        seed: the request's, or 64 fresh bits.
        controls: temperature (0 for greedy), min_p, top_k (0 where it would keep every token), top_p; where the chain
            has cut the row, nothing is left of the cuts.
        chain: [12] the numbers of llama.cpp's chain, see `kernels/sampling/chain.py`; None where it is not asked for.
        dry: the text as DRY sees it, or None.
        allowed: [N] distinct token ids, or None.
        bias_ids, bias_values: `logit_bias` as parallel arrays.
        counts: occurrences for the penalties, or None where there is no penalty. Where they look at the last tokens
            alone they are those of this step, valid until the next `append`.
        windowed: the penalties look at the last tokens alone.
        failure: what a processor of the request's own did wrong, or None.
        grammar: which tokens the form of the text leaves, or None where any text will do.
        thoughts: how much was thought, where that has a limit; it has the end of thoughts forced.
        tokens: prompt and output so far. Who plans the steps may read the same list; `append` and `rollback` change it.
        reads_tokens: the tokens before the next one must be known on the host before it is drawn.
        notes_tokens: `append` does more than to append.
        may_edit: its logits may be changed before a draw: there are masks, bias or penalties, now or at some position.
        only_masks: its grammar is all that changes its logits.
        num_ahead: tokens drawn behind them that are not known yet; more than 0 only where steps overlap.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        index: int = 0,
        bad_word_token_ids: Sequence[Sequence[int]] = (),
        grammar: GrammarState | None = None,
        thoughts: ThoughtCount | None = None,
        breakers: Breakers | None = None,
    ) -> None:
        """Checks what depends on the vocabulary.

        Args:
            params: how the tokens are chosen.
            prompt_token_ids: the prompt; its tokens count for `repetition_penalty`.
            vocab_size: V, the width of the logits.
            eos_token_ids: the model's end-of-sequence tokens. Those outside the vocabulary cannot be produced and
                need no mask.
            index: which of the request's `n` sequences this is.
            bad_word_token_ids: `params.bad_words` as tokens, each at least one.
            grammar: of `params.structured_outputs`, at the start of a text.
            thoughts: of `params.thoughts`, at the start of a text.
            breakers: of DRY; needed where the request asks for it.

        Raises:
            InvalidParameterError: a token id lies outside the vocabulary.
        """
        self.params = params
        self.vocab_size = vocab_size
        self.index = index
        self.seed = fresh_seed() if params.seed is None else params.seed
        self._uniforms: tuple[int, list[float]] = (0, [])  # the random numbers from some position on
        self.tokens = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.tokens)
        self.num_ahead = 0
        self.grammar = grammar
        self.thoughts = thoughts
        self.allowed = self._allowed_ids()
        self.bias_ids, self.bias_values = self._bias()
        stop_ids = _checked("stop_token_ids", params.stop_token_ids or (), vocab_size)
        eos_ids = [token for token in eos_token_ids if 0 <= token < vocab_size]
        self._stop_ids = _distinct(np.concatenate((stop_ids, np.array(eos_ids, np.int64))))
        self.bad_words = BadWords(bad_word_token_ids, vocab_size)
        prompt_ids = _checked("prompt_token_ids", prompt_token_ids, vocab_size)
        self._counts = _penalty_counts(params, prompt_ids)
        top_k = params.top_k if 0 < params.top_k < vocab_size else 0
        self.controls = (0.0 if params.greedy else params.temperature, params.min_p, top_k, params.top_p)
        self.chain = None
        self._recent: RecentCounts | None = None
        self._mus = [2 * params.mirostat_tau]  # of the tokens so far and the next one
        self._chances: tuple[int, list[float]] = (0, [])  # XTC's random numbers from some position on
        if params.chained:
            self.chain, self.controls = _chain(self.controls, params)
        self.dry = None if breakers is None else DryState(params, breakers, self.tokens)
        self.failure: str | None = None
        self._always_masks = self.allowed is not None or bool(bad_word_token_ids) or grammar is not None
        self.windowed = self._counts is not None and params.repeat_last_n >= 0
        held = grammar is not None or thoughts is not None
        reads = self.dry is not None or bool(params.logits_processors) or self.windowed or params.mirostat > 0
        self.reads_tokens = self.bad_words.has_sequences or held or reads
        edits = self._counts is not None or len(self.bias_ids) > 0 or self.chain is not None or reads
        self.may_edit = self._always_masks or edits or params.min_tokens > 0 or thoughts is not None
        others = edits or self.allowed is not None or bool(bad_word_token_ids) or params.min_tokens > 0
        self.only_masks = grammar is not None and thoughts is None and not others
        self.notes_tokens = self._counts is not None or held or self.dry is not None

    def sibling(self, index: int) -> SamplingState:
        """A fresh state of another sequence of the same request; what follows from the parameters alone is shared."""
        assert len(self.tokens) == self.num_prompt_tokens
        other = copy.copy(self)
        other.index = index
        other.tokens = list(self.tokens)
        other.num_ahead = 0
        other._counts = copy.deepcopy(self._counts)
        other.dry = None if self.dry is None else self.dry.sibling(other.tokens)
        other._mus = list(self._mus)
        other._chances = (0, [])
        other.grammar = None if self.grammar is None else self.grammar.sibling()
        other.thoughts = None if self.thoughts is None else self.thoughts.sibling()
        other._uniforms = (0, [])
        return other

    def uniform(self) -> float:
        """The random number in (0, 1) of the next token: a function of seed, index and position alone."""
        first, numbers = self._uniforms
        offset = self.position - first
        if 0 <= offset < len(numbers):
            return numbers[offset]
        _make_uniforms([self])
        return self._uniforms[1][0]

    def uniforms(self, count: int) -> list[float]:
        """The same of the next `count` tokens, at most 64."""
        first, numbers = self._uniforms
        offset = self.position - first
        if not 0 <= offset <= len(numbers) - count:
            _make_uniforms([self])
            offset, numbers = 0, self._uniforms[1]
        return numbers[offset : offset + count]

    @property
    def position(self) -> int:
        """How many tokens were drawn before the next one."""
        return len(self.tokens) - self.num_prompt_tokens + self.num_ahead

    @property
    def output_token_ids(self) -> list[int]:
        """Tokens generated so far."""
        return self.tokens[self.num_prompt_tokens :]

    def append(self, token_id: int) -> None:
        """Takes note of the token that was chosen.

        Raises:
            InvalidParameterError: the grammar cannot go on behind it.
            RuntimeError: the grammar does not take it.
        """
        assert 0 <= token_id < self.vocab_size
        self.tokens.append(token_id)
        if self._counts is not None:
            self._counts.add(token_id)
            self._recent = None
        if self.dry is not None:
            self.dry.append(token_id)
        if self.grammar is not None:
            self.grammar.accept(token_id)
        if self.thoughts is not None:
            self.thoughts.add(token_id)

    def may_take(self, token_id: int) -> bool:
        """Whether the grammar takes this one as the next token. Waits for it."""
        return self.grammar is None or self.grammar.legal((token_id,)) == 1

    @property
    def forced(self) -> int | None:
        """The token that must come next, as the thoughts are at their limit; None where any may. Waits for the grammar.

        What the request allows at all wins: a token that `allowed_token_ids` or the grammar has not waits until it has.
        """
        token = None if self.thoughts is None else self.thoughts.next_token
        if token is None or (bits := self._left()) is None or bits.view(np.uint32)[token // 32] >> token % 32 & 1:
            return token
        return None

    def rollback(self, count: int, thoughts: ThoughtCount | None = None) -> None:
        """Forgets the last `count` tokens that were appended, as if they had not been.

        `thoughts` is a copy of what was thought before them, where there is one; else that is counted anew.
        """
        if not count:
            return
        if self._counts is not None:
            for token_id in reversed(self.tokens[-count:]):
                self._counts.remove(token_id)
            self._recent = None
        if self.dry is not None:
            self.dry.rollback(count)
        del self.tokens[-count:]
        if self.grammar is not None:
            self.grammar.rollback(count)
        if thoughts is not None:
            self.thoughts = thoughts
        elif self.thoughts is not None:
            self.thoughts.replay(self.output_token_ids)

    @property
    def counts(self) -> TokenCounts | RecentCounts | None:
        """See the class."""
        last = self.params.repeat_last_n
        if self._counts is None or not 0 <= last < len(self.tokens):
            return self._counts
        if self._recent is None:
            first = len(self.tokens) - last
            self._recent = RecentCounts(self.tokens[first:], max(self.num_prompt_tokens - first, 0))
        return self._recent

    def links(self) -> NDArray[np.float64]:
        """`chain` as it is for the next token; a copy."""
        assert self.chain is not None
        numbers = self.chain.copy()
        if self.params.xtc_probability and self._chance() > self.params.xtc_probability:
            numbers[Link.XTC] = 1.0
        numbers[Link.MU] = self._mus[min(self.position, len(self._mus) - 1)]
        return numbers

    def note_surprise(self, bits: float, position: int) -> None:
        """Tells mirostat how surprising the token was that was drawn at a position."""
        params = self.params
        error = bits - params.mirostat_tau
        self._mus[position + 1 :] = [self._mus[position] - params.mirostat_eta * error]

    def _chance(self) -> float:
        first, numbers = self._chances
        if not 0 <= self.position - first < len(numbers):
            drawn = uniforms([seed_words(self.seed, self.index)], [self.position], _UNIFORMS, stream=1)
            self._chances = first, numbers = self.position, drawn[0].tolist()
        return numbers[self.position - first]

    @property
    def masks_tokens(self) -> bool:
        """Whether the next token may not be just any of the vocabulary."""
        return self._always_masks or self.position < self.params.min_tokens or self.is_due

    @property
    def is_due(self) -> bool:
        """Whether the thoughts are at their limit, so that their end is to be said."""
        return self.thoughts is not None and self.thoughts.next_token is not None

    def mask_bits(self) -> NDArray[np.int32] | None:
        """As `allowed_bits`, what `allowed`, the grammar and a limit of thoughts leave; None where there is none of
        them. Waits for the grammar.

        Valid until the next `append`.
        """
        token = self.forced
        if token is None:
            return self._left()
        bits = np.zeros(-(-self.vocab_size // 32), np.uint32)
        bits[token // 32] = 1 << token % 32
        return bits.view(np.int32)

    def _left(self) -> NDArray[np.int32] | None:
        """What `allowed` and the grammar leave."""
        if self.grammar is None:
            return None if self.allowed is None else self.allowed_bits
        bits = self.grammar.bits()
        return bits if self.allowed is None else bits & self.allowed_bits

    @cached_property
    def allowed_bits(self) -> NDArray[np.int32]:
        """[ceil(V / 32)]: bit i % 32 of word i // 32 is 1 for each of `allowed`."""
        assert self.allowed is not None
        flags = np.zeros(-(-self.vocab_size // 32) * 32, np.uint8)
        flags[self.allowed] = 1
        return np.packbits(flags, bitorder="little").view(np.int32)

    def forbidden_ids(self) -> NDArray[np.int64]:
        """Tokens that may not come next: ends of bad words, and every stop token before `min_tokens`.

        As in vLLM, `min_tokens` holds back the end-of-sequence tokens under `ignore_eos` too. The form of a text wins:
        where it leaves nothing but these, they may come. So may the end of thoughts that are at their limit.
        """
        if self.forced is not None:
            return np.zeros(0, np.int64)
        words = self.bad_words.completions(
            self.tokens[max(self.num_prompt_tokens, len(self.tokens) - self.bad_words.longest) :]
        )
        if self.position >= self.params.min_tokens or self._must_stop():
            return words
        return np.concatenate((words, self._stop_ids))

    def _must_stop(self) -> bool:
        """Whether the grammar leaves nothing but stop tokens here. Waits for it."""
        if self.grammar is None:
            return False
        others = np.unpackbits(self.grammar.bits().view(np.uint8), bitorder="little")
        others[self._stop_ids] = 0
        return not others.any()

    def _allowed_ids(self) -> NDArray[np.int64] | None:
        if self.params.allowed_token_ids is None:
            return None
        return _distinct(_checked("allowed_token_ids", self.params.allowed_token_ids, self.vocab_size))

    def _bias(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        bias = self.params.logit_bias or {}
        ids = _checked("logit_bias", list(bias), self.vocab_size)
        return ids, np.array(list(bias.values()), np.float32)


def uniforms_ahead(states: Sequence[SamplingState]) -> NDArray[np.float64]:
    """[K, R] the random numbers of the next K tokens of some sequences, as many as are at hand, at least one."""
    left = [_uniforms_left(state) for state in states]
    if not all(left):
        _make_uniforms(states)  # all at once, which costs what the numbers of one do
        left = [_UNIFORMS] * len(states)
    most = min(left)
    ahead = [state._uniforms[1][-count:][:most] for state, count in zip(states, left)]
    return np.array(ahead).T.copy()


def _uniforms_left(state: SamplingState) -> int:
    """How many random numbers there are from the next token on."""
    first, numbers = state._uniforms
    offset = state.position - first
    return len(numbers) - offset if 0 <= offset < len(numbers) else 0


def _make_uniforms(states: Sequence[SamplingState]) -> None:
    """Random numbers of some sequences from their next token on."""
    words, positions = [seed_words(state.seed, state.index) for state in states], [state.position for state in states]
    for state, first, numbers in zip(states, positions, uniforms(words, positions, _UNIFORMS).tolist()):
        state._uniforms = (first, numbers)


class TokenCounts:
    """How often each token was generated, kept sparse: parallel arrays of ids and counts.

    A token of the prompt that was not generated has a count of 0.
    """

    def __init__(self, prompt_token_ids: NDArray[np.int64]) -> None:
        ids = _distinct(prompt_token_ids)
        self._size = self._num_prompt_ids = len(ids)
        self._slots = dict(zip(ids.tolist(), range(len(ids))))
        self._ids = np.concatenate((ids, np.zeros(64, np.int64)))
        self._counts = np.zeros(len(self._ids), np.float32)

    def add(self, token_id: int) -> None:
        """Counts one more occurrence in the output."""
        slot = self._slots.setdefault(token_id, self._size)
        if slot == self._size:
            if slot == len(self._ids):  # doubling keeps the cost per token constant
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._ids[slot] = token_id
            self._size += 1
        self._counts[slot] += 1

    def remove(self, token_id: int) -> None:
        """Takes back the last `add`."""
        slot = self._slots[token_id]
        self._counts[slot] -= 1
        if not self._counts[slot] and slot >= self._num_prompt_ids:  # it was the first such token, so it is the last id
            del self._slots[token_id]
            self._size -= 1

    @property
    def ids(self) -> NDArray[np.int64]:
        """[N] distinct token ids; valid until the next `add`."""
        return self._ids[: self._size]

    @property
    def counts(self) -> NDArray[np.float32]:
        """[N] occurrences in the output; valid until the next `add`."""
        return self._counts[: self._size]


class RecentCounts:
    """As `TokenCounts`, of some tokens of which the first `prompt` are not the output's; not changed any more.

    A token of the prompt has a count of 0, as there; where no penalty looks at the prompt that takes nothing off it.
    """

    def __init__(self, tokens: Sequence[int], prompt: int) -> None:
        all_ids = np.array(tokens, np.int64)
        self.ids = _distinct(all_ids)
        self.counts = np.bincount(np.searchsorted(self.ids, all_ids[prompt:]), minlength=len(self.ids)).astype(
            np.float32
        )


class BadWords:
    """Token sequences that must not be produced, indexed by the token before the last one."""

    def __init__(self, words: Sequence[Sequence[int]], vocab_size: int) -> None:
        singles: list[int] = []
        self.longest = max(map(len, words), default=0)  # tokens of a word
        self._by_previous: dict[int, list[tuple[list[int], int]]] = {}
        for word in words:
            ids = _checked("bad_words", word, vocab_size).tolist()
            if not ids:
                raise InvalidParameterError("bad_words has an entry that is no token; remove it", "bad_words")
            if len(ids) == 1:
                singles.append(ids[0])
            else:
                self._by_previous.setdefault(ids[-2], []).append((ids[:-1], ids[-1]))
        self._singles = np.array(singles, np.int64)

    @property
    def has_sequences(self) -> bool:
        """Whether any word is more than one token."""
        return bool(self._by_previous)

    def completions(self, output: list[int]) -> NDArray[np.int64]:
        """Tokens that would complete a word after `output`."""
        if not output or output[-1] not in self._by_previous:
            return self._singles
        ends = [last for prefix, last in self._by_previous[output[-1]] if output[-len(prefix) :] == prefix]
        return np.concatenate((self._singles, np.array(ends, np.int64)))


def _distinct(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """In rising order, each once. Numpy's own function imports masked arrays at its first call: 15 ms of a start."""
    ordered = np.sort(ids)
    return ordered[np.diff(ordered, prepend=-1) > 0]


def _checked(name: str, token_ids: Iterable[int], vocab_size: int) -> NDArray[np.int64]:
    ids = np.array(list(token_ids), np.int64)
    if len(ids) and not (ids.min() >= 0 and ids.max() < vocab_size):
        wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise InvalidParameterError(
            f"{name} holds token id {wrong}, but this model's vocabulary has the ids 0 to {vocab_size - 1}", name
        )
    return ids


def _penalty_counts(params: SamplingParams, prompt_ids: NDArray[np.int64]) -> TokenCounts | None:
    if params.repetition_penalty != 1.0:
        return TokenCounts(prompt_ids)
    if params.frequency_penalty or params.presence_penalty:
        return TokenCounts(prompt_ids[:0])  # these two look at the output only
    return None


def _chain(controls: tuple[float, ...], params: SamplingParams) -> tuple[NDArray[np.float64], tuple[float, ...]]:
    """The numbers of the chain, and the controls of what it leaves."""
    temperature, min_p, top_k, top_p = controls
    numbers = np.zeros(len(Link))
    takes_away = params.xtc_probability > 0
    dynamic = params.dynatemp_range
    numbers[:] = (
        max(params.top_n_sigma, 0.0),
        top_k,
        params.typical_p,
        top_p,
        min_p,
        params.xtc_threshold if takes_away else 1.0,
        temperature,
        max(params.temperature - dynamic, 0.0) if dynamic else 0.0,
        params.temperature + dynamic if dynamic else 0.0,
        params.dynatemp_exponent,
        params.mirostat,
        0.0,
    )
    return numbers, (1.0 if dynamic else temperature, 0.0, 0.0, 1.0)
