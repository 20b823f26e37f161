# SPDX-License-Identifier: MIT
"""Many clients at once, each with its bad habits; an operator who changes models, and somebody who kills engines."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.chaos.judge import Judge
from tests.chaos.samples import CLIENT_KEYS, OPERATOR_KEY, Sample, cheap, generations, hostile, wrong
from tests.chaos.wire import Answer, Connection, Pace, connect

LONGEST = 120.0  # seconds that one client may take
WORKERS = 32
MODELS = ("chaos-a", "chaos-b")


@dataclass(frozen=True)
class Scale:
    """How much is done.

    Attributes:
        clients: how many come, one after the other in each of the workers.
        changes: of models, by the operator.
        kills: of engines.
        seed: of everything that is drawn by lot.
        elsewhere: share of the requests that mean another model than most do.
    """

    clients: int
    changes: int
    kills: int
    seed: int
    elsewhere: float


@dataclass
class Siege:
    """One run against a server.

    Attributes:
        engines: process ids of the engines' processes, now.
        recoveries: seconds from each kill until every model was ready again.
    """

    port: int
    judge: Judge
    scale: Scale
    engines: Callable[[], list[int]]
    recoveries: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begun = 0
        self._rng = random.Random(self.scale.seed)
        self._current = MODELS[0]
        self._kinds = (generations(), cheap(), wrong())

    async def run(self) -> None:
        """All clients, the operator and the killer, to their end."""
        habits = [self._next_client() for _ in range(self.scale.clients)]
        queue = iter(habits)
        async with asyncio.TaskGroup() as group:
            for _ in range(WORKERS):
                group.create_task(self._work(queue))
            group.create_task(self._operate())
            group.create_task(self._kill())

    # ---- clients -----------------------------------------------------------------------------------------------------

    def _next_client(self) -> tuple[Any, list[Sample], random.Random]:
        """Who comes next: its habit, what it asks, and its own luck."""
        rng = random.Random(self._rng.getrandbits(64))
        habit = rng.choices(*zip(*_HABITS, strict=True))[0]
        count = rng.randint(2, 4) if habit in _LASTING else 1
        return habit, [rng.choice(rng.choices(self._kinds, (3, 2, 6))[0]) for _ in range(count)], rng

    def _model(self, rng: random.Random) -> str:
        """Most want the model that the operator chose last, with or without its name."""
        if rng.random() < self.scale.elsewhere:
            return rng.choice(MODELS)
        return rng.choice(("default", self._current, self._current))

    async def _work(self, clients: Any) -> None:
        for habit, samples, rng in clients:
            self._begun += 1
            asked = [(sample, sample.encode(self._model(rng), rng.choice(CLIENT_KEYS))) for sample in samples]
            try:
                async with asyncio.timeout(LONGEST), connect(self.port) as connection:
                    await habit(self, connection, asked, rng)
            except TimeoutError:
                self.judge.fault(asked[0][0].name, f"{habit.__name__}: no end within {LONGEST:g} s")

    async def _plain(self, connection: Connection, asked: _Asked, rng: random.Random) -> None:
        for sample, data in asked:
            await connection.send(data)
            answer = await connection.answer()
            self._check(sample, answer)
            if answer.header("connection") == "close":
                return

    async def _pipeline(self, connection: Connection, asked: _Asked, rng: random.Random) -> None:
        await connection.send(b"".join(data for _, data in asked))
        for sample, _ in asked:
            answer = await connection.answer()
            self._check(sample, answer)
            if answer.header("connection") == "close":
                return

    async def _send_slowly(self, connection: Connection, asked: _Asked, rng: random.Random) -> None:
        sample, data = asked[0]
        await connection.send_slowly(data, rng.randint(2, 9), rng.uniform(0.01, 0.15))
        self._check(sample, await connection.answer())

    async def _send_half(self, connection: Connection, asked: _Asked, rng: random.Random) -> None:
        await connection.send(asked[0][1][: -rng.randint(1, len(asked[0][1]))])
        await asyncio.sleep(rng.uniform(0, 0.2))
        self.judge.outcomes["left"] += 1

    async def _read_slowly(self, connection: Connection, asked: _Asked, rng: random.Random) -> None:
        sample, data = asked[0]
        await connection.send(data)
        self._check(sample, await connection.answer(Pace(piece=rng.choice((700, 5000)), pause=0.002)))

    async def _stop_reading(self, connection: Connection, asked: _Asked, rng: random.Random) -> None:
        await connection.send(asked[0][1])
        await asyncio.sleep(rng.uniform(0.5, 1.5))
        self.judge.outcomes["left"] += 1

    async def _leave_early(self, connection: Connection, asked: _Asked, rng: random.Random) -> None:
        await connection.send(asked[0][1])
        await asyncio.sleep(rng.choice((0.0, 0.001, 0.02, 0.2)))
        self.judge.outcomes["left"] += 1

    async def _leave_midway(self, connection: Connection, asked: _Asked, rng: random.Random) -> None:
        sample, data = asked[0]
        await connection.send(data)
        answer = await connection.answer(Pace(piece=256, enough=rng.randint(1, 4000)))
        self.judge.check_part(sample, answer, time.monotonic())

    async def _attack(self, connection: Connection, asked: _Asked, rng: random.Random) -> None:
        data = hostile(rng)
        await connection.send(data)
        self.judge.check_bytes(data, await connection.everything(rng.uniform(0.05, 1.0)))

    def _check(self, sample: Sample, answer: Answer) -> None:
        self.judge.check(sample, answer, time.monotonic())

    # ---- the operator, and the killer --------------------------------------------------------------------------------

    async def _operate(self) -> None:
        """Chooses, loads and unloads models."""
        rng = random.Random(self.scale.seed + 1)
        async with operator(self.port) as client:
            for number in range(self.scale.changes):
                await self._until((number + 0.5) / (self.scale.changes + 0.5))
                action = ("select", "load", "unload")[number % 3]
                model = rng.choice(MODELS)
                self._current = model if action == "select" else self._current
                answer = await client.post(f"/v1/models/{action}", json={"model": model})
                refused = answer.status_code == 503 and "wait for the model" in answer.text
                if answer.status_code not in (200, 202) and not refused:
                    self.judge.fault(f"/v1/models/{action}", f"{answer.status_code} {answer.text:.300}")
                self.judge.outcomes[f"operator: {action}"] += 1

    async def _kill(self) -> None:
        """Kills engines, and measures how long each time everything takes to be ready again."""
        rng = random.Random(self.scale.seed + 2)
        async with operator(self.port) as client:
            for number in range(self.scale.kills):
                await self._until((number + 1) / (self.scale.kills + 1))
                alive = self.engines()
                victim, began = rng.choice(alive), time.monotonic()
                self.judge.deaths.append(began)
                os.kill(victim, signal.SIGKILL)
                while victim in (now := self.engines()) or len(now) < len(alive) or not await _all_ready(client):
                    if time.monotonic() - began > LONGEST:
                        self.judge.fault("kill", "the engine did not come back")
                        return
                    await asyncio.sleep(0.02)
                self.recoveries.append(time.monotonic() - began)

    async def _until(self, share: float) -> None:
        while self._begun < share * self.scale.clients:
            await asyncio.sleep(0.02)


_Asked = Sequence[tuple[Sample, bytes]]
_HABITS = (
    (Siege._plain, 40),
    (Siege._pipeline, 8),
    (Siege._send_slowly, 6),
    (Siege._send_half, 6),
    (Siege._read_slowly, 6),
    (Siege._stop_reading, 4),
    (Siege._leave_early, 8),
    (Siege._leave_midway, 10),
    (Siege._attack, 12),
)
_LASTING = (Siege._plain, Siege._pipeline)  # habits with several requests on a connection


def operator(port: int) -> httpx.AsyncClient:
    """A client with the operator's key."""
    return httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}",
        headers={"authorization": f"Bearer {OPERATOR_KEY}"},
        timeout=LONGEST,
        trust_env=False,
    )


async def _all_ready(client: httpx.AsyncClient) -> bool:
    told = (await client.get("/v1/models/status")).json()
    return all(model["status"] == "ready" for model in told["models"])


async def ask(port: int, sample: Sample, model: str, key: str) -> Answer:
    """One request by a client without habits."""
    async with asyncio.timeout(LONGEST), connect(port) as connection:
        await connection.send(sample.encode(model, key))
        return await connection.answer()
