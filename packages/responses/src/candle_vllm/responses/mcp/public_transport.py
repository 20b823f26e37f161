"""HTTP to public addresses alone: for servers that somebody else than the operator has named.

A name is looked up once, and the address that was checked is the one that is connected to, so that a name which is
somewhere else a moment later reaches nothing.
"""

from __future__ import annotations

import asyncio

import httpx2

from candle_vllm.responses.mcp.addresses import is_allowed, look_up

_RESOLVE_SECONDS = 10.0
_MAX_ADDRESSES = 4  # of one name that are tried
_PORTS = {"http": 80, "https": 443}


class PublicTransport(httpx2.AsyncBaseTransport):
    """Sends requests to the public addresses of their hosts; a host that has another one is not reached at all.

    Args:
        inner: connects; None is a transport without proxies, which would look the name up once more.
    """

    def __init__(self, inner: httpx2.AsyncBaseTransport | None = None) -> None:
        self._inner = inner or httpx2.AsyncHTTPTransport(trust_env=False)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Sends one request.

        Raises:
            httpx2.ConnectError: the host has no address, or one that is not public.
        """
        url = request.url
        *others, last = await _public_addresses(url, request)
        request.extensions = {**request.extensions, "sni_hostname": url.host}
        for address in others:
            try:
                return await self._send(request, url, address)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):  # nothing has been sent
                continue
        return await self._send(request, url, last)

    async def _send(self, request: httpx2.Request, url: httpx2.URL, address: str) -> httpx2.Response:
        """The connection goes to the address; the name stays in Host and TLS, and in the request afterwards."""
        request.url = url.copy_with(host=address)
        try:
            return await self._inner.handle_async_request(request)
        finally:
            request.url = url

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._inner.aclose()


async def _public_addresses(url: httpx2.URL, request: httpx2.Request) -> list[str]:
    host, port = url.host, url.port or _PORTS.get(url.scheme, 443)
    try:
        async with asyncio.timeout(_RESOLVE_SECONDS):
            found = await asyncio.to_thread(look_up, host, port)
    except (OSError, UnicodeError, TimeoutError):
        found = []
    if not found:
        raise httpx2.ConnectError("its name has no address", request=request)
    if not all(is_allowed(address, private=False) for address in found):
        raise httpx2.ConnectError("its address is not public", request=request)
    return found[:_MAX_ADDRESSES]
