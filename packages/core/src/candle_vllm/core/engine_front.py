# SPDX-License-Identifier: MIT
"""EngineFront: what callers do with an engine, wherever it runs (steps 3 and 10 of a request's life).

`InferenceEngine` runs its engine in a thread, `RemoteEngine` in a process of its own. What both share stands here:
texts become token ids, prompts become requests, pieces become outputs. No torch is imported for it.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, Self, Unpack, overload

import msgspec
from msgspec.structs import replace

from candle_vllm.core.arguments import explained
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.engine.adapters.adapter_store import AdapterCall
from candle_vllm.core.engine.model_info import AdapterInfo, ModelInfo
from candle_vllm.core.engine.outputs import ClassificationOutput, EmbeddingOutput, GenerationOutput, ScoreOutput
from candle_vllm.core.engine.requests import (
    AdapterUse,
    GenerationRequest,
    LoraChoice,
    LoRARequest,
    adapter_uses,
    each_lora_choice,
)
from candle_vllm.core.engine.runners.sleeping import check_sleep, read_tags
from candle_vllm.core.engine.stats import EngineStats
from candle_vllm.core.engine.step.admission import check_encoder_task
from candle_vllm.core.engine.step.pooling_calls import MAX_TEXT, Pair, PoolingCalls
from candle_vllm.core.engine.step.stream import Bar, RequestSink, TokenIterator, TokenStream, run_all, whole
from candle_vllm.core.engine.step.thread import PreparingEngine, RequestRunner
from candle_vllm.core.engine.step.watching import (
    Operation,
    PoolingOptions,
    RequestInfo,
    RequestWatcher,
    ScoreOptions,
    TextOptions,
    watched_pooling,
    watched_submit,
)
from candle_vllm.core.errors import (
    ChatTemplateError,
    EngineDeadError,
    InvalidParameterError,
    PromptTooLongError,
    RequestError,
    UnsupportedModelError,
)
from candle_vllm.core.pooling import PoolingParams
from candle_vllm.core.sampling.params import RequestOutputKind, SamplingParams
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.text.chat_conventions import ChatConventions, chat_conventions
from candle_vllm.core.text.chat_template import ChatTemplate
from candle_vllm.core.text.infill import InfillPrompt, infill_prompt
from candle_vllm.core.text.prompts import (
    Message,
    Prompt,
    addresses_of,
    as_conversations,
    as_prompts,
    one_conversation,
    pictures_of,
    prompt_pictures,
    prompt_texts,
    read_prompt,
    with_files,
)
from candle_vllm.core.text.tokenizer import Tokenizer
from candle_vllm.core.vision.fetching import ImageSources
from candle_vllm.core.vision.inputs import ImageInput
from candle_vllm.core.vision.prompts import Sight

_SAMPLING = {"SamplingParams": SamplingParams.__struct_fields__}


class Texts(Protocol):
    """What turns texts into tokens and conversations into texts."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def template(self) -> ChatTemplate | None: ...

    @property
    def sight(self) -> Sight | None: ...


class EngineFront(ABC):
    """The methods that every engine has.

    Attributes:
        config: the engine's settings.
        image_sources: where pictures of conversations may come from, by those; for adapters over the engine as well.
    """

    config: EngineConfig
    image_sources: ImageSources
    _info: ModelInfo
    _owner: int  # the process that made it

    # ---- what is loaded ----------------------------------------------------------------------------------------------

    @property
    def model_info(self) -> ModelInfo:
        """Name, architecture, size, context, and the sampling defaults."""
        return self._info

    @property
    def default_sampling_params(self) -> SamplingParams:
        """SamplingParams with the defaults of the model's files, and ours where those say nothing."""
        return msgspec.convert(self._info.default_sampling, SamplingParams)

    def _filled(self, params: SamplingParams | None) -> SamplingParams:
        """The parameters with the model's defaults in what they leave open.

        Raises:
            InvalidParameterError: they are none.
        """
        if not isinstance(params, (SamplingParams, type(None))):
            raise _no_params(params)
        params = params or SamplingParams()
        if params.output_kind is not RequestOutputKind.CUMULATIVE:
            said = "output_kind is for AsyncLLM: generate gives whole outputs, stream and generate_stream pieces"
            raise InvalidParameterError(said, "output_kind")
        return params.filled(self._info.default_sampling)

    @property
    def chat_conventions(self) -> ChatConventions:
        """How the model was trained to chat: its template and the tokens that structure a conversation."""
        loaded = self._require()[1]
        template = None if loaded.template is None else loaded.template.source
        return chat_conventions(loaded.tokenizer, template)

    @property
    @abstractmethod
    def is_alive(self) -> bool:
        """False once the engine is closed or has failed for good."""

    @abstractmethod
    def add_death_callback(self, callback: Callable[[], None]) -> None:
        """Calls `callback` once, when the engine dies without being told to; at once where it has."""

    def stats(self) -> EngineStats:
        """Counters since the start and gauges of now."""
        return self._working().stats()

    @explained()
    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, by default with the beginning token that the model asks for.

        Raises:
            PromptTooLongError: the text is longer than any prompt could be; it is refused before work is spent on it.
        """
        if not isinstance(text, str):
            raise InvalidParameterError(f"the text to tokenize must be a text, not {type(text).__name__}", "prompt")
        tokenizer = self._require()[1].tokenizer
        self._check_text_length(text, "prompt")
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _check_text_length(self, text: str, name: str) -> None:
        most = self._info.max_model_len * self._require()[1].tokenizer.longest_token
        most = most if "generate" in self._info.tasks else max(most, MAX_TEXT)
        if len(text) > most:
            raise PromptTooLongError(
                f"the text has {len(text)} characters; the model's maximum context length of "
                f"{self._info.max_model_len} tokens holds at most {most} of them",
                name,
            )

    @explained()
    def infill(self, prefix: str | Sequence[int], suffix: str) -> InfillPrompt:
        """A prompt whose answer belongs between `prefix` (a text or its tokens) and `suffix`, and where it ends.

        Raises:
            InvalidParameterError: the model was not trained to fill in the middle.
            PromptTooLongError: a text is longer than any prompt could be.
        """
        tokenizer = self._require()[1].tokenizer
        for text, name in ((prefix, "prompt"), (suffix, "suffix")):
            if isinstance(text, str) and tokenizer.infill is not None:
                self._check_text_length(text, name)
        return infill_prompt(tokenizer, tokenizer.infill, prefix, suffix)

    @explained()
    def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = True, *, whole: bool = True) -> str:
        """Text of token ids; where it is not the `whole`, the beginning of a character at its end is left out.

        Raises:
            InvalidParameterError: they are none, or one is not in the vocabulary.
        """
        try:
            return self._require()[1].tokenizer.decode(token_ids, skip_special_tokens, whole=whole)
        except TypeError:
            raise InvalidParameterError("detokenize takes a list of token ids", "token_ids") from None

    def look(
        self, token_ids: Sequence[int], images: Sequence[object], names: Sequence[str] = ()
    ) -> tuple[list[int], tuple[ImageInput, ...]]:
        """A prompt with what stands for its pictures, and these as the engine takes them; it may run in any thread.

        Args:
            token_ids: the prompt, with the mark that the model's template writes for each picture.
            images: Pillow images, arrays [height, width, 3] of uint8, or the bytes of PNG, JPEG, WebP or GIF files; or
                what this gave, with its tokens.
            names: what messages call each, and the fields to blame; "image" where that is not said.

        Raises:
            InvalidParameterError: the model reads text alone, a picture cannot be used, or there are not as many as
                marks.
        """
        if images and all(isinstance(image, ImageInput) for image in images):
            return list(token_ids), tuple(images)  # type: ignore[arg-type]
        if self._sight is None:
            raise InvalidParameterError(f"image: {self._info.name} reads text alone", "image")
        return self._sight.look(token_ids, images, names, self._info.max_model_len)

    async def fetch_images(self, messages: Sequence[Message]) -> list[Message]:
        """A conversation whose pictures are all in it, for `achat_stream`; `chat`, `chat_stream` and `achat` do it.

        Pictures at addresses are had as `allowed_media_domains` and `allowed_local_media_path` allow: `https://`,
        `http://` and `file://`, each checked at every redirect, with 20 MB and 10 seconds each and 64 MB in all.

        Raises:
            UnsupportedParameterError: nothing is allowed there.
            InvalidParameterError: one could not be had, and why.
        """
        template = self._require()[1].template
        conversation = one_conversation(messages, template, sees=self._sight is not None)
        return await self._with_images(conversation)

    async def _with_images(self, conversation: Sequence[Message]) -> list[Message]:
        wanted = addresses_of(conversation)
        return with_files(conversation, await self.image_sources.files(wanted)) if wanted else list(conversation)

    def apply_chat_template(self, messages: Sequence[Message], **options: Any) -> str:
        """The conversation as one prompt text, by the model's own template.

        Args:
            messages: dicts with `role` and `content`, as in OpenAI's API: texts or lists of text parts, calls and what
                answers them. They become what the template wants (`template_messages`).
            options: `tools`, `documents`, `add_generation_prompt`, `continue_final_message`, anything that the template
                itself reads (`enable_thinking`, ...), `chat_template` (Jinja source in the place of the model's), and
                `chat_template_kwargs`: variables that a template may leave unread, for programs that do not know it.

        Raises:
            InvalidParameterError: a message or the template is wrong; the error names its place.
            ChatTemplateError: the model has no template, or it refused the conversation.
            TypeError: an option is none, and the template does not read it.
        """
        return self._rendered("apply_chat_template", messages, options)[0]

    def _rendered(self, method: str, messages: Any, options: Mapping[str, Any]) -> list[str]:
        template, sees = self._template(options.get("chat_template")), self._sight is not None
        conversation = one_conversation(messages, template, sees=sees)
        return prompt_texts(method, [conversation], template, options, _SAMPLING)

    def _template(self, source: str | None = None) -> ChatTemplate:
        """The model's template, or what `source` is."""
        if not self.model_info.has_chat_template:  # a reward model reads conversations
            self._check_generates()
        texts = self._require()[1]
        if source is not None:
            if not isinstance(source, str):
                said = f"chat_template must be Jinja source, not {type(source).__name__}"
                raise InvalidParameterError(said, "chat_template")
            try:
                return ChatTemplate(source, texts.tokenizer.special_tokens)
            except UnsupportedModelError as error:
                raise InvalidParameterError(f"chat_template cannot be used: {error}", "chat_template") from None
        if texts.template is None:
            raise ChatTemplateError(f"{self._info.name} has no chat template: pass one (`chat_template`)", "messages")
        return texts.template

    @property
    @abstractmethod
    def is_sleeping(self) -> bool:
        """Whether it sleeps: requests are refused (`EngineSleepingError`) before all of it is awake."""

    @explained()
    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Gives memory back and takes no requests; returns when that is done.

        Args:
            level: 1 gives the memory of the KV cache back, and a GPU's of the weights, which go to the host's. 2 drops
                the weights as well; they are read from the model's files when it wakes up.
            mode: "abort" ends what runs or waits, as `abort` does; "wait" lets it end first.

        What prompts began with is forgotten, but for blocks on disk. Adapters stay. An engine that sleeps may be put to
        sleep at the other level; from 2 it comes back by waking alone.

        Raises:
            CandleVllmError: this engine cannot sleep so: random weights at level 2, or the CPU of another system than
                Linux. Nothing has changed then.
            EngineDeadError: it has stopped.
        """
        check_sleep(level, mode)
        self._sleep(level, mode)

    @explained()
    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Fills memory again; answers are what they were before, to the bit. One that is awake stays so.

        Args:
            tags: "weights", "kv_cache" or both; None is both. Requests are taken once both are awake.

        Raises:
            CandleVllmError: the weights cannot be read again, or there is too little memory: it sleeps on.
            EngineDeadError: it has stopped.
        """
        self._wake_up(read_tags(tags))

    @abstractmethod
    def _sleep(self, level: int, mode: str) -> None: ...

    @abstractmethod
    def _wake_up(self, tags: frozenset[str]) -> None: ...

    @abstractmethod
    def reset_prefix_cache(self) -> None:
        """Forgets what prompts began with: no later request takes anything from the cache that stands in it now.

        Raises:
            EngineDeadError: the engine has stopped.
        """

    @abstractmethod
    def abort(self, request_id: str) -> None:
        """Ends a request before the next step and frees its blocks; unknown ids are ignored."""

    @abstractmethod
    def check_structured_outputs(self, params: StructuredOutputsParams) -> None:
        """Checks a form of texts as a request with it would, and keeps what was compiled for that request.

        The first call of an engine takes a second or two, later ones as long as the form takes to compile; call it in a
        worker thread where an event loop must go on. Thread-safe.

        Raises:
            InvalidParameterError: the form is wrong, or something in it is not supported; it is named.
        """

    # ---- adapters ----------------------------------------------------------------------------------------------------

    @explained()
    def add_lora(self, lora_request: LoRARequest) -> AdapterInfo:
        """Makes an adapter known by its name and loads it; waits for that, while requests go on.

        Thread-safe, as the three methods behind it are. With `load_inplace` the files are read anew; what runs with the
        old ones ends with them.

        Raises:
            AdapterError: it cannot be used: its files, or what they ask of the model.
            InvalidParameterError: adapters are off (`enable_lora`), or the name has other files.
            EngineOverloadedError: it was not loaded in time: others need the memory.
            EngineDeadError: the engine has stopped.
        """
        if not isinstance(lora_request, LoRARequest):
            said = f"lora_request must be a LoRARequest, not {type(lora_request).__name__}"
            raise InvalidParameterError(said, "lora_request")
        return self._adapters(AdapterCall("add", lora_request.use()))[0]

    @explained()
    def remove_lora(self, lora_name: str) -> bool:
        """Forgets a name; False where there was none. Requests that were taken go on to their ends.

        Raises:
            InvalidParameterError, EngineDeadError: as of `add_lora`.
        """
        return bool(self._adapters(AdapterCall("remove", AdapterUse(name=lora_name))))

    @explained()
    def pin_lora(self, lora_name: str) -> AdapterInfo:
        """Loads an adapter that is known and keeps it in memory until it is removed. Errors as of `add_lora`."""
        return self._adapters(AdapterCall("pin", AdapterUse(name=lora_name)))[0]

    def list_loras(self) -> tuple[AdapterInfo, ...]:
        """All adapters that are known; none where adapters are off. Errors as of `remove_lora`."""
        return self._adapters(AdapterCall("list")) if self.config.enable_lora else ()

    @abstractmethod
    def _adapters(self, call: AdapterCall) -> tuple[AdapterInfo, ...]:
        """Has the engine carry out what is asked of its adapters; `remove` gives what was removed."""

    # ---- whole answers -----------------------------------------------------------------------------------------------

    @explained(**_SAMPLING)
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Bar = True,
        priority: int | Sequence[int] = 0,
        add_special_tokens: bool = True,
        lora_request: LoraChoice | Sequence[LoraChoice] = None,
    ) -> list[GenerationOutput]:
        """Continues every prompt; outputs in the order of the prompts.

        Args:
            prompts: one prompt or a list; a prompt is a text, a list of token ids, or vLLM's object with `prompt` or
                `prompt_token_ids`.
            sampling_params: one for all, or one each. What they leave open is the model's (`default_sampling_params`);
                16 tokens where they leave `max_tokens` open.
            use_tqdm: show a progress bar, on a terminal; or what makes one, called as tqdm is.
            priority: one for all, or one each; lower runs first.
            add_special_tokens: texts begin with the token that the model asks for.
            lora_request: the adapter of all prompts (`enable_lora`), pairs of adapters and scales for a mix of them, or
                one of either, or None, for each prompt. A path that comes with a name is read when it is first used.

        Raises:
            RequestError: a prompt or its parameters are wrong, with its place in a list (`prompts[50]`); nothing has
                run then.
            RequestAbortedError: the engine was closed meanwhile.
            CandleVllmError: the engine failed on a request.
        """
        todo = self._requests(
            "prompts", as_prompts(prompts), sampling_params, add_special_tokens, priority, lora_request
        )
        return [output for _, output in sorted(run_all(self._running_thread(), todo, use_tqdm))]

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        use_tqdm: Bar = True,
        priority: int = 0,
        lora_request: LoraChoice = None,
        **options: Any,
    ) -> GenerationOutput: ...

    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Bar = True,
        priority: int | Sequence[int] = 0,
        lora_request: LoraChoice | Sequence[LoraChoice] = None,
        **options: Any,
    ) -> list[GenerationOutput]: ...

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Bar = True,
        priority: int | Sequence[int] = 0,
        lora_request: LoraChoice | Sequence[LoraChoice] = None,
        **options: Any,
    ) -> GenerationOutput | list[GenerationOutput]:
        """Answers a conversation, or every one of a list; outputs in the order of the conversations.

        Where `max_tokens` is left open an answer goes on to the end of the turn, or to that of the context.

        Args:
            messages: the messages of one conversation, or a list of conversations.
            sampling_params: one for all, or one each, as of `generate`.
            use_tqdm, priority, lora_request: as of `generate`; a bar is shown for a list.
            options: as of `apply_chat_template`; `documents`, `tools` and variables are those of all conversations.

        Raises:
            RequestError: a conversation or its parameters are wrong, with the place of the fault (`messages[2].content:
                ...`); nothing has run then.
            TypeError: an option is none, and the template does not read it.
            RequestAbortedError, CandleVllmError: as of `generate`.
        """
        template = self._template(options.get("chat_template"))
        sees = self._sight is not None
        conversations, several = as_conversations(messages, template, sees=sees)
        texts = prompt_texts("chat", conversations, template, options, _SAMPLING)
        places = [f"messages[{number}]" if several else "messages" for number in range(len(conversations))]
        prompts = [self._chat_prompt(*each) for each in zip(texts, conversations, places)]
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = self._chat_params(sampling_params)
        else:
            params = [self._chat_params(each) for each in _each_params(sampling_params)]
        todo = self._requests("messages", prompts, params, False, priority, lora_request)
        outputs = [output for _, output in sorted(run_all(self._running_thread(), todo, several and use_tqdm))]
        return outputs if several else outputs[0]

    @explained(**_SAMPLING)
    async def agenerate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        **call: Unpack[TextOptions],
    ) -> GenerationOutput:
        """`generate` for one prompt, in an event loop. Cancelling it aborts the request."""
        return await whole(self.stream(prompt, sampling_params, **call))

    async def achat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        lora_request: LoraChoice = None,
        **options: Any,
    ) -> GenerationOutput:
        """`chat` for one conversation, in an event loop. Cancelling it aborts the request."""
        text = self._rendered("achat", messages, options)[0]
        prompt = self._seen_prompt(text, await self._with_images(messages) if self._sight is not None else messages)
        params = self._chat_params(sampling_params)
        return await whole(
            self.stream(prompt, params, request_id=request_id, priority=priority, lora_request=lora_request)
        )

    # ---- vectors and scores ------------------------------------------------------------------------------------------

    @explained(PoolingParams=PoolingParams.__struct_fields__)
    def embed(
        self,
        inputs: Prompt | Sequence[Prompt],
        params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: Bar = True,
        lora_request: LoraChoice | Sequence[LoraChoice] = None,
    ) -> list[EmbeddingOutput]:
        """The vector of every text; outputs in the order of the inputs.

        A model that generates text gives vectors as well: its hidden states behind the last norm, pooled.

        Args:
            inputs: one text or a list; a text may be a list of token ids, or an object as of `generate`.
            params: how the vectors are made, one for all or one each; None is as the model's files say.
            use_tqdm, lora_request: as of `generate`.

        Raises:
            RequestError: an input or its parameters are wrong, or the model gives no vectors; nothing has run then.
            RequestAbortedError: the engine was closed meanwhile.
            CandleVllmError: the engine failed on a text.
        """
        return self._pooling(lora_request=lora_request).embed(inputs, params, use_tqdm=use_tqdm)

    @explained(PoolingParams=PoolingParams.__struct_fields__)
    async def aembed(
        self,
        inputs: Prompt | Sequence[Prompt],
        params: PoolingParams | None = None,
        **call: Unpack[PoolingOptions],
    ) -> list[EmbeddingOutput]:
        """`embed` in an event loop. Cancelling it aborts what has not been run."""
        return await self._watched("embed", inputs, call, lambda calls: calls.aembed(inputs, params))

    @explained()
    def score(
        self, pairs: Sequence[Pair], *, use_tqdm: Bar = True, lora_request: LoraChoice = None
    ) -> list[ScoreOutput]:
        """How well the two texts of each pair belong together.

        A cross-encoder reads both texts at once, and its head's number is the score (brought to 0..1 by a sigmoid where
        the model's config does not say otherwise). Of other models it is the cosine of the texts' vectors, -1..1.
        Errors as `embed`.
        """
        return self._pooling(lora_request=lora_request).score(pairs, use_tqdm=use_tqdm)

    @explained()
    async def ascore(self, pairs: Sequence[Pair], **call: Unpack[ScoreOptions]) -> list[ScoreOutput]:
        """`score` in an event loop. Cancelling it aborts what has not been run.

        Scores of vectors come without token ids, which would repeat a text in each of its pairs.
        """
        return await self._watched("score", pairs, call, lambda calls: calls.ascore(pairs))

    @explained()
    def classify(
        self,
        inputs: Prompt | Sequence[Prompt],
        params: PoolingParams | None = None,
        *,
        use_tqdm: Bar = True,
        lora_request: LoraChoice | Sequence[LoraChoice] = None,
    ) -> list[ClassificationOutput]:
        """How likely each class (`ModelInfo.labels`) of a classifier is for every text; errors as `embed`.

        With `use_activation=False` in `params` the outputs are logits, such as the rewards of a reward model.
        """
        return self._pooling(lora_request=lora_request).classify(inputs, params, use_tqdm=use_tqdm)

    @explained()
    async def aclassify(
        self,
        inputs: Prompt | Sequence[Prompt],
        params: PoolingParams | None = None,
        **call: Unpack[PoolingOptions],
    ) -> list[ClassificationOutput]:
        """`classify` in an event loop. Cancelling it aborts what has not been run."""
        return await self._watched("classify", inputs, call, lambda calls: calls.aclassify(inputs, params))

    async def _watched(
        self, operation: Operation, inputs: Any, call: PoolingOptions | ScoreOptions, run: Callable[[PoolingCalls], Any]
    ) -> Any:
        """Runs a call and tells its watcher of it."""
        call["request_id"] = request_id = call.get("request_id") or uuid.uuid4().hex
        watcher = call.pop("watcher", None)
        info = RequestInfo(request_id, operation, inputs, None, self.detokenize, call.get("lora_request"))
        with watched_pooling(watcher, info) as answered:
            outputs = await run(self._pooling(**call))
            answered(outputs)
        return outputs

    # ---- pieces as they come -----------------------------------------------------------------------------------------

    @explained(**_SAMPLING)
    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        watcher: RequestWatcher | None = None,
        **call: Unpack[TextOptions],
    ) -> TokenStream:
        """Submit a prompt and return a stream of its pieces, to iterate over; call it inside an event loop.

        The request is checked and queued before this returns. Closing the iterator, cancelling its consumer or dropping
        it aborts the request. `watcher` is told of it, and of each piece that the consumer gets.

        Raises:
            RequestError, EngineOverloadedError, EngineDeadError: the request was not taken.
            RuntimeError: there is no event loop here.
        """
        params = self._filled(sampling_params)
        request_id = call.get("request_id")
        call["request_id"] = request_id = uuid.uuid4().hex if request_id is None else request_id
        info = RequestInfo(request_id, "generate", prompt, params, self.detokenize, call.get("lora_request"))
        with watched_submit(watcher, info) as watch:
            request = self._request(prompt, params, **call)
            prepared = self._working().prepare(request)
            thread = self._running_thread()
            sink = RequestSink(_running_loop(), params.n, lambda sink: thread.abort(request_id, sink), watch)
            thread.submit(prepared, sink)
        return TokenStream(request, sink)

    @explained(**_SAMPLING)
    def generate_stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        **call: Unpack[TextOptions],
    ) -> TokenIterator:
        """`stream` for a program without an event loop: submits a prompt and returns an iterator of its pieces.

        The request is checked and queued before this returns. Closing the iterator, leaving its `with` block or
        dropping it aborts the request.

        Raises:
            RequestError, EngineOverloadedError, EngineDeadError: the request was not taken.
        """
        request = self._request(prompt, sampling_params, **call)
        prepared = self._working().prepare(request)
        return TokenIterator(self._running_thread(), request, prepared)

    def chat_stream(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        lora_request: LoraChoice = None,
        **options: Any,
    ) -> TokenIterator:
        """`generate_stream` for one conversation; parameters and `options` as of `chat`."""
        prompt = self._chat_prompt(self._rendered("chat_stream", messages, options)[0], messages)
        params = self._chat_params(sampling_params)
        return self.generate_stream(prompt, params, request_id=request_id, priority=priority, lora_request=lora_request)

    def achat_stream(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        lora_request: LoraChoice = None,
        **options: Any,
    ) -> TokenStream:
        """`stream` for one conversation, for `async for` in an event loop; parameters and `options` as of `chat`.

        It waits for nothing: messages with pictures at addresses go through `fetch_images` before.
        """
        prompt = self._seen_prompt(self._rendered("achat_stream", messages, options)[0], messages)
        params = self._chat_params(sampling_params)
        return self.stream(prompt, params, request_id=request_id, priority=priority, lora_request=lora_request)

    def __repr__(self) -> str:
        info: ModelInfo | None = getattr(self, "_info", None)
        if info is None or not self.is_alive:
            return f"<{type(self).__name__} {self.config.model!r:.80}, not running>"
        what = f"{info.name!r:.80}, {info.architecture} on {info.device}, {info.max_model_len} tokens"
        return f"<{type(self).__name__} {what}>"

    # ---- lifetime ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def close(self) -> None:
        """Aborts what is running and lets go of everything. Closing twice is fine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- inside ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _require(self) -> tuple[PreparingEngine, Texts]:
        """The engine and its texts; raises `EngineDeadError` once it is closed."""

    def _working(self) -> PreparingEngine:
        """The engine, in the process where its threads are: a child that was forked off has the memory alone.

        Raises:
            EngineDeadError: it is closed, or this is a forked child.
        """
        if self._is_elsewhere:
            raise EngineDeadError(
                f"the engine belongs to another process ({self._owner}), from which this one was forked without its "
                "threads: make an engine here, or start processes by 'spawn'"
            )
        return self._require()[0]

    @property
    def _is_elsewhere(self) -> bool:
        return os.getpid() != self._owner

    @abstractmethod
    def _running_thread(self) -> RequestRunner:
        """What drives the engine, started on first use."""

    def _pooling(self, **options: Any) -> PoolingCalls:
        texts = self._require()[1]
        return PoolingCalls(self._working(), self._running_thread, texts.tokenizer, self._info, **options)

    def _check_generates(self) -> None:
        """Refuses work that an encoder cannot do before its input is looked at."""
        if "generate" not in self._info.tasks:
            check_encoder_task(self._info.name, "generate", self._info.tasks)

    def _chat_prompt(self, text: str, conversation: Sequence[Message], place: str = "messages") -> Prompt:
        """`_seen_prompt`, with the pictures that are elsewhere fetched."""
        wanted = addresses_of(conversation, place) if self._sight is not None else []
        if wanted:
            conversation = with_files(conversation, self.image_sources.files_now(wanted))
        return self._seen_prompt(text, conversation, place)

    def _seen_prompt(self, text: str, conversation: Sequence[Message], place: str = "messages") -> Prompt:
        """The prompt of a conversation, which has its special tokens already, with its pictures."""
        prompt = {"prompt": text, "prompt_token_ids": self.tokenize(text, add_special_tokens=False)}
        pictures = pictures_of(conversation, place) if self._sight is not None else []
        return {**prompt, "multi_modal_data": {"image": pictures}} if pictures else prompt

    def _chat_params(self, params: SamplingParams | None) -> SamplingParams:
        filled = self._filled(params)
        ends_turn = params is None or params.leaves_open("max_tokens")
        return replace(filled, max_tokens=None) if ends_turn else filled

    def _request(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None = None,
        priority: int = 0,
        add_special_tokens: bool = True,
        lora_request: LoraChoice = None,
    ) -> GenerationRequest:
        adapters = adapter_uses(lora_request)
        self._check_generates()
        text, ids = read_prompt(prompt, sees=self._sight is not None)
        pictures = prompt_pictures(prompt)
        if ids is None:
            ids = self.tokenize(text or "", add_special_tokens)
        images: tuple[ImageInput, ...] = ()
        if pictures:
            ids, images = self.look(ids, pictures)
        return GenerationRequest(
            request_id=uuid.uuid4().hex if request_id is None else request_id,
            prompt=text,
            prompt_token_ids=ids,
            params=self._filled(params),
            priority=priority,
            adapters=adapters,
            images=images,
        )

    @property
    def _sight(self) -> Sight | None:
        return self._require()[1].sight

    def _requests(
        self,
        field: str,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        add_special_tokens: bool,
        priority: int | Sequence[int] = 0,
        lora_request: LoraChoice | Sequence[LoraChoice] = None,
    ) -> list[tuple[GenerationRequest, Sequence[Any]]]:
        """Requests that were checked; of several prompts the error says which one is wrong, as a place in `field`."""
        engine = self._working()
        if params is None or isinstance(params, SamplingParams):
            each: list[SamplingParams | None] = [params] * len(prompts)
        else:
            each = _each_params(params)
        if len(each) != len(prompts):
            raise InvalidParameterError(f"{len(prompts)} prompts and {len(each)} sampling_params", "sampling_params")
        orders = [priority] * len(prompts) if isinstance(priority, int) else list(priority)
        if len(orders) != len(prompts):
            raise InvalidParameterError(f"{len(prompts)} prompts and {len(orders)} priorities", "priority")
        adapters = each_lora_choice(lora_request, len(prompts))
        todo: list[tuple[GenerationRequest, Sequence[Any]]] = []
        for number, (prompt, one, order, own) in enumerate(zip(prompts, each, orders, adapters)):
            try:
                request = self._request(prompt, one, None, order, add_special_tokens, own)
                todo.append((request, engine.prepare(request)))
            except RequestError as error:
                if len(prompts) == 1:
                    raise
                place = f"{field}[{number}]"
                param = place if error.param in (None, "prompt", "messages") else error.param
                raise type(error)(f"{place}: {error}", param) from None
        return todo


def _running_loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "stream and achat_stream are for programs with an event loop: use generate_stream or chat_stream"
        ) from None


def _each_params(params: Any) -> list[SamplingParams | None]:
    """One for each prompt, of a list of them."""
    if isinstance(params, (str, Mapping)) or not isinstance(params, Iterable):
        raise _no_params(params)
    return list(params)


def _no_params(given: Any) -> InvalidParameterError:
    hint = ""
    if isinstance(given, Mapping) and all(isinstance(name, str) for name in given):
        hint = f": write SamplingParams({', '.join(f'{name:.40}=...' for name in list(given)[:3])})"
    return InvalidParameterError(
        f"sampling_params must be SamplingParams, not {type(given).__name__}{hint}", "sampling_params"
    )
