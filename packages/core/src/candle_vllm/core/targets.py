# SPDX-License-Identifier: MIT
"""Protection against server-side request forgery: check URLs, hosts and IP addresses that clients name.

Used for fetched images, webhooks and MCP servers. A URL is parsed once, by httpx, and the parsed URL is used for the
connection; a name is resolved once, and the connection goes to the address that was checked. Every refusal is a
`ValueError` whose text follows the name of a setting, as in "must be a URL ...".
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx

MAX_URL = 8192  # characters; signed URLs with a session token have more than 2,048
RESOLVE_SECONDS = 10.0
MAX_ADDRESSES = 4  # maximum number of addresses of one name that are tried

_PLAIN = re.compile(r"[!#-;=?-\[\]_a-z~]+", re.ASCII)  # no blanks, and none of "<>\^`{|}
_PATTERN = re.compile(r"(?P<any>\*\.)?(?P<host>\[[0-9a-f:.]+\]|[a-z0-9.-]+)(?::(?P<port>[1-9][0-9]{0,4}))?", re.ASCII)
PORTS = {"http": 80, "https": 443}

_NAME = re.compile(r"(?:(?!-)[a-z0-9-]{1,63}(?<!-)\.)*(?!-)[a-z0-9-]{1,63}(?<!-)", re.ASCII)
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _networks(*texts: str) -> Sequence[_Network]:
    return tuple(map(ipaddress.ip_network, texts))


_PRIVATE = _networks("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "::1/128", "fc00::/7")
# Networks that `is_global` accepts but that are not public, or that relay to other addresses; and cloud metadata.
_NEVER = _networks(
    "192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "2001::/23", "2002::/16", "3fff::/20", "fd00:ec2::/32"
)
_PUBLIC_V6 = ipaddress.ip_network("2000::/3")  # leaves out mapped IPv4 addresses and NAT64


class ForbiddenTarget(ValueError):
    """A target that may not be reached; a retry does not help."""


@dataclass(frozen=True)
class Target:
    """A parsed URL.

    Attributes:
        host: name in lower case, or an address without brackets.
        port: the URL's port, or the scheme's default.
        trusted: the operator named the target, so that its address is not checked.
        private: its address may be private or loopback: the operator allows that, and named the host without `*.`.
    """

    url: httpx.URL
    host: str
    port: int
    trusted: bool = False
    private: bool = False


def parse_target(text: str, *, trusted: bool = True) -> Target:
    """Parse a URL; raises ForbiddenTarget if its form is wrong. `allowed_target` also checks whether it may be used."""
    if not 0 < len(text) <= MAX_URL or not _PLAIN.fullmatch(text):
        raise ForbiddenTarget(f"must be a URL of at most {MAX_URL} plain ASCII characters")
    import httpx  # imported here: only programs that open connections need it

    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        raise ForbiddenTarget("is not a valid URL") from None
    if url.scheme not in PORTS:
        raise ForbiddenTarget("must begin with https:// or http://")
    if url.userinfo or "@" in text.partition("://")[2].partition("/")[0].partition("?")[0]:
        raise ForbiddenTarget("must hold no user name and no @ before its path")
    if url.fragment or "#" in text:
        raise ForbiddenTarget("must hold no fragment")
    host = url.raw_host.decode("ascii")
    if not is_host(host):
        raise ForbiddenTarget("must name a host: a name in ASCII without a final dot, or an address")
    port = PORTS[url.scheme] if url.port is None else url.port
    if not 1 <= port <= 65535:
        raise ForbiddenTarget("must have a port between 1 and 65535")
    return Target(url, canonical(host), port, trusted)


def allowed_target(text: str, patterns: Sequence[str], allow_private: bool) -> Target:
    """Parse a client's URL; raises ForbiddenTarget unless its host and port are in the operator's list."""
    target = parse_target(text, trusted=False)
    matching = [pattern for pattern in patterns if _matches(pattern, target)]
    if not matching:
        raise ForbiddenTarget("names a host or a port that this server's operator does not allow")
    exact = any(not pattern.startswith("*.") for pattern in matching)
    return Target(target.url, target.host, target.port, private=allow_private and exact)


def check_pattern(pattern: str) -> None:
    """Raise ValueError unless `pattern` is `name`, `*.name`, an address, or one of these with `:port`."""
    match = _PATTERN.fullmatch(pattern)
    if match is None or not is_host(match["host"].strip("[]")) or int(match["port"] or 1) > 65535:
        raise ValueError(
            f"must be host names in lower case, like example.com, *.example.com or host:8443, not {pattern!r:.80}"
        )
    if match["any"] and ("." not in match["host"] or ip_address(match["host"].strip("[]")) is not None):
        raise ValueError(f"must have a name with a dot after *., not {pattern!r:.80}")


async def resolve(target: Target, threads: Executor) -> Sequence[str]:
    """Return the addresses to connect to, in order; all are checked unless the target is the operator's own.

    Names are resolved in `threads`, so that a lookup that hangs delays only other lookups.

    Raises:
        ForbiddenTarget: one of the addresses may not be reached.
        OSError, TimeoutError: the name could not be resolved.
    """
    async with asyncio.timeout(RESOLVE_SECONDS):
        addresses = await asyncio.get_running_loop().run_in_executor(threads, look_up, target.host, target.port)
    if not addresses:
        raise OSError("the name has no address")
    if not target.trusted and not all(is_allowed(address, target.private) for address in addresses):
        raise ForbiddenTarget("has an address that may not be reached")
    return addresses[:MAX_ADDRESSES]


def is_allowed(text: str, private: bool) -> bool:
    """Whether an address is public, or if `private`, private or loopback; never link-local, multicast or reserved."""
    address = ip_address(text)
    if address is None or any(address in network for network in _NEVER) or getattr(address, "scope_id", None):
        return False
    if any(address in network for network in _PRIVATE):
        return private
    public = address.is_global and not address.is_multicast and not address.is_reserved
    return public and (address.version == 4 or address in _PUBLIC_V6)


def is_host(host: str) -> bool:
    """Whether a text in lower case is a name without a final dot, or an address in its usual spelling."""
    if len(host) > 253:
        return False
    if ip_address(host) is None:
        # A name whose last part is a number is an address in an old spelling (127.1, 0x7f000001).
        last = host.rpartition(".")[2]
        return _NAME.fullmatch(host) is not None and re.fullmatch(r"\d+|0x[0-9a-f]*", last, re.ASCII) is None
    return "%" not in host


def look_up(host: str, port: int) -> list[str]:
    """Resolve a name to its addresses, in order. Blocks; raises OSError for a name without an address."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return a host as an IP address; None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Whether a host can be reached only from this machine: localhost, or a loopback address."""
    address = ip_address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def canonical(host: str) -> str:
    """Return an IPv6 address in its shortest spelling; other hosts unchanged."""
    return ipaddress.ip_address(host).compressed if ":" in host else host


def _matches(pattern: str, target: Target) -> bool:
    match = _PATTERN.fullmatch(pattern)
    assert match is not None
    if target.port not in ((int(match["port"]),) if match["port"] else PORTS.values()):
        return False
    host = canonical(match["host"].strip("[]"))
    return target.host.endswith("." + host) if match["any"] else target.host == host
