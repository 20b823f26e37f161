# SPDX-License-Identifier: MIT
"""A picture as it goes to the engine. No numpy here: the scheduler's sequences have some."""

from __future__ import annotations

import builtins
import math
from typing import ClassVar

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.shown import ShownStruct


class ImageInput(ShownStruct, frozen=True, kw_only=True, weakref=True):
    """A picture of a prompt, as its model's tower reads it.

    Attributes:
        key: what two must share to have the same embeddings: SHA-256 of pixels and of how they were prepared.
        tiles: uint8 [N, h, w, 3], as bytes.
        shape: N, h and w.
    """

    unshown: ClassVar[frozenset[str]] = frozenset({"key", "tiles"})

    key: builtins.bytes
    tiles: builtins.bytes
    shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        if len(self.key) != 32 or min(self.shape) < 1 or 3 * math.prod(self.shape) != len(self.tiles):
            raise InvalidParameterError(f"a picture of {list(self.shape)} has {len(self.tiles)} bytes", "image")
