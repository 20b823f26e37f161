# SPDX-License-Identifier: MIT
"""DeepSeek-OCR 2 of random weights: tiles, embeddings and logits against transformers, files, and answers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.models.deepseek_ocr2.image_processing_pil_deepseek_ocr2 import DeepseekOcr2ImageProcessorPil

from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.errors import CandleVllmError, ConfigError
from candle_vllm.core.fields import Fields
from candle_vllm.core.models.deepseek_ocr2_tower import FAMILY
from candle_vllm.core.models.registry import family_from_hf
from candle_vllm.core.vision.pictures import picture_of
from packages.core.tests.exact_sums import exact_sums
from packages.core.tests.models.families import DEEPSEEK_OCR
from packages.core.tests.models.sight import (
    RANDOM,
    answers,
    answers_of,
    answers_of_a_gpu,
    answers_op_by_op,
    loaded_from,
    model_of,
    random_model,
    require_logits,
    require_same,
    require_same_embeddings,
    require_same_from_gguf,
    require_same_in_steps,
    without_template,
    write_tokenizer,
    write_tower,
)
from packages.core.tests.models.tiny import SMALL
from tests.common_run import combined, few

IMAGE = 262
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)
PICTURES = [RANDOM.integers(0, 256, size, dtype=np.uint8) for size in ((120, 70, 3), (40, 90, 3), (96, 97, 3))]
"""A grid of 2 x 1 tiles, an image of one tile, and a square grid."""
PROMPTS: list[Any] = [
    {"prompt": "<image>\nFree OCR of this.", "multi_modal_data": {"image": PICTURES[:1]}},
    {"prompt": "<image>\nFree OCR.", "multi_modal_data": {"image": PICTURES[1:2]}},
    "Nothing to read.",
]
TEXT = {**SMALL, **DEEPSEEK_OCR, "vocab_size": 272, "max_position_embeddings": 4096}
SAM: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 2, "image_size": 128,
    "window_size": 14, "global_attn_indexes": [2], "output_channels": 16, "downsample_channels": [24, 32],
    "mlp_dim": 48,
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
IMAGES: dict[str, Any] = {
    "size": {"height": 128, "width": 128}, "tile_size": 96, "min_patches": 2, "max_patches": 4, "resample": 3,
    "image_mean": [0.5, 0.4, 0.6], "image_std": [0.5, 0.6, 0.4],
}  # fmt: skip
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "usual": ({}, {}),
    "small": (
        {"window_size": 5, "global_attn_indexes": [0], "num_hidden_layers": 2, "qkv_bias": False},
        {"num_key_value_heads": 2, "num_hidden_layers": 3},
    ),
}


def write(folder: Path, kind: str = "usual") -> Path:
    sam, encoder = KINDS[kind]
    vision = {"sam_config": SAM | sam, "encoder_config": ENCODER | encoder}
    config = AutoConfig.for_model("deepseek_ocr2", text_config=TEXT, vision_config=vision, image_token_id=IMAGE)
    model = random_model(config)
    with torch.no_grad():  # embeddings of pictures as long as those of words
        model.model.multi_modal_projector.weight.mul_(3)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    write_tokenizer(folder, ("<a>", "<b>", "<image>", "<c>"), TEMPLATE)
    return folder


@pytest.fixture(scope="module", params=few(KINDS, "usual"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("deepseek_ocr2"), request.param)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return model_of(folder)


def their_pixels(*pictures: NDArray[np.uint8], **said: Any) -> dict[str, Any]:
    processor: Any = DeepseekOcr2ImageProcessorPil(**IMAGES | said)
    found = processor(images=list(pictures), return_tensors="pt")
    return {key: found[key] for key in ("pixel_values", "pixel_values_local", "num_local_patches") if key in found}


# ---- tiles and placeholders ------------------------------------------------------------------------------------------

EDGES = (
    (640, 480), (1920, 1080), (768, 768), (769, 10), (767, 300), (1000, 1000), (1024, 1024), (1700, 2200), (200, 3000),
    (3000, 400), (1, 1), (5, 900), (1600, 1200), (2000, 667), (1537, 1025),
)  # fmt: skip
"""Widths and heights."""


def rule_of(said: dict[str, Any], scale: int) -> Any:
    """Of the published sizes, or of those divided by `scale`."""
    vision = PUBLISHED["vision_config"]
    config = PUBLISHED | {"vision_config": vision | {"sam_config": vision["sam_config"] | {"patch_size": 16 // scale}}}
    path = Path("config.json")
    return FAMILY.config_from_hf(Fields(config, path), Fields({}, path), 1280, said).rule


@combined(
    "said scale", ({}, {"max_patches": 9}, {"min_patches": 3}, {"crop_to_patches": False}), (1, 8),
    common=[({}, 8), ({"max_patches": 9}, 8), ({"crop_to_patches": False}, 8)],
)  # fmt: skip
def test_images_have_the_tiles_and_placeholders_of_transformers(said: dict[str, Any], scale: int) -> None:
    said = said | {"tile_size": 768 // scale, "size": {"height": 1024 // scale, "width": 1024 // scale}}
    rule = rule_of(said, scale)
    theirs: Any = DeepseekOcr2ImageProcessorPil(**said)
    for width, height in [tuple(max(side // scale, 1) for side in edges) for edges in EDGES]:
        cut = rule.cut(height, width)
        found = theirs(images=[RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)], return_tensors="pt")
        pixels = [*found.get("pixel_values_local", ()), *found["pixel_values"]]
        assert cut.tiles == len(pixels), (width, height)
        whole = (found["pixel_values"].shape[-1] // (64 // scale)) ** 2
        count = found["num_local_patches"][0] * 144 + whole + 1
        assert FAMILY.words_around(cut, cut.cells(64 // scale)).count("<image>") == count, (width, height)


@pytest.mark.parametrize("said", [{}, {"crop_to_patches": False}, {"background_color": [9, 9, 9], "resample": 2}])
def test_pixels_are_those_of_transformers(said: dict[str, Any], folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    rule = FAMILY.config_from_hf(Fields(config, folder), Fields(IMAGES | said, folder), 64, {}).rule
    for picture in PICTURES:
        found = their_pixels(picture, **said)
        wanted = [*found.get("pixel_values_local", ()), *found["pixel_values"]]
        tiles = rule.tiles(picture_of(picture))
        assert len(tiles) == len(wanted)
        for tile, pixels in zip(tiles, wanted):
            assert np.array_equal(rule.normalisation.table[tile, np.arange(3)].transpose(2, 0, 1), pixels.numpy())


# ---- embeddings, logits, answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("eager", few([True, False], False))
def test_embeddings_are_those_of_transformers(eager: bool, folder: Path, theirs: Any) -> None:
    shown = slice(None) if eager else slice(1, 2)
    pictures, wanted = PICTURES[shown], list[NDArray[np.float32]]()
    for picture in pictures:
        with torch.inference_mode():
            wanted.append(theirs.model.get_image_features(**their_pixels(picture)).pooler_output[0].numpy())
    _, given = require_same_embeddings(folder, IMAGE, pictures, wanted, eager=eager, most=8)
    assert [each.sizes for each in given] == [
        ((96, 96),) * 2 + ((128, 128),),
        ((128, 128),),
        ((96, 96),) * 4 + ((128, 128),),
    ][shown]


@pytest.mark.parametrize("eager", few([True, False], False))
def test_logits_are_those_of_transformers(eager: bool, folder: Path, theirs: Any) -> None:
    def wanted(ids: torch.Tensor) -> torch.Tensor:
        return theirs(input_ids=ids, **their_pixels(PICTURES[0])).logits[0].log_softmax(-1)

    require_logits(folder, PROMPTS[0], wanted, eager=eager, tokens=128)


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[tuple[int, ...]]:
    with InferenceEngine(folder, enable_prefix_caching=False, max_num_batched_tokens=1024) as engine:
        found = [answers(engine, [prompt])[0] for prompt in PROMPTS]
    assert len(set(found)) == len(found)
    return found


@pytest.mark.parametrize("tokens", few([1024, 77], 77))
def test_answers_are_the_same_in_a_batch_in_chunks_and_cached(
    tokens: int, folder: Path, alone: list[tuple[int, ...]]
) -> None:
    require_same_in_steps(folder, PROMPTS, alone, tokens)


def test_a_template_writes_the_mark_of_an_image(folder: Path) -> None:
    content: Any = [{"type": "image", "image": PICTURES[1]}, {"type": "text", "text": "\nFree OCR."}]
    with InferenceEngine(folder) as engine:
        output = engine.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=1), use_tqdm=False)
    ids = list(output.prompt_token_ids)
    assert ids[:257] == [IMAGE] * 257
    assert ids.count(IMAGE) == 257


def test_published_files_have_no_template(folder: Path, tmp_path: Path) -> None:
    content: Any = [{"type": "image", "image": PICTURES[1]}, {"type": "text", "text": "Free OCR."}]
    with InferenceEngine(without_template(folder, tmp_path / "bare")) as engine:
        params = SamplingParams(max_tokens=1)
        plain = [each.prompt_token_ids for each in engine.generate(["Hi", "\nFree OCR."], params, use_tqdm=False)]
        said: Any = [{"role": "user", "content": content}]
        ids = engine.chat(said, params, use_tqdm=False).prompt_token_ids
        assert engine.chat([{"role": "user", "content": "Hi"}], params, use_tqdm=False).prompt_token_ids == plain[0]
    assert list(ids) == [IMAGE] * 257 + list(plain[1])


def test_an_operator_sets_tiles(folder: Path) -> None:
    for said, tiles in (({}, 5), ({"max_patches": 2}, 3), ({"crop_to_patches": False}, 1)):
        loaded = loaded_from(folder, mm_processor_kwargs=said)
        assert loaded.tower is not None
        _, images = loaded.tower.vision.look([IMAGE], PICTURES[2:])
        assert len(images[0].sizes) == tiles
    with pytest.raises(ConfigError, match="min_patches is 1; it must be 2 to max_patches, 4"):
        loaded_from(folder, mm_processor_kwargs={"min_patches": 1})


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", few(KINDS, "usual"), indirect=True)
def test_names_of_transformers_are_read(folder: Path, tmp_path: Path, alone: list[tuple[int, ...]]) -> None:
    """Which saves the names of the original files."""
    made = shutil.copytree(folder, tmp_path / "made")
    stored = load_file(folder / "model.safetensors")
    assert "model.sam_model.net_2.weight" in stored
    names = {
        "sam_model.": "vision_tower.sam_encoder.", "blocks.": "layers.", "norm1.": "layer_norm1.",
        "norm2.": "layer_norm2.", "patch_embed.proj.": "patch_embed.projection.", "neck.0.": "neck.conv1.",
        "neck.1.": "neck.layer_norm1.", "neck.2.": "neck.conv2.", "neck.3.": "neck.layer_norm2.",
        "net_2.": "proj.conv1.", "net_3.": "proj.conv2.", "view_seperator": "view_separator",
        "qwen2_model.model.model.": "vision_tower.vision_encoder.", "projector.layers.": "multi_modal_projector.",
        "qwen2_model.query_768.": "vision_tower.query_768_resolution.",
        "qwen2_model.query_1024.": "vision_tower.query_1024_resolution.",
    }  # fmt: skip
    renamed = {}
    for name, tensor in stored.items():
        if re.match(r"model\.(sam_model|qwen2_model|projector|view)", name):
            for old, new in names.items():
                name = name.replace(old, new) if "sam_model" not in old or "model.sam" in name else name
        else:
            name = re.sub(r"^model\.", "model.language_model.", name)
        renamed[name] = tensor
    save_file(renamed, made / "model.safetensors", {"format": "pt"})
    assert answers_of(made, PROMPTS[1:2]) == alone[1:2]


GGUF_NAMES = {
    "sam_model.patch_embed.proj": "v.sam.patch_embd", "sam_model.pos_embed": "v.sam.pos_embd.weight",
    "norm1": "pre_ln", "norm2": "post_ln", "attn.qkv": "attn.qkv", "attn.proj": "attn.out", "mlp.lin1": "mlp.lin1",
    "mlp.lin2": "mlp.lin2", "attn.rel_pos_h": "attn.pos_h.weight", "attn.rel_pos_w": "attn.pos_w.weight",
    "sam_model.neck.0": "v.sam.neck.0", "sam_model.neck.1": "v.sam.neck.1", "sam_model.neck.2": "v.sam.neck.2",
    "sam_model.neck.3": "v.sam.neck.3", "sam_model.net_2": "v.sam.net_2", "sam_model.net_3": "v.sam.net_3",
    "input_layernorm": "ln1", "post_attention_layernorm": "ln2", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "qwen2_model.model.model.norm": "v.post_ln", "qwen2_model.query_768": "v.resample_query_768",
    "qwen2_model.query_1024": "v.resample_query_1024", "projector.layers": "mm.model.fc",
    "view_seperator": "v.view_seperator",
}  # fmt: skip


def write_mmproj(folder: Path, made: Path) -> Path:
    """The checkpoint's vision encoders as llama.cpp's converter writes them."""
    values: dict[str, Any] = {
        "image_size": 128, "patch_size": 2, "block_count": 2, "attention.head_count_kv": 1, "window_size": 14,
        "sam.block_count": 3, "sam.embedding_length": 32, "sam.head_count": 2, "preproc_min_tiles": 2,
        "preproc_max_tiles": 4, "clip.use_gelu": True,
    }  # fmt: skip
    tensors = dict[str, NDArray[np.float32]]()
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not re.match(r"model\.(sam_model|qwen2_model|projector|view)", name):
            continue
        name = name.removeprefix("model.")
        if name == "view_seperator":
            tensor = tensor[None]
        found = re.match(r"(sam_model\.blocks|qwen2_model\.model\.model\.layers)\.(\d+)\.", name)
        at = "" if found is None else f"v.{'sam.' if name.startswith('sam') else ''}blk.{found[2]}."
        part = name if found is None else name[found.end() :]
        stem, _, kind = part.rpartition(".")
        tensors[at + (GGUF_NAMES[part] if part in GGUF_NAMES else f"{GGUF_NAMES[stem]}.{kind}")] = tensor.numpy()
    return write_tower(made, "deepseekocr2", values, tensors, IMAGES)


@pytest.mark.parametrize("folder", ["usual"], indirect=True)
def test_a_gguf_file_and_that_of_its_tower_are_the_same_model(
    folder: Path, tmp_path: Path, alone: list[tuple[int, ...]]
) -> None:
    tower = write_mmproj(folder, tmp_path / "mmproj.gguf")
    require_same_from_gguf(folder, tower, PROMPTS[1:], alone[1:], "deepseek2-ocr")


@pytest.mark.every_case
def test_steps_of_a_gpu_have_the_same_answers(tmp_path: Path) -> None:
    """By the references of its kernels."""
    loaded = loaded_from(write(tmp_path, "small"), op_by_op=True, mm_processor_kwargs={"crop_to_patches": False})
    asked = [("<image>\nFree OCR.", PICTURES[1:2]), ("Nothing to see.", [])]
    with exact_sums():
        found, _ = answers_of_a_gpu(loaded, asked, captured=64, budget=64)
        require_same(found, answers_op_by_op(loaded, asked))


PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekOcr2ForConditionalGeneration"], "model_type": "deepseek_ocr2", "image_token_id": 128815,
    "text_config": {
        "model_type": "deepseek_ocr2_text", "hidden_size": 1280, "intermediate_size": 6848, "num_hidden_layers": 12,
        "num_attention_heads": 10, "num_key_value_heads": 10, "vocab_size": 129280, "max_position_embeddings": 8192,
        "n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 896, "n_shared_experts": 2,
        "mlp_layer_types": ["dense"] + ["sparse"] * 11, "topk_method": "greedy", "eos_token_id": 1,
        "rms_norm_eps": 1e-6,
    },
    "vision_config": {
        "sam_config": {"model_type": "deepseek_ocr2_sam_vision_model"},
        "encoder_config": {
            "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
            "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    },
}  # fmt: skip
"""Sizes of DeepSeek-OCR 2; those of SAM's encoder are transformers' defaults."""


def test_the_published_sizes_are_read() -> None:
    path = Path("config.json")
    tower: Any = FAMILY.config_from_hf(Fields(PUBLISHED, path), Fields({}, path), 1280, {})
    assert (tower.hidden_size, tower.blocks, tower.size, tower.depth, tower.theta) == (768, 12, 896, 24, 1e6)
    assert (tower.tiles, tower.windows, tower.patches, tower.cell_pixels) == ((48, 64), 25, 4900, 64)
    assert 1e9 < tower.step_bytes(8) < 4e9
    family, text = family_from_hf(PUBLISHED, path)
    assert (family.hf.get("DeepseekOcr2ForCausalLM"), text.hidden_size, text.num_experts) == (
        "deepseek_ocr2_text",
        1280,
        64,
    )


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("sam_config", "use_rel_pos", False, "use_rel_pos"),
        ("sam_config", "use_abs_pos", False, "use_abs_pos"),
        ("sam_config", "hidden_act", "relu", "hidden_act is 'relu'"),
        ("sam_config", "hidden_size", 36, "implemented: multiples of 16"),
        ("sam_config", "global_attn_indexes", [12], "not numbers of the 12 layers"),
        ("sam_config", "downsample_channels", [512], "two numbers"),
        ("sam_config", "downsample_channels", [512, 1024], "ends with 1024; hidden_size is 896"),
        ("sam_config", "mlp_ratio", 0.0, "mlp_ratio is 0.0"),
        ("sam_config", "window_size", 200, "at most 16384 are supported"),
        ("sam_config", "window_size", 0, "window_size is 0"),
        ("sam_config", "patch_size", 32, "queries for tiles"),
        ("encoder_config", "use_sliding_window", True, "use_sliding_window"),
        ("encoder_config", "num_attention_heads", 13, "896 elements, 13 and 2 heads"),
        ("encoder_config", "rope_parameters", {"rope_type": "yarn"}, "yarn"),
        ("encoder_config", "rms_norm_eps", 2.0, "rms_norm_eps is 2.0"),
    ],
)
def test_other_encoders_are_refused(section: str, key: str, value: Any, said: str) -> None:
    vision, path = PUBLISHED["vision_config"], Path("config.json")
    config = PUBLISHED | {"vision_config": vision | {section: vision[section] | {key: value}}}
    with pytest.raises(CandleVllmError, match=said):
        FAMILY.config_from_hf(Fields(config, path), Fields({}, path), 1280, {})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tile_size": 640}, "queries for tiles of 48 and 64 patches"),
        ({"tile_size": 700}, "whole cells of 64 pixels"),
        ({"background_color": [1, 2, 3]}, "implemented: one grey"),
        ({"min_patches": 7}, "min_patches is 7"),
        ({"do_resize": False}, "do_resize"),
        ({"size": {"height": 1024, "width": 768}}, "tiles are squares"),
    ],
)
def test_other_settings_of_images_are_refused(given: dict[str, Any], said: str) -> None:
    path = Path("config.json")
    with pytest.raises(CandleVllmError, match=said):
        FAMILY.config_from_hf(Fields(PUBLISHED, path), Fields(given, path), 1280, {})


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("mlp_bias", True, "mlp_bias"), ("norm_topk_prob", True, "norm_topk_prob"), ("topk_method", "no", "topk_method"),
     ("mlp_layer_types", ["sparse", "dense"] * 6, "mlp_layer_types"), ("hidden_act", "gelu", "hidden_act")],
)  # fmt: skip
def test_other_text_models_are_refused(key: str, value: Any, said: str) -> None:
    config = PUBLISHED | {"text_config": PUBLISHED["text_config"] | {key: value}}
    with pytest.raises(CandleVllmError, match=said):
        family_from_hf(config, Path("config.json"))
