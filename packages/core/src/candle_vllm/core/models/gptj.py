# SPDX-License-Identifier: MIT
"""GPT-J: a parallel block with one norm, interleaved rotary pairs, and a bias of the logits.

Source: Wang and Komatsuzaki, 2021, "GPT-J-6B", github.com/kingoflolz/mesh-transformer-jax.
"""

from __future__ import annotations

import dataclasses

from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import shared_from_hf
from candle_vllm.core.loading.views import half_split
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.gpt import Gpt, GptConfig, activation_of

# ---- config ----------------------------------------------------------------------------------------------------------

_NAMES = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}


def config_from_hf(fields: Fields, model_type: str) -> GptConfig:
    """Read `config.json` of gptj."""
    fields = fields.with_defaults(n_inner=4 * fields.count("n_embd"))
    shared = shared_from_hf(fields, model_type, eps="layer_norm_epsilon", names=_NAMES)
    rope = dataclasses.replace(shared.pop("rope"), dim=fields.count("rotary_dim"))
    return GptConfig(
        **shared,
        rope=rope,
        interleaved_rotary=True,
        activation=activation_of(fields, "activation_function", "gelu_new"),
        parallel=True,
        shared_norm=True,
        qkv_bias=False,
        output_bias=False,
        head_bias=True,
    )


# ---- weight names ----------------------------------------------------------------------------------------------------

_HF, _LAYER = "transformer.h.{i}.", "layers.{i}."

WEIGHTS = [
    WeightName("embed:weight", "transformer.wte.weight", None),
    *pair(_LAYER + "attention_norm:", _HF + "ln_1"),
    *[
        WeightName(f"{_LAYER}attention.qkv:{part}.weight", f"{_HF}attn.{part}_proj.weight", None, view)
        for part, view in {"q": half_split("num_heads"), "k": half_split("num_kv_heads"), "v": None}.items()
    ],
    *pair(_LAYER + "attention.output:", _HF + "attn.out_proj"),
    *pair(_LAYER + "mlp.up:", _HF + "mlp.fc_in"),
    *pair(_LAYER + "mlp.down:", _HF + "mlp.fc_out"),
    *pair("norm:", "transformer.ln_f"),
    WeightName("head:weight", "lm_head.weight", None),
    WeightName("scorer:bias", "lm_head.bias", None),
]


def ignored(config: GptConfig) -> list[str]:
    """Stored masks of old checkpoints, and the copy of a tied head."""
    masks = [r".*\.attn\.(masked_)?bias"]
    return [*masks, r"lm_head\.weight"] if config.tie_embeddings else masks


FAMILY = Family(
    hf={"GPTJForCausalLM": "gptj"},
    config_from_hf=config_from_hf,
    build=Gpt,
    weights=WEIGHTS,
    ignored=ignored,
)
