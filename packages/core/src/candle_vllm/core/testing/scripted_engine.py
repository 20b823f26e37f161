# SPDX-License-Identifier: MIT
"""ScriptedEngine: an engine with scripted answers, for tests of code that uses the engine.

`ScriptedEngine` has the methods of `InferenceEngine` that the other packages call. It needs no model and no torch,
answers at once, follows the same contract (`TokenOutput`), and records its requests.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import re
import uuid
from array import array
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Unpack

import msgspec

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.engine.adapters.adapter_store import AdapterCall
from candle_vllm.core.engine.model_info import AdapterInfo, ModelInfo
from candle_vllm.core.engine.outputs import (
    ClassificationOutput,
    EmbeddingOutput,
    ScoreOutput,
    TokenOutput,
)
from candle_vllm.core.engine.requests import GenerationRequest, LoraChoice, PoolingRequest
from candle_vllm.core.engine.runners.sleeping import TAGS
from candle_vllm.core.engine.stats import EngineStats
from candle_vllm.core.engine.step.preparation import check_pooling_request
from candle_vllm.core.engine.step.request_watchers import (
    Apart,
    RequestInfo,
    RequestWatch,
    RequestWatcher,
    TextOptions,
    watched_submit,
)
from candle_vllm.core.engine.step.stream import Receiver, RequestSink, TokenStream
from candle_vllm.core.engine.step.thread import SLEEPS
from candle_vllm.core.engine_front import EngineFront
from candle_vllm.core.errors import (
    CandleVllmError,
    ChatTemplateError,
    EngineSleepingError,
    InvalidParameterError,
    PromptTooLongError,
    RequestError,
)
from candle_vllm.core.pooling import POOLING_METHODS, ModelPooling, PoolingParams, PoolingPlan
from candle_vllm.core.sampling.llguidance_backend import LlguidanceBackend
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.testing.scripted_sequence import ScriptedSequence, made_up_logprobs
from candle_vllm.core.text.infill import infill_marks
from candle_vllm.core.text.prompts import Prompt, as_prompts, read_prompt
from candle_vllm.core.text.tokenizer import ChatConventions, utf8_decoder
from candle_vllm.core.vision.inputs import ImageInput
from candle_vllm.core.vision.pictures import Picture, picture_of

_PAUSE = 0.005  # seconds
SIZE = 16  # elements of a vector

Pieces = str | Sequence[str | bytes]
Script = Pieces | Callable[[str], Pieces]


class PoolingCall(NamedTuple):
    """Arguments of one call of `aembed`, `aclassify` or `ascore`."""

    inputs: list[Prompt] | list[tuple[str, str]]
    params: PoolingParams | None
    request_id: str | None
    priority: int
    lora_request: LoraChoice = ()
    apart: Apart = asyncio.to_thread


class TemplateCall(NamedTuple):
    """Arguments of one `render_messages` call."""

    messages: list[dict[str, Any]]
    options: dict[str, Any]


class ScriptedEngine(EngineFront):
    """An engine that answers every prompt with a script, and computes vectors and scores from the tokens.

    A vector counts tokens by their id modulo `SIZE`; by default its length is 1, and `dimensions` truncates it. A score
    is the cosine of two vectors, or without the task "embed" the share of the second text's tokens that the first has.

    Args:
        script: the answer: a text (one character per step), a list of chunks (one chunk per step; a chunk of bytes may
            end inside a character), or a function that gets the prompt's text (without the beginning token) and returns
            either. A function is called once per sequence, so that answers can differ. The end token follows the
            script; with `ignore_eos` the script begins again.
        name, max_model_len, default_sampling, has_chat_template: shown in `model_info`.
        submit_error: raised for every request, like the error of a full queue or a dead engine.
        fail_after: number of a request's `TokenOutput`s before `failure`; requests for vectors fail at once.
        failure: an exception that the stream raises, or a text, with which sequences end as `FinishReason.ERROR`.
        failure_kind: kind of the error for a text.
        num_cached_tokens: reported by every answer.
        chat_template: shown in `chat_conventions`; the engine always renders ChatML.
        special_tokens: names of further special tokens, which a chunk of a script may contain.
        architecture: shown in `model_info`.
        sees: whether to accept images; the script does not receive them.
        tasks: supported tasks; without "generate" it is an embedding model, with "score" alone a cross-encoder.
        pause, first_pause: seconds before every `TokenOutput`, and before the first one if that is not 0.

    Attributes:
        requests: every accepted request, in order.
        aborted: ids of requests whose stream was closed before its end.
        pausing: number of requests in a pause before their next `TokenOutput`.
        template_calls: every rendered conversation.
        pooling_calls: every call for vectors or scores, in order.
        pictures: every image that `look` was given.
        chat_conventions: conventions like those of a model.
    """

    chat_conventions: ChatConventions = ChatConventions()  # tests set it
    template = vision = None

    def __init__(
        self,
        script: Script = "Hello!",
        *,
        name: str = "scripted",
        max_model_len: int = 4096,
        default_sampling: Mapping[str, Any] | None = None,
        has_chat_template: bool = True,
        submit_error: Exception | None = None,
        fail_after: int | None = None,
        failure: Exception | str = "scripted failure",
        failure_kind: Literal["request", "engine"] = "engine",
        num_cached_tokens: int = 0,
        chat_template: str | None = None,
        special_tokens: Sequence[str] = (),
        architecture: str = "scripted",
        tasks: Sequence[str] = ("generate", "embed", "score"),
        sees: bool = False,
        pause: float = 0.0,
        first_pause: float = 0.0,
    ) -> None:
        self.config, self._owner = EngineConfig(model=name, enable_lora=True), os.getpid()
        self.pooling_calls: list[PoolingCall] = []
        self.tokenizer = ByteTokenizer(special_tokens)
        self.chat_conventions = ChatConventions(
            chat_template=chat_template, special_tokens=self.tokenizer.special_tokens
        )
        self.requests: list[GenerationRequest] = []
        self.aborted: list[str] = []
        self.pausing = 0
        self.prefix_cache_resets = 0
        self.asleep: frozenset[str] = frozenset()
        self.sleep_level = 0
        self.template_calls: list[TemplateCall] = []
        self.pictures: list[Picture] = []
        self.adapters: dict[str, AdapterInfo] = {}
        self._grammars = LlguidanceBackend(self.tokenizer, self.tokenizer.vocab_size, (self.tokenizer.eos_token_id,))
        self.submit_error = submit_error
        self.fail_after = fail_after
        self.failure = failure
        self.failure_kind: Literal["request", "engine"] = failure_kind
        self.num_cached_tokens = num_cached_tokens
        self.pause = pause
        self.first_pause = first_pause
        self._script = script
        self._default_sampling = dict(default_sampling or {})
        self._live: set[str] = set()
        self._finished = Counter[str]()
        self._generated = 0
        self._info = ModelInfo(
            name=name,
            architecture=architecture,
            num_parameters=0,
            max_model_len=max_model_len,
            vocab_size=self.tokenizer.vocab_size,
            dtype="none",
            device="none",
            quantization=None,
            weight_bytes=0,
            eos_token_ids=(self.tokenizer.eos_token_id,),
            has_chat_template=has_chat_template,
            default_sampling=self._default_sampling,
            tasks=tuple(tasks),
            modalities=("text", "image") if sees else ("text",),
            max_images=64 if sees else 0,
            image_text="<image>" if sees else "",
            embedding_size=SIZE if "embed" in tasks else 0,
            max_num_seqs=256,
            pair_marks=2,
            labels=("first", "second", "third") if "classify" in tasks else (),
        )

    @property
    def is_alive(self) -> bool:
        return True

    def add_death_callback(self, callback: Callable[[], None]) -> None:
        """Ignore the callback: a scripted engine does not die."""

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the bytes of the text as token ids, by default after the beginning token."""
        return self.tokenizer.encode(text, add_special_tokens)

    def token_names(self, token_ids: Sequence[int]) -> list[str]:
        """Return each token's bytes in hexadecimal, so that its name differs from its text."""
        return [data.hex() for data in self.token_bytes(token_ids)]

    def reset_prefix_cache(self) -> None:
        """Count the call in `prefix_cache_resets`; there is no cache."""
        self.prefix_cache_resets += 1

    @property
    def is_sleeping(self) -> bool:
        """Whether a part of the engine sleeps."""
        return bool(self.asleep)

    def _sleep(self, level: int, mode: str) -> None:  # noqa: ARG002
        """Refuse new requests for text; running requests continue in every `mode`."""
        self.asleep, self.sleep_level = TAGS, level

    def _wake_up(self, tags: frozenset[str]) -> None:
        self.asleep -= tags
        self.sleep_level = self.sleep_level if self.asleep else 0

    def look(
        self, token_ids: Sequence[int], images: Sequence[object], names: Sequence[str] = (), *, bounded: bool = True
    ) -> tuple[list[int], tuple[ImageInput, ...]]:
        """Return the prompt unchanged, with the images as inputs, and record the images."""
        del bounded
        if images and all(isinstance(image, ImageInput) for image in images):
            return list(token_ids), tuple(images)  # type: ignore[arg-type]
        shown = [picture_of(image, name=name) for image, name in zip(images, names or ["image"] * len(images))]
        self.pictures += shown
        return list(token_ids), tuple(
            ImageInput(key=each.digest, tiles=each.pixels.tobytes(), sizes=(size,), whole=size)
            for each, size in zip(shown, [(each.height, each.width) for each in shown])
        )

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Render ChatML, tool calls as JSON; only `add_generation_prompt` and `continue_final_message` matter."""
        variables = options.pop("chat_template_kwargs", None) or {}
        return self.render_messages(messages, **options, **variables)

    def render_messages(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Render as `apply_chat_template`."""
        self._check_generates()
        if not self._info.has_chat_template:
            raise ChatTemplateError(f"{self._info.name} has no chat template", "messages")
        self.template_calls.append(TemplateCall([dict(message) for message in messages], options))
        text = "".join(map(_chatml, messages))
        if options.get("continue_final_message"):
            return text.removesuffix("<|im_end|>\n")
        return text + ("<|im_start|>assistant\n" if options.get("add_generation_prompt", True) else "")

    def check_structured_outputs(self, params: StructuredOutputsParams) -> None:
        """Compile the grammar for the byte tokenizer; raise the real engine's errors. It does not constrain scripts."""
        self._grammars.compile(params)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        watcher: RequestWatcher | None = None,
        **call: Unpack[TextOptions],
    ) -> TokenStream:
        """Check the request and return its stream; raises the real engine's errors, or `submit_error`."""
        params = self._filled(sampling_params)
        call["request_id"] = request_id = call.get("request_id") or uuid.uuid4().hex
        info = RequestInfo(request_id, "generate", prompt, params, self.detokenize, call.get("lora_request"))
        with watched_submit(watcher, info) as watch:
            request = self._request(prompt, params, **call)
            self._check(request)
            self.requests.append(request)
            self._live.add(request_id)
            sequences = [self._sequence(request, index) for index in range(params.n)]
        return TokenStream(request, ScriptedSink(self, request, sequences, watch))

    def stats(self) -> EngineStats:
        """Return counts of requests and tokens; a scripted engine has no blocks."""
        return EngineStats(
            num_running=len(self._live),
            num_waiting=0,
            num_blocks=0,
            num_free_blocks=0,
            block_size=16,
            prompt_tokens=sum(len(request.prompt_token_ids) for request in self.requests),
            cached_prompt_tokens=self.num_cached_tokens * len(self.requests),
            generation_tokens=self._generated,
            finished=dict(self._finished),
            preemptions=0,
            steps=self._generated,
            sleep_level=self.sleep_level,
        )

    def call_adapters(self, call: AdapterCall) -> tuple[AdapterInfo, ...]:
        """Register, remove or pin an adapter, or list all of them; files are not read."""
        if call.adapter is None:
            return tuple(self.adapters.values())
        name = call.adapter.name
        if call.what == "remove":
            return (self.adapters.pop(name),) if name in self.adapters else ()
        if call.what == "add":
            self.adapters[name] = AdapterInfo(name=name, path=call.adapter.path, state="ready", rank=8, modules=1)
        else:
            self.adapters[name] = msgspec.structs.replace(self.adapters[name], pinned=True)
        return (self.adapters[name],)

    def close(self) -> None:
        """Do nothing: a scripted engine has no resources."""

    def _require(self) -> tuple[Any, Any]:
        return self, self

    def _running_thread(self) -> Any:
        raise NotImplementedError("a scripted engine has no thread")

    def _pooling(self, **options: Any) -> ScriptedPooling:  # type: ignore[override]
        return ScriptedPooling(self, **options)

    def _check(self, request: GenerationRequest) -> None:
        if request.params.structured_outputs is not None:
            self.check_structured_outputs(request.params.structured_outputs)
        if self.asleep:
            raise EngineSleepingError(SLEEPS)
        if self.submit_error is not None:
            raise self.submit_error
        ids, limit = request.prompt_token_ids, self._info.max_model_len
        if not ids or min(ids) < 0 or max(ids) >= self.tokenizer.vocab_size:
            raise InvalidParameterError("the prompt needs at least one token, all of them in the vocabulary", "prompt")
        if len(ids) + (request.params.max_tokens or 1) > limit:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens and max_tokens is {request.params.max_tokens}; "
                f"together that is too many: this model's maximum context length is {limit} tokens",
                "max_tokens",
            )
        if request.request_id in self._live:
            raise InvalidParameterError(f"a request with id {request.request_id!r} is running", "request_id")

    def _sequence(self, request: GenerationRequest, index: int) -> ScriptedSequence:
        script, tokenizer = self._script, self.tokenizer
        if callable(script):
            ids = request.prompt_token_ids
            bare = ids[1:] if ids[0] == tokenizer.bos_token_id else ids
            script = script(self.detokenize(bare, skip_special_tokens=False))
        room = self._info.max_model_len - len(request.prompt_token_ids)
        return ScriptedSequence(
            request,
            index,
            [list(piece) if isinstance(piece, bytes) else tokenizer.encode(piece, False) for piece in script],
            eos_token_id=tokenizer.eos_token_id,
            token_bytes=tokenizer.token_bytes,
            max_tokens=min(request.params.max_tokens or room, room),
            num_cached_tokens=self.num_cached_tokens,
            special_tokens=tokenizer.special_tokens,
        )

    def note_piece(self, piece: TokenOutput) -> None:
        """Count a `TokenOutput` of a stream."""
        self._generated += len(piece.token_ids)
        if piece.finish_reason is not None:
            self._finished[piece.finish_reason] += 1

    def note_end(self, request_id: str, *, aborted: bool) -> None:
        """Remove a request whose stream has ended."""
        self._live.discard(request_id)
        if aborted:
            self.aborted.append(request_id)


@dataclasses.dataclass
class ScriptedPooling:
    """One call for vectors, scores or classes; raises the real engine's errors, `submit_error` or `failure`."""

    engine: ScriptedEngine
    _: dataclasses.KW_ONLY
    request_id: str
    priority: int = 0
    lora_request: LoraChoice = ()
    apart: Apart = asyncio.to_thread
    add_special_tokens: bool = True

    async def atexts(self, task: str, inputs: Prompt | Sequence[Prompt], params: PoolingParams | None) -> list[Any]:
        """Return a vector of each text, or its tokens' shares by label: a token's id modulo the number of labels."""
        items = as_prompts(inputs)
        read = (read_prompt(item, sees=True) for item in items)
        encode = self.engine.tokenize
        texts = [encode(text or "", self.add_special_tokens) if ids is None else ids for text, ids, _ in read]
        self._note(items, params)
        for number, ids in enumerate(texts):
            self._check_text(ids, number, len(texts))
        self._fail()
        plan = ModelPooling(SIZE, "mean", matryoshka=True).plan(params or PoolingParams())
        count, made = len(self.engine.model_info.labels), []
        for number, ids in enumerate(texts):
            name, tokens = f"{self.request_id}-{number}", tuple(ids)
            if task == "embed":
                made.append(EmbeddingOutput(request_id=name, embedding=_vector(ids, plan), prompt_token_ids=tokens))
            else:
                shares = array("f", [sum(token % count == each for token in ids) / len(ids) for each in range(count)])
                made.append(ClassificationOutput(request_id=name, probs=shares, prompt_token_ids=tokens))
        return made

    async def ascore(self, pairs: Sequence[tuple[str, str]]) -> list[ScoreOutput]:
        """Return the score of every pair."""
        self._note(list(pairs), None)
        made = [self._score(pair, number, len(pairs)) for number, pair in enumerate(pairs)]
        self._fail()
        return made

    def _note(self, items: Any, params: PoolingParams | None) -> None:
        self.engine.pooling_calls.append(
            PoolingCall(items, params, self.request_id, self.priority, self.lora_request, self.apart)
        )

    def _score(self, pair: tuple[str, str], number: int, count: int) -> ScoreOutput:
        first, second = map(self.engine.tokenize, pair)
        if "embed" in self.engine.model_info.tasks:
            self._check_text(first, number, count, 0)
            self._check_text(second, number, count, 1)
            plan = PoolingPlan(POOLING_METHODS["mean"], True, SIZE)
            score = math.fsum(a * b for a, b in zip(_vector(first, plan), _vector(second, plan)))
        else:
            self._check_text(first + second, number, count)
            score = sum(token in first for token in second) / len(second)
        return ScoreOutput(score=score, num_tokens=len(first) + len(second))

    def _check_text(self, ids: list[int], number: int, count: int, side: int | None = None) -> None:
        info = self.engine.model_info
        request = PoolingRequest(request_id="scripted", prompt_token_ids=ids)
        try:
            check_pooling_request(request, info.vocab_size, info.max_model_len)
        except RequestError as error:
            if count == 1 and side is None:
                raise
            param = f"inputs.{number}" if side is None else f"inputs.{number}.{side}"
            raise type(error)(f"input {number}: {error}", param) from None

    def _fail(self) -> None:
        engine = self.engine
        if engine.submit_error is not None:
            raise engine.submit_error
        if engine.fail_after is not None:
            raise engine.failure if isinstance(engine.failure, Exception) else CandleVllmError(engine.failure)


class ScriptedSink(RequestSink):
    """Produces the `TokenOutput`s of one request after `start` is called, one of each sequence in turn."""

    def __init__(
        self,
        engine: ScriptedEngine,
        request: GenerationRequest,
        sequences: Sequence[ScriptedSequence],
        watch: RequestWatch | None,
    ) -> None:
        super().__init__(None, len(sequences), lambda _: engine.note_end(request.request_id, aborted=True), watch)
        self._request = request
        self._engine = engine
        self._waiting = deque(sequences)
        self._given = 0
        self._task: asyncio.Task[None] | None = None

    def start(self, receiver: Receiver[TokenOutput]) -> None:
        """Push all further outputs to `receiver`."""
        super().start(receiver)
        if self._unfinished:
            self._task = asyncio.create_task(self._run())

    def close(self, *, dropped: bool = False) -> None:
        super().close(dropped=dropped)
        if self._task is not None and not self._task.get_loop().is_closed():
            self._task.cancel()

    async def _run(self) -> None:
        engine = self._engine
        if self._request.params.prompt_progress:
            for piece in self._waiting[0].progress():
                self.put(piece)
        while self._unfinished:
            pause = engine.pause if self._given else engine.first_pause or engine.pause
            engine.pausing += 1
            try:
                await asyncio.sleep(pause)  # yields to the event loop even if `pause` is 0
            finally:
                engine.pausing -= 1
            while self._held:  # the real engine would generate on, and its outputs would be held
                await asyncio.sleep(_PAUSE)
            piece = self._next_piece()
            self._given += 1
            if isinstance(piece, TokenOutput):
                engine.note_piece(piece)
            if isinstance(piece, Exception) or not self._waiting:
                engine.note_end(self._request.request_id, aborted=False)
            self.put(piece)  # type: ignore[arg-type]  # scripts may fail with any exception

    def _next_piece(self) -> TokenOutput | Exception:
        sequence = self._waiting.popleft()
        if self._engine.fail_after is not None and self._given >= self._engine.fail_after:
            failure = self._engine.failure
            return failure if isinstance(failure, Exception) else sequence.failed(failure, self._engine.failure_kind)
        piece = sequence.next_piece(self._prompt_logprobs() if self._given == 0 else None)
        if not piece.finished:
            self._waiting.append(sequence)
        return piece

    def _prompt_logprobs(self) -> tuple[Any, ...] | None:
        params, ids = self._request.params, self._request.prompt_token_ids
        if params.prompt_logprobs is None:
            return None
        token_bytes = self._engine.tokenizer.token_bytes
        return (None, *(made_up_logprobs(token, params.prompt_logprobs, token_bytes) for token in ids[1:]))


def _chatml(message: Mapping[str, Any]) -> str:
    calls = "".join("\n" + json.dumps(call["function"]) for call in message.get("tool_calls", ()))
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part.get("text", f"<{part['type']}>") for part in content)
    return f"<|im_start|>{message['role']}\n{content}{calls}<|im_end|>\n"


def _vector(ids: Sequence[int], plan: PoolingPlan) -> array[float]:
    counts = [float(sum(token % SIZE == place for token in ids)) for place in range(plan.dimensions)]
    length = math.sqrt(math.fsum(count * count for count in counts)) if plan.normalize else 1.0
    return array("f", [count / (length or 1.0) for count in counts])


class ByteTokenizer:
    """A tokenizer of bytes, for tests. Ids 0 to 255 are bytes; four special tokens follow, and then the given ones."""

    SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
    bos_token_id = 256
    eos_token_id = 257

    def __init__(self, special_tokens: Sequence[str] = ()) -> None:
        names = (*self.SPECIAL_TOKENS, *special_tokens)
        self.special_tokens = {name: 256 + place for place, name in enumerate(names)}
        self.vocab_size = 256 + len(names)
        self.longest_token = max(map(len, names))
        self.infill = infill_marks(self.special_tokens.get, {})
        self._names = names
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")")

    def encode(self, text: str, add_special_tokens: bool = True, *, parse_special: bool = True) -> list[int]:
        """Return UTF-8 bytes as ids. By default the beginning token is first, and special tokens' names become ids."""
        ids = [self.bos_token_id] if add_special_tokens else []
        for part in self._split.split(text) if parse_special else (text,):
            if parse_special and part in self.special_tokens:
                ids.append(self.special_tokens[part])
            else:
                ids.extend(part.encode("utf-8"))
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True, *, whole: bool = True) -> str:
        """As in `core.text.tokenizer.Tokenizer`."""
        kept = [token for token in token_ids if not (skip_special_tokens and self.is_special(token))]
        return utf8_decoder("replace").decode(b"".join(map(self.token_bytes, kept)), whole)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, also of a special one; raises InvalidParameterError for an unknown id."""
        if not 0 <= token_id < self.vocab_size:
            raise InvalidParameterError(f"there is no token {token_id}; ids run from 0 to {self.vocab_size - 1}")
        return bytes([token_id]) if token_id < 256 else self._names[token_id - 256].encode()

    def is_special(self, token_id: int) -> bool:
        """Whether a token is special."""
        return 256 <= token_id < self.vocab_size
