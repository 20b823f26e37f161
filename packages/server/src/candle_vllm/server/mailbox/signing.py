# SPDX-License-Identifier: MIT
"""Authentication of pushes: read, check and send the operator's token, key or signature.

`${NAME}` stands for an environment variable only in the secrets of the settings file.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from candle_vllm.core.setting_kinds import Choice, Secret, Text
from candle_vllm.server.settings.options import UsageError, known_keys

HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}", re.ASCII)
RESERVED_HEADERS = frozenset({
    "host", "content-length", "content-type", "content-encoding", "transfer-encoding", "connection", "keep-alive",
    "te", "trailer", "upgrade", "expect", "accept-encoding", "user-agent", "cookie", "proxy-authorization",
    "proxy-connection", "idempotency-key", "x-webhook-timestamp",
})  # fmt: skip

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]{0,127})\}", re.ASCII)
_SIGNATURE_HEADERS = {"sha256": "X-Signature-256", "sha512": "X-Signature-512"}
_SECRETS = {"none": None, "bearer": "token", "api_key": "key", "hmac": "secret"}

Value = TypeVar("Value")


@dataclass(frozen=True)
class WebhookAuth:
    """How the operator's webhook recognises that a push comes from this server.

    Attributes:
        type: none, bearer (`Authorization: Bearer`), api_key (a header of its own) or hmac (a signature).
        secret: the token, the key, or the secret of the signature.
        header: the header of the key or of the signature; "" means X-API-Key or X-Signature-256 (-512).
        algorithm: hash algorithm of the signature.
        signs: what is signed: timestamp, dot and body, or only the body, as the Rust candle-vllm signs it.
    """

    type: Literal["none", "bearer", "api_key", "hmac"] = "none"
    secret: str = field(default="", repr=False)
    header: str = ""
    algorithm: Literal["sha256", "sha512"] = "sha256"
    signs: Literal["timestamp", "body"] = "timestamp"

    def __post_init__(self) -> None:
        if self.type != "none" and not self.secret:
            raise UsageError(f"webhook auth of type {self.type} needs its secret")
        if self.header and (not HEADER_NAME.fullmatch(self.header) or self.header.lower() in RESERVED_HEADERS):
            raise UsageError(f"webhook auth: {self.header!r:.80} cannot be the header")

    @property
    def header_name(self) -> str:
        """The header with the key or the signature."""
        return self.header or ("X-API-Key" if self.type == "api_key" else _SIGNATURE_HEADERS[self.algorithm])

    def headers(self, timestamp: str, body: bytes) -> dict[str, str]:
        """Return the authentication headers of a push of `body` at `timestamp`; {} without authentication."""
        if self.type == "none":
            return {}
        if self.type == "bearer":
            return {"Authorization": f"Bearer {self.secret}"}
        return {self.header_name: self.secret if self.type == "api_key" else sign(self, timestamp, body)}


def sign(auth: WebhookAuth, timestamp: str, body: bytes) -> str:
    """Return `sha256=<hex>`: the HMAC of timestamp, dot and exact body, so that an old push cannot be replayed.

    If `auth.signs` is "body", it is the HMAC of only the body.
    """
    signed = body if auth.signs == "body" else timestamp.encode("ascii") + b"." + body
    return f"{auth.algorithm}={hmac.new(auth.secret.encode(), signed, getattr(hashlib, auth.algorithm)).hexdigest()}"


def webhook_auth(section: Any, variables: Mapping[str, str]) -> WebhookAuth:
    """Read the `auth` section of a webhook; UsageError for an unknown key, an invalid value, or an unset variable."""
    if not isinstance(section, Mapping):
        raise UsageError("webhook auth must be a mapping with a type")
    kind = checked("webhook auth type", lambda: Choice(tuple(_SECRETS)).check(section.get("type")))
    secret = _SECRETS[kind]
    known = ["type"] + ([secret] if secret else [])
    known += {"api_key": ["header"], "hmac": ["algorithm", "header", "signs"]}.get(kind, [])
    known_keys(section, known, f"webhook auth of type {kind}")
    values: dict[str, Any] = {"type": kind}
    if secret and secret in section:
        values["secret"] = webhook_secret(f"auth {secret}", section[secret], variables)
    if "header" in section:
        values["header"] = checked("webhook auth header", lambda: Text(64).check(section["header"]))
    if "algorithm" in section:
        choice = Choice(tuple(_SIGNATURE_HEADERS))
        values["algorithm"] = checked("webhook auth algorithm", lambda: choice.check(section["algorithm"]))
    if "signs" in section:
        values["signs"] = checked("webhook auth signs", lambda: Choice(("timestamp", "body")).check(section["signs"]))
    return WebhookAuth(**values)


def webhook_secret(name: str, value: Any, variables: Mapping[str, str]) -> str:
    """Read a secret of the `webhook` section, and replace its variables.

    Raises UsageError if the secret is no text, is empty or too long, or has an unset variable.
    """
    if not isinstance(value, str):
        raise UsageError(f"webhook {name} must be a text")
    missing = next((found for found in _VARIABLE.findall(value) if not variables.get(found)), None)
    if missing is not None:
        raise UsageError(f"webhook {name} names the variable {missing}, which is not set")
    text = _VARIABLE.sub(lambda match: variables[match[1]], value)
    return checked(f"webhook {name}", lambda: Secret().check(text))


def checked(name: str, check: Callable[[], Value]) -> Value:
    """Return the result of `check`; its ValueError becomes a UsageError that begins with the setting's name."""
    try:
        return check()
    except ValueError as error:
        raise UsageError(f"{name} {error}") from None
