# SPDX-License-Identifier: MIT
"""LLaVA-NeXT of random weights, with CLIP's and SigLIP's encoder: embeddings and logits against transformers."""

from __future__ import annotations

import json
import re
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
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.models.llava_next_tower import FAMILY
from candle_vllm.core.models.registry import tower_family
from candle_vllm.core.models.towers import of_tower
from candle_vllm.core.vision.pictures import picture_of
from candle_vllm.core.vision.preprocessing import NOTHING
from packages.core.tests.models.gguf_export import export_gguf
from packages.core.tests.models.sight import (
    answers,
    answers_alone,
    model_of,
    random_model,
    require_logits,
    require_same_embeddings,
    require_same_in_steps,
    write_tokenizer,
    write_tower,
)
from packages.core.tests.models.test_llava_onevision import EDGES, MARKS, PAD, PICTURES, PROMPTS, TEMPLATE
from packages.core.tests.models.tiny import SMALL
from tests.common_run import combined, few

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 4}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "CLIP": ({"model_type": "llama"}, {"model_type": "clip_vision_model", "image_size": 12, "projection_dim": 8}, {}),
    "SigLIP": (
        {
            "model_type": "granite", "embedding_multiplier": 3.0, "residual_multiplier": 1.5, "logits_scaling": 2.0,
            "attention_multiplier": 0.3,
        },
        {"model_type": "siglip_vision_model", "image_size": 15, "vision_use_head": False},
        {"vision_feature_layer": [-5, -3, -1, -2], "vision_feature_select_strategy": "full"},
    ),
    "Mistral": (
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "clip_vision_model", "image_size": 12, "projection_dim": 8},
        {"vision_feature_layer": [1, -1], "multimodal_projector_bias": True},
    ),
    "Qwen2": (
        {"model_type": "qwen2"},
        {"model_type": "siglip_vision_model", "image_size": 15, "vision_use_head": False, "hidden_act": "gelu"},
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "multimodal_projector_bias": False},
    ),
}  # fmt: skip
"""Text model, vision encoder, and keys of the whole. Tiles of 15 pixels have three pixels beyond their patches."""


def images_of(kind: str) -> dict[str, Any]:
    tile = KINDS[kind][1]["image_size"]
    size = {"shortest_edge": tile} if kind == "CLIP" else {"height": tile, "width": tile}
    grids = [[tile * rows, tile * columns] for rows in range(1, 4) for columns in range(1, 4)]
    return {
        "size": size, "crop_size": {"height": tile, "width": tile}, "image_grid_pinpoints": grids, "resample": 3,
        "do_pad": True, "image_mean": [0.5, 0.4, 0.6], "image_std": [0.5, 0.6, 0.4],
    }  # fmt: skip


def write(folder: Path, kind: str) -> Path:
    text, vision, own = KINDS[kind]
    images = images_of(kind)
    config = AutoConfig.for_model(
        "llava_next", text_config={**SMALL, **text}, vision_config={**SIZES, **vision}, image_token_index=PAD,
        image_grid_pinpoints=images["image_grid_pinpoints"], **own,
    )  # fmt: skip
    model = random_model(config)
    with torch.no_grad():  # embeddings of pictures as long as those of words
        model.model.multi_modal_projector.linear_2.weight.mul_(6)
        model.model.image_newline.normal_()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    write_tokenizer(folder, MARKS, TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write(tmp_path_factory.mktemp("llava_next"), kind) for kind in KINDS}


def their_pixels(kind: str, pictures: list[NDArray[np.uint8]]) -> Any:
    processor = LlavaNextImageProcessorPil(**images_of(kind))
    return processor(images=[Image.fromarray(each) for each in pictures], return_tensors="pt")


def config_of(folder: Path, processor: Mapping[str, Any] = NOTHING, **change: Any) -> Any:
    config, images = (json.loads((folder / f"{n}config.json").read_text()) for n in ("", "preprocessor_"))
    return FAMILY.config_from_hf(Fields(config | change, folder), Fields(images | dict(processor), folder), 64, {})


def test_images_have_the_placeholders_of_transformers() -> None:
    path = Path("config.json")
    sizes = {"size": {"shortest_edge": 336}, "crop_size": 336}
    config: Any = FAMILY.config_from_hf(Fields({"vision_config": None}, path), Fields(sizes, path), 4096, {})
    assert (config.hidden_size, config.num_layers, config.side, config.tiles) == (1024, 23, 24, 5)
    words: Any = object.__new__(LlavaNextProcessor)
    words.image_processor, words.patch_size, words.num_additional_image_tokens = LlavaNextImageProcessorPil(), 14, 1
    for width, height in EDGES:
        cut = config.rule.cut(height, width)
        count = words._get_number_of_features(height, width, 336, 336) - 1
        assert FAMILY.words_around(cut, cut.cells(14)) == "<image>" * count, (width, height)


@pytest.mark.parametrize("kind", ["CLIP", "SigLIP"])
def test_tiles_are_those_of_transformers(kind: str, folders: dict[str, Path]) -> None:
    rule = config_of(folders[kind]).rule
    for picture in PICTURES:
        tiles = np.stack(rule.tiles(picture_of(picture)))
        expected = their_pixels(kind, [picture])["pixel_values"][0].numpy()
        ours = rule.normalisation.table[tiles, np.arange(3)].transpose(0, 3, 1, 2)
        assert np.abs(expected[:, :, :12, :12] - ours).max() < 1e-6


@combined("kind eager", KINDS, (True, False), common=[*((kind, False) for kind in KINDS)])
def test_embeddings_are_those_of_transformers(kind: str, eager: bool, folders: dict[str, Path]) -> None:
    model, wanted = model_of(folders[kind]), list[NDArray[np.float32]]()
    for picture in PICTURES:
        with torch.inference_mode():
            wanted.append(model.model.get_image_features(**their_pixels(kind, [picture])).pooler_output[0].numpy())
        text = model.config.text_config  # the residual stream is stored divided by `residual_multiplier`
        wanted[-1] = wanted[-1] * getattr(text, "embedding_multiplier", 1.0) / getattr(text, "residual_multiplier", 1.0)
    require_same_embeddings(folders[kind], PAD, PICTURES, wanted, eager=eager, most=64)


@combined("kind eager tokens", KINDS, (True, False), (512, 23), common=[("SigLIP", False, 23)])
def test_logits_are_those_of_transformers(kind: str, tokens: int, eager: bool, folders: dict[str, Path]) -> None:
    pixels, model = their_pixels(kind, PICTURES[:2]), model_of(folders[kind])

    def wanted(ids: torch.Tensor) -> torch.Tensor:
        scale = getattr(model.config.text_config, "logits_scaling", 1.0)  # transformers leaves it out in this class
        return (model(input_ids=ids, **pixels).logits[0] / scale).log_softmax(-1)

    require_logits(folders[kind], PROMPTS[0], wanted, eager=eager, tokens=tokens)


@combined("kind tokens", KINDS, (512, 17), common=[("CLIP", 17)])
def test_answers_are_the_same_in_a_batch_in_chunks_and_cached(kind: str, tokens: int, folders: dict[str, Path]) -> None:
    require_same_in_steps(folders[kind], PROMPTS, answers_alone(folders[kind], PROMPTS), tokens)


# ---- files -----------------------------------------------------------------------------------------------------------


def older(name: str) -> str:
    """The name that llama.cpp's `convert_image_encoder_to_gguf.py` gives a tensor, with up and down swapped."""
    if name == "image_newline":
        return "model.image_newline"
    for hf, gguf in {"multi_modal_projector.linear_1": "mm.0", "multi_modal_projector.linear_2": "mm.2"}.items():
        name = name.replace(hf, gguf)
    changes = {
        "vision_tower.vision_model": "v", "vision_tower": "v", "encoder.layers": "blk", "embeddings.": "",
        "_proj": "", "self_attn.": "attn_", "layer_norm": "ln", "layernorm": "ln", "mlp.fc1": "ffn_down",
        "mlp.fc2": "ffn_up", "embedding": "embd", "layrnorm": "ln",
    }  # fmt: skip
    for hf, gguf in changes.items():
        name = name.replace(hf, gguf)
    return name


def write_gguf(kind: str, folder: Path, made: Path, **keys: Any) -> dict[str, Any]:
    """The checkpoint as llama.cpp's converters leave it: settings that name its text model's file and its tower's."""
    config, images, text = json.loads((folder / "config.json").read_text()), images_of(kind), made / "text"
    tensors = {key.removeprefix("model."): each for key, each in load_file(folder / "model.safetensors").items()}
    text.mkdir(parents=True)
    language = {re.sub(r"^language_model\.(model\.)?", "", key): each for key, each in tensors.items()}
    kept = {key: each for key, each in language.items() if not of_tower(key)}
    save_file({k if "lm_head" in k else f"model.{k}": each for k, each in kept.items()}, text / "model.safetensors")
    (text / "config.json").write_text(json.dumps(config["text_config"] | {"tie_word_embeddings": False}))
    export_gguf(text, made / "model.gguf", "granite" if kind == "SigLIP" else "llama")
    layers = config["vision_feature_layer"]
    layers = [layer if layer >= 0 else 5 + layer for layer in (layers if isinstance(layers, list) else [layers])]
    values: dict[str, Any] = {
        "image_size": config["vision_config"]["image_size"], "projection_dim": 8, "block_count": max(layers),
        "clip.use_gelu": kind == "SigLIP", "attention.layer_norm_epsilon": 1e-6 if kind == "SigLIP" else 1e-5,
        "image_grid_pinpoints": [side for grid in images["image_grid_pinpoints"] for side in grid[::-1]],
        "mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres", **keys,
    }  # fmt: skip
    values |= {"feature_layer": layers} if layers[1:] else {}
    stored = dict[str, NDArray[np.float32]]()
    for name, tensor in tensors.items():
        number = re.search(r"encoder\.layers\.(\d+)\.", name)
        dropped = number is not None and int(number[1]) >= max(layers)
        unused = "post_layernorm" in name or (name == "image_newline" and not values["image_grid_pinpoints"])
        if of_tower(name) and not dropped and not unused:
            stored[older(name)] = np.ascontiguousarray(tensor.float().numpy().squeeze())
    said = {key: value for key, value in values.items() if value is not None}
    write_tower(made / "mmproj.gguf", "mlp", said, stored, images)
    return {"model": str(made / "model.gguf"), "mmproj": made / "mmproj.gguf", "tokenizer": folder}


@pytest.mark.parametrize("kind", few(["CLIP", "Mistral"], "Mistral"))
def test_a_gguf_file_beside_the_model_is_the_same_tower(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    files = write_gguf(kind, folders[kind], tmp_path)
    with InferenceEngine(folders[kind]) as engine:
        wanted = answers(engine, PROMPTS)
    with InferenceEngine(**files) as engine:
        assert answers(engine, PROMPTS) == wanted


def test_a_gguf_file_of_llava_1_5_is_the_tower_of_its_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    """The same tensors in a folder of LLaVA 1.5, whose images are one tile."""
    folder = tmp_path / "folder"
    folder.mkdir()
    source = folders["CLIP"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(images_of("CLIP") | {"do_pad": False}))
    stored = {key: each for key, each in load_file(source / "model.safetensors").items() if "newline" not in key}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    one = {"image_grid_pinpoints": None, "mm_patch_merge_type": None, "image_aspect_ratio": None}
    files = write_gguf("CLIP", source, tmp_path / "gguf", **one)
    with InferenceEngine(folder) as engine:
        wanted = answers(engine, PROMPTS)
    with InferenceEngine(**files) as engine:
        assert answers(engine, PROMPTS) == wanted


@pytest.mark.parametrize(
    ("change", "processor", "said"),
    [
        ({"vision_feature_layer": 9}, {}, "vision_feature_layer is 9"),
        ({"vision_feature_layer": 0}, {}, "which has no block"),
        ({"vision_feature_layer": []}, {}, "vision_feature_layer is"),
        ({"vision_feature_select_strategy": "full"}, {}, "vision_feature_select_strategy is 'full'"),
        ({"image_grid_pinpoints": [[12, 12]]}, {}, "image_grid_pinpoints is"),
        ({}, {"crop_size": 16}, "size and crop_size must be one number"),
        ({}, {"size": {"shortest_edge": 24}, "crop_size": 24}, "tiles of 24 x 24 pixels"),
        ({"projector_hidden_act": "relu"}, {}, "projector_hidden_act"),
    ],
)
def test_other_models_are_refused(
    change: dict[str, Any], processor: dict[str, Any], said: str, folders: dict[str, Path]
) -> None:
    with pytest.raises((InvalidFileError, UnsupportedModelError), match=said):
        config_of(folders["CLIP"], processor, **change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio"),
        ({"image_grid_pinpoints": [12, 24, 12]}, "has 3 numbers, not pairs"),
        ({"mm_projector_type": "ldp"}, "mm_projector_type"),
    ],
)
def test_other_files_are_refused(change: dict[str, Any], said: str, folders: dict[str, Path], tmp_path: Path) -> None:
    files = write_gguf("CLIP", folders["CLIP"], tmp_path, **change)
    with pytest.raises((InvalidFileError, UnsupportedModelError), match=said):
        InferenceEngine(**files)


def test_siglip_in_a_gguf_file_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="implemented with CLIP's encoder"):
        InferenceEngine(**write_gguf("SigLIP", folders["SigLIP"], tmp_path))


def test_the_family_is_found() -> None:
    for kind in ("clip_vision_model", "siglip_vision_model"):
        config = {"architectures": ["LlavaNextForConditionalGeneration"], "vision_config": {"model_type": kind}}
        assert tower_family(config) is FAMILY


def test_a_tokenizer_without_the_mark_has_the_unknown_token_in_its_place(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Published GGUF files of LLaVA have the tokenizer of Vicuna or Mistral."""
    source, other = folders["CLIP"], tmp_path / "other"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_text((source / name).read_text().replace("<image>", "<unk>"))
    files = write_gguf("CLIP", source, tmp_path / "gguf")
    asked = [{**each, "prompt": each["prompt"].replace("<image>", "<unk>")} for each in PROMPTS[:-1]]
    with InferenceEngine(source) as engine:
        wanted = answers(engine, PROMPTS)
    with InferenceEngine(**files | {"tokenizer": other}) as engine:
        assert answers(engine, [*asked, PROMPTS[-1]]) == wanted
        text = [{"type": "image", "image": PICTURES[3]}, {"type": "text", "text": "What is this?"}]
        assert engine.chat([{"role": "user", "content": text}], SamplingParams(max_tokens=2), use_tqdm=False)
