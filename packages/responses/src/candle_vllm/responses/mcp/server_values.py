# SPDX-License-Identifier: MIT
"""Check the values of a server's settings, and mask values that may be secret; error messages never show secrets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote, urlsplit

from candle_vllm.core.errors import ConfigError

MAX_LABEL = 256
MAX_TEXT = 32_768  # characters of an argument, a variable or a header
MAX_ITEMS = 256  # arguments, variables, headers, keys of an entry
MAX_PATTERNS = 1000
MAX_URL = 4096
MAX_INSTRUCTIONS = 20_000
MAX_TIMEOUT = 3600.0
MAX_CONNECT_TIMEOUT = 600.0

MASK = "***"

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}")
_SHORTEST_SECRET = 6  # characters; shorter values occur in ordinary words
_SECRET_WORD = re.compile(
    r"token|secret|passw|pwd|api.?key|access.?key|auth|bearer|credential|header|cookie", re.IGNORECASE
)
_VALUE = re.compile(r"([=:]\s*)\S.*", re.DOTALL)


class Checks:
    """Checks of one server's settings; each returns the value, or raises `ConfigError`."""

    def __init__(self, server: object) -> None:
        if not isinstance(server, str) or not server.strip() or len(server) > MAX_LABEL or _CONTROL.search(server):
            raise ConfigError(
                f"the name of an MCP server must be 1 to {MAX_LABEL} characters on one line, not {server!r:.100}",
                "name",
            )
        self.server = server

    def fail(self, setting: str, problem: str) -> NoReturn:
        """Raise `ConfigError` with the server's name and the setting."""
        raise ConfigError(f"MCP server {self.server!r:.100}: {setting} {problem}", setting)

    def text(self, setting: str, value: Any, *, most: int = MAX_TEXT, empty: bool = False) -> str:
        """Check a string without NUL."""
        if not isinstance(value, str):
            self.fail(setting, f"must be a string, not {_kind(value)}")
        if not value and not empty:
            self.fail(setting, "must not be empty")
        if len(value) > most:
            self.fail(setting, f"has {len(value)} characters, and {most} are allowed")
        if "\0" in value:
            self.fail(setting, "must not contain a NUL character")
        return value

    def one_line(self, setting: str, value: Any, *, most: int = MAX_TEXT) -> str:
        """Check a string without control characters, as HTTP requires."""
        checked = self.text(setting, value, most=most)
        if _CONTROL.search(checked):
            self.fail(setting, "must be one line without control characters")
        return checked

    def texts(self, setting: str, value: Any, *, most: int = MAX_ITEMS, empty: bool = False) -> tuple[str, ...]:
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
            self.fail(setting, f"must be a list of strings, not {_kind(value)}")
        items = tuple(value)
        if len(items) > most:
            self.fail(setting, f"has {len(items)} entries, and {most} are allowed")
        return tuple(self.text(f"{setting}[{number}]", item, empty=empty) for number, item in enumerate(items))

    def variables(self, setting: str, value: Any) -> dict[str, str]:
        for name, text in self._mapping(setting, value).items():
            if not name or "=" in name or "\0" in name or len(name) > MAX_LABEL:
                self.fail(setting, f"has the name {name!r:.60}, which no environment variable can have")
            self.text(f"{setting}.{name:.100}", text, empty=True)
        return dict(value)

    def http_headers(self, setting: str, value: Any) -> dict[str, str]:
        seen: set[str] = set()
        for name, text in self._mapping(setting, value).items():
            if not _HEADER_NAME.fullmatch(name):
                self.fail(setting, f"has the name {name!r:.60}, which no HTTP header can have")
            if name.lower() in seen:
                self.fail(setting, f"has {name:.60} twice; names differ only in case")
            seen.add(name.lower())
            self.one_line(f"{setting}.{name:.100}", text)
            if not text.isascii():
                self.fail(f"{setting}.{name:.100}", "must be ASCII")
        return dict(value)

    def address(self, setting: str, value: Any) -> str:
        url = self.one_line(setting, value, most=MAX_URL)
        try:
            parts = urlsplit(url)
            usable = (
                parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
            )
        except ValueError:
            usable = False
        if not usable or " " in url:
            self.fail(setting, "must be an address with http:// or https:// and a host, e.g. http://localhost:8000/mcp")
        return url

    def folder(self, setting: str, value: Any) -> Path:
        return value if isinstance(value, Path) else Path(self.text(setting, value, most=MAX_URL))

    def flag(self, setting: str, value: Any) -> bool:
        if not isinstance(value, bool):
            self.fail(setting, f"must be true or false, not {_kind(value)}")
        return value

    def seconds(self, setting: str, value: Any, most: float, *, unit: str = "seconds", factor: float = 1.0) -> float:
        """Check a time, and return it in seconds; `factor` is its unit in seconds."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(setting, f"must be a number of {unit}, not {_kind(value)}")
        if not 0 < value <= most / factor:
            hint = "; for milliseconds write timeout_ms" if factor == 1.0 and 1000 <= value <= 1000 * most else ""
            self.fail(setting, f"must be more than 0 and at most {most / factor:.10g} {unit}, not {value!r:.40}{hint}")
        return float(value * factor)

    def _mapping(self, setting: str, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            self.fail(setting, f"must be an object of names and strings, not {_kind(value)}")
        if len(value) > MAX_ITEMS:
            self.fail(setting, f"has {len(value)} entries, and {MAX_ITEMS} are allowed")
        return value


def _kind(value: Any) -> str:
    """Return the JSON type of a value, for messages that must not show it."""
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


class SecretMap(Mapping[str, str]):
    """An immutable mapping whose `repr` hides its values. It is not a `dict`, so that encoders refuse it."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(values)

    def __getitem__(self, key: str) -> str:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        return repr(self.masked())

    def masked(self) -> dict[str, str]:
        """Return the names, with a mask for each value."""
        return dict.fromkeys(self._values, MASK)


@dataclass(frozen=True, kw_only=True)
class OAuthClient:
    """Credentials of a program that requests its own token (OAuth client credentials).

    Attributes:
        client_secret: secret, which is sent only to the authorization server.
        issuer: address of the authorization server that may get the secret; None lets the MCP server choose it: only
            for an MCP server that may know the secret.
    """

    client_id: str
    client_secret: str = field(repr=False)
    scopes: tuple[str, ...] = ()
    issuer: str | None = None


def masked_url(url: str) -> str:
    """Return the address with user, password, and the values of its query masked, without its fragment."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return MASK
    _, at, host = parts.netloc.rpartition("@")
    pairs = [part.partition("=") for part in parts.query.split("&")] if parts.query else []
    query = "&".join(f"{name}={MASK}" if equals else MASK for name, equals, _ in pairs)
    return parts._replace(netloc=f"{MASK}@{host}" if at else host, query=query, fragment="").geturl()


def masked_arguments(arguments: Iterable[str]) -> list[str]:
    """Return a command's arguments; mask a value in or after one such as "--token", and addresses (`masked_url`).

    Other secrets stay visible: `env` is safer.
    """
    shown: list[str] = []
    follows = False
    for argument in arguments:
        secret = _SECRET_WORD.search(argument) is not None
        if follows:
            shown.append(MASK)
        elif secret and _VALUE.search(argument):
            shown.append(_VALUE.sub(rf"\1{MASK}", argument, count=1))
        else:
            shown.append(masked_url(argument) if "://" in argument else argument)
        follows = secret and argument.startswith("-") and not _VALUE.search(argument)
    return shown


def redactor(secrets: Iterable[str]) -> Callable[[str], str]:
    """Return a function that masks the secrets, their percent-decoded forms and words, of 6 characters or more."""
    values = {part for value in secrets for part in (value, unquote(value), *value.split())}
    longest_first = sorted((value for value in values if len(value) >= _SHORTEST_SECRET), key=len, reverse=True)
    if not longest_first:
        return str
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    return lambda text: pattern.sub(MASK, text)
