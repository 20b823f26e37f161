# SPDX-License-Identifier: MIT
"""Beam search for one prompt of a request (steps 4 to 9 of a request's life)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence

from msgspec.structs import replace

from candle_vllm.core.engine.outputs import FinishReason, PositionLogprobs, TokenOutput
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.step import stream
from candle_vllm.core.engine.step.request_watchers import RequestWatch
from candle_vllm.core.errors import CandleVllmError, EngineOverloadedError
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.vllm.beam_search import Beam, BeamSearch, BeamSearchParams, beam_step
from candle_vllm.openai.engine import EngineLike, TokenStream
from candle_vllm.openai.serving import WorkerThreads

_PAUSE = 0.01  # seconds between attempts to submit a step
_Submit = Callable[[Sequence[int], SamplingParams, str], TokenStream]


def beam_stream(
    engine: EngineLike, request: GenerationRequest, length_penalty: float, submit: _Submit, work: WorkerThreads,
    watch: RequestWatch | None,
) -> TokenStream:  # fmt: skip
    """Search for the best answers to a prompt; the stream has one output per answer, at the end of the search.

    Each step submits one request per beam for one token; the prefix cache holds the beam's earlier tokens.

    `submit` gets the tokens of the prompt and a beam, and the parameters and id of the step's request; the first step's
    errors are raised here. `watch` is notified of the answers and of the end.
    """
    prompt, params, loop = tuple(request.prompt_token_ids), request.params, asyncio.get_running_loop()
    info, step = engine.model_info, beam_step(params.n, params.logprobs or 0, params.cache_salt)
    most, ignored = params.max_tokens or info.max_model_len, params.ignore_eos
    asked = BeamSearchParams(beam_width=params.n, max_tokens=most, ignore_eos=ignored, length_penalty=length_penalty)
    search, numbers = BeamSearch(info, asked, len(prompt)), itertools.count()

    def extended(beam: Beam) -> TokenStream:
        return submit((*prompt, *beam.tokens), step, f"{request.request_id}-beam-{next(numbers)}")

    async def run(steps: list[TokenStream]) -> None:
        try:
            first, last = await _searched(search, extended, steps)
            for output in await work.prepare(_outputs, engine, request, search.best(), first, last):
                sink.put(output)
        except Exception as error:
            sink.put(error if isinstance(error, CandleVllmError) else CandleVllmError(str(error)))

    def abort(_: object) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(task.cancel)

    sink = stream.RequestSink(loop, params.n, abort, watch)
    task = loop.create_task(run([extended(search.beams[0])]))
    return stream.TokenStream(request, sink)


async def _searched(
    search: BeamSearch, extended: Callable[[Beam], TokenStream], steps: list[TokenStream]
) -> tuple[TokenOutput, TokenOutput]:
    """Search to the end, from the submitted first step; return outputs of the first step and of the last."""
    ends: list[TokenOutput] = []
    try:
        while search.beams:
            found = [await anext(each) for each in steps]
            for each in found:
                stream.raise_failure(each)
            ends += (found[0], found[-1])
            search.take([entry for output in found for entry in output.logprobs or ()])
            steps.clear()
            while len(steps) < len(search.beams):
                try:
                    steps.append(extended(search.beams[len(steps)]))
                except EngineOverloadedError:  # other requests fill the queue
                    await asyncio.sleep(_PAUSE)
    finally:
        for each in steps:
            each.close()
    return ends[0], ends[-1]


def _outputs(
    engine: EngineLike, request: GenerationRequest, beams: Sequence[Beam], first: TokenOutput, last: TokenOutput
) -> list[TokenOutput]:
    """Return one output per beam, with the times from the first step to the last."""
    prompt, params, metrics = request.prompt_token_ids, request.params, first.metrics
    if metrics is not None and last.metrics is not None:
        metrics = replace(metrics, finished_time=last.metrics.finished_time)

    def text(tokens: Sequence[int], *, whole: bool = True) -> str:
        return engine.detokenize((*prompt, *tokens), skip_special_tokens=params.skip_special_tokens, whole=whole)

    start, outputs = len(text((), whole=False)), list[TokenOutput]()
    special = frozenset(() if params.skip_special_tokens else engine.chat_conventions.special_tokens.values())
    for index, beam in enumerate(beams):
        shown = beam.tokens[:-1] if beam.finish_reason is FinishReason.STOP else beam.tokens
        places = [place for place, token in enumerate(shown) if token in special]
        asked = None if params.logprobs is None else beam.logprobs
        outputs.append(TokenOutput(
            request_id=request.request_id, index=index, text=text(shown)[start:], token_ids=beam.tokens,
            special_tokens=tuple((len(text(shown[:place])) - start, shown[place]) for place in places),
            logprobs=asked and tuple(PositionLogprobs(each.chosen, each.top[: params.logprobs]) for each in asked),
            finish_reason=beam.finish_reason, num_prompt_tokens=len(prompt), metrics=metrics,
            num_cached_tokens=first.num_cached_tokens,
        ))  # fmt: skip
    return outputs
