# SPDX-License-Identifier: MIT
"""Answers requests for generation, embeddings and scores: the code that the routes of every API share.

Steps 1 and 10 of a request's life. The body is read and validated, the request waits for its turn at a model, the
model's API adapter answers, and the answer is sent; the turn ends when nothing more is generated.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from fastapi import Request
from starlette.requests import HTTPConnection
from starlette.responses import Response

from candle_vllm.core.engine.requests import arrived
from candle_vllm.openai import to_json_bytes
from candle_vllm.openai.embedding import octets
from candle_vllm.openai.fair_threads import RequestBytes, apart
from candle_vllm.openai.json_body import parse_body
from candle_vllm.openai.protocol.generation import GenerationFields, StreamOptions
from candle_vllm.server.http.body import parse_request, unless_disconnected
from candle_vllm.server.http.errors import HttpError, took_too_long
from candle_vllm.server.http.failures import error_event
from candle_vllm.server.http.routing import caller_of
from candle_vllm.server.http.sse import EventStream, StreamForm, data_event
from candle_vllm.server.mailbox.policy import refuse_headers
from candle_vllm.server.models.manager import ModelManager, Turn, take_turn
from candle_vllm.server.models.slot import ServedModel
from candle_vllm.server.outliving import NOT_HERE, MailboxWriter, StoredForm
from candle_vllm.server.settings.table import RequestOptions

JSON = "application/json"
OPENAI_FORM = StreamForm(data_event, error_event)
_TEXTS = ("input", "content", "documents", "texts")  # fields with the texts of a request for vectors or scores


def with_defaults(wire: Any, values: Mapping[str, Any]) -> Any:
    """Return the request with the operator's values for sampling settings that it omits; a beam search uses none."""
    if getattr(wire, "use_beam_search", None):
        return wire
    absent = {name: value for name, value in values.items() if getattr(wire, name) is None}
    return wire.model_copy(update=absent) if absent else wire


def _with_operators_form(wire: Any, settings: RequestOptions) -> Any:
    """Return the request with what the operator adds to every answer: token counts, ids instead of tokens' texts."""
    if not isinstance(wire, GenerationFields):
        return wire
    added: dict[str, Any] = {}
    if settings.enable_force_include_usage and wire.stream:
        added["stream_options"] = (wire.stream_options or StreamOptions()).model_copy(update={"include_usage": True})
    if settings.return_tokens_as_token_ids and wire.return_tokens_as_token_ids is None:
        added["return_tokens_as_token_ids"] = True
    return wire.model_copy(update=added) if added else wire


@dataclass(frozen=True)
class GenerationApi:
    """How one API parses requests and encodes answers.

    Attributes:
        parse: converts a body to a validated request.
        whole, streamed: let a model generate the whole answer, or its chunks.
        form: how a streamed answer is encoded; by default, in OpenAI's form.
        defaults: whether sampling settings that a request omits get the operator's values before `whole` or `streamed`.
        stored: how answers are stored for clients that disconnected; None if they are not stored.
    """

    parse: Callable[[bytes], Any]
    whole: Callable[[ServedModel, Any], Awaitable[Any]]
    streamed: Callable[[ServedModel, Any], Awaitable[AsyncIterator[Any]]]
    form: StreamForm = OPENAI_FORM
    defaults: bool = True
    stored: StoredForm | None = None


async def answer(request: Request, api: GenerationApi) -> Response:
    """Read and answer one request; every failure is an exception."""
    deadline = deadline_of(request)
    return await answer_parsed(request, api, await parsed(request, api.parse), deadline)


def json_answer(made: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response whose body is a wire type or a plain value, as JSON."""
    return Response(to_json_bytes(made), status, headers, media_type=JSON)


async def answer_parsed(request: Request, api: GenerationApi, wire: Any, deadline: float) -> Response:
    """Answer a request whose body has been read; `deadline` is a `time.monotonic()`."""
    request.state.prompt_only = getattr(wire, "max_tokens", None) == 0
    writer: MailboxWriter | None = request.app.state.mailbox_writer
    streams, wish = bool(wire.stream), None
    wire = _with_operators_form(wire, request.app.state.settings)
    _permit_mix(request, wire)
    if writer is None or api.stored is None:
        refuse_headers(request.scope["headers"], None if api.stored else NOT_HERE)
    else:
        wish, wire = writer.wish(request.scope, wire)
    async with in_time(deadline, request):
        taken = take_turn(request.scope, wire.model, sequences=sequences_of(wire), priority=_priority(wire))
        # An answer for the mailbox does not need its client: a future that is never done is no disconnect.
        receive = request.receive if wish is None else asyncio.get_running_loop().create_future
        turn = await unless_disconnected(taken, receive, Turn.release)
        try:
            defaults = turn.model.entry.settings.default_sampling if api.defaults else {}
            wire = with_defaults(wire, defaults) if defaults else wire
            if not wire.stream:
                made = await unless_disconnected(api.whole(turn.model, wire), request.receive)
                turn.release()
                large = any(getattr(wire, name, None) for name in ("logprobs", "top_logprobs", "prompt_logprobs"))
                return Response(await apart(to_json_bytes, made) if large else to_json_bytes(made), media_type=JSON)
            chunks = await unless_disconnected(api.streamed(turn.model, wire), receive, _closing)
        except BaseException:
            turn.release()
            raise
        if wish is None or writer is None or api.stored is None:
            return EventStream(chunks, api.form, deadline=deadline, released=turn.release)
        outliving = writer.keep(wish, chunks, api.stored, turn, deadline)
        if streams:
            return EventStream(outliving, api.form, deadline=deadline)
        return await unless_disconnected(outliving.response(), request.receive, lambda _: outliving.aclose())


def _permit_mix(request: Request, wire: Any) -> None:
    """Refuse (HttpError 403) a request with an adapter in `lora` that its API key may not use."""
    caller = caller_of(request.scope)
    if caller.models is None or not getattr(wire, "lora", None):
        return
    manager: ModelManager = request.app.state.manager
    slot, wanted = manager.find(wire.model, caller=caller), {each.id for each in wire.lora}
    for adapter in manager.adapters.numbered(slot.entry.name):
        if adapter.number in wanted and not caller.may_use(*adapter.names):
            message = (
                f"This API key may not use the adapter {adapter.number}: the server's operator sets which adapters it "
                "may use."
            )
            raise HttpError(403, message, "model_not_allowed", param="lora")  # the message must not reveal its name


def _closing(chunks: AsyncIterator[Any]) -> Awaitable[object] | None:
    """Close a stream that nobody reads, which aborts its request."""
    close = getattr(chunks, "aclose", None)
    return None if close is None else close()


async def answer_with(
    request: Request,
    parse: Callable[[bytes], Any],
    method: Callable[[ServedModel, Any], Awaitable[Any]],
    *,
    queued: bool = True,
) -> Response:
    """Answer a request that has one answer and no stream: embeddings, scores, token counts.

    Args:
        method: computes the answer with a model.
        queued: whether the request waits for its turn; False for work that the engine does not do.
    """
    deadline = deadline_of(request)
    return await answer_parsed_with(request, await parsed(request, parse), method, deadline, queued=queued)


async def answer_parsed_with(
    request: Request,
    wire: Any,
    method: Callable[[ServedModel, Any], Awaitable[Any]],
    deadline: float,
    *,
    queued: bool = True,
) -> Response:
    """As `answer_with`, for a request whose body has been read; `deadline` is a `time.monotonic()`."""
    refuse_headers(request.scope["headers"], NOT_HERE)

    async def work() -> Any:
        if queued:
            turn = await take_turn(request.scope, wire.model, sequences=texts_of(wire), priority=_priority(wire))
        else:
            manager: ModelManager = request.app.state.manager
            await manager.reach(wire.model, caller_of(request.scope))
            turn = await manager.acquire(wire.model)
        try:
            return await method(turn.model, wire)
        finally:
            turn.release()

    async with in_time(deadline, request):
        made = await unless_disconnected(work(), request.receive)
    if getattr(wire, "encoding_format", None) in ("bytes", "bytes_only"):
        body, headers = await apart(octets, wire, made)
        return Response(body, headers=headers, media_type="application/octet-stream")
    # in a thread if large: thousands of embeddings are many megabytes of JSON
    return Response(await apart(to_json_bytes, made), media_type=JSON)


async def answer_about(request: Request, describe: Callable[[ServedModel], Any]) -> Response:
    """Answer with a description of the model that `?model=` names, which is loaded for it if necessary."""

    async def described(model: ServedModel, _: Any) -> Any:
        return describe(model)

    named = SimpleNamespace(model=request.query_params.get("model") or None)
    return await answer_parsed_with(request, named, described, deadline_of(request), queued=False)


def deadline_of(request: Request) -> float:
    """Return the `time.monotonic()` at which a request that begins now must have its answer."""
    return time.monotonic() + request.app.state.settings.request_timeout


async def parsed(request: Request, parse: Callable[[bytes], Any]) -> Any:
    """Return the validated body of a request; its route says whether it needs a content type (`Operation.untyped`)."""
    typed = not request.scope["route"].openapi_extra["operation"].untyped
    most = request.app.state.settings.max_body_mb << 20
    wire = await parse_request(request.scope, request.receive, most, parse, typed=typed)
    arrived.set(time.monotonic())
    return wire


async def body_of(request: Request, kind: type[Any]) -> Any:
    """Return the validated body of a request, which has the fields of a wire type."""
    return await parsed(request, functools.partial(parse_body, kind))


def texts_of(wire: Any) -> int:
    """Return the number of texts in a request for embeddings or scores; each is one sequence of the engine."""
    pairs = getattr(wire, "pairs", None)
    texts = pairs or next(filter(None, (getattr(wire, name, None) for name in _TEXTS)), ())
    many = isinstance(texts, (list, tuple)) and not (texts and isinstance(texts[0], int))
    return len(texts) if many else 1


def _priority(wire: Any) -> int:
    return getattr(wire, "priority", None) or 0


def sequences_of(wire: Any) -> int:
    """Return the number of sequences that a request generates."""
    prompts = getattr(wire, "prompts", None)
    return (len(prompts) if prompts is not None else 1) * getattr(wire, "sequences", 1)


@asynccontextmanager
async def in_time(deadline: float, request: HTTPConnection) -> AsyncIterator[RequestBytes]:
    """Context manager that cancels work at the deadline (`time.monotonic()`), and raises the client's error.

    The bytes of the request count in `Held` until its prompt is tokenized.
    """
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            with request.app.state.held.waiting(request.scope) as size:
                yield size
    except TimeoutError:
        raise took_too_long() from None
