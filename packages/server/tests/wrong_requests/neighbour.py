"""A client of its own process that reads a stream and notes when each piece came, until its input ends.

Prints the times of the pieces (`time.monotonic()`, which is the machine's), one to a line. For `test_neighbours.py`.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time

MESSAGES = [{"role": "user", "content": "Hi"}]
BODY = json.dumps({"messages": MESSAGES, "stream": True, "ignore_eos": True}).encode()


def main(port: int) -> None:
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(BODY)}\r\n\r\n".encode()
            + BODY
        )
        times: list[float] = []
        while not over.is_set() and connection.recv(1 << 16):
            times.append(time.monotonic())
            if len(times) == 1:
                sys.stdout.write("begun\n")
                sys.stdout.flush()
    sys.stdout.write("".join(f"{moment}\n" for moment in times))


if __name__ == "__main__":
    main(int(sys.argv[1]))
