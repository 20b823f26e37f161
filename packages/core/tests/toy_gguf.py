# SPDX-License-Identifier: MIT
"""The random model of `toy_model` as one GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants

from candle_vllm.core.testing.toy_model import SPECIAL_TOKENS, TOY_TEMPLATE, byte_names, random_weights, toy_config


def write_toy_gguf(
    path: Path,
    config: Mapping[str, Any] | None = None,
    *,
    quantization: str = "Q8_0",
    others: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Path:
    """Write the same random model as one GGUF file with quantised matrices.

    Args:
        path: the file; its folder must exist.
        config: result of `toy_config` for llama or qwen2.
        quantization: a GGML type that the `gguf` package can make: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, F16, BF16, F32.
        others: types of other matrices, by the end of their GGUF name: {"attn_v": "F16"}.
        seed: seed of the random weights.

    Returns:
        The path.
    """
    config = dict(config or toy_config())
    name = config["model_type"]
    writer = GGUFWriter(path, name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    add_toy_vocabulary(writer)
    for hf_name, data in random_weights(config, seed).items():
        if name == "llama" and ("q_proj" in hf_name or "k_proj" in hf_name):
            data = _interleaved(data, config["head_dim"])
        gguf_name = _gguf_name(hf_name)
        if data.ndim == 2:
            matching = [kind for end, kind in (others or {}).items() if gguf_name.endswith(f"{end}.weight")]
            kind = GGMLQuantizationType[matching[0] if matching else quantization]
            writer.add_tensor(gguf_name, quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_toy_vocabulary(writer: GGUFWriter) -> None:
    """Writes the byte tokenizer and its chat template into a GGUF file's metadata."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*byte_names(), *SPECIAL_TOKENS, "he"])
    writer.add_token_types([1] * 256 + [3] * len(SPECIAL_TOKENS) + [1])
    writer.add_token_merges(["h e"])  # a file without merges has no byte-pair tokenizer
    writer.add_eos_token_id(258)
    writer.add_chat_template(TOY_TEMPLATE)


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


def _gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    if stem.startswith("model.layers."):
        return f"blk.{layer}.{_GGUF_NAMES[part]}.{kind}"
    return f"{_GGUF_NAMES[stem]}.{kind}"


def _interleaved(data: np.ndarray, head_dim: int) -> np.ndarray:
    """Return rows in the order of GGUF's llama files: the two halves of each head alternate."""
    heads = data.reshape(-1, 2, head_dim // 2, *data.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(data.shape)
