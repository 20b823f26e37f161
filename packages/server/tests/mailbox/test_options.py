# SPDX-License-Identifier: MIT
"""The operator's settings: the webhook section, its secrets, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from candle_vllm.server.mailbox.options import MailboxOptions, WebhookAuth, WebhookOptions, webhook_options
from candle_vllm.server.settings.options import UsageError

VARIABLES = {"TOKEN": "t0ken", "EMPTY": ""}


def test_a_whole_section() -> None:
    section = {
        "url": "https://hooks.example/x", "on_disconnect": False, "on_complete": True, "retry_count": 5,
        "retry_delay_ms": 200, "timeout_secs": 2.5, "auth": {"type": "bearer", "token": "pre-${TOKEN}"},
        "headers": {"X-Team": "core"}, "signing_secret": "${TOKEN}",
    }  # fmt: skip
    assert webhook_options(section, VARIABLES) == WebhookOptions(
        "https://hooks.example/x", False, True, 5, 200, 2.5, WebhookAuth("bearer", "pre-t0ken"), {"X-Team": "core"},
        "t0ken",
    )  # fmt: skip
    assert webhook_options({}, {}) == WebhookOptions()


AUTHS = [
    ({"type": "none"}, WebhookAuth()),
    ({"type": "api_key", "key": "k"}, WebhookAuth("api_key", "k")),
    ({"type": "api_key", "key": "k", "header": "X-Own"}, WebhookAuth("api_key", "k", "X-Own")),
    ({"type": "hmac", "secret": "s", "algorithm": "sha512"}, WebhookAuth("hmac", "s", "", "sha512")),
]


@pytest.mark.parametrize(("section", "auth"), AUTHS)
def test_kinds_of_auth(section: dict[str, Any], auth: WebhookAuth) -> None:
    assert webhook_options({"auth": section}, {}).auth == auth


def test_names_of_headers() -> None:
    assert WebhookAuth("api_key", "k").header_name == "X-API-Key"
    assert WebhookAuth("hmac", "s").header_name == "X-Signature-256"
    assert WebhookAuth("hmac", "s", algorithm="sha512").header_name == "X-Signature-512"
    assert WebhookAuth("hmac", "s", "X-Hub").header_name == "X-Hub"


def test_null_sets_nothing() -> None:
    nothing = {"url": None, "retry_count": None, "auth": None, "headers": None, "signing_secret": None}
    assert webhook_options(nothing, {}) == WebhookOptions()
    assert webhook_options({"headers": {"X-Team": None, "X-Unit": "a"}}, {}).headers == {"X-Unit": "a"}
    auth = {"type": "api_key", "key": "k", "header": None, "algorithm": None}
    assert webhook_options({"auth": auth}, {}).auth == WebhookAuth("api_key", "k")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"auth": {"type": None}}, "one of none, bearer"),
    ({"auth": {"type": "bearer", "token": None}}, "needs its secret"),
    ({"ulr": "x"}, "did you mean url"),
    ({"url": "ftp://x"}, "https://"),
    ({"url": "https://x/${TOKEN}"}, "secrets only"),
    ({"url": 3}, "text"),
    ({"on_complete": "yes"}, "true or false"),
    ({"retry_count": 21}, "between 0 and 20"),
    ({"retry_count": True}, "whole number"),
    ({"retry_delay_ms": 0}, "between 1"),
    ({"timeout_secs": 0}, "above 0"),
    ({"timeout_secs": 1e9}, "at most 300"),
    ({"signing_secret": "${NOPE}"}, "NOPE, which is not set"),
    ({"signing_secret": "${EMPTY}"}, "EMPTY, which is not set"),
    ({"signing_secret": ""}, "printable ASCII"),
    ({"signing_secret": 1}, "text"),
    ({"signing_secret": "s", "auth": {"type": "hmac", "secret": "s"}}, "not both"),
    ({"signing_secret": "s", "auth": {"type": "api_key", "key": "k", "header": "x-signature-256"}}, "the signature"),
    ({"auth": "bearer"}, "mapping"),
    ({"auth": {"type": "basic"}}, "one of none, bearer"),
    ({"auth": {}}, "one of none, bearer"),
    ({"auth": {"type": "bearer"}}, "needs its secret"),
    ({"auth": {"type": "bearer", "key": "k"}}, "unknown key 'key'"),
    ({"auth": {"type": "none", "token": "k"}}, "unknown key 'token'"),
    ({"auth": {"type": "hmac", "secret": "s", "algorithm": "md5"}}, "sha256"),
    ({"auth": {"type": "api_key", "key": "k", "header": "Host"}}, "cannot be the header"),
    ({"auth": {"type": "api_key", "key": "k", "header": "a b"}}, "cannot be the header"),
    ({"headers": []}, "mapping"),
    ({"headers": {"a": 1}}, "mapping"),
    ({"headers": {"Content-Length": "3"}}, "cannot be set"),
    ({"headers": {"authorization": "x"}, "auth": {"type": "bearer", "token": "t"}}, "'authorization' cannot be set"),
    ({"headers": {"x-signature-256": "x"}, "signing_secret": "s"}, "cannot be set"),
    ({"headers": {"a": "b\r\nc: d"}}, "printable"),
    ({"headers": {"a": "${TOKEN}"}}, "secrets only"),
    ({"headers": {f"x-{number}": "1" for number in range(17)}}, "at most 16"),
]


@pytest.mark.parametrize(("section", "message"), WRONG)
def test_wrong_sections(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as refusal:
        webhook_options(section, VARIABLES)
    assert "webhook" in str(refusal.value)


WRONG_OPTIONS = [
    {"retention_secs": 0}, {"max_record_bytes": 10}, {"max_records_per_key": 0}, {"max_records": 0},
    {"max_deliveries": 0}, {"webhook_allowed_hosts": ("http://x",)}, {"webhook_allowed_hosts": ("*",)},
    {"webhook_allowed_headers": ("authorization",)}, {"webhook_allowed_headers": ("Host",)},
    {"webhook_allowed_hosts": ("a.example",) * 257},
]  # fmt: skip


@pytest.mark.parametrize("options", WRONG_OPTIONS)
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        MailboxOptions("sqlite:///x", **options)


def test_secrets_are_not_shown() -> None:
    webhook = webhook_options({"auth": {"type": "bearer", "token": "hunter2"}, "signing_secret": "hunter2"}, {})
    assert "hunter2" not in repr(MailboxOptions("postgresql://u:hunter2@h/d", webhook=webhook))
