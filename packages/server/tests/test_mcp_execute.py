# SPDX-License-Identifier: MIT
"""`--mcp-execute`: chat requests whose tools run in the server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from candle_vllm.core.engine.outputs import FinishReason
from candle_vllm.openai.chat_answers import Told
from candle_vllm.openai.protocol.usage import CompletionTokensDetails
from candle_vllm.responses.conversation.events import TurnFinished
from candle_vllm.responses.conversation.options import ConversationUsage
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.server.mailbox.options import MailboxOptions
from candle_vllm.server.mailbox.service import Mailbox
from candle_vllm.server.mcp.chat_execution import ExecutionState
from packages.server.tests.mcp_fakes import Seen, call_text, stdio_config, turns
from packages.server.tests.server_fakes import PacedEngine
from tests.waiting import wait_for

Start = Callable[..., Any]
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Twice 21?"}]}
DOUBLE = call_text("numbers__double", n=21)
ECHO = call_text("web__echo", text="hi")


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(model="default", messages=CHAT["messages"], **more)


def series(text: str, name: str) -> dict[str, float]:
    """The samples of a family by their labels."""
    rows = [line.removeprefix(name).rsplit(" ", 1) for line in text.splitlines() if line.startswith(name + "{")]
    return {labels.strip("{}"): float(value) for labels, value in rows}


def test_a_whole_answer(start_mcp: Start, tmp_path: Path) -> None:
    engine = PacedEngine(turns("Let me see." + DOUBLE, "It is 42."), num_cached_tokens=3)
    running = start_mcp(engine, [stdio_config(tmp_path, sdk=True)], execute=True)
    answer = ask(running.openai(), max_tokens=500)
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("It is 42.", None, "stop")
    (call,) = choice.mcp_calls
    assert call.pop("seconds") >= 0
    assert call.pop("arguments") == '{"n": 21}'
    assert call == {"server": "numbers", "name": "numbers__double", "status": "completed"}
    first, second = engine.requests
    assert answer.id == first.request_id
    assert second.request_id != first.request_id
    assert answer.usage.prompt_tokens == len(first.prompt_token_ids) + len(second.prompt_token_ids)
    assert answer.usage.prompt_tokens_details.cached_tokens == 6
    spoken = len("Let me see." + DOUBLE) + len("It is 42.") + 2  # and two end tokens
    assert answer.usage.completion_tokens == spoken
    assert second.params.max_tokens == 500 - (len("Let me see." + DOUBLE) + 1)
    assert engine.template_calls[-1].messages[-1]["content"] == "42"


@pytest.mark.parametrize("forced", [False, True])
def test_a_stream(start_mcp: Start, web: Any, tmp_path: Path, forced: bool) -> None:
    engine = PacedEngine(turns("Let me see." + DOUBLE + "\n" + ECHO, ECHO, "It is 42."))
    running = start_mcp(engine, [stdio_config(tmp_path), web.config()], execute=True, enable_force_include_usage=forced)
    options = {} if forced else {"stream_options": {"include_usage": True}}
    chunks = list(ask(running.openai(), stream=True, **options))
    assert {chunk.id for chunk in chunks} == {engine.requests[0].request_id}
    *parts, last = chunks
    choices = [chunk.choices[0] for chunk in parts]
    assert [choice.delta.role for choice in choices if choice.delta.role] == ["assistant"]
    assert all(choice.delta.tool_calls is None for choice in choices)
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
    assert choices[-1].finish_reason == "stop"
    assert "".join(choice.delta.content or "" for choice in choices) == "Let me see.\n\nIt is 42."
    assert [call["name"] for call in choices[-1].mcp_calls] == ["numbers__double", "web__echo", "web__echo"]
    assert {call["status"] for call in choices[-1].mcp_calls} == {"completed"}
    assert all(chunk.usage is None for chunk in parts)
    assert last.choices == []
    assert last.usage.prompt_tokens == sum(len(one.prompt_token_ids) for one in engine.requests)
    whole = running.openai().chat.completions
    with whole.stream(model="default", messages=CHAT["messages"]) as stream:  # the client's own accumulator
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == "It is 42."


def test_progress_with_each_turns_prompt(start_mcp: Start, web: Any) -> None:
    engine = PacedEngine(turns("Wait." + ECHO, "Done."))
    body = {**CHAT, "stream": True, "return_progress": True, "verbose": True, "timings_per_token": True}
    body |= {"return_tokens_as_token_ids": True, "logprobs": True}
    with start_mcp(engine, [web.config()], execute=True).http() as client:
        answer = client.post("/v1/chat/completions", json=body)
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    reports = [chunk["prompt_progress"]["processed"] for chunk in chunks if "prompt_progress" in chunk]
    first, second = (len(request.prompt_token_ids) for request in engine.requests)
    assert reports == [0, first, 0, second]
    assert "prompt_progress" in chunks[0]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == "Wait.\n\nDone."
    for name in ("verbose", "timings_per_token", "return_tokens_as_token_ids"):
        assert f"{name} has no effect" in answer.headers["x-warning"]


def test_only_approved_tools_are_shown_and_run(start_mcp: Start, seen: Seen, web: Any) -> None:
    engine = PacedEngine(turns(call_text("web__slow", seconds=0), ECHO, "Done."))
    running = start_mcp(engine, [web.config(auto_approve=["echo"])], execute=True)
    answer = ask(running.openai())
    tools = [tool["function"]["name"] for tool in engine.template_calls[0].options["tools"]]
    assert tools == ["web__echo"]
    statuses = [(call["name"], call["server"], call["status"]) for call in answer.choices[0].mcp_calls]
    assert statuses == [("web__slow", "web", "unknown"), ("web__echo", "web", "completed")]
    assert seen.begun == 0
    assert answer.choices[0].message.content == "Done."


def test_without_approved_tools_it_is_a_plain_request(start_mcp: Start, web: Any) -> None:
    engine = PacedEngine("Hello!")
    running = start_mcp(engine, [web.config(auto_approve=[])], execute=True)
    answer = ask(running.openai(), n=2)
    assert [choice.message.content for choice in answer.choices] == ["Hello!", "Hello!"]
    assert "tools" not in engine.template_calls[0].options


def test_what_goes_wrong_with_a_call_is_told_to_the_model(start_mcp: Start, web: Any) -> None:
    bad = call_text("web__echo", words="hi")
    engine = PacedEngine(turns(call_text("web__fail") + bad + call_text("nothing"), "Sorry."))
    running = start_mcp(engine, [web.config()], execute=True)
    answer = ask(running.openai())
    calls = [(call["server"], call["status"]) for call in answer.choices[0].mcp_calls]
    assert calls == [("web", "failed"), ("web", "invalid_arguments"), (None, "unknown")]
    told = [message["content"] for message in engine.template_calls[-1].messages[-3:]]
    assert told[0] == "Error executing tool fail"
    assert "schema" in told[1]
    assert "no tool" in told[2]


@pytest.mark.parametrize(
    ("limits", "limit", "calls", "requests"),
    [
        ({"mcp_max_turns": 2}, "max_turns", ["completed", "completed"], 2),
        ({"mcp_max_tool_calls": 1}, "max_tool_calls", ["completed", "not_run"], 2),
        ({}, "loop", ["completed"] * 3, 3),
    ],
)
def test_limits(start_mcp: Start, web: Any, limits: Any, limit: str, calls: list[str], requests: int) -> None:
    engine = PacedEngine(ECHO)
    running = start_mcp(engine, [web.config()], execute=True, **limits)
    (choice,) = ask(running.openai()).choices
    assert (choice.finish_reason, choice.mcp_limit) == ("length", limit)
    assert [call["status"] for call in choice.mcp_calls] == calls
    assert choice.message.content is None
    assert len(engine.requests) == requests


@pytest.mark.parametrize("kind", ["required", "function", "allowed_tools"])
def test_a_tool_that_the_tool_choice_names_may_go_away(start_mcp: Start, web: Any, kind: str) -> None:
    def script(_: str) -> str:
        running.server.config.app.state.mcp.registry.replace("web", [])
        return left.pop(0)

    left, one = [ECHO, "Sorry."], {"type": "function", "function": {"name": "web__echo"}}
    several = {"type": kind, "allowed_tools": {"mode": "auto", "tools": [one]}}
    running = start_mcp(PacedEngine(script), [web.config()], execute=True)
    choice = {"required": kind, "function": one, "allowed_tools": several}[kind]
    answer = ask(running.openai(), tool_choice=choice).choices[0]
    assert (answer.message.content, answer.mcp_calls[0]["status"]) == ("Sorry.", "unknown")


def test_no_tools_are_shown_if_those_that_may_be_called_went_away(start_mcp: Start, web: Any, tmp_path: Path) -> None:
    def script(_: str) -> str:
        running.server.config.app.state.mcp.registry.replace("web", [])
        return left.pop(0)

    left, chosen = [ECHO, "Sorry."], [{"type": "function", "function": {"name": "web__echo"}}]
    running = start_mcp(engine := PacedEngine(script), [web.config(), stdio_config(tmp_path)], execute=True)
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": chosen}}
    assert ask(running.openai(), tool_choice=choice).choices[0].message.content == "Sorry."
    assert [call.options.get("tools") is None for call in engine.template_calls] == [False, True]


def test_the_token_limit_is_for_all_turns(start_mcp: Start, web: Any) -> None:
    engine = PacedEngine(turns(ECHO, "A long answer."))
    running = start_mcp(engine, [web.config()], execute=True)
    one = len(ECHO) + 1
    for limit, text in ((one + 6, "A long"), (one, None)):
        engine._script = turns(ECHO, "A long answer.")
        answer = ask(running.openai(), max_completion_tokens=limit)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text, "length")
        assert answer.usage.completion_tokens == limit
        assert answer.choices[0].mcp_calls[0]["status"] == "completed"


def test_results_that_fill_the_context_end_the_answer(start_mcp: Start, web: Any) -> None:
    engine = PacedEngine(turns(call_text("web__echo", text="x" * 300), "Never."), max_model_len=640)
    running = start_mcp(engine, [web.config()], execute=True)
    (choice,) = ask(running.openai()).choices
    assert (choice.finish_reason, choice.mcp_limit) == ("length", "context_length")
    with pytest.raises(openai.BadRequestError):  # this one is the client's own
        running.openai().chat.completions.create(model="default", messages=[{"role": "user", "content": "x" * 700}])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 2}, "n"),
        ({"echo": True}, "echo"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
         "stream_options.continuous_usage_stats"),
    ],
)  # fmt: skip
def test_what_an_answer_of_several_turns_cannot_have(
    start_mcp: Start, web: Any, more: dict[str, Any], param: str, stream: bool
) -> None:
    if stream is ("prompt_logprobs" in more) or (not stream and "stream_options" in more):
        return
    engine = PacedEngine("Hello!")
    messages = [*CHAT["messages"], {"role": "assistant", "content": "It"}]
    body = {"messages": messages if param in ("echo", "continue_final_message") else CHAT["messages"], **more}
    with start_mcp(engine, [web.config()], execute=True).http() as client:
        answer = client.post("/v1/chat/completions", json={**body, "stream": stream})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert "tools: []" in answer.json()["error"]["message"]
        assert engine.requests == []
        assert client.post("/v1/chat/completions", json={**body, "stream": stream, "tools": []}).status_code == 200


def test_log_probabilities_and_thoughts_come_through(start_mcp: Start, web: Any) -> None:
    engine = PacedEngine(turns("<think>A</think>" + ECHO, "<think>B</think>Done"))
    running = start_mcp(engine, [web.config()], execute=True, reasoning_parser="think")
    answer = ask(running.openai(), logprobs=True, top_logprobs=1)
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.reasoning_content) == ("Done", "B")
    assert [one.token for one in choice.logprobs.content][-5:-1] == list("Done")
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    engine._script = turns("<think>A</think>" + ECHO, "<think>B</think>Done")
    chunks = [one.choices[0].delta for one in ask(running.openai(), stream=True)]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in chunks) == "AB"


@pytest.mark.parametrize("stream", [False, True])
def test_the_stop_string_of_the_last_turn_is_named(start_mcp: Start, web: Any, stream: bool) -> None:
    running = start_mcp(PacedEngine(turns(ECHO, "Done")), [web.config()], execute=True)
    answer = ask(running.openai(), stop=["D"], stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert len(choices[-1].mcp_calls) == 1
    assert (choices[-1].finish_reason, choices[-1].stop_reason) == ("stop", "D")


def test_a_forced_call_is_forced_once(start_mcp: Start, web: Any) -> None:
    engine = PacedEngine(turns(ECHO, "Done."))
    running = start_mcp(engine, [web.config()], execute=True)
    choice = {"type": "function", "function": {"name": "web__echo"}}
    assert ask(running.openai(), tool_choice=choice, parallel_tool_calls=False).choices[0].message.content == "Done."
    forced, free = engine.requests
    assert forced.params.structured_outputs is not None
    assert forced.params.structured_outputs != free.params.structured_outputs


def test_default_sampling_holds_in_every_turn(start_mcp: Start, web: Any) -> None:
    engine = PacedEngine(turns(ECHO, "Done."))
    running = start_mcp(engine, [web.config()], execute=True, temperature=0.25, top_k=7)
    ask(running.openai(), top_p=0.5, extra_body={"top_k": 9, "request_id": "mine"})
    assert [(one.params.temperature, one.params.top_p, one.params.top_k) for one in engine.requests] == [
        (0.25, 0.5, 9)
    ] * 2
    assert engine.requests[0].request_id == "chatcmpl-mine"


def test_the_mailbox_is_refused_by_the_name_of_its_header(start_mcp: Start, web: Any, tmp_path: Path) -> None:
    mailbox = Mailbox(MailboxOptions(url=f"sqlite:///{tmp_path}/mailbox.sqlite"))
    with start_mcp(PacedEngine(), [web.config()], execute=True, mailbox=mailbox).http() as client:
        headers = {"X-Mailbox-Mode": "always"}
        answer = client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "X-Mailbox-Mode")
        assert "tools: []" in answer.json()["error"]["message"]
        assert client.post("/v1/chat/completions", json={**CHAT, "tools": []}, headers=headers).status_code == 200
    with start_mcp(PacedEngine(), [web.config()], execute=True).http() as client:
        answer = client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert "needs a mailbox, which is off" in answer.json()["error"]["message"]


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_a_server_that_has_died_is_a_result_that_the_model_sees(start_mcp: Start, web: Any, tmp_path: Path) -> None:
    engine = PacedEngine(turns(call_text("numbers__die"), "It died."))
    running = start_mcp(engine, [stdio_config(tmp_path), web.config()], execute=True)
    answer = ask(running.openai())
    assert answer.choices[0].message.content == "It died."
    assert answer.choices[0].mcp_calls[0]["status"] == "unavailable"
    with running.http() as client:
        assert client.get("/ready").status_code == 200
        running.wait_for(lambda: client.get("/v1/mcp/servers").json()["data"][0]["reconnects"] == 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_a_tool_runs_leaves_nothing(
    start_mcp: Start, web: Any, seen: Seen, stream: bool
) -> None:
    engine = PacedEngine(turns(call_text("web__slow", seconds=60), "Never."))
    running = start_mcp(engine, [web.config()], execute=True, max_num_seqs=1)
    running.leave("/v1/chat/completions", {**CHAT, "stream": stream}, lambda: seen.begun)
    running.wait_for(lambda: seen.cancelled == 1)
    assert seen.begun == 1
    assert engine.stats().num_running == 0
    with running.http() as client:
        running.wait_for(lambda: 'status="cancelled"} 1.0' in client.get("/metrics").text)
    left = [thread.name for thread in threading.enumerate() if "tool" in thread.name]
    assert left == []
    assert len(engine.requests) == 1
    engine._script = "Hello!"
    assert ask(running.openai()).choices[0].message.content == "Hello!"


def test_a_client_that_leaves_while_the_model_speaks(start_mcp: Start, web: Any) -> None:
    engine = PacedEngine(turns(ECHO, "word " * 500), pause=0.005)
    running = start_mcp(engine, [web.config()], execute=True)
    stream = ask(running.openai(), stream=True)
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    stream.close()
    running.wait_for(lambda: engine.stats().num_running == 0)
    assert engine.aborted == [engine.requests[1].request_id]


@pytest.mark.parametrize("stream", [False, True])
def test_the_deadline_ends_a_tool(start_mcp: Start, web: Any, seen: Seen, stream: bool) -> None:
    engine = PacedEngine(turns("Wait." + call_text("web__slow", seconds=60), "Never."))
    with start_mcp(engine, [web.config()], execute=True, request_timeout=3).http() as client:
        answer = client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
        text = answer.text.split("data: ")[-1] if stream else answer.text
        assert json.loads(text)["error"]["code"] == "timeout"
        assert answer.status_code == (200 if stream else 504)
    assert seen.begun == 1
    wait_for(lambda: seen.cancelled)


def test_a_model_that_fails_in_a_later_turn(start_mcp: Start, web: Any) -> None:
    for stream in (False, True):
        engine = PacedEngine(turns(ECHO, "Never."), fail_after=len(ECHO) + 1, failure="broken")
        with start_mcp(engine, [web.config()], execute=True).http() as client:
            engine._script = turns(ECHO, "N" * 200)
            answer = client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
            assert answer.status_code == (200 if stream else 500)
            assert "error" in answer.text
            assert engine.stats().num_running == 0


def test_a_model_that_takes_no_request_is_an_answer_with_its_status(start_mcp: Start, web: Any) -> None:
    from candle_vllm.core.errors import EngineOverloadedError

    engine = PacedEngine(submit_error=EngineOverloadedError("full"))
    with start_mcp(engine, [web.config()], execute=True).http() as client:
        for stream in (False, True):
            assert client.post("/v1/chat/completions", json={**CHAT, "stream": stream}).status_code == 503


# ---- counts ----------------------------------------------------------------------------------------------------------


def test_what_is_counted_adds_up(start_mcp: Start, web: Any, tmp_path: Path) -> None:
    engine = PacedEngine()
    running = start_mcp(engine, [stdio_config(tmp_path), web.config()], execute=True)
    usages, ran = [], []
    for stream in (False, True):
        engine._script = turns(ECHO + DOUBLE, call_text("web__fail") + call_text("web__echo", no=1), "Done.")
        answer = ask(running.openai(), stream=stream, **({"stream_options": {"include_usage": True}} if stream else {}))
        chunks = list(answer) if stream else [answer]
        usages.append(chunks[-1].usage)
        ran += chunks[-2 if stream else -1].choices[0].mcp_calls
    with running.http() as client:
        text = client.get("/metrics").text
        usage = client.get("/v1/usage").json()["data"][0]["counts"]
    calls = series(text, "candle_vllm:mcp_tool_calls_total")
    assert calls == {
        'server="numbers",status="completed"': 2,
        'server="web",status="completed"': 2,
        'server="web",status="failed"': 2,
    }
    assert len(ran) == 8
    assert sum(call["status"] in ("completed", "failed") for call in ran) == sum(calls.values())
    for name, field in (("vllm:prompt_tokens_total", "prompt_tokens"),
                        ("vllm:generation_tokens_total", "completion_tokens")):  # fmt: skip
        assert sum(series(text, name).values()) == sum(getattr(one, field) for one in usages)
        assert usage[field] == sum(getattr(one, field) for one in usages)
    assert usage["requests"] == 2
    assert sum(series(text, "vllm:request_success_total").values()) == 6


def test_many_at_the_same_time(start_mcp: Start, web: Any, seen: Seen) -> None:
    def script(prompt: str) -> str:
        number = prompt.split("Number ")[1].split("<")[0]
        return f"Done {number}." if "<|im_start|>tool" in prompt else call_text("web__echo", text=number)

    running = start_mcp(PacedEngine(script), [web.config()], execute=True)

    async def all_of_them() -> list[str]:
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(base_url=running.url + "/v1", api_key="x", http_client=http) as client:
            answers = await asyncio.gather(*(
                client.chat.completions.create(
                    model="default", messages=[{"role": "user", "content": f"Number {number}"}]
                )
                for number in range(24)
            ))  # fmt: skip
        return [answer.choices[0].message.content or "" for answer in answers]

    assert asyncio.run(all_of_them()) == [f"Done {number}." for number in range(24)]
    assert sorted(seen.texts) == sorted(map(str, range(24)))


def test_what_was_guessed_and_predicted_is_added_up_over_the_turns() -> None:
    state = ExecutionState(ToolRegistry(), reasons=False, told=Told(predicted=True, drafts=True))
    counts = {"draft_tokens": 5, "accepted_draft_tokens": 2, "predicted_tokens": 9, "accepted_predicted_tokens": 4}
    usage = ConversationUsage(prompt_tokens=3, completion_tokens=8, **counts)
    for number in (1, 2):
        state.add(TurnFinished(number=number, message={}, finish_reason=FinishReason.STOP, usage=usage))
    details = state.usage.completion_tokens_details
    assert details == CompletionTokensDetails(
        0, accepted_prediction_tokens=8, rejected_prediction_tokens=10, draft_tokens=10, accepted_draft_tokens=4
    )
