# SPDX-License-Identifier: MIT
"""serve: addresses are taken before the model loads, signals drain, Unix sockets are cleaned up."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx
import msgspec
import pytest

from candle_vllm.core.engine.stats import EngineStats
from candle_vllm.core.errors import NotReadyError
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.server import serve as serve_module
from candle_vllm.server.app import create_app
from candle_vllm.server.serve import banner, bind, serve
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry
from candle_vllm.server.settings.configuration import Configuration
from candle_vllm.server.settings.options import UsageError
from packages.server.tests.forks import Forked
from packages.server.tests.server_fakes import FakeLoader, PacedEngine
from tests.waiting import wait_for

ROOT = str(Path(__file__).parents[3])
SCRIPT = """
import logging, sys, time
sys.path.insert(0, {root!r})
from packages.server.tests.server_fakes import PacedEngine
from candle_vllm.server import serve
from candle_vllm.server.cli import main
from candle_vllm.server.models.loader import serve_engine
class Engine(PacedEngine):
    def close(self):
        time.sleep({closing})
        super().close()
engine = Engine(["a"] * {pieces}, pause=0.02, max_model_len=1 << 21)
class Loader(serve.ModelLoader):
    def check(self, entry, beside):
        pass
    def __call__(self, entry, beside):
        return serve_engine(engine, entry, self._metrics)
serve.ModelLoader = Loader
class Hurry(logging.Handler):
    def emit(self, record):
        engine.pause = {hurried}
logging.getLogger("candle_vllm.server.drain").addHandler(Hurry())
status = main({arguments!r})
sys.stderr.write("aborted %d closed %s\\n" % (len(engine.aborted), engine.closed))
sys.exit(status)
"""
BODY = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}


def test_a_port_in_use_is_found_before_the_model_loads() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        settings = Settings(port=other.getsockname()[1])
        configuration = Configuration(settings, settings, Catalogue([ModelEntry("m", settings)]), ())
        loader = FakeLoader()
        with pytest.raises(NotReadyError, match=r"port \d+ on 127.0.0.1 is in use: .* choose another --port"):
            serve(configuration, loader)
        assert loader.loads == []


def test_a_second_server_on_the_port_is_refused_while_the_first_one_loads() -> None:
    with bind(Settings(port=0).address) as listener:
        address = Settings(port=listener.getsockname()[1]).address
        with pytest.raises(NotReadyError, match="is in use"):
            bind(address).close()


def test_a_second_server_on_the_unix_socket_is_refused_while_the_first_one_loads(tmp_path: Path) -> None:
    address = Settings(host=f"unix://{tmp_path / 's.sock'}").address
    with bind(address), pytest.raises(NotReadyError, match="another server listens"):
        bind(address).close()


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(NotReadyError, match="cannot listen on"):
        bind(Settings(host="192.0.2.1").address)
    with pytest.raises(UsageError, match="is not an address of this machine"):
        bind(Settings(host="no-such-host.invalid").address)


def test_grammars_are_made_ready_once_the_first_answers_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a second of the interpreter, which whoever asks at once would wait for."""
    monkeypatch.setattr(serve_module, "WARM_UP_AFTER", 0.01)
    seen: list[str] = []

    class Busy(PacedEngine):
        def stats(self) -> EngineStats:
            seen.append("asked")
            return msgspec.structs.replace(super().stats(), num_running=int(len(seen) < 4))

        def check_structured_outputs(self, params: StructuredOutputsParams) -> None:
            seen.append("made")

    serve_module._warm_up(Busy())
    wait_for(lambda: "made" in seen)
    assert seen == ["asked"] * 4 + ["made"]


_WARMING = """
import sys, threading, time
sys.path.insert(0, {root!r})
from packages.server.tests.server_fakes import PacedEngine
from candle_vllm.server import serve
begun, ends = threading.Event(), threading.Event()
class Slow(PacedEngine):
    def check_structured_outputs(self, params):
        print("begun", flush=True)
        begun.set()
        ends.wait()
        time.sleep(0.3)
        print("made", flush=True)
serve.WARM_UP_AFTER = {after}
serve._warm_up(Slow())
if {after} < 1:
    begun.wait()
print("ends", flush=True)
ends.set()
"""


@pytest.mark.parametrize(("after", "said"), [(0.01, ["begun", "ends", "made"]), (600.0, ["ends"])])
def test_the_end_of_the_process_waits_for_grammars_that_are_made_and_makes_no_more(
    after: float, said: list[str]
) -> None:
    """A thread that is left within compiled code when the interpreter ends may end it by a signal."""
    done = subprocess.run(
        [sys.executable, "-c", _WARMING.format(root=ROOT, after=after)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == said


def test_ipv6() -> None:
    with bind(Settings(host="[::1]:0").address) as listener:
        assert listener.family == socket.AF_INET6


def test_localhost_is_the_ipv4_address(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0] for host in ("::1", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with bind(Settings(host="localhost", port=0).address) as listener:
        assert listener.family == socket.AF_INET


def test_unix_sockets(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    address = Settings(host=f"unix://{path}").address
    bind(address).close()  # leaves the file behind, as a crash would
    assert path.exists()
    with bind(address) as listener:
        listener.listen()
        with pytest.raises(NotReadyError, match="another server listens"):
            bind(address)
        serve_module._remove_socket(address)  # as a server that drained while this one was started
        assert path.exists()
    serve_module._remove_socket(address)
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(UsageError, match="is not a socket"):
        bind(address)
    serve_module._remove_socket(address)
    assert path.read_text() == "precious"


REDIS = "redis://me:word@box:6379/0"


def test_the_banner_says_where_and_what() -> None:
    settings = Settings(host="0.0.0.0", api_key=("k",), served_model_name=("n",))
    text = banner(create_app(PacedEngine(), settings), settings.address)
    for part in ("http://127.0.0.1:2000/v1", "n (scripted", "required", "Ctrl+C to stop", "tokens"):
        assert part in text


def test_the_banner_of_a_unix_socket_has_no_urls() -> None:
    settings = Settings(host="unix:///tmp/s.sock", ui_server=True)
    text = banner(create_app(PacedEngine(), settings), settings.address)
    assert "unix:///tmp/s.sock" in text
    assert "/v1" not in text
    assert "web UI" not in text


def test_the_banner_says_what_was_asked_for() -> None:
    settings = Settings(
        ollama_port=11434, enable_lora=True, lora_modules=("a=./a",), requests_per_minute=5, prompt_cache_url=REDIS,
        speculative_config={"method": "draft_model", "model": "org/small"}, responses_store="sqlite",
        tensor_parallel_size=2,
    )  # fmt: skip
    plain = banner(create_app(PacedEngine(), Settings()), settings.address)
    text = banner(create_app(PacedEngine(), settings), settings.address)
    for name, part in (
        ("drafts", "draft_model, by org/small"), ("adapters", "a"), ("ranks", "2"), ("prompt cache", "redis://box:6379/0"),
        ("responses", "sqlite"), ("limits", "5 requests a minute"), ("Ollama's port", "11434"),
    ):  # fmt: skip
        assert f"{name:15}  {part}\n" in text
        assert f"\n{name}" not in plain


def test_the_banner_is_one_object_where_the_log_is_json() -> None:
    settings = Settings(log_format="json", ui_server=True)
    line = banner(create_app(PacedEngine(), settings), settings.address)
    fields = json.loads(line)
    assert line.count("\n") == 1
    assert (fields["message"], fields["level"], fields["address"]) == ("ready", "INFO", "http://127.0.0.1:2000")
    assert fields["web_ui"] == "http://127.0.0.1:2000/"


@contextmanager
def _process(
    *arguments: str, pieces: int = 50, hurried: float = 0.02, closing: float = 0, cwd: Path
) -> Iterator[tuple[Forked, IO[str], str]]:
    """A server process on a scripted engine, its standard error, and its base URL.

    `hurried` is the engine's pause in seconds once the server says that it waits for answers; before, it is 0.02.
    `closing` is the time in seconds that the engine takes to close.
    """
    script = SCRIPT.format(
        root=ROOT, pieces=pieces, hurried=hurried, closing=closing, arguments=["--p", "0", *arguments]
    )
    (out, write_out), (error, write_error) = os.pipe(), os.pipe()
    with open(out) as stdout, open(error) as stderr:
        try:
            with open(os.devnull) as nothing:
                process = Forked(script, (nothing.fileno(), write_out, write_error), cwd, os.environ)
        finally:
            os.close(write_out)
            os.close(write_error)
        try:
            url = ""
            for line in stdout:
                if line.startswith("address"):
                    url = line.split()[1]
                if line.startswith("Ctrl+C"):
                    break
            assert url, stderr.read()
            yield process, stderr, url
        finally:
            process.kill()
            process.wait()


def _client(url: str) -> httpx.Client:
    transport = httpx.HTTPTransport(uds=url.removeprefix("unix://")) if url.startswith("unix") else None
    base = "http://unix" if transport else url
    return httpx.Client(base_url=base, transport=transport, trust_env=False, timeout=60)


def _wait_until_served(client: httpx.Client) -> None:
    def answers() -> bool:
        with contextlib.suppress(httpx.ConnectError):
            return client.get("/health").status_code == 200
        return False

    wait_for(answers)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_stream_finish(tmp_path: Path, number: signal.Signals) -> None:
    with _process(pieces=2000, hurried=0, cwd=tmp_path) as (process, err, url), _client(url) as client:
        _wait_until_served(client)
        with client.stream("POST", "/v1/chat/completions", json=BODY) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(number)
            rest = "".join(lines)
        assert rest.endswith("data: [DONE]")
        assert process.wait(60) == 0
        said, stopped, ended = err.read().splitlines()
        assert stopped.endswith(": stopped")
        again = "Ctrl+C again to stop now" if number == signal.SIGINT else "a second signal stops at once"
        assert said.endswith(f"finishing 1 request, up to 30 s; {again}")
        assert ended == "aborted 0 closed True"


def test_the_drain_has_a_limit(tmp_path: Path) -> None:
    with _process("--shutdown-timeout", "1", pieces=5000, cwd=tmp_path) as (process, err, url), _client(url) as client:
        _wait_until_served(client)
        with client.stream("POST", "/v1/chat/completions", json=BODY) as response:
            chunks = response.iter_bytes()
            next(chunks)
            begin = time.monotonic()
            process.send_signal(signal.SIGTERM)
            rest = b"".join(chunks).decode()
            assert process.wait(60) == 0
            assert time.monotonic() - begin > 0.9
        assert '"code":"request_aborted"' in rest.split("data: ")[-1]
        log = err.read()
        assert log.endswith("aborted 1 closed True\n")
        assert "Traceback" not in log
        assert "running task" not in log
        assert "the time limit is reached: 1 request is cancelled\n" in log


def test_a_second_signal_does_not_wait_and_the_unix_socket_goes(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with _process("--h", f"unix://{path}", pieces=5000, cwd=tmp_path) as (process, err, url), _client(url) as client:
        _wait_until_served(client)
        with client.stream("POST", "/v1/chat/completions", json=BODY) as response:
            chunks = response.iter_bytes()
            next(chunks)
            process.send_signal(signal.SIGTERM)
            assert err.readline().endswith("finishing 1 request, up to 30 s; a second signal stops at once\n")
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            second, _, _ = err.read().splitlines()
            assert second.endswith("stopping now: running requests are cancelled")
    assert not path.exists()


def test_a_second_signal_while_the_engine_closes_logs_no_traceback(tmp_path: Path) -> None:
    with _process(closing=3, cwd=tmp_path) as (process, err, url), _client(url) as client:
        _wait_until_served(client)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert err.read() == "aborted 0 closed False\n"  # the process does not wait for the engine


def test_a_whole_answer_that_is_cut_off_is_a_503(tmp_path: Path) -> None:
    with _process("--shutdown-timeout", "0", pieces=5000, cwd=tmp_path) as (process, _, url), _client(url) as client:
        _wait_until_served(client)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(client.post, "/v1/chat/completions", json={**BODY, "stream": False})
            wait_for(lambda: client.get("/load").json()["server_load"])
            process.send_signal(signal.SIGTERM)
            response = answer.result(60)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("flag", "place", "status", "message"),
    [
        ("--mailbox", "sqlite:///{}/m.sqlite", 2, "cannot open the mailbox: file is not a database"),
        ("--mailbox", "postgresql://u:p@127.0.0.1:1/d", 1, "cannot open the mailbox: connection failed"),
        ("--responses-store", "postgresql://u:p@127.0.0.1:1/d", 1, "cannot open the store of responses: connection"),
        ("--h", "192.0.2.1", 1, "cannot listen on 192.0.2.1 port 0"),
        ("--h", "unix://{}/m.sqlite", 2, "m.sqlite exists and is not a socket"),
    ],
)
def test_the_status_says_whether_the_next_start_may_succeed(
    flag: str, place: str, status: int, message: str, tmp_path: Path
) -> None:
    """A service manager starts again after status 1, and not after an error that the user has to correct."""
    (tmp_path / "m.sqlite").write_bytes(b"garbage" * 500)
    script = SCRIPT.format(
        root=ROOT, pieces=1, hurried=0, closing=0, arguments=["--p", "0", flag, place.format(tmp_path)]
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False
    )
    assert ended.returncode == status, ended.stderr
    assert "candle-vllm: error: " in ended.stderr
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def test_a_signal_lets_what_is_kept_for_a_client_that_left_be_completed(tmp_path: Path) -> None:
    mailbox = ("--mailbox", f"sqlite:///{tmp_path}/m.sqlite")
    body, headers = {**BODY, "request_id": "k"}, {"x-mailbox-mode": "on_disconnect"}
    with _process(*mailbox, cwd=tmp_path) as (process, _, url), _client(url) as client:
        with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            next(response.iter_bytes())
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    with _process(*mailbox, cwd=tmp_path) as (_, _, url), _client(url) as client:
        assert client.get("/v1/mailbox/chatcmpl-k").json()["status"] == "completed"
