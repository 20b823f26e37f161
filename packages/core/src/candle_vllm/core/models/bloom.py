# SPDX-License-Identifier: MIT
"""BLOOM and BLOOMZ: the layers of `gpt.py` with ALiBi positions and a norm after the embedding.

The rows of q, k and v in the fused matrix are grouped by head.
Source: BigScience Workshop, 2022, arXiv:2211.05100.
"""

from __future__ import annotations

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.attention import alibi_slopes
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import qkv_rows
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, gguf_projection, pair
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.gpt import Gpt, GptConfig, fused

# ---- config ----------------------------------------------------------------------------------------------------------

_NAMES = {"num_attention_heads": "n_head", "num_key_value_heads": "n_head", "num_hidden_layers": "n_layer"}
_CONTEXT = 2048  # context of training, which most files do not store


def config_from_hf(fields: Fields, model_type: str) -> GptConfig:
    """Read `config.json` of bloom; older files use other keys."""
    values = fields.values
    renamed = {
        "hidden_size": values.get("n_embed") or values.get("hidden_size"),
        "n_head": values.get("n_head", values.get("num_attention_heads")),
        "n_layer": values.get("n_layer", values.get("num_hidden_layers")),
    }
    fields = Fields({**values, **{key: value for key, value in renamed.items() if value is not None}}, fields.path)
    if fields.get("apply_residual_connection_post_layernorm", bool, False):
        raise UnsupportedModelError(
            f"{fields.path}: apply_residual_connection_post_layernorm is true, which is not implemented"
        )
    fields = fields.with_defaults(
        intermediate_size=4 * fields.count("hidden_size"),
        max_position_embeddings=fields.get("seq_length", int, _CONTEXT),
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
    )
    shared = shared_from_hf(fields, model_type, eps="layer_norm_epsilon", names=_NAMES)
    return GptConfig(**shared, slopes=alibi_slopes(shared["num_heads"]), embed_norm=True)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> GptConfig:
    """Read GGUF metadata of bloom."""
    shared = shared_from_gguf(fields, checkpoint, eps="attention.layer_norm_epsilon")
    return GptConfig(**shared, slopes=alibi_slopes(shared["num_heads"]), embed_norm=True)


# ---- weight names ----------------------------------------------------------------------------------------------------


def _names(part: str) -> tuple[str, str]:
    """The tensor name in a checkpoint with an output layer, and in one without."""
    return f"transformer.{part}", part


_H, _LAYER = "h.{i}.", "layers.{i}."

WEIGHTS = [
    WeightName("embed:weight", _names("word_embeddings.weight"), "token_embd.weight"),
    *pair("embed_norm:", _names("word_embeddings_layernorm"), "token_embd_norm"),
    *pair(_LAYER + "attention_norm:", _names(_H + "input_layernorm"), GG + "attn_norm"),
    *[
        WeightName(
            f"{_LAYER}attention.qkv:{part}.{kind}",
            _names(f"{_H}self_attention.query_key_value.{kind}"),
            gguf_projection(part, kind),
            qkv_rows(part, grouped=True),
        )
        for part in "qkv"
        for kind in ("weight", "bias")
    ],
    *pair(_LAYER + "attention.output:", _names(_H + "self_attention.dense"), GG + "attn_output"),
    *pair(_LAYER + "mlp_norm:", _names(_H + "post_attention_layernorm"), GG + "ffn_norm"),
    *pair(_LAYER + "mlp.up:", _names(_H + "mlp.dense_h_to_4h"), GG + "ffn_up"),
    *pair(_LAYER + "mlp.down:", _names(_H + "mlp.dense_4h_to_h"), GG + "ffn_down"),
    *pair("norm:", _names("ln_f"), "output_norm"),
    WeightName("head:weight", "lm_head.weight", "output.weight"),
]

FAMILY = Family(
    hf={"BloomForCausalLM": "bloom"},
    gguf=("bloom",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Gpt,
    weights=WEIGHTS,
    ignored=llama.ignored,
    as_gguf={"bloom": fused(name="bloom")},
)
