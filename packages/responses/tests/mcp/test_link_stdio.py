# SPDX-License-Identifier: MIT
"""Links to servers on stdio: what a good one gives, and what each kind of bad one comes to."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.responses.mcp import processes, stdio, supervisor
from candle_vllm.responses.mcp.link import McpLink
from candle_vllm.responses.mcp.peer import McpServerError
from candle_vllm.responses.tools.tool import (
    ContentPart,
    ToolArgumentsError,
    ToolError,
    ToolOutput,
    ToolProgress,
    ToolTimedOutError,
    ToolUnavailableError,
)
from tests.waiting import skip, until

Scripted = Callable[..., Any]


def said(output: ToolOutput) -> str:
    return " ".join(part.text or "" for part in output.content)


async def test_a_good_server(scripted: Scripted, notes: Any) -> None:
    link = McpLink(scripted("plain"))
    assert (link.state, link.protocol_version, link.tools) == ("closed", None, {})
    async with link:
        assert link.state == "ready"
        assert (link.transport, link.protocol_version, link.error) == ("stdio", "2025-11-25", None)
        assert link.server_info is not None
        assert (link.server_info.name, link.instructions, link.reconnects) == ("scripted", "Be kind.", 0)
        assert list(link.tools) == ["echo", "say more"]
        assert await link.call("echo", {"text": "hi ü"}) == ToolOutput.of_text("hi ü")
        outputs = await asyncio.gather(*(link.call("say more", {"text": str(n)}) for n in range(100)))
        assert [said(output) for output in outputs] == [str(n) for n in range(100)]
        with pytest.raises(ToolError, match="has no tool 'nothing'"):
            await link.call("nothing", {})
    assert link.state == "closed"
    assert not notes.alive
    with pytest.raises(ToolUnavailableError, match="not available now"):
        await link.call("echo", {})
    await link.aclose()


async def test_a_link_can_be_started_again(scripted: Scripted) -> None:
    link = McpLink(scripted("plain"))
    for _ in range(2):
        await link.start()
        await link.start()
        assert said(await link.call("echo", {"text": "x"})) == "x"
        await link.aclose()


async def test_batches_of_messages(scripted: Scripted) -> None:
    async with McpLink(scripted("batch")) as link:
        assert said(await link.call("echo", {"text": "é"}, timeout=5)) == "é"
        faults = [line for line in link.log_lines() if "not a message" in line]
        assert faults
        assert {line[-4:] for line in faults} == {"t: 1"}


async def test_every_kind_of_content(scripted: Scripted) -> None:
    async with McpLink(scripted("content")) as link:
        output = await link.call("echo", {})
    assert output.is_error
    assert output.structured == {"n": 1}
    assert output.content == (
        ContentPart(kind="text", text="a text"),
        ContentPart(kind="image", data="aW1n", mime_type="image/png"),
        ContentPart(kind="audio", data="YXVk", mime_type="audio/wav"),
        ContentPart(kind="resource_link", uri="file:///a", name="a", text="an a", mime_type="text/plain"),
        ContentPart(kind="resource", uri="file:///t", mime_type="text/plain", text="inside"),
        ContentPart(kind="resource", uri="file:///b", mime_type="x/y", data="Ymxi"),
    )


async def test_bad_parts_of_lists_and_results_are_left_out_by_themselves(scripted: Scripted) -> None:
    async with McpLink(scripted("bad-parts")) as link:
        assert list(link.tools) == ["echo", "bare"]
        assert "the tool 'bad' is left out" in "\n".join(link.log_lines())
        assert "twice" not in "\n".join(link.log_lines())
        assert said(await link.call("bare", {})) == ("[content of the kind 'video', which is not understood] the text")
        for fields in (
            {"isError": None}, {"structuredContent": [1]}, {"structuredContent": "x"}, {"_meta": []},
            {"content": {"type": "text", "text": "the text"}}, {"content": "the text"},
            {"content": None, "structuredContent": {"a": "the text"}},
            {"content": [], "structuredContent": ["the text"]},  # as servers of the newer era may send it
            {"content": [{"type": "text", "text": "the text", "annotations": {"priority": 9}, "_meta": []}]},
        ):  # fmt: skip
            output = await link.call("echo", {"text": json.dumps(fields)})
            assert "the text" in said(output)
            assert not output.is_error
        nothing = await link.call("echo", {"text": json.dumps({"content": None})})
        assert (nothing.content, nothing.is_error) == ((), False)


async def test_progress(scripted: Scripted) -> None:
    seen: list[ToolProgress] = []
    async with McpLink(scripted("progress")) as link:
        assert said(await link.call("echo", {}, report=seen.append)) == "done"
    assert seen == [ToolProgress(progress=n, total=5, message=f"step {n}") for n in range(5)]


async def test_only_its_own_environment_and_folder(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUR_SECRET", "x")
    network = {
        **{name: f"http://{name}" for name in ("HTTP_PROXY", "https_proxy", "ALL_PROXY", "no_proxy")},
        **{name: f"/{name}" for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")},
    }
    for name in ("HTTPS_PROXY", "NO_PROXY", "http_proxy", "all_proxy", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in network.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "folder"
    folder.mkdir()
    async with McpLink(scripted("environment", env={"GIVEN": "yes"}, cwd=str(folder))) as link:
        told = json.loads(said(await link.call("echo", {})))
    assert told["folder"] == str(folder)
    assert told["environment"]["GIVEN"] == "yes"
    assert set(told["environment"]) <= {
        "GIVEN", "HOME", "LOGNAME", "PATH", "SHELL", "TERM", "USER", "LC_CTYPE", "__CF_USER_TEXT_ENCODING", *network,
    }  # fmt: skip
    assert network.items() <= told["environment"].items()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"command": "no-such-command-1"}, "the command 'no-such-command-1' was not found"),
        ({"cwd": "/no/such/folder"}, "its folder '/no/such/folder' does not exist"),
        ({"command": "/"}, "the command '/' cannot be run: Permission denied"),
    ],
)
async def test_a_program_that_does_not_start(scripted: Scripted, fields: dict[str, Any], why: str) -> None:
    link = McpLink(scripted("plain", **fields))
    with pytest.raises(McpServerError) as failure:
        await link.start()
    assert why in str(failure.value)
    assert str(failure.value).startswith("MCP server 'test': ")
    assert (link.state, link.error) == ("failed", failure.value.why)


async def test_a_program_that_ends_at_once(scripted: Scripted) -> None:
    link = McpLink(scripted("exit", env={"TOKEN": "top-secret"}))
    told = r"closed the connection: its program ended with status 3; it wrote: no licence for \*\*\*$"
    with pytest.raises(McpServerError, match=told):
        await link.start()
    assert link.error is not None
    assert link.error.endswith("no licence for ***")
    assert "no licence for ***" in link.log_lines()
    assert "top-secret" not in repr(link.log_lines()) + repr(link._peer) + repr(link._peer.redact)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (r"Error: Cannot find module 'x'\n    at Object.error\n\nNode.js v22.1.0\n", "Error: Cannot find module 'x'"),
        (r"Traceback:\n  raise OSError\nOSError: \x1b[1mno\x1b[0m\a \u202emodel\n", "OSError: [1mno[0m model"),
        (
            r"  + Exception Group Traceback:\n  | ExceptionGroup: unhandled errors (1 sub-exception)\n  +-+--- 1 ---\n"
            r"    | Traceback:\n    |   raise ValueError(1)\n    | \n    | ValueError: no key\n    +-----------\n",
            "ValueError: no key",
        ),
        (r"Error: " + "w" * 400, "Error: " + "w" * 292 + "…"),
        (r"starting\nno model\n", "no model"),
        (r"Error: http://me:hunter22@proxy:1/ refused, hunter22", "Error: http://***@proxy:1/ refused, ***"),
    ],
)
async def test_a_failed_server_s_own_words(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch, written: str, told: str
) -> None:
    monkeypatch.setenv("https_proxy", "http://me:hunter22@proxy:1/")
    program = f"import sys; sys.stderr.write({written!r}.encode().decode('unicode-escape')); sys.exit(1)"
    link = McpLink(scripted("plain", command=sys.executable, args=["-X", "utf8", "-c", program]))
    with pytest.raises(McpServerError) as failure:
        await link.start()
    assert failure.value.why == f"the server closed the connection: its program ended with status 1; it wrote: {told}"


async def test_a_server_that_reads_nothing_and_ends(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deaf, start = tmp_path / "deaf", stdio.processes.start_process

    async def later(*arguments: Any, **options: Any) -> Any:
        process = await start(*arguments, **options)
        await until(deaf.exists)
        return process

    monkeypatch.setattr(stdio.processes, "start_process", later)
    program = (
        f"import os, sys, time; os.close(0); open({str(deaf)!r}, 'w').close(); time.sleep(0.3); "
        "sys.stderr.write('no model'); sys.exit(1)"
    )
    link = McpLink(scripted("plain", command=sys.executable, args=["-c", program]))
    with pytest.raises(McpServerError, match=r"its program ended with status 1; it wrote: no model$"):
        await link.start()


async def test_what_a_server_wrote_that_does_not_answer(scripted: Scripted) -> None:
    program = "echo still loading >&2; exec sleep 60"
    link = McpLink(scripted("plain", command="sh", args=["-c", program], connect_timeout=30))
    starting = asyncio.create_task(link.start())
    await until(lambda: "still loading" in link.log_lines())
    await skip(30)
    with pytest.raises(McpServerError, match=r"within 30 seconds \(connect_timeout\); it wrote: still loading$"):
        await starting


@pytest.mark.parametrize("mode", ["silent", "silent-list", "children-silent"])
async def test_a_server_that_hangs_at_the_start(scripted: Scripted, notes: Any, mode: str) -> None:
    with pytest.raises(McpServerError, match=r"within 0\.7 seconds \(connect_timeout\)"):
        await McpLink(scripted(mode, connect_timeout=0.7)).start()
    assert not notes.alive


@pytest.mark.parametrize("mode", ["silent", "children-silent"])
async def test_a_start_that_is_cancelled_leaves_nothing(scripted: Scripted, notes: Any, mode: str) -> None:
    link = McpLink(scripted(mode))
    start = asyncio.create_task(link.start())
    await until(lambda: len(notes.alive) == (2 if mode == "children-silent" else 1))
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert link.state == "closed"
    assert not notes.alive


@pytest.mark.skipif(sys.platform == "win32", reason="no groups of processes there")
async def test_a_process_that_is_cancelled_again_while_it_spawns_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine a program may run before the loop knows of it; who cancels may do so more than once."""
    spawn, told = asyncio.create_subprocess_exec, asyncio.Event()
    started: list[Any] = []

    async def slowly(*given: Any, **others: Any) -> Any:
        started.append(await spawn(*given, **others))
        await told.wait()
        return started[0]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", slowly)
    start = asyncio.create_task(
        processes.start_process("sleep", ["1000"], environment={"PATH": os.defpath}, folder=str(tmp_path))
    )
    await until(lambda: len(started) == 1)
    for _ in range(3):
        start.cancel()
        await asyncio.sleep(0.01)
    told.set()
    await asyncio.wait({start})
    assert start.cancelled()
    assert started[0].returncode is not None


@pytest.mark.skipif(sys.platform == "win32", reason="no groups of processes there")
async def test_an_input_that_nobody_reads_is_closed_with_its_process(tmp_path: Path) -> None:
    """Also where a descendant outside the group holds its other end."""
    program = "import subprocess; print(subprocess.Popen(['sleep', '1000'], start_new_session=True).pid, flush=True)"
    process = await processes.start_process(
        sys.executable, ["-c", program], environment={"PATH": os.defpath}, folder=str(tmp_path)
    )
    assert process.stdin is not None
    assert process.stdout is not None
    descendant = int(await process.stdout.readline())
    try:
        pipe = process.stdin.transport.get_extra_info("pipe")
        process.stdin.write(bytes(1 << 20))
        await processes.end_process(process, grace=0.0)
        await until(lambda: pipe.closed)
    finally:
        os.kill(descendant, signal.SIGKILL)


@pytest.mark.parametrize("delay", [0.0, 0.001, 0.003, 0.01, 0.03])
async def test_a_start_that_is_cancelled_at_any_time_leaves_nothing(
    scripted: Scripted, notes: Any, delay: float
) -> None:
    link = McpLink(scripted("plain"))
    start = asyncio.create_task(link.start())
    await asyncio.sleep(delay)
    start.cancel()
    await asyncio.gather(start, return_exceptions=True)
    if not start.cancelled():  # it was ready before
        assert link.state == "ready"
        await link.aclose()
    await asyncio.sleep(0.1)
    assert not notes.alive


async def test_a_server_that_dies_in_a_call_comes_back(scripted: Scripted, notes: Any) -> None:
    async with McpLink(scripted("exit-in-call")) as link:
        for turn in (1, 2):
            with pytest.raises(
                ToolUnavailableError, match=r"lost during the call .*status 7; it wrote: out of cheese"
            ) as failure:
                await link.call("echo", {})
            assert "whether the tool did its work is not known" in str(failure.value)
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0
            await until(lambda turn=turn: link.state == "ready" and link.reconnects == turn)
        assert notes.count("called") == 2  # never again by itself
        assert "out of cheese" in link.log_lines()


async def test_a_call_waits_a_little_for_a_server_that_comes_back(scripted: Scripted, notes: Any) -> None:
    async with McpLink(scripted("plain")) as link:
        import os

        os.kill(notes.processes[0], 9)
        await until(lambda: link.state != "ready")
        assert said(await link.call("echo", {"text": "again"})) == "again"
        assert link.reconnects == 1


async def test_grandchildren_end_after_a_close_and_after_a_crash(scripted: Scripted, notes: Any) -> None:
    async with McpLink(scripted("children")):
        assert len(notes.alive) == 2
    assert not notes.alive
    async with McpLink(scripted("children-exit")) as link:
        with pytest.raises(ToolUnavailableError):
            await link.call("echo", {})
        await until(lambda: link.reconnects == 1)
        assert len(notes.alive) == 2
    assert not notes.alive


async def test_a_stubborn_server_is_ended(scripted: Scripted, notes: Any) -> None:
    async with McpLink(scripted("stubborn")):
        assert len(notes.alive) == 2
    assert not notes.alive


async def test_a_call_that_takes_too_long(scripted: Scripted, notes: Any) -> None:
    async with McpLink(scripted("hang", timeout=0.3)) as link:
        with pytest.raises(ToolTimedOutError, match=r"did not answer within 0\.3 seconds"):
            await link.call("echo", {})
        with pytest.raises(ToolTimedOutError, match=r"within 0\.1 seconds"):
            await link.call("echo", {}, timeout=0.1)
        await until(lambda: notes.count("cancelled") == 2)
        assert said(await link.call("echo", {"text": "fine"}, timeout=60)) == "fine"
        assert link.reconnects == 0


async def test_a_cancelled_call_reaches_the_server(scripted: Scripted, notes: Any) -> None:
    async with McpLink(scripted("hang")) as link:
        calls = [asyncio.create_task(link.call("echo", {})) for _ in range(3)]
        await until(lambda: notes.count("called") == 3)
        for call in calls[:2]:
            call.cancel()
        outcomes = await asyncio.gather(*calls[:2], return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        await until(lambda: notes.count("cancelled") == 2)
        assert not calls[2].done()
        assert said(await link.call("echo", {"text": "fine"})) == "fine"
    with pytest.raises(ToolUnavailableError, match="the connection was closed"):
        await calls[2]


async def test_a_server_that_reads_nothing(scripted: Scripted) -> None:
    async with McpLink(scripted("deaf", timeout=0.5)) as link:
        for text in ("x", "x" * 1_000_000):  # the second does not fit the pipe
            with pytest.raises(ToolTimedOutError):
                await link.call("echo", {"text": text})


async def test_rubbish_between_messages(scripted: Scripted) -> None:
    async with McpLink(scripted("rubbish")) as link:
        for _ in range(5):
            assert said(await link.call("echo", {"text": "x"})) == "x"
        assert link.reconnects == 0
        assert "not a message of the protocol: on standard output: Listening..." in link.log_lines()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"jsonrpc": "2.0", "id": ID, "result": {"content": [{"type": "text", "text": "cut \\ud83d"}]}}', "cut ?"),
        ('{"jsonrpc": "2.0", "id": ID, "result": {"content": [{"type": "text", "text": "caf\udce9"}]}}', "caf\ufffd"),
        ('\ufeff{"jsonrpc": "2.0", "id": ID, "result": {"content": [{"type": "text", "text": "marked"}]}}', "marked"),
    ],
)
async def test_a_reply_that_is_not_quite_json(scripted: Scripted, line: str, told: str) -> None:
    """JavaScript cuts texts in the middle of characters, and programs write bytes that are not UTF-8."""
    async with McpLink(scripted("line")) as link:
        assert said(await link.call("echo", {"text": line.encode("utf-8", "surrogateescape").hex()})) == told


@pytest.mark.parametrize(
    "line",
    [
        *(f'{{"jsonrpc": "2.0", "id": ID, "result": {wrong}}}' for wrong in ("null", "[1]", '"done"')),
        '{"jsonrpc": "2.0", "id": ID, "error": "it went wrong"}',
        '{"id": ID, "result": {"content": []}}',
        '{"jsonrpc": "2.0", "id": ID, "result": {"content": [], "structuredContent": '
        + '{"a": ' * 300
        + "1}" * 301
        + "}",
        '{"result": 3, "jsonrpc": "2.0", "id": ID}',
        '{"id": ID, "jsonrpc": "2.0", "result": null}',
    ],
)
async def test_a_reply_that_is_no_message_fails_its_call_at_once(scripted: Scripted, line: str) -> None:
    async with McpLink(scripted("line")) as link:
        with pytest.raises(ToolError, match="not a message of the protocol: on standard output") as failure:
            await link.call("echo", {"text": line.encode().hex()})
        assert not isinstance(failure.value, ToolTimedOutError)
        assert link.reconnects == 0


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"text": "cut \ud83d"}, "surrogates not allowed"),
        ({"text": b"\xff"}, "utf-8"),
        ([1], "sequence"),
        ({"text": float("nan")}, "JSON compliant"),
        ({"text": object()}, "serialize"),
    ],
)
async def test_arguments_that_are_not_json_leave_the_connection(scripted: Scripted, arguments: Any, why: str) -> None:
    async with McpLink(scripted("good")) as link:
        with pytest.raises(ToolArgumentsError, match=f"the arguments must be JSON: .*{why}"):
            await link.call("echo", arguments)
        assert said(await link.call("echo", {"text": "fine"})) == "fine"
        assert link.reconnects == 0


async def test_nothing_but_rubbish(scripted: Scripted, notes: Any) -> None:
    with pytest.raises(McpServerError, match="1000 consecutive items that are not messages"):
        await McpLink(scripted("only-rubbish-at-start")).start()
    assert not notes.alive
    async with McpLink(scripted("only-rubbish")) as link:
        with pytest.raises(ToolUnavailableError, match="1000 consecutive items"):
            await link.call("echo", {})


@pytest.mark.parametrize("mode", ["huge", "huge-id-last"])
async def test_a_reply_that_is_too_large_is_refused(scripted: Scripted, mode: str) -> None:
    async with McpLink(scripted(mode)) as link:
        with pytest.raises(ToolError, match=r"the reply has 115\d+ bytes; at most 10485760 are read"):
            await link.call("echo", {"text": "huge"})
        assert link.reconnects == 0
        if mode == "huge":
            assert said(await link.call("echo", {"text": "small"})) == "small"


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        *((mode, "a message of 115.* bytes; at most") for mode in ("huge-other", "huge-question", "huge-no-id")),
        ("endless-line", "a line of more than 104"),
    ],
)
async def test_a_flood_ends_the_connection(scripted: Scripted, notes: Any, mode: str, why: str) -> None:
    async with McpLink(scripted(mode)) as link:
        with pytest.raises(ToolUnavailableError, match=why):
            await link.call("echo", {})
    assert not notes.alive


@pytest.mark.parametrize("mode", ["blank-lines", "chatter"])
async def test_a_flood_beside_the_protocol_leaves_time_to_others(scripted: Scripted, mode: str) -> None:
    async with McpLink(scripted(mode)) as link:
        began = time.thread_time()
        for _ in range(80):
            await asyncio.sleep(0.001)
        assert time.thread_time() - began < 3, "the event loop was held up"
        assert not (await link.call("echo", {"text": "x"})).is_error


async def test_the_era_of_a_server_is_remembered(scripted: Scripted, notes: Any) -> None:
    """A server that leaves unknown requests unanswered would cost seconds at each connection."""
    async with McpLink(scripted("exit-in-call")) as link:
        assert notes.count("asked") == 1
        with pytest.raises(ToolUnavailableError):
            await link.call("echo", {})
        await until(lambda: link.state == "ready" and link.reconnects == 1)
        assert notes.count("asked") == 1


async def test_a_server_that_ends_at_a_request_of_the_newer_era(scripted: Scripted, notes: Any) -> None:
    async with McpLink(scripted("ends-at-discover")) as link:
        assert (link.protocol_version, link.reconnects, link.error) == ("2025-11-25", 0, None)
        assert said(await link.call("echo", {"text": "x"})) == "x"
        os.kill(notes.processes[-1], signal.SIGTERM)
        await until(lambda: link.state == "ready" and link.reconnects == 1)
        assert notes.count("asked") == 1


async def test_the_log_is_bounded(scripted: Scripted) -> None:
    async with McpLink(scripted("words", env={"TOKEN": "top-secret"})) as link:
        await until(lambda: any(line.startswith("2999 ") for line in link.log_lines()))
        lines = link.log_lines()
    assert len(lines) == 200
    assert max(map(len, lines)) == 1000
    assert "\x1b" not in "".join(lines)
    assert "the last words of ***" in link.log_lines()


async def test_outputs_that_do_not_fit_their_schema(scripted: Scripted) -> None:
    async with McpLink(scripted("lies")) as link:
        good = await link.call("echo", {"text": "truth"})
        assert (good.is_error, good.structured) == (False, {"n": 3})
        bad = await link.call("echo", {"text": "lie"})
        assert bad.is_error
        assert bad.structured == {"n": "three"}
        assert "does not fit the schema that its server declares: n: 'three' is not of type 'integer'" in said(bad)
        assert bad.content[-1] == ContentPart(kind="text", text="the text")
        missing = await link.call("echo", {"text": "nothing"})
        assert missing.is_error
        assert "gave no structured output" in said(missing)


async def test_tools_that_are_renamed(scripted: Scripted) -> None:
    changes: list[list[str]] = []
    async with McpLink(scripted("renames"), on_tools_changed=lambda link: changes.append(list(link.tools))) as link:
        assert said(await link.call("echo", {})) == "done"
        await until(lambda: list(link.tools) == ["renamed"])
        with pytest.raises(ToolError, match="has no tool 'echo'"):
            await link.call("echo", {})
    assert changes == [["echo", "say more"], ["renamed"]]


async def test_a_changed_list_that_cannot_be_read_is_asked_for_again(scripted: Scripted) -> None:
    async with McpLink(scripted("renames")) as link:
        assert said(await link.call("echo", {"text": "1"})) == "done"
        await until(lambda: list(link.tools) == ["renamed"])
        assert any("could not be listed again" in line for line in link.log_lines())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sampling", "Sampling not supported"),
        ("elicitation", "Elicitation not supported"),
        ("roots", "List roots not supported"),
        ("unknown", "Method not found"),
    ],
)
async def test_what_a_server_asks_is_refused(scripted: Scripted, text: str, message: str) -> None:
    async with McpLink(scripted("sampling")) as link:
        answer = json.loads(said(await link.call("echo", {"text": text})))
    assert answer["message"] == message
    assert answer["code"] in (-32600, -32601)


async def test_refusals_and_nonsense(scripted: Scripted) -> None:
    async with McpLink(scripted("error", env={"TOKEN": "top-secret"})) as link:
        with pytest.raises(ToolError, match=r"refused the call: no, \*\*\* xxx") as failure:
            await link.call("echo", {})
    assert len(str(failure.value)) < 2100
    async with McpLink(scripted("bad-result")) as link:
        with pytest.raises(ToolError, match="does not fit the protocol") as failure:
            await link.call("echo", {})
        assert type(failure.value) is ToolError
        assert link.reconnects == 0


@pytest.mark.parametrize(
    ("mode", "count", "note"),
    [
        ("circle", 3, "repeats a cursor"),
        ("pages", 100, "more than 100 pages"),
        ("many", 1000, "more than 1000 tools"),
        ("big-list", 3, "more than 4194304 bytes of definitions; the tools after the first 3 are left out"),
        ("twice", 2, "lists the tool 'echo' twice"),
        ("tasks", 1, "the tool 'slow' is left out: it runs only as a task, which is not supported"),
    ],
)
async def test_lists_of_tools_have_limits(scripted: Scripted, mode: str, count: int, note: str) -> None:
    async with McpLink(scripted(mode)) as link:
        assert len(link.tools) == count
        assert note in link.notes[-1]


async def test_allowed_and_excluded_tools(scripted: Scripted) -> None:
    for fields, names in (
        ({"allowed_tools": ("e*",)}, ["echo"]),
        ({"excluded_tools": ("echo",)}, ["say more"]),
        ({"allowed_tools": ("*",), "excluded_tools": ("* more",)}, ["echo"]),
        ({"allowed_tools": ()}, []),
    ):
        async with McpLink(scripted("plain", **fields)) as link:
            assert list(link.tools) == names
            if names != ["echo"]:
                with pytest.raises(ToolError, match="has no tool 'echo'"):
                    await link.call("echo", {})


async def test_a_server_that_is_not_there_yet_comes_later(scripted: Scripted, tmp_path: Path) -> None:
    config = scripted("plain", cwd=str(tmp_path / "later"))
    link = McpLink(config)
    with pytest.raises(McpServerError):
        await link.start(keep_trying=True)
    assert link.state == "failed"
    with pytest.raises(ToolUnavailableError, match="its folder"):
        await link.call("echo", {}, timeout=0.2)
    (tmp_path / "later").mkdir()
    await until(lambda: link.state == "ready")
    assert said(await link.call("echo", {"text": "x"})) == "x"
    await link.aclose()


async def test_after_many_attempts_only_a_call_makes_another(
    scripted: Scripted, notes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(supervisor, "MAX_ATTEMPTS", 3)
    folder, away = tmp_path / "here", tmp_path / "away"
    folder.mkdir()
    link = McpLink(scripted("plain", cwd=str(folder)))
    await link.start()
    folder.rename(away)
    os.kill(notes.processes[0], signal.SIGTERM)
    await until(lambda: "3 attempts failed; the next one is made when a tool is called" in link.log_lines())
    away.rename(folder)
    await asyncio.sleep(0.3)
    assert link.state == "failed"
    assert said(await link.call("echo", {"text": "x"})) == "x"
    assert link.state == "ready"
    await link.aclose()


async def test_a_server_without_known_tools_is_tried_without_end(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody could call a tool of it."""
    monkeypatch.setattr(supervisor, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(supervisor, "LAST_DELAY", 0.02)
    monkeypatch.setattr(supervisor, "MAX_ATTEMPTS", 3)
    attempts, connect = 0, supervisor.Supervisor._connect

    async def counted(self: supervisor.Supervisor) -> Any:
        nonlocal attempts
        attempts += 1
        return await connect(self)

    monkeypatch.setattr(supervisor.Supervisor, "_connect", counted)
    link = McpLink(scripted("plain", cwd=str(tmp_path / "later")))
    with pytest.raises(McpServerError):
        await link.start(keep_trying=True)
    await until(lambda: attempts > 5)
    await link._supervisor._pause(100_000)  # the delay stays the same
    (tmp_path / "later").mkdir()
    await until(lambda: link.state == "ready")
    await link.aclose()


async def test_a_disabled_server_is_left_alone(scripted: Scripted, notes: Any) -> None:
    async with McpLink(scripted("plain", enabled=False)) as link:
        assert link.state == "disabled"
        with pytest.raises(ToolUnavailableError, match="disabled"):
            await link.call("echo", {})
    assert link.state == "disabled"
    assert not notes.processes
