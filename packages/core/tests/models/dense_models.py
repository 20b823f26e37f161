# SPDX-License-Identifier: MIT
"""Tiny Phi, StableLM and SmolLM3 checkpoints for tests that change their configs or files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from candle_vllm.core.loading.gguf import open_gguf
from candle_vllm.core.models.registry import family_from_gguf
from packages.core.tests.models.families import PHI2, PHI3, PHI4_MINI, SMOLLM3, STABLELM, STABLELM_12B
from packages.core.tests.models.tiny import config_of, write_tiny

MODELS: Mapping[str, Mapping[str, Any]] = {
    "phi": PHI2,
    "phi3": PHI3,
    "longrope": PHI4_MINI,
    "stablelm": STABLELM,
    "stablelm 12b": STABLELM_12B,
    "smollm3": SMOLLM3,
}


def folders(factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a name of `MODELS`, written when it is first asked for; no test changes it."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            model_type = "phi3" if name == "longrope" else name.split()[0]
            made[name] = write_tiny(factory.mktemp("dense"), model_type, **MODELS[name])
        return made[name]

    return get


def edited(source: Path, target: Path, **changes: Any) -> Path:
    """The same weights with another config; None takes a key out."""
    config = {key: value for key, value in (config_of(source) | changes).items() if value is not None}
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config))
    return target


def gguf_config(path: Path, architecture: str, tensors: dict[str, np.ndarray], **numbers: int) -> Any:
    """The config that a file of nothing but metadata and small tensors gives."""
    writer = GGUFWriter(path, architecture)
    required = {"context_length": 4096, "embedding_length": 64, "block_count": 32, "feed_forward_length": 96}
    for key, value in (required | {"attention.head_count": 4} | numbers).items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    for name, data in ({"token_embd.weight": np.zeros((8, 64), np.float32)} | tensors).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(path) as checkpoint:
        return family_from_gguf(checkpoint.metadata, checkpoint)[1]
