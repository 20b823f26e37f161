# SPDX-License-Identifier: MIT
"""Encode and cache the images of waiting requests, in parts between steps (before step 4 of a request's life).

A sequence with images is admitted when all its images are encoded; until then, other sequences are admitted before it.
Embeddings are cached by the image's `key`, so requests with the same image share them. A sequence uses them until its
prompt is computed. Images are encoded in the order of admission; while the cache is full, only those of the first
waiting sequence.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Collection, Generator, Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.engine.step.sequence import Sequence
from candle_vllm.core.vision.inputs import ImageInput

Encoding = Generator[None, None, NDArray[np.float32]]


class TowerRunner(Protocol):
    """Runs a vision tower."""

    fatal: tuple[type[Exception], ...]
    """See `ModelRunner`."""

    def embeddings(self, tiles: Collection[NDArray[np.uint8]], whole: tuple[int, int] = (0, 0)) -> Encoding:
        """Encode tiles [h, w, 3] to rows of `EmbeddedRows.vectors`; yields between parts, so that steps can run.

        `whole` is the height and width of the image before it was cut, for encoders that join the tiles of a grid.
        """


def tiles_of(image: ImageInput) -> list[NDArray[np.uint8]]:
    """Return the tiles of an image, each [h, w, 3]."""
    ends = np.cumsum([3 * height * width for height, width in image.sizes])
    parts = np.split(np.frombuffer(image.tiles, np.uint8), ends[:-1])
    return [part.reshape(*size, 3) for part, size in zip(parts, image.sizes)]


class ImageStore:
    """Image embeddings that sequences wait for or use, and a cache of unused embeddings.

    Args:
        runner: encodes images.
        most_bytes: bytes of all embeddings above which embeddings without a sequence are evicted, and only the first
            waiting sequence with images has its images encoded.
    """

    def __init__(self, runner: TowerRunner, most_bytes: int) -> None:
        self._runner = runner
        self._most_bytes = most_bytes
        self._made: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()  # least recently used first
        self._bytes = 0
        self._wanted: set[bytes] = set()
        self._users: dict[bytes, set[Sequence]] = {}
        self._encoding: tuple[bytes, Encoding] | None = None
        self.failures: dict[bytes, Exception] = {}  # errors of images that sequences still wait for
        self._counts = Counter(images_encoded=0, images_reused=0, image_failures=0)
        self._seconds = 0.0  # total time of encoding

    def add(self, sequence: Sequence) -> None:
        """Request the embeddings of a sequence's images: of a new sequence, or of one that was preempted."""
        for image in sequence.images:
            key = image.given.key
            self._users.setdefault(key, set()).add(sequence)
            if key in self._made:
                self._made.move_to_end(key)
                self._counts["images_reused"] += image.rows is None
            elif self._encoding is None or self._encoding[0] != key:
                self._wanted.add(key)

    def is_ready(self, sequence: Sequence) -> bool:
        """Assign encoded embeddings to a sequence's images; return whether all are encoded."""
        for image in sequence.images:
            if image.rows is None:
                image.rows = self._made.get(image.given.key)
        return all(image.rows is not None for image in sequence.images)

    def failure(self, sequence: Sequence) -> Exception | None:
        """Return the error of a sequence's image that could not be encoded; None if none failed."""
        return next(
            (self.failures[image.given.key] for image in sequence.images if image.given.key in self.failures), None
        )

    def left(self, sequence: Sequence) -> None:
        """Drop a sequence whose prompt is computed, or that was aborted; no effect on one that was dropped before."""
        for image in sequence.images:
            key, image.rows = image.given.key, None
            users = self._users.get(key, set())
            users.discard(sequence)
            if not users and self._users.pop(key, None) is not None:
                self._wanted.discard(key)
                self.failures.pop(key, None)
                if self._encoding is not None and self._encoding[0] == key:
                    self._encoding[1].close()
                    self._encoding = None
        self._shrink()

    def work(self, waiting: Iterable[Sequence]) -> bool:
        """Encode the next part of an image; return whether there was one to encode.

        `waiting` are the waiting sequences in the order of admission.
        """
        if self._encoding is None:
            given = self._next(waiting) if self._wanted else None
            if given is None:
                return False
            self._wanted.remove(given.key)
            self._encoding = given.key, self._runner.embeddings(tiles_of(given), given.whole)
        key, encoding = self._encoding
        begun = time.perf_counter()
        try:
            next(encoding)
        except StopIteration as done:
            self._encoding = None
            self._made[key] = done.value
            self._bytes += done.value.nbytes
            self._counts["images_encoded"] += 1
            self._shrink()
        except self._runner.fatal:
            raise
        except Exception as error:  # only this image has failed
            self._encoding = None
            self._counts["image_failures"] += 1
            self.failures[key] = error
        finally:
            self._seconds += time.perf_counter() - begun
        return True

    def _next(self, waiting: Iterable[Sequence]) -> ImageInput | None:
        """Return the image to encode next; None if the limit allows none.

        The first sequence with images may exceed the limit; a later one of the same request (`index`) does not count as
        the first, because it may wait for its request's share of the batch. A preempted sequence with adapters may
        exceed it too: the first may wait for the memory of these adapters.
        """
        allowed = True
        for sequence in waiting:
            if not (sequence.images and (allowed or sequence.adapters)):
                continue
            for image in sequence.images:
                if image.given.key in self._wanted:
                    return image.given
            allowed = allowed and (sequence.index > 0 or self._bytes <= self._most_bytes)
        return None

    def stats(self) -> dict[str, float]:
        """Return the statistics of images, by field of `EngineStats`."""
        return {**self._counts, "image_seconds": self._seconds}

    def _shrink(self) -> None:
        """Evict the least recently used embeddings without a sequence, until the limit is met."""
        for key in list(self._made):
            if self._bytes <= self._most_bytes:
                return
            if key not in self._users:
                self._bytes -= self._made.pop(key).nbytes
