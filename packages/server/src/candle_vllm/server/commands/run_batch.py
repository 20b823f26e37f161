# SPDX-License-Identifier: MIT
"""`candle-vllm run-batch`: answers the requests of a file in OpenAI's batch format, and writes the answers to a file.

No port is opened: the application in this process answers the lines, from step 1 of a request's life. The operator may
also give HTTP URLs instead of files; they are read by GET and written by PUT.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import os
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import IO, Any

import httpx

from candle_vllm.core.errors import CandleVllmError, EngineDeadError
from candle_vllm.core.shown import without_secrets
from candle_vllm.responses.store.backend import MEMORY
from candle_vllm.server.adapters.fetching import steadily
from candle_vllm.server.app import create_app
from candle_vllm.server.batches.lines import Application, Result, answered_in_order, asked_here, failed
from candle_vllm.server.models.switcher import Load
from candle_vllm.server.reloading import warn_of_missing
from candle_vllm.server.serve import open_manager
from candle_vllm.server.settings.configuration import Configuration
from candle_vllm.server.settings.derived import refuse_wrong_settings
from candle_vllm.server.settings.options import UsageError
from candle_vllm.server.settings.table import RATES

MAX_LINE_MB = 64
MAX_INPUT_MB = 4096  # maximum size of a file from a URL
PATIENCE = 1 << 20  # seconds until the timeout of one line
TELLING_SECONDS = 5.0  # seconds between two progress messages
SENDING_PAUSES = (1.0, 5.0, 25.0)  # seconds before each further attempt to upload the answers
MORE_THAN_RUN = 2  # lines in progress per running sequence, so that the next lines are parsed meanwhile


def run_batch(
    configuration: Configuration,
    input_file: str | None = None,
    output_file: str | None = None,
    output_tmp_dir: Path | None = None,
    load: Load | None = None,
) -> int:
    """Answer every line of `input_file` in `output_file`, which is overwritten; return 0 even if lines failed.

    Both are files or HTTP URLs; answers for a URL are first written to a file in `output_tmp_dir`. Raises
    CandleVllmError or OSError if an argument is wrong, or a file, a URL or the model is not available.
    """
    if input_file is None or output_file is None:
        raise UsageError(f"{'-i' if input_file is None else '-o'} FILE is missing: run-batch -i IN.jsonl -o OUT.jsonl")
    source, target = _place(input_file), _place(output_file)
    for entry in configuration.catalogue.entries:
        refuse_wrong_settings(entry.settings)
    warn_of_missing(configuration.catalogue)
    with _fetched(source) if isinstance(source, httpx.URL) else source.open("rb") as given:
        if isinstance(target, Path):
            if target.exists() and isinstance(source, Path) and target.samefile(source):
                raise UsageError(f"{target} is the input: write the answers to another file")
            with target.open("ab") as made:
                asyncio.run(_run(configuration, given, made, load))
            return 0
        descriptor, name = tempfile.mkstemp(prefix="run-batch-", suffix=".jsonl", dir=output_tmp_dir)
        try:
            with os.fdopen(descriptor, "wb") as made:
                asyncio.run(_run(configuration, given, made, load))
            _send(target, Path(name))
        except BaseException:
            if os.path.getsize(name):
                sys.stderr.write(f"run-batch: the answers so far are in {name}\n")
            else:
                os.unlink(name)
            raise
    return 0


# ---- files at URLs ---------------------------------------------------------------------------------------------------


def _place(text: str) -> Path | httpx.URL:
    if text == "-":
        raise UsageError("- is not a file here: name one, such as /dev/stdin or /dev/stdout")
    scheme, colon, _ = text.partition("://")
    if not colon or "/" in scheme:
        return Path(os.path.expanduser(text))
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        raise UsageError(f"{without_secrets(text)!r:.200} is not a valid address") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(f"{without_secrets(str(url))} is neither a file nor an address of http:// or https://")
    return url


def _client() -> httpx.Client:
    """Return an HTTP client for the one URL that the operator allowed: it follows no redirects, and accepts gzip."""
    return httpx.Client(timeout=60, follow_redirects=False, headers={"accept-encoding": "gzip"})


def _fetched(url: httpx.URL) -> IO[bytes]:
    """Download a URL to a temporary file, which is deleted when it is closed."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    try:
        with _client() as http, http.stream("GET", url) as answer:
            if answer.status_code != httpx.codes.OK:
                raise CandleVllmError(
                    f"{without_secrets(str(url))} cannot be read: it answered with {answer.status_code}"
                )
            if answer.headers.get("content-encoding", "identity") not in ("identity", "gzip"):
                raise CandleVllmError(
                    f"{without_secrets(str(url))} has a compression other than gzip: download it and name the file"
                )
            for piece in steadily(answer.iter_bytes()):
                if file.tell() + len(piece) > MAX_INPUT_MB << 20:
                    raise CandleVllmError(
                        f"{without_secrets(str(url))} is larger than {MAX_INPUT_MB} MB: download it and name the file"
                    )
                file.write(piece)
    except httpx.HTTPError as error:
        file.close()
        raise CandleVllmError(f"{without_secrets(str(url))} cannot be read: {error}") from None
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


def _send(url: httpx.URL, path: Path) -> None:
    """Upload the answers and remove their file; CandleVllmError if that fails."""
    why = ""
    for pause in (0.0, *SENDING_PAUSES):
        time.sleep(pause)
        try:
            with _client() as http, path.open("rb") as file, http.stream("PUT", url, content=file) as answer:
                status = answer.status_code
        except httpx.HTTPError as error:
            why = str(error)
            continue
        if status < httpx.codes.MULTIPLE_CHOICES:
            path.unlink()
            return
        why = f"it answered with {status}"
        if status < httpx.codes.INTERNAL_SERVER_ERROR and status != httpx.codes.TOO_MANY_REQUESTS:
            break
    raise CandleVllmError(f"{without_secrets(str(url))} did not accept the answers ({why})")


# ---- lines -----------------------------------------------------------------------------------------------------------


async def _run(configuration: Configuration, given: IO[bytes], made: IO[bytes], load: Load | None) -> None:
    # There are no other clients, so no keys or limits are needed; nor a store, whose batches would be continued.
    settings = dataclasses.replace(
        configuration.settings, host="127.0.0.1", api_key=(), api_key_file=None, api_keys_file=None, management_key=(),
        max_queued_per_key=None, max_body_mb=MAX_LINE_MB, request_timeout=PATIENCE, responses_store=MEMORY,
        **dict[str, Any](dict.fromkeys(RATES)),
    )  # fmt: skip
    manager, observation = open_manager(configuration.catalogue, settings, load)
    app = create_app(manager, settings)
    async with app.router.lifespan_context(app), asked_here(app) as application:
        slot = await manager.start()
        assert slot.model is not None
        gc.freeze()
        if made.seekable() and made.tell() and not str(made.name).startswith(("/dev/std", "/dev/fd/")):
            made.truncate(0)  # what an earlier run wrote stays until the model is loaded; or the shell does it
        width = MORE_THAN_RUN * slot.model.engine.model_info.max_num_seqs
        await _answer_all(application, given, made, width, lambda: manager.is_healthy)
    observation.close()


async def _answer_all(
    application: Application, given: IO[bytes], made: IO[bytes], width: int, is_alive: Callable[[], bool]
) -> None:
    done, wrong, longest = 0, 0, MAX_LINE_MB << 20
    told = time.monotonic()

    async def answer(line: bytes) -> Result:
        if len(line) > longest:
            return failed(None, "line_too_long", f"A line has at most {MAX_LINE_MB} MB.")
        return await application.answer(line)

    async with contextlib.aclosing(answered_in_order(_lines(given, longest), answer, width)) as results:
        async for result in results:
            if result.error is not None and not is_alive():
                raise EngineDeadError("the engine has stopped; the answers so far are written")
            made.write(result.line)
            made.flush()  # whole lines, even if a signal ends the process
            done += 1
            wrong += result.error is not None
            if time.monotonic() - told >= TELLING_SECONDS:
                told = time.monotonic()
                sys.stderr.write(f"run-batch: lines answered: {done}, with an error: {wrong}\n")
    sys.stderr.write(f"run-batch: done; lines answered: {done}, with an error: {wrong}\n")


async def _lines(given: IO[bytes], longest: int) -> AsyncGenerator[bytes]:
    """Yield the non-empty lines of a file; a line that is too long is truncated."""
    lines = _cut_lines(given, longest)
    while (line := await asyncio.to_thread(next, lines, None)) is not None:
        yield line


def _cut_lines(given: IO[bytes], longest: int) -> Iterator[bytes]:
    while line := given.readline(longest + 2):
        whole = line.endswith(b"\n")
        while not whole and (rest := given.readline(1 << 20)):  # read and discard the rest
            whole = rest.endswith(b"\n")
        if line := line.strip(b" \t\r\n"):
            yield line
