# SPDX-License-Identifier: MIT
"""The indexer of sparse latent attention in DeepSeek V3.2, A.X K2 and GLM-5: its layer, its config, its weight names.

A token attends to the positions with the largest scores: sums of w ReLU(q k) over its index heads q with weights w, k
the index key (`kernels/latent_attention`). The last `rope` elements of q and k rotate here, the first ones in
checkpoints. In GLM-5.2 and later, layers without an indexer use the positions that an earlier layer chose. Published
code also multiplies q and k by a Hadamard matrix, which changes no product. Source: DeepSeek-AI, 2025, DeepSeek-V3.2.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.latent_attention import latent_write
from candle_vllm.core.kernels.latent_attention.layout import LatentParts
from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import LatentSizes
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.attention_names import GG, HF
from candle_vllm.core.quantization.tensors import StoredTensor

KEY_EPS = 1e-6  # epsilon of the keys' norm
_LONG = 1 << 20  # shortest context for which a GGUF file without `indexer.types` counts as GLM-5.2 or later

# ---- layer -----------------------------------------------------------------------------------------------------------


class Index:
    """Chooses the positions that each token of a step attends to."""

    def __init__(self, config: Any, layer: int, rotary: Rotary, placement: Placement) -> None:
        assert config.index is not None
        self.sizes, self.layer, self.rotary, self.top = config.index, layer, rotary, config.index_top
        heads, dim = config.index.heads, config.index.rope + config.index.latent
        self.inputs = Linear(config.hidden_size, {"k": dim, "w": heads}, placement)
        self.queries = Linear(config.q_rank, heads * dim, placement)
        self.norm = LayerNorm(dim, KEY_EPS, placement)

    def __call__(self, x: Value, q: Value, step: StepInput) -> Any:
        """Return `LatentParts.chosen`; x [T, E] is attention's input, q [T, q_rank] the latent vector of queries."""
        cache, q, sizes = step.caches[self.layer].values, self.queries(q), self.sizes
        key, weights = self.inputs(x).split((sizes.rope + sizes.latent, sizes.heads), -1)
        key = self.norm(key)
        if isinstance(q, Recorded):
            parts = LatentParts(sizes, self.norm.weight, KEY_EPS, *self.rotary.tables, (), ())
            return q.choose_positions(key, weights, parts, cache, self.top)
        from candle_vllm.core.kernels.latent_attention.reference import choose

        heads, keys = (v.unflatten(-1, (-1, sizes.rope + sizes.latent)) for v in (q, key))
        (rest, turned), (key_rest, key_turned) = (v.split((sizes.latent, sizes.rope), -1) for v in (heads, keys))
        turned, key_turned = self.rotary(turned, key_turned, step.positions)
        latent_write(key_turned.squeeze(1), key_rest.squeeze(1), cache, step.slots)
        return choose(side_by_side(turned, rest), weights, cache, step.rows, self.top)


# ---- config ----------------------------------------------------------------------------------------------------------


def from_hf(fields: Fields, model_type: str, layers: int, rope: int) -> dict[str, Any]:
    """The config's fields of the indexer and its layers; empty for a model without an indexer."""
    if model_type not in ("deepseek_v32", "glm_moe_dsa", "axk2"):
        return {}
    sizes = [fields.count(key) for key in ("index_n_heads", "index_head_dim", "index_topk")]
    pairs = model_type == "glm_moe_dsa"
    full = full_layers(fields, layers) if pairs else [True] * layers
    if fields.get("indexer_rope_interleave", bool, pairs) is not pairs:
        raise UnsupportedModelError(f"{fields.path}: indexer_rope_interleave other than {pairs} is not implemented")
    return _checked(fields, sizes, rope, full, layers, pairs)


def full_layers(fields: Fields, layers: int) -> list[bool]:
    """Whether each layer has an indexer of its own, from the config keys of GLM."""
    every, first = max(1, fields.get("index_topk_freq", int, 1)), fields.get("index_skip_topk_offset", int, 2)
    full = [max(layer - first + 1, 0) % every == 0 for layer in range(layers)]
    named = (fields.prefix + key for key in ("indexer_types", "index_topk_pattern"))
    key = next((key for key in named if fields.values.get(key)), "")
    kinds = fields.values.get(key, [])
    if not isinstance(kinds, (list, str)) or any(kind not in ("F", "S", "full", "shared") for kind in kinds):
        raise InvalidFileError(f"{fields.path}: {key} is {kinds!r:.80}, not full or shared for each layer")
    return [kind in ("F", "full") for kind in kinds][:layers] or full


def from_gguf(fields: Fields, architecture: str, layers: int, rope: int) -> dict[str, Any]:
    """As `from_hf`, from GGUF metadata; GLM files without `indexer.types` get llama.cpp's defaults."""
    if architecture not in ("deepseek32", "glm-dsa"):
        return {}
    at, glm = "attention.indexer.", architecture == "glm-dsa"
    sizes = [fields.count(at + key) for key in ("head_count", "key_length", "top_k")]
    shares = glm and fields.count("context_length") >= _LONG
    full = [not shares or layer < 2 or layer % 4 == 2 for layer in range(layers)]
    kinds = fields.get(at + "types", list, []) if glm else []
    return _checked(fields, sizes, rope, [kind in (1, "full") for kind in kinds][:layers] or full, layers, glm)


def _checked(fields: Fields, sizes: list[int], rope: int, full: list[bool], layers: int, pairs: bool) -> dict[str, Any]:
    heads, dim, top = sizes
    if len(full) != layers or not full[0] or dim <= rope:
        raise InvalidFileError(
            f"{fields.path}: layer 0 has no indexer, indexer types do not cover the {layers} layers, or index keys "
            f"have {dim} elements (more than {rope} are needed)"
        )
    if not fields.count("q_lora_rank" if "q_lora_rank" in fields else "attention.q_lora_rank", 0):
        raise UnsupportedModelError(f"{fields.path}: an indexer without q_lora_rank is not implemented")
    index = LatentSizes(heads=heads, nope=dim - rope, rope=rope, latent=dim - rope, value=0)
    indexed = frozenset(layer for layer in range(layers) if full[layer])
    return {"index": index, "index_top": top, "index_layers": indexed, "index_interleaved": pairs}


def gguf_keys(config: Any) -> dict[str, Any]:
    """The metadata of the indexer; llama.cpp reads `types` for GLM alone."""
    at, sizes = "attention.indexer.", config.index
    if sizes is None:
        return {}
    keys: dict[str, Any] = {at + "head_count": sizes.heads, at + "top_k": config.index_top}
    keys[at + "key_length"] = sizes.rope + sizes.latent
    full = [layer in config.index_layers for layer in range(config.num_layers)]
    return keys | ({at + "types": full} if config.index_interleaved else {})


# ---- weight names ----------------------------------------------------------------------------------------------------


def _rows(stored: StoredTensor, config: Any) -> StoredTensor:
    """Rows of heads [rope | nope] as [nope | rope], in half-split rotary order."""
    sizes = config.index
    dim = 1 if sizes is None else sizes.rope + sizes.latent
    if sizes is None or not stored.shape or stored.shape[0] % dim:
        return stored  # the loader reports a wrong shape
    rotated = np.arange(sizes.rope)
    if config.index_interleaved:
        rotated = np.concatenate([rotated[::2], rotated[1::2]])
    head = np.concatenate([np.arange(sizes.rope, dim), rotated])
    return stored.select((np.arange(0, stored.shape[0], dim)[:, None] + head).reshape(-1))


_AT, _HF, _GG = "layers.{i}.attention.index.", HF + "self_attn.indexer.", GG + "indexer."

WEIGHTS = [
    WeightName(_AT + "inputs:k.weight", _HF + "wk.weight", _GG + "attn_k.weight", _rows, _rows),
    WeightName(_AT + "inputs:w.weight", _HF + "weights_proj.weight", _GG + "proj.weight"),
    WeightName(_AT + "queries:weight", _HF + "wq_b.weight", _GG + "attn_q_b.weight", _rows, _rows),
    WeightName(_AT + "norm:weight", _HF + "k_norm.weight", _GG + "k_norm.weight", _rows, _rows),
    WeightName(_AT + "norm:bias", _HF + "k_norm.bias", _GG + "k_norm.bias", _rows, _rows),
]
