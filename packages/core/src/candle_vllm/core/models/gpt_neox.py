# SPDX-License-Identifier: MIT
"""GPT-NeoX (Pythia, Dolly, RedPajama): rotary positions for a part of each head, and a norm for each part of a block.

Attention and MLP of a block are parallel, in some models sequential. The rows of q, k and v are grouped by head.
Source: Black et al., 2022, arXiv:2204.06745.
"""

from __future__ import annotations

from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import qkv_rows
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.attention_names import GG, gguf_has_bias, gguf_projection, pair, parallel_keys
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.gpt import Gpt, GptConfig, activation_of, fused

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> GptConfig:
    """Read `config.json` of gpt_neox; older files have `rotary_pct` and `rotary_emb_base`."""
    rotary = {
        "partial_rotary_factor": fields.get("rotary_pct", float, 0.25),
        "rope_theta": fields.get("rotary_emb_base", float, 10000.0),
    }
    names = {"num_key_value_heads": "num_attention_heads"}
    bias = fields.get("attention_bias", bool, True)
    return GptConfig(
        **shared_from_hf(fields.with_defaults(**rotary), model_type, eps="layer_norm_eps", names=names),
        activation=activation_of(fields, "hidden_act", "gelu"),
        parallel=fields.get("use_parallel_residual", bool, True),
        qkv_bias=bias,
        output_bias=bias,
    )


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> GptConfig:
    """Read GGUF metadata of gptneox, which does not store the activation: all published models have GELU."""
    return GptConfig(
        **shared_from_gguf(fields, checkpoint, eps="attention.layer_norm_epsilon"),
        activation="gelu",
        parallel=fields.get("use_parallel_residual", bool),
        qkv_bias=gguf_has_bias(checkpoint),
        output_bias="blk.0.attn_output.bias" in checkpoint.tensors,
    )


# ---- weight names ----------------------------------------------------------------------------------------------------

_HF, _LAYER = "gpt_neox.layers.{i}.", "layers.{i}."

WEIGHTS = [
    WeightName("embed:weight", "gpt_neox.embed_in.weight", "token_embd.weight"),
    *pair(_LAYER + "attention_norm:", _HF + "input_layernorm", GG + "attn_norm"),
    *[
        WeightName(
            f"{_LAYER}attention.qkv:{part}.{kind}",
            f"{_HF}attention.query_key_value.{kind}",
            gguf_projection(part, kind),
            qkv_rows(part, grouped=True),
        )
        for part in "qkv"
        for kind in ("weight", "bias")
    ],
    *pair(_LAYER + "attention.output:", _HF + "attention.dense", GG + "attn_output"),
    *pair(_LAYER + "mlp_norm:", _HF + "post_attention_layernorm", GG + "ffn_norm"),
    *pair(_LAYER + "mlp.up:", _HF + "mlp.dense_h_to_4h", GG + "ffn_up"),
    *pair(_LAYER + "mlp.down:", _HF + "mlp.dense_4h_to_h", GG + "ffn_down"),
    *pair("norm:", "gpt_neox.final_layer_norm", "output_norm"),
    WeightName("head:weight", ("embed_out.weight", "lm_head.weight"), "output.weight"),
]


def ignored(config: GptConfig) -> list[str]:
    """Stored buffers of old checkpoints, and the copy of a tied head."""
    buffers = [r".*\.attention\.(masked_)?bias", r".*rotary_emb\.inv_freq"]
    return [*buffers, r"(embed_out|lm_head)\.weight"] if config.tie_embeddings else buffers


FAMILY = Family(
    hf={"GPTNeoXForCausalLM": "gpt_neox"},
    gguf=("gptneox",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Gpt,
    weights=WEIGHTS,
    ignored=ignored,
    as_gguf={"gpt_neox": fused(name="gptneox", more=parallel_keys, head=True)},
)
