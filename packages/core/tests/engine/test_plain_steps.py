# SPDX-License-Identifier: MIT
"""Recorded steps over plain matrices, alone and beside quantised ones, against the same weights computed by torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from candle_vllm.core import EngineConfig, InferenceEngine, SamplingParams, UnsupportedModelError
from candle_vllm.core.assembly.model import load_model
from candle_vllm.core.engine.outputs import GenerationOutput
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.toy_gguf import write_toy_gguf

pytest.importorskip("numba")

# Heads of 32, which attention has; hidden and feed-forward sizes that are no multiple of anything.
SIZES: dict[str, Any] = {"head_dim": 32, "hidden_size": 101, "intermediate_size": 77}
WHOLE: dict[str, Any] = {"head_dim": 32, "hidden_size": 128, "intermediate_size": 160}
PROMPTS = [[(7 * i) % 256 for i in range(3 + 11 * n)] for n in range(9)]
# Every product of q, k and v, and of gate and up, mixes kinds.
MIXED = {"attn_v": "F16", "attn_k": "BF16", "ffn_up": "F32", "ffn_down": "BF16", "token_embd": "F16", "output": "BF16"}


def bf16(folder: Path) -> Path:
    return write_toy_model(folder, toy_config(**SIZES, torch_dtype="bfloat16", tie_word_embeddings=True))


def f16(folder: Path) -> Path:
    return write_toy_model(folder, toy_config("qwen2", **SIZES, torch_dtype="float16"))


def f32(folder: Path) -> Path:
    return write_toy_model(folder, toy_config("qwen3", **SIZES))


def f64(folder: Path) -> Path:
    return write_toy_model(folder, toy_config(**SIZES, torch_dtype="float64"))


def mixed(folder: Path) -> Path:
    return write_toy_gguf(folder / "toy.gguf", toy_config(**WHOLE), quantization="Q5_1", others=MIXED)


def halves(folder: Path) -> Path:
    return write_toy_gguf(folder / "toy.gguf", toy_config("qwen2", **SIZES), quantization="F16")


def make(path: Path, **settings: Any) -> InferenceEngine:
    return InferenceEngine(str(path), **({"threads": 2, "block_size": 16} | settings))


def run(engine: InferenceEngine) -> list[GenerationOutput]:
    params = [
        SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=16, ignore_eos=True, logprobs=2)
        for i in range(len(PROMPTS))
    ]
    return engine.generate(PROMPTS, params, use_tqdm=False)


def numbers(outputs: list[GenerationOutput]) -> list[Any]:
    """Tokens and the exact log-probabilities behind them."""
    return [[(e.chosen.token_id, e.chosen.logprob) for e in output.outputs[0].logprobs or ()] for output in outputs]


def scores(engine: InferenceEngine) -> list[dict[int, float]]:
    """The 20 likeliest tokens at every position of a prompt."""
    asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=20)
    output = engine.generate([PROMPTS[-1]], asked, use_tqdm=False)[0]
    assert output.prompt_logprobs is not None
    return [{t.token_id: t.logprob for t in (e.chosen, *e.top)} for e in output.prompt_logprobs[1:] if e]


def greedy(engine: InferenceEngine) -> list[GenerationOutput]:
    asked = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2)
    return engine.generate(PROMPTS, asked, use_tqdm=False)


def check_greedy(ours: GenerationOutput, theirs: GenerationOutput) -> bool:
    """Whether the tokens are equal; else they part where torch's two likeliest tokens are as good as equal."""
    for token, entry in zip(ours.token_ids, theirs.outputs[0].logprobs or ()):
        if token != entry.chosen.token_id:
            best, second = sorted((candidate.logprob for candidate in entry.top), reverse=True)[:2]
            assert best - second < 0.05
            return False
    return True


@pytest.mark.parametrize(
    ("write", "dtype", "tolerance"),
    [
        (bf16, "bf16", 0.01),
        (f16, "f16", 0.005),
        (f32, "f32", 0.005),
        (f64, "f32", 0.005),
        (halves, "f16", 0.005),
        (mixed, "bf16, int8, f16, f32", 0.02),
    ],
)
def test_logits_are_those_of_torch(
    write: Callable[[Path], Path], dtype: str, tolerance: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What remains is the 16-bit cache, and what the types round: bfloat16 and 8-bit activations."""
    path = write(tmp_path)
    with make(path) as engine:
        assert engine.model_info.dtype == dtype
        fast, outputs = scores(engine), greedy(engine)
    assert "torch" not in caplog.text
    with make(path, op_by_op=True) as engine:
        assert engine.model_info.dtype == "f32"
        exact, wanted = scores(engine), greedy(engine)
    gaps = [abs(fast[i][t] - exact[i][t]) for i in range(len(exact)) for t in exact[i].keys() & fast[i].keys()]
    sizes = [abs(value) for row in exact for value in row.values()]
    assert np.sqrt(np.mean(np.square(gaps))) < tolerance * np.sqrt(np.mean(np.square(sizes)))
    if dtype == "f32":
        assert sum(check_greedy(ours, theirs) for ours, theirs in zip(outputs, wanted)) > len(PROMPTS) // 2


@pytest.mark.parametrize("write", [bf16, f32, mixed])
def test_nothing_around_a_request_changes_a_bit_of_it(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path)
    with make(path, enable_prefix_caching=False, max_num_seqs=1) as engine:
        alone = numbers(run(engine))
    for settings in ({"threads": 1}, {"threads": 3, "max_num_batched_tokens": 37, "max_num_seqs": 5, "block_size": 32}):
        with make(path, **settings) as engine:
            assert numbers(run(engine)) == alone, settings
            assert numbers(run(engine)) == alone, (settings, "with a warm cache")


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_plain_matrices_are_converted_on_request(dtype: str, tmp_path: Path) -> None:
    """A converted checkpoint gives the bits of one that was stored so; quantised matrices stay."""
    names = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
    folder = write_toy_model(tmp_path / "a", toy_config(**SIZES))
    weights = load_file(folder / "model.safetensors")
    stored = write_toy_model(tmp_path / "b", toy_config(**SIZES))
    matrices = {name: weight.to(getattr(torch, names[dtype])) for name, weight in weights.items() if weight.ndim == 2}
    save_file(weights | matrices, stored / "model.safetensors")
    found = []
    for path, settings in ((folder, {"dtype": dtype}), (stored, {})):
        with make(path, **settings) as engine:
            assert engine.model_info.dtype == dtype
            found.append(scores(engine))
    assert found[0] == found[1]
    with make(mixed(tmp_path), dtype=dtype) as engine:
        assert engine.model_info.dtype == f"{dtype}, int8"


def test_a_weight_beyond_f16_names_its_tensor(tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path, toy_config(**SIZES, torch_dtype="bfloat16"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e5
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight: .*range of F16"):
        make(folder, dtype="f16")


def test_plain_weights_take_the_memory_of_the_file(tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path, toy_config(**WHOLE, torch_dtype="bfloat16"))
    loaded = load_model(EngineConfig(model=str(folder), block_size=16), torch.device("cpu"), lambda *_: None)
    layer = loaded.decoder.layers[0]  # type: ignore[attr-defined]
    assert sum(matrix.nbytes for matrix in layer.attention.qkv.pieces.values()) == 128 * (4 + 2 + 2) * 32 * 2


def test_a_head_size_without_a_kernel_runs_in_torch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with make(write_toy_model(tmp_path, toy_config(hidden_size=128, head_dim=8))) as engine:
        assert engine.model_info.dtype == "f32"
        assert engine.generate([[1]], SamplingParams(max_tokens=1), use_tqdm=False)
    assert "op by op in torch, which is slow: head size 8" in caplog.text
