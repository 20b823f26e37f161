# SPDX-License-Identifier: MIT
"""GLM-5.3-Flash: every cut against transformers, groups of positions in the engine's cache, published configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from candle_vllm.core import (
    ConfigError,
    EngineConfig,
    InferenceEngine,
    InvalidFileError,
    SamplingParams,
    UnsupportedModelError,
)
from candle_vllm.core.memory import Room, plan_cache
from candle_vllm.core.models import eagle3, glm5_next
from candle_vllm.core.models.registry import family_from_hf
from candle_vllm.core.models.towers import text_fields
from packages.core.tests.models.gguf_export import export_gguf
from packages.core.tests.models.rows import answers_twice, require_no_stages, require_other_logits, write_row
from packages.core.tests.models.test_sparse_index import changed
from packages.core.tests.models.tiny import (
    LENGTH,
    eager_logits,
    error,
    load,
    recorded_logits,
    some_tokens,
    spread,
    their_logits,
)
from tests.common_run import few

NAMES = ["GLM-5.3-Flash", "GLM-5.3-Flash pools"]
LINEAR = {"gate_lower_bound": -5.0, "head_dim": 128, "num_heads": 64, "safe_gate": True, "short_conv_kernel_size": 4}
TEXT: dict[str, Any] = {
    "model_type": "glm5_next_text",
    "head_dim": 192,
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_kpool": 4,
    "index_kpool_always_select_tail": True,
    "index_n_heads": 32,
    "index_topk": 2048,
    "intermediate_size": 12288,
    "kv_lora_rank": 512,
    "linear_attn_config": LINEAR,
    "max_position_embeddings": 1048576,
    "mhc": True,
    "mla_use_nope": True,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 288,
    "n_shared_experts": 1,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 45,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 256,
    "qk_rope_head_dim": 0,
    "rms_norm_eps": 1e-05,
    "routed_scaling_factor": 2.5,
    "swiglu_limit": 10.0,
    "v_head_dim": 256,
    "vocab_size": 154880,
}  # the sizes of transformers' and llama.cpp's defaults
PUBLISHED: dict[str, Any] = {
    "architectures": ["Glm5NextForConditionalGeneration"],
    "model_type": "glm5_next",
    "text_config": TEXT,
    "vision_config": {"model_type": "glm5_next_vision"},
}


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_row(tmp_path_factory.mktemp("model"), request.param)


# ---- logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.one_of_each(4)
@pytest.mark.parametrize("cut", few(range(1, LENGTH), 1, 26, 27, 28, LENGTH - 1))
def test_every_cut_of_the_prompt(cut: int, folder: Path) -> None:
    """In front of, within and behind the first group that is not chosen; compiled, the same bits."""
    tokens = some_tokens()
    ours = eager_logits(folder, tokens, [cut, LENGTH - cut])
    assert spread(ours, their_logits(folder, tokens)) < 1e-5
    whole = recorded_logits(folder, tokens, [LENGTH])
    assert torch.equal(recorded_logits(folder, tokens, [cut, LENGTH - cut]), whole)


@pytest.mark.one_of_each(4)
@pytest.mark.parametrize(
    ("keys", "least"),
    [
        ({"index_topk": 64}, 1e-3),
        ({"index_topk": 32, "index_kpool": 16}, 1e-3),
        ({"linear_lower_bound": None}, 1e-3),
        ({"linear_lower_bound": -1.0}, 1e-3),
        ({"hc_sinkhorn_iters": 1}, 1e-4),
        ({"hc_eps": 1e-2}, 1e-4),
        ({"rms_norm_eps": 1e-2}, 1e-4),
        ({"routed_scaling_factor": 1.0}, 1e-3),
        ({"norm_topk_prob": False}, 1e-3),
        ({"attention_bias": True}, 1e-3),
        ({"linear_conv_kernel_dim": 2}, 1e-3),
    ],
    ids=str,
)
def test_keys_that_change_the_logits(keys: dict[str, Any], least: float, tmp_path: Path) -> None:
    require_other_logits(NAMES[0], keys, least, tmp_path, some_tokens(), [LENGTH])


# ---- the cache, and the engine ---------------------------------------------------------------------------------------


def test_keys_and_gates_stand_beside_latent_rows(tmp_path: Path) -> None:
    config: Any = load(write_row(tmp_path, NAMES[0]), op_by_op=True).config
    plan = plan_cache(EngineConfig(model="m", block_size=16), config, lambda _: 2, 4, Room(1 << 30, 0.5))
    assert plan.block_bytes == 16 * 2 * (32 + 2 * 32)
    assert (config.index_top, config.index_pool, config.shared_choices) == (27, 4, [])


def test_what_is_around_a_sequence_changes_nothing(folder: Path) -> None:
    """Batches, chunks that end within a group, prefixes, preemption, several answers, drafts that are rejected."""
    prompts = [[(7 * i + n) % 256 for i in range(3 + 33 * n)] for n in range(6)]
    params = SamplingParams(
        temperature=0.0, max_tokens=30, ignore_eos=True, logprobs=1, n=2, allowed_token_ids=[*range(6)]
    )
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2}

    def run(**settings: Any) -> tuple[list[Any], Any]:
        return answers_twice(folder, prompts, params, **settings)

    alone, _ = run(enable_prefix_caching=False, max_num_seqs=1, speculative_config=None)
    few_blocks = {"kv_cache_memory": 544 << 10, "state_cache_gb": 2e-4, "max_model_len": 256}
    small, stats = run(max_num_batched_tokens=45, max_num_seqs=4, **few_blocks)
    assert small == alone
    assert stats.preemptions > 0
    drafted, stats = run(speculative_config=ngram, max_num_batched_tokens=45, max_num_seqs=4)
    assert drafted == alone
    assert 0 < stats.accepted_draft_tokens < stats.draft_tokens
    assert stats.cached_prompt_tokens > 0


def test_a_block_has_whole_groups(folder: Path) -> None:
    for size in (8, 4, 2):
        pool = 16 if "pools" in str(folder) or load(folder).config.index_pool == 16 else 4
        if size % pool:
            with pytest.raises(ConfigError, match=f"pools the index keys of {pool} tokens, .* block_size to {pool}"):
                InferenceEngine(str(folder), block_size=size, device="cpu")


# ---- configs ---------------------------------------------------------------------------------------------------------


def read(**changes: Any) -> Any:
    said = PUBLISHED | {"text_config": TEXT | changes}
    architecture, fields = text_fields(PUBLISHED["architectures"][0], said, Path("config.json"))
    assert architecture == "Glm5NextForCausalLM"
    return glm5_next.config_from_hf(fields, "glm5_next_text")


def test_a_published_description() -> None:
    config = read()
    assert [n for n in range(45) if n not in config.delta_layers] == [*range(3, 45, 4)]
    assert config.index_layers == frozenset(range(3, 45, 4))
    assert (config.delta.heads, config.delta.key_dim, config.delta.taps, config.decay_bound) == (64, 128, 4, -5.0)
    assert (config.latent.nope, config.latent.rope, config.latent.latent, config.latent.value) == (256, 0, 512, 256)
    assert (config.index.heads, config.index.nope, config.index.latent, config.index_top) == (32, 128, 256, 2051)
    assert (config.dense_layers, config.extra_layers, config.mixture.experts) == (3, 1, 288)
    assert (config.mixture.activation, config.mixture.shared_activation) == ("silu_10", "silu_10")
    assert (config.streams.count, config.streams.rounds, config.latent_eps) == (4, 20, 1e-5)
    plain = {"linear_attn_config": None, "linear_num_heads": 8, "linear_head_dim": 64, "linear_conv_kernel_dim": 3}
    other = read(**plain, linear_lower_bound=None)
    assert (other.delta.heads, other.delta.key_dim, other.delta.taps, other.decay_bound) == (8, 64, 3, 0.0)
    for safe, bound in ((True, -5.0), (False, 0.0)):
        assert read(linear_attn_config=LINEAR | {"gate_lower_bound": None, "safe_gate": safe}).decay_bound == bound
    shared = ["full"] * 7 + ["shared"] * 38
    assert read(indexer_types=shared).shared_choices == [*range(7, 45, 4)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mla_use_nope": False}, "mla_use_nope is False; implemented: True"),
        ({"mhc": False}, "mhc is False; implemented: True"),
        ({"qk_rope_head_dim": 64}, "qk_rope_head_dim is 64; implemented: 0"),
        ({"swiglu_limit": 7.0}, "swiglu_limit is 7.0; implemented: 10.0"),
        ({"index_kpool_always_select_tail": False}, "index_kpool_always_select_tail is False; implemented: True"),
        ({"index_kpool": 32}, "index keys pooled by 32 are not implemented"),
        ({"index_kpool": 1}, "index keys pooled by 1 are not implemented"),
        ({"index_topk": 2050}, "index_topk 2050 is not a multiple of index_kpool 4"),
        ({"index_topk": 2}, "index_topk 2 is not a multiple of index_kpool 4"),
        ({"indexer_types": ["full", "full", "full", "shared"] + ["full"] * 41}, "latent attention, 3, has no indexer"),
        ({"indexer_types": ["full"]}, "indexer types are given for 1 of 45 layers"),
        ({"layer_types": ["sliding_attention"] * 45}, "layer_types must name"),
        ({"layer_types": ["linear_attention"]}, "layer_types must name"),
        ({"hc_mult": 1}, "1 residual streams, .* 2 to 16"),
        ({"hc_mult": 17}, "hc_mult is 17; it must be 1 to 16"),
        ({"hc_sinkhorn_iters": 101}, "hc_sinkhorn_iters is 101; it must be 1 to 100"),
        ({"hc_eps": 1.0}, "epsilon between 0 and 1"),
        ({"linear_attn_config": {"num_heads": 1, "head_dim": 8, "short_conv_kernel_size": 17}}, "it must be 1 to 16"),
        ({"linear_attn_config": None, "linear_lower_bound": 1.0, **dict.fromkeys(("linear_num_heads", "linear_head_dim",
          "linear_conv_kernel_dim"), 4)}, "lower bound of decays is 1.0"),
        ({"linear_attn_config": LINEAR | {"gate_lower_bound": 0.0}}, "lower bound of decays is 0.0"),
        ({"qk_nope_head_dim": 2}, "qk_nope_head_dim is 2, not above 2"),
        ({"qk_nope_head_dim": 2048}, "qk_nope_head_dim is 2048; it must be 1 to 1024"),
        ({"q_lora_rank": None}, "without q_lora_rank is not implemented"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'; implemented: sigmoid"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; implemented: silu"),
        ({"mlp_layer_types": ["sparse", "dense"] + ["sparse"] * 43}, "mlp_layer_types must have one entry"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((UnsupportedModelError, InvalidFileError), match=message):
        read(**changes)


def test_a_flat_config_is_text() -> None:
    """As published text models have it, beside no `text_config`."""
    flat = TEXT | {"architectures": PUBLISHED["architectures"], "model_type": "glm5_next"}
    _, fields = text_fields("Glm5NextForConditionalGeneration", flat, Path("config.json"))
    assert glm5_next.config_from_hf(fields, "glm5_next_text") == read()
    family, _ = family_from_hf(TEXT | {"architectures": ["Glm5NextForCausalLM"]}, Path("c"))
    assert family is glm5_next.FAMILY


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("swiglu_limit", 7.0, "swiglu_clamp_exp is 7.0; implemented: 10.0"),
        ("index_kpool_always_select_tail", False, "kpool_select_tail is False; implemented: True"),
        ("index_kpool", 3, "pooled by 3 are not implemented"),
        ("linear_lower_bound", 0.0, "lower bound of decays is 0.0"),
        ("indexer_types", ["full"], "indexer types are given for 1 of 2 layers"),
    ],
)
def test_gguf_files_that_are_refused(key: str, value: Any, message: str, tmp_path: Path) -> None:
    folder = changed(write_row(tmp_path / "m", NAMES[0]), tmp_path / "other", **{key: value})
    with pytest.raises((UnsupportedModelError, InvalidFileError), match=message):
        load(export_gguf(folder, tmp_path / "m.gguf", "glm5-next"))


def test_indexers_that_are_not_used_are_left_out(tmp_path: Path) -> None:
    """Those of layers with the choice of an earlier layer, which files may have."""
    tokens = some_tokens()
    whole = write_row(tmp_path / "m", NAMES[0], layer_types=["indexed_attention"] * 2)
    folder = changed(whole, tmp_path / "shared", indexer_types=["full", "shared"])
    found = eager_logits(folder, tokens, [LENGTH])
    stored = export_gguf(folder, tmp_path / "m.gguf", "glm5-next")
    assert error(eager_logits(stored, tokens, [LENGTH]), found) < 1e-5


def test_stages_are_refused(tmp_path: Path) -> None:
    require_no_stages(tmp_path, NAMES[0], glm5_next.FAMILY)


def test_a_head_cannot_read_several_streams() -> None:
    with pytest.raises(UnsupportedModelError, match="EAGLE-3 head of a model with several residual streams"):
        eagle3._fitted({}, read())


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """They are not loaded, and drafts by them are refused by name."""
    from safetensors.torch import load_file, save_file

    tokens = some_tokens(20)
    usual = write_row(tmp_path / "m", NAMES[0])
    folder = changed(usual, tmp_path / "more", num_nextn_predict_layers=1)
    weights = load_file(folder / "model.safetensors")
    weights |= {f"model.layers.2.{name}.weight": torch.ones(8, 8) for name in ("eh_proj", "self_attn.q_a_proj")}
    save_file(weights, folder / "model.safetensors")
    assert error(eager_logits(folder, tokens, [20]), eager_logits(usual, tokens, [20])) == 0
    with pytest.raises(UnsupportedModelError, match="layers of glm5_next_text are not implemented"):
        InferenceEngine(str(folder), speculative_config={"method": "mtp"}, device="cpu")
