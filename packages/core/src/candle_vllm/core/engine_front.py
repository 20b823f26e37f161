# SPDX-License-Identifier: MIT
"""EngineFront: the public methods of every engine (steps 3 and 10 of a request's life).

`InferenceEngine` runs its engine in a thread, `RemoteEngine` in a process of its own, `ReplicatedEngine` in several.
Their common part turns texts into token ids, prompts into requests, and outputs into results. It imports no torch.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
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
    each_priority,
)
from candle_vllm.core.engine.runners.sleeping import check_sleep, read_tags
from candle_vllm.core.engine.stats import EngineStats
from candle_vllm.core.engine.step.pooling_calls import Pair, PoolingCalls
from candle_vllm.core.engine.step.preparation import check_encoder_task, check_text_length
from candle_vllm.core.engine.step.request_watchers import (
    Operation,
    PoolingOptions,
    RequestInfo,
    RequestWatcher,
    ScoreOptions,
    TextOptions,
    watched_pooling,
    watched_submit,
)
from candle_vllm.core.engine.step.stream import Bar, RequestSink, TokenIterator, TokenStream, run_all, whole
from candle_vllm.core.engine.step.thread import PreparingEngine, RequestRunner
from candle_vllm.core.errors import (
    ChatTemplateError,
    EngineDeadError,
    InvalidParameterError,
    RequestError,
    UnsupportedModelError,
)
from candle_vllm.core.pooling import PoolingParams
from candle_vllm.core.sampling.params import RequestOutputKind, SamplingParams
from candle_vllm.core.sampling.structured import StructuredOutputsParams
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
    prompt_texts,
    read_prompt,
    with_files,
)
from candle_vllm.core.text.tokenizer import ChatConventions, Tokenizer, chat_conventions
from candle_vllm.core.vision.fetching import ImageSources
from candle_vllm.core.vision.inputs import ImageInput
from candle_vllm.core.vision.prompts import VisionInput

_SAMPLING = {"SamplingParams": SamplingParams.__struct_fields__}
FITTED: ContextVar[bool] = ContextVar("FITTED", default=False)
"""Whether `max_tokens` is lowered to what the context leaves after the prompt; otherwise the request is refused."""


class Texts(Protocol):
    """The tokenizer, the chat template and the image processing of a model."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def template(self) -> ChatTemplate | None: ...

    @property
    def vision(self) -> VisionInput | None: ...


class EngineFront(ABC):
    """The methods that every engine has.

    `image_sources` fetches images of conversations from URLs, as far as `config` allows it.
    """

    config: EngineConfig
    image_sources: ImageSources
    _info: ModelInfo
    _owner: int  # id of the process that created the engine

    # ---- the loaded model --------------------------------------------------------------------------------------------

    @property
    def model_info(self) -> ModelInfo:
        """Name, architecture, size, context length, and sampling defaults of the model."""
        return self._info

    @property
    def default_sampling_params(self) -> SamplingParams:
        """SamplingParams with the defaults of the model's files, else of this package."""
        return msgspec.convert(self._info.default_sampling, SamplingParams)

    def _filled(self, params: SamplingParams | None) -> SamplingParams:
        """Fill in model defaults; raises InvalidParameterError for another type, or an `output_kind` of AsyncLLM."""
        if not isinstance(params, (SamplingParams, type(None))):
            raise no_params(params)
        params = params or SamplingParams()
        if params.output_kind is not RequestOutputKind.CUMULATIVE:
            said = "output_kind is for AsyncLLM: generate returns whole outputs, stream and generate_stream deltas"
            raise InvalidParameterError(said, "output_kind")
        return params.filled(self._info.default_sampling)

    @property
    def chat_conventions(self) -> ChatConventions:
        """The chat format that the model was trained on: its template and the tokens that structure a conversation."""
        loaded = self._require()[1]
        template = None if loaded.template is None else loaded.template.source
        return chat_conventions(loaded.tokenizer, template)

    @property
    @abstractmethod
    def is_alive(self) -> bool:
        """False once the engine is closed or has failed for good."""

    @abstractmethod
    def add_death_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, when the engine's processes die without `close`; at once if they have died already."""

    def stats(self) -> EngineStats:
        """Return counters since the start and current values of gauges."""
        return self._working().stats()

    @explained()
    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokenize a text, by default with special tokens such as BOS.

        Raises:
            InvalidParameterError: `text` is not a string, or UTF-8 cannot encode it.
            PromptTooLongError: the text has more characters than any prompt can have; it is not tokenized.
        """
        if not isinstance(text, str):
            raise InvalidParameterError(f"the text to tokenize must be a text, not {type(text).__name__}", "prompt")
        tokenizer = self._require()[1].tokenizer
        check_text_length(self._info, tokenizer, len(text))
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)

    @explained()
    def infill(self, prefix: str | Sequence[int], suffix: str) -> InfillPrompt:
        """Return a fill-in-the-middle prompt for `prefix` (a text or its tokens) and `suffix`, with its stop tokens.

        Raises:
            InvalidParameterError: the model was not trained to fill in the middle.
            PromptTooLongError: a text has more characters than any prompt can have.
        """
        tokenizer = self._require()[1].tokenizer
        for text, name in ((prefix, "prompt"), (suffix, "suffix")):
            if isinstance(text, str) and tokenizer.infill is not None:
                check_text_length(self._info, tokenizer, len(text), name)
        return infill_prompt(tokenizer, tokenizer.infill, prefix, suffix)

    @explained()
    def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = True, *, whole: bool = True) -> str:
        """Detokenize token ids; without `whole`, an incomplete character at the end is left out.

        Raises InvalidParameterError if `token_ids` is no list of token ids, or one is not in the vocabulary.
        """
        try:
            return self._require()[1].tokenizer.decode(token_ids, skip_special_tokens, whole=whole)
        except TypeError:
            raise InvalidParameterError("detokenize takes a list of token ids", "token_ids") from None

    def token_names(self, token_ids: Sequence[int]) -> list[str]:
        """Return the tokens' entries in the vocabulary, as `convert_ids_to_tokens` of transformers gives them."""
        return list(map(self._require()[1].tokenizer.token_name, token_ids))

    def token_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        """Return the bytes that each token adds to a text, of a special token its name."""
        return list(map(self._require()[1].tokenizer.token_bytes, token_ids))

    def look(
        self, token_ids: Sequence[int], images: Sequence[object], names: Sequence[str] = (), *, bounded: bool = True
    ) -> tuple[list[int], tuple[ImageInput, ...]]:
        """Preprocess the images of a prompt; return the prompt with image tokens, and the images. Thread-safe.

        Args:
            token_ids: the prompt, with the token that the model's template writes for each image.
            images: Pillow images, arrays [height, width, 3] of uint8, or the bytes of PNG, JPEG, WebP or GIF files; or
                images that an earlier call returned with these token ids.
            names: the field of each image, for error messages; "image" by default.
            bounded: whether a prompt that exceeds the context is refused (PromptTooLongError).

        Raises:
            InvalidParameterError: the model is text-only, or there is an unusable image, one too many or too few.
        """
        if images and all(isinstance(image, ImageInput) for image in images):
            return list(token_ids), tuple(images)  # type: ignore[arg-type]
        vision = self._require()[1].vision
        if vision is None:
            raise InvalidParameterError(f"image: {self._info.name} takes text only", "image")
        return vision.look(token_ids, images, names, self._info.max_model_len if bounded else None)

    async def fetch_images(self, messages: Sequence[Message]) -> list[Message]:
        """Fetch the images of a conversation, before `achat_stream`; `chat`, `chat_stream` and `achat` do this.

        Images at `https://`, `http://` and `file://` URLs are fetched if `allowed_media_domains` and
        `allowed_local_media_path` allow every address, redirects included. Limits: 20 MB and 10 s each, 64 MB in all.

        Raises:
            UnsupportedParameterError: the settings allow no images from URLs.
            InvalidParameterError: an image could not be fetched; the message says why.
            EngineOverloadedError: images of other requests take too much memory.
        """
        template = self._require()[1].template
        return await self._with_images(one_conversation(messages, template, sees=self._sees))

    async def _with_images(self, conversation: Sequence[Message]) -> list[Message]:
        wanted = addresses_of(conversation)
        return with_files(conversation, await self.image_sources.files(wanted)) if wanted else list(conversation)

    def apply_chat_template(self, messages: Sequence[Message], **options: Any) -> str:
        """Render the conversation as one prompt text, by the model's own chat template.

        Args:
            messages: dicts with `role` and `content`, as in OpenAI's API: texts or lists of text and image parts, tool
                calls and tool results. They are converted to the format of the template (`template_messages`).
            options: `tools`, `documents`, `add_generation_prompt`, `continue_final_message`, any variable that the
                template reads (`enable_thinking`, ...), `chat_template` (Jinja source instead of the model's template),
                and `chat_template_kwargs`: variables that the template need not read.

        Raises:
            InvalidParameterError: a message or the template is wrong; the error has its position.
            ChatTemplateError: the model has no template, or it refused the conversation.
            TypeError: an option is unknown, and the template does not read it.
        """
        return self._rendered("apply_chat_template", messages, options)[0]

    def render_messages(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Render messages, without a check, that `template_needs.fit` has adapted to the model's template.

        `variables` are other arguments of `ChatTemplate.render`, and variables of the template. Raises
        ChatTemplateError if the model has no template, or it refused the conversation.
        """
        return self._template().render(messages, **variables)

    def _rendered(self, method: str, messages: Any, options: Mapping[str, Any]) -> list[str]:
        template, sees = self._template(options.get("chat_template")), self._sees
        conversation = one_conversation(messages, template, sees=sees)
        return prompt_texts(method, [conversation], template, options, _SAMPLING, self._info.image_text)

    def _template(self, source: str | None = None) -> ChatTemplate:
        """Return the template of `source`, or else the model's."""
        if not self.model_info.has_chat_template:  # a reward model generates nothing, but may have a template
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
    def is_sleeping(self) -> bool:
        """Whether the engine sleeps: it refuses requests (`EngineSleepingError`) until all tags are awake."""
        return self._running_thread().is_sleeping

    @explained()
    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Free memory and refuse requests; return when that is done.

        Args:
            level: 1 frees the KV cache, and moves weights from a GPU to host memory. 2 frees the KV cache and drops the
                weights; they are read from the model's files at `wake_up`.
            mode: "abort" ends running and waiting requests, as `abort` does; "wait" lets them end first.

        The prefix cache is cleared, except for offloaded blocks. Adapters stay. An engine that sleeps at level 1 may be
        put to sleep at level 2; `wake_up` ends level 2.

        Raises:
            CandleVllmError: the engine cannot sleep at this level (random weights at level 2, or on the CPU of a system
                other than Linux), and nothing has changed; or memory cannot be freed: the engine is awake again, or
                sleeps if that fails too (`EngineSleepingError`).
            EngineDeadError: the engine has stopped.
        """
        check_sleep(level, mode)
        self._sleep(level, mode)

    @explained()
    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Allocate memory again; later answers equal those before `sleep` bit for bit. If awake, do nothing.

        Args:
            tags: "weights", "kv_cache" or both; None means both. Requests are accepted once both are awake.

        Raises:
            CandleVllmError: the weights cannot be read again, or there is too little memory: all of the engine sleeps.
            EngineDeadError: the engine has stopped.
        """
        self._wake_up(read_tags(tags))

    def _sleep(self, level: int, mode: str) -> None:
        self._running_thread().sleep(level, mode)

    def _wake_up(self, tags: frozenset[str]) -> None:
        self._running_thread().wake_up(tags)

    def reset_prefix_cache(self) -> None:
        """Clear the prefix cache, of all replicas: no later request uses a block that is cached now.

        Raises EngineDeadError if the engine has stopped.
        """
        self._running_thread().reset_prefix_cache()

    def abort(self, request_id: str) -> None:
        """End a request before the next step and free its blocks; unknown ids are ignored."""
        self._running_thread().abort(request_id)

    @abstractmethod
    def check_structured_outputs(self, params: StructuredOutputsParams) -> None:
        """Check structured outputs (a schema or grammar), and cache the compiled grammar for the request.

        The first call of an engine takes a second or two, later ones as long as the grammar takes to compile; with an
        event loop, call it in a worker thread. Thread-safe. Raises InvalidParameterError if the schema or grammar is
        wrong or not supported; the message names the part.
        """

    async def compile_form(self, params: SamplingParams | None) -> None:  # noqa: B027  # a `RemoteEngine` does nothing
        """Run `check_structured_outputs` for a request in a worker thread, if this process compiles its grammar."""

    # ---- adapters ----------------------------------------------------------------------------------------------------

    @explained()
    def add_lora(self, lora_request: LoRARequest) -> AdapterInfo:
        """Register an adapter under its name and load it; wait for the load, while requests go on.

        Thread-safe, like the next three methods. With `load_inplace` files are read again, for later requests only.

        Raises:
            AdapterError: the adapter's files cannot be used, or do not fit the model.
            InvalidParameterError: LoRA is off (`enable_lora`), or the name is registered with another path.
            EngineOverloadedError: it was not loaded in time, because other adapters need the memory.
            EngineDeadError: the engine has stopped.
        """
        if not isinstance(lora_request, LoRARequest):
            said = f"lora_request must be a LoRARequest, not {type(lora_request).__name__}"
            raise InvalidParameterError(said, "lora_request")
        return self.call_adapters(AdapterCall("add", lora_request.use()))[0]

    @explained()
    def remove_lora(self, lora_name: str) -> bool:
        """Remove an adapter; return False if the name is unknown. Accepted requests continue.

        Raises InvalidParameterError, EngineDeadError: see `add_lora`.
        """
        return bool(self.call_adapters(AdapterCall("remove", AdapterUse(name=lora_name))))

    @explained()
    def pin_lora(self, lora_name: str) -> AdapterInfo:
        """Load a known adapter and keep it in memory until it is removed. Raises as `add_lora`."""
        return self.call_adapters(AdapterCall("pin", AdapterUse(name=lora_name)))[0]

    def list_loras(self) -> tuple[AdapterInfo, ...]:
        """Return all known adapters; () if LoRA is off. Raises as `remove_lora`."""
        return self.call_adapters(AdapterCall("list")) if self.config.enable_lora else ()

    @abstractmethod
    def call_adapters(self, call: AdapterCall) -> tuple[AdapterInfo, ...]:
        """Send a call to the engine's adapter store; see `AdapterStore.call`."""

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
        """Continue every prompt; return the outputs in the order of the prompts.

        Args:
            prompts: one prompt or a list; a prompt is a text, a list of token ids, or vLLM's object with `prompt` or
                `prompt_token_ids`, and images as `multi_modal_data`.
            sampling_params: one for all prompts, or one for each. Fields that are left out have the model's defaults
                (`default_sampling_params`); `max_tokens` is 16 by default.
            use_tqdm: show a progress bar, on a terminal; or a function that makes one, called like tqdm.
            priority: one for all prompts, or one for each; a lower number runs first.
            add_special_tokens: add the tokenizer's special tokens, such as BOS, to texts.
            lora_request: the adapter of all prompts (`enable_lora`), pairs of adapters and scales for a mix, or one of
                these or None for each prompt. An adapter's files are read when its name is first used.

        Raises:
            RequestError: a prompt or its parameters are wrong; the message has its position (`prompts[50]`). No prompt
                was run.
            RequestAbortedError: the engine was closed meanwhile.
            CandleVllmError: the engine failed on a request, sleeps or has stopped.
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
        """Answer a conversation, or each of a list; return the outputs in the order of the conversations.

        Without `max_tokens` an answer goes on to the end of the turn, or to the end of the context.

        Args:
            messages: the messages of one conversation, or a list of conversations.
            sampling_params: one for all conversations, or one for each; see `generate`.
            use_tqdm, priority, lora_request: see `generate`; a progress bar is shown for a list only.
            options: see `apply_chat_template`; `documents`, `tools` and variables apply to all conversations.

        Raises:
            RequestError: a conversation or its parameters are wrong: `messages[2].content: ...`. Nothing was run.
            TypeError: an option is unknown, and the template does not read it.
            RequestAbortedError, CandleVllmError: see `generate`.
        """
        template = self._template(options.get("chat_template"))
        conversations, several = as_conversations(messages, template, sees=self._sees)
        texts = prompt_texts("chat", conversations, template, options, _SAMPLING, self._info.image_text)
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
        await self.compile_form(sampling_params)
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
        await self.compile_form(sampling_params)
        prompt = self._seen_prompt(text, await self._with_images(messages) if self._sees else messages)
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
        """Return the embedding of every text, in the order of the inputs.

        A generative model can embed as well: its hidden states after the last norm are pooled.

        Args:
            inputs: one text or a list; a text may be a list of token ids, or an object as in `generate`.
            params: pooling parameters, one for all inputs or one for each; None for the defaults of the model's files.
            use_tqdm, lora_request: see `generate`.

        Raises:
            RequestError: an input or its parameters are wrong, or the model cannot embed; no input was run.
            RequestAbortedError: the engine was closed meanwhile.
            CandleVllmError: the engine failed on a text.
        """
        return self._pooling(lora_request=lora_request).texts("embed", inputs, params, use_tqdm=use_tqdm)

    @explained(PoolingParams=PoolingParams.__struct_fields__)
    async def aembed(
        self,
        inputs: Prompt | Sequence[Prompt],
        params: PoolingParams | None = None,
        **call: Unpack[PoolingOptions],
    ) -> list[EmbeddingOutput]:
        """`embed` in an event loop. Cancelling it aborts the unfinished inputs."""
        return await self._watched("embed", inputs, call, lambda calls: calls.atexts("embed", inputs, params))

    @explained('the texts are one argument: score([("a", "b")])')
    def score(
        self, pairs: Sequence[Pair], *, use_tqdm: Bar = True, lora_request: LoraChoice = None
    ) -> list[ScoreOutput]:
        """Return the similarity of the two texts of each pair; raises as `embed`.

        A cross-encoder reads both texts at once, and the output of its head is the score (mapped to 0..1 by a sigmoid,
        unless the model's config says otherwise). For other models the score is the cosine similarity of the texts'
        vectors, -1..1; MaxSim for several vectors of a text, or the dot product of sparse vectors.
        """
        return self._pooling(lora_request=lora_request).score(pairs, use_tqdm=use_tqdm)

    @explained('the texts are one argument: ascore([("a", "b")])')
    async def ascore(self, pairs: Sequence[Pair], **call: Unpack[ScoreOptions]) -> list[ScoreOutput]:
        """`score` in an event loop. Cancelling it aborts the unfinished pairs.

        Outputs that compare vectors have no token ids: these would be repeated in each pair with the same text.
        """
        return await self._watched("score", pairs, call, lambda calls: calls.ascore(pairs))

    @explained(PoolingParams=PoolingParams.__struct_fields__)
    def classify(
        self,
        inputs: Prompt | Sequence[Prompt],
        params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: Bar = True,
        lora_request: LoraChoice | Sequence[LoraChoice] = None,
    ) -> list[ClassificationOutput]:
        """Return the probability of each class (`ModelInfo.labels`) for every text; raises as `embed`.

        With `use_activation=False` in `params` the outputs are logits, such as the rewards of a reward model.
        """
        return self._pooling(lora_request=lora_request).texts("classify", inputs, params, use_tqdm=use_tqdm)

    @explained(PoolingParams=PoolingParams.__struct_fields__)
    async def aclassify(
        self,
        inputs: Prompt | Sequence[Prompt],
        params: PoolingParams | None = None,
        **call: Unpack[PoolingOptions],
    ) -> list[ClassificationOutput]:
        """`classify` in an event loop. Cancelling it aborts the unfinished inputs."""
        return await self._watched("classify", inputs, call, lambda calls: calls.atexts("classify", inputs, params))

    async def _watched(
        self, operation: Operation, inputs: Any, call: PoolingOptions | ScoreOptions, run: Callable[[PoolingCalls], Any]
    ) -> Any:
        call["request_id"] = request_id = call.get("request_id") or uuid.uuid4().hex
        watcher = call.pop("watcher", None)
        info = RequestInfo(request_id, operation, inputs, None, self.detokenize, call.get("lora_request"))
        with watched_pooling(watcher, info) as answered:
            outputs = await run(self._pooling(**call))
            answered(outputs)
        return outputs

    # ---- streaming ---------------------------------------------------------------------------------------------------

    @explained(**_SAMPLING)
    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        watcher: RequestWatcher | None = None,
        **call: Unpack[TextOptions],
    ) -> TokenStream:
        """Submit a prompt and return a stream of its outputs, to iterate over; call it inside an event loop.

        The request is checked and queued before this returns. Closing the iterator, cancelling its consumer or dropping
        it aborts the request. `watcher` is notified of the request and of each output, also while nobody iterates.

        Raises:
            RequestError, EngineOverloadedError, EngineSleepingError, EngineDeadError: the request was refused.
            RuntimeError: no event loop is running.
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
        """`stream` for a program without an event loop: submit a prompt and return an iterator of its outputs.

        The request is checked and queued before this returns. Closing or dropping the iterator aborts the request.
        Raises RequestError, EngineOverloadedError, EngineSleepingError, EngineDeadError if the request was refused.
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
        """`generate_stream` for one conversation; for parameters and `options` see `chat`."""
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
        """`stream` for one conversation, for `async for` in an event loop; for parameters and `options` see `chat`.

        It does not fetch images: call `fetch_images` before if messages contain URLs of images.
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
        """Abort running requests and free all resources. Closing twice is fine."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- inside ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _require(self) -> tuple[PreparingEngine, Texts]:
        """Return the engine and its `Texts`; raises `EngineDeadError` once it is closed."""

    def _working(self) -> PreparingEngine:
        """Return the engine; raises EngineDeadError if it is closed, or in a forked child, which lacks its threads."""
        if self._is_elsewhere:
            raise EngineDeadError(
                f"the engine belongs to another process ({self._owner}), and this process was forked from it without "
                "its threads: create an engine here, or start processes with 'spawn'"
            )
        return self._require()[0]

    @property
    def _is_elsewhere(self) -> bool:
        return os.getpid() != self._owner

    @abstractmethod
    def _running_thread(self) -> RequestRunner:
        """Return the thread to which requests are submitted; `InferenceEngine` starts it on first use."""

    def _pooling(self, **options: Any) -> PoolingCalls:
        texts = self._require()[1]
        return PoolingCalls(self._working(), self._running_thread, texts.tokenizer, self._info, self.look, **options)

    def _check_generates(self) -> None:
        """Refuse to generate with an encoder, before the input is read."""
        if "generate" not in self._info.tasks:
            check_encoder_task(self._info.name, "generate", self._info.tasks)

    def _chat_prompt(self, text: str, conversation: Sequence[Message], place: str = "messages") -> Prompt:
        """Fetch a conversation's images from URLs, then return `_seen_prompt`."""
        wanted = addresses_of(conversation, place) if self._sees else []
        if wanted:
            conversation = with_files(conversation, self.image_sources.files_now(wanted))
        return self._seen_prompt(text, conversation, place)

    def _seen_prompt(self, text: str, conversation: Sequence[Message], place: str = "messages") -> Prompt:
        """Tokenize the rendered conversation, whose text has its special tokens already, and add its images."""
        prompt = {"prompt": text, "prompt_token_ids": self.tokenize(text, add_special_tokens=False)}
        pictures = pictures_of(conversation, place) if self._sees else []
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
        text, ids, pictures = read_prompt(prompt, sees=self._sees)
        if ids is None:
            ids = self.tokenize(text or "", add_special_tokens)
        images: tuple[ImageInput, ...] = ()
        if pictures:
            ids, images = self.look(ids, pictures)
        filled, room = self._filled(params), self._info.max_model_len - len(ids)
        if FITTED.get() and max(1, filled.min_tokens) <= room < (filled.max_tokens or 0):
            filled = replace(filled, max_tokens=room)
        return GenerationRequest(
            request_id=uuid.uuid4().hex if request_id is None else request_id,
            prompt=text,
            prompt_token_ids=ids,
            params=filled,
            priority=priority,
            adapters=adapters,
            images=images,
        )

    @property
    def _sees(self) -> bool:
        """Whether the model accepts images."""
        return "image" in self._info.modalities

    def _requests(
        self,
        field: str,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        add_special_tokens: bool,
        priority: int | Sequence[int] = 0,
        lora_request: LoraChoice | Sequence[LoraChoice] = None,
    ) -> list[tuple[GenerationRequest, Sequence[Any]]]:
        """Return checked requests, with their prepared sequences; errors name one of several prompts as `field[i]`."""
        engine = self._working()
        if params is None or isinstance(params, SamplingParams):
            each: list[SamplingParams | None] = [params] * len(prompts)
        else:
            each = _each_params(params)
        if len(each) != len(prompts):
            raise InvalidParameterError(f"{len(prompts)} prompts and {len(each)} sampling_params", "sampling_params")
        orders = each_priority(priority, len(prompts))
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


def shut_down(owner: int, *parts: Any) -> None:
    """Close parts of an engine in this order, unless this process was forked from its `owner` without its threads."""
    if os.getpid() == owner:
        for part in parts:
            part.close()


def _each_params(params: Any) -> list[SamplingParams | None]:
    if isinstance(params, (str, Mapping)) or not isinstance(params, Iterable):
        raise no_params(params)
    return list(params)


def no_params(given: Any) -> InvalidParameterError:
    """Return the error for something else than `SamplingParams`; for a dict it says how to write them."""
    hint = ""
    if isinstance(given, Mapping) and all(isinstance(name, str) for name in given):
        hint = f": write SamplingParams({', '.join(f'{name:.40}=...' for name in list(given)[:3])})"
    said = f"sampling_params must be SamplingParams, not {type(given).__name__}{hint}"
    return InvalidParameterError(said, "sampling_params")
