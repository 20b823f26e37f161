# SPDX-License-Identifier: MIT
"""vLLM's `AsyncLLM`: outputs that grow, pieces, or one whole; requests that end when nobody wants them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core import (
    AsyncEngineArgs,
    AsyncLLM,
    EngineDeadError,
    InferenceEngine,
    InvalidParameterError,
    PoolingParams,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from candle_vllm.core.sampling.llguidance_backend import LlguidanceBackend
from candle_vllm.core.sampling.llguidance_grammar import LlguidanceGrammar
from packages.core.tests.toy_encoder import toy_encoder_config, write_toy_encoder
from tests.waiting import until

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(toy_model: Path) -> Iterator[InferenceEngine]:
    with InferenceEngine(str(toy_model), threads=1) as made:
        yield made


async def outputs(engine: InferenceEngine, prompt: Any, params: SamplingParams | None, **options: Any) -> list[Any]:
    return [output async for output in AsyncLLM(engine).generate(prompt, params, **options)]


def test_what_an_output_has(engine: InferenceEngine) -> None:
    whole = engine.generate("abc", SamplingParams(**GREEDY, logprobs=1), use_tqdm=False)[0]
    given = {
        kind: asyncio.run(outputs(engine, "abc", SamplingParams(**GREEDY, logprobs=1, output_kind=kind)))
        for kind in RequestOutputKind
    }
    cumulative, pieces, final = (given[kind] for kind in RequestOutputKind)
    assert len(cumulative) > 1
    for last in (cumulative[-1], final[-1]):
        assert isinstance(last, RequestOutput)
        assert (last.outputs[0].text, last.outputs[0].token_ids) == (whole.text, list(whole.token_ids))
        assert last.outputs[0].cumulative_logprob == pytest.approx(whole.outputs[0].cumulative_logprob)
        assert len(last.outputs[0].logprobs or ()) == 8
    assert len(final) == 1
    lengths = [len(each.outputs[0].token_ids) for each in cumulative]
    assert lengths == sorted(lengths)
    assert lengths[0] < 8
    assert "".join(each.outputs[0].text for each in pieces) == whole.text
    assert [token for each in pieces for token in each.outputs[0].token_ids] == list(whole.token_ids)
    assert pieces[-1].outputs[0].cumulative_logprob == pytest.approx(whole.outputs[0].cumulative_logprob)
    for each in given.values():
        assert [output.finished for output in each] == [*[False] * (len(each) - 1), True]
        assert each[-1].outputs[0].finish_reason == "length"
        assert each[-1].prompt_token_ids == engine.tokenize("abc")


def test_sequences_by_their_index_and_all_at_the_end(engine: InferenceEngine) -> None:
    params = SamplingParams(n=3, seed=1, max_tokens=4, ignore_eos=True)
    told = asyncio.run(outputs(engine, {"prompt": "abc"}, params))
    assert {each.outputs[0].index for each in told} == {0, 1, 2}
    assert [each.finished for each in told].count(True) == 1
    params.output_kind = RequestOutputKind.FINAL_ONLY
    (final,) = asyncio.run(outputs(engine, "abc", params))
    assert [each.index for each in final.outputs] == [0, 1, 2]
    last = {each.outputs[0].index: each.outputs[0].token_ids for each in told}
    assert [each.token_ids for each in final.outputs] == [last[index] for index in range(3)]


def test_many_at_once_by_their_ids(engine: InferenceEngine) -> None:
    async def all_of_them() -> list[list[Any]]:
        params = SamplingParams(**GREEDY)
        return await asyncio.gather(*(outputs(engine, "a" * n, params, request_id=f"r{n}") for n in (1, 2, 3)))

    told = asyncio.run(all_of_them())
    assert [each[-1].request_id for each in told] == ["r1", "r2", "r3"]
    wanted = engine.generate(["a", "aa", "aaa"], SamplingParams(**GREEDY), use_tqdm=False)
    assert [each[-1].outputs[0].token_ids for each in told] == [list(each.token_ids) for each in wanted]


def test_a_sequence_ends_with_the_context_as_in_vllm(engine: InferenceEngine) -> None:
    most = engine.model_info.max_model_len
    (*_, last) = asyncio.run(outputs(engine, "abc", SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)))
    assert len(last.prompt_token_ids) + len(last.outputs[0].token_ids) == most


def test_a_grammar_is_compiled_outside_the_event_loop(engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would stop all other streams of the loop."""
    threads: list[threading.Thread] = []
    compile_grammar = LlguidanceBackend.compile

    def noted(backend: LlguidanceBackend, spec: StructuredOutputsParams) -> LlguidanceGrammar:
        threads.append(threading.current_thread())
        return compile_grammar(backend, spec)

    monkeypatch.setattr(LlguidanceBackend, "compile", noted)
    params = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["yes", "no"]), max_tokens=8)
    user = {"role": "user", "content": "abc"}
    for call in (outputs(engine, "abc", params), engine.agenerate("abc", params), engine.achat([user], params)):
        threads.clear()
        assert asyncio.run(call)
        assert threads[0] is not threading.main_thread()


def test_an_abort_ends_the_iteration_and_leaving_it_aborts(engine: InferenceEngine) -> None:
    def slowly(_: Any, row: Any) -> Any:
        time.sleep(0.02)  # the answer is not whole before it is aborted
        return row

    long = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, logits_processors=[slowly])

    async def aborted() -> Any:
        llm, last = AsyncLLM(engine), None
        async for output in llm.generate("abc", long, "x"):
            await llm.abort("x" if last is None else ["x", "unknown"])
            last = output
        return last

    last = asyncio.run(aborted())
    assert (last.finished, last.outputs[0].finish_reason) == (True, "abort")
    assert len(last.outputs[0].token_ids) < 400

    async def left() -> None:
        stream = AsyncLLM(engine).generate("abc", long, "y")
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        await until(lambda: engine.stats().finished.get("abort", 0) == before + 1 and not engine.stats().num_running)

    before = engine.stats().finished.get("abort", 0)
    asyncio.run(left())


def test_a_vector(engine: InferenceEngine) -> None:
    async def vector() -> Any:
        return [each async for each in AsyncLLM(engine).encode("abc", PoolingParams(pooling="mean"), "z")]

    (output,) = asyncio.run(vector())
    assert output.request_id == "z"
    assert output.outputs.data.tolist() == engine.embed("abc", PoolingParams(pooling="mean"))[0].embedding.tolist()


def test_classes(tmp_path: Path, engine: InferenceEngine) -> None:
    folder = write_toy_encoder(tmp_path / "m", toy_encoder_config("BertForSequenceClassification"), pooling=None)

    async def classes(of: Any, *more: Any, task: str = "classify") -> Any:
        return [each async for each in AsyncLLM(of).encode("a b", *more, pooling_task=task)]

    with InferenceEngine(str(folder), threads=1) as classifier:
        (output,) = asyncio.run(classes(classifier, None, "z"))
        assert output.request_id == "z"
        (wanted,) = classifier.classify("a b")
        assert output.outputs.data.tolist() == wanted.probs.tolist()
        assert output.prompt_token_ids == list(wanted.prompt_token_ids)
        with pytest.raises(InvalidParameterError, match="normalize has no effect on classes"):
            asyncio.run(classes(classifier, PoolingParams(normalize=True)))
    with pytest.raises(InvalidParameterError, match="no head for scores or classes"):
        asyncio.run(classes(engine))
    (single,) = asyncio.run(classes(engine, task="token_embed"))
    assert single.outputs.data.shape == (len(single.prompt_token_ids), engine.model_info.embedding_size)


def test_what_there_is_not_is_refused_by_name(engine: InferenceEngine) -> None:
    for options, said in (
        ({"lora_request": object()}, "lora_request must be a LoRARequest, or pairs .*, not object"),
        ({"data_parallel_rank": 1}, "takes no data_parallel_rank"),
        ({"tokenization_kwargs": {"truncation": True}}, "may only have add_special_tokens"),
    ):
        with pytest.raises(InvalidParameterError, match=said):
            asyncio.run(outputs(engine, "abc", None, **options))
    with pytest.raises(InvalidParameterError, match="must be SamplingParams, not dict"):
        asyncio.run(outputs(engine, "abc", {"max_tokens": 5}))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="generate has no argument 'max_tokens': it is a field of SamplingParams"):
        asyncio.run(outputs(engine, "abc", None, max_tokens=5))


def test_its_life(toy_model: Path) -> None:
    async def life() -> None:
        arguments = AsyncEngineArgs(str(toy_model), max_model_len=64, threads=1)
        with pytest.raises(InvalidParameterError, match="from_engine_args takes no stat_loggers"):
            AsyncLLM.from_engine_args(arguments, stat_loggers=[object()])
        llm = AsyncLLM.from_engine_args(arguments, start_engine_loop=True, usage_context="API_SERVER")
        await llm.check_health()
        assert llm.is_running
        assert (await llm.get_default_sampling_params()).temperature == 1
        assert llm.get_tokenizer().decode(llm.get_tokenizer().encode("abc")) == "abc"
        assert (await llm.get_tokenizer()).decode([97]) == "a"  # as in older versions of vLLM
        llm.shutdown()
        assert llm.errored
        with pytest.raises(EngineDeadError):
            await llm.check_health()

    asyncio.run(life())
