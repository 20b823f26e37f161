# SPDX-License-Identifier: MIT
"""`/completion` and `/infill` of llama.cpp's server, without HTTP (steps 2 and 10 of a request's life).

A request becomes a task for an `OpenAIAdapter`; the events of the answer become llama.cpp's chunks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Annotated, Any, ClassVar, Self, cast

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import replace
from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from candle_vllm.core.engine.outputs import PositionLogprobs, TokenLogprob
from candle_vllm.core.sampling.params import BIAS, MAX_TOKEN_ID
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.openai.adapter import OpenAIAdapter
from candle_vllm.openai.answers import ChunkStream, Writer
from candle_vllm.openai.chat_answers import RunningTimings, wire_progress, wire_timings
from candle_vllm.openai.events import Begun, Ended, Event, Progress, Text, Usage
from candle_vllm.openai.logprobs import LOWEST
from candle_vllm.openai.protocol import fields
from candle_vllm.openai.protocol.generation import (
    OTHER_NAMES,
    LlamaFields,
    Logprobs,
    LoraScales,
    lora_scales,
    sampling_names,
)
from candle_vllm.openai.protocol.structured import LlamaForms
from candle_vllm.openai.protocol.usage import PromptProgress, Timings
from candle_vllm.openai.requests import sampling_params
from candle_vllm.openai.task import ImagePart, Paths, Task

MAX_EXTRA = 256  # snippets of other files
MAX_IMAGES = 1024  # images of a prompt, before the model's own limit is checked
_SNIPPET = "\n\n--- snippet ---\n\n"

_REFUSED: Mapping[str, fields.Refusal] = {
    **fields.DRAFT_FIELDS,
    "min_keep": fields.Refusal("every sampler keeps at least one token", (0, 1)),
    "post_sampling_probs": fields.Refusal("log-probabilities are those before any sampler", (False,)),
    "image_data": fields.Refusal("send images in the prompt: {prompt_string, multimodal_data}", ([],)),
    "n_cmpl": fields.Refusal("for several answers use /v1/completions (n)", (1,)),
    "t_max_prompt_ms": fields.Refusal("a prompt is always read whole", idle=True),
    "t_max_predict_ms": fields.Refusal("n_predict bounds an answer", idle=True),
    "n_indent": fields.Refusal("stop ends an answer", idle=True),
    **{n: fields.REFUSED_FIELDS[n] for n in ("n_cache_reuse", "backend_sampling", "samplers", "slot_id", "tfs_z")},
}

_Limit = Annotated[int, Field(ge=-(1 << 31), le=1 << 31)]


def _biases(given: Any) -> Any:
    """Validate pairs of a token, given as its id or as a text, and its logit bias."""
    if given is None:
        return None
    pairs = list(given.items()) if isinstance(given, dict) else given
    if not isinstance(pairs, list) or len(pairs) > fields.MAX_LOGIT_BIAS:
        raise fields.invalid("", f"must be an object, or a list of pairs, of at most {fields.MAX_LOGIT_BIAS} entries")
    return [_bias_pair(pair, isinstance(given, dict)) for pair in pairs]


def _bias_pair(pair: Any, named: bool) -> tuple[int | str, float]:
    if isinstance(pair, (list, tuple)) and len(pair) == 2:
        name, value = pair
        name = int(name) if named and name.isdecimal() and len(name) <= 10 else name
        known = isinstance(name, str) or (type(name) is int and 0 <= name <= MAX_TOKEN_ID)
        if known and (value is False or (type(value) in (int, float) and BIAS.low <= value <= BIAS.high)):
            return name, float(BIAS.low) if value is False else float(value)
    said = f"a number from {BIAS.low} to {BIAS.high}, or with false"
    raise fields.invalid("", f"must pair a token id or a text with {said}, not {pair!r:.60}")


class _Asked(LlamaFields, LlamaForms):
    """Fields that `/completion` and `/infill` share.

    Attributes:
        n_predict: maximum number of tokens; -1 and -2 mean up to the end of the context, 0 only processes the prompt.
        n_probs: number of likeliest tokens reported at each position; 0 reports no probabilities.
        logit_bias: pairs, or an object, of a token id (or a text, for all of its tokens) and a bias; false means -100.
        return_tokens: whether a whole answer has its token ids; chunks of a stream always have their ids.
        timings_per_token: whether every chunk has timings.
        return_progress: whether a stream has chunks with `prompt_progress` before the first token.
        response_fields: fields of the last chunk or the whole answer: names, or paths like `generation_settings/seed`.
        cache_prompt, id_slot, n_keep, n_discard: no effect: prefixes of prompts are always cached, there are no slots,
            and prompts are never truncated.
    """

    refused_fields: ClassVar[Mapping[str, fields.Refusal]] = _REFUSED
    other_names: ClassVar[Mapping[str, str]] = {**OTHER_NAMES, "max_tokens": "n_predict"}

    model: fields.ModelName | None = None
    stream: bool | None = None
    n_predict: Annotated[int, fields.bounded("max_tokens", ge=-2)] | None = None
    ignore_eos: bool | None = None
    lora: LoraScales | None = None
    n_probs: Logprobs | None = None
    logit_bias: Annotated[Any, BeforeValidator(_biases)] = None
    return_tokens: bool | None = None
    timings_per_token: bool | None = None
    return_progress: bool | None = None

    cache_prompt: bool | None = None
    id_slot: _Limit | None = None
    n_keep: _Limit | None = None
    n_discard: _Limit | None = None
    response_fields: Annotated[list[str], Field(max_length=256, fail_fast=True)] | None = None

    def sampling(self) -> dict[str, Any]:
        limit = self.n_predict
        limits = {"max_tokens": None if limit is None or limit < 0 else max(limit, 1)}
        return self.given_values() | limits | ({"logprobs": self.n_probs} if self.n_probs else {})

    @model_validator(mode="after")
    def _form_is_right(self) -> Self:
        self.form()
        return self

    def form(self) -> StructuredOutputsParams | None:
        given = self.llama_form()
        return None if given is None else given[1]


class MediaPrompt(fields.WireModel):
    """A text with `<__media__>` (`task.MEDIA_MARK`) in place of each image.

    Attributes:
        multimodal_data: the images in base64, in the order of the marks.
    """

    prompt_string: str
    multimodal_data: Annotated[list[str], Field(max_length=MAX_IMAGES, fail_fast=True)] | None = None


def _several(value: Any) -> bool:
    """Whether a value is a list of prompts, not of token ids."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], (str, list, dict, MediaPrompt))


_Prompt = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[fields.TokenIds, Tag("<tokens>")]
    | Annotated[MediaPrompt, Tag("<object>")],
    Discriminator(lambda value: {dict: "<object>", list: "<tokens>"}.get(type(value), "<string>")),
]


class LlamaCompletionRequest(_Asked):
    """A prompt: a text, its token ids, or a text with images; or a list of prompts, each of which gets an answer."""

    prompt: Annotated[
        Annotated[_Prompt, Tag("<one>")]
        | Annotated[list[_Prompt], Field(max_length=fields.MAX_PROMPTS, fail_fast=True), Tag("<list>")],
        Discriminator(lambda value: "<list>" if _several(value) else "<one>"),
    ]

    @model_validator(mode="after")
    def _one_is_streamed(self) -> Self:
        if self.stream and len(self.prompts) > 1:
            raise fields.invalid("stream", "is for one prompt only; the answers to several prompts are not streamed")
        return self

    @property
    def prompts(self) -> list[str | list[int] | MediaPrompt]:
        """The prompts as a list."""
        return cast(Any, self.prompt) if _several(self.prompt) else [cast(Any, self.prompt)]

    def tasks(self, shared: Mapping[str, Any]) -> list[Task]:
        """Convert the request to tasks, one for each prompt."""
        prompts = self.prompts
        names = ["prompt"] if prompts[0] is self.prompt else [f"prompt.{number}" for number in range(len(prompts))]
        return [_task(prompt, name, shared) for prompt, name in zip(prompts, names, strict=True)]


def _task(prompt: str | list[int] | MediaPrompt, name: str, shared: Mapping[str, Any]) -> Task:
    """Convert a prompt to a task; `name` is the path of the prompt in the request."""
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


class Extra(fields.WireModel):
    """A snippet of another file. `filename` and other fields that editors send (llama.vim: `time`) have no effect."""

    text: str
    filename: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_known_names(cls, data: Any) -> Any:
        return {name: data[name] for name in cls.wire_names() if name in data} if isinstance(data, dict) else data


class InfillRequest(_Asked):
    """A gap to fill, by a model trained for fill-in-the-middle.

    Attributes:
        input_prefix, input_suffix: text before and after the gap.
        prompt: text between prefix and gap: the beginning of the gap's line, as editors send it.
        input_extra: snippets of other files, which precede the prefix.
    """

    input_prefix: str
    input_suffix: str
    prompt: str | None = None
    input_extra: Annotated[list[Extra], Field(max_length=MAX_EXTRA, fail_fast=True)] | None = None

    def tasks(self, shared: Mapping[str, Any]) -> list[Task]:
        """Convert the request to one task; without a suffix, the task continues the text."""
        before = "".join(_SNIPPET + each.text for each in self.input_extra or ())
        prefix = (f"{before}\n\n{self.input_prefix}" if before else self.input_prefix) + (self.prompt or "")
        return [Task(prompts=(prefix,), suffix=self.input_suffix, **shared)]


LlamaRequest = LlamaCompletionRequest | InfillRequest


class TokenProbability(msgspec.Struct, frozen=True, kw_only=True):
    """A token and its natural log-probability, with the likeliest tokens at its position."""

    id: int
    token: str
    bytes: tuple[int, ...]
    logprob: float
    top_logprobs: tuple[TokenProbability, ...] | UnsetType = UNSET


def _probabilities(entries: Sequence[PositionLogprobs]) -> tuple[TokenProbability, ...]:
    def one(token: TokenLogprob, **top: tuple[TokenProbability, ...]) -> TokenProbability:
        logprob = max(token.logprob, LOWEST)
        return TokenProbability(id=token.token_id, token=token.text, bytes=tuple(token.bytes), logprob=logprob, **top)

    return tuple(one(entry.chosen, top_logprobs=tuple(map(one, entry.top))) for entry in entries)


class LlamaText(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk of a streamed answer, or a whole answer; `stop` is true for the last chunk and for a whole answer.

    Attributes:
        content: the text.
        tokens: token ids of the chunk; of a whole answer if `return_tokens` requests them.
        completion_probabilities: log-probabilities, if `n_probs` requests them.
        prompt: text of the prompt, in the last chunk; absent if the prompt was token ids.
        generation_settings: sampling values of the answer, under llama.cpp's names.
        stop_type: `eos`, `limit`, or `word` if the stop string `stopping_word` ended the answer.
        truncated: always false, because prompts are not truncated.
    """

    content: str = ""
    stop: bool = False
    index: int = 0
    tokens: tuple[int, ...] = ()
    completion_probabilities: tuple[TokenProbability, ...] | UnsetType = UNSET
    model: str | UnsetType = UNSET
    prompt: str | UnsetType = UNSET
    generation_settings: Mapping[str, Any] | UnsetType = UNSET
    has_new_line: bool | UnsetType = UNSET
    stop_type: str | UnsetType = UNSET
    stopping_word: str | UnsetType = UNSET
    truncated: bool | UnsetType = UNSET
    tokens_predicted: int | UnsetType = UNSET
    tokens_evaluated: int | UnsetType = UNSET
    tokens_cached: int | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET
    prompt_progress: PromptProgress | UnsetType = UNSET


class LlamaChosen(LlamaText, frozen=True, kw_only=True, omit_defaults=True):
    """A `LlamaText` for the API's description: `response_fields` may leave out any of its fields."""


Answered = LlamaText | dict[str, Any]
"""A chunk or a whole answer; a dict if `response_fields` selects fields."""


async def llama_stream(
    adapter: OpenAIAdapter, request: LlamaRequest, defaults: Mapping[str, Any] | None = None
) -> ChunkStream[Answered]:
    """Submit a request with one prompt, and stream its chunks; raises what the adapter's methods raise.

    Closing the stream aborts the request.

    `defaults` are sampling values, by name in `SamplingParams`, that take precedence over the model's defaults.
    """
    (task,) = await _tasks(adapter, request, defaults)
    writer = _Writer(request, task, _settings(adapter, request, task))
    return ChunkStream(await adapter.continued(task), writer)


async def _tasks(adapter: OpenAIAdapter, request: LlamaRequest, defaults: Mapping[str, Any] | None) -> list[Task]:
    form = "grammar" if request.grammar else "json_schema"
    spelled = {"max_tokens": "n_predict", "repetition_penalty": "repeat_penalty", "structured_outputs": form}
    spelled |= {"logprobs": "n_probs", "lora_request": "lora" if request.lora else "model"}
    if isinstance(request, InfillRequest):
        spelled |= {"prompt": "input_prefix", "suffix": "input_suffix"}
    bias = await _bias(adapter, request)
    tasks = request.tasks({
        "model": request.model,
        "paths": Paths(spelled),
        "form": request.form(),
        "sampling": {**(defaults or {}), **request.sampling(), **({"logit_bias": bias} if bias else {}),
                     "prompt_progress": bool(request.return_progress and request.stream)},
        "scored_only": request.n_predict == 0,
        "tell_ids": bool(request.stream or request.return_tokens or request.timings_per_token),
        "tell_counts": bool(request.timings_per_token),
        "lora": lora_scales(request.lora),
    })  # fmt: skip
    begin = adapter.beginning  # rendered chat templates already have it
    whole = [bool(begin) and isinstance(one := task.prompts[0], str) and one.startswith(begin) for task in tasks]
    return [replace(task, add_special_tokens=not begun) for task, begun in zip(tasks, whole, strict=True)]


async def _bias(adapter: OpenAIAdapter, request: LlamaRequest) -> dict[int, float]:
    pairs: Sequence[tuple[int | str, float]] = request.logit_bias or ()
    texts = [name for name, _ in pairs if isinstance(name, str)]
    known = dict(zip(texts, await adapter.tokens_of(texts, add_special_tokens=False) if texts else (), strict=True))
    return {token: value for name, value in pairs for token in (known[name] if isinstance(name, str) else (name,))}


def _settings(adapter: OpenAIAdapter, request: LlamaRequest, task: Task) -> dict[str, Any]:
    """Return the sampling values of an answer under llama.cpp's names."""
    params = sampling_params(task, adapter.model_info.default_sampling).filled({})
    shared = {name: getattr(params, name) for name in sampling_names(LlamaFields)}
    ends = adapter.model_info.eos_token_ids if params.ignore_eos else ()  # null is llama.cpp's minus infinity
    biases: dict[int, float | None] = {**(params.logit_bias or {}), **dict.fromkeys(ends)}
    return shared | {
        "n_predict": 0 if task.scored_only else -1 if params.max_tokens is None else params.max_tokens,
        "seed": -1 if params.seed is None else params.seed,
        "repeat_penalty": params.repetition_penalty,
        "stop": params.stop_strings,
        "ignore_eos": params.ignore_eos,
        "logit_bias": [{"token": token, "bias": bias} for token, bias in biases.items()],
        "n_probs": request.n_probs or 0,
        "grammar": request.grammar or "",
        "timings_per_token": bool(request.timings_per_token),
    }


async def llama_answer(
    adapter: OpenAIAdapter, request: LlamaRequest, defaults: Mapping[str, Any] | None = None
) -> Answered | list[Answered]:
    """Return the whole answer, or the answers to several prompts, which run at the same time.

    Each answer is joined from a stream's chunks. Cancelling this coroutine aborts the request.
    """
    answers: list[Answered] = []
    async with AsyncExitStack() as streams:
        begun: list[ChunkStream[LlamaText]] = []
        for task in await _tasks(adapter, request, defaults):
            writer = _Writer(request, task, _settings(adapter, request, task), whole=True)
            stream = ChunkStream[LlamaText](await adapter.continued(task), writer)
            begun.append(await streams.enter_async_context(aclosing(stream)))
        for index, stream in enumerate(begun):
            pieces = await stream.whole(list)
            ids = [token for piece in pieces for token in piece.tokens] if request.return_tokens else []
            probabilities = [one for piece in pieces for one in piece.completion_probabilities or ()]
            whole = replace(
                pieces[-1],
                content="".join(piece.content for piece in pieces),
                index=index,
                tokens=tuple(ids),
                completion_probabilities=tuple(probabilities) if request.n_probs else UNSET,
            )
            answers.append(_chosen(whole, request.response_fields))
    return answers if len(answers) > 1 else answers[0]


def _chosen(piece: LlamaText, paths: Sequence[str] | None) -> Answered:
    """Select the fields at these paths, each under its path; without paths, return everything."""
    if not paths:
        return piece
    found: dict[str, Any] = {}
    for path in paths:
        value: Any = msgspec.to_builtins(piece)
        for name in path.split("/"):
            value = value.get(name, UNSET) if isinstance(value, dict) else UNSET
        if value is not UNSET:
            found[path] = value
    return found


class _Writer(Writer[Any]):
    """Writes the chunks of one answer; with `whole`, for chunks that are joined, the last one has all fields.

    `settings` are the sampling values of the answer.
    """

    def __init__(self, request: LlamaRequest, task: Task, settings: Mapping[str, Any], *, whole: bool = False) -> None:
        self._request, self._settings, self._whole = request, settings, whole
        self._prompt = task.prompts[0] if isinstance(task.prompts[0], str) else UNSET
        self._model, self._new_line = "", False
        self._ended: Ended | None = None
        self._running = RunningTimings() if request.timings_per_token else None
        self._timings: Timings | UnsetType = UNSET
        self._held: list[Text] = []  # events without text yet, whose tokens go into the next chunk

    def write(self, events: Sequence[Event]) -> list[Any]:
        made: list[Any] = []
        for event in events:
            match event:
                case Begun():
                    self._model = event.head.model
                case Text():
                    self._held.append(event)
                    if event.text:
                        self._new_line = self._new_line or "\n" in event.text
                        made.append(self._piece())
                case Ended():
                    self._ended = event
                case Usage(final=True):
                    last = self._last(event)
                    made.append(last if self._whole else _chosen(last, self._request.response_fields))
                case Progress():
                    timings = UNSET if self._running is None else wire_timings(event.usage)
                    made.append(LlamaText(content="", prompt_progress=wire_progress(event), timings=timings))
                case Usage() if self._running is not None:
                    self._timings = self._running.of(event)
        return made

    def _piece(self) -> LlamaText:
        held, self._held = self._held, []
        entries = [entry for each in held for entry in each.logprobs or ()]
        return LlamaText(
            content="".join(each.text for each in held),
            tokens=tuple(token for each in held for token in each.ids or ()),
            completion_probabilities=_probabilities(entries) if self._request.n_probs else UNSET,
            timings=self._timings,
        )

    def _last(self, usage: Usage) -> LlamaText:
        assert self._ended is not None
        word = self._ended.stop if isinstance(self._ended.stop, str) else ""
        return replace(
            self._piece(),
            stop=True,
            model=self._model,
            prompt=self._prompt,
            generation_settings=self._settings,
            has_new_line=self._new_line,
            stop_type="word" if word and not self._ended.reason.cut else self._ended.reason.llama_server,
            stopping_word=word,
            truncated=False,
            tokens_predicted=usage.completion_tokens,
            tokens_evaluated=usage.prompt_tokens,
            tokens_cached=usage.cached_tokens,
            timings=wire_timings(usage),
        )
