# SPDX-License-Identifier: MIT
"""Claude Code, unchanged, does its work with a model of ours: it needs nothing but our server.

Where the system allows it, both run in a network of their own that has a loopback and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.claude_code import ClaudeCode, claude_code
from tests.scripted_server import ScriptedServer, can_be_isolated, tool_call

pytestmark = [pytest.mark.peer, pytest.mark.timeout(600)]

Start = Callable[..., tuple[ScriptedServer, ClaudeCode]]
ROOM = {"max_model_len": 1 << 18}  # its first prompt has more than 16,000 of the scripted engine's tokens
ASKED = "POST /v1/messages"


@pytest.fixture(scope="module")
def program() -> Path:
    return claude_code()


@pytest.fixture(scope="module")
def isolated() -> bool:
    return can_be_isolated()


@pytest.fixture
def start(program: Path, isolated: bool, tmp_path: Path) -> Iterator[Start]:
    """Starts a server with a script, and gives a Claude Code for it: `start(answers, *flags, **engine)`."""
    with ExitStack() as stack:

        def start(
            answers: Mapping[str, str | Sequence[str]], *flags: str, **engine: Any
        ) -> tuple[ScriptedServer, ClaudeCode]:
            server = ScriptedServer(tmp_path, answers, *flags, isolated=isolated, engine=ROOM | engine)
            stack.callback(server.stop)
            return server, ClaudeCode(program, tmp_path, server.url, server.inside if isolated else ())

        yield start


def test_a_question_is_one_request(start: Start) -> None:
    server, claude = start({"What is the capital": ["The capital", " is Paris."]})
    run = claude.run("What is the capital of France?")
    assert run.status == 0, run.errors
    assert (run.result["result"], run.result["num_turns"]) == ("The capital is Paris.", 1)
    assert server.answered(1) == [(ASKED, 200)]
    usage = run.result["usage"]
    assert server.counted == [(usage["input_tokens"], usage["output_tokens"])]


@pytest.mark.every_case
def test_it_writes_the_file_that_the_model_writes(start: Start, tmp_path: Path) -> None:
    note, text = tmp_path / "work" / "note.txt", 'A "quoted" line – ü\n</tool_call> in a string\n'
    write = tool_call("Write", file_path=str(note), content=text)
    server, claude = start({"tool\nFile created": ["It is ", "written."], "Take a note": ["I write.\n", write]})
    run = claude.run("Take a note")
    assert run.status == 0, run.errors
    assert note.read_text() == text
    assert (run.result["result"], run.result["num_turns"]) == ("It is written.", 2)
    assert server.answered(2) == [(ASKED, 200)] * 2
    assert [block["name"] for block in run.blocks("assistant", "tool_use")] == ["Write"]
    assert [block.get("is_error", False) for block in run.blocks("user", "tool_result")] == [False]
    first, second = server.prompts
    assert second.startswith(first)  # so the prefix cache holds all of it
    assert second.endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.every_case
def test_a_chain_of_tools_and_thoughts(start: Start, tmp_path: Path) -> None:
    one, two = tmp_path / "work" / "one.txt", tmp_path / "work" / "two.txt"
    both = (
        tool_call("Write", file_path=str(one), content="1") + "\n" + tool_call("Write", file_path=str(two), content="2")
    )
    server, claude = start(
        {
            "tool\nFile created": "Three steps.",
            "File does not exist": ["No such file.\n", both],
            "tool\nsaid-by-bash": ["<think>It works.</think>\n\n", tool_call("Read", file_path=str(one))],
            "Go on": [
                "<think>First ",
                "the shell.</think>\n\nI ask it.\n",
                tool_call("Bash", command="echo said-by-bash"),
            ],
        }
    )
    run = claude.run("Go on")
    assert run.status == 0, run.errors
    assert (one.read_text(), two.read_text()) == ("1", "2")
    assert (run.result["result"], server.answered(4)) == ("Three steps.", [(ASKED, 200)] * 4)
    assert [block["name"] for block in run.blocks("assistant", "tool_use")] == ["Bash", "Read", "Write", "Write"]
    assert [block["thinking"] for block in run.blocks("assistant", "thinking")] == ["First the shell.", "It works."]
    texts = [block["text"] for block in run.blocks("assistant", "text")]
    assert texts == ["I ask it.", "No such file.", "Three steps."]
    ids = [block["id"] for block in run.blocks("assistant", "tool_use")]
    results = run.blocks("user", "tool_result")
    assert [block["tool_use_id"] for block in results] == ids
    assert [block.get("is_error", False) for block in results] == [False, True, False, False]


@pytest.mark.every_case
def test_a_conversation_goes_on_in_a_second_run(start: Start) -> None:
    server, claude = start({"And of Spain": "Madrid.", "capital of France": ["<think>Easy.</think>\n\n", "Paris."]})
    assert claude.run("The capital of France?").result["result"] == "Paris."
    again = claude.run("And of Spain?", "--continue")
    assert (again.status, again.result["result"]) == (0, "Madrid.")
    assert server.answered(2) == [(ASKED, 200)] * 2
    assert server.prompts[1].startswith(server.prompts[0])


@pytest.mark.every_case
def test_an_answer_that_was_cut_off_goes_on(start: Start) -> None:
    server, claude = start({"Output token limit hit": "The end.", "Tell": ["word "] * 2000})
    run = claude.run("Tell a story", environment={"CLAUDE_CODE_MAX_OUTPUT_TOKENS": "1024"})
    assert run.status == 0, run.errors
    assert (run.result["result"], server.answered(2)) == ("The end.", [(ASKED, 200)] * 2)


def test_it_reads_and_changes_a_file(start: Start, tmp_path: Path) -> None:
    story = tmp_path / "work" / "story.txt"
    server, claude = start(
        {
            "tool\nThe file": "Changed.",
            "1\told": ["I change it.\n", tool_call("Edit", file_path=str(story), old_string="old", new_string="new")],
            "Look at it": ["I read it.\n", tool_call("Read", file_path=str(story))],
        }
    )
    story.write_text("old\n")
    run = claude.run("Look at it")
    assert (run.status, run.result["result"], story.read_text()) == (0, "Changed.", "new\n"), run.errors
    assert server.answered(3) == [(ASKED, 200)] * 3


@pytest.mark.every_case
@pytest.mark.parametrize(
    "key",
    [{"ANTHROPIC_AUTH_TOKEN": "right"}, {"ANTHROPIC_AUTH_TOKEN": "", "ANTHROPIC_API_KEY": "right"}],
    ids=["Authorization", "x-api-key"],
)
def test_either_header_carries_the_key(start: Start, key: dict[str, str]) -> None:
    server, claude = start({"Hi": "Hello."}, "--api-key", "right")
    assert claude.run("Hi", environment=key).result["result"] == "Hello."
    assert server.answered(1) == [(ASKED, 200)]


@pytest.mark.every_case
def test_a_wrong_key_is_not_tried_again(start: Start) -> None:
    server, claude = start({}, "--api-key", "right")
    run = claude.run("Hi")
    assert (run.status, run.result["is_error"], run.result["api_error_status"]) == (1, True, 401)
    assert "Missing or wrong API key" in run.result["result"]
    assert server.answered(1) == [(ASKED, 401)]


@pytest.mark.every_case
def test_a_prompt_beyond_the_context_is_understood(start: Start) -> None:
    server, claude = start({}, max_model_len=4096)
    run = claude.run("Hi")
    assert (run.status, run.result["terminal_reason"]) == (1, "prompt_too_long")
    assert server.answered(1) == [(ASKED, 400)]


@pytest.mark.every_case
def test_a_stream_that_fails_is_asked_for_again(start: Start) -> None:
    server, claude = start({"Hi": ["Hello ", "there."]}, fail_after=1)
    run = claude.run("Hi", environment={"CLAUDE_CODE_MAX_RETRIES": "1"})
    assert (run.status, run.result["is_error"]) == (1, True)
    begun, *again = server.answered(2)
    assert begun == (ASKED, 200)
    assert set(again) == {(ASKED, 500)}
    assert not os.listdir(claude.work)
