# SPDX-License-Identifier: MIT
"""Texts of JSON values, and texts that grammars allow."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import numpy as np

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling.device_edits import mask_flags
from candle_vllm.core.sampling.json_schema import compilable_schema
from candle_vllm.core.sampling.llguidance_backend import LlguidanceBackend
from candle_vllm.core.sampling.structured import StructuredOutputsParams

MOST_TOKENS = 3_000


def spellings(value: Any) -> Iterator[str]:
    """Texts of an instance, with keys in every order."""
    if isinstance(value, dict):
        inner = [[f"{json.dumps(k, ensure_ascii=False)}:{t}" for t in spellings(v)] for k, v in value.items()]
        for order in itertools.permutations(inner):
            yield from ("{" + ",".join(parts) + "}" for parts in itertools.product(*order))
    elif isinstance(value, list):
        yield from ("[" + ",".join(parts) + "]" for parts in itertools.product(*map(list, map(spellings, value))))
    elif isinstance(value, float):
        yield format(Decimal(repr(value)), "f").removesuffix(".0")
    else:
        yield json.dumps(value, ensure_ascii=False)


def accepts(backend: LlguidanceBackend, spec: StructuredOutputsParams, text: str) -> bool:
    grammar = backend.compile(spec)
    return all(not grammar.exhausted and grammar.accept(byte) for byte in text.encode()) and grammar.may_end


def checked_schema(schema: Any) -> dict[str, Any]:
    """The schema in llguidance's keywords."""
    return compilable_schema(schema).schema


def refused(backend: LlguidanceBackend, spec: StructuredOutputsParams) -> InvalidParameterError | None:
    try:
        backend.compile(spec)
    except InvalidParameterError as error:
        return error
    return None


def walk(backend: LlguidanceBackend, vocabulary: Any, spec: StructuredOutputsParams, seed: int) -> str | None:
    """A text of tokens that the masks allow; None where it did not end. It leans to what ends parts."""
    rng, grammar, said = random.Random(seed), backend.compile(spec), []
    closing = {token for token, data in enumerate(vocabulary.tokens) if data[:1] in (b'"', b"}", b"]", b"0", b":")}
    bits = np.zeros(-(-vocabulary.vocab_size // 32), np.int32)
    while not grammar.exhausted:
        grammar.fill_mask(bits)
        choices = np.flatnonzero(mask_flags(bits, vocabulary.vocab_size)).tolist()
        wanted = [token for token in choices if token in closing or token in vocabulary.ends]
        token = rng.choice(wanted if wanted and rng.random() < 0.5 else choices)
        assert grammar.accept(token)
        if token in vocabulary.ends:
            break
        said.append(token)
        if len(said) > MOST_TOKENS:
            return None
    return vocabulary.text(said)
