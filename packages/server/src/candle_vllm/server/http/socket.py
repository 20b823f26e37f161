"""uvicorn's WebSocket protocol with an end that its route decides (step 1 and 10 of a request's life).

A server that stops closes idle connections at once; one on which an answer is written is told, and has the time of the
drain for it.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

DRAINING = "candle_vllm.draining"  # extension of the scope: an event that is set when the server stops


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """Leaves it to the route to end a connection when the server stops."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._draining = asyncio.Event()

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if hasattr(self, "scope"):  # the handshake was right; the route has not begun
            extensions: dict[str, Any] = self.scope.setdefault("extensions", {})  # type: ignore[assignment]
            extensions[DRAINING] = self._draining

    def shutdown(self) -> None:
        if self.handshake_complete and not self.close_sent and not self.disconnected:
            self._draining.set()
        else:
            super().shutdown()
