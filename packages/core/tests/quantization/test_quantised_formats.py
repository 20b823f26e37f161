# SPDX-License-Identifier: MIT
"""Quantised safetensors, bit for bit: each format against its own arithmetic, as written out in `format_writers`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError, WeightsError
from candle_vllm.core.kernels.group_linear import from_codes, reference
from candle_vllm.core.kernels.torch_numbers import DTYPES, load_tensor, tensor_of
from candle_vllm.core.loading import quantised, views
from candle_vllm.core.loading.gguf import open_gguf
from candle_vllm.core.loading.quantised import read_quantised
from candle_vllm.core.loading.safetensors import open_safetensors
from candle_vllm.core.quantization import stored as stored_module
from candle_vllm.core.quantization.fp4 import with_scales
from candle_vllm.core.quantization.stored import QuantisedTensor
from candle_vllm.core.quantization.tensors import StoredTensor
from packages.core.tests.quantization.format_writers import (
    WRITERS,
    Written,
    awq,
    ct_packed,
    fp8,
    gptq,
    marlin,
    mxfp4,
    nvfp4,
    write_safetensors,
)

BLOCKS = {
    "gptq": "Q4_0",
    "gptq 8 bits": "Q8_0",
    "gptq asymmetric": "Q5_0",
    "gptq v2": "Q5_0",
    "gptq 8 bits asymmetric": None,  # code - zero takes 9 bits
    "gptq whole rows": "Q4_0",
    "gptq act order": "Q5_0",
    "gptq bf16 scales": "Q4_0",
    "awq": "Q5_0",
    "awq whole rows": "Q5_0",
    "ct int4": "Q4_0",
    "ct int4 asymmetric": "Q5_0",
    "ct int4 channel": "Q4_0",
    "ct int4 act order": "Q4_0",
    "ct int8 packed": "Q8_0",
    "ct int8": "Q8_0",
    "ct int8 asymmetric": None,
    "mxfp4": "MXFP4",
}
"""The ggml type that holds a format's numbers exactly."""


def loaded(stored: StoredTensor, name: str = "F32") -> torch.Tensor:
    return tensor_of(stored.load(name), name)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def open_layer(written: Written, folder: Path, name: str = "l", **config: Any) -> QuantisedTensor:
    """The logical tensor of the only layer of a checkpoint."""
    file = write_safetensors(folder / "model.safetensors", {name + end: part for end, part in written.parts.items()})
    settings = {"quantization_config": written.config | config}
    tensors = read_quantised(open_safetensors(file), settings, folder / "config.json").tensors
    (found,) = (tensor for tensor in tensors.values() if tensor.name != "odd")
    assert isinstance(found, QuantisedTensor)
    return found


@pytest.mark.one_of_each(62)
@pytest.mark.parametrize(("rows", "columns"), [(24, 96), (8, 32), (72, 224)])
@pytest.mark.parametrize("name", WRITERS)
def test_every_number_is_exact(
    name: str, rows: int, columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_module, "CHUNK", 20 * columns)  # rounds that end amid the rows
    written = WRITERS[name](numbers(rows, columns))
    found = open_layer(written, tmp_path)
    assert found.name == "l.weight"
    assert found.shape == (rows, columns)
    assert found.dtype is None
    assert found.nbytes == sum(part.nbytes for part in written.parts.values())
    assert torch.equal(loaded(found), written.weight)
    for name in ("BF16", "F16"):
        assert torch.equal(loaded(found, name), written.weight.to(DTYPES[name]))
        assert torch.equal(load_tensor(found, DTYPES[name]), written.weight.to(DTYPES[name]))
    found.release()
    assert torch.equal(torch.from_numpy(found.load(None)), written.weight)
    assert float((written.weight - numbers(rows, columns)).abs().max()) < 0.05, "the test's own writer rounds badly"


@pytest.mark.parametrize("name", WRITERS)
def test_blocks_hold_the_same_numbers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_module, "CHUNK", 16 * 96)
    written = WRITERS[name](numbers(40, 96))
    found = open_layer(written, tmp_path)
    blocks, wanted = found.blocks(), BLOCKS.get(name)
    assert (None if blocks is None else blocks.type.name) == wanted
    if blocks is None:
        return
    assert (blocks.order is not None) == ("act order" in name)
    meant = written.weight if blocks.order is None else written.weight[:, blocks.order]
    assert np.array_equal(quants.dequantize(blocks.raw, blocks.type), meant.numpy())
    if blocks.order is None:
        assert np.array_equal(found.raw(), blocks.raw)
    else:
        with pytest.raises(UnsupportedModelError, match=r"tensor l\.weight fits no ggml type exactly"):
            found.raw()


@pytest.mark.parametrize("name", [name for name in WRITERS if "fp" not in name])
def test_the_gpus_layout_holds_the_same_numbers(name: str, tmp_path: Path) -> None:
    written = WRITERS[name](numbers(40, 96))
    codes = open_layer(written, tmp_path).codes()
    assert codes is not None
    matrix = from_codes(codes, "cpu")
    assert matrix is not None
    got = reference.dequantise(matrix)
    wanted = written.weight if matrix.order is None else written.weight[:, matrix.order]
    assert torch.equal(got, wanted)
    assert (matrix.order is not None) == ("act order" in name)


@pytest.mark.parametrize("name", WRITERS)
def test_rows_may_be_picked(name: str, tmp_path: Path) -> None:
    written = WRITERS[name](numbers(64, 96))
    found = open_layer(written, tmp_path)
    for first, last in ((0, 64), (3, 4), (5, 43)):
        part = found.rows(first, last)
        assert part.shape == (last - first, 96)
        assert torch.equal(loaded(part), written.weight[first:last])
    odd = views.every_other(1)(found.rows(6, 60), None)
    assert isinstance(odd, QuantisedTensor)
    assert torch.equal(loaded(odd), written.weight[6:60][1::2])
    if (blocks := odd.blocks()) is not None:
        meant = written.weight[6:60][1::2].numpy()
        meant = meant if blocks.order is None else meant[:, blocks.order]
        assert np.array_equal(quants.dequantize(blocks.raw, blocks.type), meant)
    mixed = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(found.select(mixed.numpy())), written.weight[mixed])


@pytest.mark.parametrize("name", WRITERS)
def test_columns_are_those_of_the_whole(name: str, tmp_path: Path) -> None:
    """In numbers, in blocks and as kernels read them, of any rows; and what shares a scale stays together."""
    written = WRITERS[name](numbers(64, 480))
    found = open_layer(written, tmp_path)
    step = found.column_step
    for first, last in ((0, 480), (0, 480 // 2 // step * step or 480), (480 // 2 // step * step, 480)):
        part = found.columns(first, last)
        assert part.shape == (64, last - first)
        assert torch.equal(loaded(part), written.weight[:, first:last])
        few = part.rows(5, 43)
        assert torch.equal(loaded(few), written.weight[5:43, first:last])
        assert isinstance(few, QuantisedTensor)
        if (blocks := few.blocks()) is not None:
            meant = loaded(few) if blocks.order is None else loaded(few)[:, blocks.order]
            assert np.array_equal(quants.dequantize(blocks.raw, blocks.type), meant.numpy())
        if few.span is not None:
            assert np.allclose(few.codes().dequantise(), few.load(), rtol=2**-22, atol=0)
    if step > 1:
        with pytest.raises(WeightsError, match=rf"cannot be cut at columns 1 and 480: {step} columns are stored"):
            found.columns(1, 480)
    with pytest.raises(WeightsError, match="columns 0 to 480 are needed"):
        found.columns(0, 481)


@pytest.mark.parametrize(("rows", "columns", "group"), [(64, 256, 128), (192, 128, 128), (64, 48, -1), (128, 160, -1)])
def test_marlin_is_unpacked(rows: int, columns: int, group: int, tmp_path: Path) -> None:
    written = marlin(numbers(rows, columns), group=group)
    found = open_layer(written, tmp_path)
    assert torch.equal(loaded(found), written.weight)
    assert torch.equal(loaded(found.rows(7, 33)), written.weight[7:33])


def test_experts_of_mxfp4(tmp_path: Path) -> None:
    """gpt-oss: three dimensions, gate and up in turn."""
    written = mxfp4(numbers(3, 12, 64), ct=False)
    found = open_layer(written, tmp_path, "mlp.experts.gate_up_proj")
    assert found.name == "mlp.experts.gate_up_proj"
    assert found.shape == (3, 12, 64)
    assert torch.equal(loaded(found), written.weight)
    expert = views.entry(found, 2)
    gate = views.every_other(0)(expert, None)
    assert isinstance(gate, QuantisedTensor)
    assert torch.equal(loaded(gate), written.weight[2, ::2])
    blocks = gate.blocks()
    assert blocks is not None
    assert np.array_equal(quants.dequantize(blocks.raw, blocks.type), written.weight[2, ::2].numpy())
    assert gate.nbytes == found.nbytes // 6


def test_experts_of_nvfp4_in_a_gguf_file_have_a_scale_each(tmp_path: Path) -> None:
    """Gemma 4's `ffn_down_exps.scale` is of its router; what has no scale, and another type's, is left as it is."""
    random = np.random.default_rng(0)
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    scales = np.array([0.5, 3.0, 1e-3], np.float32)
    for name in ("0.ffn_up_exps", "0.ffn_down_exps", "1.ffn_down_exps", "1.ffn_gate_exps"):
        blocks = random.integers(0, 0x7F, (3, 5, 2 * 36), np.uint8)
        writer.add_tensor(f"blk.{name}.weight", blocks, raw_dtype=GGMLQuantizationType.NVFP4)
        if "gate" not in name:
            writer.add_tensor(f"blk.{name}.scale", scales)
            writer.add_tensor(f"blk.{name}.input_scale", scales)
    writer.add_tensor("blk.0.ffn_gate_inp.scale", scales)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(tmp_path / "m.gguf") as checkpoint:
        found, before = with_scales(checkpoint), checkpoint.tensors
        assert before.keys() - found.keys() == {
            *(f"blk.{name}.input_scale" for name in ("0.ffn_up_exps", "0.ffn_down_exps", "1.ffn_down_exps")),
            *(f"blk.{name}.scale" for name in ("0.ffn_up_exps", "1.ffn_down_exps")),
        }
        for name, tensor in found.items():
            combined = isinstance(tensor, QuantisedTensor)
            assert combined == (name in ("blk.0.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight"))
            expected = before[name].load() * scales[:, None, None] if combined else before[name].load()
            np.testing.assert_allclose(tensor.load(), expected, rtol=1e-6)
            if combined:
                expert = views.entry(tensor, 1)
                np.testing.assert_array_equal(expert.load(), tensor.load()[1])
    writer = GGUFWriter(tmp_path / "wrong.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((4, 36), np.uint8), raw_dtype=GGMLQuantizationType.NVFP4)
    writer.add_tensor("blk.0.ffn_up.scale", scales)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with (
        open_gguf(tmp_path / "wrong.gguf") as checkpoint,
        pytest.raises(InvalidFileError, match=r"scale has shape \[3"),
    ):
        with_scales(checkpoint)


def test_mxfp4_beyond_float16(tmp_path: Path) -> None:
    written = mxfp4(numbers(8, 64))
    scales = written.parts[".weight_scale"]
    blocks = written.parts[".weight_packed"]
    scales[0, 0], blocks[0, :16] = 0, 0  # zeros, with a scale of 2^-127
    found = open_layer(written, tmp_path).blocks()
    assert found is not None
    assert not quants.dequantize(found.raw, found.type)[0, :32].any()
    scales[1, 1], blocks[1, 16:] = 90, 0x11
    tiny = open_layer(written, tmp_path)
    kept = tiny.blocks()
    assert kept is not None
    assert (quants.dequantize(kept.raw, kept.type)[1, 32:] == 0.5 * 2.0**-37).all()
    assert torch.equal(loaded(tiny)[1, 32:], torch.full((32,), 0.5 * 2.0**-37))
    scales[1, 1] = 255  # not a number
    none = open_layer(written, tmp_path)
    assert np.isnan(none.load()[1, 32:]).all()
    assert none.blocks() is None


def test_bf16_scales_that_float16_lacks_are_not_rounded(tmp_path: Path) -> None:
    written = gptq(numbers(8, 64), dtype=torch.bfloat16)
    written.parts[".scales"] = (written.parts[".scales"].float() * 1e-5).bfloat16()
    found = open_layer(written, tmp_path)
    assert found.blocks() is None


def test_act_order_that_leaves_runs_of_inputs_together_has_blocks(tmp_path: Path) -> None:
    written = gptq(numbers(16, 128), group=32)
    order = torch.tensor([2, 0, 3, 1]).repeat_interleave(32)
    written.parts[".g_idx"] = order.int()
    columns = torch.argsort(order, stable=True)
    codes = written.parts[".qweight"].clone()
    for group, own in enumerate(order[::32].tolist()):
        written.parts[".qweight"][group * 4 : group * 4 + 4] = codes[own * 4 : own * 4 + 4]
    found = open_layer(written, tmp_path)
    blocks = found.blocks()
    assert blocks is not None
    assert blocks.order is None
    assert torch.equal(loaded(found)[:, columns], written.weight)
    assert np.array_equal(quants.dequantize(blocks.raw, blocks.type), found.load())


def test_groups_that_are_cut_off(tmp_path: Path) -> None:
    """96 inputs in groups of 64: two groups, the second of 32."""
    for name in ("gptq", "ct"):
        written = gptq(numbers(16, 96), group=64) if name == "gptq" else ct_packed(numbers(16, 96), group=64)
        written.parts.pop(".g_idx", None)
        found = open_layer(written, tmp_path)
        assert torch.equal(loaded(found), written.weight)
        blocks = found.blocks()
        assert blocks is not None
        assert np.array_equal(quants.dequantize(blocks.raw, blocks.type), written.weight.numpy())


@pytest.mark.parametrize("writer", [awq, partial(gptq, symmetric=False), partial(ct_packed, symmetric=False)])
def test_blocks_of_rounds_with_and_without_zeros_have_one_type(
    writer: Callable[..., Written], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first round of rows is symmetric, and its blocks alone would be Q4_0."""
    monkeypatch.setattr(stored_module, "CHUNK", 8 * 64)
    even = torch.arange(-8.0, 8).repeat(8, 4) * 0.01
    written = writer(torch.cat([even, numbers(8, 64).abs()]), group=32)
    blocks = open_layer(written, tmp_path).blocks()
    assert blocks is not None
    assert np.array_equal(quants.dequantize(blocks.raw, blocks.type), written.weight.numpy())


@pytest.mark.parametrize("columns", [77, 8, 33])
def test_rows_that_are_no_whole_words(columns: int, tmp_path: Path) -> None:
    written = ct_packed(numbers(13, columns), group=-1, symmetric=False)
    found = open_layer(written, tmp_path)
    assert torch.equal(loaded(found), written.weight)
    assert found.blocks() is None


def test_gptq_without_g_idx(tmp_path: Path) -> None:
    written = gptq(numbers(16, 96))
    del written.parts[".g_idx"]
    assert torch.equal(loaded(open_layer(written, tmp_path)), written.weight)


def test_layers_may_have_bits_and_groups_of_their_own(tmp_path: Path) -> None:
    """GPTQModel's `dynamic`; the pattern is not run."""
    dynamic = {r"+:.*\.down": {"bits": 8, "group_size": 16}, r"-:(a+)+$": {}}
    written = gptq(numbers(16, 96), bits=8, group=16)
    assert torch.equal(loaded(open_layer(written, tmp_path, bits=4, group_size=32, dynamic=dynamic)), written.weight)


@pytest.mark.parametrize("name", ["gptq", "gptq asymmetric", "gptq 8 bits", "awq"])
def test_auto_round_stores_as_others_do(name: str, tmp_path: Path) -> None:
    written = WRITERS[name](numbers(16, 96))
    layout = f"auto_round:auto_{name[:4].strip()}"
    own = {"other": {"bits": 8}, "lm_head": {"bits": 16, "data_type": "float"}}
    config = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": layout, "extra_config": own}
    found = open_layer(Written(written.parts, written.weight, config), tmp_path)
    assert torch.equal(loaded(found), written.weight)


def test_symmetric_awq_has_zeros_too(tmp_path: Path) -> None:
    """AutoRound's symmetric checkpoints in AWQ's layout say `zero_point: false`, and store the middle as zeros."""
    written = WRITERS["awq"](numbers(16, 96))
    assert torch.equal(loaded(open_layer(written, tmp_path, zero_point=False)), written.weight)
    del written.parts[".qzeros"]
    with pytest.raises(InvalidFileError, match=r"qzeros is missing"):
        open_layer(written, tmp_path, zero_point=False)


def test_zeros_of_the_first_version_wrap(tmp_path: Path) -> None:
    """A zero of 0 is stored as -1, in 4 bits 15."""
    weight = numbers(8, 32).abs()
    written = gptq(weight, symmetric=False)
    assert int(written.parts[".qzeros"][0, 0]) == -1
    assert torch.equal(loaded(open_layer(written, tmp_path)), written.weight)


@pytest.mark.parametrize("where", ["config", "nested", "beside"])
def test_modelopt_says_so_in_either_file(where: str, tmp_path: Path) -> None:
    written = nvfp4(numbers(8, 32))
    parts = {f"l{end}": part for end, part in written.parts.items()} | {"l.input_scale": torch.ones(())}
    file = write_safetensors(tmp_path / "model.safetensors", parts)
    config: dict[str, Any] = {"quantization_config": written.config}
    if where == "nested":
        config = {"quantization_config": {"producer": {}, "quantization": {"quant_algo": "NVFP4"}}}
    if where == "beside":
        (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4", "group_size": 16}}')
        config = {}
    found = read_quantised(open_safetensors(file), config, tmp_path / "config.json")
    assert set(found.tensors) == {"odd", "l.weight"}
    assert torch.equal(loaded(found.tensors["l.weight"]), written.weight)


@pytest.mark.parametrize(("file", "name"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_older_writers_left_the_settings_beside(file: str, name: str, tmp_path: Path) -> None:
    written = WRITERS[name](numbers(16, 96))
    settings = {"bits": 4, "group_size": 32} if name == "gptq" else {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}
    (tmp_path / file).write_text(json.dumps(settings))
    parts = {f"l{end}": part for end, part in written.parts.items()}
    checkpoint = open_safetensors(write_safetensors(tmp_path / "model.safetensors", parts))
    found = read_quantised(checkpoint, {}, tmp_path / "config.json").tensors
    assert torch.equal(loaded(found["l.weight"]), written.weight)


def test_biases_of_zeros_are_spare(tmp_path: Path) -> None:
    """The model decides whether it has a place for them."""
    parts: dict[str, torch.Tensor] = {}
    for layer in ("zero", "full"):
        written = gptq(numbers(16, 96))
        parts |= {layer + end: part for end, part in written.parts.items()}
        parts[f"{layer}.bias"] = torch.full((16,), float(layer == "full"))
    parts["plain.bias"] = torch.zeros(16)
    checkpoint = open_safetensors(write_safetensors(tmp_path / "model.safetensors", parts))
    found = read_quantised(checkpoint, {"quantization_config": gptq(numbers(16, 96)).config}, tmp_path / "config.json")
    biases = {name: type(tensor) for name, tensor in found.tensors.items() if name.endswith("bias")}
    assert biases.keys() == {"zero.bias", "full.bias", "plain.bias"}
    assert [name for name, kind in biases.items() if kind is views.Spare] == ["zero.bias"]
    assert not found.tensors["zero.bias"].load().any()


@pytest.mark.parametrize("block", [None, [24, 40], [32, 48]])
def test_experts_of_one_tensor_in_fp8(block: list[int] | None, tmp_path: Path) -> None:
    """A scale for each expert, or for each block; the settings are those of the text model."""
    written = [fp8(numbers(48, 80, seed=seed), block=block and (block[0], block[1])) for seed in range(3)]
    scales = [each.parts[".weight_scale_inv" if block else ".weight_scale"] for each in written]
    parts = {
        "experts.down_proj": torch.stack([each.parts[".weight"] for each in written]),
        "experts.down_proj_scale_inv": torch.stack(scales).reshape(3, *(2, 2) if block else (1, 1)),
        "experts.down_proj_activation_scale": torch.ones(()),
    }
    checkpoint = open_safetensors(write_safetensors(tmp_path / "m.safetensors", parts))
    settings = {"text_config": {"quantization_config": written[0].config | {"weight_block_size": block}}}
    found = read_quantised(checkpoint, settings, tmp_path / "config.json").tensors
    assert found.keys() - {"odd"} == {"experts.down_proj"}
    for expert, each in enumerate(written):
        assert loaded(views.entry(found["experts.down_proj"], expert)).equal(each.weight)
    parts["experts.down_proj_scale_inv"] = parts["experts.down_proj_scale_inv"][:2]
    checkpoint = open_safetensors(write_safetensors(tmp_path / "damaged.safetensors", parts))
    with pytest.raises(InvalidFileError, match="down_proj_scale_inv has shape"):
        read_quantised(checkpoint, settings, tmp_path / "config.json")


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = WRITERS["ct fp8"](numbers(8, 32))
    names = ("l.input_scale", "a.k_scale", "a.v_scale", "l.other")
    parts = {f"l{end}": part for end, part in written.parts.items()} | {name: torch.ones(1) for name in names}
    checkpoint = open_safetensors(write_safetensors(tmp_path / "m.safetensors", parts))
    with caplog.at_level(logging.INFO):
        found = read_quantised(checkpoint, {"quantization_config": written.config}, tmp_path / "config.json")
    assert set(found.tensors) == {"odd", "l.weight", "l.other"}
    assert "3 scales of activations" in caplog.text


@pytest.mark.parametrize(("name", "said"), [("fp8", True), ("ct int8", True), ("ct int4", False), ("gptq", False)])
def test_activations_that_are_not_rounded_are_said(
    name: str, said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        open_layer(WRITERS[name](numbers(8, 32)), tmp_path)
    assert ("asks for quantised activations" in caplog.text) is said


def test_a_checkpoint_without_quantisation_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_safetensors(write_safetensors(tmp_path / "m.safetensors", {"l.weight": torch.ones(2, 2)}))
    with monkeypatch.context() as without_formats:
        without_formats.setattr(quantised, "collected", None)
        assert read_quantised(checkpoint, {}, tmp_path / "config.json") is checkpoint
    dense: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}
    same = read_quantised(checkpoint, {"quantization_config": dense}, tmp_path / "config.json")
    assert set(same.tensors) == {"odd", "l.weight"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.int8])
def test_a_merged_model_keeps_the_settings_of_its_training(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Models that were trained by QLoRA and merged often have bitsandbytes' settings, and weights in bf16."""
    file = write_safetensors(tmp_path / "m.safetensors", {"l.weight": torch.ones(2, 2).to(dtype)})
    checkpoint, config = open_safetensors(file), {"quantization_config": {"quant_method": "bitsandbytes"}}
    if dtype != torch.bfloat16:
        with pytest.raises(UnsupportedModelError, match="'bitsandbytes', which is not implemented"):
            read_quantised(checkpoint, config, tmp_path / "config.json")
        return
    assert read_quantised(checkpoint, config, tmp_path / "config.json") is checkpoint
    assert "names the method bitsandbytes, but no weight is quantised" in caplog.text


def test_checkpoints_of_mlx_are_named(tmp_path: Path) -> None:
    """They have the same settings under two keys, and no `quant_method`."""
    parts = {"l.weight": torch.ones(2, 8).int(), "l.scales": torch.ones(2, 1), "l.biases": torch.ones(2, 1)}
    checkpoint = open_safetensors(write_safetensors(tmp_path / "m.safetensors", parts))
    config = {key: {"group_size": 64, "bits": 4} for key in ("quantization", "quantization_config")}
    with pytest.raises(UnsupportedModelError, match="asks for the method 'mlx', which is not implemented"):
        read_quantised(checkpoint, config, tmp_path / "config.json")


def test_files_beside_the_config_have_names_that_are_looked_for(tmp_path: Path) -> None:
    files = quantised.collected("FILES")
    assert {"quantize_config.json", "quant_config.json", "hf_quant_config.json"} <= files.keys()
    for name in files:
        (tmp_path / name).touch()
    assert {path.name for path in tmp_path.glob(quantised.BESIDE)} == files.keys()


@pytest.mark.parametrize("algorithm", ["MIXED_PRECISION", "W4A16_NVFP4", "FP8_PER_CHANNEL_PER_TOKEN"])
def test_modelopt_quantises_layers_in_different_formats(algorithm: str, tmp_path: Path) -> None:
    """As NVIDIA's Nemotron 3 Super, whose attention is in FP8 and whose experts are in NVFP4."""
    each = {"a": nvfp4(numbers(8, 32)), "b": fp8(numbers(8, 32)), "c": fp8(numbers(8, 32), channel=True)}
    parts = {f"{name}{end}": part for name, written in each.items() for end, part in written.parts.items()}
    stored = open_safetensors(write_safetensors(tmp_path / "m.safetensors", parts))
    config = {"quantization_config": {"quant_method": "modelopt", "quant_algo": algorithm}}
    found = read_quantised(stored, config, tmp_path / "config.json").tensors
    for name, written in each.items():
        assert torch.equal(loaded(found[f"{name}.weight"]), written.weight)


def test_modelopt_may_quantise_the_cache_alone(tmp_path: Path) -> None:
    checkpoint = open_safetensors(write_safetensors(tmp_path / "m.safetensors", {"l.weight": torch.ones(2, 2)}))
    settings = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(settings))
    assert set(read_quantised(checkpoint, {}, tmp_path / "config.json").tensors) == {"odd", "l.weight"}
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {}}')
    with pytest.raises(UnsupportedModelError, match="quant_algo is ''; implemented: NVFP4, FP8"):
        read_quantised(checkpoint, {}, tmp_path / "config.json")


def test_the_name_of_compressed_tensors_has_two_spellings(tmp_path: Path) -> None:
    written = WRITERS["ct int8"](numbers(8, 32))
    assert torch.equal(loaded(open_layer(written, tmp_path, quant_method="compressed_tensors")), written.weight)


def test_scales_of_plain_weights_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """compressed-tensors' dense layers keep the scales that they would be quantised by."""
    written = ct_packed(numbers(16, 64))
    parts = {f"l{end}": part for end, part in written.parts.items()}
    parts |= {"d.weight": torch.ones(2, 2), "d.weight_scale": torch.ones(2, 1), "d.weight_zero_point": torch.ones(2, 1)}
    checkpoint = open_safetensors(write_safetensors(tmp_path / "m.safetensors", parts))
    with caplog.at_level(logging.INFO):
        found = read_quantised(checkpoint, {"quantization_config": written.config}, tmp_path / "config.json")
    assert set(found.tensors) == {"odd", "l.weight", "d.weight"}
    assert "2 scales, zero points or group indices of unquantised weights" in caplog.text


def test_rows_are_unpacked_in_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a large matrix never lies in memory as codes."""
    found = open_layer(gptq(numbers(64, 64)), tmp_path)
    sizes: list[int] = []
    read = found.source.decode

    def counted(first: int, last: int) -> np.ndarray:
        sizes.append(last - first)
        return read(first, last)

    monkeypatch.setattr(found.source, "decode", counted)
    monkeypatch.setattr(stored_module, "CHUNK", 64 * 16)
    found.load()
    assert sizes == [16] * 4
