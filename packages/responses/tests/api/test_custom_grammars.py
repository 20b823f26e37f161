# SPDX-License-Identifier: MIT
"""Custom tools with a grammar: a random model writes nothing else, and a grammar that is none is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core import EngineConfig, InferenceEngine
from candle_vllm.core.errors import RequestError
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from candle_vllm.openai import OpenAIAdapter
from candle_vllm.openai.remarks import collect_remarks
from candle_vllm.responses.api.responder import Responder
from candle_vllm.responses.conversation.chat_model import InProcessModel

LINES = 'start: "begin" LF line+ "end"\nline: "+" /[^\\nx]{0,4}/ LF\n%import common.LF'


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceEngine]:
    folder: Path = write_toy_model(tmp_path_factory.mktemp("toy") / "toy", toy_config(max_position_embeddings=2048))
    with InferenceEngine(EngineConfig(model=str(folder), threads=1)) as made:
        yield made


async def called(engine: InferenceEngine, definition: str, *, parser: str = "hermes", seed: int = 0) -> Any:
    tool = {"type": "custom", "name": "c", "format": {"type": "grammar", "syntax": "lark", "definition": definition}}
    responder = Responder(InProcessModel(OpenAIAdapter(engine, tool_parser=parser)))
    body: dict[str, Any] = {"input": "x", "tools": [tool], "tool_choice": {"type": "custom", "name": "c"}}
    response = await responder.create({**body, "max_output_tokens": 1500, "seed": seed, "temperature": 1.0})
    return next(item for item in response.output if item.__struct_config__.tag == "custom_tool_call")


@pytest.mark.parametrize("parser", ["hermes", "mistral", "qwen3_coder", "glm45", "pythonic"])
async def test_the_input_of_a_call_fits_the_grammar(engine: InferenceEngine, parser: str) -> None:
    calls = [await called(engine, LINES, parser=parser, seed=seed) for seed in range(3)]
    whole = [call.input for call in calls if call.status == "completed"]
    assert whole
    for text in whole:
        assert re.fullmatch(r"begin\n(\+[^\nx]{0,4}\n)+end", text), text


async def test_a_grammar_that_a_format_cannot_hold_is_shown_and_the_client_told(engine: InferenceEngine) -> None:
    told = collect_remarks()
    nested = 'start: "(" start ")" | "a"'
    tool = {"type": "custom", "name": "c", "format": {"type": "grammar", "syntax": "lark", "definition": nested}}
    responder = Responder(InProcessModel(OpenAIAdapter(engine, tool_parser="glm45")))
    await responder.create({"input": "x", "tools": [tool], "max_output_tokens": 4})
    assert any("'c' is not constrained by its grammar" in text for text in told)


@pytest.mark.parametrize("definition", ["start: (", "begin: /a/", 'start: "a" other'])
async def test_a_grammar_that_is_none_is_refused_by_name(engine: InferenceEngine, definition: str) -> None:
    with pytest.raises(RequestError) as caught:
        await called(engine, definition)
    assert caught.value.param == "tools.0.format.definition"


CHAT_CHOICES: list[Any] = [
    {"type": "custom", "custom": {"name": "c"}},
    {"type": "allowed_tools",
     "allowed_tools": {"mode": "required", "tools": [{"type": "custom", "custom": {"name": "c"}}]}},
]  # fmt: skip


@pytest.mark.parametrize("choice", CHAT_CHOICES, ids=["named", "allowed"])
@pytest.mark.parametrize(
    ("grammar", "fits"),
    [({"syntax": "lark", "definition": LINES}, r"begin\n(\+[^\nx]{0,4}\n)+end"),
     ({"syntax": "regex", "definition": "[ab]{3}\n?[cd]"}, r"[ab]{3}\n?[cd]")],
    ids=["lark", "regex"],
)  # fmt: skip
async def test_chat_requests_have_them_too(engine: InferenceEngine, choice: Any, grammar: Any, fits: str) -> None:
    custom = {"name": "c", "format": {"type": "grammar", "grammar": grammar}}
    tools = [{"type": "custom", "custom": custom}, {"type": "function", "function": {"name": "f"}}]
    adapter = OpenAIAdapter(engine, tool_parser="hermes")
    texts: list[str] = []
    for seed in range(3):
        asked = {"messages": "x", "tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
        answer = await adapter.chat({**asked, "max_tokens": 1500, "seed": seed, "temperature": 1.0})
        (one,) = answer.choices
        if one.finish_reason == "tool_calls":
            texts += [call.custom.input for call in one.message.tool_calls]
    assert texts
    assert all(re.fullmatch(fits, text) for text in texts), texts
