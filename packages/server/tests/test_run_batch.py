"""run-batch: every line of a file is answered in its place, and what is wrong with one stays its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from server_fakes import PacedEngine

from candle_vllm.server.batches.lines import (
    PRIORITY,
    LineError,
    Problem,
    Result,
    answered_in_order,
    asked_here,
    failed,
    problem_of,
    read_line,
)
from candle_vllm.server.cli import main
from candle_vllm.server.commands import run_batch as module
from candle_vllm.server.http.routing import Caller, acting_for
from candle_vllm.server.models.loader import serve_engine


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> PacedEngine:
    engine = PacedEngine("abc")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(
        module, "ModelLoader", lambda metrics: lambda entry, _beside: serve_engine(engine, entry, metrics)
    )
    return engine


def request(name: Any, url: str = "/v1/completions", method: str = "POST", **body: Any) -> dict[str, Any]:
    body = {"model": "default", "prompt": "hi", "max_tokens": 3} | body
    return {"custom_id": name, "method": method, "url": url, "body": body}


def run(folder: Path, *lines: Any) -> list[dict[str, Any]]:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "in.jsonl").write_text(text, "utf-8")
    assert main(["run-batch", "-i", "in.jsonl", "--output-file", "out.jsonl"]) == 0
    return [json.loads(line) for line in (folder / "out.jsonl").read_text("utf-8").splitlines()]


def test_lines_are_answered_in_their_order(
    engine: PacedEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = {"model": "default", "messages": [{"role": "user", "content": "hi"}]}
    made = run(
        tmp_path,
        request("first"),
        {"custom_id": "second", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        "",
        "no JSON",
        request("third", max_tokens=-1),
        request("fourth", model="another"),
        {"custom_id": "fifth", "method": "POST", "url": "/v1/responses", "body": {"model": "default", "input": "hi"}},
    )
    assert [line["custom_id"] for line in made] == ["first", "second", None, "third", "fourth", "fifth"]
    assert made[0]["response"]["status_code"] == 200
    assert made[0]["response"]["body"]["choices"][0]["text"] == "abc"
    assert made[0]["error"] is None
    assert made[1]["response"]["body"]["object"] == "chat.completion"
    assert made[2]["response"] is None
    assert made[2]["error"]["code"] == "invalid_json_line"
    assert made[3]["response"]["status_code"] == 400
    assert made[3]["response"]["body"]["error"]["param"] == "max_tokens"
    assert made[3]["error"]["code"] == "invalid_value"
    assert made[4]["response"]["status_code"] == 200  # the one model answers to any name
    assert made[5]["response"]["body"]["object"] == "response"
    assert len({line["id"] for line in made}) == 6
    assert "done, 6 lines answered, 2 of them with an error" in capsys.readouterr().err


def test_keys_of_the_environment_lock_nobody_out(
    engine: PacedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANDLE_VLLM_API_KEY", "secret")
    assert run(tmp_path, request("a"))[0]["response"]["status_code"] == 200


def test_a_line_that_is_too_long_is_let_go(
    engine: PacedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_LINE_MB", 1)
    made = run(tmp_path, request("a"), request("b", prompt="x" * (3 << 20)), request("c"))
    assert [line["custom_id"] for line in made] == ["a", None, "c"]
    assert made[1]["error"]["code"] == "line_too_long"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "-i FILE is missing"),
        (["-i", "in"], "-o FILE is missing"),
        (["-i", "in", "-o", "./in"], "write the answers to another file"),
        (["-i", "https://example.com/in", "-o", "out"], "reads and writes files of this machine"),
        (["-i", "nowhere", "-o", "out"], "No such file or directory: nowhere"),
    ],
)
def test_files_that_cannot_be(
    arguments: list[str], message: str, engine: PacedEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").write_text(json.dumps(request("kept")), "utf-8")
    assert main(["run-batch", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert "kept" in (tmp_path / "in").read_text("utf-8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "code", "name"),
    [
        ([], "invalid_json_line", None),
        ({"custom_id": 1}, "missing_required_parameter", None),
        ({"custom_id": "x" * 513}, "missing_required_parameter", None),
        (request("a", method="GET"), "invalid_method", "a"),
        (request("a", url="/v1/models/unload"), "invalid_url", "a"),
        (request("a", url="/v1/embeddings"), "invalid_url", "a"),
        (request("a", stream=True), "invalid_request", "a"),
        (request("a", background=True), "invalid_request", "a"),
        ({**request("a"), "body": "x"}, "invalid_request", "a"),
        ({**request("a"), "extra": 1}, "invalid_request", "a"),
    ],
)
def test_what_is_no_request_is_named(line: Any, code: str, name: str | None) -> None:
    with pytest.raises(LineError) as caught:
        read_line(json.dumps(line).encode(), "/v1/completions")
    assert (caught.value.code, caught.value.custom_id) == (code, name)


def test_requests_of_clients_go_first() -> None:
    def priority(**body: Any) -> Any:
        return json.loads(read_line(json.dumps(request("a", **body)).encode()).body)["priority"]

    assert (priority(), priority(priority=7), priority(priority=-1)) == (PRIORITY, PRIORITY + 7, -1)


async def test_a_server_that_is_full_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = [503, 429, 200]
    seen: list[tuple[str, str]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        acting = acting_for.get()
        assert acting is not None
        seen.append((scope["path"], acting.key))
        status = statuses[len(seen) - 1]
        code = {503: "overloaded", 429: "rate_limit_exceeded"}.get(status)
        body = json.dumps({"error": {"message": "full", "code": code}} if code else {"text": "good"}).encode()
        await send({"type": "http.response.start", "status": status, "headers": [(b"retry-after", b"0")]})
        await send({"type": "http.response.body", "body": body})

    async with asked_here(app) as application:
        result = await application.answer(json.dumps(request("a")).encode(), caller=Caller("alice", "hers"))
    assert seen == [("/v1/completions", "hers")] * 3
    assert result.response is not None
    assert (result.response.status_code, bytes(result.response.body)) == (200, b'{"text": "good"}')


async def test_no_more_lines_are_held_than_asked_for() -> None:
    read = most = 0
    ended: list[bytes] = []

    async def lines() -> AsyncGenerator[bytes]:
        nonlocal read
        for number in range(100):
            read += 1
            yield b"%d" % number

    async def answer(line: bytes) -> Result:
        await asyncio.sleep(0.001 * (int(line) % 3))
        ended.append(line)
        return failed(line.decode(), "code", "message")

    given: list[str | None] = []
    async for result in answered_in_order(lines(), answer, 5):
        given.append(result.custom_id)
        most = max(most, read - len(given))
    assert given == [str(number) for number in range(100)]
    assert most < 5
    assert ended != sorted(ended, key=int)  # some were done before those in front of them


@pytest.mark.parametrize("body", [b"", b"[]", b'{"error": 1}', b'{"error": {"message": "m"}}'])
def test_errors_of_any_form_are_told(body: bytes) -> None:
    assert problem_of(body) == Problem(code="error", message="m" if b'"m"' in body else "The request failed.")
