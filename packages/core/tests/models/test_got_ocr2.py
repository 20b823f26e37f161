# SPDX-License-Identifier: MIT
"""GOT-OCR 2.0 of random weights: tiles, prompts, embeddings and logits against transformers, and answers."""

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
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.got_ocr2.processing_got_ocr2 import GotOcr2Processor

from candle_vllm.core import InferenceEngine
from candle_vllm.core.errors import CandleVllmError, ConfigError, InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.models.got_ocr2_tower import FAMILY
from candle_vllm.core.models.registry import family_from_hf, tower_family
from candle_vllm.core.vision.pictures import picture_of
from packages.core.tests.models.sight import (
    GPU_STEPS,
    answers_alone,
    loaded_from,
    random_pictures,
    require_embeddings,
    require_logits,
    require_same_on_a_gpu,
    require_same_when_cached,
    without_template,
    write_tokenizer,
)
from packages.core.tests.models.tiny import SMALL, randomise
from tests.common_run import few

PAD, PATH = 262, Path("config.json")
MARKS = ("<img>", "</img>", "<imgpad>", "<|endoftext|>")
SYSTEM = (
    "<|im_start|>system\nYou should follow the instructions carefully and explain your answers in detail.<|im_end|>"
)
PICTURES = random_pictures((30, 47), (64, 20), (5, 5))
PROMPTS: list[Any] = [
    {
        "prompt": "<img><imgpad><imgpad></img>\nOCR of both pages, one after the other.",
        "multi_modal_data": {"image": PICTURES[:2]},
    },
    {
        "prompt": "<img><imgpad></img>\nPlease OCR this page, line by line, with every word of it.",
        "multi_modal_data": {"image": PICTURES[2:]},
    },
    "<|im_start|>user\nNothing to read.<|im_end|>",
]
VISION: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 2, "image_size": 32,
    "window_size": 5, "global_attn_indexes": [1], "output_channels": 16, "mlp_dim": 48,
}  # fmt: skip
IMAGES: dict[str, Any] = {
    "size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.4, 0.6], "image_std": [0.5, 0.6, 0.4], "resample": 3,
}  # fmt: skip
KINDS = {"usual": ({}, {}), "tiles": ({"window_size": 14, "qkv_bias": False}, {"crop_to_patches": True})}


def write(folder: Path, kind: str = "usual") -> Path:
    vision, images = KINDS[kind]
    text = {**SMALL, "model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    config = AutoConfig.for_model("got_ocr2", text_config=text, vision_config=VISION | vision, image_token_index=PAD)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager")
    randomise(model)
    with torch.no_grad():  # embeddings of pictures as long as those of words
        model.model.multi_modal_projector.multimodal_projector.weight.mul_(3)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES | images))
    write_tokenizer(folder, MARKS, "{{ messages[0].content }}")
    return folder


@pytest.fixture(scope="module", params=few(KINDS, "tiles"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("got_ocr2"), request.param)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def their_pixels(pictures: list[NDArray[np.uint8]], said: dict[str, Any]) -> Any:
    return GotOcr2ImageProcessorPil(**said)(images=[Image.fromarray(each) for each in pictures], return_tensors="pt")


def pixels_of(folder: Path, pictures: list[NDArray[np.uint8]]) -> torch.Tensor:
    return their_pixels(pictures, json.loads((folder / "preprocessor_config.json").read_text()))["pixel_values"]


# ---- tiles and prompts -----------------------------------------------------------------------------------------------

PUBLISHED: dict[str, Any] = {
    "architectures": ["GotOcr2ForConditionalGeneration"], "model_type": "got_ocr2", "image_token_index": 151859,
    "text_config": {
        "model_type": "qwen2", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "rope_theta": 1000000.0, "vocab_size": 151860,
        "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 21,
    },
    "vision_config": {
        "hidden_size": 768, "image_size": 1024, "mlp_dim": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
        "output_channels": 256, "patch_size": 16, "window_size": 14, "global_attn_indexes": [2, 5, 8, 11],
    },
}  # fmt: skip
SIZE: dict[str, Any] = {"size": {"height": 1024, "width": 1024}}


def config_of(vision: dict[str, Any] | None = None, said: dict[str, Any] | None = None, **images: Any) -> Any:
    values = PUBLISHED | {"vision_config": PUBLISHED["vision_config"] | (vision or {})}
    return FAMILY.config_from_hf(Fields(values, PATH), Fields(SIZE | images, PATH), 1024, said or {})


@pytest.mark.parametrize("said", [{}, {"crop_to_patches": True}, {"crop_to_patches": True, "min_patches": 3}])
def test_images_have_the_placeholders_of_transformers(said: dict[str, Any]) -> None:
    rule, theirs = config_of(said=said).rule, GotOcr2ImageProcessorPil(**SIZE | said)
    for width, height in ((640, 480), (1920, 1080), (3000, 400), (1, 1), (1024, 3072), (2048, 2048), (10, 3000)):
        cut, count = rule.cut(height, width), theirs.get_number_of_image_patches(height, width)
        assert FAMILY.words_around(cut, cut.cells(64)) == "<imgpad>" * 256 * count, (width, height)


@pytest.mark.parametrize("said", [{}, {"crop_to_patches": True}, {"crop_to_patches": True, "resample": 2}])
def test_pixels_are_those_of_transformers(said: dict[str, Any]) -> None:
    values = {"vision_config": VISION}
    rule: Any = FAMILY.config_from_hf(Fields(values, PATH), Fields(IMAGES | said, PATH), 64, {}).rule
    for picture in PICTURES:
        tiles, wanted = rule.tiles(picture_of(picture)), their_pixels([picture], IMAGES | said)["pixel_values"]
        ours = rule.normalisation.table[np.stack(tiles), np.arange(3)].transpose(0, 3, 1, 2)
        assert np.abs(ours - wanted.numpy()).max() < 1e-6


def test_prompts_are_those_of_transformers(tmp_path: Path) -> None:
    """Whose processor has no template, and writes one conversation; images of a message are its pages."""
    folder = write(tmp_path / "model")
    processor: Any = object.__new__(GotOcr2Processor)
    processor.image_processor = GotOcr2ImageProcessorPil()
    processor.message_start_token, processor.message_end_token = "<|im_start|>", "<|im_end|>"
    processor.img_start_token, processor.image_token, processor.img_end_token = "<img>", "<imgpad>", "</img>"
    processor.system_query = SYSTEM.removeprefix("<|im_start|>").removesuffix("<|im_end|>")
    pages = [{"type": "image", "image": each} for each in PICTURES[:2]]
    with InferenceEngine(without_template(folder, tmp_path / "bare")) as engine:
        for images, query, said in (
            (pages[:1], " OCR: ", {"multi_page": False}),
            (pages, " OCR across multi pages: ", {"multi_page": True}),
        ):
            content: Any = [*images, {"type": "text", "text": query}]
            wanted = f"{SYSTEM}<|im_start|>user\n<img>{'<imgpad>' * len(images)}</img>\n{query}<|im_end|>"
            wanted += "<|im_start|>assistant\n"
            assert engine.apply_chat_template([{"role": "user", "content": content}]) == wanted
            given = [each["image"] for each in images]
            theirs = processor.prepare_inputs_layout(
                images=[given] if said["multi_page"] else given, format=False, images_kwargs={}, **said
            )[1]
            assert theirs == [wanted.replace("<imgpad><imgpad>", "<imgpad>")]  # one mark for all pages
        plain = engine.apply_chat_template([{"role": "system", "content": "Read."}, {"role": "user", "content": "Hi"}])
        assert plain == "<|im_start|>system\nRead.<|im_end|><|im_start|>user\nHi<|im_end|><|im_start|>assistant\n"


# ---- embeddings, logits, answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("eager", few([True, False], False))
def test_embeddings_are_those_of_transformers(eager: bool, folder: Path, theirs: Any) -> None:
    loaded, wanted = loaded_from(folder, op_by_op=eager), list[NDArray[np.float32]]()
    assert loaded.tower is not None
    for picture in PICTURES:
        with torch.inference_mode():
            found = theirs.model.get_image_features(pixels_of(folder, [picture])).pooler_output
        wanted.append(found.flatten(0, 1).numpy())
    ids, given = loaded.tower.vision.look([PAD] * len(PICTURES), PICTURES)
    assert [len(each) for each in loaded.tower.vision.places(ids, given)] == [len(each) for each in wanted]
    require_embeddings(loaded, given, wanted, eager=eager, most=16)


@pytest.mark.parametrize(("eager", "tokens"), few([(e, t) for e in (True, False) for t in (512, 23)], (True, 23)))
def test_logits_are_those_of_transformers(tokens: int, eager: bool, folder: Path, theirs: Any) -> None:
    def wanted(ids: torch.Tensor) -> torch.Tensor:
        return theirs(input_ids=ids, pixel_values=pixels_of(folder, PICTURES[:2])).logits[0].log_softmax(-1)

    require_logits(folder, PROMPTS[0], wanted, eager=eager, tokens=tokens)


@pytest.mark.parametrize("tokens", few([512, 17], 17))
def test_answers_are_the_same_in_a_batch_in_chunks_and_cached(tokens: int, folder: Path) -> None:
    alone = answers_alone(folder, PROMPTS)
    with InferenceEngine(folder, max_num_batched_tokens=tokens, max_num_seqs=8) as engine:
        require_same_when_cached(engine, PROMPTS, alone)


@pytest.mark.parametrize("how", few(GPU_STEPS, "captured"))
def test_steps_of_a_gpu_have_the_same_answers(folder: Path, how: str) -> None:
    """By the references of its kernels."""
    asked = [("<img><imgpad></img>\nRead.", PICTURES[:1]), ("Nothing to see.", [])]
    require_same_on_a_gpu(folder, asked, how)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_the_published_config_is_read() -> None:
    """Without the keys that have transformers' defaults."""
    assert tower_family(PUBLISHED) is FAMILY
    tower = config_of()
    assert (tower.hidden_size, tower.blocks, tower.side, tower.channels) == (768, 12, 64, (256, 512, 1024))
    family, text = family_from_hf(PUBLISHED, PATH)
    assert (family.hf.get("Qwen2ForCausalLM"), text.hidden_size, text.max_position) == ("qwen2", 1024, 32768)
    assert text.tie_embeddings


@pytest.mark.parametrize(
    ("vision", "images", "said"),
    [
        ({"use_rel_pos": False}, {}, "use_rel_pos"), ({"use_abs_pos": False}, {}, "use_abs_pos"),
        ({"hidden_act": "relu"}, {}, "hidden_act"), ({"hidden_size": 24}, {}, "hidden_size is 24"),
        ({"num_channels": 1}, {}, "num_channels"), ({"image_size": 512}, {}, "tiles of 1024 pixels"),
        ({"global_attn_indexes": [12]}, {}, "global_attn_indexes"), ({}, {"do_resize": False}, "do_resize"),
        ({}, {"crop_to_patches": True, "min_patches": 13}, "min_patches is 13"),
    ],
)  # fmt: skip
def test_other_models_are_refused(vision: dict[str, Any], images: dict[str, Any], said: str) -> None:
    with pytest.raises((InvalidFileError, UnsupportedModelError), match=said):
        config_of(vision, **images)


def test_missing_tensors_and_unknown_settings_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path)
    with pytest.raises(ConfigError, match="'tile_size' is not a setting"):
        loaded_from(folder, mm_processor_kwargs={"tile_size": 5})
    stored = load_file(folder / "model.safetensors")
    for name in ("multi_modal_projector.conv_upsampler2.weight", "vision_tower.neck.conv1.weight"):
        kept = {key: each for key, each in stored.items() if not key.endswith(name)}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(CandleVllmError, match=name):
            loaded_from(folder)
