# SPDX-License-Identifier: MIT
"""What tests of models that see share: a tower's answer, answers of an engine, and log-probabilities of a prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core import GenerationOutput, InferenceEngine, SamplingParams
from candle_vllm.core.engine.images import TowerRunner
from candle_vllm.core.remote import RemoteEngine


def finished(runner: TowerRunner, tiles: NDArray[np.uint8]) -> tuple[NDArray[np.float32], int]:
    """What a tower gives, and in how many pieces before that."""
    encoding, pieces = runner.embeddings(tiles), 0
    while True:
        try:
            next(encoding)
            pieces += 1
        except StopIteration as done:
            return done.value, pieces


def answers(engine: InferenceEngine | RemoteEngine, prompts: list[Any], **params: Any) -> list[tuple[int, ...]]:
    asked = SamplingParams(**{"max_tokens": 8, "temperature": 0, "ignore_eos": True} | params)
    return [tuple(each.outputs[0].token_ids) for each in engine.generate(prompts, asked, use_tqdm=False)]


def prompt_error(found: GenerationOutput, logits: torch.Tensor) -> float:
    """How far the log-probabilities of a prompt's tokens lie from those of other logits [T, V], at most."""
    assert found.prompt_logprobs is not None
    ours = [each.chosen.logprob for each in found.prompt_logprobs[1:] if each is not None]
    assert len(ours) == len(found.prompt_token_ids) - 1
    expected = logits.log_softmax(-1).numpy()
    wanted = [expected[place, token] for place, token in enumerate(found.prompt_token_ids[1:])]
    return float(np.abs(np.array(ours) - np.array(wanted)).max())
