"""`candle-vllm run-batch`: answers the requests of a file, in OpenAI's batch format, and writes a file of answers.

No address is opened: the lines are asked of the application in this process, at step 1 of a request's life.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import BinaryIO

from candle_vllm.server.app import create_app
from candle_vllm.server.batches.lines import Application, Result, answered_in_order, asked_here, failed
from candle_vllm.server.models.loader import ModelLoader
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.models.switcher import Load
from candle_vllm.server.observing.metrics import Observation
from candle_vllm.server.reloading import warn_of_missing
from candle_vllm.server.serve import limits_of
from candle_vllm.server.settings.configuration import Configuration
from candle_vllm.server.settings.derived import refuse_wrong_formats
from candle_vllm.server.settings.options import UsageError

MAX_LINE_MB = 64
PATIENCE = 1 << 20  # seconds for one line
TELLING_SECONDS = 5.0  # between two lines about how far it is
MORE_THAN_RUN = 2  # lines under way for each one that the engine computes: the next are read and checked meanwhile


def run_batch(
    configuration: Configuration,
    input_file: Path | None = None,
    output_file: Path | None = None,
    load: Load | None = None,
) -> int:
    """Answers every line of `input_file` into `output_file`, which is written anew; 0 also where lines failed.

    Raises:
        CandleVllmError: a file or the model cannot be had.
    """
    if input_file is None or output_file is None:
        raise UsageError(f"{'-i' if input_file is None else '-o'} FILE is missing: run-batch -i IN.jsonl -o OUT.jsonl")
    for path in (input_file, output_file):
        if "://" in str(path) or str(path).startswith(("http:/", "https:/")):
            raise UsageError(f"{path} is an address: run-batch reads and writes files of this machine")
    for entry in configuration.catalogue.entries:
        refuse_wrong_formats(entry.settings)
    warn_of_missing(configuration.catalogue)
    with input_file.open("rb") as given:
        if output_file.exists() and output_file.samefile(input_file):
            raise UsageError(f"{output_file} is the input: write the answers to another file")
        with output_file.open("wb") as made:
            asyncio.run(_run(configuration, given, made, load))
    return 0


async def _run(configuration: Configuration, given: BinaryIO, made: BinaryIO, load: Load | None) -> None:
    # Nobody comes from outside: there are no keys, and nobody has to be protected from the others.
    settings = dataclasses.replace(
        configuration.settings, api_key=(), api_key_file=None, api_keys_file=None, management_key=(),
        requests_per_minute=None, tokens_per_minute=None, max_queued_per_key=None,
        max_body_mb=MAX_LINE_MB, request_timeout=PATIENCE,
    )  # fmt: skip
    observation = Observation(settings)
    loader = load or ModelLoader(observation.metrics)
    manager = ModelManager(configuration.catalogue, loader, limits_of(settings), observation.metrics)
    app = create_app(manager, settings)
    async with app.router.lifespan_context(app), asked_here(app) as application:
        slot = await manager.start()
        assert slot.model is not None
        gc.freeze()
        width = MORE_THAN_RUN * slot.model.engine.model_info.max_num_seqs
        await _answer_all(application, given, made, width)
    observation.close()


async def _answer_all(application: Application, given: BinaryIO, made: BinaryIO, width: int) -> None:
    done, wrong, longest = 0, 0, MAX_LINE_MB << 20
    told = time.monotonic()

    async def answer(line: bytes) -> Result:
        if len(line) > longest:
            return failed(None, "line_too_long", f"A line has at most {MAX_LINE_MB} MB.")
        return await application.answer(line)

    async with contextlib.aclosing(answered_in_order(_lines(given, longest), answer, width)) as results:
        async for result in results:
            made.write(result.line)
            done += 1
            wrong += result.error is not None
            if time.monotonic() - told >= TELLING_SECONDS:
                told = time.monotonic()
                made.flush()
                sys.stderr.write(f"run-batch: {done} lines answered, {wrong} of them with an error\n")
    sys.stderr.write(f"run-batch: done, {done} lines answered, {wrong} of them with an error\n")


async def _lines(given: BinaryIO, longest: int) -> AsyncGenerator[bytes]:
    """The lines of a file that are not empty; of one that is too long, its beginning."""
    lines = _cut_lines(given, longest)
    while (line := await asyncio.to_thread(next, lines, None)) is not None:
        yield line


def _cut_lines(given: BinaryIO, longest: int) -> Iterator[bytes]:
    while line := given.readline(longest + 2):
        whole = line.endswith(b"\n")
        while not whole and (rest := given.readline(1 << 20)):  # read, and let go
            whole = rest.endswith(b"\n")
        if line := line.strip(b" \t\r\n"):
            yield line
