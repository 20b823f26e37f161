# SPDX-License-Identifier: MIT
"""`/api/tags` and related routes: Ollama's API for the available models (step 1 of a request's life)."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Mapping
from typing import ClassVar

import msgspec
from fastapi import Request
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from candle_vllm.core.errors import CandleVllmError
from candle_vllm.openai.ollama import Failure, ollama_parser, rfc3339
from candle_vllm.openai.protocol.fields import Refusal
from candle_vllm.openai.protocol.generation import llama_names
from candle_vllm.server.answering import json_answer
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.http.routing import Caller, caller_of
from candle_vllm.server.models.library import Description, describe, file_bytes
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.models.slot import ModelSlot
from candle_vllm.server.openapi.operation import OLLAMA, QUEUED, routing
from candle_vllm.server.routes.ollama import OfModel, ollama_body, served_name

logger = logging.getLogger(__name__)

router, route = routing(tag="ollama", error=Failure, naming=OLLAMA, untyped=True)

API_VERSION = "0.12.11"
"""The version of Ollama whose API this is; clients select features by it."""

_FAR = 253370764800  # Unix seconds of the first day of 9999
_AS_IT_IS = "it does not change the description of a model"


class Details(msgspec.Struct, frozen=True, kw_only=True):
    """The kind of a model; a field is empty if it is not known before the model is loaded."""

    parent_model: str = ""
    format: str = ""
    family: str = ""
    families: tuple[str, ...] = ()
    parameter_size: str = ""
    quantization_level: str = ""


class Tag(msgspec.Struct, frozen=True, kw_only=True):
    """A model that can be used, or an adapter, with the size and details of its base model.

    Attributes:
        modified_at: time of loading; of the request if it is not loaded.
        size: bytes of the model's weights; 0 if they are not on this machine yet.
        digest: hash of the name, not of the weights.
    """

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class Tags(msgspec.Struct, frozen=True):
    """The models and adapters that the caller may use."""

    models: tuple[Tag, ...]


class Resident(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is loaded.

    Attributes:
        size: bytes of its weights, of a full cache and of the indexer of sparse attention.
        size_vram: the part of `size` on a GPU.
        expires_at: time at which it will be unloaded if nobody uses it; in the year 9999 if it stays loaded.
        context_length: maximum tokens of a prompt and its answer together.
    """

    name: str
    model: str
    size: int
    digest: str
    details: Details
    expires_at: str
    size_vram: int
    context_length: int


class Residents(msgspec.Struct, frozen=True):
    """The models that are loaded."""

    models: tuple[Resident, ...]


class ApiVersion(msgspec.Struct, frozen=True):
    """The version of Ollama whose API this is."""

    version: str


class ShowRequest(OfModel):
    """The model to describe; `name` is the older name of `model`, and `verbose` has no effect."""

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        "system": Refusal(_AS_IT_IS, ("",)),
        "template": Refusal(_AS_IT_IS, ("",)),
        "options": Refusal(_AS_IT_IS, ({},)),
    }

    verbose: bool | None = None


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """Properties of a model.

    Attributes:
        modelfile: only a comment and `FROM` with its name.
        parameters: its sampling settings, one per line.
        template: its chat template, in Jinja.
        model_info: properties with Ollama's names.
        capabilities: completion, embedding, rerank, tools, thinking, vision.
    """

    modelfile: str
    parameters: str
    details: Details
    model_info: dict[str, str | int]
    capabilities: tuple[str, ...]
    modified_at: str
    template: str | UnsetType = UNSET


@route("GET /api/tags", answer=Tags)
async def ollama_tags(request: Request) -> Response:
    """The models and adapters that the caller may use."""
    manager: ModelManager = request.app.state.manager
    slots = sorted(manager.slots.values(), key=lambda slot: slot.entry.name != manager.active)
    infos = [(slot, None if slot.model is None else slot.model.engine.model_info) for slot in slots]
    sizes = await asyncio.to_thread(
        lambda: [file_bytes(slot.entry.settings) if info is None else info.weight_bytes for slot, info in infos]
    )
    await manager.adapters.listed()
    found = (
        Tag(name=name, model=name, modified_at=rfc3339(slot.loaded_at or time.time()), size=size, digest=digest(name),
            details=details(slot))
        for slot, size in zip(slots, sizes, strict=True) for name in _names(manager, slot, caller_of(request.scope))
    )  # fmt: skip
    return json_answer(Tags(tuple(found)))


def _names(manager: ModelManager, slot: ModelSlot, caller: Caller) -> list[str]:
    """Return the names of a model, and of its adapters, that the caller may use."""
    own = list(slot.entry.names) if caller.may_use(*slot.entry.names) else []
    adapters = (each for each in manager.adapters.all() if each.base == slot.entry.name)
    return own + [manager.adapters.called(each) for each in adapters if caller.may_use(*each.names)]


@route("GET /api/ps", answer=Residents)
async def ollama_ps(request: Request) -> Response:
    """The models that are loaded."""
    manager: ModelManager = request.app.state.manager
    found = list[Resident]()
    for slot in manager.slots.values():
        if slot.model is None or not caller_of(request.scope).may_use(*slot.entry.names):
            continue
        name, info = slot.entry.names[0], slot.model.engine.model_info
        size, expires = info.weight_bytes + info.kv_cache_bytes + info.index_bytes, manager.expires_at(slot)
        found.append(
            Resident(name=name, model=name, size=size, digest=digest(name), details=details(slot),
                     expires_at=rfc3339(_FAR if expires is None else expires),
                     size_vram=0 if info.device == "cpu" else size, context_length=info.max_model_len)
        )  # fmt: skip
    return json_answer(Residents(tuple(found)))


@route("POST /api/show", body=ShowRequest, example={"model": "default"}, answer=Shown, errors=(*QUEUED, 409))
async def ollama_show(request: Request) -> Response:
    """What is known of a model."""
    wire = await ollama_body(request, ollama_parser(ShowRequest), exact=True)
    manager: ModelManager = request.app.state.manager
    slot = manager.find(await served_name(request, wire.named, exact=True))
    if slot.model is None and slot.described is None:
        try:
            slot.described = await asyncio.to_thread(describe, slot.entry.settings)
        except CandleVllmError as error:  # its message may hold paths
            logger.warning("the model %s cannot be served: %s", slot.entry.name, error)
            message = f"The model {slot.entry.names[0]!r} cannot be served; the server's log has the reason."
            raise HttpError(409, message, "model_unusable", param="model") from None
    return json_answer(_shown(slot))


@route("GET /api/version", answer=ApiVersion)
async def ollama_version() -> Response:
    """The version of Ollama whose API this is."""
    return json_answer(ApiVersion(API_VERSION))


def _shown(slot: ModelSlot) -> Shown:
    known, settings, name = _description(slot), slot.entry.settings, slot.entry.names[0]
    assert known is not None
    drawn = llama_names({**known.sampling, **settings.default_sampling})
    about: dict[str, str | int] = {
        "general.architecture": known.architecture,
        "general.basename": name,
        "general.parameter_count": known.num_parameters,
    }
    if known.context:
        about[f"{known.architecture}.context_length"] = known.context
    if slot.model is not None and (length := slot.model.engine.model_info.embedding_size):
        about[f"{known.architecture}.embedding_length"] = length
    return Shown(
        modelfile=f"# {name} as it is served; its settings come from flags or models.yaml\nFROM {name}\n",
        parameters="\n".join(f"{field:30} {value}" for field, value in drawn.items()),
        template=UNSET if known.template is None else known.template,
        details=details(slot),
        model_info=about,
        capabilities=known.capabilities,
        modified_at=rfc3339(slot.loaded_at or time.time()),
    )


def _description(slot: ModelSlot) -> Description | None:
    """Return the description of a model: from the loaded model, or from its files if they were read."""
    if slot.model is None:
        return slot.described
    engine, choice = slot.model.engine, slot.model.adapter.planner.choice
    info, template = engine.model_info, engine.chat_conventions.chat_template
    return Description(
        format=_format(slot),
        architecture=info.architecture,
        num_parameters=info.num_parameters,
        quantization=(info.quantization or info.dtype).partition(" ")[0],
        context=info.max_model_len,
        file_bytes=info.weight_bytes,
        tasks=info.tasks,
        tools=choice.shows_tools,
        thinks=choice.reasoning is not None,
        sees="image" in info.modalities,
        template=template if isinstance(template, str) else None,
        sampling=info.default_sampling,
    )


def _format(slot: ModelSlot) -> str:
    settings = slot.entry.settings
    names = (settings.weight_file, settings.model)
    return "gguf" if any((name or "").endswith(".gguf") for name in names) else ""


def details(slot: ModelSlot) -> Details:
    """Return the kind of a slot's model."""
    known = _description(slot)
    if known is None:
        return Details(format=_format(slot))
    count = known.num_parameters  # shown as 134.52M, 7.6B
    return Details(
        format=known.format,
        family=known.architecture,
        families=(known.architecture,),
        parameter_size=(f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.2f}M") if count else "",
        quantization_level=known.quantization,
    )


def digest(name: str) -> str:
    """Return the hash of a model's name."""
    return hashlib.sha256(name.encode()).hexdigest()
