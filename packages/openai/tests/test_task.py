# SPDX-License-Identifier: MIT
"""The library's chat and the adapter give a template the same messages."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.core.text.chat_template import ChatTemplate
from candle_vllm.core.text.prompts import one_conversation
from candle_vllm.core.text.prompts import template_messages as of_core
from candle_vllm.core.text.template_needs import TemplateNeeds, TemplateProbe, fit, fit_tools, template_needs
from candle_vllm.openai import OpenAIAdapter
from candle_vllm.openai.protocol.chat import ChatCompletionRequest
from candle_vllm.openai.protocol.fields import Cut
from candle_vllm.openai.requests import read_chat
from candle_vllm.openai.task import Call, Message, Paths, Task, template_messages

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {"role": "user", "content": "c"},
    {
        "role": "assistant",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}},
            {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": ""}},
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "1"},
    {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "2"}]},
    {"role": "assistant", "content": "d", "refusal": "e", "reasoning_content": "f"},
    {"role": "assistant", "content": "d2", "reasoning_content": "f2"},
    {"role": "user", "content": "g", "name": "h"},
    {"role": "user", "content": "g2", "name": "i"},
    {"role": "system", "content": "j"},
    {
        "role": "assistant",
        "content": "k",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": "y'}},
            {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": "[]"}},
        ],
    },
    {"role": "tool", "tool_call_id": "call_2", "content": "2"},
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "1"}, IMAGE]},
    {"role": "user", "content": [{"type": "text", "text": "l"}, IMAGE]},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "m"},
    {"role": "system", "content": "n"},
]
FIELDS = {field.name: not field.default for field in dataclasses.fields(TemplateNeeds)}


@pytest.mark.parametrize("fields", [(), *((name,) for name in FIELDS), *itertools.combinations(FIELDS, 2)])
def test_both_write_the_same(fields: tuple[str, ...]) -> None:
    needs = TemplateNeeds(**{name: FIELDS[name] for name in fields})
    task = read_chat(ChatCompletionRequest.model_validate({"model": "m", "messages": MESSAGES}))
    theirs = template_messages(task.messages, needs)
    ours = of_core(one_conversation(MESSAGES, sees=True))
    fit(ours, needs)
    assert ours == theirs
    again = of_core(theirs)  # what is adapted already stays
    fit(again, needs)
    assert again == theirs
    parts = [(one["role"], part["type"]) for one in ours if isinstance(one["content"], list) for part in one["content"]]
    images = [role for role, kind in parts if kind == "image"]
    assert len(images) == 2
    assert "images_in_results" not in fields or images == ["user", "user"]


def test_what_fits_stays() -> None:
    task = read_chat(ChatCompletionRequest.model_validate({"model": "m", "messages": MESSAGES[:6]}))
    assert template_messages(task.messages, TemplateNeeds()) == template_messages(task.messages)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": True}}}}]
    assert fit_tools(tools, TemplateNeeds()) == tools


def test_each_call_has_its_own_result() -> None:
    messages = of_core(one_conversation(MESSAGES[10:13], sees=True))
    fit(messages, TemplateNeeds(parallel_calls=False, content_beside_calls=False))
    assert [one.get("tool_call_id") or one.get("tool_calls", [{}])[0].get("id") for one in messages] == [
        None, "call_2", "call_2", "call_1", "call_1",
    ]  # fmt: skip
    parts = [{"type": "text", "text": "1"}, {"type": "image"}]
    assert [one["content"] for one in messages] == ["k", "", "2", "", parts]  # images stay in their order


async def test_results_are_shown_in_the_order_of_their_calls() -> None:
    """A template that shows no ids gives the model no other way to tell the results apart."""

    def answer(*ids: str) -> dict[str, Any]:
        calls = [{"id": one, "type": "function", "function": {"name": one, "arguments": "{}"}} for one in ids]
        return {"role": "assistant", "content": "", "tool_calls": calls}

    def results(*ids: str) -> list[dict[str, Any]]:
        return [{"role": "tool", "tool_call_id": one, "content": one} for one in ids]

    user = {"role": "user", "content": "x"}
    messages = [
        user,
        answer("a", "b", "c"),
        *results("c", "a", "b"),
        answer("b"),
        answer("a"),
        *results("a", "b"),
        user,
    ]
    engine = ScriptedEngine("ok")
    await OpenAIAdapter(engine).chat({"messages": messages})
    shown = [one["content"] for one in engine.template_calls[-1].messages if one["role"] == "tool"]
    assert shown == ["a", "b", "c", "b", "a"]
    one, other = Call("a", "f", ""), Call("b", "f", "")
    ids = (None, "b", None, "a")
    loose = (Message(role="assistant", calls=(one, other)), *(Message(role="tool", call_id=each) for each in ids))
    ordered = Task(paths=Paths({}), messages=loose).with_results_in_order()
    assert [message.call_id for message in ordered.messages[1:]] == ["a", "b", None, None]
    mixed = read_chat(ChatCompletionRequest.model_validate({"model": "m", "messages": MESSAGES}))
    assert [one.call_id for one in mixed.with_results_in_order().messages[11:13]] == ["call_1", "call_2"]
    assert mixed.with_results_in_order().messages[:11] == mixed.messages[:11]


@pytest.mark.parametrize("behind", [True, False])
def test_a_user_has_the_images_that_results_may_not_have(behind: bool) -> None:
    """In their order: the request's images take the marks of a prompt one after the other."""
    first, *others = ({"type": "image", "n": n} for n in range(4))
    text = {"type": "text", "text": "a"}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [text, first]},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": [text, others[0]]},
        {"role": "tool", "content": [others[1]]},
        {"role": "user", "content": [text, others[2]]},
        {"role": "assistant", "content": "b"},
    ]
    shown, early = messages[:4], messages[1:4]
    fit(messages, TemplateNeeds(images_in_results=False, user_behind_results=behind))
    said = "[an image, which is in a message of the user]"
    results = [one["content"] for one in messages if one["role"] == "tool"]
    users = [one["content"] for one in messages if one["role"] == "user"]
    if behind:
        assert results == [f"a\n{said}", said]
        assert users == [[text, first], [*others[:2], text, others[2]]]
    else:
        assert results == [f"a\n{said}", f"{said}\na\n{said}"]
        assert users == [[text, first, *others]]
    for given, last in ((shown, [*others[:2]]), (early, others[:2])):
        fit(given, TemplateNeeds(images_in_results=False, user_behind_results=behind))
        assert [one for one in given if one["role"] == "user"][-1]["content"][-2:] == last
        assert (given[-1]["role"] == "user") is (behind or given is early)


@pytest.mark.parametrize(
    ("around", "prompt", "left", "right"),
    [
        ([], [1, 2, 3, 4, 5], [3, 4, 5], [1, 2, 3]),
        ([101, 102], [101, 1, 2, 3, 102], [101, 3, 102], [101, 1, 102]),  # [CLS] and [SEP]
        ([101], [101, 1, 2, 3, 4], [101, 3, 4], [101, 1, 2]),
        ([102], [1, 2, 3, 4, 102], [3, 4, 102], [1, 2, 102]),
        ([101, 102, 103], [101, 1, 2, 102, 103], [101, 102, 103], [101, 102, 103]),
        ([101, 102, 103, 104], [101, 102, 1, 103, 104], [1, 103, 104], [101, 102, 1]),  # no place for all of them
        ([101], [1, 2, 3, 4, 5], [3, 4, 5], [1, 2, 3]),  # a text without it
    ],
)
def test_special_tokens_around_a_text_remain(
    around: list[int], prompt: list[int], left: list[int], right: list[int]
) -> None:
    assert list(Cut(3, "left").of(prompt, 9, around)) == left
    assert list(Cut(3, "right").of(prompt, 9, around)) == right
    assert list(Cut(5).of(prompt, 9, around)) == list(Cut(-1).of(prompt, 5, around)) == prompt


def test_schemas_that_macros_of_templates_take() -> None:
    properties = {
        "a": True,
        "b": {"type": ["integer", "string", "null"]},
        "c": {"type": "array", "items": {"type": "null"}},
        "d": {"type": "object"},
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}]
    needs = TemplateNeeds(bare_tools=False, bare_schemas=False, odd_schemas=False)
    (tool,) = fit_tools(tools, needs)
    assert tool["function"] == {
        "name": "f",
        "description": "",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"description": ""},
                "b": {"type": "integer", "nullable": True, "description": "(integer or string)"},
                "c": {"type": "array", "items": {"type": "string", "nullable": True}, "description": ""},
                "d": {"type": "object", "description": "", "additionalProperties": {}},
            },
        },
    }
    assert fit_tools([tool], needs) == [tool]
    (tool,) = fit_tools(tools, TemplateNeeds(bare_schemas=False))
    assert tool["function"]["parameters"]["properties"]["a"] is True
    assert tools[0]["function"]["parameters"] == {"properties": properties}  # type: ignore[index]
    parameters = {"properties": {"n": {"type": ["integer", "string"], "description": 5}}}
    (tool,) = fit_tools([{"function": {"name": "f", "parameters": parameters}}], TemplateNeeds(odd_schemas=False))
    assert tool["function"]["parameters"]["properties"]["n"]["description"] == "5 (integer or string)"


def test_texts_of_merged_messages_stay_apart_beside_an_image() -> None:
    image, text = {"type": "image"}, {"type": "text", "text": "What?"}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello."},
        {"role": "user", "content": [text, image, text]},
        {"role": "user", "content": ["And?", image]},
    ]
    fit(messages, TemplateNeeds(writes_system=False))
    first, last = ({"type": "text", "text": said} for said in ("Be kind.\n\nHello.\nWhat?", "What?\nAnd?"))
    assert messages == [{"role": "user", "content": [first, image, last, image]}]


PARTS = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ '<i>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}{% endfor %}"
)
TEXTS = "{% for m in messages %}{{ m.content + '' }}{% endfor %}"
TEXTS_WITH_TOOLS = "{% if tools %}{% for m in messages %}{{ m.content }}{% endfor %}{% else %}" + PARTS + "{% endif %}"


@pytest.mark.parametrize(("template", "takes"), [(PARTS, True), (TEXTS, False), (TEXTS_WITH_TOOLS, False)])
def test_images_are_texts_where_a_template_takes_no_parts(template: str, takes: bool) -> None:
    text, image = {"type": "text", "text": "a"}, {"type": "image"}
    messages: list[dict[str, Any]] = [{"role": "user", "content": [text, image, text]}]
    fit(messages, template_needs(TemplateProbe(ChatTemplate(template, {}))), "<i>")
    assert messages[0]["content"] == ([text, image, text] if takes else "a<i>a")


def test_a_template_that_gathers_system_messages_does_not_take_them_where_they_stand() -> None:
    """A new one would change the prompt's head, and nothing of the conversation would be found in the cache."""
    each = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ tools or '' }}"
    gathered = (
        "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
        "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ tools or '' }}"
    )
    assert template_needs(TemplateProbe(ChatTemplate(each, {}))).system_anywhere
    assert not template_needs(TemplateProbe(ChatTemplate(gathered, {}))).system_anywhere
