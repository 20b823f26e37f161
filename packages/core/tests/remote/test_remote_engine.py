# SPDX-License-Identifier: MIT
"""An engine in its own process gives what an engine in this one gives, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from candle_vllm.core import (
    ChatTemplateError,
    ConfigError,
    EngineDeadError,
    EngineOverloadedError,
    EngineStats,
    FinishReason,
    InferenceEngine,
    InvalidParameterError,
    ModelNotFoundError,
    PromptTooLongError,
    RequestError,
    SamplingParams,
    StructuredOutputsParams,
    TokenOutput,
)
from candle_vllm.core.progress import Progress, heard_by
from candle_vllm.core.remote import RemoteEngine
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from candle_vllm.core.text.detokenizer import StopMarks
from packages.core.tests.toy_encoder import write_toy_encoder
from packages.core.tests.toy_gguf import write_toy_gguf
from tests.waiting import until

PROMPT = [(7 * i) % 256 for i in range(40)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=30_000, ignore_eos=True)  # some seconds
CONFIG = toy_config(max_position_embeddings=1 << 15)
# Blocks of 16 have compiled kernels: the two engines give the same bits, however their steps are composed.
# Where tokens are guessed, which of them come in one piece follows from the times of steps.
SETTINGS: dict[str, Any] = {"threads": 1, "block_size": 16, "speculative_config": {"method": "none"}}


@pytest.fixture(scope="module")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its context holds answers that do not end while a test looks at them."""
    return write_toy_model(tmp_path_factory.mktemp("toy") / "toy", CONFIG)


@pytest.fixture(scope="module")
def local(toy_model: Path) -> Iterator[InferenceEngine]:
    with InferenceEngine(str(toy_model), **SETTINGS) as engine:
        assert engine._loaded is not None
        assert engine._loaded.placement.recorded
        yield engine


@pytest.fixture(scope="module")
def remote(toy_model: Path) -> Iterator[RemoteEngine]:
    with RemoteEngine(str(toy_model), **SETTINGS) as engine:
        yield engine


def comparable(output: Any) -> Any:
    """An output without what differs from run to run."""
    return output.outputs, output.prompt, output.prompt_token_ids, output.prompt_logprobs


def at_rest(stats: EngineStats) -> bool:
    return not stats.num_running and not stats.num_waiting and stats.num_free_blocks == stats.num_blocks


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has not been forgotten and counts as there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(temperature=0.9, top_p=0.9, top_k=40, seed=11, max_tokens=20),
        SamplingParams(temperature=1.0, seed=3, n=2, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=8, logprobs=3, prompt_logprobs=2, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=5, max_tokens=60, stop=("e", "a"), include_stop_str_in_output=True),
        SamplingParams(
            temperature=1.0,
            seed=5,
            max_tokens=60,
            stop=("e", "a"),
            stop_marks=StopMarks(states={"": {"e": "within"}, "within": {"o": "", "i": ""}}, behind=True),
        ),
        SamplingParams(
            temperature=0.7,
            seed=2,
            max_tokens=16,
            logit_bias={65: 5},
            bad_words=["AB"],
            allowed_token_ids=range(60, 90),
            repetition_penalty=1.3,
        ),
        SamplingParams(
            temperature=1.0, seed=9, max_tokens=40, structured_outputs=StructuredOutputsParams(regex="[a-c]{5}")
        ),
        SamplingParams(
            temperature=1.0,
            seed=9,
            max_tokens=80,
            structured_outputs=StructuredOutputsParams(
                json={
                    "type": "object",
                    "properties": {"n": {"type": "integer"}},
                    "required": ["n"],
                    "examples": [10**30],
                }
            ),
        ),
        SamplingParams(
            temperature=0.9,
            seed=4,
            max_tokens=30,
            typical_p=0.9,
            xtc_probability=0.5,
            mirostat=2,
            dry_multiplier=1.0,
            dry_sequence_breakers=["e"],
            repetition_penalty=1.2,
            repeat_last_n=8,
        ),
    ],
    ids=["greedy", "seeded", "n", "logprobs", "stop", "marks", "lists", "regex", "schema", "samplers"],
)
async def test_a_request_gives_what_it_gives_in_this_process(
    local: InferenceEngine, remote: RemoteEngine, params: SamplingParams
) -> None:
    here, there = await asyncio.gather(local.agenerate(PROMPT, params), remote.agenerate(PROMPT, params))
    assert comparable(there) == comparable(here)
    assert there.metrics is not None
    assert there.metrics.first_token_time is not None
    assert there.metrics.arrival_time <= there.metrics.first_token_time <= time.monotonic()


async def test_processors_stay_in_their_process(remote: RemoteEngine) -> None:
    with pytest.raises(InvalidParameterError, match="another process") as caught:
        await remote.agenerate(PROMPT, SamplingParams(logits_processors=[lambda _, row: row]))
    assert caught.value.param == "logits_processors"


async def test_pieces_are_those_of_an_engine_here(local: InferenceEngine, remote: RemoteEngine) -> None:
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=30, n=3, ignore_eos=True)
    streams = [engine.stream("some words", params, request_id="r") for engine in (local, remote)]
    here, there = [[piece async for piece in stream] for stream in streams]
    for index in range(3):
        pairs = zip([p for p in here if p.index == index], [p for p in there if p.index == index], strict=True)
        assert all((a.request_id, a.text, a.token_ids) == (b.request_id, b.text, b.token_ids) for a, b in pairs)
    assert {type(piece) for piece in there} == {TokenOutput}
    stream = remote.stream("some words", ENDLESS, request_id="r")
    await anext(stream)
    remote.abort("r")
    assert [piece async for piece in stream][-1].finish_reason == FinishReason.ABORT


def test_generate_and_what_is_loaded_are_the_same(local: InferenceEngine, remote: RemoteEngine) -> None:
    assert remote.model_info == local.model_info
    assert remote.default_sampling_params == local.default_sampling_params
    assert remote.chat_conventions == local.chat_conventions
    text = "Grüße <|im_end|> 你好 \x00 ok"
    assert remote.tokenize(text) == local.tokenize(text)
    assert remote.detokenize(remote.tokenize(text), False) == local.detokenize(local.tokenize(text), False)
    messages = [{"role": "user", "content": "hi"}]
    asked = local.apply_chat_template(messages)
    assert remote.apply_chat_template(messages) == asked
    assert remote.render_messages(messages) == local.render_messages(messages) == asked
    prompts = [PROMPT[:n] for n in range(1, 30)]
    outputs = [engine.generate(prompts, GREEDY, use_tqdm=False) for engine in (local, remote)]
    assert list(map(comparable, outputs[1])) == list(map(comparable, outputs[0]))
    assert remote.chat(messages, GREEDY).text == local.chat(messages, GREEDY).text


async def test_vectors_are_the_same(local: InferenceEngine, remote: RemoteEngine) -> None:
    texts = ["one", "two words", "three"]
    here, there = await local.aembed(texts), await remote.aembed(texts)
    for one, other in zip(there, here, strict=True):  # which texts share a step differs from run to run
        np.testing.assert_allclose(one.embedding, other.embedding, rtol=1e-4, atol=1e-6)
        assert one.prompt_token_ids == other.prompt_token_ids
    scores = [(await engine.ascore([("a", "b")]))[0] for engine in (local, remote)]
    assert scores[1].score == pytest.approx(scores[0].score, rel=1e-4)
    assert scores[1].num_tokens == scores[0].num_tokens == 2


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        ([], GREEDY),
        ([100_000], GREEDY),
        ([1] * 40_000, GREEDY),
        ([1], SamplingParams(max_tokens=40_000)),
        ([1], SamplingParams(logit_bias={5000: 1.0})),
        ([1], SamplingParams(bad_words=["\ud800"])),
        ("x" * 100_000, GREEDY),
        ([1], SamplingParams(structured_outputs=StructuredOutputsParams(json={"type": {1, 2}}))),
    ],
)
async def test_wrong_requests_are_refused_before_they_are_sent(
    local: InferenceEngine, remote: RemoteEngine, prompt: Any, params: SamplingParams
) -> None:
    with pytest.raises(RequestError) as here:
        local.stream(prompt, params)
    with pytest.raises(RequestError) as there:
        remote.stream(prompt, params)
    assert (type(there.value), str(there.value), there.value.param) == (
        type(here.value),
        str(here.value),
        here.value.param,
    )


async def test_what_only_the_engine_can_refuse_is_raised_at_the_first_piece(
    local: InferenceEngine, remote: RemoteEngine
) -> None:
    form = StructuredOutputsParams(regex="((")
    with pytest.raises(InvalidParameterError) as here:
        local.check_structured_outputs(form)
    with pytest.raises(InvalidParameterError) as there:
        remote.check_structured_outputs(form)
    assert (str(there.value), there.value.param) == (str(here.value), here.value.param)
    stream = remote.stream(PROMPT, SamplingParams(structured_outputs=form, n=2), request_id="wrong")
    with pytest.raises(InvalidParameterError, match="regex"):
        await anext(stream)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    remote.check_structured_outputs(StructuredOutputsParams(json={"type": "object"}))
    with pytest.raises(InvalidParameterError):
        remote.generate([PROMPT], SamplingParams(structured_outputs=form), use_tqdm=False)
    assert (await remote.agenerate(PROMPT, GREEDY, request_id="wrong")).finish_reason == FinishReason.LENGTH


async def test_texts_that_utf8_cannot_carry_are_refused(remote: RemoteEngine) -> None:
    with pytest.raises(InvalidParameterError, match="surrogate"):
        remote.stream(PROMPT, SamplingParams(stop="\ud800"))
    with pytest.raises(InvalidParameterError, match="surrogate"):
        remote.check_structured_outputs(StructuredOutputsParams(choice=["\ud800"]))


async def test_sixty_four_streams_at_once(local: InferenceEngine, remote: RemoteEngine) -> None:
    prompts = [PROMPT[: 1 + i % 40] for i in range(64)]
    before = remote.stats()
    outputs = await asyncio.gather(*(remote.agenerate(prompt, GREEDY) for prompt in prompts))
    stats = remote.stats()  # exact as soon as the last piece is here
    assert at_rest(stats)
    assert stats.finished["length"] == before.finished.get("length", 0) + 64
    assert stats.generation_tokens == before.generation_tokens + 64 * 24
    expected = local.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]


async def test_an_abort_frees_the_blocks_and_the_id(remote: RemoteEngine) -> None:
    before = remote.stats()
    for _ in range(5):
        stream = remote.stream(PROMPT, ENDLESS, request_id="same")
        with pytest.raises(InvalidParameterError, match="'same' is in use"):
            remote.stream(PROMPT, ENDLESS, request_id="same")
        await anext(stream)
        await stream.aclose()
        await until(lambda: "same" not in remote._thread._clients)
    forms = SamplingParams(max_tokens=5, structured_outputs=StructuredOutputsParams(regex="[x-z]{400}"))
    await remote.stream(PROMPT, forms).aclose()  # while it is compiled
    await until(lambda: at_rest(remote.stats()) and remote.stats().finished.get("abort", 0) >= 5)
    assert remote.stats().num_free_blocks == before.num_free_blocks
    again = await remote.agenerate(PROMPT, GREEDY, request_id="same")
    assert len(again.token_ids) == 24


async def test_counters_come_while_it_works(remote: RemoteEngine) -> None:
    stream = remote.stream(PROMPT, ENDLESS)
    await until(lambda: remote.stats().num_running == 1)
    await stream.aclose()
    await until(lambda: at_rest(remote.stats()))


async def test_a_gguf_engine_is_the_same_until_it_is_killed(tmp_path: Path) -> None:
    path = write_toy_gguf(tmp_path / "toy.gguf", CONFIG)
    settings = {**SETTINGS, "max_queued_requests": 4, "seed": 5}
    unseeded = SamplingParams(temperature=1.0, max_tokens=10, ignore_eos=True)
    with InferenceEngine(str(path), **settings) as engine:
        expected = [(await engine.agenerate("the hedge", unseeded)).text for _ in range(2)]
        tokens = engine.tokenize("the hedge <|im_start|>")
    engine = RemoteEngine(str(path), **settings)
    assert [(await engine.agenerate("the hedge", unseeded)).text for _ in range(2)] == expected
    assert engine.tokenize("the hedge <|im_start|>") == tokens
    streams = [engine.stream(PROMPT, ENDLESS) for _ in range(4)]
    with pytest.raises(EngineOverloadedError, match="max_queued_requests"):
        engine.stream(PROMPT, ENDLESS)
    await asyncio.gather(*(anext(stream) for stream in streams))

    deaths: list[bool] = []
    engine.add_death_callback(lambda: deaths.append(engine.is_alive))
    os.kill(engine.pid, signal.SIGKILL)
    for stream in streams:
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            _ = [piece async for piece in stream]
    assert not engine.is_alive
    await until(lambda: deaths == [False])
    await until(lambda: gone(engine.pid))  # before it is closed
    engine.add_death_callback(lambda: deaths.append(True))
    assert deaths == [False, True]
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        engine.stream(PROMPT, GREEDY)
    with pytest.raises(EngineDeadError):
        engine.check_structured_outputs(StructuredOutputsParams(regex="a"))
    folder = engine._process._folder
    engine.close()
    engine.close()
    assert not os.path.exists(folder)
    with pytest.raises(EngineDeadError, match="closed"):
        engine.stats()


def test_who_waits_for_the_process_hears_what_it_is_at(toy_model: Path) -> None:
    told: list[Progress] = []
    with heard_by(told.append), RemoteEngine(str(toy_model), max_model_len=64):
        pass
    assert [each.done for each in told if each.what == "loading the weights"][-1] > 0
    assert told[-1].what == "preparing the steps"


async def test_an_encoder_and_an_orderly_end(tmp_path: Path) -> None:
    path = write_toy_encoder(tmp_path / "encoder")
    with InferenceEngine(str(path), threads=1) as engine:
        expected = [each.embedding for each in await engine.aembed(["one", "two"])]
    engine = RemoteEngine(str(path), threads=1)
    try:
        for one, other in zip(await engine.aembed(["one", "two"]), expected, strict=True):
            np.testing.assert_allclose(one.embedding, other, rtol=1e-4, atol=1e-6)
        with pytest.raises(InvalidParameterError, match="generates no text"):
            engine.stream("x")
        with pytest.raises(RequestError):
            engine.apply_chat_template([{"role": "user", "content": "x"}])
        deaths: list[bool] = []
        engine.add_death_callback(lambda: deaths.append(True))
        os.kill(engine.pid, signal.SIGTERM)  # meant for the server, which ends it when its answers are finished
        os.kill(engine.pid, signal.SIGINT)
        assert len(await engine.aembed(["three"])) == 1
    finally:
        folder, pid = engine._process._folder, engine.pid
        engine.close()
    assert engine._process._popen.returncode == 0  # it was asked and ended, and was not killed
    assert not os.path.exists(folder)
    assert gone(pid)
    assert not engine.is_alive
    assert deaths == []
    engine.close()


async def test_closing_ends_running_streams(toy_model: Path) -> None:
    engine = RemoteEngine(str(toy_model), **SETTINGS)
    stream = engine.stream(PROMPT, ENDLESS)
    await anext(stream)
    await asyncio.to_thread(engine.close)
    pieces = [piece async for piece in stream]
    assert pieces[-1].finish_reason == FinishReason.ABORT
    with pytest.raises(EngineDeadError, match="closed"):
        engine.tokenize("x")


def test_a_model_that_cannot_be_loaded_raises_the_same_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[str] = []
    make_folder = tempfile.mkdtemp

    def noted(**given: str) -> str:
        folders.append(make_folder(**given))
        return folders[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", noted)
    for make in (InferenceEngine, RemoteEngine):
        with pytest.raises(ModelNotFoundError) as caught:
            make(str(tmp_path / "nothing.gguf"))
        with pytest.raises(ConfigError):
            make("model", block_size=7)
        assert str(tmp_path / "nothing.gguf") in str(caught.value)
    assert folders
    assert not [folder for folder in folders if os.path.exists(folder)]


def test_errors_keep_their_class(remote: RemoteEngine) -> None:
    with pytest.raises(ChatTemplateError):
        remote.apply_chat_template([{"role": "user", "content": "x"}], documents=[{"title": "a", "text": "b"}])
    with pytest.raises(PromptTooLongError):
        remote.tokenize("x" * 10_000_000)


def test_a_chat_of_another_process(remote: RemoteEngine) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    answer = remote.chat(messages, params)
    assert answer.prompt == remote.apply_chat_template(messages)
    assert asyncio.run(remote.achat(messages, params)).token_ids == answer.token_ids
    with pytest.raises(TypeError, match="chat has no argument 'foo'"):
        remote.chat(messages, params, foo=1)


def test_a_reset_of_the_prefix_cache_reaches_the_process(remote: RemoteEngine) -> None:
    prompt, params = list(range(3, 150)), SamplingParams(max_tokens=2, temperature=0)
    first = remote.generate([prompt], params, use_tqdm=False)[0]
    second = remote.generate([prompt], params, use_tqdm=False)[0]
    remote.reset_prefix_cache()
    third = remote.generate([prompt], params, use_tqdm=False)[0]
    assert (first.num_cached_tokens == 0, second.num_cached_tokens > 0, third.num_cached_tokens) == (True, True, 0)
    assert first.outputs[0].token_ids == third.outputs[0].token_ids
