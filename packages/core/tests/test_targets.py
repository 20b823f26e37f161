# SPDX-License-Identifier: MIT
"""Where webhooks may go: the parser, the operator's list, the check of addresses, and the pin to what was checked."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from candle_vllm.core.targets import (
    ForbiddenTarget,
    allowed_target,
    check_pattern,
    is_allowed,
    parse_target,
    resolve,
)

WRONG = [
    "", "x", "//host/x", "host", "ftp://host/", "file:///etc/passwd", "gopher://host/", "javascript:alert(1)",
    "http://", "http:///x", "http://user@host/", "http://user:pw@host/", "http://@host/", "http://a\\@b/", "http://a\\b/",
    "http://host#x", "http://host/#", "http://host/ x", "http://host/\r\nX: y", "http://host/\x00", "http://hösst/",
    "http://host%00/", "http://%31.com/", "http://host./", "http://[::1%25eth0]/", "http://[fe80::1%eth0]/",
    "http://host:0/", "http://host:99999/", "http://host:x/", "http://host:-1/", "http://127.1/", "http://2130706433/",
    "http://0x7f.0.0.1/", "http://0x7f000001/", "http://017700000001/", "http://0177.0.0.1/", "http://127.0.0.1.5/",
    "http://-a.com/", "http://a..b/", "http://*.a.com/", "http://a_b.com/", "http://[::1/", "http://[v1.x]/",
    "http://" + "a" * 64 + ".com/", "http://host/" + "x" * 8192, "http://a@b@c/", "http://ok.example@169.254.169.254/",
    "http://ok.example&@evil/", "http://evil\t.com/", "http://ｅvil.com/",
]  # fmt: skip


@pytest.mark.parametrize("url", WRONG)
def test_urls_that_no_webhook_has(url: str) -> None:
    with pytest.raises(ForbiddenTarget, match=r"^(must|is not)"):
        parse_target(url)


RIGHT = [
    ("https://example.com", "example.com", 443),
    ("HTTP://EXAMPLE.com/A?b=%2F", "example.com", 80),
    ("http://example.com:8080/x", "example.com", 8080),
    ("http://[2001:DB8:0::1]:81/", "2001:db8::1", 81),
    ("https://10.0.0.1/", "10.0.0.1", 443),
    ("https://xn--bcher-kva.example/", "xn--bcher-kva.example", 443),
    ("https://a.example/x?mail=a@b", "a.example", 443),
    ("https://a.example/@user/logo@2x.png", "a.example", 443),
    ("https://a.example/?X-Amz-Security-Token=" + "x" * 4096, "a.example", 443),
]


@pytest.mark.parametrize(("url", "host", "port"), RIGHT)
def test_urls_that_a_webhook_may_have(url: str, host: str, port: int) -> None:
    target = parse_target(url)
    assert (target.host, target.port, target.trusted, target.private) == (host, port, True, False)


@given(st.text(max_size=60))
def test_any_text_is_a_target_or_refused(text: str) -> None:
    for url in (text, f"http://{text}", f"http://ok.example{text}"):
        try:
            target = allowed_target(url, ("ok.example",), True)
        except ForbiddenTarget:
            continue
        assert target.host == target.url.host == "ok.example"
        assert target.port in (80, 443)


LISTS = [
    ("http://a.example/", ("a.example",), True),
    ("https://A.Example/", ("a.example",), True),
    ("https://a.example:443/", ("a.example",), True),
    ("https://a.example:8443/", ("a.example",), False),
    ("https://a.example:8443/", ("a.example:8443",), True),
    ("https://a.example/", ("a.example:8443",), False),
    ("https://b.a.example/", ("a.example",), False),
    ("https://b.a.example/", ("*.a.example",), True),
    ("https://c.b.a.example/", ("*.a.example",), True),
    ("https://a.example/", ("*.a.example",), False),
    ("https://ba.example/", ("*.a.example",), False),
    ("https://a.example.evil/", ("a.example", "*.a.example"), False),
    ("https://evil/?a.example", ("a.example",), False),
    ("https://evil/a.example", ("a.example",), False),
    ("https://[2001:db8:0:0::1]/", ("[2001:db8::1]",), True),
    ("https://[2001:db8::2]/", ("[2001:db8::1]",), False),
    ("https://a.example/", (), False),
]


@pytest.mark.parametrize(("url", "patterns", "allowed"), LISTS)
def test_the_list_of_hosts(url: str, patterns: tuple[str, ...], allowed: bool) -> None:
    for pattern in patterns:
        check_pattern(pattern)
    if allowed:
        assert not allowed_target(url, patterns, False).trusted
    else:
        with pytest.raises(ForbiddenTarget, match="does not allow"):
            allowed_target(url, patterns, False)


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "*",
        "*.",
        "*.com",
        "*.1.2.3.4",
        "*.[::ffff:1.2.3.4]",
        "A.example",
        "http://a.example",
        "a.example/",
        "a*.example",
        "a.example:0",
        "a:70000",
    ],
)
def test_patterns_that_are_none(pattern: str) -> None:
    with pytest.raises(ValueError, match="must"):
        check_pattern(pattern)


def test_only_hosts_that_are_listed_by_name_may_be_private() -> None:
    patterns = ("exact.example", "*.any.example")
    assert allowed_target("http://exact.example/", patterns, True).private
    assert not allowed_target("http://x.any.example/", patterns, True).private
    assert not allowed_target("http://exact.example/", patterns, False).private


PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "2a00:1450:4001::1"]
PRIVATE = ["127.0.0.1", "127.9.9.9", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.0.1", "::1", "fd12::1"]
NEVER = [
    "0.0.0.0", "0.1.2.3", "169.254.169.254", "169.254.0.1", "100.64.0.1", "100.100.100.200", "224.0.0.1",
    "239.1.1.1", "240.0.0.1", "255.255.255.255", "192.0.0.8", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1",
    "192.88.99.1", "168.63.129.16", "::", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "::ffff:127.0.0.1",
    "::ffff:8.8.8.8", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::808:808",
    "64:ff9b:1::a9fe:a9fe", "2002:7f00:1::", "2002:808:808::", "2001::1", "2001:db8::1", "3fff::1", "5f00::1", "100::1",
    "fd00:ec2::254", "not an address", "",
]  # fmt: skip


def test_public_addresses() -> None:
    assert [text for text in PUBLIC if not is_allowed(text, False) or not is_allowed(text, True)] == []


def test_private_addresses_need_the_switch() -> None:
    assert [text for text in PRIVATE if is_allowed(text, False)] == []
    assert [text for text in PRIVATE if not is_allowed(text, True)] == []


def test_addresses_that_are_never_reached() -> None:
    assert [text for text in NEVER if is_allowed(text, True) or is_allowed(text, False)] == []


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as made:
        yield made


def _resolver(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        assert host == "a.example"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


async def test_one_forbidden_address_among_good_ones_forbids_the_name(monkeypatch, threads) -> None:
    target = allowed_target("http://a.example/", ("a.example",), False)
    _resolver(monkeypatch, "8.8.8.8", "8.8.8.8", "1.1.1.1")
    assert await resolve(target, threads) == ["8.8.8.8", "1.1.1.1"]
    for bad in ("127.0.0.1", "169.254.169.254", "::ffff:10.0.0.1"):
        _resolver(monkeypatch, "8.8.8.8", bad)
        with pytest.raises(ForbiddenTarget, match="may not be reached"):
            await resolve(target, threads)


async def test_a_forbidden_address_behind_many_good_ones_is_found(monkeypatch, threads) -> None:
    target = allowed_target("http://a.example/", ("a.example",), False)
    _resolver(monkeypatch, *(f"8.8.8.{number}" for number in range(20)), "10.0.0.1")
    with pytest.raises(ForbiddenTarget):
        await resolve(target, threads)


async def test_a_name_without_an_address_may_have_one_later(monkeypatch, threads) -> None:
    _resolver(monkeypatch)
    with pytest.raises(OSError, match="no address"):
        await resolve(parse_target("http://a.example/"), threads)


async def test_the_operators_own_address_is_not_checked(monkeypatch, threads) -> None:
    _resolver(monkeypatch, "10.0.0.1")
    assert await resolve(parse_target("http://a.example/"), threads) == ["10.0.0.1"]


async def test_a_resolver_that_hangs_is_left(monkeypatch, threads) -> None:
    monkeypatch.setattr("candle_vllm.core.targets.RESOLVE_SECONDS", 0.05)
    done = threading.Event()

    def getaddrinfo(*_: object, **__: object) -> list[object]:
        done.wait()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(TimeoutError):
        await resolve(parse_target("http://a.example/"), threads)
    done.set()
