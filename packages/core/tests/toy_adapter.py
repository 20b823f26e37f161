# SPDX-License-Identifier: MIT
"""Writes real adapters (LoRA) of random numbers, as PEFT saves them, without PEFT and in milliseconds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.testing.toy_model import save_plain

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERY_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def linear_shapes(model: ModelConfig, targets: Iterable[str] = EVERY_LINEAR) -> dict[str, tuple[int, int]]:
    """Return names and shapes [out, in] of the matrices in all layers of a model that is wired like Llama.

    Args:
        model: the model's description.
        targets: the matrices, by the last part of their names; "lm_head" is possible too.
    """
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    hidden, inner = model.hidden_size, model.intermediate_size
    sizes = {
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    wanted = tuple(targets)
    found = {
        f"model.layers.{layer}.{name}": size
        for layer in range(model.num_layers)
        for name, size in sizes.items()
        if name.rpartition(".")[2] in wanted
    }
    return found | ({"lm_head": (model.vocab_size, hidden)} if "lm_head" in wanted else {})


def write_adapter(
    folder: Path | str,
    shapes: Mapping[str, tuple[int, int]] | ModelConfig,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    seed: int = 0,
    targets: Iterable[str] = EVERY_LINEAR,
    dtype: str = "F32",
    size: float = 0.1,
    zero: bool = False,
    tensors: Mapping[str, np.ndarray] | None = None,
    **config: Any,
) -> Path:
    """Writes `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        folder: created if it does not exist.
        shapes: [out, in] of each module by its name ("model.layers.0.self_attn.q_proj"), or a model's description.
        rank, alpha: values of all modules; `rank_pattern` in `config` changes only the config, not the tensors.
        seed: seed of the random weights.
        targets: for a model's description, see `linear_shapes`.
        dtype: F32, BF16 or F16.
        size: approximate magnitude of B A x for an x of ones, before the scale.
        zero: whether B is zero, so that the adapter changes nothing.
        tensors: further float32 tensors, by name without the prefix "base_model.model.".
        config: keys of adapter_config.json that replace or extend the usual ones.

    Returns:
        the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    modules = linear_shapes(shapes, targets) if isinstance(shapes, ModelConfig) else dict(shapes)
    rng, written = np.random.default_rng(seed), dict[str, np.ndarray]()
    for name, (rows, columns) in modules.items():
        a = rng.standard_normal((rank, columns), np.float32) * np.float32(1 / math.sqrt(columns))
        b = np.zeros((rows, rank), np.float32) if zero else rng.standard_normal((rows, rank), np.float32)
        written[f"{name}.lora_A.weight"], written[f"{name}.lora_B.weight"] = a, b * np.float32(size / math.sqrt(rank))
    written |= tensors or {}
    usual = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "toy",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(usual | config, indent=2), encoding="utf-8")
    named = {f"base_model.model.{name}": values for name, values in written.items()}
    save_plain(folder / "adapter_model.safetensors", named, dtype)
    return folder
