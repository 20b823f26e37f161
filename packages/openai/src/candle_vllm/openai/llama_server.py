# SPDX-License-Identifier: MIT
"""The texts of llama.cpp's server: `/completion`, with images or not, and `/infill`, without HTTP (steps 2 and 10).

A request is read as a task that an `OpenAIAdapter` answers, and what happens meanwhile is written in llama.cpp's words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Annotated, Any, ClassVar, Self, cast

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import replace
from pydantic import Discriminator, Field, Tag, model_validator

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling import params as caps
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.openai.adapter import OpenAIAdapter
from candle_vllm.openai.events import Begun, Ended, Event, Text, Usage
from candle_vllm.openai.protocol.fields import (
    GUESS_FIELDS,
    MAX_PROMPTS,
    ModelName,
    Refusal,
    TokenIds,
    WireModel,
    invalid,
    prompt_form,
)
from candle_vllm.openai.protocol.generation import LlamaFields, LoraScales, lora_scales
from candle_vllm.openai.remarks import remark
from candle_vllm.openai.streams import ChunkStream
from candle_vllm.openai.task import ImagePart, Paths, Task

MAX_EXTRA = 256  # pieces of other files
MAX_IMAGES = 1024  # of a prompt, before the model's own bound is asked
_SNIPPET = "\n\n--- snippet ---\n\n"

_REFUSED: Mapping[str, Refusal] = {
    **GUESS_FIELDS,
    "n_probs": Refusal("log-probabilities are those of /v1/completions (logprobs)", (0,)),
    "min_keep": Refusal("every sampler keeps at least one token", (0, 1)),
    "grammar": Refusal("grammars are those of /v1/completions (structured_outputs)", ("",)),
    "logit_bias": Refusal("it is a field of /v1/completions", ([], {})),
    "return_tokens": Refusal("tokens are told by /v1/completions (return_token_ids)", (False,)),
    "return_progress": Refusal("nothing is sent before the first token", (False,)),
    "timings_per_token": Refusal("times come with the last piece", (False,)),
    "post_sampling_probs": Refusal("log-probabilities are those of /v1/completions", (False,)),
    "image_data": Refusal("images are those of the prompt: {prompt_string, multimodal_data}", ([],)),
    "n_cmpl": Refusal("several answers are those of /v1/completions (n)", (1,)),
}
WITHOUT_EFFECT: Mapping[str, str] = {
    "t_max_prompt_ms": "a prompt is always read whole",
    "t_max_predict_ms": "n_predict bounds an answer",
    "n_indent": "stop ends an answer",
    "samplers": "samplers have one order here",
}
"""Fields that are taken and change nothing, of which the sender is told."""

_Limit = Annotated[int, Field(ge=-(1 << 31), le=1 << 31)]


class _Asked(LlamaFields):
    """What both routes take.

    Attributes:
        n_predict: most tokens of the answer; -1 and -2 are as many as the context takes, 0 reads the prompt alone.
        cache_prompt, id_slot, n_keep, n_discard, response_fields: without effect: what prompts begin with is always
            kept, there are no slots, prompts are never cut, and an answer has all its fields.
    """

    refused_fields: ClassVar[Mapping[str, Refusal]] = _REFUSED

    model: ModelName | None = None
    stream: bool = False
    n_predict: Annotated[int, Field(ge=-2, le=caps.MAX_TOKENS)] | None = None
    ignore_eos: bool | None = None
    lora: LoraScales | None = None
    json_schema: dict[str, Any] | None = None

    cache_prompt: bool | None = None
    id_slot: _Limit | None = None
    n_keep: _Limit | None = None
    n_discard: _Limit | None = None
    response_fields: Annotated[list[str], Field(max_length=256, fail_fast=True)] | None = None
    t_max_prompt_ms: _Limit | None = None
    t_max_predict_ms: _Limit | None = None
    n_indent: _Limit | None = None
    samplers: Annotated[list[str], Field(max_length=64, fail_fast=True)] | str | None = None

    def sampling(self) -> dict[str, Any]:
        """What is given, by the names of `SamplingParams`."""
        limit = self.n_predict
        return self.drawing() | {"max_tokens": None if limit is None or limit < 0 else max(limit, 1)}

    def form(self) -> StructuredOutputsParams | None:
        """What the answer must look like; raises `InvalidParameterError`."""
        if not self.json_schema:
            return None
        try:
            return StructuredOutputsParams(json=self.json_schema)
        except InvalidParameterError as error:
            raise InvalidParameterError(f"json_schema cannot be used: {error}", "json_schema") from None


class MediaPrompt(WireModel):
    """A text, perhaps with images.

    Attributes:
        multimodal_data: images in base64, in the order of their marks in the text (`task.MEDIA_MARK`), one each.
    """

    prompt_string: str
    multimodal_data: Annotated[list[str], Field(max_length=MAX_IMAGES, fail_fast=True)] | None = None


def _form(value: Any) -> str:
    """The tag of a prompt, or of a list of them."""
    if isinstance(value, dict):
        return "<object>"
    form = prompt_form(value)
    several = isinstance(value, list) and value and isinstance(value[0], (str, list, dict))
    return "<list>" if several else form


_Prompt = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[TokenIds, Tag("<tokens>")] | Annotated[MediaPrompt, Tag("<object>")],
    Discriminator(_form),
]


class LlamaCompletionRequest(_Asked):
    """A text to continue, its tokens, or a text with images; or a list of those, each with its own answer."""

    prompt: Annotated[
        Annotated[str, Tag("<string>")]
        | Annotated[TokenIds, Tag("<tokens>")]
        | Annotated[MediaPrompt, Tag("<object>")]
        | Annotated[list[_Prompt], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("<list>")],
        Discriminator(_form),
    ]

    @model_validator(mode="after")
    def _one_is_streamed(self) -> Self:
        if self.stream and len(self.prompts) > 1:
            raise invalid("stream", "is for one prompt; the answers to several come whole")
        return self

    @property
    def prompts(self) -> list[str | list[int] | MediaPrompt]:
        """The prompts, one entry each."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return cast(Any, self.prompt) if several else [cast(Any, self.prompt)]

    def tasks(self, shared: Mapping[str, Any]) -> list[Task]:
        """What is asked for."""
        prompts = self.prompts
        names = ["prompt"] if prompts[0] is self.prompt else [f"prompt.{number}" for number in range(len(prompts))]
        return [_task(prompt, name, shared) for prompt, name in zip(prompts, names, strict=True)]


def _task(prompt: str | list[int] | MediaPrompt, name: str, shared: Mapping[str, Any]) -> Task:
    """What is asked for by a prompt of the name that the request has for it."""
    if not isinstance(prompt, MediaPrompt):
        return Task(prompts=(prompt,), **shared)
    if prompt.multimodal_data is None:
        return Task(prompts=(prompt.prompt_string,), **shared)
    field = f"{name}.multimodal_data"
    images = tuple(
        ImagePart(f"data:;base64,{data}", path=f"{field}.{place}") for place, data in enumerate(prompt.multimodal_data)
    )
    paths: Paths = shared["paths"]
    shared = {**shared, "paths": paths._replace(fields={**paths.fields, "images": field})}
    return Task(prompts=(prompt.prompt_string,), images=images, **shared)


class Extra(WireModel):
    """A piece of another file. What else an editor notes beside it (llama.vim: `time`) has no effect."""

    text: str
    filename: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_known_names(cls, data: Any) -> Any:
        return {name: data[name] for name in cls.wire_names() if name in data} if isinstance(data, dict) else data


class InfillRequest(_Asked):
    """A gap to fill, by a model that was trained to.

    Attributes:
        input_prefix, input_suffix: what stands before and behind the gap.
        prompt: the beginning of the gap's line, behind the prefix: editors send the lines above the cursor as prefix.
        input_extra: pieces of other files, which the model reads before it.
    """

    input_prefix: str
    input_suffix: str
    prompt: str = ""
    input_extra: Annotated[list[Extra], Field(max_length=MAX_EXTRA, fail_fast=True)] | None = None

    def tasks(self, shared: Mapping[str, Any]) -> list[Task]:
        """What is asked for. Without a suffix the text is continued."""
        before = "".join(_SNIPPET + each.text for each in self.input_extra or ())
        prefix = (f"{before}\n\n{self.input_prefix}" if before else self.input_prefix) + self.prompt
        return [Task(prompts=(prefix,), suffix=self.input_suffix, **shared)]


LlamaRequest = LlamaCompletionRequest | InfillRequest


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens and milliseconds of the prompt and of the answer; those of the cache took no time.

    Attributes:
        draft_n, draft_n_accepted: guessed tokens that were tried, and tokens of the answer that came of them; there
            where any was tried.
    """

    cache_n: int
    prompt_n: int
    prompt_ms: int
    predicted_n: int
    predicted_ms: int
    draft_n: int | UnsetType = UNSET
    draft_n_accepted: int | UnsetType = UNSET


class LlamaText(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of an answer, and with `stop` its last one; of an answer that is not streamed, all of it.

    Attributes:
        stop_type: eos, limit or word; `stopping_word` is the latter.
        truncated: never, for prompts are not cut.
    """

    content: str
    stop: bool = False
    index: int = 0
    model: str | UnsetType = UNSET
    stop_type: str | UnsetType = UNSET
    stopping_word: str | UnsetType = UNSET
    truncated: bool | UnsetType = UNSET
    tokens_predicted: int | UnsetType = UNSET
    tokens_evaluated: int | UnsetType = UNSET
    tokens_cached: int | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET


class LlamaStream(ChunkStream[LlamaText]):
    """The pieces of one answer. Close it (`aclose`) when the reader goes away: that aborts the request."""


async def llama_stream(
    adapter: OpenAIAdapter, request: LlamaRequest, defaults: Mapping[str, Any] | None = None
) -> LlamaStream:
    """Submits a request of one prompt and gives its pieces as they come; close the stream to abort it.

    Args:
        adapter: answers it; raises what its methods raise.
        request: a checked one.
        defaults: by names of `SamplingParams`, for what the request leaves open; before the model's own.
    """
    (task,) = _tasks(adapter, request, defaults)
    return LlamaStream(await adapter.continued(task), _Writer())


def _tasks(adapter: OpenAIAdapter, request: LlamaRequest, defaults: Mapping[str, Any] | None) -> list[Task]:
    said = [
        f"{name} has no effect: {why}" for name, why in WITHOUT_EFFECT.items() if getattr(request, name) is not None
    ]
    if said:
        remark(said)
    spelled = {"max_tokens": "n_predict", "repetition_penalty": "repeat_penalty", "structured_outputs": "json_schema"}
    if isinstance(request, InfillRequest):
        spelled |= {"prompt": "input_prefix", "suffix": "input_suffix"}
    tasks = request.tasks({
        "model": request.model,
        "paths": Paths(spelled),
        "form": request.form(),
        "sampling": {**(defaults or {}), **request.sampling()},
        "scored_only": request.n_predict == 0,
        "lora": lora_scales(request.lora),
    })  # fmt: skip
    return [replace(task, add_special_tokens=not _begins(task.prompts[0], adapter.beginning)) for task in tasks]


def _begins(prompt: str | Sequence[int], beginning: str) -> bool:
    """Whether a text has its first token already, as one that a template wrote."""
    return bool(beginning) and isinstance(prompt, str) and prompt.startswith(beginning)


async def llama_answer(
    adapter: OpenAIAdapter, request: LlamaRequest, defaults: Mapping[str, Any] | None = None
) -> LlamaText | list[LlamaText]:
    """The whole answer, which is the sum of a stream's pieces, or those to several prompts, which are answered at the
    same time. Cancelling it aborts the request."""
    answers: list[LlamaText] = []
    async with AsyncExitStack() as streams:
        begun = [
            await streams.enter_async_context(aclosing(LlamaStream(await adapter.continued(task), _Writer())))
            for task in _tasks(adapter, request, defaults)
        ]
        for index, stream in enumerate(begun):
            pieces = [piece async for piece in stream]
            answers.append(replace(pieces[-1], content="".join(piece.content for piece in pieces), index=index))
    return answers if len(answers) > 1 else answers[0]


class _Writer:
    """The pieces of one answer."""

    def __init__(self) -> None:
        self._model = ""
        self._ended: Ended | None = None

    def write(self, events: Sequence[Event]) -> list[LlamaText]:
        made: list[LlamaText] = []
        for event in events:
            match event:
                case Begun():
                    self._model = event.head.model
                case Text(text=text) if text:
                    made.append(LlamaText(content=text))
                case Ended():
                    self._ended = event
                case Usage(final=True):
                    made.append(self._last(event))
                case _:
                    pass
        return made

    def _last(self, usage: Usage) -> LlamaText:
        assert self._ended is not None
        word = self._ended.stop if isinstance(self._ended.stop, str) else ""
        return LlamaText(
            content="",
            stop=True,
            model=self._model,
            stop_type="word" if word and not self._ended.reason.cut else self._ended.reason.llama_server,
            stopping_word=word,
            truncated=False,
            tokens_predicted=usage.completion_tokens,
            tokens_evaluated=usage.prompt_tokens,
            tokens_cached=usage.cached_tokens,
            timings=Timings(
                cache_n=usage.cached_tokens,
                prompt_n=usage.prompt_tokens - usage.cached_tokens,
                prompt_ms=usage.prompt_ms or 0,
                predicted_n=usage.completion_tokens,
                predicted_ms=usage.completion_ms or 0,
                draft_n=usage.draft_tokens or UNSET,
                draft_n_accepted=usage.accepted_draft_tokens if usage.draft_tokens else UNSET,
            ),
        )
