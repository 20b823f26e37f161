# SPDX-License-Identifier: MIT
"""Configs of Phi, StableLM, Command R and SmolLM3: as they are published, as old files leave keys out, and wrong."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from transformers import CONFIG_MAPPING

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError, WeightsError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.rope import attention_scale, inverse_frequencies
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models import granite, modernbert
from candle_vllm.core.models.llama import LlamaConfig
from candle_vllm.core.models.registry import HF_FAMILIES, family_from_gguf, family_from_hf
from packages.core.tests.models.dense_models import edited, folders, gguf_config
from packages.core.tests.models.families import PHI4_MINI, ROWS
from packages.core.tests.models.tiny import load, tiny_config, write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return folders(tmp_path_factory)


# ---- what old files leave out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "window"),
    [
        ({}, 2047),  # Phi-3-mini-4k from before files had the key
        ({"block_count": 40}, 2047),
        ({"context_length": 131072}, None),
        ({"block_count": 24}, None),
        ({"attention.sliding_window": 0}, None),  # Phi-4
        ({"attention.sliding_window": 512}, 512),
    ],
)
def test_the_window_of_old_phi3_files(numbers: dict[str, int], window: int | None, tmp_path: Path) -> None:
    assert set(gguf_config(tmp_path / "m.gguf", "phi3", {}, **numbers).sliding_windows) == {window}


def test_longropes_scale_where_a_file_has_none(tmp_path: Path) -> None:
    factors = {f"rope_factors_{kind}.weight": np.full(8, 2.0, np.float32) for kind in ("long", "short")}
    numbers = {"context_length": 131072, "rope.scaling.original_context_length": 4096}
    config = gguf_config(tmp_path / "m.gguf", "phi3", factors, **numbers)
    assert attention_scale(config.rope) == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


@pytest.mark.parametrize(("said", "dense"), [(-1, 0), (2, 2), (1 << 62, 4)])
def test_norths_number_of_dense_layers_is_limited(said: int, dense: int) -> None:
    """A number beyond the layers was counted up, and a negative one was an AssertionError."""
    config = tiny_config("cohere2_moe", **ROWS["North"].config).to_dict()
    keys = {"architectures": ["Cohere2MoeForCausalLM"], "layer_types": None, "mlp_layer_types": None}
    found: Any = family_from_hf(config | keys | {"first_k_dense_replace": said}, Path("config.json"))[1]
    assert found.sparse_layers == frozenset(range(dense, 4))


ABSENT = [
    ("Mistral", "sliding_window"),
    ("Ministral", "sliding_window"),
    ("OLMo 3", "sliding_window"),
    ("EXAONE 4 windows", "sliding_window"),
    ("Command R7B", "sliding_window"),
    ("Laguna", "sliding_window"),
    ("gpt-oss", "sliding_window"),
    ("QwQ", "max_window_layers"),
    ("Gemma-2", "attn_logit_softcapping"),
    ("Gemma-2", "final_logit_softcapping"),
    ("MiMo V2", "attention_value_scale"),
    ("DeepSeek-V3", "routed_scaling_factor"),
    ("DeepSeek-V3", "first_k_dense_replace"),
    ("DeepSeek-V3.2", "routed_scaling_factor"),
    ("GLM-5", "routed_scaling_factor"),
    ("GLM-4.7-Flash", "routed_scaling_factor"),
    ("Kimi Linear", "routed_scaling_factor"),
    *(("GLM-5.3-Flash", key) for key in ("routed_scaling_factor", "linear_lower_bound", "hc_sinkhorn_iters")),
    *(("Inkling", key) for key in ("d_rel", "rel_extent", "route_scale", "conv_kernel_size", "log_scaling_alpha")),
    *(("Inkling", key) for key in ("logits_mup_width_multiplier", "n_shared_experts")),
    *(("Inkling", key) for key in ("sliding_window_size", "swa_head_dim", "layer_types", "mlp_layer_types")),
    ("Hy3", "router_scaling_factor"),
    ("Llama-4", "rope_parameters"),
    ("gpt-oss", "rope_parameters"),
    ("Mixtral", "rope_parameters"),
    ("Phi-3.5-MoE", "rope_parameters"),
    ("MiniMax-M2", "rope_parameters"),
    ("Command R", "rope_parameters"),
    ("Nemotron-H", "head_dim"),
]


@pytest.mark.parametrize(("name", "key"), ABSENT)
def test_an_absent_key_has_the_default_of_transformers(name: str, key: str) -> None:
    row, more, absent = ROWS[name], dict[str, Any](), {key}
    if key == "max_window_layers":
        more, absent = {"use_sliding_window": True, "num_hidden_layers": 30}, {key, "layer_types"}
    whole = tiny_config(row.model_type, **{**row.config, **more}).to_dict()
    stored = {k: v for k, v in whole.items() if k not in absent}
    completed = CONFIG_MAPPING[row.model_type].from_dict(stored).to_dict()
    classes = [each for each in HF_FAMILIES if HF_FAMILIES[each].hf[each] == row.model_type]
    ours, theirs = (
        family_from_hf(values | {"architectures": classes[:1]}, Path("config.json"), impl="native")[1]
        for values in (stored, completed)
    )
    assert ours == theirs


@pytest.mark.parametrize("given", [{"rope_type": "default"}, None], ids=str)
@pytest.mark.parametrize(("name", "owner"), [("apertus", "ApertusForCausalLM"), ("gpt_oss", "GptOssForCausalLM")])
def test_rotary_settings_have_the_defaults_of_transformers(name: str, owner: str, given: dict[str, Any] | None) -> None:
    values = tiny_config(name).to_dict() | {"rope_parameters": given, "architectures": [owner]}
    completed = CONFIG_MAPPING[name].from_dict(copy.deepcopy(values)).to_dict()
    ours, theirs = (family_from_hf(each, Path("config.json"), impl="native")[1].rope for each in (values, completed))
    assert ours == theirs
    if name == "gpt_oss":
        seeing = {"architectures": ["InternVLForConditionalGeneration"], "text_config": values, "vision_config": {}}
        assert family_from_hf(seeing, Path("config.json"))[1].rope == theirs


def test_a_null_window_is_no_window() -> None:
    values = tiny_config("mistral", sliding_window=None).to_dict() | {"architectures": ["MistralForCausalLM"]}
    assert family_from_hf(values, Path("config.json"))[1].sliding_windows == (None, None)


def test_mistral_4_with_rotary_settings_of_before_transformers_5() -> None:
    row = ROWS["Mistral Small 4"]
    new = tiny_config(row.model_type, **row.config).to_dict() | {"architectures": ["Mistral4ForCausalLM"]}
    scaling = dict(new["rope_parameters"])
    old = new | {"rope_parameters": None, "rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    ours, theirs = (family_from_hf(values, Path("config.json"))[1] for values in (old, new))
    assert ours == theirs
    with pytest.raises(InvalidFileError, match="rope_parameters is missing"):
        family_from_hf(new | {"rope_parameters": None}, Path("config.json"))


YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 4e4}


@pytest.mark.parametrize(
    ("rope", "local"),
    [
        ({"rope_parameters": YARN}, ("default", 4e4)),
        ({"rope_scaling": YARN, "rope_theta": 4e4}, ("default", 4e4)),
        (
            {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            ("linear", 4e4),
        ),
    ],
)
def test_rotary_settings_of_olmo_3(rope: dict[str, Any], local: tuple[str, float]) -> None:
    row = ROWS["OLMo 3"]
    plain = tiny_config(row.model_type, **row.config).to_dict() | {"architectures": ["Olmo3ForCausalLM"]}
    config = family_from_hf(plain | {"rope_parameters": None} | rope, Path("config.json"))[1]
    assert (config.rope.kind, config.rope.theta, config.rope.factor) == ("yarn", 4e4, 8.0)
    assert isinstance(config, LlamaConfig)
    assert config.local_rope is not None
    assert (config.local_rope.kind, config.local_rope.theta) == local


@pytest.mark.parametrize(
    ("name", "owner"),
    [("Gemma-3", "Gemma3ForCausalLM"), ("Gemma-3n", "Gemma3nForCausalLM"), ("OLMo 3", "Olmo3ForCausalLM")],
)
def test_rope_scaling_beside_rope_parameters_stretches_layers_without_a_window(name: str, owner: str) -> None:
    row, added = ROWS[name], {key: value for key, value in YARN.items() if key != "rope_theta"}
    written = tiny_config(row.model_type, **row.config).to_dict()
    assert set(written["rope_parameters"]) >= {"full_attention", "sliding_attention"}
    values = written | {"rope_scaling": added, "architectures": [owner]}
    theirs = type(tiny_config(row.model_type, **row.config)).from_dict(copy.deepcopy(values)).rope_parameters
    config: Any = family_from_hf(values, Path("config.json"))[1]
    for kind, rope in (("full_attention", config.rope), ("sliding_attention", config.local_rope)):
        assert (rope.kind, rope.theta) == (theirs[kind]["rope_type"], theirs[kind]["rope_theta"])
    assert (config.rope.kind, config.rope.factor, config.rope.original_max_position) == ("yarn", 8.0, 64)


@pytest.mark.parametrize(("name", "owner"), [("MiMo V2", "MiMoV2FlashForCausalLM"), ("Gemma-4", "Gemma4ForCausalLM")])
def test_rotary_settings_that_are_no_kinds_of_layers_are_refused(name: str, owner: str) -> None:
    """Otherwise they would be ignored; transformers refuses them or cannot build the model."""
    row, said = ROWS[name], "rope_parameters is one for all layers, without full_attention"
    values = tiny_config(row.model_type, **row.config).to_dict() | {"rope_parameters": YARN}
    with pytest.raises(InvalidFileError, match=said):
        family_from_hf(values | {"architectures": [owner]}, Path("config.json"))
    encoder = Fields(CONFIG_MAPPING["modernbert"]().to_dict() | {"rope_parameters": YARN}, Path("config.json"))
    with pytest.raises(InvalidFileError, match=said):
        modernbert.config_from_hf(encoder, "modernbert", scores=False)


def test_rotary_settings_of_early_lagunas() -> None:
    """One for all layers, and others for layers with a window if the file has them."""
    row, share = ROWS["Laguna"], {"partial_rotary_factor": 0.5}
    plain = tiny_config(row.model_type, **row.config).to_dict() | {"architectures": ["LagunaForCausalLM"]}
    for own, local in (({}, ("yarn", 4e4, 16)), ({"swa_rope_parameters": {"rope_theta": 5e3}}, ("default", 5e3, 16))):
        config = family_from_hf(plain | share | {"rope_parameters": YARN} | own, Path("config.json"))[1]
        assert isinstance(config, LlamaConfig)
        assert (config.rope.kind, config.rope.theta, config.rope.dim) == ("yarn", 4e4, 16)
        assert config.local_rope is not None
        assert (config.local_rope.kind, config.local_rope.theta, config.local_rope.dim) == local


def test_a_scale_of_phi_moe_that_is_no_number_is_named() -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [1.0] * 16}
    plain = tiny_config("phimoe", **ROWS["Phi-3.5-MoE"].config).to_dict() | {"architectures": ["PhimoeForCausalLM"]}
    rope = {"rope_parameters": scaling | {"short_mscale": [1.2], "long_mscale": [1.2]}}
    with pytest.raises(InvalidFileError, match=r"attention_factor is \[1.2\], not a"):
        family_from_hf(plain | rope, Path("config.json"))


# ---- configs as they are published -----------------------------------------------------------------------------------

SIZES = {"vocab_size": 1000, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32}
PUBLISHED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Phi-3-mini-4k": (
        "Phi3ForCausalLM",
        {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
        | {"original_max_position_embeddings": 4096, "rope_scaling": None, "rope_theta": 10000.0}
        | {"sliding_window": 2047, "attention_bias": False, "tie_word_embeddings": False, "embd_pdrop": 0.0},
        {"head_dim": 96, "sliding_windows": (2047,) * 32, "max_position": 4096, "tie_embeddings": False},
    ),
    "Phi-3.5-mini": (
        "Phi3ForCausalLM",
        {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 131072}
        | {"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": 262144}
        | {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}},
        {"head_dim": 96, "max_position": 131072, "sliding_windows": (262144,) * 32},
    ),
    "Phi-4": (
        "Phi3ForCausalLM",
        {"num_attention_heads": 40, "hidden_size": 5120, "num_key_value_heads": 10, "rope_theta": 250000}
        | {"max_position_embeddings": 16384, "original_max_position_embeddings": 16384, "rope_scaling": None}
        | {"rms_norm_eps": 1e-5, "sliding_window": None},
        {"head_dim": 128, "num_kv_heads": 10, "sliding_windows": (None,) * 32},
    ),
    "phi-2": (
        "PhiForCausalLM",
        {"num_attention_heads": 32, "hidden_size": 2560, "num_key_value_heads": 32, "layer_norm_eps": 1e-5}
        | {"max_position_embeddings": 2048, "partial_rotary_factor": 0.4, "rope_scaling": None, "rope_theta": 10000.0}
        | {"hidden_act": "gelu_new", "qk_layernorm": False, "resid_pdrop": 0.1},
        {"head_dim": 80, "norm_eps": 1e-5},
    ),
    "stablelm-2-12b": (
        "StableLmForCausalLM",
        {"num_attention_heads": 32, "hidden_size": 5120, "num_key_value_heads": 8, "layer_norm_eps": 1e-5}
        | {"max_position_embeddings": 4096, "partial_rotary_factor": 0.25, "rope_theta": 10000, "use_qkv_bias": False}
        | {"qk_layernorm": True, "use_parallel_residual": True},
        {"head_dim": 160, "parallel": True, "head_norms": "cut", "qkv_bias": False},
    ),
    "Command R+": (
        "CohereForCausalLM",
        {"num_attention_heads": 96, "num_key_value_heads": 8, "layer_norm_eps": 1e-5, "use_qk_norm": True}
        | {"max_position_embeddings": 8192, "model_max_length": 131072, "rope_theta": 75000000.0},
        {"head_dim": 32, "max_position": 131072, "head_norms": True},
    ),
    "SmolLM3-3B": (
        "SmolLM3ForCausalLM",
        {"num_attention_heads": 16, "hidden_size": 2048, "num_key_value_heads": 4, "rms_norm_eps": 1e-6}
        | {"max_position_embeddings": 65536, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None}
        | {"use_sliding_window": False, "no_rope_layers": [1, 1, 1, 0] * 8, "no_rope_layer_interval": 4}
        | {"layer_types": ["full_attention"] * 32, "max_window_layers": 28},
        {"unrotated_layers": frozenset(range(3, 32, 4)), "tie_embeddings": True, "head_dim": 128},
    ),
}
ROTARY = {"Phi-3.5-mini": ("longrope", 96), "phi-2": ("default", 32), "stablelm-2-12b": ("default", 40)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str) -> None:
    architecture, values, wanted = PUBLISHED[name]
    config = family_from_hf(SIZES | values | {"architectures": [architecture]}, Path("config.json"))[1]
    assert {key: getattr(config, key) for key in wanted} == wanted
    kind, dim = ROTARY.get(name, ("default", config.head_dim))
    assert (config.rope.kind, config.rope.dim) == (kind, dim)
    assert len(inverse_frequencies(config.rope, config.max_position)) == dim // 2


# ---- what is wrong, or not there -------------------------------------------------------------------------------------

LONGROPE = PHI4_MINI["rope_parameters"]
assert isinstance(LONGROPE, dict)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("longrope", {"rope_parameters": LONGROPE | {"short_factor": [1.0] * 11}}, "short_factor has 11 .* have 12"),
        ("longrope", {"rope_parameters": LONGROPE | {"long_factor": [1.0] * 11 + [0]}}, "long_factor holds 0"),
        ("longrope", {"rope_parameters": LONGROPE | {"long_factor": [1.0] * 11 + ["x"]}}, "long_factor holds 'x'"),
        ("longrope", {"rope_parameters": LONGROPE | {"long_factor": [math.nan] * 12}}, "long_factor holds nan"),
        ("longrope", {"rope_parameters": LONGROPE | {"long_factor": [10**400] * 12}}, "long_factor holds 1000"),
        ("longrope", {"rope_parameters": LONGROPE | {"long_factor": None}}, "long_factor is missing"),
        ("longrope", {"rope_parameters": LONGROPE | {"short_factor": 3}}, "short_factor is 3, not a list"),
        ("longrope", {"rope_parameters": LONGROPE | {"attention_factor": 0}}, "attention_factor is 0"),
        ("longrope", {"original_max_position_embeddings": 0}, "original_max_position_embeddings is 0"),
        ("longrope", {"original_max_position_embeddings": 1}, "context before scaling is 1"),
        ("phi3", {"num_key_value_heads": 3}, "2 heads are not a multiple of 3"),
        ("phi3", {"sliding_window": -1}, "sliding window is -1"),
        ("phi", {"layer_norm_eps": None}, "layer_norm_eps is missing"),
        ("phi", {"rope_parameters": {"partial_rotary_factor": 0.01}}, "0 rotary dimensions"),
        ("phi", {"qk_layernorm": 1}, "qk_layernorm is 1, not a bool"),
        ("stablelm", {"use_parallel_residual": "yes"}, "use_parallel_residual is 'yes'"),
        ("stablelm", {"layer_norm_eps": 2.0}, "epsilon of the model's norms is 2"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is .* 4 layers"),
        ("smollm3", {"no_rope_layers": [1, 0, 2, 1]}, "no_rope_layers is .* 4 layers"),
        ("smollm3", {"no_rope_layers": [[], {}, None, "0"]}, "no_rope_layers is .* 4 layers"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
    ],
    ids=str,
)
def test_a_wrong_config_names_file_and_key(
    name: str, change: dict[str, Any], message: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source = edited(folder(name), tmp_path, **change)
    with pytest.raises(InvalidFileError, match=message) as caught:
        load(source)
    assert str(source / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("row", "change", "message"),
    [
        ("MiMo V2", {"mlp_layer_types": ["dense"] * 4}, "dense or sparse, .* for each of the 3 layers"),
        ("MiMo V2", {"mlp_layer_types": ["dense", "spares", "sparse"]}, "dense or sparse, .* for each of the 3 layers"),
        ("MiMo V2", {"mlp_layer_types": [[], "dense", "dense"]}, "dense or sparse, .* for each of the 3 layers"),
        ("Laguna wide gates", {"mlp_layer_types": ["dense"]}, "one entry for each of the 2 layers: dense"),
        ("Laguna wide gates", {"mlp_layer_types": ["sparse", "dense"]}, "one entry for each of the 2 layers: dense"),
        ("Laguna wide gates", {"mlp_layer_types": ["dense", "spares"]}, "one entry for each of the 2 layers: dense"),
        ("Nemotron-H", {"layers_block_type": [["mamba"]] * 5}, "layers other than mamba"),
    ],
)
def test_kinds_of_layers_are_checked(row: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    written = write_tiny(tmp_path / "there", ROWS[row].model_type, **ROWS[row].config)
    with pytest.raises((InvalidFileError, UnsupportedModelError), match=message):
        load(edited(written, tmp_path, **change))


def test_a_rope_pattern_is_for_all_layers(tmp_path: Path) -> None:
    checkpoint = SimpleNamespace(tensors={}, metadata={})
    dense = SimpleNamespace(num_layers=3, head_dim=64, model_type="granite_swa")
    fields = Fields({"attention.sliding_window": 8, "logit_scale": 1.0, "attention.rope_pattern": [True]}, tmp_path)
    with (
        mock.patch.object(granite.llama, "config_from_gguf", return_value=dense),
        pytest.raises(InvalidFileError, match="rope_pattern must describe 3 layers"),
    ):
        granite.config_from_gguf(fields, checkpoint)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("phi3", {"architectures": ["Phi3SmallForCausalLM"]}, "architecture 'Phi3SmallForCausalLM' is not implemented"),
        ("phi3", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; implemented: silu"),
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type is 'linear'; Phi-3 has"),
        ("longrope", {"rope_parameters": LONGROPE | {"long_mscale": 1.2}}, "long_mscale in the rotary settings"),
        ("phi", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; implemented: gelu_new"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm is true"),
        ("stablelm", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("stablelm 12b", {"num_attention_heads": 256}, "qk_layernorm is true with 256 heads; at most 128"),
        ("smollm3", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("smollm3", {"rope_parameters": {"rope_type": "spiral"}}, "rope_type is 'spiral'"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(
    name: str, change: dict[str, Any], message: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        load(edited(folder(name), tmp_path, **change))
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("stablelm", {"use_parallel_residual": True}, r"unexpected tensors \(4\): .*post_attention_layernorm"),
        ("stablelm", {"use_qkv_bias": True}, r"missing tensors \(6\): .*q_proj\.bias"),
        ("stablelm 12b", {"qk_layernorm": False}, r"unexpected tensors \(12\): .*k_layernorm\.norms\.0\.weight"),
        ("phi3", {"num_key_value_heads": 1}, r"qkv_proj\.weight has shape \[576, 192\].* 192 rows of q and 96 each"),
        ("smollm3", {"attention_bias": True}, r"missing tensors \(16\): .*q_proj\.bias"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_the_config(
    name: str, change: dict[str, Any], message: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=message):
        load(edited(folder(name), tmp_path, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_factors_short.weight": None}, r"tensor rope_factors_short\.weight is missing"),
        ({"rope_factors_long.weight": np.ones(5, np.float32)}, r"rope_factors_long\.weight has shape \[5\].*\[8\]"),
        ({"rope_factors_long.weight": np.zeros(8, np.float32)}, "long_factor holds 0.0"),
        ({"rope_factors_short.weight": np.full(8, math.inf, np.float32)}, "short_factor holds inf"),
    ],
    ids=str,
)
def test_wrong_factors_in_a_gguf_file(change: dict[str, np.ndarray | None], message: str, tmp_path: Path) -> None:
    factors = {f"rope_factors_{kind}.weight": np.full(8, 2.0, np.float32) for kind in ("long", "short")} | change
    with pytest.raises(InvalidFileError, match=message):
        gguf_config(tmp_path / "m.gguf", "phi3", {name: data for name, data in factors.items() if data is not None})


@pytest.mark.parametrize("count", [np.arange(3), "8", True], ids=str)
def test_a_count_of_experts_that_is_no_number_is_named(count: object) -> None:
    """It tells Mixtral's files from Llama's, before either's metadata is read; long arrays come as NumPy's."""
    metadata = {"general.architecture": "llama", "llama.expert_count": count}
    with pytest.raises(InvalidFileError, match=r"m\.gguf: llama\.expert_count is .*, not a int"):
        family_from_gguf(metadata, Checkpoint(Path("m.gguf"), "gguf", (), {}, metadata))


@pytest.mark.parametrize("numbers", [["0.5", "0.5"], [0.5]], ids=str)
def test_wrong_parameters_of_xielu_in_a_gguf_file(numbers: list[object]) -> None:
    counts = {"block_count": 2, "embedding_length": 8, "feed_forward_length": 16, "attention.head_count": 2}
    counts |= {"context_length": 64, "vocab_size": 10, "attention.layer_norm_rms_epsilon": 1e-5}
    metadata: dict[str, object] = {f"apertus.{key}": value for key, value in counts.items()}
    metadata |= {f"xielu.{part}": [-1e-6, -1e-6] for part in ("alpha_p", "alpha_n", "beta")} | {"xielu.eps": numbers}
    metadata["general.architecture"] = "apertus"
    with pytest.raises(InvalidFileError, match=r"m\.gguf: the parameters of xIELU are not 2 numbers each"):
        family_from_gguf(metadata, Checkpoint(Path("m.gguf"), "gguf", (), {}, metadata))
