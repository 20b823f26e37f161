# SPDX-License-Identifier: MIT
"""What a model is given where others are loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from candle_vllm.core.testing.toy_model import write_toy_model
from candle_vllm.server.models.loader import LEAST_CACHE, room_beside
from candle_vllm.server.settings import Settings
from packages.core.tests.toy_encoder import write_toy_encoder


def test_a_cache_beside_others_is_for_models_that_have_one(tmp_path: Path) -> None:
    info = SimpleNamespace(kv_cache_bytes=1 << 20, index_bytes=0)
    beside: Any = [SimpleNamespace(engine=SimpleNamespace(model_info=info))]
    decoder, encoder = write_toy_model(tmp_path / "decoder"), write_toy_encoder(tmp_path / "encoder")
    assert room_beside(Settings(model=str(decoder), device="cpu"), beside)["kv_cache_memory"] >= LEAST_CACHE
    assert room_beside(Settings(model=str(encoder), device="cpu"), beside) == {}
