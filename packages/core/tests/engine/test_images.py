# SPDX-License-Identifier: MIT
"""Pictures on their way to embeddings: who shares them, what stays, and what becomes of those that fail or go away."""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners.images import Encoding, ImageStore
from candle_vllm.core.engine.step.sequence import PlacedImage, Sequence
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.vision.inputs import ImageInput


class Tower:
    """Three pieces for each picture; one of zeros fails in the second."""

    fatal: tuple[type[Exception], ...] = (MemoryError,)

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.closed = 0

    def embeddings(self, tiles: Collection[NDArray[np.uint8]], whole: tuple[int, int] = (0, 0)) -> Encoding:
        del whole
        shade = int(next(iter(tiles))[0, 0, 0])
        self.begun.append(shade)
        try:
            yield
            if not shade:
                raise ValueError("zeros")
            yield
        except GeneratorExit:
            self.closed += 1
            raise
        return np.full((len(tiles), 8), shade, np.float32)


def image(shade: int, tiles: int = 1) -> ImageInput:
    return ImageInput(key=bytes([shade] * 32), tiles=bytes([shade] * 12 * tiles), sizes=((2, 2),) * tiles, whole=(2, 2))


def sequence(*shades: int) -> Sequence:
    made = Sequence(GenerationRequest(request_id="r", prompt_token_ids=[1] * 9, params=SamplingParams()), 0, 0)
    made.images = tuple(PlacedImage(image(shade), [place]) for place, shade in enumerate(shades))
    return made


def steps(store: ImageStore, *waiting: Sequence) -> int:
    count = 0
    while store.work(waiting):
        assert count < 100
        count += 1
    return count


@pytest.fixture
def tower() -> Tower:
    return Tower()


def test_a_picture_is_encoded_once_in_pieces(tower: Tower) -> None:
    store, first, second = ImageStore(tower, 1 << 20), sequence(1, 2), sequence(2, 1, 1)
    store.add(first)
    store.add(second)
    assert not store.is_ready(first)
    assert steps(store, first, second) == 6
    assert store.is_ready(first)
    assert store.is_ready(second)
    assert tower.begun == [1, 2]
    assert [float(each.rows[0, 0]) for each in second.images] == [2, 1, 1]
    third = sequence(1)
    store.add(third)
    assert store.is_ready(third)
    assert (store.stats()["images_encoded"], store.stats()["images_reused"]) == (2, 1)
    assert not store.work([third])


def test_what_was_used_longest_ago_goes_but_nothing_that_is_used(tower: Tower) -> None:
    store, held = ImageStore(tower, 2 * 32), sequence(1, 2, 3)
    store.add(held)
    steps(store, held)
    assert store.is_ready(held)  # three of them, though there is room for two
    store.left(held)
    assert not any(each.rows is not None for each in held.images)
    for shade, known in ((2, True), (3, True), (1, False)):
        each = sequence(shade)
        store.add(each)
        assert store.is_ready(each) is known
        store.left(each)
        assert not store.work([])  # nobody wants the first any more


def test_images_are_encoded_in_the_order_of_admission_and_not_far_ahead(tower: Tower) -> None:
    store, sequences = ImageStore(tower, 2 * 32), [sequence(1, 2, 3), sequence(), sequence(4), sequence(5, 6)]
    for each in reversed(sequences):
        store.add(each)
    steps(store, *sequences)
    assert tower.begun == [1, 2, 3]  # the first gets all of its own, though there is room for two
    store.left(sequences[0])  # its prompt is computed
    steps(store, *sequences[1:])
    assert tower.begun == [1, 2, 3, 4, 5, 6]
    more, better = sequence(7), sequence(8)
    store.add(more)
    store.add(better)
    assert not store.work([*sequences[1:], more])
    steps(store, better, *sequences[1:], more)
    assert tower.begun[6:] == [8]
    adapter: Any = SimpleNamespace(alora=None)
    more.adapters = ((adapter, 1.0),)  # a preempted one, whose adapters a sequence before it may wait for
    steps(store, better, *sequences[1:], more)
    assert tower.begun[6:] == [8, 7]


def test_others_of_a_request_hold_no_images_back(tower: Tower) -> None:
    """They may wait until another request has its share of the batch."""
    store, first, second, third = ImageStore(tower, 0), sequence(1), sequence(2), sequence(3)
    first.index = 1
    for each in (first, second, third):
        store.add(each)
    steps(store, first, second, third)
    assert tower.begun == [1, 2]


def test_a_preempted_sequence_asks_again(tower: Tower) -> None:
    store, first, second = ImageStore(tower, 0), sequence(1), sequence(1)
    for each in (first, second, first):  # the first was preempted before its prompt was computed
        store.add(each)
    steps(store, first, second)
    assert store.is_ready(first)
    store.left(first)
    store.left(first)
    assert store.is_ready(second)
    store.left(second)
    store.add(first)  # it was preempted after its prompt was computed, and nothing of it is left
    assert not store.is_ready(first)
    steps(store, first)
    assert store.is_ready(first)
    assert tower.begun == [1, 1]
    assert not store.stats()["images_reused"]


def test_who_goes_away_is_encoded_for_no_more(tower: Tower) -> None:
    store, gone, stays = ImageStore(tower, 1 << 20), sequence(1, 2), sequence(2)
    store.add(gone)
    store.add(stays)
    store.work([gone, stays])
    store.left(gone)
    assert tower.closed == 1
    steps(store, stays)
    assert tower.begun == [1, 2]
    assert store.is_ready(stays)


def test_a_picture_that_fails_fails_alone(tower: Tower) -> None:
    store, wrong, right = ImageStore(tower, 1 << 20), sequence(1, 0), sequence(1)
    store.add(wrong)
    store.add(right)
    steps(store, wrong, right)
    assert str(store.failure(wrong)) == "zeros"
    assert store.failure(right) is None
    assert store.is_ready(right)
    assert not store.is_ready(wrong)
    store.left(wrong)
    assert not store.failures
    again = sequence(0)  # is tried again
    store.add(again)
    assert store.work([again])


def test_blocks_are_known_by_what_they_show() -> None:
    def hashes(*shades: int, at: int = 2) -> list[bytes]:
        made = sequence()
        made.images = tuple(
            PlacedImage(image(shade, 2), [at + 2 * place, at + 2 * place + 1]) for place, shade in enumerate(shades)
        )
        return made.hashes(3)

    plain, one, other = hashes(), hashes(1, 2), hashes(1, 3)
    assert len({*plain, *one}) == 6  # the picture stands in the first block already
    assert one[0] == other[0]
    assert one[1] != other[1]
    assert hashes(1, at=3)[0] == plain[0]
    assert hashes(1, at=2)[1] != hashes(1, at=3)[1]
    assert hashes(1, 2) == one
