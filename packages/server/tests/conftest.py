"""A real server on loopback, in a thread, around a scripted engine."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))  # --import-mode=importlib does not

from running_server import Running
from server_fakes import PacedEngine

from candle_vllm.server.model_manager import ModelManager
from candle_vllm.server.settings import Settings


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Starts servers that end with the test: `start(engine, api_key=("k",))`."""
    with contextlib.ExitStack() as stack:

        def start(engine: PacedEngine | ModelManager | None = None, **settings: Any) -> Running:
            running = Running(engine or PacedEngine(), Settings(port=0, shutdown_timeout=1, **settings))
            stack.callback(running.stop)
            return running

        yield start
