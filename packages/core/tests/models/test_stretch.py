# SPDX-License-Identifier: MIT
"""`yarn_scaling_factor` against transformers, whose config says the same, and where it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core.errors import ConfigError
from candle_vllm.core.testing.toy_model import write_toy_tokenizer
from packages.core.tests.models.families import GEMMA3, LLAMA3, ROWS
from packages.core.tests.models.gguf_export import export_gguf
from packages.core.tests.models.tiny import (
    config_of,
    cuts,
    eager_logits,
    error,
    load,
    some_tokens,
    their_logits,
    write_tiny,
)

CONTEXT, FACTOR = 20, 4.0


def their_twin(folder: Path, to: Path) -> Path:
    """The same weights with a config that says what the setting does."""
    to.mkdir()
    config = config_of(folder)
    config["rope_parameters"] |= {
        "rope_type": "yarn",
        "factor": FACTOR,
        "original_max_position_embeddings": CONTEXT,
    }
    (to / "config.json").write_text(json.dumps(config))
    (to / "model.safetensors").symlink_to(folder / "model.safetensors")
    write_toy_tokenizer(to)
    return to


@pytest.mark.parametrize(("model_type", "gguf"), [("llama", "llama"), ("glm4", "glm4"), ("qwen3", "qwen3")])
def test_it_is_what_transformers_makes_of_the_same_scaling(model_type: str, gguf: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "plain", model_type, head_dim=32, max_position_embeddings=CONTEXT)
    tokens = some_tokens()
    theirs = their_logits(their_twin(folder, tmp_path / "twin"), tokens)
    for chunks in cuts():
        assert error(eager_logits(folder, tokens, chunks, yarn_scaling_factor=FACTOR), theirs) < 1e-4
    path = export_gguf(folder, tmp_path / "model.gguf", gguf)
    assert error(eager_logits(path, tokens, cuts()[0], yarn_scaling_factor=FACTOR), theirs) < 1e-4


def test_the_context_grows_by_the_factor(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "llama", head_dim=32, max_position_embeddings=CONTEXT)
    assert load(folder).config.max_position == 20
    assert load(folder, yarn_scaling_factor=2.5).config.max_position == 50
    assert load(folder, yarn_scaling_factor=2.5, max_model_len=30).config.max_position == 30


@pytest.mark.parametrize(("model_type", "impl"), [("hyperclovax", "auto"), ("qwen3", "transformers")])
def test_on_layers_of_transformers_the_config_scales(model_type: str, impl: Any, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "plain", model_type, head_dim=32, max_position_embeddings=CONTEXT)
    with pytest.raises(ConfigError, match=rf"yarn_scaling_factor=4: {model_type} runs on layers of transformers"):
        load(folder, yarn_scaling_factor=FACTOR, model_impl=impl)
    twin, tokens = their_twin(folder, tmp_path / "twin"), some_tokens()
    assert load(twin, model_impl=impl).config.max_position == CONTEXT * FACTOR
    logits = eager_logits(twin, tokens, [len(tokens)], model_impl=impl)
    assert error(logits, their_logits(twin, tokens)) < 1e-4
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for kind, context in (("linear", 80), ("dynamic", 80), ("llama3", 20), ("default", 20)):
        said = {"rope_theta": 1e4, "rope_type": kind, "factor": FACTOR, "original_max_position_embeddings": CONTEXT}
        (twin / "config.json").write_text(json.dumps(config_of(folder) | {"rope_parameters": said | bands}))
        assert load(twin, model_impl=impl).config.max_position == context


def test_models_that_are_scaled_already_are_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "scaled", "llama", head_dim=32, rope_parameters=LLAMA3)
    with pytest.raises(ConfigError, match=r"yarn_scaling_factor=2: .*scaled already \(llama3.*leave the setting out"):
        load(folder, yarn_scaling_factor=2.0)
    path = export_gguf(folder, tmp_path / "model.gguf", "llama")
    with pytest.raises(ConfigError, match=r"scaled already \(by tensors of its file\)"):
        load(path, yarn_scaling_factor=2.0)


def test_models_with_two_rotary_settings_are_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "gemma3_text", **GEMMA3)
    with pytest.raises(ConfigError, match="rotary positions of two kinds"):
        load(folder, yarn_scaling_factor=2.0)


@pytest.mark.parametrize("name", ["BLOOM", "Falcon-RW", "Jamba", "Nemotron-H", "OLMo Hybrid"])
def test_models_whose_positions_are_not_rotary_are_refused(name: str, tmp_path: Path) -> None:
    """ALiBi, or attention without positions: only the context would grow."""
    folder = write_tiny(tmp_path, ROWS[name].model_type, **ROWS[name].config)
    with pytest.raises(ConfigError, match=rf"{ROWS[name].model_type} has no rotary positions, and YaRN"):
        load(folder, yarn_scaling_factor=2.0)


def test_a_context_beyond_what_is_possible_is_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "llama", head_dim=32, max_position_embeddings=1 << 20)
    with pytest.raises(ConfigError, match="set it to 16 or less") as caught:
        load(folder, yarn_scaling_factor=100.0)
    assert caught.value.setting == "yarn_scaling_factor"
