# SPDX-License-Identifier: MIT
"""The web UI at `/`: the files of the bundle that `packages/server/webui` builds.

Not a step of a request's life. The files are the same in every installation and reveal nothing about this one, so they
need no key; the page's requests to the API do. Only names in the manifest are served: no path is made of client input.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from importlib.resources import files

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from candle_vllm.server.http.page_files import PageFile, page_headers
from candle_vllm.server.settings.table import AccessOptions

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
    """Return the files of the bundle by name, read once."""
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
        """A file whose name changes with its content."""
        found = bundle.get(f"assets/{name}")
        if found is None:
            raise HTTPException(404)
        return found.answer(request)

    return router
