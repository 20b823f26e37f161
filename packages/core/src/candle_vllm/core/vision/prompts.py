# SPDX-License-Identifier: MIT
"""Pictures in prompts: what stands for them among the tokens, and what goes to the engine with these (step 3)."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidParameterError, PromptTooLongError
from candle_vllm.core.shown import ShownStruct
from candle_vllm.core.vision.inputs import ImageInput
from candle_vllm.core.vision.pictures import LIMITS, Picture, PictureLimits, picture_of
from candle_vllm.core.vision.preprocessing import Cut, Rule


def spans_of(places: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Where runs of neighbours among rising numbers begin and end."""
    ends = np.flatnonzero(np.diff(places) > 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(places, ends)]


class Sighted(ShownStruct, frozen=True, kw_only=True):
    """What is to be known of a tower by who has the texts.

    Attributes:
        family: the file of its family.
        rule: how pictures become tiles.
        mark: the token that stands for each of a picture's embeddings.
        asks: the token that a template writes for a picture; the same, or another.
        written: all that it writes for one, as text.
        cell: pixels of the side of what is one embedding.
        whole: the embeddings of a tile see each other.
        turned: they are turned by their time, row and column.
        blank: the token that stands for a mark where tokens are looked up; None for the mark itself.
    """

    family: str
    rule: Rule
    mark: int
    asks: int
    written: str = ""
    cell: int
    whole: bool = False
    turned: bool = False
    blank: int | None = None

    def embeddings(self, cut: Cut) -> int:
        """Of a tile of a picture that is cut so."""
        return math.prod(cut.cells(self.cell))


@dataclasses.dataclass(frozen=True)
class Sight:
    """How a model sees pictures.

    Attributes:
        parts: of its tower.
        words: the tokens of a picture that is cut so.
        breaks: how many line breaks a token is, of those that are nothing else; with any, a single one has a token.
        limits: what a picture may be.
        most: pictures of a prompt.
        one_at_a_time: held while a picture is decoded.
    """

    parts: Sighted
    words: Callable[[Cut], Sequence[int]]
    breaks: Mapping[int, int] = dataclasses.field(default_factory=dict)
    limits: PictureLimits = LIMITS
    most: int = 64
    one_at_a_time: threading.Lock = dataclasses.field(default_factory=threading.Lock, compare=False, repr=False)

    def look(
        self, ids: Sequence[int], images: Sequence[object], names: Sequence[str] = (), most_tokens: int | None = None
    ) -> tuple[list[int], tuple[ImageInput, ...]]:
        """A prompt with what stands for its pictures, and these.

        One picture is decoded at a time, whoever asks, for a large one takes hundreds of megabytes meanwhile.

        Args:
            ids: the prompt, with one mark for each picture.
            images: pictures as `picture_of` takes them.
            names: what messages call each; "image" where it is not said.
            most_tokens: of the prompt; what is longer is refused before the next picture is decoded.

        Raises:
            InvalidParameterError: one cannot be used, or there are not as many as marks.
            PromptTooLongError: there is no room for them.
        """
        if len(images) > self.most:
            raise InvalidParameterError(f"image: {len(images)} pictures; a prompt may have {self.most}", "image")
        marks = (ids := list(ids)).count(self.parts.asks)
        if marks != len(images):
            raise InvalidParameterError(
                f"image: {len(images)} pictures, and {marks} marks for them in the prompt; a picture needs one each",
                "image",
            )
        expanded: list[int] = []
        inputs: list[ImageInput] = []
        made: dict[bytes, ImageInput] = {}
        begin = 0
        for image, name in zip(images, names or ["image"] * len(images), strict=True):
            end = ids.index(self.parts.asks, begin)
            self._join(expanded, ids[begin:end])
            begin = end + 1
            with self.one_at_a_time:
                picture = picture_of(image, self.limits, name)
                cut = self.parts.rule.cut(picture.height, picture.width)
                least = len(expanded) + cut.tiles * self.parts.embeddings(cut)
                if most_tokens is None or least < most_tokens:  # else there is no use in writing them down
                    self._join(expanded, self.words(cut))
                    least = len(expanded)
                if most_tokens is not None and least >= most_tokens:
                    said = f"{name}: with it the prompt has {least} tokens and more"
                    raise PromptTooLongError(f"{said}; the maximum context length is {most_tokens} tokens", name)
                if picture.digest not in made:
                    made[picture.digest] = self._input(picture)
            inputs.append(made[picture.digest])
        self._join(expanded, ids[begin:])
        return expanded, tuple(inputs)

    def _join(self, ids: list[int], more: Sequence[int]) -> None:
        """Puts tokens behind others; line breaks that meet become the tokens of one run of them, as in one text."""
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
        return ImageInput(key=key, tiles=tiles.tobytes(), shape=(tiles.shape[0], tiles.shape[1], tiles.shape[2]))

    def grid(self, image: ImageInput) -> tuple[int, int] | None:
        """Rows and columns of a picture's embeddings where these are turned by them; None elsewhere."""
        return (image.shape[1] // self.parts.cell, image.shape[2] // self.parts.cell) if self.parts.turned else None

    def places(self, ids: Sequence[int], images: Sequence[ImageInput]) -> list[NDArray[np.int64]]:
        """Where in a prompt the embeddings of each picture stand.

        Raises:
            InvalidParameterError: there are not as many marks as embeddings, or those of one that is turned by its rows
                and columns do not stand side by side.
        """
        marks = np.flatnonzero(np.asarray(ids) == self.parts.mark)
        cell = self.parts.cell
        counts = [image.shape[0] * (image.shape[1] // cell) * (image.shape[2] // cell) for image in images]
        if len(marks) != sum(counts):
            raise InvalidParameterError(
                f"image: {sum(counts)} embeddings of {len(images)} pictures, and {len(marks)} marks for them", "image"
            )
        found = np.split(marks, np.cumsum(counts)[:-1])
        if self.parts.turned and any(len(each) and each[-1] - each[0] >= len(each) for each in found):
            raise InvalidParameterError("image: the marks of a picture must stand side by side in the prompt", "image")
        return found
