"""Which web pages may have a tool called: the server's own, and those of configured origins (step 1)."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence

from starlette.types import Scope

from candle_vllm.server.errors import HttpError

_PORTS = {"http": 80, "https": 443}


def check_origin(scope: Scope, allowed: Sequence[str]) -> None:
    """Refuses a request of a page from elsewhere; programs that are no browsers send no Origin.

    The own origin is that of the address at which the connection arrived, never that of the Host header.

    Args:
        scope: of the request.
        allowed: the origins of --cors-origin.

    Raises:
        HttpError: 403.
    """
    given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
    if not given or "*" in allowed:
        return
    if len(given) > 1 or given[0] not in {*allowed, *_own(scope)}:
        message = (
            f"Pages of {given[0][:100]!r} may not call tools: open the server's own page at the address that it listens"
            " at, or allow the origin with --cors-origin."
        )
        raise HttpError(403, message, "origin_not_allowed", param="Origin")


def _own(scope: Scope) -> Iterator[str]:
    host, port = scope.get("server") or ("", None)
    if port is None:  # a Unix socket has no origin
        return
    names = [host]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        names = [f"[{host}]" if address.version == 6 else host]
        if address.is_loopback:
            names += ["localhost", "127.0.0.1", "[::1]"]
    scheme = scope.get("scheme", "http")
    end = "" if port == _PORTS.get(scheme) else f":{port}"
    yield from (f"{scheme}://{name}{end}" for name in names)
