# SPDX-License-Identifier: MIT
"""create_app: the ASGI application around a model manager, or around one engine.

Steps 1 and 10 of a request's life. Routes use `app.state` and no globals, so a process can hold several applications.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from candle_vllm.core.config import SETTINGS
from candle_vllm.core.errors import CandleVllmError
from candle_vllm.responses.api.background import Background
from candle_vllm.responses.api.response_store import ResponseStore
from candle_vllm.server.adapters.resolvers import open_adapters
from candle_vllm.server.batches.service import Batches
from candle_vllm.server.batches.store import FileOptions
from candle_vllm.server.http.auth import ANY_ORIGIN, ApiKeyMiddleware, HostMiddleware, OriginMiddleware, origins
from candle_vllm.server.http.body import Held
from candle_vllm.server.http.errors import ClientGone, HttpError
from candle_vllm.server.http.failures import FailureMiddleware, answer_failure
from candle_vllm.server.http.keys import Keyring
from candle_vllm.server.http.limits import RateLimitMiddleware, RateLimits
from candle_vllm.server.http.routing import GreetingMiddleware, HeadMiddleware, PrefixMiddleware, UnversionedMiddleware
from candle_vllm.server.models.loader import serve_engine
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.observing import series
from candle_vllm.server.observing.metrics import Observation, Outcome
from candle_vllm.server.observing.middleware import ObservingMiddleware
from candle_vllm.server.observing.model_metrics import ServedEngine
from candle_vllm.server.openapi.document import RATE_LIMIT_HEADERS, ApiDocument
from candle_vllm.server.openapi.operation import Access, operations_of
from candle_vllm.server.outliving import MailboxWriter
from candle_vllm.server.routes import (
    adapters,
    conversations,
    docs,
    embeddings,
    files,
    generation,
    llama_server,
    messages,
    models,
    ollama,
    ollama_library,
    ollama_models,
    responses,
    responses_socket,
    status,
    tokenizing,
    vllm,
)
from candle_vllm.server.routes import mailbox as mailbox_routes
from candle_vllm.server.routes import mcp as mcp_routes
from candle_vllm.server.routes.webui import public_paths, web_ui_router
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.catalogue import ModelEntry
from candle_vllm.server.settings.derived import store_options

if TYPE_CHECKING:
    from candle_vllm.server.mailbox.service import Mailbox
    from candle_vllm.server.mcp.service import McpService

_MODULES = (
    generation, messages, responses, responses_socket, conversations, files, embeddings,
    tokenizing, models, adapters,
    mailbox_routes, ollama, ollama_models, ollama_library, mcp_routes, status, vllm, llama_server, docs,
)  # fmt: skip
ROUTERS = tuple(module.router for module in _MODULES)
OPERATIONS = operations_of(ROUTERS)

# Headers of answers that the page of another origin may read: OpenAI's and Anthropic's clients use the first four.
_EXPOSED = ("x-request-id", "request-id", "retry-after", "x-should-retry", "x-warning", "x-error-code")


def create_app(
    served: ServedEngine | ModelManager,
    settings: Settings | None = None,
    *,
    mailbox: Mailbox | None = None,
    mcp: McpService | None = None,
) -> FastAPI:
    """Return the server as an ASGI application, which starts and closes `mailbox` and `mcp`.

    Args:
        served: a model manager, which the application closes at its end; or a loaded engine, which it does not close.
        settings: API keys, CORS, body limit, default sampling and others; only `serve` binds the address.
    """
    settings = settings or Settings()
    app = FastAPI(
        title="candle-vllm",
        version=version("candle-vllm-server"),
        redirect_slashes=False,  # a redirect would be built from the Host header
        docs_url=None,  # FastAPI's pages load their scripts from other hosts
        redoc_url=None,
        openapi_url=None,
        lifespan=_lifespan,
    )
    app.state.manager = served if isinstance(served, ModelManager) else manager_of(served, settings)
    app.state.metrics = app.state.manager.metrics
    app.state.settings = settings
    app.state.keys = Keyring(settings)
    app.state.held = Held(max(settings.max_held_mb, 2 * settings.max_body_mb) << 20)
    app.state.manager.rates = app.state.limits = RateLimits(settings.rates, app.state.metrics.rate_limited)
    app.state.mailbox = mailbox
    if mailbox is not None:
        count = app.state.metrics.count
        mailbox.pushed = lambda delivered: count(series.WEBHOOKS, Outcome.OK if delivered else Outcome.FAILED)
    options = store_options(settings)
    app.state.response_store = None if options is None else ResponseStore(options)
    app.state.batches = None if options is None else _batches(app, options.url, settings)
    app.state.background = None if app.state.response_store is None else Background(app.state.response_store)
    app.state.mcp = mcp
    if mcp is not None:
        mcp.called = functools.partial(app.state.metrics.count, series.TOOL_CALLS)
        app.state.metrics.watch_mcp_servers(mcp.states)
    app.state.response_servers = responses.response_servers(mcp, settings, keys=settings.has_api_keys)
    app.state.mailbox_writer = None if mailbox is None else MailboxWriter(mailbox, app.state.metrics)
    app.state.pulls = ollama_library.pulls_of(app.state.manager, settings)
    app.state.stopping = lambda: False
    app.state.reloader = None  # reads settings files again; set by `serve`
    app.state.failure = None  # why the application could not start
    app.state.page_key = None  # key in the printed address of the web UI, with which the page may call tools
    # The web UI's routes come first, because its page replaces the server's own response to GET /.
    for router in (*((web_ui_router(),) if settings.ui_server else ()), *ROUTERS):
        app.include_router(router)
    keys = {"keys": settings.has_api_keys, "management_keys": bool(settings.management_key)}
    app.state.document = ApiDocument(ROUTERS, **keys, prefix=settings.root_path or "")
    app.openapi = lambda: app.state.document.value  # instead of FastAPI's document; this one has the wire types
    for kind in (Exception, HttpError, HTTPException, CandleVllmError, ClientGone):
        app.add_exception_handler(kind, answer_failure)
    _add_layers(app, settings)
    return app


def manager_of(engine: ServedEngine, settings: Settings) -> ModelManager:
    """Return a model manager of one loaded engine, which its owner closes."""
    names = settings.served_model_name or (engine.model_info.name,)
    entry = ModelEntry(names[0], settings, names)
    metrics = Observation(settings).metrics
    known = open_adapters(settings, settings, functools.partial(metrics.count, series.ADAPTER_LOOKS))
    return ModelManager.of_loaded(serve_engine(engine, entry, metrics, known), metrics, known)


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
    """Yield the server's state: `busy()` returns whether a drain must wait for work for disconnected clients."""
    state = app.state
    watch = asyncio.create_task(state.keys.watch(), name="key-files")
    try:
        for each in (state.mailbox, state.response_store, state.batches, state.mcp):
            if each is not None:
                try:
                    await each.start()
                except Exception as failure:
                    state.failure = failure
                    raise
        working = [each for each in (state.mailbox_writer, state.background) if each is not None]
        yield {"busy": lambda: any(each.busy for each in working)}
    finally:
        watch.cancel()
        # A service is closed before the services that it uses.
        for each in (
            state.batches, state.mailbox_writer, state.background, state.response_store, state.mcp, state.manager,
            state.mailbox,
        ):  # fmt: skip
            if each is not None:
                await each.close()


def _batches(app: FastAPI, url: str, settings: Settings) -> Batches:
    options = FileOptions(
        url, settings.files_max_mb << 20, settings.file_max_mb << 20, settings.responses_retention_days * 86400
    )
    manager: ModelManager = app.state.manager

    def places() -> int:
        """Maximum number of running sequences: of the loaded models, else the setting; 0 if no model can answer."""
        slots = manager.slots.values()
        if not (manager.is_healthy and any(slot.last_used for slot in slots)) or any(slot.dead for slot in slots):
            return 0  # no model was loaded yet, or an engine has died
        loaded = [model.engine.model_info.max_num_seqs for model in manager.loaded]
        return max(loaded, default=settings.max_num_seqs or SETTINGS["max_num_seqs"].default or 1)

    return Batches(options, app.state.keys.callers, settings.max_body_mb << 20, places, app)


def _add_layers(app: FastAPI, settings: Settings) -> None:
    """Add the middleware, the innermost layer (rate limits) first, the outermost (path prefix) last."""
    app.add_middleware(RateLimitMiddleware, limits=app.state.limits)
    if settings.has_api_keys or settings.management_key:
        access = Access(OPERATIONS, public_paths() if settings.ui_server else frozenset())
        app.add_middleware(ApiKeyMiddleware, keys=app.state.keys, access=access)
    app.add_middleware(HeadMiddleware)
    if settings.ollama_port is not None:
        app.add_middleware(GreetingMiddleware, port=settings.ollama_port)
    if not settings.has_api_keys and ANY_ORIGIN not in settings.cors_origin:
        public = Access(OPERATIONS).public
        app.add_middleware(HostMiddleware, own=settings.address.host, allowed=settings.cors_origin, public=public)
    app.add_middleware(OriginMiddleware, allowed=settings.cors_origin, page=settings.ui_server)
    app.add_middleware(FailureMiddleware)
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[origin for origin in settings.cors_origin if origin == ANY_ORIGIN],
            allow_origin_regex=origins(settings.cors_origin).pattern,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[*_EXPOSED, *RATE_LIMIT_HEADERS],
        )
    app.add_middleware(
        ObservingMiddleware,
        metrics=app.state.metrics,
        log=settings.log_requests,
        unknown_fields=settings.unknown_fields == "warn",
    )
    app.add_middleware(UnversionedMiddleware)
    if settings.root_path:
        app.add_middleware(PrefixMiddleware, prefix=settings.root_path)
