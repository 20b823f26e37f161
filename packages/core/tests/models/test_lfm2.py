# SPDX-License-Identifier: MIT
"""LFM2 beyond what is tested of every family: each cut of a prompt, its states in engines, adapters, wrong files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core.errors import InvalidFileError, ModelLoadError, UnsupportedModelError
from candle_vllm.core.loading.cache_specs import PagedSpec, StatePart, StateSpec
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models.registry import family_from_gguf, family_from_hf
from packages.core.tests.engine.test_adapter_steps import TEXTS, Served, apart, random_adapter
from packages.core.tests.exact_sums import exact_sums
from packages.core.tests.models.families import LFM2, ROWS
from packages.core.tests.models.published_configs import CONFIGS
from packages.core.tests.models.test_state_layers import alone, ask, engine, on_device, prompts, settings_of
from packages.core.tests.models.tiny import SMALL, eager_logits, some_tokens, spread, their_logits, write_tiny
from tests.common_run import few

NAMES = ["LFM2", "LFM2 biases", "LFM2-MoE"]
KINDS = [(name, kind) for name in NAMES for kind in ("eager", "compiled")]
CUTS = [[1, 2, 3, 4, 10, 19], list(range(1, 20))]  # around the tails of convolutions, and anywhere
DRAFTS = {"speculative_config": {"method": "suffix", "num_speculative_tokens": 5}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in made:
            made[name] = write_tiny(tmp_path_factory.mktemp("lfm2"), ROWS[name].model_type, **ROWS[name].config)
        return made[name]

    return write


# ---- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", few(CUTS, CUTS[0]), ids=["some", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_every_cut_gives_transformers_logits(name: str, cuts: list[int], folder: Callable[[str], Path]) -> None:
    tokens = some_tokens(20)
    theirs = their_logits(folder(name), tokens)
    for first in cuts:
        assert spread(eager_logits(folder(name), tokens, [first, 20 - first]), theirs) < 1e-5
    assert spread(eager_logits(folder(name), tokens, [1] * 20), theirs) < 1e-5


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("kind", ["eager", "compiled"])
@pytest.mark.parametrize(
    ("name", "more"),
    [("LFM2", {"max_num_batched_tokens": 20}), ("LFM2", DRAFTS), ("LFM2-MoE", {}), ("LFM2-MoE", DRAFTS)],
    ids=["chunks", "drafts", "experts", "experts, drafts"],
)
def test_no_answer_is_another(name: str, more: dict[str, Any], kind: str, folder: Callable[[str], Path]) -> None:
    given, how = prompts(), settings_of(kind)
    expected = alone(folder(name), given, **how)
    with engine(folder(name), **how, **more) as mixed:
        assert ask(mixed, given) == expected
        assert ask(mixed, given) == expected
        counts = mixed.stats()
    assert counts.cached_prompt_tokens
    assert counts.accepted_draft_tokens or more is not DRAFTS


@pytest.mark.parametrize(
    ("name", "more"), few([("LFM2", {"drafts": 12}), ("LFM2-MoE", {"captured": 40})], ("LFM2", {"drafts": 12}))
)
def test_the_runner_of_a_gpu_gives_the_same(name: str, more: dict[str, Any], folder: Callable[[str], Path]) -> None:
    given = prompts()
    with exact_sums():
        expected = alone(folder(name), given, **settings_of("eager"))
        found, built = on_device(folder(name), given, **more)
    assert found == expected
    assert bool(built.stats().accepted_draft_tokens) == ("drafts" in more)


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize(("name", "kind"), few(KINDS, *KINDS[::4], *KINDS[3::4]))
def test_adapters_are_as_merged_weights(name: str, kind: str, folder: Callable[[str], Path]) -> None:
    """On every product: convolutions' projections, attention, feed-forward layers, routers and experts."""
    settings = settings_of(kind)
    near = 1e-4 if kind == "eager" else 2e-3  # a cache in bfloat16 rounds what is near otherwise
    with Served(folder(name), **settings) as ours:
        assert {"layers.0.conv.inputs", "layers.0.conv.output"} <= ours.places.keys()
        adapter = random_adapter(ours, 1, 8, size=0.3)
        found = ours.logits(TEXTS, [((ours.pack(adapter), 1.0),), (), ((ours.pack(adapter), 0.5),)], start=2)
    for text, weight, logits in zip(TEXTS, (1.0, None, 0.5), found, strict=True):
        with Served(folder(name), [] if weight is None else [(adapter, weight)], **settings) as merged:
            assert apart(logits, merged.logits([text], [()], start=2)[0]) < near


# ---- what files say --------------------------------------------------------------------------------------------------


def from_hf(**changes: Any) -> Any:
    values = {**SMALL, **LFM2, "norm_eps": 1e-5, "architectures": ["Lfm2ForCausalLM"]}
    given = {key: value for key, value in (values | changes).items() if value != "absent"}
    return family_from_hf(given, Path("c.json"))[1]


def test_published_sizes() -> None:
    """Widths of feed-forward layers as llama.cpp tells models by them; a ring of two inputs, or keys and values."""
    found = {name: family_from_hf(CONFIGS[name], Path("c.json"))[1] for name in CONFIGS if name.startswith("LFM2")}
    widths = {name: config.intermediate_size for name, config in found.items()}
    assert widths == {"LFM2-1.2B": 8192, "LFM2.5-350M": 4608, "LFM2-8B-A1B": 7168}
    assert all(config.tie_embeddings and config.rope.theta == 1e6 for config in found.values())
    tail, pages = StateSpec((StatePart((2, 2048), 2048, exact=False),)), PagedSpec(8, 64, 64)
    attends = (2, 5, 8, 10, 12, 14)
    assert found["LFM2-1.2B"].cache_specs == tuple(pages if layer in attends else tail for layer in range(16))


def test_older_keys_win_and_defaults_are_transformers() -> None:
    assert from_hf(block_ff_dim=960, tie_embedding=False).intermediate_size == 640
    assert not from_hf(tie_embedding=False).tie_embeddings
    assert from_hf(block_auto_adjust_ff_dim=False).intermediate_size == 96
    assert from_hf(block_ffn_dim_multiplier=1.5).intermediate_size == 96
    assert from_hf(block_ffn_dim_multiplier=None, intermediate_size=100).intermediate_size == 66
    assert from_hf(layer_types="absent").conv_layers == frozenset()
    assert from_hf(layer_types=None, full_attn_idxs=[1]).conv_layers == {0, 2, 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["conv"] * 3}, "layer_types must name"),
        ({"layer_types": ["conv", "sliding_attention", "conv", "conv"]}, "layer_types must name"),
        ({"layer_types": None, "full_attn_idxs": [4]}, "full_attn_idxs is"),
        ({"layer_types": None, "full_attn_idxs": [True]}, "full_attn_idxs is"),
        ({"conv_L_cache": 0}, "conv_L_cache is 0"),
        ({"conv_L_cache": 17}, "conv_L_cache is 17"),
        ({"intermediate_size": "absent"}, "intermediate_size is missing"),
        ({"block_ffn_dim_multiplier": 1e300}, "block_ffn_dim_multiplier is"),
        ({"block_ffn_dim_multiplier": -1e308}, "block_ffn_dim_multiplier is"),
        ({"block_multiple_of": 0}, "block_multiple_of is 0"),
        ({"norm_eps": "absent"}, "norm_eps is missing"),
    ],
)
def test_a_wrong_config_is_refused_by_file_and_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=rf"c\.json: {message}"):
        from_hf(**changes)


def from_gguf(architecture: str = "lfm2", **changes: Any) -> Any:
    sizes = {"context_length": 512, "embedding_length": 64, "block_count": 3, "feed_forward_length": 96}
    heads = {"attention.head_count": 4, "attention.head_count_kv": [0, 2, 0], "vocab_size": 300}
    values: dict[str, Any] = sizes | heads | {"attention.layer_norm_rms_epsilon": 1e-5, "shortconv.l_cache": 3}
    metadata = {f"{architecture}.{key}": value for key, value in (values | changes).items()}
    metadata["general.architecture"] = architecture
    return family_from_gguf(metadata, Checkpoint(Path("m.gguf"), "gguf", (), {}, metadata))[1]


def test_layers_without_key_value_heads_have_convolutions() -> None:
    config = from_gguf()
    assert (config.conv_layers, config.num_kv_heads, config.taps) == ({0, 2}, 2, 3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"attention.head_count_kv": [0, 2, 4]}, UnsupportedModelError, "head_count_kv is"),
        ({"attention.head_count_kv": [0, 0, 0]}, UnsupportedModelError, "head_count_kv is"),
        ({"attention.head_count_kv": [0, 2, -1]}, UnsupportedModelError, "head_count_kv is"),
        ({"attention.head_count_kv": [0, 2, [2]]}, UnsupportedModelError, "head_count_kv is"),
        ({"attention.head_count_kv": [0, 2]}, InvalidFileError, "head_count_kv has 2 entries for 3 layers"),
        ({"attention.head_count_kv": 2}, InvalidFileError, "head_count_kv is 2, not a list"),
        ({"shortconv.l_cache": 1 << 20}, InvalidFileError, "l_cache is 1048576"),
        ({"expert_count": 4, "expert_gating_func": 1}, UnsupportedModelError, "expert_gating_func is 1"),
    ],
)
def test_wrong_metadata_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_gguf(**changes)
