# SPDX-License-Identifier: MIT
"""Families whose layers keep states alone, or pages and a state: caches, published descriptions, what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import GraniteMoeHybridConfig

from candle_vllm.core import EngineConfig, InferenceEngine, SamplingParams, UnsupportedModelError
from candle_vllm.core.errors import InvalidFileError, NoMemoryError
from candle_vllm.core.loading.cache_specs import PagedSpec, StateSpec, paged
from candle_vllm.core.memory import Room, plan_cache
from candle_vllm.core.models.registry import NOT_BUILT, family_from_hf
from packages.core.tests.models.families import FALCON_H1, ROWS
from packages.core.tests.models.models_page import PAGE
from packages.core.tests.models.tiny import BLOCK, eager_logits, load, some_tokens, write_tiny

CODESTRAL = {
    "architectures": ["Mamba2ForCausalLM"],
    "conv_kernel": 4,
    "eos_token_id": 0,
    "expand": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 8192,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mamba2",
    "n_groups": 8,
    "num_heads": 128,
    "num_hidden_layers": 64,
    "state_size": 128,
    "tie_word_embeddings": False,
    "time_step_limit": [0.0, float("inf")],
    "use_bias": False,
    "use_conv_bias": True,
    "vocab_size": 32768,
}
FALCON_MAMBA = {
    "architectures": ["FalconMambaForCausalLM"],
    "conv_kernel": 4,
    "eos_token_id": 11,
    "expand": 16,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 8192,
    "layer_norm_epsilon": 1e-05,
    "model_type": "falcon_mamba",
    "num_hidden_layers": 64,
    "state_size": 16,
    "tie_word_embeddings": False,
    "time_step_rank": 256,
    "use_bias": False,
    "use_conv_bias": True,
    "vocab_size": 65024,
}
JAMBA = {
    "architectures": ["JambaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "mamba_dt_rank": 256,
    "model_type": "jamba",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 65536,
}
KIMI = {
    "architectures": ["KimiLinearForCausalLM"],
    "first_k_dense_replace": 1,
    "head_dim": 72,
    "hidden_act": "silu",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "kv_lora_rank": 512,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "head_dim": 128,
        "kda_layers": [n for n in range(1, 27) if n % 4],
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "model_type": "kimi_linear",
    "moe_intermediate_size": 1024,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 32,
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_grouped_topk": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}


def read(config: dict[str, Any]) -> Any:
    return family_from_hf(config, Path("config.json"), impl="native")[1]


def test_published_descriptions() -> None:
    kimi = read(KIMI)
    assert [n + 1 for n in range(27) if n not in kimi.delta_layers] == KIMI["linear_attn_config"]["full_attn_layers"]
    assert (kimi.delta.heads, kimi.delta.key_dim, kimi.dense_layers, kimi.max_position) == (32, 128, 1, 1 << 20)
    assert (kimi.mixture.top_k, kimi.mixture.scale, kimi.mixture.shared_size) == (8, 2.446, 1024)
    assert (kimi.latent.nope, kimi.latent.rope, kimi.latent.value) == (128, 64, 128)
    codestral = read(CODESTRAL)
    assert (codestral.mamba.inner, codestral.mamba.groups, codestral.mamba_layers) == (8192, 8, frozenset(range(64)))
    assert codestral.max_position == 1 << 20
    falcon = read(FALCON_MAMBA)  # its `expand` is wrong: transformers prefers intermediate_size
    assert (falcon.mamba.inner, falcon.mamba.state, falcon.mamba.rank) == (8192, 16, 256)
    assert read(FALCON_MAMBA | {"intermediate_size": None, "expand": 2}).mamba.inner == 8192
    jamba = read(JAMBA)  # without what transformers has as default
    attended = [n for n in range(32) if n not in jamba.mamba_layers]
    assert (attended, sorted(jamba.sparse_layers), jamba.num_kv_heads) == ([4, 12, 20, 28], [*range(1, 32, 2)], 8)
    assert (jamba.mamba.inner, jamba.mamba.state, jamba.mixture.experts, jamba.mixture.top_k) == (8192, 16, 16, 2)
    assert read(JAMBA | {"num_key_value_heads": None}).num_kv_heads == 32


def test_granite_without_kinds_of_layers_has_mamba_in_all_as_in_transformers() -> None:
    theirs = GraniteMoeHybridConfig(num_hidden_layers=3, hidden_size=64, num_attention_heads=4, vocab_size=272)
    said = theirs.to_dict() | {"architectures": ["GraniteMoeHybridForCausalLM"], "layer_types": None}
    assert set(theirs.layer_types) == {"linear_attention"}
    assert read(said).mamba_layers == frozenset(range(3))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (KIMI | {"mla_use_nope": False}, "mla_use_nope is false"),
        (KIMI | {"layer_types": ["full_attention"]}, "must name full or linear attention per layer"),
        (CODESTRAL | {"time_step_limit": [0.0, 0.1]}, "time_step_limit is"),
        (JAMBA | {"attn_layer_offset": 8}, "attn_layer_offset is 8; it must be 0 to 7"),
        (JAMBA | {"hidden_act": "gelu"}, "hidden_act is 'gelu'; implemented: silu"),
    ],
)
def test_what_is_not_implemented(config: dict[str, Any], message: str) -> None:
    with pytest.raises((UnsupportedModelError, InvalidFileError), match=message):
        read(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projectors_bias": True}, "projectors_bias is not implemented"),
        ({"mlp_multipliers": [1.0]}, r"mlp_multipliers is \[1\.0\], not 2 number"),
        ({"key_multiplier": -1.0}, "key_multiplier is -1.0, not 1 number"),
        ({"mamba_d_ssm": 120, "mamba_n_heads": 8, "mamba_d_head": 15}, "16 must divide"),
    ],
)
def test_what_is_not_implemented_of_falcon_h1(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "falcon_h1", **FALCON_H1)
    config = load(folder).config
    kinds = [type(spec) for spec in config.cache_specs]
    assert kinds == [PagedSpec] * config.num_layers + [StateSpec] * config.num_layers
    described = json.loads((folder / "config.json").read_text())
    with pytest.raises((UnsupportedModelError, InvalidFileError), match=message):
        read(described | change)


def test_architectures_that_are_not_built_name_the_page() -> None:
    text = PAGE.read_text()
    assert [name for name in NOT_BUILT if f"`{name}`" not in text] == []
    with pytest.raises(UnsupportedModelError, match=r"docs/models\.md lists what is missing; implemented:"):
        read({"architectures": ["RWKV7ForCausalLM"]})


@pytest.mark.parametrize("name", ["Mamba 2", "Falcon Mamba"])
def test_a_model_without_pages(name: str, tmp_path: Path) -> None:
    """Blocks take no memory, and few of them exist however long a context may be; prefixes are found by states."""
    row = ROWS[name]
    folder, tokens = write_tiny(tmp_path, row.model_type, **row.config), some_tokens(40)
    model = load(folder)
    plan = plan_cache(EngineConfig(model=str(folder)), model.config, lambda _: 2, 64, Room(1 << 28, 0.4))
    assert (paged(model.config.cache_specs), plan.block_bytes, plan.max_model_len) == ([], 0, 1 << 20)
    assert plan.num_bytes == plan.states.num_bytes > 0
    assert plan.num_blocks == 1 << 17
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with InferenceEngine(str(folder), device="cpu", threads=1, block_size=BLOCK, kv_cache_memory=1 << 24) as engine:
        first, second = (engine.generate([tokens], greedy, use_tqdm=False)[0] for _ in range(2))
    expected = list(tokens)
    for _ in range(4):
        expected.append(int(eager_logits(folder, expected, [len(expected)])[-1].argmax()))
    assert list(first.outputs[0].token_ids) == list(second.outputs[0].token_ids) == expected[40:]
    assert second.num_cached_tokens == 32


def test_a_cut_context_counts_states(tmp_path: Path) -> None:
    """What all of the context takes includes the states of the sequences."""
    row = ROWS["Nemotron-H"]
    folder = write_tiny(tmp_path, row.model_type, **row.config)
    model, config = load(folder).config, EngineConfig(model=str(folder))
    cut = list[str]()
    for free in range(1 << 17, 1 << 20, 1 << 12):
        with contextlib.suppress(NoMemoryError):
            plan = plan_cache(config, model, lambda _: 2, 4, Room(free, 0.5))
            assert plan.states.num_bytes
            cut += [plan.warning] if plan.warning else []
    assert cut
    assert all(re.search(r"all of it takes [1-9]\d* MiB more than the", each) for each in cut), cut


@pytest.mark.parametrize("state_cache_gb", [None, 0.0, 0.001, 1.0])
@pytest.mark.parametrize("mib", [1, 2, 4])
def test_the_memory_for_a_context_counts_states(state_cache_gb: float | None, mib: int, tmp_path: Path) -> None:
    """The size of the cache that the error suggests is enough, however the memory for checkpoints is set."""
    folder = write_tiny(tmp_path, ROWS["Nemotron-H"].model_type, **ROWS["Nemotron-H"].config)
    model = dataclasses.replace(load(folder).config, max_position=1 << 16)
    settings: dict[str, Any] = {"max_model_len": 1 << 16, "state_cache_gb": state_cache_gb}
    with pytest.raises(NoMemoryError) as refused:
        plan_cache(
            EngineConfig(model="m", kv_cache_memory=mib << 20, **settings), model, lambda _: 2, 4, Room(1 << 30, 0.5)
        )
    (asked,) = re.findall(r"kv_cache_memory=(\d+) \(bytes\)", str(refused.value))
    config = EngineConfig(model="m", kv_cache_memory=int(asked), **settings)
    assert plan_cache(config, model, lambda _: 2, 4, Room(1 << 30, 0.5)).max_model_len == 1 << 16


def test_what_does_not_rotate_has_no_tables(tmp_path: Path) -> None:
    row = ROWS["Nemotron-H"]
    decoder: Any = load(write_tiny(tmp_path, row.model_type, **row.config)).decoder
    decoder.prepare(512)
    assert decoder.rotary._tables is None
