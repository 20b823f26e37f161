"""What is in a block of each ggml type, as tensors on any device: used at load by `pack.py`.

The GPU takes a model's blocks apart itself, so that loading costs the copy of the file and little more. What the bytes
mean: ggml's `ggml-common.h`. Shapes: R rows, B blocks of a row, W bytes, K weights of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.packed_linear.layout import PackedKind


class BlockCodes(NamedTuple):
    """What some rows are made of.

    Attributes:
        codes: uint8 [R, K], unsigned.
        scale, minimum: int16 [R, B], bits of float16; a minimum is added, and None where there is none.
        small: uint8 [R, B, 16], the sub-scales of K-quants in the order in which the layout has them; else None.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None = None
    small: torch.Tensor | None = None


def take_apart(blocks: torch.Tensor, kind: PackedKind) -> BlockCodes:
    """Blocks of the kind's own ggml type: uint8 [R, B, W]."""
    return _PARTS[kind](blocks)


def from_floats(weights: torch.Tensor) -> BlockCodes:
    """Rounds float32 [R, K] to 8 bits with a float16 scale for each 32, large enough for its largest weight."""
    groups = weights.reshape(len(weights), -1, 32)
    largest = groups.abs().amax(2)
    if not bool((largest < 127 * 65504).all()):  # False for NaN too
        raise UnsupportedModelError("a weight is not finite or above 8 million: the file is damaged, or needs F32")
    scale = (largest / 127).half()
    short = scale.float() * 127 < largest
    scale = torch.where(short, (scale.view(torch.int16) + 1).view(torch.float16), scale)  # the next float16
    exact = scale.float()[:, :, None]
    codes = torch.where(exact > 0, groups / exact, 0.0).round().to(torch.int16) + 128
    return BlockCodes(codes.to(torch.uint8).reshape(weights.shape), scale.view(torch.int16))


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 at byte `start` of each block, as its bits [R, B]."""
    return blocks[:, :, start : start + 2].contiguous().view(torch.int16)[:, :, 0]


def _negated(half: torch.Tensor) -> torch.Tensor:
    return half ^ -0x8000


def _fields(blocks: torch.Tensor, start: int, stop: int, width: int, bits: int) -> torch.Tensor:
    """Bit fields of bytes `start` to `stop`, lowest first for each run of `width` bytes: [R, B, fields]."""
    runs = blocks[:, :, start:stop].unflatten(2, (-1, 1, width))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=blocks.device)[:, None]
    return (runs >> shifts & (1 << bits) - 1).flatten(2)


def _single_bits(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """4 bytes from `start` as 32 bits, lowest first: [R, B, 32]."""
    return _fields(blocks, start, start + 4, 1, 1)


def _simple(codes: torch.Tensor, blocks: torch.Tensor, minimum: bool = False) -> BlockCodes:
    return BlockCodes(codes.flatten(1), _half(blocks, 0), _half(blocks, 2) if minimum else None)


def _q4_0(blocks: torch.Tensor) -> BlockCodes:
    return _simple(_fields(blocks, 2, 18, 16, 4), blocks)


def _q4_1(blocks: torch.Tensor) -> BlockCodes:
    return _simple(_fields(blocks, 4, 20, 16, 4), blocks, minimum=True)


def _q5_0(blocks: torch.Tensor) -> BlockCodes:
    return _simple(_fields(blocks, 6, 22, 16, 4) | _single_bits(blocks, 2) << 4, blocks)


def _q5_1(blocks: torch.Tensor) -> BlockCodes:
    return _simple(_fields(blocks, 8, 24, 16, 4) | _single_bits(blocks, 4) << 4, blocks, minimum=True)


def _q8_0(blocks: torch.Tensor) -> BlockCodes:
    return _simple(blocks[:, :, 2:] ^ 128, blocks)


def _q2_k(blocks: torch.Tensor) -> BlockCodes:
    """16 bytes of scale (low nibble) and minimum (high), 64 of 2-bit numbers, d, dmin."""
    codes = _fields(blocks, 16, 80, 32, 2)
    return BlockCodes(codes.flatten(1), _half(blocks, 80), _negated(_half(blocks, 82)), blocks[:, :, :16])


def _q3_k(blocks: torch.Tensor) -> BlockCodes:
    """32 bytes of high bits, 64 of low 2-bit numbers, 12 of 6-bit scales, d."""
    codes = _fields(blocks, 32, 96, 32, 2) | _fields(blocks, 0, 32, 32, 1) << 2
    small = (_fields(blocks, 96, 104, 8, 4) | _fields(blocks, 104, 108, 4, 2) << 4) - 32  # wraps: a signed byte
    return BlockCodes(codes.flatten(1), _half(blocks, 108), None, small)


def _six_bit_scales(blocks: torch.Tensor) -> torch.Tensor:
    """The 12 bytes from byte 4 of Q4_K and Q5_K: for each half block, the scales and then the minima of its groups."""
    first, second, third = blocks[:, :, 4:8], blocks[:, :, 8:12], blocks[:, :, 12:16]
    scales = (first & 63, third & 15 | first >> 2 & 48)
    minima = (second & 63, third >> 4 | second >> 2 & 48)
    return torch.cat([scales[0], minima[0], scales[1], minima[1]], 2)


def _q4_k(blocks: torch.Tensor) -> BlockCodes:
    """d, dmin, 12 bytes of scales, 128 of nibbles: 32 bytes hold two groups."""
    codes = _fields(blocks, 16, 144, 32, 4)
    return BlockCodes(codes.flatten(1), _half(blocks, 0), _negated(_half(blocks, 2)), _six_bit_scales(blocks))


def _q5_k(blocks: torch.Tensor) -> BlockCodes:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: bit i of each belongs to group i."""
    codes = _fields(blocks, 48, 176, 32, 4) | _fields(blocks, 16, 48, 32, 1) << 4
    return BlockCodes(codes.flatten(1), _half(blocks, 0), _negated(_half(blocks, 2)), _six_bit_scales(blocks))


def _q6_k(blocks: torch.Tensor) -> BlockCodes:
    """128 bytes of low nibbles, 64 of high 2-bit fields, 16 int8 scales, d."""
    codes = _fields(blocks, 0, 128, 64, 4) | _fields(blocks, 128, 192, 32, 2) << 4
    return BlockCodes(codes.flatten(1), _half(blocks, 208), None, blocks[:, :, 192:208])


_PARTS: Mapping[PackedKind, Callable[[torch.Tensor], BlockCodes]] = MappingProxyType(
    {
        PackedKind.Q4_0: _q4_0,
        PackedKind.Q4_1: _q4_1,
        PackedKind.Q5_0: _q5_0,
        PackedKind.Q5_1: _q5_1,
        PackedKind.Q8_0: _q8_0,
        PackedKind.Q2_K: _q2_k,
        PackedKind.Q3_K: _q3_k,
        PackedKind.Q4_K: _q4_k,
        PackedKind.Q5_K: _q5_k,
        PackedKind.Q6_K: _q6_k,
    }
)
