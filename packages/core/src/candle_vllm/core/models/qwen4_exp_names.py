# SPDX-License-Identifier: MIT
"""Names of Qwen4's tensors: those of transformers' modules, and those of llama.cpp's files."""

from __future__ import annotations

from candle_vllm.core.loading.views import View, flattened, plus_one
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models import qwen3_next
from candle_vllm.core.models.attention_names import GG, HF
from candle_vllm.core.models.ngram_table import GGUF_TABLE
from candle_vllm.core.models.qwen4_exp_config import Qwen4ExpConfig
from candle_vllm.core.quantization.tensors import StoredTensor


def _streams(to: str, name: str, gguf: str) -> list[WeightName]:
    """The table rows of a `GatedResidual`."""
    parts = {"down": "input_mix_weight_down", "up": "input_mix_weight_up", "inject": "block_inject_weight"}
    lines = [
        WeightName(f"{to}.{part}:weight", f"{name}.{hf}.weight", f"{gguf}_{part}.weight") for part, hf in parts.items()
    ]
    return [*lines, WeightName(f"{to}.norm:weight", f"{name}.hc_norm.weight", f"{gguf}_norm.weight", plus_one)]


def _index_rows(part: str) -> View:
    """View of the rows of queries "q" or keys "k" of the index."""

    def view(stored: StoredTensor, config: Qwen4ExpConfig) -> StoredTensor:
        assert config.index is not None
        queries = config.index.heads * config.index.nope
        return stored.rows(*((0, queries) if part == "q" else (queries, queries + config.index.nope)))

    return view


_INDEX, _NGRAMS = "layers.{i}.attention.index", "layers.{i}.ngrams"
_ATTENTION, _PLE = HF + "self_attn.indexer.", HF + "ple."
WEIGHTS = [
    *qwen3_next.WEIGHTS,
    *_streams("streams", "model.hyper_connection_mixer", "output_hc"),
    *_streams("layers.{i}.attention_streams", HF + "attn_hyper_connection", GG + "hc_attn"),
    *_streams("layers.{i}.mlp_streams", HF + "mlp_hyper_connection", GG + "hc_ffn"),
    *(
        line
        for part in "qk"
        for line in (
            WeightName(
                f"{_INDEX}.inputs:{part}.weight",
                Seen(_ATTENTION + "index_qk_proj.weight", _index_rows(part)),
                f"{GG}indexer.{part}_proj.weight",
            ),
            WeightName(
                f"{_INDEX}.{part}_norm:weight",
                f"{_ATTENTION}{part}_layernorm.weight",
                f"{GG}indexer.{part}_norm.weight",
                plus_one,
            ),
        )
    ),
    *(
        WeightName(f"{_NGRAMS}.{part}:weight", f"{_PLE}{part}_proj.weight", f"{GG}ple_{part}.weight")
        for part in ("key", "value")
    ),
    *(
        WeightName(f"{_NGRAMS}.{to}_norm:weight", f"{_PLE}norm_{to}.weight", f"{GG}ple_norm_{to}.weight", plus_one)
        for to in ("key", "query", "conv")
    ),
    WeightName(f"{_NGRAMS}:taps", _PLE + "conv1d.weight", GG + "ple_conv1d.weight", flattened),
    WeightName(f"{_NGRAMS}.table:weight", _PLE + "ple_embedding.ngram_embedding.weight", GGUF_TABLE),
]
