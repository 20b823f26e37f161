# SPDX-License-Identifier: MIT
"""Stop strings in whole and streamed answers of every API: they end the answer, not thoughts or a call before it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.openai import OpenAIAdapter, to_json_bytes
from candle_vllm.openai.anthropic import MessagesAdapter
from candle_vllm.openai.ollama import OllamaAdapter, ollama_parser
from candle_vllm.openai.ollama.request import ChatRequest

ASK = [{"role": "user", "content": "Where?"}]
PARAMETERS = {"type": "object", "properties": {"text": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "say", "parameters": PARAMETERS}}
CALL = '<tool_call>\n{"name": "say", "arguments": {"text": "The sea. It is\\n\\nblue."}}\n</tool_call>'
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_MARK = re.compile("(" + "|".join(MARKS) + ")")
THOUGHTS = "Paris is the capital. Or\n\nis it?"


class Opening(ScriptedEngine):
    """An engine whose template opens the thoughts."""

    def render_messages(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        return super().render_messages(messages, **options) + "<think>\n"


def engine(script: str, *, special: bool, opened: bool) -> ScriptedEngine:
    text = script if opened else f"<think>\n{script}"
    steps = [one for part in _MARK.split(text) for one in ([part] if part in MARKS else part)]
    return (Opening if opened else ScriptedEngine)(steps, special_tokens=MARKS if special else ())


def adapter(made: ScriptedEngine) -> OpenAIAdapter:
    return OpenAIAdapter(made, reasoning_parser="think", tool_parser="hermes")


async def chat(made: ScriptedEngine, stop: list[str]) -> tuple[str, str, list[str], str, Any]:
    request = {"messages": ASK, "stop": stop, "tools": [TOOL]}
    choice = json.loads(to_json_bytes(await adapter(made).chat(request)))["choices"][0]
    said, calls = choice["message"], choice["message"].get("tool_calls") or []
    whole = (
        said["content"] or "", said.get("reasoning_content") or "", [one["function"]["arguments"] for one in calls],
        choice["finish_reason"], choice["stop_reason"],
    )  # fmt: skip
    texts: dict[str, list[str]] = {"content": [], "reasoning_content": [], "arguments": []}
    ended: dict[str, Any] = {}
    async for chunk in await adapter(made).chat_stream({**request, "stream": True}):
        for one in json.loads(to_json_bytes(chunk))["choices"]:
            for name in ("content", "reasoning_content"):
                texts[name].append(one["delta"].get(name) or "")
            for call in one["delta"].get("tool_calls") or ():
                texts["arguments"].append(call["function"].get("arguments") or "")
            ended = one if one["finish_reason"] else ended
    content, thoughts, arguments = map("".join, texts.values())
    assert (content, thoughts, arguments) == (whole[0], whole[1], "".join(whole[2]))
    assert (ended["finish_reason"], ended["stop_reason"]) == whole[3:]
    return whole


@pytest.mark.parametrize("opened", [False, True], ids=["opens", "opened"])
@pytest.mark.parametrize("special", [False, True], ids=["text", "special"])
async def test_the_answer_ends_and_not_the_thoughts(special: bool, opened: bool) -> None:
    made = engine(f"{THOUGHTS}\n</think>\n\nParis. It is.\n\nYes.", special=special, opened=opened)
    for stop, content in (
        (["."], "Paris"),
        (["\n\n"], "Paris. It is."),
        (["\n"], "Paris. It is."),
        (["<", "think", ">"], "Paris. It is.\n\nYes."),
        (["capital", "It", "Yes"], "Paris. "),
    ):
        text, thoughts, _, reason, found = await chat(made, stop)
        assert (text, thoughts, reason) == (content, THOUGHTS, "stop"), stop
        assert found in (stop if content != "Paris. It is.\n\nYes." else [None])


@pytest.mark.parametrize("special", [False, True], ids=["text", "special"])
async def test_a_call_is_whole_and_the_text_behind_it_ends(special: bool) -> None:
    made = engine(f"{THOUGHTS}</think>Look!\n{CALL}\nDone. Bye.", special=special, opened=True)
    arguments = '{"text": "The sea. It is\\n\\nblue."}'
    for stop, content in ((["sea"], "Look!\nDone. Bye."), (["."], "Look!\nDone"), (['"', "<"], "Look!\nDone. Bye.")):
        text, _, calls, reason, _ = await chat(made, stop)
        assert (text, calls, reason) == (content, [arguments], "tool_calls"), stop
    text, _, calls, reason, found = await chat(made, ["!"])
    assert (text, calls, reason, found) == ("Look", [], "stop", "!")


async def test_every_api_ends_the_answer() -> None:
    made = engine(f"{THOUGHTS}</think>\n\nParis. It is.", special=True, opened=True)
    fields = {"model": "m", "max_tokens": 500, "messages": ASK, "stop_sequences": ["."]}
    fields["thinking"] = {"type": "adaptive"}
    message = json.loads(to_json_bytes(await MessagesAdapter(adapter(made)).create(fields)))
    assert [one.get("text") or one.get("thinking") for one in message["content"]] == [THOUGHTS, "Paris"]
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", ".")

    request = {"model": "m", "messages": ASK, "stream": False, "options": {"stop": ["."]}}
    line = json.loads(to_json_bytes(await OllamaAdapter(adapter(made)).chat(ollama_parser(ChatRequest)(request))))
    assert (line["message"]["content"], line["message"]["thinking"]) == ("Paris", THOUGHTS)


async def test_every_choice_ends_where_it_has_to() -> None:
    made = engine(f"{THOUGHTS}</think>Paris. It is.", special=True, opened=True)
    answer = json.loads(to_json_bytes(await adapter(made).chat({"messages": ASK, "stop": ".", "n": 3})))
    assert [one["message"]["content"] for one in answer["choices"]] == ["Paris"] * 3
    assert {one["message"]["reasoning_content"] for one in answer["choices"]} == {THOUGHTS}


async def test_without_a_reader_of_thoughts_every_text_is_the_answer() -> None:
    made = ScriptedEngine(f"<think>{THOUGHTS}</think>Paris.", chat_template=None)
    plain = OpenAIAdapter(made, reasoning_parser="none", tool_parser="none")
    answer = json.loads(to_json_bytes(await plain.chat({"messages": ASK, "stop": "."})))
    assert answer["choices"][0]["message"]["content"] == "<think>Paris is the capital"
    answer = json.loads(
        to_json_bytes(await adapter(made).complete({"prompt": "Where?", "stop": ".", "max_tokens": 99}))
    )
    assert answer["choices"][0]["text"] == "<think>Paris is the capital"


async def test_a_stop_string_before_min_tokens_and_one_that_is_shown() -> None:
    made = engine("Hm.</think>A. B. C.", special=True, opened=True)
    for fields, content in (({"min_tokens": 8}, "A. B"), ({"include_stop_str_in_output": True}, "A.")):
        answer = json.loads(to_json_bytes(await adapter(made).chat({"messages": ASK, "stop": ".", **fields})))
        assert answer["choices"][0]["message"]["content"] == content
