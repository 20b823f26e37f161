# SPDX-License-Identifier: MIT
"""Whole engines on a GPU: answers against the CPU's exact path, and what must not change them."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from candle_vllm.core import ConfigError, GenerationOutput, InferenceEngine, SamplingParams
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.toy_gguf import write_toy_gguf
from packages.core.tests.toy_sight import write_toy_sight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

PROMPTS = [[5 + i, *range(40, 42 + 9 * i)] for i in range(8)]
CONFIG = toy_config("qwen3", head_dim=64, hidden_size=256, intermediate_size=512)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("toy") / "toy", CONFIG)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = toy_config("llama", head_dim=64, hidden_size=256, intermediate_size=512)
    path = tmp_path_factory.mktemp("toy") / "toy.gguf"
    return write_toy_gguf(path, config, quantization="Q4_0", others={"attn_v": "Q8_0", "ffn_down": "F16"})


def make(path: Path, **settings: Any) -> InferenceEngine:
    usual: dict[str, Any] = {"device": "cuda", "kv_cache_memory": 64 << 20, "max_num_seqs": 8}
    return InferenceEngine(str(path), **(usual | {"max_num_batched_tokens": 128} | settings))


def run(engine: InferenceEngine, prompts: list[list[int]] = PROMPTS) -> list[GenerationOutput]:
    params = [
        SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=1)
        if index % 2
        else SamplingParams(temperature=0.9, seed=index, top_p=0.95, max_tokens=20, ignore_eos=True, logprobs=1)
        for index in range(len(prompts))
    ]
    return engine.generate(prompts, params, use_tqdm=False)


def numbers(outputs: list[GenerationOutput]) -> list[Any]:
    return [[(e.chosen.token_id, e.chosen.logprob) for e in output.outputs[0].logprobs or ()] for output in outputs]


def prompt_scores(engine: InferenceEngine) -> torch.Tensor:
    scored = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    (output,) = engine.generate([PROMPTS[-1]], scored, use_tqdm=False)
    return torch.tensor([e.chosen.logprob for e in output.prompt_logprobs or () if e], dtype=torch.float64)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"dtype": "f32"}, 1e-4),
        ({}, 0.03),
        ({"dtype": "f16"}, 0.01),
        ({"cuda_graphs": False}, 0.03),
        ({"op_by_op": True}, 0.03),
        ({"deterministic": True}, 0.03),
        ({"attention_backend": "torch"}, 0.03),
        ({"kv_cache_dtype": "fp8"}, 0.15),
        ({"kv_cache_dtype": "fp8_per_token_head"}, 0.15),
        ({"kv_cache_dtype": "int8_per_token_head"}, 0.05),
    ],
    ids=str,
)
def test_scores_are_those_of_the_cpu(model: Path, settings: dict[str, Any], tolerance: float) -> None:
    with make(model, device="cpu", op_by_op=True) as engine:
        wanted = prompt_scores(engine)
    with make(model, **settings) as engine:
        assert error(prompt_scores(engine), wanted) < tolerance
        assert all(len(output.outputs[0].token_ids) in (20, 24) for output in run(engine))


@pytest.mark.parametrize("deterministic", [False, True])
def test_scores_of_quantised_weights(gguf: Path, deterministic: bool) -> None:
    with make(gguf, device="cpu", op_by_op=True) as engine:
        wanted = prompt_scores(engine)
    with make(gguf, deterministic=deterministic) as engine:
        assert error(prompt_scores(engine), wanted) < 0.03


@pytest.mark.parametrize("name", ["torch_flash", "flash_attn"])
def test_other_attention(model: Path, name: str) -> None:
    try:
        engine = make(model, attention_backend=name)
    except ConfigError as refusal:
        pytest.skip(str(refusal))
    with engine, make(model) as usual:
        assert error(prompt_scores(engine), prompt_scores(usual)) < 0.02
        run(engine)


def test_captured_steps_give_the_bits_of_launched_ones(model: Path) -> None:
    with make(model) as captured, make(model, cuda_graphs=False) as launched:
        one = PROMPTS[3:4]
        assert numbers(run(captured, one)) == numbers(run(launched, one))


@pytest.mark.parametrize("quantised", [False, True])
def test_nothing_around_a_request_changes_a_bit_of_it(model: Path, gguf: Path, quantised: bool) -> None:
    path = gguf if quantised else model
    with make(path, deterministic=True, max_num_seqs=1, enable_prefix_caching=False) as engine:
        alone = numbers(run(engine))
    for settings in ({}, {"max_num_batched_tokens": 17}, {"max_num_seqs": 5, "cuda_graphs": False, "block_size": 32}):
        with make(path, deterministic=True, **settings) as engine:
            assert numbers(run(engine)) == alone, settings
            assert numbers(run(engine)) == alone, (settings, "with a warm cache")


def test_drafts_change_no_bit_of_reproducible_answers(model: Path, gguf: Path) -> None:
    for path in (model, gguf):
        with make(path, deterministic=True) as plain:
            expected = numbers(run(plain))
        with make(path, deterministic=True, speculative_config={"method": "suffix"}) as engine:
            assert numbers(run(engine)) == expected
            assert numbers(run(engine)) == expected, "past answers say what comes"
            assert engine.stats().accepted_draft_tokens > 0


def taken() -> int:
    """Bytes of tensors; a workspace of cuBLAS stays for each thread and stream."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def test_memory_is_planned_and_given_back(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = taken()
    with caplog.at_level(logging.INFO), make(model, kv_cache_memory=None, kv_fraction=0.01) as engine:
        run(engine)
        assert "MiB for steps" in caplog.text
    assert taken() - before < 8 << 20
    with pytest.raises(ConfigError, match=r"set kv_cache_memory=.* or less"):
        make(model, kv_cache_memory=1 << 49)


def test_streams_and_aborts(model: Path) -> None:
    with make(model) as engine:
        for index, prompt in enumerate(PROMPTS):
            engine.add_request(prompt, SamplingParams(max_tokens=50, ignore_eos=True), request_id=str(index))
        ended, step = {}, 0
        while engine.has_unfinished_requests:
            ended |= {piece.request_id: piece.finish_reason for piece in engine.step() if piece.finished}
            if step in (3, 5):
                engine.abort(str(step))
            step += 1
        assert engine.stats().num_free_blocks == engine.stats().num_blocks
        assert len(ended) == len(PROMPTS)


def test_pictures_are_those_of_the_cpu(tmp_path: Path) -> None:
    folder, random = write_toy_sight(tmp_path), np.random.default_rng(0)
    prompts = [
        {"prompt": "Look <image> now", "multi_modal_data": {"image": random.integers(0, 256, size, dtype=np.uint8)}}
        for size in ((40, 33, 3), (19, 70, 3))
    ]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, prompt_logprobs=0)
    found = []
    for device in ("cuda", "cpu"):
        with InferenceEngine(folder, device=device, dtype="f32", kv_cache_memory=64 << 20) as engine:
            outputs = engine.generate(prompts, params, use_tqdm=False)
            scores = [e.chosen.logprob for output in outputs for e in output.prompt_logprobs or () if e]
            found.append(torch.tensor(scores, dtype=torch.float64))
    assert error(*found) < 1e-2  # the CPU's cache is bfloat16
