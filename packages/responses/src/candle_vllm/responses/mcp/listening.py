"""Notices of changed tools in the newer protocol era: a subscription that is opened again when it is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mcp import MCPError
from mcp.client.subscriptions import SubscriptionLost

from candle_vllm.responses.mcp.connection import McpConnection

_FIRST_DELAY, _LAST_DELAY = 1.0, 60.0  # seconds before it is opened again
_ACK_SECONDS = 10.0


async def listen_for_changes(connection: McpConnection, note: Callable[[str], None]) -> None:
    """Tells the connection of each change until it ends; a server that refuses the subscription is left in peace.

    The protocol replays nothing: after a subscription was lost the tools count as changed.
    """
    delay = _FIRST_DELAY
    while not connection.is_down:
        began = asyncio.get_running_loop().time()
        try:
            await _listen(connection)
        except (SubscriptionLost, TimeoutError) as error:
            note(f"the subscription to changes of tools was lost: {type(error).__name__}")
        except (MCPError, RuntimeError) as error:
            note(f"it gives no notice of changed tools: {str(error)[:200]}")
            return
        if asyncio.get_running_loop().time() - began > _LAST_DELAY:
            delay = _FIRST_DELAY
        await asyncio.sleep(delay)
        delay = min(_LAST_DELAY, 2 * delay)
        connection.note_tools_changed()


async def _listen(connection: McpConnection) -> None:
    async with asyncio.timeout(_ACK_SECONDS) as limit, connection.client.listen(tools_list_changed=True) as events:
        limit.reschedule(None)
        async for _ in events:
            connection.note_tools_changed()
