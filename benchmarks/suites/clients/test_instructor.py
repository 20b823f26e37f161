# SPDX-License-Identifier: MIT
"""instructor in its modes for OpenAI's and Anthropic's APIs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import anthropic
import instructor
import openai
import pytest
from instructor import Mode
from pydantic import BaseModel

ADDRESS = os.environ["SUITE_ADDRESS"]
OPENAI = (Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON, Mode.JSON_SCHEMA, Mode.MD_JSON, Mode.RESPONSES_TOOLS)
ANTHROPIC = (Mode.TOOLS, Mode.JSON)
ASKED: Any = [{"role": "user", "content": "Bob is 41 years old."}]
SEVERAL: Any = [{"role": "user", "content": "Bob is 41 years old, and Eve is 39 years old."}]


class Person(BaseModel):
    name: str
    age: int


def client_of(mode: Mode, api: str = "openai") -> Any:
    if api == "anthropic":
        return instructor.from_anthropic(anthropic.Anthropic(base_url=ADDRESS, api_key="none"), mode=mode)
    return instructor.from_openai(openai.OpenAI(base_url=f"{ADDRESS}/v1", api_key="none"), mode=mode)


def more(mode: Mode) -> dict[str, Any]:
    limit = {"max_output_tokens": 300} if mode is Mode.RESPONSES_TOOLS else {"max_tokens": 300}
    return {"model": "qwen", "temperature": 0, "max_retries": 0, **limit}


@pytest.mark.parametrize(
    ("api", "mode"), [*(("openai", mode) for mode in OPENAI), *(("anthropic", mode) for mode in ANTHROPIC)]
)
def test_one(api: str, mode: Mode) -> None:
    made = client_of(mode, api).chat.completions.create(response_model=Person, messages=ASKED, **more(mode))
    assert made.model_dump() == {"name": "Bob", "age": 41}


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.JSON_SCHEMA])
def test_several(mode: Mode) -> None:
    made = client_of(mode).chat.completions.create(response_model=Iterable[Person], messages=SEVERAL, **more(mode))
    assert [each.name for each in made] == ["Bob", "Eve"]


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.JSON])
def test_partial(mode: Mode) -> None:
    made = list(client_of(mode).create_partial(response_model=Person, messages=ASKED, **more(mode)))
    assert made[-1].model_dump() == {"name": "Bob", "age": 41}
