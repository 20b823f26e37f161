"""`prediction` of chat requests: checked, told of in usage, and without effect on the answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from candle_vllm.core.errors import RequestError
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.openai import OpenAIAdapter, to_dict

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Why?"}]}


def answer(engine: ScriptedEngine, **fields: Any) -> dict[str, Any]:
    made = to_dict(asyncio.run(OpenAIAdapter(engine, reasoning_parser="none").chat({**ASK, **fields})))
    ChatCompletion.model_validate(made)
    return made


@pytest.mark.parametrize("content", ["Because.", [{"type": "text", "text": "Bec"}, {"type": "text", "text": "ause."}]])
def test_no_token_of_a_prediction_is_tried(content: Any) -> None:
    engine = ScriptedEngine("Because.")
    predicted = answer(engine, prediction={"type": "content", "content": content}, seed=1)
    details = predicted["usage"]["completion_tokens_details"]
    assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (0, 0)
    plain = answer(engine, seed=1)
    assert "completion_tokens_details" not in plain["usage"]
    assert plain["choices"] == predicted["choices"]
    assert engine.requests[0].prompt_token_ids == engine.requests[1].prompt_token_ids


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
