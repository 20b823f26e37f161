# SPDX-License-Identifier: MIT
"""Granite 4 Vision of random weights: embeddings and logits against transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.models.granite4_vision.processing_granite4_vision import Granite4VisionProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from candle_vllm.core import EngineConfig, InferenceEngine
from candle_vllm.core.conversion import write_gguf
from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError, WeightsError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.gguf import open_gguf
from candle_vllm.core.models.granite4_vision_tower import FAMILY
from candle_vllm.core.models.registry import family_from_gguf, family_from_hf, tower_family
from candle_vllm.core.vision.pictures import picture_of
from candle_vllm.core.vision.preprocessing import NOTHING
from packages.core.tests.models.sight import (
    GPU_STEPS,
    answers,
    answers_alone,
    loaded_from,
    model_of,
    random_model,
    require_logits,
    require_same_embeddings,
    require_same_in_steps,
    require_same_on_a_gpu,
    write_tokenizer,
)
from packages.core.tests.models.test_llava_onevision import ASK, EDGES, MARKS, PAD, PICTURES, PROMPTS, TEMPLATE
from packages.core.tests.models.tiny import SMALL
from tests.common_run import combined, few

TEXT = {
    **SMALL, "num_hidden_layers": 6, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0,
    "attention_multiplier": 0.3,
}  # fmt: skip
VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 128, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "patch_size": 4, "image_size": 32, "vision_use_head": False,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "all": {
        "deepstack_layer_map": [[-4, 3], [-1, 0]], "spatial_target_layers": [1, 2, 4, 5], "downsample_rate": "2/4",
    },
    "some": {
        "deepstack_layer_map": [[2, 4]], "spatial_target_layers": [5, 0], "spatial_vision_layer": -3,
        "downsample_rate": "4/8",
    },
    "no offsets": {"deepstack_layer_map": [[-2, 2], [-2, 0]], "spatial_target_layers": [], "downsample_rate": "1/2"},
}  # fmt: skip
"""Keys of the whole model; tiles have 8 x 8 patches."""
GRIDS = [[32 * rows, 32 * columns] for rows in range(1, 4) for columns in range(1, 4)]
IMAGES = {
    "size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}, "image_grid_pinpoints": GRIDS,
    "resample": 3, "do_pad": True, "image_mean": [0.5, 0.4, 0.6], "image_std": [0.5, 0.6, 0.4],
}  # fmt: skip


def write(folder: Path, kind: str = "all") -> Path:
    config = AutoConfig.for_model(
        "granite4_vision", text_config=TEXT, vision_config=VISION, image_token_index=PAD, image_grid_pinpoints=GRIDS,
        vision_feature_select_strategy="full", **KINDS[kind],
        qformer_config={
            "model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 80,
            "cross_attention_frequency": 1, "layer_norm_eps": 1e-6,
        },
    )  # fmt: skip
    model = random_model(config)
    with torch.no_grad():  # vectors of pictures as long as those of words
        for each in (*model.model.layerwise_projectors, *model.model.spatial_projectors):
            each.out_linear.weight.mul_(20)
        model.model.image_newline.normal_()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    write_tokenizer(folder, MARKS, TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write(tmp_path_factory.mktemp("granite4_vision"), kind) for kind in KINDS}


def their_pixels(pictures: list[NDArray[np.uint8]]) -> Any:
    given = [Image.fromarray(each) for each in pictures]
    return LlavaNextImageProcessorPil(**IMAGES)(images=given, return_tensors="pt")


def config_of(folder: Path, processor: Mapping[str, Any] = NOTHING, **change: Any) -> Any:
    config, images = (json.loads((folder / f"{n}config.json").read_text()) for n in ("", "preprocessor_"))
    return FAMILY.config_from_hf(Fields(config | change, folder), Fields(images | dict(processor), folder), 64, {})


@combined("kind eager", KINDS, (True, False), common=[("some", False)])
def test_embeddings_are_those_of_transformers(kind: str, eager: bool, folders: dict[str, Path]) -> None:
    """The vectors for all layers of the text model, side by side."""
    model, wanted = model_of(folders[kind]), list[NDArray[np.float32]]()
    for picture in PICTURES:
        with torch.inference_mode():
            found = model.model.get_image_features(**their_pixels([picture])).deepstack_features
        layers = [each[0].numpy() / 0.4 for _, each in sorted(found, key=lambda each: each[0])]
        wanted.append(np.concatenate(layers, 1))
    require_same_embeddings(folders[kind], PAD, PICTURES, wanted, eager=eager, most=64)


@combined("kind eager tokens", KINDS, (True, False), (512, 23), common=[("all", False, 23)])
def test_logits_are_those_of_transformers(kind: str, tokens: int, eager: bool, folders: dict[str, Path]) -> None:
    pixels, model = their_pixels(PICTURES[:2]), model_of(folders[kind])

    def wanted(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, **pixels).logits[0].log_softmax(-1)

    require_logits(folders[kind], PROMPTS[0], wanted, eager=eager, tokens=tokens)


@combined("kind tokens", ("all", "no offsets"), (512, 17), common=[("all", 17)])
def test_answers_are_the_same_in_a_batch_in_chunks_and_cached(kind: str, tokens: int, folders: dict[str, Path]) -> None:
    require_same_in_steps(folders[kind], PROMPTS, answers_alone(folders[kind], PROMPTS), tokens)


@pytest.mark.parametrize("how", few(list(GPU_STEPS), "captured"))
def test_steps_of_a_gpu_have_the_same_answers(how: str, folders: dict[str, Path]) -> None:
    asked = [(ASK, PICTURES[:2]), ("Nothing to see.", []), ("<image>What is this?", PICTURES[3:4])]
    require_same_on_a_gpu(folders["all"], asked, how)


def test_a_gguf_file_of_the_text_model_is_the_same_text_model(folders: dict[str, Path], tmp_path: Path) -> None:
    """The layers to which images are added are stored in it; `mmproj` files of this family are refused."""
    write_gguf(EngineConfig(model=str(folders["all"]), dtype="f32"), tmp_path / "model.gguf")
    with InferenceEngine(tmp_path / "model.gguf", tokenizer=folders["all"]) as engine:
        found = answers(engine, PROMPTS[-1:])
    with InferenceEngine(folders["all"]) as engine:
        assert answers(engine, PROMPTS[-1:]) == found
    with open_gguf(tmp_path / "model.gguf") as stored:
        assert stored.metadata["granite.deepstack_mapping"] == [-1, 1, 2, 3, 4, 5]
        config: Any = family_from_gguf(stored.metadata, stored)[1]
    assert config.deep_layers == (1, 2, 3, 4, 5)


# ---- tiles and configs -----------------------------------------------------------------------------------------------

SIDES = [[384 * rows, 384 * columns] for rows in range(1, 11) for columns in range(1, 11) if rows * columns <= 10]
PUBLISHED: dict[str, Any] = {
    "architectures": ["Granite4VisionForConditionalGeneration"], "model_type": "granite4_vision",
    "deepstack_layer_map": [[-19, 9], [-13, 6], [-7, 3], [-1, 0]], "spatial_target_layers": [12, 15, 18, 21],
    "downsample_rate": "4/8", "image_grid_pinpoints": SIDES, "vision_feature_select_strategy": "full",
    "text_config": {
        "model_type": "granite", "hidden_size": 2560, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 100353, "residual_multiplier": 0.22,
        "embedding_multiplier": 12.0, "logits_scaling": 10.0, "attention_multiplier": 0.015625, "eos_token_id": 100257,
        "max_position_embeddings": 131072, "rope_parameters": {"rope_type": "default", "rope_theta": 1e7},
    },
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16,
        "intermediate_size": 4304, "image_size": 384, "patch_size": 16,
    },
}  # fmt: skip
PIXELS = {"size": {"height": 384, "width": 384}, "crop_size": 384, "image_grid_pinpoints": SIDES}


def test_images_have_the_placeholders_of_transformers() -> None:
    path = Path("config.json")
    config: Any = FAMILY.config_from_hf(Fields(PUBLISHED, path), Fields(PIXELS, path), 2560, {})
    assert (config.num_layers, config.side, config.window, config.tiles, config.inner_size) == (27, 24, 4, 11, 3072)
    assert config.projectors == ((-4, 27), (-3, 21), (-2, 15), (-1, 9), (0, 27), (1, 27), (2, 27), (3, 27))
    text: Any = family_from_hf(PUBLISHED, path)[1]
    assert (text.deep_layers, text.deep) == ((3, 6, 9, 12, 15, 18, 21), 7)
    words: Any = object.__new__(Granite4VisionProcessor)
    words.image_processor, words.patch_size = LlavaNextImageProcessorPil(image_grid_pinpoints=SIDES), 16
    words.num_additional_image_tokens, words.downsample_rate = 0, "4/8"
    for width, height in EDGES:
        cut = config.rule.cut(height, width)
        count = words._get_number_of_features(height, width, 384, 384)
        assert FAMILY.words_around(cut, cut.cells(32)) == "<image>" * count, (width, height)


def test_tiles_are_those_of_transformers(folders: dict[str, Path]) -> None:
    rule = config_of(folders["all"]).rule
    for picture in PICTURES:
        expected = their_pixels([picture])["pixel_values"][0].numpy()
        ours = rule.normalisation.table[np.stack(rule.tiles(picture_of(picture))), np.arange(3)].transpose(0, 3, 1, 2)
        assert np.abs(expected - ours).max() < 1e-6


@pytest.mark.parametrize(
    ("change", "processor", "said"),
    [
        ({"downsample_rate": "3/8"}, {}, "downsample_rate is '3/8'"),
        ({"downsample_rate": "8/16"}, {}, "downsample_rate is '8/16'"),
        ({"deepstack_layer_map": None}, {}, "deepstack_layer_map is missing"),
        ({"deepstack_layer_map": [[-1, 3], [-2, 0]]}, {"x": 1}, None),
        ({"deepstack_layer_map": [[-1, 3]]}, {}, "must name layer 0"),
        ({"deepstack_layer_map": [[-1, 0], [-2, 1]]}, {}, "each layer once"),
        ({"deepstack_layer_map": [[-6, 0]]}, {}, "layers that 4 blocks do not have"),
        ({"deepstack_layer_map": [[-1]]}, {}, "must name layers"),
        ({"spatial_target_layers": [1, 2, 4, 5, 6]}, {}, "up to four layers"),
        ({"vision_feature_select_strategy": "default"}, {}, "vision_feature_select_strategy"),
        ({"vision_config": VISION | {"model_type": "clip_vision_model"}}, {}, "model_type"),
        ({"vision_config": VISION | {"hidden_size": 96}}, {}, "heads of 64 elements"),
        ({"qformer_config": {"num_hidden_layers": 2}}, {}, "qformer_config.num_hidden_layers is 2"),
        ({"qformer_config": {"layer_norm_eps": 1e-6}}, {}, "qformer_config.num_hidden_layers is 12"),
        ({"qformer_config": {"hidden_act": "relu"}}, {}, "hidden_act"),
        ({"image_grid_pinpoints": [[32, 32]]}, {}, "image_grid_pinpoints is"),
        ({}, {"size": {"height": 64, "width": 64}, "crop_size": 64}, "tiles of 64 pixels|up to 64 tiles"),
    ],
)  # fmt: skip
def test_other_models_are_refused(
    change: dict[str, Any], processor: dict[str, Any], said: str | None, folders: dict[str, Path]
) -> None:
    if said is None:
        config_of(folders["all"], processor, **change)
        return
    with pytest.raises((InvalidFileError, UnsupportedModelError), match=said):
        config_of(folders["all"], processor, **change)


def test_a_text_model_with_too_few_layers_is_refused() -> None:
    config = PUBLISHED | {"text_config": PUBLISHED["text_config"] | {"num_hidden_layers": 20}}
    with pytest.raises(InvalidFileError, match="before layer 21; there are 20 layers"):
        family_from_hf(config, Path("config.json"))


def test_the_family_is_found() -> None:
    assert tower_family(PUBLISHED) is FAMILY


def test_a_file_without_a_tensor_of_a_projector_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["all"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.spatial_projectors.1.query"]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match="query"):
        loaded_from(tmp_path)
