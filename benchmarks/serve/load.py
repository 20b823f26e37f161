# SPDX-License-Identifier: MIT
"""Many streams at a fixed rate: what reaches the clients, how evenly, and what the server takes for it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from client import Notes, StreamClient, chat_request, connect
from figures import report
from process import ServerProcess, cpu_per_thousand, server

RAMP = 200.0  # streams that begin per second
SETTLE = 1.0  # seconds between the last beginning and the first figure
PROBE_PAUSE = 0.1  # seconds between two short requests beside the streams
PATIENCE = 60.0  # seconds for what should take few
ENDLESS = 1_000_000  # tokens; the clients leave before


async def measure(target: ServerProcess, streams: int, rate: float, seconds: float) -> dict[str, Any]:
    """Figures of so many streams, over so many seconds."""
    notes, probed = Notes(), Notes()
    clients = await _begin(target, streams, notes)
    probes = asyncio.create_task(_probe(target, probed))
    cpu, own_cpu, start = target.cpu_seconds(), time.process_time(), time.monotonic()
    memory = [target.resident_mb()]
    notes.open = True
    for minute in range(1, int(seconds // 60) + 1):
        await asyncio.sleep(start + 60 * minute - time.monotonic())
        memory.append(target.resident_mb())
    await asyncio.sleep(max(0.0, start + seconds - time.monotonic()))
    notes.open = False
    elapsed, used = time.monotonic() - start, time.process_time() - own_cpu
    cpu_end = target.cpu_seconds()
    memory.append(target.resident_mb())
    probes.cancel()
    broken = (await asyncio.gather(probes, return_exceptions=True))[0]
    if not isinstance(broken, asyncio.CancelledError):
        probed.failures.append(f"the probes ended: {broken!r}")
    for client in clients:
        client.leave()
    tokens = notes.tokens + probed.tokens
    return {
        "streams": streams,
        "rate": rate,
        "seconds": round(elapsed, 1),
        "tokens_per_s": round(notes.tokens / elapsed, 1),
        "share_of_offered": round(notes.tokens / (streams * rate * elapsed), 4),
        "gap_ms": notes.gaps.milliseconds(),
        "delay_ms": notes.delays.milliseconds(),
        "stalls": notes.stalls,
        "first_token_above_engine_ms": probed.first.milliseconds(),
        "first_token_in_ramp_ms": notes.first.milliseconds(),
        "probes": probed.first.count,
        "failures": (notes.failures + probed.failures)[:3],
        **cpu_per_thousand(cpu, cpu_end, tokens),
        "server_cpu_share": round((cpu_end - cpu) / elapsed, 3),
        "client_cpu_share": round(used / elapsed, 3),
        "server_rss_mb": memory,
    }


async def _begin(target: ServerProcess, streams: int, notes: Notes) -> list[StreamClient]:
    clients: list[StreamClient] = []
    for number in range(streams):
        request = chat_request(f"Stream {number}", ENDLESS)
        clients.append(await connect(target.address, request, notes))
        await asyncio.sleep(1 / RAMP)
    end = time.monotonic() + PATIENCE
    while notes.begun < streams and not notes.failures:
        if time.monotonic() > end:
            raise RuntimeError(f"{notes.begun} of {streams} streams have begun after {PATIENCE:.0f} s")
        await asyncio.sleep(0.05)
    await asyncio.sleep(SETTLE)
    return clients


async def _probe(target: ServerProcess, notes: Notes) -> None:
    """Short requests, one after the other, for as long as it is left alone."""
    notes.open = True
    while True:
        client = await connect(target.address, chat_request("A probe", 3), notes)
        async with asyncio.timeout(PATIENCE):  # `wait_for` may take an answer that comes now for its cancellation
            await client.done
        await asyncio.sleep(PROBE_PAUSE)


def bars(figures: dict[str, Any], *, minutes: bool) -> dict[str, bool]:
    """Which of the project's bars the figures meet."""
    gaps, memory = figures["gap_ms"], figures["server_rss_mb"]
    met = {
        "no_stall_over_250_ms": figures["stalls"] == 0,
        "p99_gap_under_2_medians": gaps["p99"] < 2 * gaps["p50"],
        "first_token_under_15_ms_above_engine": figures["first_token_above_engine_ms"]["p50"] < 15,
        "no_failures": not figures["failures"],
    }
    if minutes:  # the first minute fills pools
        settled = memory[1:]
        met["memory_flat"] = max(settled) - settled[0] < max(0.02 * settled[0], 4.0)
    return met


def load(
    counts: list[int], rate: float, seconds: float, *, name: str = "load", extra: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """One line for every number of streams."""
    found: list[dict[str, Any]] = []
    with server("paced", "--rate", str(rate), *extra) as target:
        for count in counts:
            figures = asyncio.run(measure(target, count, rate, seconds))
            report(name, **figures, bars=bars(figures, minutes=seconds >= 120))
            found.append(figures)
            time.sleep(1)
    return found
