# SPDX-License-Identifier: MIT
"""Admission: places are bounded and shared fairly, and every one comes back."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from candle_vllm.openai.fair_threads import asker
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.models.admission import Admission, Place
from tests.waiting import PATIENCE


async def _settled() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_requests_enter_until_the_places_are_taken() -> None:
    admission = Admission(2, 10)
    first, second = await admission.enter("", 1), await admission.enter("", 1)
    third = asyncio.create_task(admission.enter("", 1))
    await _settled()
    assert (admission.running, admission.waiting, third.done()) == (2, 1, False)
    assert [(one.key, one.sequences, one.priority) for one in admission.queue] == [("none", 1, 0)]
    first.leave()
    first.leave()  # once is enough
    assert (await third).sequences == 1
    assert (admission.running, admission.waiting, admission.queue) == (2, 0, [])
    second.leave()


async def test_a_free_place_goes_to_the_key_that_has_least() -> None:
    admission = Admission(2, 1000)
    places = [await admission.enter("busy", 1) for _ in range(2)]
    order: list[str] = []

    async def take(key: str) -> Place:
        place = await admission.enter(key, 1)
        order.append(key)
        return place

    tasks = [asyncio.create_task(take(key)) for key in ["busy"] * 5 + ["other"] * 2]
    await _settled()
    for place in places:
        place.leave()
    await _settled()
    assert order == ["busy", "other"] or order == ["other", "busy"]
    for task in tasks:
        (await task).leave()
    assert admission.running == admission.waiting == 0


async def test_lower_priorities_enter_first() -> None:
    admission = Admission(1, 100)
    place = await admission.enter("", 1)
    order: list[int] = []

    async def take(priority: int) -> None:
        taken = await admission.enter("", 1, priority)
        order.append(priority)
        taken.leave()

    tasks = [asyncio.create_task(take(priority)) for priority in (5, 0, -3, 5, 0)]
    await _settled()
    place.leave()
    await asyncio.gather(*tasks)
    assert order == [-3, 0, 0, 5, 5]


async def test_a_request_of_more_than_half_of_the_capacity_counts_as_half_and_is_not_overtaken() -> None:
    admission = Admission(4, 100)
    small = [await admission.enter("", 1) for _ in range(3)]
    big = asyncio.create_task(admission.enter("", 9))
    await _settled()
    late = asyncio.create_task(admission.enter("", 1))
    await _settled()
    assert not big.done()
    assert not late.done()
    small[0].leave()
    await big
    assert admission.running == 11
    await _settled()
    assert not late.done()
    small[1].leave()
    await late


async def test_too_many_unfinished_are_refused_with_a_time() -> None:
    admission = Admission(1, 3, max_per_key=2)
    places = [await admission.enter("a", 1)]
    waiting = asyncio.create_task(admission.enter("a", 1))
    await _settled()
    with pytest.raises(HttpError) as refusal:
        await admission.enter("a", 1)
    assert refusal.value.status == 429
    assert 1 <= int(refusal.value.headers["retry-after"]) <= 60
    other = asyncio.create_task(admission.enter("b", 1))
    await _settled()
    with pytest.raises(HttpError) as refusal:
        await admission.enter("c", 1)
    assert refusal.value.status == 503
    places[0].leave()
    (await waiting).leave()
    (await other).leave()
    (await admission.enter("c", 50)).leave()  # alone, any size may come


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5), st.sampled_from(["enter", "leave", "cancel"]))))
def test_nothing_is_lost_whatever_comes_and_goes(steps: list[tuple[str, int, str]]) -> None:
    async def run() -> None:
        admission = Admission(4, 30)
        tasks: list[asyncio.Task[Place]] = []
        for number, (key, count, what) in enumerate(steps):
            if what == "enter":
                tasks.append(asyncio.create_task(admission.enter(key, count)))
            elif tasks:
                task = tasks[number % len(tasks)]
                if what == "cancel":
                    task.cancel()
                elif task.done() and not task.cancelled() and not task.exception():
                    task.result().leave()
            if number % 3:
                await asyncio.sleep(0)
            assert admission.running >= 0
            assert admission.waiting >= 0
        for _ in range(len(tasks) + 1):
            await asyncio.sleep(0)
            for task in tasks:
                if task.done() and not task.cancelled() and not task.exception():
                    task.result().leave()
        assert all(task.done() for task in tasks)
        assert (admission.running, admission.waiting) == (0, 0)

    asyncio.run(run())


async def test_one_key_has_half_of_the_queue() -> None:
    """Unless the operator says how much it has, and where there are several keys."""
    for most, key in ((None, "a"), (6, "a"), (None, "")):
        admission = Admission(1, 8, most)
        asker.set(key)
        allowed = {None: 4 if key else 8, 6: 6}[most]
        tasks = [asyncio.create_task(admission.enter(key, 1)) for _ in range(allowed)]
        await _settled()
        with pytest.raises(HttpError) as refusal:
            await asyncio.wait_for(admission.enter(key, 1), PATIENCE)
        assert refusal.value.status == (429 if key else 503)
        if key:
            tasks.append(asyncio.create_task(admission.enter("b", 1)))
        await _settled()
        admission.close()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_request_of_very_many_texts_does_not_fill_the_queue() -> None:
    """It counts as its share of the places, running or waiting: others are neither refused nor kept out."""
    admission = Admission(72, 1096)
    others = [await admission.enter("b", 1)]
    places = [await admission.enter("a", 2048)]
    others += [await asyncio.wait_for(admission.enter(key, 1), PATIENCE) for key in "abc" for _ in range(10)]
    for place in (*places, *others):
        place.leave()
    assert (admission.running, admission.waiting, admission._counted.total(), admission._taken) == (0, 0, 0, 0)
