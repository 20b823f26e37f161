# SPDX-License-Identifier: MIT
"""`suffix` of text completions: what an editor sends, what the model is given, and what is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from candle_vllm.core.errors import RequestError
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.openai import OpenAIAdapter
from candle_vllm.openai.protocol.completions import Completion

QWEN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
# As Continue asks for the text between two others, where it does not write the marks itself.
CONTINUE: dict[str, Any] = {
    "model": "scripted",
    "prompt": "def add(a, b):\n    return ",
    "suffix": "\n\nprint(add(1, 2))\n",
    "max_tokens": 256,
    "temperature": 0.01,
    "stop": ["/src/", "#- coding: utf-8", "```"],
    "stream": True,
}
# And as it writes them itself, for a model of Qwen's.
TEMPLATED: dict[str, Any] = {
    "model": "scripted",
    "prompt": "<|fim_prefix|>def add(a, b):\n    return <|fim_suffix|>\n\nprint(add(1, 2))\n<|fim_middle|>",
    "max_tokens": 256,
    "temperature": 0.01,
    "stop": [*QWEN, "<|endoftext|>", "/src/", "#- coding: utf-8", "```"],
    "stream": True,
}


def complete(engine: ScriptedEngine, body: dict[str, Any]) -> list[str]:
    """The texts of the choices."""

    async def run() -> list[str]:
        adapter = OpenAIAdapter(engine)
        if not body.get("stream"):
            return [choice.text for choice in (await adapter.complete(body)).choices]
        chunks: list[Completion] = [chunk async for chunk in await adapter.complete_stream(body)]
        return ["".join(choice.text for chunk in chunks for choice in chunk.choices)]

    return asyncio.run(run())


def test_an_editor_s_request_is_answered_with_what_belongs_into_the_gap() -> None:
    engine = ScriptedEngine("a + b", special_tokens=QWEN)
    assert complete(engine, CONTINUE) == ["a + b"]
    assert complete(engine, TEMPLATED) == ["a + b"]
    filled, templated = (request.prompt_token_ids for request in engine.requests)
    assert list(filled) == list(templated)
    assert engine.tokenizer.decode(filled, skip_special_tokens=False).endswith("print(add(1, 2))\n<|fim_middle|>")


def test_an_answer_ends_where_another_file_would_begin() -> None:
    engine = ScriptedEngine(["a + b", "<|file_sep|>", "other"], special_tokens=QWEN)
    assert complete(engine, {"prompt": "x = ", "suffix": "\n", "stop_token_ids": [7]}) == ["a + b"]
    stops = engine.requests[-1].params.stop_token_ids
    assert stops is not None
    assert stops[0] == 7
    assert len(stops) == 1 + len(QWEN)


def test_each_prompt_has_its_own_gap() -> None:
    engine = ScriptedEngine("?", special_tokens=QWEN)
    assert complete(engine, {"prompt": ["a", "b"], "suffix": "z", "n": 2}) == ["?"] * 4
    texts = [engine.tokenizer.decode(request.prompt_token_ids) for request in engine.requests]
    assert texts == ["az", "bz"]


@pytest.mark.parametrize("suffix", [None, ""])
def test_nothing_behind_a_prompt_is_a_plain_continuation(suffix: str | None) -> None:
    engine = ScriptedEngine("b", special_tokens=QWEN)
    complete(engine, {"prompt": "a", "suffix": suffix})
    assert engine.tokenizer.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False) == "<|bos|>a"


@pytest.mark.parametrize(
    ("body", "marks", "param", "text"),
    [
        ({"suffix": "z"}, (), "suffix", "cannot fill in the middle"),
        ({"suffix": "z", "echo": True}, QWEN, "echo", "cannot be combined with suffix"),
        ({"suffix": "z", "truncate_prompt_tokens": 2}, QWEN, "truncate_prompt_tokens", "combined with suffix"),
        ({"suffix": "z", "truncate_prompt_tokens": 0}, QWEN, "truncate_prompt_tokens", "combined with suffix"),
        ({"suffix": 5}, QWEN, "suffix", "must be a string"),
        ({"suffix": "z" * 5000}, QWEN, "max_tokens", "tokens"),
        ({"suffix": "z", "prompt": [5000]}, QWEN, "prompt", "out of vocabulary"),
    ],
)
def test_what_cannot_be_filled_in_is_refused_by_name(
    body: dict[str, Any], marks: tuple[str, ...], param: str, text: str
) -> None:
    with pytest.raises(RequestError, match=text) as caught:
        complete(ScriptedEngine(special_tokens=marks), {"prompt": "a", **body})
    assert caught.value.param == param


def test_chat_has_no_suffix() -> None:
    with pytest.raises(RequestError, match="/v1/completions") as caught:
        asyncio.run(
            OpenAIAdapter(ScriptedEngine()).chat({"messages": [{"role": "user", "content": "a"}], "suffix": "b"})
        )
    assert caught.value.param == "suffix"
