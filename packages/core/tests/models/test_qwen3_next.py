# SPDX-License-Identifier: MIT
"""Qwen3-Next, Qwen3.5, OLMo Hybrid, Jamba and Falcon Mamba beyond every family's tests: cuts, engines, adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from candle_vllm.core.errors import InvalidFileError, ModelLoadError, UnsupportedModelError
from candle_vllm.core.loading.cache_specs import PagedSpec, StatePart, StateSpec
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import ColumnOrder, constant
from candle_vllm.core.models.registry import family_from_gguf, family_from_hf
from packages.core.tests.engine.test_adapter_steps import TEXTS, Served, apart, random_adapter
from packages.core.tests.exact_sums import exact_sums
from packages.core.tests.models.families import OLMO_HYBRID, QWEN3_NEXT, QWEN35, QWEN_MOE, ROWS
from packages.core.tests.models.gguf_export import export_gguf
from packages.core.tests.models.test_state_layers import alone, ask, engine, on_device, prompts, settings_of
from packages.core.tests.models.tiny import (
    SMALL,
    config_of,
    device_logits,
    eager_logits,
    error,
    load,
    recorded_logits,
    some_tokens,
    spread,
    their_logits,
    typical_spread,
    write_tiny,
)
from tests.common_run import few

NAMES = ["Qwen3.5", "Qwen3.5 even heads", "Qwen3.5-MoE", "Qwen3-Next", "Qwen3-Next sparse steps"]
NAMES += ["OLMo Hybrid turned", "Jamba", "Falcon Mamba"]
KINDS = [(name, kind) for name in NAMES for kind in ("eager", "compiled")]
CUTS = [[1, 2, 3, 4, 10, 19], list(range(1, 20))]  # around the tails of convolutions, and anywhere
DRAFTS = {"speculative_config": {"method": "suffix", "num_speculative_tokens": 5}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in made:
            made[name] = write_tiny(tmp_path_factory.mktemp("qwen"), ROWS[name].model_type, **ROWS[name].config)
        return made[name]

    return write


# ---- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.one_of_each(2)
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
    [
        ("Qwen3.5", {"max_num_batched_tokens": 20}),
        ("Qwen3.5 even heads", DRAFTS),
        ("Qwen3.5-MoE", DRAFTS),
        ("Qwen3-Next", {}),
        ("OLMo Hybrid", DRAFTS),
        ("Jamba", DRAFTS),
        ("Falcon Mamba", DRAFTS),
    ],
    ids=["chunks", "drafts", "experts, drafts", "experts", "norms behind, drafts", "Mamba 1, drafts", "without pages"],
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


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("name", "more"),
    few(
        [
            ("Qwen3.5", {"drafts": 12}),
            ("Qwen3.5 even heads", {"captured": 40}),
            ("Qwen3.5-MoE", {"blocks": 14}),
            ("Jamba", {"drafts": 12}),
            ("Jamba", {"blocks": 14}),
            ("Falcon Mamba", {"drafts": 12}),
        ],
        ("Qwen3.5-MoE", {"blocks": 14}),
    ),
)
def test_the_runner_of_a_gpu_gives_the_same(name: str, more: dict[str, Any], folder: Callable[[str], Path]) -> None:
    given = prompts()
    with exact_sums():
        expected = alone(folder(name), given, **settings_of("eager"))
        found, built = on_device(folder(name), given, **more)
    assert found == expected
    counts = built.stats()
    assert bool(counts.accepted_draft_tokens) == ("drafts" in more)
    assert bool(counts.preemptions) == ("blocks" in more)


@pytest.mark.one_of_each(3)
@pytest.mark.parametrize(("name", "kind"), few(KINDS, *KINDS[::4], *KINDS[3::4]))
def test_adapters_are_as_merged_weights(name: str, kind: str, folder: Callable[[str], Path]) -> None:
    """On every product: projections of delta nets and attention, feed-forward layers, routers and experts."""
    settings = settings_of(kind)
    near = 1e-4 if kind == "eager" else 5e-3  # a cache in bfloat16 rounds what is near otherwise
    with Served(folder(name), **settings) as ours:
        net = "layers.1.attention" if name.startswith("OLMo") else "layers.0.attention"
        assert {f"{net}.inputs", f"{net}.result"} <= ours.places.keys()
        adapter = random_adapter(ours, 1, 8, size=0.1)
        found = ours.logits(TEXTS, [((ours.pack(adapter), 1.0),), (), ((ours.pack(adapter), 0.5),)], start=2)
    for text, weight, logits in zip(TEXTS, (1.0, None, 0.5), found, strict=True):
        with Served(folder(name), [] if weight is None else [(adapter, weight)], **settings) as merged:
            assert apart(logits, merged.logits([text], [()], start=2)[0]) < near


# ---- what files hold -------------------------------------------------------------------------------------------------


def test_layers_for_further_tokens_are_left_where_they_are(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """By the names of published checkpoints; where they are asked for, what is missing is named."""
    source, tokens = folder("Qwen3.5"), some_tokens(12)
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    more = {"mtp.fc.weight": torch.ones(64, 128), "mtp.layers.0.self_attn.q_proj.weight": torch.ones(256, 64)}
    save_file(load_file(source / "model.safetensors") | more, tmp_path / "model.safetensors")
    assert torch.equal(eager_logits(tmp_path, tokens, [12]), eager_logits(source, tokens, [12]))
    with pytest.raises(ModelLoadError, match=r"speculative_config: .*missing tensors .*mtp\."):
        engine(tmp_path, speculative_config={"method": "mtp"})


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_value_heads_of_quantised_files_are_read_in_order(kind: str, tmp_path: Path) -> None:
    """Of 48 elements, so that blocks of 32 have parts of two: bytes stay, and inputs are brought to their order."""
    tokens, sizes = some_tokens(24), {"linear_num_value_heads": 16, "linear_value_head_dim": 48}
    source = write_tiny(tmp_path / "m", "qwen3_5_text", **QWEN35 | sizes)
    path = export_gguf(source, tmp_path / "m.gguf", "qwen35", quantization=kind)
    decoded = eager_logits(path, tokens, [24])
    assert typical_spread(decoded, eager_logits(source, tokens, [24])) < (0.05 if kind == "Q8_0" else 0.5)
    assert error(device_logits(path, tokens, [24]), decoded) < 1e-5
    assert typical_spread(recorded_logits(path, tokens, [24]), decoded) < 0.05


def test_kernels_of_queries_keys_and_values_of_several_sizes(tmp_path: Path) -> None:
    """As published files of OLMo Hybrid have them; transformers writes thirds of all."""
    sizes = {"linear_num_key_heads": 2, "linear_value_head_dim": 48}
    source = write_tiny(tmp_path, "olmo_hybrid", **ROWS["OLMo Hybrid"].config | sizes)
    weights = load_file(source / "model.safetensors")
    names = [f"model.layers.0.linear_attn.{part}_conv1d.weight" for part in "qkv"]
    kernels = torch.cat([weights[name] for name in names]).split([64, 64, 192])
    save_file(weights | dict(zip(names, (part.contiguous() for part in kernels))), source / "model.safetensors")
    tokens = some_tokens(24)
    assert spread(eager_logits(source, tokens, [24]), their_logits(source, tokens)) < 1e-5


def test_an_order_of_columns_and_back() -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 12)
    view, order = ColumnOrder(lambda config: config), np.random.default_rng(0).permutation(12)
    stored = constant("w", values, Path("m"))
    assert view(stored, np.arange(12)) is stored
    seen = view(stored, order)
    assert np.array_equal(seen.load()[:, order], values)
    assert np.array_equal(view.undone(seen, order).load(), values)


def test_the_text_tower_of_a_checkpoint_with_a_tower_is_served_alone(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source, tokens = folder("Qwen3.5"), some_tokens(12)
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(source / "model.safetensors")
    named = {name.replace("model.", "model.language_model.", 1): weight for name, weight in weights.items()}
    save_file(named | {"model.visual.blocks.0.norm1.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    whole = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5"}
    whole |= {"text_config": config_of(source), "vision_config": {"model_type": "qwen3_5"}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert load(tmp_path).tower is None
    assert torch.equal(eager_logits(tmp_path, tokens, [12]), eager_logits(source, tokens, [12]))


# ---- what files say --------------------------------------------------------------------------------------------------


def from_hf(name: str = "Qwen3_5ForCausalLM", **changes: Any) -> Any:
    values = {**SMALL, **QWEN35, "rms_norm_eps": 1e-6, "linear_conv_kernel_dim": 4, "architectures": [name]}
    given = {key: value for key, value in (values | changes).items() if value != "absent"}
    return family_from_hf(given, Path("c.json"))[1]


def test_layers_and_what_they_keep() -> None:
    config = from_hf(num_hidden_layers=6, layer_types=None)
    assert config.delta_layers == {0, 1, 2, 4, 5}
    assert from_hf(num_hidden_layers=6, layer_types=None, full_attention_interval=2).delta_layers == {0, 2, 4}
    channels, heads = 2 * 64 + 6 * 32, 6
    state = StatePart((heads, 2, 32, 16), 2 * 32 + heads * 34)
    assert config.cache_specs[0] == StateSpec((StatePart((3, channels), channels, exact=False), state))
    assert config.cache_specs[3] == PagedSpec(2, 32, 32)


def test_a_quarter_of_a_head_turns_where_nothing_is_said() -> None:
    assert from_hf(rope_parameters={"rope_theta": 1e7}).rope.dim == 8
    assert from_hf(rope_parameters={"rope_theta": 1e7}, partial_rotary_factor=0.5).rope.dim == 16
    assert from_hf().rope.axes == (0, 1, 2, 0)
    assert from_hf().model_type == "qwen3_5"  # by which formats of tools are known


def test_no_position_where_the_base_is_null() -> None:
    values = {**SMALL, **OLMO_HYBRID, "rms_norm_eps": 1e-6, "architectures": ["OlmoHybridForCausalLM"]}
    for rope, rotates in (({"rope_theta": None}, False), ({"rope_theta": 1e4}, True), ({}, True), (None, True)):
        config = family_from_hf(values | {"rope_parameters": rope}, Path("c.json"))[1]
        assert getattr(config, "rotates") is rotates  # noqa: B009 (of this family alone)


def test_experts_stand_in_all_layers_or_by_steps() -> None:
    steps = {"decoder_sparse_step": 2, "mlp_only_layers": None, "rope_parameters": None}
    config = from_hf("Qwen3NextForCausalLM", **QWEN3_NEXT | QWEN_MOE | steps, norm_topk_prob=False)
    assert (config.sparse_layers, config.mixture.renormalise, config.mixture.shared_gate) == ({1}, False, True)
    config = from_hf("Qwen3_5MoeForCausalLM", **QWEN_MOE, intermediate_size="absent")
    assert (config.sparse_layers, config.mixture.renormalise) == ({0, 1}, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["linear_attention"]}, "layer_types must name"),
        ({"layer_types": ["linear_attention", "sliding_attention"]}, "layer_types must name"),
        ({"layer_types": None, "full_attention_interval": 0}, "full_attention_interval is 0"),
        ({"linear_num_value_heads": 5}, "5 linear-attention value heads cannot share 2"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1"),
        ({"linear_conv_kernel_dim": 17}, "linear_conv_kernel_dim is 17"),
        ({"linear_key_head_dim": "absent"}, "linear_key_head_dim is missing"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_a_wrong_config_is_refused_by_file_and_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        from_hf(**changes)


def from_gguf(**changes: Any) -> Any:
    sizes = {"context_length": 512, "embedding_length": 64, "block_count": 5, "feed_forward_length": 96}
    heads = {"attention.head_count": 4, "attention.head_count_kv": 2, "vocab_size": 300}
    delta = {"group_count": 2, "time_step_rank": 6, "state_size": 16, "inner_size": 192, "conv_kernel": 4}
    values: dict[str, Any] = {**sizes, **heads, "attention.layer_norm_rms_epsilon": 1e-6, "nextn_predict_layers": 1}
    values |= {f"ssm.{key}": value for key, value in delta.items()}
    metadata: dict[str, Any] = {f"qwen35.{key}": value for key, value in (values | changes).items()}
    metadata["general.architecture"] = "qwen35"
    return family_from_gguf(metadata, Checkpoint(Path("m.gguf"), "gguf", (), {}, metadata))[1]


def test_layers_of_a_gguf_file() -> None:
    assert from_gguf().delta_layers == {0, 1, 2}
    assert from_gguf(full_attention_interval=2).delta_layers == {0, 2}
    listed = [False, True, True, False, False]
    assert from_gguf(**{"attention.recurrent_layers": listed}).delta_layers == {1, 2}
    assert (from_gguf().num_layers, from_gguf().delta.value_dim) == (4, 32)
    axes = {"attention.key_length": 32, "rope.dimension_count": 8, "rope.dimension_sections": [2, 1, 1, 0]}
    assert from_gguf(**axes).rope.axes == (0, 1, 2, 0)  # in turns


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"attention.recurrent_layers": [True] * 4}, InvalidFileError, "recurrent_layers must"),
        ({"attention.recurrent_layers": [1, 0, "no", 0, 0]}, InvalidFileError, "recurrent_layers must"),
        ({"ssm.inner_size": 191}, InvalidFileError, "inner_size 191 is no multiple"),
        ({"ssm.time_step_rank": 0}, InvalidFileError, "time_step_rank is 0"),
        ({"ssm.conv_kernel": 1 << 20}, InvalidFileError, "conv_kernel is 1048576"),
        ({"rope.scaling.type": "longer", "rope.scaling.factor": 2.0}, UnsupportedModelError, "rope scaling"),
    ],
)
def test_wrong_metadata_is_refused(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        from_gguf(**changes)
