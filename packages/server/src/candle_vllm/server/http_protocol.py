"""uvicorn's HTTP protocol with a limit on request heads, which its fast parser lacks.

Below step 1 of a request's life. Without the limit, a client that never ends its headers would fill the memory.
"""

from __future__ import annotations

import asyncio
import importlib.util
from typing import TYPE_CHECKING

from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 << 10  # bytes of request line and headers, besides the last piece read from the socket
CHUNK_OVERHEAD = 6  # bytes on the wire per byte of a body that is sent in chunks of one


def http_protocol() -> type[asyncio.Protocol]:
    """The fastest protocol that is installed: httptools with a limit, else h11, which has one."""
    if importlib.util.find_spec("httptools") is None:
        return H11Protocol
    return _limited()


def _limited() -> type[HttpToolsProtocol]:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class LimitedHttpToolsProtocol(HttpToolsProtocol):
        """Closes a connection whose request has too many bytes that are not body: headers, trailers, framing."""

        _seen = 0  # bytes of a request that has not ended
        _body = 0  # those of its body
        _ended = False  # a request ended in the current piece

        def data_received(self, data: bytes) -> None:
            self._ended = False
            super().data_received(data)
            if self._ended:
                return
            self._seen += len(data)
            if self._seen - CHUNK_OVERHEAD * self._body > MAX_HEAD and not self.transport.is_closing():
                self.send_400_response("The request head is too large.")

        def on_body(self, body: bytes) -> None:
            self._body += len(body)
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._seen = self._body = 0
            self._ended = True
            super().on_message_complete()

    return LimitedHttpToolsProtocol
