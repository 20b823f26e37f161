"""What a server process does while its model loads, and when it cannot be loaded."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

TESTS = str(Path(__file__).parent)
SCRIPT = """
import sys
sys.path.append({tests!r})
from server_fakes import FakeLoader
from candle_vllm.core.errors import ModelLoadError
from candle_vllm.server import serve
from candle_vllm.server.cli import main
loader = FakeLoader(seconds={seconds})
if {fails}:
    loader.broken = dict.fromkeys(["SmolLM2-135M-Instruct.Q4_1"], ModelLoadError("it is damaged"))
serve.ModelLoader = lambda metrics: loader
status = main({arguments!r})
sys.stderr.write("loaded %d closed %s\\n" % (len(loader.engines), [engine.closed for engine in loader.engines]))
sys.exit(status)
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _starting(folder: Path, port: int, seconds: float, *, fails: bool = False) -> Iterator[subprocess.Popen[str]]:
    arguments = ["--p", str(port)]
    script = SCRIPT.format(tests=TESTS, seconds=seconds, fails=fails, arguments=arguments)
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def _ready(port: int) -> int:
    """Status of /ready, once the server answers at all."""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False) as client:
        end = time.monotonic() + 60
        while True:
            try:
                assert client.get("/health").status_code == 200
                return client.get("/ready").status_code
            except httpx.TransportError:
                assert time.monotonic() < end, "the server does not answer"
                time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_loads_ends_the_server_in_peace(tmp_path: Path, number: signal.Signals) -> None:
    port = _free_port()
    with _starting(tmp_path, port, 3) as process:
        assert _ready(port) == 503
        process.send_signal(number)
        out, error = process.communicate(timeout=30)
    assert process.returncode == 0, error
    assert "Traceback" not in error
    assert out == ""


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_reason(tmp_path: Path) -> None:
    with _starting(tmp_path, 0, 0.0, fails=True) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "candle-vllm: error: it is damaged" in error
    assert "Traceback" not in error
