# SPDX-License-Identifier: MIT
"""The vocabulary as llguidance sees it is freed with its model."""

from __future__ import annotations

import gc
import weakref

from candle_vllm.core.sampling.llguidance_backend import LlguidanceBackend
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.sampling.token_trie import TokenTrie
from candle_vllm.core.testing import ByteTokenizer


def test_a_vocabulary_is_freed_with_its_model() -> None:
    tokenizer = ByteTokenizer()
    trie = TokenTrie(tokenizer, tokenizer.vocab_size, (tokenizer.eos_token_id,))
    gone = weakref.ref(trie)
    assert trie.written(b"abc") == (97, 98)
    del trie
    gc.collect()
    assert gone() is None


def test_a_backend_is_freed_after_it_was_used() -> None:
    tokenizer = ByteTokenizer()
    backend = LlguidanceBackend(tokenizer, tokenizer.vocab_size, (tokenizer.eos_token_id,))
    grammar = backend.compile(StructuredOutputsParams(regex="a+"))
    gone = weakref.ref(backend)
    del backend, grammar
    gc.collect()
    assert gone() is None
