# SPDX-License-Identifier: MIT
"""Gemma 3n: closeness to transformers, configs as they are published or wrong, and answers of an engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from candle_vllm.core import EngineConfig, InferenceEngine, SamplingParams
from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.loading.cache_specs import PagedSpec, SharedKVSpec
from candle_vllm.core.models.gemma3n import Gemma3n
from candle_vllm.core.models.gemma3n_config import Gemma3nConfig
from candle_vllm.core.models.registry import family_from_hf
from packages.core.tests.models.families import ROWS, cases
from packages.core.tests.models.tiny import (
    config_of,
    cuts,
    eager_logits,
    load,
    recorded_logits,
    some_tokens,
    spread,
    their_logits,
    write_tiny,
)

PATH = Path("config.json")
NAMES = [name for name in ROWS if name.startswith("Gemma-3n")]
E4B: dict[str, Any] = {  # as it is published
    "model_type": "gemma3n_text",
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 25,
    "altup_active_idx": 0,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_num_inputs": 4,
    "attention_bias": False,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2048,
    "hidden_size_per_layer_input": 256,
    "intermediate_size": [16384] * 35,
    "laurel_rank": 64,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
    "max_position_embeddings": 32768,
    "num_attention_heads": 8,
    "num_hidden_layers": 35,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 15,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "vocab_size": 262400,
    "vocab_size_per_layer_input": 262144,
}
WHOLE = {"architectures": ["Gemma3nForConditionalGeneration"], "model_type": "gemma3n", "torch_dtype": "bfloat16"}


def read(**changes: Any) -> Gemma3nConfig:
    config = family_from_hf({**WHOLE, "text_config": E4B | changes}, PATH)[1]
    assert isinstance(config, Gemma3nConfig)
    return config


@pytest.mark.parametrize("name", cases(NAMES))
def test_logits_equal_transformers_closely(name: str, tmp_path: Path) -> None:
    folder, tokens = write_tiny(tmp_path, ROWS[name].model_type, **ROWS[name].config), some_tokens()
    theirs = their_logits(folder, tokens)
    for chunks in cuts():
        assert spread(eager_logits(folder, tokens, chunks), theirs) < 1e-5, chunks


def test_a_published_config_is_read() -> None:
    config = read()
    window, full = PagedSpec(2, 256, 256, 512), PagedSpec(2, 256, 256)
    assert config.cache_specs[:20] == ((window,) * 4 + (full,)) * 4
    assert config.cache_specs[20:] == ((SharedKVSpec(18),) * 4 + (SharedKVSpec(19),)) * 3
    assert (config.rope.theta, config.local_rope.theta, config.intermediate_size) == (1e6, 1e4, 16384)
    assert config.deviations == (pytest.approx(1.6448535),) * 10 + (None,) * 25
    assert (config.embedding_scale, config.input_scale) == (45.25, 16.0)  # in bfloat16
    usual = ("layer_types", "activation_sparsity_pattern", "altup_num_inputs", "laurel_rank", "num_kv_shared_layers")
    assert read(**dict.fromkeys(usual)) == config


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"hidden_activation": "silu"}, UnsupportedModelError, "hidden_activation is 'silu'"),
        ({"intermediate_size": [16384] * 34}, InvalidFileError, "not 35 counts"),
        ({"intermediate_size": [16384] * 34 + [8]}, UnsupportedModelError, "intermediate_size differs by layer"),
        ({"activation_sparsity_pattern": [0.95]}, InvalidFileError, "a share from 0 to below 1 for each of 35 layers"),
        ({"activation_sparsity_pattern": [1.0] * 35}, InvalidFileError, "a share from 0 to below 1"),
        ({"altup_active_idx": 4}, InvalidFileError, "the active stream is 4; it must be 0 to 3"),
        ({"altup_num_inputs": 9}, InvalidFileError, "9 streams; 2 to 8 are possible"),
        ({"hidden_size": 2056}, UnsupportedModelError, "hidden_size 2056 is not implemented: not a multiple of 16"),
        ({"num_kv_shared_layers": 32}, InvalidFileError, "some have no layer to share with"),
    ],
)
def test_wrong_configs_are_named(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        read(**changes)


def test_the_text_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    """As it is published: under the names of the whole model, beside towers that are left where they are."""
    row, tokens = ROWS["Gemma-3n"], some_tokens(12)
    folder = write_tiny(tmp_path / "text", row.model_type, **row.config)
    whole = Path(shutil.copytree(folder, tmp_path / "whole"))
    stored = load_file(folder / "model.safetensors")
    named = {name.replace("model.", "model.language_model.", 1): data for name, data in stored.items()}
    towers = {
        f"model.{part}.weight": stored["model.norm.weight"].clone() for part in ("vision_tower.a", "embed_audio.b")
    }
    save_file(named | towers, whole / "model.safetensors", {"format": "pt"})
    (whole / "config.json").write_text(json.dumps({**WHOLE, "torch_dtype": None, "text_config": config_of(folder)}))
    assert eager_logits(whole, tokens, [12]).equal(eager_logits(folder, tokens, [12]))


def test_tokens_without_an_embedding_for_layers_have_that_of_the_first(tmp_path: Path) -> None:
    row = ROWS["Gemma-3n"]
    folder = write_tiny(tmp_path, row.model_type, **row.config)
    tokens = [5, row.config["vocab_size_per_layer_input"] + 1, 7]
    theirs = their_logits(folder, tokens)
    assert spread(eager_logits(folder, tokens, [3]), theirs) < 1e-5
    assert spread(recorded_logits(folder, tokens, [3]), theirs) < 1e-2


def test_neither_cache_nor_chunks_nor_rows_left_out_change_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tiny(tmp_path / "model", ROWS["Gemma-3n"].model_type, **ROWS["Gemma-3n"].config)
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=2)
    prompts = [some_tokens(64), [*some_tokens(48), 7, 8, 9], some_tokens(64)]

    def answers(given: list[list[int]], **settings: Any) -> list[Any]:
        with InferenceEngine(EngineConfig(model=str(source), block_size=16, **settings)) as engine:
            return [(each.outputs[0].token_ids, each.outputs[0].logprobs) for each in engine.generate(given, params)]

    alone = [answers([prompt], enable_prefix_caching=False)[0] for prompt in prompts]
    more: dict[str, Any] = {"max_num_batched_tokens": 20, "max_num_seqs": 4}
    assert answers(prompts, **more, prompt_cache_path=tmp_path / "blocks") == alone
    assert load(source).decoder.narrows
    monkeypatch.setattr(Gemma3n, "narrows", property(lambda self: False, lambda self, value: None))
    assert answers(prompts, **more) == alone
