# SPDX-License-Identifier: MIT
"""What tests of drafts share: a model of slots, times that hold nothing back, requests of many kinds, their answers."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core import InferenceEngine, SamplingParams, StructuredOutputsParams
from candle_vllm.core.engine.drafts.draft_model import OwnTimes
from candle_vllm.core.engine.drafts.drafting import StepTimes
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners.model_runner import StepwiseRunner
from candle_vllm.core.engine.step.batch import Batch, Ints
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.engine.step.scheduler import Scheduler


class SlotModel(StepwiseRunner):
    """Its cache is the token of each slot, and its logits follow from what its cache says of all tokens before.

    Every row has to find there what its sequence has; of a draft's rows, the guesses behind that.
    """

    def __init__(self, blocks: int, size: int, words: int, wrong: int = 0) -> None:
        super().__init__()
        self.slots, self.size, self.words, self.wrong = np.full(blocks * size, -1), size, words, wrong

    def run(self, batch: Batch) -> NDArray[np.float32]:
        self.slots[batch.slots] = batch.token_ids
        rows: list[NDArray[np.float32]] = []
        for number, run in enumerate(batch.runs):
            table = batch.block_tables[number]
            end = run.start + run.count
            assert run.count >= max(run.wanted, 1)
            there = [int(self.slots[table[place // self.size] * self.size + place % self.size]) for place in range(end)]
            known = run.sequence.tokens[:end]
            assert there[: len(known)] == known
            rows += [self.logits(there[: end - run.wanted + 1 + place]) for place in range(run.wanted)]
        return np.stack(rows) if rows else np.empty((0, self.words), np.float32)

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        mark = zlib.crc32(np.array(tokens[-3:]).tobytes())
        row = np.zeros(self.words, np.float32)
        if self.wrong and mark % self.wrong == 0:
            mark += 1
        row[97 + mark % 7] = 9
        row[97 + mark // 7 % 5] += 8
        return row

    def score(self, rows: Ints) -> None:
        raise NotImplementedError

    def hidden_sum(self, rows: Ints) -> NDArray[np.float64]:
        raise NotImplementedError


class SameTimes(StepTimes):
    """A step takes as long as any other, so that guesses are tried wherever there are any."""

    GAIN, LEAVING, UNPLAIN = 1.0, 0.0, 1 << 60

    def plain(self, lives: int) -> float:
        return 1.0

    def __call__(self, drafts: int) -> float:
        return 1.0


def same_times(lives: int) -> SameTimes:
    """Those of a step; what was seen of others is not known."""
    return SameTimes(lives, 72)


class FreeTimes(OwnTimes):
    """A step takes nothing, or more than it can be worth."""

    def __init__(self, moods: random.Random | None = None) -> None:
        super().__init__()
        self.moods = moods

    def __call__(self, rows: int) -> float:
        return 1e-30 if self.moods is None or self.moods.random() < 0.7 else 1e9


FORM = StructuredOutputsParams(json={"type": "object", "properties": {"a": {"enum": ["first", "second"]}},
                                     "required": ["a"], "additionalProperties": False})  # fmt: skip
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.9, "seed": 3, "n": 2, "top_p": 0.9},
    {"temperature": 0.9, "seed": 4, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
    {"temperature": 0.7, "seed": 5, "logit_bias": {97: 4.0}, "min_p": 0.02, "logprobs": 0},
    {"temperature": 0.8, "seed": 6, "structured_outputs": FORM, "logprobs": 1},
    {"temperature": 0.0, "stop": ["ab", "q"], "min_tokens": 5},
    {"temperature": 0.9, "seed": 8, "mirostat": 2, "mirostat_tau": 3.0, "cache_salt": "mine"},
]


def answers(engine: InferenceEngine, seed: int) -> list[Any]:
    rng = random.Random(seed)
    prompts = [[rng.choice(b"abc") for _ in range(rng.randrange(3, 120))] for _ in PARAMS]
    params = [SamplingParams(max_tokens=40, ignore_eos="stop" not in each, **each) for each in PARAMS]
    found = engine.generate(prompts, params, use_tqdm=False)
    return [
        (out.token_ids, out.text, repr(out.logprobs), out.finish_reason, out.stop_reason)
        for answer in found
        for out in answer.outputs
    ]


def requests(rng: random.Random, count: int) -> list[GenerationRequest]:
    beginning = [rng.randrange(97, 105) for _ in range(13)]
    found = []
    for number in range(count):
        prompt = beginning[: rng.choice((0, 8, 13))] + [rng.randrange(97, 105) for _ in range(rng.randrange(1, 22))]
        params: dict[str, Any] = {"temperature": 0.0, "max_tokens": rng.randrange(1, 44), "ignore_eos": True}
        if rng.random() < 0.5:
            params |= {"temperature": 1.0, "seed": number, "n": rng.choice((1, 2))}
        found.append(
            GenerationRequest(request_id=str(number), prompt_token_ids=prompt, params=SamplingParams(**params))
        )
    return found


def driven(engine: Engine, asked: Sequence[GenerationRequest], aborts: dict[int, str]) -> dict[tuple[str, int], Any]:
    """The tokens of all answers; after each step no block may be anybody's that no sequence holds."""
    assert isinstance(engine.scheduler, Scheduler)
    scheduler, blocks, steps = engine.scheduler, engine.scheduler.blocks, 0
    tokens: dict[tuple[str, int], Any] = {}
    left = list(asked)
    while left or engine.has_work:
        if left and steps % 3 == 0:
            engine.add(engine.prepare(left.pop(0)))
        pieces = engine.step()
        pieces += engine.abort(aborts[steps]) if steps in aborts else []
        for piece in pieces:
            assert piece.error is None
            tokens.setdefault((piece.request_id, piece.index), []).extend(piece.token_ids)
        held = {block for sequence in scheduler.running for block in sequence.block_table}
        assert blocks.num_free == blocks.num_blocks - len(held)
        for sequence in scheduler.running:
            assert len(sequence.block_table) <= blocks.blocks_for(len(sequence.tokens) + len(sequence.drafts))
        steps += 1
        assert steps < 2000
    assert blocks.num_free == blocks.num_blocks
    return tokens
