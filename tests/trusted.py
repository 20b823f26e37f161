# SPDX-License-Identifier: MIT
"""Certificates of certificate authorities, read once in a process."""

from __future__ import annotations

import functools
import ssl

import httpx


@functools.cache
def trusted() -> ssl.SSLContext:
    """Return httpx's default SSL context. Creating one reads 140 certificates, in 40 ms of CPU."""
    return httpx.create_ssl_context(trust_env=False)
