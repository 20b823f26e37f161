# SPDX-License-Identifier: MIT
"""Streamed output is identical to whole output, however the engine's text is cut."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from candle_vllm.core.engine.outputs import FinishReason, RequestMetrics, TokenOutput, joined
from candle_vllm.core.errors import RequestAbortedError, RequestError
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.core.testing.scripted_sequence import made_up_logprobs
from candle_vllm.openai import (
    ChunkStream,
    GenerationFailedError,
    OpenAIAdapter,
    parse_chat_request,
    parse_completion_request,
    to_error,
    to_json_bytes,
)
from candle_vllm.openai.answers import AnswerPlan, AnswerReader, AnswerStream, ChoiceReader, TokenCounts
from candle_vllm.openai.chat_answers import CustomCallWriter, wire_timings, wire_usage
from candle_vllm.openai.completion_answers import CompletionWriter, EchoedPrompt, join_completion
from candle_vllm.openai.events import Begun, CallBegun, CallText, Head, Text
from candle_vllm.openai.formats.layout import Layout, bind
from candle_vllm.openai.formats.reasoning_table import REASONING_FORMATS
from candle_vllm.openai.task import Paths, Task

OWN = ("id", "created", "object")  # differ between a stream and a whole answer, or between two requests


@st.composite
def scripts(draw: st.DrawFn) -> list[bytes]:
    data = draw(st.text(alphabet='ab <>é€😀\n"\u2028', max_size=16)).encode()
    points = sorted(draw(st.lists(st.integers(0, len(data)), max_size=6)))
    return [data[low:high] for low, high in itertools.pairwise([0, *points, len(data)])]


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "stop": st.sampled_from(["b", "ab", "😀", ["<", "a "]]),
        "max_tokens": st.integers(1, 12),
        "return_token_ids": st.booleans(),
        "include_stop_str_in_output": st.booleans(),
        "skip_special_tokens": st.booleans(),
    },
)


def added_up(chunks: list[dict[str, Any]], field: str) -> dict[str, Any]:
    """What a client that knows OpenAI's stream format makes of the chunks."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            whole = choices.setdefault(choice["index"], {"text": "", "logprobs": None, "token_ids": None})
            whole["text"] += choice[field] if field == "text" else choice[field].get("content", "")
            if choice["logprobs"] is not None:
                known = whole["logprobs"] or {}
                whole["logprobs"] = {k: (known.get(k) or []) + v if v else v for k, v in choice["logprobs"].items()}
            if "token_ids" in choice:
                whole["token_ids"] = (whole["token_ids"] or []) + choice["token_ids"]
            whole["finish_reason"], whole["stop_reason"] = choice["finish_reason"], choice.get("stop_reason")
    return {"choices": choices, "usage": chunks[-1]["usage"]}


def reduced(answer: dict[str, Any], field: str) -> dict[str, Any]:
    choices = {
        choice["index"]: {
            "text": choice["text"] if field == "text" else choice["message"]["content"],
            "logprobs": choice["logprobs"],
            "token_ids": choice.get("token_ids"),
            "finish_reason": choice["finish_reason"],
            "stop_reason": choice["stop_reason"],
        }
        for choice in answer["choices"]
    }
    return {"choices": choices, "usage": answer["usage"]}


async def both_ways(script: list[bytes], body: dict[str, Any], *, chat: bool) -> None:
    def prepare() -> OpenAIAdapter:
        order = itertools.cycle([script, [*reversed(script)]])
        return OpenAIAdapter(ScriptedEngine(lambda _: next(order)))

    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    if chat:
        field = "delta"
        answer = await prepare().chat(parse_chat_request(body))
        stream = await prepare().chat_stream(parse_chat_request(streamed))
    else:
        field = "text"
        answer = await prepare().complete(parse_completion_request(body))
        stream = await prepare().complete_stream(parse_completion_request(streamed))
    chunks = [json.loads(to_json_bytes(chunk)) async for chunk in stream]
    assert added_up(chunks, field) == reduced(json.loads(to_json_bytes(answer)), field)


@settings(deadline=None, max_examples=60)
@given(scripts(), OPTIONS, st.integers(1, 3), st.sampled_from([None, 0, 2]))
async def test_chat_streams_equal_whole_answers(
    script: list[bytes], options: dict[str, Any], n: int, logprobs: int | None
) -> None:
    more = {} if logprobs is None else {"logprobs": True, "top_logprobs": logprobs}
    await both_ways(script, {"messages": [{"role": "user", "content": "é"}], "n": n, **options, **more}, chat=True)


@settings(deadline=None, max_examples=60)
@given(
    scripts(), OPTIONS, st.integers(1, 2), st.sampled_from(["a", ["ab", "é", "x"]]), st.none() | st.integers(0, 2),
    st.booleans(),
)  # fmt: skip
async def test_completion_streams_equal_whole_answers(
    script: list[bytes], options: dict[str, Any], n: int, prompt: object, logprobs: int | None, echo: bool
) -> None:
    body = {"prompt": prompt, "n": n, "logprobs": logprobs, "echo": echo, **options}
    await both_ways(script, body, chat=False)


@settings(deadline=None, max_examples=60)
@given(scripts(), OPTIONS, st.booleans())
async def test_answers_do_not_depend_on_the_cuts(script: list[bytes], options: dict[str, Any], chat: bool) -> None:
    answers = []
    for pieces in (script, [b"".join(script)]):
        adapter = OpenAIAdapter(ScriptedEngine(pieces))
        if chat:
            body = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 1, **options}
            answer = await adapter.chat(parse_chat_request(body))
        else:
            answer = await adapter.complete(parse_completion_request({"prompt": "a", "logprobs": 1, **options}))
        data = json.loads(to_json_bytes(answer))
        answers.append({name: value for name, value in data.items() if name not in OWN})
    assert answers[0] == answers[1]


HEAD = Head("id", 1, "m", "fp")


ECHOED_TWICE = Task(paths=Paths({}), prompts=("pq",), choices=2, echo_prompts=True, sampling={"logprobs": 1})


class Noting:
    """A receiver that notes chunks as their JSON."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def put(self, items: Sequence[Any]) -> None:
        assert items
        self.chunks += [one if isinstance(one, bytes) else to_json_bytes(one) for one in items]

    def end(self, error: Exception | None = None) -> None:
        self.ended.set_result(error)


@settings(max_examples=30)
@given(scripts(), OPTIONS, st.booleans(), st.integers(1, 2), st.booleans(), st.sampled_from([None, 1, 2]))
async def test_chunks_that_are_pushed_or_encoded_are_those_that_are_iterated_over(
    script: list[bytes], options: dict[str, Any], chat: bool, prompts: int, counts: bool, logprobs: int | None
) -> None:
    body = options | ({"messages": [{"role": "user", "content": "?"}]} if chat else {"prompt": ["?"] * prompts})
    body |= {"stream": True, "n": 2, "stream_options": {"include_usage": True, "continuous_usage_stats": counts}}
    body |= {} if logprobs is None else {"logprobs": True, "top_logprobs": logprobs} if chat else {"logprobs": logprobs}

    async def start() -> ChunkStream[Any]:
        adapter = OpenAIAdapter(ScriptedEngine(script))
        return await (adapter.chat_stream(body) if chat else adapter.complete_stream(body))

    iterated = [to_json_bytes(chunk) async for chunk in await start()]

    async def pushed(stream: ChunkStream[Any]) -> list[bytes]:
        receiver = Noting()
        stream.push(receiver)
        assert await receiver.ended is None
        await stream.aclose()
        return receiver.chunks

    def told(chunks: list[bytes]) -> list[dict[str, Any]]:
        return [{name: value for name, value in json.loads(one).items() if name not in OWN} for one in chunks]

    assert told(await pushed(await start())) == told(iterated)
    assert told(await pushed((await start()).encoded(to_json_bytes))) == told(iterated)


def test_encoded_texts_around_a_call_are_those_of_the_writer() -> None:
    tools = [{"type": "custom", "custom": {"name": "run"}}]
    request = parse_chat_request({"messages": [{"role": "user", "content": "?"}], "tools": tools})
    plain, call = [Text(0, one) for one in 'a"\x85'], [CallBegun(0, 0, "call_1", "run"), CallText(0, 0, '{"input":"x"')]
    pieces = [[Begun(0, HEAD)], *([one] for one in (*plain, *call, *plain, Text(0, ""), Text(0, "b", (7,)), *plain))]
    alone, beside = CustomCallWriter(request, []), CustomCallWriter(request, [])
    stream: Any = ChunkStream(AnswerStream([], reader()), beside).encoded(to_json_bytes)
    for events in pieces:
        assert list(stream.writer.write(events)) == [to_json_bytes(chunk) for chunk in alone.write(events)]


@pytest.mark.parametrize("pushed", [False, True])
@pytest.mark.parametrize("prompts", [1, 3])
async def test_a_failure_of_a_stage_ends_the_stream_and_the_request(
    pushed: bool, prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("broken")

    engine = ScriptedEngine(["a"] * 100)
    monkeypatch.setattr(CompletionWriter, "write", broken)
    stream = await OpenAIAdapter(engine).complete_stream({"prompt": ["?"] * prompts, "max_tokens": 100})
    if pushed:
        found = Noting()
        stream.push(found)
        assert str(await found.ended) == "broken"
        await stream.aclose()
    else:
        with pytest.raises(ValueError, match="broken"):
            await anext(stream)
    assert engine.aborted == [request.request_id for request in engine.requests]


async def test_a_stream_that_is_dropped_aborts() -> None:
    engine = ScriptedEngine(["a"] * 100)
    stream = await OpenAIAdapter(engine).complete_stream({"prompt": "?", "max_tokens": 100})
    await anext(stream)
    del stream
    assert engine.aborted == [engine.requests[0].request_id]


@pytest.mark.parametrize("special", [{}, {"<think>": 300, "</think>": 301}], ids=["texts", "special tokens"])
@given(cuts=st.lists(st.booleans(), min_size=46, max_size=46))
@settings(max_examples=40, deadline=None)
def test_joined_outputs_have_the_same_thoughts(special: dict[str, int], cuts: list[bool]) -> None:
    """With speculation and `stream_interval` an output has tokens of the reasoning and of the answer."""
    (think,) = (each for each in REASONING_FORMATS if each.name == "think")
    plan = AnswerPlan(bind(Layout(think, None), special), show_reasoning=False, special_tokens=bool(special))
    outputs, at = list[TokenOutput](), 0
    for text in re.findall("<think>|</think>|." if special else ".", "<think>Hm</think>Hel<think>x</think>lo"):
        found = ((at, special[text]),) if text in special else ()
        values = (made_up_logprobs(ord(text[0]), 0, lambda token: bytes([token])),)
        outputs.append(TokenOutput(request_id="r", text=text, token_ids=(7,), special_tokens=found, logprobs=values))
        at += len(text)
    outputs.append(TokenOutput(request_id="r", finish_reason=FinishReason.STOP))

    def read(groups: list[list[TokenOutput]], plan: AnswerPlan = plan) -> tuple[int, list[Any], str, list[Any]]:
        one = ChoiceReader(plan)
        events: list[Any] = [event for group in groups for event in one.read(joined([joined(group)]))]
        logprobs = [entry.chosen.text for event in events for entry in event.logprobs or ()]
        with_text = [entry.chosen.text for event in events if isinstance(event, Text) and event.text
                     for entry in event.logprobs or ()]  # fmt: skip
        return one.reasoning_tokens, logprobs, "".join(event.text for event in events), with_text

    alone = read([[output] for output in outputs])
    later = "Hel<think>x</think>lo"  # text, if the marks are no special tokens
    assert alone[:3] == ((7, list("Hello"), "Hel\nlo") if special else (11, list(f"<think{later}"), later))
    groups: list[list[TokenOutput]] = [[]]
    for cut, output in zip(cuts, outputs):
        groups += [[]] if cut and groups[-1] else []
        groups[-1].append(output)
    assert read(groups)[:3] == alone[:3]
    count, logprobs, _, with_text = read(groups, dataclasses.replace(plan, show_reasoning=True))
    assert (count, logprobs) == (alone[0], [output.logprobs[0].chosen.text for output in outputs if output.logprobs])
    assert with_text == list("Hello") if special else "m" not in with_text


def reader() -> AnswerReader:
    return AnswerReader(HEAD, AnswerPlan(), Task(paths=Paths({})))


def test_errors_and_aborts_of_the_engine_are_raised() -> None:
    with pytest.raises(GenerationFailedError, match="boom"):
        reader().add(0, TokenOutput(request_id="r", finish_reason=FinishReason.ERROR, error="boom"))
    with pytest.raises(RequestAbortedError):
        reader().add(0, TokenOutput(request_id="r", finish_reason=FinishReason.ABORT))


def test_a_dead_end_of_the_request_is_the_requests_fault() -> None:
    text = "no token may be chosen: together, allowed_token_ids and bad_words forbid every token"
    failed = TokenOutput(request_id="r", finish_reason=FinishReason.ERROR, error=text, error_kind="request")
    with pytest.raises(RequestError, match="no token may be chosen") as caught:
        reader().add(0, failed)
    answer = to_error(caught.value)
    assert (answer.status, answer.body.error.code, answer.body.error.message) == (400, "invalid_request", text)


def test_the_engine_says_whose_fault_an_error_is() -> None:
    text = "no token may be chosen"
    with pytest.raises(GenerationFailedError, match=text):
        reader().add(0, TokenOutput(request_id="r", finish_reason=FinishReason.ERROR, error=text, error_kind="engine"))


def test_the_request_names_the_parameter_at_fault() -> None:
    names = {"structured_outputs": "response_format"}
    for param, told in (("structured_outputs", "response_format"), ("allowed_token_ids", "allowed_token_ids")):
        failed = TokenOutput(
            request_id="r", finish_reason=FinishReason.ERROR, error=f"{param}: no", error_kind="request",
            error_param=param,
        )  # fmt: skip
        with pytest.raises(RequestError) as caught:
            AnswerReader(HEAD, AnswerPlan(), Task(paths=Paths(names))).add(0, failed)
        assert (caught.value.param, str(caught.value)) == (told, f"{told}: no")


def test_cached_tokens_are_those_of_the_first_sequence() -> None:
    counts = TokenCounts()
    for index, cached in ((1, 64), (0, 16), (1, 64), (0, 48)):
        counts.add(0, TokenOutput(request_id="r", index=index, num_prompt_tokens=70, num_cached_tokens=cached), 1)
    assert counts.usage(final=True).cached_tokens == 16


def test_a_stream_that_ends_early_is_a_failure() -> None:
    started = reader()
    started.add(0, TokenOutput(request_id="r", text="a", token_ids=(1,)))
    with pytest.raises(GenerationFailedError, match="1 sequences unfinished"):
        started.end()


def test_times_are_of_the_slowest_prompt() -> None:
    counts = TokenCounts()
    for prompt, (scheduled, first, end) in enumerate([(1.0, 1.5, 2.0), (2.0, 2.1, 4.1)]):
        times = RequestMetrics(0.0, scheduled, first, end)
        counts.add(prompt, TokenOutput(request_id="r", num_prompt_tokens=3, metrics=times), 2)
    usage = counts.usage(final=True)
    assert (usage.prompt_ms, usage.completion_ms) == (500, 2000)
    assert (usage.prompt_tokens, usage.completion_tokens) == (6, 4)


def test_a_time_below_a_millisecond_is_not_zero() -> None:
    """Clients divide by it, as Ollama's documentation does for tokens per second."""
    counts = TokenCounts()
    times = RequestMetrics(0.0, 1.0, 1.0074, 1.00752)
    counts.add(0, TokenOutput(request_id="r", num_prompt_tokens=3, metrics=times), 1)
    usage = counts.usage(final=True)
    timings, costs = wire_timings(usage), wire_usage(usage)
    assert (timings.prompt_ms, timings.predicted_ms) == (7.4, 0.12)
    assert (costs.prompt_time_costs, costs.completion_time_costs) == (7, 0)
    assert timings.prompt_per_second == pytest.approx(3000 / 7.4)


def test_sequences_that_come_before_the_prompts_logprobs_wait_for_them() -> None:
    request = parse_completion_request({"prompt": "pq", "echo": True, "logprobs": 0, "n": 2})
    made = CompletionWriter(request, [EchoedPrompt("pq", "p", (112, 113))], whole=True)
    pieces = AnswerReader(HEAD, AnswerPlan(), ECHOED_TWICE)
    entry = made_up_logprobs(113, 0, lambda token: bytes([token]))
    end = {"request_id": "r", "token_ids": (113,), "logprobs": (entry,), "finish_reason": FinishReason.LENGTH}
    early = pieces.add(0, TokenOutput(index=1, text="one", **end))
    assert early == []
    events = pieces.add(0, TokenOutput(index=0, text="zero", prompt_logprobs=(None, entry), **end))
    answer = join_completion(made.write([*events, *pieces.end()]))
    assert [choice.text for choice in answer.choices] == ["pqzero", "pqone"]
    assert all(choice.logprobs and choice.logprobs.text_offset == (0, 1, 2) for choice in answer.choices)


def test_the_logprobs_of_an_echoed_prompt_are_made_once() -> None:
    request = parse_completion_request({"prompt": "pq", "echo": True, "logprobs": 0, "n": 2, "stream": True})
    made = CompletionWriter(request, [EchoedPrompt("pq", "p", (112, 113))])
    pieces = AnswerReader(HEAD, AnswerPlan(), ECHOED_TWICE)
    entry = made_up_logprobs(113, 0, lambda token: bytes([token]))
    first = made.write(pieces.add(0, TokenOutput(request_id="r", index=0, prompt_logprobs=(None, entry))))
    other = made.write(pieces.add(0, TokenOutput(request_id="r", index=1)))
    assert first[0].choices[0].logprobs is not None
    assert first[0].choices[0].logprobs is other[0].choices[0].logprobs
