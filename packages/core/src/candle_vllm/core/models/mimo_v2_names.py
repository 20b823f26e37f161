# SPDX-License-Identifier: MIT
"""Tensor names of MiMo V2 (`mimo_v2.py`), whose newer checkpoints have q, k and v of a layer as one FP8 matrix.

The matrix is cut into as many parts as layers without a window have key-value heads. Each part has the rows of its
query heads, then of its keys, then of its values, and blocks of FP8 scales begin anew in it (`quantization/fp8.py`). In
checkpoints with three matrices, blocks may begin anew in each head of keys.
Source: `MiMoV2ForCausalLM` of vLLM.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from candle_vllm.core.errors import UnsupportedModelError, WeightsError
from candle_vllm.core.loading.views import View, chain
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, HF, RepeatedValues, projections
from candle_vllm.core.models.experts import expert_names
from candle_vllm.core.models.glm4_moe import later_layers
from candle_vllm.core.models.llama import LlamaConfig
from candle_vllm.core.quantization.fp8 import Fp8Source
from candle_vllm.core.quantization.stored import QuantisedTensor
from candle_vllm.core.quantization.tensors import StoredTensor


def fused_rows(part: str) -> View:
    """Select the rows of part "q", "k" or "v" of the one matrix.

    Raises:
        UnsupportedModelError: the matrix is not FP8; only for FP8 the order of its rows is known.
        WeightsError: it has another number of rows or of scales, or key-value heads that cannot be divided among the
            parts.
    """

    def view(stored: StoredTensor, config: Any) -> StoredTensor:
        if stored.type_name != "FP8":
            raise UnsupportedModelError(
                f"{stored.path}: tensor {stored.name} is {stored.type_name}; qkv_proj is implemented for FP8 alone: "
                "take a checkpoint in FP8, or one with q_proj, k_proj and v_proj"
            )
        heads, kv_heads = _heads(stored, config)
        count = config.num_kv_heads
        sizes = [heads * config.head_dim, kv_heads * config.head_dim, kv_heads * config.value_dim]
        if stored.shape[:1] != (sum(sizes),) or kv_heads % count or heads % count:
            raise WeightsError(
                f"{stored.path}: tensor {stored.name} has shape {list(stored.shape)}; the model's config asks for "
                f"{count} parts of {sizes} rows of q, k and v in all"
            )
        stored = _anew(stored, count)
        ends = np.cumsum([0, *(size // count for size in sizes)])
        number = "qkv".index(part)
        rows = np.arange(sum(sizes)).reshape(count, -1)[:, ends[number] : ends[number + 1]]
        return stored.select(rows.reshape(-1))

    return view


def _heads(stored: StoredTensor, config: LlamaConfig) -> tuple[int, int]:
    """Heads, and key-value heads, of the layer that a tensor belongs to."""
    return config.heads(next(int(part) for part in stored.name.split(".") if part.isdecimal()) % config.num_layers)


def _anew(stored: StoredTensor, count: int) -> StoredTensor:
    """An FP8 matrix whose blocks of scales begin anew in each of `count` parts."""
    assert isinstance(stored, QuantisedTensor)
    source = stored.source.parted(count) if isinstance(stored.source, Fp8Source) else None
    if source is None:
        raise WeightsError(f"{stored.path}: the scales of tensor {stored.name} are not those of {count} equal parts")
    return dataclasses.replace(stored, source=source)


def _keys(stored: StoredTensor, config: Any) -> StoredTensor:
    """A matrix of keys, in whose heads blocks begin anew if its scales are more than those of one matrix."""
    source = getattr(stored, "source", None)
    anew = isinstance(source, Fp8Source) and source.refused is not None
    return _anew(stored, _heads(stored, config)[1]) if anew else stored


def _with_fused(line: WeightName, part: str) -> WeightName:
    """The line of a projection's weight that also reads the one matrix; `line.hf` is a name."""
    own = line.hf_view or chain()
    one, fused = chain(_keys, own) if part == "k" else own, chain(fused_rows(part), own)
    names = Seen(str(line.hf), one), Seen(f"{HF}self_attn.qkv_proj.weight", fused)
    return WeightName(line.target, names, line.gguf)


_SINKS = "layers.{i}.attention.attend:sinks"
_PROJECTIONS = projections({"v": RepeatedValues()})
WEIGHTS = [
    *(line for line in llama.WEIGHTS if ".attention.qkv:" not in line.target and line.target != _SINKS),
    *(_with_fused(line, line.target[-8]) if line.target.endswith(".weight") else line for line in _PROJECTIONS),
    WeightName(_SINKS, (HF + "self_attn.sinks", HF + "self_attn.attention_sink_bias"), GG + "attn_sinks.weight"),
    WeightName("layers.{i}.mlp.router:weight", HF + "mlp.gate.weight", GG + "ffn_gate_inp.weight"),
    WeightName("layers.{i}.mlp.router:correction", HF + "mlp.gate.e_score_correction_bias", GG + "exp_probs_b.bias"),
    *expert_names("mlp.experts", "gate_proj", "up_proj", "down_proj"),
]


def ignored(config: LlamaConfig) -> list[str]:
    """Names that Llama ignores, multi-token prediction layers, and the encoders of images and sound."""
    encoders = r"(visual|audio_encoder|speech_embeddings)\..*"
    return [*llama.ignored(config), r"model\.mtp\..*", encoders, *later_layers(config.num_layers)]
