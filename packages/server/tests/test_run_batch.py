# SPDX-License-Identifier: MIT
"""run-batch: every line of a file is answered in its place, and what is wrong with one stays its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core.errors import EngineDeadError, InvalidFileError
from candle_vllm.server import serve
from candle_vllm.server.adapters import fetching
from candle_vllm.server.batches import lines as batch_lines
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
from packages.server.tests.server_fakes import PacedEngine


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> PacedEngine:
    engine = PacedEngine("abc")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(
        serve, "ModelLoader", lambda metrics, **_: lambda entry, _beside: serve_engine(engine, entry, metrics)
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
        request("third", max_tokens=-2),
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
    assert "done; lines answered: 6, with an error: 2" in capsys.readouterr().err


def test_keys_of_the_environment_lock_nobody_out(
    engine: PacedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANDLE_VLLM_API_KEY", "secret")
    assert run(tmp_path, request("a"))[0]["response"]["status_code"] == 200


def test_lines_name_adapters_as_requests_to_a_server_do(
    engine: PacedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANDLE_VLLM_HOST", "0.0.0.0")  # nobody listens: whose requests they are is known
    monkeypatch.setattr(
        serve,
        "ModelLoader",
        lambda metrics, adapters, **_: lambda entry, _beside: serve_engine(engine, entry, metrics, adapters),
    )
    for name in ("local/poems", "named"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
        (folder / "adapter_model.safetensors").write_bytes(b"x")
    flags = ["--enable-lora", "--lora-modules", "tone=named", "--lora-resolver", "local=local", "--lora-resolver", "hf",
             "--offline", "--max-loras", "4", "--lora-warmup", "tone"]  # fmt: skip
    lines = [request(name or "base", model=name or "default") for name in ("tone", "poems", "", "none")]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["run-batch", "-i", "in.jsonl", "-o", "out.jsonl", *flags]) == 0
    made = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["response"]["status_code"] for line in made] == [200, 200, 200, 404]
    used = {tuple(use.name for use in each.adapters) for each in engine.requests}
    assert used == {("tone",), ("poems",), ()}


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
        (["-i", "s3://bucket/in", "-o", "out"], "s3://bucket/in is neither a file nor an address of http:// or https"),
        (["-i", "in", "-o", "-"], "- is not a file here: name one, such as /dev/stdin or /dev/stdout"),
        (["-i", "https:///in", "-o", "out"], "is neither a file nor an address"),
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


def test_answers_of_an_earlier_run_stay_until_the_model_is_loaded(
    engine: PacedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = run(tmp_path, *(request(name) for name in "abc"))

    def refuse(entry: Any, _beside: Any) -> Any:
        raise InvalidFileError("the file is damaged")

    with monkeypatch.context() as damaged:
        damaged.setattr(serve, "ModelLoader", lambda metrics, **_: refuse)
        assert main(["run-batch", "-i", "in.jsonl", "-o", "out.jsonl"]) == 2
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == earlier
    assert len(run(tmp_path, request("d"))) == 1


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="the system has no /dev/fd")
def test_the_shell_decides_whether_a_file_is_overwritten(engine: PacedEngine, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(request("a")), "utf-8")
    (tmp_path / "out.jsonl").write_text("earlier\n", "utf-8")
    with (tmp_path / "out.jsonl").open("ab") as appended:  # as with >> out.jsonl
        assert main(["run-batch", "-i", "in.jsonl", "-o", f"/dev/fd/{appended.fileno()}"]) == 0
    assert (tmp_path / "out.jsonl").read_text("utf-8").startswith('earlier\n{"id":')


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="the system has no /dev/null")
def test_answers_may_go_to_a_device(engine: PacedEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(request("a")), "utf-8")
    assert main(["run-batch", "-i", "in.jsonl", "-o", "/dev/null"]) == 0
    assert "done; lines answered: 1, with an error: 0" in capsys.readouterr().err


class Shelf:
    """A server of files: what is read from it, what is written to it, and how it answers."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.statuses: list[int] = []  # of the next requests; 200 behind them
        self.asked: list[str] = []
        self.encoding = "identity"
        self.accepted: str | None = None
        shelf = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                shelf.accepted = self.headers["accept-encoding"]
                self._answer(shelf.files.get(self.path.partition("?")[0], b""))

            def do_PUT(self) -> None:
                data = self.rfile.read(int(self.headers["content-length"]))
                if (shelf.statuses or [200])[0] == 200:  # before the answer, behind which a test looks
                    shelf.files[self.path.partition("?")[0]] = data
                self._answer(b"")

            def _answer(self, body: bytes) -> None:
                shelf.asked.append(f"{self.command} {self.path}")
                status = shelf.statuses.pop(0) if shelf.statuses else 200
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("location", "/elsewhere")
                self.send_header("content-length", str(len(body)))
                self.send_header("content-encoding", shelf.encoding)
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # the client leaves after a status or a length it refuses
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelf]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(module, "SENDING_PAUSES", (0.01, 0.01))
    shelf = Shelf()
    thread = threading.Thread(target=shelf.server.serve_forever, daemon=True)
    thread.start()
    yield shelf
    shelf.server.shutdown()
    shelf.server.server_close()
    thread.join()


def test_files_behind_addresses(
    engine: PacedEngine, shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shelf.files["/in"] = "\n".join(json.dumps(request(name)) for name in "ab").encode()
    shelf.statuses = [200, 503]  # the first PUT comes again
    line = ["run-batch", "-i", f"{shelf.url}/in?key=secret", "-o", f"{shelf.url}/out?key=secret"]
    assert main([*line, "--output-tmp-dir", str(tmp_path)]) == 0
    assert shelf.asked == ["GET /in?key=secret", *["PUT /out?key=secret"] * 2]
    made = [json.loads(line) for line in shelf.files["/out"].splitlines()]
    assert [line["response"]["body"]["choices"][0]["text"] for line in made] == ["abc", "abc"]
    assert not list(tmp_path.glob("run-batch-*"))
    assert main(["run-batch", "-i", f"{shelf.url}/in", "-o", "out.jsonl"]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    capsys.readouterr()
    for statuses, asked in (([200, 403], 2), ([200, 503, 429, 503], 4), ([200, 307], 2)):
        shelf.statuses, shelf.asked = [*statuses], []
        assert main([*line, "--output-tmp-dir", str(tmp_path)]) == 2
        assert len(shelf.asked) == asked
        [kept] = tmp_path.glob("run-batch-*")
        said = capsys.readouterr().err
        assert f"{shelf.url}/out did not accept the answers (it answered with {statuses[-1]})\n" in said
        assert f"the answers so far are in {kept}" in said
        assert "secret" not in said
        assert len(kept.read_text().splitlines()) == 2
        kept.unlink()


@pytest.mark.parametrize("answers", [b"{}\n", b""])
def test_answers_of_a_run_that_is_interrupted_are_found(
    answers: bytes, engine: PacedEngine, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    async def interrupted(_: Any, given: Any, made: Any, load: Any) -> None:
        made.write(answers)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_run", interrupted)
    (tmp_path / "in").write_text(json.dumps(request("a")))
    assert main(["run-batch", "-i", "in", "-o", f"{shelf.url}/out", "--output-tmp-dir", str(tmp_path)]) == 130
    kept = list(tmp_path.glob("run-batch-*"))
    said = capsys.readouterr().err
    assert [path.read_bytes() for path in kept] == ([answers] if answers else [])
    assert all(f"the answers so far are in {path}" in said for path in kept)


def test_answers_whose_upload_is_interrupted_are_found(
    engine: PacedEngine, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_send", interrupted)
    (tmp_path / "in").write_text(json.dumps(request("a")))
    assert main(["run-batch", "-i", "in", "-o", f"{shelf.url}/out", "--output-tmp-dir", str(tmp_path)]) == 130
    [kept] = tmp_path.glob("run-batch-*")
    assert f"the answers so far are in {kept}" in capsys.readouterr().err


@pytest.mark.parametrize("status", [404, 302])
def test_an_address_that_cannot_be_read(
    status: int,
    engine: PacedEngine,
    shelf: Shelf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shelf.statuses = [status]
    assert main(["run-batch", "-i", f"{shelf.url}/in?key=secret", "-o", "out"]) == 2
    said = capsys.readouterr().err
    assert f"{shelf.url}/in cannot be read: it answered with {status}" in said
    assert "secret" not in said
    assert len(shelf.asked) == 1  # a redirect is not followed
    shelf.files["/in"] = b"x" * (2 << 20)
    monkeypatch.setattr(module, "MAX_INPUT_MB", 1)
    assert main(["run-batch", "-i", f"{shelf.url}/in", "-o", "out"]) == 2
    assert "is larger than 1 MB" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(fetching, "_BEGINNING", -1.0)
        patched.setattr(fetching, "_SLOWEST", 1 << 50)
        assert main(["run-batch", "-i", f"{shelf.url}/in", "-o", "out"]) == 2
    assert "bytes of it arrive in a second" in capsys.readouterr().err
    shelf.encoding = "zstd"
    assert main(["run-batch", "-i", f"{shelf.url}/in", "-o", "out"]) == 2
    assert "has a compression other than gzip" in capsys.readouterr().err
    assert shelf.accepted == "gzip"  # what is asked for is not refused
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
        (request("a", encoding_format="bytes_only"), "invalid_request", "a"),
        ({**request("a"), "body": "x"}, "invalid_request", "a"),
        ({**request("a"), "extra": 1}, "invalid_request", "a"),
    ],
)
def test_what_is_no_request_is_named(line: Any, code: str, name: str | None) -> None:
    with pytest.raises(LineError) as caught:
        read_line(json.dumps(line).encode(), "/v1/completions")
    assert (caught.value.code, caught.value.custom_id) == (code, name)


def test_a_number_beyond_all_floats_has_its_field_named() -> None:
    line = json.dumps(request("a", temperature=-7.5)).replace("-7.5", "1e400")
    with pytest.raises(LineError, match=r"^temperature has a number that is too large\.$") as caught:
        read_line(line.encode())
    assert (caught.value.code, caught.value.custom_id) == ("invalid_request", "a")


def test_requests_of_clients_go_first() -> None:
    def priority(**body: Any) -> Any:
        return json.loads(read_line(json.dumps(request("a", **body)).encode()).body)["priority"]

    assert (priority(), priority(priority=7)) == (PRIORITY, PRIORITY + 7)
    assert priority(priority=-1) == PRIORITY  # as it is, it would run together with requests of clients
    assert priority(priority=-(1 << 31)) == -(1 << 31)  # the route refuses it


REFUSALS = (
    (503, "overloaded"),
    (429, "rate_limit_exceeded"),
    (503, "model_not_ready"),
    (503, "model_sleeping"),
    (503, "request_aborted"),
    (409, "conversation_locked"),
    (503, "store_unavailable"),
    (503, "engine_dead"),
)


async def asked_for(answers: list[tuple[int, str]]) -> tuple[Result, list[tuple[str, str]]]:
    """The result of a line whose requests get these answers, and the path and the caller's key of each request."""
    seen: list[tuple[str, str]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        acting = acting_for.get()
        assert acting is not None
        status, code = answers[len(seen)]
        seen.append((scope["path"], acting.key))
        body = json.dumps({"error": {"message": "full", "code": code}} if code else {"text": "good"}).encode()
        await send({"type": "http.response.start", "status": status, "headers": [(b"retry-after", b"0")]})
        await send({"type": "http.response.body", "body": body})

    async with asked_here(app) as application:
        result = await application.answer(json.dumps(request("a")).encode(), caller=Caller("alice", "hers"))
    return result, seen


async def test_a_server_that_cannot_answer_now_is_asked_again() -> None:
    result, seen = await asked_for([*REFUSALS, (200, "")])
    assert seen == [("/v1/completions", "hers")] * (len(REFUSALS) + 1)
    assert result.response is not None
    assert (result.response.status_code, bytes(result.response.body)) == (200, b'{"text": "good"}')


@pytest.mark.parametrize(("code", "times"), [("engine_dead", 2), ("model_load_failed", 1)])
async def test_a_line_that_may_be_the_cause_of_a_failure_is_not_sent_for_ever(code: str, times: int) -> None:
    result, seen = await asked_for([(503, code)] * 20)
    assert (len(seen), result.error) == (times, Problem(code=code, message="full"))


async def test_a_line_is_not_sent_again_once_its_batch_has_expired() -> None:
    asked = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal asked
        asked += 1
        body = json.dumps({"error": {"message": "asleep", "code": "model_not_ready"}}).encode()
        await send({"type": "http.response.start", "status": 503, "headers": [(b"retry-after", b"0")]})
        await send({"type": "http.response.body", "body": body})

    async def stopped() -> tuple[str, str] | None:
        return ("batch_expired", "too late") if asked == 3 else None

    async with asked_here(app) as application:
        result = await application.answer(json.dumps(request("a")).encode(), stopped=stopped)
    assert (result.custom_id, result.response, asked) == ("a", None, 3)
    assert result.error is not None
    assert result.error.code == "batch_expired"


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


def test_each_answer_is_written_at_once(engine: PacedEngine, tmp_path: Path) -> None:
    """A process that a signal ends, as that of a container that is stopped, leaves whole lines."""
    engine.pause, seen, over = 0.1, list[int](), threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            seen.append((tmp_path / "out.jsonl").read_bytes().count(b"\n") if (tmp_path / "out.jsonl").exists() else 0)

    watching = threading.Thread(target=watch)
    watching.start()
    run(tmp_path, request("a", max_tokens=1), request("b", max_tokens=3))
    over.set()
    watching.join()
    assert 1 in seen


def test_the_first_ctrl_c_stops_it(engine: PacedEngine, tmp_path: Path) -> None:
    engine.pause = 1.0

    def press() -> None:
        while not engine.pausing:
            time.sleep(0.01)
        time.sleep(0.1)  # now the command waits for the answer
        os.kill(os.getpid(), signal.SIGINT)

    (tmp_path / "in").write_text(json.dumps(request("a")))
    pressing = threading.Thread(target=press)
    pressing.start()
    assert main(["run-batch", "--m", "scripted", "-i", "in", "-o", "out"]) == 130
    pressing.join()
    assert "shutting_down" not in (tmp_path / "out").read_text()


def test_batches_of_a_server_stay_that_servers(
    engine: PacedEngine, start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment may name the server's store, and the server may be stopped for this command."""
    url = f"sqlite:///{tmp_path}/kept.sqlite"
    served = PacedEngine("served", pause=0.5)
    first = start(served, responses_store=url, api_key=("key",))
    client = first.openai("key")
    lines = "\n".join(json.dumps(request(str(number), max_tokens=9)) for number in range(20))
    file = client.files.create(file=("in.jsonl", lines.encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    first.wait_for(lambda: served.requests)
    first.stop()
    engine.pause = 0.1
    monkeypatch.setenv("CANDLE_VLLM_RESPONSES_STORE", url)
    assert len(run(tmp_path, request("own"))) == 1
    client = start(PacedEngine("served"), responses_store=url, api_key=("key",)).openai("key")
    first.wait_for(lambda: client.batches.retrieve(batch.id).status not in ("validating", "in_progress", "finalizing"))
    batch = client.batches.retrieve(batch.id)
    assert (batch.status, batch.errors, batch.request_counts.completed) == ("completed", None, 20)


def test_a_run_whose_engine_dies_fails(
    engine: PacedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answers so far stay, and the other lines have no answers, rather than errors."""
    monkeypatch.setattr(batch_lines, "LONGEST_PAUSE", 0.01)

    def answer(prompt: str) -> str:
        if prompt == "last":
            engine.alive = False
            engine.submit_error = EngineDeadError("the engine has stopped")
        return "abc"

    engine._script = answer
    lines = [request("a"), request("b"), request("c", prompt="last"), *(request(str(n)) for n in range(50))]
    (tmp_path / "in").write_text("\n".join(map(json.dumps, lines)))
    assert main(["run-batch", "-i", "in", "-o", "out"]) == 1
    assert "the engine has stopped" in capsys.readouterr().err
    made = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line["custom_id"] for line in made[:2]] == ["a", "b"]
    assert [line["error"] for line in made if line["error"] is not None] == []


@pytest.mark.parametrize("body", [b"", b"[]", b'{"error": 1}', b'{"error": {"message": "m"}}'])
def test_errors_of_any_form_are_told(body: bytes) -> None:
    assert problem_of(body) == Problem(code="error", message="m" if b'"m"' in body else "The request failed.")


def test_a_file_may_begin_with_a_byte_order_mark() -> None:  # as editors of Windows write it
    line = json.dumps(request("a")).encode()
    assert read_line(b"\xef\xbb\xbf" + line) == read_line(line)


def test_a_line_that_is_not_utf8_is_named() -> None:
    with pytest.raises(LineError, match="The line is not valid UTF-8"):
        read_line(b'{"custom_id": "\xff"}')
