"""Values that must not be shown: mappings and addresses as they may stand in a log, and OAuth credentials."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

MASK = "***"

_SECRET_WORD = re.compile(
    r"token|secret|passw|pwd|api.?key|access.?key|auth|bearer|credential|header|cookie", re.IGNORECASE
)
_VALUE = re.compile(r"([=:]\s*)\S.*", re.DOTALL)


class SecretMap(Mapping[str, str]):
    """A mapping that cannot be changed, and whose values its `repr` hides. It is no `dict`: encoders refuse it."""

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
        """The names, with a mask for each value."""
        return dict.fromkeys(self._values, MASK)


@dataclass(frozen=True, kw_only=True)
class OAuthClient:
    """Credentials of a program that gets its own token (OAuth client credentials).

    Attributes:
        client_id: of the program.
        client_secret: goes to the authorization server alone.
        scopes: that are asked for.
        issuer: the address of the authorization server that may have the secret; None leaves the choice to the MCP
            server, which is only right for a server that is trusted with the secret.
    """

    client_id: str
    client_secret: str = field(repr=False)
    scopes: tuple[str, ...] = ()
    issuer: str | None = None


def masked_url(url: str) -> str:
    """The address with masks for user and password and for all of its query but the names."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return MASK
    _, at, host = parts.netloc.rpartition("@")
    pairs = [part.partition("=") for part in parts.query.split("&")] if parts.query else []
    query = "&".join(f"{name}={MASK}" if equals else MASK for name, equals, _ in pairs)
    return parts._replace(netloc=f"{MASK}@{host}" if at else host, query=query, fragment="").geturl()


def masked_arguments(arguments: Iterable[str]) -> list[str]:
    """The arguments of a command, with masks for those that look like secrets by the words in them or before them.

    It is a guess: a secret is safer in `env`.
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
        follows = secret and not follows and argument.startswith("-") and not _VALUE.search(argument)
    return shown
