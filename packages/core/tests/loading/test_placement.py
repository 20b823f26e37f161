# SPDX-License-Identifier: MIT
"""Which type a model computes in, where its GPU has no bfloat16, and what float16 is too small for."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from candle_vllm.core import ConfigError, EngineConfig, UnsupportedModelError
from candle_vllm.core.assembly import model as loading
from candle_vllm.core.assembly.encoder import open_model
from candle_vllm.core.assembly.placement import choose_placement, device_dtype
from candle_vllm.core.devices import CPU, Device
from candle_vllm.core.kernels import triton_build
from candle_vllm.core.layers.parameters import MatrixParameter, Placement
from candle_vllm.core.loading.source import model_files
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.toy_gguf import write_toy_gguf

GPU = Device("cuda:0")


def config(**settings: Any) -> EngineConfig:
    return EngineConfig(model="m", **settings)


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_build, "capability", lambda device: 75)


def test_turing_computes_in_float16(turing: None) -> None:
    assert device_dtype(config(), GPU) == "F16"
    assert device_dtype(config(dtype="f16"), GPU) == "F16"
    assert device_dtype(config(dtype="f32"), GPU) == "F32"
    with pytest.raises(
        ConfigError, match=r"bf16 needs compute capability 8.0 and cuda:0 has 7.5: .* f16 or f32"
    ) as caught:
        device_dtype(config(dtype="bf16"), GPU)
    assert caught.value.setting == "dtype"


@pytest.mark.parametrize("found", [80, 90, 120, triton_build.AMD])
def test_others_compute_in_bfloat16(found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_build, "capability", lambda device: found)
    assert device_dtype(config(), GPU) == device_dtype(config(dtype="bf16"), GPU) == "BF16"
    assert device_dtype(config(dtype="f16"), GPU) == "F16"


def test_the_cpu_asks_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_build, "capability", None)
    assert device_dtype(config(), CPU) == "F32"
    assert device_dtype(config(dtype="bf16"), CPU) == "BF16"


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3", "gemma3_text", "glm4"])
def test_activations_that_float16_is_too_small_for(
    model_type: str, turing: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, _ = opened(write_toy_model(tmp_path / "plain"), model_type)
    quantised, model = opened(write_toy_gguf(tmp_path / "q.gguf", toy_config(), quantization="Q4_0"), model_type)
    with caplog.at_level(logging.WARNING):
        assert choose_placement(config(), GPU, plain, model).dtype == "F32"
    assert f"activations of {model_type}" in caplog.text
    assert "runs in f32" in caplog.text
    with pytest.raises(ConfigError, match=f"activations of {model_type} .* set device='cpu', or dtype='f16'"):
        choose_placement(config(), GPU, quantised, model)
    caplog.clear()
    for checkpoint in (plain, quantised):
        with caplog.at_level(logging.WARNING):
            assert choose_placement(config(dtype="f16"), GPU, checkpoint, model).dtype == "F16"
        assert "ends with an error" in caplog.text
    usual = dataclasses.replace(model, model_type="llama")
    assert choose_placement(config(), GPU, quantised, usual).dtype == "F16"


def opened(path: Path, model_type: str) -> tuple[Any, Any]:
    """A checkpoint, and its configuration under another name."""
    settings = EngineConfig(model=str(path))
    found = open_model(model_files(settings), CPU)
    _, model = loading.describe_family(found.files, found.checkpoint, found.metadata)
    return found.checkpoint, dataclasses.replace(model, model_type=model_type)


def test_deterministic_is_refused_on_amd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoint, model = opened(write_toy_model(tmp_path / "plain"), "llama")
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert choose_placement(config(), GPU, checkpoint, model).dtype == "BF16"
    with pytest.raises(ConfigError, match="deterministic is not supported on AMD GPUs"):
        choose_placement(config(deterministic=True), GPU, checkpoint, model)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"])
def test_plain_weights_beyond_float16_are_refused_by_name(name: str, tmp_path: Path) -> None:
    """A number of 70,000 is one of bfloat16, and would be infinite."""
    folder = write_toy_model(tmp_path / "toy")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[name].view(-1)[3] = -70000.0
    save_file({key: value.bfloat16() for key, value in tensors.items()}, file)

    def load(dtype: str) -> None:
        settings = EngineConfig(model=str(folder), dtype=dtype, op_by_op=True)  # type: ignore[arg-type]
        loading.load_model(settings, CPU, lambda *_: None)

    load("bf16")
    load("f32")
    with pytest.raises(
        UnsupportedModelError, match=f"tensor {name}: weights are beyond the range of f16.*dtype='bf16'"
    ):
        load("f16")


def test_plain_weights_beside_quantised_ones_are_looked_at_too(tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path / "toy")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][0, 0] = 1e6
    save_file(tensors, file)
    checkpoint, _ = opened(folder, "llama")
    stored, found = checkpoint.tensors[name], {}
    rows, columns = stored.shape
    for dtype in ("BF16", "F16"):
        placement = Placement(CPU, dtype, keeps_quantised=True)
        part = MatrixParameter(found, "m", (rows, columns), placement.backend)
        if dtype == "BF16":
            assert part.fill(stored) is None
            continue
        with pytest.raises(UnsupportedModelError, match="beyond the range of f16"):
            part.fill(stored)
