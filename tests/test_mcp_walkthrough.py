# SPDX-License-Identifier: MIT
"""docs/mcp.md, "From nothing to a working agent": every step, with the demo model; the last one downloads another."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live_server import COMMAND, ServerProcess, clean_environment
from tests.waiting import wait_for

PAGE = (Path(__file__).parents[1] / "docs" / "mcp.md").read_text(encoding="utf-8")
WALK = PAGE.split("## From nothing to a working agent\n")[1].split("\n## ")[0]
BIN = Path(sys.executable).parent
PATH = f"{BIN}{os.pathsep}{os.environ['PATH']}"  # as `uv run` has it


def blocks(language: str) -> list[str]:
    """The code blocks of the walk, as they are typed."""
    found = re.findall(rf"^   ```{language}\n(.*?)^   ```$", WALK, re.MULTILINE | re.DOTALL)
    return [re.sub(r"^   ", "", block, flags=re.MULTILINE) for block in found]


def requests() -> list[list[str]]:
    """Every curl command, split as a shell does it."""
    text = "\n".join(blocks("sh")).replace("\\\n", "")  # lines that go on
    return [shlex.split(found) for found in re.findall(r"^curl (?:\n     |[^\n])*", text, re.MULTILINE)]


def send(server: ServerProcess, words: list[str]) -> Any:
    """What a curl command prints."""
    url = words[1].replace("http://127.0.0.1:2000", server.url)
    options = list(zip(words[2::2], words[3::2], strict=True))
    headers = dict(value.split(": ", 1) for name, value in options if name == "-H")
    body = next((value for name, value in options if name == "-d"), None)
    answer = httpx.request(
        "GET" if body is None else "POST", url, headers=headers, content=body, timeout=60, trust_env=False
    )
    assert answer.status_code == 200, answer.text
    return answer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder after the first two steps."""
    shop, agent = blocks("python")
    (config,) = blocks("json")
    (tmp_path / "shop.py").write_text(shop)
    (tmp_path / "agent.py").write_text(agent)
    (tmp_path / "mcp.json").write_text(config)
    return tmp_path


def started(folder: Path, command: str) -> ServerProcess:
    flags = shlex.split(command.removeprefix("uv run candle-vllm "))
    return ServerProcess(folder, *flags, command=("env", f"PATH={PATH}", COMMAND))


@pytest.mark.every_case
def test_the_server_by_hand_and_by_itself(folder: Path) -> None:
    plain, executing = re.findall(r"^uv run candle-vllm --api-key.*$", "\n".join(blocks("sh")), re.MULTILINE)
    servers, tools, call, chat = requests()
    server = started(folder, plain)
    try:
        assert "MCP servers      shop; clients run their tools" in [line.strip() for line in server.banner]
        wait_for(lambda: send(server, servers).json()["data"][0]["state"] == "ready")
        assert [one["function"]["name"] for one in send(server, tools).json()["data"]] == ["shop__stock", "shop__order"]
        assert send(server, call).text.startswith('{"status":"completed","content":[{"kind":"text","text":"12"}]')
        choice = send(server, chat).json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "shop__stock"
    finally:
        assert server.stop() == 0
    server = started(folder, executing)
    try:
        choice = send(server, chat).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert "12" in choice["message"]["content"]  # the result is in the prompt
        (made,) = choice["mcp_calls"]
        assert (made["server"], made["name"], made["status"]) == ("shop", "shop__stock", "completed")
    finally:
        assert server.stop() == 0
    log = (folder / "server.log").read_text()
    assert "tools that run in chat requests: shop__stock\n" in log
    assert "does not approve them: shop__order\n" in log


def test_the_program(folder: Path) -> None:
    environment = clean_environment(folder) | {"PATH": PATH}
    made = subprocess.run(
        [sys.executable, "agent.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    called, answer = made.stdout.splitlines()[0], made.stdout.splitlines()[1:]
    assert called == "[('shop__stock', '12')]"
    assert "".join(answer)
