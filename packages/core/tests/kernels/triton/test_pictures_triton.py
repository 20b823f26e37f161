# SPDX-License-Identifier: MIT
"""Models that see over the GPU's path: towers and steps with pictures by the Triton kernels equal those in torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from candle_vllm.core import EngineConfig
from candle_vllm.core.assembly.model import load_model
from candle_vllm.core.devices import CPU
from candle_vllm.core.kernels import dispatch
from packages.core.tests.models.sight import answers_of_a_gpu, answers_op_by_op, require_same
from packages.core.tests.models.test_qwen_vl import KINDS, ONE, PICTURES, write
from packages.core.tests.models.test_sight_families import ROWS, write_sight
from tests.common_run import few

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
WIDTH = 40  # of towers: heads of 20, no power of two, as of 80 in those that are published


@pytest.mark.parametrize("name", few([*KINDS, *ROWS], "qwen3_vl", "Gemma 3"))
def test_answers_equal_those_in_torch(
    name: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in KINDS:
        folder = write(tmp_path, name, **{"embed_dim" if name == "qwen2_vl" else "hidden_size": WIDTH})
        asked = [(f"{ONE}?", PICTURES[3:])]
    else:
        folder, asked = write_sight(tmp_path, name), [(f"{ROWS[name].asks}?", PICTURES[3:])]
    config = EngineConfig(model=str(folder), op_by_op=True, dtype="f32")
    loaded = load_model(config, device, lambda *_: None)
    found, _ = answers_of_a_gpu(loaded, asked, graphs=False, tokens=3)
    with monkeypatch.context() as patched:
        patched.setattr(dispatch, "interpreted", lambda: False)
        plain = load_model(config, CPU, lambda *_: None)
        require_same(found, answers_op_by_op(plain, asked, tokens=3))
