# SPDX-License-Identifier: MIT
"""GGUF files with q, k and v in one matrix, as llama.cpp's converter writes them when it is asked to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from candle_vllm.core.assembly.adapter_base import adapter_base
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.loading.gguf import open_gguf
from candle_vllm.core.loading.source import model_files
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.gguf_export import CONVERTERS, Tensors, export_gguf
from packages.core.tests.models.tiny import eager_logits, error, recorded_logits, some_tokens, spread, write_tiny

TOKENS = some_tokens(24)
KINDS = ("Llama", "Ministral 3", "Qwen2", "Qwen3-MoE", "Gemma-3", "StableLM-2", "SmolLM3", "GLM-4-MoE", "gpt-oss",
         "Gemma-4", "Gemma-4 shared keys", "Laguna", "Step 3.5")  # fmt: skip


def fuse(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes the converter of a row's architecture fuse; returns the architecture."""
    architecture = str(ROWS[name].gguf)
    usual = CONVERTERS.get(architecture, lambda writer, config, tensors: tensors)

    def fused(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
        made = usual(writer, config, tensors)
        for layer in range(config["num_hidden_layers"]):
            for kind in ("weight", "bias"):
                names = [f"model.layers.{layer}.self_attn.{part}_proj.{kind}" for part in "qkv"]
                if all(each in made for each in names):  # a layer of Gemma 4 may have no v
                    made[f"blk.{layer}.attn_qkv.{kind}"] = np.concatenate([made.pop(each) for each in names])
        return made

    monkeypatch.setitem(CONVERTERS, architecture, fused)  # type: ignore[arg-type]
    return architecture


@pytest.mark.parametrize("name", KINDS)
def test_rows_of_one_matrix_are_q_k_and_v(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny(tmp_path / "source", ROWS[name].model_type, **ROWS[name].config)
    path = export_gguf(folder, tmp_path / "fused.gguf", fuse(name, monkeypatch))
    with open_gguf(path) as checkpoint:
        assert "blk.1.attn_qkv.weight" in checkpoint.tensors
        assert "blk.1.attn_q.weight" not in checkpoint.tensors
    plain = eager_logits(folder, TOKENS, [len(TOKENS)])
    assert error(eager_logits(path, TOKENS, [len(TOKENS)]), plain) < 1e-5


def test_quantised_rows_run_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny(tmp_path / "source", "llama", **ROWS["Llama"].config)
    apart = export_gguf(folder, tmp_path / "apart.gguf", "llama", quantization="Q8_0")
    fused = export_gguf(folder, tmp_path / "fused.gguf", fuse("Llama", monkeypatch), quantization="Q8_0")
    ours, wanted = (recorded_logits(path, TOKENS, [len(TOKENS)]) for path in (fused, apart))
    assert spread(ours, wanted) < 1e-6


@pytest.mark.parametrize("name", ["Llama", "Gemma-4", "Laguna", "Step 3.5"])
def test_adapters_of_one_matrix_have_the_heads_of_their_layer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny(tmp_path / "source", ROWS[name].model_type, **ROWS[name].config)
    path = str(export_gguf(folder, tmp_path / "fused.gguf", fuse(name, monkeypatch)))
    config = EngineConfig(model=path)
    base = adapter_base(model_files(config), config)
    with open_gguf(path) as checkpoint:
        stored = {key: one.shape[0] for key, one in checkpoint.tensors.items() if key.endswith("attn_qkv.weight")}
    assert len(stored) > 1
    for key, total in stored.items():
        spots = base.places.find(key, "gguf")
        rows = [base.places.rows(spot, total, "gguf") for spot in spots]
        assert [len(each) for each in rows] == [spot.shape[0] for spot in spots]
        assert [*np.sort(np.concatenate(rows))] == [*range(total)]
