# SPDX-License-Identifier: MIT
"""`/v1/files` and `/v1/batches`: stored files, and batches, whose requests are the lines of a file (steps 1 and 10).

A caller sees only its own files and batches.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any
from urllib.parse import quote

from fastapi import Request
from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai.errors import InvalidBodyError
from candle_vllm.openai.json_body import parse_body
from candle_vllm.server.answering import json_answer
from candle_vllm.server.batches import records
from candle_vllm.server.batches.service import FORM_OVERHEAD, Batches
from candle_vllm.server.batches.store import PIECE, too_large
from candle_vllm.server.http.body import READING_SECONDS, SILENCE_SECONDS, parse_request
from candle_vllm.server.http.errors import ClientGone, HttpError
from candle_vllm.server.http.routing import caller_of
from candle_vllm.server.openapi.operation import KEPT, routing
from candle_vllm.server.store_access import AFTER, limit_and_after, number_of, order_of, query_of

router, route = routing(tag="batches", errors=KEPT)
MAX_LIST = 10_000
DEFAULT_BATCHES, MAX_BATCHES = 20, 100  # batches in one page of a list
MAX_BODY = 64 << 10  # maximum bytes of the body that creates a batch
_NAME = 200  # maximum characters of a stored file name
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FIELDS = ("file", "purpose", _ANCHOR, _SECONDS)
_PURPOSES = (*records.UPLOADED, records.BATCH_OUTPUT)


@route(
    "POST /v1/files",
    form={
        "file": {"type": "string", "format": "binary", "description": "Lines of JSON, or an image."},
        "purpose": {"enum": [*records.UPLOADED]},
        "expires_after[anchor]": {"enum": ["created_at"], "default": "created_at"},
        "expires_after[seconds]": {
            "type": "integer",
            "minimum": records.LEAST_LIFE,
            "maximum": records.LONGEST_LIFE,
            "default": records.LONGEST_LIFE,
        },
    },
    answer=records.FileObject,
)
async def upload_file(request: Request) -> Response:
    """Store a file: requests of a batch, or an image."""
    batches, owner, _ = await _asked(request)
    with request.app.state.limits.counted(caller_of(request.scope)), batches.upload(owner) as count:
        return json_answer(await _uploaded(request, batches, owner, count))


async def _uploaded(request: Request, batches: Batches, owner: str, count: Callable[[int], None]) -> records.FileObject:
    """Store the file of a form; `count` is called with the size of each chunk of the form before it is stored."""
    most = min(batches.store.options.max_file_bytes, batches.store.share)
    form = await _form(request, most + FORM_OVERHEAD, count)
    try:
        unknown = next((name for name in form if name not in _FIELDS), None)
        if unknown is not None:
            raise InvalidParameterError(f"{unknown!r:.80} is not a field of this form: {', '.join(_FIELDS)}", "file")
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise InvalidParameterError("file is missing: the form needs one, with a file name", "file")
        if not isinstance(purpose, str) or purpose not in records.UPLOADED:
            raise InvalidParameterError(f"purpose must be {_one_of(records.UPLOADED)}, not {purpose!r:.60}", "purpose")
        if (file.size or 0) > most:
            raise too_large(most)
        name = safe_name(file.filename or "")
        return await batches.store.upload(owner, name, _pieces(file), _seconds(form), purpose)
    finally:
        await form.close()


@route(
    "GET /v1/files",
    answer=records.FileList,
    query={
        "limit": {"type": "integer", "minimum": 1, "maximum": 10_000, "default": 10_000},
        "order": {"enum": ["asc", "desc"], "default": "desc"},
        "purpose": {"enum": [*_PURPOSES]},
        **AFTER,
    },
)
async def list_files(request: Request) -> Response:
    """The caller's files, by default the newest first."""
    batches, owner, query = await _asked(request, "limit", "after", "purpose", "order")
    (limit, after), purpose = limit_and_after(query, MAX_LIST, MAX_LIST), query.get("purpose")
    if purpose not in (None, *_PURPOSES):
        raise InvalidParameterError(f"purpose must be {_one_of(_PURPOSES)}, not {purpose!r:.60}", "purpose")
    return _page(records.FileList, await batches.store.files(owner, limit + 1, after, purpose, order_of(query)), limit)


@route("GET /v1/files/{file_id}", answer=records.FileObject)
async def get_file(request: Request, file_id: str) -> Response:
    """The metadata of a file."""
    batches, owner, _ = await _asked(request)
    return json_answer(await batches.store.file(owner, file_id))


@route("GET /v1/files/{file_id}/content", media="application/octet-stream")
async def get_file_content(request: Request, file_id: str) -> Response:
    """The content of a file."""
    batches, owner, _ = await _asked(request)
    file = await batches.store.file(owner, file_id)

    async def contents() -> AsyncGenerator[bytes]:
        async for part in batches.store.contents(owner, file_id):
            yield part.body

    headers = {
        "content-disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        "content-length": str(file.bytes),
        "x-content-type-options": "nosniff",
    }
    return _Download(contents(), headers=headers, media_type="application/octet-stream")


class _Download(StreamingResponse):
    """The content of a file; the size of one part counts in `Held` while the client reads."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file; raises HttpError 503 if too many bytes are held."""
        held, caller = scope["app"].state.held, caller_of(scope)
        held.add(caller, PIECE)
        try:
            await super().__call__(scope, receive, send)
        finally:
            held.add(caller, -PIECE)


@route("DELETE /v1/files/{file_id}", answer=records.FileDeleted)
async def delete_file(request: Request, file_id: str) -> Response:
    """Delete a file."""
    batches, owner, _ = await _asked(request)
    await batches.store.delete_file(owner, file_id)
    return json_answer(records.FileDeleted(id=file_id))


async def _asked(request: Request, *known: str) -> tuple[Batches, str, dict[str, str]]:
    """Return the service of files and batches, the caller as an owner, and the query; 404 if the store is off."""
    batches: Batches | None = request.app.state.batches
    if batches is None:
        raise HttpError(404, "This server stores no files: it was started with --responses-store off.", "store_off")
    owner = await batches.store.owner(caller_of(request.scope).key)
    return batches, owner, query_of(request, *known)


def _one_of(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _page(kind: Callable[..., Any], found: Sequence[records.FileObject | records.Batch], limit: int) -> Response:
    """Return the response with a page of a list: at most `limit` of the found entries, and whether there are more."""
    some = found[:limit]
    ends = {"first_id": some[0].id if some else None, "last_id": some[-1].id if some else None}
    return json_answer(kind(data=some, **ends, has_more=len(found) > limit))


def safe_name(name: str) -> str:
    """Return a file's name without folders and unprintable characters, truncated; file.jsonl if nothing is left."""
    last = re.split(r"[/\\]", name)[-1]
    name = "".join(character for character in last if character.isprintable()).strip(" .")
    return name[:_NAME] or "file.jsonl"


def _seconds(form: FormData) -> int | None:
    """Return for how many seconds a file is stored, from the fields `expires_after[...]`, or None."""
    anchor, seconds = form.get(_ANCHOR, "created_at"), form.get(_SECONDS)
    if anchor != "created_at":
        raise InvalidParameterError(f"{_ANCHOR} must be created_at, not {anchor!r:.60}", _ANCHOR)
    if seconds is None:
        return None
    return number_of(_SECONDS, seconds if isinstance(seconds, str) else "", records.LEAST_LIFE, records.LONGEST_LIFE)


async def _pieces(file: UploadFile) -> AsyncIterator[bytes]:
    while piece := await file.read(PIECE):
        yield piece


async def _form(request: Request, limit: int, count: Callable[[int], None]) -> FormData:
    """Read the form of a request; a file that is not small is written to the disk.

    HttpError for another content type (415), an invalid length (400), a form that is too large (413) or too slow (408),
    or as `count` raises it; ClientGone if the client disconnects; InvalidBodyError if the body is not a form, or has
    too many files or fields.
    """
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "multipart/form-data":
        message = "The body must be a form: send it as `multipart/form-data` with the fields file and purpose."
        raise HttpError(415, message, "unsupported_media_type")
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise HttpError(400, "The Content-Length header is not a number.", "invalid_content_length")
    if len(length) > 15 or int(length) > limit:
        raise _form_too_large(limit)
    bounded = Request(request.scope, _bounded(request.receive, limit, count))
    try:
        async with asyncio.timeout(READING_SECONDS):
            return await bounded.form(max_files=1, max_fields=len(_FIELDS))
    except TimeoutError:
        message = "The body did not arrive in time; send it without long pauses."
        raise HttpError(408, message, "request_timeout", {"connection": "close"}) from None
    except HTTPException as error:
        raise InvalidBodyError(f"The form cannot be read: {error.detail}") from None
    except FormParserError as error:  # older versions of Starlette raise this
        raise InvalidBodyError(f"The form cannot be read: {error}") from None


def _bounded(receive: Receive, limit: int, count: Callable[[int], None]) -> Receive:
    size = 0

    async def bounded() -> Message:
        nonlocal size
        async with asyncio.timeout(SILENCE_SECONDS):
            message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        size += len(message.get("body", b""))
        if size > limit:
            raise _form_too_large(limit)
        count(len(message.get("body", b"")))
        return message

    return bounded


def _form_too_large(limit: int) -> HttpError:
    message = f"The file is larger than {limit >> 20} MB. Send it in parts, or raise --file-max-mb and --files-max-mb."
    return HttpError(413, message, "request_too_large", {"connection": "close"})


# ---- batches ---------------------------------------------------------------------------------------------------------


@route(
    "POST /v1/batches",
    body=records.BatchRequest,
    example={"input_file_id": "file_0", "endpoint": "/v1/chat/completions", "completion_window": "24h"},
    answer=records.Batch,
)
async def create_batch(request: Request) -> Response:
    """Answer the requests of a file."""
    batches, owner, _ = await _asked(request)
    parse = functools.partial(parse_body, records.BatchRequest)
    wire = await parse_request(request.scope, request.receive, MAX_BODY, parse)
    return json_answer(await batches.create(owner, wire))


@route(
    "GET /v1/batches",
    answer=records.BatchList,
    query={"limit": {"type": "integer", "minimum": 1, "maximum": MAX_BATCHES, "default": DEFAULT_BATCHES}, **AFTER},
)
async def list_batches(request: Request) -> Response:
    """The caller's batches, newest first."""
    batches, owner, query = await _asked(request, "limit", "after")
    limit, after = limit_and_after(query, DEFAULT_BATCHES, MAX_BATCHES)
    return _page(records.BatchList, await batches.store.batches(owner, limit + 1, after), limit)


@route("GET /v1/batches/{batch_id}", answer=records.Batch)
async def get_batch(request: Request, batch_id: str) -> Response:
    """The state of a batch."""
    batches, owner, _ = await _asked(request)
    return json_answer((await batches.store.batch(owner, batch_id)).batch)


@route("POST /v1/batches/{batch_id}/cancel", answer=records.Batch, errors=(*KEPT, 409))
async def cancel_batch(request: Request, batch_id: str) -> Response:
    """Cancel a batch; its results so far stay."""
    batches, owner, _ = await _asked(request)
    return json_answer(await batches.cancel(owner, batch_id))
