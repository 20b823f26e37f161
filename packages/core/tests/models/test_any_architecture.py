# SPDX-License-Identifier: MIT
"""Architectures by transformers' own layers, over this engine's pages and products, against plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from transformers import CONFIG_MAPPING

from candle_vllm.core import ConfigError, EngineConfig, InferenceEngine, SamplingParams, UnsupportedModelError
from candle_vllm.core.models import registry
from packages.core.tests.models.families import ROWS as FAMILIES
from packages.core.tests.models.tiny import (
    eager_logits,
    eager_runner,
    error,
    load,
    some_tokens,
    step_logits,
    their_logits,
    write_tiny,
)

ROWS: dict[str, dict[str, Any]] = {
    "arcee": {},
    "gpt_neox": {},  # fused q, k and v; LayerNorm; a part of a head is rotated
    "gemma2": {"head_dim": 16, "sliding_window": 24},  # windows, soft caps, a scaled embedding that is the head
    "mixtral": {"num_local_experts": 4},  # experts, which are stored one by one and run as one tensor
    "cwm": {"sliding_window": 24},
    "nemotron": {"head_dim": 16},
}
"""Architectures of the common run, each with its config beside `SMALL`."""

PAGED = [
    "afmoe",
    "apertus",
    "aria_text",
    "bert",
    "bitnet",
    "camembert",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "ctrl",
    "deepseek_v2",
    "deepseek_v3",
    "electra",
    "ernie",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "exaone_moe",
    "flex_olmo",
    "flint",
    "fuyu",
    "gemma",
    "gemma3_text",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt-sw3",
    "gpt2",
    "gpt_bigcode",
    "gpt_oss",
    "granite",
    "granite_swa",
    "granitemoe",
    "granitemoe_swa",
    "granitemoeshared",
    "helium",
    "hrm_text",
    "hy_v3",
    "hyperclovax",
    "internlm3",
    "iquestcoder",
    "jais2",
    "kolibri1",
    "laguna",
    "llama",
    "mellum",
    "mimo_v2_flash",
    "minimax_m2",
    "ministral",
    "ministral3",
    "modernbert-decoder",
    "mistral",
    "nanochat",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "solar_open",
    "starcoder2",
    "vaultgemma",
]
"""Types beside those whose keys and values are in this engine's pages."""

ALONE = ["bloom", "mamba"]
MORE_ALONE = [
    "biogpt",
    "doge",
    "falcon",
    "falcon_mamba",
    "git",
    "gpt_neo",
    "gptj",
    "jetmoe",
    "lfm2",
    "llama4_text",
    "megatron-bert",
    "mpt",
    "olmo_hybrid",
]
"""Types that run one sequence at a time."""

_ENCODERS = {"is_decoder": True, "pad_token_id": 257}  # positions count no padding tokens, which prompts have none of
_OWN: dict[str, dict[str, Any]] = dict.fromkeys(("bert", "camembert", "electra", "ernie", "megatron-bert"), _ENCODERS)
_SIZES: dict[str, Any] = {
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(
        ["num_experts_per_tok", "moe_topk", "moe_k", "num_layers", "n_layer", "decoder_layers", "encoder_layers"], 2
    ),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 32),
    **dict.fromkeys(
        ["head_dim", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "mamba_d_state", "state_size"], 16
    ),
    **dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "num_shared_experts"], 1),
    **dict.fromkeys(["ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"], 96),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads", "n_head"], 4),
    "qk_rope_head_dim": 8,
    "sliding_window": 24,
}
"""Sizes by the names that some config has for them."""


def _config(name: str) -> dict[str, Any]:
    """What a tiny model of a type is made with beside `SMALL`."""
    row = next((row.config for row in FAMILIES.values() if row.model_type == name), None)
    if name in ROWS or row is not None:
        return ROWS[name] if row is None else dict(row)
    usual = CONFIG_MAPPING[name]()
    known = {*vars(usual), *usual.attribute_map}
    sizes = {key: size for key, size in _SIZES.items() if key in known and getattr(usual, key, None) is not None}
    return sizes | _OWN.get(name, {})


def _settings(**more: Any) -> dict[str, Any]:
    return {"device": "cpu", "threads": 1, "block_size": 16, "kv_cache_memory": 1 << 24, **more}


@pytest.mark.parametrize("name", [*ROWS, *(pytest.param(each, marks=pytest.mark.every_case) for each in PAGED)])
def test_logits_and_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    folder, tokens = write_tiny(tmp_path, name, **_config(name)), some_tokens()
    theirs = their_logits(folder, tokens)
    for chunks in ([70], [17, 33, 1, 1, 18]):
        assert error(eager_logits(folder, tokens, chunks, model_impl="transformers"), theirs) < 1e-5, chunks
    prompts = [tokens[:length] for length in (7, 40, 18, 29)]
    with InferenceEngine(str(folder), **_settings(model_impl="transformers", enable_prefix_caching=False)) as engine:
        assert engine.model_info.implementation == "transformers"
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        together = [list(each.outputs[0].token_ids) for each in engine.generate(prompts, params, use_tqdm=False)]
        alone = [list(engine.generate([each], params, use_tqdm=False)[0].outputs[0].token_ids) for each in prompts]
    assert together == alone
    assert together[1][0] == int(theirs[39].argmax())


@pytest.mark.parametrize("name", [*ALONE, *(pytest.param(each, marks=pytest.mark.every_case) for each in MORE_ALONE)])
def test_a_cache_of_its_own_runs_one_sequence_at_a_time(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, tokens = write_tiny(tmp_path, name, **_config(name)), some_tokens()
    theirs = their_logits(folder, tokens)
    loaded = load(folder, model_impl="transformers")
    runner = eager_runner(loaded, 5)
    assert error(step_logits(runner, tokens, [40] + [1] * 30), theirs) < 1e-5
    assert error(step_logits(runner, tokens, [70]), theirs) < 1e-5, "the next sequence begins anew"
    prompts = [tokens[:length] for length in (7, 40, 18)]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with InferenceEngine(str(folder), **_settings(model_impl="transformers")) as engine:
        info = engine.model_info
        assert (info.implementation, info.max_num_seqs) == ("transformers, one sequence at a time", 1)
        together = [list(each.outputs[0].token_ids) for each in engine.generate(prompts, params, use_tqdm=False)]
        again = [list(engine.generate([each], params, use_tqdm=False)[0].outputs[0].token_ids) for each in prompts]
    assert together == again
    assert together[1][0] == int(theirs[39].argmax())
    assert "one sequence at a time" in caplog.text
    with pytest.raises(ConfigError, match="drafted"):
        InferenceEngine(str(folder), **_settings(model_impl="transformers", speculative_config={"method": "ngram"}))


def test_weights_are_quantised_as_they_are_loaded(tmp_path: Path) -> None:
    folder, tokens = write_tiny(tmp_path, "arcee"), some_tokens()
    plain = eager_logits(folder, tokens, [70], model_impl="transformers")
    loaded = load(folder, model_impl="transformers", isq="q8_0")
    found = error(step_logits(eager_runner(loaded, 5), tokens, [70]), plain)
    assert 1e-4 < found < 0.05


def test_native_layers_come_first(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "llama")
    assert load(folder, enforce_eager=True).config.implementation == "native"
    assert load(folder, model_impl="transformers").config.implementation == "transformers"
    tokens = some_tokens()
    ours, other = (eager_logits(folder, tokens, [70], model_impl=each) for each in ("native", "transformers"))
    assert error(other, ours) < 1e-5


def test_unknown_architectures_name_the_way(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "arcee")
    with mock.patch.object(registry, "_has_transformers", return_value=False):
        with pytest.raises(UnsupportedModelError, match=r"ArceeForCausalLM.*pip install 'candle-vllm\[transformers\]'"):
            load(folder)
        with pytest.raises(ConfigError, match=r"pip install 'candle-vllm\[transformers\]'"):
            load(folder, model_impl="transformers")
    assert load(folder).config.implementation == "transformers"
    with pytest.raises(UnsupportedModelError, match="ArceeForCausalLM"):
        load(folder, model_impl="native")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "nobody", "auto_map": {"AutoModelForCausalLM": "x.Y"}}, "code beside the weights is never run"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers is"),
        ({"model_type": "t5"}, "is no decoder"),
        ({"model_type": "bert", "is_decoder": False}, "sees the tokens behind its own"),
        ({"model_type": "rembert", "is_decoder": False}, "is_decoder false"),
    ],
)
def test_what_cannot_run_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "arcee")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(Exception, match=message):
        load(folder, model_impl="transformers")


def test_ranks_are_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "arcee")
    settings = EngineConfig(model=str(folder), model_impl="transformers", tensor_parallel_size=2, enforce_eager=True)
    from candle_vllm.core.assembly.model import fit_settings

    with pytest.raises(ConfigError, match="not divided among ranks"):
        fit_settings(settings, load(folder, model_impl="transformers").config)
