# SPDX-License-Identifier: MIT
"""`/v1/load_lora_adapter`, `/v1/unload_lora_adapter` and `/lora-adapters`: LoRA adapters as in vLLM and llama.cpp.

Not a step of a request's life: the `model` of a request can name an adapter without any of these routes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import Request
from pydantic import Field, TypeAdapter, ValidationError
from starlette.responses import PlainTextResponse, Response

from candle_vllm.core.engine.requests import MAX_ADAPTER_NAME, MAX_ADAPTER_PATH, LoRARequest
from candle_vllm.core.errors import AdapterError, ModelNotFoundError, RequestError
from candle_vllm.core.models.jina_tasks import adapter_exists
from candle_vllm.openai.protocol.fields import Name, WireModel
from candle_vllm.openai.protocol.generation import LoraScale, LoraScales, lora_scales
from candle_vllm.openai.remarks import remark
from candle_vllm.server.adapters.registry import Adapter
from candle_vllm.server.answering import body_of, json_answer, parsed
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.http.routing import caller_of
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.models.slot import ModelSlot
from candle_vllm.server.openapi.operation import MODEL_ERRORS, WHICH, routing

router, route = routing(tag="operators", manages=True)

_INVALID, _NOT_FOUND = "InvalidUserInput", "NotFoundError"  # error codes of vLLM


class LoadAdapterRequest(WireModel):
    """A LoRA adapter in files of this machine or from a resolver, and the name under which it is served.

    Attributes:
        lora_path: a PEFT folder, a GGUF adapter, or a name that a resolver knows.
        load_inplace: whether it may replace an adapter of the same name.
        base_model_name: its base model; by default the first that supports adapters, the default model first.
        is_3d_lora_weight: no effect, because an adapter's files say how they store experts.
    """

    lora_name: Annotated[str, Field(max_length=MAX_ADAPTER_NAME)] = ""
    lora_path: Annotated[str, Field(max_length=MAX_ADAPTER_PATH)] = ""
    load_inplace: bool = False
    base_model_name: Name | None = None
    is_3d_lora_weight: bool = False


class UnloadAdapterRequest(WireModel):
    """The name of the adapter to unload; `lora_int_id` has no effect."""

    lora_name: Annotated[str, Field(max_length=MAX_ADAPTER_NAME)] = ""
    lora_int_id: int | None = None


class NumberedAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter as llama.cpp lists it.

    Attributes:
        id: its number, which the field `lora` of a request uses.
        path: name of its files without their folder, which stays private; or its name in its source.
        scale: its scale in requests that name no adapter.
        name: its name, which the field `model` of a request uses.
    """

    id: int
    path: str
    scale: float
    name: str


class Succeeded(msgspec.Struct, frozen=True):
    """The change is done."""

    success: bool = True


@route(
    "POST /v1/load_lora_adapter",
    body=LoadAdapterRequest,
    example={"lora_name": "tone", "lora_path": "/srv/adapters/tone"},
    media="text/plain",
    errors=(*MODEL_ERRORS, 409),
)
async def load_lora_adapter(request: Request) -> Response:
    """Load an adapter and serve it by a name; answers when it is in memory."""
    wanted: LoadAdapterRequest = await body_of(request, LoadAdapterRequest)
    manager = _changeable(request)
    name = wanted.lora_name
    if not name or not wanted.lora_path:
        raise HttpError(400, "Both 'lora_name' and 'lora_path' must be provided.", _INVALID)
    if manager.catalogue.has(name) or not name.isprintable():
        raise HttpError(400, f"{name!r:.200} is the name of a model, or not a valid name.", _INVALID, param="lora_name")
    if manager.adapters.spelled(name)[0] != name:
        message = f"{name!r:.200} begins with the name of a model: set 'base_model_name' instead."
        raise HttpError(400, message, _INVALID, param="lora_name")
    slot = _base(manager, wanted.base_model_name)
    _refuse_second(manager, slot, wanted)
    adapter = manager.adapters.in_place(await _files(manager, wanted, slot.entry.name))
    held = manager.adapters.use(adapter)
    try:
        lease = await manager.acquire(slot.entry.name)
        try:
            asked, engine = adapter.request, lease.model.engine
            asked = LoRARequest(asked.lora_name, lora_path=asked.lora_path, load_inplace=wanted.load_inplace)
            info = await asyncio.to_thread(engine.add_lora, asked)
            if adapter.pinned:
                await asyncio.to_thread(engine.pin_lora, asked.lora_name)
            _refuse_second(manager, slot, wanted)  # another request may have loaded it meanwhile
            replaced = manager.adapters.add(adapter)
            if replaced is not None and replaced.request.lora_name != asked.lora_name:
                await asyncio.to_thread(engine.remove_lora, replaced.request.lora_name)
        finally:
            lease.release()
    except (AdapterError, ModelNotFoundError) as error:
        raise HttpError(400, f"The adapter cannot be used: {error}", "adapter_refused", param="lora_path") from None
    finally:
        held()
    remark([f"rank {info.rank}, {info.modules} matrices, norm {info.delta_norm:.4g}", *info.notes])
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


def _refuse_second(manager: ModelManager, slot: ModelSlot, wanted: LoadAdapterRequest) -> None:
    if manager.adapters.find(f"{slot.entry.names[0]}:{wanted.lora_name}") is not None and not wanted.load_inplace:
        message = f"The lora adapter '{wanted.lora_name}' has already been loaded."
        more = " If you want to load the adapter in place, set 'load_inplace' to True."
        raise HttpError(400, message + more, _INVALID, param="lora_name")


async def _files(manager: ModelManager, wanted: LoadAdapterRequest, base: str) -> Adapter:
    """Return an adapter whose files are on this machine or are fetched by a resolver; HttpError 404 without files."""
    path, local = wanted.lora_path, Path(os.path.expanduser(wanted.lora_path))
    if await asyncio.to_thread(adapter_exists, local):
        return Adapter(name=wanted.lora_name, base=base, path=local, root=local.name)
    if (found := await manager.adapters.fetch(path, wanted.lora_name, base)) is None:
        raise HttpError(404, f"There is no adapter at {path!r:.200}.", _NOT_FOUND, param="lora_path")
    return found


@route(
    "POST /v1/unload_lora_adapter",
    body=UnloadAdapterRequest,
    example={"lora_name": "tone"},
    media="text/plain",
    errors=(*MODEL_ERRORS, 409),
)
async def unload_lora_adapter(request: Request) -> Response:
    """Stop serving an adapter; running answers finish with it."""
    wanted: UnloadAdapterRequest = await body_of(request, UnloadAdapterRequest)
    manager, name = _changeable(request), wanted.lora_name
    if not name:
        raise HttpError(400, "'lora_name' needs to be provided to unload a LoRA adapter.", _INVALID)
    known = manager.adapters.find(name)
    if known is None:
        raise HttpError(404, f"The lora adapter '{name}' cannot be found.", _NOT_FOUND, param="lora_name")
    manager.adapters.forget(known)
    model = manager.slots[known.base].model
    if model is not None:
        await asyncio.to_thread(model.engine.remove_lora, known.request.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _changeable(request: Request) -> ModelManager:
    """Return the model manager; raises HttpError if clients may not change adapters, or no model supports adapters."""
    state = request.app.state
    if not state.settings.allow_runtime_lora:
        message = "Adapters cannot be changed: this server was started without --allow-runtime-lora."
        raise HttpError(403, message, "adapter_changes_off")
    manager: ModelManager = state.manager
    if not manager.adapters.bases():
        raise HttpError(409, "The models of this server do not support adapters (--enable-lora).", "adapters_off")
    return manager


def _base(manager: ModelManager, name: str | None) -> ModelSlot:
    """Return the named model, or `bases()[0]` for None; HttpError 409 if the named model does not support adapters."""
    slot = manager.slots[manager.adapters.bases()[0].name] if name is None else manager.find(name, exact=True)
    if not slot.entry.settings.enable_lora:
        raise HttpError(409, f"The model {slot.entry.names[0]!r} does not support adapters.", "adapters_off")
    return slot


# ---- routes of llama.cpp ---------------------------------------------------------------------------------------------


@route(
    "GET /lora-adapters",
    tag="server",
    query=WHICH,
    answer=NumberedAdapter,
    bare=True,
    errors=(403, *MODEL_ERRORS),
    manages=False,
)
async def list_lora_adapters(request: Request) -> Response:
    """The adapters that the operator named, with their numbers and scales, in llama.cpp's form."""
    manager, caller = request.app.state.manager, caller_of(request.scope)
    found = manager.adapters.numbered(_asked(request).entry.name)
    return json_answer([
        NumberedAdapter(id=each.number, path=each.root, scale=each.scale, name=each.name)
        for each in found if caller.may_use(*each.names)
    ])  # fmt: skip


@route(
    "POST /lora-adapters",
    query=WHICH,
    body=LoraScale,
    bare_body=True,
    example=[{"id": 0, "scale": 0.5}],
    answer=Succeeded,
    errors=MODEL_ERRORS,
)
async def scale_lora_adapters(request: Request) -> Response:
    """Set the scale of each adapter in requests that name no adapter, in llama.cpp's form.

    An adapter that the body does not name gets the scale 0.
    """
    scales = await parsed(request, _read_scales)
    manager: ModelManager = request.app.state.manager
    manager.adapters.scale(_asked(request).entry.name, scales)
    return json_answer(Succeeded())


def _asked(request: Request) -> ModelSlot:
    manager: ModelManager = request.app.state.manager
    name, caller = request.query_params.get("model") or None, caller_of(request.scope)
    manager.permit(name, caller)
    return manager.find(name, caller=caller)


_LIST: TypeAdapter[Sequence[LoraScale]] = TypeAdapter(LoraScales)


def _read_scales(body: bytes) -> Mapping[int, float]:
    try:
        scales = lora_scales(_LIST.validate_json(body))
    except (ValidationError, RequestError) as error:
        said: Any = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise HttpError(400, f"The body must be a list of id and scale: {said}", "invalid_value") from None
    return scales or {}
