# SPDX-License-Identifier: MIT
"""Behind the last layer's keys and values a recorded step has the rows alone that are drawn from: the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.engine.runners.recorded_runner import RecordedRunner
from candle_vllm.core.testing.toy_model import toy_config
from packages.core.tests.toy_gguf import write_toy_gguf

pytest.importorskip("numba")

SIZES: dict[str, Any] = {"head_dim": 32, "hidden_size": 128, "intermediate_size": 160}
PROMPTS = [[(7 * i + n) % 256 for i in range(1 + 23 * n)] for n in range(6)]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = toy_config(request.param, **SIZES)
    return write_toy_gguf(tmp_path_factory.mktemp("gguf") / "toy.gguf", config, quantization="Q4_1")


def drawn(model: Path, *, prompt_logprobs: int | None = None, **settings: Any) -> tuple[list[Any], int]:
    """Tokens with exact log-probabilities, prompts beside what is written; and how many plans the runner has."""
    params = [
        SamplingParams(temperature=0.0, max_tokens=3 + n, ignore_eos=True, logprobs=3, prompt_logprobs=prompt_logprobs)
        for n in range(len(PROMPTS))
    ]
    with InferenceEngine(str(model), **({"threads": 2, "block_size": 16} | settings)) as engine:
        outputs = engine.generate(PROMPTS, params, use_tqdm=False)
        runner = engine._engine.runner  # type: ignore[union-attr]
        assert isinstance(runner, RecordedRunner)
        plans = len(runner._plans)
    found = [
        [[(each.token_id, each.logprob) for each in (e.chosen, *e.top)] for e in output.outputs[0].logprobs or ()]
        for output in outputs
    ]
    return found, plans


@pytest.mark.parametrize("tokens", [16, 64, 512])
def test_rows_that_nobody_draws_from_are_left_out(tokens: int, model: Path) -> None:
    settings = {"max_num_batched_tokens": tokens, "max_num_seqs": 16}
    found, plans = drawn(model, **settings)
    wanted, whole = drawn(model, prompt_logprobs=1, **settings)
    assert (plans, whole) == (2, 1)
    assert [len(each) for each in found] == [3 + n for n in range(len(PROMPTS))]
    assert found == wanted
