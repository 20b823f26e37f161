# SPDX-License-Identifier: MIT
"""Two processes that notice when the other has gone, and strangers who are not heard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import zmq

from candle_vllm.core import EngineConfig, EngineDeadError, ModelLoadError, UnsupportedModelError
from candle_vllm.core.remote import RemoteEngine
from candle_vllm.core.remote.process import EngineProcess
from tests.waiting import wait_for

# A child that says what the last argument is once it was started, and then waits to be ended.
FAKE = textwrap.dedent(
    """
    import sys, time, zmq
    from candle_vllm.core.remote.child import connected
    from candle_vllm.core.remote.line import read_start
    start = read_start(0)
    context = zmq.Context()
    control = connected(context, b"c", start)
    exec(sys.argv[1])
    time.sleep(30)
    """
)


def fake(script: str) -> EngineProcess:
    return EngineProcess(EngineConfig(model="m"), (sys.executable, "-c", FAKE, script))


def gone(pid: int) -> bool:
    """Whether a process that is not our child has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"  # nobody here can reap it


def test_the_child_ends_when_its_parent_is_killed(toy_model: Path) -> None:
    script = textwrap.dedent(
        f"""
        import time
        from candle_vllm.core.remote import RemoteEngine
        engine = RemoteEngine({str(toy_model)!r}, threads=1)
        print(engine.pid, engine._process._folder, flush=True)
        time.sleep(60)
        """
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, folder = parent.stdout.readline().split()
        assert os.stat(folder).st_mode & 0o777 == 0o700
        parent.send_signal(signal.SIGKILL)
        parent.wait(30)
        wait_for(lambda: gone(int(pid)))
    assert not os.path.exists(folder)


def test_a_forgotten_engine_ends_with_the_interpreter(toy_model: Path) -> None:
    script = textwrap.dedent(
        f"""
        from candle_vllm.core.remote import RemoteEngine
        engine = RemoteEngine({str(toy_model)!r}, threads=1)
        print(engine.pid, engine._process._folder, flush=True)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    pid, folder = done.stdout.split()
    wait_for(lambda: gone(int(pid)))
    assert not os.path.exists(folder)


def test_an_interrupt_while_it_loads_ends_the_child() -> None:
    process = fake("")
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        process.greeting()
    process.close(kill=True)
    assert process._popen.returncode == -signal.SIGKILL
    process.close()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("control.send(b'\\xc1 nonsense')", "what is no message"),
        ("control.send(b'')", "what is no message"),
        ("control.send(b'\\x93\\xa5ready\\x01\\x02')", "what is no message"),
        ("sys.exit(3)", "exit status 3"),
    ],
)
def test_a_child_that_makes_no_sense_is_no_engine(script: str, message: str) -> None:
    process = fake(script)
    try:
        with pytest.raises(ModelLoadError, match=message):
            process.greeting()
    finally:
        process.close(kill=True)


def test_what_a_child_said_last_is_heard_though_it_has_ended() -> None:
    script = """
import os
from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.remote.wire import Failed, describe_error, encode
control.send(encode(Failed(error=describe_error(UnsupportedModelError("last words")))))
context.destroy(linger=1000)
os._exit(1)
"""
    process = fake(script)
    try:
        with pytest.raises(UnsupportedModelError, match="last words"):
            process.greeting()
    finally:
        process.close(kill=True)


async def test_a_message_that_makes_no_sense_ends_the_engine(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = RemoteEngine(str(toy_model), threads=1)
    try:
        stream = engine.stream([1, 2, 3])
        await anext(stream)
        monkeypatch.setattr(engine._process, "received", lambda _most: [b"\xc1 nonsense"])
        with pytest.raises(EngineDeadError, match="is no message"):
            async for _ in engine.stream([1, 2, 3]):
                pass
        assert not engine.is_alive
        assert "is no message" in caplog.text
        wait_for(lambda: gone(engine.pid))  # it is not left to itself
    finally:
        engine.close()


async def test_strangers_are_not_heard_and_the_child_ends_on_nonsense(
    toy_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RemoteEngine(str(toy_model), threads=1) as engine:
        context = zmq.Context()
        try:
            stranger = context.socket(zmq.DEALER)
            stranger.setsockopt(zmq.ROUTING_ID, b"c" + bytes(32))
            stranger.connect(f"ipc://{engine._process._folder}/engine")
            for _ in range(20):
                stranger.send(b"\xc1 nonsense")
            output = await engine.agenerate([1, 2, 3])
            assert output.finish_reason is not None
            wait_for(lambda: caplog.text.count("not from the engine") == 10)
        finally:
            context.destroy(linger=0)
        assert engine.is_alive
        engine._thread._commands.append(lambda: engine._process.send(b"\xc1 nonsense"))
        engine._link.wake()
        wait_for(lambda: not engine.is_alive)
        with pytest.raises(EngineDeadError, match="exit status 1"):
            engine.stream([1, 2, 3])
    assert caplog.text.count("not from the engine") == 10
