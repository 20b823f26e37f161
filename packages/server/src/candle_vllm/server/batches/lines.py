# SPDX-License-Identifier: MIT
"""One line of a batch, in OpenAI's format: parse it, send it to the application, and write the result as a line.

Each line enters step 1 of a request's life: the ASGI application of this process is called, without a network. So a
line has the same fields, limits and errors as a client's request.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import secrets
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from starlette.types import ASGIApp

from candle_vllm.core.engine.requests import MAX_PRIORITY
from candle_vllm.openai.errors import InvalidBodyError
from candle_vllm.openai.fair_threads import apart
from candle_vllm.openai.json_body import decode_json, to_json_bytes
from candle_vllm.server.http.routing import NOBODY, Caller, acting_for

if TYPE_CHECKING:
    import httpx

POOLING = ("/v1/embeddings", "/v1/score", "/score", "/v1/rerank", "/rerank", "/v2/rerank")
URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", *POOLING)
MAX_CUSTOM_ID = 512  # characters
PRIORITY = 1000  # added to a line's own priority, so that requests of clients run first
LONGEST_PAUSE = 5.0  # maximum seconds before a line is sent again
_FULL = frozenset({"overloaded", "rate_limit_exceeded", "model_not_ready", "model_sleeping", "request_aborted",
                   "conversation_locked", "store_unavailable"})  # fmt: skip
_FIELDS = frozenset({"custom_id", "method", "url", "body"})


Stopped = Callable[[], Awaitable[tuple[str, str] | None]]
"""Returns why a batch answers no further line, as code and message; None if it continues."""


class Line(NamedTuple):
    """A request of a batch: its `custom_id`, one of `URLS`, and its body as JSON."""

    custom_id: str
    url: str
    body: bytes


class LineError(Exception):
    """A line that is not a valid request; `code` is the error code of its result."""

    def __init__(self, message: str, code: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.custom_id = custom_id


class InvalidKeyError(Exception):
    """The key of a line's caller is not valid any more."""


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """The application's response to a line."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Why a line has no successful response."""

    code: str
    message: str


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A line of an output file.

    Attributes:
        custom_id: `custom_id` of the request; None for a request without one.
        response: the application's response; None if the line is invalid, or the batch ended first.
        error: why there is no successful response; None if there is one.
    """

    id: str
    custom_id: str | None
    response: Answered | None
    error: Problem | None

    @property
    def line(self) -> bytes:
        """The result as JSON, with a newline."""
        return to_json_bytes(self) + b"\n"


def failed(custom_id: str | None, code: str, message: str) -> Result:
    """Return the result of a line without a response."""
    return Result(id=_new_id(), custom_id=custom_id, response=None, error=Problem(code=code, message=message))


def read_line(data: bytes, endpoint: str | None = None) -> Line:
    """Parse a line without its newline, and lower its priority; LineError if it is not a valid request.

    `endpoint` is the only URL that the batch allows; None allows all of `URLS`.
    """
    try:
        value = decode_json(data.removeprefix(codecs.BOM_UTF8), "The line")
    except InvalidBodyError as error:
        raise LineError(str(error), "invalid_json_line") from None
    if not isinstance(value, dict):
        raise LineError("A line must be a JSON object.", "invalid_json_line")
    name = value.get("custom_id")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_CUSTOM_ID:
        raise LineError(f"custom_id must be a text of 1 to {MAX_CUSTOM_ID} characters.", "missing_required_parameter")
    unknown = next((key for key in value if key not in _FIELDS), None)
    if unknown is not None:
        raise LineError(
            f"{unknown!r:.80} is not a field of a line; the fields are: {', '.join(sorted(_FIELDS))}.",
            "invalid_request",
            name,
        )
    if value.get("method") != "POST":
        raise LineError(f"method must be POST, not {value.get('method')!r:.60}.", "invalid_method", name)
    url, body = value.get("url"), value.get("body")
    allowed = URLS if endpoint is None else (endpoint,)
    if not isinstance(url, str) or url not in allowed:
        raise LineError(f"url must be one of {', '.join(allowed)}, not {url!r:.80}.", "invalid_url", name)
    if not isinstance(body, dict):
        raise LineError("body must be an object.", "invalid_request", name)
    for field in ("stream", "background"):
        if body.get(field):
            raise LineError(f"{field} must be left out: a line has one whole answer.", "invalid_request", name)
    if body.get("encoding_format") in ("bytes", "bytes_only"):
        raise LineError("encoding_format must be float or base64: a result is JSON.", "invalid_request", name)
    own = body.get("priority")
    if own is None or (type(own) is int and -MAX_PRIORITY <= own <= MAX_PRIORITY - PRIORITY):  # others stay
        body["priority"] = max(own or 0, 0) + PRIORITY
    for field, one in body.items():
        try:
            body[field] = msgspec.Raw(
                json.dumps(one, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
            )
        except ValueError:
            raise LineError(f"{field} has a number that is too large.", "invalid_request", name) from None
    return Line(name, url, msgspec.json.encode(body))


class Application:
    """Sends the lines of batches to the ASGI application of this process, with the HTTP client of `asked_here`."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def read(self, data: bytes, endpoint: str | None = None) -> Line:
        """Parse a line as `read_line`, in a thread; a large line counts as a large request (see `apart`)."""
        return await apart(read_line, data, endpoint, size=len(data))

    async def answer(
        self, data: bytes, *, caller: Caller = NOBODY, endpoint: str | None = None, stopped: Stopped | None = None
    ) -> Result:
        """Return the result of a line that `caller` sent.

        While the failure is temporary (`_FULL`), and once after `engine_dead`, send the line again, until `stopped`
        returns a reason. Raises InvalidKeyError if the application answers 401.
        """
        try:
            line = await self.read(data, endpoint)
        except LineError as error:
            return failed(error.custom_id, error.code, str(error))
        died = False
        while True:
            answer = await self._ask(line, caller)
            if answer.status_code == 401:
                raise InvalidKeyError
            problem = None if answer.is_success else problem_of(answer.content)
            if problem is None or (problem.code not in _FULL and (died or problem.code != "engine_dead")):
                break
            died = died or problem.code == "engine_dead"  # the line may be the cause, so it is sent only once more
            if stopped is not None and (reason := await stopped()) is not None:
                return failed(line.custom_id, *reason)
            after = answer.headers.get("retry-after", "1")
            await asyncio.sleep(min(float(after) if after.isdigit() else 1.0, LONGEST_PAUSE))
        response = Answered(
            status_code=answer.status_code,
            request_id=answer.headers.get("x-request-id", ""),
            body=msgspec.Raw(answer.content or b"null"),
        )
        return Result(id=_new_id(), custom_id=line.custom_id, response=response, error=problem)

    async def _ask(self, line: Line, caller: Caller) -> httpx.Response:
        token = acting_for.set(caller) if caller.label else None
        try:
            return await self._client.post(line.url, content=line.body, headers={"content-type": "application/json"})
        finally:
            if token is not None:
                acting_for.reset(token)


@asynccontextmanager
async def asked_here(app: ASGIApp) -> AsyncGenerator[Application]:
    """Context manager that yields the `Application` for an ASGI application of this event loop."""
    import httpx  # a server that never has a batch does not load it

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    # trust_env=False: otherwise the requests would go to the proxies in the environment variables.
    async with httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None, trust_env=False) as client:  # noqa: S113
        yield Application(client)


async def answered_in_order(
    lines: AsyncIterator[bytes], answer: Callable[[bytes], Awaitable[Result]], width: int
) -> AsyncGenerator[Result]:
    """Yield the results of lines in the order of the lines; at most `width` lines are in progress at a time.

    Closing the generator cancels the lines in progress.
    """
    working: deque[asyncio.Future[Result]] = deque()

    async def first() -> Result:
        await asyncio.wait([working[0]])  # awaiting the line itself would cancel it, and it would end with an error
        return working.popleft().result()

    try:
        async for line in lines:
            working.append(asyncio.ensure_future(answer(line)))
            while len(working) >= width or (working and working[0].done()):
                yield await first()
        while working:
            yield await first()
    finally:
        for each in working:
            each.cancel()
        await asyncio.gather(*working, return_exceptions=True)


def problem_of(body: bytes) -> Problem:
    try:
        error: Any = msgspec.json.decode(body)["error"]
        return Problem(code=str(error.get("code") or error.get("type") or "error"), message=str(error["message"]))
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return Problem(code="error", message="The request failed.")


def _new_id() -> str:
    return f"batch_req_{secrets.token_hex(16)}"
