# SPDX-License-Identifier: MIT
"""What a server process does while its model loads, and when it cannot be loaded."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from candle_vllm.core.testing.toy_model import write_toy_model
from tests.ports import free_port
from tests.waiting import wait_for

ROOT = str(Path(__file__).parents[3])
SCRIPT = """
import os, sys, threading
sys.path.insert(0, {root!r})
from packages.server.tests.server_fakes import FakeLoader
from candle_vllm.core.errors import ModelLoadError
from candle_vllm.server import serve
from candle_vllm.server.cli import main
loader = FakeLoader()
if {fails}:
    loader.broken = dict.fromkeys(["SmolLM2-135M-Instruct.Q4_1"], ModelLoadError("it is damaged"))
else:
    loader.gate.clear()
    threading.Thread(target=lambda: os.read(0, 1) or loader.gate.set(), daemon=True).start()
serve.ModelLoader = lambda *_, **__: loader
status = main({arguments!r})
sys.stderr.write("loaded %d closed %s\\n" % (len(loader.engines), [engine.closed for engine in loader.engines]))
sys.exit(status)
"""


@contextmanager
def _starting(folder: Path, port: int, *, fails: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A server whose model is loaded when its standard input ends, or fails to load."""
    arguments = ["--p", str(port)]
    script = SCRIPT.format(root=ROOT, fails=fails, arguments=arguments)
    command = [sys.executable, "-c", script]
    pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes, text=True, cwd=folder) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def _ready(port: int) -> int:
    """Status of /ready, once the server answers at all."""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:

        def answers() -> bool:
            with suppress(httpx.TransportError):
                return client.get("/health").status_code == 200
            return False

        wait_for(answers)
        return client.get("/ready").status_code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_loads_ends_the_server_in_peace(tmp_path: Path, number: signal.Signals) -> None:
    port = free_port()
    with _starting(tmp_path, port) as process:
        assert _ready(port) == 503
        process.send_signal(number)
        assert process.stderr is not None
        expected = "candle-vllm: stopped while SmolLM2-135M-Instruct.Q4_1 was loaded (testing, 43 %)\n"
        said = list(itertools.takewhile(lambda line: line != expected, process.stderr))  # before the loading goes on
        out, error = process.communicate(timeout=60)
    assert process.returncode == 0, [*said, error]
    assert "Traceback" not in "".join([*said, error])
    assert out == ""


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--mailbox=sqlite", "cannot write the mailbox {home}/.candle-vllm/mailbox.sqlite: "),
        ("--responses-store=sqlite", "cannot write the store of responses {home}/.candle-vllm/responses.sqlite: "),
        (
            "--mailbox=sqlite:///{home}/a/b/r.db",
            "cannot write the mailbox {home}/a/b/r.db: there is no folder {home}/a",
        ),
    ],
)
def test_a_store_that_cannot_be_written_is_told_in_one_line(option: str, said: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / ".candle-vllm").write_text("a file where a folder should be")
    arguments = ["serve", "--p", "0", "--log-level", "warning", option.format(home=home)]
    command = [sys.executable, "-m", "candle_vllm.server.cli", *arguments]
    environment = {**os.environ, "HOME": str(home)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=environment, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"candle-vllm: error: {said.format(home=home)}"), done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in home.iterdir()] == [".candle-vllm"]


# ---- Ctrl+C at any moment --------------------------------------------------------------------------------------------

AT_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from candle_vllm.server.cli import main
sys.argv[1:] = {arguments!r}
sys.exit(main())
"""
STARTED = "candle-vllm: stopped while it started\n"


@pytest.mark.one_of_each(3)
@pytest.mark.parametrize(
    ("module", "command", "said"),
    [
        ("candle_vllm.core.errors", "serve", STARTED),
        ("candle_vllm.server.settings.table", "serve", STARTED),
        ("fastapi", "serve", STARTED),
        ("candle_vllm.server.commands.chat", "chat", STARTED),
        ("candle_vllm.core.sampling.params", "generate", STARTED),
        ("tokenizers", "generate", STARTED),
        (
            "candle_vllm.core.engine.runners.recorded_runner",
            "chat",
            "candle-vllm: stopped while the model loaded (preparing the steps)\n",
        ),
    ],
)
def test_ctrl_c_amid_imports_is_one_line(module: str, command: str, said: str, toy: Path) -> None:
    arguments = [command, "--m", str(toy), *(["hi"] if command == "generate" else [])]
    script = AT_IMPORT.format(module=module, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", said)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder that loads in no time, once its kernels are there."""
    return write_toy_model(tmp_path / "toy")


@pytest.mark.one_of_each(1)
@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["generate", "hi"], 130, "candle-vllm: stopped while the model loaded ("),
        (["serve", "--p", "0"], 0, "candle-vllm: stopped while toy was loaded ("),
    ],
)
def test_ctrl_c_while_kernels_are_compiled_ends_both_processes(
    arguments: list[str], status: int, said: str, toy: Path, tmp_path: Path
) -> None:
    """LLVM must not be taken down under a thread that uses it."""
    command = [sys.executable, "-m", "candle_vllm.server.cli", *arguments, "--m", str(toy)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            wait_for(lambda: _compiled(tmp_path / "cache") >= 2 or process.poll() is not None)
            assert process.poll() is None
            helpers = _children(process.pid)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                process.kill()
    assert process.returncode == status, error
    assert error.splitlines()[-1].startswith(said)
    assert "Traceback" not in error
    wait_for(lambda: not any(_runs(helper) for helper in helpers))


_INTERRUPTED = """
import os, signal, sys
class Sender:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Sender())
from candle_vllm.server.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    "name", ["candle_vllm.server.interrupts", "contextlib", "candle_vllm.core.errors", "candle_vllm.server.settings"]
)
def test_ctrl_c_while_a_command_begins_is_one_line(name: str) -> None:
    code = "import sys\nfor name in ('contextlib', 'typing', 're'):\n    sys.modules.pop(name, None)\n"
    done = subprocess.run(
        [sys.executable, "-c", code + _INTERRUPTED.format(name=name), "config"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr in ("candle-vllm: stopped\n", "candle-vllm: stopped while it started\n")


def test_hardly_anything_is_imported_before_ctrl_c_is_heard() -> None:
    code = "import sys; before = {*sys.modules}; import candle_vllm.server.cli; print(*({*sys.modules} - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    ours = {"candle_vllm", "candle_vllm.server", "candle_vllm.server.cli"}
    assert {*done.stdout.split()} <= {*ours, "__future__"}


def _compiled(cache: Path) -> int:
    """How many kernels a first start has kept so far."""
    return sum(path.suffix != ".tmp" for path in cache.glob("candle-vllm/kernels/*/*"))


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    return [int(child) for task in tasks.glob("*/children") for child in task.read_text().split()]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_reason(tmp_path: Path) -> None:
    with _starting(tmp_path, 0, fails=True) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.splitlines()[:-1] == ["candle-vllm: error: it is damaged"]  # once, and not in the log as well
