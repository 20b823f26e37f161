# SPDX-License-Identifier: MIT
"""mcp.json: where it is found, the forms that it may have, and what is wrong with others."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core.errors import ConfigError
from candle_vllm.responses.mcp.config import McpConfig, McpInput, find_mcp_config, load_mcp_config
from candle_vllm.responses.mcp.server_values import OAuthClient

Load = Callable[..., McpConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """`load(content, environ={}, inputs=None)`: what a file of this content gives; text stands as it is."""

    def loaded(content: Any, environ: dict[str, str] | None = None, **options: Any) -> McpConfig:
        path = tmp_path / "mcp.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return load_mcp_config(environ=environ or {}, workspace=tmp_path, **options)

    return loaded


def one(server: dict[str, Any]) -> dict[str, Any]:
    return {"mcpServers": {"s": server}}


TIME = {"command": "uvx", "args": ["mcp-server-time"]}


def test_the_order_of_the_places(tmp_path: Path) -> None:
    for name in ("flag.json", "variable.json"):
        (tmp_path / name).write_text("{}")
    variable = {"CANDLE_VLLM_MCP_CONFIG": "variable.json"}
    assert find_mcp_config(None, {}, tmp_path) is None
    (tmp_path / "mcp.json").write_text("{}")
    assert find_mcp_config(None, {}, tmp_path) == tmp_path / "mcp.json"
    assert find_mcp_config(None, {"CANDLE_VLLM_MCP_CONFIG": ""}, tmp_path) == tmp_path / "mcp.json"
    assert find_mcp_config(None, variable, tmp_path) == tmp_path / "variable.json"
    assert find_mcp_config("flag.json", variable, tmp_path) == tmp_path / "flag.json"
    home = tmp_path / "home"
    assert find_mcp_config(None, {"HOME": str(home)}, tmp_path) == tmp_path / "mcp.json"
    (home / ".candle-vllm").mkdir(parents=True)
    (home / ".candle-vllm" / "mcp.json").write_text("{}")
    assert find_mcp_config(None, {"HOME": str(home)}, tmp_path) == home / ".candle-vllm" / "mcp.json"
    with pytest.raises(ConfigError, match=r"--mcp-config: the file .*none.json does not exist"):
        find_mcp_config("none.json", variable, tmp_path)
    with pytest.raises(ConfigError, match=r"CANDLE_VLLM_MCP_CONFIG: the file .* does not exist"):
        find_mcp_config(None, {"CANDLE_VLLM_MCP_CONFIG": "none.json"}, tmp_path)


def test_no_file_is_no_servers(tmp_path: Path) -> None:
    assert load_mcp_config(environ={}, workspace=tmp_path) == McpConfig()


@pytest.mark.parametrize(
    "content",
    [
        {"mcpServers": {"time": TIME}},
        {"mcpServers": [{"name": "time", **TIME}]},
        {"servers": {"time": {"type": "stdio", **TIME}}, "inputs": []},
        {"servers": [{"id": "time", **TIME}]},
        {"time": TIME},
        {"$schema": "x", "time": TIME},
        [{"name": "time", **TIME}],
        {"mcp": {"servers": {"time": TIME}}, "editor.fontSize": 12},
    ],
)
def test_the_forms_of_a_file(load: Load, content: Any) -> None:
    config = load(content)
    (server,) = config.servers
    assert (server.name, server.transport, server.command, server.args) == (
        "time", "stdio", "uvx", ("mcp-server-time",),
    )  # fmt: skip
    assert config.server("time") is server
    assert config.server("other") is None


@pytest.mark.parametrize("content", ["{}", "[]", '{"mcpServers": {}}', '{"servers": []}'])
def test_a_file_without_servers(load: Load, content: str) -> None:
    assert load(content).servers == ()


def test_comments_and_trailing_commas(load: Load) -> None:
    text = """\ufeff// the servers
    {"mcpServers": { /* one
       of them */ "s": {"command": "a//b", "args": ["/* no comment */", "x,]", "\\"//",], // two
    },}, /* and "no" more */ }"""
    (server,) = load(text).servers
    assert server.command == "a//b"
    assert server.args == ("/* no comment */", "x,]", '"//')


def test_what_runs_a_program_is_no_transport(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    """candle-vllm's files say "node" or "python" there."""
    assert load(one({"type": "node", "command": "x"})).servers[0].transport == "stdio"
    assert "type 'node' is a program that runs the server, not a transport" in caplog.text
    with pytest.raises(ConfigError, match="the server has a url"):
        load(one({"type": "node", "url": "http://h/mcp"}))


@pytest.mark.parametrize(
    ("given", "transport"),
    [("stdio", None), ("http", "http"), ("streamable-http", "http"), ("streamableHttp", "http"), ("sse", "sse")],
)
def test_the_names_of_transports(load: Load, given: str, transport: str | None) -> None:
    if given == "stdio":
        assert load(one({"type": given, "command": "x"})).servers[0].transport == "stdio"
    else:
        assert load(one({"type": given, "url": "http://h/mcp"})).servers[0].transport == transport
    assert load(one({"url": "http://h/mcp"})).servers[0].transport is None


@pytest.mark.parametrize(
    ("entry", "field", "value"),
    [
        ({"timeout": 5}, "timeout", 5.0),
        ({"timeout_ms": 1500}, "timeout", 1.5),
        ({"timeout_secs": 7}, "timeout", 7.0),
        ({"connectTimeout": 3}, "connect_timeout", 3.0),
        ({"disabled": True}, "enabled", False),
        ({"enabled": False}, "enabled", False),
        ({"disabled": False}, "enabled", True),
        ({"autoApprove": ["a", "b*"]}, "auto_approve", ("a", "b*")),
        ({"alwaysAllow": "*"}, "auto_approve", ("*",)),
        ({"autoApprove": True}, "auto_approve", ("*",)),
        ({"autoApprove": False}, "auto_approve", ()),
        ({"includeTools": ["a"]}, "allowed_tools", ("a",)),
        ({"tools": ["*"]}, "allowed_tools", ("*",)),
        ({"allowed_tools": []}, "allowed_tools", ()),
        ({"excludeTools": ["b"]}, "excluded_tools", ("b",)),
        ({"instructions": "ask first"}, "instructions", "ask first"),
        ({"url": "http://h/a", "auth": "abc"}, "auth", "abc"),
        ({"url": "http://h/a", "auth": "Bearer abc"}, "auth", "abc"),
        ({"serverUrl": "https://h/a"}, "url", "https://h/a"),
        ({"timeout": None}, "timeout", 60.0),
    ],
)
def test_the_keys(load: Load, entry: dict[str, Any], field: str, value: Any) -> None:
    remote = "url" in entry or "serverUrl" in entry
    assert getattr(load(one(entry if remote else {"command": "x", **entry})).servers[0], field) == value


def test_other_schemes_become_the_header(load: Load) -> None:
    server = load(one({"url": "http://h/a", "auth": "Basic Zm9v", "headers": {"X": "y"}})).servers[0]
    assert server.auth is None
    assert dict(server.headers) == {"X": "y", "Authorization": "Basic Zm9v"}


def test_oauth_clients(load: Load) -> None:
    auth = {"CLIENT_ID": "${ID}", "CLIENT_SECRET": "${env:SECRET}", "scopes": ["read", "write"]}
    server = load(one({"url": "https://h/a", "auth": auth}), {"ID": "me", "SECRET": "hush"}).servers[0]
    assert server.auth == OAuthClient(client_id="me", client_secret="hush", scopes=("read", "write"))
    assert "hush" not in repr(server)
    assert "hush" not in repr(server.auth)
    with pytest.raises(ConfigError, match="needs CLIENT_ID and CLIENT_SECRET: signing in with a browser"):
        load(one({"url": "https://h/a", "auth": {"CLIENT_ID": "me"}}))
    with pytest.raises(ConfigError, match=r"unknown key 'CLIENT_SECRETS' \(did you mean CLIENT_SECRET\?\)"):
        load(one({"url": "https://h/a", "auth": {"CLIENT_SECRETS": "me"}}))


def test_folders_start_at_the_file(load: Load, tmp_path: Path) -> None:
    (tmp_path / "e.env").write_text("A=1\nB='two words' # why\nexport C=${A}\n")
    server = load(one({"command": "x", "cwd": "sub", "envFile": "e.env", "env": {"A": "mine", "N": 3, "T": True}}))
    assert server.servers[0].cwd == tmp_path / "sub"
    assert dict(server.servers[0].env) == {"A": "mine", "B": "two words", "C": "${A}", "N": "3", "T": "true"}
    assert load(one({"command": "x", "cwd": "/abs"})).servers[0].cwd == Path("/abs")


def test_variables_are_expanded_where_values_stand(load: Load, tmp_path: Path) -> None:
    entry = {
        "command": "${env:BIN}/x",
        "args": ["--dir=${workspaceFolder}", "${MISSING:-def ault}", "$HOME $$ $", "${EMPTY:-e}${EMPTY}"],
        "env": {"K": "${input:my-key}", "H": "${userHome}"},
        "instructions": "write ${BIN}",
    }
    environ = {"BIN": "/opt/${HOME}", "HOME": "/home/me", "EMPTY": "", "MCP_INPUT_MY_KEY": "answer"}
    server = load(one(entry), environ).servers[0]
    assert server.command == "/opt/${HOME}/x"  # what was put in is not expanded again
    assert server.args == (f"--dir={tmp_path}", "def ault", "$HOME $$ $", "e")
    assert dict(server.env) == {"K": "answer", "H": "/home/me"}
    assert server.instructions == "write ${BIN}"


def test_inputs_are_asked_once(load: Load) -> None:
    declared = {"type": "promptString", "id": "key", "description": "the key", "password": True}
    content = {"inputs": [declared], "servers": {"s": {"command": "x", "args": ["${input:key}", "${input:key}"]}}}
    asked: list[McpInput] = []

    def answer(item: McpInput) -> str:
        asked.append(item)
        return "typed"

    assert load(content, {"MCP_INPUT_KEY": "set"}, inputs=answer).servers[0].args == ("typed", "typed")
    assert asked == [McpInput(id="key", description="the key", password=True)]
    assert load(content, {"MCP_INPUT_KEY": "set"}, inputs={"key": "mapped"}).servers[0].args[0] == "mapped"
    assert load(content, {"MCP_INPUT_KEY": "set"}, inputs=lambda _: None).servers[0].args[0] == "set"
    with pytest.raises(ConfigError, match=r"'s': args\[0\]: the input key has no answer; .* MCP_INPUT_KEY"):
        load(content)
    with pytest.raises(ConfigError, match="the answer to the input key must be text"):
        load(content, inputs={"key": 3})
    declared |= {"default": "b", "options": ["a", "b"]}
    assert load(content).servers[0].args[0] == "b"
    with pytest.raises(ConfigError, match="must be one of a, b"):
        load(content, inputs={"key": "c"})


def test_options_of_an_input_that_are_no_list(load: Load) -> None:
    content = {"servers": {"a": {"command": "${input:c}"}}, "inputs": [{"id": "c", "options": 5, "default": "x"}]}
    assert load(content).servers[0].command == "x"


def test_few_warnings_of_many_unknown_keys(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    load({"mcpServers": {"a": TIME}, **dict.fromkeys(map(str, range(1000)))})
    assert len(caplog.records) == 20


def test_an_unset_variable_names_server_and_key(load: Load) -> None:
    for entry, place in (
        ({"url": "http://h/a", "headers": {"X-Key": "${TOKEN}"}}, "headers.X-Key"),
        ({"command": "x", "args": ["ok", "${env:TOKEN}"]}, r"args\[1\]"),
        ({"command": "${TOKEN}"}, "command"),
        ({"url": "http://h/${TOKEN}"}, "url"),
    ):
        with pytest.raises(
            ConfigError, match=rf"mcp.json: MCP server 's': {place}: .* TOKEN is not set; set it"
        ) as error:
            load(one(entry))
        assert str(error.value).count("mcp.json") == 1


def test_disabled_servers_need_nothing(load: Load) -> None:
    entry = {"disabled": True, "url": "${ADDRESS}", "headers": {"A": "${TOKEN}"}}
    server = load(one(entry)).servers[0]
    assert not server.enabled
    assert server.url == "${ADDRESS}"
    assert not load(one({"command": "x", "enabled": False, "envFile": "none"})).servers[0].enabled


def test_unknown_keys_are_told(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load({"mcpServers": {"s": {"command": "x", "arg": ["y"]}}, "input": []})
    assert "MCP server 's': the key 'arg' is not known and has no effect (did you mean args?)" in caplog.text
    assert "the key 'input' is not known and has no effect (did you mean inputs?)" in caplog.text


WRONG: list[tuple[Any, str]] = [
    ("", "not valid JSON"),
    ('{"mcpServers": {"a": {"command": "x"}, "a": {"command": "y"}}}', "'a' appears twice"),
    ('{"mcpServers": {}, /* never closed', "not valid JSON"),
    ('{"mcpServers": {} // "', "not valid JSON: .* at line 1"),
    ("[" * 100_000, "nested too deeply"),
    ('{"a":' * 70 + "1" + "}" * 70, "nested too deeply"),
    ("3", "there must be an object or a list"),
    ({"mcpServers": 3}, "there must be an object or a list"),
    ({"mcpServers": {}, "servers": {}}, 'both "mcpServers" and "servers"'),
    ({"command": "x", "args": []}, "the servers must be keyed by their names"),
    (["x"], 'server 1 of the list needs a "name"'),
    ([{"name": "a", **TIME}, {"name": "a", **TIME}], "two servers are named 'a'"),
    ({"a": 3}, "MCP server 'a' must be an object"),
    ({"a": {}}, "MCP server 'a': command or url must be given, and not both"),
    ({"a": {"command": "x", "url": "http://h"}}, "url must be given, and not both"),
    ({"a": {"command": ""}}, "command must not be empty"),
    ({"a": {"command": ["x"]}}, "command must be a string, not a list"),
    ({"a": {"command": "x\0"}}, "NUL"),
    ({"mcp_servers": {"a": {"command": "x"}}}, "the unknown key 'mcp_servers' contains servers: rename it"),
    ({"a": {"command": "x", **dict.fromkeys(map(str, range(256)))}}, "entry has 257 keys, and 256 are allowed"),
    ('{"a": {"command": "x", "timeout": 1' + "0" * 400 + "}}", "timeout must be more than 0 and at most 3600 seconds"),
    ({"a": {"command": "x", "args": "y"}}, "args must be a list of strings, not a string"),
    ({"a": {"command": "x", "args": [1]}}, r"args\[0\] must be a string, not a number"),
    ({"a": {"command": "x", "args": ["y"] * 257}}, "args has 257 entries, and 256"),
    ({"a": {"command": "x", "args": ["y" * 32_769]}}, r"args\[0\] has 32769 characters"),
    ({"a": {"command": "x", "env": []}}, "env must be an object of names and strings"),
    ({"a": {"command": "x", "env": {"A=B": "c"}}}, "'A=B', which no environment variable can have"),
    ({"a": {"command": "x", "env": {"A": ["c"]}}}, "env.A must be a string"),
    ({"a": {"command": "x", "headers": {"A": "b"}}}, "headers cannot be used: the server has a command"),
    ({"a": {"command": "x", "auth": "b"}}, "auth cannot be used"),
    ({"a": {"command": "x", "type": "http"}}, "transport does not fit: the server has a command"),
    ({"a": {"command": "x", "type": "websocket"}}, "type must be one of stdio, http, .*, not 'websocket'"),
    ({"a": {"url": "http://h", "type": "stdio"}}, "transport does not fit: the server has a url"),
    ({"a": {"url": "http://h", "env": {"A": "b"}}}, "env cannot be used: the server has a url"),
    ({"a": {"url": "http://h", "envFile": "e"}}, "envFile cannot be used"),
    ({"a": {"envFile": "none.env"}}, "none.env does not exist"),
    ({"a": {"url": "ftp://h"}}, "url must be an address with http"),
    ({"a": {"url": "http://"}}, "url must be an address"),
    ({"a": {"url": "http://h:99999/"}}, "url must be an address"),
    ({"a": {"url": "http://h/a b"}}, "url must be an address"),
    ({"a": {"url": "http://h/\r\nX: y"}}, "one line"),
    ({"a": {"url": "http://h", "headers": {"A b": "c"}}}, "'A b', which no HTTP header can have"),
    ({"a": {"url": "http://h", "headers": {"A": "c\r\nD: e"}}}, "headers.A must be one line"),
    ({"a": {"url": "http://h", "headers": {"A": "é"}}}, "headers.A must be ASCII"),
    ({"a": {"url": "http://h", "headers": {"A": "b", "a": "c"}}}, "has a twice"),
    ({"a": {"url": "http://h", "auth": "x", "headers": {"authorization": "y"}}}, "give one"),
    ({"a": {"url": "http://u:p@h", "auth": "x"}}, "the user in url"),
    ({"a": {"url": "http://h", "auth": 3}}, "auth must be a token, or an object"),
    ({"a": {"command": "x", "timeout": 0}}, "timeout must be more than 0 and at most 3600 seconds, not 0"),
    ({"a": {"command": "x", "timeout": 30_000}}, "for milliseconds write timeout_ms"),
    ({"a": {"command": "x", "timeout": True}}, "timeout must be a number of seconds, not true or false"),
    ({"a": {"command": "x", "timeout": 1, "timeout_ms": 1}}, "timeout_ms and timeout are the same setting"),
    ({"a": {"command": "x", "enabled": True, "disabled": True}}, "disabled and enabled are the same setting"),
    ({"a": {"command": "x", "disabled": "yes"}}, "disabled must be true or false, not a string"),
    ({"a": {"command": "x", "autoApprove": "a"}}, "autoApprove must be a list of strings"),
    ({"a": {"command": "x", "sandboxEnabled": True}}, "asks for a sandbox"),
    ({"a": {"command": "x", "envFile": "none.env"}}, "'a': envFile: .*none.env does not exist"),
    ({"a": {"command": "${x y}"}}, r"'a': command: \$\{x y\} is not known"),
    ({"a": {"command": "${command:pick}"}}, "is not known"),
    ({"a": {"command": "${A:-${B}}"}}, "inside of another"),
    ({"a": {"command": "${A"}}, "without a"),
    ({"a\nb": TIME}, "must be 1 to 256 characters on one line"),
    ({"": TIME}, "must be 1 to 256 characters"),
    ({f"s{n}": TIME for n in range(65)}, "65 servers; at most 64 are allowed"),
    ({"servers": {}, "inputs": {}}, '"inputs" must be a list'),
    ({"servers": {}, "inputs": [{"id": "a"}, {"id": "a"}]}, 'input 2 needs an "id" of its own'),
]


@pytest.mark.parametrize(("content", "message"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_what_is_wrong_is_told(load: Load, content: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(content)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "mcp.json"
    for content, message in ((b" " * (1 << 20) + b"{}", "larger than 1 MB"), (b"{\xff}", "not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            load_mcp_config(path, environ={}, workspace=tmp_path)
    with pytest.raises(ConfigError, match="is a folder"):
        load_mcp_config(tmp_path, environ={}, workspace=tmp_path)
    path.write_text(json.dumps({"a": {"command": "x", "envFile": "x" * 3000}}))
    with pytest.raises(ConfigError, match="envFile: cannot read"):
        load_mcp_config(path, environ={}, workspace=tmp_path)
    for place in ("~nobody-of-this-name/mcp.json", "x" * 3000):
        with pytest.raises(ConfigError, match="does not exist"):
            find_mcp_config(place, {}, tmp_path)
    path.write_text('{"a": {"command": "x", "envFile": "pipe"}}')
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is no plain file"):
        load_mcp_config(path, environ={}, workspace=tmp_path)
    (tmp_path / "pipe").unlink()
    (tmp_path / "pipe").write_text("A=1\nwhat is this\n")
    with pytest.raises(ConfigError, match="on line 2"):
        load_mcp_config(path, environ={}, workspace=tmp_path)


@pytest.mark.one_of_each(7)
@pytest.mark.parametrize("piece", ["/*", "//", '"', ",", ", ", "${", "\\", '/*"*/', "[,"])
def test_hostile_text_takes_no_time(load: Load, piece: str) -> None:
    with pytest.raises(ConfigError):
        load("[" + piece * (1_000_000 // len(piece)))
