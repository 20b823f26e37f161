# SPDX-License-Identifier: MIT
"""Ports for servers whose port must be known before they listen."""

from __future__ import annotations

import random
import socket

CHOICE = random.SystemRandom()


def free_port() -> int:
    """Return a free port of 127.0.0.1, below the ports that the system assigns for port 0.

    So no other process gets it before its server listens.
    """
    while True:
        port = CHOICE.randrange(10_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
