# SPDX-License-Identifier: MIT
"""Images of MCP tools stay in the conversation: a response that goes on from another shows the model the same."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.core.vision.pictures import picture_of
from candle_vllm.openai import OpenAIAdapter, to_json_bytes
from candle_vllm.responses.api import turn_items
from candle_vllm.responses.api.conversations import ConversationCreateRequest, Conversations
from candle_vllm.responses.api.mcp_source import OpenServer
from candle_vllm.responses.api.responder import Responder
from candle_vllm.responses.api.response_store import ResponseStore
from candle_vllm.responses.conversation.chat_model import InProcessModel
from candle_vllm.responses.protocol.tools import McpTool
from candle_vllm.responses.store.backend import StoreOptions
from candle_vllm.responses.tools.tool import ContentPart, ToolDefinition, ToolOutput
from tests.response_judges import judge_response

FILE = io.BytesIO()
Image.effect_noise((60, 50), 90).save(FILE, "PNG")
DATA = base64.b64encode(FILE.getvalue()).decode()
URL = f"data:image/png;base64,{DATA}"
SHOWN = [{"type": "input_text", "text": "before"}, {"type": "input_image", "image_url": URL}]
RENDERED = [{"type": "text", "text": "before"}, {"type": "image"}]
TEXT = f"before\n[image: image/png, {len(FILE.getvalue())} bytes]"
CALL = f"<tool_call>\n{json.dumps({'name': 's__draw', 'arguments': {}})}\n</tool_call>"


class Draw:
    """A tool of the server "s"."""

    definition = ToolDefinition(name="s__draw", server="s", original_name="draw")

    async def run(self, arguments: Any, report: Any) -> ToolOutput:
        part = ContentPart(kind="image", data=DATA, mime_type="image/png")
        return ToolOutput(content=(ContentPart(kind="text", text="before"), part))


class Server:
    """The one that has it."""

    def check(self, tool: McpTool, path: str) -> None: ...

    @asynccontextmanager
    async def open(self, tool: McpTool) -> AsyncIterator[OpenServer]:
        yield OpenServer("s", (Draw(),), None)


class Bench:
    """Answers over a store, by a model that calls the tool once."""

    def __init__(self, kept: ResponseStore | None, *, sees: bool = True) -> None:
        self.engine = ScriptedEngine(
            lambda prompt: "Red." if "tool\n" in prompt else CALL,
            chat_template="{{ tools }}<tool_call>", sees=sees, max_model_len=100_000,
        )  # fmt: skip
        self._responder = Responder(
            InProcessModel(OpenAIAdapter(self.engine, tool_parser="hermes")), servers=Server(), store=kept
        )

    async def ask(self, approval: str = "never", **request: Any) -> dict[str, Any]:
        tool = {"type": "mcp", "server_label": "s", "require_approval": approval}
        made = json.loads(to_json_bytes(await self._responder.create({"input": "Draw.", "tools": [tool], **request})))
        judge_response(made)
        return made

    @property
    def result(self) -> Any:
        """What the model was shown last of the tool."""
        return next(one["content"] for one in self.engine.template_calls[-1].messages if one["role"] == "tool")


def ran(made: dict[str, Any]) -> dict[str, Any]:
    return next(item for item in made["output"] if item["type"] == "mcp_call")


@pytest.fixture(params=["memory", "sqlite"])
async def kept(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ResponseStore]:
    made = ResponseStore(StoreOptions(url="memory" if request.param == "memory" else f"sqlite:///{tmp_path}/k.sqlite"))
    await made.start()
    yield made
    await made.close()


async def test_a_response_that_follows_shows_them_again(kept: ResponseStore) -> None:
    bench = Bench(kept)
    first = await bench.ask()
    assert (ran(first)["content"], ran(first)["output"], bench.result) == (SHOWN, TEXT, RENDERED)
    prompt = bench.engine.requests[-1].prompt_token_ids
    second = await bench.ask(input="Sure?", previous_response_id=first["id"])
    assert [item["type"] for item in second["output"]] == ["message"]
    assert bench.result == RENDERED
    last = bench.engine.requests[-1]
    assert list(last.prompt_token_ids[: len(prompt)]) == list(prompt)  # so the prefix cache has it
    assert len(last.images) == 1
    assert bench.engine.pictures[-1].digest == picture_of(FILE.getvalue()).digest
    # So does one that is sent the items, and one that refers to them.
    for item in (ran(first), {"type": "item_reference", "id": ran(first)["id"]}):
        bench = Bench(kept)
        await bench.ask(input=[{"role": "user", "content": "Draw."}, item, {"role": "user", "content": "Sure?"}])
        assert bench.result == RENDERED


async def test_conversations_and_calls_that_were_agreed_to_have_them_too(kept: ResponseStore) -> None:
    bench = Bench(kept)
    name = (await Conversations(kept).create("", ConversationCreateRequest())).id
    asked = (await bench.ask("always", conversation=name))["output"][-1]
    assert asked["type"] == "mcp_approval_request"
    agreed = {"type": "mcp_approval_response", "approval_request_id": asked["id"], "approve": True}
    made = await bench.ask("always", input=[agreed], conversation=name)
    assert ran(made)["content"] == SHOWN
    await bench.ask("always", input="Sure?", conversation=name)
    assert (bench.result, len(bench.engine.requests[-1].images)) == (RENDERED, 1)


async def test_where_they_cannot_be_shown_their_text_stands(kept: ResponseStore) -> None:
    first = await Bench(kept).ask()
    blind = Bench(kept, sees=False)
    await blind.ask(input="Sure?", previous_response_id=first["id"])
    assert blind.result == TEXT
    assert "content" not in ran(await Bench(kept, sees=False).ask())
    bench = Bench(kept)
    most = bench.engine.model_info.max_images
    full = [{"role": "user", "content": [{"type": "input_image", "image_url": URL}] * most}]
    await bench.ask(input=full, previous_response_id=first["id"])
    assert (bench.result, len(bench.engine.requests[-1].images)) == (TEXT, most)
    broken = {**ran(first), "content": [{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]}
    with pytest.raises(InvalidParameterError, match=r"input\.0\.content\.0\.image_url: this is not an image"):
        await bench.ask(input=[broken, {"role": "user", "content": "Sure?"}])


async def test_there_is_room_for_so_many_of_them(kept: ResponseStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_items, "MAX_SHOWN_OF_ITEM", len(URL) - 1)
    bench = Bench(kept)
    first = await bench.ask()
    assert bench.result == RENDERED
    assert "content" not in ran(first)
    await bench.ask(input="Sure?", previous_response_id=first["id"])
    assert bench.result == TEXT
    small = ResponseStore(StoreOptions(max_bytes=2 * len(URL)))  # half of it is for what else the answer has
    monkeypatch.undo()
    assert "content" not in ran(await Bench(small).ask())
    await small.close()
