# SPDX-License-Identifier: MIT
"""Tensor names of A.X K2 (`axk2.py`), in published files and in transformers."""

from __future__ import annotations

from typing import Any

import numpy as np

from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import deepseek
from candle_vllm.core.models.attention_names import HF
from candle_vllm.core.models.deepseek import query_rows
from candle_vllm.core.quantization.tensors import StoredTensor


def _query_rows(stored: StoredTensor, config: Any) -> StoredTensor:
    """The rows of queries of heads [nope | rope | gate], in half-split rotary order."""
    each = config.head_dim + config.value_dim
    if stored.shape[:1] != (config.num_heads * each,):
        return stored  # the loader reports the wrong shape
    rows = (np.arange(config.num_heads)[:, None] * each + np.arange(config.head_dim)).reshape(-1)
    return query_rows(stored.select(rows), config)


def _gate_rows(stored: StoredTensor, config: Any) -> StoredTensor:
    """The rows of gates of the same heads."""
    each = config.head_dim + config.value_dim
    if stored.shape[:1] != (config.num_heads * each,):
        return stored
    return stored.select((np.arange(config.num_heads)[:, None] * each + np.arange(config.head_dim, each)).reshape(-1))


_AT = "layers.{i}."
_UP = (HF + "self_attn.q_b_proj.weight", HF + "self_attn.q_gate_proj.weight")
_NORMS = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
_LEFT_OUT = [f"{_AT}{part}_norm:weight" for part in _NORMS] + [_AT + "attention.q_up:weight"]


def _of_norm(part: str, name: str) -> list[WeightName]:
    """The table rows of a norm and its gate, by the names in published files and in transformers."""
    gates = {"down": ("W_down", "mlp.fc1"), "up": ("W_up", "mlp.fc2")}
    return [
        WeightName(f"{_AT}{part}_norm:weight", (f"{HF}{name}.weight", f"{HF}{name}.norm.weight"), None),
        *(
            WeightName(f"{_AT}{part}_gate.{to}:weight", tuple(f"{HF}{name}.{each}.weight" for each in names), None)
            for to, names in gates.items()
        ),
    ]


WEIGHTS = [
    *(line for line in deepseek.WEIGHTS if line.target not in _LEFT_OUT),
    *(line for part, name in _NORMS.items() for line in _of_norm(part, name)),
    WeightName(_AT + "attention.q_up:q.weight", _UP, None, _query_rows),
    WeightName(_AT + "attention.q_up:gate.weight", _UP, None, _gate_rows),
]
