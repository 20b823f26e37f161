# SPDX-License-Identifier: MIT
"""Quantised layers as other programs store them, written out literally, and the weights that their bytes mean.

Nothing here is the library's: codes are put into words one by one, and weights are computed number by number or group
by group from what each format's description says.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

TYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
}


@dataclass
class Written:
    """A stored layer.

    Attributes:
        parts: stored tensors by the end of their names.
        weight: what they mean, float32.
        config: `quantization_config` of a checkpoint of such layers.
    """

    parts: dict[str, torch.Tensor]
    weight: torch.Tensor
    config: dict[str, Any] = field(default_factory=dict)


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """A file in which, other than the usual writers leave it, no tensor begins at a multiple of its element's size."""
    header: dict[str, Any] = {"odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    data, end = [b"\0"], 1
    for name, tensor in tensors.items():
        raw = torch.cat([tensor.reshape(-1)]).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(raw)],
        }
        data.append(raw)
        end += len(raw)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))
    return path


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers [R, C] as int32 [R, C * bits / 32], rounded up, the first in the lowest bits."""
    per = 32 // bits
    words = np.zeros((len(codes), -(-codes.shape[1] // per)), np.uint32)
    for column in range(codes.shape[1]):
        words[:, column // per] |= codes[:, column].numpy().astype(np.uint32) << np.uint32(bits * (column % per))
    return torch.from_numpy(words.view(np.int32).copy())


@dataclass
class Quantised:
    """Rounded weights: codes [N, K], scales and zeros [N, G], the group of each column, and what they mean."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    group_of: list[int]
    weight: torch.Tensor


def quantise(
    weight: torch.Tensor, group_of: list[int], bits: int, symmetric: bool, dtype: torch.dtype = torch.float16
) -> Quantised:
    """Rounds to nearest, column by column."""
    rows, groups, top = len(weight), max(group_of) + 1, (1 << bits) - 1
    scales, zeros = torch.empty(rows, groups, dtype=dtype), torch.empty(rows, groups, dtype=torch.int64)
    codes, meant = torch.empty(weight.shape, dtype=torch.int64), torch.empty_like(weight)
    for group in range(groups):
        columns = [column for column, own in enumerate(group_of) if own == group]
        part = weight[:, columns]
        low, high = part.min(1).values.clamp(max=0), part.max(1).values.clamp(min=1e-4)
        if symmetric:
            scales[:, group] = (part.abs().max(1).values.clamp(min=1e-4) * 2 / top).to(dtype)
            zeros[:, group] = 1 << (bits - 1)
        else:
            scales[:, group] = ((high - low) / top).to(dtype)
            zeros[:, group] = (-low / scales[:, group].float()).round().clamp(0, top).long()
        scale = scales[:, group].float()
        for column in columns:
            code = ((weight[:, column] / scale).round().long() + zeros[:, group]).clamp(0, top)
            codes[:, column] = code
            meant[:, column] = scale * (code - zeros[:, group]).float()
    return Quantised(codes, scales, zeros, group_of, meant)


def neighbours(columns: int, group: int) -> list[int]:
    return [0 if group < 0 else column // group for column in range(columns)]


def gptq(
    weight: torch.Tensor,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    version: int = 1,
    act_order: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Written:
    group_of = neighbours(weight.shape[1], group)
    if act_order:
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(3)).tolist()
        group_of = [group_of[column] for column in order]
    found = quantise(weight, group_of, bits, symmetric, dtype)
    zeros = (found.zeros - 1) % (1 << bits) if version == 1 else found.zeros
    parts = {
        ".qweight": packed(found.codes, bits).T,
        ".qzeros": packed(zeros.T, bits),
        ".scales": found.scales.T,
        ".g_idx": torch.tensor(group_of, dtype=torch.int32),
    }
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": symmetric}
    if version == 2:
        config["checkpoint_format"] = "gptq_v2"
    return Written(parts, found.weight, config)


def awq(weight: torch.Tensor, *, group: int = 32) -> Written:
    found = quantise(weight, neighbours(weight.shape[1], group), 4, symmetric=False)

    def shuffled(codes: torch.Tensor) -> torch.Tensor:
        words = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
        for column in range(0, codes.shape[1], 8):
            for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                words[:, column // 8] |= codes[:, column + output].numpy().astype(np.uint32) << np.uint32(4 * place)
        return torch.from_numpy(words.view(np.int32).copy())

    parts = {".qweight": shuffled(found.codes.T), ".qzeros": shuffled(found.zeros.T), ".scales": found.scales.T}
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Written(parts, found.weight, config)


def marlin(weight: torch.Tensor, *, group: int = 128) -> Written:
    """Code by code: which of a tile's 16 x 64 weights each of a warp's registers holds."""
    rows, columns = weight.shape
    found = quantise(weight, neighbours(columns, group), 4, symmetric=True)
    words = np.zeros((columns // 16, rows * 2), np.uint32)
    codes = found.codes.numpy().astype(np.uint32)
    for lane in range(32):
        for block in range(4):
            eight = [
                (2 * (lane % 4) + 8 * pair + odd, 16 * block + 8 * half + lane // 4)
                for half in range(2)
                for pair in range(2)
                for odd in range(2)
            ]
            for nibble, number in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                k, n = eight[number]
                for tile in range(rows // 64):
                    own = codes[tile * 64 + n, k::16] << np.uint32(4 * nibble)
                    words[:, tile * 128 + lane * 4 + block] |= own
    scales = found.scales.T.clone()
    run = 64 if scales.shape[0] > 1 else 32
    stored = torch.empty_like(scales)
    for place in range(rows):
        first, i = place // run * run, place % run
        output = i // 8 + 8 * (i % 8) if run == 64 else 2 * (i // 8) + 8 * (i % 8 // 2) + i % 2
        stored[:, place] = scales[:, first + output]
    parts = {".B": torch.from_numpy(words.view(np.int32).copy()), ".s": stored}
    config = {"quant_method": "gptq", "bits": 4, "group_size": group, "is_marlin_format": True}
    return Written(parts, found.weight, config)


def _ct_config(format: str, weights: dict[str, Any], **group: Any) -> dict[str, Any]:
    own = {"targets": ["Linear"], "weights": weights, "input_activations": None} | group
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": own},
        "ignore": ["lm_head"],
    }


def ct_packed(
    weight: torch.Tensor,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    act_order: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Written:
    group_of = neighbours(weight.shape[1], group)
    if act_order:
        group_of = group_of[::2] + group_of[1::2]
    found = quantise(weight, group_of, bits, symmetric, dtype)
    parts = {
        ".weight_packed": packed(found.codes, bits),
        ".weight_scale": found.scales,
        ".weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        parts[".weight_zero_point"] = packed(found.zeros.T, bits).T
    if act_order:
        parts[".weight_g_idx"] = torch.tensor(group_of, dtype=torch.int32)
    strategy = {"strategy": "channel"} if group < 0 else {"strategy": "group", "group_size": group}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, **strategy}
    return Written(parts, found.weight, _ct_config("pack-quantized", weights))


def ct_int8(weight: torch.Tensor, *, symmetric: bool = True, dtype: torch.dtype = torch.bfloat16) -> Written:
    found = quantise(weight, neighbours(weight.shape[1], -1), 8, symmetric, dtype)
    parts = {".weight": (found.codes - 128).to(torch.int8), ".weight_scale": found.scales}
    if not symmetric:
        parts[".weight_zero_point"] = (found.zeros - 128).to(torch.int8)
    weights = {"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": "channel"}
    activations = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
    return Written(parts, found.weight, _ct_config("int-quantized", weights, input_activations=activations))


def fp8(
    weight: torch.Tensor,
    *,
    block: tuple[int, int] | None = None,
    channel: bool = False,
    dtype: torch.dtype = torch.float8_e4m3fn,
    ct: bool = False,
) -> Written:
    rows, columns = weight.shape
    height, width = block or ((1, columns) if channel else (rows, columns))
    scales = torch.empty(-(-rows // height), -(-columns // width))
    stored, meant = torch.empty(weight.shape, dtype=dtype), torch.empty_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            where = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            scales[i, j] = weight[where].abs().max().clamp(min=1e-6) / torch.finfo(dtype).max
            stored[where] = (weight[where] / scales[i, j]).to(dtype)
            meant[where] = stored[where].float() * scales[i, j]
    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    if ct:
        strategy = {"strategy": "block", "block_structure": block} if block else {}
        strategy = strategy or {"strategy": "channel" if channel else "tensor"}
        config = _ct_config("float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, **strategy})
    name = ".weight_scale_inv" if block and not ct else ".weight_scale"
    scale = scales if block or channel else scales.reshape(1)
    return Written({".weight": stored, name: scale}, meant, json.loads(json.dumps(config)))


def e2m1(code: int) -> float:
    """A sign, two bits of exponent, one of mantissa; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    value = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -value if sign else value


def nearest_e2m1(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and the numbers that they are."""
    table = torch.tensor([e2m1(code) for code in range(16)])
    codes = (values[..., None] - table).abs().argmin(-1)
    return codes, table[codes]


def byte_pairs(codes: torch.Tensor) -> torch.Tensor:
    """The first of two codes in the lower half of a byte."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def mxfp4(weight: torch.Tensor, *, ct: bool = True) -> Written:
    """compressed-tensors' names; else gpt-oss's, whose weight has leading dimensions."""
    groups = weight.reshape(*weight.shape[:-1], -1, 32)
    exponents = (groups.abs().amax(-1).clamp(min=1e-6) / 6).log2().ceil().long()
    codes, values = nearest_e2m1(groups / torch.exp2(exponents.double())[..., None].float())
    meant = (values * torch.exp2(exponents.double())[..., None].float()).reshape(weight.shape)
    blocks, scales = byte_pairs(codes), (exponents + 127).to(torch.uint8)
    if not ct:
        return Written({"_blocks": blocks, "_scales": scales}, meant, {"quant_method": "mxfp4"})
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
    parts = {".weight_packed": blocks.flatten(-2), ".weight_scale": scales}
    return Written(parts, meant, _ct_config("mxfp4-pack-quantized", weights))


def nvfp4(weight: torch.Tensor, *, ct: bool = False) -> Written:
    groups = weight.reshape(len(weight), -1, 16)
    whole = weight.abs().max() / (6 * 448)
    stored_whole = 1 / whole if ct else whole
    scales = (groups.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
    exact = scales.float() / stored_whole if ct else scales.float() * stored_whole
    codes, values = nearest_e2m1(groups / exact[..., None])
    meant = (values * exact[..., None]).reshape(weight.shape)
    pairs = byte_pairs(codes).flatten(-2)
    if not ct:
        parts = {".weight": pairs, ".weight_scale": scales, ".weight_scale_2": stored_whole}
        return Written(parts, meant, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    parts = {".weight_packed": pairs, ".weight_scale": scales, ".weight_global_scale": stored_whole.reshape(1)}
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    return Written(parts, meant, _ct_config("nvfp4-pack-quantized", weights))


Writer = Callable[[torch.Tensor], Written]

WRITERS: Mapping[str, Writer] = {
    "gptq": gptq,
    "gptq 8 bits": lambda w: gptq(w, bits=8),
    "gptq asymmetric": lambda w: gptq(w, symmetric=False),
    "gptq v2": lambda w: gptq(w, symmetric=False, version=2),
    "gptq 8 bits asymmetric": lambda w: gptq(w, bits=8, symmetric=False),
    "gptq whole rows": lambda w: gptq(w, group=-1),
    "gptq act order": lambda w: gptq(w, act_order=True, symmetric=False),
    "gptq bf16 scales": lambda w: gptq(w, dtype=torch.bfloat16),
    "awq": awq,
    "awq whole rows": lambda w: awq(w, group=-1),
    "ct int4": ct_packed,
    "ct int4 asymmetric": lambda w: ct_packed(w, symmetric=False),
    "ct int4 channel": lambda w: ct_packed(w, group=-1, dtype=torch.float16),
    "ct int4 act order": lambda w: ct_packed(w, act_order=True),
    "ct int8 packed": lambda w: ct_packed(w, bits=8),
    "ct int8": ct_int8,
    "ct int8 asymmetric": lambda w: ct_int8(w, symmetric=False),
    "fp8": fp8,
    "fp8 e5m2": lambda w: fp8(w, dtype=torch.float8_e5m2),
    "fp8 channel": lambda w: fp8(w, channel=True),
    "fp8 blocks": lambda w: fp8(w, block=(24, 40)),
    "fp8 blocks of 32": lambda w: fp8(w, block=(24, 32)),
    "ct fp8": lambda w: fp8(w, ct=True),
    "ct fp8 channel": lambda w: fp8(w, channel=True, ct=True),
    "ct fp8 blocks": lambda w: fp8(w, block=(24, 40), ct=True),
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
    "ct nvfp4": lambda w: nvfp4(w, ct=True),
}
"""Every format for matrices of rows that are a multiple of 32 long; Marlin and gpt-oss's experts stand apart."""


def quantise_model(source: Path, folder: Path, writer: Writer, *, head: bool = False) -> tuple[Path, Path]:
    """The model with its linear layers written by `writer`, and a plain one with the weights that they mean."""
    stored: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    settings: dict[str, Any] = {}
    config = json.loads((source / "config.json").read_text())
    for name, tensor in load_file(source / "model.safetensors").items():
        if "_proj." in name or (head and name.startswith("lm_head")):
            written = writer(tensor)
            settings = written.config
            layer = name.removesuffix(".weight")
            stored |= {layer + end: part.contiguous() for end, part in written.parts.items()}
            meant[name] = written.weight
        else:
            stored[name] = meant[name] = tensor
    both = folder / "quantised", folder / "decoded"
    for path, tensors, extra in zip(both, (stored, meant), ({"quantization_config": settings}, {}), strict=True):
        path.mkdir()
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config | extra))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (path / file).write_bytes((source / file).read_bytes())
    return both
