# SPDX-License-Identifier: MIT
"""What is in a block: the rows fill it, arrays and tensors are taken apart alike, and put together again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from candle_vllm.core.kernels.gguf_linear.layout import PLANES
from candle_vllm.core.kernels.packed_linear import PackedKind
from candle_vllm.core.kernels.packed_linear.grids import FORMATS
from candle_vllm.core.quantization.ggml_blocks import put_together, take_apart
from candle_vllm.core.quantization.ggml_types import CONTENTS, GGMLQuantizationType

WITH_FIELDS = [kind for kind, contents in CONTENTS.items() if contents.codes]  # TQ1_0 has digits
each_type = pytest.mark.parametrize("kind", WITH_FIELDS, ids=lambda kind: kind.name)


def random_blocks(kind: GGMLQuantizationType) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 5, kind.block[1]), dtype=np.uint8)


def test_every_type_that_is_described_has_a_packed_layout() -> None:
    assert {kind.type for kind in PackedKind} == {*CONTENTS, *(GGMLQuantizationType[name] for name in FORMATS)}
    assert {kind.name for kind in PackedKind if kind.name != kind.type.name} == {f"{name}_CODES" for name in FORMATS}
    assert sum(kind.is_precompiled for kind in PackedKind) == 10
    without = {kind.name for kind in PackedKind if kind not in PLANES and kind.name == kind.type.name}
    assert without == {"MXFP4", "NVFP4", "Q8_K", "TQ1_0", "TQ2_0", "Q1_0"}  # decoded to 8 bits on a GPU


@each_type
def test_a_row_tells_every_bit_of_a_block_once(kind: GGMLQuantizationType) -> None:
    size, width = kind.block
    contents, told = CONTENTS[kind], np.zeros((width, 8), int)
    for fields in sum(contents.small, contents.codes):
        for place in fields.places:
            told[fields.start : fields.stop, place : place + fields.bits] += 1
    for start, stop in contents.floats:
        told[start:stop] += 1
    described = width - contents.unused
    assert (told[:described] == 1).all()
    assert not told[described:].any()
    assert {fields.numbers for fields in contents.codes} == {size}


@each_type
def test_tensors_are_taken_apart_as_arrays_are(kind: GGMLQuantizationType) -> None:
    blocks = random_blocks(kind)
    before = blocks.copy()
    arrays = take_apart(blocks, CONTENTS[kind], np)
    tensors = take_apart(torch.from_numpy(blocks), CONTENTS[kind], torch)
    assert np.array_equal(blocks, before)
    for name in ("codes", "scale", "minimum", "scales", "minima"):
        array, tensor = getattr(arrays, name), getattr(tensors, name)
        assert (array is None) == (tensor is None)
        assert array is None or np.array_equal(array, tensor.numpy())


@each_type
def test_put_together_is_the_way_back(kind: GGMLQuantizationType) -> None:
    blocks, contents = random_blocks(kind), CONTENTS[kind]
    again = put_together(take_apart(blocks, contents, np), contents)
    described = kind.block[1] - contents.unused
    assert np.array_equal(again[..., :described], blocks[..., :described])
