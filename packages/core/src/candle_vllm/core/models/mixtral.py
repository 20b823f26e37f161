# SPDX-License-Identifier: MIT
"""Mixtral: Llama's layers (`llama.py`) with experts in every layer; the weights of a token's k experts sum to 1.

GGUF files of Mixtral have the architecture llama; the number of experts distinguishes them (`registry.py`).
"""

from __future__ import annotations

from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.config import layer_windows, shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, HF, window_keys
from candle_vllm.core.models.experts import count_keys, expert_count, expert_names, in_all_layers
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import Llama, LlamaConfig

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of mixtral."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    shared = shared_from_hf(fields.with_absent(rope_theta=1e6), model_type)
    layers, window = shared["num_layers"], fields.get("sliding_window", int, None)
    mixture = Mixture(
        experts=expert_count(fields, "num_local_experts", "num_experts"),
        top_k=fields.count("num_experts_per_tok"),
        inner_size=shared["intermediate_size"],
    )
    windows = layer_windows(fields, layers, window) or (window,) * layers
    return LlamaConfig(**shared | {"sliding_windows": windows, **in_all_layers(mixture, layers)})


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of llama with experts."""
    shared = shared_from_gguf(fields, checkpoint)
    mixture = Mixture(
        experts=fields.count("expert_count"),
        top_k=fields.count("expert_used_count"),
        inner_size=shared["intermediate_size"],
    )
    return LlamaConfig(**shared, **in_all_layers(mixture, shared["num_layers"]), interleaved_rotary=True)


# ---- weight names ----------------------------------------------------------------------------------------------------

_ROUTERS = (HF + "block_sparse_moe.gate.weight", HF + "mlp.gate.weight")

WEIGHTS = [
    *llama.WEIGHTS,
    WeightName("layers.{i}.mlp.router:weight", _ROUTERS, GG + "ffn_gate_inp.weight"),
    *expert_names("block_sparse_moe.experts", "w1", "w3", "w2"),
]

FAMILY = Family(
    hf={"MixtralForCausalLM": "mixtral"},
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama,
    weights=WEIGHTS,
    ignored=llama.ignored,
    as_gguf={
        "mixtral": Architecture(
            name="llama",
            more=lambda config: window_keys(config) | count_keys(config.mixture),
            reordered=True,
            unread=(),
        )
    },
)
