# SPDX-License-Identifier: MIT
"""What attacks are made of: a target, requests of two keys, bare connections, frames of web sockets, floods."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

KEYS = {"alice": "alice-attacks-00001", "bob": "bob-neighbours-00001"}  # alice attacks, bob wants his answer
SILENCE = 15.0  # seconds behind the end of an attack for which an answer is waited for
LASTS = 8.0  # seconds of a flood on one connection after which nobody is taken to end it
PAUSE = 0.01  # seconds before a connection that the server ended is opened again
CHAT = "/v1/chat/completions"


class Target:
    """A server under attack, and what the attack notes.

    Attributes:
        address: of the server.
        pid: its process; 0 where it is this one, or not told.
        spare: a port of this machine that the attack may listen on.
        statuses: how many answers of each status; "closed" and "open" are ends of connections, "silent" no answer.
        missed: what went wrong beside the bars that hold for every attack.
        note: a figure of this attack's own, for people.
    """

    def __init__(self, address: tuple[str, int], seconds: float = 0.0, pid: int = 0, spare: int = 0) -> None:
        self.address, self.pid, self.spare = address, pid, spare
        self._until = time.monotonic() + seconds
        self.statuses = Counter[str]()
        self.missed: list[str] = []
        self.note = ""

    @property
    def left(self) -> float:
        """Seconds of the attack that are left, at least 0."""
        return max(0.0, self._until - time.monotonic())

    def connect(self) -> socket.socket:
        """A new connection, of which no call waits for more than a second."""
        connection = socket.create_connection(self.address, SILENCE)
        connection.settimeout(1.0)
        return connection

    def send(
        self,
        path: str,
        body: Mapping[str, Any] | bytes | None,
        key: str,
        kind: str = "application/json",
        patience: float | None = None,
    ) -> tuple[str, Any]:
        """One request and its answer: the status, or "silent" or "closed"; the object in it, or None."""
        data = json.dumps(body).encode() if isinstance(body, Mapping) else body
        client = http.client.HTTPConnection(
            *self.address, timeout=self.left + SILENCE if patience is None else patience
        )
        headers = {"authorization": f"Bearer {KEYS[key]}", "content-type": kind}
        try:
            client.request("GET" if data is None else "POST", path, data, headers)
            answer = client.getresponse()
            text = answer.read()
        except TimeoutError:
            return "silent", None
        except (OSError, http.client.HTTPException):
            return "closed", None
        finally:
            client.close()
        try:
            return str(answer.status), json.loads(text)
        except ValueError:
            return str(answer.status), None

    def ask(self, path: str, body: Mapping[str, Any] | bytes, kind: str = "application/json") -> str:
        """A request of alice's; its status, which is noted."""
        status, _ = self.send(path, body, "alice", kind)
        self.statuses[status] += 1
        return status

    def again(self, attack: Callable[[socket.socket], None]) -> None:
        """Opens a connection for the attack, and another whenever it ends, until the time is over."""
        while self.left:
            try:
                with self.connect() as connection:
                    attack(connection)
            except OSError:
                self.statuses["closed"] += 1
            time.sleep(PAUSE)

    def flood(self, connection: socket.socket, data: bytes) -> None:
        """Sends the data again and again, and raises OSError when the server ends it.

        Of a connection that stands for `LASTS` seconds "open" is noted, also where the time of the attack ends sooner.
        """
        view, at, ends = memoryview(data), 0, time.monotonic() + LASTS
        while self.left or time.monotonic() < ends:
            try:
                at = (at + connection.send(view[at:])) % len(data)
            except TimeoutError:
                continue
        self.statuses["open"] += 1

    def drip(self, connections: list[socket.socket], data: bytes = b"x", pause: float = 0.25) -> None:
        """A little on each of the connections, for as long as any stands and there is time."""
        standing = list(connections)
        while standing and self.left:
            for connection in list(standing):
                try:
                    connection.send(data)
                except OSError:
                    standing.remove(connection)
                    self.statuses["closed"] += 1
            time.sleep(min(pause, self.left))
        self.statuses["open"] += len(standing)


def chat_body(content: str, **fields: Any) -> dict[str, Any]:
    """The body of a chat request for a few tokens."""
    return {"model": "demo", "messages": [{"role": "user", "content": content}], "max_tokens": 4, **fields}


def head(path: str, key: str | None, *lines: str, method: str = "POST") -> bytes:
    """A request's head; without a key, a stranger's."""
    known = [f"Authorization: Bearer {KEYS[key]}"] if key else []
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *known, *lines, "", ""]).encode()


def status_of(connection: socket.socket, patience: float = 5.0) -> str:
    """The status of the answer that comes; "closed" or "silent" without one."""
    connection.settimeout(patience)
    try:
        data = connection.recv(1 << 16)
    except TimeoutError:
        return "silent"
    except OSError:
        return "closed"
    finally:
        connection.settimeout(1.0)
    return data[9:12].decode("latin-1") if data.startswith(b"HTTP/1.") else "no HTTP" if data else "closed"


def upgraded(connection: socket.socket) -> socket.socket:
    """The connection as a web socket of alice's at `/v1/responses`; raises OSError where it does not become one."""
    lines = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13")
    nonce = "Sec-WebSocket-Key: " + base64.b64encode(bytes(16)).decode()
    connection.sendall(head("/v1/responses", "alice", *lines, nonce, method="GET"))
    if status_of(connection) != "101":
        raise ConnectionError("no web socket")
    return connection


def frame(opcode: int, payload: bytes = b"", *, final: bool = True) -> bytes:
    """A client's frame, masked with zeroes; source: RFC 6455, 5.2. Opcodes: 0 goes on, 1 text, 9 ping."""
    size = len(payload)
    length = bytes([0x80 | min(size, 125)])
    if size >= 126:
        length = b"\xfe" + size.to_bytes(2, "big") if size < 1 << 16 else b"\xff" + size.to_bytes(8, "big")
    return bytes([(0x80 if final else 0) | opcode]) + length + bytes(4) + payload


def form(*parts: bytes) -> tuple[bytes, str]:
    """A form of parts, each with its headers, and its content type."""
    return b"".join(
        b"--edge\r\n" + part + b"\r\n" for part in parts
    ) + b"--edge--\r\n", "multipart/form-data; boundary=edge"


def file_form(data: bytes) -> tuple[bytes, str]:
    """The form that uploads a file of a batch."""
    name = b'content-disposition: form-data; name="file"; filename="lines.jsonl"\r\n\r\n'
    return form(b'content-disposition: form-data; name="purpose"\r\n\r\nbatch', name + data)
