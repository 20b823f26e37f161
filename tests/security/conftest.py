# SPDX-License-Identifier: MIT
"""Servers, engines and a watched network for the tests of this folder."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core import InferenceEngine
from tests.security.guarded_server import KEY, OPERATOR, Guarded, Watch, guarded


@pytest.fixture(scope="module")
def locked() -> Iterator[Guarded]:
    """A server with a client's key and an operator's key."""
    with guarded(api_key=(KEY,), management_key=(OPERATOR,)) as server:
        yield server


@pytest.fixture(scope="module")
def engine(toy_model: Path) -> Iterator[InferenceEngine]:
    """A real engine around a model of a few hundred kilobytes."""
    with InferenceEngine(str(toy_model), device="cpu", kv_cache_memory=32 << 20, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def real(engine: InferenceEngine) -> Iterator[Guarded]:
    """A server around the real engine."""
    with guarded(engine) as server:
        yield server


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Notes every name that is looked up and every address that is connected to, outside of this machine."""
    watch = Watch()
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def noted_connect(self: socket.socket, address: Any) -> Any:
        watch.note(address)
        return connect(self, address)

    def noted_look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        watch.note(host)
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket.socket, "connect", noted_connect)
    monkeypatch.setattr(socket, "getaddrinfo", noted_look_up)
    return watch
