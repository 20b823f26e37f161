# SPDX-License-Identifier: MIT
"""Adapters that PEFT makes of tiny models, and what they should do to each matrix."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from candle_vllm.core import EngineConfig
from candle_vllm.core.assembly.adapter_base import AdapterBase, adapter_base
from candle_vllm.core.kernels.lora import FittedAdapter
from candle_vllm.core.loading.source import model_files
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.tiny import write_tiny

Parts = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A tiny model's folder, that of an adapter of it, and PEFT's model of both."""

    model: Path
    adapter: Path
    peft: PeftModel

    def merged(self, folder: Path) -> Parts:
        """What PEFT makes of the two."""
        self.peft.merge_and_unload().save_pretrained(folder)
        return parts(base_of(folder))


def trained(folder: Path, name: str, model: Mapping[str, Any] | None = None, seed: int = 1, **config: Any) -> Trained:
    """An adapter with random numbers wherever there are some.

    Args:
        folder: where the two go.
        name: of a row of `ROWS`.
        model: keys of its config, over the row's.
        seed: of the adapter's numbers.
        config: of `LoraConfig`; r 4 and alpha 8 of every linear layer else.
    """
    row = ROWS[name]
    source = write_tiny(folder / "model", row.model_type, **(dict(row.config) | dict(model or {})))
    usual = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice
        made = get_peft_model(
            AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), LoraConfig(**(usual | config))
        )
        randomise(made, seed)
        made.save_pretrained(str(folder / "adapter"))
    return Trained(source, folder / "adapter", made)


def randomise(model: PeftModel, seed: int) -> None:
    """Gives all that is trained numbers that do something."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.requires_grad:
                continue
            if "magnitude" in name:
                weight.mul_(1 + 0.2 * torch.rand_like(weight))
            elif "lora_" in name or "trainable_tokens" in name:
                weight.normal_(0.0, 0.1)
            else:
                weight.add_(torch.randn_like(weight) * 0.1)


def base_of(source: Path, **settings: Any) -> AdapterBase:
    config = EngineConfig(model=str(source), **settings)
    return adapter_base(model_files(config), config)


def parts(base: AdapterBase) -> Parts:
    """Every part of a model, decoded."""
    with base.weights() as stored:
        found = {target: stored(target) for target in base.shapes}
        return {target: tensor.load("F32") for target, tensor in found.items() if tensor is not None}


def merged(base: AdapterBase, fitted: FittedAdapter) -> Parts:
    """The parts of a model with an adapter merged into them, by the words of `Delta`."""
    found = parts(base)
    for path, deltas in fitted.deltas.items():
        for prefix, delta in deltas.items():
            weight = found[f"{path}:{prefix}weight"].copy()
            if delta.full is not None:
                weight = delta.full.load("F32")
            if delta.rows is not None:
                weight[delta.rows[0]] = delta.rows[1]
            if delta.a is not None and delta.b is not None:
                weight += np.float32(delta.scale) * (delta.b.load("F32") @ delta.a.load("F32"))
            if delta.column_scale is not None:
                weight *= delta.column_scale[:, None]
            found[f"{path}:{prefix}weight"] = weight
            if delta.bias is not None:
                found[f"{path}:{prefix}bias"] = found.get(f"{path}:{prefix}bias", np.float32(0)) + delta.bias
    return found


def furthest(found: Parts, expected: Parts) -> float:
    """The largest relative difference of a part; what only one file stores is no part of both."""
    shared = [target for target in expected if target in found and not target.startswith("rotary")]
    return max(
        float(np.linalg.norm(found[target] - expected[target]) / max(np.linalg.norm(expected[target]), 1e-30))
        for target in shared
    )


def changed(found: Parts, base: Parts) -> set[str]:
    """Targets of parts that differ."""
    return {target for target in found if target not in base or not np.array_equal(found[target], base[target])}
