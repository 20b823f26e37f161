# SPDX-License-Identifier: MIT
"""What the chat template gets of Anthropic's requests, and which fields have no effect."""

from __future__ import annotations

import json
from typing import Any

import pytest

from candle_vllm.core.errors import ChatTemplateError, RequestError
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.openai import OpenAIAdapter
from candle_vllm.openai.anthropic import (
    ADVISORY_MESSAGES_FIELDS,
    MessagesAdapter,
    MessagesRequest,
    to_anthropic_error,
)
from candle_vllm.openai.anthropic.turns import read_turns

USE = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": "é"}}
TOOL = {"input_schema": {"type": "object", "properties": {}}, "name": "f", "description": "d"}


WRITES = "{{ m.role }}: {{ m.content }} {% for c in m.tool_calls %}{{ c.function.arguments.values()|list }}{% endfor %}"
EACH = "{% for m in messages %}{% if REFUSED %}{{ raise_exception('no') }}{% endif %}" + WRITES + "{% endfor %}"
OLD = EACH.replace("REFUSED", "m.role == 'system' and not loop.first")
STRICT = EACH.replace("REFUSED", "m.role == 'user' and loop.previtem and loop.previtem.role == 'tool'")


async def rendered(*messages: Any, engine: ScriptedEngine | None = None, **fields: Any) -> list[dict[str, Any]]:
    engine = engine or ScriptedEngine("hello")
    adapter = MessagesAdapter(OpenAIAdapter(engine, tool_parser="hermes"))
    await adapter.create({"model": "default", "max_tokens": 50, "messages": list(messages), **fields})
    return engine.template_calls[-1].messages


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def text(value: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **fields}


def result(content: Any = "done", **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "t1", "content": content, **fields}


async def test_documents_of_text() -> None:
    """A title, what is said of it, and its text, in a question and in a tool's result."""
    plain = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "The sky is blue."}}
    titled = {**plain, "title": "Sky", "context": "From 1990.", "citations": {"enabled": False}}
    blocks = {"type": "document", "source": {"type": "content", "content": [text("a"), text("b")]}}
    assert await rendered(user([plain, text("Why?")])) == [user("The sky is blue.\nWhy?")]
    assert await rendered(user([titled])) == [user("Sky\nFrom 1990.\nThe sky is blue.")]
    assert await rendered(user([blocks])) == [user("a\nb")]
    call = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
    *_, answered = await rendered(user("x"), assistant([call]), user([result([plain])]))
    assert answered["content"] == "The sky is blue."


async def test_system_text_or_blocks() -> None:
    assert await rendered(user("x"), system="s") == [{"role": "system", "content": "s"}, user("x")]
    blocks = [text("s", cache_control={"type": "ephemeral", "scope": "global"}), text("t")]
    assert await rendered(user("x"), system=blocks) == [{"role": "system", "content": "s\nt"}, user("x")]
    for nothing in (None, "", []):
        assert await rendered(user("x"), system=nothing) == [user("x")]


async def test_the_billing_line_does_not_change_the_prompt() -> None:
    prompts = []
    for number in (1, 2):
        billing = f"x-anthropic-billing-header: cc_version=2.1.328.{number}; cch={number};"
        prompts.append(await rendered(user("x"), system=[text(billing), text("You are.")]))
        prompts.append(await rendered(user("x"), system=f"{billing}\nYou are."))
    assert prompts == [[{"role": "system", "content": "You are."}, user("x")]] * 4


async def test_messages_of_one_role_are_merged() -> None:
    assert await rendered(
        user("a"), user([text("b"), text("c")]), assistant("d"), assistant([text("e")]), user("f")
    ) == [
        user("a\nb\nc"),
        assistant("d\ne"),
        user("f"),
    ]


async def test_calls_results_and_thoughts() -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": "anything"}
    hidden = {"type": "redacted_thinking", "data": "xyz"}
    messages = await rendered(
        user("x"), assistant([thought, hidden, text("so"), USE]), user([result([text("1"), text("2")]), text("next")])
    )
    function = {"name": "f", "arguments": {"a": "é"}}
    assert messages == [
        user("x"),
        {
            "role": "assistant",
            "content": "so",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "t1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "t1", "name": "f", "content": "1\n2"},
        user("next"),
    ]


@pytest.mark.parametrize(
    ("block", "shown"),
    [
        (result("no such file", is_error=True), "Error: no such file"),
        (result("Error: no", is_error=True), "Error: no"),
        (result("<tool_use_error>no</tool_use_error>", is_error=True), "<tool_use_error>no</tool_use_error>"),
        (result(None, is_error=True), "Error"),
        (result("ok", is_error=False), "ok"),
        (result(None), ""),
        (result([]), ""),
        (result([{"type": "tool_reference", "tool_name": "g"}]), "Tool: g"),
        ({"type": "tool_result", "tool_use_id": "t1"}, ""),
    ],
)
async def test_results(block: dict[str, Any], shown: str) -> None:
    messages = await rendered(user("x"), assistant([USE]), user([block]))
    assert messages[-1]["content"] == shown


def test_texts_and_images_of_a_result_keep_their_order() -> None:
    image = {"type": "image", "source": {"type": "url", "url": "https://x/a.png"}}

    def shown(*parts: dict[str, Any], **fields: Any) -> list[str]:
        turns, _ = read_turns(None, MessagesRequest.model_validate({
            "model": "m", "max_tokens": 1,
            "messages": [user("x"), assistant([USE]), user([result(list(parts), **fields)])],
        }).messages)  # fmt: skip
        return [getattr(part, "text", "image") for part in turns[-1].message.parts]

    assert shown(text("a"), image, text("b"), image) == ["a", "image", "b", "image"]
    assert shown(image, is_error=True) == ["Error", "image"]
    assert shown(text("no"), image, is_error=True) == ["Error: no", "image"]


async def test_results_of_two_messages_stand_before_what_was_said() -> None:
    other = {**USE, "id": "t2"}
    messages = await rendered(
        user("x"),
        assistant([USE, other]),
        {"role": "system", "content": "between"},
        user([result("1"), text("a")]),
        user([{**result("2"), "tool_use_id": "t2"}, text("b")]),
    )
    assert [(m["role"], m["content"]) for m in messages[2:]] == [
        ("tool", "1"),
        ("tool", "2"),
        ("system", "between"),
        ("user", "a\nb"),
    ]


async def test_text_behind_results_where_the_template_takes_none() -> None:
    turns = (user("x"), assistant([USE]), user([result("1"), text("a")]), user("b"), assistant("c"), user("d"))
    messages = await rendered(*turns, engine=ScriptedEngine("hello", chat_template=STRICT))
    assert [(m["role"], m["content"]) for m in messages[2:]] == [("tool", "1\na\nb"), ("assistant", "c"), ("user", "d")]
    late = {"role": "system", "content": "late"}
    strict = ScriptedEngine("hello", chat_template=STRICT)
    messages = await rendered(*turns[:2], user([result("1")]), late, user("b"), engine=strict)
    assert [(m["role"], m["content"]) for m in messages[2:]] == [("tool", "1"), ("system", "late"), ("user", "b")]


async def test_system_messages_in_the_conversation() -> None:
    late = {"role": "system", "content": [text("late")]}
    first = {"role": "system", "content": "first"}
    assert await rendered(first, user("x"), late, system="s") == [
        {"role": "system", "content": "s\nfirst"},
        user("x"),
        {"role": "system", "content": "late"},
    ]
    engine = ScriptedEngine("hello", chat_template=OLD)
    assert await rendered(first, user("x"), late, user("y"), system="s", engine=engine) == [
        {"role": "system", "content": "s\nfirst"},
        user("x\n<system>\nlate\n</system>\ny"),
    ]


async def test_system_messages_until_the_next_user_message() -> None:
    once = {"role": "system", "content": "once", "clear_at": "next_user_message"}
    assert (await rendered(user("x"), once))[-1] == {"role": "system", "content": "once"}
    assert await rendered(user("x"), once, assistant("y"), user("z")) == [user("x"), assistant("y"), user("z")]
    effort = {"role": "system", "output_config": {"effort": "low"}}
    assert await rendered(user("x"), effort) == [user("x")]


async def test_a_last_assistant_message_is_continued() -> None:
    engine = ScriptedEngine(lambda prompt: "!" if prompt.endswith("assistant\nThe best is (") else "?")
    adapter = MessagesAdapter(OpenAIAdapter(engine))
    body = {"model": "default", "max_tokens": 5, "messages": [user("x"), assistant("The best is (")]}
    assert (await adapter.create(body)).content[0].text == "!"
    for empty in ("", []):
        assert await rendered(user("x"), assistant(empty), engine=engine) == [user("x")]
        assert engine.template_calls[-1].options["add_generation_prompt"] is True


async def test_a_template_that_cannot_continue_is_told_in_anthropics_words() -> None:
    class Cannot(ScriptedEngine):
        def render_messages(self, messages: Any, **options: Any) -> str:
            if options["continue_final_message"]:
                raise ChatTemplateError("continue_final_message: cannot", "continue_final_message")
            return super().render_messages(messages, **options)

    adapter = MessagesAdapter(OpenAIAdapter(Cannot()))
    with pytest.raises(RequestError) as caught:
        await adapter.create({"model": "default", "max_tokens": 5, "messages": [user("x"), assistant("y")]})
    error = to_anthropic_error(caught.value).body.error
    assert error.param == "messages.1"
    assert error.message.startswith("messages.1: has role assistant")


async def test_tools_are_shown_as_functions() -> None:
    engine = ScriptedEngine("hello")
    deferred = {**TOOL, "name": "g", "type": "custom", "defer_loading": True, "cache_control": {"type": "ephemeral"}}
    search = {"type": "tool_search_tool_bm25_20251119", "name": "tool_search_tool_bm25"}
    await rendered(user("x"), engine=engine, tools=[TOOL, search, deferred], tool_choice={"type": "auto"})
    shown = engine.template_calls[-1].options["tools"]
    functions = [{"name": name, "description": "d", "parameters": TOOL["input_schema"]} for name in ("f", "g")]
    assert shown == [{"type": "function", "function": function} for function in functions]
    await rendered(user("x"), engine=engine, tools=[TOOL], tool_choice={"type": "none"})
    assert "tools" not in engine.template_calls[-1].options


@pytest.mark.parametrize(
    ("thinking", "expected"),
    [
        (None, None),
        ({"type": "enabled", "budget_tokens": 1024}, True),
        ({"type": "adaptive"}, True),
        ({"type": "adaptive", "display": "summarized", "block_binding": {}}, True),
        ({"type": "disabled"}, False),
    ],
)
async def test_thinking_is_the_templates_switch(thinking: Any, expected: bool | None) -> None:
    engine = ScriptedEngine("hello")
    await rendered(user("x"), engine=engine, thinking=thinking, max_tokens=1025)
    options = engine.template_calls[-1].options
    assert (options.get("enable_thinking"), options.get("thinking")) == (expected, expected)


async def test_sampling_and_defaults() -> None:
    engine = ScriptedEngine("hello", default_sampling={"top_k": 7})
    adapter = MessagesAdapter(OpenAIAdapter(engine), sampling_defaults={"temperature": 0.25, "min_p": 0.125})
    body = {"model": "default", "max_tokens": 50, "messages": [user("x")]}
    await adapter.create(body)
    await adapter.create({**body, "temperature": 0.5, "top_p": 0.75, "top_k": 3, "stop_sequences": ["a", "b"]})
    first, second = (request.params for request in engine.requests)
    assert (first.temperature, first.min_p, first.top_k, first.max_tokens) == (0.25, 0.125, 7, 50)
    assert (second.temperature, second.min_p, second.top_p, second.top_k) == (0.5, 0.125, 0.75, 3)
    assert list(second.stop) == ["a", "b"]


async def test_output_format_is_enforced() -> None:
    engine = ScriptedEngine("{}")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    await rendered(user("x"), engine=engine, output_config={"format": {"type": "json_schema", "schema": schema}})
    form = engine.requests[-1].params.structured_outputs
    assert form is not None
    assert json.dumps(schema) in (form.json if isinstance(form.json, str) else json.dumps(form.json))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metadata", {"user_id": "u"}),
        ("service_tier", "standard_only"),
        ("speed", "fast"),
        ("cache_control", {"type": "ephemeral", "ttl": "1h"}),
        ("context_management", {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}),
        ("diagnostics", {"previous_message_id": None}),
        ("inference_geo", "eu"),
        ("user_profile_id", "p"),
        ("workspace_id", "w"),
        ("output_config", {"effort": "max"}),
        ("container", None),
        ("mcp_servers", []),
    ],
)
async def test_fields_without_effect(field: str, value: Any) -> None:
    engine = ScriptedEngine("hello")
    plain = await rendered(user("x"), engine=engine)
    assert await rendered(user("x"), engine=engine, **{field: value}) == plain
    assert engine.requests[0].params == engine.requests[1].params
    assert engine.template_calls[0] == engine.template_calls[1]


def test_every_field_without_effect_is_tried() -> None:
    mark = next(m for m in test_fields_without_effect.pytestmark if m.name == "parametrize")
    assert set(ADVISORY_MESSAGES_FIELDS) <= {field for field, _ in mark.args[1]}
