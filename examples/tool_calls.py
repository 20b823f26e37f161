# SPDX-License-Identifier: MIT
"""An agent's loop in one program, without a server: the model calls a function, gets its result, and answers.

    python examples/tool_calls.py MODEL [--sync]

MODEL is `demo`, a Hugging Face id, a folder or a .gguf file of a chat model. With --sync the same runs without an
event loop.
"""

import asyncio
import json
import sys
from typing import Any

from candle_vllm.core import CandleVllmError, InferenceEngine
from candle_vllm.openai import OpenAIAdapter, SyncOpenAIAdapter

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two whole numbers.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": -999, "maximum": 999},
                "b": {"type": "integer", "minimum": -999, "maximum": 999},
            },
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
QUESTION = {"role": "user", "content": "What is 17 plus 25?"}
SETTINGS = {"max_completion_tokens": 500, "seed": 1}


def request(messages: list[dict[str, Any]], tool_choice: str) -> dict[str, Any]:
    return {"messages": messages, "tools": [TOOL], "tool_choice": tool_choice, **SETTINGS}


def results(call: Any) -> list[dict[str, Any]]:
    """Return the messages that continue the conversation: the call and its result."""
    arguments = json.loads(call.function.arguments)  # valid by the schema, because the tool is strict
    print(f"{call.function.name}({arguments['a']}, {arguments['b']})")
    shown = {"id": call.id, "type": "function",
             "function": {"name": call.function.name, "arguments": call.function.arguments}}  # fmt: skip
    return [
        {"role": "assistant", "content": None, "tool_calls": [shown]},
        {"role": "tool", "tool_call_id": call.id, "content": str(arguments["a"] + arguments["b"])},
    ]


async def ask(adapter: OpenAIAdapter) -> None:
    called = await adapter.chat(request([QUESTION], "required"))
    messages = [QUESTION, *results(called.choices[0].message.tool_calls[0])]
    async for chunk in await adapter.chat_stream(request(messages, "none")):
        for choice in chunk.choices:
            print(choice.delta.content or "", end="")
    print()


def ask_sync(adapter: SyncOpenAIAdapter) -> None:
    called = adapter.chat(request([QUESTION], "required"))
    messages = [QUESTION, *results(called.choices[0].message.tool_calls[0])]
    with adapter.chat_stream(request(messages, "none")) as chunks:
        for chunk in chunks:
            for choice in chunk.choices:
                print(choice.delta.content or "", end="")
    print()


def main(model: str, *flags: str) -> None:
    with InferenceEngine(model) as engine:
        adapter = OpenAIAdapter(engine)  # detects the tool-call format; tool_parser="..." sets it
        if "--sync" in flags:
            with SyncOpenAIAdapter(adapter) as sync:
                ask_sync(sync)
        else:
            asyncio.run(ask(adapter))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"name a model, for example: python {sys.argv[0]} demo")
    try:
        main(*sys.argv[1:])
    except CandleVllmError as error:  # a file that is not there, for example
        sys.exit(str(error))
