"""Tiles against transformers' Pillow processors, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.vision.pictures import picture_of
from candle_vllm.core.vision.preprocessing import Normalisation, patch_rows, tile_rule

SIZES = [(40, 70), (70, 40), (1, 1), (3, 300), (300, 3), (64, 64), (33, 32), (32, 32), (500, 501), (5, 7)]
CONFIGS: list[dict[str, Any]] = [
    {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}},
    {"size": {"longest_edge": 100}, "max_image_size": {"longest_edge": 32}, "resample": 3},
    {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}, "resample": 2},
    {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}, "do_image_splitting": False},
    {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}, "image_mean": [0.4, 0.5, 0.6],
     "image_std": [0.2, 0.3, 0.25], "rescale_factor": 0.004},
    {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}, "do_normalize": False},
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_tiles_are_those_of_transformers(config: dict[str, Any]) -> None:
    theirs, rule = SmolVLMImageProcessorPil(**config), tile_rule(Fields(config, Path("p.json")))
    random = np.random.default_rng(0)
    for height, width in SIZES:
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = theirs(images=[Image.fromarray(pixels)], return_tensors="np")["pixel_values"][0]
        tiles = rule.tiles(picture_of(pixels))
        assert tiles.shape[0] == rule.cut(height, width).tiles
        ours = rule.normalisation.table[tiles, np.arange(3)].transpose(0, 3, 1, 2)
        assert np.array_equal(ours, expected)


def test_published_sizes_have_published_counts() -> None:
    """SmolVLM-256M: tiles of 512 pixels, the longer side 2,048; 64 embeddings of each."""
    rule = tile_rule(Fields({"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}, Path("p.json")))
    found = [rule.cut(height, width).tiles * 64 for width, height in ((640, 480), (1920, 1080), (3000, 56), (200, 300))]
    assert found == [832, 832, 320, 832]


def test_patches_of_a_cell_stand_behind_each_other() -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (2, 12, 24, 3), dtype=np.uint8)
    rows, places = patch_rows(tiles, 3, 2, Normalisation(1.0, (0.0,) * 3, (1.0,) * 3))
    assert rows.shape == (2 * 4 * 8, 27)
    for number, (row, column) in enumerate(places.tolist()):
        tile = tiles[number // 32]
        patch = tile[3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        assert np.array_equal(rows[number], patch.transpose(2, 0, 1).reshape(-1))
    assert places[:4].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert places[4:6].tolist() == [[0, 2], [0, 3]]


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({}, InvalidFileError, "longest_edge is missing"),
        ({"size": {"longest_edge": 1 << 30}}, InvalidFileError, "1073741824"),
        (CONFIGS[0] | {"do_resize": False}, UnsupportedModelError, "do_resize is false"),
        (CONFIGS[0] | {"resample": 4}, UnsupportedModelError, "resample is 4"),
        (CONFIGS[0] | {"image_std": [1, 0, 1]}, UnsupportedModelError, "image_std has a 0"),
        (CONFIGS[0] | {"image_mean": [1]}, UnsupportedModelError, "image_mean has 1 numbers"),
        (CONFIGS[0] | {"image_mean": ["x"] * 3}, InvalidFileError, "image_mean is 'x'"),
        (CONFIGS[0] | {"image_std": [1e-300] * 3}, InvalidFileError, "pixels are infinite"),
        (CONFIGS[0] | {"rescale_factor": 1e300}, InvalidFileError, "pixels are infinite"),
    ],
)
def test_wrong_files_are_named(config: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        tile_rule(Fields(config, Path("p.json")))
