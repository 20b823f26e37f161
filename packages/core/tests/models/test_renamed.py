# SPDX-License-Identifier: MIT
"""Models that transformers has no class for: a Llama of transformers, its config and its tensors under other names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from candle_vllm.core.testing.toy_model import write_toy_tokenizer
from packages.core.tests.models.families import LLAMA3, RENAMED
from packages.core.tests.models.gguf_export import export_gguf
from packages.core.tests.models.tiny import (
    config_of,
    cuts,
    eager_logits,
    error,
    recorded_logits,
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


def _renamed(tensors: Tensors, names: Mapping[str, str]) -> Tensors:
    made: Tensors = {}
    for name, tensor in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new)
        made[name] = tensor
    return made


KINDS: Mapping[str, tuple[Callable[..., tuple[dict[str, Any], Tensors]], Mapping[str, Any]]] = {
    "ExaoneForCausalLM": (exaone, {"head_dim": 16, "rope_parameters": LLAMA3}),
    "InternLM2ForCausalLM": (internlm2, {"head_dim": 16, "attention_bias": True}),
    "InternLM3ForCausalLM": (internlm3, {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
}


def write_renamed(kind: str, folder: Path, **changes: Any) -> tuple[Path, Path]:
    """Folders of transformers' Llama and of the same under the names of a class."""
    rename, usual = KINDS[kind]
    plain, renamed = write_tiny(folder / "plain", "llama", **{**usual, **changes}), folder / "renamed"
    config, tensors = rename(config_of(plain), load_file(plain / "model.safetensors"))
    renamed.mkdir()
    (renamed / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, renamed / "model.safetensors")
    write_toy_tokenizer(renamed)
    return plain, renamed


def test_every_class_is_here() -> None:
    assert KINDS.keys() == RENAMED.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_renamed_models_are_llamas(kind: str, tmp_path: Path) -> None:
    """From safetensors, compiled, and from GGUF as llama.cpp's converter has it."""
    plain, folder = write_renamed(kind, tmp_path)
    theirs = their_logits(plain, TOKENS)
    for chunks in cuts():
        assert error(eager_logits(folder, TOKENS, chunks), theirs) < 1e-5
    assert spread(recorded_logits(folder, TOKENS, [len(TOKENS)]), theirs) < 1e-2
    gguf = export_gguf(plain, tmp_path / "model.gguf", RENAMED[kind])
    assert error(eager_logits(gguf, TOKENS, [len(TOKENS)]), theirs) < 1e-5
