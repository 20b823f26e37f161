# SPDX-License-Identifier: MIT
"""FP8 and NVFP4 on a GPU's path: matrices stay small floats, whatever a model makes of their rows."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels import triton_build
from candle_vllm.core.kernels.group_linear import GroupMatrix
from candle_vllm.core.kernels.group_linear.reference import dequantise
from candle_vllm.core.kernels.matrices import TensorMatrix
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.moe import ExpertMLPs, Mixture
from candle_vllm.core.layers.parameters import MatrixParameter, Placement
from candle_vllm.core.loading.quantised import read_quantised
from candle_vllm.core.loading.safetensors import open_safetensors
from candle_vllm.core.quantization.tensors import StoredTensor
from packages.core.tests.quantization.format_writers import WRITERS, Written

DEVICE = Placement(torch.device("cpu"), "F32", keeps_quantised=True)
KEPT = [name for name in WRITERS if ("fp8" in name and not name.endswith("blocks")) or "nvfp4" in name]


def stored_layer(
    name: str, folder: Path, rows: int = 48, columns: int = 96, factor: float = 1.0
) -> tuple[StoredTensor, Written]:
    """A layer in a format, and what was written."""
    written = WRITERS[name](factor * torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)))
    save_file({f"l{end}": part.contiguous() for end, part in written.parts.items()}, folder / "model.safetensors")
    checkpoint = open_safetensors(folder)
    config = {"quantization_config": written.config}
    return read_quantised(checkpoint, config, folder / "config.json").tensors["l.weight"], written


def filled(stored: StoredTensor, *, floats: bool = True, why: str | None = None, device: Placement = DEVICE) -> Any:
    """A matrix on the device, and that it is there as it is stored, or why not."""
    matrices: dict[str, Any] = {}
    rows, columns = stored.shape
    said = MatrixParameter(matrices, "m", (rows, columns), partial(device.backend, floats=floats)).fill(stored)
    assert said is None if why is None else said is not None and why in said
    return matrices["m"].data


def assert_means(matrix: GroupMatrix, weight: torch.Tensor, name: str) -> None:
    """NVFP4's two scales meet a number in another order: roundings of fp32."""
    assert isinstance(matrix, GroupMatrix)
    assert torch.allclose(dequantise(matrix), weight, rtol=2**-22 if "nvfp4" in name else 0, atol=0)


def test_there_are_kinds_of_every_sort() -> None:
    assert len(KEPT) >= 8


@pytest.mark.parametrize("name", KEPT)
def test_matrices_are_kept_with_their_rows_in_any_order(name: str, tmp_path: Path) -> None:
    stored, written = stored_layer(name, tmp_path)
    matrix = filled(stored)
    assert matrix.numbers == ("e2m1" if "nvfp4" in name else "e5m2" if "e5m2" in name else "e4m3")
    assert_means(matrix, written.weight, name)
    order = np.array([3, 40, 24, 23, 0])
    assert_means(filled(stored.select(order)), written.weight[torch.from_numpy(order)], name)


@pytest.mark.parametrize(
    ("name", "floats", "why"),
    [
        ("fp8 blocks", True, "a scale for 40 columns has no kernel on a GPU"),
        ("fp8", False, "such a layer has no kernel for small floats on a GPU"),
        ("nvfp4", False, "such a layer has no kernel for small floats on a GPU"),
    ],
)
def test_what_is_decoded_is_said(name: str, floats: bool, why: str, tmp_path: Path) -> None:
    stored, written = stored_layer(name, tmp_path)
    assert torch.equal(filled(stored, floats=floats, why=why), written.weight)


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_without_tensor_cores_they_are_decoded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_build, "capability", lambda device: 75)
    stored, written = stored_layer(name, tmp_path)
    half = dataclasses.replace(DEVICE, dtype="F16")
    matrix = filled(stored, why="no kernel below compute capability 8.0", device=half)
    assert torch.equal(matrix, written.weight.half())


@pytest.mark.parametrize("name", ["fp8", "nvfp4", "fp8 blocks"])
def test_weights_beyond_float16_are_refused_by_name(name: str, tmp_path: Path) -> None:
    """Many rows meet weights in the type of the activations."""
    half = dataclasses.replace(DEVICE, dtype="F16")
    why = "a scale for 40 columns" if "blocks" in name else None
    for factor in (1.0, 1e6):
        folder = tmp_path / str(factor)
        folder.mkdir()
        stored, _ = stored_layer(name, folder, columns=80, factor=factor)
        assert filled(stored, why=why) is not None
        if factor == 1.0:
            assert filled(stored, why=why, device=half) is not None
            continue
        with pytest.raises(UnsupportedModelError, match=r"tensor l\.weight: weights are beyond the range of f16"):
            filled(stored, device=half)


@pytest.mark.parametrize("name", KEPT)
def test_matrices_of_one_input_are_one(name: str, tmp_path: Path) -> None:
    """And are multiplied in one launch."""
    stored, written = stored_layer(name, tmp_path)
    layer = Linear(96, {"q": 48, "k": 24}, DEVICE)
    parts = layer.parameters()
    parts["q.weight"].fill(stored)
    parts["k.weight"].fill(stored.select(np.arange(24, 48)))
    layer.finish()
    (piece,) = layer.matrices
    weight = torch.cat([written.weight, written.weight[24:]])
    assert_means(piece.data, weight, name)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(layer(x), x @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["fp8 channel", "fp8 blocks of 32", "nvfp4"])
def test_experts_are_kept(name: str, tmp_path: Path) -> None:
    stored, written = stored_layer(name, tmp_path, 96, 96)
    experts = ExpertMLPs(96, Mixture(experts=2, top_k=1, inner_size=96), DEVICE)
    for part in experts.parameters().values():
        part.fill(stored)
    experts.finish()
    for layer, count in ((experts.gate_up, 4), (experts.down, 2)):
        (matrix,) = layer.matrices
        assert isinstance(matrix.data, GroupMatrix)
        assert_means(matrix.data, written.weight.repeat(count, 1), name)


def test_experts_of_several_kinds_are_decoded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = {}
    for name in ("fp8 channel", "fp8 blocks of 32"):
        (tmp_path / name).mkdir()
        found[name] = stored_layer(name, tmp_path / name, 96, 96)
    experts = ExpertMLPs(96, Mixture(experts=2, top_k=1, inner_size=96), DEVICE)
    for place, part in experts.parameters().items():
        part.fill(found["fp8 channel" if place.startswith("down.0") else "fp8 blocks of 32"][0])
    experts.finish()
    (gate_up,), (down,) = experts.gate_up.matrices, experts.down.matrices
    assert isinstance(gate_up.data, GroupMatrix)
    assert isinstance(down, TensorMatrix)
    assert torch.equal(down.data, torch.cat([found[name][1].weight for name in found]))
    assert "experts of several types (e4m3 in 32s, e4m3 in 96s) are decoded" in caplog.text
