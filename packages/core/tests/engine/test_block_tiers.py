# SPDX-License-Identifier: MIT
"""Blocks in main memory behind a GPU's cache, in Redis, and in several places at once; what lies, hangs or is gone."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from candle_vllm.core import ConfigError, EngineConfig, SamplingParams
from candle_vllm.core.assembly.model import LoadedModel, load_model
from candle_vllm.core.devices import CPU
from candle_vllm.core.engine.build import build_engine, preparation_for
from candle_vllm.core.engine.cache import block_tiers as kept_blocks
from candle_vllm.core.engine.cache import redis_blocks
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.cache.block_stores import (
    BlockError,
    BlockFolder,
    BlockStore,
    Bytes,
    HostBlocks,
    Tiers,
    sealed,
)
from candle_vllm.core.engine.cache.block_tiers import OffloadedBlocks, OffloadedPrefixes
from candle_vllm.core.engine.cache.redis_blocks import RedisBlocks
from candle_vllm.core.engine.cache.states import StatePool
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners.device_inputs import DeviceLimits
from candle_vllm.core.engine.runners.device_runner import DeviceRunner
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.kernels.device_stream import Work
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.lazy_stream import LazyStream
from tests.waiting import PATIENCE, Clock, wait_for

SPEAKING = Path(__file__).parents[1] / "models/speaking/qwen3.5"
SIZE = 16  # tokens of a block
PROMPT = [3 + n * 7 % 90 for n in range(5 * SIZE + 3)]
DIGESTS = [bytes([n]) * 32 for n in range(6)]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time that blocks are waited for stands still: who waits for one that does not come waits for ever."""
    return Clock(monkeypatch, kept_blocks)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("tiers") / "toy", toy_config(head_dim=32))


def answer(engine: Engine, prompt: list[int] = PROMPT, name: str = "a", **params: Any) -> list[int]:
    chosen = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, **params)
    engine.add(engine.prepare(GenerationRequest(request_id=name, prompt_token_ids=tuple(prompt), params=chosen)))
    tokens: list[int] = []
    while engine.has_work:
        for piece in engine.step():
            assert piece.error is None
            tokens += piece.token_ids
    return tokens


@contextmanager
def running(model: Path, url: str | None, **settings: Any) -> Iterator[Engine]:
    settings = {"kv_cache_memory": 4 << 20, "threads": 1, "block_size": SIZE, **settings}
    config = EngineConfig(model=str(model), prompt_cache_url=url, **settings)
    engine = build_engine(config, load_model(config, CPU, lambda *_: None))
    try:
        yield engine
    finally:
        engine.close()


# ---- main memory, and several places ---------------------------------------------------------------------------------


def test_main_memory_is_bounded() -> None:
    store = HostBlocks(3 * 1000 + 500, 1000)
    for digest in DIGESTS[:3]:
        store.write(digest, digest[:1] * 1000)
    assert store.read(DIGESTS[0]) == DIGESTS[0][:1] * 1000  # used now
    store.write(DIGESTS[1], DIGESTS[1][:1] * 1000)  # computed again
    store.write(DIGESTS[3], bytes(1000))
    assert [store.has(digest) for digest in DIGESTS[:4]] == [True, True, False, True]
    assert store.read(DIGESTS[2]) is None
    assert store.num_bytes == 3000
    store.clear()
    assert store.num_bytes == 0
    with pytest.raises(ConfigError, match="is too small for one block") as caught:
        HostBlocks(999, 1000)
    assert caught.value.setting == "kv_offloading_size"


class Failing(HostBlocks):
    """Has everything, and gives nothing."""

    def may_have(self, digest: bytes) -> bool:
        return True

    def read(self, digest: bytes) -> Bytes | None:
        raise BlockError("gone")

    def write(self, digest: bytes, data: Bytes) -> None:
        raise OSError("full")


def test_what_is_found_further_away_comes_nearer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    near, far = HostBlocks(5000, 1000), BlockFolder(tmp_path / "kept", "a", 1 << 20, 1000)
    tiers: BlockStore = Tiers([near, Failing(5000, 1000), far])
    tiers.write(DIGESTS[0], bytes(1000))  # somebody took it
    assert "to one of several tiers: full" in caplog.text
    with pytest.raises(OSError, match="full"):
        Tiers([Failing(5000, 1000)]).write(DIGESTS[0], bytes(1000))
    assert (near.has(DIGESTS[0]), far.has(DIGESTS[0]), tiers.has(DIGESTS[0])) == (True, True, False)
    near.clear()
    assert tiers.read(DIGESTS[0]) == bytes(1000)
    assert near.has(DIGESTS[0])
    with pytest.raises(BlockError):
        tiers.read(DIGESTS[1])  # nobody has it, and one could not say so
    tiers.forget(DIGESTS[0])
    assert (near.has(DIGESTS[0]), far.has(DIGESTS[0])) == (False, False)
    assert Tiers([near, far]).read(DIGESTS[0]) is None


class SharedLazyStream(LazyStream):
    """For several threads."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()

    def run(self, work: Work) -> None:
        with self._lock:
            super().run(work)

    def run_until(self, count: int) -> None:
        with self._lock:
            super().run_until(count)


@pytest.mark.parametrize("graphs", [False, True])
def test_blocks_of_a_device_come_back_from_main_memory(model: Path, tmp_path: Path, graphs: bool) -> None:
    """A GPU's runner, on a stream that is as late as a GPU may be; its cache has few blocks, which others take."""
    loaded = load_model(EngineConfig(model=str(model), op_by_op=True), CPU, lambda *_: None)
    host = HostBlocks(1 << 20, 2 * 2 * SIZE * loaded.config.num_kv_heads * 32 * 4)
    engine = on_a_device(loaded, host, graphs)
    right = answer(engine)
    for number in range(4):
        answer(engine, [9 + number, *PROMPT], f"other {number}")
    assert not engine.scheduler.blocks.lookup(engine.prepare(_request())[0].sequence.hashes(SIZE)[:1])
    assert answer(engine, name="again") == right
    assert (engine.stats().kept_blocks_read, engine.stats().kept_block_failures) == (5, 0)
    assert engine.stats().kept_block_bytes > 0
    engine.reset_prefix_cache()
    before = engine.stats().cached_prompt_tokens
    assert answer(engine, name="anew") == right
    assert engine.stats().cached_prompt_tokens == before
    engine.close()
    folder = BlockFolder(tmp_path / "kept", "a", 1 << 20, host._block_bytes)
    for _ in range(2):  # the folder outlives the engine
        engine = on_a_device(loaded, Tiers([HostBlocks(1 << 20, host._block_bytes), folder]), graphs)
        assert answer(engine) == right
        engine.close()
    assert engine.offloaded is not None
    assert engine.offloaded.stats()["kept_blocks_read"] == 5


def on_a_device(loaded: LoadedModel, store: BlockStore, graphs: bool) -> Engine:
    stream = SharedLazyStream()
    limits = DeviceLimits(64, 4, 12, SIZE)
    runner = DeviceRunner(loaded.decoder, limits, stream, torch.float32, finite_cache=True, graphs=graphs)
    runner.allocate(16)
    blocks = BlockManager(16, SIZE)
    kept = OffloadedBlocks(store, runner, blocks)
    return Engine(runner, Scheduler(blocks, 4, 64, offloaded=kept), preparation_for(loaded, 192), offloaded=kept)


def _request() -> GenerationRequest:
    return GenerationRequest(request_id="h", prompt_token_ids=tuple(PROMPT), params=SamplingParams(max_tokens=6))


def test_main_memory_behind_the_cache_is_of_a_gpu(model: Path) -> None:
    with pytest.raises(ConfigError, match="is for GPUs") as caught, running(model, None, kv_offloading_size=1):
        pass
    assert caught.value.setting == "kv_offloading_size"


# ---- Redis -----------------------------------------------------------------------------------------------------------

REDIS = shutil.which("redis-server")
needs_redis = pytest.mark.skipif(REDIS is None, reason="there is no redis-server (apt install redis-server)")


@pytest.fixture
def redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server with a password, and its address; its answers are waited for as long as a busy machine may take."""
    assert REDIS is not None
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    process = subprocess.Popen(
        [REDIS, "--port", str(port), "--save", "", "--requirepass", "secret", "--dir", str(tmp_path)],
        stdout=subprocess.DEVNULL,
    )
    wait_for(lambda: answers(port) or process.poll() is not None)
    monkeypatch.setattr(redis_blocks, "TIMEOUT", PATIENCE)
    yield f"redis://:secret@127.0.0.1:{port}/1", process
    with suppress(OSError):
        process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def client(url: str) -> Any:
    import redis

    return redis.Redis.from_url(url)


class TimedSocket:
    """A socket that notes the seconds that it may take to send."""

    def __init__(self) -> None:
        self.timeout, self.allowed = 1.0, list[float]()

    def settimeout(self, seconds: float) -> None:
        self.timeout = seconds

    def gettimeout(self) -> float:
        return self.timeout

    def sendall(self, data: bytes) -> None:
        self.allowed.append(self.timeout)

    def recv(self, size: int) -> bytes:
        return bytes(size)


def test_a_block_may_take_as_long_to_send_as_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    end = TimedSocket()
    bounded = redis_blocks._BoundedSocket(end, 1 << 10)
    bounded.sendall(b"x")
    bounded._until = time.monotonic() + 0.01  # a slow answer, of which the end comes
    bounded.recv(8)
    bounded.sendall(bytes(16 << 20))
    assert end.allowed == [pytest.approx(1.0, abs=0.1), 3.0]


@needs_redis
def test_servers_share_what_prompts_begin_with(model: Path, redis: tuple[str, Any], tmp_path: Path) -> None:
    with running(model, None) as engine:
        right = answer(engine)
    with running(model, redis[0]) as engine:
        assert answer(engine) == right
    with running(model, redis[0]) as engine:
        assert answer(engine) == right
        stats = engine.stats()
        assert (stats.cached_prompt_tokens, stats.kept_blocks_read, stats.kept_block_failures) == (5 * SIZE, 5, 0)
        assert stats.kept_block_bytes > 0
        assert answer(engine, name="salted", cache_salt="mine")
        assert engine.stats().cached_prompt_tokens == 5 * SIZE
    with running(model, redis[0], kv_cache_dtype="q8_0") as engine:
        answer(engine)
        assert engine.stats().cached_prompt_tokens == 0
    for _ in range(2):  # a folder before it gets what is read there
        with running(model, redis[0], prompt_cache_path=tmp_path / "kept") as engine:
            assert answer(engine) == right
            assert engine.stats().kept_blocks_read == 5
    assert len(list((tmp_path / "kept").glob("*/*/*"))) >= 5
    with running(model, redis[0]) as engine:
        engine.reset_prefix_cache()
        answer(engine)
        assert engine.stats().cached_prompt_tokens == 0


def test_servers_share_redis_whenever_they_downloaded_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list[str]()

    class Named(HostBlocks):
        def __init__(self, url: str, name: str, most_bytes: int, block_bytes: int, *, listed: bool) -> None:
            super().__init__(most_bytes, block_bytes)
            names.append(name)

    monkeypatch.setattr(redis_blocks, "RedisBlocks", Named)
    for seconds, seed in ((1000, 0), (2000, 0), (2000, 1)):
        model = write_toy_model(tmp_path / f"{seconds} {seed}", toy_config(head_dim=32), seed=seed)
        for path in model.iterdir():
            os.utime(path, (seconds, seconds))
        with running(model, "redis://h"):
            pass
    assert names[0] == names[1] != names[2]


@needs_redis
def test_servers_share_states_with_the_pages_before_them(redis: tuple[str, subprocess.Popen[bytes]]) -> None:
    """One that ran before the other wrote them finds them as well; where Redis is gone they are computed."""
    turn = [*PROMPT, 1, 2, 3]
    with running(SPEAKING, None) as engine:
        right = answer(engine, turn)
    with running(SPEAKING, redis[0]) as second:
        with running(SPEAKING, redis[0]) as first:
            answer(first)
        assert answer(second, turn) == right
        stats = second.stats()
        found = stats.cached_prompt_tokens, stats.kept_blocks_read, stats.kept_block_failures
        assert found == (5 * SIZE, 6, 0), "five blocks and a checkpoint"
        assert answer(second, turn[1:], "other")
        assert second.stats().kept_blocks_read == 6
    with running(SPEAKING, redis[0]) as engine:
        there = client(redis[0])
        sizes = {key: there.strlen(key) for key in there.keys("candle-vllm:kv:*")}
        assert engine.stats().kept_block_bytes == sum(sizes.values())
        assert len(set(sizes.values())) == 2
        there.delete(*(key for key, size in sizes.items() if size == max(sizes.values())))  # all checkpoints
        assert answer(engine, turn) == right
        assert engine.stats().cached_prompt_tokens == 0
        redis[1].kill()
        redis[1].wait()
        assert answer(engine, turn[1:], "other")


def test_a_look_up_that_ends_during_a_step_is_waited_for() -> None:
    """`is_ready` has deferred the sequence; the engine must run another step, whenever the look-up ends."""
    ends, nothing = threading.Event(), lambda *_: None
    part: Any = SimpleNamespace(reads=False, take=nothing, offer=nothing, may_have=nothing, is_ready=lambda *_: True)
    pool = StatePool(1, 1, SIZE)

    def look(_: object) -> None:
        ends.wait()

    prefixes = OffloadedPrefixes(part, part, pool, look)
    assert not prefixes.is_ready("a", (), 1)
    ends.set()
    prefixes.wait(PATIENCE)
    assert prefixes.reads
    prefixes.take()
    assert not prefixes.reads
    assert prefixes.is_ready("a", (), 1)


def test_prompts_that_wait_share_the_threads_of_look_ups() -> None:
    ends, nothing = threading.Event(), lambda *_: None
    part: Any = SimpleNamespace(
        reads=False, take=nothing, offer=nothing, may_have=nothing, left=nothing, is_ready=lambda *_: True
    )
    prefixes, before = (
        OffloadedPrefixes(part, part, StatePool(1, 1, SIZE), lambda _: ends.wait()),
        threading.active_count(),
    )
    assert not any(prefixes.is_ready(number, (), 1) for number in range(100))
    assert threading.active_count() - before <= 4
    prefixes.left(99)
    ends.set()
    wait_for(lambda: prefixes.take() or not prefixes.reads)
    assert all(prefixes.is_ready(number, (), 1) for number in range(99))


@needs_redis
def test_redis_is_bounded_and_emptied(redis: tuple[str, Any]) -> None:
    store = RedisBlocks(redis[0], "a", 3 * 1040, 1000)
    for digest in DIGESTS[:3]:
        store.write(digest, digest[:1] * 1000)
        time.sleep(0.002)
    assert store.read(DIGESTS[0]) == DIGESTS[0][:1] * 1000  # used now
    store.write(DIGESTS[3], bytes(1000))
    other = RedisBlocks(redis[0], "a", 3 * 1040, 1000)  # another server
    assert [other.read(digest) is not None for digest in DIGESTS[:4]] == [True, False, True, True]
    assert other.num_bytes == 3 * 1040
    stranger = RedisBlocks(redis[0], "b", 3 * 1040, 1000)
    assert stranger.read(DIGESTS[0]) is None
    stranger.write(DIGESTS[0], bytes(1000))
    other.clear()
    assert other.read(DIGESTS[0]) is None
    wait_for(lambda: not other._to_clear)
    assert store.read(DIGESTS[0]) is None
    assert stranger.read(DIGESTS[0]) == bytes(1000)
    assert 0 < client(redis[0]).ttl(stranger._prefix + DIGESTS[0]) <= 7 * 24 * 3600


@needs_redis
@pytest.mark.parametrize("damage", ["short", "long", "flipped", "another", "text", "list"])
def test_what_redis_has_is_looked_at(redis: tuple[str, Any], damage: str) -> None:
    store, there = RedisBlocks(redis[0], "a", 1 << 20, 1000), client(redis[0])
    for digest in DIGESTS[:2]:
        store.write(digest, digest[:1] * 1000)
    key, other = (store._prefix + digest for digest in DIGESTS[:2])
    data = there.get(key)
    if damage == "list":
        there.delete(key)
        there.rpush(key, b"x")
    else:
        flipped = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
        damaged = {"short": data[:-1], "long": data + b"x", "flipped": flipped, "text": b"x" * 2000}
        there.set(key, damaged.get(damage, there.get(other)))
    with pytest.raises(BlockError):
        store.read(DIGESTS[0])
    assert store.read(DIGESTS[1]) == DIGESTS[1][:1] * 1000
    if damage != "list":
        assert not there.exists(key)


@needs_redis
def test_a_redis_that_hangs_or_goes_costs_a_second_once(
    model: Path, redis: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, process = redis
    with running(model, url) as engine:
        right = answer(engine)
        wait_for(lambda: engine.stats().kept_blocks_written == 5)
    reads = list[bytes]()
    with running(model, url) as engine:
        process.send_signal(signal.SIGSTOP)
        read = RedisBlocks.read
        monkeypatch.setattr(RedisBlocks, "read", lambda store, digest: reads.append(digest) or read(store, digest))
        monkeypatch.setattr(redis_blocks, "QUIET", math.inf)
        monkeypatch.setattr(redis_blocks, "TIMEOUT", 1.0)
        began = time.monotonic()
        assert answer(engine) == right
        assert time.monotonic() - began > 0.5
        assert reads
        reads.clear()
        answer(engine, [8, *PROMPT], "other")
        assert not reads  # it is left alone
        assert engine.stats().kept_block_failures >= 1
    process.send_signal(signal.SIGCONT)
    monkeypatch.setattr(redis_blocks, "TIMEOUT", PATIENCE)
    with running(model, url) as engine:
        process.kill()
        process.wait()
        assert answer(engine) == right
        assert answer(engine, [8, *PROMPT], "other")
        assert engine.stats().cached_prompt_tokens == 0
    with running(model, url) as engine:  # it is not there at the start
        assert answer(engine) == right


@needs_redis
def test_a_wrong_password_is_told_and_never_repeated(
    model: Path, redis: tuple[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    url = redis[0].replace("secret", "guessed")
    with running(model, url) as engine:
        assert answer(engine)
    assert "Redis does not answer" in caplog.text
    assert "guessed" not in caplog.text + repr(EngineConfig(model="m", prompt_cache_url=url))


def drip(connection: socket.socket) -> None:
    connection.sendall(b"$40\r\n")
    for _ in range(100):
        time.sleep(0.2)
        connection.sendall(b"x")


LIES: dict[str, Callable[[socket.socket], None]] = {
    "garbage": lambda connection: connection.sendall(b"\xff\x00HTTP/1.1 200 OK\r\n\r\n"),
    "numbers": lambda connection: connection.sendall(b":7\r\n" * 9),
    "lists": lambda connection: connection.sendall(b"*1\r\n$1\r\nx\r\n" * 9),
    "half": lambda connection: connection.sendall(b"$40000\r\nCVKV0001"),
    "huge": lambda connection: connection.sendall(b"$99999999999999\r\nCVKV0001"),
    "negative": lambda connection: connection.sendall(b"$-99\r\n*-5\r\n"),
    "error": lambda connection: connection.sendall(b"-WRONGTYPE no\r\n" * 9),
    "nothing": lambda connection: None,
    "drip": drip,
}


@contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """A false Redis, and its address; a thread serves each connection.

    The listener is closed after the accepting thread has ended: the next listener may get the same file descriptor, and
    a thread that was about to accept would take a connection of that listener.
    """

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join()


def test_a_redis_that_takes_no_blocks_gives_those_that_it_has() -> None:
    """One without memory (noeviction) or disk refuses all commands that write, also those that note the time of use."""
    data = b"x" * 1000

    def serve(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            while asked := connection.recv(1 << 16):
                if b"GETRANGE" in asked:
                    block = sealed(DIGESTS[0], data) + data
                    connection.sendall(b"$%d\r\n%b\r\n" % (len(block), block) + b"-OOM command not allowed\r\n" * 2)
                else:
                    connection.sendall(b":0\r\n" * asked.count(b"*"))

    with listening(serve) as url:
        store = RedisBlocks(url, "a", 1 << 20, 1000)
        assert store.read(DIGESTS[0]) == data
        assert store.may_have(DIGESTS[0])
        store.close()


def test_an_emptied_redis_gets_all_blocks_again() -> None:
    """A missing block says that others may be missing: each must be written when it is computed again."""

    def serve(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            while asked := connection.recv(1 << 16):
                numbers = b":1\r\n" * asked.count(b"*")
                connection.sendall(b"$0\r\n\r\n:1\r\n:0\r\n" if b"GETRANGE" in asked else numbers)

    with listening(serve) as url:
        store = RedisBlocks(url, "a", 1 << 20, 1000)
        for digest in DIGESTS[:3]:
            store.write(digest, bytes(1000))
        assert store.has(DIGESTS[2])
        assert store.read(DIGESTS[0]) is None
        assert not any(store.has(digest) for digest in DIGESTS[:3])
        store.close()


RARELY = ("numbers", "lists", "huge", "negative", "error")


@pytest.mark.parametrize(
    "lie", [pytest.param(lie, marks=pytest.mark.every_case) if lie in RARELY else lie for lie in LIES]
)
def test_one_that_lies_costs_a_computation_alone(model: Path, lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes back, answers are right after a while, and later ones wait for nothing."""

    def serve(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            while connection.recv(1 << 16):
                LIES[lie](connection)
                if lie == "half":
                    return

    with running(model, None) as engine:
        right = answer(engine)
    with listening(serve) as url:
        monkeypatch.setattr(redis_blocks, "QUIET", math.inf)
        with running(model, url) as engine:
            monkeypatch.setattr(kept_blocks, "time", time)
            assert answer(engine) == right
            with monkeypatch.context() as later:  # an answer that waited would wait for ever
                Clock(later, kept_blocks).skip(1.1)
                assert answer(engine, [8, *PROMPT], "other")
            assert engine.stats().cached_prompt_tokens == 0


@pytest.mark.parametrize("lie", ["announced", "lines", "drip"])
def test_an_answer_has_bytes_and_time_as_a_whole(lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of 1,000 bytes: 1.5 GB that are announced and sent, a list without end, and a byte now and then."""
    monkeypatch.setattr(redis_blocks, "TIMEOUT", 0.3 if lie == "drip" else PATIENCE)
    over, sent = threading.Event(), [0]
    first = {"announced": b"$1500000000\r\n", "lines": b"*100000000\r\n", "drip": b"$1040\r\n"}[lie]
    piece = {"announced": bytes(1 << 16), "lines": b":1\r\n" * 10_000, "drip": b"x"}[lie]

    def serve(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            while asked := connection.recv(1 << 16):
                if b"GETRANGE" not in asked:
                    connection.sendall(b":1\r\n" * asked.count(b"*"))
                    continue
                connection.sendall(first)
                while not over.wait(0.02 if lie == "drip" else 0):
                    sent[0] += connection.send(piece)

    with listening(serve) as url:
        store = RedisBlocks(url, "a", 1 << 20, 1000)
        with pytest.raises(BlockError, match="Timeout" if lie == "drip" else "more than 66576 bytes"):
            store.read(DIGESTS[0])
        over.set()
        store.close()
    assert sent[0] < (1040 if lie == "drip" else 64 << 20)  # what the system keeps of a connection, and no more


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://localhost", "must be redis"),
        ("redis://", "must be redis"),
        ("redis://h:port", "must be redis"),
        ("redis://h/first", "the database is a number"),
        ("redis://h?ssl_cert_reqs=none", "ssl_cert_reqs, which cannot be set"),
        ("redis://h?socket_timeout=600", "socket_timeout, which cannot be set"),
    ],
)
def test_wrong_addresses_are_refused_before_anything_is_loaded(url: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"prompt_cache_url .*{why}") as caught:
        EngineConfig(model="m", prompt_cache_url=url)
    assert caught.value.setting == "prompt_cache_url"


def test_a_missing_client_of_redis_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"prompt_cache_url needs the package redis: .* --extra redis"):
        EngineConfig(model="m", prompt_cache_url="redis://h")


def test_a_limit_below_one_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="is too small for one block"):
        RedisBlocks("redis://h", "a", 1000, 1000)


@needs_redis
def test_redis_over_tls(tmp_path: Path) -> None:
    assert REDIS is not None
    key, cert, path = tmp_path / "key.pem", tmp_path / "cert.pem", tmp_path
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl")
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(cert), "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    process = subprocess.Popen(
        [REDIS, "--port", "0", "--tls-port", str(port), "--tls-cert-file", str(cert), "--tls-key-file", str(key),
         "--tls-auth-clients", "no", "--save", "", "--dir", str(path)],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(lambda: answers(port) or process.poll() is not None)
        if process.poll() is not None:
            pytest.skip("this redis-server has no TLS")
        store = RedisBlocks(f"rediss://localhost:{port}?ssl_ca_certs={cert}", "a", 1 << 20, 1000)
        store.write(DIGESTS[0], bytes(1000))
        assert store.read(DIGESTS[0]) == bytes(1000)
        with pytest.raises(BlockError, match="certificate"):
            RedisBlocks(f"rediss://localhost:{port}", "a", 1 << 20, 1000).read(DIGESTS[0])  # signed by nobody known
    finally:
        process.kill()
        process.wait()
    assert os.path.exists(cert)
