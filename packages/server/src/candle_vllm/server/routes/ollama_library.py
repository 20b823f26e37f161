# SPDX-License-Identifier: MIT
"""`/api/pull`, `/api/copy` and `/api/delete`: Ollama's API for downloading, naming and deleting models.

Not a step of a request's life. The operator must allow these routes; clients need a key, or are on this machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any, ClassVar

import msgspec
from fastapi import Request
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from candle_vllm.core.errors import CandleVllmError, ModelNotFoundError
from candle_vllm.openai.ollama import Failure, ollama_parser
from candle_vllm.openai.ollama.request import Streams
from candle_vllm.openai.protocol.fields import Name, Refusal, WireModel
from candle_vllm.server.answering import json_answer, parsed
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.http.failures import ollama_error_line
from candle_vllm.server.http.sse import EventStream, lines_form
from candle_vllm.server.loop_threads import in_thread
from candle_vllm.server.models.downloads import Local, find_downloaded, remove
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.models.pulls import Pull, Pulls, failure_code
from candle_vllm.server.openapi.operation import OLLAMA, routing
from candle_vllm.server.routes.ollama import LATEST, OfModel, own_name
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.catalogue import ModelEntry
from candle_vllm.server.settings.model_names import PullError
from candle_vllm.server.settings.options import UsageError

router, route = routing(tag="ollama", error=Failure, naming=OLLAMA, manages=True, untyped=True)


def refuse_open_changes(settings: Settings) -> None:
    """Raise UsageError if everybody who reaches the server could download and delete models, or load adapters."""
    for flag, is_set, what in (
        ("--allow-model-changes", settings.allow_model_changes, "download and delete models"),
        ("--allow-runtime-lora", settings.allow_runtime_lora, "load files of this machine"),
    ):
        if is_set and not settings.is_guarded:
            raise UsageError(
                f"{flag} lets everybody who reaches {settings.host} {what}: set --api-key and --management-key, or "
                "listen at 127.0.0.1"
            )


class PullRequest(OfModel):
    """A model of Hugging Face to download: `org/name:Q4_K_M`, or a known name. `stream` is true by default."""

    refused_fields: ClassVar[Mapping[str, Refusal]] = {
        "insecure": Refusal("downloads are always checked", (False,)),
        "username": Refusal("the operator sets the token (--hf-token)", ("",)),
        "password": Refusal("the operator sets the token (--hf-token)", ("",)),
    }

    stream: Streams = True


class StopRequest(OfModel):
    """A model whose download is to be stopped; `remove` also deletes the downloaded part."""

    remove: bool = False


class DeleteRequest(OfModel):
    """A downloaded model whose files are to be removed, or the name of a copy."""


class CopyRequest(WireModel):
    """The name `destination` for the model `source`, until the server ends or reads models.yaml again."""

    source: Name
    destination: Name


class PullLine(msgspec.Struct, frozen=True, kw_only=True):
    """The progress of a pull; `total` and `completed` are bytes."""

    status: str
    digest: str | UnsetType = UNSET
    total: int | UnsetType = UNSET
    completed: int | UnsetType = UNSET


@route(
    "POST /api/pull",
    body=PullRequest,
    example={"model": "qwen3:0.6b", "stream": False},
    answer=PullLine,
    lines=(PullLine, Failure),
    errors=(404, 502, 503),
)
async def ollama_pull(request: Request) -> Response:
    """Fetch a model of Hugging Face, where the operator allows that.

    The weights are compared with the hub's checksums, and the model is served from then on.
    """
    wire: PullRequest = await _allowed(request, PullRequest)
    pulls: Pulls = request.app.state.pulls
    if pulls.is_full:
        raise HttpError(503, "Too many models are being downloaded already.", "overloaded", {"retry-after": "30"})
    try:
        pull = await pulls.begin(wire.named)
    except CandleVllmError as error:
        code = failure_code(error)
        raise HttpError(502 if code == "hub_unreachable" else 404, str(error), code, param="model") from None
    if wire.stream:
        return EventStream(_lines(pull), lines_form(_failed_line))
    try:
        async for _ in pull.follow():
            pass
    except CandleVllmError as error:
        raise HttpError(502, str(error), failure_code(error)) from None
    return json_answer(PullLine(status="success"))


@route("DELETE /api/pull", body=StopRequest, example={"model": "qwen3:0.6b"}, errors=(403, 404))
async def ollama_stop_pull(request: Request) -> Response:
    """Stop fetching a model; what has arrived is kept or removed."""
    wire: StopRequest = await _allowed(request, StopRequest)
    pulls: Pulls = request.app.state.pulls
    pull = pulls.find(wire.named)
    if pull is None:
        raise HttpError(404, f"The model {wire.named!r} is not being downloaded.", "model_not_found", param="model")
    await pulls.stop(pull, remove=wire.remove)
    return Response()


@route("POST /api/copy", body=CopyRequest, example={"source": "default", "destination": "mine"}, errors=(404, 409))
async def ollama_copy(request: Request) -> Response:
    """Give a model another name, where the operator allows that.

    It has the name until the server ends or reads models.yaml again.
    """
    wire: CopyRequest = await _allowed(request, CopyRequest)
    manager: ModelManager = request.app.state.manager
    entry, name = manager.find(own_name(manager, wire.source), exact=True).entry, wire.destination.removesuffix(LATEST)
    if not name.isprintable() or name.strip() != name or not name:
        raise HttpError(400, f"{wire.destination!r:.200} is not a valid name.", "invalid_value", param="destination")
    try:
        manager.change(entry, dataclasses.replace(entry, aliases=(*entry.names, name)))
    except UsageError as error:
        raise HttpError(409, str(error), "name_taken", param="destination") from None
    return Response()


@route("DELETE /api/delete", body=DeleteRequest, example={"model": "qwen3:0.6b"}, errors=(404, 409))
async def ollama_delete(request: Request) -> Response:
    """Remove a fetched model, where the operator allows that.

    Of a copy, only the name is removed. A fetched model is not served any more, and its files are deleted.
    """
    wire: DeleteRequest = await _allowed(request, DeleteRequest)
    manager: ModelManager = request.app.state.manager
    async with request.app.state.pulls.removing:
        settings, name = request.app.state.settings, own_name(manager, wire.named)
        entry = manager.find(name, exact=True).entry
        pulled = await in_thread(lambda: _names_file(settings, name, entry), "find-model")
        entry = manager.find(name, exact=True).entry  # another request may have removed it
        if not pulled and name in entry.names and name not in entry.settings.served_model_name:  # operators' names stay
            left = tuple(each for each in entry.names if each != name)
            manager.change(entry, dataclasses.replace(entry, aliases=left))
            return Response()
        try:
            local = await in_thread(lambda: find_downloaded(settings, entry.name), "find-model")
            entry = manager.find(name, exact=True).entry
        except ModelNotFoundError:
            message = f"The model {name!r} was not downloaded by this server, so its files cannot be deleted."
            raise HttpError(409, message, "model_stays", param="model") from None
        if entry.name in (manager.catalogue.default.name, manager.active):
            raise HttpError(
                409,
                f"The model {entry.name!r} is the default or the active model, which cannot be deleted.",
                "model_stays",
                param="model",
            )
        manager.change(entry, None)
        await in_thread(lambda: remove(settings, local), "remove-model")
        return Response()


def _names_file(settings: Settings, name: str, entry: ModelEntry) -> bool:
    """Whether the name is the model's own, or a short name of it such as `qwen3:0.6b`; a copy's name is neither."""
    with suppress(PullError, ModelNotFoundError):
        return name == entry.name or find_downloaded(settings, name).name == entry.name
    return False


async def _lines(pull: Pull) -> AsyncIterator[PullLine]:
    yield PullLine(status="pulling manifest")
    yield PullLine(status=f"{pull.plan.name}: {pull.room}")
    digests = [file.sha256 for file in pull.plan.files if file.sha256 is not None]
    digest = f"sha256:{digests[0]}" if digests else UNSET
    async for progress in pull.follow():
        verifies = progress.what.startswith("verifying")
        status = progress.what if verifies or digest is UNSET else f"pulling {str(digest)[7:19]}"
        yield PullLine(status=status, digest=digest, total=progress.total, completed=progress.done)
    yield PullLine(status="writing manifest")
    yield PullLine(status="success")


def pulls_of(manager: ModelManager, settings: Settings) -> Pulls:
    """Return the service that downloads models and adds them to the served ones."""
    return Pulls(settings, lambda pull, local: _serve(manager, settings, local, pull.asked))


def _serve(manager: ModelManager, settings: Settings, local: Local, asked: str) -> None:
    """Serve a downloaded model, also by the name that the pull asked for, unless another model has that name."""
    old = manager.slots[local.name].entry if local.name in manager.slots else None
    new = old or served_entry(settings, local)
    try:
        manager.change(old, dataclasses.replace(new, aliases=(*new.names, asked)))
    except UsageError:
        if old is None:
            manager.change(None, new)


def served_entry(settings: Settings, local: Local) -> ModelEntry:
    """Return the entry of a downloaded model in the catalogue."""
    return ModelEntry(local.name, local.settings(settings), (local.name,))


def _failed_line(failure: Exception) -> bytes:
    if isinstance(failure, CandleVllmError):
        failure = HttpError(502, str(failure), failure_code(failure))
    return ollama_error_line(failure)


async def _allowed(request: Request, kind: type[WireModel]) -> Any:
    """Return the validated body; HttpError 403 without --allow-model-changes, or if the server is not guarded."""
    settings: Settings = request.app.state.settings
    wire = await parsed(request, ollama_parser(kind))
    if not settings.allow_model_changes or not settings.is_guarded:
        message = "Clients cannot change models: this server was started without --allow-model-changes."
        raise HttpError(403, message, "model_changes_not_allowed")
    return wire
