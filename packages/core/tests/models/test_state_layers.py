# SPDX-License-Identifier: MIT
"""Layers that keep a state: whatever is found, cut, guessed or preempted, answers are those of a whole prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from candle_vllm.core import ConfigError, EngineConfig, InferenceEngine, SamplingParams
from candle_vllm.core.config import SpeculativeConfig
from candle_vllm.core.engine.build import preparation_for
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.cache.states import StatePool
from candle_vllm.core.engine.drafts.drafting import Drafter
from candle_vllm.core.engine.outputs import OutputCollector
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners.device_inputs import DeviceLimits
from candle_vllm.core.engine.runners.device_runner import DeviceRunner
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.engine.step.live import LiveSequence
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.errors import NoMemoryError
from candle_vllm.core.loading.cache_specs import StateRoom
from candle_vllm.core.models import registry
from candle_vllm.core.testing.toy_model import write_toy_model
from packages.core.tests.engine.drafted import FreeTimes, same_times
from packages.core.tests.exact_sums import exact_sums
from packages.core.tests.lazy_stream import LazyStream
from packages.core.tests.models import state_layers
from packages.core.tests.models.state_layers import CHANNELS, INPUTS, plain_logits, write_hybrid
from packages.core.tests.models.tiny import load, some_tokens
from tests.common_run import few

BLOCK, LONGEST = 16, 24


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"{registry.__package__}.hybrid", state_layers)
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, "hybrid"))


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hybrid(tmp_path_factory.mktemp("models") / "hybrid")


def settings_of(kind: str) -> dict[str, Any]:
    return {"eager": {"op_by_op": True, "dtype": "f32"}, "compiled": {}}[kind]


@pytest.fixture(params=["eager", "compiled"])
def how(request: pytest.FixtureRequest) -> dict[str, Any]:
    return settings_of(request.param)


def engine(source: Path, **settings: Any) -> InferenceEngine:
    made = InferenceEngine(EngineConfig(**{"model": str(source), "block_size": BLOCK, "max_num_seqs": 8} | settings))
    inner: Any = made._engine
    if inner._drafter is not None:
        inner._drafter.times = same_times  # drafts are tried, whatever they take on this machine
    return made


def ask(engine: InferenceEngine, prompts: list[list[int]], tokens: int = LONGEST, **params: Any) -> list[list[Any]]:
    """The tokens of each answer, of each prompt."""
    greedy = SamplingParams(**{"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True} | params)
    return [[tuple(each.token_ids) for each in found.outputs] for found in engine.generate(prompts, greedy)]


def alone(source: Path, prompts: list[list[int]], tokens: int = LONGEST, **settings: Any) -> list[list[Any]]:
    """What each prompt gives when nothing is found, cut or guessed."""
    with engine(source, enable_prefix_caching=False, speculative_config={"method": "none"}, **settings) as plain:
        return [ask(plain, [prompt], tokens)[0] for prompt in prompts]


_ALONE: dict[str, list[list[Any]]] = {}


def alone_once(source: Path, how: dict[str, Any], exact: bool = False) -> list[list[Any]]:
    """What `prompts` give alone, computed at the first call; with `exact`, under `exact_sums`."""
    key = repr((source, how, exact))
    if key not in _ALONE:
        _ALONE[key] = alone(source, prompts(), **how)
    return _ALONE[key]


def prompts() -> list[list[int]]:
    """Texts with beginnings in common, that end within blocks, with one, and a token behind it."""
    tokens = some_tokens(70)
    return [
        tokens,
        [*tokens[:40], 7, 8, 9],
        tokens[:64],
        tokens[:65],
        tokens[:3],
        [*tokens[:40], *[1, 2, 3] * 8],
        tokens,
    ]


def test_answers_are_those_of_the_definition(hybrid: Path, how: dict[str, Any]) -> None:
    tokens = some_tokens(37)
    expected = list(tokens)
    for _ in range(8):
        expected.append(int(plain_logits(hybrid, expected)[-1].argmax()))
    with engine(hybrid, **how) as whole:
        assert ask(whole, [tokens], 8) == [[tuple(expected[37:])]]


@pytest.mark.one_of_each(3)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"max_num_batched_tokens": 20},
        {"max_num_batched_tokens": 20, "max_num_seqs": 2},
        {"speculative_config": {"method": "suffix", "num_speculative_tokens": 5}},
        {"state_cache_gb": 0.0},
        {"state_cache_gb": 6e-5},
        {"enable_prefix_caching": False},
        {"block_size": 32},
    ],
    ids=["hits", "chunks", "few at a time", "guesses", "no checkpoints", "few checkpoints", "no hits", "large blocks"],
)
def test_no_answer_is_another(hybrid: Path, how: dict[str, Any], more: dict[str, Any]) -> None:
    given = prompts()
    expected = alone_once(hybrid, how)
    with engine(hybrid, **how, **more) as mixed:
        assert ask(mixed, given) == expected
        assert ask(mixed, given[::-1]) == expected[::-1]
        found = mixed.stats().cached_prompt_tokens
    assert bool(found) == (more.get("state_cache_gb") != 0 and more.get("enable_prefix_caching", True))


def test_ranks_of_the_cpu_change_no_answer(hybrid: Path) -> None:
    given = prompts()
    threads: dict[str, Any] = {"cpu_ranks": 2, "threads": 2}
    expected = alone(hybrid, given, **threads)
    with engine(hybrid, **threads) as mixed:
        assert ask(mixed, given) == expected
        assert ask(mixed, given) == expected
        assert mixed.stats().cached_prompt_tokens


def test_a_folder_keeps_pages_and_states_together(hybrid: Path, how: dict[str, Any], tmp_path: Path) -> None:
    given = prompts()
    expected = alone(hybrid, given, **how)
    for _ in range(2):
        with engine(hybrid, prompt_cache_path=tmp_path, **how) as kept:
            assert ask(kept, given) == expected
    with engine(hybrid, prompt_cache_path=tmp_path, **how) as kept:
        assert ask(kept, given[:1]) == expected[:1]
        counts = kept.stats()
    assert (counts.cached_prompt_tokens, counts.kept_blocks_read) == (64, 5), "four blocks and a checkpoint"
    assert not counts.kept_block_failures


@pytest.mark.parametrize("lost", ["states", "blocks"])
def test_one_without_the_other_is_not_found(hybrid: Path, how: dict[str, Any], tmp_path: Path, lost: str) -> None:
    tokens = some_tokens(70)
    with engine(hybrid, prompt_cache_path=tmp_path, **how) as kept:
        expected = ask(kept, [tokens])
    files = sorted((path.stat().st_size, path) for path in tmp_path.rglob("*") if path.is_file())
    sizes = sorted({size for size, _ in files})
    assert len(sizes) == 2, "blocks, and checkpoints"
    of_states = max(sizes, key=lambda size: -sum(found == size for found, _ in files))
    for size, path in files:
        if (size == of_states) == (lost == "states"):
            path.unlink()
    with engine(hybrid, prompt_cache_path=tmp_path, **how) as kept:
        assert ask(kept, [tokens]) == expected
        assert not kept.stats().cached_prompt_tokens


def test_sleep_forgets_states(hybrid: Path, how: dict[str, Any]) -> None:
    given = prompts()
    with engine(hybrid, **how) as sleeper:
        expected = ask(sleeper, given)
        assert sleeper.stats().checkpoints
        sleeper.sleep(level=1)
        sleeper.wake_up()
        assert not sleeper.stats().checkpoints
        assert ask(sleeper, given) == expected


def test_what_states_cannot_be_had_with_is_refused(hybrid: Path, how: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="have a recurrent state"):
        engine(hybrid, **how, speculative_config={"method": "draft_model", "model": str(hybrid)})
    with pytest.raises(NoMemoryError, match=r"max_num_seqs=\d"):
        engine(hybrid, kv_cache_memory=300_000, **how, max_num_seqs=64)


def test_sequences_of_one_request_part(hybrid: Path, how: dict[str, Any]) -> None:
    tokens = some_tokens(50)
    params = {"n": 3, "temperature": 1.0, "seed": 4}
    with engine(hybrid, **how) as shared, engine(hybrid, enable_prefix_caching=False, **how) as apart:
        assert ask(shared, [tokens], **params) == ask(apart, [tokens], **params)


def test_preemption_changes_no_answer(hybrid: Path, how: dict[str, Any]) -> None:
    given = prompts()
    expected = alone(hybrid, given, 50, **how)
    memory = 215_000 if how else 157_000  # of 14 blocks, which three texts need more than
    sizes = {"kv_cache_memory": memory, "max_num_seqs": 3, "state_cache_gb": 4e-5, "max_model_len": 128}
    with engine(hybrid, speculative_config={"method": "none"}, **sizes, **how) as small:
        assert ask(small, given, 50) == expected
        assert small.stats().preemptions


def test_a_conversation_goes_on(hybrid: Path, how: dict[str, Any]) -> None:
    with engine(hybrid, **how) as talk:
        first = [*(tokens := some_tokens(40)), *ask(talk, [tokens], 30)[0][0], 5, 6]
        before = talk.stats().cached_prompt_tokens
        answer = ask(talk, [first])
        assert talk.stats().cached_prompt_tokens - before == 64
    assert answer == alone(hybrid, [first], **how)


def on_device(
    source: Path, given: list[list[int]], *, graphs: bool = True, captured: int = 0, drafts: int = 0, blocks: int = 60
) -> tuple[list[list[Any]], Engine]:
    """The answers of a GPU's runner on a stream that is as late as one may be, a prompt more in every other step."""
    loaded, stream, kept = load(source, op_by_op=True, dtype="f32"), LazyStream(), 5 if drafts else 0
    limits = DeviceLimits(40, 4 + drafts, 8, BLOCK)
    how: dict[str, Any] = {"graphs": graphs, "captured_prompts": captured, "overlaps": not drafts}
    runner = DeviceRunner(loaded.decoder, limits, stream, torch.float32, finite_cache=True, **how)
    for work in runner.largest_steps():
        work()
    room = StateRoom(4, 6, kept)
    runner.allocate(blocks, room)
    pool = StatePool(room.running, room.checkpoints, BLOCK)
    scheduler = Scheduler(BlockManager(blocks, BLOCK), 4, 40, draft_rows=drafts, states=pool)
    drafter = Drafter(SpeculativeConfig(num_speculative_tokens=kept), drafts) if drafts else None
    if drafter is not None:
        drafter.times = same_times  # or nothing is drafted where steps with drafts are slow
    built = Engine(runner, scheduler, preparation_for(loaded, 128, seed=0), drafter)
    greedy = SamplingParams(temperature=0.0, max_tokens=LONGEST, ignore_eos=True)
    waiting = [
        GenerationRequest(request_id=str(number), prompt_token_ids=prompt, params=greedy)
        for number, prompt in enumerate(given)
    ]
    requests = {each.request_id: OutputCollector(each) for each in waiting}
    for step in range(2000):
        if waiting and step % 2:
            built.add(built.prepare(waiting.pop(0)))
        for piece in built.step():
            requests[piece.request_id].add(piece)
        if not waiting and not built.has_work:
            break
    found = [[tuple(each.token_ids) for each in request.result().outputs] for request in requests.values()]
    return found, built


DEVICE = [{}, {"graphs": False}, {"captured": 40}, {"drafts": 12}, {"drafts": 12, "captured": 40}, {"blocks": 14}]


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize(
    "more",
    few(DEVICE, *DEVICE[2:4], DEVICE[5]),
    ids=["graphs", "plain", "captured prompts", "guesses", "captured guesses", "preemption"],
)
def test_the_runner_of_a_gpu_gives_the_same(hybrid: Path, more: dict[str, Any]) -> None:
    given = [*prompts(), some_tokens(6)]  # the last one is as long as a row and its drafts
    with exact_sums():
        expected = alone_once(hybrid, settings_of("eager"), exact=True)
        expected = [*expected, *alone(hybrid, given[-1:], **settings_of("eager"))]
        found, built = on_device(hybrid, given, **more)
    assert found == expected
    counts = built.stats()
    assert counts.cached_prompt_tokens
    assert bool(counts.accepted_draft_tokens) == bool(more.get("drafts"))
    assert bool(counts.preemptions) == ("blocks" in more)


def test_a_dense_model_drafts_beside_states(hybrid: Path, tmp_path: Path) -> None:
    given = [*prompts(), some_tokens(4)]  # the last one is as long as a row and its drafts
    expected = alone(hybrid, given)
    drafts = {"method": "draft_model", "model": str(write_toy_model(tmp_path)), "num_speculative_tokens": 3}
    with engine(hybrid, speculative_config=drafts) as mixed:
        inner: Any = mixed._engine
        inner._drafter.times, inner._drafter.model.times = same_times, FreeTimes()
        for _ in range(2):
            assert ask(mixed, given) == expected
        counts = mixed.stats()
    assert counts.draft_tokens
    assert counts.cached_prompt_tokens


def guess(answers: dict[tuple[int, ...], list[Any]], lives: Sequence[LiveSequence]) -> bool:
    """Drafts of which the first 0 to 5 are right, by where the sequence stands."""
    for live in lives:
        sequence, most = live.sequence, len(live.sequence.tokens)
        done = most - sequence.num_prompt_tokens
        answer = answers[tuple(sequence.tokens[: sequence.num_prompt_tokens])][sequence.index]
        right = list(answer[done : done + most % 6])
        sequence.drafts = tuple([*right, *[1] * 5][: min(5, len(answer) - done - 1)])
    return True


FEATURES = ("hits", "chunks", "guesses", "preemption", "several answers", "a folder", "ranks")


@pytest.mark.one_of_each
@pytest.mark.parametrize("second", FEATURES)
@pytest.mark.parametrize("first", FEATURES)
def test_every_pair(hybrid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, second: str) -> None:
    """On the compiled runner answers are equal to those of whole prompts, one at a time.

    Two of the prompts begin alike and run in one step, two are equal, and one is as long as the guesses of a step and a
    token, one as blocks and a token.
    """
    both = {first, second}
    given, settings = [*prompts(), some_tokens(6)], dict[str, Any]()
    params: dict[str, Any] = {"n": 2, "temperature": 0.8, "seed": 3} if "several answers" in both else {}
    ranks: dict[str, Any] = {"cpu_ranks": 2, "threads": 2} if "ranks" in both else {}
    guesses = {"method": "suffix", "num_speculative_tokens": 5} if "guesses" in both else {"method": "none"}
    with engine(hybrid, enable_prefix_caching=False, speculative_config={"method": "none"}, **ranks) as plain:
        expected = [ask(plain, [prompt], 40, **params)[0] for prompt in given]
    answers = {tuple(prompt): found for prompt, found in zip(given, expected)}
    monkeypatch.setattr(Drafter, "propose", lambda _, lives: guess(answers, lives))
    if "chunks" in both:
        settings["max_num_batched_tokens"] = 20
    if "preemption" in both:  # there is room for three states, three checkpoints, and 14 blocks of 4 KiB
        state = 19_840
        running = state + ("guesses" in both) * 2 * 4 * 5 * (CHANNELS + INPUTS)
        settings |= {"max_num_seqs": 3, "max_model_len": 128, "state_cache_gb": 3 * state / (1 << 30)}
        settings["kv_cache_memory"] = 3 * running + 3 * state + 14 * 4096
    if "a folder" in both:
        settings["prompt_cache_path"] = tmp_path
    with engine(hybrid, speculative_config=guesses, **settings, **ranks) as mixed:
        assert ask(mixed, given, 40, **params) == expected
        if "hits" in both:
            assert ask(mixed, given, 40, **params) == expected
        counts = mixed.stats()
    assert counts.cached_prompt_tokens or "preemption" in both, "where pages are few they may all be gone"
    assert bool(counts.preemptions) == ("preemption" in both)
    assert bool(counts.accepted_draft_tokens) == ("guesses" in both)
    assert counts.accepted_draft_tokens < counts.draft_tokens or "guesses" not in both
    if "a folder" in both:
        with engine(hybrid, speculative_config=guesses, **settings, **ranks) as again:
            assert ask(again, given[:1], 40, **params) == expected[:1]
            assert again.stats().kept_blocks_read == 5
