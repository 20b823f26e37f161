# SPDX-License-Identifier: MIT
"""Images in prompts: expand placeholder tokens, and preprocess the images for the engine (step 3)."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidParameterError, PromptTooLongError
from candle_vllm.core.shown import ShownStruct
from candle_vllm.core.vision.inputs import ImageInput
from candle_vllm.core.vision.pictures import LIMITS, Picture, PictureLimits, picture_of
from candle_vllm.core.vision.preprocessing import Cut

MAX_TILE_PIXELS = 1 << 27  # of all tiles of an image: 400 MB


class VisionDescription(ShownStruct, frozen=True, kw_only=True):
    """Description of a vision encoder for the process that tokenizes prompts.

    Attributes:
        family: name of the family's module.
        rule: preprocessing rule of images; in a message from another process its fields, see `rule_from`.
        mark: placeholder token of each image embedding.
        asks: token that a chat template writes for an image; may be `mark`.
        written: the whole text that a chat template writes for an image.
        cell: pixels of a cell's side; a cell becomes one embedding.
        whole: whether the embeddings of a tile attend to each other, also to later ones.
        prefix: maximum length of a prompt with images, all of whose tokens attend to each other; 0 if they do not.
        turned: whether embeddings are rotated by time, row and column (M-RoPE).
        blank: token whose row of the embedding table is used for `mark`; None for the row of `mark` itself.
    """

    family: str
    rule: Any
    mark: int
    asks: int
    written: str = ""
    cell: int
    whole: bool = False
    prefix: int = 0
    turned: bool = False
    blank: int | None = None

    def embeddings(self, cut: Cut) -> int:
        """Number of embeddings of an image with this grid."""
        if cut.joined is not None:
            return math.prod(cut.cells(self.cell)) + cut.joined[0] * (cut.joined[1] + 1)
        last = math.prod(side // self.cell for side in cut.last or (cut.height, cut.width))
        return (cut.tiles - 1) * math.prod(cut.cells(self.cell)) + last + cut.more


@dataclasses.dataclass(frozen=True)
class VisionInput:
    """Expands the image placeholders in a model's prompts, and preprocesses the images.

    Attributes:
        parts: description of the model's vision encoder.
        words: returns the tokens that replace an image's placeholder, given its grid of tiles.
        turns: see `TowerFamily.turned`.
        trailing: token ids, see `TowerFamily.trailing`.
        breaks: number of line breaks by token, for tokens of line breaks only; empty if no token is one line break.
        limits: limits of a prompt's images.
        arrange: puts the tokens of a prompt with images in the order that the model expects, and adds missing ones.
        spans: returns `PlacedImage.spans`: see `spans_of` of `models/tower_family.py`.
        one_at_a_time: lock that is held while an image is decoded and preprocessed.
    """

    parts: VisionDescription
    words: Callable[[Cut], Sequence[int]]
    turns: Callable[[Cut], tuple[int, int, NDArray[np.int64]]] | None = None
    trailing: frozenset[int] = frozenset()
    breaks: Mapping[int, int] = dataclasses.field(default_factory=dict)
    limits: PictureLimits = LIMITS
    arrange: Callable[[list[int]], list[int]] = list
    spans: Callable[[ImageInput, NDArray[np.int64], int, int], list[tuple[int, int]]] = lambda *_: []
    one_at_a_time: threading.Lock = dataclasses.field(default_factory=threading.Lock, compare=False, repr=False)

    def look(
        self, ids: Sequence[int], images: Sequence[object], names: Sequence[str] = (), most_tokens: int | None = None
    ) -> tuple[list[int], tuple[ImageInput, ...]]:
        """Return a prompt with its image placeholders expanded, and the preprocessed images.

        Images are decoded one at a time for all requests, because decoding a large one takes hundreds of megabytes.

        Args:
            ids: the prompt, with one token `asks` for each image.
            images: images as `picture_of` accepts them.
            names: name of each image in messages; "image" by default.
            most_tokens: context length; a prompt that fills it up to an image is refused before the next is decoded.

        Raises:
            InvalidParameterError: too many images, an unusable image, or another number of placeholders than images.
            PromptTooLongError: up to one of its images the expanded prompt has `most_tokens` or more.
        """
        names = names or ["image"] * len(images)
        if len(images) > (most := self.limits.max_images):
            name = names[most]
            said = f"{name}: the prompt has {len(images)} images; at most {most} are allowed (max_images)"
            raise InvalidParameterError(said, name)
        marks = (ids := list(ids)).count(self.parts.asks)
        if marks != len(images):
            name = next(iter(names), "image")
            raise InvalidParameterError(
                f"{name}: {len(images)} images, and {marks} placeholders in the prompt; each image needs one "
                f"{self.parts.written!r}, and no text may contain it",
                name,
            )
        expanded: list[int] = []
        inputs: list[ImageInput] = []
        made: dict[bytes, ImageInput] = {}
        begin = 0
        for image, name in zip(images, names, strict=True):
            end = ids.index(self.parts.asks, begin)
            self._join(expanded, ids[begin:end])
            begin = end + 1
            with self.one_at_a_time:
                picture = picture_of(image, self.limits, name)
                try:
                    cut = self.parts.rule.cut(picture.height, picture.width)
                    if (made_pixels := cut.tiles * cut.height * cut.width) > MAX_TILE_PIXELS:
                        said = f"its tiles would have {made_pixels} pixels, by the model's preprocessor_config.json"
                        raise InvalidParameterError(f"{said}; at most {MAX_TILE_PIXELS} are allowed")
                except InvalidParameterError as error:  # which does not know the image's name
                    raise InvalidParameterError(f"{name}: {error}", name) from None
                least = len(expanded) + self.parts.embeddings(cut)
                if most_tokens is None or least < most_tokens:  # otherwise the prompt is refused below
                    self._join(expanded, self.words(cut._replace(number=len(inputs))))
                    least = len(expanded)
                if most_tokens is not None and least >= most_tokens:
                    said = f"{name}: with this image the prompt has at least {least} tokens; this model's maximum"
                    raise PromptTooLongError(f"{said} context length is {most_tokens} tokens", name)
                if picture.digest not in made:
                    made[picture.digest] = self._input(picture)
            inputs.append(made[picture.digest])
        self._join(expanded, ids[begin:])
        if inputs and self.parts.prefix:
            expanded = self.arrange(expanded)
            inputs = [msgspec.structs.replace(each, prefix=len(expanded)) for each in inputs]
        return expanded, tuple(inputs)

    def _join(self, ids: list[int], more: Sequence[int]) -> None:
        """Append `more` to `ids`; line breaks at the border are tokenized as in one text."""
        count, place, breaks = 0, 0, self.breaks
        if ids and more and ids[-1] in breaks and more[0] in breaks:
            while ids and ids[-1] in breaks:
                count += breaks[ids.pop()]
            while place < len(more) and more[place] in breaks:
                count += breaks[more[place]]
                place += 1
        while count:
            token, size = max(((one, size) for one, size in breaks.items() if size <= count), key=lambda each: each[1])
            ids.append(token)
            count -= size
        ids += more[place:]

    def _input(self, picture: Picture) -> ImageInput:
        tiles = self.parts.rule.tiles(picture)
        how = msgspec.json.encode(self.parts.rule)
        key = hashlib.sha256(len(how).to_bytes(8, "little") + how + picture.digest).digest()
        sizes = tuple((tile.shape[0], tile.shape[1]) for tile in tiles)
        joined, whole = b"".join(tile.tobytes() for tile in tiles), (picture.height, picture.width)
        return ImageInput(key=key, tiles=joined, sizes=sizes, whole=whole)

    def turned(
        self, ids: Sequence[int], places: NDArray[np.int64], image: ImageInput, number: int, shift: int
    ) -> tuple[NDArray[np.int64], int, int]:
        """Return `PlacedImage.turned`, `begin` and `shift` of a prompt's image; `shift` is that of the image before it.

        Raises InvalidParameterError if other tokens stand among those of the image.
        """
        if self.turns is None:
            return np.zeros((0, 4), np.int64), 0, 0
        lead, axes, made = self.turns(self.parts.rule.cut(*image.whole)._replace(number=number))
        if places[-1] - places[0] != len(made) + 2 * lead - 1:
            raise InvalidParameterError("image: the placeholders of an image must be consecutive", "image")
        begin = int(places[0]) + lead
        end = begin + len(made)
        while end < len(ids) and ids[end] in self.trailing:
            end += 1
        made = np.pad(made, ((0, end - begin - len(made)), (0, 0)))
        made[:, :axes] += begin + shift
        return made, begin, int(made[:, :axes].max()) + 1 - end

    def places(self, ids: Sequence[int], images: Sequence[ImageInput]) -> list[NDArray[np.int64]]:
        """Return the positions of each image's embeddings in a prompt.

        Raises InvalidParameterError if the numbers of placeholders and embeddings differ.
        """
        marks = np.flatnonzero(np.asarray(ids) == self.parts.mark)
        counts = [self.parts.embeddings(self.parts.rule.cut(*image.whole)) for image in images]
        if len(marks) != sum(counts):
            said = f"image: {sum(counts)} embeddings of {len(images)} images, and {len(marks)} placeholders"
            raise InvalidParameterError(said, "image")
        return np.split(marks, np.cumsum(counts)[:-1])
