# SPDX-License-Identifier: MIT
"""Encoders with rotary positions and norms after sums: nomic-bert, GTE and jina-embeddings-v3.

nomic-bert has a SiLU gate and no biases; GTE has a GELU gate; jina v3 has no gate. nomic v2 has biases, no gate, and
experts in every second layer. None has a position table.
Sources: Nussbaum et al., 2024, arXiv:2402.01613; Zhang et al., 2024, arXiv:2407.19669; Sturua et al., 2024,
arXiv:2409.10173.
"""

from __future__ import annotations

from collections.abc import Iterable

from candle_vllm.core.loading.views import View, as_row, chain, entry, row_part, transposed
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models.encoder_parts import block_names, ignored, prefix_of, table_names, thirds
from candle_vllm.core.models.encoder_stack import PlainEncoder, StackConfig
from candle_vllm.core.models.family import EncoderFamily
from candle_vllm.core.models.jina_tasks import STACKED, WEIGHT, parametrized
from candle_vllm.core.models.nomic_config import GTE, JINA, NOMIC, config_from_gguf, config_from_hf

# ---- weight names ----------------------------------------------------------------------------------------------------


def _of_expert(number: int) -> View:
    """View of the matrix of expert `number` in a tensor [experts, rows, columns]."""
    return lambda stored, config: entry(stored, number)  # noqa: ARG005


def weights(config: StackConfig, stored: Iterable[str]) -> list[WeightName]:
    """The table of weight names: those of transformers, of published repositories and of GGUF files."""
    at = prefix_of((name.replace(WEIGHT, ".weight") for name in stored), "embeddings.word_embeddings.weight")
    new, old, gte, block = f"{at}layers.{{i}}.", f"{at}encoder.layers.{{i}}.", f"{at}encoder.layer.{{i}}.", "blk.{i}."
    alone = {part: (f"{new}self_attn.{part}_proj",) for part in "qkv"}
    fused = (f"{old}attn.Wqkv", f"{old}mixer.Wqkv", f"{gte}attention.qkv_proj")
    outputs = (f"{new}self_attn.o_proj", f"{old}attn.out_proj", f"{old}mixer.out_proj", f"{gte}attention.o_proj")
    gates = tuple(Seen(f"{gte}mlp.up_gate_proj.weight", row_part(half, 2)) for half in (1, 0))
    ups = (f"{new}mlp.fc1", f"{old}mlp.fc1")
    downs = (f"{new}mlp.down_proj", f"{new}mlp.fc2", f"{old}mlp.fc2", f"{gte}mlp.down_proj")
    norms = (f"{new}post_attention_layernorm", f"{old}norm1", f"{gte}attn_ln")
    last = (f"{new}post_mlp_layernorm", f"{old}norm2", f"{gte}mlp_ln")
    own = {f"attention.qkv:{part}.": () for part in "qkv"} | {"attention.output:": outputs, "attention_norm:": norms}
    own |= {"mlp.up:": ups, "mlp.down:": downs, "mlp_norm:": last}
    lines = [
        *table_names(at, (f"{at}pooler.dense", "classifier"), f"{at}emb_ln"),
        *thirds(alone, fused, f"{block}attn_qkv"),
        *block_names("", own),
        WeightName("layers.{i}.mlp.gate_up:gate.weight",
                   (f"{new}mlp.gate_proj.weight", f"{old}mlp.fc12.weight", gates[0]), f"{block}ffn_gate.weight"),
        WeightName("layers.{i}.mlp.gate_up:up.weight",
                   (f"{new}mlp.up_proj.weight", f"{old}mlp.fc11.weight", gates[1]), f"{block}ffn_up.weight"),
        WeightName("layers.{i}.mlp.router:weight", f"{old}mlp.router.layer.weight", f"{block}ffn_gate_inp.weight"),
        *(
            WeightName(
                f"layers.{{i}}.mlp.experts:{part}.{number}.weight",
                Seen(f"{old}mlp.experts.mlp.{name}", chain(row_part(number, config.num_experts), *views)),
                Seen(f"{block}ffn_{part}_exps.weight", _of_expert(number)),
            )
            for part, name, views in (("up", "w1", ()), ("down", "w2", (transposed,)))
            for number in range(config.num_experts)
        ),
        WeightName("layers.{i}.mlp_bias:weight", Seen(f"{old}mlp.experts.bias", as_row), None),
    ]  # fmt: skip
    return [parametrized(line) for line in lines] if config.model_type == JINA else lines


FAMILY = EncoderFamily(
    hf={
        "NomicBertModel": (NOMIC, False),
        "NomicBertForSequenceClassification": (NOMIC, True),
        "GteModel": (GTE, False),
        "GteForSequenceClassification": (GTE, True),
        "NewModel": (GTE, False),
        "NewForSequenceClassification": (GTE, True),
        "JinaEmbeddingsV3Model": (JINA, False),
    },
    gguf=("nomic-bert", "nomic-bert-moe", "jina-bert-v3"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=PlainEncoder,
    weights=weights,
    ignored=lambda config: (*ignored(config), STACKED),
)
