# SPDX-License-Identifier: MIT
"""`/openapi.json`, and `/docs`: a page that shows the document and sends requests (no step of a request's life).

Everything comes from this server: the page may load nothing from other hosts, may run only scripts that are files of
this server, and may not be shown in a frame of another page.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from importlib.resources import files

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from candle_vllm.server.openapi.document import ApiDocument
from candle_vllm.server.routes.webui import page_headers

router = APIRouter()

_RESOURCES = "fastapi_swagger.resources"  # Swagger UI's own files, packed for Python
_FILES: Mapping[str, str] = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}
_HEADERS: Mapping[str, str] = page_headers("private, max-age=3600")
# Addresses are relative, so that the page also works below a path prefix.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>candle-vllm API</title>
<link rel="icon" href="docs/favicon-32x32.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
_START = """"use strict";
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  displayRequestDuration: true,
  filter: true,
  persistAuthorization: false,
  tryItOutEnabled: true,
  validatorUrl: null,
});
"""


@router.get("/openapi.json")
async def openapi_document(request: Request) -> Response:
    """The OpenAPI document of this server."""
    document: ApiDocument = request.app.state.document
    encoded = await asyncio.to_thread(lambda: document.encoded)
    return Response(encoded, headers={"x-content-type-options": "nosniff"}, media_type="application/json")


@router.get("/docs")
async def page() -> Response:
    """The page of Swagger UI."""
    return Response(_PAGE, headers=_HEADERS, media_type="text/html")


@router.get("/docs/{name}")
async def page_file(name: str) -> Response:
    """A file of the page."""
    if name == "start.js":
        return Response(_START, headers=_HEADERS, media_type="text/javascript")
    if name not in _FILES:
        raise HTTPException(404)
    content = await asyncio.to_thread((files(_RESOURCES) / name).read_bytes)
    return Response(content, headers=_HEADERS, media_type=_FILES[name])
