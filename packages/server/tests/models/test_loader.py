# SPDX-License-Identifier: MIT
"""What a model is given where others are loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from candle_vllm.core import devices, memory
from candle_vllm.core.errors import NoMemoryError
from candle_vllm.core.testing.toy_model import write_toy_model
from candle_vllm.server.models.loader import LEAST_CACHE, check_model, room_beside
from candle_vllm.server.settings import Settings
from packages.core.tests.toy_encoder import write_toy_encoder


def _beside(device: str, kv_cache_bytes: int, weight_bytes: int = 0) -> Any:
    info = SimpleNamespace(device=device, kv_cache_bytes=kv_cache_bytes, index_bytes=0, weight_bytes=weight_bytes)
    return [SimpleNamespace(engine=SimpleNamespace(model_info=info), memory=kv_cache_bytes)]


def test_a_cache_beside_others_is_for_models_that_have_one(tmp_path: Path) -> None:
    beside = _beside("cpu", kv_cache_bytes=1 << 20)
    decoder, encoder = write_toy_model(tmp_path / "decoder"), write_toy_encoder(tmp_path / "encoder")
    assert room_beside(Settings(model=str(decoder), device="cpu"), beside)["kv_cache_memory"] >= LEAST_CACHE
    assert room_beside(Settings(model=str(encoder), device="cpu"), beside) == {}


def test_an_encoder_needs_no_memory_for_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda _: 300 << 20)
    encoder = write_toy_encoder(tmp_path / "encoder")
    check_model(Settings(model=str(encoder), device="cpu"), _beside("cpu", 0))


def test_models_on_a_gpu_free_no_memory_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda _: 0)
    settings = Settings(model=str(write_toy_model(tmp_path)), device="cpu")
    check_model(settings, _beside("cpu", 0, 2 << 30))
    with pytest.raises(NoMemoryError, match="and 0 MiB would be left"):
        check_model(settings, _beside("cuda:0", 2 << 30, 2 << 30))
    monkeypatch.setattr(devices, "choose_device", lambda _: devices.Device("cuda:0"))  # which may be one of several
    check_model(settings, _beside("cuda:0", 0))


def test_caches_on_a_gpu_take_no_memory_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda _: 2 << 30)
    settings = Settings(model=str(write_toy_model(tmp_path)), device="cpu")
    assert room_beside(settings, _beside("cuda:0", 64 << 30))["kv_cache_memory"] >= LEAST_CACHE


def test_a_model_on_a_gpu_leaves_no_memory_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda _: 1 << 20)
    settings = Settings(model=str(write_toy_model(tmp_path)), device="cpu")
    with pytest.raises(NoMemoryError, match="and 1 MiB would be left without any other model: choose a smaller quant"):
        check_model(settings, _beside("cuda:0", 64 << 30))
    with pytest.raises(NoMemoryError, match="any other model: lower --mem, or choose a smaller quantisation"):
        check_model(dataclasses.replace(settings, mem=64), _beside("cuda:0", 64 << 30))
