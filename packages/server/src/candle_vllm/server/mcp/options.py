# SPDX-License-Identifier: MIT
"""Read the MCP servers, and the limits on their tools, from the settings (before step 1 of a request's life).

The MCP SDK is not imported here, so a server without MCP servers does not load it.
"""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass, replace

from candle_vllm.responses.mcp.config import load_mcp_config
from candle_vllm.responses.mcp.server_config import McpServerConfig
from candle_vllm.server.settings.options import UsageError
from candle_vllm.server.settings.table import ToolOptions

DEFAULT = "default"  # name of the server that --mcp-command starts, as in the Rust candle-vllm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class McpOptions:
    """The MCP servers, and the limits on a chat request whose tool calls run in this server.

    Attributes:
        servers: servers in the order of mcp.json; the server of --mcp-command is the last.
        execute: whether calls run in this server if a chat request has no tools of its own.
        max_turns: maximum number of turns of the model, 1 to 1000.
        max_tool_calls: maximum number of calls that run, 0 to 10000.
    """

    servers: tuple[McpServerConfig, ...]
    execute: bool = False
    max_turns: int = 8
    max_tool_calls: int = 32


def mcp_options(settings: ToolOptions) -> McpOptions | None:
    """Return the options, or None without MCP servers; raises `ConfigError` if mcp.json or a setting is wrong."""
    config = load_mcp_config(settings.mcp_config)
    servers = config.servers
    if settings.mcp_command is not None:
        arguments = () if settings.mcp_args is None else split_arguments(settings.mcp_args)
        servers = (*servers, McpServerConfig(name=DEFAULT, command=settings.mcp_command, args=arguments))
    elif settings.mcp_args is not None:
        raise UsageError("mcp_args needs mcp_command: they are its arguments")
    if not servers:
        if settings.mcp_execute:
            raise UsageError("mcp_execute needs MCP servers: name a file with --mcp-config, or one by --mcp-command")
        return None
    if config.path is not None:
        logger.info("MCP servers from %s: %s", config.path, ", ".join(server.name for server in config.servers))
    limit = settings.mcp_tool_timeout
    if limit is not None:
        servers = tuple(replace(server, timeout=min(server.timeout, limit)) for server in servers)
    return McpOptions(servers, settings.mcp_execute, settings.mcp_max_turns, settings.mcp_max_tool_calls)


def split_arguments(text: str) -> tuple[str, ...]:
    """Split a text into arguments: as a shell does, or at commas if it has no blanks, quotes or backslashes.

    If a quote is not closed, this raises a `UsageError` that does not repeat the text, which may hold a secret.
    """
    if "," in text and not any(mark in text for mark in " \t'\"\\"):
        return tuple(text.split(","))
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"mcp_args cannot be split: {error}".replace("No closing", "no closing")) from None
