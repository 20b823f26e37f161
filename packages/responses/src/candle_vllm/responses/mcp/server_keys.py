# SPDX-License-Identifier: MIT
"""Converts a server's keys in mcp.json, of this project and of other programs, to fields of `McpServerConfig`."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from candle_vllm.core.errors import ConfigError
from candle_vllm.core.setting_kinds import nearest
from candle_vllm.responses.mcp.server_values import MAX_CONNECT_TIMEOUT, MAX_ITEMS, MAX_TIMEOUT, Checks, OAuthClient

logger = logging.getLogger(__name__)

TRANSPORTS = {
    "stdio": "stdio",
    "http": "http",
    "streamable-http": "http",
    "streamableHttp": "http",
    "streamable_http": "http",
    "sse": "sse",
}
_RUNTIMES = frozenset({"node", "python", "command", "local", "npx", "uvx", "docker"})
KEYS: Mapping[str, tuple[str, ...]] = {
    "transport": ("type", "transport"),
    "command": ("command",),
    "args": ("args",),
    "env": ("env",),
    "env_file": ("envFile", "env_file"),
    "cwd": ("cwd",),
    "url": ("url", "serverUrl", "httpUrl"),
    "headers": ("headers", "http_headers"),
    "auth": ("auth", "authorization"),
    "timeout": ("timeout", "timeout_secs", "timeoutSecs", "tool_timeout_sec", "timeout_ms", "timeoutMs"),
    "connect_timeout": ("connect_timeout", "connectTimeout", "startup_timeout_sec", "connect_timeout_ms"),
    "enabled": ("enabled", "disabled"),
    "allowed_tools": (
        "allowed_tools", "allowedTools", "includeTools", "include_tools", "enabled_tools", "enabledTools", "tools",
    ),
    "excluded_tools": (
        "excluded_tools", "excludedTools", "excludeTools", "exclude_tools", "disabled_tools", "disabledTools",
    ),
    "auto_approve": ("auto_approve", "autoApprove", "alwaysAllow"),
    "instructions": ("instructions",),
    "sandbox": ("sandbox", "sandboxEnabled"),
}  # fmt: skip
NAMES = ("name", "id", "label")  # keys that name the server; `config.py` reads them if the servers are a list
FIELD_OF = {key: field for field, keys in KEYS.items() for key in keys}
EXPANDED = frozenset(
    key for field in ("command", "args", "env", "env_file", "cwd", "url", "headers", "auth") for key in KEYS[field]
)
MAX_FILE = 1 << 20  # bytes of a configuration file
_IN_MILLISECONDS = frozenset({"timeout_ms", "timeoutMs", "connect_timeout_ms"})
_OAUTH = {
    "client_id": ("CLIENT_ID", "client_id", "clientId"),
    "client_secret": ("CLIENT_SECRET", "client_secret", "clientSecret"),
    "scopes": ("scopes", "scope"),
    "issuer": ("issuer",),
}


def settings_of(server: str, mapping: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Return the fields of `McpServerConfig` that an entry sets, except the name.

    Raises ConfigError if two keys set one field, a value is invalid, a sandbox is requested, or `envFile` is unusable.
    """
    checks = Checks(server)
    if not isinstance(mapping, Mapping):
        checks.fail("entry", 'must be an object with "command" or "url"')
    if len(mapping) > MAX_ITEMS:
        checks.fail("entry", f"has {len(mapping)} keys, and {MAX_ITEMS} are allowed")
    fields: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for key, value in mapping.items():
        field = FIELD_OF.get(key)
        if field is None:
            if key not in NAMES:
                hint = nearest(key[:100], FIELD_OF)
                logger.warning("MCP server %.100r: the key %.60r is not known and has no effect%s", server, key, hint)
        elif value is not None:  # many programs write null for a setting that is not set
            if field in spelled:
                checks.fail(key, f"and {spelled[field]} are the same setting: give one")
            spelled[field] = key
            fields[field] = _CONVERSIONS[field](checks, key, value) if field in _CONVERSIONS else value
    if fields.pop("sandbox", False) is not False:
        checks.fail(
            spelled["sandbox"],
            "asks for a sandbox, which is not supported: remove the key to run the server without one",
        )
    folder = Path() if folder is None else folder
    if "cwd" in fields:
        fields["cwd"] = folder / fields["cwd"]
    if "env_file" in fields:
        if "url" in fields:
            checks.fail(spelled["env_file"], "cannot be used: the server has a url")
        path = folder / fields.pop("env_file")
        fields["env"] = {**_read_env_file(checks, spelled["env_file"], path), **fields.get("env", {})}
    return fields


def _transport(checks: Checks, key: str, value: Any) -> str:
    if isinstance(value, str) and value in _RUNTIMES:  # the Rust candle-vllm writes these values
        logger.warning(
            "MCP server %.100r: %s %r is a program that runs the server, not a transport: stdio is used",
            checks.server,
            key,
            value,
        )
        return "stdio"
    if not isinstance(value, str) or value not in TRANSPORTS:
        checks.fail(key, f"must be one of {', '.join(TRANSPORTS)}, not {value!r:.40}")
    return TRANSPORTS[value]


def _env(checks: Checks, key: str, value: Any) -> dict[str, str]:
    """Convert the values of variables to texts, because people write numbers and booleans without quotes."""
    if isinstance(value, Mapping):
        value = {
            name: str(text).lower() if isinstance(text, bool) else str(text) if isinstance(text, (int, float)) else text
            for name, text in value.items()
        }
    return checks.variables(key, value)


def _seconds(most: float) -> Callable[[Checks, str, Any], float]:
    def convert(checks: Checks, key: str, value: Any) -> float:
        if key in _IN_MILLISECONDS:
            return checks.seconds(key, value, most, unit="milliseconds", factor=0.001)
        return checks.seconds(key, value, most)

    return convert


def _patterns(checks: Checks, key: str, value: Any) -> tuple[str, ...]:
    """Return a list of patterns; true and "*" match all names, and false matches none."""
    if isinstance(value, bool):
        return ("*",) if value else ()
    return ("*",) if value == "*" else checks.texts(key, value, most=1000)


def _auth(checks: Checks, key: str, value: Any) -> str | OAuthClient:
    """Return a token, or the credentials of an OAuth client in Cursor's form."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        checks.fail(key, "must be a token, or an object with CLIENT_ID and CLIENT_SECRET")
    known = {spelling: field for field, spellings in _OAUTH.items() for spelling in spellings}
    fields: dict[str, Any] = {}
    for spelling, given in value.items():
        if spelling not in known:
            checks.fail(key, f"has the unknown key {spelling!r:.60}{nearest(str(spelling)[:100], known)}")
        fields[known[spelling]] = given
    for needed in ("client_id", "client_secret"):
        if not fields.get(needed):
            checks.fail(key, "needs CLIENT_ID and CLIENT_SECRET: signing in with a browser is not supported")
    scopes = fields.get("scopes", ())
    fields["scopes"] = tuple(scopes.split()) if isinstance(scopes, str) else checks.texts(f"{key}.scopes", scopes)
    return OAuthClient(**fields)


_CONVERSIONS: Mapping[str, Callable[[Checks, str, Any], Any]] = {
    "transport": _transport,
    "cwd": Checks.folder,
    "env_file": Checks.folder,
    "env": _env,
    "auth": _auth,
    "timeout": _seconds(MAX_TIMEOUT),
    "connect_timeout": _seconds(MAX_CONNECT_TIMEOUT),
    "enabled": lambda checks, key, value: checks.flag(key, value) is not (key == "disabled"),
    "allowed_tools": _patterns,
    "excluded_tools": _patterns,
    "auto_approve": _patterns,
}


def _read_env_file(checks: Checks, key: str, path: Path) -> dict[str, str]:
    """Return the variables of a dotenv file; `${...}` in it is not expanded."""
    from dotenv.parser import parse_stream

    content = read_small_file(path, f"MCP server {checks.server!r:.100}: {key}")
    found: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(content)):
        if binding.error or (binding.key is not None and binding.value is None):
            checks.fail(key, f"({path}) has no NAME=value on line {binding.original.line}")
        if binding.key is not None and binding.value is not None:
            found[binding.key] = binding.value
    return checks.variables(key, found)


def read_small_file(path: Path, what: str) -> str:
    """Return the text of a file in UTF-8, with or without a byte order mark.

    Raises ConfigError if it is missing, not a regular file, too large, or not text; the message begins with `what`.
    """
    try:
        if not path.is_file():  # reading a pipe may never end, and a device has no size
            problem = "is a folder" if path.is_dir() else "is no plain file" if path.exists() else "does not exist"
            raise ConfigError(f"{what}: {path} {problem}")
        with path.open("rb") as file:
            content = file.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{what}: cannot read {path!s:.300}: {error.strerror}") from None
    if len(content) > MAX_FILE:
        raise ConfigError(f"{what}: {path} is larger than {MAX_FILE >> 20} MB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{what}: {path} is not UTF-8 text") from None
