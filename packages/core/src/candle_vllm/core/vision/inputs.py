# SPDX-License-Identifier: MIT
"""Preprocessed image as the engine gets it. The module imports no numpy: the scheduler's sequences refer to images."""

from __future__ import annotations

import builtins
import math
from typing import ClassVar

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.shown import ShownStruct


class ImageInput(ShownStruct, frozen=True, kw_only=True, weakref=True):
    """Preprocessed image of a prompt, the input of the model's vision encoder.

    Attributes:
        key: SHA-256 of the pixels and of the preprocessing; images with equal keys have equal embeddings.
        tiles: bytes of uint8 [h, w, 3] of one tile after the other.
        sizes: height h and width w of each tile.
        whole: height and width of the image before it was cut.
        prefix: first tokens of its prompt that attend to each other; 0 unless the model has `VisionDescription.prefix`.
    """

    unshown: ClassVar[frozenset[str]] = frozenset({"key", "tiles"})

    key: builtins.bytes
    tiles: builtins.bytes
    sizes: tuple[tuple[int, int], ...]
    whole: tuple[int, int]
    prefix: int = 0

    def __post_init__(self) -> None:
        counts = [3 * math.prod(size) if min(size) > 0 else 0 for size in self.sizes]
        if len(self.key) != 32 or not counts or not all(counts) or sum(counts) != len(self.tiles):
            raise InvalidParameterError(f"an image of {list(self.sizes)} has {len(self.tiles)} bytes", "image")
