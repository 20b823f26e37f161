# SPDX-License-Identifier: MIT
"""Definition of a setting: name, flags, kind and help; errors for invalid values; the forms of `--host`.

Settings are read before step 1 of a request's life. The engine's settings are defined in the table of `EngineConfig`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from candle_vllm.core.config import SETTINGS
from candle_vllm.core.errors import ConfigError
from candle_vllm.core.setting_kinds import Boolean, Integer, Kind, Secret, nearest
from candle_vllm.core.shown import HIDDEN, without_secrets

ENV_PREFIX = "CANDLE_VLLM_"
GROUPS = MODEL, DEVICE, LIMITS, SAMPLING, MODELS, ADAPTERS, MAILBOX, RESPONSES, TOOLS, HTTP, LOGGING = (
    "model", "device and memory", "scheduling", "default sampling", "several models", "adapters",
    "mailbox and webhooks", "kept responses", "MCP tools", "HTTP server", "logging",
)  # fmt: skip
# needs (`Option.needs`): what a command does, besides using groups of settings
SERVES, BATCHES, REUSES, CALLS = "serving", "batch size", "shared prefixes", "tool calls"


class Rate(NamedTuple):
    """A limit of each API key: what is counted (`Meter.spend`), and in which time; a setting has the amount."""

    unit: str
    window: str
    seconds: float

    @property
    def label(self) -> str:
        """Name in headers and metrics; without the window if that is a minute, as in OpenAI's headers."""
        return self.unit if self.window == "minute" else f"{self.unit}-{self.window}"


@dataclasses.dataclass(frozen=True)
class Option:
    """One setting.

    Attributes:
        name: field of `Settings`; in upper case after `CANDLE_VLLM_`, the environment variable.
        group: heading in the help.
        flags: flags that take a value, in the order of the help.
        kind: type of its values, which parses and checks them.
        help: text for `--help`.
        metavar: placeholder of the value in the help.
        constants: flags without a value, each with the value that it sets.
        repeat: whether the flag may be repeated; in the environment, values are separated by commas.
        in_yaml: whether it is allowed in `params` of a model in models.yaml.
        rivals: name of a set of settings of which one source may set only one.
        needs: a need or a further group. A command uses the setting only if its `Command.uses` lists this as well as
            the setting's group, or its `Command.plus` names the setting; other commands reject the flags.
        default: value if it is not set; None leaves it to the engine, the model or the machine.
        engine: field of `EngineConfig` that receives its value.
        unset: the default in words, where it is no value: for `--help`, docs/configuration.md and `candle-vllm config`.
        secret: whether its value is never shown.
        rate: what the setting limits for each API key, if it is such a limit.
    """

    name: str
    group: str
    flags: tuple[str, ...]
    kind: Kind
    help: str
    metavar: str = ""
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    repeat: bool = False
    in_yaml: bool = False
    rivals: str | None = None
    needs: str = ""
    default: Any = None
    engine: str | None = None
    unset: str = ""
    secret: bool = False
    rate: Rate | None = None

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def usual(self) -> Any:
        """The value of a setting that is not set, or `unset`."""
        defaults = (self.default, SETTINGS[self.engine].default if self.engine else None)
        return next((value for value in defaults if value not in (None, ())), self.unset)


def shown(option: Option, value: Any) -> Any:
    """Convert a setting's value to JSON types, without secrets, also without the ones in URLs."""
    if (option.secret or isinstance(option.kind, Secret)) and value and value != option.default:
        return [HIDDEN] * len(value) if option.repeat else HIDDEN
    return plain(value)


def plain(value: Any) -> Any:
    """Convert a value to JSON types; URLs lose user, password, query and fragment."""
    if isinstance(value, (str, Path)):
        return without_secrets(str(value), alone=True)
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (tuple, list)) else value


Told = Callable[[str, Any], Option]
"""Makes a setting from its name and its default."""


def switch(name: str, group: str, text: str, on: str = "", off: tuple[str, ...] = (), **more: Any) -> Option:
    """Return a Boolean setting, with `--name` and `--no-name`, or with another flag `on`, or other flags `off`."""
    flag = on or "--" + name.replace("_", "-")
    constants = {flag: True, **dict.fromkeys(off or (f"--no-{flag[2:]}",), False)}
    return Option(name, group, (), Boolean(), text, constants=constants, **more)


def own(group: str, kind: Kind, text: str, metavar: str = "", **more: Any) -> Told:
    """Return a maker of a setting with this kind and help; `engine` takes both from `EngineConfig`."""

    def told(name: str, default: Any) -> Option:
        if isinstance(kind, Boolean):
            return switch(name, group, text, default=default, **more)
        given: dict[str, Any] = {"flags": ("--" + name.replace("_", "-"),), **more}
        return Option(
            name, group, kind=kind, help=text, metavar=metavar, repeat=default == (), default=default, **given
        )

    return told


def engine(
    group: str, metavar: str = "", *, name: str = "", text: str = "", more: str = "",
    reading: Mapping[str, Any] | None = None, **others: Any,
) -> Told:  # fmt: skip
    """Return a maker of a setting of `EngineConfig`, under the same name or under `name`.

    `EngineConfig` defines its type and help. `text` replaces the help, `more` is appended to it, and `reading` replaces
    attributes of its kind. By default, the setting is allowed in models.yaml.
    """

    def told(field: str, default: Any) -> Option:
        setting = SETTINGS[name or field]
        kind = dataclasses.replace(cast(Any, setting.kind), **(reading or {}))
        given = {"in_yaml": True, "engine": setting.name, **others}
        return own(group, kind, (text or setting.help) + more, metavar, **given)(field, default)

    return told


# ---- refusals --------------------------------------------------------------------------------------------------------


class UsageError(ConfigError):
    """A command line, environment variable, settings file or other setting is invalid."""


class Section(dict[Any, Any]):
    """A mapping of a YAML file with its `line`, and the `lines` of its keys, counted from 1."""

    line = 0
    lines: Mapping[Any, int] = {}


def line_of(section: Any, key: Any = None) -> str:
    """Return the position of a mapping, or of one of its keys, in a file, for messages: ", line 3"; "" if unknown."""
    line = section.lines.get(key, section.line) if isinstance(section, Section) else 0
    return f", line {line}" if line else ""


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """Return a section of a settings file; UsageError if it is not a mapping."""
    if not isinstance(value, dict):
        raise UsageError(f"{where} must be a mapping of keys to values")
    return value


def known_keys(keys: Iterable[Any], known: Iterable[str], where: str) -> None:
    """Raise UsageError for the first unknown key, with its line and the nearest known key, or all known keys."""
    for key in keys:
        if key not in known:
            hint = nearest(str(key), known) or f"; known: {', '.join(known)}"
            raise UsageError(f"{where}{line_of(keys, key)}: unknown key {str(key)[:60]!r}{hint}")


def convert(kind: Kind, value: Any, spelled: str) -> Any:
    """Convert `value`, a text or a typed YAML value, to its kind; the UsageError names it as `spelled`."""
    try:
        if isinstance(value, str):
            return kind.from_text(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return kind.from_text(str(value))
        return kind.check(value)
    except ValueError as error:
        raise UsageError(f"{spelled} {error}") from None


# ---- where the server listens ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Address:
    """A TCP address or the path of a Unix socket, and whether it uses HTTPS."""

    host: str
    port: int
    unix_path: Path | None = None
    tls: bool = False

    @property
    def url(self) -> str:
        """The URL for users; for a server that listens on all interfaces, the host is 127.0.0.1 or ::1."""
        if self.unix_path is not None:
            return f"unix://{self.unix_path}"
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http{'s' * self.tls}://{f'[{host}]' if ':' in host else host}:{self.port}"


SOCKETS = ("unix://", "file://", "socket://")  # synonyms, as in the Rust candle-vllm


def parse_address(host: str, port: int) -> Address:
    """Parse the forms of `--host`; a port inside `host` replaces `port`."""
    if host.startswith(SOCKETS):
        path = Path(host.partition("://")[2])
        if not path.is_absolute() or len(str(path).encode()) > 100:
            raise UsageError(f"host {host!r} must be unix:///absolute/path of at most 100 bytes")
        return Address("", 0, path)
    name, inner = split_host(host)
    return Address(name, port if inner is None else inner)


def split_host(host: str) -> tuple[str, int | None]:
    """Split a host name or address from its port, if it has one."""
    match = re.fullmatch(r"(?:(?P<scheme>[a-z]+)://)?(?P<rest>[^/]+)/?", host)
    if match is None or match["scheme"] not in (None, "tcp", "http"):
        hint = ": for HTTPS set --ssl-certfile and --ssl-keyfile" if host.startswith("https:") else ""
        raise UsageError(f"host {host!r} must be host, host:port, [v6]:port, tcp://, http:// or unix:///path{hint}")
    rest = match["rest"]
    if re.fullmatch(r"[0-9a-fA-F:.]*:[0-9a-fA-F:.]*:[0-9a-fA-F:.]*(%\w+)?", rest):
        return rest, None  # an IPv6 address without brackets
    match = re.fullmatch(r"(?:\[(?P<v6>[0-9a-fA-F:.]+(?:%\w+)?)\]|(?P<name>[\w.-]+))(?::(?P<port>.*))?", rest, re.ASCII)
    if match is None:
        raise UsageError(f"host {host!r} must be host, host:port, [v6]:port, tcp://, http:// or unix:///path")
    name = match["v6"] or match["name"]
    if match["port"] is None:
        return name, None
    try:
        return name, Integer(0, 65535, units=False).from_text(match["port"])
    except ValueError as error:
        raise UsageError(f"the port in host {host!r} {error}") from None
