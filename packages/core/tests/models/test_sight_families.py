# SPDX-License-Identifier: MIT
"""Pixtral, Mistral 3, Gemma 3 and 4, and Llama 4 with pictures, of random weights: their towers and logits against
transformers, their answers however a prompt comes to them, and files that cannot be used."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPVisionConfig, LlavaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.llama4.processing_llama4 import Llama4Processor
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.engine.drafts.draft_model import DraftModel
from candle_vllm.core.engine.runners import recorded_tower
from candle_vllm.core.engine.runners.images import tiles_of
from candle_vllm.core.engine.runners.recorded_tower import RecordedTower
from candle_vllm.core.errors import (
    ConfigError,
    InvalidFileError,
    InvalidParameterError,
    UnsupportedModelError,
    WeightsError,
)
from candle_vllm.core.fields import Fields, read_json
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.models import clip_tower, gemma4_tower_config, gemma4_unified_tower, llama4_tower, siglip
from candle_vllm.core.models.canvas_rules import CanvasRule
from candle_vllm.core.models.registry import tower_family
from candle_vllm.core.models.towers import of_tower
from candle_vllm.core.remote import RemoteEngine
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model, write_toy_tokenizer
from candle_vllm.core.vision.pictures import picture_of
from candle_vllm.core.vision.preprocessing import Normalisation
from packages.core.tests.engine.drafted import same_times
from packages.core.tests.models import families
from packages.core.tests.models.gguf_export import export_gguf
from packages.core.tests.models.sight import (
    answers,
    answers_without_torch,
    model_of,
    prompt_error,
    require_same_embeddings,
    require_same_on_a_gpu,
    write_tower,
)
from packages.core.tests.models.tiny import SMALL, config_of, load, randomise
from packages.core.tests.toy_sight import write_toy_sight
from tests.common_run import combined, few

RANDOM = np.random.default_rng(3)
SIZES = ((40, 70), (32, 32), (9, 100), (3, 2), (47, 15))
PICTURES = [RANDOM.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
PIXTRAL = VISION | {"model_type": "pixtral", "hidden_act": "silu", "head_dim": 16}
GEMMA3 = {
    "model_type": "gemma3_text",
    "head_dim": 16,
    "num_hidden_layers": 3,
    "query_pre_attn_scalar": 16,
    "sliding_window": 6,  # less than a picture has tokens
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
GEMMA4 = {
    "model_type": "gemma4_text",
    "head_dim": 16,
    "global_head_dim": 32,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window": 16,  # less than an image has tokens
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 16,
    "final_logit_softcapping": 3.0,
    "vocab_size_per_layer_input": 264,
    "vocab_size": 264,
}
GEMMA4_WIDE = GEMMA4 | {
    "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"
}  # fmt: skip
GEMMA4_VISION = VISION | {
    "model_type": "gemma4_vision", "num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2,
    "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
}  # fmt: skip
GEMMA4_TOKENS = {"image_token_id": 261, "boi_token_id": 259, "eoi_token_id": 260, "audio_config": None}
LLAMA4 = families.LLAMA4 | {"model_type": "llama4_text", "vocab_size": 272}
LLAMA4_VISION = VISION | {
    "model_type": "llama4_vision_model", "intermediate_size": 128, "image_size": 16, "projector_input_dim": 40,
    "projector_output_dim": 40, "vision_output_dim": 40,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}  # fmt: skip
LLAMA4_MARKS = ("<|image_start|>", "<|image_end|>", "<|patch|>", "<|image|>")
LLAMA4_MARKS += ("<|tile_x_separator|>", "<|tile_y_separator|>")
MISTRAL = {"model_type": "mistral", "head_dim": 16, "rms_norm_eps": 1e-4}  # not that of the tower's norms


@dataclasses.dataclass(frozen=True)
class Row:
    """A family: keys of its config, those of its processor, tokens from 259 on, and what a template writes."""

    model_type: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    own: Mapping[str, Any]
    processor: Mapping[str, Any]
    tokens: tuple[str, ...]
    asks: str
    mark: int
    gguf: tuple[str, Mapping[str, Any]]  # of the text model, and keys of the tower's file


MARKS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
ROWS = {
    "Mistral 3": Row(
        "mistral3", MISTRAL, PIXTRAL | {"image_size": 40}, {"image_token_index": 259, "spatial_merge_size": 2},
        {"size": {"longest_edge": 40}, "patch_size": {"height": 4, "width": 4}, "resample": 3, **CLIP}, MARKS, "[IMG]",
        259, ("llama", {"image_size": 40, "spatial_merge_size": 2, **CLIP}),
    ),
    "Pixtral": Row(
        "llava", MISTRAL, PIXTRAL | {"image_size": 24, "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0}},
        {"image_token_index": 259, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        {"size": {"longest_edge": 24}, "patch_size": 4, **CLIP}, MARKS, "[IMG]",
        259, ("llama", {"image_size": 24, **CLIP}),
    ),
    "LLaVA 1.5": Row(
        "llava", {"model_type": "llama"},
        VISION | {"model_type": "clip_vision_model", "image_size": 24, "num_hidden_layers": 3, "projection_dim": 8},
        {"image_token_index": 259, "vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
        {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}, "resample": 3, **CLIP},
        ("<image>",), "<image>", 259, ("llama", {}),
    ),
    "LightOnOCR": Row(
        "lighton_ocr", {"model_type": "qwen3", "head_dim": 16, "rms_norm_eps": 1e-4}, PIXTRAL | {"image_size": 40},
        {"image_token_id": 259, "spatial_merge_size": 2},
        {"size": {"longest_edge": 40}, "patch_size": {"height": 4, "width": 4}, "resample": 3, **CLIP},
        ("<|image_pad|>", "<|vision_pad|>", "<|vision_end|>"), "<|image_pad|>", 259,
        ("qwen3", {"image_size": 24, "preproc_image_size": 40, "spatial_merge_size": 2, **CLIP}),
    ),
    "Gemma 3": Row(
        "gemma3", GEMMA3, VISION | {"model_type": "siglip_vision_model", "image_size": 32, "vision_use_head": False},
        {"mm_tokens_per_image": 16, "boi_token_index": 259, "eoi_token_index": 260, "image_token_index": 261},
        {"size": {"height": 32, "width": 32}, "resample": 2, **HALF},
        ("<start_of_image>", "<end_of_image>", "<image_soft_token>"), "<start_of_image>",
        261, ("gemma3", {"image_size": 32, "projector.scale_factor": 2, **HALF}),
    ),
    "Gemma 4 E2B": Row(
        "gemma4", GEMMA4, GEMMA4_VISION | {"use_clipped_linears": True, "position_embedding_size": 10240},
        GEMMA4_TOKENS, {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 2},
        ("<|image>", "<image|>", "<|image|>"), "<|image|>",
        261, ("gemma4", {"projector.scale_factor": 2}),
    ),
    "Gemma 4 12B": Row(
        "gemma4_unified",
        GEMMA4_WIDE | {"model_type": "gemma4_unified_text"},
        {"model_type": "gemma4_unified_vision", "patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 64,
         "output_proj_dims": 64},
        GEMMA4_TOKENS, {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 2},
        ("<|image>", "<image|>", "<|image|>"), "<|image|>",
        261, ("gemma4", {"projector.scale_factor": 2}),
    ),
    "Gemma 4 31B": Row(
        "gemma4", GEMMA4_WIDE, GEMMA4_VISION | {"standardize": True, "position_embedding_size": 10240},
        GEMMA4_TOKENS, {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 2},
        ("<|image>", "<image|>", "<|image|>"), "<|image|>",
        261, ("gemma4", {"projector.scale_factor": 2}),
    ),
    "Llama 4": Row(
        "llama4", LLAMA4, LLAMA4_VISION, {"boi_token_index": 259, "eoi_token_index": 260, "image_token_index": 261},
        {"size": {"height": 16, "width": 16}, "max_patches": 4, "resample": 2, **HALF}, LLAMA4_MARKS, "<|image|>",
        261, ("llama4", {"image_size": 16, "projector.scale_factor": 2, "projection_dim": 64, **HALF}),
    ),
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}ASKS"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


OLDER = ("Mistral 3", "Pixtral", "Gemma 3")
IN_GGUF = few([name for name, row in ROWS.items() if row.gguf[1]], *OLDER)


def write_sight(folder: Path, name: str, processor: Mapping[str, Any] = {}, **config: Any) -> Path:
    row = ROWS[name]
    said = {"text_config": dict(SMALL) | dict(row.text), "vision_config": dict(row.vision), **row.own} | config
    made = AutoConfig.for_model(row.model_type, tie_word_embeddings=False, **said)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(made, dtype=torch.float32, attn_implementation="eager")
    randomise(model)
    for key, buffer in model.named_buffers():  # of Gemma 4's tower, so that none is idle
        if key.endswith(("put_min", "put_max")):
            buffer.fill_(-0.8 if key.endswith("min") else 0.7)
        elif key.endswith(("std_bias", "std_scale")):
            buffer.copy_(torch.randn_like(buffer))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(row.processor) | dict(processor)))
    write_toy_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(list(row.tokens))
    tokenizer.save(str(folder / "tokenizer.json"))
    told = read_json(folder / "tokenizer_config.json") | {"chat_template": TEMPLATE.replace("ASKS", row.asks)}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = write_sight(tmp_path_factory.mktemp("sight"), name)
        return made[name]

    return folder


@pytest.fixture(autouse=True)
def small_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """GGUF files do not say the size of Llama 4's adapter."""
    monkeypatch.setattr(llama4_tower, "_ADAPTER", 40)


def theirs(folder: Path) -> Any:
    return model_of(folder)


def canvas_tiles(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    plain = Normalisation(1.0, (0.0,) * 3, (1.0,) * 3)
    return CanvasRule(tile=16, most=4, grows=False, resample=2, normalisation=plain).tiles(picture_of(picture))


def their_inputs(name: str, folder: Path, pictures: list[NDArray[np.uint8]]) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of pictures."""
    said, images = read_json(folder / "preprocessor_config.json"), [Image.fromarray(each) for each in pictures]
    if name == "Llama 4":  # whose own processor needs torchvision; `test_preprocessing.py` compares its tiles
        made = [torch.from_numpy(canvas_tiles(each)).permute(0, 3, 1, 2) for each in pictures]
        return {"pixel_values": (torch.cat(made).bfloat16() * (1 / 255)).sub(0.5).div(0.5).float()}
    if name == "Gemma 3":
        made = Gemma3ImageProcessorPil(**said)(images=images, return_tensors="pt")
        return {"pixel_values": made["pixel_values"]}
    if name == "LLaVA 1.5":
        return {"pixel_values": CLIPImageProcessorPil(**said)(images=images, return_tensors="pt")["pixel_values"]}
    if "Gemma 4" in name:
        if "12B" in name:  # whose own processor needs torchvision: patches of what is one embedding
            said = {"patch_size": 8, "max_soft_tokens": 70, "pooling_kernel_size": 1}
        made = Gemma4ImageProcessorPil(**said)(images=images, return_tensors="pt")
        return {key: made[key] for key in ("pixel_values", "image_position_ids")}
    patch = 4 * ROWS[name].own.get("spatial_merge_size", 1)
    made = PixtralImageProcessorPil(**said | {"patch_size": {"height": patch, "width": patch}})(
        images=images, return_tensors="pt"
    )
    return {"pixel_values": made["pixel_values"], "image_sizes": torch.as_tensor(made["image_sizes"])}


def their_features(name: str, folder: Path, model: Any, picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Of one of two: alone, a picture of a single embedding is too much for transformers."""
    with torch.inference_mode():
        if name == "Llama 4":
            found = model.get_image_features(**their_inputs(name, folder, [picture])).last_hidden_state
            return model.multi_modal_projector(found).reshape(-1, 64).numpy()
        inputs = their_inputs(name, folder, [picture] * 2)
        found = model.model.get_image_features(**inputs).pooler_output
    if "12B" in name and not isinstance(found, tuple):
        found = found[0][(inputs["image_position_ids"][0] >= 0).all(-1)][None]
    return found[0].reshape(-1, 64).numpy()


@combined(
    "name eager", ROWS, (True, False),
    common=[*((name, False) for name in ("Mistral 3", "LLaVA 1.5", "Gemma 4 E2B", "Gemma 4 12B", "Llama 4"))],
)  # fmt: skip
def test_embeddings_are_those_of_transformers(name: str, eager: bool, folders: Callable[[str], Path]) -> None:
    folder = folders(name)
    model, asks = theirs(folder), Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(ROWS[name].asks)
    wanted = [their_features(name, folder, model, picture) for picture in PICTURES]
    most = 32 if name == "Llama 4" else 16  # its tiles are the smallest
    require_same_embeddings(folder, asks, PICTURES, wanted, eager=eager, most=most)


@pytest.mark.parametrize("name", few(ROWS, "Gemma 3"))
def test_others_wait_for_an_operation_where_a_layer_takes_long(
    name: str, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(folders(name), max_images=64)
    assert loaded.tower is not None
    image = loaded.tower.vision.look([loaded.tower.vision.parts.asks], PICTURES[:1])[1][0]
    tiles = tiles_of(image)
    team, found, pieces = ThreadTeam(2), list[NDArray[np.float32]](), list[int]()
    try:
        runner = RecordedTower(loaded.tower.tower, team)
        for piece in (1e9, 0.0):
            monkeypatch.setattr(recorded_tower, "_PIECE", piece)
            encoding, count = runner.embeddings(tiles), 0
            while True:
                try:
                    next(encoding)
                    count += 1
                except StopIteration as done:
                    found.append(done.value)
                    break
            pieces.append(count)
    finally:
        team.close()
    assert np.array_equal(*found)
    assert pieces[0] == 0
    assert pieces[1] > 3 * len(loaded.tower.tower.layers)


def prompt(name: str, *pictures: NDArray[np.uint8]) -> dict[str, Any]:
    between = f" with\n{ROWS[name].asks}" * (len(pictures) - 1)
    text = f"<|im_start|>user\n{ROWS[name].asks}\nCompare it{between}.<|im_end|>\n<|im_start|>assistant\n"
    return {"prompt": text, "multi_modal_data": {"image": list(pictures)}}


@combined(
    "name eager",
    ROWS,
    (True, False),
    common=[
        *((name, False) for name in ("Pixtral", "LLaVA 1.5", "LightOnOCR", "Gemma 3")),
        *((name, True) for name in ("Gemma 4 E2B", "Gemma 4 31B", "Llama 4")),
    ],
)
def test_logits_are_those_of_transformers(name: str, eager: bool, folders: Callable[[str], Path]) -> None:
    folder = folders(name)
    pictures = [PICTURES[0], PICTURES[4], PICTURES[1]]
    with InferenceEngine(folder, op_by_op=eager, enable_prefix_caching=False) as engine:
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
        found = engine.generate(prompt(name, *pictures), params, use_tqdm=False)[0]
    ids = torch.tensor([found.prompt_token_ids])
    kind = {"Gemma 3": "token_type_ids", "Gemma 4": "mm_token_type_ids"}.get(name[:7])
    more = {kind: (ids == 261).long()} if kind else {}
    model = theirs(folder)
    if "12B" in name:  # as its generate() has them: its forward() alone lets images see themselves in full layers too
        embeds = torch.zeros(1, len(ids[0]), 64)
        more["attention_mask"] = model.create_masks_for_generate(model.config, embeds, None, None, None, **more)
    with torch.inference_mode():
        logits = model(input_ids=ids, **their_inputs(name, folder, pictures), **more).logits[0]
    # keys and values are bfloat16 in the compiled steps
    assert prompt_error(found, logits) < (1e-4 if eager else 0.2)


@pytest.mark.parametrize("name", ["Mistral 3", "Pixtral"])
def test_rows_of_a_picture_end_with_a_mark_of_their_own(name: str, folders: Callable[[str], Path]) -> None:
    """As PixtralProcessor writes them, which needs torchvision."""
    folder = folders(name)
    with InferenceEngine(folder) as engine:
        for picture in PICTURES:
            found = engine.generate(prompt(name, picture), SamplingParams(max_tokens=1), use_tqdm=False)[0]
            cell = 4 * ROWS[name].own.get("spatial_merge_size", 1)
            height, width = their_inputs(name, folder, [picture])["image_sizes"][0].tolist()
            row = [259] * (width // cell)
            marks = [*([*row, 260] * (height // cell))[:-1], 261]
            text = prompt(name, picture)["prompt"].split("[IMG]")
            head, tail = (Tokenizer.from_file(str(folder / "tokenizer.json")).encode(part).ids for part in text)
            assert list(found.prompt_token_ids) == [*head, *marks, *tail]


@pytest.mark.parametrize("said", [{}, {"use_bidirectional_attention": None}, {"use_bidirectional_attention": "vision"}])
@pytest.mark.parametrize(("name", "read"), [
    ("Gemma 4 12B", gemma4_unified_tower.config_from_hf), ("Gemma 4 31B", gemma4_tower_config.config_from_hf),
])  # fmt: skip
def test_a_config_says_whether_tokens_of_an_image_see_later_ones(name: str, read: Any, said: dict[str, Any]) -> None:
    row = ROWS[name]
    text = {key: value for key, value in row.text.items() if key != "use_bidirectional_attention"} | said
    fields = Fields({"vision_config": row.vision, "text_config": text}, Path("config.json"))
    found = read(fields, Fields(row.processor, Path("preprocessor_config.json")), 64)
    theirs = AutoConfig.for_model(text["model_type"], **said).use_bidirectional_attention
    assert found.whole is (theirs == "vision")


def test_line_breaks_around_a_picture_are_those_of_one_text(tmp_path: Path) -> None:
    """Gemma's tokenizer has a token for each count of line breaks; transformers reads the whole prompt as one text."""
    folder = write_sight(tmp_path, "Gemma 3")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["\n" * count for count in range(2, 6)])
    tokenizer.save(str(folder / "tokenizer.json"))
    around = "\n\n<start_of_image>" + "<image_soft_token>" * 16 + "<end_of_image>\n\n"
    vision = load(folder, max_images=64).vision
    assert vision is not None
    for text in ("a\n\nb", "\n", "", "x"):
        parts = [f"One{text}", text, f"{text}two"]
        ids, _ = vision.look(tokenizer.encode("<start_of_image>".join(parts)).ids, PICTURES[:2])
        assert ids == tokenizer.encode(around.join(parts)).ids


@pytest.mark.parametrize("size", few([((20, 90),), ((90, 20),), ((40, 45),)], ((20, 90),), ((40, 45),)))
def test_pan_and_scan_shows_parts_of_wide_pictures(size: tuple[int, int], tmp_path: Path) -> None:
    said = {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 16,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    folder = write_sight(tmp_path, "Gemma 3", said)
    picture = RANDOM.integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels = their_inputs("Gemma 3", folder, [picture])["pixel_values"]
    tile = "\n\n<start_of_image>" + "<image_soft_token>" * 16 + "<end_of_image>\n\n"
    parts = " ".join([tile] * (len(pixels) - 1))
    expected = f"Here is the original image {tile} and here are some crops to help you see better {parts}"
    with InferenceEngine(folder, op_by_op=True) as engine:
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
        found = engine.generate(prompt("Gemma 3", picture), params, use_tqdm=False)[0]
        assert found.prompt_logprobs is not None
        text = prompt("Gemma 3", picture)["prompt"].replace("<start_of_image>", expected if parts else tile)
        assert list(found.prompt_token_ids) == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    ids = torch.tensor([found.prompt_token_ids])
    with torch.inference_mode():
        logits = theirs(folder)(input_ids=ids, pixel_values=pixels, token_type_ids=(ids == 261).long()).logits[0]
    wanted = [logits.log_softmax(-1)[at, token].item() for at, token in enumerate(found.prompt_token_ids[1:])]
    ours = [each.chosen.logprob for each in found.prompt_logprobs[1:] if each is not None]
    assert np.abs(np.array(ours) - np.array(wanted)).max() < 1e-4


def several(name: str) -> list[Any]:
    """Prompts of several pictures, of one twice, of one, and of none."""
    few = [(0, 1), (1, 0), (2, 2), (4,), (3,)]
    return [*(prompt(name, *(PICTURES[n] for n in each)) for each in few), "<|im_start|>user\nHello<|im_end|>\n"]


@pytest.fixture(scope="module")
def alone(folders: Callable[[str], Path]) -> Callable[[str], list[tuple[int, ...]]]:
    """Answers to prompts of one step each, nothing cached."""
    made: dict[str, list[tuple[int, ...]]] = {}

    def found(name: str) -> list[tuple[int, ...]]:
        if name not in made:
            with InferenceEngine(folders(name), enable_prefix_caching=False, max_num_batched_tokens=512) as engine:
                made[name] = [answers(engine, [each])[0] for each in several(name)]
        return made[name]

    return found


@combined("name tokens", ROWS, (512, 41, 36), common=[("Mistral 3", 36), ("LightOnOCR", 512), ("Gemma 3", 41)])
def test_answers_are_the_same_in_a_batch_in_chunks_and_cached(
    name: str, tokens: int, folders: Callable[[str], Path], alone: Callable[[str], list[tuple[int, ...]]]
) -> None:
    assert len(set(alone(name))) == len(alone(name))
    tokens += 54 * ("Gemma 4" in name)  # whose images have up to 70 tokens
    with InferenceEngine(folders(name), max_num_batched_tokens=tokens, max_num_seqs=4, block_size=16) as engine:
        assert answers(engine, several(name)) == alone(name)
        again = engine.generate(
            several(name), SamplingParams(max_tokens=8, temperature=0, ignore_eos=True), use_tqdm=False
        )
        assert [tuple(each.outputs[0].token_ids) for each in again] == alone(name)
        windows = name in ("Gemma 4 12B", "Gemma 4 31B")  # the first prompts' blocks behind a window may be evicted
        assert all(each.num_cached_tokens for each in again[2 * windows : 3])


@pytest.mark.parametrize("name", few(ROWS, "Gemma 3"))
def test_answers_survive_preemption(name: str, folders: Callable[[str], Path]) -> None:
    few = several(name)[:3]
    layers = config_of(folders(name))["text_config"]["num_hidden_layers"]
    blocks = 24 if "Gemma 4" in name else 18  # three answers take 24, and not all begin in one step
    memory = blocks * 16 * layers * 2 * 2 * 16 * 2  # tokens, keys and values of two heads in bfloat16
    memory *= 1 + (name == "Llama 4")  # whose heads are larger
    if "Gemma 4" in name:  # whose layers share caches, or have larger heads
        memory = memory * 3 // (4 if "E2B" in name else 2)
    with InferenceEngine(
        folders(name), kv_cache_memory=memory, block_size=16, max_model_len=256, max_num_seqs=4
    ) as engine:
        count = 80 if "Gemma 4" in name else 90  # its images have more tokens
        whole = [answers(engine, [each], max_tokens=count)[0] for each in few]
        assert answers(engine, few, max_tokens=count) == whole
        assert engine.stats().preemptions


@pytest.mark.every_case
def test_conversations_have_pictures_here_and_in_another_process(folders: Callable[[str], Path]) -> None:
    part = {"type": "image", "image": PICTURES[0]}
    ask = {"role": "user", "content": [{"type": "text", "text": "What is "}, part]}
    for name in ROWS:
        found = []
        kinds: tuple[Callable[..., InferenceEngine | RemoteEngine], ...] = (InferenceEngine, RemoteEngine)
        for make in kinds:
            with make(folders(name)) as engine:
                assert engine.model_info.modalities == ("text", "image")
                found.append(engine.chat([ask], SamplingParams(max_tokens=8, temperature=0)))
        assert found[0].prompt_token_ids == found[1].prompt_token_ids
        assert found[0].outputs[0].token_ids == found[1].outputs[0].token_ids


@pytest.mark.parametrize("name", few(list(ROWS), "Gemma 3"))
def test_steps_of_a_gpu_have_the_same_answers(name: str, folders: Callable[[str], Path]) -> None:
    """Where tokens of a picture see each other, too."""
    asks = ROWS[name].asks
    asked = [(f"Compare {asks} with {asks}", PICTURES[:2]), ("Nothing to see.", []), (f"{asks} and?", PICTURES[2:3])]
    require_same_on_a_gpu(folders(name), asked, budget=128)


@pytest.mark.parametrize("names", few([(["Gemma 3"],), (list(ROWS),)], (["Gemma 3"],)))
def test_pictures_need_no_torch(names: Sequence[str], folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Of these families and of SmolVLM."""
    models = [*map(folders, names), write_toy_sight(tmp_path / "toy")]
    asks = [*(ROWS[name].asks for name in names), "<image>"]
    expected = []
    for folder, ask in zip(models, asks):
        prompt = {"prompt": f"See {ask} now", "multi_modal_data": {"image": PICTURES[:1]}}
        with InferenceEngine(folder, device="cpu") as engine:
            expected += answers(engine, [prompt])
    given = [(folder, f"See {ask} now", PICTURES[:1]) for folder, ask in zip(models, asks)]
    assert answers_without_torch(given) == expected


def as_in_mmproj(key: str, data: NDArray[np.float32]) -> NDArray[np.float32]:
    """A tensor of Gemma 4's tower as llama.cpp's converter leaves it."""
    if key.endswith("input_proj.weight"):
        return data.reshape(-1, 4, 4, 3).transpose(0, 3, 1, 2)
    if key.endswith(("patch_dense.weight", "patch_ln1.weight", "patch_ln1.bias")):
        return np.moveaxis(data.reshape(*data.shape[:-1], 8, 8, 3), -1, -3).reshape(data.shape)
    if key.endswith("pos_embedding"):
        return data.swapaxes(0, 1)
    return data.reshape(1) if data.ndim == 0 else data


def write_gguf(name: str, folder: Path, made: Path) -> dict[str, Any]:
    """The checkpoint as llama.cpp's converter leaves it: settings that name its text model's file and its tower's."""
    row, config, text = ROWS[name], config_of(folder), made / "text"
    tensors = {key.removeprefix("model."): each for key, each in load_file(folder / "model.safetensors").items()}
    text.mkdir(parents=True)
    language = {re.sub(r"^language_model\.(model\.)?", "", key): each for key, each in tensors.items()}
    kept = {key: each for key, each in language.items() if not of_tower(key)}
    save_file(
        {key if "lm_head" in key else f"model.{key}": each for key, each in kept.items()}, text / "model.safetensors"
    )
    (text / "config.json").write_text(json.dumps(config["text_config"] | {"tie_word_embeddings": False}))
    architecture, keys = row.gguf
    export_gguf(text, made / "model.gguf", architecture)
    family = tower_family(config)
    assert family is not None
    gemma4 = "Gemma 4" in name
    vision, stored = config["vision_config"], dict[str, NDArray[np.float32]]()
    values = {
        "embedding_length": vision.get("hidden_size", 64), "attention.head_count": vision.get("num_attention_heads", 0),
        "feed_forward_length": vision.get("intermediate_size", 0), "block_count": vision.get("num_hidden_layers", 0),
        "attention.layer_norm_epsilon": 1e-6 if "Gemma" in name else 1e-5,
        "clip.use_gelu" if name in ("Gemma 3", "Llama 4") else "clip.use_silu": True, **keys,
        **({"projector_type": family.gguf[0]} if gemma4 else {}),
    }  # fmt: skip
    table = {(line.hf,) if isinstance(line.hf, str) else line.hf: line.gguf for line in family.weights}
    names = {hf: gguf for several, gguf in table.items() if several for hf in several}
    for key, tensor in tensors.items():
        number = re.search(r"layers\.(\d+)\.", key)
        found = names.get(key if number is None else key.replace(number[0], "layers.{i}."))
        found = found[0] if isinstance(found, tuple) else found
        if not isinstance(found, str):
            continue
        data = tensor.float().numpy()
        if gemma4:
            data = as_in_mmproj(key, data)
        if not row.gguf[0].startswith(("gemma", "llama4")) and key.endswith(("q_proj.weight", "k_proj.weight")):
            heads = data.reshape(vision["num_attention_heads"], 2, -1, data.shape[1])
            data = heads.swapaxes(1, 2).reshape(data.shape)
        if "soft_emb_norm" in key:
            data = data + 1
        stored[found.replace("{i}", "" if number is None else number[1])] = np.ascontiguousarray(data)
    if row.gguf[0] == "llama":
        stored["v.token_embd.img_break"] = np.zeros(64, np.float32)
    write_tower(made / "mmproj.gguf", "" if gemma4 else family.gguf[0], values, stored, {})
    return {"model": str(made / "model.gguf"), "mmproj": made / "mmproj.gguf", "tokenizer": folder}


@pytest.mark.parametrize("name", IN_GGUF)
def test_a_gguf_file_beside_the_model_is_the_same_tower(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What such files do not say is as it is published: the tower's rotation, and the eps of its last norm."""
    row, eps = ROWS[name], 1e-6 if "Gemma" in name else 1e-5
    vision = dict(row.vision)
    vision.pop("rope_parameters", None)
    if "E2B" in name:  # files do not say whether an image's tokens see each other: the width tells
        monkeypatch.setattr(gemma4_tower_config, "_CAUSAL", (64,))
    text = dict(SMALL) | dict(row.text) | {"rms_norm_eps": eps}
    folder = write_sight(tmp_path / "folder", name, text_config=text, vision_config=vision)
    with InferenceEngine(folder) as engine:
        wanted = answers(engine, several(name))
    unsaid = {"Gemma 4": {"max_soft_tokens": 70}, "Llama 4": {"max_patches": 4}}.get(name[:7])  # files do not say it
    with InferenceEngine(**write_gguf(name, folder, tmp_path / "gguf"), mm_processor_kwargs=unsaid) as engine:
        assert answers(engine, several(name)) == wanted


SAID: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "Mistral 3": ({"size": {"longest_edge": 12}}, {"longest": 12}, "size.longest_edge"),
    "Pixtral": ({"size": {"longest_edge": 12}}, {"longest": 12}, "size.longest_edge"),
    "LightOnOCR": ({"size": {"longest_edge": 12}}, {"longest": 12}, "size.longest_edge"),
    **dict.fromkeys(
        ["Gemma 4 E2B", "Gemma 4 12B", "Gemma 4 31B"], ({"max_soft_tokens": 140}, {"most": 140 * 64}, "max_soft_tokens")
    ),
    "Gemma 3": (
        {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8},
        {"most_parts": 4, "least_part": 8, "ratio": 1.2},
        "do_pan_and_scan, pan_and_scan_min_crop_size",
    ),
    "Llama 4": ({"max_patches": 2, "resize_to_max_canvas": True}, {"most": 2, "grows": True}, "max_patches, resize_to"),
}
"""By family: what an operator says of pictures, what comes of it, and the names that there are."""


@pytest.mark.parametrize("name", few(SAID, "Gemma 3"))
def test_an_operator_says_how_pictures_are_prepared(name: str, tmp_path: Path) -> None:
    said, wanted, known = SAID[name]
    folder = write_sight(tmp_path / "folder", name)
    gguf = write_gguf(name, folder, tmp_path / "gguf")
    for made in ({"model": str(folder)}, gguf):
        others = {key: value for key, value in made.items() if key != "model"}
        vision = load(Path(made["model"]), **others, max_images=4, mm_processor_kwargs=said).vision
        assert vision is not None
        rule = vision.parts.rule
        assert {key: getattr(rule, key) for key in wanted} == wanted
        for other, message in (
            ({"max_pixels": 4}, rf"'max_pixels' is not a setting of this model, which has {known}"),
            ({next(iter(said)): "x"}, "mm_processor_kwargs: "),
        ):
            with pytest.raises(ConfigError, match=message) as caught:
                InferenceEngine(**made, mm_processor_kwargs=other)
            assert caught.value.setting == "mm_processor_kwargs"


def refused(
    folder: Path, to: Path, kind: type[Exception], message: str, processor: Mapping[str, Any] = {}, **config: Any
) -> None:
    """A checkpoint whose files say something else is refused by name."""
    to.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    own = config_of(folder)
    for key, value in config.items():
        own[key] = own[key] | value if isinstance(value, dict) else value
    (to / "config.json").write_text(json.dumps(own))
    said = read_json(folder / "preprocessor_config.json") | processor
    (to / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(kind, match=message):
        InferenceEngine(to)


def test_pixtrals_that_do_not_fit_are_named(folders: Callable[[str], Path], tmp_path: Path) -> None:
    def wrong(name: str, kind: type[Exception], message: str, **files: Any) -> None:
        refused(folders(name), tmp_path, kind, message, **files)

    unsupported = UnsupportedModelError
    wrong("Mistral 3", unsupported, "vision_feature_layer is -2", vision_feature_layer=-2)
    wrong("Mistral 3", unsupported, "hidden_act is 'gelu'; implemented: silu", vision_config={"hidden_act": "gelu"})
    wrong("Mistral 3", unsupported, "projector_hidden_act is 'relu'", projector_hidden_act="relu")
    wrong("LightOnOCR", unsupported, "vision_feature_layer is 2; implemented: -1", vision_feature_layer=2)
    wrong("Mistral 3", unsupported, "rope_type is 'yarn'", vision_config={"rope_parameters": {"rope_type": "yarn"}})
    wrong("Mistral 3", InvalidFileError, "patch_size is 5; config.json asks for", processor={"patch_size": 5})
    wrong("Mistral 3", InvalidFileError, "longest_edge is missing", processor={"size": {"height": 40, "width": 40}})
    wrong("Mistral 3", InvalidFileError, "more than 16384", processor={"size": {"longest_edge": 4000}})
    wrong("Mistral 3", InvalidFileError, "head size 2 must be", vision_config={"num_attention_heads": 16})
    wrong("Mistral 3", unsupported, "do_center_crop is true", processor={"do_center_crop": True})
    wrong(
        "Pixtral", unsupported, "vision_feature_select_strategy is 'default'", vision_feature_select_strategy="default"
    )


def test_gemmas_that_do_not_fit_are_named(folders: Callable[[str], Path], tmp_path: Path) -> None:
    def wrong(kind: type[Exception], message: str, **files: Any) -> None:
        refused(folders("Gemma 3"), tmp_path, kind, message, **files)

    wrong(InvalidFileError, "mm_tokens_per_image is 15", mm_tokens_per_image=15)
    wrong(InvalidFileError, "mm_tokens_per_image is 9", mm_tokens_per_image=9)
    wrong(InvalidFileError, "tiles of 64 pixels", processor={"size": {"height": 64, "width": 64}})
    wrong(InvalidFileError, "tiles are squares", processor={"size": {"height": 32, "width": 64}})
    wrong(InvalidFileError, "min_crop_size is 0", processor={"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 0})
    crops = {
        "pan_and_scan_min_crop_size": 3,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    wrong(InvalidFileError, "less than pan_and_scan_max_num_crops, 4", processor={"do_pan_and_scan": True} | crops)
    told = "needs 16 tokens for an image in one step, beside 20 tokens of other .*: set max_num_batched_tokens=36"
    for tokens in (4, 10, 35):
        with pytest.raises(ConfigError, match=told):
            InferenceEngine(folders("Gemma 3"), max_num_batched_tokens=tokens, max_num_seqs=4)
    with InferenceEngine(folders("Gemma 3"), max_num_batched_tokens=35, max_num_seqs=4, max_images=0) as engine:
        assert engine.model_info.modalities == ("text",)


def test_towers_of_llama_4_that_do_not_fit_are_named(folders: Callable[[str], Path], tmp_path: Path) -> None:
    def wrong(message: str, kind: type[Exception] = InvalidFileError, **files: Any) -> None:
        refused(folders("Llama 4"), tmp_path, kind, message, **files)

    wrong("hidden_act is 'silu'", UnsupportedModelError, vision_config={"hidden_act": "silu"})
    wrong("rope_type is 'yarn'", UnsupportedModelError, vision_config={"rope_parameters": {"rope_type": "yarn"}})
    wrong("pixel_shuffle_ratio is 0.4", vision_config={"pixel_shuffle_ratio": 0.4})
    wrong("intermediate_size is 96; cells have 128 elements", vision_config={"intermediate_size": 96})
    wrong("projector_output_dim is 48; projector_input_dim is 40", vision_config={"projector_output_dim": 48})
    wrong("head size 2 must be", vision_config={"num_attention_heads": 16})
    wrong("tiles of 32 pixels; the model has 4 x 4 patches", processor={"size": {"height": 32, "width": 32}})
    wrong("tiles are squares", processor={"size": {"height": 16, "width": 32}})
    wrong("max_patches is 65", processor={"max_patches": 65})


def test_tiles_with_too_many_patches_are_named() -> None:
    with pytest.raises(InvalidFileError, match=r"147 x 147 patches of 14 pixels.* at most 16384 are supported"):
        siglip.check_tiles(Fields({}, Path("config.json")), 147 * 14, 14, 147, 1)


def test_tiles_of_an_image_are_in_the_prompt_as_transformers_writes_them(folders: Callable[[str], Path]) -> None:
    folder = folders("Llama 4")
    vision, tokenizer = load(folder, max_images=4).vision, Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert vision is not None
    for picture in PICTURES:
        cut = vision.parts.rule.cut(*picture.shape[:2])
        grid, unused = (max(cut.rows, 1), max(cut.columns, 1)), Llama4Processor.__new__(Llama4Processor)
        written = unused._prompt_split_image(grid, 4)
        assert vision.look([262], [picture])[0] == tokenizer.encode(written).ids


def test_towers_of_gemma_4_that_do_not_fit_are_named(folders: Callable[[str], Path], tmp_path: Path) -> None:
    def wrong(kind: type[Exception], message: str, name: str = "Gemma 4 E2B", **files: Any) -> None:
        refused(folders(name), tmp_path, kind, message, **files)

    wrong(InvalidFileError, "max_soft_tokens is 71", processor={"max_soft_tokens": 71})
    wrong(InvalidFileError, "pooling_kernel_size is 3; config.json says 2", processor={"pooling_kernel_size": 3})
    wrong(UnsupportedModelError, "vision_config.head_dim other than 16", vision_config={"head_dim": 8})
    wrong(UnsupportedModelError, "rope_type is 'yarn'", vision_config={"rope_parameters": {"rope_type": "yarn"}})
    wrong(InvalidFileError, "64 learned positions", vision_config={"position_embedding_size": 64})
    wrong(InvalidFileError, "64 learned positions", "Gemma 4 12B", vision_config={"mm_posemb_size": 64})
    wrong(
        InvalidFileError,
        "head size 2 must be",
        vision_config={"num_attention_heads": 16, "head_dim": 2, "num_key_value_heads": 16},
    )


def test_tensors_of_sounds_are_left_out(folders: Callable[[str], Path], tmp_path: Path) -> None:
    for file in folders("Gemma 4 E2B").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    sounds = {f"model.{name}.weight": torch.ones(3) for name in ("audio_tower.layers.0.norm", "embed_audio.projection")}
    save_file(tensors | sounds, tmp_path / "model.safetensors")
    loaded = load(tmp_path, op_by_op=True, max_images=4)
    assert loaded.tower is not None


def test_marks_that_nobody_asked_for_are_refused(folders: Callable[[str], Path]) -> None:
    for name, text in {"Gemma 3": "<image_soft_token>", "Mistral 3": "[IMG]"}.items():
        with InferenceEngine(folders(name)) as engine:
            asked = prompt(name, PICTURES[0])
            asked["prompt"] += text
            with pytest.raises(InvalidParameterError, match=r"and \d+ placeholders"):
                engine.generate(asked, SamplingParams(max_tokens=1), use_tqdm=False)


def test_a_tower_of_another_kind_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """LLaVA's with SigLIP: texts alone are read."""
    vision = VISION | {"model_type": "siglip_vision_model", "image_size": 8, "vision_use_head": False}
    folder = write_sight(tmp_path, "Pixtral", vision_config=vision)
    with caplog.at_level("INFO"), InferenceEngine(folder) as engine:
        assert engine.model_info.modalities == ("text",)
    assert "tensors) is not supported and not loaded" in caplog.text


def test_what_llava_says_of_its_tower(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """CLIP's blocks up to one, and the middle of an image."""
    folder, name = folders("LLaVA 1.5"), "LlavaForConditionalGeneration"
    config = read_json(folder / "config.json")
    processor = Fields(read_json(folder / "preprocessor_config.json"), tmp_path)
    for last, layers in ((-2, 2), ([-2], 2), (-1, 3), (1, 1), (3, 3)):
        fields = Fields(config | {"vision_feature_layer": last}, tmp_path)
        assert clip_tower.FAMILY.config_from_hf(fields, processor, 64, {}).num_layers == layers
    for key, value in (
        ("vision_feature_layer", [-2, -3]), ("vision_feature_layer", 0), ("vision_feature_layer", 4),
        ("vision_feature_select_strategy", "full"), ("projector_hidden_act", "relu"),
    ):  # fmt: skip
        with pytest.raises((UnsupportedModelError, InvalidFileError), match=key):
            clip_tower.FAMILY.config_from_hf(Fields(config | {key: value}, tmp_path), processor, 64, {})
    for changed, message in (
        ({"crop_size": 32}, "crop_size is 32, more than size, 24"),
        ({"size": {"height": 24, "width": 20}, "do_center_crop": False}, "size is .*; tiles are squares"),
        ({"crop_size": 16}, "tiles of 16 pixels"),
    ):
        given = Fields(dict(processor.values) | changed, tmp_path)
        with pytest.raises(InvalidFileError, match=message):
            clip_tower.FAMILY.config_from_hf(Fields(config, tmp_path), given, 64, {})
    padded = Fields(dict(processor.values) | {"do_pad": True}, tmp_path)  # to a square, as LlavaImageProcessor can
    with pytest.raises(UnsupportedModelError, match="do_pad is true, which is not implemented"):
        clip_tower.FAMILY.config_from_hf(Fields(config, tmp_path), padded, 64, {})
    usual = Fields(config | {"vision_config": {"model_type": "clip_vision_model"}}, tmp_path)
    made, known = clip_tower.FAMILY.config_from_hf(usual, Fields({}, tmp_path), 64, {}), CLIPVisionConfig()
    assert (made.hidden_size, made.num_heads, made.patch) == (768, known.num_attention_heads, known.patch_size)
    absent, large = Fields(config | {"vision_config": None}, tmp_path), LlavaConfig().vision_config
    sizes = {"size": {"shortest_edge": large.image_size}, "crop_size": large.image_size}
    made = clip_tower.FAMILY.config_from_hf(absent, Fields(sizes, tmp_path), 64, {})
    assert (made.hidden_size, made.num_heads, made.patch) == (1024, large.num_attention_heads, large.patch_size)
    for vision in (None, {}, {"hidden_size": 64}):
        told = {"architectures": ["LlavaForConditionalGeneration"], "vision_config": vision}
        assert tower_family(told) is clip_tower.FAMILY
    whole = Fields(dict(processor.values) | {"size": 24, "do_center_crop": False}, tmp_path)
    rule = clip_tower.FAMILY.config_from_hf(Fields(config, tmp_path), whole, 64, {}).rule
    assert rule.tiles(picture_of(PICTURES[0])).shape == (1, 24, 24, 3)
    with InferenceEngine(folder) as engine, pytest.raises(InvalidParameterError, match="200 times the other"):
        engine.generate(prompt("LLaVA 1.5", np.zeros((1, 300, 3), np.uint8)), SamplingParams(max_tokens=1))
    assert tower_family({"architectures": [name], "vision_config": {"model_type": "clip_vision_model"}})
    tensors = load_file(folder / "model.safetensors")
    absent = next(key for key in tensors if key.endswith("class_embedding"))
    shutil.copytree(folder, tmp_path / "broken")
    save_file({key: each for key, each in tensors.items() if key != absent}, tmp_path / "broken" / "model.safetensors")
    with pytest.raises(WeightsError, match="class_embedding is missing"):
        load(tmp_path / "broken", max_images=4)


PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any], int, int, list[int]]] = {
    "Mistral Small 3.1": (
        {
            "architectures": ["Mistral3ForConditionalGeneration"],
            "model_type": "mistral3",
            "image_token_index": 10,
            "multimodal_projector_bias": False,
            "projector_hidden_act": "gelu",
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
            "text_config": {"model_type": "mistral", "hidden_size": 5120, "rms_norm_eps": 1e-05},
            "vision_config": {
                "attention_dropout": 0.0, "head_dim": 64, "hidden_act": "silu", "hidden_size": 1024, "image_size": 1540,
                "intermediate_size": 4096, "model_type": "pixtral", "num_attention_heads": 16, "num_channels": 3,
                "num_hidden_layers": 24, "patch_size": 14, "rope_theta": 10000.0,
            },
        },
        {
            "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, **CLIP, "resample": 3,
            "patch_size": {"height": 14, "width": 14}, "rescale_factor": 1 / 255, "size": {"longest_edge": 1540},
        },
        110, 28, [414, 1705],
    ),
    "Pixtral 12B": (
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_seq_length": 1,
            "image_token_index": 10,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "text_config": {"model_type": "mistral", "hidden_size": 5120},
            "vision_config": {
                "head_dim": 64, "hidden_act": "silu", "image_size": 1024, "is_composition": True, "patch_size": 16,
                "model_type": "pixtral", "rope_theta": 10000.0,
            },
        },
        {"do_resize": True, **CLIP, "patch_size": {"height": 16, "width": 16}, "size": {"longest_edge": 1024}},
        64, 16, [1200, 2304],
    ),
    "Gemma 3 4B": (
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "boi_token_index": 255999,
            "eoi_token_index": 256000,
            "image_token_index": 262144,
            "mm_tokens_per_image": 256,
            "text_config": {"model_type": "gemma3_text", "hidden_size": 2560},
            "vision_config": {
                "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
                "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
            },
        },
        {
            "do_convert_rgb": None, "do_normalize": True, "do_pan_and_scan": None, "do_rescale": True,
            "do_resize": True, **HALF, "image_seq_length": 256, "pan_and_scan_max_num_crops": None,
            "pan_and_scan_min_crop_size": None, "pan_and_scan_min_ratio_to_activate": None, "resample": 2,
            "size": {"height": 896, "width": 896},
        },
        64, 56, [256, 256],
    ),
    "Gemma 4 E2B": (
        {
            "architectures": ["Gemma4ForConditionalGeneration"],
            "model_type": "gemma4",
            "image_token_id": 258880,
            "text_config": {"model_type": "gemma4_text", "hidden_size": 1536},
            "vision_config": {
                "head_dim": 64, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 768,
                "model_type": "gemma4_vision", "intermediate_size": 3072, "num_attention_heads": 12,
                "num_hidden_layers": 16,
                "patch_size": 16, "num_key_value_heads": 12, "pooling_kernel_size": 3,
                "position_embedding_size": 10240,
                "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}, "use_clipped_linears": True,
            },
        },
        {
            "do_convert_rgb": True, "do_normalize": False, "do_rescale": True, "do_resize": True, "patch_size": 16,
            "image_mean": [0.0] * 3, "image_std": [1.0] * 3, "image_seq_length": 280, "max_soft_tokens": 280,
            "pooling_kernel_size": 3, "resample": 3, "rescale_factor": 1 / 255,
        },
        840, 48, [266, 264],
    ),
    "Llama 4 Scout": (
        {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "boi_token_index": 200080,
            "eoi_token_index": 200081,
            "image_token_index": 200092,
            "text_config": {"model_type": "llama4_text", "hidden_size": 5120},
            "vision_config": {
                "attention_dropout": 0.0, "hidden_act": "gelu", "hidden_size": 1408, "image_size": 336,
                "intermediate_size": 5632, "model_type": "llama4_vision_model", "multi_modal_projector_bias": False,
                "norm_eps": 1e-05, "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 34,
                "patch_size": 14, "pixel_shuffle_ratio": 0.5, "projector_dropout": 0.0, "projector_input_dim": 4096,
                "projector_output_dim": 4096, "rope_theta": 10000, "vision_feature_layer": -1,
                "vision_feature_select_strategy": "default", "vision_output_dim": 4096,
            },
        },
        {
            "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, **HALF,
            "max_patches": 16, "resample": 2, "rescale_factor": 1 / 255, "resize_to_max_canvas": False,
            "size": {"height": 336, "width": 336},
        },
        24, 28, [144, 144],
    ),
}  # fmt: skip
"""What published files say of towers and pictures: patches of the longest side, pixels of an embedding's side, and
embeddings of a tile of 640 x 480 and 1920 x 1080."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str) -> None:
    config, processor, side, cell, counts = PUBLISHED[name]
    family, path = tower_family(config), Path("config.json")
    assert family is not None
    found = family.config_from_hf(Fields(config, path), Fields(processor, path), config["text_config"]["hidden_size"])
    assert (found.side, found.cell_pixels) == (side, cell)
    cuts = [found.rule.cut(height, width).cells(cell) for width, height in ((640, 480), (1920, 1080))]
    assert [rows * columns for rows, columns in cuts] == counts
    assert found.num_layers in (16, 24, 27, 34)


def test_a_model_that_drafts_reads_marks_alone(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees no pictures, and its guesses, which seem to cost nothing here, change no answer."""
    monkeypatch.setattr(DraftModel, "_prices", lambda *_: [0.0] * 16)
    monkeypatch.setattr(DraftModel, "_behind", lambda *_: 0)
    folder = folders("Gemma 3")
    draft = write_toy_model(tmp_path, toy_config("llama"))
    (draft / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    drafts = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3}
    with InferenceEngine(folder, max_num_seqs=4) as engine:
        wanted = answers(engine, several("Gemma 3")[:3], max_tokens=24)
    with InferenceEngine(folder, max_num_seqs=4, speculative_config=drafts) as engine:
        inner: Any = engine._engine
        inner._drafter.times = same_times
        assert answers(engine, several("Gemma 3")[:3], max_tokens=24) == wanted
        assert engine.stats().drafts > 3
