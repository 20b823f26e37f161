# SPDX-License-Identifier: MIT
"""Every test of this folder leaves no task behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from packages.responses.tests.conversation.conversation_fakes import other_tasks


@pytest.fixture(autouse=True)
async def _nothing_runs_on() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    assert not other_tasks() - before
