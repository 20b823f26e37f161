"""API keys: pure ASGI middleware before every route but /health, /ping and /ready.

The pages for people are guarded too. A browser cannot send a key from its address bar, so these take it as the
password of HTTP Basic as well.

Step 1 of a request's life. The decision rests on the ASGI path and two headers alone, never on the Host header or the
raw URL, and takes the same time whichever key is right and however long it is. Routes of operators can have keys of
their own.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from starlette.types import ASGIApp, Receive, Scope, Send

from candle_vllm.core.setting_kinds import Secret
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.http.failures import refusal
from candle_vllm.server.http.routing import Caller, route_path
from candle_vllm.server.settings.options import UsageError

READY = "/ready"
PUBLIC_PATHS = frozenset({"/health", "/ping", READY})
MANAGEMENT_PATHS = frozenset({
    "/metrics", "/v1/models/load", "/v1/models/unload", "/v1/models/select", "/v1/models/status", "/v1/usage",
    "/server_info", "/reset_prefix_cache", "/v1/queues",
})  # fmt: skip
PAGES = ("/openapi.json", "/docs")  # and what is below /docs/
MAX_KEYS = 10_000


class _Key(NamedTuple):
    digest: bytes
    caller: Caller


class ApiKeyMiddleware:
    """Lets a request pass when it carries a key, as `Authorization: Bearer KEY` or `x-api-key: KEY`.

    Who it comes from is known afterwards (`caller_of`), and at `/ready` whether it is a stranger (`is_stranger`).

    Args:
        keys: those of clients; without any, routes for clients are open.
        management_keys: those of operators; without any, a client's key opens their routes as well.
        public: paths that need no key beside those of `PUBLIC_PATHS`.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        management_keys: Sequence[str] = (),
        public: frozenset[str] = frozenset(),
    ) -> None:
        self._app = app
        self._public = PUBLIC_PATHS | public
        self._keys = _numbered("", keys)
        self._management_keys = _numbered("m", management_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        path = route_path(scope)
        manages = (path in MANAGEMENT_PATHS or path.startswith("/v1/queues/")) and bool(self._management_keys)
        keys = self._management_keys if manages else self._keys
        if not keys or path in self._public:
            if path == READY and keys and _matching(self._keys + self._management_keys, scope, page=False) is None:
                scope.setdefault("state", {})["stranger"] = True
            await self._app(scope, receive, send)
        elif (caller := _matching(keys, scope, page := _is_page(scope.get("method", ""), path))) is not None:
            scope.setdefault("state", {})["caller"] = caller
            await self._app(scope, receive, send)
        else:
            which = "management key" if manages else "key"
            header = "send the header `Authorization: Bearer <key>`"
            message = f"Missing or wrong API key: {header} with a {which} of this server."
            if not manages and _matching(self._management_keys, scope, page) is not None:
                message = "This route wants an API key (--api-key): a management key opens operators' routes alone."
            error = HttpError(
                401,
                message,
                "invalid_api_key",
                {"WWW-Authenticate": 'Basic realm="candle-vllm"' if page else "Bearer"},
            )
            await refusal(scope, error)(scope, receive, send)


def _is_page(method: str, path: str) -> bool:
    """Whether a browser asks for one of the pages or of their files."""
    return method == "GET" and (path in PAGES or path.startswith("/docs/"))


def _numbered(prefix: str, keys: Sequence[str]) -> tuple[_Key, ...]:
    """Keys with whom they stand for, counted from 1."""
    return tuple(
        _Key(_digest(key.encode("ascii")), Caller(f"{prefix}{number}", key)) for number, key in enumerate(keys, 1)
    )


def _matching(keys: Sequence[_Key], scope: Scope, page: bool) -> Caller | None:
    """Whose key the request has; None where it has none of these."""
    bearers = [value for name, value in scope["headers"] if name == b"authorization"]
    own = [value for name, value in scope["headers"] if name == b"x-api-key"]
    if bearers:
        given = _authorized(bearers[0], page) if len(bearers) == 1 else None
    else:
        given = own[0].strip() if len(own) == 1 else None
    if given is None:
        return None
    digest = _digest(given)
    matches = [hmac.compare_digest(digest, key.digest) for key in keys]
    return keys[matches.index(True)].caller if any(matches) else None


def _digest(key: bytes) -> bytes:
    """What is compared instead of a key, so that its length does not show in the time."""
    return hashlib.sha256(key).digest()


def _authorized(header: bytes, page: bool) -> bytes | None:
    """The key in an Authorization header: after `Bearer`, or for a page the password of `Basic`."""
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


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one in a line; empty lines and lines that begin with # are left out.

    Raises:
        UsageError: the file cannot be read, has no key, or something that cannot be one.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"cannot read the API keys in {path}: {reason}") from None
    stripped = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    keys = [(number, line) for number, line in stripped if line and not line.startswith("#")]
    if not keys:
        raise UsageError(f"the API key file {path} holds no key: the server would be open")
    if len(keys) > MAX_KEYS:
        raise UsageError(f"the API key file {path} holds more than {MAX_KEYS} keys")
    for number, key in keys:
        try:
            Secret().check(key)
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: a key {error}") from None
    return tuple(key for _, key in keys)


# ---- pages from elsewhere --------------------------------------------------------------------------------------------

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
            f"Pages of {given[0][:100]!r} may not do this: open the server's own page at the address that it listens"
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
    scheme = str(scope.get("scheme", "http"))
    scheme = {"ws": "http", "wss": "https"}.get(scheme, scheme)  # as the page's own address has it
    end = "" if port == _PORTS.get(scheme) else f":{port}"
    yield from (f"{scheme}://{name}{end}" for name in names)
