"""Which URLs a request may name as MCP servers: those that fit a pattern of the operator's."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from candle_vllm.core.errors import ConfigError, InvalidParameterError
from candle_vllm.openai.errors import UnsupportedParameterError
from candle_vllm.responses.addresses import is_host
from candle_vllm.responses.tools.names import matches

ANY = "*"
SETTING = "mcp_allow_urls"
_PORTS = {"http": "80", "https": "443"}


class _Parts(NamedTuple):
    scheme: str
    host: str  # in lower case, an IPv6 address without brackets
    port: str
    path: str  # with the query

    @property
    def names_host(self) -> bool:
        """Whether the host of a pattern stands for itself alone."""
        return ANY not in self.host


class ServerUrls:
    """The operator's patterns: `https://host[:port]/path`, with "*" for any characters within one of the three parts,
    or "*" alone for every public URL.

    Without a port it is the scheme's own. Where "*" stands in the host, the addresses of what fits must be public.

    Raises:
        ConfigError: a pattern that no URL could fit.
    """

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self._any = ANY in patterns
        self._patterns = [_pattern(pattern) for pattern in patterns if pattern != ANY]

    def check(self, url: str, field: str) -> bool:
        """Whether the host stands in a pattern; otherwise it must have public addresses.

        Args:
            url: of a request.
            field: where the request has it.

        Raises:
            InvalidParameterError: it is none that could be dialled.
            UnsupportedParameterError: no pattern fits.
        """
        parts = _parts(url)
        if parts is None:
            raise InvalidParameterError(
                f"{field} must be an https URL in ASCII: a host, maybe a port, and a path without dots for parts; no "
                "user name, no blanks and no fragment",
                field,
            )
        if parts.scheme == "http" and not _is_loopback(parts.host):
            raise InvalidParameterError(f"{field} must be an https URL: what is sent to it may be secret", field)
        fitting = [pattern for pattern in self._patterns if _fits(pattern, parts)]
        named = any(pattern.names_host for pattern in fitting)
        if named or ((fitting or self._any) and not _is_loopback(parts.host)):
            return named
        raise UnsupportedParameterError(
            f"{field} is not supported: this server dials no URL that a request names, unless the operator allows it "
            "with --mcp-allow-urls; name one of its own servers by server_label alone",
            field,
        )


def _pattern(text: str) -> _Parts:
    made = _parts(text, pattern=True)
    if made is None:
        raise ConfigError(
            f"{SETTING} must be URLs like https://example.com/mcp or https://*.example.com/*, or * for every public "
            f"one, not {text!r:.100}",
            SETTING,
        )
    return made


def _parts(url: str, *, pattern: bool = False) -> _Parts | None:
    """A URL, in one spelling; None where it is none, or could mean different things to different programs."""
    if not url.isascii() or not url.isprintable() or any(char in url for char in ' \\"<>^`{|}#'):
        return None
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.netloc.rpartition("]")[2].partition(":")[2]
        if not (pattern and port == ANY):
            port = str(parts.port or _PORTS[parts.scheme])  # raises for one that is none
    except (ValueError, KeyError):
        return None
    if parts.scheme not in _PORTS or "@" in parts.netloc or not is_host(host.replace(ANY, "x") if pattern else host):
        return None
    if {".", ".."} & set(unquote(parts.path).split("/")):
        return None
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return _Parts(parts.scheme, _canonical(host), port, path)


def _fits(pattern: _Parts, given: _Parts) -> bool:
    same = pattern.scheme == given.scheme and pattern.port in (given.port, ANY)
    return same and matches([pattern.host], given.host) and matches([pattern.path], given.path)


def _canonical(host: str) -> str:
    return ipaddress.ip_address(host).compressed if ":" in host else host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
