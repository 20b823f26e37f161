# SPDX-License-Identifier: MIT
"""A hub on loopback: the routes of Hugging Face that are used to fetch a model, over files in memory."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

COMMIT = "a" * 40


def installed(monkeypatch: Any) -> Iterator[FakeHub]:
    """A hub that huggingface_hub uses instead of its own, for a fixture; it has no repositories yet."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.hf_api import api

    fake = FakeHub()
    for name in ("HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    monkeypatch.setattr(api, "endpoint", fake.url)
    yield fake
    huggingface_hub.close_session()
    fake.stop()


class FakeHub:
    """Serves repositories of files by name.

    Attributes:
        repos: repository -> file -> content.
        moved: old name of a repository -> its present name.
        commits: repository and revision -> commit; `COMMIT` of all others.
        branches: repository -> branch -> its commits, the last one first; a page of them is one commit.
        sums: repository and file -> a checksum that is reported instead of the true one.
        cut: bytes after which the next download breaks off; None for never.
        held: bytes after which downloads of weights wait until the event is set; None for never.
        asked: requested ranges of the downloads.
        strange: paths of requests that a hub of models alone does not know.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.moved: dict[str, str] = {}
        self.commits: dict[tuple[str, str], str] = {}
        self.branches: dict[str, dict[str, list[str]]] = {}
        self.sums: dict[tuple[str, str], str] = {}
        self.cut: int | None = None
        self.held: tuple[int, threading.Event] | None = None
        self.asked: list[tuple[str, str | None]] = []
        self.strange: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, *, body: bool) -> None:
                path = self.path.partition("?")[0]
                if (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)) is not None:
                    self._describe(match[1], match[2])
                elif (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/refs", path)) is not None:
                    self._refer(match[1])
                elif (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commits/([^/]+)", path)) is not None:
                    self._recount(match[1], match[2])
                elif (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+.*", path)) is not None:
                    self._send(200, json.dumps([hub.sibling(match[1], name) for name in hub.repos[match[1]]]).encode())
                elif (match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)) is not None:
                    self._file(match[1], match[2], body=body)
                else:
                    hub.strange.append(path)
                    self._send(404, b"{}")

            def _refer(self, repo: str) -> None:
                branches = hub.branches.get(repo, {"main": [COMMIT]})
                listed = [
                    {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[0]}
                    for name, commits in branches.items()
                ]
                self._send(200, json.dumps({"branches": listed, "tags": [], "converts": []}).encode())

            def _recount(self, repo: str, branch: str) -> None:
                commits, page = hub.branches[repo][branch], int(self.path.partition("?p=")[2] or 0)
                told = {"id": commits[page], "authors": [], "date": "2026-01-01T00:00:00.000Z"}
                address = f"{hub.url}{self.path.partition('?')[0]}?p={page + 1}"
                more = {"link": f'<{address}>; rel="next"'} if page + 1 < len(commits) else {}
                self._send(200, json.dumps([told]).encode(), more)

            def _describe(self, repo: str, revision: str | None) -> None:
                repo = hub.moved.get(repo, repo)
                if repo not in hub.repos:
                    self._send(404, b"{}", {"x-error-code": "RepoNotFound"})
                    return
                siblings = [hub.sibling(repo, name) for name in hub.repos[repo]]
                commit = hub.commits.get((repo, revision or "main"), COMMIT)
                self._send(200, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode())

            def _file(self, repo: str, name: str, *, body: bool) -> None:
                content = hub.repos.get(repo, {}).get(name)
                if content is None:
                    self._send(404, b"", {"x-error-code": "EntryNotFound"})
                    return
                headers = {"etag": f'"{hub.told(repo, name)}"', "x-repo-commit": COMMIT, "accept-ranges": "bytes"}
                headers["x-linked-size"], headers["x-linked-etag"] = str(len(content)), headers["etag"]
                if not body:
                    self._send(200, content, headers, body=False)
                    return
                wanted = self.headers.get("range")
                hub.asked.append((name, wanted))
                start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
                part = content[start:]
                if wanted:
                    headers["content-range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                cut, hub.cut = hub.cut if name.endswith(".gguf") else None, None if name.endswith(".gguf") else hub.cut
                self._send(206 if wanted else 200, part, headers, cut=cut)

            def _send(
                self, status: int, content: bytes, headers: dict[str, str] | None = None, *, body: bool = True,
                cut: int | None = None,
            ) -> None:  # fmt: skip
                self.send_response(status)
                for key, value in {"content-length": str(len(content)), **(headers or {})}.items():
                    self.send_header(key, value)
                self.end_headers()
                if body and self.command != "HEAD":
                    self._write(content[:cut])
                if cut is not None:
                    self.close_connection = True

            def _write(self, content: bytes) -> None:
                if hub.held is not None and len(content) > hub.held[0]:
                    first, released = hub.held
                    self.wfile.write(content[:first])
                    content = content[first:]
                    released.wait(60)
                with contextlib.suppress(ConnectionError):  # the client has disconnected
                    self.wfile.write(content)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def told(self, repo: str, name: str) -> str:
        """Return the checksum that the hub reports for a file."""
        return self.sums.get((repo, name)) or hashlib.sha256(self.repos[repo][name]).hexdigest()

    def sibling(self, repo: str, name: str) -> dict[str, Any]:
        """Return a file's entry in the hub's list; weights are large files with checksums."""
        content = self.repos[repo][name]
        found: dict[str, Any] = {"rfilename": name, "path": name, "type": "file", "size": len(content), "oid": "0" * 40}
        if name.endswith((".gguf", ".safetensors")):
            told = self.told(repo, name)
            found["lfs"] = {"sha256": told, "oid": told, "size": len(content), "pointerSize": 100}
        return found | {"blobId": "0" * 40}

    def stop(self) -> None:
        """End the hub."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
