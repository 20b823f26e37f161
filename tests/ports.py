# SPDX-License-Identifier: MIT
"""Ports for servers that must know theirs before they listen."""

from __future__ import annotations

import random
import socket

CHOICE = random.SystemRandom()


def free_port() -> int:
    """A port of 127.0.0.1 where nobody listens, below those that a system gives to whoever asks for port 0.

    So no other process is given it before its server listens.
    """
    while True:
        port = CHOICE.randrange(10_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
