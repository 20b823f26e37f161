# SPDX-License-Identifier: MIT
"""What `recorded.py` asks: chat, completions, messages and responses, with the parameters and tools that they take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

WORDS = "Tell me of the sea."
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": [{"type": "text", "text": "And of Italy?"}]},
]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
USED = [
    {"role": "user", "content": "The weather in Rome?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Rome", "days": 1}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "maximum": 120, "minimum": 0},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}

SAMPLED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 7},
    {"temperature": 1.0, "seed": 7, "top_p": 0.9, "top_k": 40, "min_p": 0.02},
    {"temperature": 0.7, "seed": -3, "n": 3},
    {"stop": [".", "sea"]},
    {"stop": ["e"], "include_stop_str_in_output": True},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.3},
    {"logit_bias": {"100": 5, "260": -100}},
    {"allowed_token_ids": [28, 29, 30, 31, 260]},
    {"bad_words": ["sea", "the"]},
    {"min_tokens": 12},
    {"ignore_eos": True},
    {"stop_token_ids": [30, 28]},
    {"return_token_ids": True},
    {"prompt_logprobs": 2},
    {"user": "u", "metadata": {"a": "b"}, "service_tier": "auto"},
    {"structured_outputs": {"choice": ["yes", "no", "perhaps"]}},
    {"structured_outputs": {"regex": "[a-f]{3,5}-[0-9]{2}"}},
    {"structured_outputs": {"json": PERSON}},
    {"structured_outputs": {"grammar": 'start: "a" ("b" | "c")+ "d"'}},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}},
]
CHATS: list[dict[str, Any]] = [
    {"messages": TALK},
    {"messages": TALK, "logprobs": True, "top_logprobs": 3},
    {"messages": TALK, "logprobs": True, "n": 2, "temperature": 0.9, "seed": 1},
    {
        "messages": [*TALK, {"role": "assistant", "content": "The capital"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    },
    {"messages": [*TALK, {"role": "assistant", "content": "Rome"}], "echo": True},
    {"messages": [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "Hi", "name": "Ann"}]},
    {"messages": TALK, "tools": TOOLS},
    {"messages": TALK, "tools": TOOLS, "tool_choice": "none"},
    {"messages": TALK, "tools": TOOLS, "tool_choice": "required"},
    {"messages": TALK, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
    {"messages": TALK, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "weather"}}},
    {
        "messages": TALK,
        "tools": TOOLS,
        "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TOOLS[1]]}},
    },
    {"messages": USED, "tools": TOOLS},
    {"messages": TALK, "reasoning_effort": "low"},
    {"messages": TALK, "chat_template_kwargs": {"enable_thinking": False}},
    {"messages": TALK, "max_completion_tokens": 1},
    {"messages": TALK, "verbosity": "low", "store": False, "prompt_cache_key": "k"},
]
COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": "Once upon a time"},
    {"prompt": ["Once upon a time", "The sea"]},
    {"prompt": [504, 2141, 253]},
    {"prompt": [[504, 2141, 253], [260, 288]]},
    {"prompt": "Once", "echo": True},
    {"prompt": "Once", "echo": True, "logprobs": 2},
    {"prompt": "Once upon", "echo": True, "max_tokens": 1, "logprobs": 0},
    {"prompt": "Once", "logprobs": 3, "n": 2, "temperature": 0.6, "seed": 5},
    {"prompt": ["a", "b"], "n": 2, "temperature": 0.6, "seed": 5},
    {"prompt": "Once", "suffix": "end"},
]
MESSAGES: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": WORDS}]},
    {"system": "You are brief.", "messages": [{"role": "user", "content": [{"type": "text", "text": WORDS}]}]},
    {
        "system": [{"type": "text", "text": "Brief."}],
        "messages": [{"role": "user", "content": WORDS}],
        "stop_sequences": ["."],
    },
    {
        "messages": [{"role": "user", "content": WORDS}],
        "temperature": 1.0,
        "top_k": 20,
        "top_p": 0.5,
        "metadata": {"user_id": "u"},
    },
    {"messages": [{"role": "user", "content": WORDS}, {"role": "assistant", "content": "The sea"}]},
    {
        "messages": [{"role": "user", "content": WORDS}],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "max_tokens": 2048,
        "stop_sequences": ["e"],
    },
    *[
        {
            "messages": [{"role": "user", "content": WORDS}],
            "tools": [
                {"name": "weather", "description": "of a city", "input_schema": WEATHER},
                {"name": "now", "input_schema": {"type": "object"}},
            ],
            "tool_choice": choice,
        }
        for choice in (
            {"type": "auto"},
            {"type": "any"},
            {"type": "any", "disable_parallel_tool_use": True},
            {"type": "tool", "name": "weather"},
            {"type": "none"},
        )
    ],
    {
        "messages": [
            {"role": "user", "content": "Rome?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "So."},
                    {"type": "tool_use", "id": "t1", "name": "now", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "noon"}]}
                ],
            },
        ],
        "tools": [{"name": "now", "input_schema": {"type": "object"}}],
    },
    {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}],
            }
        ]
    },
    {"messages": [{"role": "assistant", "content": "first"}]},
    {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t9", "content": "x"}]}]},
    {"messages": []},
    {"messages": [{"role": "robot", "content": "x"}]},
    {"messages": [{"role": "user", "content": WORDS}], "tools": [{"name": "a b", "input_schema": {"type": "object"}}]},
    {
        "messages": [{"role": "user", "content": WORDS}],
        "tools": [{"type": "web_search_20250305", "name": "web_search"}],
    },
    {
        "messages": [{"role": "user", "content": WORDS}],
        "tool_choice": {"type": "tool", "name": "z"},
        "tools": [{"name": "y", "input_schema": {"type": "object"}}],
    },
    {"messages": [{"role": "user", "content": WORDS}], "temperature": 3},
    {"messages": [{"role": "user", "content": WORDS}], "top_p": 0},
    {"messages": [{"role": "user", "content": WORDS}], "stop_sequences": [""]},
    {"messages": [{"role": "user", "content": WORDS}], "max_tokens": 0},
    {"messages": [{"role": "user", "content": WORDS}], "max_tokens": 100_000, "stop_sequences": ["."]},
    {"messages": [{"role": "user", "content": WORDS}], "mcp_servers": []},
    {"messages": [{"role": "user", "content": WORDS}], "wrong": 1},
]
FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]
RESPONSES: list[dict[str, Any]] = [
    {"input": WORDS},
    {"input": WORDS, "instructions": "Be brief.", "metadata": {"a": "b"}, "store": False},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": WORDS}]}], "temperature": 1.0, "top_p": 0.3},
    {"input": WORDS, "top_logprobs": 2, "include": ["message.output_text.logprobs"]},
    {"input": WORDS, "text": {"format": {"type": "json_object"}}},
    {"input": WORDS, "text": {"format": {"type": "json_schema", "name": "p", "schema": PERSON, "strict": True}}},
    {"input": WORDS, "tools": FLAT},
    {"input": WORDS, "tools": FLAT, "tool_choice": "required"},
    {"input": WORDS, "tools": FLAT, "tool_choice": "required", "parallel_tool_calls": False},
    {"input": WORDS, "tools": FLAT, "tool_choice": {"type": "function", "name": "weather"}},
    {"input": WORDS, "tools": FLAT, "tool_choice": "none"},
    {"input": WORDS, "tools": [{"type": "custom", "name": "c"}], "tool_choice": {"type": "custom", "name": "c"}},
    {
        "input": [
            {"role": "user", "content": "Rome?"},
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Rome", "days": 1}'},
            {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        ],
        "tools": FLAT,
    },
    {"input": WORDS, "reasoning": {"effort": "low"}},
    {"input": WORDS, "truncation": "auto"},
    {"input": WORDS, "max_output_tokens": 1},
    {"input": WORDS, "background": True, "stream": False},
    {"input": WORDS, "previous_response_id": "resp_unknown"},
]
PAGES = [
    "/health",
    "/ready",
    "/version",
    "/v1/models",
    "/v1/models/status",
    "/v1/models/default",
    "/v1/models/none",
    "/openapi.json",
    "/docs",
    "/metrics",
    "/v1/usage",
    "/v1/mailbox",
    "/v1/mailbox/none",
    "/v1/mcp/servers",
    "/v1/mcp/tools",
    "/nothing",
    "/v1/responses/resp_none",
    "/v1/conversations/conv_none",
]
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("/tokenize", {"prompt": "Hello world"}),
    ("/tokenize", {"messages": TALK, "return_token_strs": True}),
    ("/detokenize", {"tokens": [504, 2141]}),
    ("/v1/embeddings", {"input": "a"}),
    ("/v1/score", {"text_1": "a", "text_2": "b"}),
    ("/v1/rerank", {"query": "a", "documents": ["b"]}),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": WORDS}]}),
    ("/v1/responses/input_tokens", {"input": WORDS}),
    ("/v1/models/select", {"model": "default"}),
    ("/v1/models/load", {"model": "none"}),
    ("/v1/mcp/call", {"server": "none", "tool": "none", "arguments": {}}),
    ("/v1/conversations", {"items": [{"role": "user", "content": "a"}]}),
]
# What the scripted model says, by a word that is in the prompt.
SCRIPT = {
    "alpha": "Hello there, friend.",
    "bravo": "<think>\nLet me see.\n</think>\n\nIt is noon.",
    "charlie": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>',
    "delta": 'Two calls. <tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "echo": "<think>I need\nthe weather</think><tool_call>\n"
    '{"name": "weather", "arguments": {"city": "A\\"b\\\\ é 日本"',
    "foxtrot": '<tool_call>\n{"name": "nothing", "arguments": {"x": [1, {"y": null}]}}\n</tool_call> and then text',
    "golf": "text <tool_call>not json</tool_call> text <think> late </think>",
    "hotel": ["日", "本", "語 ", "🙂", " <tool", "_call>", '{"name": "now", "arg', 'uments": {}}', "</tool_call>"],
}


def right() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Requests to the demo model: the server, the path, the body."""
    chat, text = "/v1/chat/completions", "/v1/completions"
    for extra in SAMPLED:
        yield "model", chat, {"messages": [{"role": "user", "content": WORDS}], "max_tokens": 16, **extra}
        yield "model", text, {"prompt": "The sea is", "max_tokens": 16, **extra}
    for extra in CHATS:
        yield "model", chat, {"max_completion_tokens": 24, **extra}
    for extra in COMPLETIONS:
        yield "model", text, {"max_tokens": 12, **extra}
    for extra in MESSAGES:
        yield "model", "/v1/messages", {"model": "default", "max_tokens": 24, **extra}
    for extra in RESPONSES:
        yield "model", "/v1/responses", {"max_output_tokens": 24, **extra}
    for word in SCRIPT:
        said = f"{word}, please"
        yield "script", chat, {"messages": [{"role": "user", "content": said}], "tools": TOOLS}
        yield "script", chat, {"messages": [{"role": "user", "content": said}], "n": 2, "include_reasoning": False}
        yield "script", text, {"prompt": said}
        anthropic = [{"name": "weather", "input_schema": WEATHER}, {"name": "now", "input_schema": {"type": "object"}}]
        yield (
            "script",
            "/v1/messages",
            {
                "model": "default",
                "max_tokens": 99,
                "messages": [{"role": "user", "content": said}],
                "tools": anthropic,
            },
        )
        yield "script", "/v1/responses", {"input": said, "tools": FLAT}


# What the scripted model says to a server with an MCP server of its own, whose tool `echo` is approved; results first.
ECHO = '<tool_call>\n{"name": "words__echo", "arguments": {"text": "%s"}}\n</tool_call>'
MCP_SCRIPT = {
    "first result": "It said the first.",
    "third result": ["<think>Enough", ".</think>\n\n", "Both ", "are done."],
    "is not of type": "My mistake.",
    "words__nothing": "There is no such tool.",
    "alpha": ECHO % "first result",
    "bravo": "Two.\n" + ECHO % "second" + "\n" + ECHO % "third result",
    "charlie": "<think>I ask.</think>" + ECHO % "first result",
    "delta": '<tool_call>\n{"name": "words__echo", "arguments": {"text": 5}}\n</tool_call>',
    "echo again": ECHO % "and again",
    "foxtrot": '<tool_call>\n{"name": "words__say_more", "arguments": {"text": "x"}}\n</tool_call>',
    "golf": '<tool_call>\n{"name": "words__nothing", "arguments": {}}\n</tool_call>',
    "hotel": "No tool is needed.",
}
MCP_WORDS = ("alpha", "bravo", "charlie", "delta", "echo again", "foxtrot", "golf", "hotel")


def acting() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Requests to the server with tools of an MCP server: executed, named, narrowed, beside the request's own."""
    named = {"type": "mcp", "server_label": "words"}
    for word in MCP_WORDS:
        said = f"{word}, please"
        messages = [{"role": "user", "content": said}]
        yield "mcp", "/v1/chat/completions", {"messages": messages}
        yield "mcp", "/v1/chat/completions", {"messages": messages, "tools": TOOLS}
        yield "mcp", "/v1/messages", {"model": "default", "max_tokens": 99, "messages": messages}
        yield "mcp", "/v1/responses", {"input": said, "tools": [named | {"require_approval": "never"}]}
        yield "mcp", "/v1/responses", {"input": said, "tools": [named | {"allowed_tools": ["echo"]}, *FLAT]}
    yield "mcp", "/v1/responses", {"input": "alpha", "tools": [named | {"server_label": "none"}]}
    yield "mcp", "/v1/responses", {"input": "alpha", "tools": [named | {"allowed_tools": ["nothing"]}]}
    yield "mcp", "/v1/chat/completions", {"messages": [{"role": "user", "content": "alpha"}], "tool_choice": "none"}
    for call in (
        {"name": "words__echo", "arguments": {"text": "a"}, "approved": True},
        {"name": "words__echo", "arguments": {"text": "a"}},
        {"name": "words__echo", "arguments": {"text": 5}, "approved": True},
        {"name": "words__nothing", "arguments": {}, "approved": True},
        {"name": "words__echo", "approved": True, "timeout": -1},
    ):
        yield "mcp", "/v1/mcp/call", call
