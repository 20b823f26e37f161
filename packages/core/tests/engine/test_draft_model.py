# SPDX-License-Identifier: MIT
"""Drafts by a model: its cache is right whatever happens to sequences, and answers stay what they are."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from candle_vllm.core import (
    ConfigError,
    EngineConfig,
    InferenceEngine,
    ModelNotFoundError,
    SamplingParams,
)
from candle_vllm.core.assembly.draft import draft_config, vocabulary_difference
from candle_vllm.core.config import SpeculativeConfig, draft_settings
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.drafts.draft_model import DraftModel, OwnTimes, _best
from candle_vllm.core.engine.drafts.drafting import Drafter
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.engine.step.preparation import DecoderPreparation
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from candle_vllm.core.text.tokenizer import Tokenizer
from packages.core.tests.engine.drafted import FreeTimes, SlotModel, answers, driven, requests, same_times

EOS, CONTEXT = 258, 80


# ---- the model's cache -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("toy") / "toy", toy_config())


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    words = Tokenizer.from_folder(folder)
    words.cover(272)
    return words


def scripted(
    tokenizer: Tokenizer,
    blocks: int,
    size: int,
    budget: int,
    wrong: int,
    moods: random.Random | None,
    matches: int = 24,
) -> tuple[Engine, Drafter]:
    scheduler = Scheduler(BlockManager(blocks, size), 4, budget, draft_rows=8)
    words = tokenizer.vocab_size
    config = SpeculativeConfig(method="draft_model", model="draft", num_speculative_tokens=5, prompt_lookup_min=matches)
    model = DraftModel(SlotModel(blocks, size, words, wrong), config, scheduler, (words, words), CONTEXT, budget, 0.1)
    model.times = FreeTimes(moods)
    drafter = Drafter(config, 8, model)
    drafter.times = same_times  # type: ignore[method-assign]
    preparation = DecoderPreparation(tokenizer, (EOS,), words, CONTEXT, seed=0)
    return Engine(SlotModel(blocks, size, words), scheduler, preparation, drafter), drafter


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from((21, 30, 90)), st.sampled_from((4, 8)), st.sampled_from((0, 3, 20)))
def test_the_models_cache_is_right_and_every_block_is_given_back(
    tokenizer: Tokenizer, seed: int, blocks: int, size: int, wrong: int
) -> None:
    rng = random.Random(seed)
    budget = rng.choice((12, 16, 40))
    asked = requests(rng, rng.randrange(1, 8))
    aborts = {rng.randrange(60): str(rng.randrange(8)) for _ in range(rng.choice((0, 0, 3)))}
    engine, drafter = scripted(tokenizer, blocks, size, budget, wrong, rng, rng.choice((2, 24)))
    found = driven(engine, asked, aborts)
    assert drafter.model is not None
    assert not drafter.model._owns
    plain, _ = scripted(tokenizer, blocks, size, budget, 0, None)
    plain._drafter = None
    wanted = driven(plain, asked, {})
    assert set(found) <= set(wanted)
    for key, tokens in found.items():
        assert tokens == wanted[key][: len(tokens)]
        assert tokens == wanted[key] or key[0] in aborts.values()


def test_a_draft_model_is_not_quantised_with_its_target(tmp_path: Path) -> None:
    (matrix := tmp_path / "imatrix.gguf").touch()
    config = EngineConfig(model="x", isq="q4k", imatrix=matrix, speculative_config={"model": "draft"})
    found = draft_config(config)
    assert found is not None
    assert (found.model, found.isq, found.imatrix) == ("draft", None, None)


def test_preempted_sequences_and_shared_beginnings_are_guessed_for_as_others(tokenizer: Tokenizer) -> None:
    """A draft that is the target is never wrong, whatever became of the blocks meanwhile."""
    rng = random.Random(5)
    preempted = cached = 0
    for seed in range(4):
        rng.seed(seed)
        engine, drafter = scripted(tokenizer, 22, 4, 16, 0, None)
        asked = [
            GenerationRequest(
                request_id=str(number),
                prompt_token_ids=[97 + number % 2] * 9 + [98, 99, 97 + number],
                params=SamplingParams(temperature=0.0, max_tokens=rng.randrange(30, 50), ignore_eos=True),
            )
            for number in range(6)
        ]
        driven(engine, asked, {})
        assert drafter.stats()["draft_tokens"] == drafter.stats()["accepted_draft_tokens"] > 0
        preempted += engine.stats().preemptions
        cached += engine.stats().cached_prompt_tokens
    assert preempted > 0
    assert cached > 0


@pytest.mark.usefixtures("failing_guesses")
def test_a_step_of_the_model_that_fails_leaves_no_block_reserved_and_none_that_counts_as_read(
    tokenizer: Tokenizer,
) -> None:
    engine, drafter = scripted(tokenizer, 90, 4, 16, 0, None)
    assert drafter.model is not None
    run, calls = drafter.model._run, itertools.count()

    def failing(runs: Any, ready: Any) -> Any:
        if next(calls) % 5 == 0:
            raise ZeroDivisionError
        return run(runs, ready)

    drafter.model._run = failing  # type: ignore[method-assign]
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    asked = [
        GenerationRequest(request_id=str(number), prompt_token_ids=[*b"abcabcabca", 97 + number], params=params)
        for number in range(4)
    ]
    driven(engine, asked, {})
    assert set(engine.draft_failures) == {ZeroDivisionError}, "and no row was missing"
    assert drafter.stats()["draft_tokens"] == drafter.stats()["accepted_draft_tokens"] > 0


# ---- what pays -------------------------------------------------------------------------------------------------------


def test_as_many_guesses_are_planned_as_pay() -> None:
    assert _best(1.0, 0.9, [0.7] * 8, 1.0) == pytest.approx((0.9 + 0.81 + 0.729, 2.1, 0.339))
    assert _best(1.0, 0.5, [0.6] * 8, 1.0) == (0.0, 0.0, 0.0)
    assert _best(1.0, 0.9, [0.7] * 8, 1.2) == pytest.approx((0.9, 0.7, 0.06))  # time is dearer where guesses pay
    assert _best(0.5, 1.0, [0.1, 1.0, 0.1, 0.1, 0.1], 1.0) == pytest.approx((2.5, 1.4, 1.1))  # behind one dear row
    assert _best(1.0, 1.0, [], 1.0) == (0.0, 0.0, 0.0)


def test_times_of_the_model_are_those_that_were_seen_and_like_those_near() -> None:
    times = OwnTimes()
    assert times(1) == 0
    times.note(60, 0.0657)
    assert times(1) == pytest.approx(0.0067)
    times.note(1, 0.010)
    assert times(1) == pytest.approx(0.010)
    assert times(60) == pytest.approx(0.0657)
    for _ in range(60):
        times.note(1, 0.005)
    assert times(1) == pytest.approx(0.005, rel=0.05)
    times.note(1, 100.0)
    assert times(1) < 0.006


def test_a_model_that_costs_more_than_it_saves_is_not_asked(tokenizer: Tokenizer) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    for wrong, cost, least, most in ((0, 1e9, 0, 0), (1, 0.3, 3, 12)):  # dear; always wrong, which is soon known
        engine, drafter = scripted(tokenizer, 90, 8, 40, wrong, None)
        assert drafter.model is not None
        drafter.model.times, steps = OwnTimes(), list[int]()
        drafter.model.times.note = lambda rows, _, steps=steps: steps.append(rows)  # type: ignore[method-assign]
        drafter.model._cost = cost
        driven(engine, [GenerationRequest(request_id="0", prompt_token_ids=[97, 98, 99], params=params)], {})
        assert least <= len(steps) <= most


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "draft_model"}, "the method draft_model needs a model"),
        ({"model": ""}, "model must not be empty"),
        ({"model": 5}, "model must be a text, not 5"),
        ({"method": "ngram", "model": "m"}, "model is for the method draft_model or eagle3 or mtp, not for ngram"),
        ({"draft_p_min": 0.5}, "draft_p_min is for the method draft_model or eagle3 or mtp, not for suffix"),
        ({"model": "m", "draft_p_min": 1.5}, "draft_p_min must be at least 0 and at most 1, not 1.5"),
        ({"model": "m", "draft_min": 6, "num_speculative_tokens": 5}, "draft_min 6 is above num_speculative_tokens"),
        ({"model": "m", "num_speculative_tokens": 32}, "num_speculative_tokens must be between 1 and 31, not 32"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(model="m", speculative_config=given)
    assert said in str(caught.value)
    assert caught.value.setting == "speculative_config"


def test_a_model_is_asked_for_by_its_name_alone() -> None:
    found = draft_settings({"model": Path("small.gguf"), "num_speculative_tokens": 5})
    assert found == SpeculativeConfig(method="draft_model", model="small.gguf", num_speculative_tokens=5)


# ---- with models -----------------------------------------------------------------------------------------------------


def loaded(folder: Path, draft: Path | None = None, **given: Any) -> InferenceEngine:
    speculative = None if draft is None else {"model": str(draft), "num_speculative_tokens": 4}
    chosen: dict[str, Any] = {
        "threads": 1,
        "max_model_len": 256,
        "block_size": 16,
        "speculative_config": speculative,
    } | given
    engine = InferenceEngine(folder, **chosen)
    if draft is not None:
        assert engine._engine is not None
        drafter = engine._engine._drafter
        assert drafter is not None
        assert drafter.model is not None
        drafter.times = same_times  # type: ignore[method-assign]
        drafter.model.times = FreeTimes()
    return engine


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[InferenceEngine]:
    with loaded(folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model, with fewer rows and positions."""
    config = toy_config(num_hidden_layers=1, hidden_size=32, vocab_size=264, max_position_embeddings=60)
    return write_toy_model(tmp_path_factory.mktemp("draft") / "draft", config, seed=7)


def test_a_draft_that_is_the_model_is_always_right(folder: Path, plain: InferenceEngine) -> None:
    with loaded(folder, folder) as engine:
        asked_for: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.9, "seed": 3, "top_k": 40}]
        for params in asked_for:
            asked = SamplingParams(max_tokens=41, ignore_eos=True, **params)
            before = engine.stats()
            (answer,) = engine.generate([list(b"xyzzy")], asked, use_tqdm=False)
            after = engine.stats()
            (wanted,) = plain.generate([list(b"xyzzy")], asked, use_tqdm=False)
            assert answer.outputs[0].token_ids == wanted.outputs[0].token_ids
            tried = after.draft_tokens - before.draft_tokens
            assert tried == after.accepted_draft_tokens - before.accepted_draft_tokens
            assert after.steps - before.steps <= 11
        assert answers(engine, 1) == answers(plain, 1)
        assert engine.stats().num_free_blocks == engine.stats().num_blocks


@pytest.mark.parametrize("seed", range(2))
def test_another_model_changes_no_answer(folder: Path, stranger: Path, plain: InferenceEngine, seed: int) -> None:
    with loaded(folder, stranger) as engine:
        assert answers(engine, seed) == answers(plain, seed)
        assert engine.stats().draft_tokens > engine.stats().accepted_draft_tokens
        assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_layers_op_by_op_guess_as_well(folder: Path) -> None:
    with loaded(folder, folder, op_by_op=True) as engine:
        asked = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.0)
        engine.generate([list(b"xyzzy")], asked, use_tqdm=False)
        assert engine.stats().accepted_draft_tokens > 15


def test_the_cache_of_both_is_planned(folder: Path, plain: InferenceEngine, stranger: Path) -> None:
    with loaded(folder, folder) as engine:
        assert engine.model_info.kv_cache_bytes == 2 * plain.model_info.kv_cache_bytes
        assert engine.model_info.weight_bytes == 2 * plain.model_info.weight_bytes
    with loaded(folder, stranger, kv_cache_memory=1 << 20) as engine:
        assert (1 << 19) < engine.model_info.kv_cache_bytes <= 1 << 20


def test_other_words_and_missing_models_are_refused_by_name(folder: Path, stranger: Path, tmp_path: Path) -> None:
    words = (stranger / "tokenizer.json").read_text()
    other = write_toy_model(tmp_path / "other", toy_config())
    assert '"<|im_start|>"' in words
    (other / "tokenizer.json").write_text(words.replace("<|im_start|>", "<|turn|>"))
    with pytest.raises(ConfigError, match=r"other cannot draft for toy.*token 257 is '<\|im_start\|>' in one"):
        loaded(folder, other)
    with pytest.raises(ModelNotFoundError, match="speculative_config: draft model"):
        loaded(folder, tmp_path / "nothing.gguf")


def test_vocabularies_may_end_in_other_tokens(tokenizer: Tokenizer) -> None:
    class Words:
        def __init__(self, count: int) -> None:
            self.backend, self.count = self, count

        def get_vocab(self, with_added_tokens: bool) -> dict[str, int]:
            return {str(index): index for index in range(self.count)}

    few, more, many = (Words(count) for count in (1000, 1128, 1129))
    assert vocabulary_difference(few, more) is None  # type: ignore[arg-type]
    wrong = vocabulary_difference(many, few)  # type: ignore[arg-type]
    assert wrong == "129 tokens are in only one of them, of 1129 and 1000"
    assert vocabulary_difference(tokenizer, tokenizer) is None
