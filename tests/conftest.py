"""Models that the tests of this folder share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from candle_vllm.core.testing.toy_model import toy_config, write_toy_model

sys.path.append(str(Path(__file__).parent))  # for live_server; --import-mode=importlib does not


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama and a context of 2048 tokens."""
    return write_toy_model(tmp_path_factory.mktemp("toy"), toy_config(max_position_embeddings=2048))
