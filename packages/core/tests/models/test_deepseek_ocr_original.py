# SPDX-License-Identifier: MIT
"""DeepSeek-OCR 1 of random weights in its original format: embeddings and logits against the same encoders and text
model of Unlimited-OCR in transformers, files, and answers; and the original format of DeepSeek-OCR 2."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from candle_vllm.core import EngineConfig, InferenceEngine
from candle_vllm.core.conversion import write_gguf
from candle_vllm.core.errors import CandleVllmError
from candle_vllm.core.fields import Fields
from candle_vllm.core.models import deepseek_ocr2_tower
from candle_vllm.core.models.deepseek_ocr_tower import FAMILY
from candle_vllm.core.models.registry import family_from_hf
from candle_vllm.core.vision.pictures import picture_of
from packages.core.tests.models.sight import (
    answers,
    random_model,
    random_pictures,
    require_logits,
    require_same_embeddings,
    require_same_when_cached,
    write_tokenizer,
    write_tower,
)
from packages.core.tests.models.test_deepseek_ocr import EDGES, PUBLISHED, TEXT
from tests.common_run import few

IMAGE = 262
PICTURES = random_pictures((900, 600), (400, 600), (300, 1300))
"""A grid of 3 x 2 tiles, an image of one tile, and a row of tiles."""
PROMPTS: list[Any] = [
    {"prompt": "<image>\nFree OCR of this.", "multi_modal_data": {"image": PICTURES[2:]}},
    {"prompt": "<image>\nFree OCR.", "multi_modal_data": {"image": PICTURES[1:2]}},
    "Nothing to read.",
]
SAM = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "global_attn_indexes": [2], "mlp_dim": 128}
CLIP = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {
    "image_size": 1024, "mlp_ratio": 3.7362, "model_name": "deeplip_b_l", "model_type": "vision",
    "width": {
        "clip-l-14-224": {"heads": 2, "image_size": 224, "layers": 2, "patch_size": 14, "width": 48},
        "sam_vit_b": {
            "downsample_channels": [512, 1024], "global_attn_indexes": [2], "heads": 2, "layers": 3, "width": 32
        },
    },
}  # fmt: skip
"""Without the sizes that the original code has: 256 elements between the convolutions, windows of 14 patches."""
NEWER = ("model_type", "mlp_layer_types", "layer_types", "sliding_window", "rope_parameters", "head_dim")


def write(folder: Path) -> Path:
    """The original format, and beside it the folder `theirs`, in which no text is longer than the window."""
    vision = {"sam_config": SAM | {"downsample_channels": [512, 48]}, "encoder_config": CLIP}
    text = TEXT | {"sliding_window": 4000}
    config = AutoConfig.for_model("unlimited_ocr", text_config=text, vision_config=vision, image_token_id=IMAGE)
    model = random_model(config)
    with torch.no_grad():  # embeddings of pictures as long as those of words
        model.model.multi_modal_projector.weight.mul_(3)
    model.save_pretrained(folder)
    (folder / "theirs").mkdir()
    shutil.copy(folder / "config.json", folder / "theirs" / "config.json")
    os.link(folder / "model.safetensors", folder / "theirs" / "model.safetensors")
    said = json.loads((folder / "config.json").read_text())["text_config"]
    told = {key: value for key, value in said.items() if key not in NEWER}
    told |= {"first_k_dense_replace": 1, "use_mla": False, "kv_lora_rank": None, "qk_rope_head_dim": 0}
    original = {
        "architectures": ["DeepseekOCRForCausalLM"], "model_type": "deepseek_vl_v2", "language_config": told,
        "vision_config": VISION, **{key: told[key] for key in list(told)[::2]}, "eos_token_id": 258,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(original))
    images = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "processor_class": "DeepseekVLV2Processor"}
    (folder / "processor_config.json").write_text(json.dumps(images))
    write_tokenizer(folder, ("<a>", "<b>", "<image>", "<c>"), "{{ messages[0].content }}")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("deepseek_ocr"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(
        folder / "theirs", dtype=torch.float32, attn_implementation="eager"
    ).eval()


def rule_of(said: dict[str, Any]) -> Any:
    path = Path("config.json")
    return FAMILY.config_from_hf(Fields({"vision_config": VISION}, path), Fields({}, path), 64, said).rule


def their_pixels(picture: NDArray[np.uint8]) -> dict[str, Any]:
    """Of the tiles of this package: those of DeepSeek-OCR 2 are compared, and Unlimited-OCR's need torchvision."""
    rule, (height, width) = rule_of({}), picture.shape[:2]
    table, cut = rule.normalisation.table, rule.cut(height, width)
    tiles = [torch.from_numpy(table[tile, np.arange(3)]).permute(2, 0, 1) for tile in rule.tiles(picture_of(picture))]
    return {
        "pixel_values": tiles[-1][None],
        "pixel_values_local": torch.stack(tiles[:-1]) if tiles[1:] else None,
        "num_local_patches": [len(tiles) - 1],
        "patches_grid": [[cut.columns, cut.rows]],
    }


def test_images_have_as_many_placeholders_as_embeddings() -> None:
    """As `UnlimitedOcrProcessor` counts them, which needs torchvision."""
    rule = rule_of({})
    for width, height in EDGES:
        cut = rule.cut(height, width)
        count = 16 * 17 + 1 + (cut.rows * 10) * (cut.columns * 10 + 1)
        assert (max(width, height) > 640) == (cut.rows > 0)
        assert 2 <= cut.rows * cut.columns <= 9 or not cut.rows
        assert FAMILY.words_around(cut, cut.cells(64)).count("<image>") == count, (width, height)


@pytest.mark.parametrize("eager", few([True, False], False))
def test_embeddings_are_those_of_transformers(eager: bool, folder: Path, theirs: Any) -> None:
    pictures, wanted = PICTURES if eager else PICTURES[1:2], list[NDArray[np.float32]]()
    for picture in pictures:
        with torch.inference_mode():
            wanted.append(theirs.model.get_image_features(**their_pixels(picture)).pooler_output[0].numpy())
    require_same_embeddings(folder, IMAGE, pictures, wanted, eager=eager, most=8)


@pytest.mark.parametrize("eager", few([True, False], False))
def test_logits_are_those_of_transformers(eager: bool, folder: Path, theirs: Any) -> None:
    def wanted(ids: torch.Tensor) -> torch.Tensor:
        return theirs(input_ids=ids, **their_pixels(PICTURES[2])).logits[0].log_softmax(-1)

    require_logits(folder, PROMPTS[0], wanted, eager=eager, tokens=128)


@pytest.mark.every_case
def test_answers_are_the_same_in_chunks_cached_and_from_gguf(folder: Path, tmp_path: Path) -> None:
    with InferenceEngine(folder, enable_prefix_caching=False, max_num_batched_tokens=2048) as engine:
        alone = [answers(engine, [prompt])[0] for prompt in PROMPTS]
    assert len(set(alone)) == len(alone)
    with InferenceEngine(folder, max_num_batched_tokens=77, max_num_seqs=8) as engine:
        require_same_when_cached(engine, PROMPTS, alone)
    text, tower = tmp_path / "model.gguf", write_mmproj(folder, tmp_path / "mmproj.gguf")
    write_gguf(EngineConfig(model=str(folder), dtype="f32"), text)
    with InferenceEngine(text, mmproj=tower, tokenizer=folder) as engine:
        assert engine.model_info.architecture == "deepseek2-ocr"
        assert answers(engine, PROMPTS) == alone


GGUF_NAMES = {
    "sam_model.patch_embed.proj": "v.sam.patch_embd", "sam_model.pos_embed": "v.sam.pos_embd.weight",
    "norm1": "pre_ln", "norm2": "post_ln", "attn.qkv": "attn.qkv", "attn.proj": "attn.out", "mlp.lin1": "mlp.lin1",
    "mlp.lin2": "mlp.lin2", "attn.rel_pos_h": "attn.pos_h.weight", "attn.rel_pos_w": "attn.pos_w.weight",
    "sam_model.neck.0": "v.sam.neck.0", "sam_model.neck.1": "v.sam.neck.1", "sam_model.neck.2": "v.sam.neck.2",
    "sam_model.neck.3": "v.sam.neck.3", "sam_model.net_2": "v.sam.net_2", "sam_model.net_3": "v.sam.net_3",
    "layer_norm1": "ln1", "layer_norm2": "ln2", "self_attn.qkv_proj": "attn_qkv", "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down", "vision_model.pre_layrnorm": "v.pre_ln",
    "vision_model.embeddings.class_embedding": "v.class_embd", "projector.layers": "mm.model.fc",
    "vision_model.embeddings.position_embedding": "v.position_embd", "view_seperator": "v.view_seperator",
    "image_newline": "v.image_newline",
}  # fmt: skip


def write_mmproj(folder: Path, made: Path) -> Path:
    """The checkpoint's vision encoders as llama.cpp's converter writes them, with its size of CLIP's MLP."""
    values: dict[str, Any] = {
        "image_size": 1024, "patch_size": 16, "embedding_length": 48, "block_count": 2, "feed_forward_length": 8,
        "window_size": 14, "sam.block_count": 3, "sam.embedding_length": 32, "sam.head_count": 2,
        "preproc_min_tiles": 2, "preproc_max_tiles": 9, "clip.use_gelu": True,
    }  # fmt: skip
    return write_tower(made, "deepseekocr", values, gguf_tensors(folder), {})


def gguf_tensors(folder: Path) -> dict[str, NDArray[np.float32]]:
    """The tensors of a checkpoint's vision encoders by llama.cpp's names."""
    tensors = dict[str, NDArray[np.float32]]()
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not re.match(r"model\.(sam_model|vision_model|projector|view|image)", name):
            continue
        name = name.removeprefix("model.")
        found = re.match(r"(sam_model\.blocks|vision_model\.transformer\.layers)\.(\d+)\.", name)
        at = "" if found is None else f"v.{'sam.' if name.startswith('sam') else ''}blk.{found[2]}."
        part = name if found is None else name[found.end() :]
        stem, _, kind = part.rpartition(".")
        named = GGUF_NAMES[part] if part in GGUF_NAMES else f"{GGUF_NAMES[stem]}.{kind}"
        tensors[at + named] = (tensor[None] if name == "view_seperator" else tensor).numpy()
    return tensors


TOLD: dict[str, Any] = {
    "hidden_size": 1280, "intermediate_size": 6848, "num_hidden_layers": 12, "num_attention_heads": 10,
    "num_key_value_heads": 10, "vocab_size": 129280, "max_position_embeddings": 8192, "n_routed_experts": 64,
    "num_experts_per_tok": 6, "moe_intermediate_size": 896, "n_shared_experts": 2, "first_k_dense_replace": 1,
    "topk_method": "greedy", "n_group": 1, "topk_group": 1, "use_mla": False, "kv_lora_rank": None,
    "q_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0, "lm_head": True,
    "rm_head": False, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


SAM_B = {
    "downsample_channels": [512, 1024], "global_attn_indexes": [2, 5, 8, 11], "heads": 12, "layers": 12, "width": 768
}  # fmt: skip


def test_the_published_config_is_read() -> None:
    path, width = Path("config.json"), {"heads": 16, "image_size": 224, "layers": 24, "patch_size": 14, "width": 1024}
    config = {
        "architectures": ["DeepseekOCRForCausalLM"], "model_type": "deepseek_vl_v2", "language_config": TOLD,
        "vision_config": VISION | {"width": {"clip-l-14-224": width, "sam_vit_b": SAM_B}}, **TOLD,
    }  # fmt: skip
    tower: Any = FAMILY.config_from_hf(Fields(config, path), Fields({}, path), 1280, {})
    assert (tower.hidden_size, tower.blocks, tower.clip.hidden_size, tower.clip.num_layers) == (768, 12, 1024, 24)
    assert (tower.tiles, tower.sides, tower.channels, tower.cell_size) == ((40, 64), (16, 10), (256, 512, 1024), 2048)
    _, text = family_from_hf(config, path)
    assert (text.hidden_size, text.num_experts, text.head_dim, text.eos_token_ids) == (1280, 64, 128, (1,))
    for key, value in (("use_mla", True), ("sliding_window", 128), ("scoring_func", "sigmoid")):
        with pytest.raises(CandleVllmError, match=key):
            family_from_hf(config | {"language_config": TOLD | {key: value}}, path)


def test_the_original_format_of_the_second_version_is_read() -> None:
    path = Path("config.json")
    config = {
        "architectures": ["DeepseekOCR2ForCausalLM"], "model_type": "deepseek_vl_v2", "language_config": TOLD, **TOLD,
        "vision_config": {"image_size": 1024, "width": {"qwen2-0-5b": {"dim": 896}, "sam_vit_b": SAM_B}},
    }  # fmt: skip
    family = deepseek_ocr2_tower.FAMILY
    assert "DeepseekOCR2ForCausalLM" in family.hf
    found = family.config_from_hf(Fields(config, path), Fields({}, path), 1280, {})
    assert found == family.config_from_hf(Fields(PUBLISHED, path), Fields({}, path), 1280, {})
    assert family_from_hf(config, path)[1] == family_from_hf(PUBLISHED, path)[1]
