# SPDX-License-Identifier: MIT
"""Unlimited-OCR of random weights: its window over the answer, tiles, embeddings and logits against transformers."""

from __future__ import annotations

import itertools
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from candle_vllm.core import SamplingParams
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners.eager_runner import EagerRunner
from candle_vllm.core.engine.runners.model_runner import ModelRunner
from candle_vllm.core.engine.runners.recorded_runner import RecordedRunner
from candle_vllm.core.engine.step.batch import BatchBuilder
from candle_vllm.core.engine.step.sequence import Run, Sequence
from candle_vllm.core.kernels.cpu_runtime.recorder import StepLimits
from packages.core.tests.models.families import DEEPSEEK_OCR
from packages.core.tests.models.tiny import BLOCK, CPU, load, settled, some_tokens, spread, write_tiny

WINDOW, PROMPT, ANSWER = 20, 37, 70


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("text"), "unlimited_ocr_text", **DEEPSEEK_OCR, sliding_window=WINDOW)


def their_logits(folder: Path, tokens: list[int], prompt: int) -> torch.Tensor:
    """transformers' logits [T, V] of a prompt, and of an answer token by token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    cache, found, ends = DynamicCache(config=model.config), [], [prompt, *range(prompt + 1, len(tokens) + 1)]
    with torch.inference_mode():
        for first, last in itertools.pairwise([0, *ends]):
            found.append(model(torch.tensor([tokens[first:last]]), past_key_values=cache).logits[0])
    return torch.cat(found)


def our_logits(runner: ModelRunner, tokens: list[int], prompt: int, window: int, chunk: int) -> torch.Tensor:
    """The logits of the same tokens, the prompt in chunks; the blocks suffice for the prompt and the window alone."""
    request = GenerationRequest(request_id="r", prompt_token_ids=tokens[:prompt], params=SamplingParams())
    sequence, found = Sequence(request, 0, 0, answer_window=window), list[torch.Tensor]()
    sequence.tokens, sequence.num_uncomputed_tokens = list(tokens), len(tokens)
    sequence.block_table = array("i", reversed(range(-(-(prompt + window) // BLOCK))))
    builder = BatchBuilder(BLOCK, runner.step_memory)
    while sequence.num_uncomputed_tokens:
        run = Run.next(sequence, sequence.chunk(chunk))
        runner.forward(builder.build([run]), [])
        found.append(torch.as_tensor(runner.score(np.arange(run.count))).clone())
        sequence.num_uncomputed_tokens -= run.count
    return torch.cat(found)


def blocks_of(prompt: int, window: int) -> int:
    return -(-(prompt + window) // BLOCK)


@pytest.mark.parametrize("prompt", [PROMPT, 48, 1])
def test_an_answer_reads_its_prompt_and_its_last_tokens(text: Path, prompt: int) -> None:
    tokens = some_tokens(prompt + ANSWER)
    theirs = their_logits(text, tokens, prompt)
    loaded = load(text, op_by_op=True)
    assert loaded.config.answer_window == WINDOW
    for chunk in (64, 7, 1):
        runner = EagerRunner(
            loaded.decoder, blocks_of(prompt, WINDOW), BLOCK, CPU, torch.float32, None, None, loaded.turning(64)
        )
        assert spread(our_logits(runner, tokens, prompt, WINDOW, chunk), theirs) < 1e-5, chunk


@pytest.mark.parametrize("prompt", [PROMPT, 48])
def test_compiled_steps_read_the_same(text: Path, prompt: int) -> None:
    tokens, made = some_tokens(prompt + ANSWER), list[torch.Tensor]()
    theirs = their_logits(text, tokens, prompt)
    for chunk in (64, 7):
        loaded, blocks = load(text, block_size=BLOCK), blocks_of(prompt, WINDOW)
        limits = StepLimits(
            tokens=64, sequences=4, logit_rows=64, table_width=blocks, block_size=BLOCK, threads=2
        )
        runner = RecordedRunner(loaded.decoder, blocks, limits, turning=loaded.turning(64))
        try:
            made.append(our_logits(runner, tokens, prompt, WINDOW, chunk))
        finally:
            runner.close()
    assert spread(*settled(made[0], theirs, 0.1)) < 1e-2
    assert torch.equal(*made)
