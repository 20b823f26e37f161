# SPDX-License-Identifier: MIT
"""Stores of responses in memory, in an SQLite file and in a real PostgreSQL, with a clock that stands still."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from candle_vllm.responses.api.response_store import ResponseStore
from candle_vllm.responses.store.backend import StoreOptions
from tests.postgres_server import new_database, postgres_server


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server on loopback, without the database; it ends with the tests."""
    with postgres_server() as url:
        yield url


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind."""
    if request.param == "postgresql":
        return new_database(request.getfixturevalue("postgres"))
    return "memory" if request.param == "memory" else f"sqlite:///{tmp_path}/responses.sqlite"


@pytest.fixture(params=["sqlite", "postgresql"])
def shared_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind that several servers can open."""
    if request.param == "postgresql":
        return new_database(request.getfixturevalue("postgres"))
    return f"sqlite:///{tmp_path}/responses.sqlite"


@pytest_asyncio.fixture
async def opener(clock: Clock) -> AsyncIterator[Any]:
    """Opens stores that end with the test: `await opener(url, max_records=3)`."""
    stores: list[ResponseStore] = []

    async def opener(url: str, **options: Any) -> ResponseStore:
        store = ResponseStore(StoreOptions(url=url, **options), clock)
        stores.append(store)
        await store.backend()
        assert store._purging is not None
        await store._purging.close()  # it is purged when a test says so
        return store

    yield opener
    for store in stores:
        await store.close()
