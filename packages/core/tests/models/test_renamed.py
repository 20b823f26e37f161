# SPDX-License-Identifier: MIT
"""Models that transformers has no class for: a model of another class, its config and its tensors under other names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from candle_vllm.core import InvalidFileError, UnsupportedModelError
from candle_vllm.core.models.registry import family_from_hf
from candle_vllm.core.testing.toy_model import write_toy_tokenizer
from packages.core.tests.models.families import GLM_GROUPS, GLM_MOE, LLAMA3, MIMO, RENAMED
from packages.core.tests.models.gguf_export import export_gguf, interleaved
from packages.core.tests.models.tiny import (
    config_of,
    cuts,
    eager_logits,
    error,
    recorded_logits,
    settled,
    some_tokens,
    spread,
    their_logits,
    write_tiny,
)

Tensors = dict[str, torch.Tensor]
TOKENS = some_tokens()


def exaone(config: Mapping[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    names = {
        "model.embed_tokens": "transformer.wte",
        "model.layers": "transformer.h",
        "model.norm": "transformer.ln_f",
        "self_attn.o_proj": "attn.attention.out_proj",
        "self_attn": "attn.attention",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "mlp.gate_proj": "mlp.c_fc_0",
        "mlp.up_proj": "mlp.c_fc_1",
        "mlp.down_proj": "mlp.c_proj",
    }
    made = dict(config)
    for key, other in {"num_hidden_layers": "num_layers", "rms_norm_eps": "layer_norm_epsilon"}.items():
        made[other] = made.pop(key)
    made["activation_function"] = made.pop("hidden_act")
    return made | {"architectures": ["ExaoneForCausalLM"], "model_type": "exaone"}, _renamed(tensors, names)


def internlm2(config: Mapping[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    names = {
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "self_attn.o_proj": "attention.wo",
        "self_attn": "attention",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
    }
    made, groups = _renamed(tensors, names), config["num_key_value_heads"]
    for layer in range(config["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            at = f"model.layers.{layer}.attention."
            if f"{at}q_proj.{kind}" in made:
                parts = [made.pop(f"{at}{part}_proj.{kind}").unflatten(0, (groups, -1)) for part in "qkv"]
                made[f"{at}wqkv.{kind}"] = torch.cat(parts, dim=1).flatten(0, 1)
    bias = config["attention_bias"]
    keys = {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": bias}
    return {**config, **keys}, made


def internlm3(config: Mapping[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    made = dict(config)
    made |= {"qkv_bias": made.pop("attention_bias"), "bias": made.pop("mlp_bias")}
    return made | {"architectures": ["InternLM3ForCausalLM"], "model_type": "internlm3"}, tensors


def chatglm(config: Mapping[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    names = {
        "model.embed_tokens": "transformer.embedding.word_embeddings",
        "model.layers": "transformer.encoder.layers",
        "model.norm": "transformer.encoder.final_layernorm",
        "lm_head": "transformer.output_layer",
        "self_attn.o_proj": "self_attention.dense",
        "gate_up_proj": "dense_h_to_4h",
        "down_proj": "dense_4h_to_h",
    }
    made = _renamed(tensors, names) | {"transformer.rotary_pos_emb.inv_freq": torch.ones(8)}
    for layer in range(config["num_hidden_layers"]):
        at = f"transformer.encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            if f"{at}self_attn.q_proj.{kind}" in made:
                parts = [made.pop(f"{at}self_attn.{part}_proj.{kind}") for part in "qkv"]
                made[f"{at}self_attention.query_key_value.{kind}"] = torch.cat(parts)
    keys = {
        "architectures": ["ChatGLMForConditionalGeneration"],
        "model_type": "chatglm",
        "num_layers": config["num_hidden_layers"],
        "multi_query_attention": True,
        "multi_query_group_num": config["num_key_value_heads"],
        "ffn_hidden_size": config["intermediate_size"],
        "seq_length": config["max_position_embeddings"],
        "layernorm_epsilon": config["rms_norm_eps"],
        "padded_vocab_size": config["vocab_size"],
        "kv_channels": config["head_dim"],
        "add_qkv_bias": config["attention_bias"],
        "rope_ratio": config["rope_parameters"]["rope_theta"] / 10000.0,
    }
    same = ("hidden_size", "num_attention_heads", "tie_word_embeddings", "eos_token_id")
    return keys | {key: config[key] for key in same if key in config}, made


def bailing(config: Mapping[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    names = {
        "model.embed_tokens": "model.word_embeddings",
        "self_attn.o_proj": "attention.dense",
        "self_attn.q_norm": "attention.query_layernorm",
        "self_attn.k_norm": "attention.key_layernorm",
        "e_score_correction_bias": "expert_bias",
    }
    made = _renamed(tensors, names)
    for layer in range(config["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            at = f"model.layers.{layer}."
            if f"{at}self_attn.q_proj.{kind}" in made:
                parts = [made.pop(f"{at}self_attn.{part}_proj.{kind}") for part in "qkv"]
                made[f"{at}attention.query_key_value.{kind}"] = torch.cat(parts)
    own = dict(config)
    own |= {"num_experts": own.pop("n_routed_experts"), "num_shared_experts": own.pop("n_shared_experts")}
    own |= {"use_qkv_bias": own.pop("attention_bias"), "use_rmsnorm": True, "score_function": "sigmoid"}
    rope = own.pop("rope_parameters")
    own |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope["partial_rotary_factor"]}
    return own | {"architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe"}, made


def sarvam(config: Mapping[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    keys, made = bailing(config, tensors)
    del keys["partial_rotary_factor"]  # by default whole heads rotate
    return keys | {"architectures": ["SarvamMoEForCausalLM"], "model_type": "sarvam_moe"}, made


def chatglm_model(config: Mapping[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    keys, made = chatglm(config, tensors)
    return keys | {"architectures": ["ChatGLMModel"]}, made


def deci(config: Mapping[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Where attention or the MLP is missing, that of the Llama is idle: its last matrix, or a part of it, is zeros."""
    heads, size = config["num_attention_heads"] // config["num_key_value_heads"], config["hidden_size"]
    has = [(True, 256), (False, 0), (True, 0), (True, 512), (False, 512)]
    blocks, gone = [], list[str]()
    for layer, (attends, inner) in enumerate(has):
        at = f"model.layers.{layer}."
        if not attends:
            tensors[f"{at}self_attn.o_proj.weight"].zero_()
            gone += [f"{at}self_attn.", f"{at}input_layernorm."]
        tensors[f"{at}mlp.down_proj.weight"][:, inner:] = 0
        gone += [] if inner else [f"{at}mlp.", f"{at}post_attention_layernorm."]
        ffn = {"ffn_mult": 1.5 * inner / size - 0.01} if layer else {"intermediate_size": inner, "hidden_act": "silu"}
        ffn |= {"no_op": not inner, "replace_with_linear": False, "sparsify": None} | (
            {} if inner else {"ffn_mult": None}
        )
        group = {"n_heads_in_group": heads if attends else None, "no_op": not attends, "window_length": None}
        blocks.append({"attention": group, "ffn": ffn})
    made = {name: data for name, data in tensors.items() if not name.startswith(tuple(gone))}
    for part in ("gate_proj", "up_proj"):
        made[f"model.layers.0.mlp.{part}.weight"] = made[f"model.layers.0.mlp.{part}.weight"][:256]
    made["model.layers.0.mlp.down_proj.weight"] = made["model.layers.0.mlp.down_proj.weight"][:, :256]
    own = {"block_configs": blocks, "intermediate_size": None, "num_key_value_heads": None}
    return {**config, **own, "architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas"}, made


def pico(config: Mapping[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Rows of q and k in pairs of neighbours; the last norm has the name without the wrapper's prefix."""
    names = {
        "model.embed_tokens": "pico_decoder.embedding_proj",
        "model.norm": "output_norm",
        "lm_head": "pico_decoder.de_embedding_proj",
        "model.layers": "pico_decoder.layers",
        "self_attn": "attention",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "swiglu_norm",
        "mlp.gate_proj": "swiglu.w_0",
        "mlp.up_proj": "swiglu.w_1",
        "mlp.down_proj": "swiglu.w_2",
    }
    made = _renamed(tensors, names)
    for name, matrix in made.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            made[name] = torch.from_numpy(interleaved(matrix.numpy(), config["head_dim"]))
    keys = {
        "n_layers": "num_hidden_layers",
        "d_model": "hidden_size",
        "vocab_size": "vocab_size",
        "attention_n_heads": "num_attention_heads",
        "attention_n_kv_heads": "num_key_value_heads",
        "max_seq_len": "max_position_embeddings",
        "activation_hidden_dim": "intermediate_size",
        "norm_eps": "rms_norm_eps",
    }
    own = {key: config[other] for key, other in keys.items()} | {"position_emb_theta": 1e4, "dropout": 0.1}
    return own | {"architectures": ["PicoDecoderHF"], "model_type": "pico_decoder"}, made


def qwen(config: Mapping[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    names = {
        "model.embed_tokens": "transformer.wte",
        "model.layers": "transformer.h",
        "model.norm": "transformer.ln_f",
        "self_attn.o_proj": "attn.c_proj",
        "self_attn": "attn",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "mlp.up_proj": "mlp.w1",
        "mlp.gate_proj": "mlp.w2",
        "mlp.down_proj": "mlp.c_proj",
    }
    made = _renamed(tensors, names) | {"transformer.rotary_emb.inv_freq": torch.ones(8)}
    for layer in range(config["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            at = f"transformer.h.{layer}.attn."
            made[f"{at}c_attn.{kind}"] = torch.cat([made.pop(f"{at}{part}_proj.{kind}") for part in "qkv"])
    keys = {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "kv_channels": config["hidden_size"] // config["num_attention_heads"],
        "layer_norm_epsilon": config["rms_norm_eps"],
        "rotary_emb_base": config["rope_parameters"]["rope_theta"],
        "intermediate_size": 2 * config["intermediate_size"],
        "seq_length": config["max_position_embeddings"],
    }
    same = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "tie_word_embeddings")
    return QWEN | keys | {key: config[key] for key in same}, made


def mimo(config: Mapping[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """With the keys of published files, and tensors of other encoders and of layers for draft tokens."""
    made = _renamed(tensors, {"self_attn.sinks": "self_attn.attention_sink_bias"})
    more = ("visual.blocks.0.norm1", "audio_encoder.proj", "speech_embeddings.0", "model.mtp.layers.0.eh_proj")
    made |= {f"{name}.weight": torch.ones(4) for name in more}
    gone = {"layer_types", "mlp_layer_types", "rope_parameters", "rms_norm_eps"}
    full, local = (config["rope_parameters"][f"{kind}_attention"] for kind in ("full", "sliding"))
    keys: dict[str, Any] = {
        "architectures": ["MiMoV2ForCausalLM"], "model_type": "mimo_v2", "attention_projection_layout": "split",
        "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False, "n_shared_experts": None,
        "hybrid_layer_pattern": [int(kind == "sliding_attention") for kind in config["layer_types"]],
        "moe_layer_freq": [int(kind == "sparse") for kind in config["mlp_layer_types"]],
        "layernorm_epsilon": config["rms_norm_eps"], "rope_theta": full["rope_theta"],
        "swa_rope_theta": local["rope_theta"], "partial_rotary_factor": full["partial_rotary_factor"],
        "rope_parameters": {"rope_type": "default", **full}, "sliding_window_size": config["sliding_window"] - 1,
        "swa_num_attention_heads": config["num_attention_heads"], "swa_head_dim": config["head_dim"],
        "swa_v_head_dim": config["v_head_dim"], "swa_num_key_value_heads": 2 * config["num_key_value_heads"],
        "vision_config": {"depth": 28}, "audio_config": {},
    }  # fmt: skip
    return {key: value for key, value in config.items() if key not in gone} | keys, made


def _renamed(tensors: Tensors, names: Mapping[str, str]) -> Tensors:
    made: Tensors = {}
    for name, tensor in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new)
        made[name] = tensor
    return made


GLM = {"hidden_size": 128, "head_dim": 32, "attention_bias": True}  # whose type is no Llama's
GLM_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5}}
BAILING = {"head_dim": 32, "partial_rotary_factor": 0.5} | GLM_MOE | GLM_GROUPS | {"first_k_dense_replace": 1}
SARVAM = BAILING | {"partial_rotary_factor": 1.0, "attention_bias": False, "n_group": 1, "topk_group": 1}
DECI = {"num_hidden_layers": 5, "intermediate_size": 512, "head_dim": 16, "rope_parameters": LLAMA3}
QWEN: dict[str, Any] = {  # as Qwen-14B-Chat is published
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "attn_dropout_prob": 0.0,
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 27392,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 8192,
    "no_bias": True,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": 152064,
}
KINDS: Mapping[str, tuple[Callable[..., tuple[dict[str, Any], Tensors]], Mapping[str, Any]]] = {
    "BailingMoeV2ForCausalLM": (bailing, BAILING),
    "SarvamMoEForCausalLM": (sarvam, SARVAM),
    "ChatGLMForConditionalGeneration": (chatglm, GLM | GLM_ROPE),
    "ChatGLMModel": (chatglm_model, GLM),
    "ExaoneForCausalLM": (exaone, {"head_dim": 16, "rope_parameters": LLAMA3}),
    "InternLM2ForCausalLM": (internlm2, {"head_dim": 16, "attention_bias": True}),
    "InternLM3ForCausalLM": (internlm3, {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "DeciLMForCausalLM": (deci, DECI),
    "PicoDecoderHF": (pico, {"head_dim": 16}),
    "MiMoV2ForCausalLM": (mimo, MIMO),
    "QWenLMHeadModel": (qwen, {"hidden_size": 128, "num_key_value_heads": 4}),
}


def _type_of(kind: str) -> str:
    """The type of transformers that has the same layers."""
    if kind.startswith("QWen"):
        return "qwen2"
    if kind.startswith("MiMo"):
        return "mimo_v2_flash"
    return "glm4_moe" if "MoE" in kind or "Moe" in kind else "glm" if "GLM" in kind else "llama"


def write_renamed(kind: str, folder: Path, **changes: Any) -> tuple[Path, Path]:
    """Folders of transformers' Llama, or GLM, and of the same under the names of a class."""
    rename, usual = KINDS[kind]
    plain, renamed = (
        write_tiny(folder / "plain", _type_of(kind), **{**usual, **changes}),
        folder / "renamed",
    )
    stored = load_file(plain / "model.safetensors")
    config, tensors = rename(config_of(plain), stored)
    save_file(stored, plain / "model.safetensors", {"format": "pt"})  # `rename` may make some of them idle
    renamed.mkdir()
    (renamed / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, renamed / "model.safetensors")
    write_toy_tokenizer(renamed)
    return plain, renamed


CHATGLM3: dict[str, Any] = {  # as ChatGLM3-6B is published
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "eos_token_id": 2,
    "ffn_hidden_size": 13696,
    "fp32_residual_connection": False,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "original_rope": True,
    "padded_vocab_size": 65024,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}


def test_a_published_chatglm_is_read() -> None:
    """ChatGLM2's config differs by its context."""
    for context in (8192, 32768):
        config = family_from_hf(CHATGLM3 | {"seq_length": context}, Path("config.json"))[1]
        sizes = (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim, config.max_position)
        assert sizes == (28, 32, 2, 128, context)
        assert (config.rope.dim, config.rope.theta, config.tie_embeddings) == (64, 10000.0, False)


def test_a_published_qwen_is_read() -> None:
    config = family_from_hf(QWEN, Path("config.json"))[1]
    sizes = (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim, config.intermediate_size)
    assert sizes == (40, 40, 40, 128, 13696)
    assert (config.max_position, config.rope.theta, config.norm_eps) == (2048, 10000.0, 1e-6)
    large = QWEN | {"seq_length": 32768, "max_position_embeddings": 32768, "rotary_emb_base": 1000000}
    config = family_from_hf(large, Path("config.json"))[1]
    assert (config.max_position, config.rope.theta) == (32768, 1e6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual": {"heads": 16, "image_size": 448}}, "visual belongs to Qwen-VL"),
        ({"audio": {"n_mels": 80}}, "audio belongs to Qwen-Audio"),
        ({"no_bias": False}, "no_bias is false"),
        ({"scale_attn_weights": False}, "scale_attn_weights is false"),
        ({"rotary_pct": 0.5}, "rotary_pct is 0.5"),
        ({"intermediate_size": 27393}, "27393, which is not even"),
        ({"seq_length": 0}, "seq_length is 0"),
    ],
)
def test_other_qwens_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((InvalidFileError, UnsupportedModelError), match=message):
        family_from_hf(QWEN | changes, Path("config.json"))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("attention", {"replace_with_linear": True, "n_heads_in_group": None}, "replace_with_linear in block_configs"),
        ("attention", {"window_length": 64}, "window_length in block_configs"),
        ("attention", {"n_heads_in_group": 1}, r"n_heads_in_group is \[1, 2\]"),
        ("attention", {"no_op": True}, "a first layer without attention"),
        ("ffn", {"ffn_mult": -1.0}, "an MLP of -"),
        ("ffn", {"ffn_mult": 1e308}, "an MLP of inf"),
        ("ffn", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("attention", {"no_op": "no"}, "no_op is 'no', not a bool"),
        ("attention", {"n_heads_in_group": "2"}, "n_heads_in_group is '2', not a int"),
        ("attention", {"n_heads_in_group": None}, "n_heads_in_group is missing"),
        ("ffn", {"ffn_mult": None}, "intermediate_size is missing"),
        ("ffn", {"ffn_mult": None, "intermediate_size": 3.7}, "intermediate_size is 3.7, not a int"),
    ],
)
def test_other_blocks_are_refused(part: str, changes: dict[str, Any], message: str) -> None:
    block: dict[str, Any] = {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 6.0}}
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 272}
    rest = {"max_position_embeddings": 512, "rms_norm_eps": 1e-6, "architectures": ["DeciLMForCausalLM"]}
    assert family_from_hf(sizes | rest | {"block_configs": [block, block]}, Path("config.json"))
    first = block | {part: block[part] | changes}
    with pytest.raises((InvalidFileError, UnsupportedModelError), match=message):
        family_from_hf(sizes | rest | {"block_configs": [first, block]}, Path("config.json"))
    many = {"num_hidden_layers": 1 << 24, "block_configs": None}  # must not take memory for each
    with pytest.raises(InvalidFileError, match="num_hidden_layers is 16777216; it must be 1 to 4096"):
        family_from_hf(sizes | rest | many, Path("config.json"))


@pytest.mark.parametrize("heads", ["", [], {}, False])
def test_key_value_heads_of_pico_are_a_number(heads: Any) -> None:
    """0 means one for each head."""
    config = {"architectures": ["PicoDecoderHF"], "d_model": 64, "n_layers": 2, "vocab_size": 272, "norm_eps": 1e-6}
    config |= {"attention_n_heads": 4, "attention_n_kv_heads": 0, "activation_hidden_dim": 64, "max_seq_len": 512}
    assert family_from_hf(config, Path("config.json"))[1].num_kv_heads == 4
    with pytest.raises(InvalidFileError, match="attention_n_kv_heads is"):
        family_from_hf(config | {"attention_n_kv_heads": heads}, Path("config.json"))


def test_keys_of_ling_may_be_null() -> None:
    """And the share of a head that rotates may be a number, with heads of the usual size."""
    names = ("use_bias", "norm_head", "use_qk_norm", "use_rmsnorm", "score_function", "moe_router_enable_expert_bias")
    sizes = {
        "vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_experts": 4,
        "num_attention_heads": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
    }  # fmt: skip
    named = {"architectures": ["BailingMoeV2ForCausalLM"], "rotary_dim": 4}
    config = family_from_hf(named | sizes | dict.fromkeys(names), Path("config.json"))[1]
    assert (config.head_dim, config.rope.dim) == (16, 4)


def test_every_class_is_here() -> None:
    assert KINDS.keys() == RENAMED.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_renamed_models_are_llamas(kind: str, tmp_path: Path) -> None:
    """From safetensors, compiled, and from GGUF as llama.cpp's converter has it."""
    plain, folder = write_renamed(kind, tmp_path)
    theirs = their_logits(plain, TOKENS)
    for chunks in cuts():
        assert error(eager_logits(folder, TOKENS, chunks), theirs) < 1e-5
    compiled = recorded_logits(folder, TOKENS, [len(TOKENS)])
    assert spread(*settled(compiled, theirs, 0.1 if kind[:4] == "MiMo" or "MoE" in kind or "Moe" in kind else 0)) < 1e-2
    gguf = export_gguf(plain, tmp_path / "model.gguf", RENAMED[kind])
    assert error(eager_logits(gguf, TOKENS, [len(TOKENS)]), theirs) < 1e-5
