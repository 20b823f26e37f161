# SPDX-License-Identifier: MIT
"""A peer's log: the last lines, cut, cleaned and without secrets."""

from __future__ import annotations

import pytest

from candle_vllm.responses.mcp import peer
from candle_vllm.responses.mcp.server_config import McpServerConfig


def test_a_log_keeps_the_last_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "MAX_LINES", 3)
    monkeypatch.setattr(peer, "MAX_LINE_CHARS", 10)
    server = peer.Peer(McpServerConfig(name="test", command="x", env={"KEY": "secret"}))
    assert server.log_lines() == []
    for line in ("one", "", "\x1b[2J", "a secret", "x" * 50, "tab\there\r\n"):
        server.log(line)
    assert server.log_lines() == ["a ***", "x" * 9 + "…", "tab\there"]
