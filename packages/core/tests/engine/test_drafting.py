# SPDX-License-Identifier: MIT
"""Drafts that are guessed: what is found, how much of it is tried, and that answers stay what they are."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from candle_vllm.core import (
    ConfigError,
    EngineConfig,
    InferenceEngine,
    InvalidParameterError,
    SamplingParams,
    StructuredOutputsParams,
)
from candle_vllm.core.config import LONGEST_MATCH, SpeculativeConfig, draft_settings
from candle_vllm.core.engine.drafts import drafting as drafting_module
from candle_vllm.core.engine.drafts.drafting import Drafter, StepTimes, _Match
from candle_vllm.core.engine.drafts.repeats import SEPARATOR, Past, Text
from candle_vllm.core.engine.step.live import Prediction
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.engine.drafted import same_times


def naive(tokens: list[int], end: Sequence[int], least: int, most: int) -> int:
    """The longest match of the end of a text that stands wholly in `tokens` and is not the end itself."""
    own, best = end is tokens, 0
    for place in range(len(tokens) - 1 if own else len(tokens)):
        length = 0
        while length < min(most, place + 1, len(end)) and tokens[place - length] == end[len(end) - 1 - length]:
            length += 1
        best = max(best, length)
    return best if best >= max(least, 2) else 0


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(2, 5), st.integers(5, LONGEST_MATCH), st.data())
def test_a_match_is_one_and_no_longer_one_is_near(tokens: list[int], least: int, most: int, data: Any) -> None:
    grown: list[int] = []
    text = Text(grown)
    for token in tokens:
        grown.append(token)
        if data.draw(st.booleans()):
            text.follow()
    text.follow()
    for end in (grown, data.draw(st.lists(st.integers(0, 3), max_size=12))):
        place, length = text.find(end, least, most)
        best = naive(grown, end, least, most)
        assert (length > 0) == (best > 0)
        if length:
            assert least <= length <= most
            assert list(grown[place - length : place]) == list(end[len(end) - length :])
            assert end is not grown or place < len(grown)
            if len(grown) < 12:  # every place of the pair is looked at
                assert length == best


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=30), st.integers(1, 29), st.integers(1, 9))
def test_texts_that_begin_alike_share_what_is_known_of_it(tokens: list[int], first: int, most: int) -> None:
    """Each finds what it would find by itself, once all was looked at, so many tokens at a time."""
    first = min(first, len(tokens) - 1)
    alone = Text(tokens)
    alone.follow()
    prompt = Text(tokens, size=first)
    others = [Text(tokens[:first] + ends, prompt) for ends in ([1, 2, 1], tokens[first:])]
    looked = []
    while not looked or looked[-1]:
        looked.append(sum(other.follow(most) for other in others))
        assert looked[-1] <= most * len(others)
        for other in others:  # what is not known yet is not found, and nothing else is
            place, length = other.find(other.tokens, 2, 24)
            assert other.tokens[place - length : place] == (other.tokens[-length:] if length else [])
    assert sum(looked) == first - 1 + 3 + len(tokens) - first
    assert others[1].find(others[1].tokens, 2, 24) == alone.find(tokens, 2, 24)


def test_what_repeats_goes_on_repeating() -> None:
    tokens = [9, 1, 2, 3, 1, 2, 3]
    text = Text(tokens)
    text.follow()
    place, length = text.find(tokens, 2, 24)
    assert (place, length) == (4, 3)
    assert _Match(tokens, place, length).upcoming(8) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_past_answers_are_kept_in_two_generations_and_end_where_they_ended() -> None:
    past = Past(most=100)
    past.add([1, 2, 3, 4])
    tokens, place, length = past.find([7, 1, 2], 2, 24)
    assert length == 2
    assert _Match(tokens, place, length).upcoming(9) == [3, 4]
    for number in range(40):
        past.add([100 + number] * 5)
    assert past.find([7, 1, 2], 2, 24)[2] == 0
    assert past.find([129, 129, 129], 2, 24)[2] == 3
    past.add([5] * 1000)
    assert sum(len(text.tokens) for text in past._texts) < 300


def test_no_more_past_answers_are_kept_than_were_asked_for() -> None:
    for most in (1, 2, 5, 8):
        past = Past(answers=most)
        for number in range(20):
            past.add([100 + number] * 5)
            kept = sum(text.tokens.count(SEPARATOR) - 1 for text in past._texts)
            assert max(1, most // 2) <= kept <= most or number + 1 < most
            assert past.find([100 + number] * 3, 2, 24)[2] == 3  # the last one always


@pytest.mark.parametrize(
    ("prediction", "answer", "found"),
    [
        ([], [1, 2], 0),
        ([1, 2, 3], [], 0),
        ([1, 2, 3, 4], [1, 2, 3, 4], 4),
        ([1, 2, 3, 4], [1, 9, 9, 3, 4], 3),  # left behind the first, found again where 3 and 4 stand
        ([1, 2, 3, 4], [4, 3, 2, 1], 0),
        ([5, 6, 1, 5, 6, 2, 5, 6, 3], [5, 6, 2, 5, 6, 3], 6),
        ([7, 8], [7, 8] * 50, 2),  # no token is found twice
    ],
)
def test_tokens_of_a_prediction_are_counted_once_each(prediction: list[int], answer: list[int], found: int) -> None:
    assert Prediction(prediction).found_in(answer) == found


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 3), max_size=30))
def test_no_more_of_a_prediction_is_found_than_stands_in_the_answer(left: list[int], right: list[int]) -> None:
    assert Prediction(left).found_in(left) == len(left)
    assert 0 <= Prediction(left).found_in(right) <= min(len(left), len(right))
    assert Prediction(left).found_in([9, *right]) <= sum(each in right for each in left)


def drafter_of_steps(rows: int = 16) -> Drafter:
    return Drafter(SpeculativeConfig(), rows)


def test_times_of_steps_follow_what_is_measured_and_no_single_time() -> None:
    times = StepTimes(1, 16)
    assert times.plain(1) == 0
    for seconds in (0.010, 0.500, 0.010):  # something else ran beside the second
        times.note_plain(1, seconds)
    assert times.plain(1) == 0.010
    assert 1 < times(3) < times(4) < 2
    known = times(7)
    times.note(1, 7, 100.0, 3.0)  # the first step with so many drafts was slow by chance
    assert known < times(7) <= 1.05 * known
    for _ in range(20):
        times.note_plain(1, 0.010)
        times.note(1, 7, 0.015, 3.0)
    assert times(7) == pytest.approx(1.5, rel=0.01)
    assert times(6) < 1.7  # the neighbours follow
    before, balance = times(7), times.balance
    times.note(1, 7, 100.0, 3.0)
    times.note_plain(1, 100.0)
    assert (times(7), times.plain(1)) == (before, 0.010)
    assert times.balance >= balance  # twice what such steps take is charged for it: it saved three
    for _ in range(9):
        times.note(1, 7, 0.040, 0.0)
    assert times(7) == pytest.approx(4.0, rel=0.01)
    for _ in range(60):
        times.relax()
    assert times(7) < 2.5  # so that it is tried again
    times.note(1, 4000, 1.0, 0.0)


def test_drafts_of_one_sequence_say_nothing_about_steps_of_many() -> None:
    """Rows of drafts are not rows of sequences: a step of eight sequences is a plain one."""
    drafter = drafter_of_steps()
    before = [drafter.times(8)(drafts) for drafts in range(17)]
    for _ in range(40):
        drafter.times(1).note_plain(1, 0.010)
        drafter.times(1).note(1, 7, 0.050, 0.0)
    assert drafter.times(1)(7) > 4
    assert [drafter.times(8)(drafts) for drafts in range(17)] == before
    assert drafter.times(9) is drafter.times(8)
    assert drafter.times(7) is not drafter.times(8)


class Steps:
    """Steps of an engine that take what is given, in plain ones; the clock of drafting is theirs.

    Args:
        look: what the search takes.
        draft: what a step with drafts takes.
        right: drafts of each sequence that are right.
        tries: of how many searches one finds something.
        noise: of how many steps one takes eight times as long.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, look: float, draft: float, right: int, tries: int, noise: int
    ) -> None:
        self.look, self.draft, self.right, self.tries, self.noise = look, draft, right, tries, noise
        self.now, self.looked, self.drafter = 0.0, 0, drafter_of_steps()
        monkeypatch.setattr(drafting_module.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(self.drafter, "_propose", self._propose)

    def _propose(self, *_: object) -> bool:
        self.now += self.look
        self.looked += 1
        return bool(self.tries) and self.looked % self.tries == 0

    def run(self, count: int, steps: int) -> float:
        """Time of so many steps of so many sequences, without the noise, for each step that a plain engine takes."""
        lives = [SimpleNamespace(sequence=SimpleNamespace(drafts=()), state=SimpleNamespace(grammar=None))] * count
        found, made, began, touched, disturbed = False, 0, self.now, False, 0.0
        for step in range(steps):
            took = self.draft if found else 1.3 if touched else 1.0
            made += 1 + (self.right if found else 0)
            other = 7 * took if self.noise and step % self.noise == 0 else 0
            self.now, disturbed, touched = self.now + took + other, disturbed + other, found
            if self.drafter.rests(count):
                found = False
                continue
            for _ in range(count if found else 0):
                self.drafter.tried(4, self.right)
            self.drafter.stepped(count, 4 * count if found else 0, took + other)
            found = self.drafter.propose(lives)  # type: ignore[arg-type]
        return (self.now - began - disturbed) / made


@pytest.mark.parametrize("count", [2, 8, 32])
@pytest.mark.parametrize(
    ("look", "draft", "right", "tries"),
    [
        (0.15, 1.0, 0, 0),  # the search alone, of a step that takes hardly longer
        (3.0, 1.0, 0, 0),  # one that takes longer than a step
        (0.02, 4.0, 0, 1),  # drafts that are believed in and never right
        (0.02, 4.0, 1, 3),  # now and then, and too dear for what they save
    ],
)
def test_drafts_that_do_not_pay_cost_a_hundredth(
    monkeypatch: pytest.MonkeyPatch, count: int, look: float, draft: float, right: int, tries: int
) -> None:
    steps = Steps(monkeypatch, look, draft, right, tries, 0)
    steps.run(count, 300)
    assert steps.run(count, 4000) < 1.015
    assert steps.looked > 10  # and they are tried again and again


@pytest.mark.parametrize("count", [1, 2, 8, 32])
@pytest.mark.parametrize("noise", [0, 7])
def test_drafts_that_pay_are_not_left(monkeypatch: pytest.MonkeyPatch, count: int, noise: int) -> None:
    steps = Steps(monkeypatch, 0.02, 1.4, 2, 1, noise)
    steps.run(count, 300)
    assert steps.run(count, 4000) < 1.05 * 1.42 / 3


def test_drafts_are_tried_again_when_they_begin_to_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch, 0.02, 4.0, 0, 1, 0)
    assert steps.run(8, 2000) > 1
    steps.draft, steps.right = 1.2, 3
    steps.run(8, 1000)
    assert steps.run(8, 1000) < 0.4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"methd": "suffix"}, "has no 'methd' (did you mean method?)"),
        ({"method": "eagle"}, "method must be one of none, ngram, suffix, draft_model, eagle3, mtp: heads of EAGLE-1"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens must be between 1 and 31, not 0"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens must be a whole number"),
        ({"num_speculative_tokens": 2.0}, "num_speculative_tokens must be a whole number"),
        ({"suffix_decoding_min_token_prob": 1.5}, "must be at least 0 and at most 1, not 1.5"),
        ({"suffix_decoding_min_token_prob": float("nan")}, "must be at least 0 and at most 1, not nan"),
        ({"prompt_lookup_min": 5, "prompt_lookup_max": 4}, "prompt_lookup_min 5 is above prompt_lookup_max"),
        (
            {"method": "ngram", "suffix_decoding_min_token_prob": 0.5},
            "is for the method suffix or draft_model or eagle3 or mtp, not for ngram",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(model="m", speculative_config=given)
    assert said in str(caught.value)
    assert caught.value.setting == "speculative_config"


def test_settings() -> None:
    assert draft_settings(None) is draft_settings({"method": "none"}) is None
    assert draft_settings({}) == draft_settings({"method": "suffix"})
    assert draft_settings({"method": "ngram", "model": None, "revision": None}) == SpeculativeConfig(method="ngram")
    vllms = {"draft_tensor_parallel_size": 1, "suffix_decoding_max_tree_depth": 24, "quantization": None}
    assert draft_settings({"method": "suffix", **vllms}) == draft_settings({})
    with pytest.raises(ConfigError, match="has no 'draft_tensor_parallel_size'"):
        draft_settings({"draft_tensor_parallel_size": 2})


def test_a_step_without_rows_for_guesses_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"set max_num_batched_tokens=23$"):
        loaded(folder, speculative_config={}, max_num_seqs=8, max_num_batched_tokens=8)


# ---- with a model ----------------------------------------------------------------------------------------------------

FORM = StructuredOutputsParams(
    json={
        "type": "object",
        "properties": {"name_of_it": {"enum": ["first one", "second one"]}, "is_it_there": {"type": "boolean"}},
        "required": ["name_of_it", "is_it_there"],
        "additionalProperties": False,
    }
)
PARAMS = [
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.9, "seed": 3, "n": 2},
    {"temperature": 0.9, "seed": 4, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
    {"temperature": 0.7, "seed": 5, "logit_bias": {97: 4.0}, "min_p": 0.02, "logprobs": 0},
    {"temperature": 0.8, "seed": 6, "structured_outputs": FORM, "logprobs": 1},
    {"temperature": 0.0, "stop": ["ab"], "min_tokens": 5},
    {"temperature": 0.0, "cache_salt": "mine"},
    {"temperature": 0.9, "seed": 8, "mirostat": 2, "mirostat_tau": 3.0},
    {"temperature": 0.9, "seed": 9, "mirostat": 1},
    {"temperature": 0.9, "seed": 10, "dry_multiplier": 0.8, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    {"temperature": 0.9, "seed": 12, "num_speculative_tokens": 2},
    {"temperature": 0.9, "seed": 13, "prediction": "abcabcbbbaaacab" * 3},
    {"temperature": 0.9, "seed": 11, "top_n_sigma": 1.0, "repetition_penalty": 1.3, "repeat_last_n": 5, "logprobs": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("toy") / "toy", toy_config())


def loaded(folder: Path, **settings: Any) -> InferenceEngine:
    return InferenceEngine(folder, threads=1, max_model_len=256, block_size=16, **settings)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[InferenceEngine]:
    with loaded(folder, speculative_config={"method": "none"}) as engine:
        yield engine


@pytest.fixture(scope="module")
def drafting(folder: Path) -> Iterator[InferenceEngine]:
    with loaded(folder, speculative_config={"suffix_decoding_min_token_prob": 0.0}) as engine:
        assert engine._engine is not None
        assert engine._engine._drafter is not None
        engine._engine._drafter.times = same_times  # what is tried follows from the guesses alone
        yield engine


def answers(engine: InferenceEngine, seed: int) -> list[Any]:
    """Of texts that repeat themselves, so that there is something to be guessed, all parameters in one batch."""
    rng = random.Random(seed)
    prompts = [[rng.choice(b"abc") for _ in range(6)] * 4 for _ in PARAMS]
    params = [SamplingParams(max_tokens=48, ignore_eos="stop" not in each, **each) for each in PARAMS]
    found = engine.generate(prompts, params, use_tqdm=False)
    return [
        (out.token_ids, out.text, repr(out.logprobs), out.finish_reason, out.stop_reason)
        for answer in found
        for out in answer.outputs
    ]


@pytest.mark.parametrize("seed", range(4))
def test_guesses_change_no_answer(plain: InferenceEngine, drafting: InferenceEngine, seed: int) -> None:
    assert answers(drafting, seed) == answers(plain, seed)


def test_guesses_save_steps_and_are_counted(plain: InferenceEngine, drafting: InferenceEngine) -> None:
    prompt = list(b"abcabcabcabc")
    params = SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True)
    steps = []
    for engine in (plain, drafting):
        before = engine.stats()
        engine.generate([prompt], params, use_tqdm=False)
        after = engine.stats()
        steps.append(after.steps - before.steps)
        if engine is drafting:
            right = after.accepted_draft_tokens - before.accepted_draft_tokens
            assert 0 < right <= after.draft_tokens - before.draft_tokens
            assert steps[1] == steps[0] - right
            assert sum(after.accepted_per_position) == after.accepted_draft_tokens
        else:
            assert after.drafts == after.draft_tokens == 0
    assert drafting.stats().num_free_blocks == drafting.stats().num_blocks


def steps_of(engine: InferenceEngine, params: SamplingParams) -> tuple[int, Any]:
    """Steps that an answer took, and the answer."""
    before = engine.stats()
    (answer,) = engine.generate([list(b"xyzq")], params, use_tqdm=False)
    after = engine.stats()
    assert answer.metrics is not None
    assert answer.metrics.draft_tokens == after.draft_tokens - before.draft_tokens
    assert answer.metrics.accepted_draft_tokens == after.accepted_draft_tokens - before.accepted_draft_tokens
    return after.steps - before.steps, answer


def test_a_request_may_guess_less_or_nothing(drafting: InferenceEngine) -> None:
    steps, texts = [], set()
    for most in (128, 2, 1, 0):
        params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, num_speculative_tokens=most)
        params.cache_salt = "alone"  # no past answers
        count, answer = steps_of(drafting, params)
        steps.append(count)
        texts.add(answer.token_ids)
        assert (answer.metrics.draft_tokens > 0) == (most > 0)
        assert count + answer.metrics.accepted_draft_tokens == 60
        assert answer.metrics.draft_tokens <= most * count
    assert steps == sorted(steps)
    assert steps[-1] == 60
    assert len(texts) == 1
    for wrong in (-1, 129, True, 1.0):
        with pytest.raises(InvalidParameterError, match="num_speculative_tokens must be"):
            SamplingParams(num_speculative_tokens=wrong)  # type: ignore[arg-type]


def test_a_predicted_text_is_guessed(plain: InferenceEngine, drafting: InferenceEngine) -> None:
    """The answer of a fresh seed, which nothing has said before, predicted right, half right and wrong."""
    params = SamplingParams(temperature=1.5, seed=77, max_tokens=60, ignore_eos=True, cache_salt="alone")
    allowed = [*range(97, 123)]  # tokens of letters, each of which is read as itself
    params.allowed_token_ids = allowed
    steps, answer = steps_of(plain, params)
    assert steps == 60
    assert (answer.metrics.predicted_tokens, answer.metrics.accepted_predicted_tokens) == (0, 0)
    text = answer.text
    for prediction, most, found in (
        (text, 15, 60),
        (text[:20] + "\n\n" + text[22:], 25, 60),
        ("never " * 10, 60, 0),
        ("", 60, 0),
    ):
        params.prediction = prediction
        for engine in (plain, drafting):
            took, other = steps_of(engine, params)
            assert other.token_ids == answer.token_ids
            assert took <= (60 if engine is plain else most)
            told = other.metrics
            assert (told.predicted_tokens, told.accepted_predicted_tokens) == (
                len(prediction),
                found - 2 * ("\n" in prediction),
            )
    params.prediction = "a" * 300
    with pytest.raises(
        InvalidParameterError, match="prediction has 300 tokens, but prompt and answer together at most 256"
    ):
        drafting.generate([[97]], params, use_tqdm=False)


def test_what_a_form_leaves_no_choice_about_is_not_computed_token_by_token(
    plain: InferenceEngine, drafting: InferenceEngine
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=100, structured_outputs=FORM)
    found = []
    for engine in (plain, drafting):
        before = engine.stats().steps
        (answer,) = engine.generate([list(b"tell")], params, use_tqdm=False)
        found.append((answer.outputs[0].text, engine.stats().steps - before))
    assert found[0][0] == found[1][0]
    assert found[1][1] < found[0][1] / 2


def test_a_form_is_guessed_on_behind_what_it_leaves_open(plain: InferenceEngine, drafting: InferenceEngine) -> None:
    """Any of two signs may come between what must come, so nothing is forced there; one comes where it came before."""
    form = StructuredOutputsParams(regex="([a-d][:;]name[=~][a-d][.,]){8}")
    params = SamplingParams(temperature=0.0, max_tokens=100, structured_outputs=form)
    params.cache_salt = "alone"
    (steps, alone), (guessing, answer) = steps_of(plain, params), steps_of(drafting, params)
    assert answer.token_ids == alone.token_ids
    assert steps == len(alone.token_ids)
    assert guessing <= 24  # 27 where each guess ends with what is sure


def test_salted_answers_are_no_guesses_of_others(folder: Path) -> None:
    for salt, expected in (("mine", 0), (None, 1)):
        with loaded(folder, speculative_config={}) as engine:
            params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, cache_salt=salt)
            engine.generate([[97, 98]], params, use_tqdm=False)
            assert engine._engine is not None
            assert engine._engine._drafter is not None
            past = engine._engine._drafter._past
            assert past is not None
            assert (sum(len(text.tokens) for text in past._texts) > 2) == bool(expected)


@pytest.mark.usefixtures("failing_guesses")
def test_a_guess_that_cannot_be_made_is_missed_by_nobody(
    drafting: InferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert drafting._engine is not None
    monkeypatch.setattr(drafting._engine, "draft_failures", {})
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    (before,) = drafting.generate([list(b"abcabcabc")], params, use_tqdm=False)
    with monkeypatch.context() as patched:
        patched.setattr(drafting._engine._drafter, "_current", lambda *_: 1 / 0)
        (found,) = drafting.generate([list(b"abcabcabc")], params, use_tqdm=False)
    assert found.outputs[0].token_ids == before.outputs[0].token_ids


@pytest.mark.usefixtures("failing_guesses")
def test_a_failure_to_guess_is_told_once_a_minute(
    drafting: InferenceEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of each kind; not at every step."""
    inner = drafting._engine
    assert inner is not None
    monkeypatch.setattr(inner, "_last_logged", {})
    monkeypatch.setattr(inner, "draft_failures", {})
    failures = itertools.cycle([ZeroDivisionError, KeyError])

    def fail(*_: object) -> None:
        raise next(failures)

    def told() -> int:
        caplog.clear()
        params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
        drafting.generate([list(b"abcabcabc")], params, use_tqdm=False)
        return sum("no drafts for a step" in record.message for record in caplog.records)

    monkeypatch.setattr(inner._drafter, "propose", fail)
    assert told() == 2
    assert told() == 0
    monkeypatch.setattr(inner, "_last_logged", {kind: when - 61 for kind, when in inner._last_logged.items()})
    assert told() == 2
    assert set(inner.draft_failures) == {ZeroDivisionError, KeyError}


def test_a_long_prompt_is_looked_at_in_parts_and_once_for_all_its_answers(
    drafting: InferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = drafting._engine
    assert inner is not None
    assert inner._drafter is not None
    monkeypatch.setattr(drafting_module, "_LOOKED", 50)
    records, seen = inner._drafter._records, list[int]()
    begun: dict[int, Any] = {}
    propose = inner._drafter.propose

    def looked(lives: Any) -> bool:
        chosen = propose(lives)
        begun.update({id(text): text for record in records.values() if (text := record.text._begun)})
        seen.append(sum(len(text._earlier) for text in begun.values()))
        return chosen

    monkeypatch.setattr(inner._drafter, "propose", looked)
    prompt = [97 + number % 23 for number in range(170)]
    params = SamplingParams(temperature=0.9, seed=1, n=3, max_tokens=40, ignore_eos=True)
    drafting.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    assert len(begun) == 1
    assert max(new - old for old, new in itertools.pairwise(seen) if new > old) <= 50
    assert max(seen) == len(prompt)
    begun.clear()
    assert not inner._drafter._prompts  # nothing stays of what has ended


@pytest.mark.parametrize(
    ("given", "guessed"),
    [
        ({"structured_outputs": StructuredOutputsParams(regex="(ab){20}")}, True),
        ({"structured_outputs": StructuredOutputsParams(regex="(ab){20}"), "logprobs": 1}, False),
        ({"structured_outputs": StructuredOutputsParams(regex="(ab){20}"), "repetition_penalty": 1.1}, False),
        (
            {
                "structured_outputs": StructuredOutputsParams(
                    json={"type": "array", "items": {"enum": list(range(10, 40))}, "uniqueItems": True, "minItems": 9}
                )
            },
            False,
        ),
    ],
)
def test_a_form_is_guessed_for_where_looking_ahead_leaves_it_alone(
    drafting: InferenceEngine, given: dict[str, Any], guessed: bool
) -> None:
    _, answer = steps_of(drafting, SamplingParams(temperature=0.0, max_tokens=40, **given))
    assert (answer.metrics.draft_tokens > 0) is guessed
