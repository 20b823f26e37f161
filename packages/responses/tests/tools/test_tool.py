# SPDX-License-Identifier: MIT
"""What a model reads of a tool's output."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from candle_vllm.responses.tools.tool import NOTHING, ContentPart, ToolOutput, output_text


def part(kind: Any, **fields: Any) -> ContentPart:
    return ContentPart(kind=kind, **fields)


DATA = base64.b64encode(b"12345").decode()


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([part("text", text="a"), part("text", text="b")], "a\nb"),
        ([part("image", data=DATA, mime_type="image/png")], "[image: image/png, 5 bytes]"),
        ([part("audio", data=DATA, mime_type="audio/wav")], "[audio: audio/wav, 5 bytes]"),
        (
            [part("resource", text="body", uri="file:///x", mime_type="text/plain")],
            "[resource: file:///x, text/plain]\nbody",
        ),
        ([part("resource", data=DATA, uri="file:///x")], "[resource: file:///x, 5 bytes]"),
        ([part("resource_link", uri="file:///x", name="X")], "[link to a resource: X, file:///x]"),
        ([part("resource_link", uri="x:y", name="X", text="all of it")], "[link to a resource: X, x:y, all of it]"),
        ([part("text", text="a"), part("image", data="")], "a\n[image: 0 bytes]"),
        ([part("image")], "[image]"),
        ([], NOTHING),
        ([part("text", text="")], NOTHING),
        ([part("text", text="half \ud800")], "half ?"),
    ],
)
def test_kinds_of_content(parts: list[ContentPart], text: str) -> None:
    assert output_text(ToolOutput(content=tuple(parts)), 1000) == text


def test_structured_output_stands_for_missing_text() -> None:
    assert output_text(ToolOutput(structured={"é": [1]}), 1000) == '{"é": [1]}'
    assert output_text(ToolOutput.of_text("one"), 1000) == "one"
    both = ToolOutput(content=(part("text", text="one"),), structured=1)
    assert output_text(both, 1000) == "one"
    with_picture = ToolOutput(content=(part("image"),), structured=1)
    assert output_text(with_picture, 1000) == "[image]\n1"
    assert output_text(ToolOutput(structured=object()), 1000) == "[structured output that is no JSON]"


@pytest.mark.parametrize("most", [1, 10, 47, 100, 9_999])
def test_long_text_is_cut(most: int) -> None:
    text = output_text(ToolOutput.of_text("x" * 10_000), most)
    assert len(text) == most
    if most >= 100:
        assert text.endswith("\n[cut: the whole output has 10000 characters]")
    assert output_text(ToolOutput.of_text("x" * 10_000), 10_000) == "x" * 10_000
