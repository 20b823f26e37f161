# SPDX-License-Identifier: MIT
"""Wire types of the response of `/v1/models`."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec import UNSET, UnsetType


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One served name.

    Attributes:
        id: the name for a request's `model`.
        created: Unix seconds.
        root: the model's own name; `id` may be an alias of it.
        max_model_len: maximum number of tokens of prompt and output together.
        modalities: input types: text, and image if the model reads images.
        tool_parser: format of the model's tool calls; absent if the model calls no tools.
        reasoning_parser: format of the model's reasoning; absent if it is not separated from the answer.
        default_sampling: sampling values that apply if a request does not set them.
    """

    id: str
    created: int
    root: str
    max_model_len: int
    object: str = "model"
    owned_by: str = "candle-vllm"
    modalities: tuple[str, ...] = ("text",)
    tool_parser: str | UnsetType | None = UNSET
    reasoning_parser: str | UnsetType | None = UNSET
    default_sampling: Mapping[str, float | int] | UnsetType = UNSET


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """Every served name."""

    data: tuple[ModelCard, ...]
    object: str = "list"
