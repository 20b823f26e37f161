# SPDX-License-Identifier: MIT
"""A real checkpoint of a few hundred kilobytes: random weights, a byte tokenizer and a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from candle_vllm.core.quantization.plain import read_plain
from candle_vllm.core.text.token_bytes import BYTE_ALPHABET

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOY_VOCAB_SIZE = 272  # 256 bytes, the special tokens, and a few unused rows, as in real models

TOY_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

_TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def toy_config(model_type: str = "llama", **overrides: Any) -> dict[str, Any]:
    """Return the `config.json` of a two-layer model; `overrides` replace or add keys."""
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": TOY_VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "torch_dtype": "float32",
    }
    return config | overrides


def write_toy_model(folder: Path, config: Mapping[str, Any] | None = None, *, seed: int = 0) -> Path:
    """Write a checkpoint that loads like any other (config, safetensors, tokenizer's files); return the folder.

    Args:
        folder: folder, which is created if it does not exist.
        config: configuration as from `toy_config`; "torch_dtype" is float64, float32, float16 or bfloat16.
        seed: seed of the random weights. Equal arguments give equal files.
    """
    config = dict(config or toy_config())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_plain(folder / "model.safetensors", random_weights(config, seed), _TYPES[config["torch_dtype"]])
    write_toy_tokenizer(folder)
    return folder


def save_plain(path: Path, weights: Mapping[str, np.ndarray], type_name: str) -> None:
    """Write float32 weights in one type to a safetensors file. The format's numpy writer lacks bfloat16."""
    data = {
        name: read_plain(weight.view(np.uint8), "F32", weight.shape, type_name).tobytes()
        for name, weight in weights.items()
    }
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, held in data.items():
        begin, end = end, end + len(held)
        header[name] = {"dtype": type_name, "shape": weights[name].shape, "data_offsets": [begin, end]}
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)  # so that the tensors are aligned
    path.write_bytes(len(told).to_bytes(8, "little") + told + b"".join(data.values()))


def write_toy_tokenizer(folder: Path) -> None:
    """Write the files of the byte tokenizer, with its chat template, into a model's folder."""
    _tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config = {"eos_token": "<|im_end|>", "chat_template": TOY_TEMPLATE, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def random_weights(config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Return random float32 weights whose logits differ so much that rounding rarely decides between two tokens."""
    generator = np.random.default_rng(seed)
    hidden, feed, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    query, key = (config[n] * config["head_dim"] for n in ("num_attention_heads", "num_key_value_heads"))

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return generator.standard_normal((rows, columns), np.float32) * np.float32(gain * columns**-0.5)

    def vector(size: int, centre: float) -> np.ndarray:
        return np.float32(centre) + np.float32(0.1) * generator.standard_normal(size, np.float32)

    weights = {"model.embed_tokens.weight": matrix(vocab, hidden, 3.0), "model.norm.weight": vector(hidden, 1.0)}
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(vocab, hidden, 3.0)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, rows in (("q", query), ("k", key), ("v", key)):
            weights[f"{at}self_attn.{name}_proj.weight"] = matrix(rows, hidden, 1.5)
            if config["model_type"] == "qwen2" or config.get("attention_bias"):
                weights[f"{at}self_attn.{name}_proj.bias"] = vector(rows, 0.0)
        weights[f"{at}self_attn.o_proj.weight"] = matrix(hidden, query)
        if config.get("attention_bias") and config["model_type"] != "qwen2":
            weights[f"{at}self_attn.o_proj.bias"] = vector(hidden, 0.0)
        if config["model_type"] == "qwen3":
            for name in ("q_norm", "k_norm"):
                weights[f"{at}self_attn.{name}.weight"] = vector(config["head_dim"], 1.0)
        for name in ("gate", "up"):
            weights[f"{at}mlp.{name}_proj.weight"] = matrix(feed, hidden)
        weights[f"{at}mlp.down_proj.weight"] = matrix(hidden, feed)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}{name}.weight"] = vector(hidden, 1.0)
    return weights


def byte_names() -> list[str]:
    """Return the character of each byte in GPT-2's byte alphabet."""
    return sorted(BYTE_ALPHABET, key=BYTE_ALPHABET.__getitem__)


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={name: value for value, name in enumerate(byte_names())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer
