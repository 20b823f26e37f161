"""The library beside the server: the same prompts, the same engine, one process, in turns."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

from client import Notes, chat_request, connect
from figures import report
from process import ServerProcess, server

PATIENCE = 300.0  # seconds for a round
TOPICS = ("rivers", "bread", "clocks", "glass", "birds", "maps", "salt", "bridges")


def prompts_of(streams: int, round_number: int) -> list[str]:
    """Prompts of much the same length that begin differently, so that no cache helps one side."""
    return [f"{round_number}.{n}: tell me about {TOPICS[n % len(TOPICS)]} and their history." for n in range(streams)]


async def http_round(target: ServerProcess, prompts: list[str], max_tokens: int) -> dict[str, Any]:
    """Seconds from the first request to the end of the last answer, and what the clients saw."""
    notes = Notes()
    notes.open = True
    requests = [chat_request(text, max_tokens, stream_options={"include_usage": True}) for text in prompts]
    cpu, start = target.cpu_seconds(), time.perf_counter()
    clients = await asyncio.gather(*(connect(target.address, request, notes) for request in requests))
    await asyncio.wait_for(asyncio.gather(*(client.done for client in clients)), PATIENCE)
    seconds = time.perf_counter() - start
    if notes.failures:
        raise RuntimeError(notes.failures[0])
    return {"seconds": seconds, "cpu_s": target.cpu_seconds() - cpu, "notes": notes}


def compare(streams: int, max_tokens: int, rounds: int, arguments: tuple[str, ...], how: str) -> dict[str, Any]:
    """Tokens per second of both sides, alternating; medians, and the median of the rounds' ratios."""
    tokens = streams * max_tokens
    library: list[float] = []
    served: list[float] = []
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
                    end = asyncio.run(http_round(target, prompts, max_tokens))
                    notes = end["notes"]
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
        "ratios": [round(b / a, 3) for a, b in zip(library, served)],
        "last_gap_ms": notes.gaps.milliseconds(),
        "last_first_token_ms": notes.first.milliseconds(),
        "server_rss_mb": memory,
    }


def run(streams: int, max_tokens: int, rounds: int, *, engine: str, model: str | None, how: str) -> dict[str, Any]:
    """One line: HTTP over the library at so many streams."""
    arguments = ("--engine", engine, *(("--m", model) if model else ()))
    figures = compare(streams, max_tokens, rounds, arguments, how)
    met = {"http_at_least_95_percent": figures["http_over_library"] >= 0.95}
    report("library", engine=engine, model=model or "demo", **figures, bars=met)
    return figures
