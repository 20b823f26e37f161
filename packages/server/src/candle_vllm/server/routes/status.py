# SPDX-License-Identifier: MIT
"""Health, readiness, metrics and usage of the server: `/health`, `/ready`, `/metrics` and similar routes.

Not a step of a request's life: for load balancers, Prometheus and people. `/health` and `/ready` need no key; without a
valid key, they show only the status.
"""

from __future__ import annotations

import asyncio
from importlib.metadata import version

import msgspec
from fastapi import Request
from starlette.responses import Response

from candle_vllm.server.answering import json_answer
from candle_vllm.server.http.routing import caller_of, is_stranger
from candle_vllm.server.models.cards import LoadProgress, load_progress
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.models.slot import ModelState
from candle_vllm.server.observing.metrics import render
from candle_vllm.server.observing.request_record import UsageRow
from candle_vllm.server.openapi.operation import routing

router, route = routing(tag="server")


class Standing(msgspec.Struct, frozen=True):
    """The status of the server: ok or dead."""

    status: str


class Readiness(msgspec.Struct, frozen=True):
    """The status of the default model, or "stopping"; `loading` is the progress while the model is being loaded."""

    status: str
    loading: LoadProgress | msgspec.UnsetType = msgspec.UNSET


class Version(msgspec.Struct, frozen=True):
    """The version of the server package."""

    version: str


class Welcome(msgspec.Struct, frozen=True):
    """Name and version of this server, and the address of its API."""

    name: str
    version: str
    models: tuple[str, ...]
    openai_base_url: str


@route("GET /metrics", tag="operators", media="text/plain", manages=True)
async def metrics(request: Request) -> Response:
    """Every metric, in Prometheus's format."""
    data, kind = await asyncio.to_thread(render, request.app.state.metrics.registry, request.headers.get("accept", ""))
    return Response(data, headers={"content-type": kind})


@route("GET /v1/usage", tag="operators", answer=UsageRow, listed=True, manages=True)
async def usage(request: Request) -> Response:
    """The requests that have ended, and their tokens, by model and API key, since the start."""
    return json_answer({"object": "list", "data": await asyncio.to_thread(request.app.state.metrics.usage)})


@route("GET /health /v1/health", answer=Standing, statuses=(200, 503), public=True)
async def health(request: Request) -> Response:
    """200 while every engine runs or is restarted automatically, otherwise 503."""
    if request.app.state.manager.is_healthy:
        return json_answer(Standing("ok"))
    return json_answer(Standing("dead"), 503)


@route("GET /ready", answer=Readiness, statuses=(200, 503), public=True)
async def ready(request: Request) -> Response:
    """200 while the default model can answer, or was loaded before and is now unloaded.

    The next request loads an unloaded model again. Otherwise 503, for example while the model loads or sleeps.
    Requests without a valid key, and keys that may not use the model, get only the status, because the progress may
    contain names of files.
    """
    manager: ModelManager = request.app.state.manager
    if request.app.state.stopping():
        return json_answer(Readiness("stopping"), 503)
    slot = manager.slots[manager.active]
    if slot.state is ModelState.READY and slot.model is not None:
        alive = slot.model.engine.is_alive
        if alive and (slot.resting or slot.model.engine.is_sleeping):
            return json_answer(Readiness("sleeping"), 503, {"retry-after": "1"})
        return json_answer(Readiness("ready" if alive else "dead"), 200 if alive else 503)
    rested = slot.state is ModelState.UNLOADED and slot.load_seconds is not None
    told = not is_stranger(request.scope) and caller_of(request.scope).may_use(*slot.entry.names)
    loading = load_progress(slot) if told else None
    return json_answer(Readiness(slot.state.value, loading or msgspec.UNSET), 200 if rested else 503)


@route("GET /version", id="version", answer=Version)
async def server_version() -> Response:
    """The server's version."""
    return json_answer(Version(version("candle-vllm-server")))


@route("GET /", answer=Welcome)
async def root(request: Request) -> Response:
    """Name and version of this server, its models, and the address of its API."""
    entries, caller = (slot.entry for slot in request.app.state.manager.slots.values()), caller_of(request.scope)
    models = tuple(name for entry in entries if caller.may_use(*entry.names) for name in entry.names)
    return json_answer(Welcome("candle-vllm", version("candle-vllm-server"), models, "/v1"))
