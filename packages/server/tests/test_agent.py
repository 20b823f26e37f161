# SPDX-License-Identifier: MIT
"""`candle-vllm agent` on a scripted engine, with a real MCP server over stdio and a real terminal."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from candle_vllm.core.engine.outputs import FinishReason
from candle_vllm.core.errors import ConfigError
from candle_vllm.responses.conversation import events
from candle_vllm.responses.conversation.options import ConversationUsage
from candle_vllm.responses.tools.approval import Approval
from candle_vllm.responses.tools.names import tool_name
from candle_vllm.responses.tools.tool import ToolCall, ToolDefinition, ToolProgress
from candle_vllm.server.cli import main
from candle_vllm.server.commands import agent as agent_module
from candle_vllm.server.commands.agent import AgentDisplay, TerminalApproval, changes
from packages.server.tests import mcp_fakes
from packages.server.tests.server_fakes import PacedEngine
from packages.server.tests.terminals import Terminal

SERVER = """
import sys
from mcp.server import MCPServer

server = MCPServer("numbers")

@server.tool()
def double(n: int) -> int:
    "Doubles a number."
    return 2 * n

server.run(transport="stdio")
"""


def call_text(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    return tmp_path


def write_config(folder: Path, *tools: str, sdk: bool = False, **more: object) -> None:
    """One server, in plain Python with the named tools, or with `sdk` the MCP SDK's own."""
    (folder / "server.py").write_text(SERVER)
    plain = ["-S", str(Path(mcp_fakes.__file__).with_name("plain_mcp.py")), str(folder / "pid"), *(tools or ["double"])]
    entry = {"command": sys.executable, "args": [str(folder / "server.py")] if sdk else plain, **more}
    (folder / "mcp.json").write_text(json.dumps({"mcpServers": {"numbers": entry}}))


def scripted(monkeypatch: pytest.MonkeyPatch, *texts: str) -> PacedEngine:
    left = list(texts)
    engine = PacedEngine(lambda _: left.pop(0) if len(left) > 1 else left[0])
    monkeypatch.setattr(agent_module, "load_engine", lambda *_: engine)
    return engine


DOUBLE = call_text("numbers__double", n=21)


@pytest.mark.parametrize("flags", [["--yes"], ["--approve", "double"], ["--approve", "numbers__*"]])
def test_a_request_is_carried_out(
    flags: Sequence[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(folder, sdk=flags == ["--yes"])
    engine = scripted(monkeypatch, "Let me see." + DOUBLE, "It is 42.")
    assert main(["agent", "--tool-parser", "hermes", *flags, "--system", "S", "--max-tokens", "99", "21 * 2?"]) == 0
    out, err = capsys.readouterr()
    assert out == "Let me see.\nIt is 42.\n"
    assert "MCP servers: numbers; tools: 1\n" in err
    assert '-> numbers__double {"n": 21}' in err
    assert "<- numbers__double 42" in err
    first = engine.template_calls[0].messages
    assert [message["content"] for message in first] == ["S", "21 * 2?"]
    assert engine.requests[0].params.max_tokens == 99
    assert engine.closed


def test_names_of_no_tool_are_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(folder)
    scripted(monkeypatch, "ok")
    names = ["double", "numbers__double", "numbers__*", "d*", "duble", "double__", "words__*"]
    assert main(["agent", *(word for name in names for word in ("--approve", name)), "x"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "--approve" in line]
    assert told == [f"--approve {name}: there is no such tool" for name in ("duble", "double__", "words__*")]


def test_the_configuration_approves_tools(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(folder, autoApprove=["double"])
    engine = scripted(monkeypatch, DOUBLE, "42")
    assert main(["agent", "--tool-parser", "hermes", "x"]) == 0
    assert engine.template_calls[-1].messages[-1]["content"] == "42"


def test_without_a_terminal_nothing_is_allowed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(folder)
    engine = scripted(monkeypatch, DOUBLE, "I may not.")
    assert main(["agent", "--tool-parser", "hermes", "x"]) == 0
    out, err = capsys.readouterr()
    assert "numbers__double is not allowed, because standard input is no terminal" in err
    assert "denied" in err
    assert out == "I may not.\n"
    assert "not agree" in engine.template_calls[-1].messages[-1]["content"]


def test_an_unfinished_request_is_status_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(folder)
    scripted(monkeypatch, call_text("nothing"))
    assert main(["agent", "--tool-parser", "hermes", "--max-turns", "1", "x"]) == 1
    err = capsys.readouterr().err
    assert "<- nothing unknown: There is no tool 'nothing'." in err
    assert "not finished: the maximum number of turns is reached" in err


def test_an_empty_answer_is_status_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(monkeypatch, "")
    assert main(["agent", "x"]) == 1
    assert "not finished: the model's answer is empty" in capsys.readouterr().err


def test_the_name_of_another_servers_model_is_sent_as_it_is_typed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "models.yaml").write_text("models:\n- {name: small, local_path: small.gguf}\n")
    names: list[str | None] = []

    def session(*_: object, model_name: str | None, **__: object) -> None:
        names.append(model_name)
        raise ConfigError("no session")

    monkeypatch.setattr(agent_module, "ResponsesSession", session)
    for flags in (["--m", "small"], ["--m", "default"], []):
        assert main(["agent", "--base-url", "http://127.0.0.1:9/v1", *flags, "x"]) == 2
    assert names == ["small", "default", None]


def test_a_failing_model_is_status_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert main(["agent", "--base-url", "http://127.0.0.1:9/v1", "--m", "m", "--api-key", "sk-secret", "x"]) == 1
    err = capsys.readouterr().err
    assert "error: the model server at 127.0.0.1 cannot be reached" in err
    assert "sk-secret" not in err


def test_events_as_json(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(folder)
    answer = "4\u20282\u2029\x85."
    scripted(monkeypatch, DOUBLE, answer)
    assert main(["agent", "--tool-parser", "hermes", "--yes", "--json", "x"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"type": "TurnStarted", "number": 1}
    assert lines[-1]["type"] == "ConversationFinished"
    assert lines[-1]["result"]["final_message"] == answer
    finished = [line["result"]["text"] for line in lines if line["type"] == "ToolFinished"]
    assert finished == ["42"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["agent"], "the following arguments are required: REQUEST"),
        (["agent", ""], "REQUEST must have 1 to"),
        (["agent", "-"], "the request is empty"),
        (["agent", "--api-key", "x", "y"], "--api-key needs --base-url"),
        (["agent", "--base-url", "ftp://x", "y"], "must begin with http"),
        (["agent", "--mcp-config", "no.json", "y"], "no.json does not exist"),
        (["agent", "--max-turns", "0", "y"], "between 1 and 1000"),
        (["chat", "--mcp-config", "x"], "--mcp-config does not apply to `candle-vllm chat`"),
    ],
)
def test_usage(
    arguments: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_request_from_standard_input(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = scripted(monkeypatch, "ok")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüße\n".encode())))
    assert main(["agent", "-"]) == 0
    assert engine.template_calls[0].messages[0]["content"] == "Grüße\n"


class TestAsking:
    CALL = ToolCall(id="c", name="s__delete", arguments="{}")
    DEFINITION = ToolDefinition(name="s__delete", server="s", original_name="delete")

    def ask(self, *lines: str | None) -> tuple[list[Approval], int]:
        """The answers to two calls of one tool, and how many lines were read."""
        left = list(lines)

        async def read_line(_: str) -> str | None:
            return left.pop(0)

        async def twice() -> list[Approval]:
            approval = TerminalApproval((), read_line)
            return [await approval(self.CALL, self.DEFINITION) for _ in range(2)]

        return asyncio.run(twice()), len(lines) - len(left)

    @pytest.mark.parametrize(
        ("lines", "answers"),
        [
            (["y\n", "n\n"], [Approval.ALLOW, Approval.DENY]),
            (["YES\n", "what?\n", " no \n"], [Approval.ALLOW, Approval.DENY]),
            (["a\n"], [Approval.ALLOW, Approval.ALLOW]),
            ([None, None], [Approval.DENY, Approval.DENY]),
        ],
    )
    def test_answers(self, lines: list[str | None], answers: list[Approval]) -> None:
        assert self.ask(*lines) == (answers, len(lines))

    @pytest.mark.parametrize(
        ("approved", "server", "own", "allowed"),
        [
            ("delete", "s", "delete", True),
            ("de*", "other", "delete", True),
            ("s__delete", "s", "delete", True),
            ("s__*", "s", "delete", True),
            ("s__delete", "evil", "s__delete", False),
            ("s__*", "evil", "s__delete", False),
            ("delete", "s", "undelete", False),
        ],
    )
    def test_names_that_need_no_asking(
        self, approved: str, server: str, own: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stdin", None)  # closed: nobody can be asked
        name = tool_name(server, own)
        definition = ToolDefinition(name=name, server=server, original_name=own)
        answer = asyncio.run(TerminalApproval((approved,))(ToolCall(id="c", name=name, arguments="{}"), definition))
        assert answer is (Approval.ALLOW if allowed else Approval.DENY)

    def test_always_is_for_one_tool(self) -> None:
        async def read_line(_: str) -> str | None:
            return lines.pop(0)

        async def ask() -> list[Approval]:
            approval = TerminalApproval((), read_line)
            imitation = ToolDefinition(name="evil__s__delete", server="evil", original_name=self.CALL.name)
            call = ToolCall(id="d", name=imitation.name, arguments="{}")
            return [await approval(self.CALL, self.DEFINITION), await approval(call, imitation)]

        lines = ["a", "n"]
        assert asyncio.run(ask()) == [Approval.ALLOW, Approval.DENY]
        assert lines == []

    def test_all_that_is_agreed_to_is_shown(self, capsys: pytest.CaptureFixture[str]) -> None:
        async def read_line(_: str) -> str | None:
            return "n"

        arguments = json.dumps({"command": "true" + " " * 500 + "#" * 1000, "then": "rm -rf"})
        call = ToolCall(id="c", name="s__delete", arguments=arguments)
        asyncio.run(TerminalApproval((), read_line)(call, self.DEFINITION))
        assert "rm -rf" in capsys.readouterr().err
        call = ToolCall(id="c", name="s__delete", arguments=json.dumps({"command": "#" * 9000, "then": "rm -rf"}))
        asyncio.run(TerminalApproval((), read_line)(call, self.DEFINITION))
        assert f"... ({len(call.arguments)} characters in all)" in capsys.readouterr().err


def test_what_a_tool_says_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    display = AgentDisplay()
    call = ToolCall(id="c", name="f\x1b[2J", arguments="\x1b]0;title\x07" + "x" * 5000)
    display.show(events.ToolStarted(call=call, definition=ToolDefinition(name="f")))
    display.show(events.ToolProgressed(call_id="c", progress=ToolProgress(progress=1, total=4, message="a\nb")))
    display.show(events.ReasoningDelta(text="hidden where no terminal is"))
    message = {"role": "assistant", "content": ""}
    display.show(
        events.TurnFinished(number=1, message=message, finish_reason=FinishReason.STOP, usage=ConversationUsage())
    )
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b" not in err
    assert "\x07" not in err
    assert "1 of 4 a b" in err
    assert max(map(len, err.splitlines())) < 400


def test_hidden_reasoning_does_not_join_two_turns(capsys: pytest.CaptureFixture[str]) -> None:
    display, message = AgentDisplay(), {"role": "assistant", "content": ""}
    for number, text in enumerate(("One.", "Two."), 1):
        display.show(events.TextDelta(text=text))
        display.show(events.ReasoningDelta(text="hidden"))
        usage = ConversationUsage()
        ended = events.TurnFinished(number=number, message=message, finish_reason=FinishReason.STOP, usage=usage)
        display.show(ended)
    assert capsys.readouterr().out == "One.\nTwo.\n"


AGENT = ("agent", "--tool-parser", "hermes", "x")


def test_a_person_is_asked_on_the_terminal(folder: Path) -> None:
    write_config(folder)
    terminal = Terminal(folder, AGENT, DOUBLE, "It is 42.")
    terminal.wait_for("[n]o: ")
    assert '{"n": 21}' in terminal.shown
    terminal.type("y\n")
    terminal.wait_for("It is 42.")
    assert terminal.end() == 0


def test_what_was_typed_before_the_question_is_no_answer(folder: Path) -> None:
    write_config(folder)
    terminal = Terminal(folder, AGENT, "Thinking." + DOUBLE, "It stays undone.", pause=0.01)
    terminal.wait_for("Thinking.")
    terminal.type("y\n")
    terminal.wait_for("[n]o: ")
    terminal.type("n\n")
    terminal.wait_for("It stays undone.")
    assert "denied" in terminal.shown
    assert terminal.end() == 0


def test_ctrl_c_while_a_question_is_open(folder: Path) -> None:
    write_config(folder)
    terminal = Terminal(folder, AGENT, DOUBLE, "never")
    terminal.wait_for("[n]o: ")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_who_ends_it_ends_its_servers(folder: Path, number: int) -> None:
    write_config(folder, "hang")
    terminal = Terminal(folder, (*AGENT, "--yes"), call_text("numbers__hang"))
    terminal.wait_for("-> numbers__hang")
    terminal.process.send_signal(number)
    assert terminal.end() == 143
    assert "Traceback" not in terminal.shown
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "pid").read_text()), 0)


def test_ctrl_c_in_an_answer(folder: Path) -> None:
    terminal = Terminal(folder, AGENT, "abc" * 1000, pause=0.01)
    terminal.wait_for("abcabc")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert "Traceback" not in terminal.shown


def test_who_is_asked_sees_what_would_change_and_agrees_for_all_calls(folder: Path) -> None:
    write_config(folder, "write_file", "double")
    (folder / "notes.txt").write_text("first\nsecond\n")
    path = str(folder / "notes.txt")
    writes = [call_text("numbers__write_file", path=path, content=text) for text in ("first\nnew\n", "last\n")]
    terminal = Terminal(folder, AGENT, *writes, "It is **done**.", columns=250)
    terminal.wait_for("[n]o: ")
    assert "compared with the file here" in terminal.screen
    assert "  -second\n  +new" in terminal.screen
    assert "\x1b[31m  -second" in terminal.shown
    terminal.type("a\n")
    terminal.wait_for("a second)")
    assert terminal.end() == 0
    assert terminal.screen.count("[n]o: ") == 1
    assert "It is done." in terminal.screen
    assert (folder / "notes.txt").read_text() == "last\n"


class TestChanges:
    def of(self, arguments: object, *, read_only: bool = False) -> list[str]:
        definition = ToolDefinition(name="w", read_only=read_only)
        return changes(ToolCall(id="c", name="w", arguments=json.dumps(arguments)), definition)

    def test_pieces_that_are_replaced(self) -> None:
        edits = [{"oldText": "a", "newText": "b"}, {"oldText": "c", "newText": "d"}, 7]
        assert [line for line in self.of({"path": "p", "edits": edits}) if line[0] in "+-"] == ["-a", "+b", "-c", "+d"]
        assert self.of({"file_path": "p", "old_string": "a\nb", "new_string": "a"})[-2:] == [" a", "-b"]

    def test_a_new_file_and_one_that_stays(self, folder: Path) -> None:
        assert self.of({"path": "new", "content": "x"}) == ["new (no text file here):", "@@ -0,0 +1 @@", "+x"]
        (folder / "same").write_text("x")
        assert self.of({"path": "same", "content": "x"})[-1] == "(nothing changes)"
        assert self.of({"path": "same", "content": "x\r\n"})[-1] == "(line ends change, and nothing else)"

    def test_what_says_nothing_of_a_change(self, folder: Path) -> None:
        assert self.of({"path": "p", "content": "x"}, read_only=True) == []
        assert [self.of(arguments) for arguments in ({"n": 1}, [], 3, {"path": "p"}, {"content": "x"})] == [[]] * 5

    def test_much_is_cut_and_pipes_are_not_waited_for(self, folder: Path) -> None:
        os.mkfifo(folder / "pipe")
        lines = self.of({"path": "pipe", "content": "y" * 5000 + "\nx" * 5000})
        assert lines[0] == "pipe (no regular file here):"
        assert len(lines) == 201
        assert max(map(len, lines)) < 600
        assert lines[-1] == "... (4803 more lines)"
