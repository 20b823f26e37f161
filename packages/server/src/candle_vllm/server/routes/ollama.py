# SPDX-License-Identifier: MIT
"""`/api/chat` and related routes: Ollama's API for answers and embeddings (steps 1 and 10 of a request's life)."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Self

from fastapi import Request
from pydantic import model_validator
from starlette.responses import Response

from candle_vllm.openai import ollama
from candle_vllm.openai.protocol.fields import ModelName, WireModel, invalid
from candle_vllm.openai.remarks import remark
from candle_vllm.server import answering
from candle_vllm.server.http.body import unless_disconnected
from candle_vllm.server.http.failures import ollama_error_line
from candle_vllm.server.http.routing import caller_of, may_manage
from candle_vllm.server.http.sse import lines_form
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.models.slot import ServedModel
from candle_vllm.server.openapi.operation import OLLAMA, QUEUED, routing

router, route = routing(tag="ollama", error=ollama.Failure, naming=OLLAMA, errors=QUEUED, untyped=True)

LATEST = ":latest"


class OfModel(WireModel):
    """The name of a model, in `model` or in the older field `name`; Ollama's own client sends the other one empty."""

    model: ModelName | None = None
    name: ModelName | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if bool(self.model) == bool(self.name):
            raise invalid("model", "is needed: the name of a model (or name, not both)")
        return self

    @property
    def named(self) -> str:
        return self.model or self.name or ""


async def ollama_body(request: Request, parse: Callable[[bytes], Any], *, exact: bool = False) -> Any:
    """Return the validated body, with this server's name of the model; raises what `served_name` raises."""
    wire = await answering.parsed(request, parse)
    named = getattr(wire, "model", None)
    if not named:
        return wire
    return wire.model_copy(update={"model": await served_name(request, named, exact=exact)})


async def served_name(request: Request, name: str, *, exact: bool = False) -> str:
    """Return this server's name of a model or adapter: `name`, `name` without `:latest`, or the only model's name.

    Raises:
        ModelNotServedError: nothing has that name; without `exact`, a single model may accept any (`Catalogue.find`).
        HttpError: as `ModelManager.reach` raises it.
    """
    manager, caller = _manager(request), caller_of(request.scope)
    own = own_name(manager, name)
    if manager.catalogue.has(own):
        manager.permit(own, caller)
        return own
    names = list(dict.fromkeys((name, name.removesuffix(LATEST)))) if manager.adapters.bases() else []
    for given in [each for each in names if caller.may_use(*manager.adapters.spelled(each))] or names:
        await manager.reach(given, caller)  # raises if the API key may use none of the names
        if manager.adapters.find(given) is not None:
            return given
    manager.permit(name, caller)
    return manager.find(name, caller=caller, exact=exact).entry.names[0]


def own_name(manager: ModelManager, name: str) -> str:
    """Return `name` without `:latest` if only that is the name of a model of the catalogue; otherwise `name`."""
    return next(filter(manager.catalogue.has, (name, name.removesuffix(LATEST))), name)


# ---- answers ---------------------------------------------------------------------------------------------------------


@route(
    "POST /api/chat",
    body=ollama.ChatRequest,
    example={
        "model": "default",
        "stream": False,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    },
    answer=ollama.ChatLine,
    lines=(ollama.ChatLine, ollama.Failure),
)
async def ollama_chat(request: Request) -> Response:
    """Continue a conversation, in Ollama's form."""
    return await _generated(request, CHAT)


@route(
    "POST /api/generate",
    body=ollama.GenerateRequest,
    example={"model": "default", "stream": False, "prompt": "Why is the sky blue?"},
    answer=ollama.GenerateLine,
    lines=(ollama.GenerateLine, ollama.Failure),
)
async def ollama_generate(request: Request) -> Response:
    """Answer a prompt, in Ollama's form."""
    return await _generated(request, GENERATE)


@route(
    "POST /api/embed",
    body=ollama.EmbedRequest,
    example={"model": "default", "input": "The sky is blue."},
    answer=ollama.Vectors,
)
async def ollama_embed(request: Request) -> Response:
    """The vectors of texts, in Ollama's form."""

    def loaded(wire: ollama.EmbedRequest, times: ollama.Times) -> ollama.Vectors:
        return ollama.Vectors(model=wire.model, embeddings=(), **times.durations(), prompt_eval_count=0)

    return await _embedded(request, ollama.EmbedRequest, lambda model, wire: model.ollama.embed(wire), loaded)


@route(
    "POST /api/embeddings",
    body=ollama.EmbeddingsRequest,
    example={"model": "default", "prompt": "The sky is blue."},
    answer=ollama.Vector,
)
async def ollama_embeddings(request: Request) -> Response:
    """The vector of one text, in Ollama's older form."""
    method, empty = (lambda model, wire: model.ollama.embeddings(wire)), ollama.Vector([])
    return await _embedded(request, ollama.EmbeddingsRequest, method, lambda *_: empty)


CHAT = answering.GenerationApi(
    parse=ollama.ollama_parser(ollama.ChatRequest),
    whole=lambda model, wire: model.ollama.chat(wire),
    streamed=lambda model, wire: model.ollama.chat_stream(wire),
    form=lines_form(ollama_error_line),
    defaults=False,  # `OllamaAdapter` fills them in
)
GENERATE = answering.GenerationApi(
    parse=ollama.ollama_parser(ollama.GenerateRequest),
    whole=lambda model, wire: model.ollama.generate(wire),
    streamed=lambda model, wire: model.ollama.generate_stream(wire),
    form=CHAT.form,
    defaults=CHAT.defaults,
)


async def _generated(request: Request, api: answering.GenerationApi) -> Response:
    deadline = answering.deadline_of(request)
    wire = await ollama_body(request, api.parse)
    chats = api is CHAT
    if wire.loads and wire.keep_seconds == 0 and may_manage(request.scope):
        async with answering.in_time(deadline, request):
            base = _manager(request).find(wire.model).entry.name  # the request may name an adapter
            await unless_disconnected(_manager(request).unload(base), request.receive)
        now = time.perf_counter_ns()
        return answering.json_answer(
            ollama.loaded_line(wire.model, ollama.Times(wire.received, now), "unload", chat=chats)
        )
    _keep(request, wire)
    if wire.loads:
        times = await _loaded(request, wire, deadline)
        return answering.json_answer(ollama.loaded_line(wire.model, times, "load", chat=chats))
    return await answering.answer_parsed(request, api, wire, deadline)


async def _embedded(
    request: Request,
    kind: type[WireModel],
    method: Callable[[ServedModel, Any], Awaitable[Any]],
    loaded: Callable[[Any, ollama.Times], Any],
) -> Response:
    """Answer with vectors; for a request without a text, load the model, and answer with the result of `loaded`."""
    deadline = answering.deadline_of(request)
    wire = await ollama_body(request, ollama.ollama_parser(kind))
    _keep(request, wire)
    if wire.loads:
        return answering.json_answer(loaded(wire, await _loaded(request, wire, deadline)))
    return await answering.answer_parsed_with(request, wire, method, deadline)


async def _loaded(request: Request, wire: Any, deadline: float) -> ollama.Times:
    async with answering.in_time(deadline, request):
        lease = await unless_disconnected(
            _manager(request).acquire(wire.model), request.receive, lambda lease: lease.release()
        )
    lease.release()
    return ollama.Times(wire.received, time.perf_counter_ns())


def _keep(request: Request, wire: Any) -> None:
    """Set for how long the model stays loaded, if the request has `keep_alive` and its sender may unload models."""
    seconds = wire.keep_seconds
    if seconds is None:
        return
    if not may_manage(request.scope):
        remark(["keep_alive has no effect: only operators, who have keys of their own, may unload models"])
    elif not _manager(request).keep(wire.model, seconds):
        remark(["keep_alive has no effect: the model of this server stays loaded"])


def _manager(request: Request) -> ModelManager:
    return request.app.state.manager
