# SPDX-License-Identifier: MIT
"""Tiles against transformers' Pillow processors, to the bit."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from candle_vllm.core.errors import InvalidFileError, InvalidParameterError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.models.canvas_rules import CanvasRule, RatioRule
from candle_vllm.core.models.lfm2_vl_tower import RatioAreaRule
from candle_vllm.core.vision.pictures import PictureLimits, picture_of
from candle_vllm.core.vision.preprocessing import (
    Normalisation,
    Rule,
    area_rule,
    fit_rule,
    patch_rows,
    rule_from,
    stretch_rule,
    tile_rule,
)
from candle_vllm.core.vision.prompts import VisionDescription, VisionInput

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


@pytest.fixture(scope="module")
def llama4() -> Any:
    """transformers' image processing of Llama 4, which imports torchvision and needs only its padding here."""
    names = [
        "torchvision",
        "torchvision.transforms",
        "torchvision.transforms.v2",
        "torchvision.transforms.v2.functional",
    ]
    made: dict[str, Any] = {name: ModuleType(name) for name in names}
    made[names[2]].functional = made[names[3]]
    made[names[3]].pad = lambda image, padding, fill: torch.nn.functional.pad(image, (0, padding[2], 0, padding[3]))
    with mock.patch.dict(sys.modules, made):
        return importlib.import_module("transformers.models.llama4.image_processing_llama4")


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize(("tile", "most"), [(32, 5), (16, 16), (336, 16)])
def test_canvases_are_those_of_transformers(tile: int, most: int, grows: bool, llama4: Any) -> None:
    """torchvision's resampling, which torch computes, differs from Pillow's by 1 or 2 of 255 in some values."""
    normalisation = Normalisation(1 / 255, (0.5,) * 3, (0.5,) * 3, narrow=True)
    rule = CanvasRule(tile=tile, most=most, grows=grows, resample=2, normalisation=normalisation)
    canvases = torch.tensor(llama4.find_supported_resolutions(most, SizeDict(height=tile, width=tile)))
    random = np.random.default_rng(0)
    sizes = [
        *SIZES,
        *random.integers(1, 8 * tile, (200, 2)).tolist(),
        *((tile * n, tile * n // 2) for n in (1, 2, 3, 4)),
    ]
    for height, width in sizes:
        canvas = llama4.get_best_fit((height, width), canvases, grows).tolist()
        cut = rule.cut(height, width)
        assert [max(cut.rows, 1) * tile, max(cut.columns, 1) * tile] == canvas, (height, width)
        if max(height, width) > 100:
            continue
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
        wanted = canvas if grows else [min(max(side, tile), most) for side, most in zip((height, width), canvas)]
        fitted = [max(side, 1) for side in llama4.get_max_res_without_distortion((height, width), wanted)]
        whole = llama4.pad_to_best_fit(resized(image, fitted), canvas)
        expected = llama4.split_to_tiles(whole, canvas[0] // tile, canvas[1] // tile)[0]
        if len(expected) > 1:
            expected = torch.cat([expected, resized(image, [tile, tile])])
        tiles = rule.tiles(picture_of(pixels))
        assert len(tiles) == cut.tiles if len(tiles) > 1 else cut.tiles == 1
        ours = torch.from_numpy(tiles).permute(0, 3, 1, 2)
        assert ours.shape == expected.shape
        apart = (ours.int() - expected.int()).abs()
        assert apart.max() <= 2
        assert (apart == 0).float().mean() > 0.7
    values = (torch.arange(256).bfloat16() * (1 / 255)).sub(torch.tensor(0.5).bfloat16()).div(0.5)
    assert np.array_equal(normalisation.table, values.float()[:, None].expand(-1, 3).numpy())


def resized(image: torch.Tensor, size: list[int]) -> torch.Tensor:
    if list(image.shape[-2:]) == size:
        return image
    return torch.nn.functional.interpolate(image, size, mode="bilinear", antialias=True)


@pytest.mark.parametrize("config", [
    {"size": {"longest_edge": 64}},
    {"size": {"longest_edge": 100}, "resample": 2, "image_mean": [0.4, 0.5, 0.6], "rescale_factor": 0.004},
    {"size": {"longest_edge": 512}, "patch_size": 14, "do_normalize": False},
])  # fmt: skip
def test_fitted_pictures_are_those_of_transformers(config: dict[str, Any]) -> None:
    rule = fit_rule(Fields(config, Path("p.json")), 14, 28)
    given: dict[str, Any] = config | {"patch_size": {"height": 28, "width": 28}}
    theirs = PixtralImageProcessorPil(**given)
    random = np.random.default_rng(0)
    for height, width in SIZES:
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if min(height, width) * rule.longest < max(height, width):
            assert min(rule.tiles(picture_of(pixels)).shape[1:3]) == 28
            continue  # a side of no pixels, which transformers cannot make
        expected = theirs(images=[Image.fromarray(pixels)], return_tensors="np")
        tiles = rule.tiles(picture_of(pixels))
        cut = rule.cut(height, width)
        assert tiles.shape == (1, cut.height, cut.width, 3)
        assert expected["image_sizes"][0].tolist() == [cut.height, cut.width]
        ours = rule.normalisation.table[tiles, np.arange(3)].transpose(0, 3, 1, 2)
        assert np.array_equal(ours, expected["pixel_values"])


@pytest.mark.parametrize("config", [
    {},
    {"resample": 3, "image_std": [0.2, 0.3, 0.25]},
    {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8, "pan_and_scan_max_num_crops": 4,
     "pan_and_scan_min_ratio_to_activate": 1.2},
    {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 2, "pan_and_scan_max_num_crops": 1,
     "pan_and_scan_min_ratio_to_activate": 1.0},
])  # fmt: skip
def test_stretched_pictures_are_those_of_transformers(config: dict[str, Any]) -> None:
    config = {"size": {"height": 56, "width": 56}} | config
    rule, theirs = stretch_rule(Fields(config, Path("p.json"))), Gemma3ImageProcessorPil(**config)
    random = np.random.default_rng(0)
    counts = set[int]()
    for height, width in [*SIZES, (100, 19), (23, 61), (30, 90)]:
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = theirs(images=[Image.fromarray(pixels)], return_tensors="np")["pixel_values"]
        tiles = rule.tiles(picture_of(pixels))
        assert tiles.shape[0] == rule.cut(height, width).tiles
        ours = rule.normalisation.table[tiles, np.arange(3)].transpose(0, 3, 1, 2)
        assert np.array_equal(ours, expected)
        counts.add(len(tiles))
    assert (len(counts) > 1) == bool(rule.most_parts)


def test_a_rule_that_another_process_sent_is_the_same() -> None:
    area: Any = area_rule(Fields({}, Path("p.json")), 28, most=1 << 22)
    rules: list[Rule] = [
        area,
        CanvasRule(tile=16, most=4, **area.pixels),
        RatioRule(tile=16, most=4, **area.pixels),
        RatioAreaRule(tile=28, most=4, whole=area, alone=9, **area.pixels),
    ]
    for rule in rules:
        assert rule_from(msgspec.msgpack.decode(msgspec.msgpack.encode(rule))) == rule


def test_published_counts_of_other_families() -> None:
    """Pixtral 12B, patches of 16 pixels; Mistral Small 3.1, cells of 28: as many as `docs/vision.md` says."""
    sizes = ((640, 480), (1920, 1080), (3000, 56))
    pixtral = fit_rule(Fields({"size": {"longest_edge": 1024}}, Path("p.json")), 16, 16)
    grids = [pixtral.cut(height, width).cells(16) for width, height in sizes]
    assert [rows * (columns + 1) for rows, columns in grids] == [1230, 2340, 130]
    mistral = fit_rule(Fields({"size": {"longest_edge": 1540}}, Path("p.json")), 14, 28)
    grids = [mistral.cut(height, width).cells(28) for width, height in sizes[:2]]
    assert [rows * (columns + 1) for rows, columns in grids] == [432, 1736]


AREAS: list[dict[str, Any]] = [
    {},
    {"min_pixels": 3136, "max_pixels": 28 * 28 * 9},
    {"size": {"shortest_edge": 28 * 28 * 30, "longest_edge": 28 * 28 * 40}, "resample": 2},
    {"patch_size": 4, "min_pixels": 64, "max_pixels": 1000, "image_mean": [0.4, 0.5, 0.6], "rescale_factor": 0.004},
]


@pytest.mark.parametrize("config", AREAS)
def test_areas_are_those_of_transformers(config: dict[str, Any]) -> None:
    theirs, random = Qwen2VLImageProcessorPil(**config), np.random.default_rng(0)
    patch = config.get("patch_size", 14)
    rule = area_rule(Fields(config, Path("p.json")), 2 * patch, most=1 << 22)
    for height, width in [*SIZES, (14, 42), (70, 126), (42, 8000), (8000, 40), (1, 200), (700, 900)]:
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = theirs(images=[Image.fromarray(pixels)], return_tensors="np")
        tiles = rule.tiles(picture_of(pixels))
        assert (1, *tiles.shape[1:3]) == (1, *rule.cut(height, width)[2:4])
        assert expected["image_grid_thw"].tolist() == [[1, tiles.shape[1] // patch, tiles.shape[2] // patch]]
        assert max(tiles.shape) <= rule.longest
        assert tiles.size <= rule.most_cells * 3 * rule.cell**2
        rows, _ = patch_rows(tiles, patch, 2, rule.normalisation)
        both = expected["pixel_values"].reshape(len(rows), 3, 2, -1)
        assert np.array_equal(both[:, :, 0].reshape(rows.shape), rows)
        assert np.array_equal(both[:, :, 1].reshape(rows.shape), rows)


def test_published_areas_have_published_counts() -> None:
    rule = area_rule(Fields({"max_pixels": 12845056}, Path("p.json")), 28, most=(1 << 14) * 14**2)
    sizes = (640, 480), (1920, 1080), (3000, 56), (8000, 6000)
    grids = [rule.cut(height, width).cells(28) for width, height in sizes]
    assert [rows * columns for rows, columns in grids] == [391, 2691, 214, 55 * 73]
    with pytest.raises(InvalidParameterError, match="201 x 1 pixels; the longer side may be 200 times the other"):
        rule.cut(1, 201)


def test_an_image_that_the_rule_refuses_is_named() -> None:
    rule = area_rule(Fields({}, Path("p.json")), 28, most=1 << 22)
    parts = VisionDescription(family="toy", rule=rule, mark=1, asks=1, cell=28)
    images = [np.zeros((size, 1, 3), np.uint8) for size in (9, 201)]
    with pytest.raises(InvalidParameterError, match=r"^messages\[1\]: 1 x 201 pixels; the longer side") as caught:
        VisionInput(parts, lambda _: [1]).look([1, 1], images, ["messages[0]", "messages[1]"])
    assert caught.value.param == "messages[1]"
    vision = VisionInput(parts, lambda _: [1], limits=PictureLimits(max_images=1))
    for ids, given, name in (([1, 1], images, "messages[1]"), ([1, 1], images[:1], "messages[0]"), ([1], [], "image")):
        with pytest.raises(InvalidParameterError, match=f"^{re.escape(name)}: ") as caught:
            vision.look(ids, given, ["messages[0]", "messages[1]"][: len(given)])
        assert caught.value.param == name


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
