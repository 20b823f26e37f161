# SPDX-License-Identifier: MIT
"""Access checks: API keys, origins of web pages, and names in the Host header (step 1 of a request's life).

If clients have keys, only /health, /v1/health, /ping, /ready and the web UI's files need none. A browser cannot send a
header from its address bar, so the documentation pages also accept the key as the password of HTTP Basic.

The check of keys uses only the method, the ASGI path and two headers, never the Host header or the raw URL. Its time
does not reveal the server's keys or their lengths. Routes of operators can have keys of their own.
"""

from __future__ import annotations

import base64
import binascii
import functools
import logging
import re
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from candle_vllm.core.targets import PORTS, ip_address
from candle_vllm.openai.fair_threads import asker
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.http.failures import refusal
from candle_vllm.server.http.keys import Key, Keyring
from candle_vllm.server.http.protocol import most_connections
from candle_vllm.server.http.routing import acting_for, route_path, routed_path

if TYPE_CHECKING:
    from candle_vllm.server.openapi.operation import Access

logger = logging.getLogger(__name__)

READY = "/ready"
PAGES = ("/openapi.json", "/docs")  # and every path below /docs/


class ApiKeyMiddleware:
    """Requires a valid key, as `Authorization: Bearer KEY` or `x-api-key: KEY`, on paths that need one.

    Inner layers find the request's caller with `caller_of`; `/ready`, which needs no key, finds with `is_stranger`
    whether a valid key was missing. If the keys of clients have several owners, one name or unnamed key may have as
    many open requests and WebSockets as half of the connections that the server allows.

    Args:
        keys: keys of clients and of operators.
        access: which paths need no key, and which are for operators.
    """

    def __init__(self, app: ASGIApp, keys: Keyring, access: Access) -> None:
        self._app = app
        self._access = access
        self._keys = keys
        self._open: Counter[str] = Counter()  # requests and WebSockets of each key that have not ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        path = route_path(scope)
        manages = self._access.manages(scope.get("method"), routed_path(scope))
        guarded = self._keys.guards(operators=manages)
        if not guarded or path in self._access.public:
            key = self._keys.find(_given(scope, page=False))
            known = key if key is not None and key.is_valid else None
            state = scope.setdefault("state", {})
            state["manages"] = known is not None and known.manages
            if path == READY and guarded:
                state.update({"stranger": True} if known is None else {"caller": known.caller})
            await self._app(scope, receive, send)
            return
        page = scope.get("method") == "GET" and (path in PAGES or path.startswith("/docs/"))
        acting = acting_for.get()
        key = self._keys.find(_given(scope, page)) if acting is None else self._keys.find_caller(acting)
        if key is not None and key.is_valid and (key.manages if manages else key.uses):
            scope.setdefault("state", {}).update({"caller": key.caller, "manages": key.manages})
            asker.set(key.caller.label if self._keys.are_several else "")  # a single owner need not share threads
            if acting is None:
                await self._counted(key.caller.label, scope, receive, send)
            else:
                await self._app(scope, receive, send)
            return
        challenge = {"WWW-Authenticate": 'Basic realm="candle-vllm"' if page else "Bearer"}
        await refusal(scope, HttpError(401, _refused(key, manages), "invalid_api_key", challenge))(scope, receive, send)

    @functools.cached_property
    def _most(self) -> int:
        return max(1, most_connections() // 2)

    async def _counted(self, label: str, scope: Scope, receive: Receive, send: Send) -> None:
        count = self._open[label]
        if count >= self._most and self._keys.are_several:
            message = f"This API key has {count} requests and WebSockets open and may have {self._most}: end some."
            error = HttpError(429, message, "rate_limit_exceeded", {"retry-after": "1"})
            await refusal(scope, error)(scope, receive, send)
            return
        self._open[label] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open[label] -= 1


def _refused(key: Key | None, manages: bool) -> str:
    if key is not None and not key.is_valid:
        return f"The API key {key.caller.label!r} has expired: ask this server's operator for another."
    if key is not None and not manages:
        return "This route needs a client's API key (--api-key): a management key is for operators' routes only."
    if key is not None:
        named = not key.caller.label.removeprefix("m").isdecimal()  # the number of a key without a name is not shown
        called = f"The API key {key.caller.label!r}" if named else "This API key"
        return f"{called} is not a management key of this server: it is for clients' routes only."
    which = "management key" if manages else "key"
    header = "send the header `Authorization: Bearer <key>`"
    return f"Missing or wrong API key: {header} with a {which} of this server."


def _given(scope: Scope, page: bool) -> bytes | None:
    """Return a request's key, Authorization before x-api-key; None without one, or if its header is repeated."""
    bearers = [value for name, value in scope["headers"] if name == b"authorization"]
    own = [value for name, value in scope["headers"] if name == b"x-api-key"]
    given = _authorized(bearers[0], page) if len(bearers) == 1 else None
    if given is not None or len(bearers) > 1:
        return given
    return own[0].strip() if len(own) == 1 else None  # also beside a proxy's own Authorization, such as `Basic`


def _authorized(header: bytes, page: bool) -> bytes | None:
    """Return the key in an Authorization header: after `Bearer` or, for a page, the password of `Basic`."""
    scheme, _, given = header.partition(b" ")
    if scheme.lower() == b"bearer":
        return given.strip()
    if scheme.lower() != b"basic" or not page:
        return None
    try:
        _, colon, password = base64.b64decode(given.strip(), validate=True).partition(b":")
    except binascii.Error:
        return None
    return password if colon else None


# ---- web pages of other origins --------------------------------------------------------------------------------------

ANY_ORIGIN = "*"
_LONGEST_ORIGIN = 512  # characters; a name of the DNS has 253
# RFC 6761, mDNS, names of ICANN and RFC 8375 for private networks, services of Kubernetes
_PRIVATE_NAMES = (".localhost", ".local", ".internal", ".home.arpa", ".svc")


def origins(allowed: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern for the origins of --cors-origin, in which `*` is any host, any part of a host, or any port."""
    return re.compile("|".join(re.escape(origin).replace(r"\*", "[^/]*") for origin in allowed) or r"(?!)")


class OriginMiddleware:
    """Refuses (403) requests of web pages of other origins, by the Origin header that browsers add.

    A browser lets any page send simple requests to any address. Such a request must not even begin: the page could not
    read the answer, but the request would use the models. The web UI's page is also refused where it would not work.

    Args:
        allowed: the origins of --cors-origin.
        page: whether `/` is the web UI, which works only at an address whose origin is allowed or the server's own.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str], *, page: bool = False) -> None:
        self._app = app
        self._page = page
        self._silent = False
        self._any = ANY_ORIGIN in allowed
        self._allowed = origins(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = [] if scope["type"] == "lifespan" else _values(scope, b"origin")
        own = "" if given or self._any else self._shut_page(scope)
        if not (given or own) or self._any or (len(given) == 1 and self._may_ask(scope, given[0])):
            await self._app(scope, receive, send)
            return
        if not self._silent:  # logged once: a browser does not show this to its user
            self._silent = True
            logger.warning("refused a web page of the origin %r; --cors-origin allows it", (own or given[0])[:100])
        if own:
            text = (
                f"{own:.100} is not a known address of this server, which protects itself against DNS rebinding. Start "
                f"it with --cors-origin {own:.100}, open it by the machine's IP address, or serve HTTPS."
            )
            await PlainTextResponse(text, 403)(scope, receive, send)
            return
        message = (
            f"Web pages of {given[0][:100]!r} may not call this server: open its own page at the address that it "
            "listens at, or allow the origin with --cors-origin."
        )
        await refusal(scope, HttpError(403, message, "origin_not_allowed", param="Origin"))(scope, receive, send)

    def _shut_page(self, scope: Scope) -> str:
        """Return the web UI's origin if a browser could load the page, but not its scripts; otherwise ""."""
        if not self._page or scope["type"] != "http" or route_path(scope) != "/":
            return ""
        asked = _values(scope, b"host")
        browser = "text/html" in "".join(_values(scope, b"accept"))
        if len(asked) != 1 or not browser or _values(scope, b"sec-fetch-site"):
            return ""
        origin = f"{_scheme(scope)}://{asked[0]}"
        return "" if self._may_ask(scope, origin) else origin

    def _may_ask(self, scope: Scope, origin: str) -> bool:
        if len(origin) > _LONGEST_ORIGIN:
            return False
        return self._allowed.fullmatch(origin) is not None or _is_own(scope, origin)


class HostMiddleware:
    """Refuses (403) requests whose Host is a public name: the owner of a name can make it resolve to this machine.

    For the browser, a page of that name (DNS rebinding) has the server's origin, and sends its GETs without Origin.
    Used if clients need no key. `_may_pass` accepts every name, for example on public paths and over TLS.

    Args:
        own: the name or address at which the server listens.
        allowed: the origins of --cors-origin, whose hosts are names of this server as well.
        public: paths that need no key, where every name is accepted.
    """

    def __init__(self, app: ASGIApp, own: str, allowed: Sequence[str], public: AbstractSet[str]) -> None:
        self._app = app
        self._public = public
        names = [re.sub(r":[0-9*]+$", "", origin.rpartition("://")[2]) for origin in allowed]
        self._names = origins([name.lower() for name in (own, socket.gethostname(), *names)])
        self._is_known = functools.lru_cache(maxsize=1024)(self._is_private)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = [] if scope["type"] == "lifespan" else _values(scope, b"host")
        if (
            not asked
            or (len(asked) == 1 and len(asked[0]) <= 300 and self._is_known(asked[0]))
            or self._may_pass(scope)
        ):
            await self._app(scope, receive, send)
            return
        message = (
            f"A server without keys refuses the host name {asked[0][:100]!r}, as a protection against DNS rebinding: "
            "use its address (in Kubernetes SERVICE.NAMESPACE.svc works as well), allow the name with --cors-origin "
            f"{_scheme(scope)}://NAME, or set --api-key."
        )
        await refusal(scope, HttpError(403, message, "host_not_allowed", param="Host"))(scope, receive, send)

    def _is_private(self, authority: str) -> bool:
        """Whether a Host may pass: an IP address, a private name, a name of this machine, or a host of `allowed`."""
        name = re.sub(r":[0-9]*$", "", authority).lower().removesuffix(".")
        private = "." not in name or name.endswith(_PRIVATE_NAMES)
        return private or _is_number(authority) or self._names.fullmatch(name) is not None

    def _may_pass(self, scope: Scope) -> bool:
        """Whether every name passes. No page can set `Sec-Fetch-Site`; browsers send it only to trustworthy origins."""
        return (
            route_path(scope) in self._public
            or scope.get("scheme") in ("https", "wss")
            or (scope.get("server") or ("", None))[1] is None
            or _values(scope, b"sec-fetch-site") in (["same-origin"], ["none"])
        )


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for header, value in scope["headers"] if header == name]


def _is_own(scope: Scope, origin: str) -> bool:
    """Whether `origin` is this server's own, by evidence that no page of another origin can produce.

    The evidence is one of: the address at which the connection arrived; an IP address in the Host header (behind a
    container's port), which no DNS server can redirect; `Sec-Fetch-Site` (behind a proxy), which a browser sends only
    over HTTPS or to its own machine.
    """
    if origin in _addresses(scope) or _values(scope, b"sec-fetch-site") == ["same-origin"]:
        return True
    asked = _values(scope, b"host")
    return len(asked) == 1 and origin == f"{_scheme(scope)}://{asked[0]}" and _is_number(asked[0])


def _addresses(scope: Scope) -> Iterator[str]:
    host, port = scope.get("server") or ("", None)
    if port is None:  # a Unix socket has no origin
        return
    names = [host]
    if (address := ip_address(host)) is not None:
        names = [f"[{host}]" if address.version == 6 else host]
        if address.is_loopback:
            names += ["localhost", "127.0.0.1", "[::1]"]
    end = "" if port == PORTS.get(_scheme(scope)) else f":{port}"
    yield from (f"{_scheme(scope)}://{name}{end}" for name in names)


def _scheme(scope: Scope) -> str:
    """Return the scheme as in a page's address: http or https."""
    scheme = str(scope.get("scheme", "http"))
    return {"ws": "http", "wss": "https"}.get(scheme, scheme)


def _is_number(authority: str) -> bool:
    """Whether a Host header has an IP address instead of a name, with or without a port."""
    host = re.sub(r":[0-9]{1,5}$", "", authority)
    return ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host) is not None
