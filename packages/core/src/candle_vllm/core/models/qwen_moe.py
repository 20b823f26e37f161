# SPDX-License-Identifier: MIT
"""Qwen2-MoE and Qwen3-MoE: the layers of Qwen2 and Qwen3 (`llama.py`) with experts in all or some layers.

Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B) adds a shared expert, weighted by a sigmoid gate, and uses the chosen experts'
scores without normalisation. Qwen3-MoE and the text model of Qwen3-VL-MoE have no shared expert, and normalise the
scores to sum to 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.config import shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import as_row, transposed
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, HF, axes_keys, window_keys
from candle_vllm.core.models.experts import expert_count, expert_names, shared_names, size_keys, sparse_in_gguf
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import Llama, LlamaConfig
from candle_vllm.core.quantization.tensors import StoredTensor

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of qwen2_moe and qwen3_moe, and of the text model of qwen3_vl_moe."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    shared = shared_from_hf(fields, model_type)
    qwen2 = model_type == "qwen2_moe"
    renormalise = bool(shared["rope"].axes) or fields.get("norm_topk_prob", bool, False)
    mixture = mixture_from_hf(fields, renormalise=renormalise, shared=qwen2)
    bias = fields.get("attention_bias", bool, False)
    return LlamaConfig(
        **shared
        | {
            "model_type": "qwen3_vl_moe" if shared["rope"].axes else model_type,
            "qkv_bias": fields.get("qkv_bias", bool, True) if qwen2 else bias,
            "output_bias": not qwen2 and bias,
            "qk_norm": not qwen2,
            "sliding_windows": llama.windows_from_hf(fields, model_type, shared["num_layers"]),
            "mixture": mixture,
            "num_experts": mixture.experts,
            "sparse_layers": sparse_layers(fields, shared["num_layers"]),
            "deep": fields.get("n_deepstack_layers", int, 0),
        }
    )


def mixture_from_hf(fields: Fields, *, renormalise: bool, shared: bool) -> Mixture:
    """Read the experts' config from `config.json`.

    Args:
        fields: the config.
        renormalise: see `Mixture`.
        shared: the model has a shared expert.
    """
    return Mixture(
        experts=expert_count(fields, "num_experts", "num_local_experts"),
        top_k=fields.count("num_experts_per_tok"),
        inner_size=fields.count("moe_intermediate_size"),
        renormalise=renormalise,
        shared_size=fields.count("shared_expert_intermediate_size") if shared else 0,
        shared_gate=shared,
    )


def sparse_layers(fields: Fields, layers: int) -> frozenset[int]:
    """Every `decoder_sparse_step`-th layer, except `mlp_only_layers`."""
    step, dense = fields.count("decoder_sparse_step", 1), fields.get("mlp_only_layers", list, [])
    if not all(isinstance(layer, int) for layer in dense):
        raise InvalidFileError(f"{fields.path}: mlp_only_layers is {dense!r:.80}, not a list of layers")
    return frozenset(layer for layer in range(layers) if (layer + 1) % step == 0) - set(dense)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of qwen2moe, qwen3moe and qwen3vlmoe."""
    dense = llama.config_from_gguf(fields, checkpoint)
    qwen2, sparse = dense.model_type == "qwen2moe", sparse_in_gguf(checkpoint, dense.num_layers)
    mixture = mixture_from_gguf(fields, checkpoint.tensors, renormalise=not qwen2, shared=qwen2)
    return dataclasses.replace(dense, mixture=mixture, num_experts=mixture.experts, sparse_layers=sparse)


def mixture_from_gguf(fields: Fields, tensors: Any, *, renormalise: bool, shared: bool) -> Mixture:
    """Read the experts' config from GGUF metadata; `renormalise` is a default, `shared` as in `mixture_from_hf`."""
    return Mixture(
        experts=fields.count("expert_count"),
        top_k=fields.count("expert_used_count"),
        inner_size=fields.count("expert_feed_forward_length"),
        renormalise=fields.get("expert_weights_norm", bool, renormalise),
        scale=fields.get("expert_weights_scale", float, 0.0) or 1.0,  # llama.cpp writes 0 for no scale
        shared_size=_shared_size(fields, tensors) if shared else 0,
        shared_gate=shared,
    )


def _shared_size(fields: Fields, tensors: Any) -> int:
    """The size of the shared expert from the metadata; old files show it only by the tensors of layer 0."""
    found: StoredTensor | None = tensors.get("blk.0.ffn_up_shexp.weight")
    stored = found.shape[0] if found is not None and found.shape else None
    return fields.count("expert_shared_feed_forward_length", *([] if stored is None else [stored]))


# ---- weight names ----------------------------------------------------------------------------------------------------

_GATE = "layers.{i}.mlp.shared_gate:weight"


def _upright(stored: StoredTensor, config: Any) -> StoredTensor:
    """An expert's matrix [rows, columns], which files of Qwen3-VL-MoE store transposed."""
    size, inner = config.hidden_size, config.mixture.inner_size
    lies = stored.shape in ((size, 2 * inner), (inner, size)) and stored.shape not in ((2 * inner, size), (size, inner))
    return transposed(stored, config) if lies and config.model_type == "qwen3_vl_moe" else stored


WEIGHTS = [
    *llama.WEIGHTS,
    WeightName("layers.{i}.mlp.router:weight", HF + "mlp.gate.weight", GG + "ffn_gate_inp.weight"),
    *expert_names("mlp.experts", "gate_proj", "up_proj", "down_proj", upright=_upright),
    *shared_names("mlp.shared_expert"),
    WeightName(_GATE, HF + "mlp.shared_expert_gate.weight", GG + "ffn_gate_inp_shexp.weight", None, as_row),
]


def gguf_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata of a model with experts in addition to the keys of every model."""
    keys = (axes_keys if config.rope.axes else window_keys)(config) | size_keys(config.mixture)
    shared = {"expert_shared_feed_forward_length": config.mixture.shared_size} if config.mixture.shared_size else {}
    return keys | {"expert_weights_norm": config.mixture.renormalise} | shared


FAMILY = Family(
    hf={"Qwen2MoeForCausalLM": "qwen2_moe", "Qwen3MoeForCausalLM": "qwen3_moe"},
    gguf=("qwen2moe", "qwen3moe", "qwen3vlmoe"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama,
    weights=WEIGHTS,
    ignored=llama.ignored,
    as_gguf={
        "qwen2_moe": Architecture(name="qwen2moe", more=gguf_keys, head=True, square=True, every=True, norm=False),
        "qwen3_moe": Architecture(name="qwen3moe", more=gguf_keys, every=True, norm=True),
        "qwen3_vl_moe": Architecture(name="qwen3vlmoe", more=gguf_keys, every=True, norm=True),
    },
)
