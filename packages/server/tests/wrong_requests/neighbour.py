# SPDX-License-Identifier: MIT
"""A client of its own process that reads a stream and tells when each piece came, until its input ends.

Prints a line for each piece: its time (`time.monotonic()`, which is the machine's) and the server's processor time by
then. For `test_neighbours.py`.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time

import psutil

MESSAGES = [{"role": "user", "content": "Hi"}]
BODY = json.dumps({"messages": MESSAGES, "stream": True, "ignore_eos": True}).encode()


def main(port: int, server: psutil.Process) -> None:
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(BODY)}\r\n\r\n".encode()
            + BODY
        )
        while not over.is_set() and connection.recv(1 << 16):
            used = server.cpu_times()
            sys.stdout.write(f"{time.monotonic()} {used.user + used.system}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), psutil.Process(int(sys.argv[2])))
