# SPDX-License-Identifier: MIT
"""Links over HTTP in both protocol eras: what a failing server comes to, row by row of the SDK's own behaviour.

Without a link, the SDK cancels the caller where a server of the newer era dies, and never makes a new session.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from mcp.server.transport_security import TransportSecuritySettings

from candle_vllm.responses.mcp import http, supervisor
from candle_vllm.responses.mcp.link import McpLink
from candle_vllm.responses.mcp.peer import McpServerError
from candle_vllm.responses.tools.tool import ToolError, ToolOutput, ToolTimedOutError, ToolUnavailableError
from packages.responses.tests.mcp.http_apps import Seen, good_server, legacy_only, moved, refusing, scripted_app
from tests.waiting import PATIENCE, skip, until

ERAS = ["2026-07-28", "2025-11-25"]
Serve = Callable[..., Any]
Config = Callable[..., Any]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts to connect again follow each other quickly."""
    monkeypatch.setattr(supervisor, "FIRST_DELAY", 0.1)
    monkeypatch.setattr(supervisor, "LAST_DELAY", 0.3)


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture(params=ERAS)
def era(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def good(serve: Serve, seen: Seen, era: str) -> Any:
    """A good server of an era."""

    def app(**options: Any) -> Any:
        app = good_server(seen).streamable_http_app(**options)
        return app if era == ERAS[0] else legacy_only(app, seen)

    return serve(app)


def said(output: ToolOutput) -> str:
    return " ".join(part.text or "" for part in output.content)


def not_cancelled() -> bool:
    """Nobody has cancelled the caller."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() == 0


async def test_a_server_that_has_moved_within_its_origin(serve: Serve, seen: Seen, config: Config) -> None:
    server = serve(lambda: moved(good_server(seen).streamable_http_app(), "/mcp/", "/mcp"), "/mcp/")
    async with McpLink(config(url=server.url)) as link:
        assert said(await link.call("echo", {"text": "here"})) == "here"


async def test_public_addresses_alone(
    serve: Serve, seen: Seen, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever names a server for somebody else does not get into the network of that one; names are looked up once."""
    server = serve(lambda: good_server(seen).streamable_http_app())
    with pytest.raises(McpServerError, match="not public"):
        await McpLink(config(url=server.url), public_only=True).start()
    asked: list[str] = []

    def look_up(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]

    monkeypatch.setattr(http, "look_up", look_up)
    monkeypatch.setattr(http, "is_allowed", lambda text, private: text == "127.0.0.1")
    app = good_server(seen).streamable_http_app(transport_security=TransportSecuritySettings(
        allowed_hosts=[f"mcp.example:{server.port}"]))  # fmt: skip
    server.stop()
    server._make_app = lambda: app
    server.start()
    async with McpLink(config(url=f"http://mcp.example:{server.port}/mcp"), public_only=True) as link:
        assert said(await link.call("echo", {"text": "by name"})) == "by name"
    assert set(asked) == {"mcp.example"}


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (None, r"its name cannot be looked up now \(DNS failure or timeout\)"),
        (socket.gaierror(socket.EAI_AGAIN, "again"), r"its name cannot be looked up now \(DNS failure or timeout\)"),
        (socket.gaierror(socket.EAI_NONAME, "unknown"), "its name has no address"),
    ],
)
async def test_a_name_that_cannot_be_looked_up(
    failure: OSError | None, message: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()

    def look_up(host: str, port: int) -> list[str]:
        if failure is not None:
            raise failure
        done.wait()
        return []

    monkeypatch.setattr(http, "look_up", look_up)
    monkeypatch.setattr(http, "_RESOLVE_SECONDS", 0.05)
    try:
        with pytest.raises(McpServerError, match=message):
            await McpLink(config(url="http://mcp.example/mcp"), public_only=True).start()
    finally:
        done.set()


async def test_a_good_server(good: Any, config: Config, era: str) -> None:
    async with McpLink(config(url=good.url)) as link:
        assert (link.transport, link.protocol_version, link.instructions) == ("http", era, "Be good.")
        assert {"echo", "slow", "large"} <= set(link.tools)
        outputs = await asyncio.gather(*(link.call("echo", {"text": str(n)}) for n in range(20)))
        assert [said(output) for output in outputs] == [str(n) for n in range(20)]
        failed = await link.call("fail", {})
        assert failed.is_error
        assert "fail" in said(failed)
        wrong = await link.call("echo", {"wrong": 1})
        assert wrong.is_error
        assert (await link.call("numbers", {})).structured == {"one": 1}
        steps: list[float] = []
        await link.call("slow", {"seconds": 0.1}, report=lambda progress: steps.append(progress.progress))
        assert steps == sorted(steps)
        assert len(steps) > 5
    assert link.state == "closed"


async def test_headers_and_credentials_are_sent(serve: Serve, config: Config, seen: Seen) -> None:
    server = serve(lambda: scripted_app("plain", seen))
    async with McpLink(config(url=server.url, headers={"X-Key": "secret-1"}, auth="secret-2")):
        pass
    assert {(seen["x-key"], seen["authorization"]) for seen in seen.headers} == {("secret-1", "Bearer secret-2")}
    seen.headers.clear()
    async with McpLink(config(url=server.url.replace("//", "//me:pass-word@") + "?key=secret-3")) as link:
        pass
    assert {seen["authorization"] for seen in seen.headers} == {"Basic bWU6cGFzcy13b3Jk"}
    assert "secret" not in repr(link.log_lines()) + repr(link.error)


async def test_a_server_that_is_not_there(config: Config) -> None:
    link = McpLink(config(url="http://me:pass-word@127.0.0.1:9/mcp?key=secret-3"))
    with pytest.raises(McpServerError, match=r"nothing answers at http://127\.0\.0\.1:9/mcp") as failure:
        await link.start()
    assert not_cancelled()
    assert "secret" not in str(failure.value) + repr(link.log_lines())
    assert "pass-word" not in str(failure.value) + repr(link.log_lines())


async def test_a_server_killed_in_a_call(
    good: Any, config: Config, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with McpLink(config(url=good.url)) as link:
        call = asyncio.create_task(link.call("slow", {"seconds": 20}))
        await until(lambda: seen.calls == 1)
        await asyncio.to_thread(good.stop)
        with pytest.raises((ToolUnavailableError, ToolError)) as failure:
            await call
        assert not_cancelled()
        assert call.cancelling() == 0
        assert "test" in str(failure.value)
        monkeypatch.setattr("candle_vllm.responses.mcp.link.CALL_WAIT", 0.5)
        with pytest.raises(ToolUnavailableError):
            await link.call("echo", {"text": "x"})
        good.start()
        await until(lambda: link.state == "ready" and link.reconnects == 1)
        assert said(await link.call("echo", {"text": "again"})) == "again"
        assert seen.calls == 2  # the slow one was not made again


async def test_a_call_that_waited_for_its_turn_is_made_on_the_next_connection(good: Any, config: Config) -> None:
    async with McpLink(config(url=good.url)) as link:
        link._calls = asyncio.Semaphore(0)
        waiting = asyncio.create_task(link.call("echo", {"text": "later"}))
        await asyncio.sleep(0)
        assert link._supervisor.connection is not None
        await link._supervisor.connection.close()
        link._calls.release()
        assert said(await waiting) == "later"
        assert link.reconnects == 1


async def test_a_server_gone_while_idle(good: Any, config: Config) -> None:
    async with McpLink(config(url=good.url)) as link:
        await asyncio.to_thread(good.stop)
        with pytest.raises(ToolUnavailableError, match="MCP server 'test'"):
            await link.call("echo", {"text": "x"})
        assert not_cancelled()
        good.start()
        await until(lambda: link.state == "ready" and link.reconnects >= 1)
        assert said(await link.call("echo", {"text": "again"})) == "again"


async def test_a_server_that_was_restarted_while_idle(good: Any, config: Config, seen: Seen) -> None:
    async with McpLink(config(url=good.url)) as link:
        await asyncio.to_thread(good.stop)
        good.start()
        assert said(await link.call("echo", {"text": "again"})) == "again"
        assert seen.calls == 1
        assert not_cancelled()


async def test_a_server_that_answers_400_to_a_session_it_does_not_know(
    serve: Serve, config: Config, seen: Seen
) -> None:
    server = serve(lambda: scripted_app("forgets", seen))
    async with McpLink(config(url=server.url)) as link:
        await link.call("echo", {})
        await asyncio.to_thread(server.stop)
        server.start()
        await link.call("echo", {})
        assert (seen.calls, link.reconnects) == (2, 1)


async def test_time_and_cancellation_reach_the_server(good: Any, config: Config, seen: Seen) -> None:
    async with McpLink(config(url=good.url)) as link:
        call = asyncio.create_task(link.call("slow", {"seconds": 20}, timeout=30))
        await until(lambda: seen.calls == 1)
        await skip(30)
        with pytest.raises(ToolTimedOutError, match=r"within 30 seconds"):
            await call
        await until(lambda: seen.cancelled == 1)
        call = asyncio.create_task(link.call("slow", {"seconds": 20}))
        await until(lambda: seen.calls == 2)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: seen.cancelled == 2)
        assert said(await link.call("echo", {"text": "x"})) == "x"
        assert link.reconnects == 0


async def test_a_close_in_the_middle_of_a_call(good: Any, config: Config, seen: Seen) -> None:
    link = McpLink(config(url=good.url))
    await link.start()
    call = asyncio.create_task(link.call("slow", {"seconds": 20}))
    await until(lambda: seen.calls == 1)
    await link.aclose()
    with pytest.raises(ToolUnavailableError):
        await call


async def test_tools_that_come_later(good: Any, config: Config, seen: Seen) -> None:
    changes: list[int] = []
    link = McpLink(config(url=good.url), on_tools_changed=lambda link: changes.append(len(link.tools)))
    async with link:
        if link.protocol_version == ERAS[1]:
            await until(lambda: seen.streams)  # it is opened beside the handshake
        await until(lambda: link.state == "ready")
        await asyncio.sleep(0.2)
        await link.call("grow", {})
        await until(lambda: "grown" in link.tools)
        assert said(await link.call("grown", {})) == "grown"
    assert changes == [changes[0], changes[0] + 1]


@pytest.mark.parametrize("json_response", [False, True])
async def test_a_reply_that_is_too_large(
    serve: Serve, config: Config, seen: Seen, era: str, json_response: bool
) -> None:
    def app() -> Any:
        app = good_server(seen).streamable_http_app(json_response=json_response)
        return app if era == ERAS[0] else legacy_only(app, seen)

    async with McpLink(config(url=serve(app).url)) as link:
        with pytest.raises(ToolError, match=r"10485760"):
            await link.call("large", {"megabytes": 11})
        assert len(said(await link.call("large", {"megabytes": 4}))) == 4 << 20
        assert link.reconnects == 0


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("large", "the reply has more than 10485760 bytes"),
        ("endless", "the reply has more than 10485760 bytes"),
        ("endless-events", "exceeded the 10485760 byte limit"),
        ("zipped", r"the reply is compressed \(gzip\)"),
        ("status", "refused the call"),
        ("no-json", "Failed to parse JSON"),
    ],
)
async def test_replies_that_cannot_be_read(serve: Serve, config: Config, seen: Seen, mode: str, message: str) -> None:
    async with McpLink(config(url=serve(lambda: scripted_app(mode, seen)).url)) as link:
        with pytest.raises(ToolError, match=message):
            await link.call("echo", {})
        assert seen.calls == 1
        assert not_cancelled()
        assert link.state == "ready"


async def test_a_server_that_does_not_accept_the_response_to_its_ping(
    serve: Serve, config: Config, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it does, the SDK sends nothing else."""
    monkeypatch.setattr(http, "_NOTICE_SECONDS", 0.2)
    async with McpLink(config(url=serve(lambda: scripted_app("pings", seen)).url)) as link:
        await link.call("echo", {})
        await until(lambda: link.state == "ready" and link.reconnects == 1)
        await link.call("echo", {})
    assert seen.calls == 2


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("401", "answered 401: it needs credentials"),
        ("403", "answered 403: it needs credentials"),
        ("404", "answered 404: there is no MCP server at this path"),
        ("405", "answered 405: there is no MCP server at this path"),
        ("500", "answered with HTTP status 500"),
        ("html", "text/html"),
        ("redirect", r"Redirect to http://elsewhere\.invalid/mcp not followed|HTTP status 307"),
        ("hang", r"within 0\.5 seconds"),
    ],
)
async def test_addresses_that_are_no_server(serve: Serve, config: Config, seen: Seen, mode: str, why: str) -> None:
    server = serve(lambda: scripted_app(mode, seen))
    with pytest.raises(McpServerError, match=why):
        await McpLink(config(url=server.url, connect_timeout=0.5 if mode == "hang" else PATIENCE)).start()
    assert not_cancelled()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the SDK's server, which is stopped
async def test_sse_where_streamable_http_is_refused(serve: Serve, config: Config, seen: Seen) -> None:
    server = serve(lambda: good_server(seen).sse_app(), "/sse")
    async with McpLink(config(url=server.url)) as link:
        assert (link.transport, link.protocol_version) == ("sse", ERAS[0])
        assert said(await link.call("echo", {"text": "over SSE"})) == "over SSE"
        with pytest.raises(ToolUnavailableError, match="1048576 byte limit"):
            await link.call("large", {"megabytes": 2})
        await until(lambda: link.state == "ready" and link.reconnects == 1)
        call = asyncio.create_task(link.call("slow", {"seconds": 20}))
        await until(lambda: seen.calls == 2)
        await asyncio.to_thread(server.stop)
        with pytest.raises(ToolUnavailableError):
            await call
        server.start()
        assert said(await link.call("echo", {"text": "again"})) == "again"
    with pytest.raises(McpServerError, match="405"):
        await McpLink(config(url=server.url, transport="http")).start()
    async with McpLink(config(url=server.url, transport="sse")) as link:
        assert link.transport == "sse"
    gc.collect()


@pytest.mark.parametrize("sent", [True, False])
@pytest.mark.parametrize(("refused", "error"), [("tools/list", McpServerError), ("tools/call", ToolUnavailableError)])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the SDK's server, which is stopped
async def test_a_message_that_an_sse_server_refuses(
    serve: Serve, config: Config, seen: Seen, monkeypatch: pytest.MonkeyPatch, refused: str,
    error: type[Exception], sent: bool,
) -> None:  # fmt: skip
    """The SDK sends nothing more over such a connection: each later call would only run into its time limit."""
    server = serve(lambda: refusing(good_server(seen).sse_app(), refused if sent else "", seen), "/sse")
    send = httpx2.AsyncHTTPTransport.handle_async_request

    async def failing(self: httpx2.AsyncHTTPTransport, request: httpx2.Request) -> httpx2.Response:
        if not sent and not seen.refused and f'"{refused}"'.encode() in request.content:
            seen.refused = True
            raise httpx2.ReadError("it broke off", request=request)
        return await send(self, request)

    monkeypatch.setattr(httpx2.AsyncHTTPTransport, "handle_async_request", failing)
    link = McpLink(config(url=server.url, transport="sse"))
    if refused == "tools/call":
        await link.start()
    with pytest.raises(error, match=r"answered with HTTP status 507|it broke off"):
        await (link.call("echo", {"text": "lost"}) if refused == "tools/call" else link.start())
    await link.start()
    assert said(await link.call("echo", {"text": "again"})) == "again"
    await link.aclose()
    gc.collect()


async def test_a_server_of_this_process(config: Config, seen: Seen) -> None:
    async with McpLink(config(url="http://unused.invalid"), server=good_server(seen)) as link:
        assert (link.transport, link.protocol_version) == ("in process", "2026-07-28")
        assert said(await link.call("echo", {"text": "x"})) == "x"
        call = asyncio.create_task(link.call("slow", {"seconds": 20}, timeout=30))
        await until(lambda: seen.calls == 2)
        await skip(30)
        with pytest.raises(ToolTimedOutError):
            await call
        await until(lambda: seen.cancelled == 1)
