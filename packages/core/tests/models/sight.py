# SPDX-License-Identifier: MIT
"""What tests of models that see share: a tower's answer, answers of an engine, and log-probabilities of a prompt."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
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


WITHOUT_TORCH = """
import json, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import numpy as np
from candle_vllm.core import InferenceEngine, SamplingParams

params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
for folder, text, pixels in json.load(sys.stdin):
    prompt = {"prompt": text, "multi_modal_data": {"image": [np.array(each, np.uint8) for each in pixels]}}
    with InferenceEngine(folder, device="cpu", threads=1) as engine:
        print(json.dumps(engine.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids))
"""


def answers_without_torch(prompts: list[tuple[Path, str, list[NDArray[np.uint8]]]]) -> list[tuple[int, ...]]:
    """Greedy answers of models in a process that cannot import torch; to a prompt with pictures each."""
    given = json.dumps([[str(folder), text, [each.tolist() for each in pixels]] for folder, text, pixels in prompts])
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], input=given, stdout=subprocess.PIPE, text=True, check=True
    )
    return [tuple(json.loads(line)) for line in run.stdout.splitlines()]
