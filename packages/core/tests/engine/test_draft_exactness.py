# SPDX-License-Identifier: MIT
"""Drafts that are forced, right, wrong and random, change no token, log-probability or end, whatever a request asks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import pytest

from candle_vllm.core import InferenceEngine, SamplingParams, StructuredOutputsParams
from candle_vllm.core.engine.drafts.draft_head import DraftingHead
from candle_vllm.core.engine.step.live import LiveSequence
from candle_vllm.core.sampling.thoughts import ThoughtBudget
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from candle_vllm.core.text.detokenizer import StopMarks
from packages.core.tests.engine.drafted import FreeTimes, same_times
from packages.core.tests.engine.toy_heads import NextTokens, eagle3_config, eagle3_weights, write_head

EOS, END = 258, ". So: "
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["first", "second one"]}, "there": {"type": "boolean"}, "n": {"type": "integer"}},
    "required": ["name", "there"],
    "additionalProperties": False,
}
CALL = f"""\
start: "<call>" ("alpha" | "beta") " " body "</call>"
body: %json {json.dumps(SCHEMA)}
"""
ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "logprobs": {"logprobs": 3},
    "n = 3": {"n": 3, "logit_bias": {EOS: 2.0}},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": 0.4},
    "bias": {"logit_bias": {97: 5.0, 98: 4.5, 99: -100.0, EOS: 4.0}, "min_p": 0.02, "logprobs": 0},
    "schema": {"structured_outputs": StructuredOutputsParams(json=SCHEMA), "max_tokens": 60},
    "tools": {"structured_outputs": StructuredOutputsParams(grammar=CALL), "max_tokens": 70},
    "stop strings": {"stop": ["ab", "caa", "bb"], "allowed_token_ids": [97, 98, 99, EOS], "min_tokens": 4},
    "stop strings between marks": {
        "stop": ["ab", "caa", "bb"],
        "stop_marks": StopMarks(states={"": {"c": "within"}, "within": {"ba": "", "a": ""}}, first="within"),
        "allowed_token_ids": [97, 98, 99, EOS],
        "min_tokens": 4,
    },
    "a form behind thoughts": {
        "structured_outputs": StructuredOutputsParams(json=SCHEMA, reasoning_end=END),
        "thoughts": ThoughtBudget(tokens=6, marks={"Hm ": END}, opened="Hm "),
        "max_tokens": 80,
    },
}
Kind = Literal["right", "wrong", "random"]


class Case(NamedTuple):
    asked: str
    prompt: tuple[int, ...]
    params: SamplingParams


def cases(asked: Iterable[str], prompts: int, greedy: Iterable[bool] = (True, False)) -> list[Case]:
    """Prompts that differ, each with what is asked, greedy and with a seed."""
    rng, made = random.Random(prompts), []
    for number in range(prompts):
        for name in asked:
            for likeliest in greedy:
                prompt = (*rng.randbytes(rng.randint(2, 20)), number >> 8, number & 255)
                drawn = {"temperature": 0.0} if likeliest else {"temperature": 0.9, "seed": number}
                made.append(Case(name, prompt, SamplingParams(**{"max_tokens": 24, **drawn, **ASKED[name]})))
    return made


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceEngine]:
    folder = write_toy_model(tmp_path_factory.mktemp("toy") / "toy", toy_config())
    drafts = {"num_speculative_tokens": 31, "suffix_decoding_max_cached_requests": 0}
    with InferenceEngine(
        folder, threads=1, max_model_len=192, max_num_seqs=8, max_num_batched_tokens=64, speculative_config=drafts
    ) as engine:
        yield engine


def answered(engine: InferenceEngine, given: list[Case]) -> list[list[Any]]:
    prompts = [{"prompt_token_ids": list(case.prompt)} for case in given]
    found = engine.generate(prompts, [case.params for case in given], use_tqdm=False)
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    return [
        [(one.token_ids, one.text, repr(one.logprobs), one.finish_reason, one.stop_reason) for one in answer.outputs]
        for answer in found
    ]


def forced(kind: Kind, given: list[Case], answers: list[list[Any]]) -> Any:
    """As `Drafter.propose`: the known answer's next tokens, others than those, or both."""
    known = {(case.prompt, index): one[0] for case, answer in zip(given, answers) for index, one in enumerate(answer)}
    rng = random.Random(len(given))

    def propose(lives: Iterable[LiveSequence]) -> bool:
        for live in lives:
            sequence = live.sequence
            answer = known[tuple(sequence.tokens[: sequence.num_prompt_tokens]), sequence.index]
            place = len(sequence.tokens) - sequence.num_prompt_tokens
            right = answer[place : place + rng.randint(1, 9)]
            if kind == "wrong":
                right = tuple((token + rng.randint(1, 200)) % 259 for token in right)
            elif kind == "random":  # right up to some place, and on behind the end
                right = (*right[: rng.randint(0, 9)], *(rng.randrange(259) for _ in range(rng.randint(0, 3))))
            sequence.drafts = right
        return True

    return propose


def check(engine: InferenceEngine, given: list[Case], kinds: Iterable[Kind], monkeypatch: pytest.MonkeyPatch) -> None:
    inner = engine._engine
    assert inner is not None
    drafter = inner._drafter
    assert drafter is not None
    with monkeypatch.context() as patched:
        patched.setattr(drafter, "propose", lambda *_: False)
        expected = answered(engine, given)
    for case, answer in zip(given, expected):
        if "form behind" in case.asked:
            said = answer[0][1].partition(END)[2]
            assert answer[0][3].value == "length" or json.loads(said).keys() <= SCHEMA["properties"].keys()
    for kind in kinds:
        before = engine.stats()
        with monkeypatch.context() as patched:
            patched.setattr(drafter, "propose", forced(kind, given, expected))
            assert answered(engine, given) == expected, kind
        after = engine.stats()
        tried, right = (
            getattr(after, name) - getattr(before, name) for name in ("draft_tokens", "accepted_draft_tokens")
        )
        tokens = sum(len(one[0]) for answer in expected for one in answer)
        assert tried > tokens / 3
        assert after.generation_tokens - before.generation_tokens == tokens  # what was given is counted, and no more
        assert (right == 0) == (kind == "wrong")
        assert kind != "right" or right > tokens / 4


@pytest.mark.parametrize("kind", ["right", "wrong", "random"])
def test_drafts_change_no_answer(engine: InferenceEngine, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that may be asked, in the same steps."""
    check(engine, cases(ASKED, 2), [kind], monkeypatch)


def test_runs_are_drawn_by_the_steps_own_plan(engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing changes their logits, a step with drafts enters the threads once, and other rows are as before."""
    inner = engine._engine
    assert inner is not None
    drafter, team = inner._drafter, inner.runner.team  # type: ignore[attr-defined]
    assert drafter is not None
    given = [*cases(["plain"], 2), *cases(["logprobs"], 1)]
    monkeypatch.setattr(drafter, "propose", lambda *_: False)
    expected = answered(engine, given)
    entered, run, steps = [0], team.run, inner.stats().steps

    def counted(*plan: Any) -> None:
        entered[0] += 1
        run(*plan)

    monkeypatch.setattr(team, "run", counted)
    monkeypatch.setattr(drafter, "propose", forced("random", given[:4], expected[:4]))
    assert answered(engine, given[:4]) == expected[:4]
    assert entered[0] == inner.stats().steps - steps
    monkeypatch.setattr(drafter, "propose", forced("random", given, expected))
    assert answered(engine, given) == expected


@pytest.mark.every_case
@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "seeded"])
@pytest.mark.parametrize("asked", ASKED)
def test_drafts_change_none_of_200_answers(
    engine: InferenceEngine, asked: str, greedy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(engine, cases([asked], 200, [greedy]), ["right", "wrong", "random"], monkeypatch)


# ---- with heads that read hidden states ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["eagle3", "mtp"])
def headed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceEngine]:
    """A model with a random head, and guesses whatever they cost."""
    made = tmp_path_factory.mktemp(request.param)
    config = toy_config("qwen3")
    folder = write_toy_model(made / "toy", config)
    drafts: dict[str, Any] = {"method": request.param, "num_speculative_tokens": 5}
    if request.param == "eagle3":
        told = eagle3_config(config)
        drafts["model"] = str(write_head(made / "head", told, eagle3_weights(told)))
    else:
        folder = NextTokens(folder, "mtp").write(made / "model", folder)
    with InferenceEngine(
        folder, threads=1, max_model_len=192, max_num_seqs=8, max_num_batched_tokens=64, speculative_config=drafts
    ) as engine:
        drafter = engine._engine and engine._engine._drafter
        assert drafter is not None
        assert isinstance(drafter.model, DraftingHead)
        drafter.times = same_times  # type: ignore[method-assign]
        drafter.model.times = FreeTimes()
        drafter._past = None  # what the same prompts were answered before
        yield engine


def check_headed(engine: InferenceEngine, given: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = engine._engine and engine._engine._drafter
    assert drafter is not None
    with monkeypatch.context() as patched:
        patched.setattr(drafter, "propose", lambda *_: False)
        expected = answered(engine, given)
    before = engine.stats()
    assert answered(engine, given) == expected
    after = engine.stats()
    guessed = [case for case in given if "thoughts" not in case.asked]  # nothing is guessed beside a budget of them
    assert after.draft_tokens - before.draft_tokens >= len(guessed)
    model = drafter.model
    assert isinstance(model, DraftingHead)
    assert not model._owns
    assert not model._tails


def test_heads_change_no_answer(
    headed: InferenceEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check_headed(headed, cases(ASKED, 2), monkeypatch)
    assert "no drafts for a step" not in caplog.text


@pytest.mark.every_case
@pytest.mark.parametrize("asked", ASKED)
def test_heads_change_none_of_200_answers(headed: InferenceEngine, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_headed(headed, cases([asked], 200), monkeypatch)
