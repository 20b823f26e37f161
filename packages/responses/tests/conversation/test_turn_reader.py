# SPDX-License-Identifier: MIT
"""One answer from chunks as different servers send them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from candle_vllm.core.engine.outputs import FinishReason
from candle_vllm.core.errors import CandleVllmError
from candle_vllm.openai import events as answer
from candle_vllm.openai.protocol.chat import ChatTokenLogprob
from candle_vllm.responses.conversation import turn_reader
from candle_vllm.responses.conversation.events import (
    CallArgumentsDelta,
    CallStarted,
    Event,
    ReasoningDelta,
    TextDelta,
    TurnFinished,
)
from candle_vllm.responses.conversation.http_chunks import ChunkReader
from candle_vllm.responses.conversation.options import ConversationUsage
from candle_vllm.responses.conversation.turn_reader import TurnReader


def chunk(finish: str | None = None, index: int = 0, logprobs: Any = None, **delta: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
    return msgspec.json.decode(msgspec.json.encode({"choices": [choice]}))


def call(index: int, id: str | None = None, name: str | None = None, arguments: str | None = None) -> dict[str, Any]:
    return {"index": index, "id": id, "function": {"name": name, "arguments": arguments}}


def read(*chunks: dict[str, Any], used: Any = ()) -> tuple[list[Event], TurnFinished]:
    chunk_reader, reader = ChunkReader(), TurnReader(1, used)
    said = [event for one in chunks for event in chunk_reader.read(one)] + chunk_reader.end()
    return [event for one in said for event in reader.read(one)], reader.finish()


def calls_of(turn: TurnFinished) -> list[tuple[str, str, str]]:
    return [
        (one["id"], one["function"]["name"], one["function"]["arguments"]) for one in turn.message.get("tool_calls", ())
    ]


def test_text_and_thoughts() -> None:
    events, turn = read(
        chunk(role="assistant", content=""),
        chunk(reasoning_content="hm"),
        chunk(reasoning_content="m"),
        chunk(content="Yes"),
        chunk(content="."),
        chunk("stop"),
    )
    assert events == [
        ReasoningDelta(text="hm"), ReasoningDelta(text="m"), TextDelta(text="Yes"), TextDelta(text="."),
    ]  # fmt: skip
    assert turn.message == {"role": "assistant", "content": "Yes.", "reasoning_content": "hmm"}
    assert turn.finish_reason == "stop"


def test_nothing_at_all_is_an_empty_answer() -> None:
    assert read(chunk("stop"))[1].message == {"role": "assistant", "content": ""}


def test_thoughts_alone_have_no_content() -> None:
    assert read(chunk(reasoning_content="x"))[1].message["content"] is None


def test_logprobs_stay_with_their_text() -> None:
    entry = ChatTokenLogprob("a", -0.5, (97,), ())
    given = {"content": [msgspec.to_builtins(entry)]}
    events, _ = read(chunk(content="a", logprobs=given), chunk(logprobs=given))
    assert events == [TextDelta(text="a", logprobs=(entry,)), TextDelta(text="", logprobs=(entry,))]


def test_calls_in_pieces_that_interleave() -> None:
    events, turn = read(
        chunk(tool_calls=(call(0, "a", "f", ""),)),
        chunk(tool_calls=(call(1, "b", "g", "{"), call(0, None, None, '{"x":'))),
        chunk(tool_calls=(call(0, None, None, "1}"), call(1, None, None, "}"))),
        chunk("tool_calls"),
    )
    assert calls_of(turn) == [("a", "f", '{"x":1}'), ("b", "g", "{}")]
    assert events[0] == CallStarted(index=0, call_id="a", name="f")
    assert events[1] == CallStarted(index=1, call_id="b", name="g")
    assert CallArgumentsDelta(index=1, call_id="b", delta="}") in events
    assert (turn.message["content"], turn.finish_reason) == (None, "tool_calls")


def test_names_and_ids_in_every_piece() -> None:
    events, turn = read(
        chunk(tool_calls=(call(0, "a", "f", '{"x"'),)), chunk(tool_calls=(call(0, "a", "f", ":1}"),)), chunk("stop")
    )
    assert calls_of(turn) == [("a", "f", '{"x":1}')]
    assert turn.finish_reason == "tool_calls"  # some servers say "stop"
    assert sum(isinstance(event, CallStarted) for event in events) == 1


def test_whole_calls_under_one_index() -> None:
    _, turn = read(chunk(tool_calls=(call(0, "a", "f", "{}"),)), chunk(tool_calls=(call(0, "b", "f", "{}"),)))
    assert calls_of(turn) == [("a", "f", "{}"), ("b", "f", "{}")]


def test_another_id_without_a_name_is_the_same_call() -> None:
    _, turn = read(chunk(tool_calls=(call(0, "a", "f", "{"),)), chunk(tool_calls=(call(0, "zz", None, "}"),)))
    assert calls_of(turn) == [("a", "f", "{}")]


def test_used_missing_and_endless_ids_are_replaced() -> None:
    _, turn = read(
        chunk(tool_calls=(call(0, "call_0", "f", "{}"), call(1, None, "g", "{}"), call(2, "x" * 1000, "h", "{}"))),
        chunk(tool_calls=(call(0, "call_0", "f", " "),)),
        used={"call_0"},
    )
    ids = [one[0] for one in calls_of(turn)]
    assert all(one.startswith("call_") and len(one) == 37 for one in ids)
    assert len(set(ids)) == 3
    assert calls_of(turn)[0][2] == "{} "


def test_arguments_before_the_name_and_calls_without_one() -> None:
    events, turn = read(
        chunk(tool_calls=(call(0, "a", None, '{"x"'), call(1, "b", None, "{}"))),
        chunk(tool_calls=(call(0, None, "f", ":1}"),)),
    )
    assert calls_of(turn) == [("a", "f", '{"x":1}'), ("b", "unnamed", "{}")]
    assert events == [
        CallStarted(index=0, call_id="a", name="f"),
        CallArgumentsDelta(index=0, call_id="a", delta='{"x"'),
        CallArgumentsDelta(index=0, call_id="a", delta=":1}"),
        CallStarted(index=1, call_id="b", name="unnamed"),
        CallArgumentsDelta(index=1, call_id="b", delta="{}"),
    ]


@pytest.mark.parametrize("reason", ["length", "content_filter", "something"])
def test_an_answer_that_ends_otherwise_was_cut(reason: str) -> None:
    assert read(chunk(tool_calls=(call(0, "a", "f", "{"),)), chunk(reason))[1].finish_reason == "length"


def test_other_choices_are_not_ours() -> None:
    assert read(chunk(content="a"), chunk(index=1, content="b"))[1].message["content"] == "a"


def test_each_of_several_choices_is_read() -> None:
    reader = ChunkReader()
    chunks = (
        chunk(content="a"), chunk(index=1, tool_calls=(call(0, "c", "f", "{}"),)), chunk("stop", content="b"),
        chunk("tool_calls", index=1),
    )  # fmt: skip
    events, finished = [], []
    for one in chunks:
        events += reader.read(one)
        finished.append(reader.finished)
    events += reader.end()
    assert finished == [False, False, False, True]
    assert [event for event in events if event.choice == 0][1:] == [
        answer.Text(0, "a"), answer.Text(0, "b"), answer.Ended(0, FinishReason.STOP),
    ]  # fmt: skip
    assert [event for event in events if event.choice == 1][1:] == [
        answer.CallBegun(1, 0, "c", "f"), answer.CallText(1, 0, "{}"), answer.Ended(1, FinishReason.TOOL_CALLS),
    ]  # fmt: skip
    with pytest.raises(CandleVllmError, match="more than 128 answers"):
        read(*(chunk(index=number) for number in range(200)))


def test_usage_with_and_without_details() -> None:
    def counted(details: Any) -> dict[str, Any]:
        usage = {"prompt_tokens": 5, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
        return {"choices": [], "usage": {**usage, "completion_tokens_details": details}}

    assert read(counted(None))[1].usage == ConversationUsage(prompt_tokens=5, completion_tokens=3, cached_tokens=2)
    assert read(counted({"reasoning_tokens": 1}))[1].usage.reasoning_tokens == 1
    assert read(chunk("stop"))[1].usage == ConversationUsage()


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CandleVllmError, match="more than 128 calls"):
        read(*(chunk(tool_calls=(call(number, None, "f", "{}"),)) for number in range(129)))
    monkeypatch.setattr(turn_reader, "MAX_CHARS", 10)
    with pytest.raises(CandleVllmError, match="more than 10 characters"):
        read(chunk(content="123456"), chunk(reasoning_content="12345"))
