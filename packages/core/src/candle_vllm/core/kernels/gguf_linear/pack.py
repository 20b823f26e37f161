# SPDX-License-Identifier: MIT
"""Convert GGUF bytes to the GPU's layout, once, at load, before step 1 of a request's life.

Some rows at a time are copied to the device and arranged there in torch; types without a layout are rounded before.
"""

from __future__ import annotations

import logging
from functools import cache

import numpy as np
import torch

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.gguf_linear.layout import PLANES, WORDS, GgufMatrix, Planes, gguf_kind
from candle_vllm.core.kernels.packed_linear import grids
from candle_vllm.core.kernels.packed_linear.grids import GridLayout
from candle_vllm.core.kernels.packed_linear.layout import GROUP, LAYOUTS
from candle_vllm.core.quantization import ggml
from candle_vllm.core.quantization.ggml_blocks import BlockParts, as_q5_0, take_apart
from candle_vllm.core.quantization.ggml_types import CONTENTS, GGMLQuantizationType

logger = logging.getLogger(__name__)

CHUNK = 1 << 24
"""Number of weights that are converted at a time, but at least a row; this needs about 20 times as many bytes."""


def pack(
    raw: np.ndarray, ggml_type: GGMLQuantizationType, rows: int, columns: int, device: torch.device | str
) -> GgufMatrix:
    """Copy a quantised matrix to a device.

    A type with its own layout stays exact, and so does MXFP4, as Q5_0, if float16 holds its scales. Any other matrix is
    decoded and rounded to 8 bits with a scale for each 32 weights; this is logged.

    Args:
        raw: the tensor's bytes, uint8, contiguous; need not be aligned.
        rows, columns: N and K; the rows stay in their order.

    Raises:
        UnsupportedModelError: no kernel multiplies such a matrix.
        ValueError: the length of `raw` does not match the shape.
    """
    kind, device = gguf_kind(ggml_type), torch.device(device)
    size, width = ggml_type.block
    if rows < 1 or columns < 1 or columns % max(size, 32):
        raise UnsupportedModelError(
            f"a {ggml_type.name} matrix of {rows} x {columns} cannot be read: its rows must be a multiple of "
            f"{max(size, 32)} weights long"
        )
    if raw.dtype != np.uint8 or raw.size != rows * (columns // size) * width:
        raise ValueError(f"{raw.size} bytes given for a {ggml_type.name} matrix of {rows} x {columns}")
    if ggml_type is GGMLQuantizationType.MXFP4 and (blocks := as_q5_0(raw)) is not None:
        return pack(blocks, GGMLQuantizationType.Q5_0, rows, columns, device)
    if kind.type is not ggml_type:
        _log_rounding(ggml_type)
    planes = PLANES[kind]
    found = planes.empty(rows, columns, device)
    source = raw.reshape(rows, columns // size, width)
    step = max(1, CHUNK // columns)
    for first in range(0, rows, step):
        part = np.ascontiguousarray(source[first : first + step])
        if kind.type is not ggml_type:
            part = ggml.round_to_q8_0(part, ggml_type)
        layout = LAYOUTS[kind]
        if isinstance(layout, GridLayout):
            parts = _of_grid(part, layout, device)
        else:
            there = torch.from_numpy(part.copy()).to(device)  # torch must not wrap a mapped file, which is read-only
            parts = take_apart(there, CONTENTS[kind.type], torch)
        _store(parts, planes, found, slice(first, first + step))
    return GgufMatrix(rows, columns, kind, **found)  # pyrefly: ignore[bad-argument-type]  # the names are its own


@cache
def _log_rounding(ggml_type: GGMLQuantizationType) -> None:
    """Log once for each type that its matrices are rounded to 8 bits."""
    text = "%s has no kernel: its matrices are converted to 8 bits, which takes %.1f times the memory"
    size, width = ggml_type.block
    logger.info(text, ggml_type.name, 8.5 * size / (8 * width))


def _of_grid(part: np.ndarray, layout: GridLayout, device: torch.device) -> BlockParts[torch.Tensor]:
    """Decode rows of blocks [R, B, bytes] of a grid type to parts with a code for each weight."""
    found = grids.decoded(dict(grids.split(part, layout)), layout, lambda array: torch.from_numpy(array).to(device))
    codes = torch.from_numpy(grids.codes(layout.name)).to(device)[found.indices]
    codes = codes.view(found.flags.shape) | found.flags << 3
    scale = found.supers.to(torch.int16).view(torch.uint8).unflatten(-1, (-1, 2))
    return BlockParts(codes.to(torch.uint8), scale, None, found.scales.to(torch.uint8))


def _store(parts: BlockParts[torch.Tensor], planes: Planes, found: dict[str, torch.Tensor | None], rows: slice) -> None:
    """Write the parts of some rows to the planes."""
    codes = parts.codes.flatten(1)
    if planes.layout.values is None:  # else codes are already unsigned
        codes = codes + planes.layout.zero
    codes = arranged(codes, planes.groups)
    for name, first, bits in (("low", 0, planes.low), ("high", planes.low, planes.high)):
        target = found[name]
        if target is not None:
            words = plane(codes >> first & (1 << bits) - 1, bits)
            if bits == 1:  # an element has the bits of two steps
                steps = torch.nn.functional.pad(words, (0, 0, 0, words.shape[1] % 2)).unflatten(1, (-1, 2))
                words = steps[:, :, 0] | steps[:, :, 1] << 8
            target[:, rows] = words.to(target.dtype).transpose(0, 1)
    scales, supers = found["scales"], found["supers"]
    assert scales is not None
    scales[:, :, rows] = _scale_words(parts, planes).permute(1, 2, 0)
    if supers is not None:
        scale = _half(parts.scale)
        negated = torch.zeros_like(scale) if parts.minimum is None else _half(parts.minimum) ^ -0x8000
        supers[:, rows] = torch.stack([scale, negated], -1).view(torch.int32)[..., 0].transpose(0, 1)


def _half(data: torch.Tensor) -> torch.Tensor:
    """View bytes of float16 [R, B, 2] as int16 [R, B]."""
    return data.contiguous().view(torch.int16)[:, :, 0]


def arranged(codes: torch.Tensor, groups: int) -> torch.Tensor:
    """Convert codes uint8 [R, K] to [R, steps, groups, 2, 16], padded with 0; a step has `groups` groups."""
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (groups * GROUP)))
    return codes.view(len(codes), -1, groups, WORDS, 2).transpose(3, 4)


def plane(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes of `bits` bits, uint8 [R, steps, groups, 2, 16], to int32 [R, steps, 16]."""
    groups = codes.shape[2]
    packed = torch.zeros((*codes.shape[:2], WORDS), dtype=torch.int32, device=codes.device)
    for half in range(2):
        for group in range(groups):
            packed |= codes[:, :, group, half].to(torch.int32) << bits * (group + groups * half)
    return packed


def _scale_words(parts: BlockParts[torch.Tensor], planes: Planes) -> torch.Tensor:
    """Return the words of the plane `scales`, int32 [R, steps, words]."""
    if parts.scales is not None:
        small = parts.scales
        if parts.minima is not None and planes.layout.paired:
            small = small | parts.minima << 4
        elif parts.minima is not None:
            small = torch.stack([part.unflatten(-1, (-1, planes.groups)) for part in (small, parts.minima)], -2)
        return small.reshape(len(small), -1, 4 * planes.words).contiguous().view(torch.int32)
    numbers = [_half(part) for part in (parts.scale, parts.minimum) if part is not None]
    groups = torch.stack(numbers, -1)  # [R, groups of the row, 1 or 2]
    groups = torch.nn.functional.pad(groups, (0, 0, 0, -groups.shape[1] % planes.groups))
    return groups.reshape(len(groups), -1, planes.groups * len(numbers)).view(torch.int32)
