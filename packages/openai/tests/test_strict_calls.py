# SPDX-License-Identifier: MIT
"""A strict tool in auto mode: what is a call for the parser was held to its schema by the grammar."""

from __future__ import annotations

import pytest
from msgspec import UNSET

from candle_vllm.core.sampling.llguidance_backend import LlguidanceBackend
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.openai import OpenAIAdapter

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "maximum": 2}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "f2", "strict": True, "parameters": SCHEMA}}
OBJECT = '{"name": "f2", "arguments": {"city": "x", "days": 30}}'
WRONG = (  # calls with an argument that the schema does not allow, as models write them
    OBJECT,
    f"```json\n{OBJECT}\n```",
    f"<tool_call>\n{OBJECT}\n</tool_call>",
    f"<tool_call>\n```json\n{OBJECT}\n```\n</tool_call>",
    f"[{OBJECT}]",
    f'<think>a "</think>" b\n<tool_call>\n{OBJECT}\n</tool_call>',
    f"<think>hm\n<tool_call>\n{OBJECT}\n</tool_call>",
    '{"arguments": {"city": "x", "days": 30}, "name": "f2"}',
    '{"id": 1, "name": "f2", "arguments": {"city": "x", "days": 30}}',
    '{"name" : "f2", "arguments": {"city": "x", "days": 30}}',
    '{\n\t"name": "f2", "arguments": {"city": "x", "days": 30}}',
    '{          "name": "f2", "arguments": {"city": "x", "days": 30}}',
    '{"type": "function", "function": {"name": "f2", "arguments": {"city": "x", "days": 30}}}',
    "{'name': 'f2', 'arguments': {'city': 'x', 'days': 30}}",
    '{"name": "f2", "parameters": {"city": "x", "days": 30}}',
    '<|python_tag|>{"name": "f2", "parameters": {"city": "x", "days": 30}}',
    '<function=f2>{"city": "x", "days": 30}</function>',
    "<tool_call>\n<function=f2>\n<parameter=city>\nx\n</parameter>\n<parameter=days>\n30\n</parameter>\n</function>\n</tool_call>",
    '[f2(city="x", days=30)]',
)


@pytest.mark.one_of_each(1)
@pytest.mark.parametrize("row", ["hermes", "json", "llama3_json", "llama4_json", "qwen3_coder", "pythonic"])
async def test_no_call_escapes_its_schema(row: str) -> None:
    called = 0
    for text in WRONG:
        engine = ScriptedEngine([text])
        made = OpenAIAdapter(engine, tool_parser=row, reasoning_parser="think")
        answer = await made.chat({"messages": [{"role": "user", "content": "x"}], "tools": [TOOL]})
        if answer.choices[0].message.tool_calls is UNSET:
            continue
        called += 1
        form, tokens = engine.requests[0].params.structured_outputs, engine.tokenizer
        assert form is not None
        backend = LlguidanceBackend(tokens, tokens.vocab_size, (tokens.eos_token_id,))
        grammar = backend.compile(form)
        assert not all(grammar.accept(token) for token in tokens.encode(text, False)), text
        backend.close()
    assert called  # the row reads some of them
