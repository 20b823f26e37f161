# SPDX-License-Identifier: MIT
"""Adapters' files in a few bytes, archives of them, and a store of files over HTTP."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import json
import tarfile
import threading
from typing import Any, Self

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def config(**changes: Any) -> bytes:
    """A configuration as PEFT writes it."""
    return json.dumps({"peft_type": "LORA", "r": 8, "base_model_name_or_path": "acme/base", **changes}).encode()


def files(weights: bytes = b"weights", **changes: Any) -> dict[str, bytes]:
    """An adapter's files."""
    return {CONFIG: config(**changes), WEIGHTS: weights}


Member = tuple[tarfile.TarInfo, bytes]


def member(
    name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **more: Any
) -> tuple[tarfile.TarInfo, bytes]:
    """A member of an archive."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    for key, value in more.items():
        setattr(info, key, value)
    return info, content


def archive(*members: Member, zipped: bool = True) -> bytes:
    """A tar archive."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(made.getvalue(), 6) if zipped else made.getvalue()


def whole(folder: str = "", **options: Any) -> bytes:
    """An archive of one adapter."""
    return archive(*(member(folder + name, content) for name, content in files().items()), **options)


class Store:
    """Files over HTTP on loopback.

    Attributes:
        files: path -> content.
        asked: method and path of each request.
        status: answered in the place of everything.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.status: int | None = None
        store = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                store.asked.append((self.command, path))
                content = store.files.get(path)
                status = store.status or (404 if content is None else 200)
                body = b"" if content is None or status != 200 else content
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.send_header("etag", f'"{hashlib.md5(body).hexdigest()}"')
                self.send_header("last-modified", "Wed, 21 Oct 2026 07:28:00 GMT")
                if status == 302:
                    self.send_header("location", store.url + "/elsewhere")
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def put_archive(self, path: str, content: bytes) -> str:
        """An archive with its sum beside it, which it gives."""
        told = hashlib.sha256(content).hexdigest()
        self.files |= {path: content, path + ".sha256": f"{told}  archive\n".encode()}
        return told

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
