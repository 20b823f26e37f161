"""What a caller of the library may pass as prompts (step 1 of a request's life)."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from candle_vllm.core.errors import InvalidParameterError

Prompt = str | Sequence[int]


def as_token_ids(prompt: Any) -> list[int]:
    """A prompt of token ids as a list; anything with whole numbers in it will do, a numpy array as well."""
    try:
        if isinstance(prompt, (bytes, Mapping)) or any(isinstance(token, bool) for token in prompt):
            raise TypeError
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise InvalidParameterError("a prompt is a text or a list of token ids", "prompt") from None


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise InvalidParameterError("prompts are texts or lists of token ids", "prompts")
    items = list(prompts)
    return [items] if items and all(isinstance(item, Integral) for item in items) else items  # type: ignore[list-item]
