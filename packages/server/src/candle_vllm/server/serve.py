"""serve: bind the address, load the model, run uvicorn, drain on a signal.

The frame around steps 1 to 10. The address is taken before the model is loaded, because a port in use should cost
no minutes. SIGTERM or Ctrl+C stops accepting, lets running requests finish for `--shutdown-timeout` seconds, then
aborts them; a second signal does not wait.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import socket
import stat
import sys
from pathlib import Path

import uvicorn

from candle_vllm.server.app import ServedEngine, create_app
from candle_vllm.server.drain import CutOffMiddleware, DrainingServer
from candle_vllm.server.engine_setup import load_engine
from candle_vllm.server.http_protocol import http_protocol
from candle_vllm.server.kinds import UsageError
from candle_vllm.server.settings import Address, Settings

_BACKLOG = 2048


def serve(settings: Settings) -> int:
    """Serves until a signal; 0 after a drain."""
    listener = bind(settings.address)
    try:
        with load_engine(settings) as engine:
            run(engine, settings, listener)
    finally:
        listener.close()
        _remove_socket(settings.address)
    return 0


def run(engine: ServedEngine, settings: Settings, listener: socket.socket) -> None:
    """Serves a loaded engine on a listening socket until a signal."""
    server = make_server(engine, settings)
    gc.collect()
    gc.freeze()  # the model's objects live as long as the process: no collection need look at them again
    sys.stdout.write(banner(engine, settings, _bound(settings.address, listener)))
    sys.stdout.flush()
    server.run(sockets=[listener])


def make_server(engine: ServedEngine, settings: Settings) -> DrainingServer:
    """uvicorn around the application; it serves until `should_exit` is set."""
    config = uvicorn.Config(
        CutOffMiddleware(create_app(engine, settings)),
        http=http_protocol(),
        ws="none",
        lifespan="off",
        backlog=_BACKLOG,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=settings.shutdown_timeout,
    )
    return DrainingServer(config)


def bind(address: Address) -> socket.socket:
    """A socket that listens at the address; UsageError when it is taken or not ours.

    It listens before the model is loaded, because two sockets that do not may share a port. A client that comes while
    the model is loading waits.
    """
    if address.unix_path is not None:
        return _bind_unix(address.unix_path)
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UsageError(f"host {address.host!r} is no address of this machine: {error}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and address.host == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(target)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(_bind_message(address, error)) from None
    return listener


def _bind_message(address: Address, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {address.port} on {address.host} is in use: stop the other server, or choose another --port"
    if error.errno == errno.EACCES:
        return f"port {address.port} is reserved for the system: choose a --port above 1023"
    return f"cannot listen on {address.host} port {address.port}: {error.strerror}"


def _bind_unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists():
            _remove_stale(path)
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(f"cannot listen on {path}: {error.strerror}") from None
    except UsageError:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    """Removes the socket that a crashed server left; a live one, or another kind of file, is an error."""
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise UsageError(f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise UsageError(f"another server listens on {path}")


def _remove_socket(address: Address) -> None:
    if address.unix_path is not None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address.unix_path)


def _bound(address: Address, listener: socket.socket) -> Address:
    """The address with the port that the system chose."""
    return address if address.unix_path is not None else Address(address.host, listener.getsockname()[1])


def banner(engine: ServedEngine, settings: Settings, address: Address) -> str:
    """What is served, and where."""
    info, stats = engine.model_info, engine.stats()
    names = ", ".join(settings.served_model_name) or info.name
    quantization = f", {info.quantization}" if info.quantization else ""
    url = address.url
    lines = [
        f"model            {names} ({info.architecture}, {info.num_parameters / 1e6:,.0f} M parameters{quantization})",
        f"device           {info.device}, {info.dtype}",
        f"KV cache         {stats.num_blocks * stats.block_size:,} tokens; longest request {info.max_model_len:,}",
        f"address          {url}",
        f"OpenAI base URL  {url}/v1",
        f"API key          {'required' if settings.api_key else 'none: everybody who reaches the address may use it'}",
        "Ctrl+C to stop",
    ]
    return "\n".join(lines) + "\n"
