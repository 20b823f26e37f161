# SPDX-License-Identifier: MIT
"""Asks `/health` twenty times a second, each time on a new connection, in a process that does nothing else.

    python -m benchmarks.attacks.watch HOST PORT

Each line on standard input is answered by a line of JSON about what was seen since the last one: `slowest` (seconds of
the slowest question, answered or not), `answers` and `failed`. The end of the input ends it.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time

PERIOD = 0.05  # seconds
PATIENCE = 20.0  # seconds for an answer
ASKED = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"


def ask(address: tuple[str, int]) -> bool:
    """Whether the server says in time that it is well."""
    try:
        with socket.create_connection(address, PATIENCE) as connection:
            connection.sendall(ASKED)
            return connection.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def main() -> None:
    """Until standard input ends."""
    address = (sys.argv[1], int(sys.argv[2]))
    slowest, good, bad = 0.0, 0, 0
    due = time.monotonic()
    while True:
        if select.select([0], [], [], max(0.0, due - time.monotonic()))[0]:
            if not os.read(0, 1 << 10):
                return
            print(json.dumps({"slowest": round(slowest, 3), "answers": good, "failed": bad}), flush=True)
            slowest, good, bad = 0.0, 0, 0
            continue
        begun = time.monotonic()
        if ask(address):
            good += 1
        else:
            bad += 1
        now = time.monotonic()
        slowest, due = max(slowest, now - begun), max(due + PERIOD, now)


if __name__ == "__main__":
    main()
