"""mcp.json with the environment and the working folder of this process, for programs that name a file and no more."""

from __future__ import annotations

import os
from pathlib import Path

from candle_vllm.responses.mcp.config import McpConfig, load_mcp_config


def load_local_config(path: Path | str | None = None) -> McpConfig:
    """Reads a file; `${NAME}` is a variable of this process, `${workspaceFolder}` its working folder.

    Without a path it is looked for: CANDLE_VLLM_MCP_CONFIG, then ./mcp.json; none at all is no servers.

    Raises:
        ConfigError: as of `load_mcp_config`.
    """
    return load_mcp_config(path, environ=os.environ, workspace=Path.cwd())
