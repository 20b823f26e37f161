# SPDX-License-Identifier: MIT
"""`use_beam_search` in chat and completion requests, against the library's `LLM.beam_search`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from candle_vllm.core import LLM, BeamSearchParams, InferenceEngine
from candle_vllm.core.errors import EngineOverloadedError, RequestError
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from candle_vllm.openai import OpenAIAdapter, parse_chat_request, parse_completion_request

PROMPTS = [[5, 6, 7, 8], [70, 71]]
MESSAGES = [{"role": "user", "content": "ab"}]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceEngine]:
    folder = write_toy_model(tmp_path_factory.mktemp("beams"), toy_config(torch_dtype="float32"))
    with InferenceEngine(str(folder), threads=1, block_size=4) as made:
        yield made


class Watch:
    """Counts what the observer of requests is notified of."""

    def __init__(self) -> None:
        self.begun: list[Any] = []
        self.events: list[Any] = []
        self.ended = asyncio.Event()

    def begin(self, info: Any) -> Watch:
        self.begun.append(info)
        return self

    def take(self, piece: Any) -> None:
        self.events.append(piece.index)

    def drop(self) -> None:
        """Do nothing: every stream is closed before."""

    def close(self) -> None:
        self.events.append("closed")
        self.ended.set()

    def fail(self, error: Exception) -> None:
        self.events.append(error)

    reject = fail


def searched(engine: InferenceEngine, ids: list[int], **more: Any) -> list[Any]:
    (output,) = LLM(engine).beam_search([{"prompt_token_ids": ids}], BeamSearchParams(**more))
    return output.sequences


@pytest.mark.parametrize(("width", "penalty"), [(1, None), (3, 1.0), (4, 0.0), (10, 2.0)])
async def test_choices_are_the_beams_of_the_library(engine: InferenceEngine, width: int, penalty: float | None) -> None:
    watch = Watch()
    more = {} if penalty is None else {"length_penalty": penalty}
    answer = await OpenAIAdapter(engine, watcher=watch).complete(
        {"prompt": PROMPTS, "max_tokens": 6, "n": width, "use_beam_search": True, "temperature": 0.0, "top_p": 1.0,
         "logprobs": 2, "return_token_ids": True, "return_tokens_as_token_ids": True, **more}
    )  # fmt: skip
    assert len(answer.choices) == 2 * width
    for place, ids in enumerate(PROMPTS):
        wanted = searched(engine, ids, beam_width=width, max_tokens=6, **more)
        choices = answer.choices[place * width : (place + 1) * width]
        for choice, beam in zip(choices, wanted, strict=True):
            tokens = beam.tokens[len(ids) :]
            assert list(choice.token_ids) == tokens
            assert choice.finish_reason == beam.finish_reason
            assert choice.text == beam.text[len(engine.detokenize(ids)) :]
            assert sum(choice.logprobs.token_logprobs) == pytest.approx(beam.cum_logprob)
            assert choice.logprobs.tokens == tuple(f"token_id:{token}" for token in tokens)
            assert all(len(top) in (2, 3) for top in choice.logprobs.top_logprobs)
    assert answer.usage.prompt_tokens == sum(map(len, PROMPTS))
    assert answer.usage.completion_tokens == sum(len(choice.token_ids) for choice in answer.choices)
    assert [(info.params.n, info.count) for info in watch.begun] == [(width, width)] * 2
    assert sorted(watch.events) == sorted([*range(width)] * 2)


async def test_one_beam_is_the_greedy_answer(engine: InferenceEngine) -> None:
    adapter = OpenAIAdapter(engine)
    asked = {"messages": MESSAGES, "max_tokens": 9, "temperature": 0, "logprobs": True, "top_logprobs": 1,
             "ignore_eos": True, "skip_special_tokens": False}  # fmt: skip
    greedy, best = await adapter.chat(asked), await adapter.chat(asked | {"use_beam_search": True})
    assert best.choices[0].message == greedy.choices[0].message
    assert best.choices[0].finish_reason == greedy.choices[0].finish_reason == "length"
    given = [[(entry.token, entry.bytes, *map(type, entry.top_logprobs)) for entry in one.choices[0].logprobs.content]
             for one in (greedy, best)]  # fmt: skip
    assert given[0] == given[1]
    assert best.usage.completion_tokens == 9
    assert best.usage.prompt_tokens == greedy.usage.prompt_tokens


async def test_an_end_token_completes_a_beam_and_is_not_in_its_text(tmp_path: Any, engine: InferenceEngine) -> None:
    end = searched(engine, PROMPTS[0], beam_width=3, max_tokens=5)[0].tokens[len(PROMPTS[0]) + 2]
    folder = write_toy_model(tmp_path, toy_config(torch_dtype="float32", eos_token_id=end))
    with InferenceEngine(str(folder), threads=1) as ended:
        asked = {"prompt": PROMPTS[0], "max_tokens": 5, "n": 3, "use_beam_search": True, "return_token_ids": True}
        answer = await OpenAIAdapter(ended).complete(asked)
        wanted = searched(ended, PROMPTS[0], beam_width=3, max_tokens=5)
        (stopped, *_) = [choice for choice in answer.choices if choice.finish_reason == "stop"]
        assert [list(choice.token_ids) for choice in answer.choices] == [
            one.tokens[len(PROMPTS[0]) :] for one in wanted
        ]
        assert stopped.token_ids[-1] in ended.model_info.eos_token_ids
        whole = ended.detokenize([*PROMPTS[0], *stopped.token_ids[:-1]])
        assert stopped.text == whole[len(ended.detokenize(PROMPTS[0])) :]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"stream": True}, "use_beam_search"),
        ({"n": 11}, "n"),
        ({"use_beam_search": None, "length_penalty": 2}, "length_penalty"),
        ({"use_beam_search": False, "length_penalty": 0}, "length_penalty"),
        ({"length_penalty": 11}, "length_penalty"),
        ({"use_beam_search": 1}, "use_beam_search"),
        ({"max_tokens": 2049, "n": 2}, "max_tokens"),
        ({"temperature": 0.5}, "temperature"),
        ({"stop": ["a"]}, "stop"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"echo": True}, "echo"),
    ],
)
async def test_what_a_search_cannot_honour_is_refused_by_name(
    engine: InferenceEngine, fields: dict[str, Any], named: str
) -> None:
    adapter = OpenAIAdapter(engine)
    asked = {"max_tokens": 2, "use_beam_search": True, **fields}
    for ask, parse, more in (
        (adapter.complete, parse_completion_request, {"prompt": "ab"}),
        (adapter.chat, parse_chat_request, {"messages": MESSAGES}),
    ):
        with pytest.raises(RequestError) as caught:
            await ask(parse(asked | more))
        assert caught.value.param == named
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(RequestError, match="tools: not supported with use_beam_search"):
        await adapter.chat({"messages": MESSAGES, "use_beam_search": True, "tools": tools})


async def test_a_limit_of_the_server_names_no_field_that_was_not_sent() -> None:
    made = OpenAIAdapter(ScriptedEngine(["ab"]), reasoning_parser="qwen3", reasoning_budget=10)
    with pytest.raises(RequestError, match=r"use_beam_search: .*--reasoning-budget") as refused:
        await made.chat({"messages": MESSAGES, "use_beam_search": True})
    assert refused.value.param == "use_beam_search"
    with pytest.raises(RequestError, match="thinking_token_budget: not supported with use_beam_search"):
        await made.chat({"messages": MESSAGES, "use_beam_search": True, "thinking_token_budget": 5})


async def test_without_max_tokens_a_search_ends_at_its_bound(
    engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("candle_vllm.openai.preparation.MAX_BEAM_TOKENS", 12)
    asked = {"messages": MESSAGES, "use_beam_search": True, "n": 2, "ignore_eos": True}
    answer = await OpenAIAdapter(engine).chat(asked)
    assert answer.usage.completion_tokens == 12


async def test_a_search_waits_for_a_full_queue_and_ends_with_its_caller(
    engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step is refused at once; later ones wait. Closing the search aborts its steps."""
    stream, refused = engine.stream, [0, 3, 4]
    calls: list[str] = []

    def crowded(*given: Any, request_id: str, **more: Any) -> Any:
        calls.append(request_id)
        if len(calls) - 1 in refused:
            raise EngineOverloadedError("the queue is full")
        return stream(*given, request_id=request_id, **more)

    monkeypatch.setattr(engine, "stream", crowded)
    watch = Watch()
    adapter = OpenAIAdapter(engine, watcher=watch)
    asked = {"prompt": PROMPTS[0], "max_tokens": 3, "n": 2, "use_beam_search": True}
    with pytest.raises(EngineOverloadedError):
        await adapter.complete(asked)
    answer = await adapter.complete(asked)
    wanted = searched(engine, PROMPTS[0], beam_width=2, max_tokens=3)
    monkeypatch.undo()
    assert [choice.text for choice in answer.choices] == [
        one.text[len(engine.detokenize(PROMPTS[0])) :] for one in wanted
    ]
    assert isinstance(watch.events[0], EngineOverloadedError)
    assert watch.events[1:] == [0, 1]
    running = asyncio.create_task(OpenAIAdapter(engine, watcher=watch).complete(asked | {"max_tokens": 500}))
    while len(watch.begun) < 3:
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await watch.ended.wait()
    assert watch.events[-1] == "closed"
    while engine.stats().num_running or engine.stats().num_waiting:
        await asyncio.sleep(0.001)
