# SPDX-License-Identifier: MIT
"""The operator's options of the mailbox: its store, its limits, the targets of its webhooks and their authentication.

Read before step 1 of a request's life. `webhook_options` reads the `webhook` section of a settings file; `${NAME}`
stands for an environment variable only in its secrets.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from candle_vllm.core.setting_kinds import Boolean, Choice, Integer, Kind, Number, Secret, Text
from candle_vllm.core.targets import check_pattern, parse_target
from candle_vllm.server.settings.options import UsageError, known_keys
from candle_vllm.server.settings.original_keys import given

HEADER_VALUE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,1022}[\x21-\x7e])?", re.ASCII)
MAX_HEADERS = 16
HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}", re.ASCII)
RESERVED_HEADERS = frozenset({
    "host", "content-length", "content-type", "content-encoding", "transfer-encoding", "connection", "keep-alive",
    "te", "trailer", "upgrade", "expect", "accept-encoding", "user-agent", "cookie", "proxy-authorization",
    "proxy-connection", "idempotency-key", "x-webhook-timestamp",
})  # fmt: skip

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]{0,127})\}", re.ASCII)
_SIGNATURE_HEADERS = {"sha256": "X-Signature-256", "sha512": "X-Signature-512"}
_AUTH: Mapping[str, Kind] = {
    "header": Text(64), "algorithm": Choice(tuple(_SIGNATURE_HEADERS)), "signs": Choice(("timestamp", "body")),
}  # fmt: skip
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
    """Return `sha256=<hex>` or `sha512=<hex>`: the HMAC of timestamp, dot and exact body.

    With the timestamp, the receiver can refuse a replayed push. If `auth.signs` is "body", only the body is signed.
    """
    signed = body if auth.signs == "body" else timestamp.encode("ascii") + b"." + body
    return f"{auth.algorithm}={hmac.new(auth.secret.encode(), signed, getattr(hashlib, auth.algorithm)).hexdigest()}"


def webhook_auth(section: Any, variables: Mapping[str, str]) -> WebhookAuth:
    """Read the `auth` section of a webhook; UsageError for an unknown key, a missing secret or an invalid value."""
    section = given(section, "webhook auth")
    kind = checked("webhook auth type", Choice(tuple(_SECRETS)).check, section.get("type"))
    secret = _SECRETS[kind]
    known = ["type"] + ([secret] if secret else [])
    known += {"api_key": ["header"], "hmac": ["algorithm", "header", "signs"]}.get(kind, [])
    known_keys(section, known, f"webhook auth of type {kind}")
    values: dict[str, Any] = {"type": kind}
    if secret and secret in section:
        values["secret"] = webhook_secret(f"auth {secret}", section[secret], variables)
    for name, its_kind in _AUTH.items():
        if name in section:
            values[name] = checked(f"webhook auth {name}", its_kind.check, section[name])
    return WebhookAuth(**values)


def webhook_secret(name: str, value: Any, variables: Mapping[str, str]) -> str:
    """Read a secret of the `webhook` section, and replace its variables.

    Raises UsageError if a variable is not set, or the secret is not 1 to 4096 printable characters without spaces.
    """
    if not isinstance(value, str):
        raise UsageError(f"webhook {name} must be a text")
    missing = next((found for found in _VARIABLE.findall(value) if not variables.get(found)), None)
    if missing is not None:
        raise UsageError(f"webhook {name} names the variable {missing}, which is not set")
    return checked(f"webhook {name}", Secret().check, _VARIABLE.sub(lambda match: variables[match[1]], value))


def checked(name: str, check: Callable[[Any], Value], value: Any) -> Value:
    """Return `check(value)`; its ValueError becomes a UsageError that begins with the setting's name."""
    try:
        return check(value)
    except ValueError as error:
        raise UsageError(f"{name} {error}") from None


@dataclass(frozen=True)
class WebhookOptions:
    """The operator's webhook, and the retries of all webhooks.

    Attributes:
        url: URL to which answers are pushed; None means that the operator has no webhook.
        on_disconnect: whether to push an answer if its client disconnected and its request has only X-Mailbox-Mode.
        on_complete: whether to push every answer whose request has only X-Mailbox-Mode.
        retry_count: number of attempts after the first.
        retry_delay_ms: pause before the first retry (`wait_ms` in `webhook.py`).
        timeout_secs: time limit of one whole attempt.
        signing_secret: signs the operator's pushes in addition to `auth`.
    """

    url: str | None = None
    on_disconnect: bool = True
    on_complete: bool = False
    retry_count: int = 3
    retry_delay_ms: int = 1000
    timeout_secs: float = 30.0
    auth: WebhookAuth = field(default_factory=WebhookAuth)
    headers: Mapping[str, str] = field(default_factory=dict)
    signing_secret: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if self.url is not None:
            checked("webhook url", parse_target, self.url)
        if self.signing_secret and self.auth.type == "hmac":
            raise UsageError("webhook: give signing_secret or auth of type hmac, not both")
        if len(self.headers) > MAX_HEADERS:
            raise UsageError(f"webhook headers: at most {MAX_HEADERS} are allowed")
        auths = (self.auth, WebhookAuth("hmac", self.signing_secret)) if self.signing_secret else (self.auth,)
        own = [name.lower() for auth in auths for name in auth.headers("", b"")]
        if len(own) > len(set(own)):
            raise UsageError(f"webhook auth: {self.auth.header!r:.80} cannot be the header, which has the signature")
        taken = RESERVED_HEADERS.union(own)
        for name, value in self.headers.items():
            if not HEADER_NAME.fullmatch(name) or name.lower() in taken:
                raise UsageError(f"webhook headers: {name!r:.80} cannot be set")
            if not HEADER_VALUE.fullmatch(value):
                raise UsageError(f"webhook headers: the value of {name} must be printable ASCII, 1 to 1024 characters")
        for name, kind in _NUMBERS.items():
            checked(f"webhook {name}", kind.check, getattr(self, name))


@dataclass(frozen=True)
class MailboxOptions:
    """Options of the whole mailbox.

    Attributes:
        url: URL of the store; `BACKENDS` in `responses/store/backend.py` lists the forms.
        retention_secs: how long a finished answer is stored.
        max_record_bytes: maximum size of one answer's JSON; a larger answer is stored as an error that says so.
        max_records_per_key: maximum number of answers of one API key; beyond it, its oldest one is deleted.
        max_records: maximum number of all answers; beyond it, the key with most answers loses its oldest one.
        webhook: the operator's webhook and the retries of all webhooks.
        webhook_allowed_hosts: hosts of clients' webhooks: name, `*.name` or address, with `:port` unless 80 or 443.
        webhook_allow_private: whether hosts listed by their full name may have private or loopback addresses.
        webhook_allowed_headers: headers that clients may add to a push, in lower case.
        max_deliveries: maximum number of due pushes at the same time, and of further pushes that clients ask for.
    """

    url: str = field(repr=False)
    retention_secs: int = 3600
    max_record_bytes: int = 1 << 20
    max_records_per_key: int = 1000
    max_records: int = 10_000
    webhook: WebhookOptions = field(default_factory=WebhookOptions)
    webhook_allowed_hosts: tuple[str, ...] = ()
    webhook_allow_private: bool = False
    webhook_allowed_headers: tuple[str, ...] = ("x-correlation-id", "x-request-id", "traceparent")
    max_deliveries: int = 8

    def __post_init__(self) -> None:
        for name, kind in _SIZES.items():
            checked(f"mailbox {name}", kind.check, getattr(self, name))
        if len(self.webhook_allowed_hosts) > 256:
            raise UsageError("webhook_allowed_hosts: at most 256 are allowed")
        for pattern in self.webhook_allowed_hosts:
            checked("webhook_allowed_hosts", check_pattern, pattern)
        for name in self.webhook_allowed_headers:
            if name != name.lower() or not HEADER_NAME.fullmatch(name) or name in RESERVED_HEADERS | {"authorization"}:
                raise UsageError(f"webhook_allowed_headers: {name!r:.80} cannot be allowed")


_NUMBERS: Mapping[str, Kind] = {
    "retry_count": Integer(0, 20, units=False),
    "retry_delay_ms": Integer(1, 600_000, units=False),
    "timeout_secs": Number(0, 300, open_low=True),
}
_SIZES: Mapping[str, Kind] = {
    "retention_secs": Integer(1, 30 * 86400),
    "max_record_bytes": Integer(1 << 10, 64 << 20),
    "max_records_per_key": Integer(1, 100_000),
    "max_records": Integer(1, 1_000_000),
    "max_deliveries": Integer(1, 256),
}
_FIELDS: Mapping[str, Kind] = {**_NUMBERS, "url": Text(2048), "on_disconnect": Boolean(), "on_complete": Boolean()}


def webhook_options(section: Any, variables: Mapping[str, str]) -> WebhookOptions:
    """Read the `webhook` section of a settings file, whose keys are the fields of `WebhookOptions`.

    All keys are optional; a null value sets nothing, in `auth` too. `variables` is the environment, for `${NAME}` in a
    secret. UsageError for an unknown key, a wrong value, a missing secret or a variable that is not set.
    """
    section = given(section, "mailbox: webhook")
    known_keys(section, [each.name for each in fields(WebhookOptions)], "webhook")
    known = {key: value for key, value in section.items() if key in _FIELDS}
    values = {key: checked(f"webhook {key}", _FIELDS[key].check, value) for key, value in known.items()}
    if "${" in str(values.get("url", "")):
        raise UsageError("webhook url: ${NAME} may stand in secrets only")
    if "signing_secret" in section:
        values["signing_secret"] = webhook_secret("signing_secret", section["signing_secret"], variables)
    if "headers" in section:
        values["headers"] = _headers(section["headers"])
    if "auth" in section:
        values["auth"] = webhook_auth(section["auth"], variables)
    return WebhookOptions(**values)


def _headers(section: Any) -> dict[str, str]:
    section = given(section, "webhook headers")
    if not all(isinstance(part, str) for item in section.items() for part in item):
        raise UsageError("webhook headers must be a mapping of names to texts")
    if any("${" in value for value in section.values()):
        raise UsageError("webhook headers: ${NAME} may stand in secrets only; use auth of type api_key")
    return dict(section)
