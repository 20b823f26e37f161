# SPDX-License-Identifier: MIT
"""A converter from a tiny checkpoint to GGUF, apart from the library's own: names by the `gguf` package's table.

Each architecture's function writes its metadata, and says what its tensors become, as llama.cpp's converter does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    ExpertGatingFuncType,
    GGMLQuantizationType,
    GGUFValueType,
    GGUFWriter,
    RopeScalingType,
    get_tensor_name_map,
)
from safetensors.torch import load_file

from packages.core.tests.models.tiny import config_of
from packages.core.tests.toy_gguf import add_toy_vocabulary

Tensors = dict[str, np.ndarray]
Convert = Callable[[GGUFWriter, Mapping[str, Any], Tensors], Tensors]
"""Writes metadata beyond `_shared`; gets tensors by Hugging Face's names, and gives them back as GGUF wants them."""


def export_gguf(folder: Path, path: Path, architecture: str, *, quantization: str = "F32") -> Path:
    """Writes one GGUF file with the byte tokenizer; matrices that the type can hold are quantised."""
    from gguf import quants

    config = usual_config(folder)
    kind = GGMLQuantizationType[quantization]
    writer = GGUFWriter(path, architecture)
    _shared(writer, config)
    stored = load_file(folder / "model.safetensors").items()
    tensors = {name: (x.float() if x.is_floating_point() else x).numpy() for name, x in stored}
    if config.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    tensors = CONVERTERS.get(architecture, _plain)(writer, config, tensors)
    near = MODEL_ARCH.DOTS1  # of an architecture that the package does not know yet
    known = {
        "deepseek32": "glm-dsa",
        "glm5-next": "kimi-linear",
        "bailingmoe3": "kimi-linear",
        "qwen4exp": "qwen35moe",
    }.get(architecture, architecture.removesuffix("-assistant"))
    arch = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == known), near)
    names = get_tensor_name_map(MODEL_ARCH(arch), config["num_hidden_layers"] + 1)  # there may be one behind the last
    for name, data in tensors.items():
        found = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        data = np.ascontiguousarray(data)
        kernels = (
            "shortconv.conv" in found
            or "ssm_conv1d_" in found
            or "ple_conv1d" in found
            or found.endswith(("ssm_conv1d.weight", "ssm_a", "ssm_d", "ssm_norm.weight"))
        )
        kept = "ffn_gate_inp" in found or "altup_" in found or kernels or found.endswith(".bias")  # of experts
        plain = data.ndim < 2 or kept
        if kind is not GGMLQuantizationType.F32 and not plain:
            writer.add_tensor(found, quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(found, data)
    add_toy_vocabulary(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_USUAL_KEYS = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "ffn_hidden_size": "intermediate_size",
    "model_max_length": "max_position_embeddings",
}


def usual_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config, with what the older families name otherwise under the usual keys too."""
    config = config_of(folder)
    config.setdefault("num_hidden_layers", len(config.get("layers_block_type", ())))
    if config["model_type"] == "bloom":  # which does not say it
        config["intermediate_size"] = 4 * config["hidden_size"]
    if config["model_type"] in ("mamba", "mamba2", "falcon_mamba"):  # nor these, where it has no meaning
        config |= {"num_attention_heads": 0, "intermediate_size": 0, "max_position_embeddings": 1 << 20}
        config.setdefault("head_dim", 64)
    return config | {usual: config[own] for own, usual in _USUAL_KEYS.items() if own in config}


def _shared(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    heads = config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config.get("intermediate_size") or config.get("moe_intermediate_size", 0))
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    if config.get("rms_norm_eps") is not None:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope or "rope_theta" in config:
        writer.add_rope_freq_base(rope.get("rope_theta") or config["rope_theta"])


def _plain(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    return tensors


def _llama(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Rows of q and k in pairs of neighbours; Llama 3's rotary scaling as divisors of the frequencies."""
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    made = dict(_experts(writer, config, tensors) if config["model_type"] == "mixtral" else tensors)
    for name, data in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            made[name] = interleaved(data, config["head_dim"])
    rope = config["rope_parameters"]
    if rope["rope_type"] == "yarn":
        _yarn(writer, rope)
    if rope["rope_type"] == "llama3":
        made["rope_freqs.weight"] = _llama3_factors(rope, config["head_dim"])
    return made


def _yarn(writer: GGUFWriter, rope: Mapping[str, Any]) -> None:
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
    writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])


def interleaved(data: np.ndarray, head_dim: int) -> np.ndarray:
    """The two halves of each head's rows in turns."""
    heads = data.reshape(-1, 2, head_dim // 2, *data.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(data.shape)


def _llama3_factors(rope: Mapping[str, Any], dim: int) -> np.ndarray:
    """What each frequency is divided by, from Meta's code."""
    factors = []
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    for frequency in 1.0 / rope["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float32) / dim):
        length = 2 * np.pi / frequency
        if length < high:
            factors.append(1.0)
        elif length > low or low == high:
            factors.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / length - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def _gemma(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Norms plus 1; what the architecture's keys say of caps, windows and the two rotary settings."""
    for key, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("sliding_window", writer.add_sliding_window),
    ):
        if config.get(key) is not None:
            add(config[key])
    if config["model_type"] == "gemma3_text":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
        full, local = (config["rope_parameters"][kind] for kind in ("full_attention", "sliding_attention"))
        writer.add_rope_freq_base(full["rope_theta"])
        writer.add_rope_freq_base_swa(local["rope_theta"])
        if full["rope_type"] == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(full["factor"])
    return {name: data + 1 if name.endswith("norm.weight") else data for name, data in tensors.items()}


def _gemma4(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Lists where layers differ, divisors of frequencies that turn nothing, and names of scales."""
    local = [kind == "sliding_attention" for kind in config["layer_types"]]
    full = config["per_layer_config"][str(local.index(False))]
    dim, shared, inner = full["head_dim"], config["num_kv_shared_layers"], config["intermediate_size"]
    heads = config["num_key_value_heads"], full.get("num_key_value_heads", config["num_key_value_heads"])
    widths = [inner * (1 + config["use_double_wide_mlp"] * (n >= len(local) - shared)) for n in range(len(local))]
    writer.add_feed_forward_length(widths)
    writer.add_head_count_kv([heads[0] if windowed else heads[1] for windowed in local])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(dim)
    for add in (writer.add_key_length_swa, writer.add_value_length_swa, writer.add_rope_dimension_count_swa):
        add(config["head_dim"])
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern(local)
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    turned, ropes = dim // 8, config["rope_parameters"]
    writer.add_rope_freq_base(ropes["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    if config.get("enable_moe_block"):
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["top_k_experts"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    made = {"rope_freqs.weight": np.array([1.0] * turned + [1e30] * (dim // 2 - turned), np.float32)}
    for name, data in tensors.items():
        layer = f"blk.{[*name.split('.'), ''][2]}."
        scales = {"router.scale": "ffn_gate_inp.scale", "per_expert_scale": "ffn_down_exps.scale"}
        scale = next((layer + new for old, new in scales.items() if name.endswith(old)), None)
        parts = name.endswith(("layer_scalar", "experts.gate_up_proj", "experts.down_proj"))
        made[scale or (f"{name}.weight" if parts else name)] = data
    return made


def _gemma4_assistant(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """The text model of a drafter, without clusters of tokens, and its two projections."""
    made = {name: data for name, data in tensors.items() if not name.startswith("masked_embedding")}
    writer.add_uint32(f"{writer.arch}.embedding_length_out", len(made["post_projection.weight"]))
    writer.add_uint32(f"{writer.arch}.nextn_predict_layers", config["num_hidden_layers"])
    projections = {name: made.pop(name) for name in ("pre_projection.weight", "post_projection.weight")}
    return _gemma4(writer, config, made) | {f"nextn.{name}": data for name, data in projections.items()}


def _llama4(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Gate and up apart, rows being outputs; q and k are in pairs of neighbours already."""
    writer.add_feed_forward_length(config["intermediate_size_mlp"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_interleave_moe_layer_step(config["interleave_moe_layer_step"])
    made = {"rope_freqs.weight": _llama3_factors(config["rope_parameters"], config["head_dim"])}
    for name, data in tensors.items():
        start, found, part = name.partition(".experts.")
        if not found:
            made[name] = data
        elif part == "down_proj":
            made[f"{name}.weight"] = data.swapaxes(1, 2)
        else:
            parts = zip(("gate", "up"), np.split(data.swapaxes(1, 2), 2, axis=1))
            made |= {f"{start}.experts.{each}_proj.weight": half for each, half in parts}
    return made


def _gemma3n(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Matrices of streams in one tensor, and what a gate's numbers must exceed in the place of a share."""
    local, ropes = [kind == "sliding_attention" for kind in config["layer_types"]], config["rope_parameters"]
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_altup_active_idx(config["altup_active_idx"])
    writer.add_altup_num_inputs(config["altup_num_inputs"])
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    writer.add_shared_kv_layers(config["num_kv_shared_layers"])
    shares = torch.tensor(config["activation_sparsity_pattern"])
    writer.add_activation_sparsity_scale(torch.distributions.Normal(0, 1).icdf(shares).tolist())
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern(local)
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_rope_freq_base(ropes["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    made = {}
    for name, data in tensors.items():
        start, _, number = name.removesuffix(".weight").rpartition(".")
        if name == "model.embed_tokens_per_layer.weight":  # a row for each token
            made[name] = np.concatenate([data, np.repeat(data[:1], config["vocab_size"] - len(data), 0)])
        elif not start.endswith("projections"):
            made[f"{name}.weight" if name.endswith("_scale") else name] = data
        elif number == "0":
            others = range(config["altup_num_inputs"] - 1)
            made[f"{start}.weight"] = np.stack([tensors[f"{start}.{n}.weight"] for n in others])
    return made


def _glm4(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Rows stay in pairs of neighbours."""
    writer.add_rope_dimension_count(int(config["head_dim"] * config["rope_parameters"]["partial_rotary_factor"]))
    return tensors


def _chatglm(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """As GLM-4, with q, k and v fused as in the older checkpoints."""
    made = dict(_glm4(writer, config, tensors))
    for layer in range(config["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            parts = [made.pop(f"model.layers.{layer}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            made[f"blk.{layer}.attn_qkv.{kind}"] = np.concatenate(parts)
    return made


def _deci(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """A Llama whose attention or MLP is idle in some layers (their last matrices are zeros), without these tensors."""
    idle = {name.rpartition(".")[0].rpartition(".")[0] for name, data in tensors.items() if not data.any()}
    layers, made = range(config["num_hidden_layers"]), _llama(writer, config, tensors)
    heads = [f"model.layers.{layer}.self_attn" not in idle for layer in layers]
    writer.add_head_count([config["num_attention_heads"] * each for each in heads])
    writer.add_head_count_kv([config["num_key_value_heads"] * each for each in heads])
    sizes = []
    for layer in layers:
        mlp = f"model.layers.{layer}.mlp."
        sizes.append(int(np.count_nonzero(made[mlp + "down_proj.weight"].any(axis=0))))
        made[mlp + "down_proj.weight"] = made[mlp + "down_proj.weight"][:, : sizes[-1]]
        for part in ("gate_proj.weight", "up_proj.weight"):
            made[mlp + part] = made[mlp + part][: sizes[-1]]
    writer.add_feed_forward_length(sizes)
    norms = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
    gone = tuple(part for at in idle for part in (at + ".", f"{at.rpartition('.')[0]}.{norms[at.rpartition('.')[2]]}."))
    return {name: data for name, data in made.items() if not name.startswith(gone)}


def _qwen(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """The first Qwen from a Qwen2: q, k and v fused, and the size of two matrices of the MLP as one number."""
    made, size = dict(tensors), 2 * config["intermediate_size"]
    writer.add_feed_forward_length(size)
    for layer in range(config["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            parts = [made.pop(f"model.layers.{layer}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            made[f"blk.{layer}.attn_qkv.{kind}"] = np.concatenate(parts)
    return made


def _qwen2vl(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """How many frequencies turn by time, height and width, and by an axis that there is not."""
    writer.add_rope_dimension_sections([*config["rope_parameters"]["mrope_section"], 0])
    return tensors


def _experts(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Matrices of all experts in one tensor each, as converters merge them; the numbers of a mixture."""
    count = next(config[key] for key in ("num_local_experts", "num_experts", "n_routed_experts") if key in config)
    writer.add_expert_count(count)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    made: dict[str, np.ndarray] = {}
    merged: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    names = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "down_proj": "down", "up_proj": "up"}
    for name, data in tensors.items():
        start, found, rest = name.partition(".experts.")
        if not found or "." not in rest:  # of all experts already
            made[f"{name}.weight" if found else name] = data
            continue
        expert, part, _ = rest.split(".")
        merged.setdefault((start.split(".")[2], names[part]), {})[int(expert)] = data
    for (layer, part), matrices in merged.items():
        made[f"blk.{layer}.ffn_{part}_exps.weight"] = np.stack([matrices[e] for e in range(count)])
    return made


def _qwen3vlmoe(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    return _qwen_moe(writer, config, _qwen2vl(writer, config, tensors))


def _qwen_moe(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    if config["model_type"] == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    made = _experts(writer, config, tensors)
    return {name: data[0] if "shared_expert_gate" in name else data for name, data in made.items()}


def _qwen3_next(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Norms plus 1, and delta nets as llama.cpp wants them; a file with the interval has a layer behind the last."""
    key_heads, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key, value = config["linear_key_head_dim"], config["linear_value_head_dim"]
    layers, next_ = config["num_hidden_layers"], config["model_type"] == "qwen3_next"
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(key)
    writer.add_ssm_group_count(key_heads)
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_inner_size(value * heads)
    recurrent = [kind == "linear_attention" for kind in config["layer_types"]]
    writer.add_full_attention_interval(4)
    old = recurrent == [True, True, True, False]  # which says the interval alone
    behind = any(name.startswith("mtp.") for name in tensors)
    if not old:
        writer.add_array(f"{writer.arch}.attention.recurrent_layers", recurrent + [False] * behind)
    rope = config["rope_parameters"]
    writer.add_rope_dimension_count(int(config["head_dim"] * rope["partial_rotary_factor"]))
    if not next_:
        writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    if old or behind:
        writer.add_nextn_predict_layers(1)
        writer.add_block_count(layers + 1)
    tensors = {_behind_the_last(name, layers): data for name, data in tensors.items()}
    if "num_experts" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
        tensors = _qwen_moe(writer, config, tensors)
    each = heads // key_heads

    def tiled(data: np.ndarray, size: int) -> np.ndarray:
        """Rows of value heads: the first of each key head, then the second of each."""
        if next_:
            return data
        return data.reshape(key_heads, each, size, -1).swapaxes(0, 1).reshape(data.shape)

    made: Tensors = {}
    if old and not behind:
        made[f"blk.{layers}.nextn.enorm.weight"] = np.ones(config["hidden_size"], np.float32)
    for name, data in tensors.items():
        start, part = name.rpartition("linear_attn.")[::2]
        at = f"blk.{name.split('.')[2]}." if "layers" in name else ""
        keys = 2 * key * key_heads
        if name.endswith("norm.weight") and not start:
            made[name] = data + 1
        elif part == "in_proj_qkvz.weight":
            whole = data.reshape(key_heads, -1, data.shape[1])
            q, k, v, z = np.split(whole, np.cumsum([key, key, each * value]), axis=1)
            made[at + "attn_qkv.weight"] = np.concatenate([x.reshape(-1, data.shape[1]) for x in (q, k, v)])
            made[at + "attn_gate.weight"] = z.reshape(-1, data.shape[1])
        elif part == "in_proj_qkv.weight":
            made[at + "attn_qkv.weight"] = np.concatenate([data[:keys], tiled(data[keys:], value)])
        elif part == "in_proj_z.weight":
            made[at + "attn_gate.weight"] = tiled(data, value)
        elif part in ("in_proj_a.weight", "in_proj_b.weight"):
            made[name] = tiled(data, 1)
        elif part == "A_log":
            made[at + "ssm_a"] = tiled(-np.exp(data), 1)
        elif part == "dt_bias":
            made[at + "ssm_dt.bias"] = tiled(data, 1)
        elif part == "conv1d.weight":
            data = data[:, 0]
            made[at + "ssm_conv1d.weight"] = np.concatenate([data[:keys], tiled(data[keys:], value)])
        elif part == "out_proj.weight":
            made[name] = tiled(data.T, value).T
        else:
            made[name] = data
    return made


def _behind_the_last(name: str, layers: int) -> str:
    """A tensor's name where a layer that predicts further tokens is one more layer."""
    parts = {
        "fc": "eh_proj",
        "pre_fc_norm_embedding": "enorm",
        "pre_fc_norm_hidden": "hnorm",
        "norm": "shared_head_norm",
    }
    if name.startswith("mtp.layers.0."):
        return f"model.layers.{layers}.{name.removeprefix('mtp.layers.0.')}"
    if name.startswith("mtp."):
        return f"blk.{layers}.nextn.{parts[name.split('.')[1]]}.weight"
    return name


def _glm4_moe(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """With a layer behind the last, as files of the family have it for predicting further tokens."""
    part = config["rope_parameters"].get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(config["head_dim"] * part))
    writer.add_leading_dense_block_count(config.get("first_k_dense_replace", 0))
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    writer.add_nextn_predict_layers(1)
    layers = config["num_hidden_layers"]
    writer.add_block_count(layers + 1)
    made = _experts(writer, config, tensors)
    if f"model.layers.{layers}.enorm.weight" not in made:
        made[f"blk.{layers}.nextn.enorm.weight"] = np.ones(config["hidden_size"], np.float32)
    return {name.replace("e_score_correction_bias", "e_score_correction.bias"): data for name, data in made.items()}


def _bailing(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """One matrix of q, k and v; the norm in front of the MLP has another name, and the shared experts have a length."""
    writer.add_expert_shared_feed_forward_length(config["moe_intermediate_size"])
    made: Tensors = {}
    for name, data in _glm4_moe(writer, config, tensors).items():
        at, _, part = name.partition(".self_attn.")
        if part.startswith(("q_proj", "k_proj", "v_proj")):
            kind = part.rpartition(".")[2]
            if part.startswith("q"):
                parts = [tensors[f"{at}.self_attn.{each}_proj.{kind}"] for each in "qkv"]
                made[f"blk.{at.split('.')[2]}.attn_qkv.{kind}"] = np.concatenate(parts)
            continue
        end = "post_attention_layernorm.weight"
        made[f"blk.{name.split('.')[2]}.ffn_norm.weight" if name.endswith(end) else name] = data
    return made


def _gpt_oss(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Gate and up apart, rows being outputs."""
    rope = config["rope_parameters"]
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    made = {}
    for name, data in tensors.items():
        start, found, part = name.partition(".mlp.experts.")
        if not found:
            made[name.replace("self_attn.sinks", "self_attn.sinks.weight")] = data
            continue
        at, kind = f"blk.{start.split('.')[2]}.ffn_", "bias" if part.endswith("bias") else "weight"
        data = data if kind == "bias" else data.swapaxes(1, 2)
        if part.startswith("down"):
            made[f"{at}down_exps.{kind}"] = data
        else:
            made[f"{at}gate_exps.{kind}"], made[f"{at}up_exps.{kind}"] = data[:, 0::2], data[:, 1::2]
    return made


def deepseek2(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors, *, split: bool = True) -> Tensors:
    """Keys' and values' matrices apart, as newer files have them, or in one, with the older metadata."""
    heads, nope, value = config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"]
    latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_head_count_kv(1 if split else heads)
    writer.add_key_length(latent + rope if split else nope + rope)
    writer.add_value_length(latent if split else value)
    if split:
        writer.add_key_length_mla(nope + rope)
        writer.add_value_length_mla(value)
    if config.get("q_lora_rank"):
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_rope_dimension_count(rope)
    scaling = config["rope_parameters"]
    if scaling["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])
    if "llama_4_scaling_beta" in scaling:
        writer.add_attn_temperature_scale(scaling["llama_4_scaling_beta"])
    made: Tensors = {}
    for name, data in _deepseek_experts(writer, config, tensors).items():
        if split and name.endswith("kv_b_proj.weight"):
            k, v = np.split(data.reshape(heads, nope + value, latent), [nope], axis=1)
            made[name.replace("kv_b", "k_b")], made[name.replace("kv_b", "v_b")] = k.swapaxes(1, 2), v
        else:
            made[name.replace("score_correction_bias", "score_correction.bias")] = data
    return made


def _indexed(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """DeepSeek's latent attention with an index; the layers that have one are named for GLM alone."""
    writer.add_indexer_head_count(config["index_n_heads"])
    writer.add_indexer_key_length(config["index_head_dim"])
    writer.add_indexer_top_k(config["index_topk"])
    if "indexer_types" in config:
        kinds = [kind == "full" for kind in config["indexer_types"]]
        writer.add_array(f"{writer.arch}.attention.indexer.types", kinds)
    return deepseek2(writer, config, tensors)


def _deepseek_experts(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    newer = config["model_type"] != "deepseek_v2"
    if "n_routed_experts" not in config:
        writer.add_leading_dense_block_count(config["num_hidden_layers"])
        return tensors
    writer.add_leading_dense_block_count(config.get("first_k_dense_replace", 1))
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    if newer:
        soft = config["model_type"] == "mistral4"
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_expert_gating_func(ExpertGatingFuncType.SOFTMAX if soft else ExpertGatingFuncType.SIGMOID)
    if newer or config["topk_method"] == "group_limited_greedy":
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
    return _experts(writer, config, tensors)


def _deepseek_ocr(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    writer.add_leading_dense_block_count(config["mlp_layer_types"].index("sparse"))
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    if config["model_type"] == "unlimited_ocr_text":
        writer.add_sliding_window(config["sliding_window"])
    made: Tensors = {}
    for name, data in tensors.items():
        if name.endswith("gate_up_proj"):
            for part, half in zip(("gate_proj", "up_proj"), np.split(data, 2, 1)):
                made[name.replace("gate_up_proj", part)] = half
        else:
            made[name] = data
    return _experts(writer, config, made)


def _phi2(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """q, k and v fused in the first layer, as in files from before transformers had the family."""
    _partial(writer, config)
    made = dict(tensors)
    for kind in ("weight", "bias"):
        parts = [made.pop(f"model.layers.0.self_attn.{part}_proj.{kind}") for part in "qkv"]
        made[f"blk.0.attn_qkv.{kind}"] = np.concatenate(parts)
    return made


def _partial(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """How many dimensions turn; the epsilon of LayerNorms."""
    size = config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(int(size * config["rope_parameters"]["partial_rotary_factor"]))
    if "layer_norm_eps" in config:
        writer.add_layer_norm_eps(config["layer_norm_eps"])


def _phi3(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Long-rope's factors as tensors, its scale as a number; a window of 0 where there is none."""
    _partial(writer, config)
    writer.add_sliding_window(config["sliding_window"] or 0)
    rope, position = config["rope_parameters"], config["max_position_embeddings"]
    original = config["original_max_position_embeddings"]
    writer.add_rope_scaling_orig_ctx_len(original)
    if rope["rope_type"] != "longrope":
        return tensors
    writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(position / original) / np.log(original))))
    factors = {key: np.array(rope[f"{key}_factor"], np.float32) for key in ("long", "short")}
    return tensors | {f"rope_factors_{key}.weight": values for key, values in factors.items()}


def _stablelm(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """The norms of heads in one tensor."""
    _partial(writer, config)
    writer.add_parallel_residual(config["use_parallel_residual"])
    made = {name: data for name, data in tensors.items() if ".norms." not in name}
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for layer in range(config["num_hidden_layers"] if config["qk_layernorm"] else 0):
        for part, count in heads.items():
            start = f"model.layers.{layer}.self_attn.{part}_layernorm"
            made[f"{start}.weight"] = np.stack([tensors[f"{start}.norms.{head}.weight"] for head in range(count)])
    return made


def _smollm3(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Rows of q and k in pairs of neighbours, also in the layers that do not turn."""
    size = config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(size)
    turned = ("q_proj", "k_proj")
    return {name: interleaved(data, size) if any(t in name for t in turned) else data for name, data in tensors.items()}


def _lfm2(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """No key-value heads in layers with convolutions, whose kernels lose a dimension; what experts' names are."""
    kinds, kv = config["layer_types"], config["num_key_value_heads"]
    writer.add_head_count_kv([0 if kind == "conv" else kv for kind in kinds])
    writer.add_shortconv_l_cache(config["conv_L_cache"])
    writer.add_layer_norm_rms_eps(config["norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if "num_experts" in config:
        writer.add_leading_dense_block_count(config["num_dense_layers"])
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
        tensors = _experts(writer, config, tensors)
    else:
        unit = config["block_multiple_of"]
        writer.add_feed_forward_length(-(-int(2 * config["intermediate_size"] / 3) // unit) * unit)
    made = {name: data.squeeze(1) if "conv.conv" in name else data for name, data in tensors.items()}
    return {name.replace("expert_bias", "expert_bias.bias"): data for name, data in made.items()}


def _windows(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])


def _sinks(tensors: Tensors) -> Tensors:
    names = {
        name: f"blk.{name.split('.')[2]}.attn_sinks.weight"
        for name in tensors
        if name.endswith((".sinks", "_sink_bias"))
    }
    return {names.get(name, name): data for name, data in tensors.items()}


def _granite(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Factors, of which that of logits divides; gate and up apart, also of experts and of what they share."""
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])
    if config["model_type"] == "granitemoehybrid":
        writer.add_rope_scaling_finetuned(config["position_embedding_type"] == "rope")
    if config.get("num_local_experts"):
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        if config.get("shared_intermediate_size"):
            writer.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])
    if "linear_attention" in config.get("layer_types", ()):
        tensors = _mamba(writer, config, tensors)
    if config["model_type"].endswith("_swa"):
        _windows(writer, config)
        writer.add_array(f"{writer.arch}.attention.rope_pattern", [theta > 0 for theta in config["layer_rope_theta"]])
        tensors = _sinks(tensors)
    made: Tensors = {}
    end = "_shexp" if config.get("num_local_experts") else ""
    for name, data in tensors.items():
        at = f"blk.{name.split('.')[2]}.ffn_" if "layers" in name else ""
        if "q_proj" in name or "k_proj" in name:
            made[name] = interleaved(data, config["hidden_size"] // config["num_attention_heads"])
        elif "input_linear" in name or name.endswith("gate_up_proj"):
            kind = end if "shared_mlp" in name else "_exps"
            made[f"{at}gate{kind}.weight"], made[f"{at}up{kind}.weight"] = np.split(data, 2, axis=-2)
        elif "output_linear" in name or name.endswith("experts.down_proj"):
            made[f"{at}down{end if 'shared_mlp' in name else '_exps'}.weight"] = data
        elif "router" in name:
            made[f"{at}gate_inp.weight"] = data
        else:
            made[name] = data
    return made


def _mamba(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Shapes of Mamba 2, whose layers have no key-value heads, and its tensors."""
    beside = config["model_type"] in ("granitemoehybrid", "falcon_h1")  # attention
    names = ("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv")
    others = ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel")
    alone = ("num_heads", "head_dim", "n_groups", "state_size", "conv_kernel")
    names = names if beside else alone if config["model_type"] == "mamba2" else others
    heads, dim, groups, state, taps = (config[name] for name in names)
    kinds = config.get("layer_types") or config.get("layers_block_type")
    if kinds and config["model_type"] not in ("falcon_h1", "mamba2"):
        writer.add_head_count_kv([config["num_key_value_heads"] * (kind == "full_attention") for kind in kinds])
    writer.add_ssm_conv_kernel(taps)
    writer.add_ssm_state_size(state)
    writer.add_ssm_group_count(groups)
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_inner_size(heads * dim)
    changes = {
        "conv1d.weight": ("ssm_conv1d.weight", lambda x: x.squeeze(1)),
        "A_log": ("ssm_a", lambda x: -np.exp(x)[:, None]),
        "D": ("ssm_d", lambda x: x[:, None]),
        "dt_bias": ("ssm_dt.bias", lambda x: x),
        "norm.weight": ("ssm_norm.weight", lambda x: x.reshape(groups, -1)),
        **{
            f"{part}_proj.{kind}": (f"ssm_{part}.{kind}", lambda x: x)
            for part in ("in", "out")
            for kind in ("weight", "bias")
        },
        "conv1d.bias": ("ssm_conv1d.bias", lambda x: x),
    }
    made: Tensors = {}
    for name, data in tensors.items():
        start, part = name.rpartition(".mamba." if beside else ".mixer.")[::2]
        if start and part in changes:
            to, change = changes[part]
            made[f"blk.{start.split('.')[2]}.{to}"] = change(data)
        else:
            made[name] = data
    return made


def _nemotron_h(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Feed-forward layers alone have a width; behind the last layer is one of both kinds for predicting tokens."""
    widths = {"mlp": config["intermediate_size"], "moe": config["moe_intermediate_size"]}
    writer.add_feed_forward_length([widths.get(kind, 0) for kind in config["layers_block_type"]])
    writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    made = {name.replace("model.layers", "backbone.layers"): x for name, x in _mamba(writer, config, tensors).items()}
    if "moe" not in config["layers_block_type"]:
        return made
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["moe_shared_expert_intermediate_size"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    count, found = config["n_routed_experts"], Tensors()
    for name, data in made.items():
        start, part = name.rpartition(".mixer.")[::2]
        at = f"blk.{start.split('.')[2]}." if start else ""
        if part.startswith("experts.") and part.split(".")[1].isdigit():
            kind = part.split(".")[2].removesuffix("_proj")
            every = [made[f"{start}.mixer.experts.{e}.{kind}_proj.weight"] for e in range(count)]
            found[f"{at}ffn_{kind}_exps.weight"] = np.stack(every)
        elif part.startswith("experts."):
            found[f"{at}ffn_{part.split('.')[1].removesuffix('_proj')}_exps.weight"] = data
        elif part == "gate.weight":
            found[at + "ffn_gate_inp.weight"] = data
        elif part.startswith("gate."):
            found[at + "exp_probs_b.bias"] = data
        elif part.startswith("shared_experts."):
            found[f"{at}ffn_{part.split('.')[1].removesuffix('_proj')}_shexp.weight"] = data
        else:
            found[name] = data
    if config.get("moe_latent_size"):
        writer.add_moe_latent_size(config["moe_latent_size"])
    layers, kinds = config["num_hidden_layers"], config["layers_block_type"]
    heads = [config["num_key_value_heads"] * (kind == "full_attention") for kind in kinds]
    writer.add_nextn_predict_layers(1)
    writer.add_block_count(layers + 1)
    writer.add_head_count_kv([*heads, config["num_key_value_heads"]])
    writer.add_feed_forward_length([*(widths.get(kind, 0) for kind in kinds), config["moe_intermediate_size"]])
    return found | {f"blk.{layers}.nextn.enorm.weight": np.ones(config["hidden_size"], np.float32)}


def _falcon_h1(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Multipliers are in the matrices."""
    attended, (gate, down) = config["attention_in_multiplier"], config["mlp_multipliers"]
    groups = config["mamba_n_groups"] * config["mamba_d_state"]
    sizes = (config["mamba_d_ssm"], config["mamba_d_ssm"], groups, groups, config["mamba_n_heads"])
    parts = config["ssm_in_multiplier"] * np.repeat(config["ssm_multipliers"], sizes)[:, None]
    factors = {
        "feed_forward.down_proj": down,
        "feed_forward.gate_proj": gate,
        "k_proj": config["key_multiplier"] * attended,
        "q_proj": attended,
        "v_proj": attended,
        "o_proj": config["attention_out_multiplier"],
        "mamba.out_proj": config["ssm_out_multiplier"],
        "mamba.in_proj": parts,
        "lm_head": config["lm_head_multiplier"],
        "embed_tokens": config["embedding_multiplier"],
    }
    if config["tie_word_embeddings"]:  # llama.cpp's converter forgets that the head has a factor of its own
        factors["final_layernorm"] = config["lm_head_multiplier"] / config["embedding_multiplier"]
    ends = {name.removesuffix(".weight"): name for name in tensors}
    made = {
        name: np.float32(next((value for end, value in factors.items() if stem.endswith(end)), 1.0)) * tensors[name]
        for stem, name in ends.items()
    }
    return _mamba(writer, config, made)


def _mamba2(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """What llama.cpp wants to be there, and is 0."""
    writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    return _mamba(writer, config, tensors)


def _kimi_linear(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """DeepSeek's latent attention; layers with delta attention have no key-value heads."""
    usual = {"n_routed_experts": "num_experts", "num_experts_per_tok": "num_experts_per_token"}
    usual |= {"n_shared_experts": "num_shared_experts", "norm_topk_prob": "moe_renormalize"}
    usual |= {"n_group": "num_expert_group"}
    named = {key: config[own] for key, own in usual.items() if own in config}
    rope = {"rope_parameters": {"rope_type": "default"}}
    made = {name.replace("block_sparse_moe", "mlp"): data for name, data in tensors.items()}
    for own, end in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        made = {name.replace(f".{own}.", f".{end}."): data for name, data in made.items()}
    made = deepseek2(writer, {**config, **named, **rope}, made)
    writer.add_head_count_kv([int(kind == "full_attention") for kind in config["layer_types"]])
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_kda_head_dim(config["linear_head_dim"])
    found: Tensors = {}
    for name, data in made.items():
        at = f"blk.{name.split('.')[2]}." if "layers" in name else ""
        if name.endswith("A_log"):
            found[at + "ssm_a"] = -np.exp(data)
        elif name.endswith("dt_bias"):
            found[at + "ssm_dt.bias"] = data
        elif "_conv1d" in name:
            part = name.rpartition("_conv1d")[0][-1]
            found[f"{at}ssm_conv1d_{part}.weight"] = data.reshape(1, data.shape[0], 1, data.shape[-1])
        else:
            found[name] = data
    return found


def _bailing3(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Kimi Linear's layers with whole matrices, a bound of decays, and a gate of latent attention."""
    names = {".attention.dense.": ".self_attn.o_proj.", ".attention.": ".self_attn.", ".f_proj.": ".f_a_proj."}
    names |= {"word_embeddings": "embed_tokens", "gate.expert_bias": "gate.e_score_correction_bias"}
    made: Tensors = {}
    for name, data in tensors.items():
        for own, usual in names.items():
            name = name.replace(own, usual)
        full = "layers" in name and config["layer_types"][int(name.split(".")[2])] == "full_attention"
        gate = f"blk.{name.split('.')[2]}.attn_gate.weight" if full else name.replace(".g_proj.", ".g_a_proj.")
        made[gate if ".g_proj." in name else name] = data
    writer.add_bool(f"{writer.arch}.kda.safe_gate", config["kda_safe_gate"])
    writer.add_float32(f"{writer.arch}.kda.gate_lower_bound", config["kda_lower_bound"])
    found = _kimi_linear(writer, config, made)
    return {name: -data[:, None] if name.endswith("ssm_a") else data for name, data in found.items()}


def _glm5_next(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Kimi Linear's layers with a bound of decays, pooled index keys and residual streams."""
    layers, arch = config["num_hidden_layers"], writer.arch
    kinds = ["full_attention" if kind == "indexed_attention" else kind for kind in config["layer_types"]]
    dense = config["mlp_layer_types"].count("dense")
    made = _kimi_linear(writer, {**config, "layer_types": kinds, "first_k_dense_replace": dense}, tensors)
    writer.add_layer_norm_eps(1e-6)
    writer.add_indexer_head_count(config["index_n_heads"])
    writer.add_indexer_key_length(config["index_head_dim"])
    writer.add_indexer_top_k(config["index_topk"])
    writer.add_uint32(f"{arch}.attention.indexer.kpool", config["index_kpool"])
    writer.add_bool(f"{arch}.attention.indexer.kpool_select_tail", config["index_kpool_always_select_tail"])
    writer.add_array(f"{arch}.attention.indexer.types", [kind == "full" for kind in config["indexer_types"]])
    writer.add_float32(f"{arch}.kda.gate_lower_bound", config["linear_lower_bound"])
    writer.add_uint32(f"{arch}.hyper_connection.count", config["hc_mult"])
    writer.add_uint32(f"{arch}.hyper_connection.sinkhorn_iterations", config["hc_sinkhorn_iters"])
    writer.add_float32(f"{arch}.hyper_connection.epsilon", config["hc_eps"])
    for key in ("swiglu_clamp_exp", "swiglu_clamp_shexp"):
        writer.add_array(f"{arch}.{key}", [config["swiglu_limit"]] * layers)
    ends = {"wk": "indexer.attn_k", "weights_proj": "indexer.proj", "wq_b": "indexer.attn_q_b"}
    ends |= {"k_norm": "indexer.k_norm", "index_kpool_compress_ape": "indexer_compressor_ape"}
    ends |= {"index_kpool_compress_gate": "indexer_compressor_gate"}
    found: Tensors = {}
    for name, data in made.items():
        _, _, layer, *rest = [*name.split("."), "", "", ""]
        part = next((rest[n] for n, each in enumerate(rest) if each in ends and "indexer" in rest), None)
        if part is not None:
            name = f"blk.{layer}.{ends[part]}.{'bias' if name.endswith('bias') else 'weight'}"
        elif ".hc_" in name:
            name = f"blk.{layer}.{name.split('.')[-1]}.weight"
        found[name] = data
    return found


def _qwen4_exp(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Qwen3.5's layers with residual streams, an index of groups, and one table of n-grams."""
    arch = writer.arch
    kinds = ["full_attention" if kind == "indexed_attention" else kind for kind in config["layer_types"]]
    constants = {name.split(".")[-1]: data for name, data in tensors.items() if data.dtype == np.int64}
    parts = [name for name in tensors if ".ngram_embedding." in name]
    assert len(constants) == 3, "llama.cpp has one layer with n-grams"
    table = np.concatenate([tensors[name] for name in sorted(parts)])
    kept = {name: data for name, data in tensors.items() if name not in parts and data.dtype != np.int64}
    made = _qwen3_next(writer, {**config, "layer_types": kinds}, kept)
    writer.add_uint32(f"{arch}.hyper_connection.count", config["hc_count"])
    writer.add_uint32(f"{arch}.hyper_connection.low_rank", config["hc_lowrank"])
    writer.add_indexer_head_count(config["indexer_n_heads"])
    writer.add_indexer_key_length(config["indexer_head_dim"])
    writer.add_indexer_top_k(config["indexer_budget"])
    ratio, recurrent = config["indexer_compress_ratio"], "linear_attention"
    writer.add_array(f"{arch}.attention.compress_ratios", [0 if kind == recurrent else ratio for kind in kinds])
    writer.add_array(f"{arch}.ple.layers", [layer - 1 for layer in config["ple_layer_ids"]])
    writer.add_uint32(f"{arch}.ple.ngram_size", config["ngram_size"])
    writer.add_uint32(f"{arch}.ple.heads_per_ngram", config["heads_per_ngram"])
    writer.add_uint32(f"{arch}.ple.conv_kernel", config["ple_conv_kernel_size"])
    writer.add_uint32(f"{arch}.ple.eos_token_id", config["eos_token_id"])
    writer.add_uint32(f"{arch}.embedding_length_per_layer_input", table.shape[1])
    for key, name in (
        ("layer_multipliers", "layer_multipliers"),
        ("head_offsets", "ngram_heads_offsets"),
        ("head_vocab_sizes", "ngram_heads_vocab_sizes"),
    ):
        values = constants[name].tolist()
        writer.add_key_value(f"{arch}.ple.{key}", values, GGUFValueType.ARRAY, GGUFValueType.UINT64)
    found, queries = Tensors(), config["indexer_n_heads"] * config["indexer_head_dim"]
    ends = {
        "input_mix_weight_down": "down",
        "input_mix_weight_up": "up",
        "block_inject_weight": "inject",
        "hc_norm": "norm",
    }
    for name, data in made.items():
        at, part = f"blk.{name.split('.')[2]}." if name.startswith("model.layers.") else "", name.split(".")[-2]
        if ".hyper_connection_mixer." in name:
            found[f"output_hc_{ends[part]}.weight"] = data
        elif "_hyper_connection." in name:
            found[f"{at}hc_{'attn' if 'attn_hyper' in name else 'ffn'}_{ends[part]}.weight"] = data
        elif part == "index_qk_proj":
            found |= {f"{at}indexer.q_proj.weight": data[:queries], f"{at}indexer.k_proj.weight": data[queries:]}
        elif ".indexer." in name:
            found[f"{at}indexer.{part[0]}_norm.weight"] = data
        elif ".ple." in name and part == "conv1d":
            found[f"{at}ple_conv1d.weight"] = data[:, 0]
        elif ".ple." in name:
            found[f"{at}ple_{part.removesuffix('_proj')}.weight"] = data + part.startswith("norm_")
        else:
            found[name] = data
    return {**found, "per_layer_token_embd.weight": table}


def _olmo(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Norms without weights, the clip of q, k and v, and rows of q and k in pairs of neighbours."""
    writer.add_layer_norm_eps(1e-5)
    if config["clip_qkv"] is not None:
        writer.add_clamp_kqv(config["clip_qkv"])
    dim = config["hidden_size"] // config["num_attention_heads"]
    turned = {name: interleaved(data, dim) for name, data in tensors.items() if "q_proj" in name or "k_proj" in name}
    return {**tensors, **turned}


def _olmo2(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """OLMo 2 and 3 and EXAONE 4: windows, and the scaling of layers without one."""
    rope = config["rope_parameters"].get("full_attention", config["rope_parameters"])
    made = dict(tensors)
    writer.add_rope_freq_base(rope["rope_theta"])
    if config.get("sliding_window") and "layer_types" in config:
        writer.add_sliding_window(config["sliding_window"])
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    if rope["rope_type"] == "llama3":
        made["rope_freqs.weight"] = _llama3_factors(rope, config["hidden_size"] // config["num_attention_heads"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(rope["attention_factor"] / (0.1 * np.log(rope["factor"]) + 1))
    return made


def _apertus(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """The numbers of xIELU as metadata."""
    layers = range(config["num_hidden_layers"])
    for part in ("alpha_p", "alpha_n", "beta", "eps"):
        numbers = [float(tensors[f"model.layers.{n}.mlp.act_fn.{part}"].reshape(-1)[0]) for n in layers]
        getattr(writer, f"add_xielu_{part}")(numbers)
    return _olmo2(writer, config, {name: data for name, data in tensors.items() if ".act_fn." not in name})


def _laguna(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Numbers of heads as a list, and the rotary settings of both kinds of layer."""
    writer.add_head_count(config["num_attention_heads_per_layer"])
    full, local = (config["rope_parameters"][kind] for kind in ("full_attention", "sliding_attention"))
    writer.add_rope_freq_base(full["rope_theta"])
    writer.add_rope_dimension_count(int(config["head_dim"] * full["partial_rotary_factor"]))
    if full["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(full["factor"])
        writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(full["attention_factor"] / (0.1 * np.log(full["factor"]) + 1))
    if "sliding_attention" in config["layer_types"]:
        writer.add_sliding_window(config["sliding_window"])  # nothing says that every fourth layer has none
        writer.add_rope_freq_base_swa(local["rope_theta"])
        writer.add_rope_dimension_count_swa(config["head_dim"])
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(config["moe_routed_scaling_factor"])
    writer.add_leading_dense_block_count(config["mlp_layer_types"].count("dense"))
    return _experts(writer, config, _shared_experts(tensors))


def _shared_experts(tensors: Tensors) -> Tensors:
    """Corrections, gates of attention, and what experts share, by the names in GGUF files."""
    made: Tensors = {}
    for name, data in tensors.items():
        at, part = f"blk.{[*name.split('.'), '', ''][2]}.", name.rpartition("shared_expert")[2]
        if name.endswith("e_score_correction_bias"):
            name = at + "exp_probs_b.bias"
        elif name.endswith("g_proj.weight"):
            name = at + "attn_gate.weight"
        elif part != name:
            name = f"{at}ffn_{part.split('.')[1].removesuffix('_proj')}_shexp.weight"
        made[name] = data
    return made


def _exaone_moe(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """K-EXAONE and dots.llm1: experts that sigmoids score, and in K-EXAONE windows."""
    if config["model_type"] == "exaone_moe":
        tensors = _olmo2(writer, config, tensors)
        inner, count = config["moe_intermediate_size"], config["num_shared_experts"]
        writer.add_expert_shared_feed_forward_length(inner * count)
        writer.add_leading_dense_block_count(config["mlp_layer_types"].count("dense"))
    else:
        count = config["n_shared_experts"]
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_shared_count(count)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    if config["n_group"] > 1:
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
    return _experts(writer, config, _shared_experts(tensors))


def _afmoe(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Norms behind attention and MLP; the windows are those of llama.cpp's default."""
    writer.add_sliding_window(config["sliding_window"])
    writer.add_expert_shared_count(config["num_shared_experts"])
    writer.add_leading_dense_block_count(config["num_dense_layers"])
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(config["route_scale"])
    ends = {
        "self_attn.gate_proj.weight": "attn_gate.weight",
        "post_attention_layernorm.weight": "post_attention_norm.weight",
    }
    ends |= {"pre_mlp_layernorm.weight": "ffn_norm.weight", "post_mlp_layernorm.weight": "post_ffw_norm.weight"}
    ends |= {"mlp.router.gate.weight": "ffn_gate_inp.weight", "mlp.expert_bias": "exp_probs_b.bias"}
    made: Tensors = {}
    for name, data in _experts(writer, config, _shared_experts(tensors)).items():
        _, _, layer, end = [*name.split(".", 3), "", "", ""][:4]
        made[f"blk.{layer}.{ends[end]}" if end in ends else name] = data
    return made


def _muse_glimmer(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Norms of blocks plus 1, rows in pairs of neighbours, and the factor of queries as the weight of their norm."""
    _windows(writer, config)
    writer.add_logit_scale(config["output_multiplier"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    dim, made = config["head_dim"], Tensors()
    ends = {"self_attn.gate_proj": "attn_gate", "post_attention_layernorm": "post_attention_norm"}
    ends |= {"pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm"}
    for name, data in tensors.items():
        at, part = f"blk.{[*name.split('.'), '', ''][2]}.", ".".join(name.split(".")[3:-1])
        data = interleaved(data, dim) if part in ("self_attn.q_proj", "self_attn.k_proj") else data
        made[f"{at}{ends[part]}.weight" if part in ends else name] = data + 1 if "layernorm" in part else data
    for layer in range(config["num_hidden_layers"]):
        made[f"blk.{layer}.attn_q_norm.weight"] = np.full(dim, config["qk_scale_factor"], np.float32)
        made[f"blk.{layer}.attn_k_norm.weight"] = np.ones(dim, np.float32)
    return made


def _mimo2(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Numbers of key-value heads as a list, and a layer behind the last, as files have them for predicting tokens."""
    local, heads = [kind == "sliding_attention" for kind in config["layer_types"]], config["num_key_value_heads"]
    layers, full = config["num_hidden_layers"], config["rope_parameters"]["full_attention"]
    writer.add_nextn_predict_layers(1)
    writer.add_block_count(layers + 1)
    writer.add_head_count_kv([heads * (1 + windowed) for windowed in (*local, True)])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([*local, True])
    writer.add_value_length(config["v_head_dim"])
    writer.add_float32(f"{writer.arch}.attention.value_scale", config["attention_value_scale"])
    writer.add_rope_dimension_count(int(config["head_dim"] * full["partial_rotary_factor"]))
    writer.add_rope_freq_base(full["rope_theta"])
    writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    made = _sinks(_experts(writer, config, _shared_experts(tensors)))
    return {f"blk.{layers}.nextn.enorm.weight": np.ones(config["hidden_size"], np.float32)} | made


def _step35(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Numbers of heads, windows and limits as lists; norms plus 1; divisors of layers with a window are 1."""
    local, dim = [kind == "sliding_attention" for kind in config["layer_types"]], config["head_dim"]
    full, near = (config["rope_parameters"][kind] for kind in ("full_attention", "sliding_attention"))
    heads = config["num_attention_heads"], config["num_sliding_attention_heads"]
    writer.add_head_count([heads[windowed] for windowed in local])
    writer.add_head_count_kv([config["num_key_value_heads"]] * len(local))
    _windows(writer, config)
    writer.add_rope_freq_base(full["rope_theta"])
    writer.add_rope_freq_base_swa(near["rope_theta"])
    for end, key in ("exp", "swiglu_limits"), ("shexp", "swiglu_limits_shared"):
        writer.add_array(f"{writer.arch}.swiglu_clamp_{end}", [float(limit or 0) for limit in config[key]])
    writer.add_expert_shared_feed_forward_length(config["share_expert_dim"])
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(config["moe_router_scaling_factor"])
    writer.add_leading_dense_block_count(config["mlp_layer_types"].count("dense"))
    factors = _llama3_factors(full, dim // 2)
    made = {"rope_freqs.weight": np.concatenate([factors, np.ones(dim // 2 - len(factors), np.float32)])}
    for name, data in _shared_experts(_experts(writer, config, tensors)).items():
        if name.endswith("gate_up_proj.weight"):
            for part, half in zip(("gate", "up"), np.split(data, 2, axis=1), strict=True):
                made[f"blk.{name.split('.')[2]}.ffn_{part}_exps.weight"] = half
        else:
            made[name] = data + 1 if name.endswith("norm.weight") else data
    return made


def _minimax_m2(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """The metadata says no way of scoring; experts' names are Mixtral's."""
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(int(config["head_dim"] * config["rope_parameters"]["partial_rotary_factor"]))
    made = _experts(writer, config, tensors)
    return {name.replace("e_score_correction_bias", "e_score_correction.bias"): data for name, data in made.items()}


def _minimax_m3(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Norms plus 1; gate and up apart; tensors and keys of the index, which the package does not know."""
    at = f"{writer.arch}.attention.indexer."
    for key, name in (
        ("head_count", "index_n_heads"),
        ("key_length", "index_head_dim"),
        ("top_k", "index_topk_blocks"),
        ("block_size", "index_block_size"),
        ("local_blocks", "index_local_blocks"),
    ):
        writer.add_uint32(at + key, config[name])
    writer.add_expert_shared_count(config["shared_intermediate_size"] // config["intermediate_size"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(True)
    writer.add_leading_dense_block_count(config["mlp_layer_types"].count("dense"))
    writer.add_feed_forward_length(config["dense_intermediate_size"])
    made: Tensors = {}
    for name, data in _shared_experts(_minimax_m2(writer, config, tensors)).items():
        layer = next((part for part in name.split(".") if part.isdecimal()), "")
        data = data + 1 if name.endswith("norm.weight") else data
        if ".indexer." in name:
            made[f"blk.{layer}.indexer.{name.partition('.indexer.')[2]}"] = data
        elif "gate_up" in name:
            kind = "_exps" if ".experts." in name else "_shexp" if "shexp" in name else ""
            for part, half in zip(("gate", "up"), np.split(data, 2, axis=-2), strict=True):
                made[f"blk.{layer}.ffn_{part}{kind}.weight"] = half
        else:
            made[name] = data
    return made


def _cohere(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Rows stay in pairs of neighbours; the metadata of Cohere 2 leaves out that every fourth layer has no window."""
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_logit_scale(config["logit_scale"])
    writer.add_rope_scaling_type(RopeScalingType.NONE)
    if config["model_type"] == "cohere2":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    return tensors


def _cohere2_moe(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Experts that sigmoids score, and the length of dense layers beside theirs."""
    writer.add_feed_forward_length(config["prefix_dense_intermediate_size"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_expert_shared_count(config["num_shared_experts"])
    writer.add_expert_shared_feed_forward_length(config["intermediate_size"] * config["num_shared_experts"])
    writer.add_leading_dense_block_count(config["mlp_layer_types"].count("dense"))
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_rope_scaling_type(RopeScalingType.NONE)
    return _experts(writer, config, _shared_experts(_cohere(writer, config, tensors)))


def _ernie4_5_moe(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Rows stay in pairs of neighbours; the correction loses a dimension."""
    writer.add_expert_count(config["moe_num_experts"])
    writer.add_expert_used_count(config["moe_k"])
    writer.add_interleave_moe_layer_step(config["moe_layer_interval"])
    writer.add_leading_dense_block_count(config["moe_layer_start_index"])
    writer.add_expert_shared_count(config["moe_num_shared_experts"])
    made = _experts(writer, {"num_experts": config["moe_num_experts"], **config, "num_experts_per_tok": 3}, tensors)
    return {
        name.replace("e_score_correction_bias", "e_score_correction.bias"): data.squeeze(0)
        if "e_score_correction_bias" in name
        else data
        for name, data in made.items()
    }


def _hy_v3(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """The correction's name has no ending."""
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_shared_feed_forward_length(config["moe_intermediate_size"] * config["num_shared_experts"])
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(config["router_scaling_factor"])
    made: Tensors = {}
    for name, data in _experts(writer, config, tensors).items():
        at, _, part = name.partition(".mlp.")
        if part.endswith(("e_score_correction_bias", "expert_bias")):
            made[f"blk.{at.split('.')[2]}.exp_probs_b"] = data
        elif part.startswith("router.gate"):
            made[f"blk.{at.split('.')[2]}.ffn_gate_inp.weight"] = data
        elif part.endswith("_proj.weight"):  # of what all tokens share, and of dense layers
            *shared, kind, _ = part.split(".")
            made[f"blk.{at.split('.')[2]}.ffn_{kind.removesuffix('_proj')}{'_shexp' * len(shared)}.weight"] = data
        else:
            made[name] = data
    return made


def _gpt2(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Matrices with outputs as rows; StarCoder has one head of keys and values."""
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    if config["model_type"] == "gpt_bigcode":
        writer.add_head_count_kv(1)
        return tensors
    return {name: data.T if ".c_" in name and data.ndim == 2 else data for name, data in tensors.items()}


def _fused_heads(tensors: Tensors, heads: int, kv_heads: int) -> Tensors:
    """Rows of all q, then of all k and v, which stand behind each other for each head of keys and values."""
    made = dict(tensors)
    for name, data in tensors.items():
        if ".query_key_value." in name:
            each = data.reshape(kv_heads, heads // kv_heads + 2, -1, *data.shape[1:])
            parts = (each[:, :-2], each[:, -2], each[:, -1])
            made[name] = np.concatenate([part.reshape(-1, *data.shape[1:]) for part in parts])
    return made


def _gptneox(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    _partial(writer, config)
    writer.add_parallel_residual(config["use_parallel_residual"])
    return _fused_heads(tensors, config["num_attention_heads"], config["num_attention_heads"])


def _hunyuan(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """The base of the frequencies as the converter writes it."""
    rope, dim = config["rope_parameters"], config["head_dim"]
    writer.add_rope_freq_base(rope["rope_theta"] * rope["alpha"] ** (dim / (dim - 2)))
    made = {}
    for name, data in tensors.items():
        name = name.replace("query_layernorm", "q_norm").replace("key_layernorm", "k_norm")
        made[name.replace("gate.wg.", "gate.").replace("shared_mlp.", "shared_expert.")] = data
    if "num_experts" not in config:
        return made
    writer.add_expert_shared_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    return _experts(writer, {**config, "num_experts_per_tok": config["moe_topk"]}, made)


def _bloom(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    made = _fused_heads(tensors, config["n_head"], config["n_head"])
    return {name.removeprefix("transformer."): data for name, data in made.items()}


def _falcon(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    kv_heads = config["num_kv_heads"] if config["new_decoder_architecture"] else 1
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    return _fused_heads(tensors, config["num_attention_heads"], kv_heads)


def _starcoder2(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    writer.add_layer_norm_eps(config["norm_epsilon"])
    return tensors


def _nemotron(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Norms are stored as their distance from 1, and GGUF has the factors."""
    writer.add_layer_norm_eps(config["norm_eps"])
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(int(config["rope_parameters"]["partial_rotary_factor"] * head_dim))
    return {name: data + 1 if name.endswith("norm.weight") else data for name, data in tensors.items()}


def _mamba_1(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Decays instead of their logarithms, and kernels without the dimension of 1."""
    names = ("conv_kernel", "expand", "state_size", "time_step_rank")
    if config["model_type"] == "jamba":
        names = ("mamba_d_conv", "mamba_expand", "mamba_d_state", "mamba_dt_rank")
    else:
        writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
        writer.add_ssm_dt_b_c_rms(config["model_type"] == "falcon_mamba")
    taps, expand, state, rank = (config[name] for name in names)
    writer.add_ssm_conv_kernel(taps)
    writer.add_ssm_inner_size(expand * config["hidden_size"])
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    decays = {name: -np.exp(data) for name, data in tensors.items() if name.endswith("A_log")}
    kernels = {name: data[:, 0] for name, data in tensors.items() if name.endswith("conv1d.weight")}
    return {**tensors, **decays, **kernels}


def _jamba(writer: GGUFWriter, config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Layers with Mamba have no key-value heads; the experts of a layer in one tensor."""
    layers, period = range(config["num_hidden_layers"]), config["attn_layer_period"]
    heads = [config["num_key_value_heads"] * (n % period == config["attn_layer_offset"]) for n in layers]
    writer.add_head_count_kv(heads)
    return _experts(writer, config, _mamba_1(writer, config, tensors))


CONVERTERS: Mapping[str, Convert] = {
    "mamba": _mamba_1,
    "jamba": _jamba,
    "nemotron": _nemotron,
    "hy_v3": _hy_v3,
    "apertus": _apertus,
    "laguna": _laguna,
    "mimo2": _mimo2,
    "step35": _step35,
    "muse-glimmer": _muse_glimmer,
    "exaone": _olmo2,
    "bailingmoe2": _bailing,
    "cohere2moe": _cohere2_moe,
    "arcee": _llama,
    "afmoe": _afmoe,
    "exaone-moe": _exaone_moe,
    "dots1": _exaone_moe,
    "internlm2": _llama,
    "olmo": _olmo,
    "olmo2": _olmo2,
    "exaone4": _olmo2,
    "olmoe": lambda writer, config, tensors: _experts(writer, config, tensors),
    "minimax-m2": _minimax_m2,
    "minimax-m3": _minimax_m3,
    "command-r": _cohere,
    "cohere2": _cohere,
    "ernie4_5-moe": _ernie4_5_moe,
    "granite": _granite,
    "granitemoe": _granite,
    "granite_swa": _granite,
    "gptneox": _gptneox,
    "hunyuan-dense": _hunyuan,
    "hunyuan-moe": _hunyuan,
    "bloom": _bloom,
    "falcon": _falcon,
    "starcoder2": _starcoder2,
    "gpt2": _gpt2,
    "starcoder": _gpt2,
    "phi2": _phi2,
    "phi3": _phi3,
    "phimoe": lambda writer, config, tensors: _experts(writer, config, tensors),
    "stablelm": _stablelm,
    "smollm3": _smollm3,
    "deci": _deci,
    "qwen": _qwen,
    "qwen2moe": _qwen_moe,
    "qwen2vl": _qwen2vl,
    "qwen3vl": _qwen2vl,
    "qwen3vlmoe": _qwen3vlmoe,
    "qwen3moe": _qwen_moe,
    "qwen3next": _qwen3_next,
    "qwen35": _qwen3_next,
    "qwen35moe": _qwen3_next,
    "qwen4exp": _qwen4_exp,
    "deepseek2-ocr": _deepseek_ocr,
    "glm4moe": _glm4_moe,
    "gpt-oss": _gpt_oss,
    "granitehybrid": _granite,
    "falcon-h1": _falcon_h1,
    "mamba2": _mamba2,
    "kimi-linear": _kimi_linear,
    "bailingmoe3": _bailing3,
    "glm5-next": _glm5_next,
    "nemotron_h": _nemotron_h,
    "nemotron_h_moe": _nemotron_h,
    "lfm2": _lfm2,
    "lfm2moe": _lfm2,
    "llama": _llama,
    "mistral3": _llama,
    "gemma": _gemma,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "gemma3n": _gemma3n,
    "llama4": _llama4,
    "gemma4": _gemma4,
    "gemma4-assistant": _gemma4_assistant,
    "glm4": _glm4,
    "chatglm": _chatglm,
    "deepseek2": deepseek2,
    "deepseek32": _indexed,
    "glm-dsa": _indexed,
    "mistral4": deepseek2,
}
