# SPDX-License-Identifier: MIT
"""Which network addresses others may send a program to: public ones, and private ones where that is said."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence

_NAME = re.compile(r"(?:(?!-)[a-z0-9-]{1,63}(?<!-)\.)*(?!-)[a-z0-9-]{1,63}(?<!-)", re.ASCII)
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_PRIVATE: Sequence[_Network] = tuple(
    map(
        ipaddress.ip_network,
        ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "::1/128", "fc00::/7"),
    )
)
# Not public, or a door to other addresses, though `is_global` lets them pass; and addresses of cloud metadata.
_NEVER: Sequence[_Network] = tuple(
    map(
        ipaddress.ip_network,
        ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "2001::/23", "2002::/16", "3fff::/20", "fd00:ec2::/32"),
    )
)
_PUBLIC_V6 = ipaddress.ip_network("2000::/3")  # leaves out mapped IPv4 addresses and NAT64


def is_allowed(text: str, private: bool) -> bool:
    """Whether an address is public, or private where that is allowed; never link-local, multicast or reserved."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:  # with a zone, or none at all
        return False
    if any(address in network for network in _NEVER) or getattr(address, "scope_id", None):
        return False
    if any(address in network for network in _PRIVATE):
        return private
    public = address.is_global and not address.is_multicast and not address.is_reserved
    return public and (address.version == 4 or address in _PUBLIC_V6)


def is_host(host: str) -> bool:
    """Whether a text in lower case is a name without a final dot, or an address in its usual spelling."""
    if len(host) > 253:
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        # A name whose last part is a number is an address in an old spelling (127.1, 0x7f000001).
        last = host.rpartition(".")[2]
        return _NAME.fullmatch(host) is not None and re.fullmatch(r"\d+|0x[0-9a-f]*", last, re.ASCII) is None
    return "%" not in host


def look_up(host: str, port: int) -> list[str]:
    """The addresses of a name, in order; blocks, and raises OSError where there is none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))
