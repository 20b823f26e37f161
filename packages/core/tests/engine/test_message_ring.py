# SPDX-License-Identifier: MIT
"""Messages to the ranks of one machine by a ring: order, content, room, and ends of every kind."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest

from candle_vllm.core.engine.ranks import message_ring
from candle_vllm.core.engine.ranks.message_ring import PIECE, SLOT_BYTES, SLOTS, MessageRing, RingLine, made_ring
from candle_vllm.core.engine.ranks.rank_line import Collect, Go, Line, LoadAdapter, Ready, Sleep, ToRank, encoded
from candle_vllm.core.engine.ranks.ranks import Ranks, _Other
from tests.waiting import PATIENCE, wait_for

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in message_ring._CALLS, reason="this system has no such ring"
)

READER = (
    "import os, socket, sys\n"
    "from candle_vllm.core.engine.ranks.message_ring import RingLine\n"
    "from candle_vllm.core.engine.ranks.rank_line import Ready, LoadAdapter, Collect, ToRank\n"
    "number, memory, rank = map(int, sys.argv[1:])\n"
    "line = RingLine(socket.socket(fileno=number), os.fdopen(memory, 'r+b', buffering=0), rank)\n"
    "assert 'torch' not in sys.modules\n"
    "line.send(Ready(0))\n"
    "try:\n"
    "    while True:\n"
    "        said = line.receive(ToRank)\n"
    "        if isinstance(said, LoadAdapter):\n"
    "            line.send(Ready(len(said.path)))\n"
    "except EOFError:\n"
    "    print('ended')\n"
)
WRITER = (
    "import socket, subprocess, sys\n"
    "from candle_vllm.core.engine.ranks.message_ring import MessageRing\n"
    "from candle_vllm.core.engine.ranks.rank_line import Collect, Line, ToRank, Ready, encoded\n"
    "ring = MessageRing(1)\n"
    "near, far = socket.socketpair()\n"
    "given = far.fileno(), ring.memory.fileno()\n"
    "reader = subprocess.Popen([sys.executable, '-c', sys.argv[1], *map(str, given), '1'], pass_fds=given)\n"
    "far.close()\n"
    "Line(near).receive(Ready)\n"
    "print(reader.pid, flush=True)\n"
    "while True:\n"
    "    ring.write(encoded(Collect()), 60)\n"
)


class Others:
    """A ring with its readers' lines, all in this process."""

    def __init__(self, count: int) -> None:
        self.ring = MessageRing(count)
        pairs = [socket.socketpair() for _ in range(count)]
        self.near = [Line(near) for near, _ in pairs]
        self.far = [RingLine(far, self.ring.memory, rank) for rank, (_, far) in enumerate(pairs, 1)]

    def tell(self, *messages: Any, patience: float = 60.0) -> None:
        for message in messages:
            self.ring.write(encoded(message), patience)

    def close(self) -> None:
        self.ring.close()
        for line in (*self.near, *self.far):
            line.socket.close()


@pytest.fixture
def others() -> Iterator[Callable[[int], Others]]:
    with contextlib.ExitStack() as stack:

        def made(count: int) -> Others:
            found = Others(count)
            stack.callback(found.close)
            return found

        yield made


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks for himself within the time of a test: who waits is woken, or the test ends."""
    monkeypatch.setattr(message_ring, "LOOK", 100.0)


def sized(size: int, number: int) -> LoadAdapter:
    return LoadAdapter(number, random.Random(number).randbytes(size).hex()[:size])


SIZES = [0, 1, 7, 3600, PIECE - 9, PIECE - 8, PIECE - 7, PIECE, PIECE + 1, 2 * PIECE, 5 * PIECE + 3]
LONG = (SLOTS + 3) * PIECE + 5


@pytest.mark.usefixtures("patient")
def test_all_read_all_in_order_however_slow_and_long(others: Callable[[int], Others]) -> None:
    """Seven readers that sleep, one of which is slow, and messages of all sizes, the longest longer than the ring."""
    told = others(7)
    sizes = [*SIZES, *[random.Random(1).choice(SIZES[:5]) for _ in range(3 * SLOTS)], LONG, 0, *SIZES]
    messages: list[Any] = [sized(size, number) for number, size in enumerate(sizes)]
    messages[3:3] = [Collect(), Go(), Sleep(2)]

    def read(line: RingLine) -> bool:
        for message in messages:
            if line is told.far[3]:
                time.sleep(0.002)
            if line.receive(ToRank) != message:
                return False
        return True

    with ThreadPoolExecutor(7) as pool:
        found = [pool.submit(read, line) for line in told.far]
        told.tell(*messages)
        assert all(each.result(60) for each in found)


@pytest.mark.usefixtures("patient")
def test_who_sleeps_is_woken_by_one_call_of_the_writer(
    others: Callable[[int], Others], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = others(7)
    ring, calls = told.ring._ring, list[tuple[int, ...]]()
    calling = ring._calling
    monkeypatch.setattr(ring, "_calling", lambda *given: calls.append(given) or calling(*given))
    with ThreadPoolExecutor(7) as pool:
        for number in range(20):
            found = [pool.submit(line.receive, ToRank) for line in told.far]
            time.sleep(0.01)
            told.tell(sized(100, number))
            assert all(each.result(60) == sized(100, number) for each in found)
    assert len(calls) == 20
    assert {each[3] for each in calls} == {1}


def test_what_is_not_read_is_not_overwritten(others: Callable[[int], Others]) -> None:
    told = others(2)
    messages = [sized(100, number) for number in range(SLOTS + 1)]
    told.tell(*messages[:-1])
    assert all(told.far[0].receive(ToRank) == message for message in messages[:-1])
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="rank 2 has not read the messages sent to it"):
        told.tell(messages[-1], patience=0.2)
    assert time.monotonic() - began >= 0.2
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(told.tell, messages[-1])
        time.sleep(0.05)
        assert not waiting.done()
        assert told.far[1].receive(ToRank) == messages[0]
        waiting.result(60)
    assert [told.far[1].receive(ToRank) for _ in messages[1:]] == messages[1:]
    assert told.far[0].receive(ToRank) == messages[-1]


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("who", ["writer", "reader"])
def test_who_waits_when_it_ends_goes_on_at_once(who: str, others: Callable[[int], Others]) -> None:
    told = others(1)
    with ThreadPoolExecutor(1) as pool:
        if who == "writer":
            told.tell(*[Collect()] * SLOTS)
            waiting = pool.submit(told.tell, Collect())
        else:
            waiting = pool.submit(told.far[0].receive, ToRank)
        time.sleep(0.05)
        assert not waiting.done()
        told.near[0].end()
        wait_for(lambda: told.ring.end() or waiting.done())  # again where it had not quite begun to wait
        with pytest.raises(BrokenPipeError if who == "writer" else EOFError):
            waiting.result()
    with pytest.raises(BrokenPipeError):
        told.tell(Collect())


def test_what_was_told_before_the_end_is_read(others: Callable[[int], Others]) -> None:
    told = others(1)
    messages = [sized(10, 1), sized(2 * PIECE, 2)]
    told.tell(*messages)
    told.near[0].end()
    assert [told.far[0].receive(ToRank) for _ in messages] == messages
    with pytest.raises(EOFError):
        told.far[0].receive(ToRank)


def test_a_rank_of_a_process_with_many_files_waits(others: Callable[[int], Others]) -> None:
    """Its descriptors have the numbers of those of the first rank, which may have more than select(2) knows."""
    fcntl, resource = pytest.importorskip("fcntl"), pytest.importorskip("resource")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= 1100:
        pytest.skip("a process may have no such descriptor")
    told = others(1)
    line = told.far[0]
    line.socket = socket.socket(fileno=fcntl.fcntl(line.socket.detach(), fcntl.F_DUPFD_CLOEXEC, 1100))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(line.receive, ToRank)
        time.sleep(2.5 * message_ring.LOOK)
        told.tell(Collect())
        assert waiting.result(PATIENCE) == Collect()
        waiting = pool.submit(line.receive, ToRank)
        told.near[0].socket.close()
        with pytest.raises(EOFError):
            waiting.result(PATIENCE)


def test_counts_begin_anew(others: Callable[[int], Others]) -> None:
    told = others(2)
    ring, first = told.ring._ring, 2**32 - 5
    for which in range(3):
        ring._words[(message_ring._COUNTS_AT + which * message_ring._APART) // 4] = first
    told.ring._room_until = (first + SLOTS) % 2**32
    messages = [sized(number, number) for number in range(3 * SLOTS)]
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(lambda line: [line.receive(ToRank) for _ in messages], line) for line in told.far]
        told.tell(*messages)
        assert [each.result(60) for each in found] == [messages] * 2
    assert ring.count(0) == ring.count(2) == 3 * SLOTS - 5


def test_threads_tell_whole_messages(others: Callable[[int], Others]) -> None:
    told = others(1)
    each = [[sized(size, 10 * size + thread) for size in (10, 3 * PIECE, 5, 2 * PIECE)] for thread in range(3)]
    with ThreadPoolExecutor(3) as pool:
        telling = [pool.submit(told.tell, *messages) for messages in each]
        found = [told.far[0].receive(ToRank) for _ in range(12)]
        for done in telling:
            done.result(60)
    for messages in each:  # in their order, those of other threads between them
        assert [message for message in found if message in messages] == messages


def test_each_is_told_in_one_way(others: Callable[[int], Others]) -> None:
    """Ranks of this machine by the ring, those of another one over their lines, in the same bytes."""
    told = others(2)
    near, far = socket.socketpair()
    with near, far:
        ranks: Any = object.__new__(Ranks)
        here: Any = "a process"
        ranks._ring = told.ring
        ranks._others = {rank: _Other(line, line, here, "") for rank, line in enumerate(told.near, 1)}
        ranks._others[3] = _Other(Line(near, (b"one", b"two")), Line(near), None, "elsewhere")
        messages = [sized(10, 1), sized(1000, 2), Sleep(1)]
        with ThreadPoolExecutor(1) as pool:
            telling = pool.submit(lambda: [ranks.broadcast(message) for message in messages])
            for line in (*told.far, Line(far, (b"two", b"one"))):
                assert [line.receive(ToRank) for _ in messages] == messages
            telling.result(60)
        for line in told.near:
            line.end()
        for line in told.far:
            assert line.socket.recv(1) == b""


def test_what_is_no_message_is_refused(others: Callable[[int], Others]) -> None:
    told = others(1)
    told.tell(Collect())
    with pytest.raises(msgspec.ValidationError, match="Invalid value 'Collect'"):
        told.far[0].receive(Go)
    ring = told.ring._ring
    for head, following, said in (
        ((PIECE + 1, 0), None, f"announces {PIECE + 1} bytes and 0 more; at most {PIECE},"),
        ((10, 2**31), None, f"announces 10 bytes and {2**31} more; at most"),
        ((10, 20), (10, 5), "10 bytes and announces 5 more; 20 were expected"),
        ((10, 20), (0, 20), "0 bytes and announces 20 more; 20 were expected"),
    ):
        for each in filter(None, (head, following)):
            ring.set_head(ring.count(0) % SLOTS, *each)
            ring.add(0)
        with pytest.raises(ValueError, match=said):
            told.far[0].receive(ToRank)
        told = others(1)
        ring = told.ring._ring
    with pytest.raises(ValueError, match="no count of rank 2"):
        RingLine(told.far[0].socket, told.ring.memory, 2)


def test_systems_without_it_have_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with monkeypatch.context() as other:
        other.setattr(sys, "platform", "darwin")
        assert made_ring(3) is None
    with monkeypatch.context() as other:
        other.setattr(platform, "machine", lambda: "sparc64")
        assert made_ring(3) is None
    assert "sparc64" in caplog.text
    with monkeypatch.context() as other:  # an operation that the system takes and does not do
        other.setattr(message_ring, "_WAKE_OP", message_ring._WAKE)
        assert made_ring(3) is None
    assert "does not do what it should" in caplog.text


class Process:
    """A reader in a process of its own."""

    def __init__(self, ring: MessageRing, rank: int) -> None:
        near, far = socket.socketpair()
        given = far.fileno(), ring.memory.fileno()
        with far:
            command = [sys.executable, "-c", READER, *map(str, given), str(rank)]
            self.process = subprocess.Popen(command, pass_fds=given, stdout=subprocess.PIPE, text=True)
        self.line = Line(near)

    def heard(self, seconds: float = PATIENCE) -> int:
        """How long the next message was that it has read."""
        self.line.socket.settimeout(seconds)
        said: Ready = self.line.receive(Ready)
        return said.stage


@pytest.fixture
def processes() -> Iterator[tuple[MessageRing, list[Process]]]:
    ring = MessageRing(3)
    found = [Process(ring, rank) for rank in (1, 2, 3)]
    try:
        assert [each.heard() for each in found] == [0, 0, 0]
        yield ring, found
    finally:
        ring.close()
        for each in found:
            each.process.kill()
            with each.process:
                pass
            each.line.socket.close()


def test_a_rank_that_is_stopped_or_killed_holds_up_nobody_but_the_ring(
    processes: tuple[MessageRing, list[Process]],
) -> None:
    """Others read what there is room for; who goes on reads all; who waits for a dead one ends when told to."""
    ring, (first, second, third) = processes
    for stopped in (first, second, third):
        os.kill(stopped.process.pid, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            for size in range(1, SLOTS + 1):
                ring.write(encoded(sized(size, size)), 60)
            full = pool.submit(ring.write, encoded(sized(2 * PIECE, 1)), 60)
            for other in {first, second, third} - {stopped}:
                assert [other.heard() for _ in range(SLOTS)] == list(range(1, SLOTS + 1))
            assert not full.done()
            os.kill(stopped.process.pid, signal.SIGCONT)
            assert [stopped.heard() for _ in range(SLOTS)] == list(range(1, SLOTS + 1))
            full.result(PATIENCE)
        assert [each.heard() for each in (first, second, third)] == [2 * PIECE] * 3
    second.process.kill()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(lambda: [ring.write(encoded(sized(SLOT_BYTES, 1)), 60) for _ in range(SLOTS)])
        assert [first.heard(), third.heard()] == [SLOT_BYTES] * 2
        time.sleep(0.2)
        assert not writing.done()
        ring.end()
        with pytest.raises(BrokenPipeError):
            writing.result(PATIENCE)
    first.line.end()
    third.line.socket.close()
    for each in (first, third):  # what they say at the end goes nowhere, or they read the end
        each.process.wait(PATIENCE)


def test_ranks_end_with_the_first_one_however_it_goes() -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, READER], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert int(writer.stdout.readline())
        time.sleep(0.2)  # they are in the midst of it
        writer.kill()
        assert writer.stdout.read() == "ended\n"  # of the reader, whose output it is too
