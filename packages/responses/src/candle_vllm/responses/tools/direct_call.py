"""A tool called by a program, by its server and its own name, without a model."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.responses.tools.execution import check, run
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.responses.tools.tool import ToolCall, ToolResult

MAX_TIMEOUT = 86_400.0  # seconds


async def call_directly(
    registry: ToolRegistry,
    server: str | None,
    tool: str,
    arguments: Mapping[str, Any],
    *,
    timeout: float | None = None,
) -> ToolResult:
    """What comes of the call.

    Args:
        registry: the tools.
        server: label of the MCP server; None for a Python function.
        tool: its name there, or the one that a model calls.
        arguments: checked against its schema.
        timeout: seconds; None is the tool's own, or 60.

    Raises:
        InvalidParameterError: there is no such tool, the arguments are no JSON object, or the timeout is wrong.
    """
    if timeout is not None and (not isinstance(timeout, (int, float)) or not 0 < timeout <= MAX_TIMEOUT):
        raise InvalidParameterError(
            f"timeout must be more than 0 and at most {MAX_TIMEOUT:g} seconds, not {timeout!r:.40}", "timeout"
        )
    text = _as_json(arguments)
    for definition in registry.definitions():
        if definition.server == server and tool in (definition.original_name, definition.name):
            checked = await check(
                registry, ToolCall(id=f"call_{uuid.uuid4().hex}", name=definition.name, arguments=text)
            )
            return checked if isinstance(checked, ToolResult) else await run(checked, timeout=timeout)
    where = "among the Python tools" if server is None else f"at the MCP server {server!r:.80}"
    raise InvalidParameterError(f"there is no tool {tool!r:.80} {where}", "tool")


def _as_json(arguments: Any) -> str:
    if not isinstance(arguments, Mapping):
        raise InvalidParameterError(f"arguments must be an object, not a {type(arguments).__name__}", "arguments")
    try:
        return json.dumps(dict(arguments), ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParameterError(f"arguments must be JSON: {error!s:.200}", "arguments") from None
