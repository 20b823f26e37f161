# SPDX-License-Identifier: MIT
"""Images of an MCP server's tools, in the answers of a server whose model sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packages.server.tests.mcp_fakes import call_text, stdio_config, turns
from packages.server.tests.server_fakes import PacedEngine

SERVER = """
import io
from mcp.server import MCPServer
from mcp.server.mcpserver import Image
from PIL import Image as Pillow

server = MCPServer("painter")

@server.tool()
def draw() -> Image:
    "A red picture."
    file = io.BytesIO()
    Pillow.new("RGB", (4, 3), "red").save(file, "PNG")
    return Image(data=file.getvalue(), format="png")

server.run(transport="stdio")
"""
TOOL: Any = {"type": "mcp", "server_label": "painter", "require_approval": "never"}


@pytest.mark.parametrize("sees", [True, False])
def test_they_reach_a_model_that_sees(start_mcp: Callable[..., Any], tmp_path: Path, sees: bool) -> None:
    (tmp_path / "painter.py").write_text(SERVER)
    engine = PacedEngine(turns(call_text("painter__draw"), "It is red."), sees=sees)
    config = stdio_config(tmp_path, "painter", args=[str(tmp_path / "painter.py")])
    running = start_mcp(engine, [config], execute=True)
    client = running.openai()

    def seen() -> tuple[str, bool]:
        content = engine.template_calls[-1].messages[-1]["content"]
        found = [picture.pixels[0, 0].tolist() for picture in engine.pictures[-1:]]
        return ("text" if isinstance(content, str) else content[0]["type"]), found == [[255, 0, 0]]

    answer = client.chat.completions.create(model="default", messages=[{"role": "user", "content": "Draw."}])
    assert answer.choices[0].message.content == "It is red."
    assert seen() == (("image", True) if sees else ("text", False))
    engine._script = turns(call_text("painter__draw"), "It is red.")
    engine.pictures.clear()
    response = client.responses.create(model="default", input="Draw.", tools=[TOOL])
    assert response.output_text == "It is red."
    assert seen() == (("image", True) if sees else ("text", False))
    output: Any = response.output[1]
    assert output.output.startswith("[image: image/png, ")
    # A response that goes on from it shows the model the same.
    engine.pictures.clear()
    client.responses.create(model="default", input="And now?", previous_response_id=response.id, tools=[TOOL])
    del engine.template_calls[-1].messages[3:]  # the answer, and what was asked next
    assert seen() == (("image", True) if sees else ("text", False))
