# SPDX-License-Identifier: MIT
"""The example file and the files in the documentation are what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from candle_vllm.responses.mcp.config import load_mcp_config

ROOT = Path(__file__).parents[4]
ENVIRON = {"HOME": "/home/me", "GITHUB_TOKEN": "t", "MCP_INPUT_WIKI_TOKEN": "w", "DOCS_TOKEN": "d"}


def test_the_example_loads(caplog: pytest.LogCaptureFixture) -> None:
    config = load_mcp_config(ROOT / "example.mcp.json", environ=ENVIRON, workspace=ROOT)
    assert not caplog.records
    assert {server.transport for server in config.servers} >= {"stdio", "http", None}
    assert any(not server.enabled for server in config.servers)


def test_the_documentation_loads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    section = (ROOT / "docs" / "mcp.md").read_text().partition("\n## mcp.json\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```jsonc?\n(.*?)```", section, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        path = tmp_path / "mcp.json"
        path.write_text(block)
        assert load_mcp_config(path, environ=ENVIRON, workspace=tmp_path).servers
    assert not caplog.records


def test_every_key_is_documented() -> None:
    from candle_vllm.responses.mcp.server_keys import FIELD_OF

    text = (ROOT / "docs" / "mcp.md").read_text()
    assert not [key for key in FIELD_OF if f"`{key}`" not in text]
