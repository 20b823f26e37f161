# SPDX-License-Identifier: MIT
"""`/v1/models` and `/v1/queues`: lists of models; operators load, select, add and remove them, and see their queues.

Step 1 of a request's life.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import Request
from starlette.responses import Response

from candle_vllm.server.answering import body_of, deadline_of, in_time, json_answer
from candle_vllm.server.http.body import unless_disconnected
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.http.failures import speaks_anthropic
from candle_vllm.server.http.routing import caller_of
from candle_vllm.server.loop_threads import in_thread
from candle_vllm.server.models import cards
from candle_vllm.server.models.inventory import Inventory, take_stock
from candle_vllm.server.models.manager import Changes, ModelManager
from candle_vllm.server.openapi.operation import MODEL_ERRORS, routing
from candle_vllm.server.settings.options import UsageError

if TYPE_CHECKING:
    from candle_vllm.server.reloading import Reloader

router, route = routing(tag="operators", manages=True)
_CARDS = (cards.LoadedCard, cards.UnloadedCard, cards.AdapterCard)
_NAMED: dict[str, Any] = {"body": cards.ModelRequest, "example": {"model": "default"}}


class Selected(msgspec.Struct, frozen=True):
    """The selected model: "ready" if it is the default now, "switching" if it becomes the default once it is loaded."""

    status: str
    model: str
    queue_length: int


@route("GET /v1/models", tag="models", answer=_CARDS, listed=True, manages=False)
async def list_models(request: Request) -> Response:
    """The names of models and adapters that the caller may use, the default first.

    Anthropic's clients get Anthropic's list.
    """
    listed = await cards.visible_cards(request.app.state.manager, caller_of(request.scope))
    if speaks_anthropic(request.scope):
        return json_answer(cards.anthropic_list(listed))
    most = str(request.app.state.settings.max_body_mb << 20)  # the web UI keeps its requests with images below this
    return json_answer({"object": "list", "data": listed}, headers={"x-max-body-bytes": most})


@route("GET /v1/models/status", answer=cards.ManagerStatus)
async def models_status(request: Request) -> Response:
    """The state of all models: which are loaded, what waits, and errors."""
    return json_answer(cards.status(request.app.state.manager))


@route("GET /v1/models/inventory", answer=Inventory, errors=(403,))
async def models_inventory(request: Request) -> Response:
    """Served models, models with a short name, and downloads: their sizes, and whether memory holds them."""
    state, manager = request.app.state, request.app.state.manager
    slots = sorted(manager.slots.values(), key=lambda slot: slot.entry.name != manager.active)
    settings = state.settings
    changes = settings.allow_model_changes and settings.is_guarded
    found = await in_thread(lambda: take_stock(manager, slots, settings, state.pulls.all, changes=changes), "inventory")
    return json_answer(found)


@route("POST /v1/models/load", **_NAMED, answer=cards.SlotStatus, errors=MODEL_ERRORS)
async def load_model(request: Request) -> Response:
    """Load a model; responds when it is ready."""
    wanted: cards.ModelRequest = await body_of(request, cards.ModelRequest)
    return json_answer(cards.slot_status(await request.app.state.manager.load(wanted.name)))


@route("POST /v1/models/unload", **_NAMED, answer=cards.SlotStatus, errors=(*MODEL_ERRORS, 409, 504))
async def unload_model(request: Request) -> Response:
    """Unload a model after its running requests; responds when it is unloaded."""
    deadline, wanted = deadline_of(request), await body_of(request, cards.ModelRequest)
    manager: ModelManager = request.app.state.manager
    async with in_time(deadline, request):
        return json_answer(cards.slot_status(await unless_disconnected(manager.unload(wanted.name), request.receive)))


@route("POST /v1/models/select", **_NAMED, answer=Selected, statuses=(200, 202), errors=MODEL_ERRORS)
async def select_model(request: Request) -> Response:
    """Make a model the default once it is loaded, and begin to load it.

    The status is 200 if it is loaded already, otherwise 202.
    """
    wanted: cards.ModelRequest = await body_of(request, cards.ModelRequest)
    manager: ModelManager = request.app.state.manager
    slot = manager.select(wanted.name)
    ready = manager.switch_requested_at is None
    answer = Selected("ready" if ready else "switching", slot.entry.name, len(slot.waiters))
    return json_answer(answer, 200 if ready else 202)


@route("POST /v1/models/reload", answer=Changes, errors=(400, 409))
async def reload_models(request: Request) -> Response:
    """Read models.yaml again, where the operator allows that."""
    reloader = _reloader(request)
    with _told():
        return json_answer(await reloader.reload_models())


@route(
    "POST /v1/models/add",
    body=cards.NewModelRequest,
    example={"name": "small", "hf_id": "HuggingFaceTB/SmolLM2-135M-Instruct", "params": {"mem": 512}},
    answer=cards.SlotStatus,
    errors=(400, 409),
)
async def add_model(request: Request) -> Response:
    """Serve one more model, where the operator allows that."""
    wanted: cards.NewModelRequest = await body_of(request, cards.NewModelRequest)
    reloader = _reloader(request)  # after the body, whose errors are reported before the refusal
    with _told():
        return json_answer(cards.slot_status(await reloader.add(wanted.model_dump(exclude_none=True))))


@route("POST /v1/models/remove", body=cards.ModelRequest, example={"model": "small"}, answer=Changes, errors=(404, 409))
async def remove_model(request: Request) -> Response:
    """Stop serving a model, where the operator allows that."""
    wanted: cards.ModelRequest = await body_of(request, cards.ModelRequest)
    reloader = _reloader(request)
    with _told():
        return json_answer(await reloader.remove(wanted.name))


def _reloader(request: Request) -> Reloader:
    """Return the reloader; HttpError 403 if the operator does not allow changes, 409 if the server has no reloader."""
    if not request.app.state.settings.allow_model_changes:
        message = "Models cannot be changed: this server was started without --allow-model-changes."
        raise HttpError(403, message, "model_changes_off")
    reloader: Reloader | None = request.app.state.reloader
    if reloader is None:
        raise HttpError(409, "The model of this server stays loaded.", "model_stays")
    return reloader


@contextmanager
def _told() -> Iterator[None]:
    """Context manager that converts a UsageError, from a settings file or a request's body, to HttpError 400."""
    try:
        yield
    except UsageError as error:
        raise HttpError(400, str(error), "wrong_model") from None


@route("GET /v1/queues", id="queues", answer=cards.Queues)
async def list_queues(request: Request) -> Response:
    """The waiting requests of all models."""
    return json_answer(cards.queues(request.app.state.manager.slots.values()))


@route("GET /v1/queues/{model_id:path}", answer=cards.Queues, errors=(404,))
async def queue_of_model(request: Request, model_id: str) -> Response:
    """The waiting requests of one model."""
    return json_answer(cards.queues([request.app.state.manager.find(model_id, exact=True)]))


@route("GET /v1/models/{model_id:path}", tag="models", answer=_CARDS, errors=(404,), manages=False)
async def get_model(request: Request, model_id: str) -> Response:
    """One served name."""
    listed = await cards.visible_cards(request.app.state.manager, caller_of(request.scope))
    for card in listed:
        if card.id == model_id:
            return json_answer(cards.anthropic_card(card) if speaks_anthropic(request.scope) else card)
    served = ", ".join(card.id for card in listed)[:1000]
    message = f"The model {model_id!r:.200} does not exist here; served models are: {served}."
    raise HttpError(404, message, "model_not_found", param="model")
