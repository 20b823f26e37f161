# SPDX-License-Identifier: MIT
"""McpServerConfig: made in Python with the same checks, and silent about secrets."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

from candle_vllm.core.errors import ConfigError
from candle_vllm.responses.mcp.server_config import McpServerConfig
from candle_vllm.responses.mcp.server_values import OAuthClient


def test_made_in_python() -> None:
    server = McpServerConfig(name="a", command="x", args=["1", "2"], env={"K": "v"}, cwd="sub")
    assert (server.transport, server.args, server.cwd) == ("stdio", ("1", "2"), Path("sub"))
    assert server == McpServerConfig(name="a", command="x", args=("1", "2"), env={"K": "v"}, cwd=Path("sub"))
    assert hash(server) == hash(dataclasses.replace(server))
    assert not dataclasses.replace(server, enabled=False).enabled
    with pytest.raises(dataclasses.FrozenInstanceError):
        server.command = "y"
    with pytest.raises(TypeError):
        server.env["K"] = "w"


def test_made_of_a_mapping(tmp_path: Path) -> None:
    server = McpServerConfig.from_mapping("a", {"command": "x", "cwd": "sub", "timeout_ms": 500}, folder=tmp_path)
    assert server == McpServerConfig(name="a", command="x", cwd=tmp_path / "sub", timeout=0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "url must be given, and not both"),
        ({"command": "x", "timeout": float("nan")}, "timeout must be"),
        ({"command": "x", "timeout": float("inf")}, "timeout must be"),
        ({"command": "x", "connect_timeout": 601}, "connect_timeout must be more than 0 and at most 600"),
        ({"command": "x", "env": {1: "x"}}, "names and strings"),
        ({"command": "x", "transport": "http"}, "does not fit"),
        ({"url": "http://h", "transport": "websocket"}, "one of stdio, http, sse"),
        ({"command": "x", "enabled": 1}, "enabled must be true or false"),
        ({"command": "x", "allowed_tools": "a"}, "allowed_tools must be a list"),
        ({"command": "x", "instructions": "x" * 20_001}, "instructions has 20001 characters"),
        ({"url": "http://h", "auth": OAuthClient(client_id="", client_secret="x")}, "client_id must not be empty"),
        ({"url": "http://h", "auth": OAuthClient(client_id="x", client_secret="x", issuer="y")}, "auth.issuer must be"),
        ({"url": "http://h", "auth": " "}, "must be a token"),
    ],
)
def test_the_same_checks(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        McpServerConfig(name="a", **fields)
    assert str(error.value).startswith("MCP server 'a': ")


@pytest.mark.parametrize("name", ["", "  ", "a\0", "x" * 257, 3])
def test_names(name: Any) -> None:
    with pytest.raises(ConfigError, match="the name of an MCP server must be"):
        McpServerConfig(name=name, command="x")


def test_which_tools() -> None:
    server = McpServerConfig(
        name="a", command="x", allowed_tools=("read_*", "list"), excluded_tools=("read_secret",), auto_approve=("list",)
    )
    assert [name for name in ("read_a", "read_secret", "list", "lists", "write") if server.allows(name)] == [
        "read_a", "list",
    ]  # fmt: skip
    assert server.auto_approves("list")
    assert not server.auto_approves("read_a")
    assert McpServerConfig(name="a", command="x").allows("anything")


SECRETS = ("hush1", "hush2", "hush3", "hush4", "hush5")
URL = "https://hush1:hush2@host:1/p?key=hush3&hush4"


def secretive() -> list[McpServerConfig]:
    return [
        McpServerConfig(name="a", url=URL, headers={"X-Key": "hush5"}),
        McpServerConfig(name="b", url="https://host", auth="hush1"),
        McpServerConfig(name="c", url="https://host", auth="Basic hush1"),
        McpServerConfig(name="d", command="x", env={"TOKEN": "hush1"}),
        McpServerConfig(name="e", url="https://h", auth=OAuthClient(client_id="i", client_secret="hush2")),
        McpServerConfig(
            name="f",
            command="x",
            args=[
                "--api-key",
                "hush1",
                "--token=hush2",
                "--header",
                "Authorization: Bearer hush3",
                URL,
                "PASSWORD=hush5",
            ],
        ),
    ]


@pytest.mark.parametrize("server", secretive(), ids=lambda server: server.name)
def test_secrets_are_masked(server: McpServerConfig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        logging.getLogger("t").warning("%s %r", server, [server])
    for shown in (repr(server), str(server), f"{server}", json.dumps(server.masked()), caplog.text):
        assert not [secret for secret in SECRETS if secret in shown]
        assert "***" in shown


def test_what_is_not_secret_is_shown() -> None:
    assert McpServerConfig(name="a", url=URL, headers={"X-Key": "v"}, timeout=5).masked() == {
        "name": "a",
        "url": "https://***@host:1/p?key=***&***",
        "headers": {"X-Key": "***"},
        "timeout": 5,
    }
    local = McpServerConfig(
        name="a", command="uvx", args=["mcp-server-time", "--tz", "UTC"], env={"K": "v"}, cwd=Path("s")
    )
    assert local.masked() == {
        "name": "a",
        "transport": "stdio",
        "command": "uvx",
        "args": ["mcp-server-time", "--tz", "UTC"],
        "env": {"K": "***"},
        "cwd": "s",
    }


def test_the_value_of_an_option_is_masked_behind_another_option() -> None:
    server = McpServerConfig(name="a", command="x", args=["--no-auth", "--api-key", "hunter2", "plain"])
    assert server.masked()["args"] == ["--no-auth", "***", "***", "plain"]


@pytest.mark.parametrize("server", secretive()[:4], ids=lambda server: server.name)
def test_encoders_refuse_it(server: McpServerConfig) -> None:
    """Only `masked()` makes JSON: an encoder that walks the fields does not get through."""
    for encode in (msgspec.json.encode, json.dumps, lambda value: json.dumps(dataclasses.asdict(value))):
        with pytest.raises(TypeError):
            encode(server)


def test_errors_hold_no_secrets() -> None:
    for fields in (
        {"url": "ftp://hush1@h"},
        {"url": "http://h", "headers": {"A": "hush1\n"}},
        {"url": "http://h", "auth": "hush1\n"},
        {"url": "http://h", "auth": "hush1é"},
        {"command": "x", "env": {"A": "hush1\0"}},
        {"command": "x", "args": ["hush1\0"]},
    ):
        with pytest.raises(ConfigError) as error:
            McpServerConfig(name="a", **fields)
        assert "hush1" not in str(error.value)
