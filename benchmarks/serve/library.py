# SPDX-License-Identifier: MIT
"""The library beside the server: the same prompts, the same engine, one process, in turns."""

from __future__ import annotations

import asyncio
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

from client import Notes, chat_request, connect
from figures import report
from process import ServerProcess, server

PATIENCE = 300.0  # seconds for a round
Loop = Literal["asyncio", "uvloop"]
LOOPS: dict[Loop, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": lambda: importlib.import_module("uvloop").new_event_loop(),
}
TOPICS = ("rivers", "bread", "clocks", "glass", "birds", "maps", "salt", "bridges")


def prompts_of(streams: int, round_number: int) -> list[str]:
    """Prompts of much the same length that begin differently, so that no cache helps one side."""
    return [f"{round_number}.{n}: tell me about {TOPICS[n % len(TOPICS)]} and their history." for n in range(streams)]


async def http_round(target: ServerProcess, prompts: list[str], max_tokens: int, read_bytes: int) -> dict[str, Any]:
    """Seconds from the first request to the end of the last answer, and what the clients saw."""
    notes = Notes()
    notes.open = True
    more: dict[str, Any] = {"stream_options": {"include_usage": True}, "close": read_bytes > 1}
    requests = [chat_request(text, max_tokens, **more) for text in prompts]
    cpu, own, start = target.cpu_seconds(), time.process_time(), time.perf_counter()
    reading = (connect(target.address, request, notes, read_bytes=read_bytes) for request in requests)
    clients = await asyncio.gather(*reading)
    await asyncio.wait_for(asyncio.gather(*(client.done for client in clients)), PATIENCE)
    seconds = time.perf_counter() - start
    if notes.failures:
        raise RuntimeError(notes.failures[0])
    cpus = {"cpu_s": target.cpu_seconds() - cpu, "client_cpu_s": time.process_time() - own}
    return {"seconds": seconds, "notes": notes, **cpus}


def compare(
    streams: int, max_tokens: int, rounds: int, arguments: tuple[str, ...], how: str, loop: Loop, read_bytes: int
) -> dict[str, Any]:
    """Tokens per second of both sides, alternating; medians, and the median of the rounds' ratios."""
    tokens = streams * max_tokens
    library: list[float] = []
    served: list[float] = []
    client_cpu: list[float] = []
    notes = Notes()
    with server("model", *arguments) as target:
        for number in range(rounds + 1):
            prompts = prompts_of(streams, number)
            sides = [("library", library), ("http", served)]
            for side, found in sides if number % 2 else reversed(sides):
                if side == "library":
                    end = target.library(how, prompts, max_tokens, PATIENCE)
                    if end["tokens"] != tokens:
                        raise RuntimeError(f"the library made {end['tokens']} tokens instead of {tokens}")
                else:
                    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
                        end = runner.run(http_round(target, prompts, max_tokens, read_bytes))
                    notes = end["notes"]
                    client_cpu.append(end["client_cpu_s"])
                if number:  # the first round warms up
                    found.append(tokens / end["seconds"])
        memory = target.resident_mb()
    ratio = statistics.median(b / a for a, b in zip(library, served))
    return {
        "streams": streams,
        "max_tokens": max_tokens,
        "rounds": rounds,
        "library": how,
        "library_tokens_per_s": round(statistics.median(library), 1),
        "http_tokens_per_s": round(statistics.median(served), 1),
        "http_over_library": round(ratio, 4),
        "client_loop": loop,
        "client_read_bytes": read_bytes,
        "client_cpu_us_per_token": round(1e6 * statistics.median(client_cpu) / tokens, 1),
        "ratios": [round(b / a, 3) for a, b in zip(library, served)],
        "last_gap_ms": notes.gaps.milliseconds(),
        "last_first_token_ms": notes.first.milliseconds(),
        "server_rss_mb": memory,
    }


def run(
    streams: int,
    max_tokens: int,
    rounds: int,
    *,
    engine: str,
    model: str | None,
    how: str,
    loop: Loop = "asyncio",
    read_bytes: int = 1,
) -> dict[str, Any]:
    """One line: HTTP over the library at so many streams."""
    arguments = ("--engine", engine, *(("--m", model) if model else ()))
    figures = compare(streams, max_tokens, rounds, arguments, how, loop, read_bytes)
    met = {"http_at_least_95_percent": figures["http_over_library"] >= 0.95}
    report("library", engine=engine, model=model or "demo", **figures, bars=met)
    return figures
