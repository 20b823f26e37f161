# SPDX-License-Identifier: MIT
"""Routes of vLLM's server beside OpenAI's: load, settings, tokenizer, sleep, pooling and classes.

Not a step of a request's life, except for `/pooling` and `/classify`. If several models are served, `?model=` or the
body's `model` selects one; `/sleep`, `/wake_up` and `/is_sleeping` without it are for every loaded model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import Request
from starlette.responses import Response

from candle_vllm.core.engine.runners.sleeping import MODES, TAGS
from candle_vllm.core.errors import CandleVllmError, ConfigError, EngineDeadError
from candle_vllm.openai.embedding import parse_classify_request, parse_pooling_request
from candle_vllm.openai.protocol.embeddings import ClassifiedList, ClassifyRequest, PooledList, PoolingRequest
from candle_vllm.server import answering
from candle_vllm.server.http.body import unless_disconnected
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.loop_threads import in_thread
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.models.slot import ModelSlot, ServedModel
from candle_vllm.server.observing.model_metrics import ServedEngine
from candle_vllm.server.openapi.operation import MODEL_ERRORS, QUEUED, WHICH, routing
from candle_vllm.server.routes.status import Standing, health
from candle_vllm.server.settings.options import shown
from candle_vllm.server.settings.table import OPTIONS

router, route = routing()

_LOOK = 0.02  # seconds between two checks whether all requests have ended
_EACH = {"model": {"type": "string", "description": "A served name; without it every loaded model."}}


class Load(msgspec.Struct, frozen=True):
    """The load of the server: requests that run, wait in a queue, or wait for a model to load."""

    server_load: int


class Sleeping(msgspec.Struct, frozen=True):
    """Whether at least one of the models sleeps, or finishes its requests before it sleeps."""

    is_sleeping: bool


class ServerInfo(msgspec.Struct, frozen=True):
    """The settings of the server; secrets are hidden."""

    version: str
    vllm_config: dict[str, Any]


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Properties of the model's tokenizer, without vLLM's `tokenizer_class`: no class of transformers tokenizes here.

    Attributes:
        model_max_length: maximum tokens of prompt and output together.
        special_tokens: ids of the special tokens, by their text.
        chat_template: Jinja; None for a model without a template.
    """

    model_max_length: int
    vocab_size: int
    special_tokens: dict[str, int]
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    unk_token: str | None = None
    chat_template: str | None = None


@route("GET /ping", tag="server", answer=Standing, statuses=(200, 503), public=True)
async def ping(request: Request) -> Response:
    """The same as /health."""
    return await health(request)


@route("GET /load", tag="server", answer=Load)
async def load(request: Request) -> Response:
    """How many requests run or wait."""
    manager: ModelManager = request.app.state.manager
    return answering.json_answer(Load(sum(slot.in_flight + len(slot.waiters) for slot in manager.slots.values())))


@route("GET /server_info", tag="operators", answer=ServerInfo, manages=True)
async def server_info(request: Request) -> Response:
    """What the server was started with, without secrets."""
    settings = request.app.state.settings
    config = {option.name: shown(option, getattr(settings, option.name)) for option in OPTIONS}
    return answering.json_answer(ServerInfo(version("candle-vllm-server"), config))


@route("GET /tokenizer_info", tag="tokens", answer=TokenizerInfo, errors=(*MODEL_ERRORS, 504), query=WHICH)
async def tokenizer_info(request: Request) -> Response:
    """What is known of the model's tokenizer."""
    return await answering.answer_about(request, _tokenizer)


def template_of(model: ServedModel) -> str | None:
    """Return the chat template of a model; the default one of several."""
    source = model.engine.chat_conventions.chat_template
    return source if source is None or isinstance(source, str) else source.get("default")


def _tokenizer(model: ServedModel) -> TokenizerInfo:
    info, conventions = model.engine.model_info, model.engine.chat_conventions
    names = {name: conventions.token_names.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return TokenizerInfo(
        model_max_length=info.max_model_len,
        vocab_size=info.vocab_size,
        special_tokens=dict(conventions.special_tokens),
        chat_template=template_of(model),
        **names,
    )


@route("POST /reset_prefix_cache", tag="operators", statuses=(204,), manages=True)
async def reset_prefix_cache(request: Request) -> Response:
    """Drop all blocks of the loaded models' prefix caches."""
    manager: ModelManager = request.app.state.manager
    for slot in manager.slots.values():
        if slot.model is not None:
            slot.model.engine.reset_prefix_cache()
    return Response(status_code=204)


@route(
    "POST /sleep",
    tag="operators",
    media="",
    errors=(400, 404, 409, 503),
    query={
        "level": {
            "type": "integer",
            "enum": [1, 2],
            "default": 1,
            "description": "1 frees the KV cache and the GPU memory of the weights, 2 also the weights in main memory.",
        },
        "mode": {
            "type": "string",
            "enum": ["abort", "wait"],
            "default": "abort",
            "description": "Whether requests that run or wait end now, or are waited for.",
        },
        **_EACH,
    },
    manages=True,
)
async def sleep(request: Request) -> Response:
    """Make loaded models release their memory; further requests to them are refused with 503."""
    level, mode = request.query_params.get("level", "1"), request.query_params.get("mode", "abort")
    if level not in ("1", "2"):
        raise HttpError(400, f"level {level!r:.40}: 1 (keep the weights in memory) or 2 (drop them).", "wrong_level")
    if mode not in MODES:
        raise HttpError(400, f"mode {mode!r:.40}: {' or '.join(MODES)}.", "wrong_mode")
    slots = [slot for slot, _ in _engines(request)] if mode == "wait" else []
    for slot in slots:
        slot.resting += 1
    try:
        while any(slot.in_flight for slot in slots):  # also requests that have not reached the engine
            await unless_disconnected(asyncio.sleep(_LOOK), request.receive)
        return await _each_engine(request, lambda engine: engine.sleep(int(level), mode))
    finally:
        for slot in slots:
            slot.resting -= 1


@route(
    "POST /wake_up",
    tag="operators",
    media="",
    errors=(400, 404, 409, 503),
    query={
        "tags": {
            "type": "array",
            "items": {"type": "string", "enum": ["weights", "kv_cache"]},
            "description": "What to load again; both if absent. Requests are accepted when both are loaded.",
        },
        **_EACH,
    },
    manages=True,
)
async def wake_up(request: Request) -> Response:
    """Make sleeping models load what they released."""
    tags = request.query_params.getlist("tags")
    if not TAGS.issuperset(tags):
        raise HttpError(400, f"tags {tags!r:.100}: {' and '.join(sorted(TAGS))} are possible.", "wrong_tags")
    return await _each_engine(request, lambda engine: engine.wake_up(tags or None))


@route("GET /is_sleeping", tag="operators", answer=Sleeping, errors=(404,), query=_EACH, manages=True)
async def is_sleeping(request: Request) -> Response:
    """Whether the named model, or any loaded model, sleeps."""
    asleep = any(slot.resting > 0 or engine.is_sleeping for slot, engine in _engines(request))
    return answering.json_answer(Sleeping(asleep))


def _engines(request: Request) -> list[tuple[ModelSlot, ServedEngine]]:
    """Return the slots and engines of the loaded models, or of the named one, if it is loaded."""
    manager: ModelManager = request.app.state.manager
    name = request.query_params.get("model")
    slots = [manager.find(name, exact=True)] if name else manager.slots.values()
    return [(slot, slot.model.engine) for slot in slots if slot.model is not None]


async def _each_engine(request: Request, work: Callable[[ServedEngine], None]) -> Response:
    engines = _engines(request)
    try:
        for _, engine in engines:
            await in_thread(lambda engine=engine: work(engine), "sleep")
    except (EngineDeadError, ConfigError):
        raise
    except CandleVllmError as error:
        raise HttpError(409, str(error), "cannot_sleep") from error
    return Response(status_code=200)


@route(
    "POST /pooling",
    tag="vectors and scores",
    body=PoolingRequest,
    example={"input": "The sky is blue."},
    answer=PooledList,
    octets=True,
    errors=QUEUED,
)
async def pool(request: Request) -> Response:
    """Return the pooled outputs of texts, in vLLM's form."""
    return await answering.answer_with(
        request, parse_pooling_request, lambda model, wire: model.adapter.embedding.pool(wire)
    )


@route(
    "POST /classify",
    tag="vectors and scores",
    body=ClassifyRequest,
    example={"input": "The sky is blue."},
    answer=ClassifiedList,
    errors=QUEUED,
)
async def classify(request: Request) -> Response:
    """Return the class of each text, in vLLM's form."""
    return await answering.answer_with(
        request, parse_classify_request, lambda model, wire: model.adapter.embedding.classify(wire)
    )
