"""create_app: the ASGI application around one adapter.

Steps 1 and 10 of a request's life. No globals: everything a route needs stands on `app.state`, so that several
applications can live in one process.
"""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Protocol

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from candle_vllm.core.errors import CandleVllmError
from candle_vllm.openai import EngineLike, OpenAIAdapter, to_error, to_json_bytes
from candle_vllm.server import health
from candle_vllm.server.auth import ApiKeyMiddleware
from candle_vllm.server.errors import ClientGone, HttpError
from candle_vllm.server.request_id import RequestIdMiddleware
from candle_vllm.server.routes import generation, models
from candle_vllm.server.settings import Settings

CLIENT_CLOSED_REQUEST = 499  # for the log; nobody is left to read it

logger = logging.getLogger(__name__)


class ServedEngine(EngineLike, Protocol):
    """What the server needs of an engine; `InferenceEngine` has it."""

    @property
    def is_alive(self) -> bool: ...


def create_app(engine: ServedEngine, settings: Settings | None = None) -> FastAPI:
    """The server as an ASGI application; it does not own the engine and does not close it.

    Args:
        engine: a loaded engine.
        settings: API keys, CORS, body limit, default sampling; the address settings are for `serve`.
    """
    settings = settings or Settings()
    app = FastAPI(
        title="candle-vllm",
        version=version("candle-vllm-server"),
        redirect_slashes=False,  # a redirect would be built from the Host header
        docs_url=None,  # FastAPI's pages load their scripts from elsewhere
        redoc_url=None,
        openapi_url=None,
    )
    app.state.engine = engine
    app.state.adapter = OpenAIAdapter(
        engine,
        served_model_names=settings.served_model_name,
        allow_priority=settings.enable_request_priority,
    )
    app.state.settings = settings
    for router in (generation.router, models.router, health.router):
        app.include_router(router)
    app.add_exception_handler(Exception, _failure)
    for kind in (HttpError, HTTPException, CandleVllmError, ClientGone):
        app.add_exception_handler(kind, _failure)
    _add_layers(app, settings)
    return app


def _add_layers(app: FastAPI, settings: Settings) -> None:
    """Each layer goes around those before it: request id > CORS > key > routes."""
    if settings.api_key:
        app.add_middleware(ApiKeyMiddleware, keys=settings.api_key)
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    app.add_middleware(RequestIdMiddleware, log=settings.log_requests)


async def _failure(request: Request, failure: Exception) -> Response:
    """Every failure of a route, in OpenAI's envelope."""
    if isinstance(failure, HttpError):
        return failure.response
    if isinstance(failure, ClientGone):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if isinstance(failure, HTTPException):
        return _routing_error(request, failure)
    error = to_error(failure)
    if error.status >= 500:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=failure)
    return Response(to_json_bytes(error.body), error.status, dict(error.headers), media_type="application/json")


def _routing_error(request: Request, failure: HTTPException) -> Response:
    path, method = request.scope["path"][:200], request.method
    messages = {
        404: (f"There is no route {path!r} here; the API is under /v1.", "not_found"),
        405: (f"{path!r} does not take {method}.", "method_not_allowed"),
    }
    message, code = messages.get(failure.status_code, (failure.detail, "http_error"))
    return HttpError(failure.status_code, message, code, failure.headers).response
