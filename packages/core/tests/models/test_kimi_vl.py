# SPDX-License-Identifier: MIT
"""Kimi-VL of random weights: the vision encoder and text model of transformers' Kimi K2.5 under Kimi-VL's names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from candle_vllm.core.errors import ConfigError, InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields, read_json
from candle_vllm.core.models import kimi_vl_tower
from candle_vllm.core.models.registry import family_from_hf
from packages.core.tests.models.families import DEEPSEEK
from packages.core.tests.models.sight import (
    PICTURES,
    TEMPLATE,
    answers_alone,
    answers_of,
    loaded_from,
    require_same_embeddings,
    require_same_from_gguf,
    require_same_in_steps,
    require_same_on_a_gpu,
    write_tokenizer,
    write_tower,
)
from packages.core.tests.models.test_kimi_k25 import (
    NAMES,
    PAD,
    TOWER,
    as_published,
    patches_of,
    require_same_as_transformers,
    save_random,
)
from packages.core.tests.models.tiny import SMALL
from tests.common_run import combined, few

MARKS = ("<|media_start|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>")
ONE = f"{MARKS[0]}image{MARKS[1]}{MARKS[2]}{MARKS[3]}"
PROMPTS: list[Any] = [
    {"prompt": f"{ONE}Compare this with {ONE}.", "multi_modal_data": {"image": PICTURES[:2]}},
    {
        "prompt": f"{ONE}What is this? Describe it in one sentence, please.",
        "multi_modal_data": {"image": [PICTURES[2]]},
    },
    "Compare nothing.",
]
TEXT = dict(SMALL) | DEEPSEEK | {"model_type": "deepseek_v3", "q_lora_rank": None, "n_group": 1, "topk_group": 1}
PROCESSOR: dict[str, Any] = {
    "in_token_limit": 60, "patch_size": 4, "merge_kernel_size": [2, 2], "num_pooled_tokens": 1024, "pad_input": True,
    "image_mean": [0.5, 0.4, 0.6], "image_std": [0.5, 0.6, 0.4],
}  # fmt: skip
NAMES_HERE = {
    "mm_projector.proj.0": "multi_modal_projector.linear_1",
    "mm_projector.proj.2": "multi_modal_projector.linear_2",
}


def published_name(name: str) -> str:
    """The name in Kimi-VL's files, by that in Kimi K2.5's."""
    name = as_published(name)
    for old, new in {**NAMES_HERE, "mm_projector.pre_norm": "multi_modal_projector.pre_norm"}.items():
        name = name.replace(old, new)
    return name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder, and transformers' model of its weights."""
    folder, vision = tmp_path_factory.mktemp("kimi_vl"), TOWER | {"hidden_act": "gelu_pytorch_tanh"}
    config = AutoConfig.for_model(
        "kimi_k25", text_config=TEXT, vision_config=vision, projection_hidden_size=32, projection_layer_norm_eps=1e-5,
        image_token_id=PAD, video_token_id=271, tie_word_embeddings=False,
    )  # fmt: skip
    model = save_random(config, folder)
    stored = load_file(folder / "model.safetensors")
    renamed = {published_name(name): each for name, each in stored.items() if "time_weight" not in name}
    for layer in range(SMALL["num_hidden_layers"]):  # transformers renames and reorders these as the encoder's
        part, own = f"model.layers.{layer}.self_", model.model.language_model.layers[layer].self_attn.q_proj.weight
        del renamed[f"language_model.{part}wqkv.weight"]
        renamed[f"language_model.{part}attn.q_proj.weight"] = own.detach().clone()
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    own = {"init_pos_emb_height": 7, "init_pos_emb_width": 7, "merge_kernel_size": [2, 2], "model_type": "moonvit"}
    sizes = ("num_hidden_layers", "num_attention_heads", "patch_size", "hidden_size", "intermediate_size")
    saved = read_json(folder / "config.json")
    saved |= {"architectures": ["KimiVLForConditionalGeneration"], "model_type": "kimi_vl"}
    saved |= {"vision_config": own | {key: vision[key] for key in sizes}, "media_placeholder_token_id": PAD}
    for key in ("projection_hidden_size", "projection_layer_norm_eps", "image_token_id", "video_token_id"):
        saved.pop(key, None)
    (folder / "config.json").write_text(json.dumps(saved))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    write_tokenizer(folder, MARKS, TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", ONE))
    return folder, model.eval()


@pytest.fixture(scope="module")
def folder(made: tuple[Path, Any]) -> Path:
    return made[0]


@pytest.fixture(scope="module")
def theirs(made: tuple[Path, Any]) -> Any:
    return made[1]


def resized(height: int, width: int, patch: int, most: int) -> tuple[int, int, int, int]:
    """Height and width of an image in the published processor, and with what it adds to whole cells."""
    if (count := (width // patch) * (height // patch)) > most:
        scale = math.sqrt(most / count)
        height, width = int(height * scale), int(width * scale)
    cell = 2 * patch
    return height, width, height + (cell - height % cell) % cell, width + (cell - width % cell) % cell


def their_pixels(pictures: list[NDArray[np.uint8]]) -> dict[str, torch.Tensor]:
    return patches_of(pictures, lambda height, width: resized(height, width, 4, 60))


@pytest.mark.parametrize("eager", few([True, False], False))
def test_embeddings_are_those_of_transformers(eager: bool, folder: Path, theirs: Any) -> None:
    with torch.inference_mode():
        expected = theirs.model.get_image_features(**their_pixels(PICTURES)).pooler_output
    require_same_embeddings(folder, PAD, PICTURES, expected, eager=eager, most=24)


@combined("eager tokens", (True, False), (512, 23), common=[(False, 23)])
def test_logits_are_those_of_transformers(tokens: int, eager: bool, folder: Path, theirs: Any) -> None:
    require_same_as_transformers(folder, theirs, their_pixels(PICTURES[:2]), PROMPTS[0], eager=eager, tokens=tokens)


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[tuple[int, ...]]:
    return answers_alone(folder, PROMPTS)


@pytest.mark.parametrize("tokens", few([512, 17], 17))
def test_answers_are_the_same_in_a_batch_in_chunks_and_cached(
    tokens: int, folder: Path, alone: list[tuple[int, ...]]
) -> None:
    require_same_in_steps(folder, PROMPTS, alone, tokens)


@pytest.mark.every_case
def test_steps_of_a_gpu_have_the_same_answers(folder: Path) -> None:
    """By the references of its kernels."""
    require_same_on_a_gpu(folder, [(f"{ONE}What is this?", PICTURES[3:]), ("Nothing to see.", [])])


# ---- files -----------------------------------------------------------------------------------------------------------


def write_mmproj(folder: Path, made: Path) -> Path:
    """The checkpoint's tower as llama.cpp's converter writes it: queries and keys apart, in the rows of the file."""
    values = {
        "image_size": 28,
        "projector.scale_factor": 2,
        "attention.layer_norm_epsilon": 1e-5,
        "clip.use_gelu": True,
    }
    tensors = dict[str, NDArray[np.float32]]()
    names = NAMES | {"linear_1": "mm.1", "linear_2": "mm.2"}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.startswith(("vision_tower.", "multi_modal_projector.")):
            continue
        plain, block, data = name.partition(".")[2], "", tensor.numpy()
        if plain.startswith("encoder.blocks."):
            _, _, number, plain = plain.split(".", 3)
            block = f"v.blk.{number}."
        part, _, kind = plain.rpartition(".")
        if part == "wqkv":
            for letter, rows in zip("qkv", np.split(data, 3)):
                tensors[f"{block}attn_{letter}.{kind}"] = rows
        else:
            data = data.reshape(-1, data.shape[-1]) if part.endswith("pos_emb") else data
            tensors[f"{block}{names[part]}.{kind}"] = data
    return write_tower(made, "kimivl", values, tensors, PROCESSOR)


def test_a_gguf_file_and_that_of_its_tower_are_the_same_model(
    folder: Path, tmp_path: Path, alone: list[tuple[int, ...]]
) -> None:
    tower, more = write_mmproj(folder, tmp_path / "mmproj.gguf"), {"in_token_limit": 60}
    require_same_from_gguf(folder, tower, PROMPTS, alone, "deepseek2", mm_processor_kwargs=more)
    assert answers_of(folder, PROMPTS, mm_processor_kwargs={"in_token_limit": 8}) != alone


def test_the_number_of_patches_may_be_set(folder: Path) -> None:
    loaded = loaded_from(folder, mm_processor_kwargs={"in_token_limit": 16})
    assert loaded.tower is not None
    rule: Any = loaded.tower.tower.config.rule
    assert rule.patches == 16
    for said in ({"max_patches": 16}, {"in_token_limit": 1 << 15}):
        with pytest.raises(ConfigError, match=next(iter(said))):
            loaded_from(folder, mm_processor_kwargs=said)


PATH = Path("config.json")
PUBLISHED: dict[str, Any] = {
    "architectures": ["KimiVLForConditionalGeneration"], "model_type": "kimi_vl", "media_placeholder_token_id": 163605,
    "eos_token_id": 163585,
    "vision_config": {
        "model_type": "moonvit", "patch_size": 14, "num_attention_heads": 16, "num_hidden_layers": 27,
        "hidden_size": 1152, "intermediate_size": 4304, "merge_kernel_size": [2, 2], "init_pos_emb_height": 64,
        "init_pos_emb_width": 64,
    },
    "text_config": {
        "vocab_size": 163840, "max_position_embeddings": 131072, "hidden_size": 2048, "intermediate_size": 11264,
        "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "n_shared_experts": 2,
        "n_routed_experts": 64, "routed_scaling_factor": 2.446, "kv_lora_rank": 512, "q_lora_rank": None,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "topk_method": "noaux_tc", "n_group": 1,
        "topk_group": 1, "num_experts_per_tok": 6, "moe_layer_freq": 1, "first_k_dense_replace": 1,
        "norm_topk_prob": True, "scoring_func": "sigmoid", "rope_theta": 800000.0, "rms_norm_eps": 1e-5,
    },
}  # fmt: skip
"""Sizes of Kimi-VL-A3B."""


def tower_of(config: dict[str, Any], processor: dict[str, Any], **said: Any) -> Any:
    images = {"pad_input": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3} | processor
    return kimi_vl_tower.FAMILY.config_from_hf(Fields(config, PATH), Fields(images, PATH), 2048, said)


def test_published_sizes_are_read() -> None:
    found = tower_of(PUBLISHED, {"in_token_limit": 4096, "patch_size": 14, "num_pooled_tokens": 1024})
    assert (found.hidden_size, found.num_layers, found.learned, found.norm_eps) == (1152, 27, 64, 1e-5)
    assert (found.projected_eps, found.activation, found.rule.patches) == (1e-5, "gelu_tanh", 4096)
    config: Any = family_from_hf(PUBLISHED, PATH)[1]
    assert (config.num_experts, config.q_rank, config.mixture.top_k, config.rope.theta) == (64, 0, 6, 800000.0)


@pytest.mark.parametrize(
    "size", [(640, 480), (1920, 1080), (20, 20), (10, 300), (27, 5000), (28, 28), (4000, 3000), (1, 1), (1800, 1805)]
)
def test_images_have_the_sizes_of_the_published_processor(size: tuple[int, int]) -> None:
    for most in (4096, 16384, 400):
        rule, (wide, high) = tower_of(PUBLISHED, {"in_token_limit": most}).rule, size
        cut = rule.cut(high, wide)
        assert (cut.height, cut.width) == resized(high, wide, 14, most)[2:]
    cut = tower_of(PUBLISHED, {}).rule.cut(30, 9000)  # which that processor refuses
    assert (cut.height, cut.width) == (28, 510 * 14)


@pytest.mark.parametrize(
    ("vision", "processor", "said"),
    [({}, {"pad_input": False}, "pad_input"), ({}, {"merge_kernel_size": [2, 1]}, "merge_kernel_size"),
     ({}, {"merge_kernel_size": [4, 4]}, "merge_size"), ({}, {"patch_size": 16}, "patch_size"),
     ({}, {"in_token_limit": 0}, "in_token_limit"), ({"hidden_act": "silu"}, {}, "hidden_act"),
     ({"init_pos_emb_width": 32}, {}, "64 x 32 positions"), ({"num_attention_heads": 576}, {}, "head size 2")],
)  # fmt: skip
def test_other_encoders_are_refused(vision: dict[str, Any], processor: dict[str, Any], said: str) -> None:
    with pytest.raises((InvalidFileError, UnsupportedModelError), match=said):
        tower_of(PUBLISHED | {"vision_config": PUBLISHED["vision_config"] | vision}, processor)
