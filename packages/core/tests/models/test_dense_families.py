# SPDX-License-Identifier: MIT
"""Phi, StableLM and SmolLM3 beyond the table of families: long-rope's choice, and files that are stored otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

from candle_vllm.core.loading.rope import attention_scale
from packages.core.tests.models.dense_models import MODELS, edited, folders
from packages.core.tests.models.gguf_export import CONVERTERS, export_gguf
from packages.core.tests.models.tiny import (
    config_of,
    cuts,
    eager_logits,
    error,
    load,
    recorded_logits,
    some_tokens,
    spread,
    their_logits,
)
from packages.core.tests.models.tiny import write_tiny as write

TOKENS = some_tokens()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return folders(tmp_path_factory)


# ---- long-rope -------------------------------------------------------------------------------------------------------


def test_longrope_within_the_original_context_takes_the_short_factors(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """transformers decides by the text, we by the context that is served: they agree where both are short."""
    source = edited(folder("longrope"), tmp_path, original_max_position_embeddings=128)
    theirs = their_logits(source, TOKENS)
    for chunks in cuts():
        assert error(eager_logits(source, TOKENS, chunks, max_model_len=128), theirs) < 1e-4
    assert error(eager_logits(source, TOKENS, [len(TOKENS)], max_model_len=129), theirs) > 1e-2
    assert spread(recorded_logits(source, TOKENS, [len(TOKENS)], max_model_len=128), theirs) < 1e-2


def test_longrope_decides_alike_from_gguf(folder: Callable[[str], Path], tmp_path: Path) -> None:
    path, tokens = export_gguf(folder("longrope"), tmp_path / "model.gguf", "phi3"), TOKENS[:24]
    logits = {
        (source, limit): eager_logits(source, tokens, [len(tokens)], max_model_len=limit)
        for source in (path, folder("longrope"))
        for limit in (48, 49)
    }
    for limit in (48, 49):
        assert error(logits[path, limit], logits[folder("longrope"), limit]) < 1e-5
    assert error(logits[path, 48], logits[path, 49]) > 1e-2


def test_a_shorter_context_keeps_longropes_scale(folder: Callable[[str], Path]) -> None:
    """It is of the model, not of what is served."""
    for limit in (40, 100, None):
        rope = load(folder("longrope"), op_by_op=True, max_model_len=limit).config.rope
        assert attention_scale(rope) == pytest.approx(math.sqrt(1 + math.log(512 / 48) / math.log(48)), rel=1e-6)


@pytest.mark.parametrize("name", ["su", "longrope"])
def test_longrope_as_it_was_written_before_transformers_5(
    name: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    rope = dict(config_of(folder("longrope"))["rope_parameters"])
    old = {"type": name, "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    top = {"rope_scaling": old, "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "rope_parameters": None}
    source = edited(folder("longrope"), tmp_path, **top)
    theirs = their_logits(folder("longrope"), TOKENS)
    assert error(eager_logits(source, TOKENS, [len(TOKENS)]), theirs) < 1e-4


def test_longropes_own_factor_and_scale_come_first(folder: Callable[[str], Path], tmp_path: Path) -> None:
    rope = dict(config_of(folder("longrope"))["rope_parameters"])
    for number, given in enumerate(({"factor": 3.0}, {"attention_factor": 1.7})):
        target = tmp_path / str(number)
        target.mkdir()
        source = edited(folder("longrope"), target, rope_parameters=rope | given)
        assert error(eager_logits(source, TOKENS, [len(TOKENS)]), their_logits(source, TOKENS)) < 1e-4


# ---- what files may leave out or store otherwise ---------------------------------------------------------------------


def test_phi3_from_gguf_with_q_k_and_v_apart(folder: Callable[[str], Path], tmp_path: Path, monkeypatch: Any) -> None:
    usual = CONVERTERS["phi3"]

    def apart(writer: GGUFWriter, config: Any, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        made = usual(writer, config, tensors)
        for layer in range(2):
            qkv = made.pop(f"model.layers.{layer}.self_attn.qkv_proj.weight")
            for part, rows in zip("qkv", np.split(qkv, 3), strict=True):
                made[f"blk.{layer}.attn_{part}.weight"] = rows
        return made

    monkeypatch.setitem(CONVERTERS, "phi3", apart)  # type: ignore[arg-type]
    path = export_gguf(folder("phi3"), tmp_path / "model.gguf", "phi3")
    ours, plain = (eager_logits(source, TOKENS, [len(TOKENS)]) for source in (path, folder("phi3")))
    assert error(ours, plain) < 1e-5


@pytest.mark.parametrize("name", ["phi", "stablelm", "smollm3"])
def test_tied_and_untied_heads(name: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The other way round than in the table of families; Phi-2's logits have a bias either way."""
    tied = not config_of(folder(name)).get("tie_word_embeddings", name == "smollm3")
    source = write(tmp_path, name, **MODELS[name], tie_word_embeddings=tied)
    assert error(eager_logits(source, TOKENS, [len(TOKENS)]), their_logits(source, TOKENS)) < 1e-4
    assert spread(recorded_logits(source, TOKENS, [len(TOKENS)]), their_logits(source, TOKENS)) < 1e-2


def test_phi_without_a_head_has_no_bias_of_logits(folder: Callable[[str], Path], tmp_path: Path) -> None:
    source = edited(folder("phi"), tmp_path, architectures=["PhiModel"])
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    kept = {name.removeprefix("model."): data for name, data in weights.items() if "lm_head" not in name}
    save_file(kept, source / "model.safetensors")
    assert not load(source).config.has_head


@pytest.mark.parametrize(
    ("name", "scaling"),
    [
        ("phi", {"rope_type": "linear", "factor": 4.0}),
        ("stablelm", {"rope_type": "dynamic", "factor": 1.0}),
        ("smollm3", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    ],
)
def test_other_rotary_scalings(name: str, scaling: dict[str, Any], tmp_path: Path) -> None:
    """With the share of each head that turns."""
    values = dict(MODELS[name])
    partial = {"partial_rotary_factor": values.pop("partial_rotary_factor", 0.25)} if name != "smollm3" else {}
    values["rope_parameters"] = {"rope_theta": 10000.0} | partial | scaling
    source = write(tmp_path, name, **values)
    assert error(eager_logits(source, TOKENS, [len(TOKENS)]), their_logits(source, TOKENS)) < 1e-4


def test_smollm3_without_a_list_of_layers(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The interval says which layers do not turn; the base has a default of its own."""
    rope = {"rope_parameters": None, "layer_types": None, "no_rope_layers": None, "no_rope_layer_interval": 3}
    source = edited(folder("smollm3"), tmp_path, **rope)
    loaded = load(source, op_by_op=True).config
    assert loaded.unrotated_layers == {2}  # type: ignore[attr-defined]
    assert loaded.rope.theta == 2e6
    assert error(eager_logits(source, TOKENS, [len(TOKENS)]), their_logits(source, TOKENS)) < 1e-4
