# SPDX-License-Identifier: MIT
"""Several machines: the listener for ranks that join over the network, and the process on each further node.

The first node listens at one address while ranks are missing. A connecting rank and the first node prove to each
other that they have the cluster key; afterwards each frame is signed by keys of that connection. Frames are not
encrypted, and the traffic of Gloo and NCCL is not even signed: the network between nodes must be private.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import hmac
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from typing import IO, Any, NamedTuple

import msgspec

from candle_vllm.core.assembly.placement import resolve_ranks
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.engine.ranks.rank_line import SILENCE, TICK, Line, read_exactly, time_left
from candle_vllm.core.errors import ConfigError, EngineDeadError, NotReadyError
from candle_vllm.core.shown import log_style
from candle_vllm.core.threads import default_threads, ending

logger = logging.getLogger(__name__)

RANK = (sys.executable, "-P", "-m", "candle_vllm.core.engine.ranks.rank")
REFUSED = 2  # exit status of a rank that may not join; see the errors of `join`
OWN = ("model", "weight_file", "revision", "tokenizer", "download_dir", "hf_token", "offline", "device", "threads",
       "prompt_cache_url")  # fmt: skip
"""Settings of which each node has its own values: paths, devices, secrets. The first node decides all others."""
_PROCESS = secrets.token_bytes(16)  # identifies this process
_MAGIC = b"candle-vllm ranks 1\n"
_NONCE = 32
_MOST_HELLO = 1024  # bytes
_SHAKING = 5.0  # maximum seconds of a whole handshake
_AT_ONCE = 64  # maximum number of connections that have not yet proved that they know the key
_AGAIN = 1.0  # seconds until a rank tries to join again, or a node starts new ranks
_GLANCE = 0.2  # seconds between two checks whether the listener is closed
_NOTICE = 30.0  # seconds between two log lines about missing ranks
JOINING = 1800.0  # seconds that the first node waits for all ranks, or for resources of Ray
_ENDING = 10.0  # seconds that the ranks of a node may take to end after one of them has ended


class Hello(msgspec.Struct, frozen=True):
    """A rank that wants to join; `process` distinguishes processes that claim the same rank."""

    rank: int
    size: int
    nodes: int
    side: bool
    process: bytes
    version: str
    nonce: bytes


class Verdict(msgspec.Struct, frozen=True):
    """The answer to `Hello`; a refusal of "" accepts the rank."""

    refusal: str


class Invitation(msgspec.Struct, frozen=True):
    """The message, a line of JSON on a rank's standard input, with which it joins the first node.

    `own` are settings that the first node does not decide. The rank ends when its standard input is closed.
    """

    host: str
    port: int
    key: str
    rank: int
    size: int
    nodes: int
    own: dict[str, Any]
    log: tuple[int, str]


class Joined(NamedTuple):
    """A rank that has joined: its line for steps, its side line (see `rank_line`), and the address of its machine."""

    line: Line
    side: Line
    where: str


class RankListener:
    """The listener to which the ranks of other nodes, or the ranks that Ray has started, connect.

    Args:
        host, port: the address to listen on; port 0 is any free port.
        key: the cluster key, which connecting ranks must prove to know.
        ranks: numbers of the ranks that join.
        size, nodes: number of the engine's ranks and nodes.

    Attributes:
        host, port: the address on which it listens.

    Raises:
        NotReadyError: the address cannot be listened on.
    """

    def __init__(self, host: str, port: int, key: str, ranks: range, size: int, nodes: int) -> None:
        self._key, self._ranks, self._size, self._nodes = key.encode(), ranks, size, nodes
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._listener = socket.create_server((host, port), backlog=128, family=family)
        except OSError as error:
            raise NotReadyError(
                f"the first node cannot listen on {host} port {port} (master_addr, master_port): "
                f"{error.strerror or error}. "
                "master_addr is an address of the first node that the others can reach",
                "master_addr",
            ) from None
        self._listener.settimeout(_GLANCE)  # not select(2), which cannot handle descriptors above 1023
        self.host, self.port = self._listener.getsockname()[:2]
        self._changed = threading.Condition()
        self._found: dict[int, tuple[bytes, dict[bool, Line]]] = {}
        self._where: dict[int, str] = {}  # by rank; read early: a broken connection has no address
        self._closed = False
        self._strangers: dict[socket.socket, str] = {}  # unproved connections and their addresses, oldest first
        self._thread = threading.Thread(target=self._listen, name="candle-vllm-nodes", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        said = ""
        while not self._closed:
            try:
                self._let_in()
                said = ""
            except TimeoutError:
                continue
            except (OSError, RuntimeError) as error:  # out of file descriptors or threads, maybe repeatedly
                if str(error) != said:
                    said = str(error)
                    logger.warning("connections of ranks cannot be accepted: %s", said)
                time.sleep(_GLANCE)
        self._listener.close()

    def _let_in(self) -> None:
        connection, (address, *_) = self._listener.accept()
        with self._changed:
            if len(self._strangers) >= _AT_ONCE:
                self._send_one_away()
            self._strangers[connection] = address
        looking = threading.Thread(target=self._admit, args=(connection,), name="candle-vllm-joining", daemon=True)
        try:
            looking.start()
        except RuntimeError:
            self._remove_stranger(connection)
            connection.close()
            raise

    def _send_one_away(self) -> None:
        """Drop the oldest unproved connection of the address that has the most of them."""
        ((crowd, _),) = collections.Counter(self._strangers.values()).most_common(1)
        first = next(each for each, address in self._strangers.items() if address == crowd)
        del self._strangers[first]
        with contextlib.suppress(OSError):
            first.shutdown(socket.SHUT_RDWR)  # its thread closes it

    def _remove_stranger(self, connection: socket.socket) -> bool:
        """Remove a connection from the unproved ones; return False if it was dropped before."""
        with self._changed:
            return self._strangers.pop(connection, None) is not None

    def _admit(self, connection: socket.socket) -> None:
        try:
            self._shake_hands(connection, time.monotonic() + _SHAKING)
        except (EOFError, OSError, ValueError, msgspec.MsgspecError) as error:
            with contextlib.suppress(OSError):
                logger.warning("%s cannot join as a rank: %s", connection.getpeername()[0], error)
            connection.close()
        finally:
            self._remove_stranger(connection)

    def _shake_hands(self, connection: socket.socket, until: float) -> None:
        connection.settimeout(time_left(until))
        nonce = secrets.token_bytes(_NONCE)
        connection.sendall(_MAGIC + nonce)
        said = _take(connection, until)
        if not hmac.compare_digest(read_exactly(connection, 32, until), _mac(self._key, b"hello", nonce, said)):
            connection.sendall(_frame(b"") + bytes(32))  # an invalid proof, after which the rank does not try again
            raise ValueError("its key is not the key of this cluster (cluster_key)")
        if not self._remove_stranger(connection):
            raise EOFError("too many other connections arrived meanwhile")
        hello = msgspec.msgpack.decode(said, type=Hello)
        refusal = self._refusal(hello)
        verdict = msgspec.msgpack.encode(Verdict(refusal))
        connection.sendall(_frame(verdict) + _mac(self._key, b"verdict", nonce, said, verdict))
        if refusal:
            raise ValueError(refusal)
        _set_keepalive(connection)
        where, line = connection.getpeername()[0], Line(connection, _keys(self._key, nonce, said))
        with self._changed:
            if self._closed:
                connection.close()
                return
            process, lines = self._found.get(hello.rank, (hello.process, {}))
            if process != hello.process:  # the rank was started again
                for former in lines.values():
                    former.socket.close()
                lines = {}
            lines[hello.side], self._where[hello.rank] = line, where
            self._found[hello.rank] = hello.process, lines
            self._changed.notify_all()

    def _refusal(self, hello: Hello) -> str:
        if hello.version != version("candle-vllm-core"):
            return f"it has version {hello.version}, and the first node {version('candle-vllm-core')}: install the same"
        if (hello.size, hello.nodes) != (self._size, self._nodes) or hello.rank not in self._ranks:
            return (
                f"it is rank {hello.rank} of {hello.size} on {hello.nodes} nodes, and the first node waits for ranks "
                f"{self._ranks.start} to {self._ranks.stop - 1} of {self._size} on {self._nodes} nodes: start all with "
                "the same nnodes, tensor_parallel_size and pipeline_parallel_size, each with a node_rank of its own"
            )
        return ""

    def _missing(self) -> list[int]:
        return [rank for rank in self._ranks if len(self._found.get(rank, (b"", {}))[1]) < 2]

    def everyone(self) -> dict[int, Joined]:
        """Wait until all ranks have joined; stop listening, and return them. Raises EngineDeadError if the listener was
        closed, and NotReadyError if some ranks have not joined in time."""
        until = time.monotonic() + JOINING
        with self._changed:
            while missing := self._missing():
                if self._closed:
                    raise EngineDeadError("the engine was closed, or a rank ended, before all ranks had joined")
                if time.monotonic() > until:
                    raise NotReadyError(
                        f"ranks {_listed(missing)} have not joined at {self.host} port {self.port} within "
                        f"{JOINING:.0f} s: "
                        "start candle-vllm on every node with the same --master-addr, --master-port and key, and a "
                        "--node-rank of its own",
                        "nnodes",
                    )
                if not self._changed.wait(_NOTICE):
                    logger.info("waiting at %s port %d for ranks %s", self.host, self.port, _listed(missing))
            self._closed = True
            found, self._found = self._found, {}
        lines = {rank: found[rank][1] for rank in self._ranks}
        return {rank: Joined(each[False], each[True], self._where[rank]) for rank, each in lines.items()}

    def close(self) -> None:
        """Stop listening, and close connections that `everyone` has not returned."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for _, lines in self._found.values():
                for line in lines.values():
                    line.socket.close()
        self._thread.join()  # it closes the listening socket, so that the address is free again


def join(given: IO[bytes]) -> tuple[Line, Line, Invitation]:
    """Join the first node as a rank; return the line for steps, the side line and the invitation.

    `given` is the stream of the invitation; its end ends this process. Raises ConfigError if the first node refuses
    this rank, or is not the first node of this cluster.
    """
    invitation = msgspec.json.decode(given.readline(), type=Invitation)
    threading.Thread(target=_end_with, args=(given,), name="candle-vllm-node", daemon=True).start()
    return _connect(invitation, side=False), _connect(invitation, side=True), invitation


def _end_with(given: IO[bytes]) -> None:
    given.read()
    os._exit(0)  # without waiting for threads


def _connect(invitation: Invitation, *, side: bool) -> Line:
    said_so = False
    while True:
        try:
            connection = socket.create_connection((invitation.host, invitation.port), _SHAKING)
        except OSError as error:
            if not said_so:
                logger.info("waiting for the first node at %s port %d (%s)", invitation.host, invitation.port, error)
            said_so = True
            time.sleep(_AGAIN)
            continue
        try:
            return _introduce(connection, invitation, side)
        except (EOFError, OSError) as error:  # for example, the first node is just ending
            connection.close()
            logger.info("the connection to the first node was lost before this rank had joined: %s; it retries", error)
            time.sleep(_AGAIN)
        except ValueError as error:
            connection.close()
            raise ConfigError(str(error), "cluster_key") from None


def _introduce(connection: socket.socket, invitation: Invitation, side: bool) -> Line:
    until = time.monotonic() + _SHAKING
    key = invitation.key.encode()
    if read_exactly(connection, len(_MAGIC), until) != _MAGIC:
        raise ValueError(
            f"the program that listens at {invitation.host} port {invitation.port} is not a first node of this version"
        )
    nonce = read_exactly(connection, _NONCE, until)
    said = Hello(
        invitation.rank,
        invitation.size,
        invitation.nodes,
        side,
        _PROCESS,
        version("candle-vllm-core"),
        secrets.token_bytes(_NONCE),
    )
    hello = msgspec.msgpack.encode(said)
    connection.sendall(_frame(hello) + _mac(key, b"hello", nonce, hello))
    verdict = _take(connection, until)
    if not hmac.compare_digest(read_exactly(connection, 32, until), _mac(key, b"verdict", nonce, hello, verdict)):
        raise ValueError(
            f"the first node at {invitation.host} port {invitation.port} and this one have different keys: set the "
            "same cluster_key on all nodes"
        )
    refusal = msgspec.msgpack.decode(verdict, type=Verdict).refusal
    if refusal:
        raise ValueError(f"the first node refuses this rank: {refusal}")
    _set_keepalive(connection)
    here, there = _keys(key, nonce, hello)
    return Line(connection, (there, here))


def _keys(key: bytes, nonce: bytes | bytearray, hello: bytes | bytearray) -> tuple[bytes, bytes]:
    """Return the keys with which the first node signs, and with which the other rank signs."""
    return _mac(key, b"to the rank", nonce, hello), _mac(key, b"to the first", nonce, hello)


def _mac(key: bytes, *parts: bytes | bytearray) -> bytes:
    digest = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        digest.update(len(part).to_bytes(4, "little"))
        digest.update(part)
    return digest.digest()


def _frame(data: bytes) -> bytes:
    return len(data).to_bytes(2, "little") + data


def _take(connection: socket.socket, until: float | None = None) -> bytearray:
    size = int.from_bytes(read_exactly(connection, 2, until), "little")
    if size > _MOST_HELLO:
        raise ValueError(f"the other end announces a handshake message of more than {_MOST_HELLO} bytes")
    return read_exactly(connection, size, until)


def _set_keepalive(connection: socket.socket) -> None:
    """Set a connection to send at once, and to notice a broken link even while a process is too busy for heartbeats."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    milliseconds = int(SILENCE * TICK * 1000)
    for name, value in (
        ("TCP_KEEPIDLE", 2),
        ("TCP_KEEPINTVL", 2),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", milliseconds),
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"


def share_of_threads(asked: int | None, ranks: int) -> int:
    """Return the threads of one of `ranks` ranks on this machine: as many as set, or its share of the cores."""
    return asked or max(1, default_threads() // ranks)


def rank_device(config: EngineConfig, rank: int) -> dict[str, Any]:
    """Return the settings in which a rank differs from its node: its device, or on the CPU its number of threads."""
    here = config.ranks // config.nnodes
    devices = config.device.split(",")
    if devices == ["cpu"]:
        return {"threads": share_of_threads(config.threads, here)}
    if len(devices) == 1:
        devices = [f"cuda:{number}" for number in range(here)]
    return {"device": devices[rank % here]}


def invited(config: EngineConfig, host: str, port: int, key: str, rank: int) -> Invitation:
    """Return the invitation for a rank of this node."""
    plain = config.plain()
    own = {name: plain[name] for name in OWN if plain[name] is not None} | rank_device(config, rank)
    return Invitation(host, port, key, rank, config.ranks, config.nnodes, own, log_style())


def start_rank(invitation: Invitation) -> subprocess.Popen[bytes]:
    """Start a process of this machine as a rank; it ends with this process."""
    process = subprocess.Popen((*RANK, "join"), stdin=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(invitation) + b"\n")
    process.stdin.flush()
    return process


def run_node(config: EngineConfig) -> int:
    """Run a later node's ranks until SIGTERM or Ctrl+C; return the exit status: 0, or `REFUSED` if a rank may not join.

    When the first node or any rank ends, all ranks end, and new ranks wait until the first node runs again. Raises as
    `resolve_ranks`.
    """
    config = resolve_ranks(config)
    assert config.cluster_key is not None
    here = config.ranks // config.nnodes
    ranks = range(config.node_rank * here, (config.node_rank + 1) * here)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    logger.info(
        "node %d of %d: ranks %s join at %s port %d",
        config.node_rank, config.nnodes, _listed(list(ranks)), config.master_addr, config.master_port,
    )  # fmt: skip
    while not stopped.is_set():
        processes = [
            start_rank(invited(config, config.master_addr, config.master_port, config.cluster_key, rank))
            for rank in ranks
        ]
        try:
            while not stopped.wait(0.1) and all(process.poll() is None for process in processes):
                pass
            until = time.monotonic() + (0 if stopped.is_set() else _ENDING)  # when one rank ends, the others end too
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, until - time.monotonic()))
        finally:
            for process in processes:
                assert process.stdin is not None
                process.stdin.close()
                process.kill()
                process.wait()
        if stopped.is_set():
            return 0
        if any(process.returncode == REFUSED for process in processes):
            return REFUSED
        fates = ", ".join(
            f"rank {rank} {ending(process.returncode)}" for rank, process in zip(ranks, processes, strict=True)
        )
        logger.info("the ranks of this node have ended (%s); new ones wait for the first node", fates)
        stopped.wait(_AGAIN)
    return 0
