# SPDX-License-Identifier: MIT
"""What loading leaves as it found it."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from candle_vllm.core import EngineConfig, ModelNotFoundError
from candle_vllm.core.assembly.model import LoadedModel, load_model
from candle_vllm.core.testing.toy_model import write_toy_model


def load(model: Path) -> LoadedModel:
    return load_model(EngineConfig(model=str(model)), torch.device("cpu"), lambda *_: None)


def test_the_cycle_collector_is_as_before_whether_loading_works_or_fails(tmp_path: Path) -> None:
    good = write_toy_model(tmp_path / "good")
    try:
        for running in (True, False):
            (gc.enable if running else gc.disable)()
            assert load(good).name == "good"
            assert gc.isenabled() == running
            with pytest.raises(ModelNotFoundError):
                load(tmp_path / "nothing.gguf")
            assert gc.isenabled() == running
    finally:
        gc.enable()
