# SPDX-License-Identifier: MIT
"""A small application with a watched engine, called directly or served on loopback."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from prometheus_client.parser import text_string_to_metric_families
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from candle_vllm.core.engine.requests import arrived
from candle_vllm.openai import OpenAIAdapter, parse_chat_request, parse_completion_request, to_error, to_json_bytes
from candle_vllm.openai.embedding import parse_embedding_request
from candle_vllm.server.http.routing import Caller
from candle_vllm.server.observing.metrics import Metrics, render
from candle_vllm.server.observing.middleware import ObservingMiddleware
from candle_vllm.server.observing.request_record import RequestRecord
from packages.server.tests.server_fakes import PacedEngine, watched
from tests.trusted import trusted
from tests.waiting import wait_for


class Samples:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self._samples = [sample for family in self.families.values() for sample in family.samples]

    def sum(self, name: str, **labels: str) -> float:
        """Of every sample of that name that has these labels."""
        return sum(
            sample.value for sample in self._samples if sample.name == name and labels.items() <= sample.labels.items()
        )

    def has(self, name: str, **labels: str) -> bool:
        return any(sample.name == name and labels.items() <= sample.labels.items() for sample in self._samples)

    def values(self, label: str) -> set[str]:
        """Every value that a label has."""
        return {sample.labels[label] for sample in self._samples if label in sample.labels}


class Noted:
    """Metrics, an engine that reports to them, and what observers were told."""

    def __init__(self, engine: Any, *observers: Callable[[RequestRecord], None], **options: Any) -> None:
        self.requests: list[RequestRecord] = []
        self.metrics = Metrics((self.requests.append, *observers))
        self.engine = engine
        self.watcher = watched(engine, self.metrics, **options)
        self.stream = partial(engine.stream, watcher=self.watcher)
        self.aembed = partial(engine.aembed, watcher=self.watcher)
        self.ascore = partial(engine.ascore, watcher=self.watcher)

    def samples(self) -> Samples:
        return Samples(render(self.metrics.registry)[0].decode())

    def app(self) -> FastAPI:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        adapter = OpenAIAdapter(self.engine, watcher=self.watcher)

        async def respond(request: Request, wire: Any, whole: Any, streamed: Any) -> Response:
            arrived.set(time.monotonic())
            request.state.prompt_only = getattr(wire, "max_tokens", None) == 0
            try:
                if getattr(wire, "stream", False):
                    return StreamingResponse(_events(await streamed(wire)), media_type="text/event-stream")
                return Response(to_json_bytes(await whole(wire)), media_type="application/json")
            except Exception as failure:
                error = to_error(failure)
                return Response(to_json_bytes(error.body), error.status, media_type="application/json")

        @app.post("/api/chat")
        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            return await respond(request, parse_chat_request(await request.body()), adapter.chat, adapter.chat_stream)

        @app.post("/v1/completions")
        async def completions(request: Request) -> Response:
            wire = parse_completion_request(await request.body())
            return await respond(request, wire, adapter.complete, adapter.complete_stream)

        @app.post("/v1/embeddings")
        async def embeddings(request: Request) -> Response:
            return await respond(request, parse_embedding_request(await request.body()), adapter.embed, None)

        @app.get("/v1/models/{name:path}")
        async def model(name: str) -> Response:
            return Response(name)

        @app.get("/metrics")
        async def metrics(request: Request) -> Response:
            accept = request.headers.get("accept", "")
            data, kind = await run_in_threadpool(render, self.metrics.registry, accept)
            return Response(data, headers={"content-type": kind})

        app.add_middleware(StateMiddleware)
        app.add_middleware(ObservingMiddleware, metrics=self.metrics)
        return app

    def client(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app(), raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test")


class StateMiddleware:
    """Stands for the layers that know the key and the request id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            state = scope.setdefault("state", {})
            state["request_id"] = headers.get(b"x-request-id", uuid.uuid4().hex.encode()).decode()
            if b"x-key-number" in headers:
                state["caller"] = Caller(headers[b"x-key-number"].decode())
        await self._app(scope, receive, send)


async def _events(chunks: Any) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            yield b"data: " + to_json_bytes(chunk) + b"\n\n"
        yield b"data: [DONE]\n\n"
    except Exception as failure:
        yield b"data: " + to_json_bytes(to_error(failure).body) + b"\n\n"
    finally:
        await chunks.aclose()


@pytest.fixture
def noted() -> Callable[..., Noted]:
    """`noted(engine, *observers)`; without an engine, one that says a word."""

    def make(engine: Any = None, *observers: Callable[[RequestRecord], None], **options: Any) -> Noted:
        return Noted(engine or PacedEngine("Hello!"), *observers, **options)

    return make


class Served:
    """An application on loopback, in a thread."""

    def __init__(self, app: FastAPI) -> None:
        config = uvicorn.Config(app, port=0, log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_for(lambda: self._server.started)
        self.port = int(self._server.servers[0].sockets[0].getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, verify=trusted())

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture
def serve_app() -> Iterator[Callable[[FastAPI], Served]]:
    """Serves applications until the test ends."""
    running: list[Served] = []

    def start(app: FastAPI) -> Served:
        running.append(Served(app))
        return running[-1]

    yield start
    for served in running:
        served.stop()
