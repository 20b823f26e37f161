# SPDX-License-Identifier: MIT
"""Links to MCP servers that others wrote: Python ones of the newer protocol era, JavaScript ones of the older."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from candle_vllm.responses.mcp.fleet import McpFleet
from candle_vllm.responses.mcp.link import McpLink
from candle_vllm.responses.mcp.server_config import McpServerConfig
from candle_vllm.responses.tools.tool import ToolError, ToolOutput, ToolProgress, ToolTimedOutError
from tests.mcp_servers import everything_over_http, npm_server, python_server
from tests.waiting import until

pytestmark = [pytest.mark.peer, pytest.mark.timeout(600)]


def said(output: ToolOutput) -> str:
    return "\n".join(part.text or "" for part in output.content)


@pytest.mark.every_case
async def test_time() -> None:
    async with McpLink(python_server("mcp-server-time")) as link:
        assert link.protocol_version == "2026-07-28"
        assert set(link.tools) == {"get_current_time", "convert_time"}
        arguments = {"source_timezone": "UTC", "time": "12:00", "target_timezone": "Asia/Tokyo"}
        output = await link.call("convert_time", arguments)
        assert output.structured["time_difference"] == "+9.0h"
        assert json.loads(said(output)) == output.structured
        wrong = await link.call("get_current_time", {"timezone": "Nowhere/Town"})
        assert wrong.is_error
        assert "Nowhere/Town" in said(wrong)


@pytest.mark.every_case
async def test_git(tmp_path: Path) -> None:
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.invalid")
    (tmp_path / "note.txt").write_text("one\n")
    for command in (("init", "-q", "-b", "main"), ("add", "."), (*identity, "commit", "-q", "-m", "the first")):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    (tmp_path / "note.txt").write_text("two\n")
    async with McpLink(python_server("mcp-server-git", "--repository", str(tmp_path))) as link:
        assert link.protocol_version == "2026-07-28"
        assert "the first" in said(await link.call("git_log", {"repo_path": str(tmp_path)}))
        changed = said(await link.call("git_diff_unstaged", {"repo_path": str(tmp_path)}))
        assert "-one" in changed
        assert "+two" in changed
        outside = await link.call("git_log", {"repo_path": "/"})
        assert outside.is_error


@pytest.fixture
def page() -> Iterator[str]:
    """The address of a page on the loopback."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<html><body><h1>A heading</h1><p>Some words.</p></body></html>"
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.mark.every_case
async def test_fetch(page: str) -> None:
    async with McpLink(python_server("mcp-server-fetch", "--allow-private-ips", "--ignore-robots-txt")) as link:
        assert link.protocol_version == "2026-07-28"
        assert "Some words." in said(await link.call("fetch", {"url": page, "raw": True}))
        with contextlib.suppress(ToolError):
            assert (await link.call("fetch", {"url": "http://127.0.0.1:9/"})).is_error


async def test_filesystem(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("in a file")
    async with McpLink(npm_server("server-filesystem", str(tmp_path))) as link:
        assert link.protocol_version == "2025-11-25"
        assert len(link.tools) == 14
        assert "in a file" in said(await link.call("read_text_file", {"path": str(tmp_path / "a.txt")}))
        await link.call("write_file", {"path": str(tmp_path / "b.txt"), "content": "written"})
        assert (tmp_path / "b.txt").read_text() == "written"
        refused = await link.call("read_text_file", {"path": "/etc/hostname"})
        assert refused.is_error
        assert "outside allowed directories" in said(refused)


@contextlib.contextmanager
def everything(transport: str) -> Iterator[McpServerConfig]:
    if transport == "stdio":
        yield npm_server("server-everything", "stdio")
    else:
        with everything_over_http(transport) as url:
            yield McpServerConfig(name="test", url=url)


@pytest.mark.one_of_each(2)
@pytest.mark.every_case
@pytest.mark.parametrize("transport", ["stdio", "streamableHttp", "sse"])
async def test_everything(transport: str) -> None:
    with everything(transport) as config:
        async with McpLink(config) as link:
            expected = {"stdio": "stdio", "streamableHttp": "http", "sse": "sse"}
            assert (link.transport, link.protocol_version) == (expected[transport], "2025-11-25")
            assert said(await link.call("echo", {"message": "hello"})) == "Echo: hello"
            image = (await link.call("get-tiny-image", {})).content[1]
            assert (image.kind, image.mime_type) == ("image", "image/png")
            links = (await link.call("get-resource-links", {"count": 3})).content
            assert [part.kind for part in links] == ["text", *["resource_link"] * 3]
            embedded = (await link.call("get-resource-reference", {"resourceType": "Text", "resourceId": 1})).content
            assert "resource" in [part.kind for part in embedded]
            structured = await link.call("get-structured-content", {"location": "New York"})
            assert set(structured.structured) == {"temperature", "conditions", "humidity"}
            steps: list[ToolProgress] = []
            await link.call("trigger-long-running-operation", {"duration": 0.5, "steps": 5}, report=steps.append)
            assert [step.progress for step in steps] == [1, 2, 3, 4, 5]
            with pytest.raises(ToolTimedOutError):
                await link.call("trigger-long-running-operation", {"duration": 30, "steps": 5}, timeout=0.5)
            wrong = await link.call("get-sum", {"a": "no number"})
            assert wrong.is_error
            assert said(await link.call("echo", {"message": "still"})) == "Echo: still"
            assert link.reconnects == 0


@pytest.mark.every_case
async def test_a_session_of_the_older_era_is_made_anew(tmp_path: Path) -> None:
    """The SDK alone never does that: each call after the restart would fail."""
    with everything_over_http("streamableHttp") as url:
        config = McpServerConfig(name="test", url=url)
        link = McpLink(config)
        await link.start()
    port = url.split(":")[2].split("/")[0]
    with pytest.raises(ToolError):
        await link.call("echo", {"message": "gone"}, timeout=2.0)
    with everything_over_http("streamableHttp", port=int(port)):
        await until(lambda: link.state == "ready" and not link.error, 40)
        assert said(await link.call("echo", {"message": "again"})) == "Echo: again"
    await link.aclose()


@pytest.mark.every_case
async def test_a_fleet_of_both_eras(tmp_path: Path) -> None:
    configs = [
        python_server("mcp-server-time", label="time"),
        npm_server("server-filesystem", str(tmp_path), label="files"),
        npm_server("server-everything", "stdio", label="every thing"),
    ]
    async with McpFleet(configs, strict=True) as fleet:
        names = [definition.name for definition in fleet.registry.definitions()]
        assert names[0] == "time__get_current_time"
        assert "files__read_text_file" in names
        assert [(status.state, status.protocol_version) for status in fleet.status()] == [
            ("ready", "2026-07-28"),
            ("ready", "2025-11-25"),
            ("ready", "2025-11-25"),
        ]
        tool = next(tool for tool in fleet.registry if tool.definition.original_name == "echo")
        assert said(await tool.run({"message": "x"}, lambda progress: None)) == "Echo: x"
