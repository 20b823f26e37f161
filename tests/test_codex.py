# SPDX-License-Identifier: MIT
"""Codex CLI, unchanged, does its work with a model of ours: it needs nothing but our server.

Where the system allows it, both run in a network of their own that has a loopback and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.codex import Codex, codex
from tests.scripted_server import ScriptedServer, can_be_isolated, tool_call

pytestmark = [pytest.mark.peer, pytest.mark.timeout(600)]

Start = Callable[..., tuple[ScriptedServer, Codex]]
ROOM = {"max_model_len": 1 << 18}  # its first prompt has more than 30,000 of the scripted engine's tokens
ASKED = "POST /v1/responses"


@pytest.fixture(scope="module")
def program() -> Path:
    return codex()


@pytest.fixture(scope="module")
def isolated() -> bool:
    return can_be_isolated()


@pytest.fixture
def start(program: Path, isolated: bool, tmp_path: Path) -> Iterator[Start]:
    """Starts a server with a script, and gives a Codex for it: `start(answers, *flags, **engine)`."""
    with ExitStack() as stack:

        def start(
            answers: Mapping[str, str | Sequence[str]], *flags: str, **engine: Any
        ) -> tuple[ScriptedServer, Codex]:
            server = ScriptedServer(tmp_path, answers, *flags, isolated=isolated, engine=ROOM | engine)
            stack.callback(server.stop)
            return server, Codex(program, tmp_path, server.url, server.inside if isolated else ())

        yield start


def test_a_question_is_one_request(start: Start) -> None:
    server, client = start({"What is the capital": ["The capital", " is Paris."]})
    run = client.run("What is the capital of France?")
    assert (run.status, run.words) == (0, ["The capital is Paris."]), run.errors
    assert server.answered(1) == [(ASKED, 200)]
    usage = run.events[-1]["usage"]
    assert server.counted == [(usage["input_tokens"], usage["output_tokens"])]


def test_a_command_and_an_answer(start: Start, tmp_path: Path) -> None:
    order = tool_call("exec_command", cmd="echo said-by-shell | tee note.txt")
    server, client = start(
        {
            "Process exited with code 0": "It is ready.",
            "Take a note": ["<think>A file.</think>\n\n", "I write.\n", order],
        }
    )
    run = client.run("Take a note")
    assert (run.status, run.words) == (0, ["I write.", "It is ready."]), run.errors
    assert (tmp_path / "work" / "note.txt").read_text() == "said-by-shell\n"
    assert [item["exit_code"] for item in run.items("command_execution")] == [0]
    assert server.answered(2) == [(ASKED, 200)] * 2
    first, second = server.prompts
    assert second.startswith(first)  # so the prefix cache holds all of it


@pytest.mark.every_case
def test_two_commands_at_once(start: Start) -> None:
    both = tool_call("exec_command", cmd="echo one-of-two") + "\n" + tool_call("exec_command", cmd="echo two-of-two")
    server, client = start({"two-of-two\n": "Both.", "Do both": both})
    run = client.run("Do both")
    assert (run.status, run.words) == (0, ["Both."]), run.errors
    assert sorted(item["aggregated_output"] for item in run.items("command_execution")) == [
        "one-of-two\n",
        "two-of-two\n",
    ]
    assert server.answered(2) == [(ASKED, 200)] * 2


@pytest.mark.every_case
def test_a_tool_of_a_namespace_comes_back_under_its_own_name(start: Start) -> None:
    """The model is shown `multi_agent_v1__close_agent`; Codex knows the tool only with its namespace apart."""
    server, client = start(
        {"tool\n": "There is none.", "Close it": tool_call("multi_agent_v1__close_agent", target="nobody")}
    )
    run = client.run("Close it")
    assert (run.status, run.words) == (0, ["There is none."]), run.errors
    result = server.prompts[1].rpartition("tool\n")[2]
    assert "nobody" in result
    assert "unsupported call" not in result


@pytest.mark.every_case
def test_a_conversation_goes_on_in_a_second_run(start: Start) -> None:
    server, client = start({"And of Spain": "Madrid.", "capital of France": ["<think>Easy.</think>\n\n", "Paris."]})
    assert client.run("The capital of France?").words == ["Paris."]
    again = client.run("resume", "--last", "And of Spain?")
    assert (again.status, again.words) == (0, ["Madrid."]), again.errors
    assert server.answered(2) == [(ASKED, 200)] * 2


@pytest.mark.every_case
def test_a_wrong_key_is_told(start: Start) -> None:
    server, client = start({}, "--api-key", "right")
    run = client.run("Hi")
    assert run.status != 0
    assert "Missing or wrong API key" in json.dumps(run.events)
    assert {status for _, status in server.answered(1)} == {401}
    assert client.run("Hi", key="right").status == 0


@pytest.mark.every_case
def test_a_stream_that_fails_is_told(start: Start) -> None:
    server, client = start({"Hi": ["Hello ", "there."]}, fail_after=1)
    run = client.run("Hi")
    assert run.status != 0
    assert "The engine failed on this request" in json.dumps(run.events)
    assert set(server.answered(1)) == {(ASKED, 200)}
