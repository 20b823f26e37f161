"""Where the server listens: the forms of `--host`, and the port that may stand in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from candle_vllm.server.settings.kinds import Integer, UsageError


@dataclass(frozen=True)
class Address:
    """A TCP address, or the path of a Unix socket."""

    host: str
    port: int
    unix_path: Path | None = None

    @property
    def url(self) -> str:
        """The address for people; a server that listens everywhere is reached at 127.0.0.1."""
        if self.unix_path is not None:
            return f"unix://{self.unix_path}"
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def parse_address(host: str, port: int) -> Address:
    """Reads the forms of `--host`; a port inside `host` wins over `port`."""
    if host.startswith("unix://"):
        path = Path(host.removeprefix("unix://"))
        if not path.is_absolute() or len(str(path).encode()) > 100:
            raise UsageError(f"host {host!r} must be unix:///absolute/path of at most 100 bytes")
        return Address("", 0, path)
    name, inner = split_host(host)
    return Address(name, port if inner is None else inner)


def split_host(host: str) -> tuple[str, int | None]:
    """Host name or address, and the port that stands in it, if any."""
    match = re.fullmatch(r"(?:(?P<scheme>[a-z]+)://)?(?P<rest>[^/]+)/?", host)
    if match is None or match["scheme"] not in (None, "tcp", "http"):
        hint = ": HTTPS needs a reverse proxy in front" if host.startswith("https:") else ""
        raise UsageError(f"host {host!r} is none of host, host:port, [v6]:port, tcp://, http://, unix:///path{hint}")
    rest = match["rest"]
    if re.fullmatch(r"[0-9a-fA-F:.]*:[0-9a-fA-F:.]*:[0-9a-fA-F:.]*(%\w+)?", rest):
        return rest, None  # an IPv6 address without brackets
    match = re.fullmatch(r"(?:\[(?P<v6>[0-9a-fA-F:.]+(?:%\w+)?)\]|(?P<name>[\w.-]+))(?::(?P<port>.*))?", rest, re.ASCII)
    if match is None:
        raise UsageError(f"host {host!r} is none of host, host:port, [v6]:port, tcp://, http://, unix:///path")
    name = match["v6"] or match["name"]
    if match["port"] is None:
        return name, None
    try:
        return name, Integer(0, 65535, units=False).from_text(match["port"])
    except ValueError as error:
        raise UsageError(f"the port in host {host!r} {error}") from None
