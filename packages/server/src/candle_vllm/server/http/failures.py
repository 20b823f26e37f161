# SPDX-License-Identifier: MIT
"""Turn failures of requests into responses or last events, in their API's error format (steps 1 and 10 of their life).

Anthropic's routes and clients use Anthropic's error format, Ollama's routes use Ollama's, and all others use OpenAI's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from candle_vllm.core import errors
from candle_vllm.openai import to_error, to_json_bytes
from candle_vllm.openai.anthropic import anthropic_error, to_anthropic_error
from candle_vllm.openai.ollama.answers import Failure
from candle_vllm.responses.store import entries
from candle_vllm.server.http.errors import ClientGone, HttpError
from candle_vllm.server.http.routing import current_request, route_path
from candle_vllm.server.http.sse import data_event, named_event
from candle_vllm.server.settings.derived import speak_in_flags

CLIENT_CLOSED_REQUEST = 499  # status for the log; the client has disconnected
ANTHROPIC = "/v1/messages"
OLLAMA = "/api/"
JSON = "application/json"
RETRY_SECONDS = "30"  # Retry-After of a full store, some of whose entries may have ended by then

logger = logging.getLogger(__name__)


class FailureMiddleware:
    """Turns exceptions that no exception handler takes into responses, and shortens the error of a failed start.

    A request that is cancelled before its response, as at the end of the drain, gets a 503; a begun stream reports the
    shutdown itself (`EventStream`). If an exception comes after the response has begun, uvicorn closes the connection,
    so that the client sees that the answer is incomplete. An exception whose `__cause__` is a CandleVllmError is then
    logged in one line; every other one, and every exception of a WebSocket or of the lifespan, is raised to uvicorn.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        def note(message: Message) -> Awaitable[None]:
            nonlocal begun
            begun = True
            if message["type"] == "lifespan.startup.failed":
                failure = scope["app"].state.failure
                if isinstance(failure, errors.CandleVllmError):  # its message suffices, without the traceback
                    message = {**message, "message": str(failure)}
            return send(message)

        try:
            try:
                await self._app(scope, receive, note)
            except Exception as failure:
                if scope["type"] == "http" and begun and isinstance(failure.__cause__, errors.CandleVllmError):
                    what = f"{scope['method']} {scope['path'][:200]!r}"
                    logger.warning("the answer to %s ended before it was complete: %s", what, failure.__cause__)
                    return
                if scope["type"] != "http" or begun:
                    raise
                response = await answer_failure(Request(scope), failure)
                await response(scope, receive, note)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            if not begun:  # a begun answer ends as it is; uvicorn would log a traceback of the cancellation
                message = "The server was stopped before the answer was complete."
                error = HttpError(503, message, "shutting_down", {"retry-after": "5"})
                await refusal(scope, error)(scope, receive, send)


def store_refusal(failure: Exception) -> HttpError | None:
    """Return the error that a client gets for a failure of the store, or None for any other failure."""
    if isinstance(failure, entries.NotStoredError):
        if failure.param == "previous_response_id":
            return HttpError(400, str(failure), "previous_response_not_found", param=failure.param)
        return HttpError(404, str(failure), "not_found", param=failure.param)
    if isinstance(failure, entries.StoreFullError):
        return HttpError(429 if failure.own else 503, str(failure), "store_limit", {"retry-after": RETRY_SECONDS})
    if isinstance(failure, entries.StoreLimitError):
        return HttpError(400, str(failure), "store_limit", param=failure.param)
    if isinstance(failure, entries.ConversationBusyError):
        return HttpError(409, str(failure), "conversation_locked", {"retry-after": "1"}, param=failure.param)
    if isinstance(failure, entries.StoreUnavailableError):
        code = "mailbox_unavailable" if failure.setting == "mailbox" else "store_unavailable"
        return HttpError(503, str(failure), code, {"retry-after": "1"})
    return None


async def answer_failure(request: Request, failure: Exception) -> Response:
    """Return the response to a request that failed; failures of the server are logged."""
    if isinstance(failure, ClientGone):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if isinstance(failure, HTTPException):
        failure = _routing_error(request, failure)
    failure = store_refusal(failure) or failure
    if isinstance(failure, HttpError):
        return refusal(request.scope, failure)
    if isinstance(failure, errors.CandleVllmError):
        speak_in_flags(failure)
    log_failure(f"{request.method} {request.scope['path'][:200]!r} failed", failure)
    if speaks_anthropic(request.scope):
        theirs = to_anthropic_error(failure, request_id=_request_id(request.scope))
        return _response(to_json_bytes(theirs.body), theirs.status, theirs.headers)
    error = to_error(failure)
    body = Failure(error.body.error.message) if speaks_ollama(request.scope) else error.body
    return _response(to_json_bytes(body), error.status, error.headers)


def refusal(scope: Scope, error: HttpError) -> Response:
    """Return the response for an HttpError of any status, in the format of the request's API."""
    if speaks_ollama(scope):
        headers = {"x-error-code": error.code, **error.headers}  # Ollama's errors have no field for the code
        return _response(to_json_bytes(Failure(str(error))), error.status, headers)
    if not speaks_anthropic(scope):
        return _response(error.body, error.status, error.headers)
    status = 529 if error.code == "overloaded" else error.status
    theirs = anthropic_error(
        status, str(error), param=error.param, headers=error.headers, request_id=_request_id(scope)
    )
    return _response(to_json_bytes(theirs.body), theirs.status, theirs.headers)


def error_event(failure: Exception) -> bytes:
    """Return the last event of a stream that failed, for OpenAI's clients."""
    if isinstance(failure, HttpError):
        return data_event(failure.body)
    log_failure("a stream failed", failure)
    return data_event(to_error(failure).body)


def anthropic_error_event(failure: Exception) -> bytes:
    """Return the last event of a stream that failed, for Anthropic's clients."""
    context = current_request.get()
    request_id = _request_id(context.scope) if context is not None else None
    if isinstance(failure, HttpError):
        body = anthropic_error(failure.status, str(failure), param=failure.param, request_id=request_id).body
    else:
        log_failure("a stream failed", failure)
        body = to_anthropic_error(failure, request_id=request_id).body
    return named_event(body.event_name, to_json_bytes(body))


def ollama_error_line(failure: Exception) -> bytes:
    """Return the last line of a stream that failed, for Ollama's clients."""
    if not isinstance(failure, HttpError):
        log_failure("a stream failed", failure)
    message = str(failure) if isinstance(failure, HttpError) else to_error(failure).body.error.message
    return to_json_bytes(Failure(message)) + b"\n"


def log_failure(what: str, failure: Exception) -> None:
    """Log a failure, unless the client, an abort or sleep caused it."""
    if isinstance(failure, errors.EngineDeadError | errors.EngineOverloadedError | entries.StoreUnavailableError):
        logger.error("%s: %s", what, failure)  # without a traceback: the cause is known, and ends many requests
    elif to_error(failure).status >= 500 and not isinstance(
        failure, (errors.RequestAbortedError, errors.EngineSleepingError)
    ):
        logger.error("%s", what, exc_info=failure)


_ROUTES_HERE = {"/generate": "/v1/completions", "/models/load": "/v1/models/load"}
"""Routes of other servers that this server does not have, because its responses differ, and the route to use."""


def _routing_error(request: Request, failure: HTTPException) -> HttpError:
    path, method = request.scope["path"][:200], request.method
    methods = request.app.state.document.methods(route_path(request.scope)) or ["GET"]  # the web UI's files
    nearest = _ROUTES_HERE.get(path.rstrip("/"))
    under = "" if path.startswith(("/v1/", "/api/")) else "; the API is under /v1"
    twice = "; leave /v1 out of the base URL" if path.startswith("/v1/v1/") else under
    near = f"; the route for this is {nearest}" if nearest else twice
    messages = {
        404: (f"There is no route {path!r} here{near}.", "not_found"),
        405: (f"{path!r} does not support {method}; it supports {' and '.join(methods)}.", "method_not_allowed"),
    }
    message, code = messages.get(failure.status_code, (failure.detail, "http_error"))
    # For 405, the router names the methods of only one route at this path.
    headers = {"allow": ", ".join(methods)} if failure.status_code == 405 else failure.headers
    return HttpError(failure.status_code, message, code, headers)


def speaks_anthropic(scope: Scope) -> bool:
    """Whether a request is for Anthropic's API; on the routes of models, a header tells its clients from OpenAI's."""
    path, named = f"{route_path(scope)}/", b"anthropic-version" in dict(scope["headers"])
    return path.startswith(f"{ANTHROPIC}/") or (named and path.startswith("/v1/models/"))


def speaks_ollama(scope: Scope) -> bool:
    """Whether the request is for a route of Ollama's API."""
    return route_path(scope).startswith(OLLAMA)


def _request_id(scope: Scope) -> str | None:
    return scope.get("state", {}).get("request_id")


def _response(body: bytes, status: int, headers: Mapping[str, str]) -> Response:
    return Response(body, status, dict(headers), media_type=JSON)
