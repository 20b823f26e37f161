"""InferenceEngine: the library's front door. Loads a model, owns the engine thread, and takes prompts."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import msgspec
import torch
from tqdm import tqdm

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.devices import choose_device, give_back
from candle_vllm.core.engine.build import build_engine
from candle_vllm.core.engine.engine import Engine
from candle_vllm.core.engine.live import LiveSequence
from candle_vllm.core.engine.request import (
    EngineStats,
    GenerationOutput,
    GenerationRequest,
    ModelInfo,
    OutputCollector,
    TokenOutput,
)
from candle_vllm.core.engine.run_all import raise_failure, run_all
from candle_vllm.core.engine.stream import Inbox, TokenStream
from candle_vllm.core.engine.thread import EngineThread
from candle_vllm.core.errors import (
    ChatTemplateError,
    ConfigError,
    EngineDeadError,
    InvalidParameterError,
    PromptTooLongError,
)
from candle_vllm.core.loading.model import LoadedModel, load_model
from candle_vllm.core.memory import physical_cores
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.text.prompts import Prompt, as_prompts, as_token_ids

logger = logging.getLogger(__name__)


class InferenceEngine:
    """A loaded model that continues prompts, many at a time.

    Args:
        model: a Hugging Face id, a folder, a `.gguf` file, or a whole `EngineConfig`.
        settings: fields of `EngineConfig`, where `model` is not one.

    Raises:
        ConfigError, ModelNotFoundError, ModelLoadError: the model cannot be served as asked.

    The engine runs in a thread of its own from the first request on. `close` (or leaving the `with` block) ends the
    thread and lets go of the memory. For a loop of your own use `add_request`, `step` and `abort` instead; an engine is
    driven one way or the other, not both.
    """

    def __init__(self, model: str | EngineConfig, **settings: Any) -> None:
        config = model if isinstance(model, EngineConfig) else EngineConfig(model=str(model), **settings)
        if isinstance(model, EngineConfig) and settings:
            raise ConfigError(f"pass an EngineConfig or settings, not both: {', '.join(settings)}")
        self.config = config
        device = choose_device(config.device)
        torch.set_num_threads(config.threads or physical_cores())
        with _progress_bar() as progress:
            self._loaded: LoadedModel | None = load_model(config, device, progress)
        self._engine: Engine | None = build_engine(config, self._loaded)
        self._thread: EngineThread | None = None
        self._manual = False
        self._ended: list[TokenOutput] = []  # pieces of requests that were aborted between steps
        self._lock = threading.Lock()  # guards how the engine is driven
        self._finalizer = weakref.finalize(self, self._engine.runner.close)
        self._info = _model_info(self._loaded, self._engine.max_model_len)

    # ---- what is loaded ----------------------------------------------------------------------------------------------

    @property
    def model_info(self) -> ModelInfo:
        """Name, architecture, size, context, and the sampling defaults that the model itself brings."""
        return self._info

    @property
    def default_sampling_params(self) -> SamplingParams:
        """SamplingParams with the defaults of the model's generation config."""
        return msgspec.convert(self._info.default_sampling, SamplingParams)

    @property
    def is_alive(self) -> bool:
        """False once the engine is closed or has failed for good."""
        return self._engine is not None and (self._thread is None or self._thread.is_alive)

    def stats(self) -> EngineStats:
        """Counters since the start and gauges of now."""
        return self._require()[0].stats()

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, by default with the beginning token that the model asks for.

        Raises:
            PromptTooLongError: the text is longer than any prompt could be; it is refused before work is spent on it.
        """
        tokenizer = self._require()[1].tokenizer
        most = self._info.max_model_len * tokenizer.longest_token
        if len(text) > most:
            raise PromptTooLongError(
                f"the text has {len(text)} characters; a context of {self._info.max_model_len} tokens holds at most "
                f"{most} of them",
                "prompt",
            )
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self._require()[1].tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The conversation as one prompt text, by the model's own template.

        Args:
            messages: dicts with `role` and `content`.
            options: `tools`, `documents`, `add_generation_prompt`, `continue_final_message`, and anything that the
                template itself understands (`enable_thinking`, ...).

        Raises:
            ChatTemplateError: the model has no template, or it refused the conversation.
        """
        template = self._require()[1].template
        if template is None:
            raise ChatTemplateError(f"{self._info.name} has no chat template: pass one (--chat-template)", "messages")
        return template.render([dict(message) for message in messages], **options)

    # ---- whole answers -----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[GenerationOutput]:
        """Continues every prompt; outputs in the order of the prompts.

        Args:
            prompts: one prompt or a list; a prompt is a text or a list of token ids.
            sampling_params: one for all, or one each; None is the model's defaults.
            use_tqdm: show a progress bar.

        Raises:
            RequestError: a prompt or its parameters are wrong; nothing has run then.
            RequestAbortedError: the engine was closed meanwhile.
            CandleVllmError: the engine failed on a request.
        """
        todo = self._requests(as_prompts(prompts), sampling_params)
        return [output for _, output in sorted(run_all(self._running_thread(), todo, use_tqdm))]

    def chat(
        self, messages: Sequence[Mapping[str, Any]], sampling_params: SamplingParams | None = None, **options: Any
    ) -> GenerationOutput:
        """Answers one conversation; `options` go to `apply_chat_template`."""
        tokens = self.tokenize(self.apply_chat_template(messages, **options), add_special_tokens=False)
        return self.generate([tokens], sampling_params, use_tqdm=False)[0]

    async def agenerate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        add_special_tokens: bool = True,
    ) -> GenerationOutput:
        """`generate` for one prompt, in an event loop. Cancelling it aborts the request."""
        stream = self.stream(
            prompt, sampling_params, request_id=request_id, priority=priority, add_special_tokens=add_special_tokens
        )
        collector = OutputCollector(stream.request)
        try:
            async for piece in stream:
                raise_failure(piece)
                collector.add(piece)
        finally:
            await stream.aclose()
        return collector.result()

    # ---- pieces as they come -----------------------------------------------------------------------------------------

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        add_special_tokens: bool = True,
    ) -> TokenStream:
        """Submits a prompt and returns its pieces as an async iterator; call it inside an event loop.

        The request is checked and queued before this returns. Closing the iterator, cancelling its consumer or dropping
        it aborts the request.

        Raises:
            RequestError, EngineOverloadedError, EngineDeadError: the request was not taken.
        """
        request = self._request(prompt, sampling_params, request_id, priority, add_special_tokens)
        prepared = self._require()[0].prepare(request)
        thread = self._running_thread()
        inbox = Inbox(asyncio.get_running_loop())
        thread.submit(prepared, inbox)
        return TokenStream(request, lambda: thread.abort(request.request_id, inbox), inbox)

    # ---- a loop of your own ------------------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        add_special_tokens: bool = True,
    ) -> str:
        """Queues a prompt for `step`; returns its request id."""
        engine = self._own_loop()
        request = self._request(prompt, sampling_params, request_id, priority, add_special_tokens)
        engine.add(engine.prepare(request))
        return request.request_id

    def step(self) -> list[TokenOutput]:
        """Runs one step of the requests added with `add_request`; an empty list when there is nothing to do.

        The last pieces of requests that were aborted since the step before come first. On a GPU a step launches the
        next one before it waits, so the pieces are those of the step that was launched before it.
        """
        engine = self._own_loop()
        ended, self._ended = self._ended, []
        return ended + engine.step()

    @property
    def has_unfinished_requests(self) -> bool:
        """True while `step` has something to do."""
        return bool(self._ended) or self._require()[0].has_work

    def abort(self, request_id: str) -> None:
        """Ends a request before the next step and frees its blocks; unknown ids are ignored."""
        if self._thread is not None:
            self._thread.abort(request_id)
        else:
            self._ended += self._require()[0].abort(request_id)

    # ---- lifetime ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Aborts what is running, ends the thread, and lets go of model and cache. Closing twice is fine."""
        with self._lock:
            self._finalizer()
            self._engine = self._loaded = self._thread = None
        gc.collect()
        give_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _require(self) -> tuple[Engine, LoadedModel]:
        if self._engine is None or self._loaded is None:
            raise EngineDeadError("the engine is closed")
        return self._engine, self._loaded

    def _running_thread(self) -> EngineThread:
        with self._lock:
            engine = self._require()[0]
            if self._manual:
                raise EngineDeadError("this engine is driven by add_request and step: use those, or another engine")
            if self._thread is None:
                self._thread = EngineThread(engine, self.config.max_queued_requests)
                self._finalizer.detach()
                self._finalizer = weakref.finalize(self, _shut_down, self._thread, engine)
            return self._thread

    def _own_loop(self) -> Engine:
        with self._lock:
            if self._thread is not None:
                raise EngineDeadError("this engine runs in its own thread: use generate or stream, or another engine")
            self._manual = True
            return self._require()[0]

    def _request(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None = None,
        priority: int = 0,
        add_special_tokens: bool = True,
    ) -> GenerationRequest:
        text = prompt if isinstance(prompt, str) else None
        ids = self.tokenize(prompt, add_special_tokens) if isinstance(prompt, str) else as_token_ids(prompt)
        return GenerationRequest(
            request_id=uuid.uuid4().hex if request_id is None else request_id,
            prompt=text,
            prompt_token_ids=ids,
            params=self.default_sampling_params if params is None else params,
            priority=priority,
        )

    def _requests(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[tuple[GenerationRequest, list[LiveSequence]]]:
        if params is None or isinstance(params, SamplingParams):
            each: list[SamplingParams | None] = [params] * len(prompts)
        else:
            each = list(params)
        if len(each) != len(prompts):
            raise InvalidParameterError(f"{len(prompts)} prompts and {len(each)} sampling_params", "sampling_params")
        requests = [self._request(prompt, one) for prompt, one in zip(prompts, each)]
        return [(request, self._require()[0].prepare(request)) for request in requests]


def _shut_down(thread: EngineThread, engine: Engine) -> None:
    thread.close()
    engine.runner.close()


def _model_info(loaded: LoadedModel, max_model_len: int) -> ModelInfo:
    return ModelInfo(
        name=loaded.name,
        architecture=loaded.config.model_type,
        num_parameters=loaded.num_parameters,
        max_model_len=max_model_len,
        vocab_size=loaded.config.vocab_size,
        dtype=loaded.dtype,
        device=str(loaded.placement.device),
        quantization=loaded.quantization,
        weight_bytes=loaded.weight_bytes,
        eos_token_ids=loaded.eos_token_ids,
        has_chat_template=loaded.template is not None,
        default_sampling=loaded.default_sampling,
    )


@contextmanager
def _progress_bar() -> Iterator[Any]:
    """A bar for loading, on a terminal, when it takes longer than a second."""
    with tqdm(
        desc="loading", unit="B", unit_scale=True, delay=1.0, leave=False, dynamic_ncols=True, disable=None
    ) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
