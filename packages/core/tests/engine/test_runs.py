# SPDX-License-Identifier: MIT
"""Steps that give a sequence several tokens: texts, ends and cache are those of the same tokens one at a time.

A scripted model's logits follow from the tokens before them alone. Drafts are its own next tokens, up to some place.
"""

from __future__ import annotations

import random
import zlib
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from candle_vllm.core import FinishReason, SamplingParams, StructuredOutputsParams
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.outputs import TokenOutput
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners.model_runner import StepwiseRunner
from candle_vllm.core.engine.step.batch import Batch, Ints
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.engine.step.preparation import DecoderPreparation
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.engine.step.sequence import Sequence, block_hashes
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from candle_vllm.core.text.tokenizer import Tokenizer

EOS, CONTEXT = 258, 300
LIKELY = [*b'ab{}"x: ', EOS, 200]  # 200 is half a character
JSON = {"type": "object", "properties": {"ab": {"type": "string", "maxLength": 3}}, "required": ["ab"]}
STOPS = ["ab", "x ", "a:", "b{", "{}", ":x", "}}"]
FORM, WORDS = StructuredOutputsParams(json=JSON), StructuredOutputsParams(regex="(ab|x){9}")
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 25},
    {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True, "logprobs": 2},
    {"temperature": 1.0, "seed": 3, "max_tokens": 30, "n": 2, "ignore_eos": True},
    {"temperature": 1.0, "seed": 4, "max_tokens": 40, "stop": STOPS, "min_tokens": 5},
    {"temperature": 0.9, "seed": 5, "max_tokens": 40, "stop": STOPS, "include_stop_str_in_output": True},
    {"temperature": 1.0, "seed": 6, "max_tokens": 40, "stop_token_ids": [120], "prompt_logprobs": 1},
    {"temperature": 1.0, "seed": 7, "max_tokens": 30, "repetition_penalty": 1.4, "presence_penalty": 1.0},
    {"temperature": 0.0, "max_tokens": 30, "frequency_penalty": 1.5, "ignore_eos": True},
    {"temperature": 1.0, "seed": 8, "max_tokens": 30, "bad_words": ["ab", "b{a"], "ignore_eos": True},
    {"temperature": 1.0, "seed": 9, "max_tokens": 40, "allowed_token_ids": [97, 98, EOS], "min_tokens": 9},
    {"temperature": 1.0, "seed": 10, "max_tokens": 50, "structured_outputs": FORM},
    {"temperature": 1.0, "seed": 12, "max_tokens": 30, "mirostat": 2, "mirostat_eta": 0.5, "ignore_eos": True},
    {"temperature": 1.0, "seed": 13, "max_tokens": 30, "dry_multiplier": 2.0, "dry_allowed_length": 1},
    {"temperature": 1.0, "seed": 14, "max_tokens": 30, "xtc_probability": 0.5, "xtc_threshold": 0.0},
    {"temperature": 1.0, "seed": 15, "max_tokens": 30, "repetition_penalty": 1.4, "repeat_last_n": 3},
    {
        "temperature": 1.0,
        "seed": 11,
        "max_tokens": 40,
        "structured_outputs": WORDS,
    },
]

Drafter = Callable[[Sequence], tuple[int, ...]]


class ScriptedModel(StepwiseRunner):
    """Logits that follow from the tokens before them; notes how many rows each step had."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.several = 0  # runs of more than one row that is drawn from

    def run(self, batch: Batch) -> torch.Tensor:
        rows = []
        for run in batch.drawing:
            self.several += run.wanted > 1
            rows += [self.logits([*run.sequence.tokens, *run.drafts[:place]]) for place in range(run.wanted)]
        assert len(rows) == len(batch.sampled_rows)
        for run, first in zip(batch.runs, batch.query_start.tolist(), strict=False):
            ids = [*run.sequence.tokens, *run.drafts][run.start : run.start + run.count]
            assert batch.token_ids[first : first + run.count].tolist() == ids
        return torch.stack(rows) if rows else torch.empty(0, self.vocab_size)

    def logits(self, tokens: list[int]) -> torch.Tensor:
        rng = np.random.default_rng(zlib.crc32(np.array(tokens).tobytes()))
        row = rng.normal(size=self.vocab_size).astype(np.float32)
        row[LIKELY] += 6
        row[EOS] -= 3
        return torch.from_numpy(row)

    def score(self, rows: Ints) -> torch.Tensor:
        return torch.zeros(len(rows), self.vocab_size)

    def hidden_sum(self, rows: Ints) -> np.ndarray:
        raise NotImplementedError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(write_toy_model(tmp_path_factory.mktemp("toy") / "toy", toy_config()))


def make(tokenizer: Tokenizer, blocks: int = 400, size: int = 4, budget: int = 64, drafts: int = 24) -> Engine:
    scheduler = Scheduler(BlockManager(blocks, size), 8, budget, draft_rows=drafts)
    preparation = DecoderPreparation(tokenizer, (EOS,), tokenizer.vocab_size, CONTEXT, seed=0)
    return Engine(ScriptedModel(tokenizer.vocab_size), scheduler, preparation)


def requests() -> list[GenerationRequest]:
    prompts = [[97, 98, 120, *range(number)] for number in range(len(PARAMS))]
    return [
        GenerationRequest(request_id=str(number), prompt_token_ids=prompt, params=SamplingParams(**params))
        for number, (prompt, params) in enumerate(zip(prompts, PARAMS))
    ]


Found = dict[tuple[str, int], list[TokenOutput]]


def drive(engine: Engine, drafter: Drafter | None = None, asked: list[GenerationRequest] | None = None) -> Found:
    """All pieces of all requests."""
    found: Found = defaultdict(list)
    for request in requests() if asked is None else asked:
        engine.add(engine.prepare(request))
    while engine.has_work:
        for sequence in engine.scheduler.running:
            sequence.drafts = drafter(sequence) if drafter else ()
        assert isinstance(engine.scheduler, Scheduler)
        engine.scheduler.has_drafts = drafter is not None
        for piece in engine.step():
            found[piece.request_id, piece.index].append(piece)
        held = sum(len(sequence.block_table) for sequence in engine.scheduler.running)
        assert engine.scheduler.blocks.num_free >= engine.scheduler.blocks.num_blocks - held
        for sequence in engine.scheduler.running:
            assert sequence.num_ahead == 0
            assert sequence.num_computed_tokens // engine.scheduler.blocks.block_size == sequence.num_full_blocks
    engine.close()
    return found


def summed(pieces: list[TokenOutput]) -> dict[str, Any]:
    last = pieces[-1]
    assert all(piece.finish_reason is None for piece in pieces[:-1])
    return {
        "text": "".join(piece.text for piece in pieces),
        "token_ids": [token for piece in pieces for token in piece.token_ids],
        "special_tokens": [entry for piece in pieces for entry in piece.special_tokens],
        "logprobs": [entry for piece in pieces for entry in piece.logprobs or ()],
        "prompt_logprobs": [piece.prompt_logprobs for piece in pieces if piece.prompt_logprobs is not None],
        "end": (last.finish_reason, last.stop_reason, last.error, last.num_prompt_tokens),
    }


def told(expected: Found, rng: random.Random, most: int) -> Drafter:
    """Drafts of a sequence's own next tokens, right up to some place."""
    answers = {key: [token for piece in pieces for token in piece.token_ids] for key, pieces in expected.items()}

    def drafter(sequence: Sequence) -> tuple[int, ...]:
        known = len(sequence.tokens) - sequence.num_prompt_tokens
        right = answers[sequence.request.request_id, sequence.index][known : known + rng.randrange(most + 1)]
        return (*right, *(rng.choice(LIKELY) for _ in range(rng.randrange(3))))

    return drafter


@pytest.fixture(scope="module")
def expected(tokenizer: Tokenizer) -> Found:
    return drive(make(tokenizer))


def test_the_script_has_every_end(expected: Found) -> None:
    assert {FinishReason.STOP, FinishReason.LENGTH} == {pieces[-1].finish_reason for pieces in expected.values()}
    reasons = {pieces[-1].stop_reason for pieces in expected.values()}
    assert {120, None} < reasons <= {120, None, *STOPS}, "a stop token, a stop string, and neither"
    assert min(len(pieces) for pieces in expected.values()) > 1


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    size=st.sampled_from([1, 4, 16]),
    drafts=st.sampled_from([1, 7, 40]),
    most=st.integers(1, 12),
    scarce=st.booleans(),
)
def test_drafts_change_no_answer(
    tokenizer: Tokenizer, expected: Found, seed: int, size: int, drafts: int, most: int, scarce: bool
) -> None:
    engine = make(tokenizer, (240 if scarce else 1600) // size, size, random.Random(seed).choice((8, 30, 100)), drafts)
    found = drive(engine, told(expected, random.Random(seed), most))
    assert {key: summed(pieces) for key, pieces in found.items()} == {
        key: summed(pieces) for key, pieces in expected.items()
    }
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    assert not +engine.scheduler._computing  # type: ignore[union-attr]


def long_requests() -> list[GenerationRequest]:
    """The same behind prompts that come in chunks, and of which some begin alike."""
    return [
        msgspec.structs.replace(one, prompt_token_ids=[*range(20 + 5 * (place % 3)), *one.prompt_token_ids])
        for place, one in enumerate(requests())
    ]


@pytest.fixture(scope="module")
def long_expected(tokenizer: Tokenizer) -> Found:
    return drive(make(tokenizer), asked=long_requests())


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**20), size=st.sampled_from([1, 4, 16]), budget=st.sampled_from([8, 20, 60]))
def test_cancelled_preempted_and_chunked_requests_with_drafts_free_every_block(
    tokenizer: Tokenizer, long_expected: Found, seed: int, size: int, budget: int
) -> None:
    """No block is lost, and none is kept whose tokens were not accepted; who is not cancelled gets the whole answer."""
    rng = random.Random(seed)
    engine = make(tokenizer, 112 // size, size, budget)
    blocks, drafter = engine.scheduler.blocks, told(long_expected, rng, 8)
    assert isinstance(engine.scheduler, Scheduler)
    asked, texts, cancelled = long_requests(), list[Sequence](), set[str]()
    found: Found = defaultdict(list)
    while asked or engine.has_work:
        if asked and rng.random() < 0.9:
            prepared = engine.prepare(asked.pop(rng.randrange(len(asked))))
            texts += [live.sequence for live in prepared]
            engine.add(prepared)
        if engine._requests and rng.random() < 0.08:
            cancelled.add(name := rng.choice(sorted(engine._requests)))
            engine.abort(name)
        for sequence in engine.scheduler.running:
            sequence.drafts = drafter(sequence)
        engine.scheduler.has_drafts = True
        for piece in engine.step():
            found[piece.request_id, piece.index].append(piece)
        accepted = {digest for text in texts for digest in block_hashes(text.tokens, size, None, [])}
        assert blocks._published.keys() <= accepted
        held = {block for sequence in engine.scheduler.running for block in sequence.block_table}
        assert blocks.num_free == blocks.num_blocks - len(held)
    assert blocks.num_free == blocks.num_blocks
    assert not +engine.scheduler._computing
    for key, pieces in found.items():
        if key[0] not in cancelled:
            assert summed(pieces) == summed(long_expected[key])
    engine.close()


def test_drafts_save_steps_and_leave_the_same_blocks_behind(tokenizer: Tokenizer, expected: Found) -> None:
    plain, drafted = make(tokenizer), make(tokenizer)
    drive(plain)
    drive(drafted, told(expected, random.Random(1), 8))
    assert drafted.stats().steps < plain.stats().steps / 2
    assert isinstance(drafted.runner, ScriptedModel)
    assert drafted.runner.several > 20
    counts = ("prompt_tokens", "cached_prompt_tokens", "generation_tokens", "finished", "num_free_blocks")
    assert [getattr(drafted.stats(), name) for name in counts] == [getattr(plain.stats(), name) for name in counts]
    assert drafted.scheduler.blocks._published.keys() == plain.scheduler.blocks._published.keys()


@pytest.mark.parametrize("accepted", range(1, 8))
@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_number_of_accepted_tokens_leaves_the_cache_of_as_many_steps(
    tokenizer: Tokenizer, accepted: int, size: int
) -> None:
    """Six drafts of which some are right, in a single step, against the same tokens one at a time."""
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    request = GenerationRequest(request_id="a", prompt_token_ids=[97, 98, 120, 97, 98], params=params)
    plain, drafted = make(tokenizer, size=size), make(tokenizer, size=size)
    for engine in (plain, drafted):
        engine.add(engine.prepare(request))
        engine.step()
    first, second = plain.scheduler.running[0], drafted.scheduler.running[0]
    pieces = [piece for _ in range(accepted) for piece in plain.step()]
    right = [token for piece in pieces for token in piece.token_ids]
    assert isinstance(drafted.scheduler, Scheduler)
    drafted.scheduler.has_drafts = True
    second.drafts = (*right[: accepted - 1], *[201] * (7 - accepted))
    (piece,) = drafted.step()
    assert piece.token_ids == tuple(right)
    assert piece.text == "".join(part.text for part in pieces)
    for _ in range(2 * size + 1):  # and on from there, without drafts
        for name in ("tokens", "num_computed_tokens", "num_full_blocks", "num_ahead"):
            assert getattr(second, name) == getattr(first, name), name
        assert len(second.block_table) == len(first.block_table)
        assert drafted.scheduler.blocks.num_free == plain.scheduler.blocks.num_free
        assert drafted.scheduler.blocks._published.keys() == plain.scheduler.blocks._published.keys()
        assert [p.token_ids for p in plain.step()] == [p.token_ids for p in drafted.step()]
    assert drafted.abort("a")
    assert drafted.scheduler.blocks.num_free == 400
    plain.close()
    drafted.close()


def test_drafts_give_way_to_length_budget_and_blocks(tokenizer: Tokenizer) -> None:
    """A step never has more rows than it may, no row is beyond a sequence's length, and nobody is preempted for one."""

    def begun(most: int, **limits: int) -> Engine:
        params = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True)
        engine = make(tokenizer, **limits)
        engine.add(engine.prepare(GenerationRequest(request_id="a", prompt_token_ids=[97] * 4, params=params)))
        engine.step()
        sequence = engine.scheduler.running[0]
        assert isinstance(sequence, Sequence)
        sequence.drafts = (1,) * 30
        assert isinstance(engine.scheduler, Scheduler)
        engine.scheduler.has_drafts = True
        return engine

    for most, limits, wanted in (
        (60, {"budget": 8}, 8),
        (60, {"drafts": 5}, 6),
        (60, {"drafts": 0}, 1),
        (12, {"budget": 64}, 11),
        (60, {"blocks": 4}, 8),
    ):
        engine = begun(most, **limits)
        (run,) = engine.scheduler.schedule()
        assert (run.start, run.count, run.wanted, run.drafts) == (4, wanted, wanted, (1,) * (wanted - 1)), limits
        engine.close()
