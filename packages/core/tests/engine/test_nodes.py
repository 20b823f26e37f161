# SPDX-License-Identifier: MIT
"""Ranks of several machines: how they join, what they answer, and what happens when one, or the way to it, goes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from candle_vllm.core import EngineConfig, InferenceEngine
from candle_vllm.core.engine.ranks import nodes, rank_line
from candle_vllm.core.engine.ranks.nodes import Invitation, RankListener, _connect
from candle_vllm.core.engine.ranks.rank_line import Go, Line, Ready, Sleep
from candle_vllm.core.errors import ConfigError, EngineDeadError, ModelLoadError
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.engine.test_ranks import GREEDY, KINDS, PROMPTS, dies, until_gone
from packages.core.tests.engine.test_ranks import USUAL as ALONE
from packages.core.tests.engine.test_ranks import engine_of as engine_alone
from packages.core.tests.models.test_sight import write_towers
from packages.core.tests.toy_sight import write_toy_sight
from tests.ports import free_port
from tests.waiting import PATIENCE, wait_for

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="several ranks need sockets that a child inherits")

KEY = "a key that all of the nodes know"
USUAL: dict[str, Any] = ALONE | {"nnodes": 2, "cluster_key": KEY, "max_model_len": 512}
SILENT = "rank 1 at 127.0.0.1 has ended (it has not responded for "
NODE = (
    "import json, sys, logging\n"
    "from candle_vllm.core import EngineConfig\n"
    "from candle_vllm.core.engine.ranks.nodes import run_node\n"
    "logging.basicConfig(level='INFO')\n"
    "sys.exit(run_node(EngineConfig(**json.loads(sys.argv[1]))))\n"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("toy"), toy_config(num_attention_heads=6, num_key_value_heads=3))


@pytest.fixture(scope="module")
def right(model: Path) -> list[tuple[int, ...]]:
    with engine_alone(model, 1) as engine:
        return tokens(engine)


def tokens(engine: InferenceEngine) -> list[tuple[int, ...]]:
    return [tuple(output.outputs[0].token_ids) for output in engine.generate(PROMPTS, GREEDY)]


class Node:
    """The second node, in a process of its own; what it has said."""

    def __init__(self, model: Path, port: int, settings: dict[str, Any]) -> None:
        given = USUAL | {"model": str(model), "node_rank": 1, "master_port": port, "tensor_parallel_size": 2} | settings
        self.process = subprocess.Popen(
            [sys.executable, "-c", NODE, json.dumps(given)], stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self._said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self._said.extend(self.process.stderr)

    @property
    def said(self) -> str:
        return "".join(self._said)

    @property
    def rank(self) -> int | None:
        """The process of its rank, where there is one."""
        pid = self.process.pid
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(found[0]) if found else None

    def end(self) -> None:
        self.process.terminate()
        assert self.process.wait(PATIENCE) in (0, nodes.REFUSED, -signal.SIGKILL)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextlib.contextmanager
def node(model: Path, port: int, **settings: Any) -> Iterator[Node]:
    found = Node(model, port, settings)
    try:
        yield found
    finally:
        found.end()


def engine_of(model: Path, port: int, **settings: Any) -> InferenceEngine:
    return InferenceEngine(str(model), **USUAL | {"tensor_parallel_size": 2, "master_port": port} | settings)


def rank_of(second: Node) -> int:
    found = second.rank
    assert found is not None
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_nodes_answer_lose_a_rank_and_come_back(model: Path, right: list[tuple[int, ...]]) -> None:
    port = free_port()
    with node(model, port) as second:
        with engine_of(model, port) as engine:
            assert tokens(engine) == right
            rank = rank_of(second)
            dies(engine, lambda: os.kill(rank, signal.SIGKILL), "rank 1 at 127.0.0.1 has ended")
        with engine_of(model, port, pipeline_parallel_size=1) as engine:  # the node has started another rank
            assert tokens(engine) == right
        wait_for(lambda: "rank 1 exit status 0); new ones wait for the first node" in second.said)  # it was not aborted


@pytest.mark.every_case
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("parallel", ["ranks", "stages"])
def test_a_rank_that_hangs_is_gone(model: Path, right: list[tuple[int, ...]], parallel: str) -> None:
    """Stopped, so that its connections stand: nothing but its silence tells of it."""
    sizes = {"tensor_parallel_size": 1, "pipeline_parallel_size": 2} if parallel == "stages" else {}
    port = free_port()
    with node(model, port, **sizes) as second, engine_of(model, port, **sizes) as engine:
        assert tokens(engine) == right
        rank = rank_of(second)
        dies(engine, lambda: os.kill(rank, signal.SIGSTOP), SILENT)
        engine.close()


@pytest.mark.every_case
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("end", ["first", "node"])
def test_whoever_dies(model: Path, right: list[tuple[int, ...]], end: str) -> None:
    port = free_port()
    script = (
        "import json, sys\n"
        "from candle_vllm.core import InferenceEngine, SamplingParams\n"
        "engine = InferenceEngine(**json.loads(sys.argv[1]))\n"
        "print('there', flush=True)\n"
        "engine.generate(['a'], SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True))\n"
    )
    given = USUAL | {"model": str(model), "tensor_parallel_size": 2, "master_port": port}
    with node(model, port) as second:
        if end == "first":
            first = subprocess.Popen(
                [sys.executable, "-c", script, json.dumps(given)], stdout=subprocess.PIPE, text=True
            )
            with first:
                assert first.stdout is not None
                assert first.stdout.readline() == "there\n"
                rank = rank_of(second)
                first.kill()
            until_gone([rank])  # and the node has another one, which waits
            with engine_of(model, port) as engine:
                assert tokens(engine) == right
            return
        with engine_of(model, port) as engine:
            rank = rank_of(second)
            dies(engine, second.process.kill, "rank 1 at 127.0.0.1 has ended")
            until_gone([rank])


class Wire:
    """Between a node and the first one: forwards until it is cut, and then nothing more, without a word."""

    def __init__(self, port: int) -> None:
        self._to, self.cut, self._over = port, threading.Event(), threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        ends: dict[socket.socket, socket.socket] = {}
        while not self.cut.is_set():
            for each in select.select([self._listener, *ends], (), (), 0.1)[0]:
                if each is self._listener:
                    near = each.accept()[0]
                    try:
                        far = socket.create_connection(("127.0.0.1", self._to), 5)
                    except OSError:
                        near.close()
                        continue
                    ends[near], ends[far] = far, near
                elif each in ends:
                    other = ends[each]
                    data = b""
                    with contextlib.suppress(OSError):
                        data = each.recv(1 << 16)
                    with contextlib.suppress(OSError):
                        if data:
                            other.sendall(data)
                            continue
                    for one in (each, other):
                        ends.pop(one)
                        one.close()
        self._over.wait(60)
        for each in (self._listener, *ends):
            each.close()

    def close(self) -> None:
        self.cut.set()
        self._over.set()
        self._thread.join()


@pytest.mark.every_case
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_link_that_is_cut(model: Path, right: list[tuple[int, ...]]) -> None:
    port = free_port()
    wire = Wire(port)
    with contextlib.closing(wire), node(model, wire.port) as second, engine_of(model, port) as engine:
        assert tokens(engine) == right
        rank = rank_of(second)
        dies(engine, wire.cut.set, SILENT)
        until_gone([rank])


@pytest.mark.every_case
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("seed", range(8))
def test_chaos(model: Path, seed: int) -> None:
    """Something goes at any moment, while the model loads as well; whoever asks is answered rightly or by an error.

    And in time: within 10 s, or 30 where a rank hangs while it loads. Then the next engine answers again.
    """
    chance = random.Random(seed)
    with engine_alone(model, 1) as engine:
        right = {kind: [o.token_ids for o in engine.generate(["a"], KINDS[kind])[0].outputs] for kind in KINDS}
    port = free_port()
    wire = Wire(port)
    how = chance.choice(["kill", "stop", "cut", "node"])
    sizes = chance.choice([{}, {"tensor_parallel_size": 1, "pipeline_parallel_size": 2}])
    hurt: list[float] = []
    another: list[Node] = []
    with contextlib.closing(wire), node(model, wire.port, **sizes) as second:
        wait_for(lambda: second.rank)

        def harm() -> None:
            time.sleep(chance.uniform(0, 8))
            hurt.append(time.monotonic())
            rank = second.rank
            if how == "cut":
                wire.cut.set()
            elif how == "node":
                second.process.kill()
            elif rank is not None:
                os.kill(rank, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
            time.sleep(9)
            another.append(Node(model, port, sizes))  # for whom the first node waits where the other had not joined yet

        harming = threading.Thread(target=harm)
        harming.start()
        loaded: bool | str = False
        try:
            if chance.random() < 0.5:
                time.sleep(1)
            with engine_of(model, port, **sizes) as engine:
                loaded = True
                while True:
                    kind = chance.choice(list(KINDS))
                    prompts = ["a"] * chance.randint(1, 4)
                    for output in engine.generate(prompts, KINDS[kind]):
                        assert [each.token_ids for each in output.outputs] == right[kind]
                    if hurt and time.monotonic() > hurt[0] + 20:  # between two ranks, where nobody was hurt
                        loaded = "unhurt"
                        break
        except (EngineDeadError, ModelLoadError, ConfigError):
            assert hurt
        over = time.monotonic()
        harming.join()
        assert over - hurt[0] < (25 if loaded == "unhurt" else 12 if loaded else 34)
    try:
        with engine_of(model, port, **sizes) as engine:
            for kind in KINDS:
                assert [o.token_ids for o in engine.generate(["a"], KINDS[kind])[0].outputs] == right[kind]
    finally:
        another[0].end()


@pytest.mark.every_case
def test_other_files_on_a_node(model: Path, tmp_path: Path) -> None:
    port = free_port()
    other = write_toy_model(tmp_path, toy_config(num_attention_heads=6, num_key_value_heads=3), seed=5)
    with node(other, port), pytest.raises(ModelLoadError, match="different files"):
        engine_of(model, port)


@pytest.mark.every_case
def test_the_first_node_alone_sees(tmp_path: Path) -> None:
    """It alone has the file of the tower."""
    files = write_towers(write_toy_sight(tmp_path / "toy", splits=False), tmp_path / "gguf")
    model, port, picture = Path(files["model"]), free_port(), np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    asked: Any = {"prompt": "See <image> now", "multi_modal_data": {"image": picture}}
    with engine_alone(model, 1, mmproj=files["mmproj"], tokenizer=files["tokenizer"]) as engine:
        right = engine.generate(asked, GREEDY)[0].outputs[0].token_ids
    with (
        node(model, port, tokenizer=str(files["tokenizer"])),
        engine_of(model, port, mmproj=files["mmproj"], tokenizer=files["tokenizer"]) as engine,
    ):
        assert engine.generate(asked, GREEDY)[0].outputs[0].token_ids == right


def test_what_a_node_was_started_with_is_checked() -> None:
    asked: dict[str, Any] = USUAL | {"model": "m", "tensor_parallel_size": 2}
    for settings, match in (
        ({"node_rank": 2}, "node_rank 2 of 2"),
        ({"node_rank": 1, "nnodes": 1}, "node_rank 1 needs nnodes"),
        ({"nnodes": 1, "master_addr": "10.0.0.1"}, "master_addr is for several nodes"),
        ({"nnodes": 1, "master_addr": "127.0.0.1", "master_port": 4000}, "master_port is for several nodes"),
        ({"cluster_key": None}, "cluster_key"),
        ({"cluster_key": "short"}, "16 characters"),
        ({"tensor_parallel_size": 3}, "cannot be divided among 2 nodes, .* set tensor_parallel_size=2 or a multiple"),
        ({"master_addr": "0.0.0.0"}, "every address"),
        ({"data_parallel_size": 2}, "replicas on several machines"),
    ):
        with pytest.raises(ConfigError, match=match):
            EngineConfig(**asked | settings)
    assert KEY not in repr(EngineConfig(**asked))


# ---- the door --------------------------------------------------------------------------------------------------------


@pytest.fixture
def door() -> Iterator[RankListener]:
    found = RankListener("127.0.0.1", 0, KEY, range(1, 2), 2, 2)
    yield found
    found.close()


def invitation(door: RankListener, **other: Any) -> Invitation:
    return msgspec.structs.replace(Invitation(door.host, door.port, KEY, 1, 2, 2, {}, (20, False)), **other)


def test_a_rank_joins_a_process_with_many_files() -> None:
    resource = pytest.importorskip("resource")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= 1200:
        pytest.skip("a process may have no such descriptor")
    with contextlib.ExitStack() as stack:
        for _ in range(1100):
            stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        door = RankListener("127.0.0.1", 0, KEY, range(1, 2), 2, 2)
        stack.callback(door.close)
        assert door._listener.fileno() >= 1024
        far = [_connect(invitation(door), side=side) for side in (False, True)]
        joined = door.everyone()[1]
        for each in (*far, joined.line, joined.side):
            each.socket.close()


class Full:
    """A listener of a process that may open no more files at its first three calls, with their times."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener, self.refused = listener, list[float]()

    def accept(self) -> tuple[socket.socket, Any]:
        if len(self.refused) < 3:
            self.refused.append(time.monotonic())
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self.listener.accept()

    def close(self) -> None:
        self.listener.close()


def test_a_rank_joins_when_files_may_be_opened_again(door: RankListener, caplog: pytest.LogCaptureFixture) -> None:
    full = Full(door._listener)
    door._listener = full
    far = [_connect(invitation(door), side=side) for side in (False, True)]
    joined = door.everyone()[1]
    assert full.refused[2] - full.refused[0] > 1.9 * nodes._GLANCE  # it waits, and does not ask as fast as it can
    assert [record.getMessage() for record in caplog.records if "accepted" in record.getMessage()] == [
        f"connections of ranks cannot be accepted: [Errno {errno.EMFILE}] {os.strerror(errno.EMFILE)}"
    ]
    for each in (*far, joined.line, joined.side):
        each.socket.close()


@pytest.mark.parametrize("error", [KeyError, OSError, ValueError])
def test_a_rank_whose_reader_fails_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: type[Exception]
) -> None:
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    monkeypatch.setattr(rank_line, "_GRACE", 0)
    monkeypatch.setattr(rank_line, "os", types.SimpleNamespace(_exit=ended.put))
    ends = [tuple(map(Line, socket.socketpair())) for _ in range(2)]

    def fail(asked: object) -> None:
        raise error("nobody expects that")

    side = rank_line.Side(ends[0][0], ends[1][0], None)
    side.read_by(fail)
    ends[0][1].send(rank_line.EndReading(0, 0))
    for _ in range(2):  # who listens and who says that it lives
        assert ended.get(timeout=PATIENCE) == 0
    assert "can no longer be asked for blocks" in caplog.text
    for pair in ends:
        for each in pair:
            each.socket.close()


def test_a_rank_joins_by_two_lines(door: RankListener) -> None:
    far, far_side = (_connect(invitation(door), side=side) for side in (False, True))
    joined = door.everyone()[1]
    joined.line.send(Go())
    assert far.receive(Go) == Go()
    far_side.send(Ready(0))
    assert joined.side.receive(Ready) == Ready(0)
    wait_for(lambda: is_closed(door))  # nobody comes in afterwards
    for end in (far, far_side, joined.line, joined.side):
        end.socket.close()


def test_a_rank_whose_connection_was_reset_is_still_returned(door: RankListener) -> None:
    """Otherwise an error of the system call would hide which rank has gone."""
    far = [_connect(invitation(door), side=side) for side in (False, True)]
    wait_for(lambda: not door._missing())
    for each in far:
        each.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        each.socket.close()
    joined = door.everyone()[1]
    assert joined.where == "127.0.0.1"
    with pytest.raises(EOFError):
        joined.line.receive(Ready)
    joined.line.socket.close()
    joined.side.socket.close()


def test_an_address_can_be_listened_on_again_at_once() -> None:
    port = free_port()
    for _ in range(3):
        RankListener("127.0.0.1", port, KEY, range(1, 2), 2, 2).close()


def is_closed(door: RankListener) -> bool:
    try:
        socket.create_connection((door.host, door.port), 5).close()
    except OSError:
        return True
    return False


def test_a_rank_that_was_started_again_takes_the_place_of_the_first(
    door: RankListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines of two processes are never put together."""
    old = _connect(invitation(door), side=True)
    wait_for(lambda: door._found)  # it is noted behind the handshake's last message, perhaps later than the next one
    monkeypatch.setattr(nodes, "_PROCESS", b"another process")
    new = [_connect(invitation(door), side=side) for side in (False, True)]
    joined = door.everyone()[1]
    joined.side.send(Go())
    assert new[1].receive(Go) == Go()
    with pytest.raises(EOFError):
        old.receive(Go)
    for line in (old, *new, joined.line, joined.side):
        line.socket.close()


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"key": "another key than the nodes have"}, "have different keys"),
        ({"rank": 2}, "waits for ranks 1 to 1 of 2"),
        ({"size": 4}, "same nnodes"),
        ({"nodes": 3}, "same nnodes"),
    ],
)
def test_who_may_not_join(door: RankListener, other: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        _connect(invitation(door, **other), side=False)


def test_another_version_may_not_join(door: RankListener, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter(["0.0.1", nodes.version("candle-vllm-core"), nodes.version("candle-vllm-core")])
    monkeypatch.setattr(nodes, "version", lambda _: next(found))
    with pytest.raises(ConfigError, match=r"it has version 0\.0\.1"):
        _connect(invitation(door), side=False)


def test_a_first_node_that_does_not_know_the_key_is_not_believed(door: RankListener) -> None:
    """Somebody who listens in its place, and says yes to everything."""
    with socket.create_server(("127.0.0.1", 0)) as impostor:

        def run() -> None:
            end = impostor.accept()[0]
            with end:
                end.sendall(nodes._MAGIC + bytes(32))
                nodes._take(end)
                end.sendall(nodes._frame(b"\x81\xa7refusal\xa0") + bytes(32))

        threading.Thread(target=run, daemon=True).start()
        with pytest.raises(ConfigError, match="have different keys"):
            _connect(invitation(door, port=impostor.getsockname()[1]), side=False)


def test_strangers_hurt_nobody(door: RankListener) -> None:
    """Silence, noise and a flood of connections; then the rank joins as ever."""
    ends = [socket.create_connection((door.host, door.port)) for _ in range(8)]
    for number, end in enumerate(ends):
        with contextlib.suppress(OSError):
            end.sendall(bytes([number]) * number * 100)
    far, side = (_connect(invitation(door), side=side) for side in (False, True))
    (joined,) = door.everyone().values()
    for end in (*ends, far.socket, side.socket, joined.line.socket, joined.side.socket):
        end.close()


def test_strangers_that_drip_keep_no_rank_out(door: RankListener, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold all places, and the time of each is far from over."""
    monkeypatch.setattr(nodes, "_SHAKING", 600.0)
    ends, over = list[socket.socket](), threading.Event()

    def drip() -> None:
        while not over.wait(0.05):
            for end in ends:
                with contextlib.suppress(OSError):
                    end.send(b"x")

    for _ in range(nodes._AT_ONCE):
        ends.append(socket.create_connection((door.host, door.port)))
        ends[-1].sendall((1024).to_bytes(2, "little"))
    wait_for(lambda: len(door._strangers) == nodes._AT_ONCE)
    dripping = threading.Thread(target=drip, daemon=True)
    dripping.start()
    far = [_connect(invitation(door), side=side) for side in (False, True)]
    (joined,) = door.everyone().values()
    assert len(door._strangers) == nodes._AT_ONCE - 1  # one made room, and the rank needs none any more
    over.set()
    dripping.join()
    for end in (*ends, *(line.socket for line in far), joined.line.socket, joined.side.socket):
        end.close()


def test_who_makes_room_at_the_door(door: RankListener) -> None:
    """The first of the address with most places, so that many of one address take nothing from another."""
    pairs = [socket.socketpair() for _ in range(5)]
    for (end, _), address in zip(pairs, ("one", "many", "many", "two", "many"), strict=True):
        door._strangers[end] = address
    went = list[int]()
    for _ in range(2):
        before = set(door._strangers)
        door._send_one_away()
        (gone,) = before - set(door._strangers)
        went.append(next(number for number, (end, _) in enumerate(pairs) if end is gone))
        assert pairs[went[-1]][1].recv(1) == b""
    assert went == [1, 2]
    door._strangers.clear()
    for pair in pairs:
        for end in pair:
            end.close()


@pytest.mark.parametrize("who", ["first", "rank"])
def test_a_handshake_has_one_deadline_however_it_drips(
    door: RankListener, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    monkeypatch.setattr(nodes, "_SHAKING", 0.3)
    near, far = socket.socketpair()
    over, sent = threading.Event(), [0]

    def shake() -> None:
        if who == "rank":
            nodes._introduce(near, invitation(door), side=False)
        else:
            door._shake_hands(near, time.monotonic() + nodes._SHAKING)

    def drip() -> None:
        while not over.wait(0.02) and sent[0] < nodes._MOST_HELLO:
            with contextlib.suppress(OSError):
                sent[0] += far.send(nodes._MAGIC[sent[0] : sent[0] + 1] if who == "rank" else b"\x01")

    if who == "rank":
        monkeypatch.setattr(nodes, "_MAGIC", bytes(nodes._MOST_HELLO))
    dripping = threading.Thread(target=drip, daemon=True)
    dripping.start()
    with pytest.raises(TimeoutError):
        shake()
    assert sent[0] < nodes._MOST_HELLO
    over.set()
    dripping.join()
    near.close()
    far.close()


def test_a_signed_line_refuses_what_was_changed_or_sent_again() -> None:
    near, far = socket.socketpair()
    one, other = bytes(32), bytes(range(32))
    sender, receiver = Line(near, (one, other)), Line(far, (other, one))
    sender.send(Sleep(1))
    assert receiver.receive(Sleep) == Sleep(1)
    sender.send(Sleep(2))
    frame = far.recv(1 << 10)
    for wrong in (
        frame[:8] + bytes([frame[8] ^ 1]) + frame[9:],
        frame,
    ):  # the second one is right, and the first was not
        near.sendall(wrong)
        if wrong is frame:
            receiver._received = iter([2])  # type: ignore[assignment]
        with pytest.raises(ValueError, match="a frame has a wrong signature"):
            receiver.receive(Sleep)
    near.close()
    far.close()


def pretend_redis(listener: socket.socket, kept: dict[bytes, bytes]) -> None:
    """Answers the few commands by which blocks are kept and found."""

    def answer(command: list[bytes]) -> bytes:
        name = command[0].upper()
        if name == b"SET":
            kept[command[1]] = command[2]
        elif name == b"GETRANGE":
            found = kept.get(command[1], b"")
            return b"$%d\r\n%s\r\n" % (len(found), found)
        return b"+OK\r\n" if name in (b"SET", b"CLIENT") else b":1\r\n"

    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), connection, connection.makefile("rb") as asked:
            while line := asked.readline():
                parts = [asked.read(int(asked.readline()[1:]) + 2)[:-2] for _ in range(int(line[1:]))]
                connection.sendall(answer(parts))

    with contextlib.suppress(OSError):
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


@pytest.mark.every_case
def test_blocks_in_redis_whose_address_each_node_knows_itself(model: Path, right: list[tuple[int, ...]]) -> None:
    kept: dict[bytes, bytes] = {}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=pretend_redis, args=(listener, kept), daemon=True).start()
        url: dict[str, Any] = {"prompt_cache_url": f"redis://127.0.0.1:{listener.getsockname()[1]}"}
        for number in range(2):
            port = free_port()
            with node(model, port, **url), engine_of(model, port, **url) as engine:
                assert tokens(engine) == right
                assert (engine.stats().kept_blocks_read > 0) is bool(number)
        owners = {key[: len(b"candle-vllm:kv:") + 32] for key in kept}
        assert len(owners) == 2  # a rank's parts have a name of their own
        port = free_port()
        refused = "rank 1 at 127.0.0.1: prompt_cache_url is set on the first node, and not on this one"
        with node(model, port), pytest.raises(ConfigError, match=refused), engine_of(model, port, **url):
            pass
        listener.shutdown(socket.SHUT_RDWR)
