# SPDX-License-Identifier: MIT
"""Pictures of waiting requests become embeddings (before step 4): encoded once, in pieces between steps, and kept.

A sequence with pictures begins when all of theirs are there; others pass it meanwhile. What is encoded belongs to the
pixels: requests with the same picture share it, one after the other too, as long as the bound lets it stay.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Generator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.engine.step.sequence import Sequence
from candle_vllm.core.vision.inputs import ImageInput

Encoding = Generator[None, None, NDArray[np.float32]]


class TowerRunner(Protocol):
    """Runs a tower."""

    fatal: tuple[type[Exception], ...]
    """See `ModelRunner`."""

    def embeddings(self, tiles: NDArray[np.uint8]) -> Encoding:
        """Embeddings [N * count, text size] of tiles [N, h, w, 3]; comes back now and then, that others may go on."""
        ...


class ImageStore:
    """The embeddings that sequences wait for or use, and those that may be used again.

    Args:
        runner: makes them.
        most_bytes: of those that nobody uses at the moment.
    """

    def __init__(self, runner: TowerRunner, most_bytes: int) -> None:
        self._runner = runner
        self._most_bytes = most_bytes
        self._made: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()  # the one used last stands last
        self._bytes = 0
        self._wanted: OrderedDict[bytes, ImageInput] = OrderedDict()
        self._users: Counter[bytes] = Counter()
        self._encoding: tuple[bytes, Encoding] | None = None
        self.failures: dict[bytes, Exception] = {}  # of pictures that somebody still waits for
        self.num_encoded = self.num_reused = self.num_failed = 0
        self.seconds = 0.0  # of encoding

    @property
    def works(self) -> bool:
        """Whether `work` has something to do."""
        return self._encoding is not None or bool(self._wanted)

    def add(self, sequence: Sequence) -> None:
        """A sequence waits for its pictures."""
        for image in sequence.images:
            key = image.given.key
            self._users[key] += 1
            if key in self._made:
                self._made.move_to_end(key)
                self.num_reused += 1
            elif self._encoding is None or self._encoding[0] != key:
                self._wanted.setdefault(key, image.given)

    def is_ready(self, sequence: Sequence) -> bool:
        """Whether all pictures of a sequence are there; they are its own from then on."""
        for image in sequence.images:
            if image.rows is None:
                image.rows = self._made.get(image.given.key)
        return all(image.rows is not None for image in sequence.images)

    def failure(self, sequence: Sequence) -> Exception | None:
        """Why a sequence's pictures cannot be had."""
        return next(
            (self.failures[image.given.key] for image in sequence.images if image.given.key in self.failures), None
        )

    def ended(self, sequence: Sequence) -> None:
        """A sequence is over, or was given up."""
        for image in sequence.images:
            key = image.given.key
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
                self._wanted.pop(key, None)
                self.failures.pop(key, None)
                if self._encoding is not None and self._encoding[0] == key:
                    self._encoding[1].close()
                    self._encoding = None
        self._shrink()

    def work(self) -> None:
        """Encodes a piece of what has waited longest."""
        if self._encoding is None:
            if not self._wanted:
                return
            key, given = self._wanted.popitem(last=False)
            self._encoding = key, self._runner.embeddings(np.frombuffer(given.tiles, np.uint8).reshape(*given.shape, 3))
        key, encoding = self._encoding
        begun = time.perf_counter()
        try:
            next(encoding)
        except StopIteration as done:
            self._encoding = None
            self._made[key] = done.value
            self._bytes += done.value.nbytes
            self.num_encoded += 1
            self._shrink()
        except self._runner.fatal:
            raise
        except Exception as error:  # of this picture alone
            self._encoding = None
            self.num_failed += 1
            self.failures[key] = error
        finally:
            self.seconds += time.perf_counter() - begun

    def _shrink(self) -> None:
        """Forgets what was used longest ago and has no users, down to the bound."""
        for key in list(self._made):
            if self._bytes <= self._most_bytes:
                return
            if key not in self._users:
                self._bytes -= self._made.pop(key).nbytes
