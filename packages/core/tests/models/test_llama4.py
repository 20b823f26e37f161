# SPDX-License-Identifier: MIT
"""Llama 4: closeness to transformers, configs as they are published or wrong, and pages of chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core import EngineConfig, InferenceEngine, SamplingParams
from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.loading.cache_specs import PagedSpec
from candle_vllm.core.models.llama4_config import Llama4Config
from candle_vllm.core.models.registry import family_from_hf
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.tiny import cuts, eager_logits, some_tokens, spread, their_logits, write_tiny

PATH = Path("config.json")
SCOUT: dict[str, Any] = {  # as it is published
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "attention_dropout": 0.0,
    "bos_token_id": 200000,
    "eos_token_id": [200001, 200007, 200008],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "max_position_embeddings": 10485760,
    "model_type": "llama4_text",
    "no_rope_layers": [],
    "num_attention_heads": 40,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 16.0,
        "high_freq_factor": 1.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "use_qk_norm": True,
    "vocab_size": 202048,
}
MAVERICK = SCOUT | {"interleave_moe_layer_step": 2, "num_local_experts": 128, "use_qk_norm": False}


def read(text: dict[str, Any], **changes: Any) -> Llama4Config:
    whole = {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "text_config": text | changes}
    config = family_from_hf(whole, PATH)[1]
    assert isinstance(config, Llama4Config)
    return config


@pytest.mark.parametrize("name", ["Llama-4", "Llama-4 chunks"])
def test_logits_equal_transformers_closely(name: str, tmp_path: Path) -> None:
    folder, tokens = write_tiny(tmp_path, ROWS[name].model_type, **ROWS[name].config), some_tokens()
    theirs = their_logits(folder, tokens)
    for chunks in cuts():
        assert spread(eager_logits(folder, tokens, chunks), theirs) < 1e-5, chunks


def test_published_configs_are_read() -> None:
    scout, maverick = read(SCOUT), read(MAVERICK)
    chunk, full = PagedSpec(8, 128, 128, 8192), PagedSpec(8, 128, 128)
    assert scout.cache_specs == maverick.cache_specs == ((chunk,) * 3 + (full,)) * 12
    assert scout.unrotated_layers == frozenset(range(3, 48, 4))
    assert (scout.same_length, maverick.same_length) == (True, False)
    assert scout.sparse_layers == frozenset(range(48))
    assert maverick.sparse_layers == frozenset(range(1, 48, 2))
    assert scout.mixture is not None
    assert (scout.mixture.inner_size, scout.mixture.shared_size, scout.intermediate_size) == (8192, 8192, 16384)
    assert scout.temperature == (8192, 0.1)
    assert (scout.rope.kind, scout.rope.factor) == ("llama3", 16.0)
    assert read(SCOUT, no_rope_layer_interval=6).unrotated_layers == frozenset(range(5, 48, 6))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"num_experts_per_tok": 2}, UnsupportedModelError, "2 experts per token are not"),
        ({"hidden_act": "gelu"}, UnsupportedModelError, "hidden_act is 'gelu'"),
        ({"no_rope_layers": [1, 1]}, InvalidFileError, "must describe 48 layers"),
        ({"layer_types": ["sliding_attention"] * 48}, InvalidFileError, "must describe 48 layers"),
        ({"layer_types": [["full_attention"]] * 48}, InvalidFileError, "must describe 48 layers"),
        ({"moe_layers": [48]}, InvalidFileError, "layers that the model does not have"),
        ({"moe_layers": [[0]]}, InvalidFileError, "layers that the model does not have"),
        ({"attention_chunk_size": -1}, InvalidFileError, "sliding window is -1"),
    ],
)
def test_wrong_configs_are_named(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        read(SCOUT, **changes)


def test_scaled_queries_may_be_a_number() -> None:
    """Older versions of transformers wrote 4 for `attn_temperature_tuning`."""
    assert read(SCOUT, attn_temperature_tuning=4) == read(SCOUT)
    assert read(SCOUT, attn_temperature_tuning=0).temperature is None


def test_neither_cache_nor_cuts_nor_freed_pages_change_an_answer(tmp_path: Path) -> None:
    """A chunk of 16 tokens has two pages at most; prompts and answers go on over several chunks."""
    row = ROWS["Llama-4 chunks"]
    source = write_tiny(tmp_path / "model", row.model_type, **row.config)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=2)
    prompts = [some_tokens(90), [*some_tokens(61), 7, 8, 9], some_tokens(90), some_tokens(16)]

    def answers(given: list[list[int]], **settings: Any) -> list[Any]:
        with InferenceEngine(EngineConfig(model=str(source), block_size=16, **settings)) as engine:
            return [(each.outputs[0].token_ids, each.outputs[0].logprobs) for each in engine.generate(given, params)]

    alone = [answers([prompt], enable_prefix_caching=False)[0] for prompt in prompts]
    assert answers(prompts, max_num_batched_tokens=20, max_num_seqs=4, prompt_cache_path=tmp_path / "blocks") == alone
    assert answers(prompts, max_num_batched_tokens=96, speculative_config={"method": "ngram"}) == alone
