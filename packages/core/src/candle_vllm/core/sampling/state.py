# SPDX-License-Identifier: MIT
"""SamplingState: the sampler's state of one sequence (step 7 of a request's life).

It is made once, when the request is prepared, and survives preemption: the engine may drop the sequence's cache and
compute it again, while the state keeps its tokens and counts. Values that no step changes are computed only once.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.kernels.sampling.chain import narrow
from candle_vllm.core.kernels.sampling.contract import Control, Link
from candle_vllm.core.sampling.dry import Breakers, DryState
from candle_vllm.core.sampling.grammar import GrammarState
from candle_vllm.core.sampling.params import SamplingParams, installed_processors
from candle_vllm.core.sampling.random import fresh_seed, seed_words, uniforms
from candle_vllm.core.sampling.thoughts import ThoughtCount

_NO_IDS = np.zeros(0, np.int64)
_LOWEST = float(np.finfo(np.float32).min)
_UNIFORMS = 64  # random numbers of a sequence that are computed at a time


class SamplingState:
    """One sequence's sampling parameters, its tokens, and values derived from both.

    Attributes:
        vocab_size: V, the width of the logits.
        index: index among the request's `n` sequences.
        seed: the request's seed, or 64 random bits.
        controls: temperature (0 for greedy), min_p, top_k (0 for all tokens), top_p; with a sampler chain, which
            applies min_p, top_k and top_p itself, these three are neutral, and a dynamic temperature is 1 here.
        chain: parameters of llama.cpp's sampler chain (`kernels/sampling/chain.py`), by `Link`; None without a chain.
        dry: state of DRY, or None.
        allowed: [N] distinct token ids, or None.
        bias_ids, bias_values: `logit_bias` as parallel arrays.
        counts: token counts for the penalties; None without a penalty. If `windowed`, they are valid until
            the next `append`.
        windowed: whether the penalties count only the last tokens (`repeat_last_n`).
        failure: error of one of the request's own logits processors, or None.
        grammar: state of the grammar of structured output; None without one.
        thoughts: count of reasoning tokens, which forces their end at a limit; None without a limit.
        tokens: prompt and output so far. The scheduler may read the same list; `append` and `rollback` change it.
        reads_tokens: whether the host must know all earlier tokens before the next one is sampled.
        notes_tokens: whether `append` also updates counts, the grammar, thoughts or DRY.
        may_edit: whether the sequence's logits may be edited at some position.
        only_masks: whether only the grammar edits the sequence's logits.
        num_ahead: sampled tokens after `tokens` that the host does not know yet; above 0 only if steps overlap.
    """

    num_ahead = 0
    failure: str | None = None
    _recent: RecentCounts | None = None
    _uniforms: tuple[int, Sequence[float]] = (0, ())  # a position, and the random numbers from there on
    _chances: tuple[int, Sequence[float]] = (0, ())  # a position, and XTC's random numbers from there on

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        seed: int | None = None,
        index: int = 0,
        bad_word_token_ids: Sequence[Sequence[int]] = (),
        grammar: GrammarState | None = None,
        thoughts: ThoughtCount | None = None,
        breakers: Breakers | None = None,
    ) -> None:
        """Check token ids against the vocabulary, and prepare masks, bias and counts.

        Args:
            prompt_token_ids: the prompt; its tokens count for `repetition_penalty`.
            eos_token_ids: the model's end-of-sequence tokens. Ids outside the vocabulary are ignored.
            seed: the seed of a request without one; None for a random seed.
            bad_word_token_ids: token sequences of `params.bad_words`, and the tokens that the tokenizer suppresses.
            grammar: the grammar of `params.structured_outputs`, at the start of a text.
            thoughts: the count of `params.thoughts` or `thinking_token_budget`, at the start of a text.
            breakers: sequence breakers of DRY; required for a request with DRY.

        Raises:
            InvalidParameterError: a token id lies outside the vocabulary, or a bad word has no token.
        """
        self.params = params
        self.vocab_size = vocab_size
        self.index = index
        seed = seed if params.seed is None else params.seed
        self.seed = fresh_seed() if seed is None else seed
        self.tokens = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.tokens)
        self.grammar = grammar
        self.thoughts = thoughts
        allowed = params.allowed_token_ids
        self.allowed = None if allowed is None else _distinct(_checked("allowed_token_ids", allowed, vocab_size))
        bias = params.logit_bias or {}
        self.bias_ids = _checked("logit_bias", bias, vocab_size)
        self.bias_values = np.array(list(bias.values()), np.float32)
        self._stop_ids = _checked("stop_token_ids", params.stop_token_ids, vocab_size)
        self._eos_token_ids = eos_token_ids
        self.bad_words = BadWords(bad_word_token_ids, vocab_size) if bad_word_token_ids else None
        self._counts = _penalty_counts(params, prompt_token_ids, vocab_size)
        top_k = params.top_k if 0 < params.top_k < vocab_size else 0
        self.controls = (0.0 if params.greedy else params.temperature, params.min_p, top_k, params.top_p)
        self.chain = _chain(params, self.controls)
        self._mus = [2 * params.mirostat_tau]  # mirostat's mu of the tokens so far and of the next one
        if self.chain is not None:  # the chain applies these, and a dynamic temperature
            self.controls = (1.0 if params.dynatemp_range else self.controls[0], 0.0, 0.0, 1.0)
        self._masks_ids = self.allowed is not None or self.bad_words is not None
        self.dry = None if breakers is None else DryState(params, breakers, self.tokens)
        self.windowed = self._counts is not None and params.repeat_last_n >= 0
        held = grammar is not None or thoughts is not None
        reads = self.dry is not None or bool(params.logits_processors) or self.windowed or params.mirostat > 0
        self.reads_tokens = held or reads or (self.bad_words is not None and self.bad_words.has_sequences)
        masks = self._masks_ids or params.min_tokens > 0
        edits = masks or self._counts is not None or bool(bias) or self.chain is not None or reads
        self.may_edit = edits or held
        self.only_masks = grammar is not None and thoughts is None and not edits
        self.notes_tokens = self._counts is not None or held or self.dry is not None

    def sibling(self, index: int) -> SamplingState:
        """Return a fresh state for another sequence of the same request; constant parts are shared."""
        assert len(self.tokens) == self.num_prompt_tokens
        other = copy.copy(self)
        other.index = index
        other.tokens = list(self.tokens)
        other.num_ahead = 0
        other._counts = copy.deepcopy(self._counts)
        other.dry = None if self.dry is None else self.dry.sibling(other.tokens)
        other._mus = list(self._mus)
        other._chances = (0, ())
        other.grammar = None if self.grammar is None else self.grammar.sibling()
        other.thoughts = None if self.thoughts is None else self.thoughts.sibling()
        other._uniforms = (0, ())
        return other

    def uniform(self) -> float:
        """Return the random number in (0, 1) of the next token: a function of only seed, index and position."""
        first, numbers = self._uniforms
        offset = self.position - first
        return numbers[offset] if 0 <= offset < len(numbers) else self.uniforms(1)[0]

    def uniforms(self, count: int) -> Sequence[float]:
        """Return the random numbers of the next `count` tokens, at most 64."""
        if len(self._ready) < count:
            _make_uniforms([self])
        return self._ready[:count]

    @property
    def _ready(self) -> Sequence[float]:
        """The computed random numbers, from the next token on."""
        first, numbers = self._uniforms
        return numbers[self.position - first :] if self.position >= first else ()

    @property
    def position(self) -> int:
        """Number of sampled tokens before the next one."""
        return len(self.tokens) - self.num_prompt_tokens + self.num_ahead

    @property
    def output_token_ids(self) -> list[int]:
        """Tokens generated so far."""
        return self.tokens[self.num_prompt_tokens :]

    def append(self, token_id: int) -> None:
        """Append a sampled token and update counts, DRY, the grammar and thoughts.

        Raises:
            InvalidParameterError: the grammar cannot continue after the token.
            RuntimeError: the grammar does not accept the token.
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
        """Return whether the grammar accepts this token, other than an end token, next. Waits for the grammar."""
        return self.grammar is None or self.grammar.legal((token_id,)) == 1

    @property
    def forced(self) -> int | None:
        """Next token of the text that is forced at the limit of reasoning, or None. Waits for the grammar.

        `allowed_token_ids` and the grammar have priority: a token that they forbid is forced when they allow it.
        """
        token = None if self.thoughts is None else self.thoughts.next_token
        if token is None or (bits := self._left()) is None or bits.view(np.uint32)[token // 32] >> token % 32 & 1:
            return token
        return None

    def rollback(self, count: int, thoughts: ThoughtCount | None = None) -> None:
        """Undo the last `count` calls of `append`.

        `thoughts` is a copy of the count of reasoning tokens before these calls; None counts the output again.
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
        """See the class's attributes."""
        last = self.params.repeat_last_n
        if self._counts is None or not 0 <= last < len(self.tokens):
            return self._counts
        if self._recent is None:
            first = len(self.tokens) - last
            self._recent = RecentCounts(self.tokens[first:], max(self.num_prompt_tokens - first, 0))
        return self._recent

    def links(self) -> NDArray[np.float64]:
        """Return a copy of `chain` for the next token, with XTC's decision and mirostat's mu."""
        assert self.chain is not None
        numbers = self.chain.copy()
        if self.params.xtc_probability and self._chance() > self.params.xtc_probability:
            numbers[Link.XTC] = Link.XTC.neutral
        numbers[Link.MU] = self._mus[min(self.position, len(self._mus) - 1)]
        return numbers

    def note_surprise(self, bits: float, position: int) -> None:
        """Update mirostat by the surprise, in bits, of the token that was sampled at a position."""
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
        """Whether some tokens of the vocabulary may be forbidden as the next one."""
        return self._masks_ids or self.grammar is not None or self.position < self.params.min_tokens or self.is_due

    @property
    def is_due(self) -> bool:
        """Whether reasoning has reached its limit, so that its end is forced."""
        return self.thoughts is not None and self.thoughts.next_token is not None

    def mask_bits(self) -> NDArray[np.int32] | None:
        """Return the tokens that `allowed`, the grammar and the limit of reasoning allow, as in `allowed_bits`; None
        without any of these. Waits for the grammar.

        Valid until the next `append`.
        """
        token = self.forced
        if token is None:
            return self._left()
        bits = np.zeros(-(-self.vocab_size // 32), np.uint32)
        bits[token // 32] = 1 << token % 32
        return bits.view(np.int32)

    def _left(self) -> NDArray[np.int32] | None:
        """Return the tokens that `allowed` and the grammar allow, as in `allowed_bits`; None for all."""
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
        """Return the tokens that may not come next: last tokens of bad words, and stop tokens before `min_tokens`.

        As in vLLM, `min_tokens` forbids the end-of-sequence tokens under `ignore_eos` too. A grammar that allows only
        stop tokens wins over `min_tokens`. If the end of reasoning is forced, the array is empty.
        """
        if self.forced is not None:
            return _NO_IDS
        words = _NO_IDS
        if self.bad_words is not None:
            first = max(self.num_prompt_tokens, len(self.tokens) - self.bad_words.longest)
            words = self.bad_words.completions(self.tokens[first:])
        if self.position >= self.params.min_tokens or self._must_stop():
            return words
        return np.concatenate((words, self._ending_ids))

    def _must_stop(self) -> bool:
        """Whether the grammar allows only stop tokens here. Waits for the grammar."""
        if self.grammar is None:
            return False
        others = np.unpackbits(self.grammar.bits().view(np.uint8), bitorder="little")
        others[self._ending_ids] = 0
        return not others.any()

    @cached_property
    def _ending_ids(self) -> NDArray[np.int64]:
        """The tokens that end the sequence, those of the model included, sorted."""
        eos_ids = [token for token in self._eos_token_ids if 0 <= token < self.vocab_size]
        return _distinct(np.concatenate((self._stop_ids, np.array(eos_ids, np.int64))))


def uniforms_ahead(states: Sequence[SamplingState]) -> NDArray[np.float64]:
    """Return the next random numbers [K, R] of R sequences: the K >= 1 that all sequences have computed."""
    if not all(state._ready for state in states):
        _make_uniforms(states)  # one call for all sequences, which takes as long as for one
    ahead = [state._ready for state in states]
    most = min(map(len, ahead))
    return np.array([numbers[:most] for numbers in ahead]).T.copy()


def _make_uniforms(states: Sequence[SamplingState]) -> None:
    """Compute the random numbers of sequences, each from its next token on."""
    words, positions = [seed_words(state.seed, state.index) for state in states], [state.position for state in states]
    for state, first, numbers in zip(states, positions, uniforms(words, positions, _UNIFORMS).tolist()):
        state._uniforms = (first, numbers)


class TokenCounts:
    """Number of occurrences of each token in the output, as sparse parallel arrays of ids and counts.

    Tokens that occur only in the prompt have a count of 0.
    """

    def __init__(self, prompt_token_ids: NDArray[np.int64]) -> None:
        ids = _distinct(prompt_token_ids)
        self._size = self._num_prompt_ids = len(ids)
        self._slots = dict(zip(ids.tolist(), range(len(ids))))
        self._ids = np.concatenate((ids, np.zeros(64, np.int64)))
        self._counts = np.zeros(len(self._ids), np.float32)

    def add(self, token_id: int) -> None:
        """Count an occurrence in the output."""
        slot = self._slots.setdefault(token_id, self._size)
        if slot == self._size:
            if slot == len(self._ids):  # doubling keeps the cost per token constant
                self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._ids[slot] = token_id
            self._size += 1
        self._counts[slot] += 1

    def remove(self, token_id: int) -> None:
        """Undo the last `add`."""
        slot = self._slots[token_id]
        self._counts[slot] -= 1
        if not self._counts[slot] and slot >= self._num_prompt_ids:  # the token occurred once, so its id is the last
            del self._slots[token_id]
            self._size -= 1

    @property
    def ids(self) -> NDArray[np.int64]:
        """Distinct token ids [N]; valid until the next `add` or `remove`."""
        return self._ids[: self._size]

    @property
    def counts(self) -> NDArray[np.float32]:
        """Occurrences [N] in the output; valid until the next `add` or `remove`."""
        return self._counts[: self._size]


class RecentCounts:
    """`TokenCounts` of a fixed window of tokens, of which the first `prompt` belong to the prompt.

    Tokens that occur only in the prompt have a count of 0, so that no penalty for the output applies to them.
    """

    def __init__(self, tokens: Sequence[int], prompt: int) -> None:
        all_ids = np.array(tokens, np.int64)
        self.ids = _distinct(all_ids)
        places = np.searchsorted(self.ids, all_ids[prompt:])
        self.counts = np.bincount(places, minlength=len(self.ids)).astype(np.float32)


class BadWords:
    """Token sequences that must not be produced, indexed by the token before the last one."""

    def __init__(self, words: Sequence[Sequence[int]], vocab_size: int) -> None:
        singles: list[int] = []
        self.longest = max(map(len, words))  # maximum number of tokens of a word
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
        self.has_sequences = bool(self._by_previous)  # whether any word is more than one token

    def completions(self, output: list[int]) -> NDArray[np.int64]:
        """Return the tokens that would complete a word after `output`."""
        if not output or output[-1] not in self._by_previous:
            return self._singles
        ends = [last for prefix, last in self._by_previous[output[-1]] if output[-len(prefix) :] == prefix]
        return np.concatenate((self._singles, np.array(ends, np.int64)))


def _distinct(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the distinct ids, sorted. `np.unique` would import masked arrays, which delays the start."""
    ordered = np.sort(ids)
    return ordered[np.diff(ordered, prepend=-1) > 0]


def _checked(name: str, token_ids: Collection[int] | None, vocab_size: int) -> NDArray[np.int64]:
    if not token_ids:
        return _NO_IDS
    ids = np.array(list(token_ids), np.int64)
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise InvalidParameterError(
            f"{name} holds token id {wrong}, but this model's vocabulary has {vocab_size} ids, 0 to {vocab_size - 1}",
            name,
        )
    return ids


def _penalty_counts(params: SamplingParams, prompt: Sequence[int], vocab_size: int) -> TokenCounts | None:
    if params.repetition_penalty != 1.0:
        return TokenCounts(_checked("prompt_token_ids", prompt, vocab_size))
    if params.frequency_penalty or params.presence_penalty:
        return TokenCounts(_NO_IDS)  # these two count only the output
    return None


def _chain(params: SamplingParams, controls: tuple[float, ...]) -> NDArray[np.float64] | None:
    """Return the parameters of the sampler chain; None if it would do no more than sampling with these controls."""
    found: dict[Link, float] = {link: getattr(params, link.parameter) for link in Link if link.parameter}
    found |= zip((Link.TEMPERATURE, Link.MIN_P, Link.TOP_K, Link.TOP_P), controls)
    if params.xtc_probability > 0 and params.xtc_threshold <= 0.5:
        found[Link.XTC] = params.xtc_threshold
    if params.dynatemp_range:
        found[Link.LOW] = params.temperature - params.dynatemp_range
        found[Link.HIGH] = params.temperature + params.dynatemp_range
    numbers = np.array([max(found.get(link, link.neutral or 0.0), 0.0) for link in Link])
    return numbers if any(numbers[link] != link.neutral for link in _ASKING) else None


# Links that require the chain: they have an effect of their own, and `draw` cannot apply it.
_ASKING = [link for link in Link if link.neutral is not None and link.name not in Control.__members__]


def process_row(row: NDArray[np.float32], state: SamplingState) -> None:
    """Apply the request's own logits processors in place; the first error becomes the state's `failure`."""
    if not row.max() < np.inf:  # the model is at fault, which the sampler reports
        return
    try:
        for process in state.params.logits_processors or ():
            function = installed_processors()[process] if isinstance(process, str) else process
            result = function(tuple(state.tokens), row)
            if not isinstance(result, np.ndarray) or result.shape != row.shape or result.dtype != np.float32:
                raise TypeError(f"a processor must return a float32 array of {len(row)} logits")
            row[:] = result
            if not row.max() < np.inf:
                raise ValueError("a processor must return logits without NaN and infinity, except -inf")
    except Exception as error:  # the caller's code must not affect other requests
        state.failure = f"{type(error).__name__}: {error!s:.400}"


def narrow_row(row: NDArray[np.float32], state: SamplingState) -> None:
    """Apply DRY and the sampler chain of a request, in place."""
    if state.dry is not None:
        ids, taken = state.dry.penalties()
        row[ids] = np.maximum(row[ids].astype(np.float64) - taken, np.where(row[ids] > -np.inf, _LOWEST, -np.inf))
    if state.chain is not None:
        narrow(row, state.links())
