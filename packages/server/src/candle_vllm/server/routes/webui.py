# SPDX-License-Identifier: MIT
"""The web UI at `/`: the files of the bundle that `packages/server/webui` builds.

Not a step of a request's life. The files are the same in every installation and reveal nothing about this one, so they
need no key; the page's requests to the API do. Only names in the manifest are served: no path is made of client input.
A page loads nothing from other hosts, runs only scripts that are files of this server, and is shown in no frame; only
the preview of a model's code runs inline scripts, and is shown in a frame of this server's pages.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import mimetypes
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from candle_vllm.server.settings.table import AccessOptions

POLICY: Mapping[str, str] = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
"""Directives of Content-Security-Policy that all pages share."""
_TYPES: Mapping[str, str] = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_WORTH_PACKING = 1024  # bytes; smaller files are not compressed


def page_headers(cache_control: str, policy: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the headers of a page's file; directives of `policy` are added to the shared ones or replace them."""
    directives = {**POLICY, **(policy or {})}
    return {
        "content-security-policy": "; ".join(f"{name} {value}".strip() for name, value in directives.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": cache_control,
    }


@dataclass(frozen=True)
class PageFile:
    """A file in memory, with the result of `page_headers`.

    `name` is its path relative to the page's address; the extension decides the media type.
    """

    name: str
    content: bytes = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)

    @cached_property
    def etag(self) -> str:
        """Strong ETag of the content, with its quotes."""
        return f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'

    @cached_property
    def packed(self) -> bytes | None:
        """The content compressed with gzip, reproducibly; None if that would not be smaller."""
        if len(self.content) < _WORTH_PACKING:
            return None
        packed = gzip.compress(self.content, mtime=0)
        return packed if len(packed) < len(self.content) else None

    @property
    def media_type(self) -> str:
        """Media type, by the file name's extension."""
        ending = self.name[self.name.rfind(".") :]
        return _TYPES.get(ending) or mimetypes.guess_type(self.name)[0] or "application/octet-stream"

    def answer(self, request: Request) -> Response:
        """Return the file, compressed if the client accepts gzip, or 304 if the client's copy is current."""
        packed = self.packed if "gzip" in _accepted(request) else None
        etag = self.etag if packed is None else f'{self.etag[:-1]}-gz"'
        headers = {**self.headers, "etag": etag, "vary": "accept-encoding"}
        known = request.headers.get("if-none-match", "")
        if known.strip() == "*" or etag in {one.strip().removeprefix("W/") for one in known.split(",")}:
            return Response(status_code=304, headers=headers)
        if packed is not None:
            headers["content-encoding"] = "gzip"
        return Response(packed or self.content, headers=headers, media_type=self.media_type)


def _accepted(request: Request) -> set[str]:
    """Return the encodings that the client accepts; an encoding with weight 0 is not accepted."""
    accepted = set()
    for part in request.headers.get("accept-encoding", "").lower().split(","):
        name, _, parameters = part.partition(";")
        weight = parameters.replace(" ", "").removeprefix("q=")
        if not parameters or weight.strip("0."):
            accepted.add(name.strip())
    return accepted


_ROOT = files("candle_vllm.server") / "static"
_POLICY: Mapping[str, str] = {
    "img-src": "'self' data: blob:",
    "font-src": "'self'",
    "frame-src": "'self'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
_PREVIEW_POLICY: Mapping[str, str] = {
    "script-src": "'unsafe-inline'",
    "style-src": "'unsafe-inline'",
    "img-src": "data: blob:",
    "font-src": "data:",
    "media-src": "data: blob:",
    "connect-src": "'none'",
    "frame-src": "'none'",
    "frame-ancestors": "'self'",
    "sandbox": "allow-scripts",
}
"""Policy of the document in which a preview runs a model's code: scripts run, but open no connection."""
_NO_CONNECTIONS = {"connection-allowlist": "()"}  # also covers WebRTC and DNS lookups, unlike a content policy
_CHECKED = "no-cache"  # cached, but revalidated for each use
_FOREVER = "public, max-age=31536000, immutable"  # for files whose names change with their content
_INDEX = "index.html"
_PREVIEW = "preview.html"


def bundle_names() -> tuple[str, ...]:
    """Return the names of the bundle's files, from the manifest."""
    return tuple(json.loads((_ROOT / "manifest.json").read_text("utf-8"))["files"])


def public_paths() -> frozenset[str]:
    """Return the paths of the page and its files."""
    return frozenset("/" if name == _INDEX else f"/{name}" for name in bundle_names())


def read_bundle() -> dict[str, PageFile]:
    """Read the files of the bundle, and return them by name."""
    bundle = {}
    for name in bundle_names():
        cache = _FOREVER if name.startswith("assets/") else _CHECKED
        content = _ROOT.joinpath(*name.split("/")).read_bytes()
        is_preview = name == _PREVIEW
        headers = page_headers(cache, _PREVIEW_POLICY if is_preview else _POLICY)
        bundle[name] = PageFile(name, content, {**headers, **_NO_CONNECTIONS} if is_preview else headers)
    return bundle


def new_page_key(settings: AccessOptions, has_tools: bool) -> str | None:
    """Return a random key for the printed address, with which the page may call tools, or None if it needs no key.

    It needs one if the page is served, there are tools (`has_tools`: MCP servers), and clients have no API keys.
    """
    has_keys = settings.has_api_keys
    return secrets.token_urlsafe(24) if settings.ui_server and has_tools and not has_keys else None


def page_address(url: str, key: str | None) -> str:
    """Return the address to open; the key follows #, a part that browsers do not send to any server."""
    return f"{url}/#key={key}" if key else f"{url}/"


def web_ui_router() -> APIRouter:
    """Return the routes of the page, which must be added before the server's own response at `/`."""
    router, bundle = APIRouter(), read_bundle()

    def add(path: str, name: str) -> None:
        async def file(request: Request) -> Response:
            return bundle[name].answer(request)

        router.add_api_route(path, file, include_in_schema=False)

    add("/", _INDEX)
    for name in (_PREVIEW, "icon.svg", "licenses.txt"):
        add(f"/{name}", name)

    @router.get("/assets/{name}", include_in_schema=False)
    async def asset(request: Request, name: str) -> Response:
        found = bundle.get(f"assets/{name}")
        if found is None:
            raise HTTPException(404)
        return found.answer(request)

    return router
