"""A real checkpoint of a few kilobytes: random weights, a byte tokenizer and a chat template, for fast tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOY_VOCAB_SIZE = 272  # 256 bytes, the special tokens, and a few rows that no token uses, as real models have

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def toy_config(model_type: str = "llama", **overrides: Any) -> dict[str, Any]:
    """A `config.json` of a two-layer model; `overrides` replace or add keys."""
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
    """Writes a checkpoint that loads like any other: config.json, model.safetensors and the tokenizer's files.

    Args:
        folder: made where it does not exist.
        config: as from `toy_config`.
        seed: of the random weights. Equal arguments give equal files.

    Returns:
        The folder.
    """
    config = dict(config or toy_config())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(config, torch.Generator().manual_seed(seed)), folder / "model.safetensors", {"format": "pt"})
    _tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config = {"eos_token": "<|im_end|>", "chat_template": _TEMPLATE, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


def _weights(config: Mapping[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random weights whose logits lie far apart, so that rounding never decides between two tokens."""
    hidden, feed, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    query, key = (config[n] * config["head_dim"] for n in ("num_attention_heads", "num_key_value_heads"))

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * gain * columns**-0.5

    def vector(size: int, centre: float) -> torch.Tensor:
        return centre + 0.1 * torch.randn(size, generator=generator)

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


def _tokenizer() -> Tokenizer:
    """One token per byte, in the byte alphabet of GPT-2, and the special tokens behind them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    names = {value: chr(value) for value in printable} | {value: chr(256 + i) for i, value in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={names[value]: value for value in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer
