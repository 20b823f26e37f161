# SPDX-License-Identifier: MIT
"""`prediction` of chat requests, and counts of guesses: checked, told of in usage, and without effect on the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from candle_vllm.core import InferenceEngine
from candle_vllm.core.errors import RequestError
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from candle_vllm.openai import OpenAIAdapter, to_dict
from candle_vllm.openai.llama_server import LlamaCompletionRequest, llama_answer
from candle_vllm.openai.protocol.usage import CompletionTokensDetails
from packages.core.tests.engine.drafted import same_times

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Why?"}]}


def answer(engine: ScriptedEngine, **fields: Any) -> dict[str, Any]:
    made = to_dict(asyncio.run(OpenAIAdapter(engine, reasoning_parser="none").chat({**ASK, **fields})))
    ChatCompletion.model_validate(made)
    return made


@pytest.mark.parametrize("content", ["Because.", [{"type": "text", "text": "Bec"}, {"type": "text", "text": "ause."}]])
def test_a_prediction_changes_no_token(content: Any) -> None:
    engine = ScriptedEngine("Because.")
    predicted = answer(engine, prediction={"type": "content", "content": content}, seed=1)
    assert "rejected_prediction_tokens" in predicted["usage"]["completion_tokens_details"]
    plain = answer(engine, seed=1)
    assert "completion_tokens_details" not in plain["usage"]
    assert plain["choices"] == predicted["choices"]
    assert engine.requests[0].prompt_token_ids == engine.requests[1].prompt_token_ids
    assert engine.requests[0].params.prediction == "Because."


@pytest.fixture(scope="module")
def guessing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceEngine]:
    folder = write_toy_model(tmp_path_factory.mktemp("toy") / "toy", toy_config())
    with InferenceEngine(folder, threads=1, max_model_len=512, speculative_config={"method": "ngram"}) as engine:
        yield engine


FIXED: dict[str, Any] = {
    **ASK,
    "seed": 7,
    "temperature": 1.5,
    "max_completion_tokens": 40,
    "ignore_eos": True,
    "allowed_token_ids": list(range(97, 123)),  # letters, of which each is a token of its own
}


async def test_usage_tells_what_of_a_prediction_stands_in_the_answer(guessing: InferenceEngine) -> None:
    adapter = OpenAIAdapter(guessing, reasoning_parser="none")
    text = (await adapter.chat(FIXED)).choices[0].message.content
    assert text is not None
    for predicted, found in ((text, 40), (text[:25], 25), (text[:10] + "?!" + text[12:] + "???", 38), ("?" * 9, 0)):
        for more in ({}, {"return_draft_counts": True}, {"num_speculative_tokens": 0, "return_draft_counts": True}):
            prediction = {"type": "content", "content": predicted}
            made = to_dict(await adapter.chat({**FIXED, "prediction": prediction, **more}))
            ChatCompletion.model_validate(made)
            assert made["choices"][0]["message"]["content"] == text
            told = made["usage"]["completion_tokens_details"]
            accepted = told.pop("accepted_prediction_tokens")
            assert found - 4 <= accepted <= found  # it may be looked for in a wrong place for a token or two
            assert accepted == found or "!" in predicted
            assert told.pop("rejected_prediction_tokens") == len(predicted) - accepted
            assert made["usage"]["completion_tokens"] == 40
            assert told.pop("reasoning_tokens") == 0
            assert bool(told) == bool(more)
            if "num_speculative_tokens" in more:
                assert told == {"draft_tokens": 0, "accepted_draft_tokens": 0}
            elif more:
                assert told["draft_tokens"] >= told["accepted_draft_tokens"] >= 0
    both = (await adapter.chat({**FIXED, "n": 2, "prediction": {"type": "content", "content": text}})).usage
    details = both.completion_tokens_details
    assert isinstance(details, CompletionTokensDetails)
    accepted, rejected = details.accepted_prediction_tokens, details.rejected_prediction_tokens
    assert isinstance(accepted, int)
    assert isinstance(rejected, int)
    assert accepted + rejected == 80  # of every choice


@pytest.fixture
def tries_all(guessing: InferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert guessing._engine is not None
    assert guessing._engine._drafter is not None
    monkeypatch.setattr(guessing._engine._drafter, "times", same_times)


@pytest.mark.usefixtures("tries_all")
async def test_the_counts_of_guesses_are_told_where_they_are_asked_for(guessing: InferenceEngine) -> None:
    adapter = OpenAIAdapter(guessing, reasoning_parser="none")
    text = (await adapter.chat(FIXED)).choices[0].message.content
    before = guessing.stats()
    told = {"return_draft_counts": True, "prediction": {"type": "content", "content": text}}
    usage = to_dict(await adapter.chat({**FIXED, **told}))["usage"]["completion_tokens_details"]
    after = guessing.stats()
    assert usage["accepted_draft_tokens"] == after.accepted_draft_tokens - before.accepted_draft_tokens > 25
    assert usage["draft_tokens"] == after.draft_tokens - before.draft_tokens
    chunks = [to_dict(chunk) async for chunk in await adapter.chat_stream(
        {**FIXED, **told, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    )]  # fmt: skip
    assert chunks[-1]["usage"]["completion_tokens_details"].keys() == usage.keys()
    assert all("completion_tokens_details" not in chunk["usage"] for chunk in chunks[:-1])

    form = {"properties": {"name": {"enum": ["a long name"]}}, "required": ["name"], "additionalProperties": False}
    ask = {"prompt": "x", "temperature": 0.0, "max_tokens": 60, "structured_outputs": {"json": form}}
    plain = to_dict(await adapter.complete(ask))
    counted = to_dict(await adapter.complete({**ask, "return_draft_counts": True}))
    assert plain["choices"] == counted["choices"]
    assert "completion_tokens_details" not in plain["usage"]
    assert counted["usage"]["completion_tokens_details"]["accepted_draft_tokens"] > 0

    asked = {"prompt": "x", "temperature": 0.0, "n_predict": 60, "json_schema": form}
    times = to_dict(await llama_answer(adapter, LlamaCompletionRequest.model_validate(asked)))["timings"]
    assert times["draft_n"] >= times["draft_n_accepted"] > 0
    none = await llama_answer(adapter, LlamaCompletionRequest.model_validate({**asked, "speculative.n_max": 0}))
    assert "draft_n" not in to_dict(none)["timings"]


@pytest.mark.parametrize(
    ("prediction", "param"),
    [
        ({"content": "x"}, "prediction.type"),
        ({"type": "text", "content": "x"}, "prediction.type"),
        ({"type": "content"}, "prediction.content"),
        ({"type": "content", "content": 5}, "prediction.content"),
        ({"type": "content", "content": [{"type": "image_url"}]}, "prediction.content.0.type"),
        ({"type": "content", "content": "x", "speed": 2}, "prediction.speed"),
        ("x", "prediction"),
    ],
)
def test_wrong_predictions_are_refused_by_name(prediction: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        answer(ScriptedEngine(), prediction=prediction)
    assert caught.value.param == param


def test_other_requests_have_none() -> None:
    with pytest.raises(RequestError, match="belongs to chat requests"):
        asyncio.run(OpenAIAdapter(ScriptedEngine()).complete({"prompt": "a", "prediction": {}}))
