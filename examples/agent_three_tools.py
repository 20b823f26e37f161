# SPDX-License-Identifier: MIT
"""A conversation with three tools: the model looks a value up, converts it, takes a note, and answers.

    python examples/agent_three_tools.py MODEL [--free]

MODEL is `demo`, a Hugging Face id, a folder or a .gguf file of a chat model. Small models seldom choose the right tools
by themselves, so each step forces one tool, and the arguments follow its schema. With --free the model chooses the
tools, in one call of `run_conversation`.
"""

import asyncio
import sys
from typing import Annotated, Literal

from pydantic import Field

from candle_vllm.core import CandleVllmError, InferenceEngine
from candle_vllm.responses import ConversationOptions, ConversationResult, ResponsesSession

City = Literal["Oslo", "Cairo", "Lima"]
Celsius = Annotated[float, Field(ge=-90, le=60)]
TEMPERATURES = {"Oslo": -3.0, "Cairo": 31.5, "Lima": 19.0}
QUESTION = "How warm is it in Cairo, in Fahrenheit? Take a note of it too."


def look_up(city: City) -> float:
    """Gives the temperature of a city in degrees Celsius."""
    return TEMPERATURES[city]


async def to_fahrenheit(celsius: Celsius) -> float:
    """Converts degrees Celsius to Fahrenheit."""
    return round(celsius * 9 / 5 + 32, 1)


async def main(model: str, *flags: str) -> None:
    notes: list[str] = []

    def note(city: City, weather: Literal["cold", "mild", "hot"]) -> str:
        """Takes a note of the weather of a city."""
        notes.append(f"{city} is {weather}")
        return f"{len(notes)} notes"

    with InferenceEngine(model) as engine:
        session = ResponsesSession(engine, tools=[look_up, to_fahrenheit, note])
        say = [{"role": "user", "content": QUESTION}]
        if "--free" in flags:
            show(await session.run_conversation(say, options()))
        else:
            for name in ("look_up", "to_fahrenheit", "note"):
                choice = {"type": "function", "function": {"name": name}}
                show(await session.run_conversation(say, options(max_turns=1, tool_choice=choice)))
                say = []  # the conversation continues where it ended
            say = [{"role": "user", "content": "Now answer in one sentence."}]
            show(await session.run_conversation(say, options(tool_choice="none")))
    print(f"notes: {notes}")


def options(max_turns: int = 8, **request: object) -> ConversationOptions:
    return ConversationOptions(max_turns=max_turns, request={"temperature": 0, "max_tokens": 200, **request})


def show(result: ConversationResult) -> None:
    for done in result.tool_calls:
        print(f"{done.call.name}({' '.join(done.call.arguments.split())}) -> {done.text}")
    if result.completed:
        print(f"answer: {result.final_message}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"name a model, for example: python {sys.argv[0]} demo")
    try:
        asyncio.run(main(*sys.argv[1:]))
    except CandleVllmError as error:  # a file that is not there, for example
        sys.exit(str(error))
