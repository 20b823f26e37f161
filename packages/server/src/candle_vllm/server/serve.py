# SPDX-License-Identifier: MIT
"""serve: bind the address, run uvicorn, load the model, drain on a signal.

Around steps 1 to 10. The address is bound before the model is loaded: a port in use is reported at once, and `/health`
and `/ready` answer during loading. SIGTERM or Ctrl+C stops accepting, lets running requests finish for
`--shutdown-timeout` seconds, then aborts them; a second signal aborts them at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import functools
import gc
import signal
import socket
import ssl
import stat
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI

from candle_vllm.core.config import draft_settings
from candle_vllm.core.errors import CandleVllmError, ConfigError, NotReadyError
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.shown import LOG_STYLES, without_secrets
from candle_vllm.openai.formats.layout import ReasoningFormat, ToolFormat
from candle_vllm.responses.store.backend import MEMORY
from candle_vllm.server.adapters.resolvers import open_adapters
from candle_vllm.server.app import create_app
from candle_vllm.server.batches.service import stored_image
from candle_vllm.server.drain import DrainingServer
from candle_vllm.server.http.protocol import WebSocketProtocol, http_protocol
from candle_vllm.server.http.tls import refresh, tls_context
from candle_vllm.server.interrupts import say_stopped
from candle_vllm.server.models.loader import ModelLoader
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.models.slot import ModelSlot
from candle_vllm.server.models.switcher import Load
from candle_vllm.server.observing import series
from candle_vllm.server.observing.metrics import Observation
from candle_vllm.server.observing.model_metrics import ServedEngine
from candle_vllm.server.reloading import Reloader, warn_of_missing
from candle_vllm.server.routes.ollama_library import pulls_of, refuse_open_changes, served_entry
from candle_vllm.server.routes.webui import new_page_key, page_address
from candle_vllm.server.settings import Address, Settings
from candle_vllm.server.settings.adapters import read_specs
from candle_vllm.server.settings.catalogue import Catalogue
from candle_vllm.server.settings.configuration import Configuration
from candle_vllm.server.settings.derived import engine_config, image_sources, refuse_wrong_settings
from candle_vllm.server.settings.model_names import named_model
from candle_vllm.server.settings.options import UsageError
from candle_vllm.server.settings.table import RATES

if TYPE_CHECKING:
    from candle_vllm.core.engine.model_info import ModelInfo
    from candle_vllm.server.mailbox.service import Mailbox
    from candle_vllm.server.mcp.service import McpService

_BACKLOG = 2048
SWITCH_SECONDS = 0.0005  # a tenth of Python's default, so that threads that parse large requests delay no engine step
WARM_UP_AFTER, WARM_UP_BY = 0.5, 30.0  # seconds: pause before each check that no request runs; limit of that wait


def serve(configuration: Configuration, load: Load | None = None) -> int:
    """Serve until a signal; return 0 after a drain. A node other than the first runs its ranks of the model instead.

    `load` loads a model; None uses a `ModelLoader`. Raises CandleVllmError if a setting is wrong, the address cannot be
    bound, or a store or the first model does not open.
    """
    settings = configuration.settings
    if settings.node_rank:
        from candle_vllm.core.engine.ranks.nodes import run_node

        return run_node(engine_config(configuration.catalogue.default.settings))
    for entry in configuration.catalogue.entries:
        refuse_wrong_settings(entry.settings)
    mcp = open_mcp(settings)
    tls = tls_context(settings)
    refuse_open_changes(settings)
    listener = bind(settings.address)
    second = bind_second(settings, listener)
    warn_of_missing(configuration.catalogue)
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        manager, observation = open_manager(with_fetched(configuration), settings, load)
        mailbox = None
        if configuration.mailbox is not None:
            from candle_vllm.server.mailbox.service import Mailbox  # imports SQLAlchemy

            mailbox = Mailbox(configuration.mailbox)
        app = create_app(manager, settings, mailbox=mailbox, mcp=mcp)
        app.state.page_key = new_page_key(settings, mcp is not None)
        app.state.pulls = pulls_of(manager, configuration.unlisted)
        server = make_server(app, settings, tls)
        app.state.stopping = lambda: server.should_exit
        starting = Start(app, server, _bound(settings.address, listener))
        server.begin = starting.run
        app.state.reloader = starting.reloader = Reloader(configuration, manager, app.state.keys)
        if tls is not None and settings.enable_ssl_refresh:
            server.beside = lambda: refresh(tls, settings)
        server.run(sockets=[listener, *second])
        observation.close()
    finally:
        for each in (listener, *second):
            each.close()
        _remove_socket(settings.address)
    failure = app.state.failure or starting.failure
    if failure is not None:
        raise failure
    if starting.stopped is not None:
        say_stopped(f" while {starting.stopped}")
    return 0


def with_fetched(configuration: Configuration) -> Catalogue:
    """Return the catalogue; if clients may change the models, it includes the downloaded ones."""
    catalogue, settings = configuration.catalogue, configuration.unlisted
    if not settings.allow_model_changes:
        return catalogue
    from candle_vllm.server.models.downloads import downloaded

    given = (name for entry in catalogue.entries for name in (*entry.names, entry.settings.model) if name)
    names = {named_model(name).casefold() for name in given}
    found = [served_entry(settings, local) for local in downloaded(settings) if local.name.casefold() not in names]
    return Catalogue([*catalogue.entries, *found], catalogue.default.name)


def bind_second(settings: Settings, first: socket.socket) -> list[socket.socket]:
    """Bind the port for Ollama's clients, if it differs from the first port; on an error, close `first`."""
    if settings.ollama_port is None or settings.ollama_port == settings.address.port:
        return []
    host = "127.0.0.1" if settings.address.unix_path is not None else settings.address.host
    try:
        return [bind(Address(host, settings.ollama_port))]
    except ConfigError:
        first.close()
        raise


def open_mcp(settings: Settings) -> McpService | None:
    """Return the service of the MCP servers, if some are configured; only then is the MCP SDK imported."""
    from candle_vllm.server.mcp.options import mcp_options

    options = mcp_options(settings)
    if options is None:
        return None
    from candle_vllm.server.mcp.service import McpService

    return McpService(options)


def open_manager(
    catalogue: Catalogue, settings: Settings, load: Load | None = None
) -> tuple[ModelManager, Observation]:
    """Return the manager of the catalogue's models, and its observers, which the caller closes; `load` as in `serve`.

    ConfigError if a source of adapters or images is invalid, or OpenTelemetry is not installed.
    """
    observation = Observation(settings)
    count = observation.metrics.count
    adapters = open_adapters(settings, settings, functools.partial(count, series.ADAPTER_LOOKS))
    images = image_sources(settings, stored_image, functools.partial(count, series.IMAGE_FETCHES))
    load = load or ModelLoader(observation.metrics, adapters=adapters, images=images)
    return ModelManager(catalogue, load, settings, observation.metrics, adapters), observation


class Start:
    """Loads the default model while the server already answers `/health`, and then prints the banner.

    Attributes:
        failure: why the model could not be loaded; the server then stops.
        reloader: reads files again on SIGHUP; None to leave SIGHUP alone.
        stopped: what the server was doing when it was stopped before the model was loaded.
    """

    def __init__(self, app: FastAPI, server: DrainingServer, address: Address) -> None:
        self._app = app
        self._server = server
        self._address = address
        self.failure: Exception | None = None
        self.stopped: str | None = None
        self.reloader: Reloader | None = None

    async def run(self) -> None:
        """Load the model, then print the banner or stop the server."""
        if self.reloader is not None:
            self.reloader.listen(lambda: self._server.handle_exit(signal.SIGTERM, None))
        manager: ModelManager = self._app.state.manager
        slot = manager.slots[manager.active]
        self.stopped = "it started"
        try:
            slot = await manager.start()
        except Exception as error:
            if self._server.should_exit:  # it was stopped while the model was loaded
                self.stopped = f"{slot.entry.name} was loaded" + (f" ({slot.progress})" if slot.progress else "")
            else:
                self.failure, self.stopped = error, None
            self._server.should_exit = True
            return
        self.stopped = None
        # The model's objects live as long as the process, so garbage collections need not examine them. No collection
        # runs here: a start leaves some fifty objects to collect, and a collection takes a tenth of the start.
        gc.freeze()
        sys.stdout.write(banner(self._app, self._address, slot))
        sys.stdout.flush()
        for model in manager.loaded:
            _warm_up(model.engine)


def _warm_up(engine: ServedEngine) -> None:
    """Prepare the vocabulary for grammars in a thread, which takes 1 to 2 seconds, once no request runs.

    At exit, the process waits for this thread, because ending a thread inside compiled code may crash the process.
    """
    main = threading.main_thread()

    def lives_on() -> bool:
        end = time.monotonic() + WARM_UP_AFTER
        while main.is_alive() and time.monotonic() < end:
            time.sleep(min(0.05, WARM_UP_AFTER))
        return main.is_alive()

    def make() -> None:
        end = time.monotonic() + WARM_UP_BY
        with contextlib.suppress(CandleVllmError):  # the model was unloaded meanwhile
            while lives_on():
                if not engine.stats().num_running or time.monotonic() > end:
                    engine.check_structured_outputs(StructuredOutputsParams(json_object=True))
                    break

    if "generate" in engine.model_info.tasks:
        threading.Thread(target=make, name="grammar-warm-up", daemon=False).start()


def make_server(app: FastAPI, settings: Settings, tls: ssl.SSLContext | None = None) -> DrainingServer:
    """Return uvicorn's server for the application; it serves until `should_exit` is set."""
    given: dict[str, Any] = {} if tls is None else {"ssl_context_factory": lambda *_: tls}
    config = uvicorn.Config(
        app,
        http=http_protocol(),
        ws=WebSocketProtocol,
        ws_max_size=settings.max_body_mb << 20,
        ws_per_message_deflate=False,  # 8 KB may decompress to 8 MB, which are counted only afterwards
        lifespan="on",
        backlog=_BACKLOG,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=settings.shutdown_timeout,
        **given,
    )
    return DrainingServer(config)


def bind(address: Address) -> socket.socket:
    """Return a socket that listens at the address; NotReadyError if it is in use or not this machine's, or UsageError.

    It listens at once, because two sockets that do not listen yet may share a port. Early clients wait for the server.
    """
    if address.unix_path is not None:
        return _bind_unix(address.unix_path)
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # Of a name with addresses of both kinds, such as localhost, the IPv4 one, as in vLLM.
        family, kind, protocol, _, target = min(found, key=lambda each: each[0] != socket.AF_INET)
    except (OSError, UnicodeError) as error:  # UnicodeError: a part between dots is empty or too long
        raise UsageError(f"host {address.host!r} is not an address of this machine: {error}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        if sys.platform == "win32":  # there, SO_REUSEADDR lets two servers listen at one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and address.host == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(target)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        kind = NotReadyError if error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL) else UsageError
        raise kind(_bind_message(address, error)) from None
    return listener


def _bind_message(address: Address, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {address.port} on {address.host} is in use: stop the other server, or choose another --port"
    if error.errno == errno.EACCES:
        return f"port {address.port} is reserved for the system: choose a --port above 1023"
    return f"cannot listen on {address.host} port {address.port}: {error.strerror}"


def _bind_unix(path: Path) -> socket.socket:
    if sys.platform == "win32":
        raise UsageError("Python has no Unix sockets on Windows: give --host an address, as 127.0.0.1")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists():
            _remove_stale(path)
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(f"cannot listen on {path}: {error.strerror}") from None
    except ConfigError:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    """Remove the socket of a crashed server; NotReadyError if a server listens, UsageError for another kind of file."""
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise UsageError(f"{path} exists and is not a socket")
    assert sys.platform != "win32"  # `_bind_unix` refuses Windows
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise NotReadyError(f"another server listens on {path}")


def _remove_socket(address: Address) -> None:
    """Remove this server's Unix socket, but not that of a server that was started while this one drained."""
    if address.unix_path is not None:
        with contextlib.suppress(OSError, ConfigError):
            _remove_stale(address.unix_path)


def _bound(address: Address, listener: socket.socket) -> Address:
    if address.unix_path is not None:
        return address
    return dataclasses.replace(address, port=listener.getsockname()[1])


def banner(app: FastAPI, address: Address, started: ModelSlot | None = None) -> str:
    """Return the lines that say what an application serves, and where.

    `started` is the model that was loaded at the start; None means the default model, which is loaded.
    """
    manager, settings = app.state.manager, app.state.settings
    slot = started or manager.slots[manager.active]
    assert slot.model is not None
    engine, choice = slot.model.engine, slot.model.adapter.planner.choice
    info, stats = engine.model_info, engine.stats()
    names = ", ".join(slot.entry.names)
    others = [other.entry.names[0] for other in manager.slots.values() if other is not slot]
    quantization = f", {info.quantization}" if info.quantization else ""
    url, guarded = address.url, settings.has_api_keys
    page_key: str | None = getattr(app.state, "page_key", None)
    over_tcp = address.unix_path is None  # no browser or client opens a URL of a Unix socket
    told = {
        "model": f"{names} ({info.architecture}, {info.num_parameters / 1e6:,.0f} M parameters{quantization})",
        "other models": f"{', '.join(others)} (loaded when a request names them)" if others else "",
        "device": f"{info.device}, {info.dtype}",
        "tool calls": _format(choice.tools, choice.tools_reason),
        "reasoning": _format(choice.reasoning, choice.reasoning_reason),
        "KV cache": f"{stats.num_blocks * stats.block_size:,} tokens{_cache_size(info)}; longest request "
        f"{info.max_model_len:,}",
        **_asked_for(settings, slot.entry.settings, app),
        "address": url + _for_others(address),
        "web UI": page_address(url, page_key) if settings.ui_server and over_tcp else "",
        "OpenAI base URL": f"{url}/v1" if over_tcp else "",
        "API key": "required" if guarded else "none: everybody who reaches the address may use it",
        "MCP servers": mcp_line(app),
    }
    lines = {name: text for name, text in told.items() if text}
    if (write := LOG_STYLES[settings.log_format].line) is not None:
        fields = {name.lower().replace(" ", "_"): text for name, text in lines.items()}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        return write({"time": now, "level": "INFO", "logger": __name__, "message": "ready", **fields}) + "\n"
    return "".join(f"{name:15}  {text}\n" for name, text in lines.items()) + "Ctrl+C to stop\n"


def _asked_for(settings: Settings, model: Settings, app: FastAPI) -> dict[str, str]:
    """Return the lines of the banner about what the operator turned on, by their names; "" for what is off."""
    drafts = draft_settings(model.speculative_config) if model.speculative_config else None
    limits = (
        *((limit, f"{RATES[name].unit} a {RATES[name].window}") for name, limit in settings.rates.items()),
        (settings.max_queued_requests, "waiting sequences"),
        (settings.max_queued_per_key, "waiting sequences of one key"),
    )
    mailbox: Mailbox | None = app.state.mailbox
    ranks = (model.tensor_parallel_size or model.cpu_ranks or 1) * (model.pipeline_parallel_size or 1)
    adapters = ", ".join(each.name for each in read_specs(model.lora_modules)) or "none yet, requests may name them"
    store = settings.responses_store
    blocks = [str(model.prompt_cache_path or ""), without_secrets(model.prompt_cache_url or "", alone=True)]
    return {
        "drafts": "" if drafts is None else f"{drafts.method}{f', by {drafts.model}' if drafts.model else ''}",
        "ranks": str(ranks) if ranks > 1 else "",
        "adapters": adapters if model.enable_lora else "",
        "prompt cache": ", ".join(filter(None, blocks)),
        "responses": "" if store == MEMORY else without_secrets(store, alone=True),
        "mailbox": "" if mailbox is None else without_secrets(str(settings.mailbox or "on"), alone=True),
        "limits": ", ".join(f"{value:,} {text}" for value, text in limits if value is not None),
        "Ollama's port": "" if settings.ollama_port is None else str(settings.ollama_port),
    }


def _for_others(address: Address) -> str:
    """Return the URL for other machines, by the outgoing interface, if the server listens at every address."""
    if address.unix_path is not None or address.host not in ("0.0.0.0", "::"):  # noqa: S104
        return ""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # an address for documentation (RFC 5737); nothing is sent
        return f" (from elsewhere {dataclasses.replace(address, host=probe.getsockname()[0]).url})"
    return ""


def _cache_size(info: ModelInfo) -> str:
    """Return the maximum size of the KV cache; on a CPU, memory is allocated as blocks fill."""
    if not info.kv_cache_bytes:
        return ""
    fills = ", taken as they fill" if info.device == "cpu" else ""
    return f" (at most {info.kv_cache_bytes / (1 << 20):,.0f} MiB{fills})"


def mcp_line(app: FastAPI) -> str:
    """Return the MCP servers with their states, and where their tools run; "" without servers."""
    service: McpService | None = app.state.mcp
    if service is None:
        return ""
    where = "approved tools run here" if service.options.execute else "clients run their tools"
    names = []
    for server in service.status():
        mark = "disabled" if server.state == "disabled" else "not connected" if server.error else ""
        names.append(f"{server.name} ({mark})" if mark else server.name)
    return f"{', '.join(names)}; {where}"


def _format(row: ToolFormat | ReasoningFormat | None, reason: str) -> str:
    return f"{row.name if row else 'not looked for'} ({reason})"
