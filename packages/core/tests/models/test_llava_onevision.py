# SPDX-License-Identifier: MIT
"""LLaVA-OneVision of random weights: tiles, placeholders, embeddings and logits against transformers, and answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, SiglipVisionConfig
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from candle_vllm.core import InferenceEngine
from candle_vllm.core.errors import InvalidFileError, InvalidParameterError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.models import llava_onevision_tower
from candle_vllm.core.models.llava_onevision_tower import FAMILY
from candle_vllm.core.models.registry import family_from_hf
from candle_vllm.core.vision.pictures import picture_of
from packages.core.tests.models.sight import (
    GPU_STEPS,
    answers,
    answers_alone,
    loaded_from,
    model_of,
    random_model,
    random_pictures,
    require_logits,
    require_same_embeddings,
    require_same_in_steps,
    require_same_on_a_gpu,
    write_tokenizer,
)
from packages.core.tests.models.tiny import SMALL
from tests.common_run import combined, few

PAD = 262
MARKS = ("<|vision_start|>", "<|vision_end|>", "<image>", "<video>")
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}{% for content in message['content'] "
    "| selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ASK = "<|im_start|>user <image><image>\nCompare these, please.<|im_end|><|im_start|>assistant\n"
SIZES = ((45, 28), (17, 22), (64, 12), (5, 5), (19, 70), (60, 60))
PICTURES = random_pictures(*SIZES)
PROMPTS: list[Any] = [
    {"prompt": ASK, "multi_modal_data": {"image": PICTURES[:2]}},
    {"prompt": ASK, "multi_modal_data": {"image": [PICTURES[4], PICTURES[4]]}},
    {"prompt": "<image>What is this?", "multi_modal_data": {"image": [PICTURES[3]]}},
    "<|im_start|>user\nCompare nothing.<|im_end|>\n",
]
VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 2, "patch_size": 4, "image_size": 15, "vision_use_head": False,
}  # fmt: skip
"""Three patches of four pixels on a side, and three pixels beyond them."""
GRIDS = [[15 * rows, 15 * columns] for rows in range(1, 5) for columns in range(1, 5)]
IMAGES = {
    "size": {"height": 15, "width": 15}, "image_grid_pinpoints": GRIDS, "resample": 3, "do_pad": True,
    "image_mean": [0.5, 0.4, 0.6], "image_std": [0.5, 0.6, 0.4], "image_processor_type": "LlavaOnevisionImageProcessor",
}  # fmt: skip


def write(folder: Path) -> Path:
    text = {**SMALL, "model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    config = AutoConfig.for_model(
        "llava_onevision", text_config=text, vision_config=VISION, image_token_index=PAD, image_grid_pinpoints=GRIDS,
        vision_aspect_ratio="anyres_max_4",
    )  # fmt: skip
    model = random_model(config)
    with torch.no_grad():  # embeddings of pictures as long as those of words
        model.model.multi_modal_projector.linear_2.weight.mul_(6)
        model.model.image_newline.normal_()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    write_tokenizer(folder, MARKS, TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("llava_onevision"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return model_of(folder)


def their_pixels(pictures: list[NDArray[np.uint8]], **said: Any) -> Any:
    """Each image alone, as transformers gives several images of a prompt one tile each."""
    settings = {key: value for key, value in IMAGES.items() if "type" not in key}
    processor = LlavaOnevisionImageProcessorPil(**settings | said)
    return processor(images=[Image.fromarray(each) for each in pictures], return_tensors="pt")


# ---- tiles and placeholders ------------------------------------------------------------------------------------------

EDGES = (
    (640, 480), (1920, 1080), (384, 384), (385, 385), (1000, 1000), (1280, 1024), (4000, 3000), (20, 20), (3, 2),
    (300, 10), (10, 300), (14, 2100), (2100, 14), (1000, 500), (3000, 56), (2304, 2304), (1536, 2304), (1, 1),
)  # fmt: skip
"""Widths and heights."""


def test_images_have_the_placeholders_of_transformers() -> None:
    path = Path("config.json")
    config = FAMILY.config_from_hf(Fields(PUBLISHED, path), Fields({}, path), 896, {})
    words: Any = object.__new__(LlavaOnevisionProcessor)
    words.image_processor, words.num_image_tokens = LlavaOnevisionImageProcessorPil(), 729
    words.vision_aspect_ratio = "anyres_max_9"
    for width, height in EDGES:
        cut = config.rule.cut(height, width)
        count = words._get_number_of_features(height, width, 384, 384)
        assert FAMILY.words_around(cut, cut.cells(14)) == "<image>" * count, (width, height)
        assert cut.tiles <= config.tiles


@pytest.mark.parametrize("said", [{}, {"image_grid_pinpoints": [[15, 30], [30, 15], [30, 30]]}, {"resample": 2}])
def test_tiles_are_those_of_transformers(said: dict[str, Any]) -> None:
    """To the bit, but for pixels that are in no patch."""
    path = Path("config.json")
    tiny = {**PUBLISHED, "vision_config": VISION}
    rule = FAMILY.config_from_hf(Fields(tiny, path), Fields(IMAGES | said, path), 64, {}).rule
    for picture in [*PICTURES, *random_pictures((1, 1))]:
        tiles, cut = rule.tiles(picture_of(picture)), rule.cut(*picture.shape[:2])
        assert len(tiles) == cut.tiles
        expected = their_pixels([picture], **said)["pixel_values"][0].numpy()
        ours = rule.normalisation.table[np.stack(tiles), np.arange(3)].transpose(0, 3, 1, 2)
        assert np.abs(expected[:, :, :12, :12] - ours).max() < 1e-6


def test_an_extreme_shape_is_refused(folder: Path) -> None:
    loaded = loaded_from(folder)
    assert loaded.tower is not None
    with pytest.raises(InvalidParameterError, match="1 x 201 pixels; the longer side may be 200 times the other"):
        loaded.tower.vision.look([PAD], [np.zeros((201, 1, 3), np.uint8)])


# ---- embeddings, logits, answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("eager", few([True, False], False))
def test_embeddings_are_those_of_transformers(eager: bool, folder: Path, theirs: Any) -> None:
    wanted = list[NDArray[np.float32]]()
    for picture in PICTURES:
        with torch.inference_mode():
            found = theirs.model.get_image_features(**their_pixels([picture]))
        wanted.append(found.pooler_output[0].numpy())
    vision, images = require_same_embeddings(folder, PAD, PICTURES, wanted, eager=eager, most=64)
    cuts = [vision.parts.rule.cut(*each.whole) for each in images]
    assert any(cut.shown != cut.joined for cut in cuts)
    assert any(cut.shown == cut.joined for cut in cuts)


@pytest.mark.parametrize(("piece", "steps"), [(0.0, True), (300.0, False)])
def test_steps_run_between_the_rows_of_a_large_image(
    piece: float, steps: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows of an image of 36 tiles take more than a second in a model of a usual size."""
    monkeypatch.setattr(llava_onevision_tower, "_PIECE", piece)
    loaded = loaded_from(folder, op_by_op=True)
    assert loaded.tower is not None
    _, images = loaded.tower.vision.look([PAD], PICTURES[:1])
    made = np.zeros((len(images[0].sizes) * 9, loaded.tower.tower.config.text_size), np.float32)
    rule = loaded.tower.vision.parts.rule
    joined = loaded.tower.tower.join(made, images[0].whole)  # type: ignore[attr-defined]
    assert sum(1 for _ in joined) == steps * rule.cut(*images[0].whole).joined[0]


@combined("eager tokens", (True, False), (512, 23), common=[(False, 23)])
def test_logits_are_those_of_transformers(tokens: int, eager: bool, folder: Path, theirs: Any) -> None:
    pixels = their_pixels(PICTURES[:2])

    def wanted(ids: torch.Tensor) -> torch.Tensor:
        return theirs(input_ids=ids, **pixels).logits[0].log_softmax(-1)

    require_logits(folder, PROMPTS[0], wanted, eager=eager, tokens=tokens)


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[tuple[int, ...]]:
    return answers_alone(folder, PROMPTS)


@pytest.mark.parametrize("tokens", few([512, 31, 17, 11], 17))
def test_answers_are_the_same_in_a_batch_in_chunks_and_cached(
    tokens: int, folder: Path, alone: list[tuple[int, ...]]
) -> None:
    require_same_in_steps(folder, PROMPTS, alone, tokens)


@pytest.mark.every_case
@pytest.mark.parametrize("how", GPU_STEPS)
def test_steps_of_a_gpu_have_the_same_answers(folder: Path, how: str) -> None:
    asked = [(ASK, PICTURES[:2]), ("Nothing to see.", []), ("<image>What is this?", PICTURES[3:4])]
    require_same_on_a_gpu(folder, asked, how)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("older", [True, False])
def test_names_of_other_checkpoints_are_read(
    older: bool, folder: Path, tmp_path: Path, alone: list[tuple[int, ...]]
) -> None:
    """As transformers 4 wrote them, and as transformers 5 has them in memory."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    stored = load_file(folder / "model.safetensors")
    assert {"image_newline", "language_model.lm_head.weight", "vision_tower.post_layernorm.weight"} <= stored.keys()

    def renamed(name: str) -> str:
        if older:
            return name.replace("vision_tower.", "vision_tower.vision_model.")
        plain = name.replace("language_model.model.", "language_model.").removeprefix("language_model.lm_head")
        return f"lm_head{plain}" if plain.startswith(".") else f"model.{plain}"

    made = {renamed(name): tensor for name, tensor in stored.items()}
    save_file(made, tmp_path / "model.safetensors", {"format": "pt"})
    with InferenceEngine(tmp_path) as engine:
        assert answers(engine, PROMPTS) == alone


PUBLISHED: dict[str, Any] = {
    "architectures": ["LlavaOnevisionForConditionalGeneration"], "model_type": "llava_onevision",
    "image_token_index": 151646, "projector_hidden_act": "gelu", "use_image_newline_parameter": True,
    "vision_aspect_ratio": "anyres_max_9", "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
    "text_config": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
        "vocab_size": 152000, "tie_word_embeddings": True, "sliding_window": 32768, "max_window_layers": 24,
        "hidden_act": "silu", "rms_norm_eps": 1e-06,
    },
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
        "num_attention_heads": 16, "num_hidden_layers": 26, "patch_size": 14, "vision_use_head": False,
    },
}  # fmt: skip
"""Keys of llava-onevision-qwen2-0.5b-ov-hf."""


def test_the_published_config_is_read() -> None:
    path = Path("config.json")
    tower = FAMILY.config_from_hf(Fields(PUBLISHED, path), Fields({}, path), 896, {})
    assert (tower.hidden_size, tower.num_layers, tower.side, tower.tiles) == (1152, 26, 27, 37)
    absent = FAMILY.config_from_hf(Fields(PUBLISHED | {"vision_config": None}, path), Fields({}, path), 896, {})
    assert absent == tower
    family, text = family_from_hf(PUBLISHED, path)
    assert (family.hf.get("Qwen2ForCausalLM"), text.hidden_size, text.num_layers) == ("qwen2", 896, 24)


def test_a_vision_config_without_sizes_has_those_of_siglip() -> None:
    path, known = Path("config.json"), SiglipVisionConfig()
    fields = Fields(PUBLISHED | {"vision_config": {"model_type": "siglip_vision_model"}}, path)
    images = {"size": {"height": 224, "width": 224}, "image_grid_pinpoints": [[224, 448]]}
    tower = FAMILY.config_from_hf(fields, Fields(images, path), 896, {})
    sizes = tower.hidden_size, tower.intermediate_size, tower.num_layers, tower.num_heads, tower.patch
    assert sizes == (
        known.hidden_size, known.intermediate_size, known.num_hidden_layers, known.num_attention_heads,
        known.patch_size,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "processor", "said"),
    [
        ({"vision_feature_layer": -2}, {}, "vision_feature_layer is -2"),
        ({"vision_feature_select_strategy": "default"}, {}, "vision_feature_select_strategy"),
        ({"vision_aspect_ratio": "square"}, {}, "vision_aspect_ratio is 'square'"),
        ({}, {"size": {"height": 336, "width": 336}, "image_grid_pinpoints": [[336, 336]]}, "tiles of 336 pixels"),
        ({}, {"image_grid_pinpoints": [[384, 400]]}, "image_grid_pinpoints must list"),
        ({}, {"image_grid_pinpoints": []}, "image_grid_pinpoints must list"),
        ({}, {"image_grid_pinpoints": [[384, 384 * 65]]}, "image_grid_pinpoints must list"),
    ],
)
def test_other_models_are_refused(change: dict[str, Any], processor: dict[str, Any], said: str) -> None:
    path = Path("config.json")
    with pytest.raises((InvalidFileError, UnsupportedModelError), match=said):
        FAMILY.config_from_hf(Fields(PUBLISHED | change, path), Fields(processor, path), 896, {})
