# SPDX-License-Identifier: MIT
"""The small parts of a conversation: its transcript, its channel, its watch for loops, and the end of a task."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pydantic
import pytest

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai.task import Call, Message, TextPart, text_of
from candle_vllm.responses.conversation.channel import EventChannel, end_task
from candle_vllm.responses.conversation.chat_form import ChatTranscript
from candle_vllm.responses.conversation.loop import RepeatWatch
from candle_vllm.responses.conversation.options import ConversationOptions
from candle_vllm.responses.conversation.transcript import LOST
from candle_vllm.responses.tools.tool import ToolCall, ToolOutput, ToolResult


def assistant(*ids: str) -> dict[str, object]:
    calls = [{"id": one, "type": "function", "function": {"name": "f", "arguments": "{}"}} for one in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(call_id: str, text: str = "r", name: str = "f", arguments: str = "{}") -> ToolResult:
    call = ToolCall(id=call_id, name=name, arguments=arguments)
    return ToolResult(call=call, status="completed", output=ToolOutput(), text=text)


def tool(call_id: str) -> dict[str, object]:
    return {"role": "tool", "tool_call_id": call_id, "content": "given"}


def nested(levels: int) -> list[object]:
    outer: list[object] = []
    for _ in range(levels):
        outer = [outer]
    return outer


class TestTranscript:
    def test_results_stand_in_the_order_of_the_calls(self) -> None:
        transcript = ChatTranscript([{"role": "user", "content": "x"}])
        transcript.add_turn(Message(role="assistant", calls=(Call("a", "f", "{}"), Call("b", "f", "{}"))))
        transcript.add_result(result("b", "2"))
        assert [call.id for call in transcript.open_calls] == ["a"]
        assert list(map(text_of, transcript.added)) == ["", "2"]
        transcript.add_result(result("a", "1"))
        assert list(map(text_of, transcript.added)) == ["", "1", "2"]
        transcript.add_turn(Message(role="assistant", parts=(TextPart("end"),)))
        assert [message["role"] for message in transcript.messages] == [
            "user", "assistant", "tool", "tool", "assistant",
        ]  # fmt: skip

    def test_calls_that_began_are_answered_and_the_others_stay_open(self) -> None:
        transcript = ChatTranscript([assistant("a", "b")])
        transcript.begin(transcript.open_calls[0])
        transcript.settle()
        assert list(map(text_of, transcript.added)) == [LOST]
        assert [call.id for call in transcript.open_calls] == ["b"]

    def test_tool_messages_that_were_given_close_calls(self) -> None:
        assert [call.id for call in ChatTranscript([assistant("a", "b"), tool("b")]).open_calls] == ["a"]
        assert ChatTranscript([assistant("a"), tool("a")]).open_calls == ()
        assert ChatTranscript([assistant("a"), {"role": "user", "content": "x"}]).open_calls == ()
        assert ChatTranscript([]).open_calls == ()

    def test_nothing_was_added_to_what_was_given(self) -> None:
        transcript = ChatTranscript([assistant("a"), tool("a")])
        assert (transcript.grew, transcript.added) == (False, ())

    @pytest.mark.parametrize("call", [{}, 3, {"id": "a", "function": {"name": "f"}}, {"id": 1, "function": {}}])
    def test_calls_that_cannot_be_read(self, call: object) -> None:
        with pytest.raises(InvalidParameterError, match=r"messages\.0\.tool_calls must have"):
            ChatTranscript([{"role": "assistant", "tool_calls": [call]}])

    def test_ids_that_two_calls_have(self) -> None:
        with pytest.raises(InvalidParameterError, match="'a' is the id of two calls"):
            ChatTranscript([assistant("a", "a")])

    @pytest.mark.parametrize(
        "content",
        [b"x", {1}, float("nan"), "\ud800", nested(100_000)],
        ids=["bytes", "set", "nan", "surrogate", "deep"],
    )
    def test_messages_that_are_no_json(self, content: object) -> None:
        with pytest.raises(InvalidParameterError, match=r"messages\.1 must be JSON") as caught:
            ChatTranscript([{"role": "user", "content": "x"}, {"role": "user", "content": content}])
        assert caught.value.param == "messages.1"

    @pytest.mark.parametrize("messages", [None, "hello", {"role": "user"}, 3])
    def test_what_is_no_list(self, messages: Any) -> None:
        with pytest.raises(InvalidParameterError, match="messages must be a list"):
            ChatTranscript(messages)

    @pytest.mark.parametrize("call_id", [["a"], {}, 3])
    def test_answers_to_ids_that_are_no_text(self, call_id: object) -> None:
        with pytest.raises(InvalidParameterError, match="tool_call_id must be a text"):
            ChatTranscript([assistant("a"), {"role": "tool", "tool_call_id": call_id, "content": "x"}])

    def test_it_shares_nothing_with_its_caller(self) -> None:
        given = {"role": "user", "content": [{"type": "text", "text": "x"}]}
        transcript = ChatTranscript([given])
        transcript.messages[0]["content"].clear()
        given["content"] = "y"
        assert transcript.messages[0]["content"] == [{"type": "text", "text": "x"}]


class TestRepeats:
    def test_equal_turns_whatever_their_order_ids_and_blanks(self) -> None:
        watch = RepeatWatch(2)
        assert not watch.is_loop([result("1", name="f", arguments='{"a":1,"b":2}'), result("2", name="g")])
        assert watch.is_loop([result("4", name="g"), result("3", name="f", arguments='{"b": 2, "a": 1}')])

    def test_another_turn_in_between_begins_anew(self) -> None:
        watch = RepeatWatch(2)
        texts = ["a", "b", "a", "b", "b"]
        assert [watch.is_loop([result("1", text)]) for text in texts] == [False] * 4 + [True]

    def test_arguments_that_are_no_json(self) -> None:
        watch = RepeatWatch(2)
        assert not watch.is_loop([result("1", arguments="{")])
        assert watch.is_loop([result("2", arguments="{")])

    def test_no_calls_are_no_loop(self) -> None:
        watch = RepeatWatch(2)
        assert not any(watch.is_loop([]) for _ in range(5))


class TestChannel:
    async def test_senders_wait_for_the_reader_and_lose_nothing(self) -> None:
        channel: EventChannel[int] = EventChannel(2)

        async def send() -> None:
            for number in range(10):
                await channel.send(number)

        sender = asyncio.create_task(send())
        await asyncio.sleep(0)
        channel.offer(99)  # there is no room
        sender.add_done_callback(lambda _: channel.close())
        got = []
        while (number := await channel.receive()) is not None:
            got.append(number)
        assert got == list(range(10))

    async def test_a_reader_that_waits_learns_of_the_error(self) -> None:
        channel: EventChannel[int] = EventChannel()
        asyncio.get_running_loop().call_later(0.01, channel.close, ValueError("x"))
        with pytest.raises(ValueError, match="x"):
            await channel.receive()

    async def test_what_was_sent_comes_before_the_error(self) -> None:
        channel: EventChannel[int] = EventChannel()
        await channel.send(1)
        channel.close(ValueError("x"))
        assert await channel.receive() == 1
        with pytest.raises(ValueError, match="x"):
            await channel.receive()


class TestEnding:
    async def test_it_waits_also_when_it_is_cancelled_itself(self) -> None:
        ended, release = [], asyncio.Event()

        async def slow() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                await release.wait()
                ended.append(True)

        task = asyncio.create_task(slow())
        await asyncio.sleep(0)
        ending = asyncio.create_task(end_task(task))
        await asyncio.sleep(0)
        ending.cancel()
        await asyncio.sleep(0)
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await ending
        assert ended == [True]

    async def test_a_task_that_takes_no_cancelling_is_left(self, caplog: pytest.LogCaptureFixture) -> None:
        release = asyncio.Event()

        async def stubborn() -> None:
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    continue

        task = asyncio.create_task(stubborn(), name="stubborn")
        await asyncio.sleep(0)
        with caplog.at_level(logging.ERROR):
            await end_task(task, patience=0.02)
        assert "stubborn did not end" in caplog.text
        release.set()
        await task

    async def test_a_task_that_swallows_its_cancelling_is_cancelled_again(self) -> None:
        cancels = 0

        async def swallowing() -> None:
            nonlocal cancels
            for _ in range(3):
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    cancels += 1

        task = asyncio.create_task(swallowing())
        await asyncio.sleep(0)
        await end_task(task, again=0.01)
        assert (cancels, task.done()) == (3, True)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("max_turns", 0, "must lie between 1 and 1000"),
        ("max_repeats", 1, "must lie between"),
        ("timeout", -1, "must lie between"),
        ("timeout", float("nan"), "must lie between"),
        ("parallel_tools", 65, "must lie between"),
        ("max_turns", "3", "must be a whole number, not '3'"),
        ("max_turns", None, "must be a whole number"),
        ("max_turns", 2.5, "must be a whole number"),
        ("max_turns", True, "must be a whole number"),
        ("tool_timeout", "x", "must be a number"),
        ("allowed_tools", "add", "must be a list of names, not 'add'"),
        ("allowed_tools", [3], "must be a list of names"),
        ("approval", "nevr", "must be 'never', 'always'"),
        ("approval", True, "must be 'never', 'always'"),
        ("approval", {"add": "x"}, "must have the rule 'never' or 'always' for 'add'"),
        ("request", None, "must be an object"),
    ],
)
def test_options_have_types_and_limits(name: str, value: object, told: str) -> None:
    with pytest.raises(InvalidParameterError, match=f"{name} {told}") as caught:
        ConversationOptions(**{name: value})
    assert caught.value.param == name


class Answer(pydantic.BaseModel):
    text: str


def test_a_class_as_the_form_of_the_answers_is_its_schema_for_every_model() -> None:
    options = ConversationOptions(request={"response_format": Answer, "seed": 1})
    asked = ChatTranscript([{"role": "user", "content": "hi"}]).request(options.request, (), (), first=True)
    assert json.loads(json.dumps(asked)) == asked  # as a server gets it
    assert asked["seed"] == 1
    assert asked["response_format"]["json_schema"] == {"name": "Answer", "schema": Answer.model_json_schema()}
    with pytest.raises(InvalidParameterError, match="response_format cannot be used: json is the class int"):
        ConversationOptions(request={"response_format": int})
