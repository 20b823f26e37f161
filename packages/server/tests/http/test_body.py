# SPDX-License-Identifier: MIT
"""Waiting for an answer while watching the connection: what comes too late is given back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from candle_vllm.server.http.body import unless_disconnected
from candle_vllm.server.http.errors import ClientGone


async def _never() -> Any:
    await asyncio.Event().wait()


async def _gone() -> Any:
    return {"type": "http.disconnect"}


async def test_an_answer_is_returned() -> None:
    assert await unless_disconnected(asyncio.sleep(0, "x"), _never) == "x"


async def test_a_disconnect_cancels_what_is_waited_for() -> None:
    working = asyncio.create_task(asyncio.sleep(10))
    with pytest.raises(ClientGone):
        await unless_disconnected(working, _gone)
    assert working.cancelled()


@pytest.mark.parametrize("deferred", [False, True])
async def test_what_came_while_the_waiting_was_cancelled_is_given_back(deferred: bool) -> None:
    dropped, begun = list[str](), asyncio.Event()

    async def stubborn() -> str:
        begun.set()
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            return "late"
        return "never"

    async def later(value: str) -> None:
        await asyncio.sleep(0)
        dropped.append(value)

    waiting = asyncio.create_task(unless_disconnected(stubborn(), _never, later if deferred else dropped.append))
    await begun.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert dropped == ["late"]
