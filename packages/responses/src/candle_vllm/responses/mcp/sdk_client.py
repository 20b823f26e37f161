"""The SDK's client as it is used here: who it says it is, and what it leaves to others."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import mcp_types as types
from mcp import Client


def sdk_client(target: Any, *, mode: str, on_message: Any) -> Client:
    """A client that is not connected yet.

    Args:
        target: a transport, or a server object of this process.
        mode: "auto" asks in the newer era's way first, "legacy" in the older era's alone.
        on_message: gets what the server says without being asked.
    """
    return Client(
        target,
        mode=mode,
        cache=None,
        client_info=types.Implementation(name="candle-vllm", version=version("candle-vllm-responses")),
        message_handler=on_message,
    )


def leave_outputs_unchecked(client: Client) -> None:
    """Takes the SDK's check of structured outputs out: it throws the output away, and runs patterns without a limit."""

    async def accept(name: str, result: types.CallToolResult) -> None:
        del name, result

    client.session.validate_tool_result = accept
