# SPDX-License-Identifier: MIT
"""From settings to MCP servers: mcp.json, `--mcp-command`, and what is refused at the start."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from fastapi import FastAPI

from candle_vllm.core.errors import ConfigError
from candle_vllm.server import Settings
from candle_vllm.server.cli import main
from candle_vllm.server.mcp.options import mcp_options, split_arguments
from candle_vllm.server.mcp.service import McpService
from candle_vllm.server.serve import mcp_line
from candle_vllm.server.settings.command_line import parse
from candle_vllm.server.settings.options import UsageError
from tests.waiting import PATIENCE


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CANDLE_VLLM_MCP_CONFIG", raising=False)
    monkeypatch.setattr("candle_vllm.server.cli.configure_logging", lambda *_: None)  # it outlives the test
    return tmp_path


def write(path: Path, **servers: object) -> Path:
    path.write_text(json.dumps({"mcpServers": servers or {"one": {"command": "x"}}}))
    return path


def test_nothing_is_no_servers() -> None:
    assert mcp_options(Settings()) is None


def test_the_file_of_the_flag_or_that_of_the_folder(folder: Path) -> None:
    write(folder / "mcp.json", near={"command": "x"})
    write(folder / "other.json", far={"command": "x", "timeout": 300}, off={"command": "y", "enabled": False})
    near, far = mcp_options(Settings()), mcp_options(Settings(mcp_config=Path("other.json")))
    assert near is not None
    assert [server.name for server in near.servers] == ["near"]
    assert (near.execute, near.max_turns, near.max_tool_calls) == (False, 8, 32)
    assert far is not None
    assert [server.name for server in far.servers] == ["far", "off"]
    assert [server.timeout for server in far.servers] == [300, 60]


async def test_the_start_says_which_servers_there_are(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write(folder / "mcp.json", gone={"command": "no-such-program"}, off={"command": "y", "enabled": False})
    options = mcp_options(Settings())
    assert options is not None
    assert caplog.messages[-1].endswith("mcp.json: gone, off")
    app = FastAPI()
    app.state.mcp = service = McpService(options)
    await service.start()
    await service.settled(PATIENCE)
    assert mcp_line(app) == "gone (not connected), off (disabled); clients run their tools"
    await service.close()


def test_the_setting_of_the_time_limit_lowers_and_never_raises(folder: Path) -> None:
    write(folder / "mcp.json", long={"command": "x", "timeout": 300}, short={"command": "x", "timeout": 5})
    options = mcp_options(Settings(mcp_tool_timeout=20.0, mcp_execute=True, mcp_max_turns=3, mcp_max_tool_calls=0))
    assert options is not None
    assert [server.timeout for server in options.servers] == [20, 5]
    assert (options.execute, options.max_turns, options.max_tool_calls) == (True, 3, 0)


def test_the_server_of_the_command_comes_last(folder: Path) -> None:
    write(folder / "mcp.json")
    options = mcp_options(Settings(mcp_command="prog", mcp_args="--zone,UTC"))
    assert options is not None
    assert [server.name for server in options.servers] == ["one", "default"]
    assert (options.servers[1].command, options.servers[1].args) == ("prog", ("--zone", "UTC"))
    assert not options.servers[1].auto_approve


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("a", ("a",)),
        ("", ()),
        ("a,b,c", ("a", "b", "c")),
        ("a b,c", ("a", "b,c")),
        ("--name 'two words' x", ("--name", "two words", "x")),
        ("'a,b'", ("a,b",)),
        ('--json "{}"', ("--json", "{}")),
    ],
)
def test_arguments(text: str, arguments: tuple[str, ...]) -> None:
    assert split_arguments(text) == arguments


def test_what_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="mcp_args cannot be split: no closing quotation"):
        split_arguments("'hunter2")
    with pytest.raises(UsageError, match="mcp_args needs mcp_command"):
        mcp_options(Settings(mcp_args="a"))
    with pytest.raises(UsageError, match="mcp_execute needs MCP servers"):
        mcp_options(Settings(mcp_execute=True))
    with pytest.raises(ConfigError, match="does not exist"):
        mcp_options(Settings(mcp_config=folder / "none.json"))
    write(folder / "mcp.json", default={"command": "x", "env": {"A": "${NOT_SET_HERE}"}})
    with pytest.raises(ConfigError, match=r"default.*NOT_SET_HERE"):
        mcp_options(Settings())


def test_flags() -> None:
    line = ["--mcp-command", "uvx", "--mcp-args=--port,80", "--mcp-execute", "--mcp-max-turns", "3",
            "--mcp-max-tool-calls", "5", "--mcp-tool-timeout", "2.5", "--mcp-allow-urls", "https://a.example/*",
            "--mcp-allow-urls", "https://b.example/*"]  # fmt: skip
    source, _ = parse("serve", line)
    settings = Settings(**source.values)
    assert (settings.mcp_args, settings.mcp_execute, settings.mcp_tool_timeout) == ("--port,80", True, 2.5)
    assert settings.mcp_allow_urls == ("https://a.example/*", "https://b.example/*")
    for wrong in (["--mcp-max-turns", "0"], ["--mcp-max-tool-calls", "-1"], ["--mcp-tool-timeout", "0"]):
        with pytest.raises(UsageError):
            parse("serve", wrong)
    with pytest.raises(UsageError, match="does not apply"):
        parse("generate", ["--mcp-execute", "Hi"])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--mcp-config", "none.json"], "none.json does not exist"),
        (["--mcp-execute"], "needs MCP servers"),
        (["--mcp-command", "x", "--mcp-args", "'a"], "cannot be split"),
    ],
)
def test_a_wrong_start_costs_no_model(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("candle_vllm.server.serve.bind", lambda _: pytest.fail("it went on"))
    assert main(["--p", "0", *flags]) == 2
    assert told in capsys.readouterr().err


def test_two_servers_of_one_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "mcp.json", default={"command": "x"})
    assert main(["--p", "0", "--mcp-command", "y"]) == 2
    assert "'default'" in capsys.readouterr().err


def test_patterns_that_no_url_could_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--p", "0", "--mcp-allow-urls", "ftp://a.example/*"]) == 2
    assert "mcp_allow_urls" in capsys.readouterr().err
