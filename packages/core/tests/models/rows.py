# SPDX-License-Identifier: MIT
"""Tests that models of several families share: files of a row of `families`, logits by key, answers of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from candle_vllm.core import ConfigError, EngineStats, InferenceEngine, SamplingParams
from candle_vllm.core.assembly.stages import stage_of
from packages.core.tests.engine.drafted import same_times
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.tiny import eager_logits, load, spread, their_logits, write_tiny


def write_row(folder: Path, name: str, **keys: Any) -> Path:
    """Write the model of a row, with other values of some keys."""
    row = ROWS[name]
    return write_tiny(folder, row.model_type, **dict(row.config) | keys)


def require_other_logits(
    name: str, keys: dict[str, Any], least: float, folder: Path, tokens: list[int], cuts: list[int]
) -> None:
    """Require that `keys` change the logits of a row's model, by `least`, as they change transformers' logits."""
    usual, other = write_row(folder / "usual", name), write_row(folder / "other", name, **keys)
    ours = eager_logits(other, tokens, cuts)
    assert spread(ours, their_logits(other, tokens)) < 1e-5
    assert spread(ours, eager_logits(usual, tokens, [len(tokens)])) > least


def answers_twice(
    folder: Path, prompts: Sequence[list[int]], params: SamplingParams, **settings: Any
) -> tuple[list[Any], EngineStats]:
    """Tokens and log-probabilities of an engine's answers, and its statistics.

    Require that all answers to a prompt are the same, and the second time, with a warm cache, those of the first.
    """
    given: dict[str, Any] = {"threads": 2, "block_size": 16, "device": "cpu"} | settings
    with InferenceEngine(str(folder), **given) as engine:
        inner: Any = engine._engine
        if inner._drafter is not None:
            inner._drafter.times = same_times
        found = []
        for _ in range(2):
            for output in engine.generate(list(prompts), params, use_tqdm=False):
                answers = [
                    [(e.chosen.token_id, e.chosen.logprob) for e in answer.logprobs or ()] for answer in output.outputs
                ]
                assert all(answer == answers[0] for answer in answers)
                found.append(answers[0])
        assert found[: len(prompts)] == found[len(prompts) :]
        return found, engine.stats()


def require_no_stages(folder: Path, name: str, family: Any) -> None:
    """Require that the layers of a row's model cannot be divided into stages."""
    config = load(write_row(folder, name)).config
    line, checkpoint = mock.Mock(size=2, rank=0), mock.Mock(tensors={})
    with pytest.raises(ConfigError, match="several residual streams: leave pipeline_parallel_size out"):
        stage_of("Model", family, config, checkpoint, line)
