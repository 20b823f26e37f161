# SPDX-License-Identifier: MIT
"""GPTQ: codes of 4 or 8 bits packed along the inputs, with scales and zeros of groups of inputs.

A layer [N, K] has G groups, with P = 32 / bits codes in an int32:

    qweight  int32 [K / P, N]   code of (k, n) at bit bits * (k % P) of [k / P, n]
    qzeros   int32 [G, N / P]   zero of (g, n) at bit bits * (n % P) of [g, n / P]; in version 1 minus one
    scales   float [G, N]
    g_idx    int32 [K]          the group of each input (activation order); without it, groups are runs of inputs

A zero of version 1 is (stored + 1) mod 2^bits, which inverts what the writers do, and is what AutoGPTQ's own torch
layer computes; quantisers make only zeros from 0 to 2^bits - 1.
Source: Frantar et al., 2022, arXiv:2210.17323; AutoGPTQ's and GPTQModel's torch layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.quantization import marlin
from candle_vllm.core.quantization.finding import Found, StoredTensors, group_size, layers_with
from candle_vllm.core.quantization.group_codes import GroupCodes, fields, zeros_or_middle
from candle_vllm.core.quantization.stored import FLOATS, LayerTensors, QuantisedTensor, WeightSource, floats, numbers
from candle_vllm.core.quantization.tensors import StoredTensor

METHODS = ("gptq", "gptq_marlin")
FILES = ("quantize_config.json",)


@dataclass(frozen=True)
class GptqScheme:
    """Settings of a layer from the config.

    Attributes:
        bits: 4 or 8.
        group: inputs in a group; -1 for all.
        zeros_less_one: the zeros are stored as in version 1.
    """

    bits: int
    group: int
    zeros_less_one: bool


@dataclass(eq=False)
class GptqSource(WeightSource[GroupCodes]):
    """Source of a layer's rows; see the module docstring."""

    scheme: GptqScheme
    qweight: StoredTensor
    qzeros: StoredTensor
    scales: StoredTensor
    group_of: np.ndarray | None

    def __post_init__(self) -> None:
        self.align = 32 // self.scheme.bits

    def read(self, first: int, last: int) -> GroupCodes:
        bits = self.scheme.bits
        words = numbers(self.qweight, np.int32)[:, first:last]
        codes = fields(words.T, bits)  # [rows, K]
        zeros = fields(numbers(self.qzeros, np.int32)[:, first // self.align : last // self.align], bits).T
        if self.scheme.zeros_less_one:
            zeros = zeros + np.uint8(1) & np.uint8((1 << bits) - 1)
        scales = floats(self.scales, np.s_[:, first:last]).T
        return GroupCodes(codes, scales, zeros_or_middle(zeros, bits), bits, self.scales.type_name, self.group_of)


def _tensor(parts: LayerTensors, scheme: GptqScheme) -> QuantisedTensor:
    bits, per = scheme.bits, 32 // scheme.bits
    qweight, qzeros = parts.get(".qweight", "I32"), parts.get(".qzeros", "I32")
    scales, g_idx = parts.get(".scales", *FLOATS), parts.find(".g_idx", "I32")
    words, rows = parts.matrix_shape(qweight, f"[inputs / {per}, outputs]", f"an int32 has the codes of {per} inputs")
    columns = words * per
    groups = 1 if scheme.group < 0 else -(-columns // scheme.group)
    why = f"{rows} outputs, {columns} inputs, {bits} bits and group_size {scheme.group}"
    parts.check_shape(scales, (groups, rows), why)
    if rows % per:
        raise parts.shape_error(qweight, f"[inputs / {per}, a multiple of {per}]", why)
    parts.check_shape(qzeros, (groups, rows // per), why)
    group_of = column_groups(parts, g_idx, columns, groups, scheme.group)
    source = GptqSource(scheme, qweight, qzeros, scales, group_of)
    return parts.tensor(f"GPTQ-{bits}", (rows, columns), source)


def column_groups(
    parts: LayerTensors, g_idx: StoredTensor | None, columns: int, groups: int, group: int
) -> np.ndarray | None:
    """Return the group of each column, int64 [K]; None if groups are G equally long runs, in order.

    Without stored groups, `g_idx`, they are runs of `group` columns, of which the last may be shorter.

    Raises:
        InvalidFileError: the number of entries is not K, or an entry is not a group.
    """
    if g_idx is None:
        return np.arange(columns) // group if group > 0 and columns % group else None
    parts.check_shape(g_idx, (columns,), "one group for each input")
    found = numbers(g_idx, np.int32).astype(np.int64)
    if columns and not (found.min() >= 0 and found.max() < groups):
        bad = found[(found < 0) | (found >= groups)][0]
        raise InvalidFileError(
            f"{g_idx.path}: tensor {g_idx.name} names group {bad}; there are {groups}, numbered from 0"
        )
    regular = columns % groups == 0 and (found == np.arange(columns) // (columns // groups)).all()
    return None if regular else found


# ---- the layers of a checkpoint --------------------------------------------------------------------------------------


def layers(config: Fields, stored: StoredTensors) -> Found:
    """Read the GPTQ layers of a checkpoint, also in the layout of Marlin."""
    layout = config.choice("checkpoint_format", "gptq", "gptq", "gptq_v2", "marlin")
    config.choice("pack_dtype", "int32", "int32", "torch.int32")
    if layout == "marlin" or config.get("is_marlin_format", bool, False):
        yield from marlin.layers(config, stored)
        return
    # The layers of a pattern that begins with "-:" are not quantised.
    own = [value for pattern, value in config.section("dynamic").values.items() if not pattern.startswith("-:")]
    yield from layers_by_scheme(config, stored, own, zeros_less_one=layout == "gptq")


def layers_by_scheme(config: Fields, stored: StoredTensors, own: Sequence[Any], *, zeros_less_one: bool) -> Found:
    """Read each layer by the first scheme that its parts fit: the config's, then those of `own`, for some layers."""
    bits, group = _bits(config, None), group_size(config)
    schemes = [GptqScheme(bits, group, zeros_less_one)]
    for values in own:
        some = Fields(values if isinstance(values, dict) else {}, config.path)
        schemes.append(GptqScheme(_bits(some, bits), group_size(some, group), zeros_less_one))
    for parts in layers_with(stored, ".qweight"):
        yield parts.read_by_first(list(dict.fromkeys(schemes)), _tensor)


def _bits(config: Fields, default: int | None) -> int:
    bits = config.get("bits", int, *(() if default is None else (default,)))
    if bits not in (4, 8):
        raise UnsupportedModelError(f"{config.path}: GPTQ with bits {bits} is not implemented; implemented: 4, 8")
    return bits
