# SPDX-License-Identifier: MIT
"""Views of stored tensors give what the same indexing gives of the whole, plain or quantised."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import save_file

from candle_vllm.core.errors import UnsupportedModelError, WeightsError
from candle_vllm.core.loading import views
from candle_vllm.core.loading.gguf import open_gguf
from candle_vllm.core.loading.safetensors import open_safetensors
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.quantization.tensors import StoredTensor

WHOLE = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(1))
NOTHING = SimpleNamespace()


@pytest.fixture(params=["F32", "Q8_0"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoredTensor]:
    """[3, 8, 64], in both formats."""
    with _open(request.param, tmp_path) as checkpoint:
        yield checkpoint.tensors["w"]


def _open(kind: str, folder: Path) -> Checkpoint:
    if kind == "F32":
        save_file({"w": WHOLE, "before": torch.ones(5)}, folder / "model.safetensors")
        return open_safetensors(folder)
    writer = GGUFWriter(folder / "w.gguf", "llama")
    writer.add_tensor(
        "w", quants.quantize(WHOLE.numpy(), GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_gguf(folder / "w.gguf")


def numbers(stored: StoredTensor) -> torch.Tensor:
    return torch.from_numpy(stored.load())


def check(view: StoredTensor, wanted: torch.Tensor) -> None:
    """Numbers, shape, and bytes that decode to the same."""
    assert view.shape == tuple(wanted.shape)
    assert torch.equal(numbers(view), wanted)
    raw = view.raw()
    assert raw.nbytes == view.nbytes
    if view.dtype is None:
        decoded = quants.dequantize(np.ascontiguousarray(raw), GGMLQuantizationType[view.type_name])
        assert np.array_equal(decoded.reshape(wanted.shape), wanted.numpy())
    else:
        assert np.array_equal(np.ascontiguousarray(raw).view(np.float32).reshape(wanted.shape), wanted.numpy())
    view.release()
    assert torch.equal(numbers(view), wanted)


def test_rows_and_entries(stored: StoredTensor) -> None:
    whole = numbers(stored)
    check(stored.rows(1, 3), whole[1:3])
    check(views.entry(stored, 2), whole[2])
    expert = views.entry(stored, 1)
    check(expert.rows(2, 7), whole[1, 2:7])
    check(expert.select(np.array([7, 0, 3])), whole[1, [7, 0, 3]])
    check(views.row_part(1, 2)(expert, NOTHING), whole[1, 4:])
    check(views.every_other(1)(expert, NOTHING), whole[1, 1::2])
    check(views.every_other(0)(expert, NOTHING).rows(1, 3), whole[1, [2, 4]])
    check(views.chain(views.row_part(0, 2), views.every_other(1))(expert, NOTHING), whole[1, [1, 3]])


def test_columns(stored: StoredTensor) -> None:
    whole = numbers(stored)
    check(stored.columns(32, 64), whole[..., 32:])
    check(views.entry(stored, 2).columns(0, 32), whole[2, :, :32])
    check(views.entry(stored, 1).select(np.array([7, 0])).columns(32, 64), whole[1, [7, 0], 32:])
    check(stored.columns(32, 64).rows(1, 3), whole[1:3, :, 32:])
    with pytest.raises(WeightsError, match="columns 32 to 64 are needed"):
        stored.columns(32, 65)


@pytest.mark.parametrize(
    "kind", [kind for kind, (size, _) in GGML_QUANT_SIZES.items() if size > 1 and kind.name != "Q8_1"]
)
def test_columns_of_blocks_are_blocks(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    """Any bytes, which may be numbers that are none; nothing decodes Q8_1, which no file holds."""
    size, width = GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 256, (5, 3 * width), np.uint8)
    writer = GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(tmp_path / "w.gguf") as checkpoint:
        whole = checkpoint.tensors["w"]
        assert whole.column_step == size
        part = whole.columns(size, 3 * size).rows(1, 4)
        assert np.array_equal(part.raw(), data[1:4, width:])
        assert np.array_equal(part.load().view(np.int32), whole.load()[1:4, size:].view(np.int32))
        with pytest.raises(WeightsError, match=f"at columns {size // 2} and {size}: {size} columns are stored"):
            whole.columns(size // 2, size)


def test_the_parts_of_a_fused_tensor_are_all_of_it(stored: StoredTensor) -> None:
    """8 rows: q of two heads of 2, k and v of one."""
    expert = views.entry(stored, 1)
    whole, config = numbers(expert), SimpleNamespace(num_heads=2, num_kv_heads=1, head_dim=2)
    for part, found in {"q": whole[:4], "k": whole[4:6], "v": whole[6:]}.items():
        check(views.qkv_rows(part)(expert, config), found)
    with pytest.raises(
        WeightsError, match=r"w has shape \[8, 64\]; the model's config asks for 2 rows of q and 2 each"
    ):
        views.qkv_rows("v")(expert, SimpleNamespace(num_heads=1, num_kv_heads=1, head_dim=2))
    with pytest.raises(WeightsError, match=r"w has shape \[8, 64\]; 3 equal parts are needed"):
        views.row_part(0, 3)(expert, config)


def test_half_split_order(stored: StoredTensor) -> None:
    """Two heads of 4 rows, 2 or 4 of which rotate."""
    matrix = views.entry(stored, 0)
    whole = numbers(matrix)
    for turned, order in ((4, [0, 2, 1, 3, 4, 6, 5, 7]), (2, [0, 1, 2, 3, 4, 5, 6, 7])):
        config = SimpleNamespace(num_heads=2, head_dim=4, rope=SimpleNamespace(dim=turned), interleaved_rotary=True)
        check(views.half_split("num_heads")(matrix, config), whole[order])
    config.interleaved_rotary = False
    assert views.half_split("num_heads")(matrix, config) is matrix


def test_plus_one_is_computed_in_fp32(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([0.001, -1.0], dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    with open_safetensors(tmp_path) as checkpoint:
        view = views.plus_one(checkpoint.tensors["w"], NOTHING)
        check(view, torch.tensor([0.001, -1.0], dtype=torch.bfloat16).float() + 1)


def test_a_bias_is_reordered_by_its_numbers(tmp_path: Path) -> None:
    save_file({"w": torch.arange(6.0)}, tmp_path / "model.safetensors")
    with open_safetensors(tmp_path) as checkpoint:
        check(views.every_other(1)(checkpoint.tensors["w"], NOTHING), torch.tensor([1.0, 3.0, 5.0]))
        check(checkpoint.tensors["w"].rows(2, 4), torch.tensor([2.0, 3.0]))


def test_transposed(tmp_path: Path) -> None:
    with _open("F32", tmp_path) as checkpoint:
        stored = checkpoint.tensors["w"]
        check(views.transposed(stored, NOTHING), WHOLE.transpose(1, 2))
        check(views.transposed(views.entry(stored, 2), NOTHING), WHOLE[2].T)


def test_what_cannot_be_looked_at_is_named(tmp_path: Path) -> None:
    with _open("Q8_0", tmp_path) as checkpoint:
        stored = checkpoint.tensors["w"]
        with pytest.raises(UnsupportedModelError, match="Q8_0 tensor w cannot be transposed"):
            views.transposed(stored, NOTHING)
        with pytest.raises(WeightsError, match=r"tensor w has shape \[3, 8, 64\]; rows 3 to 3 are needed"):
            views.entry(stored, 3)
