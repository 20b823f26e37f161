# SPDX-License-Identifier: MIT
"""Text towers of multimodal checkpoints against transformers, and configs as they are published or wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError, WeightsError
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import constant
from candle_vllm.core.models.registry import family_from_hf
from candle_vllm.core.models.towers import DEFAULTS, split_towers, text_fields
from candle_vllm.core.testing.toy_model import write_toy_tokenizer
from packages.core.tests.models.families import (
    DEEPSEEK,
    GEMMA3,
    GEMMA4_E4B,
    LLAMA3,
    MINIMAX_M3,
    MINISTRAL3_ROPE,
    MUSE,
    QWEN35,
    QWEN_MOE,
    STEP,
)
from packages.core.tests.models.family_formats import write_format
from packages.core.tests.models.tiny import (
    SMALL,
    config_of,
    cuts,
    eager_logits,
    error,
    load,
    randomise,
    recorded_logits,
    some_tokens,
    spread,
    write_tiny,
)
from packages.core.tests.models.tiny import their_logits as plain_logits

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Gemma-3": ("gemma3", "siglip_vision_model", {"model_type": "gemma3_text"} | GEMMA3),
    "Gemma-4": ("gemma4", "gemma4_vision", {"model_type": "gemma4_text"} | GEMMA4_E4B),
    "Kimi K2.5": ("kimi_k25", "kimi_k25_vision", {"model_type": "deepseek_v3"} | DEEPSEEK),
    "Mistral 3": ("mistral3", "pixtral", {"model_type": "mistral", "head_dim": 32}),
    "Mistral 3 with Ministral 3": (
        "mistral3",
        "pixtral",
        {"model_type": "ministral3", "head_dim": 32, "rope_parameters": MINISTRAL3_ROPE},
    ),
    "Muse Glimmer": ("muse_glimmer", "muse_glimmer_vision", {"model_type": "muse_glimmer_text"} | MUSE),
    "MiniMax M3": ("minimax_m3_vl", "minimax_m3_vl_vision", {"model_type": "minimax_m3_vl_text"} | MINIMAX_M3),
    "Step 3.7": ("step3p7", "step3p5_vision", {"model_type": "step3p5"} | STEP),
    "Qwen3.5": ("qwen3_5", "qwen3_5_vision", {"model_type": "qwen3_5_text"} | QWEN35),
    "Qwen3.5-MoE": ("qwen3_5_moe", "qwen3_5_moe_vision", {"model_type": "qwen3_5_moe_text"} | QWEN35 | QWEN_MOE),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = write_tower(tmp_path_factory.mktemp("tower"), *ROWS[name])
        return made[name]

    return folder


def write_tower(folder: Path, model_type: str, vision: str, text: dict[str, Any]) -> Path:
    own = {"image_size": 16, "patch_size": 8} | ({"head_dim": 16} if vision == "pixtral" else {})
    config = AutoConfig.for_model(
        model_type,
        text_config=dict(SMALL) | text,
        vision_config=VISION | own | {"model_type": vision},
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager")
    randomise(model)
    model.save_pretrained(folder)
    if model_type == "kimi_k25":  # transformers writes the text model's layers under the tower's name for layers
        stored = load_file(folder / "model.safetensors")
        renamed = {
            part.replace("language_model.model.blocks.", "language_model.model.layers."): part for part in stored
        }
        save_file(
            {name: stored[part] for name, part in renamed.items()}, folder / "model.safetensors", {"format": "pt"}
        )
    write_toy_tokenizer(folder)
    return folder


def their_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float()


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("name", ROWS)
def test_text_towers_equal_transformers(name: str, folders: Callable[[str], Path]) -> None:
    folder, tokens = folders(name), some_tokens()
    theirs = their_logits(folder, tokens)
    for chunks in cuts():
        assert error(eager_logits(folder, tokens, chunks), theirs) < 1e-4, chunks
    assert spread(recorded_logits(folder, tokens, cuts()[1]), theirs) < 1e-2


@pytest.mark.parametrize("name", ["Gemma-3", "Mistral 3"])
def test_names_of_both_layouts_are_known(name: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    """As transformers 5 keeps them in memory, and as checkpoints before it have them."""
    folder, tokens = folders(name), some_tokens(12)
    wanted = eager_logits(folder, tokens, [12])
    stored = load_file(folder / "model.safetensors")
    plain = {part.replace("language_model.model.", "model.language_model."): data for part, data in stored.items()}
    plain = {part.replace("language_model.lm_head.", "lm_head."): data for part, data in plain.items()}
    assert any(part.startswith("model.language_model.") for part in plain)
    older = {part.replace("model.language_model.", "language_model.model."): data for part, data in plain.items()}
    older = {part.replace("lm_head.", "language_model.lm_head."): data for part, data in older.items()}
    older = {part.removeprefix("model."): data for part, data in older.items()}
    for layout in (plain, older):
        other = copied(folder, tmp_path / str(len(list(tmp_path.iterdir()))), layout)
        assert torch.equal(eager_logits(other, tokens, [12]), wanted)


def test_a_quantised_tower_is_read(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """As Ministral 3 is published: its layers' names have the tower's prefix, and its config names the method once."""
    stored, plain = write_format(folders("Mistral 3 with Ministral 3"), "FP8", tmp_path)
    tokens = some_tokens(24)
    assert load(stored).quantization is not None
    assert error(eager_logits(stored, tokens, [24]), eager_logits(plain, tokens, [24])) < 1e-5


def test_a_tower_without_its_files_is_a_text_model_of_random_numbers(folders: Callable[[str], Path]) -> None:
    loaded = load(folders("Gemma-3"), load_format="dummy")
    assert loaded.config.model_type == "gemma3_text"
    assert loaded.num_parameters == load(folders("Gemma-3")).num_parameters


def copied(folder: Path, to: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    to.mkdir()
    save_file(tensors, to / "model.safetensors")
    (to / "config.json").write_text(json.dumps(config_of(folder) | config))
    write_toy_tokenizer(to)
    return to


def test_apertus_1_5_has_logits_of_its_text_tokens(tmp_path: Path) -> None:
    """Made of transformers' Apertus, as it has no class of 1.5: its embeddings of images and audio have no logits."""
    plain = write_tiny(tmp_path / "plain", "apertus", rope_parameters=LLAMA3)
    text, stored, tokens = config_of(plain), load_file(plain / "model.safetensors"), some_tokens(24)
    text |= {"model_type": "apertus1p5_text", "output_vocab_size": text["vocab_size"], "post_norm": False}
    whole = {name.replace("model.", "model.language_model.", 1): data for name, data in stored.items()}
    table = "model.language_model.embed_tokens.weight"
    whole[table] = torch.cat([whole[table], torch.ones(64, whole[table].shape[1])])
    whole |= {f"model.{kind}_tokenizer.encoder.weight": torch.zeros(4) for kind in ("vision", "audio")}
    config: dict[str, Any] = {
        "architectures": ["Apertus1p5ForConditionalGeneration"],
        "model_type": "apertus1p5",
        "text_config": text | {"vocab_size": text["vocab_size"] + 64},
        "vision_config": {"model_type": "apertus1p5_vision_tokenizer"},
        "tie_word_embeddings": False,
    }
    folder = copied(plain, tmp_path / "whole", whole, **config)
    theirs = plain_logits(plain, tokens)
    assert error(eager_logits(folder, tokens, [24]), theirs) < 1e-5
    assert spread(recorded_logits(folder, tokens, [24]), theirs) < 1e-2
    wrong = config | {"text_config": config["text_config"] | {"output_vocab_size": text["vocab_size"] + 65}}
    with pytest.raises(InvalidFileError, match=r"text_config\.output_vocab_size is \d+; it must be 1 to"):
        family_from_hf(wrong, PATH)
    for kind in ("plain", "whole"):  # only the rows that the config names as those of codes are not loaded
        stored = load_file(tmp_path / kind / "model.safetensors")
        name = next(name for name in stored if name.endswith("embed_tokens.weight"))
        stored[name] = torch.cat([stored[name], torch.ones(1, stored[name].shape[1])])
        save_file(stored, tmp_path / kind / "model.safetensors", {"format": "pt"})
        with pytest.raises(WeightsError, match=r"embed_tokens\.weight"):
            eager_logits(tmp_path / kind, tokens, [24])


@pytest.mark.parametrize("end", ["layers.0.weight", "visual.patch_embed.weight"])
def test_a_tensor_under_two_names_is_refused(end: str, tmp_path: Path) -> None:
    names = [f"model.{end}", end] if end.startswith("visual") else [f"model.language_model.{end}", f"model.{end}"]
    stored = {name: constant(name, np.ones(1), tmp_path) for name in names}
    with pytest.raises(InvalidFileError, match=rf"tensor (model\.)?{end} is stored under two names"):
        split_towers(
            {"architectures": ["Qwen3VLForConditionalGeneration"]}, Checkpoint(tmp_path, "safetensors", (), stored, {})
        )


def test_a_tower_without_text_weights_is_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    stored = load_file(folders("Gemma-3") / "model.safetensors")
    vision = {name: data for name, data in stored.items() if "vision_tower" in name}
    with pytest.raises(WeightsError, match=r"no tensor of the text model \(language_model\.\*\)"):
        load(copied(folders("Gemma-3"), tmp_path / "vision", vision))


def test_a_text_config_of_other_sizes_is_refused_with_the_tensors(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folders("Gemma-3")
    text = config_of(folder)["text_config"] | {"intermediate_size": 80}
    stored = load_file(folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"has shape \[96, 64\]; the model's config asks for \[80, 64\]"):
        load(copied(folder, tmp_path / "other", stored, text_config=text))


# ---- configs ---------------------------------------------------------------------------------------------------------

GEMMA_4B = {  # text_config of google/gemma-3-4b-it: what it leaves out, transformers fills in
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}
PATH = Path("config.json")


def gemma_4b(**text: Any) -> dict[str, Any]:
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "torch_dtype": "bfloat16",
        "text_config": GEMMA_4B | text,
        "vision_config": {},
    }


WITHOUT_KEYS = {"partial_rotary_factor": 1.0, "attention_bias": False}
"""What transformers' code has where its config has no key."""


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_left_out_keys_have_the_values_of_transformers(model_type: str) -> None:
    theirs = AutoConfig.for_model(model_type)
    found = (
        WITHOUT_KEYS
        | theirs.to_dict()
        | {"rope_theta": theirs.rope_parameters and theirs.rope_parameters.get("rope_theta")}
    )
    assert {key: found[key] for key in DEFAULTS[model_type]} == dict(DEFAULTS[model_type])


def test_a_published_mistral_says_only_what_differs() -> None:
    """As transformers writes nested configs: the keys of Mistral Small 3.1 that are not the class's own."""
    text = {
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "model_type": "mistral",
        "num_hidden_layers": 40,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e9,
        "sliding_window": None,
        "vocab_size": 131072,
    }
    names = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3"}
    config = family_from_hf({**names, "text_config": text}, PATH)[1]
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.max_position) == (32, 8, 128, 131072)
    assert config.sliding_windows == (None,) * 40


def test_what_a_published_config_leaves_out_is_what_transformers_fills_in() -> None:
    theirs = AutoConfig.for_model(**GEMMA_4B)
    config = family_from_hf(gemma_4b(), PATH)[1]
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)
    assert (config.max_position, config.norm_eps, config.tie_embeddings) == (131072, 1e-6, True)
    assert [kind == "full_attention" for kind in theirs.layer_types] == [
        window is None for window in config.sliding_windows
    ]
    assert (config.rope.kind, config.rope.factor, config.rope.theta) == ("linear", 8.0, 1e6)
    local = config.local_rope
    assert (local.kind, local.theta) == ("default", 10000.0)
    assert config.embedding_scale == 50.5  # the root of 2560 in bf16
    assert set(config.eos_token_ids) == {1, 106}


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        (gemma_4b() | {"text_config": None}, InvalidFileError, "text_config is missing"),
        (gemma_4b() | {"text_config": 5}, InvalidFileError, "text_config is 5, not a dict"),
        (gemma_4b(model_type="llama"), UnsupportedModelError, r"text_config\.model_type is 'llama'.*gemma3_text"),
        (gemma_4b(hidden_size=None), InvalidFileError, r"text_config\.hidden_size is missing"),
        (gemma_4b(head_dim="x"), InvalidFileError, r"text_config\.head_dim is 'x'"),
        (gemma_4b(tie_word_embeddings="no"), InvalidFileError, "tie_word_embeddings is 'no'"),
    ],
)
def test_wrong_configs_are_named(config: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        family_from_hf(config, PATH)


@pytest.mark.parametrize(
    ("said", "stored", "tied"),
    [
        ({}, None, True),
        ({"tie_word_embeddings": False}, None, False),
        ({"tie_word_embeddings": True}, ["model.x", "lm_head.weight"], True),  # and the two are compared
        ({}, ["model.x", "lm_head.weight"], False),
        ({}, ["model.x"], True),
        ({"tie_word_embeddings": False}, ["model.x"], False),
    ],
)
def test_a_stored_head_is_used_where_the_config_says_nothing(
    said: dict[str, Any], stored: list[str] | None, tied: bool
) -> None:
    config = gemma_4b() | said
    fields = text_fields("Gemma3ForConditionalGeneration", config, PATH, stored)[1]
    assert fields.get("tie_word_embeddings", bool) is tied
