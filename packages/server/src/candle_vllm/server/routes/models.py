# SPDX-License-Identifier: MIT
"""`/v1/models` and `/v1/queues`: which models there are, how an operator loads, unloads and chooses them, who waits.

Step 1 of a request's life.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from candle_vllm.server.answering import parsed
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.http.routing import caller_of
from candle_vllm.server.loop_threads import in_thread
from candle_vllm.server.models.cards import (
    anthropic_card,
    anthropic_list,
    cards,
    parse_model_request,
    parse_new_model,
    queues,
    slot_status,
    status,
)
from candle_vllm.server.models.inventory import take_stock
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.routes.ollama_library import may_change
from candle_vllm.server.settings.options import UsageError

if TYPE_CHECKING:
    from candle_vllm.server.reloading import Reloader

router = APIRouter()

_ANTHROPIC = "anthropic-version"  # a header that Anthropic's clients always send


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """All served names, loaded or not; the default first. Anthropic's clients get Anthropic's list."""
    listed = await cards(request.app.state.manager, caller_of(request.scope))
    if _ANTHROPIC in request.headers:
        return _json(anthropic_list(listed))
    most = str(request.app.state.settings.max_body_mb << 20)  # by which the page keeps its images small enough
    return _json({"object": "list", "data": listed}, headers={"x-max-body-bytes": most})


@router.get("/v1/models/status")
async def models_status(request: Request) -> Response:
    """What is loaded, what waits, and what went wrong."""
    return _json(status(request.app.state.manager))


@router.get("/v1/models/inventory")
async def models_inventory(request: Request) -> Response:
    """What the models take and whether they fit, known names, and what is being fetched."""
    state, manager = request.app.state, request.app.state.manager
    slots = sorted(manager.slots.values(), key=lambda slot: slot.entry.name != manager.active)
    settings = dataclasses.replace(state.settings, model=None, weight_path=None, weight_file=None)
    changes = state.settings.allow_model_changes and may_change(state.settings)
    found = await in_thread(lambda: take_stock(manager, slots, settings, state.pulls.all, changes=changes), "inventory")
    return _json(found)


@router.post("/v1/models/load")
async def load_model(request: Request) -> Response:
    """Loads a model and answers when it is ready."""
    wanted = await parsed(request, parse_model_request)
    manager: ModelManager = request.app.state.manager
    return _json(slot_status(await manager.load(wanted.name)))


@router.post("/v1/models/unload")
async def unload_model(request: Request) -> Response:
    """Lets a model finish its requests, unloads it, and answers when it is gone."""
    wanted = await parsed(request, parse_model_request)
    manager: ModelManager = request.app.state.manager
    return _json(slot_status(await manager.unload(wanted.name)))


@router.post("/v1/models/select")
async def select_model(request: Request) -> Response:
    """Makes a model the default and begins to load it: 200 when it is ready, 202 while it is not."""
    wanted = await parsed(request, parse_model_request)
    manager: ModelManager = request.app.state.manager
    slot = manager.select(wanted.name)
    ready = slot.model is not None
    answer = {"status": "ready" if ready else "switching", "model": slot.entry.name, "queue_length": len(slot.waiters)}
    return _json(answer, 200 if ready else 202)


@router.post("/v1/models/reload")
async def reload_models(request: Request) -> Response:
    """Reads models.yaml again."""
    reloader = _reloader(request)
    with _told():
        return _json(await reloader.reload_models())


@router.post("/v1/models/add")
async def add_model(request: Request) -> Response:
    """Serves one model more, until the server ends."""
    wanted = await parsed(request, parse_new_model)  # a wrong request is named before it is refused
    reloader = _reloader(request)
    with _told():
        return _json(slot_status(await reloader.add(wanted.model_dump(exclude_none=True))))


@router.post("/v1/models/remove")
async def remove_model(request: Request) -> Response:
    """Serves a model no more; what it was asked is finished."""
    wanted = await parsed(request, parse_model_request)
    reloader = _reloader(request)
    with _told():
        return _json(await reloader.remove(wanted.name))


def _reloader(request: Request) -> Reloader:
    """What changes the models, where the operator allows that."""
    if not request.app.state.settings.allow_model_changes:
        message = "This server's models stay as they are: it was started without --allow-model-changes."
        raise HttpError(403, message, "model_changes_off")
    reloader: Reloader | None = request.app.state.reloader
    if reloader is None:
        raise HttpError(409, "The model of this server stays loaded.", "model_stays")
    return reloader


@contextmanager
def _told() -> Iterator[None]:
    """What is wrong in a file or in a request for a model, for its sender."""
    try:
        yield
    except UsageError as error:
        raise HttpError(400, str(error), "wrong_model") from None


@router.get("/v1/queues")
async def list_queues(request: Request) -> Response:
    """The requests that wait, for every model."""
    return _json(queues(request.app.state.manager.slots.values()))


@router.get("/v1/queues/{model_id:path}")
async def get_queue(request: Request, model_id: str) -> Response:
    """The requests that wait for one model; names may hold slashes."""
    manager: ModelManager = request.app.state.manager
    return _json(queues([manager.find(model_id, exact=True)]))


@router.get("/v1/models/{model_id:path}")
async def get_model(request: Request, model_id: str) -> Response:
    """One served name; names may hold slashes."""
    listed = await cards(request.app.state.manager, caller_of(request.scope))
    for card in listed:
        if card.id == model_id:
            return _json(anthropic_card(card) if _ANTHROPIC in request.headers else card)
    served = ", ".join(card.id for card in listed)[:1000]
    message = f"The model {model_id!r:.200} does not exist here; served: {served}."
    raise HttpError(404, message, "model_not_found", param="model")
