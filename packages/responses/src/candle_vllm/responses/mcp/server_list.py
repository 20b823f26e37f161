"""The MCP servers that a session was given, in any form, as configurations by their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from candle_vllm.core.errors import ConfigError

if TYPE_CHECKING:
    from candle_vllm.responses.mcp.config import McpConfig
    from candle_vllm.responses.mcp.server_config import McpServerConfig

    McpServers = McpConfig | McpServerConfig | Iterable[McpServerConfig] | str | Path


def server_configs(servers: McpServers) -> dict[str, McpServerConfig]:
    """The configurations by name.

    Raises:
        ConfigError: something is no configuration, a file cannot be used, or two servers have one name.
    """
    if isinstance(servers, (list, tuple)) and not servers:
        return {}
    from candle_vllm.responses.mcp.config import McpConfig
    from candle_vllm.responses.mcp.local_config import load_local_config
    from candle_vllm.responses.mcp.server_config import McpServerConfig

    if isinstance(servers, (str, Path)):
        servers = load_local_config(servers)
    if isinstance(servers, McpConfig):
        servers = servers.servers
    if isinstance(servers, McpServerConfig):
        servers = (servers,)
    if isinstance(servers, Mapping) or not isinstance(servers, Iterable):
        raise _wrong(servers)
    by_name: dict[str, McpServerConfig] = {}
    for config in servers:
        if not isinstance(config, McpServerConfig):
            raise _wrong(config)
        if config.name in by_name:
            raise ConfigError(f"two MCP servers are named {config.name!r:.100}: give each its own name", "mcp_servers")
        by_name[config.name] = config
    return by_name


def _wrong(given: object) -> ConfigError:
    return ConfigError(
        "mcp_servers must be the path of an mcp.json or McpServerConfig objects (McpServerConfig.from_mapping makes "
        f"one of a name and an entry of mcp.json), not a {type(given).__name__}",
        "mcp_servers",
    )
