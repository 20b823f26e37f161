# SPDX-License-Identifier: MIT
"""GPT-2, GPT-BigCode (StarCoder, SantaCoder) and GPT-Neo: learned positions, and a norm before each part of a block.

GPT-2 stores its matrices transposed. GPT-BigCode has one key-value head, or the rows of q, k and v grouped by head.
GPT-Neo does not scale scores, and has a window in every second layer.
Sources: Radford et al., 2019, "Language Models are Unsupervised Multitask Learners"; Li et al., 2023,
arXiv:2305.06161 (StarCoder); Black et al., 2021, doi:10.5281/zenodo.5297715 (GPT-Neo).
"""

from __future__ import annotations

from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import View, chain, qkv_rows, transposed
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models.attention_names import GG, gguf_has_bias, gguf_projection, pair
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.gpt import Gpt, GptConfig, activation_of, fused
from candle_vllm.core.quantization.tensors import StoredTensor

# ---- config ----------------------------------------------------------------------------------------------------------

_GPT2 = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}
_NEO = {"num_attention_heads": "num_heads", "num_key_value_heads": "num_heads", "num_hidden_layers": "num_layers"}


def config_from_hf(fields: Fields, model_type: str) -> GptConfig:
    """Read `config.json` of gpt2, gpt_bigcode and gpt_neo."""
    if fields.get("add_cross_attention", bool, False):
        raise UnsupportedModelError(f"{fields.path}: add_cross_attention is true, which is not implemented")
    neo = model_type == "gpt_neo"
    names = _NEO if neo else _GPT2
    inner = "intermediate_size" if neo else "n_inner"
    wide = 4 * fields.count("hidden_size" if neo else "n_embd")
    fields = fields.with_defaults(**{"tie_word_embeddings": True, inner: wide})
    shared = shared_from_hf(fields, model_type, eps="layer_norm_epsilon", names=names)
    if model_type == "gpt_bigcode" and fields.get("multi_query", bool, True):
        shared["num_kv_heads"] = 1
    if neo:
        shared["sliding_windows"] = _windows(fields, shared["num_layers"])
    return GptConfig(
        **shared,
        activation=activation_of(fields, "activation_function", "gelu_pytorch_tanh"),
        positions=shared["max_position"],
        qkv_bias=not neo,
        scales=_scales(fields, shared["num_layers"], shared["head_dim"], neo=neo),
    )


def _windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    """The window of each layer of GPT-Neo; None for a global layer."""
    kinds, window = fields.get("attention_layers", list), fields.count("window_size", 256)
    if len(kinds) != layers or not all(kind in ("global", "local") for kind in kinds):
        raise UnsupportedModelError(f"{fields.path}: attention_layers must name global or local per layer")
    return tuple(window if kind == "local" else None for kind in kinds)


def _scales(fields: Fields, layers: int, head_dim: int, *, neo: bool) -> tuple[float, ...]:
    """The factor of each layer's attention scores; empty if all are D^-0.5."""
    scaled = not neo and fields.get("scale_attn_weights", bool, True)
    by_layer = fields.get("scale_attn_by_inverse_layer_idx", bool, False)
    if scaled and not by_layer:
        return ()
    return tuple((head_dim**-0.5 if scaled else 1.0) / (layer + 1 if by_layer else 1) for layer in range(layers))


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> GptConfig:
    """Read GGUF metadata of gpt2 and starcoder."""
    shared = shared_from_gguf(fields, checkpoint, eps="attention.layer_norm_epsilon")
    return GptConfig(**shared, positions=shared["max_position"], qkv_bias=gguf_has_bias(checkpoint))


# ---- weight names ----------------------------------------------------------------------------------------------------


def _upright(stored: StoredTensor, config: Any) -> StoredTensor:
    """A matrix [outputs, inputs], or a bias: of GPT-2, unquantised matrices are stored transposed."""
    return transposed(stored, config) if config.model_type == "gpt2" and stored.dtype is not None else stored


def _fused(part: str) -> View:
    """View of the rows of q, k or v in the fused tensor."""
    behind, grouped = chain(_upright, qkv_rows(part)), qkv_rows(part, grouped=True)
    return lambda stored, config: (behind if config.model_type == "gpt2" else grouped)(stored, config)


def _names(part: str) -> tuple[str, str]:
    """The tensor name in a checkpoint with a head, and in one that was saved without it."""
    return f"transformer.{part}", part


def _projection(part: str, kind: str, view: View) -> WeightName:
    """The table row of q, k or v: rows of a fused tensor, or GPT-Neo's separate tensor."""
    fused = [Seen(name, view) for name in _names(f"h.{{i}}.attn.c_attn.{kind}")]
    alone = _names(f"h.{{i}}.attn.attention.{part}_proj.{kind}")
    return WeightName(f"layers.{{i}}.attention.qkv:{part}.{kind}", (*fused, *alone), gguf_projection(part, kind))


_H, _L = "h.{i}.", "layers.{i}."
_OUTPUTS = (*_names(_H + "attn.c_proj"), *_names(_H + "attn.attention.out_proj"))
WEIGHTS = [
    WeightName("embed:weight", _names("wte.weight"), "token_embd.weight"),
    WeightName("positions:weight", _names("wpe.weight"), "position_embd.weight"),
    *pair(_L + "attention_norm:", _names(_H + "ln_1"), GG + "attn_norm"),
    *[_projection(part, kind, view) for part in "qkv" for view in [_fused(part)] for kind in ("weight", "bias")],
    *pair(_L + "attention.output:", _OUTPUTS, GG + "attn_output", _upright),
    *pair(_L + "mlp_norm:", _names(_H + "ln_2"), GG + "ffn_norm"),
    *pair(_L + "mlp.up:", _names(_H + "mlp.c_fc"), GG + "ffn_up", _upright),
    *pair(_L + "mlp.down:", _names(_H + "mlp.c_proj"), GG + "ffn_down", _upright),
    *pair("norm:", _names("ln_f"), "output_norm"),
    WeightName("head:weight", "lm_head.weight", "output.weight"),
]


def ignored(config: GptConfig) -> list[str]:
    """Stored masks of old checkpoints, and the copy of a tied head."""
    masks = [r".*\.attn\.(attention\.)?(masked_)?bias"]
    return [*masks, r"lm_head\.weight"] if config.tie_embeddings else masks


FAMILY = Family(
    hf={"GPT2LMHeadModel": "gpt2", "GPTBigCodeForCausalLM": "gpt_bigcode", "GPTNeoForCausalLM": "gpt_neo"},
    gguf=("gpt2", "starcoder"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Gpt,
    weights=WEIGHTS,
    ignored=ignored,
    as_gguf={"gpt2": fused(name="gpt2"), "gpt_bigcode": fused(name="starcoder")},
)
