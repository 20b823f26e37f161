# SPDX-License-Identifier: MIT
"""Read the headers by which a request has its answer stored or pushed: `X-Mailbox-Mode` and `X-Webhook-*`.

They are read at step 1 of a request's life, so that a wrong header is refused before anything is generated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from candle_vllm.core.targets import ForbiddenTarget, Target, allowed_target
from candle_vllm.server.mailbox.options import HEADER_VALUE, MailboxOptions
from candle_vllm.server.mailbox.store import MailboxError, invalid

MAILBOX_MODE, WEBHOOK_URL, WEBHOOK_MODE, WEBHOOK_BEARER = (
    "X-Mailbox-Mode", "X-Webhook-URL", "X-Webhook-Mode", "X-Webhook-Bearer",
)  # fmt: skip
_HEADERS = {name.lower().encode(): name for name in (MAILBOX_MODE, WEBHOOK_URL, WEBHOOK_MODE, WEBHOOK_BEARER)}
MAX_BEARER = 1024

Headers = Iterable[tuple[bytes, bytes]]  # headers of an ASGI scope


class Mode(StrEnum):
    """When an answer is stored or pushed."""

    ON_DISCONNECT = "on_disconnect"
    ALWAYS = "always"
    NEVER = "never"

    def applies(self, disconnected: bool) -> bool:
        """Whether an answer is stored or pushed in this mode, given whether its client has disconnected."""
        return self is Mode.ALWAYS or (self is Mode.ON_DISCONNECT and disconnected)


@dataclass(frozen=True)
class DeliveryPolicy:
    """Whether one request's answer is stored and pushed; at least one mode is not `never`.

    Attributes:
        mailbox, webhook: when the answer is stored for its client, and when it is pushed.
        url: URL that the answer is pushed to; None means the operator's webhook.
        bearer: bearer token for `url`, or None.
    """

    mailbox: Mode
    webhook: Mode
    url: str | None = None
    bearer: str | None = field(default=None, repr=False)


def read_policy(headers: Headers, options: MailboxOptions) -> DeliveryPolicy | None:
    """Return what the headers request, or None for nothing; raises `MailboxError` (400), which names the header."""
    given = _given(headers)
    mailbox = _mode(given, MAILBOX_MODE)
    webhook = _mode(given, WEBHOOK_MODE)
    url = given.get(WEBHOOK_URL)
    if url is not None:
        client_target(WEBHOOK_URL, url, options)
    bearer = given.get(WEBHOOK_BEARER)
    if bearer is not None:
        check_bearer(WEBHOOK_BEARER, bearer)
        if url is None:
            raise invalid(WEBHOOK_BEARER, f"is for {WEBHOOK_URL}, which is missing")
    if url is None and webhook not in (None, Mode.NEVER) and options.webhook.url is None:
        raise invalid(WEBHOOK_MODE, f"needs {WEBHOOK_URL}: this server has no webhook of its own")
    if url is None and not {mailbox, webhook} - {None, Mode.NEVER}:
        return None
    if webhook is None:
        webhook = Mode.ON_DISCONNECT if url is not None else _operators_mode(options)
    policy = DeliveryPolicy(mailbox or Mode.NEVER, webhook, url, bearer)
    return policy if {policy.mailbox, policy.webhook} != {Mode.NEVER} else None


def refuse_headers(headers: Headers, reason: str | None = None) -> None:
    """Raise a 400 if a request has one of the headers; without a `reason` the error says that the mailbox is off."""
    for name in filter(None, (_HEADERS.get(raw.lower()) for raw, _ in headers)):
        if reason is not None:
            raise invalid(name, reason)
        raise MailboxError(
            400, f"{name} needs a mailbox, which is off: the operator turns it on with --mailbox.", "mailbox_off", name
        )


def client_target(param: str, url: str, options: MailboxOptions) -> Target:
    """Check and parse a client's URL; raises a 400 that names `param`."""
    if not options.webhook_allowed_hosts:
        raise invalid(param, "is not allowed: this server's operator has allowed no hosts for webhooks of clients")
    try:
        return allowed_target(url, options.webhook_allowed_hosts, options.webhook_allow_private)
    except ForbiddenTarget as error:
        raise invalid(param, str(error)) from None


def check_bearer(param: str, bearer: str) -> None:
    """Raise a 400 that names `param` unless `bearer` can be sent in a header; the message does not repeat it."""
    if len(bearer) > MAX_BEARER or not HEADER_VALUE.fullmatch(bearer) or " " in bearer:
        raise invalid(param, f"must be 1 to {MAX_BEARER} printable ASCII characters without blanks")


def _given(headers: Headers) -> dict[str, str]:
    given: dict[str, str] = {}
    for raw, value in headers:
        name = _HEADERS.get(raw.lower())
        if name is None:
            continue
        if name in given:
            raise invalid(name, "appears twice in the request")
        given[name] = value.decode("latin-1").strip()
    return given


def _mode(given: dict[str, str], name: str) -> Mode | None:
    text = given.get(name)
    if text is None:
        return None
    try:
        return Mode(text.lower())
    except ValueError:
        raise invalid(name, f"must be on_disconnect, always or never, not {text!r:.60}") from None


def _operators_mode(options: MailboxOptions) -> Mode:
    if options.webhook.url is None:
        return Mode.NEVER
    if options.webhook.on_complete:
        return Mode.ALWAYS
    return Mode.ON_DISCONNECT if options.webhook.on_disconnect else Mode.NEVER
