# SPDX-License-Identifier: MIT
"""A real server under thousands of valid, wrong and hostile requests, while models change and engines are killed.

Nothing may come back but what a quiet server would have answered, or a refusal that was asked for; and when it is
over, everything is as it was before.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from candle_vllm.server.settings.derived import demo_model
from tests.chaos.answers import usage_of
from tests.chaos.judge import Judge, Limits
from tests.chaos.samples import CLIENT_KEYS, OPERATOR_KEY, cheap, generations, wrong
from tests.chaos.siege import MODELS, Scale, Siege, ask, operator
from tests.live_server import ServerProcess
from tests.waiting import until, wait_for

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="reads processes from /proc"),
]

logger = logging.getLogger(__name__)

LIMITS = Limits(sequences=32, sequences_per_key=16, waiting=64)
SETTLING = 60.0  # seconds
RUN = 1500.0  # seconds that everything may take
MOST_GROWTH = 128 << 20  # bytes of the server's memory from one wave to the next
COMPILING = 300.0  # seconds for kernels that nothing waits for; others go first
COMING_BACK = 100.0  # seconds from a kill until every model is ready; a busy machine is slow to import torch


class ChaosServer(ServerProcess):
    """`candle-vllm` with two models of the same weights, little cache, short queues and keys."""

    def __init__(self, folder: Path, *flags: str) -> None:
        (folder / "models.yaml").write_text(
            "default_model: chaos-a\n"
            "models:\n"
            f"- {{name: chaos-a, local_path: {demo_model()},\n"
            "   params: {mem: 6, block_size: 16, max_num_seqs: 8, max_model_len: 256, threads: 1}}\n"
            f"- {{name: chaos-b, local_path: {demo_model()},\n"
            "   params: {mem: 9, block_size: 32, max_num_seqs: 4, max_model_len: 256, threads: 1,\n"
            "            prefill_chunk_size: 64, temperature: 0.5}}\n"
        )
        keys = [part for key in CLIENT_KEYS for part in ("--api-key", key)]
        limits = ("--max-queued-requests", LIMITS.sequences, "--max-queued-per-key", LIMITS.sequences_per_key)
        super().__init__(
            folder,
            *(*keys, "--management-key", OPERATOR_KEY, "--queue-size", str(LIMITS.waiting)),
            *(str(part) for part in limits),
            *flags,
        )
        self.folder = folder
        self.port = int(self.url.rpartition(":")[2])

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text()

    def engines(self) -> list[int]:
        """The engines' processes: the server's children that live."""
        return [pid for pid, parent, state in _processes() if parent == self.pid and state != "Z"]

    def compiles(self) -> bool:
        """Whether a process of its own still compiles kernels for later, as after a first start."""
        commands = [Path(f"/proc/{pid}/cmdline") for pid in self.engines()]
        return any(b"cpu_runtime.travelling" in path.read_bytes() for path in commands if path.exists())

    def memory(self) -> int:
        """Bytes of its memory that belong to it alone."""
        rollup = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return sum(int(size) for size in re.findall(r"^Private_Dirty: +(\d+)", rollup, re.MULTILINE)) << 10

    def files(self) -> int:
        """Open files."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))


def _processes() -> Iterator[tuple[int, int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            yield int(entry.name), int(fields[1]), fields[0]


@dataclass(frozen=True)
class Counts:
    """What the server says it has done; sums over its models."""

    prompt_tokens: float
    generation_tokens: float
    ended: float
    preemptions: float
    busy: float
    http: float

    @classmethod
    async def read(cls, client: httpx.AsyncClient) -> Counts:
        text = (await client.get("/metrics")).raise_for_status().text
        rows = [row for family in text_string_to_metric_families(text) for row in family.samples]

        def total(*names: str) -> float:
            return sum(row.value for row in rows if row.name in names)

        gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        return cls(
            prompt_tokens=total("vllm:prompt_tokens_total"),
            generation_tokens=total("vllm:generation_tokens_total"),
            ended=total("vllm:request_success_total"),
            preemptions=total("vllm:num_preemptions_total"),
            busy=total(*gauges, "candle_vllm:num_requests_queued", "http_requests_in_progress") - 1,  # the scrape
            http=total("http_requests_total"),
        )

    def __sub__(self, other: Counts) -> Counts:
        return Counts(**{name: value - getattr(other, name) for name, value in vars(self).items()})


# ---- the parts of a run ----------------------------------------------------------------------------------------------


async def learn(server: ChaosServer, judge: Judge) -> None:
    """The answers of a quiet server; the second model has the same weights, so they hold for both."""
    for sample in (*generations(), *cheap(), *wrong()):
        judge.learn(sample, await ask(server.port, sample, MODELS[0], CLIENT_KEYS[0]))


async def settle(client: httpx.AsyncClient) -> Counts:
    """Waits until nothing is left of what clients asked, and says what was counted."""
    end = time.monotonic() + SETTLING
    while True:
        told, counts = (await client.get("/v1/models/status")).raise_for_status().json(), await Counts.read(client)
        left = {name: told[name] for name in ("in_flight_requests", "queue_lengths")}
        sequences = sum(model["running"] + model["waiting"] for model in told["models"])
        if (
            counts.busy == 0
            and not sequences
            and left == {"in_flight_requests": 0, "queue_lengths": dict.fromkeys(MODELS, 0)}
        ):
            return counts
        if time.monotonic() >= end:
            raise TimeoutError(f"{told} {counts}")
        await asyncio.sleep(0.1)


async def loaded_anew(server: ChaosServer, client: httpx.AsyncClient) -> int:
    """The server's memory with the first model just loaded, as far as one is let go of for another.

    A wave ends with either model, loaded long ago or just now: their caches would be most of the difference.
    """
    sample = generations()[0]
    for model in reversed(MODELS):
        await ask(server.port, sample, model, CLIENT_KEYS[0])
    await settle(client)
    await until(lambda: not server.compiles(), COMPILING)
    return server.memory()


async def besieged(server: ChaosServer, judge: Judge, client: httpx.AsyncClient, scale: Scale) -> Siege:
    """One wave, until all is quiet."""
    wave = Siege(server.port, judge, scale, server.engines)
    await wave.run()
    await settle(client)
    return wave


async def full_house(server: ChaosServer, judge: Judge, client: httpx.AsyncClient) -> None:
    """As many sequences as may be, all read to the end: none is refused, and what is counted is what was told."""
    before, told, began = await Counts.read(client), Judge(judge.limits, judge.expected), time.monotonic()
    single = [sample for sample in generations() if sample.sequences == 1][: LIMITS.sequences]
    assert len(single) == LIMITS.sequences
    answers = await asyncio.gather(
        *(ask(server.port, sample, MODELS[0], CLIENT_KEYS[n % 3]) for n, sample in enumerate(single))
    )
    for sample, answer in zip(single, answers, strict=True):
        told.check(sample, answer, began)
        assert usage_of(answer) is not None, (sample.name, answer)
    assert told.faults == []
    assert told.outcomes == {"as expected": LIMITS.sequences}
    counted = await settle(client) - before
    assert counted.prompt_tokens == told.prompt_tokens.total()
    assert counted.generation_tokens == told.completion_tokens.total()
    assert counted.ended == LIMITS.sequences


async def overfill(server: ChaosServer, judge: Judge) -> None:
    """More sequences at once than may be: what is too much is refused, and the other answers are the same."""
    told, began = Judge(judge.limits, judge.expected), time.monotonic()
    (sample,) = (sample for sample in generations() if sample.name == "longer")
    numbers = range((LIMITS.sequences + 8) // sample.sequences)
    for answer in await asyncio.gather(
        *(ask(server.port, sample, MODELS[0], CLIENT_KEYS[number % 3]) for number in numbers)
    ):
        told.check(sample, answer, began)
    assert told.faults == []
    assert told.outcomes["refused: queue"] > 0, dict(told.outcomes)
    assert told.outcomes["as expected"] + told.outcomes["refused: queue"] == len(numbers), dict(told.outcomes)


async def outgrow(server: ChaosServer, judge: Judge, client: httpx.AsyncClient) -> None:
    """Eight sequences that begin together and outgrow the cache: some are preempted, and their answers are the same."""
    before, told, began = await Counts.read(client), Judge(judge.limits, judge.expected), time.monotonic()
    (sample,) = (sample for sample in generations() if sample.name == "longer")
    for answer in await asyncio.gather(*(ask(server.port, sample, MODELS[0], CLIENT_KEYS[0]) for _ in range(2))):
        told.check(sample, answer, began)
    assert (told.faults, told.outcomes) == ([], {"as expected": 2})
    assert (await settle(client) - before).preemptions > 0, "the cache was never too small"


async def everything(server: ChaosServer, scale: Scale) -> None:
    """Learns, besieges the server in waves, and looks at what is left."""
    judge = Judge(LIMITS)
    async with operator(server.port) as client:
        await learn(server, judge)
        first = await settle(client)
        waves = [await besieged(server, judge, client, scale)]
        memory, files, engines = await loaded_anew(server, client), server.files(), len(server.engines())
        growth = MOST_GROWTH
        while growth >= MOST_GROWTH and len(waves) < 3:  # the first waves fill pools; what leaks grows in each
            waves.append(await besieged(server, judge, client, replace(scale, seed=scale.seed + 1000 * len(waves))))
            growth, memory = (after := await loaded_anew(server, client)) - memory, after
            logger.info("growth: %s", growth)
        counted = await settle(client) - first
        recoveries = [seconds for wave in waves for seconds in wave.recoveries]
        logger.info("outcomes: %s", dict(judge.outcomes))
        logger.info("files: %s", (files, server.files()))
        logger.info("recoveries: %s", recoveries)
        logger.info("counted: %s", counted)
        assert judge.faults == []
        assert judge.prompt_tokens.total() <= counted.prompt_tokens
        assert judge.completion_tokens.total() <= counted.generation_tokens
        assert growth < MOST_GROWTH
        assert len(server.engines()) == engines
        assert server.files() <= files + 3
        assert all(seconds < COMING_BACK for seconds in recoveries)
        assert len(recoveries) == len(waves) * scale.kills
        await full_house(server, judge, client)
        await overfill(server, judge)
        await outgrow(server, judge, client)


def besiege(folder: Path, scale: Scale, *flags: str) -> None:
    """Starts a server, does everything to it, and stops it."""
    server = ChaosServer(folder, *flags)
    began = time.monotonic()
    try:
        wait_for(lambda: httpx.get(server.url + "/health", trust_env=False).status_code == 200)
        asyncio.run(asyncio.wait_for(everything(server, scale), RUN))
        logger.info("seconds: %s", time.monotonic() - began)
        engines = server.engines()
    finally:
        status = server.stop()
    assert status == 0
    assert not [pid for pid, _, state in _processes() if pid in engines and state != "Z"]
    assert "Traceback" not in server.log


# ---- the tests -------------------------------------------------------------------------------------------------------

SWITCHING = Scale(clients=90, changes=3, kills=0, seed=1, elsewhere=0.002)
KILLING = Scale(clients=50, changes=0, kills=1, seed=2, elsewhere=0.6)


@pytest.mark.every_case
def test_a_server_that_switches_models(tmp_path: Path) -> None:
    besiege(tmp_path, SWITCHING, "--max-loaded-models", "1")


def test_engines_that_are_killed(tmp_path: Path) -> None:
    besiege(tmp_path, KILLING, "--engine-process")


@pytest.mark.chaos_long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(100, 105))
def test_a_server_that_switches_models_for_long(tmp_path: Path, seed: int) -> None:
    scale = replace(SWITCHING, clients=4000, changes=20, seed=seed)
    besiege(tmp_path, scale, "--max-loaded-models", "1")


@pytest.mark.chaos_long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(100, 105))
def test_engines_that_are_killed_for_long(tmp_path: Path, seed: int) -> None:
    besiege(tmp_path, replace(KILLING, clients=4000, kills=4, seed=seed), "--engine-process")
