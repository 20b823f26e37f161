"""Checks of a request, and what is made of it before it is queued: sequences with their sampling states.

It needs no engine state and may run in any thread.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq

import msgspec

from candle_vllm.core.engine.admission import check_pooling_request, check_request
from candle_vllm.core.engine.live import LiveSequence
from candle_vllm.core.engine.pooler import Pooler
from candle_vllm.core.engine.request import GenerationRequest, PoolingRequest
from candle_vllm.core.engine.sequence import Sequence
from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.pooling import ModelPooling
from candle_vllm.core.sampling.grammar import GrammarBackend, GrammarState
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.state import SamplingState
from candle_vllm.core.text.tokenizer import Tokenizer


class Preparation:
    """Makes sequences of requests to one model. Thread-safe.

    Args:
        tokenizer: tokens to text.
        eos_token_ids: the model's end-of-sequence tokens.
        vocab_size: V, the width of the logits.
        max_model_len: longest prompt plus output.
        pooling: how vectors are made of hidden states.
        grammars: compiles forms that texts must have.
        seed: makes requests without a seed reproducible, in order of preparation.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token_ids: Seq[int],
        vocab_size: int,
        max_model_len: int,
        *,
        pooling: ModelPooling,
        grammars: GrammarBackend,
        seed: int | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = tuple(eos_token_ids)
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._pooling = pooling
        self._grammars = grammars
        self._seeds = random.Random(seed) if seed is not None else random.SystemRandom()  # noqa: S311

    def prepare(self, request: GenerationRequest) -> list[LiveSequence]:
        """Checks a request and makes its sequences. Thread-safe.

        Raises:
            InvalidParameterError, PromptTooLongError: the request cannot be served as it is.
        """
        if isinstance(request, PoolingRequest):
            return [self._prepare_pooled(request)]
        max_length = check_request(request, self._vocab_size, self._max_model_len)
        if request.params.seed is None:
            seeded = msgspec.structs.replace(request.params, seed=self._seeds.getrandbits(63))
            request = msgspec.structs.replace(request, params=seeded)
        state = SamplingState(
            request.params,
            request.prompt_token_ids,
            vocab_size=self._vocab_size,
            eos_token_ids=self._eos_token_ids,
            bad_word_token_ids=self._bad_words(request.params.bad_words or ()),
            grammar=self._grammar(request.params),
        )
        states = [state, *(state.sibling(index) for index in range(1, request.params.n))]
        return [
            LiveSequence(Sequence(request, index, order=-1), own, self._tokenizer, self._eos_token_ids, max_length)
            for index, own in enumerate(states)
        ]

    def _prepare_pooled(self, request: PoolingRequest) -> LiveSequence:
        """The sequence of a text whose hidden states are pooled."""
        if request.task != "embed":
            raise InvalidParameterError("the model gives vectors and is no cross-encoder: it has no score", "task")
        check_pooling_request(request, self._vocab_size, self._max_model_len)
        plan = self._pooling.plan(request.pooling)
        params = msgspec.structs.replace(request.params, seed=0, skip_reading_prefix_cache=plan.needs_every_position)
        request = msgspec.structs.replace(request, params=params)
        state = SamplingState(params, (), vocab_size=self._vocab_size, eos_token_ids=())
        length = len(request.prompt_token_ids)
        live = LiveSequence(Sequence(request, 0, order=-1), state, self._tokenizer, (), length + 1)
        live.pooler = Pooler(plan, length)
        return live

    def _grammar(self, params: SamplingParams) -> GrammarState | None:
        if params.structured_outputs is None:
            return None
        held_back = self._eos_token_ids if params.ignore_eos else ()
        return GrammarState(self._grammars, params.structured_outputs, self._vocab_size, held_back)

    def _bad_words(self, words: Seq[str]) -> list[list[int]]:
        """Token sequences of each word, at the start of a text and behind a space."""
        texts = [text for word in words for text in (word, " " + word.lstrip())]
        return [ids for ids in self._tokenizer.encode_batch(texts, add_special_tokens=False) if ids]
