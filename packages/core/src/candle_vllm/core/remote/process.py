# SPDX-License-Identifier: MIT
"""EngineProcess: the child process that runs an engine, and the socket to it.

The socket is in a folder that only this user can access; on Windows it is a local port. The child identifies itself by
a token that it reads from its standard input; messages of other processes are dropped. This process keeps the writing
end of the child's standard input open, and the child keeps the other end of `alive` open, so each process notices when
the other ends for any reason.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import IO

import zmq

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.errors import EngineDeadError, ModelLoadError
from candle_vllm.core.progress import tell
from candle_vllm.core.remote import wire
from candle_vllm.core.remote.line import CONTROL, END, STEPS, TOKEN_BYTES, set_limits, write_start
from candle_vllm.core.threads import ending

logger = logging.getLogger(__name__)

CHILD = (sys.executable, "-P", "-m", "candle_vllm.core.remote.child")
_LONGEST_FOLDER = 80  # bytes; a socket's path may have 107
_MAX_STRANGERS = 10  # maximum number of warnings about messages of other processes
_LOOK_UP = 1000  # ms that a poll waits
_HEARTBEAT = 1.0  # seconds between two heartbeats, which the child's ZeroMQ thread answers, also while the model loads
_SILENCE = 30.0  # seconds without an answer after which the connection to the child ends
_PROBE = wire.encode(wire.Abort(""))  # the child ignores it; it cannot be sent once the connection has ended
_LAST_WORDS = 20  # ms to wait for the last messages of an ended child


class EngineProcess:
    """A child process that loads a model and serves it.

    Args:
        command: command that starts the child.

    Attributes:
        socket: socket to the child; not thread-safe.
        alive: descriptor that becomes readable when the child has ended.
        pid: the child's process id.

    Raises:
        ConfigError: see `write_start`.
    """

    def __init__(self, config: EngineConfig, command: Sequence[str] = CHILD) -> None:
        self._model = config.model
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._ending = threading.Lock()
        self._ended = False
        self._strangers = 0
        self._folder = _private_folder()
        self._context = zmq.Context()
        self._near, far = socket.socketpair()
        self._near.setblocking(False)
        given = None if sys.platform == "win32" else far.fileno()  # Windows cannot inherit a socket this way
        try:
            self.socket = self._context.socket(zmq.ROUTER)
            set_limits(self.socket)
            self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self.socket.setsockopt(zmq.HEARTBEAT_IVL, int(_HEARTBEAT * 1000))
            self.socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(_SILENCE * 1000))
            self.socket.bind(f"ipc://{self._folder}/engine" if self._folder else "tcp://127.0.0.1:*")
            address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
            start = write_start(config, self._token, address, self._folder, given)
            self._popen = subprocess.Popen(
                command, stdin=subprocess.PIPE, pass_fds=() if given is None else (given,), start_new_session=True
            )
        except BaseException:
            far.close()
            self._free()
            raise
        if given is None:
            threading.Thread(target=self._hold, args=(far,), name="candle-vllm-engine-process", daemon=True).start()
        else:
            far.close()
        self.alive = self._near.fileno()
        self.pid = self._popen.pid
        try:
            self._write(start)
        except BrokenPipeError:
            logger.debug("the engine process has ended early")  # `greeting` says why
        except BaseException:
            self.close(kill=True)
            raise

    def greeting(self) -> wire.Ready:
        """Wait until the child has loaded its model, and report progress.

        A child that fails sends its error and waits until it is ended, so no message arrives after its end. From its
        first message on, it must answer heartbeats.

        Raises:
            ConfigError, ModelNotFoundError, ModelLoadError: the child's error, or the child has ended or is silent.
        """
        poller, reader = zmq.Poller(), wire.Reader(wire.Greeting)
        poller.register(self.socket, zmq.POLLIN)
        poller.register(self.alive, zmq.POLLIN | zmq.POLLERR)
        heard = False
        while True:
            events = dict(poller.poll(_LOOK_UP))
            for data in self.received(1):
                try:
                    message = reader.read(data)
                except wire.MalformedMessageError as error:
                    raise ModelLoadError(f"the engine process sent a malformed message: {error}") from None
                if isinstance(message, wire.Failed):
                    raise wire.make_error(message.error)
                if isinstance(message, wire.Loading):
                    heard = True
                    tell(message.what, message.done, message.total, message.unit)
                    continue
                return message
            if self._popen.poll() is not None or self.alive in events or (heard and not events and self._is_lost()):
                raise ModelLoadError(
                    f"the process that was loading {self._model} {self._fate()}; the log has its last output. If "
                    "memory is short, the system kills it: use a smaller model or less cache (`kv_cache_memory`)"
                )

    def has_more(self) -> bool:
        """Return whether a message can be read, after a short wait."""
        return self.socket.poll(_LAST_WORDS) != 0

    def received(self, most: int) -> Iterator[bytes]:
        """Yield at most `most` messages of the child, without waiting; drop messages of other processes."""
        for _ in range(most):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            known = (kind + self._token for kind in (CONTROL, STEPS))
            if len(frames) == 2 and any(hmac.compare_digest(frames[0], identity) for identity in known):
                yield frames[1]
            else:
                self._strangers += 1
                if self._strangers <= _MAX_STRANGERS:
                    logger.warning("a message on the engine's socket was dropped, because the engine did not send it")

    def send(self, data: bytes) -> None:
        """Send a message to the child; raises EngineDeadError if it has ended, or does not accept it in time."""
        try:
            self.socket.send_multipart((CONTROL + self._token, data))
        except zmq.Again:
            raise EngineDeadError(
                f"the engine process accepted no message for {wire.PATIENCE:.0f} s and is ended"
            ) from None
        except zmq.ZMQError:
            raise EngineDeadError(f"the engine process {self._fate()}") from None

    def check(self) -> None:
        """Raise `EngineDeadError` if the child has ended, or does not answer heartbeats."""
        if self._popen.poll() is not None or self._closed_its_end() or self._is_lost():
            raise EngineDeadError(f"the engine process {self._fate()}")

    def kill(self) -> None:
        """Kill the child and wait for its end, at most `PATIENCE` seconds. Thread-safe."""
        self._popen.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(wire.PATIENCE)

    def close(self, *, kill: bool = False) -> None:
        """Notify the child to end, kill it after a timeout, and free all resources; may be called twice."""
        with self._ending:
            if self._ended:
                return
            self._ended = True
            try:
                self._stop(kill)
            finally:
                self.kill()
                with contextlib.suppress(OSError):
                    self._input.close()
                self._free()

    def _stop(self, kill: bool) -> None:
        if kill:
            return
        with contextlib.suppress(OSError):
            self._write(END)
        try:
            self._popen.wait(wire.PATIENCE)
        except subprocess.TimeoutExpired:
            logger.warning("the engine process did not end within %.0f s and is killed", wire.PATIENCE)

    @property
    def _input(self) -> IO[bytes]:
        assert self._popen.stdin is not None
        return self._popen.stdin

    def _write(self, data: bytes) -> None:
        self._input.write(data)
        self._input.flush()

    def _closed_its_end(self) -> bool:
        try:
            return self._near.recv(1) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _is_lost(self) -> bool:
        """Return whether the connection to the child has ended."""
        try:
            self.socket.send_multipart((CONTROL + self._token, _PROBE), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            return error.errno != zmq.EAGAIN
        return False

    def _fate(self) -> str:
        """Return what has happened to the child, for messages."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(1.0)
        if self._popen.returncode is None and not self._closed_its_end():
            return f"has not responded for {_SILENCE:.0f} s, and is ended"
        return f"has ended ({ending(self._popen.returncode)})"

    def _hold(self, end: socket.socket) -> None:
        """Hold the child's end of `alive` open until the child has ended (Windows)."""
        with end:
            self._popen.wait()

    def _free(self) -> None:
        self._near.close()
        self._context.destroy(linger=0)
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


def _private_folder() -> str:
    """Make a folder that only this user can access, with a path short enough for a socket; "" on Windows."""
    if sys.platform == "win32":
        return ""
    folder = tempfile.mkdtemp(prefix="candle-vllm-")
    if len(os.fsencode(folder)) <= _LONGEST_FOLDER:
        return folder
    os.rmdir(folder)
    return tempfile.mkdtemp(prefix="candle-vllm-", dir="/tmp")
