# SPDX-License-Identifier: MIT
"""McpServerConfig: how one MCP server is reached, and which of its tools may be used."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import parse_qsl, urlsplit

from candle_vllm.core.arguments import ExplainedSettings
from candle_vllm.responses.mcp import server_values
from candle_vllm.responses.mcp.server_keys import settings_of
from candle_vllm.responses.tools.names import matches

Transport = Literal["stdio", "http", "sse"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9-]*) +(\S.*)")
_LOCAL = ("args", "env", "cwd")  # settings only for a command
_REMOTE = ("headers", "auth")  # settings only for an address


@dataclass(frozen=True, kw_only=True, repr=False)
class McpServerConfig(ExplainedSettings):
    """One server: a command that is started (`command`), or an address (`url`).

    `repr` and `masked()` hide values that may be secret; the attributes have the plain values.

    Attributes:
        name: label of the server, with which the names of its tools begin.
        transport: "stdio", "http" (streamable HTTP) or "sse"; None with a `url` tries HTTP first, and then SSE.
        command: the program: its name in PATH, or a path.
        args: arguments of the command.
        env: environment variables of the program. It inherits only HOME, LOGNAME, PATH, SHELL, TERM, USER, and
            variables of proxies and certificates.
        cwd: working folder of the program; None means the working folder of this process.
        url: http or https address; a user and password in it are sent as Basic credentials.
        headers: headers of each request.
        auth: a bearer token, an OAuth client, or a text with another scheme ("Basic ...") for the Authorization header.
        timeout: seconds for one call, at most 3600.
        connect_timeout: seconds to connect, and to fetch one page of the tool list, at most 600.
        enabled: False means that the server is not connected.
        allowed_tools: patterns of the server's own tool names that may be used ("*" matches any text); None allows all.
        excluded_tools: patterns of tool names that may not be used, even if `allowed_tools` has them.
        auto_approve: patterns of tool names that run without an approval.
        instructions: instructions for the model, which replace the server's own.

    Raises:
        ConfigError: a setting is invalid; the message names the server and the setting.
    """

    name: str
    transport: Transport | None = None
    command: str | None = None
    args: Sequence[str] = ()
    env: Mapping[str, str] = server_values.SecretMap({})
    cwd: Path | None = None
    url: str | None = None
    headers: Mapping[str, str] = server_values.SecretMap({})
    auth: str | server_values.OAuthClient | None = None
    timeout: float = 60.0
    connect_timeout: float = 30.0
    enabled: bool = True
    allowed_tools: Sequence[str] | None = None
    excluded_tools: Sequence[str] = ()
    auto_approve: Sequence[str] = ()
    instructions: str | None = None

    @classmethod
    def from_mapping(cls, name: str, mapping: Mapping[str, Any], *, folder: Path | None = None) -> McpServerConfig:
        """Return the server of an entry of mcp.json, with any of the keys that other programs use.

        `${...}` is not expanded here. Unknown keys are ignored, with a warning in the log. `folder` is the base of
        relative `cwd` and `envFile`; None means the working folder. Two keys for one setting are a ConfigError, too.
        """
        return cls(name=name, **settings_of(name, mapping, folder))

    def __post_init__(self) -> None:
        checks = server_values.Checks(self.name)
        self._check_target(checks)
        set_to = {
            "args": checks.texts("args", self.args, empty=True),
            "env": server_values.SecretMap(checks.variables("env", self.env)),
            "cwd": None if self.cwd is None else checks.folder("cwd", self.cwd),
            "headers": server_values.SecretMap(checks.http_headers("headers", self.headers)),
            "timeout": checks.seconds("timeout", self.timeout, server_values.MAX_TIMEOUT),
            "connect_timeout": checks.seconds(
                "connect_timeout", self.connect_timeout, server_values.MAX_CONNECT_TIMEOUT
            ),
            "enabled": checks.flag("enabled", self.enabled),
            "excluded_tools": checks.texts("excluded_tools", self.excluded_tools, most=server_values.MAX_PATTERNS),
            "auto_approve": checks.texts("auto_approve", self.auto_approve, most=server_values.MAX_PATTERNS),
        }
        if self.allowed_tools is not None:
            set_to["allowed_tools"] = checks.texts("allowed_tools", self.allowed_tools, most=server_values.MAX_PATTERNS)
        if self.instructions is not None:
            checks.text("instructions", self.instructions, most=server_values.MAX_INSTRUCTIONS, empty=True)
        set_to |= self._authorization(checks, set_to["headers"])
        for name, value in set_to.items():
            object.__setattr__(self, name, value)

    def allows(self, tool: str) -> bool:
        """Whether the server's tool of this name may be used."""
        allowed = self.allowed_tools is None or matches(self.allowed_tools, tool)
        return allowed and not matches(self.excluded_tools, tool)

    def auto_approves(self, tool: str) -> bool:
        """Whether the server's tool of this name runs without an approval."""
        return matches(self.auto_approve, tool)

    def masked(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults as JSON for a log or a page, with secrets masked."""
        shown: dict[str, Any] = {}
        for name, setting in self.__dataclass_fields__.items():
            value = getattr(self, name)
            if value == setting.default:
                continue
            if isinstance(value, server_values.SecretMap):
                value = value.masked()
            elif name == "auth":
                value = server_values.MASK
            elif name == "url":
                value = server_values.masked_url(value)
            elif isinstance(value, tuple):
                value = server_values.masked_arguments(value) if name == "args" else list(value)
            shown[name] = str(value) if isinstance(value, Path) else value
        return shown

    def secrets(self) -> Iterator[str]:
        """Yield the secret values: environment, headers, credentials, and user, password and query of the URL."""
        yield from self.env.values()
        yield from self.headers.values()
        if self.auth is not None:
            yield self.auth if isinstance(self.auth, str) else self.auth.client_secret
        parts = urlsplit(self.url if self.url and self.enabled else "")
        yield from (parts.username or "", parts.password or "")
        yield from (value for _, value in parse_qsl(parts.query))

    def __repr__(self) -> str:
        return f"McpServerConfig({', '.join(f'{name}={value!r}' for name, value in self.masked().items())})"

    def _check_target(self, checks: server_values.Checks) -> None:
        """Check that exactly one of `command` and `url` is set, and that no setting is only for the other one."""
        if (self.command is None) == (self.url is None):
            checks.fail("command", "or url must be given, and not both")
        if self.transport is not None and self.transport not in get_args(Transport):
            checks.fail("transport", f"must be one of {', '.join(get_args(Transport))}, not {self.transport!r:.40}")
        if self.command is not None:
            checks.text("command", self.command)
            wrong, target = [name for name in _REMOTE if getattr(self, name)], "a command"
            fits = self.transport in (None, "stdio")
            object.__setattr__(self, "transport", "stdio")
        else:
            if self.enabled:
                checks.address("url", self.url)
            else:  # the URL may contain a variable that is not set
                checks.one_line("url", self.url)
            wrong, target = [name for name in _LOCAL if getattr(self, name)], "a url"
            fits = self.transport != "stdio"
        if wrong:
            checks.fail(wrong[0], f"cannot be used: the server has {target}")
        if not fits:
            checks.fail("transport", f"does not fit: the server has {target}")

    def _authorization(self, checks: server_values.Checks, headers: server_values.SecretMap) -> dict[str, Any]:
        """Return the settings that hold the credentials: `auth` for a bearer token, the header for another scheme."""
        if self.auth is None:
            return {}
        given = [name for name in headers if name.lower() == "authorization"]
        if given:
            checks.fail("auth", f"and headers.{given[0]} both say who the client is: give one")
        if self.enabled and "@" in urlsplit(self.url or "").netloc:
            checks.fail("auth", "and the user in url both say who the client is: give one")
        if isinstance(self.auth, server_values.OAuthClient):
            client = self.auth
            checks.one_line("auth.client_id", client.client_id)
            checks.one_line("auth.client_secret", client.client_secret)
            for scope in checks.texts("auth.scopes", client.scopes):
                checks.one_line("auth.scopes", scope)
            if client.issuer is not None:
                checks.address("auth.issuer", client.issuer)
            return {}
        token = checks.one_line("auth", self.auth).strip()
        if not token or not token.isascii():
            checks.fail("auth", "must be a token in ASCII")
        scheme = _SCHEME.fullmatch(token)
        if scheme is None or scheme[1].lower() == "bearer":
            return {"auth": scheme[2] if scheme else token}
        return {"auth": None, "headers": server_values.SecretMap({**headers, "Authorization": token})}
