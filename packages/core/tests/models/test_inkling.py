# SPDX-License-Identifier: MIT
"""Inkling of random weights with images: tiles, embeddings and logits against transformers; files that are refused."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.models.inkling.modeling_inkling import plan_out_scales

from candle_vllm.core import InferenceEngine
from candle_vllm.core.errors import InvalidFileError, InvalidParameterError, UnsupportedModelError, WeightsError
from candle_vllm.core.fields import Fields
from candle_vllm.core.models import inkling, inkling_tower
from candle_vllm.core.models.inkling_config import InklingConfig
from candle_vllm.core.models.registry import family_from_hf, tower_family
from candle_vllm.core.vision.pictures import picture_of
from packages.core.tests.models.families import INKLING
from packages.core.tests.models.sight import (
    answers_alone,
    loaded_from,
    model_of,
    random_model,
    random_pictures,
    require_logits,
    require_same_embeddings,
    require_same_in_steps,
    without_torchvision,
    write_tokenizer,
)
from packages.core.tests.models.tiny import SMALL
from tests.common_run import combined

MARK, PAD = inkling_tower.MARK, 262
PICTURES = random_pictures((17, 23), (8, 16), (5, 4), (24, 7))
TEXT: dict[str, Any] = {**SMALL, **INKLING, "vocab_size": 264, "n_routed_experts": 4}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
KINDS = {
    "folds": {"patch_size": 8, "n_layers": 3},  # the second fold joins squares of 4 x 4
    "every fold": {"patch_size": 8, "n_layers": 4},
    "pixels": {"patch_size": 6, "n_layers": 6},  # the first layer reads pixels, and two layers read both frames
    "one layer": {"patch_size": 8, "n_layers": 1},
}
PUBLISHED: dict[str, Any] = {  # with the keys of published files, but those of audio
    "architectures": ["InklingForConditionalGeneration"],
    "model_type": "inkling_mm_model",
    "text_config": {
        "model_type": "inkling_model", "vocab_size": 201024, "unpadded_vocab_size": 200058, "hidden_size": 6144,
        "intermediate_size": 3072, "dense_intermediate_size": 24576, "num_hidden_layers": 66, "dense_mlp_idx": 3,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "swa_num_attention_heads": 64,
        "swa_num_key_value_heads": 16, "swa_head_dim": 128, "sliding_window_size": 512, "d_rel": 16,
        "rel_extent": 1024, "local_layer_ids": [layer for layer in range(66) if (layer + 1) % 6], "use_sconv": True,
        "sconv_kernel_size": 4, "n_routed_experts": 256, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "route_scale": 8.0, "use_gate_bias": True, "use_global_scale": True, "shared_expert_sink": True,
        "log_scaling_n_floor": 131072, "log_scaling_alpha": 0.1, "logits_mup_width_multiplier": 24.0,
        "use_embed_norm": True, "rms_norm_eps": 1e-6, "model_max_length": 1048576,
    },
    "vision_config": {
        "vision_encoder_type": "hmlp", "decoder_dmodel": 6144, "patch_size": 40, "temporal_patch_size": 2,
        "n_channels": 3, "n_layers": 4, "use_vision_norm": True,
    },
}  # fmt: skip


def ascending(costs: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The best assignment in ascending order, in place of scipy's, which is not installed."""
    rows = np.arange(len(costs))
    choices = itertools.combinations(range(costs.shape[1]), len(costs))
    return rows, np.array(min(choices, key=lambda each: costs[rows, list(each)].sum()))


@pytest.fixture(scope="module", autouse=True)
def scipy() -> Iterator[None]:
    made, optimize = ModuleType("scipy"), ModuleType("scipy.optimize")
    optimize.linear_sum_assignment = ascending  # type: ignore[attr-defined]
    made.__version__ = "1.0"  # type: ignore[attr-defined]  # Numba, which compiles missing operations, reads it
    with mock.patch.dict(sys.modules, {"scipy": made, "scipy.optimize": optimize}):
        yield


def write(folder: Path, kind: str) -> Path:
    config = AutoConfig.for_model(
        "inkling_mm_model", text_config=TEXT, vision_config=KINDS[kind], image_token_id=PAD,
        audio_config={"n_mel_bins": 4, "mel_vocab_size": 4}, audio_token_id=261,
    )  # fmt: skip
    random_model(config).save_pretrained(folder)
    side = KINDS[kind]["patch_size"]
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": side, "width": side}}))
    write_tokenizer(folder, ("<|content_image|>", "<|content_audio_input|>", MARK), "")
    return folder


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("inkling"), kind)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return model_of(folder)


def their_pixels(pictures: list[NDArray[np.uint8]], side: int) -> list[torch.Tensor]:
    """Pixels [n, 2, side, side, 3] of each picture: what transformers' processor does, which needs torchvision."""
    cut, found = without_torchvision("inkling.image_processing_inkling").divide_to_patches, list[torch.Tensor]()
    for picture in pictures:
        patches = [each.float() for each in cut(torch.from_numpy(picture).permute(2, 0, 1), side)]
        padded = [
            torch.nn.functional.pad(each, (0, side - each.shape[2], 0, side - each.shape[1]), value=-1.0)
            for each in patches
        ]
        mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
        normalised = (torch.stack(padded) / 255 - mean) / std
        found.append(normalised[..., None].repeat(1, 1, 1, 1, 2).permute(0, 4, 2, 3, 1))
    return found


def prompts() -> list[Any]:
    end = "Say what is in them, where it is, and which of them you like more than the others, and for which reason."
    return [
        {"prompt": f"Compare <|content_image|>{MARK} and {MARK}. {end}", "multi_modal_data": {"image": PICTURES[:2]}},
        {"prompt": f"{MARK}{MARK}Look. {end}", "multi_modal_data": {"image": [PICTURES[3], PICTURES[3]]}},
        "Compare nothing, and say why.",
    ]


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [2, 6, 7, 8, 12, 40, 52])
def test_layers_are_planned_as_by_transformers(patch: int) -> None:
    for layers in range(1, 12):
        scales = plan_out_scales(2, patch, layers, 3).tolist()
        side, folds = inkling_tower.planned(patch, layers, 64)
        assert side == scales[1][1]
        for number, ((t, h, _, c), (t_next, h_next, _, c_next)) in enumerate(itertools.pairwise(scales)):
            fold = folds[number]
            square = (h_next // h) ** 2
            assert fold.rows == (square if number else 1)
            assert fold.frames == (t_next > t)
            assert fold.inputs == c * square * (t_next // t)
            assert fold.outputs == (64 if number == layers - 1 else c_next)


def test_the_published_encoder() -> None:
    path = Path("config.json")
    config = inkling_tower.config_from_hf(Fields(PUBLISHED, path), Fields({}, path), 6144)
    assert [(fold.inputs, fold.outputs) for fold in config.folds] == [(75, 128), (512, 320), (5120, 4800), (9600, 6144)]
    assert (config.patch, config.cell, config.hidden_size, config.cell_rows) == (5, 8, 4800, 1)
    family = tower_family(PUBLISHED)
    assert family is inkling_tower.FAMILY


@pytest.mark.parametrize(
    ("said", "height", "width", "sides"),
    [
        ({}, 30, 55, (30, 55)),
        ({"rescale_image_frac": 2.0}, 30, 55, (60, 110)),
        ({"rescale_image_frac": 2.0, "rescale_image_max_upscaled_long_edge": 100}, 30, 55, (55, 100)),
        ({"rescale_image_frac": 2.0, "rescale_image_max_upscaled_long_edge": 40}, 30, 55, (30, 55)),
        ({"rescale_image_frac": 0.5, "rescale_image_max_upscaled_long_edge": None}, 31, 55, (16, 28)),
    ],
)
def test_sides_of_resized_images(said: dict[str, Any], height: int, width: int, sides: tuple[int, int]) -> None:
    path = Path("config.json")
    rule = inkling_tower.config_from_hf(Fields(PUBLISHED, path), Fields(said, path), 6144).rule
    assert isinstance(rule, inkling_tower.BandRule)
    assert rule.sides(height, width) == sides
    cut = rule.cut(height, width)
    assert (cut.tiles, cut.width) == (-(-sides[0] // 40), (sides[1] // 40 + 1) * 40)
    tiles = rule.tiles(picture_of(np.zeros((height, width, 3), np.uint8)))
    assert sum(tile.shape[0] for tile in tiles) == sides[0]
    with pytest.raises(InvalidParameterError, match="a side must have 1 to 4096"):
        rule.cut(9000, 9000)


@combined("kind eager", KINDS, (True, False), common=[("folds", False)], indirect=["kind"])
def test_embeddings_are_those_of_transformers(eager: bool, kind: str, folder: Path, theirs: Any) -> None:
    wanted = list[NDArray[np.float32]]()
    with torch.inference_mode():
        for pixels in their_pixels(PICTURES, KINDS[kind]["patch_size"]):
            wanted.append(theirs.model.get_image_features(pixels).pooler_output[:, 0].numpy())
    require_same_embeddings(folder, PAD, PICTURES, wanted, eager=eager, most=8)


@combined(
    "kind eager tokens", KINDS, (True, False), (512, 23),
    common=[("folds", False, 23), ("folds", True, 512)], indirect=["kind"],
)  # fmt: skip
def test_logits_are_those_of_transformers(tokens: int, eager: bool, kind: str, folder: Path, theirs: Any) -> None:
    pixels = torch.cat(their_pixels(PICTURES[:2], KINDS[kind]["patch_size"]))

    def wanted(ids: torch.Tensor) -> torch.Tensor:
        return theirs(input_ids=ids, pixel_values=pixels).logits[0].log_softmax(-1)

    require_logits(folder, prompts()[0], wanted, eager=eager, tokens=tokens)


@combined("kind tokens", KINDS, (64, 17), common=[("folds", 17)], indirect=["kind"])
def test_answers_do_not_depend_on_steps(tokens: int, kind: str, folder: Path) -> None:
    """States of convolutions and pages of windows are found again, too."""
    require_same_in_steps(folder, prompts(), answers_alone(folder, prompts()), tokens)


# ---- files -----------------------------------------------------------------------------------------------------------


def read(**changes: Any) -> InklingConfig:
    text = PUBLISHED["text_config"] | changes
    made = family_from_hf(PUBLISHED | {"text_config": text}, Path("config.json"))[1]
    assert isinstance(made, InklingConfig)
    return made


def test_the_published_config() -> None:
    config = read()
    assert (config.vocab_size, config.tokens, config.max_position) == (200058, 200058, 1048576)
    assert config.mixture is not None
    assert (config.mixture.experts, config.mixture.top_k, config.mixture.inner_size) == (258, 8, 3072)
    assert (config.num_experts, config.intermediate_size, min(config.sparse_layers)) == (256, 24576, 3)
    assert [config.heads(layer) for layer in (0, 5)] == [(64, 16), (64, 8)]
    assert [config.sliding_windows[layer] for layer in (0, 5)] == [512, None]
    assert [config.extents[layer] for layer in (0, 5)] == [512, 1024]
    assert config.growth == (131072, 0.1)
    assert config.logit_scale == 1 / 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared_expert_sink": False}, "shared_expert_sink is False"),
        ({"use_sconv": False}, "use_sconv is False"),
        ({"gate_activation": "softmax"}, "gate_activation is 'softmax'"),
        ({"q_bias": True}, "q_bias is True"),
        ({"layer_types": ["hybrid", "full_attention"] * 33}, "layer_types has kinds of layers other than hybrid"),
        ({"mlp_layer_types": ["moe"] * 66}, "mlp_layer_types has kinds of layers other than dense"),
        ({"num_key_value_heads": 7}, "key-value heads must divide 64, which"),
        ({"num_attention_heads": 96, "num_key_value_heads": 6}, "key-value heads must divide 32, which"),
        ({"v_head_dim": 64}, "v_head_dim is 64"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ],
)
def test_what_is_not_implemented_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"logits_mup_width_multiplier": 0.0},
        {"log_scaling_n_floor": 0},
        {"unpadded_vocab_size": -1},
        {"n_shared_experts": 0},
        {"n_shared_experts": 17},
        {"num_experts_per_tok": 257},
        {"swa_head_dim": 4096},
        {"sconv_kernel_size": 1},
        {"d_rel": 1 << 30},
        {"rel_extent": 0},
        {"n_routed_experts": 600},
    ],
    ids=str,
)
def test_impossible_sizes_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidFileError):
        read(**change)


def test_experts_of_another_number_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "one layer")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("shared_experts.shared_w2_weight"))
    save_file(tensors | {name: tensors[name][:1].contiguous()}, path, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"shared_w2_weight has shape \[1, .*, not 2 experts"):
        loaded_from(folder)


@pytest.mark.parametrize(
    ("vision", "processor", "message"),
    [
        ({"temporal_patch_size": 1}, {}, "temporal_patch_size is 1"),
        ({"n_channels": 1}, {}, "n_channels is 1"),
        ({"vision_encoder_type": "linear"}, {}, "vision_encoder_type is 'linear'"),
        ({"patch_size": 1}, {}, "the encoder reads 1 pixels"),
        ({"patch_size": 512}, {}, "patch_size is 512"),
        ({"n_layers": 100}, {}, "n_layers is 100"),
        ({}, {"size": {"height": 20, "width": 40}}, "the encoder reads 40 pixels"),
        ({}, {"do_resize": False}, "do_resize is false"),
        ({}, {"rescale_image_frac": 0.0}, "rescale_image_frac is 0.0"),
    ],
)
def test_encoders_that_are_refused(vision: dict[str, Any], processor: dict[str, Any], message: str) -> None:
    path = Path("config.json")
    changed = PUBLISHED | {"vision_config": PUBLISHED["vision_config"] | vision}
    with pytest.raises((InvalidFileError, UnsupportedModelError), match=message):
        inkling_tower.config_from_hf(Fields(changed, path), Fields(processor, path), 6144)


def test_models_of_text_alone_read_published_names(tmp_path: Path) -> None:
    """The text model of a folder whose files have the names that are published, without images and audio."""
    folder = write(tmp_path, "one layer")
    assert {"model.llm.layers.1.mlp.experts.w13_weight", "model.audio.encoder.weight"} <= set(
        load_file(folder / "model.safetensors")
    )
    family, config = family_from_hf(json.loads((folder / "config.json").read_text()), folder / "config.json")
    assert family is inkling.FAMILY
    assert config.model_type == "inkling_text"
    with InferenceEngine(folder, max_images=0) as engine:
        assert engine.generate(["A"], use_tqdm=False)[0].outputs[0].token_ids
