# SPDX-License-Identifier: MIT
"""Images that tools return: what a model that sees is shown of them, and what is said of the others."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image

from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.openai import OpenAIAdapter
from candle_vllm.responses.conversation import turn_calls
from candle_vllm.responses.conversation.chat_model import InProcessModel
from candle_vllm.responses.tools.tool import ContentPart, ToolDefinition, ToolOutput
from packages.responses.tests.conversation.conversation_fakes import Bench, call_text, turns


def png(colour: str = "red") -> str:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def image(data: str, mime_type: str | None = "image/png") -> ContentPart:
    return ContentPart(kind="image", data=data, mime_type=mime_type)


def text(said: str) -> ContentPart:
    return ContentPart(kind="text", text=said)


class Look:
    definition = ToolDefinition(name="look")

    def __init__(self, *content: ContentPart) -> None:
        self.content = content

    async def run(self, arguments: Any, report: Any) -> ToolOutput:
        return ToolOutput(content=self.content)


def bench(*content: ContentPart, sees: bool = True, calls: int = 1, **options: Any) -> Bench:
    engine = ScriptedEngine(turns(call_text("look") * calls, "seen"), sees=sees, max_model_len=100_000)
    made = Bench(tools=[Look(*content)], model=InProcessModel(OpenAIAdapter(engine, tool_parser="hermes")), **options)
    made.engine = engine
    return made


def shown(made: Bench) -> list[Any]:
    """What the last turn's prompt has of the results."""
    last = made.engine.template_calls[-1].messages
    return [message["content"] for message in last if message["role"] == "tool"]


async def test_a_model_that_sees_is_shown_them_among_the_texts() -> None:
    inside = ContentPart(kind="resource", data=png("blue"), mime_type="image/png", uri="file:///b.png")
    made = bench(text("before"), image(png()), text("between"), inside, text("after"))
    result = await made.run()
    said = [{"type": "text", "text": word} for word in ("before", "between", "after")]
    picture = {"type": "image"}
    assert shown(made) == [[said[0], picture, said[1], picture, said[2]]]
    red, blue = made.engine.pictures[-2:]
    assert (red.pixels[0, 0].tolist(), blue.pixels[0, 0].tolist()) == ([255, 0, 0], [0, 0, 255])
    assert "[image: image/png" in result.tool_calls[0].text
    url = f"data:image/png;base64,{png()}"
    assert made.added[1]["content"][1] == {"type": "image_url", "image_url": {"url": url}}
    again = await made.run([{"role": "user", "content": "go"}, *made.added, {"role": "user", "content": "and now?"}])
    assert again.final_message == "seen"


async def test_a_model_that_reads_text_alone_is_told_of_them() -> None:
    made = bench(text("before"), image(png()), sees=False)
    await made.run()
    assert shown(made) == [f"before\n[image: image/png, {len(base64.b64decode(png()))} bytes]"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (base64.b64encode(b"no image").decode(), "it cannot be shown: this is not an image in a supported format"),
        (png()[:60], "it cannot be shown: the image is damaged"),
        ("?" * 40, "it cannot be shown: its data is not valid base64"),
    ],
    ids=["words", "cut", "not valid base64"],
)
async def test_a_bad_one_costs_nothing_but_itself(data: str, reason: str) -> None:
    made = bench(image(data), text("words"), image(png(), "text/html"))
    result = await made.run()
    said, picture = shown(made)[0]
    assert reason in said["text"]
    assert said["text"].endswith("]\nwords")
    assert picture == {"type": "image"}
    assert reason in result.tool_calls[0].text
    assert result.final_message == "seen"


async def test_there_are_as_many_as_a_prompt_may_have() -> None:
    url = {"type": "image_url", "image_url": {"url": f"data:;base64,{png()}"}}
    made = bench(image(png()), image(png("blue")), calls=2)
    result = await made.run([{"role": "user", "content": [url] * 61}])
    kinds = [[part["type"] for part in content] for content in shown(made)]
    assert kinds == [["image", "image"], ["image", "text"]]
    assert "a conversation may have 64 images" in result.tool_calls[1].text
    assert result.final_message == "seen"


async def test_their_size_in_all_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_calls, "MAX_PICTURES", len(png()) + 5)
    made = bench(image(png()), image(png()))
    await made.run()
    picture, said = shown(made)[0]
    assert picture == {"type": "image"}
    assert "MB of base64 in all" in said["text"]


async def test_the_limit_of_texts_holds_for_all_of_them() -> None:
    made = bench(text("x" * 90), image(png()), text("y" * 90), max_result_chars=100)
    await made.run()
    first, picture, last = shown(made)[0]
    assert (first["text"], picture, len(last["text"])) == ("x" * 90, {"type": "image"}, 10)
