# SPDX-License-Identifier: MIT
"""Recorded steps on the CPU: the model's own numbers, and the same bits however a request is batched, cached or cut."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from candle_vllm.core import EngineConfig, FinishReason, InferenceEngine, SamplingParams
from candle_vllm.core.assembly.model import load_model
from candle_vllm.core.engine.outputs import GenerationOutput
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.testing.toy_model import toy_config
from packages.core.tests.toy_gguf import write_toy_gguf

# Every row a whole number of groups.
CONFIG = toy_config(hidden_size=128, head_dim=32, intermediate_size=160)
QWEN = toy_config("qwen2", hidden_size=128, head_dim=32, intermediate_size=160, tie_word_embeddings=True)
BLOCK_BYTES = 2 * CONFIG["num_hidden_layers"] * CONFIG["num_key_value_heads"] * CONFIG["head_dim"] * 2 * 16
PROMPTS = [[(7 * i) % 256 for i in range(3 + 11 * n)] for n in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_gguf(tmp_path_factory.mktemp("gguf") / "toy.gguf", CONFIG)


def make(path: Path, **settings: Any) -> InferenceEngine:
    return InferenceEngine(str(path), **({"threads": 2, "block_size": 16} | settings))


def asked(index: int) -> SamplingParams:
    if index % 2:
        return SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=2)
    return SamplingParams(temperature=0.9, seed=index, top_p=0.95, max_tokens=18, ignore_eos=True, logprobs=2)


def run(engine: InferenceEngine) -> list[GenerationOutput]:
    return engine.generate(PROMPTS, [asked(i) for i in range(len(PROMPTS))], use_tqdm=False)


def numbers(outputs: list[GenerationOutput]) -> list[Any]:
    """Tokens and the exact log-probabilities behind them."""
    return [[(e.chosen.token_id, e.chosen.logprob) for e in output.outputs[0].logprobs or ()] for output in outputs]


@pytest.mark.one_of_each
@pytest.mark.parametrize("config", [CONFIG, QWEN], ids=["llama", "qwen2"])
@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_logits_are_those_of_the_decoded_weights(config: dict[str, Any], quantization: str, tmp_path: Path) -> None:
    """Against the same file in fp32; what remains is the 8-bit rounding of activations and the 16-bit cache."""
    path = write_toy_gguf(tmp_path / "toy.gguf", config, quantization=quantization)
    scored = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=20)
    rows = []
    for settings, dtype in (({}, "int8"), ({"op_by_op": True}, "f32")):
        with make(path, **settings) as engine:
            assert engine.model_info.dtype == dtype
            output = engine.generate([PROMPTS[-1]], scored, use_tqdm=False)[0]
            assert output.prompt_logprobs is not None
            rows.append([{t.token_id: t.logprob for t in (e.chosen, *e.top)} for e in output.prompt_logprobs[1:] if e])
    fast, exact = rows
    gaps = [abs(fast[i][t] - exact[i][t]) for i in range(len(exact)) for t in exact[i].keys() & fast[i].keys()]
    sizes = [abs(value) for row in exact for value in row.values()]
    assert np.sqrt(np.mean(np.square(gaps))) < 0.03 * np.sqrt(np.mean(np.square(sizes)))


def test_nothing_around_a_request_changes_a_bit_of_it(model: Path) -> None:
    with make(model, enable_prefix_caching=False, max_num_seqs=1) as engine:
        alone = numbers(run(engine))
    for settings in (
        {"threads": 1},
        {"threads": 3, "enable_prefix_caching": False},
        {"max_num_batched_tokens": 12, "max_num_seqs": 12},
        {"max_num_batched_tokens": 37, "block_size": 32, "max_num_seqs": 5},
    ):
        with make(model, **settings) as engine:
            assert numbers(run(engine)) == alone, settings
            assert numbers(run(engine)) == alone, (settings, "with a warm cache")


def test_preemption_changes_no_bit(model: Path) -> None:
    with make(model, enable_prefix_caching=False, max_num_seqs=1) as engine:
        alone = numbers(run(engine))
    with make(model, kv_cache_memory=BLOCK_BYTES * 12, max_model_len=160) as engine:
        assert numbers(run(engine)) == alone
        assert engine.stats().preemptions > 0


def test_prompt_scores_do_not_depend_on_chunks(model: Path) -> None:
    scored = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=1)
    found = []
    for chunk in (64, 128, 512):
        with make(model, max_num_batched_tokens=chunk) as engine:
            output = engine.generate([PROMPTS[-1]], scored, use_tqdm=False)[0]
            found.append([entry.chosen.logprob for entry in (output.prompt_logprobs or ())[1:] if entry])
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == len(PROMPTS[-1]) - 1


def test_a_model_without_a_kernel_runs_eagerly_and_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_toy_gguf(tmp_path / "toy.gguf", toy_config(hidden_size=128, head_dim=8))
    with make(path) as engine:
        assert engine.model_info.dtype == "f32"
        assert len(run(engine)) == len(PROMPTS)
    assert "head size 8" in caplog.text


def test_packed_weights_take_the_memory_of_the_file(model: Path) -> None:
    loaded = load_model(EngineConfig(model=str(model), block_size=16), torch.device("cpu"), lambda *_: None)
    layer = loaded.decoder.layers[0]  # type: ignore[attr-defined]
    packed = sum(matrix.data.nbytes for matrix in layer.attention.qkv.pieces.values())
    assert packed == 128 * (4 + 2 + 2) * 32 // 32 * 34


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0, "ignore_eos": True},
    {"temperature": 0.0},
    {"temperature": 1.5, "ignore_eos": True},
    {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "min_p": 0.001, "n": 2},
    {"temperature": 1.5, "stop": ["e", "qu", "  "], "min_tokens": 3},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 1.5, "stop_token_ids": [*range(40)]},
    {"temperature": 1.5, "xtc_probability": 0.5, "dry_multiplier": 1.0},
    {"temperature": 1.5, "mirostat": 2, "typical_p": 0.8},
    {"temperature": 1.5, "ignore_eos": True, "logprobs": 1},
    {"temperature": 2.0, "ignore_eos": True, "skip_special_tokens": False, "logit_bias": {257: 5.0}},
]


def any_requests(rng: random.Random) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=str(index),
            prompt_token_ids=[rng.randrange(256) for _ in range(rng.randrange(1, 50))],
            params=SamplingParams(seed=index, max_tokens=rng.randrange(3, 90), **rng.choice(KINDS)),
        )
        for index in range(14)
    ]


def drive(engine: Engine, requests: list[GenerationRequest], rng: random.Random, plain: float) -> dict[Any, Any]:
    """What every sequence has said when it ends; requests come, and some are aborted, at any step.

    Of the requests that ask for no log-probabilities, a share of 1 - `plain` is made to.
    """
    said: dict[Any, Any] = defaultdict(lambda: ["", [], [], None])
    requests = [
        request
        if request.params.logprobs is not None or rng.random() < plain
        else replace(request, params=replace(request.params, logprobs=0))
        for request in requests
    ]
    while requests or engine.has_work:
        while requests and rng.random() < 0.2:
            engine.add(engine.prepare(requests.pop()))
        pieces = engine.step()
        going = [key for key, entry in said.items() if entry[3] is None]
        if going and rng.random() < 0.02:
            pieces += engine.abort(rng.choice(going)[0])
        for piece in pieces:
            entry = said[piece.request_id, piece.index]
            entry[0] += piece.text
            entry[1] += piece.token_ids
            entry[2] += piece.special_tokens
            entry[3] = piece.finish_reason and (piece.finish_reason, piece.stop_reason, piece.error)
    return said


def test_no_answer_shows_how_a_step_was_run(model: Path) -> None:
    """Rows that are only drawn from beside rows of every other kind, and each alone where logits come to the sampler.

    So steps that draw by their plan, and those that go on from the step before, are met by steps that do neither.
    """
    rng, ended, specials = random.Random(1), Counter[str](), 0
    scarce: dict[str, Any] = {"kv_cache_memory": BLOCK_BYTES * 14, "max_model_len": 160, "max_num_seqs": 9}
    scarce["speculative_config"] = {"method": "none"}  # whose steps are others
    with make(model, max_num_seqs=1) as single, make(model, **scarce) as front:
        alone, together = single._engine, front._engine
        assert isinstance(alone, Engine)
        assert isinstance(together, Engine)
        for share in (1.0, 0.7, 1.0, 0.9):
            requests = any_requests(rng)
            wanted = drive(alone, requests, random.Random(0), 0.0)
            found = drive(together, requests, rng, share)
            assert found.keys() == wanted.keys()
            for key, said in found.items():
                _, tokens, special, end = said
                specials += len(special)
                assert said == wanted[key] or FinishReason.ABORT in (end[0], wanted[key][3][0])
                length = min(len(tokens), len(wanted[key][1]))
                assert tokens[:length] == wanted[key][1][:length]
                ended[end[0].value] += 1
            assert together.scheduler.blocks.num_free == together.scheduler.blocks.num_blocks
        assert together.scheduler.num_preemptions > 3
    assert specials > 5
    assert min(ended[reason] for reason in ("abort", "length", "stop")) > 3, ended


@pytest.mark.parametrize("others", [{}, {"logprobs": 0}])
def test_a_row_without_finite_logits_ends_alone(model: Path, others: dict[str, Any]) -> None:
    """Where the plan draws, and where logits come to the sampler; the other goes on as if it were not there."""
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=8, **others)
    with make(model) as front:
        engine = front._engine
        assert isinstance(engine, Engine)
        runner: Any = engine.runner
        alone = engine_run(engine, {"a": params})
        logits, run_plan, steps = runner._logits, runner.team.run, 0

        def spoilt(plan: Any, rows: int) -> None:
            nonlocal steps
            steps += plan is runner._plan.rows
            if plan is not runner._plan.rows or steps != 4:
                run_plan(plan, rows)
                return
            run_plan(plan, runner._plan.count)
            logits[1] = np.nan
            if rows > runner._plan.count:
                run_plan(runner._draw_rows.plan, 1)

        runner.team.run = spoilt
        found = engine_run(engine, {"a": params, "b": params})
    assert found["a"] == alone["a"]
    assert "NaN" in str(found["b"][-1])
    assert len(found["b"]) == 4


def engine_run(engine: Engine, params: dict[str, SamplingParams]) -> dict[str, list[Any]]:
    """Tokens of each request, and its error if there is one."""
    for name, asked_for in params.items():
        engine.add(engine.prepare(GenerationRequest(request_id=name, prompt_token_ids=[5, 6, 7], params=asked_for)))
    said: dict[str, list[Any]] = {name: [] for name in params}
    while engine.has_work:
        for piece in engine.step():
            said[piece.request_id] += [*piece.token_ids, *([piece.error] if piece.error else [])]
    return said
