# SPDX-License-Identifier: MIT
"""Adapters on their way into files: merged into a model, or as GGUF adapters of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from candle_vllm.core import AdapterError, ConfigError, EngineConfig
from candle_vllm.core.assembly.adapters import fit_adapter
from candle_vllm.core.conversion import write_gguf, write_gguf_adapter
from candle_vllm.core.loading.adapters import read_adapter
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.gguf_export import export_gguf
from packages.core.tests.models.peft_adapters import base_of, furthest, merged, parts, trained
from packages.core.tests.toy_adapter import write_adapter
from packages.core.tests.toy_encoder import write_toy_encoder

EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
TABLES = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
NORMS = {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "up_proj"]}
PATTERNS = {
    "use_rslora": True,
    "rank_pattern": {"q_proj": 2, r".*layers\.1\.mlp.*": 8},
    "alpha_pattern": {"layers.0.self_attn.k_proj": 3},
}


def every(*cases: tuple[str, dict[str, Any]]) -> list[Any]:
    return [pytest.param(*case, marks=pytest.mark.every_case) for case in cases]


def numbers(path: Path) -> dict[str, np.ndarray]:
    """The float32 tensors of a file, in the order of torch."""
    return {tensor.name: np.array(tensor.data, np.float32) for tensor in GGUFReader(path).tensors}


# ---- merged ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("Qwen2", {"use_dora": True, "bias": "all"}),
        *every(
            ("Llama", TABLES),
            ("Llama", NORMS),
            ("Gemma", NORMS),
            ("Phi-2", {"bias": "all"}),
            ("Phi-3", PATTERNS),
            ("Qwen3-MoE", EXPERTS),
            ("gpt-oss", EXPERTS),
        ),
    ],
)
def test_a_merged_file_is_the_model_that_peft_merges(
    name: str, config: dict[str, Any], tmp_path: Path, words: Path
) -> None:
    made, out = trained(tmp_path, name, **config), tmp_path / "out.gguf"
    settings = EngineConfig(model=str(made.model), tokenizer=words)
    found = []
    for uses in ([1.0], [0.25, 0.75]):
        write_gguf(settings, out, adapters=[(made.adapter, scale) for scale in uses], overwrite=True)
        found.append(parts(base_of(out)))
    expected = made.merged(tmp_path / "merged")
    for each in found:
        assert furthest(each, expected) < 1e-6


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"target_modules": ["embed_tokens"]}, False),
        pytest.param(TABLES, False, marks=pytest.mark.every_case),
        pytest.param(
            {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}, True, marks=pytest.mark.every_case
        ),
    ],
)
def test_a_tied_head_stays_one_where_it_can(config: dict[str, Any], tied: bool, tmp_path: Path, words: Path) -> None:
    made, out = trained(tmp_path, "Llama", {"tie_word_embeddings": True}, **config), tmp_path / "out.gguf"
    write_gguf(EngineConfig(model=str(made.model), tokenizer=words), out, adapters=[(made.adapter, 1.0)])
    base, written = base_of(made.model), base_of(out)
    with read_adapter(made.adapter) as stored:
        expected = merged(base, fit_adapter(stored, base))
    assert written.config.tie_embeddings == tied
    assert furthest(parts(written), expected) < 1e-6


def test_merged_matrices_are_quantised_once(tmp_path: Path, words: Path) -> None:
    """With --isq the sum in float32 is quantised, and not what the base's bfloat16 makes of it."""
    made, out = trained(tmp_path, "Qwen2", target_modules=["down_proj"]), tmp_path / "quantised.gguf"
    weights = made.model / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    settings = EngineConfig(model=str(made.model), tokenizer=words, isq="q8_0")
    write_gguf(settings, out, adapters=[(made.adapter, 1.0)])
    base, target = base_of(made.model), "layers.1.mlp.down:weight"
    with read_adapter(made.adapter) as stored:
        exact = merged(base, fit_adapter(stored, base))[target].reshape(-1, 32)
    step = np.abs(exact).max(axis=1, keepdims=True) / 127
    off = np.abs(exact - parts(base_of(out))[target].reshape(-1, 32)) / step
    assert 0.4 < off.max() < 0.57  # half a step, and 127 times the rounding of its float16 scale


# ---- GGUF adapters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("Llama", PATTERNS),
        ("Phi-3", {}),
        ("Phi-2", {"target_modules": ["q_proj", "v_proj"]}),  # and k is a part of the same matrix in some files
        ("Mixtral", EXPERTS),
        *every(
            *[
                (name, {})
                for name in ("Qwen2", "Gemma-3", "GLM-4", "SmolLM3", "Ministral 3", "Phi-2", "StableLM", "Qwen3.5")
            ],
            *[(name, EXPERTS) for name in ("Qwen3-MoE", "gpt-oss", "GLM-4-MoE")],
            ("DeepSeek-V3", EXPERTS | {"target_modules": ["q_a_proj", "q_b_proj", "o_proj", "kv_a_proj_with_mqa"]}),
        ),
    ],
)
def test_a_gguf_adapter_is_added_to_the_tensors_that_it_names(
    name: str, config: dict[str, Any], tmp_path: Path
) -> None:
    """As llama.cpp does: W of the base's file plus alpha / r B A is W of the merged model's file."""
    made, architecture = trained(tmp_path, name, **config), ROWS[name].gguf
    assert architecture is not None
    source = export_gguf(made.model, tmp_path / "base.gguf", architecture)
    for model in (made.model, source):
        out = tmp_path / f"adapter-of-{model.name}.gguf"
        write_gguf_adapter(EngineConfig(model=str(model)), made.adapter, out)
    bases = [base_of(made.model), base_of(source)]
    with read_adapter(made.adapter) as stored, read_adapter(out) as again:
        expected = merged(bases[0], fit_adapter(stored, bases[0]))
        for base in bases:
            assert furthest(merged(base, fit_adapter(again, base)), expected) < 1e-6
    if name != "Phi-2":  # whose queries, keys and values are one matrix in some files
        assert numbers(out).keys() == numbers(tmp_path / "adapter-of-model.gguf").keys()
    alpha = GGUFReader(out).fields["adapter.lora.alpha"].contents()
    made.merged(tmp_path / "merged")
    there = numbers(export_gguf(tmp_path / "merged", tmp_path / "merged.gguf", architecture))
    found, halves = numbers(source), numbers(out)
    for key, b in halves.items():
        if key.endswith(".lora_b"):
            a = halves[key[:-1] + "a"]
            found[key.removesuffix(".lora_b")] += np.float32(alpha / b.shape[-1]) * (b @ a)
    for key, values in there.items():
        assert np.linalg.norm(found[key] - values) <= 1e-6 * np.linalg.norm(values), key


def test_tables_and_the_tokens_that_switch_on_go_into_gguf(tmp_path: Path) -> None:
    made = trained(tmp_path, "Llama", **TABLES)
    config = made.adapter / "adapter_config.json"
    config.write_text(
        config.read_text().replace('"alora_invocation_tokens": null', '"alora_invocation_tokens": [5, 7]')
    )
    out = tmp_path / "adapter.gguf"
    write_gguf_adapter(EngineConfig(model=str(made.model), dtype="f16"), made.adapter, out)
    base = base_of(made.model)
    with read_adapter(made.adapter) as stored, read_adapter(out) as again:
        assert again.config.alora == stored.config.alora == (5, 7)
        expected, found = (merged(base, fit_adapter(each, base)) for each in (stored, again))
    assert numbers(out)["token_embd.weight.lora_a"].shape == (272, 4)  # llama.cpp looks its rows up
    assert 1e-6 < furthest(found, expected) < 1e-3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3]}, "rows for embed"),
    ],
)
def test_what_gguf_adapters_have_no_place_for_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    made = trained(tmp_path, "Llama", **config)
    with pytest.raises(AdapterError, match=f"{message}.*quantize --lora"):
        write_gguf_adapter(EngineConfig(model=str(made.model)), made.adapter, tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


def test_adapters_of_encoders_are_not_written(tmp_path: Path) -> None:
    model = write_toy_encoder(tmp_path / "model")
    adapter = write_adapter(tmp_path / "a", {"encoder.layer.0.attention.self.query": (32, 32)})
    with pytest.raises(AdapterError, match=r"is for the encoder .*model, and GGUF adapters are written for decoders"):
        write_gguf_adapter(EngineConfig(model=str(model)), adapter, tmp_path / "adapter.gguf")


def test_adapters_are_not_quantised(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="written unquantised"):
        write_gguf_adapter(EngineConfig(model="x", isq="q4_0"), tmp_path, tmp_path / "adapter.gguf")
