# SPDX-License-Identifier: MIT
"""AsyncLLM: vLLM's class for programs with an event loop, over `InferenceEngine`."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from candle_vllm.core.arguments import explained
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.engine.outputs import FinishReason, TokenOutput
from candle_vllm.core.engine.requests import LoraChoice, LoRARequest
from candle_vllm.core.engine.step.request_watchers import PoolingOptions
from candle_vllm.core.engine.step.stream import TokenStream, raise_failure
from candle_vllm.core.engine_front import EngineFront
from candle_vllm.core.errors import EngineDeadError, InvalidParameterError
from candle_vllm.core.pooling import PoolingParams
from candle_vllm.core.sampling.params import RequestOutputKind, SamplingParams
from candle_vllm.core.text.prompts import Prompt
from candle_vllm.core.vllm import llm, outputs
from candle_vllm.core.vllm.arguments import EngineArgs


class AsyncLLM:
    """Model for concurrent requests in an event loop, with vLLM's names.

    Arguments and errors are as for `LLM`. Loading blocks: construct it before the loop runs, or in a thread.
    """

    def __init__(self, model: str | Path | EngineConfig | EngineFront, **arguments: Any) -> None:
        self._opened = llm.Opened.of(model, arguments)
        self.engine = self._opened.engine
        self._adapter_names: dict[int, str] = {}  # names of added adapters by `lora_int_id`

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, **more: object) -> Self:
        """Make an `AsyncLLM` from stored arguments; `start_engine_loop` and `usage_context` have no effect."""
        refused = more.keys() - {"start_engine_loop", "usage_context"}
        llm.refuse_given("from_engine_args", **{name: more[name] for name in refused})
        return cls(**vars(engine_args))

    @explained(SamplingParams=SamplingParams.__struct_fields__)
    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: LoraChoice = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
    ) -> AsyncIterator[outputs.RequestOutput]:
        """Continue a prompt; yield an output for each delta, in the format of `sampling_params.output_kind`.

        With several sequences (`n`), an output has only the sequence with new text, with its index; with `FINAL_ONLY`
        the only output has all sequences. Leaving the iteration, or cancelling the task, aborts the request.

        Args:
            request_id: id for `abort`; unique among the running requests.
            priority: priority of the request; lower values run first.
            lora_request: adapter of the request, or pairs of adapters and scales (`enable_lora`).
            trace_headers, data_parallel_rank: refused.

        Raises:
            RequestError, EngineOverloadedError, EngineDeadError: the request was refused.
            CandleVllmError: the engine failed on the request.
        """
        llm.refuse_given(
            "generate",
            trace_headers=trace_headers or None,
            data_parallel_rank=data_parallel_rank or None,
        )
        params = self._opened.sampling_params(sampling_params)
        await self.engine.compile_form(params)
        kind = RequestOutputKind.CUMULATIVE if sampling_params is None else sampling_params.output_kind
        stream = llm.fitted(
            self.engine.stream,
            prompt,
            params,
            request_id=request_id,
            priority=priority,
            add_special_tokens=llm.adds_special(tokenization_kwargs),
            lora_request=lora_request,
        )
        told = _Telling(stream, kind, lora_request if isinstance(lora_request, LoRARequest) else None)
        try:
            async for piece in stream:
                if piece.finish_reason is not FinishReason.ABORT:
                    raise_failure(piece)
                output = told.take(piece)
                if output is not None:
                    yield output
        finally:
            await stream.aclose()

    @explained(PoolingParams=PoolingParams.__struct_fields__)
    async def encode(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        lora_request: LoraChoice = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        *,
        pooling_task: str = "embed",
    ) -> AsyncIterator[outputs.PoolingRequestOutput[outputs.PoolingOutput]]:
        """Yield the pooled output of a text, once. Arguments and errors are as in `generate` and `LLM.encode`."""
        llm.refuse_given("encode", trace_headers=trace_headers or None)
        call: PoolingOptions = {
            "request_id": request_id or uuid.uuid4().hex,
            "priority": priority,
            "add_special_tokens": llm.adds_special(tokenization_kwargs),
            "lora_request": lora_request,
        }
        classes, params = self._opened.task_params(pooling_task, pooling_params)
        run = self.engine.aclassify if classes else self.engine.aembed
        yield llm.pooled((await run([prompt], params, **call))[0])

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Abort requests; their iterators yield a last output with the finish reason "abort"."""
        for each in [request_id] if isinstance(request_id, str) else request_id:
            self.engine.abort(each)

    async def reset_prefix_cache(self) -> bool:
        """As in `LLM`."""
        self.engine.reset_prefix_cache()
        return True

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Release memory; as `InferenceEngine.sleep`."""
        await asyncio.to_thread(self.engine.sleep, level, mode)

    async def wake_up(self, tags: list[str] | None = None) -> bool:
        """As in `LLM`."""
        await asyncio.to_thread(self.engine.wake_up, tags)
        return not self.engine.is_sleeping

    async def is_sleeping(self) -> bool:
        """Whether the engine sleeps."""
        return self.engine.is_sleeping

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """Register and load an adapter; returns True. Errors as `InferenceEngine.add_lora`."""
        await asyncio.to_thread(self.engine.add_lora, lora_request)
        if lora_request.lora_int_id:
            self._adapter_names[lora_request.lora_int_id] = lora_request.lora_name
        return True

    async def remove_lora(self, lora_id: int | str) -> bool:
        """Remove an adapter, by its name or the number that it was added with; False for an unknown adapter."""
        name = self._adapter_names.pop(lora_id, None) if isinstance(lora_id, int) else lora_id
        return name is not None and await asyncio.to_thread(self.engine.remove_lora, name)

    async def list_loras(self) -> set[int]:
        """Return the numbers of the adapters that were added with a number; `engine.list_loras` returns all."""
        known = {each.name for each in await asyncio.to_thread(self.engine.list_loras)}
        return {number for number, name in self._adapter_names.items() if name in known}

    async def pin_lora(self, lora_id: int | str) -> bool:
        """Pin an adapter in memory; returns True. Errors as `InferenceEngine.pin_lora`."""
        name = self._adapter_names.get(lora_id) if isinstance(lora_id, int) else lora_id
        if name is None:
            raise InvalidParameterError(f"no adapter was added with the number {lora_id}", "lora_id")
        await asyncio.to_thread(self.engine.pin_lora, name)
        return True

    async def check_health(self) -> None:
        """Raise `EngineDeadError` if the engine is closed or has failed permanently."""
        if not self.engine.is_alive:
            raise EngineDeadError("the engine is closed, or has failed")

    @property
    def is_running(self) -> bool:
        """Whether the engine is open and has not failed; it may sleep."""
        return self.engine.is_alive

    @property
    def errored(self) -> bool:
        """Whether the engine is closed or has failed."""
        return not self.engine.is_alive

    async def get_default_sampling_params(self) -> SamplingParams:
        """Return the default sampling parameters, as `LLM`."""
        return self._opened.default_sampling_params()

    def get_tokenizer(self) -> llm.LlmTokenizer:
        """Return the model's tokenizer and template."""
        return llm.LlmTokenizer(self.engine)

    def shutdown(self) -> None:
        """Abort running requests and release the model; an engine that was passed in stays open."""
        self._opened.close()


AsyncLLMEngine = AsyncLLM
"""vLLM's older name."""


class _Telling:
    """Converter of a stream's `TokenOutput`s to vLLM's outputs."""

    def __init__(self, stream: TokenStream, kind: RequestOutputKind, lora_request: LoRARequest | None = None) -> None:
        self._request = stream.request
        self._lora_request = lora_request
        self._kind = kind
        count = self._request.params.n
        self._asked = self._request.params.logprobs is not None
        self._so_far = [
            outputs.CompletionOutput(index, "", [], logprobs=[] if self._asked else None) for index in range(count)
        ]
        self._sums = [0.0] * count
        self._unfinished = count
        self._of_prompt = outputs.prompt_logprobs(None)

    def take(self, piece: TokenOutput) -> outputs.RequestOutput | None:
        """Return the output for a `TokenOutput`; None for FINAL_ONLY while a sequence has not ended."""
        whole = self._so_far[piece.index]
        if self._kind is RequestOutputKind.DELTA:
            whole = self._so_far[piece.index] = outputs.CompletionOutput(
                piece.index, "", [], logprobs=[] if self._asked else None
            )
        whole.text += piece.text
        whole.token_ids += piece.token_ids
        if whole.logprobs is not None:
            whole.logprobs += [outputs.by_token(entry) for entry in piece.logprobs or ()]
            self._sums[piece.index] += sum(entry.chosen.logprob for entry in piece.logprobs or ())
            whole.cumulative_logprob = self._sums[piece.index]
        if piece.finish_reason is not None:
            self._unfinished -= 1
            whole.finish_reason, whole.stop_reason = str(piece.finish_reason), piece.stop_reason
        if piece.prompt_logprobs is not None or self._kind is RequestOutputKind.DELTA:
            self._of_prompt = outputs.prompt_logprobs(piece.prompt_logprobs)
        if self._kind is RequestOutputKind.FINAL_ONLY:
            return None if self._unfinished else self._output(piece, self._so_far)
        return self._output(piece, [whole])

    def _output(self, piece: TokenOutput, sequences: Iterable[outputs.CompletionOutput]) -> outputs.RequestOutput:
        return outputs.RequestOutput(
            request_id=self._request.request_id,
            prompt=self._request.prompt,
            prompt_token_ids=list(self._request.prompt_token_ids),
            prompt_logprobs=self._of_prompt,
            outputs=[_copied(each) for each in sequences],
            finished=not self._unfinished,
            metrics=None if self._unfinished else piece.metrics,
            num_cached_tokens=piece.num_cached_tokens,
            lora_request=self._lora_request,
        )


def _copied(given: outputs.CompletionOutput) -> outputs.CompletionOutput:
    """Copy an output, so that later deltas do not change it."""
    logprobs = None if given.logprobs is None else list(given.logprobs)
    return dataclasses.replace(given, token_ids=list(given.token_ids), logprobs=logprobs)
