# SPDX-License-Identifier: MIT
"""Adapters of PEFT, fitted to models of every family: what they do to each matrix is what PEFT's merging does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from candle_vllm.core import EngineConfig, InferenceEngine, LoRARequest, SamplingParams
from candle_vllm.core.assembly.adapters import fit_adapter, norms_with
from candle_vllm.core.config import LoraDType
from candle_vllm.core.errors import AdapterError
from candle_vllm.core.kernels.lora.reference import decoded, quantised
from candle_vllm.core.loading.adapters import read_adapter
from packages.core.tests.models.families import ROWS, first_rows
from packages.core.tests.models.gguf_export import export_gguf
from packages.core.tests.models.peft_adapters import Trained, base_of, changed, furthest, merged, parts, trained

EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
TABLES = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
PATTERNS = {
    "use_rslora": True,
    "rank_pattern": {"q_proj": 2, r".*layers\.1\.mlp.*": 8},
    "alpha_pattern": {"layers.0.self_attn.k_proj": 3},
}
SAVED = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}
TOKENS = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 100]}
MULTIPLIED = ("Falcon-H1", "Falcon-H1 norms")  # whose GGUF files have multipliers in their matrices
MAMBAS = ("falcon_h1", "falcon_mamba", "jamba", "mamba", "mamba2", "nemotron_h")
OF_MAMBA = {"target_modules": r".*(?<!out)_proj"}  # PEFT refuses the output projection of such models


def every(*cases: tuple[str, dict[str, Any]]) -> list[Any]:
    return [pytest.param(*case, marks=pytest.mark.every_case) for case in cases]


CASES = [
    ("Llama", {"r": 64, **PATTERNS, "rank_pattern": {}}),
    ("Qwen2", {"use_dora": True, "bias": "all"}),
    ("Phi-3", {"use_dora": True, **PATTERNS}),
    ("Qwen3-MoE", EXPERTS),
    ("Llama", {**TABLES, "r": 16}),
    ("Granite 4 H", {"target_modules": ["q_proj", "k_proj"]}),
    ("Phi-2", TABLES),  # PEFT saves the head's bias too
    *every(
        *[
            (name, OF_MAMBA if ROWS[name].model_type in MAMBAS else {})
            for name in first_rows()
            if not {"kv_lora_rank", "laurel_rank"} & ROWS[name].config.keys()
        ],
        ("Kimi Linear", {"target_modules": r".*self_attn\.(q|k|v|o|f_a|f_b|b|g_a|g_b|kv_a)_proj(_with_mqa)?"}),
        ("Ling 3.0", {"target_modules": r".*self_attn\.(forget_gate\.f|[qkvgbo]|kv_a)_proj(_with_mqa)?"}),
        ("A.X K2", {"target_modules": r".*(self_attn\.(q_a|q_gate|kv_a|o)_proj(_with_mqa)?|layernorm\.mlp\.fc[12])"}),
        ("GLM-5.3-Flash", {"target_modules": r".*self_attn\.([^.]*(?<!kv_b)_proj(_with_mqa)?|indexer\.w.*)"}),
        (
            "Gemma-3n own keys",
            {"target_modules": r".*(_proj|_gate|_projection|linear_left|linear_right|modality_router)"},
        ),
        *[(name, EXPERTS) for name in ("Mixtral", "Qwen2-MoE", "GLM-4-MoE", "gpt-oss", "DeepSeek-V3")],
        *[("Mixtral", EXPERTS | {"target_parameters": [f"experts.{name}"]}) for name in ("gate_up_proj", "down_proj")],
        ("DeepSeek-V2", {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]}),
        ("DeepSeek-V2 Lite", {"target_modules": ["q_proj", "kv_a_proj_with_mqa"]}),
        *[(name, {"target_modules": ["wq_b", "wk", "weights_proj"]}) for name in ("DeepSeek-V3.2", "GLM-5")],
        ("Qwen2", {"bias": "lora_only"}),
        ("Phi-2", {"lora_bias": True}),
        ("Phi-2", {"use_dora": True, "bias": "lora_only"}),
        ("Llama", SAVED),
        ("Llama", TOKENS),
        ("Llama", {"target_modules": "all-linear", "init_lora_weights": "gaussian", "r": 64}),
    ),
]


@pytest.mark.parametrize(("name", "config"), CASES)
def test_fitted_is_what_peft_merges(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    made = trained(tmp_path, name, **config)
    sources, architecture = [made.model], ROWS[name].gguf
    if architecture is not None and name not in MULTIPLIED:
        sources.append(export_gguf(made.model, tmp_path / "model.gguf", architecture))
    with read_adapter(made.adapter) as stored:
        bases = [base_of(source) for source in sources]
        found = [merged(base, fit_adapter(stored, base)) for base in bases]
        before = parts(bases[0])
        expected = made.merged(tmp_path / "merged")
        assert changed(expected, before) == changed(found[0], before), "nothing more is changed, and nothing less"
        for each in found:
            assert furthest(each, expected) < 1e-6


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        TOKENS | {"target_modules": ["q_proj", "lm_head"]},
        pytest.param(TABLES, marks=pytest.mark.every_case),
        pytest.param(TOKENS, marks=pytest.mark.every_case),
        pytest.param(SAVED, marks=pytest.mark.every_case),
        pytest.param(
            TOKENS | {"trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [7]}}, marks=pytest.mark.every_case
        ),
    ],
)
def test_a_tied_head_is_its_own_place(config: dict[str, Any], tmp_path: Path) -> None:
    """Merging writes both into one table, so what PEFT computes without is compared."""
    made = trained(tmp_path, "Llama", {"tie_word_embeddings": True}, **config)
    base = base_of(made.model)
    with read_adapter(made.adapter) as stored:
        found = merged(base, fit_adapter(stored, base))
    model: Any = made.peft.get_base_model()
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        table = model.get_input_embeddings()(torch.arange(found["embed:weight"].shape[0])).numpy()
        logits = model.get_output_embeddings()(hidden).numpy()
    np.testing.assert_allclose(found["embed:weight"], table, rtol=0, atol=1e-6)
    head = found["head:weight"]
    assert np.linalg.norm(hidden.numpy() @ head.T - logits) < 1e-6 * np.linalg.norm(logits)


def test_a_bias_that_the_base_adds_outside_its_matrix_is_added_once(tmp_path: Path) -> None:
    made = trained(tmp_path, "Mamba", target_modules=["dt_proj"], bias="lora_only")
    base = base_of(made.model)
    with read_adapter(made.adapter) as stored:
        found = fit_adapter(stored, base).deltas["layers.0.attention.times"][""].bias
    expected, before = made.merged(tmp_path / "merged"), parts(base)
    bias = "layers.0.attention:bias"
    np.testing.assert_allclose(found, expected[bias] - before[bias], rtol=0, atol=1e-6)


def test_factors_of_a_gguf_file_are_not_known(tmp_path: Path) -> None:
    made = trained(tmp_path, "Falcon-H1", target_modules=["in_proj"])
    base = base_of(export_gguf(made.model, tmp_path / "model.gguf", "falcon-h1"))
    with read_adapter(made.adapter) as stored, pytest.raises(AdapterError, match="multipliers are part of"):
        fit_adapter(stored, base)


def test_keys_and_values_of_latent_attention_are_refused(tmp_path: Path) -> None:
    made: Trained = trained(tmp_path, "DeepSeek-V3", target_modules=["kv_b_proj"])
    with read_adapter(made.adapter) as stored, pytest.raises(AdapterError, match=r"kv_b_proj.*absorbed"):
        fit_adapter(stored, base_of(made.model))


def test_a_trained_adapter_says_what_it_was_taught(tmp_path: Path) -> None:
    """Its loss falls because of what it adds, so a base without it, or with a half of it, says something else."""
    made, taught = trained(tmp_path, "Llama", r=8, lora_alpha=32), b"adapters say what they were taught."
    tokens = torch.tensor([[256, *taught, 258]])
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW([each for each in made.peft.parameters() if each.requires_grad], lr=5e-3)
    loss = torch.tensor(9.0)
    for _ in range(150):
        loss = made.peft(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    made.peft.save_pretrained(str(made.adapter))
    assert loss.item() < 0.05

    request = LoRARequest("taught", 1, str(made.adapter))
    params = SamplingParams(temperature=0.0, max_tokens=len(taught))
    types: tuple[LoraDType, ...] = ("auto", "int8")
    for dtype in types:
        config = EngineConfig(model=str(made.model), enable_lora=True, max_model_len=64, lora_dtype=dtype)
        with InferenceEngine(config) as engine:
            prompt = {"prompt_token_ids": [256, *taught[:3]]}
            said = [
                bytes(min(token, 255) for token in output.outputs[0].token_ids)
                for chosen in (request, None, [(request, 0.5)])
                for output in engine.generate([prompt], params, lora_request=chosen)
            ]
        assert said[0].startswith(taught[3:])
        assert taught[3:] not in said[1:]


def test_whole_numbers_of_8_bits_are_near_what_peft_merges(tmp_path: Path) -> None:
    """What they add is within a hundredth of it, norms of DoRA included."""
    made = trained(tmp_path, "Llama", use_dora=True, r=16)
    base = base_of(made.model)
    before = parts(base)
    with read_adapter(made.adapter) as stored:
        fit = fit_adapter(stored, base)
        expected, coarse = made.merged(tmp_path / "merged"), dict[str, np.ndarray]()
        for path, deltas in fit.deltas.items():
            for prefix, delta in deltas.items():
                assert delta.a is not None
                assert delta.b is not None
                assert delta.column_scale is not None
                a = decoded(*quantised(delta.a.load("F32"), 4))
                b = decoded(*quantised(delta.b.load("F32") * delta.column_scale[:, None], 1))
                own = before[f"{path}:{prefix}weight"] * delta.column_scale[:, None]
                coarse[f"{path}:{prefix}weight"] = own + np.float32(delta.scale) * (b @ a)
    for target, found in coarse.items():
        change = np.linalg.norm(expected[target] - before[target])
        assert 1e-4 * change < np.linalg.norm(found - expected[target]) < 1e-2 * change


@pytest.mark.parametrize("config", [EXPERTS, {}], ids=["experts", "linear"])
def test_names_with_the_adapters_own_name_are_known(config: dict[str, Any], tmp_path: Path) -> None:
    """Some tools save `lora_A.default.weight`, as PEFT names it in memory."""
    made = trained(tmp_path, "Mixtral", **config)
    base, file, found = base_of(made.model), made.adapter / "adapter_model.safetensors", []
    for end in (".weight", ".default.weight"):
        save_file({name.replace(".weight", end): each for name, each in load_file(file).items()}, file)
        with read_adapter(made.adapter) as stored:
            found.append(merged(base, fit_adapter(stored, base)))
    assert furthest(*found) == 0


def test_norms_of_what_cancels_out_are_exact() -> None:
    """DoRA's, of W + s B A: two rows are nearly gone, and one is."""
    random = np.random.default_rng(0)
    w, a, b = (random.standard_normal(shape, np.float32) for shape in ((9, 640), (8, 640), (9, 8)))
    w[2:4] = -(b[2:4] @ a) * np.array([[1.0001], [0.99999]], np.float32)
    w[5], b[5] = 0, 0
    found = norms_with(w, a, b, np.ascontiguousarray(a.T), a.astype(np.float64) @ a.T)
    exact = np.linalg.norm(w.astype(np.float64) + b.astype(np.float64) @ a, axis=1)
    assert found[5] == 0
    assert np.abs(found - exact).max() < 1e-5 * np.linalg.norm(w, axis=1).max()
    assert exact[2] < 2e-3 * np.linalg.norm(w[2])
    assert found == pytest.approx(exact, rel=2e-2, abs=1e-12)
