# SPDX-License-Identifier: MIT
"""Conversations with a scripted model: exact turns, calls, results and ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any, ClassVar

import pytest

from candle_vllm.core.errors import CandleVllmError, InvalidParameterError, PromptTooLongError, RequestAbortedError
from candle_vllm.responses.conversation import turn_calls
from candle_vllm.responses.conversation.chat_form import ChatTranscript
from candle_vllm.responses.conversation.chat_model import InProcessModel
from candle_vllm.responses.conversation.events import (
    ApprovalRequested,
    CallArgumentsDelta,
    CallStarted,
    ResultsShortened,
    TextDelta,
    ToolFinished,
    ToolProgressed,
    ToolStarted,
    TurnFinished,
    TurnStarted,
)
from candle_vllm.responses.tools.approval import Approval
from candle_vllm.responses.tools.tool import ToolCall, ToolDefinition, ToolOutput, ToolProgress
from packages.responses.tests.conversation.conversation_fakes import (
    Bench,
    Gate,
    adapter_of,
    call_text,
    other_tasks,
    user,
)
from tests.waiting import skip, until


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


def shout(text: str) -> str:
    """Shouts."""
    return text.upper()


async def clock() -> str:
    """Tells the time."""
    return "noon"


THREE = call_text("add", a=1, b=2) + call_text("shout", text="hi") + call_text("clock")


async def test_an_answer_without_calls_is_one_turn() -> None:
    bench = Bench("Hello!")
    result = await bench.run("Hi")
    assert (result.final_message, result.completed, result.stop_reason) == ("Hello!", True, "stop")
    assert result.turns_taken == 1
    assert [type(event) for event in bench.events[:2]] == [TurnStarted, TextDelta]
    assert "".join(event.text for event in bench.of(TextDelta)) == "Hello!"
    assert bench.added == ({"role": "assistant", "content": "Hello!"},)
    assert bench.engine.template_calls[0].options.get("tools") is None
    assert result.usage.completion_tokens == 7
    assert result.usage.prompt_tokens == len(bench.engine.requests[0].prompt_token_ids)


async def test_three_tools_in_one_turn() -> None:
    bench = Bench("I look." + THREE, "Done.", tools=[add, shout, clock])
    result = await bench.run()
    assert result.completed
    assert (result.final_message, result.turns_taken) == ("Done.", 2)
    assert [(one.call.name, one.status, one.text) for one in result.tool_calls] == [
        ("add", "completed", "3"), ("shout", "completed", "HI"), ("clock", "completed", "noon"),
    ]  # fmt: skip
    said, *results, last = bench.added
    assert said["content"] == "I look."
    ids = [call["id"] for call in said["tool_calls"]]
    assert len(set(ids)) == 3
    assert results == [
        {"role": "tool", "tool_call_id": call_id, "content": text} for call_id, text in zip(ids, ("3", "HI", "noon"))
    ]
    assert last == {"role": "assistant", "content": "Done."}
    assert [(one.index, one.call_id, one.name) for one in bench.of(CallStarted)] == [
        (0, ids[0], "add"), (1, ids[1], "shout"), (2, ids[2], "clock"),
    ]  # fmt: skip
    for number, call in enumerate(said["tool_calls"]):
        streamed = "".join(one.delta for one in bench.of(CallArgumentsDelta) if one.index == number)
        assert streamed == call["function"]["arguments"]
    first, second = bench.of(TurnFinished)
    assert (first.finish_reason, first.message, second.finish_reason) == ("tool_calls", said, "stop")
    assert result.usage == first.usage + second.usage
    shown = bench.engine.template_calls[0].options["tools"]
    assert [tool["function"]["name"] for tool in shown] == ["add", "shout", "clock"]


async def test_calls_run_at_the_same_time_and_results_keep_their_order() -> None:
    gate = Gate()

    async def quick() -> str:
        gate.open.set()  # only a call that runs beside the first can let it through
        return "quick"

    bench = Bench(call_text("wait", number=1) + call_text("quick"), "ok", tools=[gate.wait, quick])
    result = await bench.run()
    assert [one.text for one in result.tool_calls] == ["through 1", "quick"]
    assert [one.result.text for one in bench.of(ToolFinished)] == ["quick", "through 1"]
    assert [message["content"] for message in bench.added[1:3]] == ["through 1", "quick"]


@pytest.mark.parametrize(("limit", "together"), [(1, 1), (2, 2), (8, 5)])
async def test_at_most_parallel_tools_run(limit: int, together: int) -> None:
    gate = Gate()
    bench = Bench("".join(call_text("wait", number=n) for n in range(5)), "ok", tools=[gate.wait], parallel_tools=limit)
    task = asyncio.create_task(bench.run())
    await until(lambda: gate.begun == together)
    gate.open.set()
    result = await task
    assert gate.together == together
    assert [one.text for one in result.tool_calls] == [f"through {n}" for n in range(5)]


async def test_what_the_model_gets_wrong_is_told_to_it() -> None:
    wrong = [
        call_text("ad", a=1, b=2),
        call_text("add", a="one", b=2),
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "a": 2, "b": 3}}\n</tool_call>',
    ]
    bench = Bench("".join(wrong), "sorry", tools=[add])
    result = await bench.run()
    assert [one.status for one in result.tool_calls] == ["unknown", "invalid_arguments", "invalid_arguments"]
    assert "Did you mean add?" in bench.added[1]["content"]
    assert bench.of(ToolStarted) == []
    assert result.completed


async def test_a_failing_tool_speaks_to_the_model_and_the_conversation_goes_on() -> None:
    def broken() -> str:
        """Breaks."""
        raise RuntimeError("secret detail")

    bench = Bench(call_text("broken"), "I see.", tools=[broken])
    result = await bench.run()
    assert result.tool_calls[0].status == "failed"
    assert "secret detail" not in json.dumps(bench.added)
    assert result.final_message == "I see."


async def test_tools_that_are_not_allowed_are_neither_shown_nor_found() -> None:
    bench = Bench(call_text("shout", text="x"), "ok", tools=[add, shout], allowed_tools=("a*",))
    result = await bench.run()
    assert [tool["function"]["name"] for tool in bench.engine.template_calls[0].options["tools"]] == ["add"]
    assert result.tool_calls[0].status == "unknown"
    assert "shout" not in result.tool_calls[0].text.replace("'shout'", "")


async def test_a_tool_that_the_tool_choice_does_not_allow_is_shown_and_does_not_run() -> None:
    chosen = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "add"}}]}
    request = {"tool_choice": {"type": "allowed_tools", "allowed_tools": chosen}}
    both = call_text("shout", text="x") + call_text("add", a=1, b=2)
    bench = Bench(both, "ok", tools=[add, shout], request=request)
    result = await bench.run()
    assert [tool["function"]["name"] for tool in bench.engine.template_calls[0].options["tools"]] == ["add", "shout"]
    assert [one.status for one in result.tool_calls] == ["denied", "completed"]
    assert result.tool_calls[0].text == turn_calls.NOT_ALLOWED


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("kind", ["required", "function", "allowed_tools"])
async def test_a_tool_choice_whose_tool_goes_away_during_the_conversation(kind: str, left: bool) -> None:
    def leave() -> str:
        """Removes itself."""
        bench.tools.remove("leave")
        return "gone"

    one = {"type": "function", "function": {"name": "leave"}}
    several = {"type": kind, "allowed_tools": {"mode": "required", "tools": [one]}}
    choice = {"required": kind, "function": one, "allowed_tools": several}[kind]
    bench = Bench(call_text("leave"), "ok", tools=[leave, add] if left else [leave], request={"tool_choice": choice})
    result = await bench.run()
    assert [one.text for one in result.tool_calls] == ["gone"]
    assert result.final_message == "ok"


async def test_a_cut_call_is_never_run() -> None:
    runs: list[int] = []

    def note(a: int) -> int:
        """Notes."""
        runs.append(a)
        return a

    text = call_text("note", a=1)
    bench = Bench(text + call_text("note", a=22), "ok", tools=[note], request={"max_tokens": len(text) + 49})
    result = await bench.run()
    assert (result.stop_reason, result.completed, runs) == ("length", False, [])
    # The first call was whole, and nothing is wrong with it; of the second, the number may have gone on.
    assert [one.status for one in result.tool_calls] == ["not_run", "invalid_arguments"]
    assert result.pending == ()
    # The transcript is whole: it can go on.
    assert (await Bench("ok", tools=[note]).run([user("go"), *bench.added, user("again")])).completed


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_results_of_tools_leave_a_later_turn_the_rest_of_the_context(name: str) -> None:
    bench = Bench(call_text("clock"), "Noon.", tools=[clock])
    await bench.run()
    most = bench.engine.model_info.max_model_len - len(bench.engine.requests[0].prompt_token_ids)
    bench = Bench(call_text("clock"), "Noon.", tools=[clock], request={name: most})
    result = await bench.run()
    assert (result.final_message, result.stop_reason) == ("Noon.", "stop")
    assert [request.params.max_tokens for request in bench.engine.requests] == [most, None]
    asked = [user("go"), *bench.added[:1]]  # the call is open, and runs before the first turn of the next run
    later = Bench("Noon.", tools=[clock], request={name: most})
    assert (await later.run(asked)).final_message == "Noon."


async def test_max_turns() -> None:
    bench = Bench(call_text("add", a=1, b=1), call_text("add", a=2, b=2), "never", tools=[add], max_turns=2)
    result = await bench.run()
    assert (result.stop_reason, result.turns_taken, result.completed) == ("max_turns", 2, False)
    assert [one.text for one in result.tool_calls] == ["2", "4"]
    assert result.pending == ()
    assert result.final_message == ""


async def test_max_tool_calls_leaves_the_rest_pending_and_they_can_run_later() -> None:
    bench = Bench("".join(call_text("add", a=n, b=0) for n in range(3)), "ok", tools=[add], max_tool_calls=2)
    result = await bench.run()
    assert (result.stop_reason, len(result.tool_calls)) == ("max_tool_calls", 2)
    assert [json.loads(call.arguments)["a"] for call in result.pending] == [2]
    later = Bench("all there", tools=[add])
    again = await later.run([user("go"), *bench.added])
    assert [one.text for one in again.tool_calls] == ["2"]
    assert (again.final_message, again.turns_taken) == ("all there", 1)


async def test_no_tool_runs_with_a_limit_of_none() -> None:
    bench = Bench(call_text("add", a=1, b=1), tools=[add], max_tool_calls=0)
    result = await bench.run()
    assert (result.stop_reason, result.tool_calls, len(result.pending)) == ("max_tool_calls", (), 1)


async def test_the_same_calls_with_the_same_results_are_a_loop() -> None:
    one, other = call_text("add", a=1, b=1), call_text("clock")
    bench = Bench(other, one + other, other + one, one + other, "never", tools=[add, clock])
    result = await bench.run()
    assert (result.stop_reason, result.turns_taken, result.completed) == ("loop", 4, False)
    assert result.pending == ()


async def test_the_same_calls_with_other_results_are_no_loop() -> None:
    count = iter(range(100))

    def tick() -> int:
        """Ticks."""
        return next(count)

    bench = Bench(*[call_text("tick")] * 5, "ok", tools=[tick], max_repeats=2)
    assert (await bench.run()).completed


async def test_many_tools_and_many_inventions_take_little_time() -> None:
    class Small:
        def __init__(self, number: int) -> None:
            self.definition = ToolDefinition(name=f"tool_{number}", original_name=f"tool_{number}")

        async def run(self, arguments: Any, report: Any) -> ToolOutput:
            raise AssertionError("nobody calls it")

    patterns = (*(f"*a*b{number}*" for number in range(20)), "*")
    bench = Bench("".join(call_text(f"tol_{n}") for n in range(50)), "ok", allowed_tools=patterns)
    for number in range(1000):
        bench.tools.add(Small(number))
    began = time.process_time()
    result = await bench.run()
    assert [one.status for one in result.tool_calls] == ["unknown"] * 50
    assert time.process_time() - began < 5  # it was a minute when all patterns were tried for each call


async def test_the_results_keep_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def flood(n: int) -> str:
        """Floods."""
        return str(n) * 1000

    monkeypatch.setattr(turn_calls, "MAX_KEPT", 2500)
    calls = "".join(call_text("flood", n=n) for n in range(4))
    bench = Bench(calls, "ok", tools=[flood], max_result_chars=100, parallel_tools=1)
    result = await bench.run()
    assert [len(one.output.content[0].text or "") for one in result.tool_calls] == [1000, 1000, 100, 100]
    assert [len(one.result.output.content[0].text) for one in bench.of(ToolFinished)] == [1000] * 4


class TestApproval:
    async def test_denied_calls_are_told_to_the_model(self) -> None:
        async def deny(call: ToolCall, definition: ToolDefinition) -> Approval:
            assert definition.name == call.name
            return Approval.DENY if call.name == "add" else Approval.ALLOW

        bench = Bench(THREE, "fine", tools=[add, shout, clock], approval=deny)
        result = await bench.run()
        assert [one.status for one in result.tool_calls] == ["denied", "completed", "completed"]
        assert len(bench.of(ApprovalRequested)) == 3
        assert result.completed

    @pytest.mark.parametrize("policy", ["callback", "always"])
    async def test_nobody_is_asked_about_arguments_that_do_not_fit(self, policy: str) -> None:
        asked: list[str] = []

        def ask(call: ToolCall, _definition: ToolDefinition) -> Approval:
            asked.append(call.arguments)
            return Approval.ALLOW

        calls = call_text("add", a="one", b=2) + call_text("add", a=1)
        bench = Bench(calls, "sorry", tools=[add], approval=ask if policy == "callback" else "always")
        result = await bench.run()
        assert [one.status for one in result.tool_calls] == ["invalid_arguments", "invalid_arguments"]
        assert (asked, bench.of(ApprovalRequested), result.completed) == ([], [], True)

    async def test_pending_calls_stop_the_conversation_when_the_others_have_run(self) -> None:
        rules = {"add": "always", "*": "never"}
        bench = Bench(THREE, tools=[add, shout, clock], approval=rules)
        result = await bench.run()
        assert (result.stop_reason, result.completed) == ("approval", False)
        assert [call.name for call in result.pending] == ["add"]
        assert [one.call.name for one in result.tool_calls] == ["shout", "clock"]
        assert [one.call.name for one in bench.of(ApprovalRequested)] == ["add"]

        call_id = result.pending[0].id
        messages = [user("go"), *json.loads(json.dumps(bench.added))]  # by way of a file, say
        for given, status in (({"approved": [call_id]}, "completed"), ({"denied": [call_id]}, "denied")):
            later = Bench("ok", tools=[add], approval=rules)
            done = await later.run(messages, **given)
            assert (done.tool_calls[0].status, done.completed, done.turns_taken) == (status, True, 1)
            assert later.of(ApprovalRequested) == []
        asked_again = await Bench("no", tools=[add], approval=rules).run(messages)
        assert (asked_again.stop_reason, asked_again.turns_taken, asked_again.pending) == (
            "approval",
            0,
            result.pending,
        )

    async def test_nothing_runs_while_somebody_is_asked(self) -> None:
        gate = Gate()

        async def ask(call: ToolCall, _: ToolDefinition) -> Approval:
            await asyncio.sleep(0.01)
            assert gate.begun == 0
            return Approval.ALLOW

        gate.open.set()
        bench = Bench(call_text("wait") + call_text("wait", number=2), "ok", tools=[gate.wait], approval=ask)
        assert (await bench.run()).completed
        assert gate.begun == 2

    async def test_decisions_must_be_about_open_calls(self) -> None:
        with pytest.raises(InvalidParameterError, match="approved has 'call_x'") as caught:
            await Bench("x").run(approved=["call_x"])
        assert caught.value.param == "approved"

    async def test_a_callback_that_answers_nonsense_is_named(self) -> None:
        async def nonsense(*_: Any) -> Any:
            return True  # which is no agreement

        with pytest.raises(InvalidParameterError, match="approval callback must return"):
            await Bench(THREE, tools=[add, shout, clock], approval=nonsense).run()


class TestClientTools:
    TOOL: ClassVar[dict[str, Any]] = {
        "type": "function",
        "function": {"name": "ask_user", "parameters": {"type": "object", "properties": {}}},
    }

    async def test_a_turn_that_calls_one_is_the_last(self) -> None:
        bench = Bench(call_text("ask_user") + call_text("add", a=1, b=2), tools=[add])
        result = await bench.run(client_tools=[self.TOOL])
        assert (result.stop_reason, [call.name for call in result.pending]) == ("client_tools", ["ask_user"])
        assert [one.text for one in result.tool_calls] == ["3"]
        answer = {"role": "tool", "tool_call_id": result.pending[0].id, "content": "yes"}
        later = Bench("thanks", tools=[add])
        assert (await later.run([user("go"), *bench.added, answer], client_tools=[self.TOOL])).completed

    async def test_names_must_not_clash(self) -> None:
        with pytest.raises(InvalidParameterError, match="runs here") as caught:
            await Bench("x", tools=[add]).run(client_tools=[{"type": "function", "function": {"name": "add"}}])
        assert caught.value.param == "tools.0.function.name"
        with pytest.raises(InvalidParameterError, match="must be a text"):
            await Bench("x").run(client_tools=[{"type": "web_search"}])
        with pytest.raises(InvalidParameterError, match="must be a text"):
            await Bench("x").run(client_tools=["ask_user"])


async def test_a_forced_choice_holds_for_the_first_turn() -> None:
    bench = Bench(call_text("clock"), "noon it is", tools=[clock], request={"tool_choice": "required"})
    result = await bench.run()
    assert (result.completed, result.turns_taken) == (True, 2)
    first, second = bench.engine.requests
    assert first.params.structured_outputs is not None
    assert second.params.structured_outputs != first.params.structured_outputs


class TestTime:
    async def test_a_timeout_ends_running_tools(self) -> None:
        gate = Gate()
        calls = call_text("wait", number=1) + call_text("add", a=1, b=1) + call_text("wait", number=2)
        bench = Bench(calls, tools=[gate.wait, add], timeout=30, parallel_tools=2)
        running = asyncio.create_task(bench.run())
        await until(lambda: gate.begun == 2)
        await skip(30)
        result = await running
        assert (result.stop_reason, result.completed) == ("timeout", False)
        assert (gate.begun, gate.cancelled) == (2, 2)
        assert [one.status for one in result.tool_calls] == ["timed_out", "completed", "timed_out"]
        assert result.pending == ()

    async def test_calls_that_had_not_begun_can_run_later(self) -> None:
        gate = Gate()
        calls = call_text("wait", number=1) + call_text("wait", number=2)
        bench = Bench(calls, tools=[gate.wait], timeout=30, parallel_tools=1)
        running = asyncio.create_task(bench.run())
        await until(lambda: gate.begun == 1)
        await skip(30)
        result = await running
        assert [json.loads(call.arguments)["number"] for call in result.pending] == [2]
        gate.open.set()
        later = Bench("ok", tools=[gate.wait])
        assert [one.text for one in (await later.run([user("go"), *bench.added])).tool_calls] == ["through 2"]

    async def test_a_timeout_cuts_a_turn(self) -> None:
        bench = Bench("x" * 100_000, timeout=30)
        running = asyncio.create_task(bench.run())
        await until(lambda: len(bench.events) > 3)
        await skip(30)
        result = await running
        assert (result.stop_reason, result.turns_taken, bench.added) == ("timeout", 0, ())
        assert len(bench.engine.aborted) == 1
        assert bench.engine.stats().num_running == 0

    async def test_the_limit_never_strikes_the_reader(self) -> None:
        bench = Bench("Hello!", timeout=0.05)
        kinds = []
        async for event in bench.events_of([user("go")]):
            await asyncio.sleep(0.02)  # a slow reader
            kinds.append(type(event).__name__)
        assert kinds[-1] == "ConversationFinished"

    async def test_a_tool_has_its_own_limit(self) -> None:
        gate = Gate()
        bench = Bench(call_text("wait"), "too slow", tools=[gate.wait], tool_timeout=30)
        running = asyncio.create_task(bench.run())
        await until(lambda: gate.begun)
        await skip(30)
        result = await running
        assert (result.tool_calls[0].status, result.completed, gate.cancelled) == ("timed_out", True, 1)


class TestEnds:
    async def test_cancelled_in_a_tool(self) -> None:
        gate = Gate()
        bench = Bench(call_text("wait") + call_text("wait", number=2), tools=[gate.wait])
        task = asyncio.create_task(bench.run())
        await until(lambda: gate.begun == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert gate.cancelled == 2

    async def test_cancelled_in_a_turn(self) -> None:
        bench = Bench("x" * 100_000)
        task = asyncio.create_task(bench.run())
        await until(lambda: len(bench.events) > 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(bench.engine.aborted) == 1
        assert bench.engine.stats().num_running == 0

    async def test_closed_in_a_turn_with_a_reader_that_stands_still(self) -> None:
        bench = Bench("x" * 100_000)
        events = bench.events_of([user("go")])
        async for event in events:
            if isinstance(event, TextDelta):
                break
        await asyncio.sleep(0.05)
        assert bench.engine.stats().num_running == 1
        await events.aclose()
        assert len(bench.engine.aborted) == 1

    @pytest.mark.parametrize("way", ["cancelled", "closed"])
    async def test_ended_at_every_point(self, way: str) -> None:
        """After any number of steps of the event loop, or of events, nothing runs and the transcript can go on."""
        lengths, step, whole = set[int](), 0, False
        while not whole:
            gate = Gate()
            gate.open.set()
            calls = call_text("wait", number=1) + call_text("add", a=1, b=2) + call_text("nope")
            bench = Bench(calls, call_text("wait", number=2), "done", tools=[gate.wait, add], parallel_tools=1)
            transcript = ChatTranscript([user("go")])
            if way == "cancelled":
                task = asyncio.create_task(bench.run(transcript))
                for _ in range(step):
                    await asyncio.sleep(0)
                whole = task.done()  # a busy machine needs more steps
                task.cancel()
                await asyncio.wait({task})
                step += 7 + step // 8
            else:
                async with contextlib.aclosing(bench.events_of(transcript)) as events:
                    seen = 0
                    async for _ in events:
                        if (seen := seen + 1) > step:
                            break
                    whole = seen <= step
                step += 1
            assert not other_tasks()
            assert bench.engine.stats().num_running == 0
            lengths.add(len(transcript.messages))
            later = Bench("fine", tools=[gate.wait, add])
            assert (await later.run(json.loads(json.dumps(transcript.messages)))).completed
        assert len(lengths) >= 3, lengths  # it was ended before, between and after the calls

    async def test_never_begun(self) -> None:
        bench = Bench("x")
        events = bench.events_of([user("go")])
        await events.aclose()
        assert bench.engine.requests == []

    async def test_a_failing_model_reaches_the_caller_with_nothing_running(self) -> None:
        bench = Bench(call_text("clock"), "x", tools=[clock])
        bench.engine.fail_after, bench.engine.failure = 3, CandleVllmError("the model broke")
        with pytest.raises(CandleVllmError, match="the model broke"):
            await bench.run()
        assert bench.engine.stats().num_running == 0

    async def test_a_conversation_that_is_too_long(self) -> None:
        with pytest.raises(PromptTooLongError):
            await Bench("x").run("y" * 300_000)

    @pytest.mark.parametrize("fields", [{}, {"max_tokens": 3900}])
    async def test_results_are_shortened_to_what_fits(self, fields: dict[str, Any]) -> None:
        def read() -> str:
            """Reads."""
            return "z" * 50_000

        texts = (call_text("read") * 2, call_text("clock"), "Done.")
        model = InProcessModel(adapter_of(*texts, max_model_len=4096))
        bench = Bench(tools=[read, clock], model=model, request=fields)
        assert (await bench.run()).final_message == "Done."
        assert [one.characters for one in bench.of(ResultsShortened)] == [25_000, 12_500, 6250, 3125, 1562]
        contents = [message["content"] for message in bench.added if message["role"] == "tool"]
        cut = "z" * 1517 + "\n[cut: the whole output has 50000 characters]"
        assert contents == [cut, cut, "noon"]

    async def test_a_policy_that_fails_reaches_the_caller(self) -> None:
        async def fail(*_: Any) -> Approval:
            raise LookupError("nobody there")

        with pytest.raises(LookupError, match="nobody there"):
            await Bench(THREE, tools=[add, shout, clock], approval=fail).run()

    async def test_the_loops_own_task_cancelled_by_a_stranger(self) -> None:
        gate = Gate()
        bench = Bench(call_text("wait"), tools=[gate.wait])
        task = asyncio.create_task(bench.run())
        await until(lambda: gate.begun == 1)
        next(one for one in asyncio.all_tasks() if one.get_name() == "conversation").cancel()
        with pytest.raises(RequestAbortedError):
            await task


async def test_progress_is_shown_as_it_comes() -> None:
    class Slow:
        definition = ToolDefinition(name="slow")

        async def run(self, arguments: Any, report: Any) -> ToolOutput:
            for done in range(3):
                report(ToolProgress(progress=done, total=3))
            return ToolOutput.of_text("done")

    bench = Bench(call_text("slow"), "ok", tools=[Slow()])
    await bench.run()
    assert [one.progress.progress for one in bench.of(ToolProgressed)] == [0, 1, 2]


async def test_tools_that_come_later_are_seen_in_the_next_turn() -> None:
    bench = Bench(call_text("grow"), call_text("shout", text="a"), "ok")

    def grow() -> str:
        """Adds a tool."""
        bench.tools.add_function(shout)
        return "grown"

    bench.tools.add_function(grow)
    result = await bench.run()
    assert [one.text for one in result.tool_calls] == ["grown", "A"]
