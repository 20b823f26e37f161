# SPDX-License-Identifier: MIT
"""MiniMax M3: Llama's layers (`llama.py`), most of them with attention to chosen blocks of keys, and experts.

Norms multiply by 1 + weight, those of q and k for each head; half of each head is rotated. All feed-forward layers have
gpt-oss's clamped SwiGLU. Experts are scored by sigmoids and chosen with a correction bias, and a shared expert is
added. Multi-token prediction layers are not loaded. Sources: MiniMax, 2026, the model card; transformers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import plus_one, row_part
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models import llama, minimax_m2
from candle_vllm.core.models.attention_names import GG, HF, also_named
from candle_vllm.core.models.experts import routed_keys, shared_names
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import Llama
from candle_vllm.core.models.minimax_m3_config import MiniMaxM3Config, config_from_gguf, config_from_hf
from candle_vllm.core.models.minimax_m3_index import Attention

# ---- model -----------------------------------------------------------------------------------------------------------


class Block(llama.Block):
    """Llama's block with this attention."""

    def mixer(self, config: Any, layer: int, rotary: Rotary, placement: Placement) -> Attention:
        """See `llama.Block.mixer`."""
        return Attention(config, layer, rotary, placement)


class MiniMaxM3(Llama):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    block = Block

    def __init__(self, config: MiniMaxM3Config, placement: Placement, checkpoint: Checkpoint) -> None:
        super().__init__(config, placement, checkpoint)
        self.narrows = self.narrows and not config.index_layers


# ---- weight names ----------------------------------------------------------------------------------------------------


def _line(line: WeightName) -> WeightName:
    return dataclasses.replace(line, hf_view=plus_one) if line.target.endswith("norm:weight") else line


def _index(target: str, name: str) -> WeightName:
    published = f"{HF}self_attn.index_{name}.weight"
    hf = (published, f"{HF}self_attn.indexer.{name}.weight")
    return WeightName(f"layers.{{i}}.attention.index.{target}weight", hf, f"{GG}indexer.{name}.weight")


_TRANSFORMERS: dict[str, str | Seen] = {
    f"{part}.gate_up:{name}.weight": Seen(f"{HF}{stored}.gate_up_proj.weight", row_part(number, 2))
    for part, stored in (("mlp", "mlp"), ("mlp.shared", "mlp.shared_experts"))
    for number, name in enumerate(("gate", "up"))
}
_TRANSFORMERS["mlp.router:correction"] = f"{HF}mlp.gate.e_score_correction_bias"
_PUBLISHED = {
    f"mlp.shared.{target}weight": f"{HF}block_sparse_moe.shared_experts.{name}_proj.weight"
    for target, name in (("gate_up:gate.", "gate"), ("gate_up:up.", "up"), ("down:", "down"))
}
_LINES = [
    *minimax_m2.WEIGHTS,
    *shared_names("mlp.shared_experts"),
    _index("inputs:q.", "q_proj"),
    _index("inputs:k.", "k_proj"),
    _index("q_norm:", "q_norm"),
    _index("k_norm:", "k_norm"),
]
WEIGHTS = also_named(also_named(map(_line, _LINES), _TRANSFORMERS), _PUBLISHED)


def ignored(config: MiniMaxM3Config) -> list[str]:
    """Names that Llama ignores, and multi-token prediction layers."""
    return [*llama.ignored(config), r"model\.mtp\..*"]


def gguf_keys(config: MiniMaxM3Config) -> dict[str, Any]:
    """The GGUF metadata of experts and of the index."""
    mixture, index, layers, at = config.mixture, config.index, range(config.num_layers), "attention.indexer."
    assert mixture is not None
    dense = next((n for n in layers if n in config.index_layers), len(layers))
    whole = mixture.shared_size % mixture.inner_size == 0
    if index is None or not whole or not config.sparse_layers == config.index_layers == frozenset(layers[dense:]):
        raise UnsupportedModelError(
            "llama.cpp's minimax-m3 has an index and experts in the same layers, behind all others, and a shared "
            "expert of the size of one or several experts"
        )
    sizes = {"block_size": config.blocks.size, "top_k": config.blocks.top, "local_blocks": config.blocks.local}
    sizes |= {"head_count": index.heads, "key_length": index.nope}
    keys = routed_keys(mixture) | {"leading_dense_block_count": dense}
    return keys | {at + key: size for key, size in sizes.items()}


FAMILY = Family(
    hf=dict.fromkeys(("MiniMaxM3VLForCausalLM", "MiniMaxM3SparseForCausalLM"), "minimax_m3_vl_text"),
    gguf=("minimax-m3",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=MiniMaxM3,
    weights=WEIGHTS,
    ignored=ignored,
    as_gguf={"minimax_m3_vl_text": Architecture(name="minimax-m3", more=gguf_keys, head=True)},
)
