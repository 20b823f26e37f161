# SPDX-License-Identifier: MIT
"""bench: its arithmetic, and one run on a scripted engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from candle_vllm.core import EngineConfig
from candle_vllm.server.cli import main
from candle_vllm.server.commands import bench as module
from candle_vllm.server.commands.bench import _Times, figures, process_age, round_figure
from packages.core.tests.toy_encoder import write_toy_encoder
from packages.server.tests.server_fakes import PacedEngine


def test_figures() -> None:
    times = [
        _Times(first=1.0, last=3.0, tokens=11, first_tokens=1),
        _Times(first=2.0, last=4.0, tokens=11, first_tokens=1),
    ]
    assert figures(times, prompt_tokens=100) == {
        "prefill_tok_s": 100.0,
        "decode_tok_s": 5.0,
        "output_tok_s": 5.5,
        "ttft_s": 1.5,
    }


def test_rounding() -> None:
    assert (round_figure(1234.567), round_figure(0.00123456), round_figure(None)) == (1235.0, 0.001235, None)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_process_age() -> None:
    age = process_age()
    assert age is not None
    assert 0 < age < 3600


@pytest.fixture
def sizes() -> list[dict[str, object]]:
    """The engine's sizes that bench asked for."""
    return []


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path, sizes: list[dict[str, object]]) -> PacedEngine:
    engine = PacedEngine("abc", pause=0.001)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def load(_settings: object, **changes: object) -> PacedEngine:
        assert changes.pop("enable_prefix_caching") is False
        sizes.append(changes)
        return engine

    monkeypatch.setattr(module, "load_engine", load)
    return engine


LINE = ["bench", "--prompt-tokens", "32", "--output-tokens", "5", "--concurrency", "3", "--repeat", "2"]


def test_a_run_prints_one_json_object(engine: PacedEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LINE, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    for name in ("prefill_tok_s", "decode_tok_s", "output_tok_s", "ttft_s", "peak_rss_mb"):
        assert result[name] > 0
    assert (result["prompt_tokens"], result["output_tokens"], result["concurrency"], result["repeat"]) == (32, 5, 3, 2)
    assert {"load_s", "start_s", "versions", "device", "dtype", "model"} <= set(result)


def test_prompts_are_distinct_and_the_warm_up_is_not_counted(engine: PacedEngine) -> None:
    assert main([*LINE, "--json"]) == 0
    prompts = [tuple(request.prompt_token_ids) for request in engine.requests]
    assert [len(prompt) for prompt in prompts] == [8] + [32] * 9  # a probe, then 3 rounds of 3
    assert len(set(prompts)) == 10
    assert all(0 <= token < 260 and token != 257 for prompt in prompts for token in prompt)


def test_a_table_for_people(engine: PacedEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(LINE) == 0
    assert "decode_tok_s" in capsys.readouterr().out


def test_all_streams_run_at_once(engine: PacedEngine, sizes: list[dict[str, object]]) -> None:
    engine.num_blocks = 8000
    small = ["bench", "--prompt-tokens", "8", "--output-tokens", "2", "--repeat", "1"]
    assert main([*small, "--concurrency", "1500"]) == 0
    assert main([*small, "--concurrency", "2"]) == 0
    assert sizes == [
        {"max_num_seqs": 1500, "max_queued_requests": 1500},
        {"max_queued_requests": EngineConfig.max_queued_requests},
    ]


def test_streams_that_the_cache_cannot_hold_are_refused(
    engine: PacedEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.num_blocks = 8
    assert main(LINE) == 2
    assert "3 requests of 37 tokens need 9 KV blocks at once, and there are 8" in capsys.readouterr().err
    engine.num_blocks = 9
    assert main(LINE) == 0


def test_an_encoder_is_not_told_to_take_more_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(write_toy_encoder(tmp_path / "toy"))
    assert main(["bench", "--m", model, "--prompt-tokens", "4", "--output-tokens", "2"]) == 2
    assert "is an embedding model and generates no text" in capsys.readouterr().err


def test_a_shape_that_cannot_fit_is_refused(engine: PacedEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--prompt-tokens", "4K", "--output-tokens", "1"]) == 2
    assert "lower --prompt-tokens or --output-tokens" in capsys.readouterr().err
