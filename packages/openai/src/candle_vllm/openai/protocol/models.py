# SPDX-License-Identifier: MIT
"""Answer of `/v1/models`."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec import UNSET, UnsetType


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One served name.

    Attributes:
        id: the name to put into a request's `model`.
        created: Unix seconds.
        root: the model's own name, which `id` may be an alias of.
        max_model_len: most tokens of prompt and output together.
        modalities: what the model reads: text, and images where it sees.
        tool_parser: the format that the model's tool calls are read in; null where it calls no tools.
        reasoning_parser: the format that its thoughts are read in; null where they are not told apart.
        default_sampling: what counts where a request says nothing of it.
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
