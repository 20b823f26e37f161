# SPDX-License-Identifier: MIT
"""Two processes that notice when the other has gone, and strangers who are not heard."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import zmq

from candle_vllm.core import EngineConfig, EngineDeadError, ModelLoadError, ModelNotFoundError
from candle_vllm.core.progress import heard_by
from candle_vllm.core.remote import RemoteEngine, child
from candle_vllm.core.remote.process import EngineProcess
from candle_vllm.core.remote.serving import Outbox
from candle_vllm.core.remote.wire import Ended, Failed, FromChild, Greeting, Loading, Reader, encode
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
    except (FileNotFoundError, ProcessLookupError):  # it may end while it is read
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


def test_forgotten_replicas_end_with_the_interpreter_and_without_a_word(toy_model: Path) -> None:
    script = textwrap.dedent(
        f"""
        from candle_vllm.core.remote import ReplicatedEngine
        engine = ReplicatedEngine({str(toy_model)!r}, data_parallel_size=2, threads=2)
        print(*engine.pids, flush=True)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert "Traceback" not in done.stderr
    wait_for(lambda: all(gone(int(pid)) for pid in done.stdout.split()))


def test_an_interrupt_while_it_loads_ends_the_child() -> None:
    process = fake("")
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        process.greeting()
    process.close(kill=True)
    assert process._popen.returncode == -signal.SIGKILL
    process.close()


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("control.send(b'\\xc1 nonsense')", "a malformed message"),
        ("control.send(b'')", "a malformed message"),
        ("control.send(b'\\x93\\xa5ready\\x01\\x02')", "a malformed message"),
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


class Asked(threading.Event):
    """Knows whether anybody has looked whether it is set."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()

    def is_set(self) -> bool:
        self.asked.set()
        return super().is_set()

    def wait(self, timeout: float | None = None) -> bool:
        self.asked.set()
        return super().wait(timeout)


class Dying:
    """A child's engine that fails as soon as it is there."""

    def __init__(self, _: EngineConfig, outbox: Outbox) -> None:
        self._outbox = outbox

    def __enter__(self) -> None:
        self._outbox.fail(EngineDeadError("last words"))

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("loaded", [False, True])
def test_a_child_that_has_failed_lives_until_it_is_told_to_end(
    loaded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its parent may notice its end before what it said last has arrived, and would say something else."""
    if loaded:
        monkeypatch.setattr("candle_vllm.core.remote.serving.ChildEngine", Dying)
        monkeypatch.setattr(child, "describe", lambda _: Loading(what="it", done=1, total=1, unit=""))
    config = EngineConfig(model=str(tmp_path / "nowhere"), offline=True).plain()
    end, status = child.EndRequest(), list[int]()
    end.ended = asked = Asked()
    with zmq.Context() as context, contextlib.ExitStack() as stack:

        def pair(name: str) -> tuple[Any, Any]:
            here, there = (stack.enter_context(context.socket(zmq.PAIR)) for _ in range(2))
            here.bind(f"inproc://{name}")
            there.connect(f"inproc://{name}")
            return here, there

        (control, its_control), (steps, its_steps) = pair("control"), pair("steps")
        thread = threading.Thread(target=lambda: status.append(child.serve(config, its_control, its_steps, end)))
        thread.start()
        try:
            wait_for(lambda: asked.asked.is_set() or not thread.is_alive())
            assert status == []
            heard = map(Reader(FromChild if loaded else Greeting).read, iter((steps if loaded else control).recv, None))
            last = next(message for message in heard if not isinstance(message, Loading))
        finally:
            end.note()
            thread.join()
            end.bell.close()
    assert isinstance(last, Ended if loaded else Failed)
    assert status == [0 if loaded else 1]


def test_a_child_that_has_failed_is_ended_by_who_hears_it(tmp_path: Path) -> None:
    config = EngineConfig(model=str(tmp_path / "nowhere"), offline=True)
    process = EngineProcess(config)
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        RemoteEngine.__new__(RemoteEngine)._load(config, process)
    assert process._popen.returncode == -signal.SIGKILL


async def test_a_message_that_makes_no_sense_ends_the_engine(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = RemoteEngine(str(toy_model), threads=1)
    try:
        stream = engine.stream([1, 2, 3])
        await anext(stream)
        monkeypatch.setattr(engine._process, "received", lambda _most: [b"\xc1 nonsense"])
        with pytest.raises(EngineDeadError, match="a malformed message"):
            async for _ in engine.stream([1, 2, 3]):
                pass
        assert not engine.is_alive
        assert "a malformed message" in caplog.text
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
            wait_for(lambda: caplog.text.count("the engine did not send it") == 10)
        finally:
            context.destroy(linger=0)
        assert engine.is_alive
        engine._thread._commands.append(lambda: engine._process.send(b"\xc1 nonsense"))
        engine._link.wake()
        wait_for(lambda: not engine.is_alive)
        with pytest.raises(EngineDeadError, match="exit status 1"):
            engine.stream([1, 2, 3])
    assert caplog.text.count("the engine did not send it") == 10


async def test_a_stopped_process_is_ended_and_so_are_its_requests(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("candle_vllm.core.remote.process._SILENCE", 5.0)
    with RemoteEngine(str(toy_model), threads=1) as engine:
        await engine.agenerate([1, 2, 3])
        os.kill(engine.pid, signal.SIGSTOP)
        with pytest.raises(EngineDeadError, match="has not responded for 5 s"):
            await asyncio.wait_for(engine.agenerate([1, 2, 3]), 60)
        wait_for(lambda: gone(engine.pid))


def test_a_process_that_is_stopped_while_it_loads_is_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("candle_vllm.core.remote.process._SILENCE", 5.0)
    process = fake(f"control.send({encode(Loading(what='weights', done=1, total=2, unit='B'))!r})")
    try:
        stopped = heard_by(lambda _: os.kill(process.pid, signal.SIGSTOP))
        with stopped, pytest.raises(ModelLoadError, match="has not responded for 5 s"):
            process.greeting()
    finally:
        process.close(kill=True)
