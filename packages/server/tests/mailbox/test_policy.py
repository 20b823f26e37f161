# SPDX-License-Identifier: MIT
"""What headers ask for, and which headers are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from candle_vllm.server.mailbox.options import MailboxOptions, WebhookOptions
from candle_vllm.server.mailbox.policy import DeliveryPolicy, Mode, read_policy, refuse_headers
from candle_vllm.server.mailbox.store import MailboxError

ALWAYS, GONE, NEVER = Mode.ALWAYS, Mode.ON_DISCONNECT, Mode.NEVER
URL = "https://hooks.example/x"


def _options(**webhook: Any) -> MailboxOptions:
    return MailboxOptions("sqlite:///x", webhook=WebhookOptions(**webhook),
                          webhook_allowed_hosts=("hooks.example",))  # fmt: skip


def _headers(given: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode("latin-1")) for name, value in given.items()]


OWN = {"url": "https://operator.example/"}
CASES: list[tuple[dict[str, str], dict[str, Any], DeliveryPolicy | None]] = [
    ({}, {}, None),
    ({}, {**OWN, "on_complete": True}, None),
    ({"X-Mailbox-Mode": "never"}, {**OWN, "on_complete": True}, None),
    ({"X-Mailbox-Mode": "never", "X-Webhook-Mode": "never"}, OWN, None),
    ({"X-Mailbox-Mode": "always"}, {}, DeliveryPolicy(ALWAYS, NEVER)),
    ({"X-Mailbox-Mode": " On_Disconnect "}, {}, DeliveryPolicy(GONE, NEVER)),
    ({"X-Mailbox-Mode": "always"}, OWN, DeliveryPolicy(ALWAYS, GONE)),
    ({"X-Mailbox-Mode": "always"}, {**OWN, "on_complete": True}, DeliveryPolicy(ALWAYS, ALWAYS)),
    ({"X-Mailbox-Mode": "always"}, {**OWN, "on_disconnect": False}, DeliveryPolicy(ALWAYS, NEVER)),
    ({"X-Mailbox-Mode": "always", "X-Webhook-Mode": "never"}, OWN, DeliveryPolicy(ALWAYS, NEVER)),
    ({"X-Webhook-Mode": "always"}, OWN, DeliveryPolicy(NEVER, ALWAYS)),
    ({"X-Webhook-URL": URL}, {}, DeliveryPolicy(NEVER, GONE, URL)),
    ({"X-Webhook-URL": URL}, {**OWN, "on_complete": True}, DeliveryPolicy(NEVER, GONE, URL)),
    ({"X-Webhook-URL": URL, "X-Webhook-Mode": "never"}, {}, None),
    ({"X-Webhook-URL": URL, "X-Webhook-Mode": "always", "X-Webhook-Bearer": "t"}, {},
     DeliveryPolicy(NEVER, ALWAYS, URL, "t")),
]  # fmt: skip


@pytest.mark.parametrize(("given", "webhook", "policy"), CASES)
def test_what_headers_ask_for(given: dict[str, str], webhook: dict[str, Any], policy: DeliveryPolicy | None) -> None:
    assert read_policy(_headers(given), _options(**webhook)) == policy


WRONG = [
    ({"X-Mailbox-Mode": "sometimes"}, "X-Mailbox-Mode"),
    ({"X-Mailbox-Mode": ""}, "X-Mailbox-Mode"),
    ({"X-Webhook-Mode": "x" * 10_000}, "X-Webhook-Mode"),
    ({"X-Webhook-Mode": "always"}, "X-Webhook-Mode"),
    ({"X-Webhook-URL": "https://evil.example/"}, "X-Webhook-URL"),
    ({"X-Webhook-URL": "http://169.254.169.254/"}, "X-Webhook-URL"),
    ({"X-Webhook-URL": "https://hooks.example@evil.example/"}, "X-Webhook-URL"),
    ({"X-Webhook-URL": "https://hooks.example:22/"}, "X-Webhook-URL"),
    ({"X-Webhook-URL": ""}, "X-Webhook-URL"),
    ({"X-Webhook-Bearer": "t"}, "X-Webhook-Bearer"),
    ({"X-Webhook-Bearer": "two words", "X-Webhook-URL": URL}, "X-Webhook-Bearer"),
    ({"X-Webhook-Bearer": "\xe9", "X-Webhook-URL": URL}, "X-Webhook-Bearer"),
    ({"X-Webhook-Bearer": "", "X-Webhook-URL": URL}, "X-Webhook-Bearer"),
    ({"X-Webhook-Bearer": "t" * 1025, "X-Webhook-URL": URL}, "X-Webhook-Bearer"),
]


@pytest.mark.parametrize(("given", "param"), WRONG)
def test_wrong_headers_are_named(given: dict[str, str], param: str) -> None:
    with pytest.raises(MailboxError) as refusal:
        read_policy(_headers(given), _options())
    error = json.loads(refusal.value.body)["error"]
    assert (refusal.value.status, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert len(error["message"]) < 300
    assert "t" * 1025 not in error["message"]


def test_a_header_twice_is_refused() -> None:
    headers = _headers({"X-Mailbox-Mode": "always"}) * 2
    with pytest.raises(MailboxError, match="twice"):
        read_policy(headers, _options())


def test_clients_may_name_no_url_where_no_host_is_allowed() -> None:
    with pytest.raises(MailboxError, match="allowed no hosts"):
        read_policy(_headers({"X-Webhook-URL": URL}), MailboxOptions("sqlite:///x"))


@pytest.mark.parametrize("name", ["X-Mailbox-Mode", "X-Webhook-URL", "X-Webhook-Mode", "X-Webhook-Bearer"])
def test_without_a_mailbox_every_header_is_refused(name: str) -> None:
    refuse_headers([(b"content-type", b"application/json")])
    with pytest.raises(MailboxError) as refusal:
        refuse_headers(_headers({name: "never"}))
    assert (refusal.value.status, refusal.value.param, refusal.value.code) == (400, name, "mailbox_off")


def test_the_token_of_a_policy_is_not_shown() -> None:
    assert "secret" not in repr(DeliveryPolicy(NEVER, GONE, URL, "secret"))


@pytest.mark.parametrize(("mode", "gone", "there"), [(ALWAYS, True, True), (GONE, True, False), (NEVER, False, False)])
def test_modes(mode: Mode, gone: bool, there: bool) -> None:
    assert (mode.applies(True), mode.applies(False)) == (gone, there)
