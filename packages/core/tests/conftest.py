# SPDX-License-Identifier: MIT
"""Models that several tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from candle_vllm.core.testing.toy_model import write_toy_model


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama."""
    return write_toy_model(tmp_path_factory.mktemp("toy"))
