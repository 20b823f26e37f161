# SPDX-License-Identifier: MIT
"""Files of the web pages: the HTTP headers of each file, and how long a browser may cache it.

Not a step of a request's life. A page may load nothing from other hosts, may run only scripts that are files of this
server, and may not be shown in a frame of another page.
"""

from __future__ import annotations

import gzip
import hashlib
import mimetypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from starlette.requests import Request
from starlette.responses import Response

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
    """A file in memory.

    Attributes:
        name: path relative to the page's address; its extension decides the media type.
        content: bytes of the file.
        headers: result of `page_headers`.
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
        if _has(request, etag):
            return Response(status_code=304, headers=headers)
        if packed is not None:
            headers["content-encoding"] = "gzip"
        return Response(packed or self.content, headers=headers, media_type=self.media_type)


def _has(request: Request, etag: str) -> bool:
    known = request.headers.get("if-none-match", "")
    return known.strip() == "*" or etag in {one.strip().removeprefix("W/") for one in known.split(",")}


def _accepted(request: Request) -> set[str]:
    """Return the encodings that the client accepts; an encoding with weight 0 is not accepted."""
    accepted = set()
    for part in request.headers.get("accept-encoding", "").lower().split(","):
        name, _, parameters = part.partition(";")
        weight = parameters.replace(" ", "").removeprefix("q=")
        if not parameters or weight.strip("0."):
            accepted.add(name.strip())
    return accepted
