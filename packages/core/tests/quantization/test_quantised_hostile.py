# SPDX-License-Identifier: MIT
"""Quantised layers whose parts lie: every one is a typed error that names the file and the tensor."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from candle_vllm.core.errors import InvalidFileError, ModelLoadError
from candle_vllm.core.loading.quantised import read_quantised
from candle_vllm.core.loading.safetensors import open_safetensors
from packages.core.tests.quantization.format_writers import (
    Written,
    awq,
    ct_int8,
    ct_packed,
    fp8,
    gptq,
    marlin,
    mxfp4,
    nvfp4,
    write_safetensors,
)

Parts = dict[str, torch.Tensor]
WEIGHT = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))


def read(written: Written, folder: Path, **config: Any) -> None:
    """Opens a checkpoint of the one layer, and decodes it."""
    file = write_safetensors(folder / "model.safetensors", {f"l{end}": part for end, part in written.parts.items()})
    settings = {"quantization_config": written.config | config}
    with open_safetensors(file) as checkpoint:
        for tensor in read_quantised(checkpoint, settings, folder / "config.json").tensors.values():
            tensor.load()


def without(end: str) -> Callable[[Parts], object]:
    return lambda parts: parts.pop(end)


def cut(end: str, *sizes: int) -> Callable[[Parts], object]:
    """Takes from each dimension of a part."""

    def change(parts: Parts) -> None:
        part = parts[end]
        parts[end] = part[tuple(slice(size) for size in sizes)].clone()

    return change


def put(end: str, part: torch.Tensor) -> Callable[[Parts], object]:
    return lambda parts: parts.__setitem__(end, part)


def groups(number: int) -> torch.Tensor:
    """All inputs in one group."""
    return torch.full((128,), number, dtype=torch.int32)


def shape(name: str, got: list[int], wanted: list[int]) -> str:
    return re.escape(f"{name} has shape {got}; it must be {wanted}")


ROTATED = {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}
PACKED = r"weight_packed has shape \[64, 16\]"
EXPERTS = mxfp4(WEIGHT[None], ct=False)

WRONG: dict[str, tuple[Written, Callable[[Parts], object], str]] = {
    "gptq scales missing": (gptq(WEIGHT), without(".scales"), r"l\.scales is missing"),
    "gptq zeros missing": (gptq(WEIGHT), without(".qzeros"), r"l\.qzeros is missing"),
    "gptq scales short": (gptq(WEIGHT), cut(".scales", 3), shape("l.scales", [3, 64], [4, 64])),
    "gptq zeros narrow": (gptq(WEIGHT), cut(".qzeros", 4, 7), shape("l.qzeros", [4, 7], [4, 8])),
    "gptq outputs": (gptq(WEIGHT), cut(".qweight", 16, 63), shape("l.scales", [4, 64], [4, 63])),
    "gptq outputs of half a number": (
        gptq(WEIGHT),
        lambda parts: (cut(".qweight", 16, 60)(parts), cut(".scales", 4, 60)(parts)),
        r"l\.qweight has shape \[16, 60\]; it must be \[inputs / 8, a multiple of 8\]",
    ),
    "gptq nothing": (gptq(WEIGHT), cut(".qweight", 0), r"l\.qweight has shape \[0, 64\].*\[inputs / 8, outputs\]"),
    "gptq one dimension": (
        gptq(WEIGHT),
        put(".qweight", torch.zeros(8).int()),
        r"qweight has shape \[8\]",
    ),
    "gptq type": (gptq(WEIGHT), put(".qweight", torch.zeros(16, 64)), r"l\.qweight is F32; it must be I32"),
    "gptq scales of whole numbers": (
        gptq(WEIGHT),
        put(".scales", torch.zeros(4, 64).char()),
        "it must be F16",
    ),
    "gptq g_idx short": (gptq(WEIGHT), cut(".g_idx", 100), shape("l.g_idx", [100], [128])),
    "gptq g_idx beyond": (
        gptq(WEIGHT),
        put(".g_idx", groups(4)),
        "names group 4; there are 4",
    ),
    "gptq g_idx below": (gptq(WEIGHT), put(".g_idx", groups(-1)), "names group -1"),
    "awq scales missing": (awq(WEIGHT), without(".scales"), r"l\.scales is missing"),
    "awq zeros": (awq(WEIGHT), cut(".qzeros", 3), shape("l.qzeros", [3, 8], [4, 8])),
    "awq scales": (awq(WEIGHT), cut(".scales", 4, 56), shape("l.scales", [4, 56], [4, 64])),
    "awq groups": (awq(WEIGHT), cut(".qweight", 100), r"l\.qweight has shape \[100, 8\].*a multiple of 32"),
    "marlin scales": (marlin(WEIGHT), cut(".s", 1, 60), shape("l.s", [1, 60], [1, 64])),
    "marlin width": (marlin(WEIGHT), cut(".B", 8, 100), r"l\.B has shape \[8, 100\].*runs of 64"),
    "marlin groups": (marlin(WEIGHT), cut(".B", 7), r"l\.B has shape \[7, 128\].*groups of inputs are whole"),
    "ct shape missing": (ct_packed(WEIGHT), without(".weight_shape"), r"l\.weight_shape is missing"),
    "ct scale missing": (ct_packed(WEIGHT), without(".weight_scale"), r"l\.weight_scale is missing"),
    "ct shape of three": (
        ct_packed(WEIGHT),
        put(".weight_shape", torch.tensor([1, 2, 3])),
        r"weight_shape has shape \[3\]",
    ),
    "ct shape lies": (
        ct_packed(WEIGHT),
        put(".weight_shape", torch.tensor([64, 1 << 40])),
        r"weight_packed has shape \[64, 16\]",
    ),
    "ct shape below 0": (
        ct_packed(WEIGHT),
        put(".weight_shape", torch.tensor([64, -128])),
        r"weight_packed has shape \[64, 16\]",
    ),
    "ct scales": (
        ct_packed(WEIGHT),
        cut(".weight_scale", 64, 3),
        shape("weight_scale", [64, 3], [64, 4]),
    ),
    "ct zeros": (
        ct_packed(WEIGHT, symmetric=False),
        cut(".weight_zero_point", 7),
        shape("zero_point", [7, 4], [8, 4]),
    ),
    "ct g_idx": (
        ct_packed(WEIGHT, act_order=True),
        put(".weight_g_idx", groups(9)),
        "names group 9",
    ),
    "ct int8 scale": (
        ct_int8(WEIGHT),
        cut(".weight_scale", 63),
        shape("weight_scale", [63, 1], [64, 1]),
    ),
    "ct int8 dimensions": (
        ct_int8(WEIGHT),
        put(".weight", torch.zeros(8).char()),
        r"l\.weight has shape \[8\]",
    ),
    "fp8 scale missing": (fp8(WEIGHT), without(".weight_scale"), r"l\.weight_scale is missing"),
    "fp8 scale": (
        fp8(WEIGHT),
        put(".weight_scale", torch.ones(2)),
        r"weight_scale has shape \[2\]; it must be one number or",
    ),
    "fp8 blocks": (
        fp8(WEIGHT, block=(24, 40)),
        cut(".weight_scale_inv", 3, 3),
        r"weight_scale_inv has shape \[3, 3\]; it must be \[3, 4\] for blocks of 24 x 40",
    ),
    "fp8 dimensions": (
        fp8(WEIGHT),
        put(".weight", WEIGHT[None].to(torch.float8_e4m3fn)),
        r"l\.weight has shape \[1, 64, 128\]",
    ),
    "mxfp4 scales": (
        mxfp4(WEIGHT),
        cut(".weight_scale", 64, 3),
        shape("weight_scale", [64, 3], [64, 4]),
    ),
    "mxfp4 rows": (mxfp4(WEIGHT), cut(".weight_packed", 64, 60), "whole groups of 32"),
    "experts": (
        EXPERTS,
        cut("_scales", 1, 60),
        shape("l_scales", [1, 60, 4], [1, 64, 4]),
    ),
    "experts alone": (EXPERTS, without("_scales"), "l_scales is missing"),
    "expert bytes": (EXPERTS, cut("_blocks", 1, 64, 4, 15), "16 bytes are a group"),
    "nvfp4 scales": (
        nvfp4(WEIGHT),
        cut(".weight_scale", 64, 7),
        shape("weight_scale", [64, 7], [64, 8]),
    ),
    "nvfp4 whole": (
        nvfp4(WEIGHT),
        put(".weight_scale_2", torch.ones(2)),
        shape("weight_scale_2", [2], [1]),
    ),
    "nvfp4 type": (nvfp4(WEIGHT), put(".weight_scale", torch.ones(64, 8)), "it must be F8_E4M3"),
    "ct nvfp4 whole missing": (
        nvfp4(WEIGHT, ct=True),
        without(".weight_global_scale"),
        r"l\.weight_global_scale is missing",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_parts_that_do_not_go_together(name: str, tmp_path: Path) -> None:
    written, change, message = WRONG[name]
    parts = dict(written.parts)
    change(parts)
    with pytest.raises(InvalidFileError, match=message) as caught:
        read(Written(parts, written.weight, written.config), tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize("layer", ["k_proj", "kv_a_proj"])
def test_scales_of_more_blocks_than_a_matrix_has(layer: str, tmp_path: Path) -> None:
    """Only MiMo V2 reads them: two halves of 32 rows have two blocks of 24 rows each."""
    written = fp8(WEIGHT, block=(24, 40))
    parts = {f".{layer}{end}": part for end, part in written.parts.items()}
    parts[f".{layer}.weight_scale_inv"] = torch.ones(4, 4)
    with pytest.raises(InvalidFileError, match=r"_proj\.weight_scale_inv has shape \[4, 4\]; it must be \[3, 4\]"):
        read(Written(parts, written.weight, written.config), tmp_path)


def test_packed_codes_without_a_config_group(tmp_path: Path) -> None:
    with pytest.raises(InvalidFileError, match="layer l is stored quantised, but quantization_config has no"):
        read(ct_packed(WEIGHT), tmp_path, config_groups={})


@pytest.mark.parametrize(
    "written", [fp8(WEIGHT, ct=True), ct_int8(WEIGHT), nvfp4(WEIGHT)], ids=["fp8", "int8", "nvfp4"]
)
def test_numbers_whose_scales_are_missing(written: Written, tmp_path: Path) -> None:
    """They would look like plain weights of an odd type."""
    parts = {".weight": written.parts[".weight"]}
    with pytest.raises(InvalidFileError, match=r"l\.weight is (F8_E4M3|I8|U8), and the checkpoint has no scales"):
        read(Written(parts, written.weight, written.config), tmp_path)


def test_a_matrix_that_is_stored_twice(tmp_path: Path) -> None:
    written = gptq(WEIGHT)
    written.parts[".weight"] = WEIGHT
    with pytest.raises(InvalidFileError, match=r"l\.weight is stored both quantised and unquantised"):
        read(written, tmp_path)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"num_bits": 3, "type": "int"}, "type int with num_bits 3 are not implemented; implemented: int of 4 bits"),
        ({"num_bits": 4, "type": "int", "strategy": "attn_head"}, "strategy is 'attn_head'"),
        ({"num_bits": 4, "type": "int", "strategy": "group"}, "group_size is missing"),
        ({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 0}, "group_size is 0"),
        ({"num_bits": 4, "type": "int", "strategy": "group", "group_size": -32}, "group_size is -32"),
        ({"num_bits": 4, "type": "int", "strategy": "group", "group_size": "32"}, "group_size is '32'"),
        ({"num_bits": 4, "type": "int", "strategy": "block"}, "block_structure is missing"),
        ({"num_bits": 4, "type": "int", "strategy": "block", "block_structure": [1, 2.5]}, "block_structure is"),
        ({"type": "int"}, "num_bits is missing"),
        ({"num_bits": 4, "type": "bool"}, "type is 'bool'"),
        (["int"], "weights is"),
    ],
)
def test_a_config_group_that_cannot_be_read(weights: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=message) as caught:
        read(ct_packed(WEIGHT), tmp_path, config_groups={"group_0": {"targets": ["Linear"], "weights": weights}})
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    "config", [{"config_groups": []}, {"config_groups": {"a": 1}}, {"sparsity_config": {"format": "x"}}, ROTATED]
)
def test_other_damage_of_compressed_tensors(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        read(ct_packed(WEIGHT), tmp_path, **config)
