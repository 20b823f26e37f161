"""Pictures in prompts: what stands for them among the tokens, and what goes to the engine with these (step 3)."""

from __future__ import annotations

import builtins
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.shown import ShownStruct
from candle_vllm.core.vision.pictures import Picture, PictureLimits, picture_of
from candle_vllm.core.vision.preprocessing import Cut, TileRule

MAX_IMAGES = 64
"""Most pictures of a prompt where nothing else is said."""


class ImageInput(ShownStruct, frozen=True, kw_only=True):
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

    def pixels(self) -> NDArray[np.uint8]:
        """The tiles [N, h, w, 3], not to be written to."""
        return np.frombuffer(self.tiles, np.uint8).reshape(*self.shape, 3)


class Sighted(ShownStruct, frozen=True, kw_only=True):
    """What is to be known of a tower by who has the texts.

    Attributes:
        family: the file of its family.
        rule: how pictures become tiles.
        mark: the token that a template writes for a picture, and that stands for each of its embeddings.
        embeddings: of a tile.
    """

    family: str
    rule: TileRule
    mark: int
    embeddings: int


@dataclass(frozen=True)
class Sight:
    """How a model sees pictures.

    Attributes:
        parts: of its tower.
        words: the tokens of a picture that is cut so.
        limits: what a picture may be.
        most: pictures of a prompt.
    """

    parts: Sighted
    words: Callable[[Cut], Sequence[int]]
    limits: PictureLimits = PictureLimits()
    most: int = MAX_IMAGES

    def look(self, ids: Sequence[int], images: Sequence[object]) -> tuple[list[int], tuple[ImageInput, ...]]:
        """A prompt with what stands for its pictures, and these.

        Args:
            ids: the prompt, with one mark for each picture.
            images: pictures as `picture_of` takes them.

        Raises:
            InvalidParameterError: one cannot be used, or there are not as many as marks.
        """
        if len(images) > self.most:
            raise InvalidParameterError(f"image: {len(images)} pictures; a prompt may have {self.most}", "image")
        marks = list(ids).count(self.parts.mark)
        if marks != len(images):
            raise InvalidParameterError(
                f"image: {len(images)} pictures, and {marks} marks for them in the prompt; a picture needs one each",
                "image",
            )
        pictures = [picture_of(image, self.limits) for image in images]
        expanded: list[int] = []
        left = iter(pictures)
        for token in ids:
            if token == self.parts.mark:
                picture = next(left)
                expanded += self.words(self.parts.rule.cut(picture.height, picture.width))
            else:
                expanded.append(token)
        made: dict[bytes, ImageInput] = {}
        for picture in pictures:
            if picture.digest not in made:
                made[picture.digest] = self._input(picture)
        return expanded, tuple(made[picture.digest] for picture in pictures)

    def _input(self, picture: Picture) -> ImageInput:
        tiles = self.parts.rule.tiles(picture)
        how = msgspec.json.encode(self.parts.rule)
        key = hashlib.sha256(len(how).to_bytes(8, "little") + how + picture.digest).digest()
        return ImageInput(key=key, tiles=tiles.tobytes(), shape=(tiles.shape[0], tiles.shape[1], tiles.shape[2]))

    def places(self, ids: Sequence[int], images: Sequence[ImageInput]) -> list[NDArray[np.int64]]:
        """Where in a prompt the embeddings of each picture stand.

        Raises:
            InvalidParameterError: there are not as many marks as embeddings.
        """
        marks = np.flatnonzero(np.asarray(ids) == self.parts.mark)
        counts = [image.shape[0] * self.parts.embeddings for image in images]
        if len(marks) != sum(counts):
            raise InvalidParameterError(
                f"image: {sum(counts)} embeddings of {len(images)} pictures, and {len(marks)} marks for them", "image"
            )
        return np.split(marks, np.cumsum(counts)[:-1])
