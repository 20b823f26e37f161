# SPDX-License-Identifier: MIT
"""The official `openai` and `anthropic` clients against server processes: the demo model's, and one with a script.

What a client does by itself is tested here: its helpers, its error classes, its retries and its limits of time.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import anthropic
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from tests.live_server import ServerProcess, openai_client
from tests.scripted_server import ScriptedServer
from tests.waiting import wait_for

pytestmark = pytest.mark.timeout(600)  # a busy machine is many times slower than an idle one

CHAT, MESSAGES = "POST /v1/chat/completions", "POST /v1/messages"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>'
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
SCRIPT = {
    "tool\n22 C": ["It is ", "warm."],
    "Look out": ["I look.\n", CALL],
    "Think": ["<think>Let me ", "see.</think>\n\n", "Four."],
    "Two": ["Both.\n", CALL, CALL],
}
GREEDY = {"temperature": 0}  # the client knows no such argument any more
PATIENT = 60.0  # seconds


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=20)
    capital: bool


@contextmanager
def anthropic_client(url: str, **options: Any) -> Iterator[anthropic.Anthropic]:
    """The official client, without retries and without the machine's proxy settings."""
    settings = {"api_key": "none", "max_retries": 0, "timeout": PATIENT, **options}
    with anthropic.Anthropic(
        base_url=url, http_client=anthropic.DefaultHttpxClient(trust_env=False), **settings
    ) as client:
        yield client


@pytest.fixture(scope="module")
def demo(demo_server: ServerProcess) -> str:
    """URL of the server with the demo model."""
    return demo_server.url


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    """A server that plays `SCRIPT`."""
    process = ScriptedServer(tmp_path_factory.mktemp("scripted"), SCRIPT)
    yield process
    assert process.stop() == 0


Start = Callable[..., ScriptedServer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts one server with flags and a pace: `start(answers, *flags, **engine)`."""
    with ExitStack() as stack:

        def start(answers: Mapping[str, str | Sequence[str]], *flags: str, **engine: Any) -> ScriptedServer:
            server = ScriptedServer(tmp_path, answers, *flags, engine=engine)
            stack.callback(server.stop)
            return server

        yield start


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


# ---- OpenAI's client -------------------------------------------------------------------------------------------------


def test_openai_streams_what_it_answers_whole(demo: str) -> None:
    fields: dict[str, Any] = {"model": "default", "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    with openai_client(demo) as client:
        whole = client.chat.completions.create(**fields)
        with client.chat.completions.stream(**fields, stream_options={"include_usage": True}) as stream:
            deltas = [event.delta for event in stream if event.type == "content.delta"]
            final = stream.get_final_completion()
    assert "Paris" in (whole.choices[0].message.content or "")
    assert "".join(deltas) == final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason
    assert final.usage is not None
    assert whole.usage is not None
    assert final.usage.total_tokens == whole.usage.total_tokens


def test_openai_parses_the_form_that_it_asked_for(demo: str) -> None:
    fields: dict[str, Any] = {"model": "default", "messages": QUESTION, "max_tokens": 80, "seed": 1}
    with openai_client(demo) as client:
        whole = client.chat.completions.parse(**fields, response_format=City).choices[0].message.parsed
        with client.chat.completions.stream(**fields, response_format=City) as stream:
            streamed = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(whole, City)
    assert streamed == whole


def test_openai_gets_a_call_by_the_tools_schema(demo: str) -> None:
    tool: Any = openai.pydantic_function_tool(City, name="note")
    named: Any = {"type": "function", "function": {"name": "note"}}
    with openai_client(demo) as client:
        choice = client.chat.completions.parse(
            model="default", messages=QUESTION, tools=[tool], tool_choice=named, max_tokens=80, seed=1
        ).choices[0]
    (call,) = choice.message.tool_calls or []
    assert call.function.name == "note"
    assert isinstance(call.function.parsed_arguments, City)


def test_openai_embeds_and_lists(demo: str) -> None:
    with openai_client(demo) as client:
        (model,) = client.models.list()
        assert client.models.retrieve(model.id).id == model.id
        vectors = [entry.embedding for entry in client.embeddings.create(model=model.id, input=["one", "two"]).data]
    assert len(vectors[0]) == len(vectors[1]) > 100
    assert vectors[0] != vectors[1]


def test_openai_calls_a_tool_and_goes_on(scripted: ScriptedServer) -> None:
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}}]
    with openai_client(scripted.url) as client:
        with client.chat.completions.stream(model="default", messages=said("Look out"), tools=tools) as stream:
            arguments = [event.arguments for event in stream if event.type == "tool_calls.function.arguments.done"]
            first = stream.get_final_completion().choices[0]
        assert [json.loads(text) for text in arguments] == [{"city": "Köln", "days": 2}]
        assert first.finish_reason == "tool_calls"
        (call,) = first.message.tool_calls or []
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": "22 C"}
        turns: list[Any] = [*said("Look out"), first.message.model_dump(exclude_none=True, exclude={"parsed"}), result]
        second = client.chat.completions.create(model="default", messages=turns, tools=tools).choices[0]
    assert (second.finish_reason, second.message.content) == ("stop", "It is warm.")


def test_many_async_clients_at_once(scripted: ScriptedServer) -> None:
    async def ask() -> list[tuple[str | None, str]]:
        theirs = openai.DefaultAsyncHttpxClient(trust_env=False)
        ours = anthropic.DefaultAsyncHttpxClient(trust_env=False)
        async with (
            openai.AsyncOpenAI(base_url=scripted.url + "/v1", api_key="none", http_client=theirs) as chats,
            anthropic.AsyncAnthropic(base_url=scripted.url, api_key="none", http_client=ours) as messages,
        ):

            async def one(number: int) -> tuple[str | None, str]:
                text = f"Think of {number}"
                chat = await chats.chat.completions.create(model="default", messages=said(text))
                async with messages.messages.stream(model="default", max_tokens=99, messages=said(text)) as stream:
                    return chat.choices[0].message.content, await stream.get_final_text()

            return await asyncio.gather(*map(one, range(20)))

    assert asyncio.run(ask()) == [("Four.", "Four.")] * 20


# ---- Anthropic's client ----------------------------------------------------------------------------------------------


def test_anthropic_streams_what_it_answers_whole(demo: str) -> None:
    fields: dict[str, Any] = {"model": "default", "messages": QUESTION, "max_tokens": 12}
    with anthropic_client(demo) as client:
        whole = client.messages.create(**fields, extra_body=GREEDY)
        with client.messages.stream(**fields, extra_body=GREEDY) as stream:
            pieces = list(stream.text_stream)
            final = stream.get_final_message()
        counted = client.messages.count_tokens(model="default", messages=QUESTION)
    assert whole.content[0].type == "text"
    assert "Paris" in whole.content[0].text
    assert "".join(pieces) == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    for usage in (whole.usage, final.usage):
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted.input_tokens
        assert 0 < usage.output_tokens <= 12


def test_anthropic_s_ends(demo: str) -> None:
    fields: dict[str, Any] = {"model": "default", "messages": QUESTION, "extra_body": GREEDY}
    with anthropic_client(demo) as client:
        cut = client.messages.create(**fields, max_tokens=2)
        stopped = client.messages.create(**fields, max_tokens=20, stop_sequences=["zz", "ris"])
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 2)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "ris")
    assert stopped.content[0].type == "text"
    assert stopped.content[0].text.endswith("Pa")


def test_anthropic_parses_the_form_that_it_asked_for(demo: str) -> None:
    with anthropic_client(demo) as client:
        message = client.messages.parse(
            model="default", messages=QUESTION, max_tokens=80, output_format=City, extra_body=GREEDY
        )
    assert isinstance(message.parsed_output, City)


def test_anthropic_gets_a_call_by_the_tools_schema(demo: str) -> None:
    tool: Any = {"name": "note", "input_schema": City.model_json_schema(), "strict": True}
    choice: Any = {"type": "tool", "name": "note", "disable_parallel_tool_use": True}
    with anthropic_client(demo) as client:
        message = client.messages.create(
            model="default", messages=QUESTION, max_tokens=80, tools=[tool], tool_choice=choice, extra_body=GREEDY
        )
    (block,) = message.content
    assert block.type == "tool_use"
    assert message.stop_reason == "tool_use"
    City.model_validate(block.input)


@pytest.mark.parametrize("streamed", [False, True])
def test_anthropic_s_own_loop_runs_the_tools(start: Start, streamed: bool) -> None:
    server = start(SCRIPT)
    asked: list[tuple[str, int]] = []

    @anthropic.beta_tool
    def weather(city: str, days: int) -> str:
        """Tells the weather."""
        asked.append((city, days))
        return "22 C"

    with anthropic_client(server.url) as client:
        fields: dict[str, Any] = {"model": "default", "max_tokens": 500, "messages": said("Look out")}
        runner: Any = client.beta.messages.tool_runner(**fields, tools=[weather], stream=streamed)
        turns = [turn.get_final_message() if streamed else turn for turn in runner]
    assert asked == [("Köln", 2)]
    assert [turn.stop_reason for turn in turns] == ["tool_use", "end_turn"]
    assert [getattr(block, "text", None) for block in turns[-1].content] == ["It is warm."]
    assert server.answered(3) == [(MESSAGES, 400), (MESSAGES, 200), (MESSAGES, 200)]  # first it tries a thread


def test_anthropic_shows_thoughts_and_takes_them_back(scripted: ScriptedServer) -> None:
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    fields: dict[str, Any] = {"model": "default", "max_tokens": 2048, "thinking": thinking}
    with anthropic_client(scripted.url) as client:
        whole = client.messages.create(**fields, messages=said("Think"))
        with client.messages.stream(**fields, messages=said("Think")) as stream:
            thoughts = [event.thinking for event in stream if event.type == "thinking"]
            final = stream.get_final_message()
        again = client.messages.create(**fields, messages=[*said("Think"), final.to_param(), *said("Look out")])
    assert [block.type for block in whole.content] == [block.type for block in final.content] == ["thinking", "text"]
    assert whole.content[0].type == "thinking"
    assert "".join(thoughts) == whole.content[0].thinking == "Let me see."
    assert whole.content[0].signature
    assert again.role == "assistant"


def test_anthropic_lists_models(scripted: ScriptedServer) -> None:
    with anthropic_client(scripted.url) as client:
        assert "scripted" in [model.id for model in client.models.list()]
        assert client.models.retrieve("scripted").lifecycle == "active"


# ---- failures --------------------------------------------------------------------------------------------------------

WRONG = [
    ({"temperature": -1}, "BadRequestError", "temperature"),
    ({"temprature": 1}, "BadRequestError", "temprature"),
    ({"max_tokens": 0}, "BadRequestError", "max_tokens"),
    ({"messages": [{"role": "user", "content": 3}]}, "BadRequestError", "messages.0.content"),
    ({"model": "other"}, "NotFoundError", "model"),  # the server is strict
    ({"messages": [{"role": "user", "content": "x" * (9 << 20)}]}, "RequestTooLargeError", None),
]


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    """A server with small bodies and strict names."""
    flags = ("--max-body-mb", "8", "--strict-model-names")
    server = ScriptedServer(tmp_path_factory.mktemp("strict"), {}, *flags)
    yield server
    assert server.stop() == 0


@pytest.mark.parametrize(("change", "kind", "param"), WRONG, ids=[str(param) for _, _, param in WRONG])
def test_wrong_requests_are_the_clients_own_errors(
    strict: ScriptedServer, change: Any, kind: str, param: str | None
) -> None:
    fields: dict[str, Any] = {"model": "scripted", "messages": said("x"), "max_tokens": 9, "extra_body": change}
    with openai_client(strict.url) as client:
        expected = getattr(openai, kind, openai.APIStatusError)
        with pytest.raises(expected) as theirs:
            client.chat.completions.create(**fields)
    with anthropic_client(strict.url) as client:
        expected = getattr(anthropic, kind, anthropic.APIStatusError)
        with pytest.raises(expected) as ours:
            client.messages.create(**fields)
    assert theirs.value.status_code == ours.value.status_code
    if param is not None:
        assert theirs.value.param == param
        error: Any = ours.value.body
        assert error["error"]["param"] == param
        assert error["error"]["message"].startswith(param + ":")


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    """A server whose engine fails behind three pieces."""
    server = ScriptedServer(tmp_path_factory.mktemp("failing"), {}, engine={"fail_after": 3})
    yield server
    assert server.stop() == 0


def test_openai_sees_a_stream_fail(failing: ScriptedServer) -> None:
    server, before = failing, len(failing.answered(0))
    seen: list[Any] = []
    with openai_client(server.url) as client:
        chunks = client.chat.completions.create(model="scripted", messages=said("x"), stream=True)
        with pytest.raises(openai.APIError) as failure:
            seen.extend(choice.delta.content for chunk in chunks for choice in chunk.choices)
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="scripted", messages=said("x"))
    assert "".join(filter(None, seen)) == "Not"
    assert failure.value.type == "server_error"
    assert server.answered(before + 2)[before:] == [(CHAT, 200), (CHAT, 500)]


def test_anthropic_sees_a_stream_fail(failing: ScriptedServer) -> None:
    server, before = failing, len(failing.answered(0))
    fields: dict[str, Any] = {"model": "scripted", "max_tokens": 99, "messages": said("x")}
    seen: list[str] = []
    with anthropic_client(server.url) as client:
        with client.messages.stream(**fields) as stream, pytest.raises(anthropic.APIStatusError) as failure:
            seen.extend(stream.text_stream)
        with pytest.raises(anthropic.InternalServerError):
            client.messages.create(**fields)
    assert "".join(seen) == "Not"
    assert failure.value.body["error"]["type"] == "api_error"  # type: ignore[index]
    assert server.answered(before + 2)[before:] == [(MESSAGES, 200), (MESSAGES, 500)]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    """A server with a key."""
    server = ScriptedServer(tmp_path_factory.mktemp("keyed"), {"Think": "Four."}, "--api-key", "right")
    yield server
    assert server.stop() == 0


@pytest.mark.parametrize("header", ["Authorization", "x-api-key"])
@pytest.mark.parametrize("key", ["right", "wrong"])
def test_keys_by_either_header(keyed: ScriptedServer, header: str, key: str) -> None:
    server, before = keyed, len(keyed.answered(0))
    bearer = header == "Authorization"
    theirs: Any = {"Authorization": f"Bearer {key}" if bearer else openai.omit} | ({} if bearer else {"x-api-key": key})
    ours: Any = {"auth_token": key, "api_key": None} if bearer else {"api_key": key}
    fields: dict[str, Any] = {"model": "default", "messages": said("Think"), "max_tokens": 99}
    with openai_client(server.url) as chats, anthropic_client(server.url, **ours | {"max_retries": 3}) as messages:
        if key == "right":
            assert chats.chat.completions.create(**fields, extra_headers=theirs).choices
            assert messages.messages.create(**fields).stop_reason == "end_turn"
        else:
            with pytest.raises(openai.AuthenticationError):
                chats.chat.completions.create(**fields, extra_headers=theirs)
            with pytest.raises(anthropic.AuthenticationError):
                messages.messages.create(**fields)
    assert [status for _, status in server.answered(before + 2)[before:]] == [200 if key == "right" else 401] * 2


# ---- retries and limits of time --------------------------------------------------------------------------------------


def slow_stream(url: str, seen: list[str]) -> Thread:
    """Takes the only place of a server; ends with its answer."""

    def read() -> None:
        with openai_client(url) as client:
            for chunk in client.chat.completions.create(model="default", messages=said("Slow"), stream=True):
                seen.extend(choice.delta.content for choice in chunk.choices if choice.delta.content)

    thread = Thread(target=read, daemon=True)
    thread.start()
    wait_for(lambda: seen)
    return thread


@pytest.mark.parametrize(("flags", "statuses"), [
    (("--max-queued-requests", "1"), (503, 529)),
    (("--max-queued-per-key", "1"), (429, 429)),
])  # fmt: skip
def test_clients_come_again_when_they_are_told_to(
    start: Start, flags: tuple[str, ...], statuses: tuple[int, int]
) -> None:
    server = start({"Slow": list("abcdefghijklmnopqr"), "Think": ["Four."]}, *flags, pause=0.1)
    seen: list[str] = []
    thread = slow_stream(server.url, seen)
    begin = time.monotonic()
    with openai_client(server.url) as patient, anthropic_client(server.url, max_retries=9) as other:
        with pytest.raises(openai.APIStatusError) as refusal:
            patient.chat.completions.create(model="default", messages=said("Think"))
        assert refusal.value.response.headers["retry-after"] == "1"
        message = other.messages.create(model="default", max_tokens=9, messages=said("Think"))
        assert time.monotonic() - begin >= 1
        again = patient.with_options(max_retries=9).chat.completions.create(model="default", messages=said("Think"))
    thread.join(PATIENT)
    assert "".join(seen) == "abcdefghijklmnopqr"
    assert message.stop_reason == "end_turn"
    assert again.choices[0].message.content == "Four."
    refused = [status for _, status in server.answered(5) if status != 200]
    assert refused[0] == statuses[0]
    assert set(refused[1:]) == {statuses[1]}
    assert len(refused) <= 4  # they waited for the second that they were told


def test_a_request_that_takes_too_long_is_not_tried_again(start: Start) -> None:
    server = start({"Slow": ["a"] * 100}, "--request-timeout", "1", pause=0.1)
    with openai_client(server.url) as client, pytest.raises(openai.InternalServerError) as theirs:
        client.with_options(max_retries=3).chat.completions.create(model="default", messages=said("Slow"))
    with anthropic_client(server.url, max_retries=3) as client, pytest.raises(anthropic.APIStatusError) as ours:
        client.messages.create(model="default", max_tokens=999, messages=said("Slow"))
    assert theirs.value.status_code == ours.value.status_code == 504
    assert server.answered(2) == [(CHAT, 504), (MESSAGES, 504)]


def test_a_client_s_own_limit_of_time_frees_the_place(start: Start) -> None:
    server = start({"Slow": ["a"] * 100, "Think": "Four."}, "--max-queued-requests", "1", pause=0.1)
    with openai_client(server.url) as client, pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(model="default", messages=said("Slow"))
    server.answered(1)
    with anthropic_client(server.url, timeout=0.5) as client, pytest.raises(anthropic.APITimeoutError):
        client.messages.create(model="default", max_tokens=999, messages=said("Slow"))
    server.answered(2)
    with anthropic_client(server.url) as client:
        assert client.messages.create(model="default", max_tokens=99, messages=said("Think")).stop_reason == "end_turn"
    assert server.answered(3) == [(CHAT, 499), (MESSAGES, 499), (MESSAGES, 200)]


def test_streams_that_are_closed_early_leave_nothing_behind(start: Start) -> None:
    server = start({"Slow": ["a"] * 3000, "Think": "Four."}, "--max-queued-requests", "1", pause=0.02)
    with openai_client(server.url) as client:
        chunks = client.chat.completions.create(model="default", messages=said("Slow"), stream=True)
        next(iter(chunks))
        chunks.close()
    server.answered(1)  # before the minute that the whole answer takes
    with anthropic_client(server.url) as client:
        with client.messages.stream(model="default", max_tokens=3000, messages=said("Slow")) as stream:
            assert next(stream.text_stream) == "a"
        server.answered(2)
        assert client.messages.create(model="default", max_tokens=99, messages=said("Think")).stop_reason == "end_turn"
