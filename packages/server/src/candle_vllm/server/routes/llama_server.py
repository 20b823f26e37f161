# SPDX-License-Identifier: MIT
"""Routes of llama.cpp's server: properties, slots, rendered prompts, `/completion` and `/infill`.

`/completion` and `/infill` are steps 1 and 10 of a request's life. If several models are served, `?model=` or the
body's `model` selects one.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from importlib.metadata import version

import msgspec
from fastapi import Request
from starlette.responses import Response

from candle_vllm.openai import ChatCompletionRequest, ErrorEnvelope, llama_server
from candle_vllm.openai.json_body import parse_body
from candle_vllm.openai.protocol.generation import llama_names
from candle_vllm.openai.protocol.tokenizing import RenderedPrompt
from candle_vllm.openai.requests import parse_chat_request
from candle_vllm.openai.task import MEDIA_MARK
from candle_vllm.server import answering
from candle_vllm.server.models.slot import ServedModel
from candle_vllm.server.openapi.operation import COUNTED, MODEL_ERRORS, QUESTION, QUEUED, WHICH, routing
from candle_vllm.server.routes.vllm import template_of
from candle_vllm.server.settings.table import SAMPLED

router, route = routing()

_SHOWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class GenerationSettings(msgspec.Struct, frozen=True):
    """Defaults of llama.cpp's requests: the context length, and sampling settings."""

    n_ctx: int
    params: dict[str, float | int]


class Modalities(msgspec.Struct, frozen=True):
    """The inputs of a model besides text."""

    vision: bool = False
    video: bool = False
    audio: bool = False


class Properties(msgspec.Struct, frozen=True, kw_only=True):
    """The properties that llama.cpp's clients read first.

    Attributes:
        total_slots: maximum number of sequences in one step.
        model_path: the model's name; the path of its files stays private.
        media_marker: placeholder of an image in the `prompt_string` of `/completion`.
    """

    default_generation_settings: GenerationSettings
    total_slots: int
    model_alias: str
    model_path: str
    chat_template: str
    bos_token: str
    eos_token: str
    modalities: Modalities
    media_marker: str
    build_info: str


class Slot(msgspec.Struct, frozen=True):
    """One of the sequences that may run at the same time. Unlike in llama.cpp, a slot does not belong to a request."""

    id: int
    n_ctx: int
    is_processing: bool


@route("GET /props", tag="server", answer=Properties, errors=(*MODEL_ERRORS, 504), query=WHICH)
async def props(request: Request) -> Response:
    """The model and its defaults, as llama.cpp's clients ask for them."""
    return await answering.answer_about(request, _properties)


def _properties(model: ServedModel) -> Properties:
    info, names = model.engine.model_info, model.engine.chat_conventions.token_names
    counts = {**{name: getattr(SAMPLED, name) for name in _SHOWN}, **info.default_sampling}
    return Properties(
        default_generation_settings=GenerationSettings(
            info.max_model_len, llama_names({**counts, **model.entry.settings.default_sampling})
        ),
        total_slots=info.max_num_seqs,
        model_alias=model.entry.names[0],
        model_path=info.name,
        chat_template=template_of(model) or "",
        bos_token=names.get("bos_token", ""),
        eos_token=names.get("eos_token", ""),
        modalities=Modalities(vision="image" in info.modalities),
        media_marker=MEDIA_MARK,
        build_info=f"candle-vllm {version('candle-vllm-server')}",
    )


@route("GET /slots", tag="server", answer=Slot, errors=(*MODEL_ERRORS, 504), query=WHICH, bare=True)
async def slots(request: Request) -> Response:
    """The sequences that may run at the same time, as llama.cpp's clients ask for them."""
    return await answering.answer_about(request, _slots)


def _slots(model: ServedModel) -> list[Slot]:
    info, running = model.engine.model_info, model.engine.stats().num_running
    return [Slot(place, info.max_model_len, place < running) for place in range(info.max_num_seqs)]


@route(
    "POST /apply-template",
    tag="tokens",
    body=ChatCompletionRequest,
    example={"messages": QUESTION},
    answer=RenderedPrompt,
    errors=COUNTED,
    untyped=True,
)
async def apply_template(request: Request) -> Response:
    """Render the prompt that this chat request would have."""
    return await answering.answer_with(
        request, parse_chat_request, lambda model, wire: model.adapter.apply_template(wire), queued=False
    )


def _api(kind: type[llama_server.LlamaRequest]) -> answering.GenerationApi:
    """Return the API of llama.cpp's completions, whole or streamed."""
    return answering.GenerationApi(
        parse=lambda body: parse_body(kind, body),
        whole=lambda model, wire: llama_server.llama_answer(model.adapter, wire, model.entry.settings.default_sampling),
        streamed=lambda model, wire: llama_server.llama_stream(
            model.adapter, wire, model.entry.settings.default_sampling
        ),
        form=replace(answering.OPENAI_FORM, done=b""),
        defaults=False,  # `whole` and `streamed` pass the operator's sampling values themselves
    )


COMPLETION, INFILL = _api(llama_server.LlamaCompletionRequest), _api(llama_server.InfillRequest)
_chosen = functools.partial(
    route,
    tag="generation",
    answer=llama_server.LlamaChosen,
    events=(llama_server.LlamaChosen, ErrorEnvelope),
    errors=QUEUED,
    untyped=True,
)
_completion = functools.partial(
    _chosen,
    body=llama_server.LlamaCompletionRequest,
    example={"prompt": "Once upon a time", "n_predict": 32},
    one_or_more=True,
)


@_completion("POST /completion")
@_completion("POST /completions", id="llama_completions", summary="The same as `/completion`")
async def llama_completion(request: Request) -> Response:
    """Continue a text, perhaps one with images, in llama.cpp's form."""
    return await answering.answer(request, COMPLETION)


@_chosen(
    "POST /infill",
    body=llama_server.InfillRequest,
    example={"input_prefix": "def add(a, b):\n    ", "input_suffix": "", "n_predict": 32},
)
async def llama_infill(request: Request) -> Response:
    """Fill a gap in a text, in llama.cpp's form."""
    return await answering.answer(request, INFILL)
