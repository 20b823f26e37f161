"""Sequence: the scheduler's view of one running or waiting sequence. No torch here."""

from __future__ import annotations

from candle_vllm.core.engine.block_manager import block_hashes
from candle_vllm.core.engine.request import GenerationRequest


class Sequence:
    """One of the `n` sequences of a request.

    Attributes:
        request: what was asked for.
        index: which of the request's `n` sequences.
        order: number of arrival, unique; breaks ties of priority.
        tokens: prompt and output so far.
        num_prompt_tokens: how many of `tokens` are the prompt.
        num_computed_tokens: tokens whose keys and values are in the cache.
        num_cached_tokens: prompt tokens that were found in the prefix cache at first admission.
        block_table: cache blocks, in order of position.
    """

    def __init__(self, request: GenerationRequest, index: int, order: int) -> None:
        self.request = request
        self.index = index
        self.order = order
        self.tokens = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.tokens)
        self.num_computed_tokens = 0
        self.num_cached_tokens: int | None = None
        self.block_table: list[int] = []
        self._hashes: list[bytes] = []

    @property
    def rank(self) -> tuple[int, int]:
        """Sort key: lower runs first."""
        return self.request.priority, self.order

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self.tokens)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that the next steps must still run; 1 while decoding."""
        return len(self.tokens) - self.num_computed_tokens

    def hashes(self, block_size: int) -> list[bytes]:
        """Hashes of all full blocks of `tokens`, kept as the sequence grows."""
        self._hashes = block_hashes(self.tokens, block_size, self.request.params.cache_salt, self._hashes)
        return self._hashes
