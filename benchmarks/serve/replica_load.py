# SPDX-License-Identifier: MIT
"""Replicas without a model: requests of a real trace's shape, and an event loop over caches and steps.

The shape is that of the conversations that the Mooncake paper (FAST 2025) published: blocks of 512 tokens, some 12,000
tokens of a prompt and 343 of an answer in the mean, and 37 % of all blocks of prompts seen before. The trace itself is
not used: requests are drawn from a seed.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Final

BLOCK: Final = 512
"""Tokens of a block."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        at: seconds.
        blocks: of its prompt, each a name for itself and all before it; the last may be a part of one.
        length: tokens of the prompt.
        answer: tokens of the answer.
    """

    at: float
    blocks: tuple[int, ...]
    length: int
    answer: int

    @property
    def full(self) -> tuple[int, ...]:
        """The blocks that are full, which a cache can find again."""
        return self.blocks[: self.length // BLOCK]


def conversations(seed: int, requests: int, rate: float, shared: int = 40) -> list[Asked]:
    """Requests in order of their time: conversations whose turns repeat what was said, some with a common beginning.

    Args:
        seed: the same seed draws the same requests.
        requests: how many, at most.
        rate: requests of a second.
        shared: common beginnings, chosen by Zipf's law.
    """
    draw = random.Random(seed)  # noqa: S311
    names = iter(range(1 << 60))
    beginnings = [[next(names) for _ in range(draw.randint(1, 8))] for _ in range(shared)]
    weights = [1 / rank for rank in range(1, shared + 1)]
    made: list[Asked] = []
    at, turns_each = 0.0, 1 / 0.65
    while len(made) < requests * 1.2:
        at += draw.expovariate(rate / turns_each)
        has_beginning = draw.random() < 0.5
        blocks = list(draw.choices(beginnings, weights)[0]) if has_beginning else []
        length, when = len(blocks) * BLOCK, at
        while True:
            answer = max(1, int(draw.lognormvariate(5.3, 1.0)))
            length += max(8, int(draw.lognormvariate(8.2, 1.15)))
            length = min(length, 120_000)
            while len(blocks) * BLOCK < length:
                blocks.append(next(names))
            made.append(Asked(when, tuple(blocks), length, answer))
            if draw.random() < 0.65 or length == 120_000:
                break
            length += answer  # which comes back in the next prompt
            when += answer * 0.03 + draw.expovariate(1 / 60)
    made.sort(key=lambda asked: asked.at)
    return made[:requests]


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a replica's steps take, seconds, and what fits; the defaults are an 8B model's in bf16 on one large GPU.

    Attributes:
        step: of every step.
        per_prompt_token, per_sequence, per_held_token: on top, for each of them in the step.
        step_tokens: most tokens in a step.
        num_blocks: of the cache.
        max_num_seqs: most sequences in a step.
    """

    step: float = 0.006
    per_prompt_token: float = 80e-6
    per_sequence: float = 30e-6
    per_held_token: float = 45e-9
    step_tokens: int = 4096
    num_blocks: int = 800
    max_num_seqs: int = 256


@dataclasses.dataclass(eq=False)
class _Live:
    asked: Asked
    name: str
    to_run: int = 0
    left: int = 0


class SimulatedReplica:
    """An engine's queue, steps and prefix cache, as numbers.

    Args:
        machine: how fast it is.
        begun, over: told of requests whose first token has come, and that have ended.
    """

    def __init__(self, machine: Machine, begun: Callable[[str], None], over: Callable[[str], None]) -> None:
        self.machine = machine
        self.now = 0.0
        self.cached_tokens = 0
        self.first_tokens: list[float] = []
        self._begun, self._over = begun, over
        self._waiting: deque[_Live] = deque()
        self._prompts: list[_Live] = []  # admitted, not run to the end
        self._writing: list[_Live] = []
        self._held = 0  # tokens of those that write
        self._pinned: Counter[int] = Counter()
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def sequences(self) -> int:
        """Requests that wait or run."""
        return len(self._waiting) + len(self._prompts) + len(self._writing)

    def ask(self, asked: Asked, name: str) -> None:
        """Takes a request at its time."""
        self._waiting.append(_Live(asked, name))

    def run(self, until: float) -> None:
        """Makes steps until a time, or until nothing is left to do."""
        while self.now < until:
            self._admit()
            if self._prompts:
                self._step_with_prompts()
            elif self._writing:
                self._write(until)
            else:
                self.now = max(self.now, until) if until < float("inf") else self.now
                return

    def _admit(self) -> None:
        while self._waiting and len(self._prompts) + len(self._writing) < self.machine.max_num_seqs:
            live = self._waiting[0]
            full, new = live.asked.full, [b for b in live.asked.blocks if b not in self._pinned]
            room = self.machine.num_blocks - len(self._pinned)
            if len(new) > room and (self._prompts or self._writing):
                return
            self._waiting.popleft()
            hits = next((n for n, b in enumerate(full) if b not in self._pinned and b not in self._idle), len(full))
            cached = min(hits * BLOCK, live.asked.length - 1)
            self.cached_tokens += cached
            live.to_run = live.asked.length - cached
            for block in live.asked.blocks:
                self._idle.pop(block, None)
                self._pinned[block] += 1
            while len(self._idle) and len(self._idle) + len(self._pinned) > self.machine.num_blocks:
                self._idle.popitem(last=False)
            self._prompts.append(live)

    def _step_with_prompts(self) -> None:
        machine = self.machine
        budget = max(1, machine.step_tokens - len(self._writing))
        took, done = 0, []
        for live in self._prompts:
            part = min(live.to_run, budget - took)
            live.to_run -= part
            took += part
            if not live.to_run:
                done.append(live)
            if took == budget:
                break
        self.now += self._decode_seconds() + took * machine.per_prompt_token
        self._advance(1)
        for live in done:
            self._prompts.remove(live)
            self._writing.append(live)
            self._held += live.asked.length
            live.left = live.asked.answer
            self.first_tokens.append(self.now - live.asked.at)
            self._begun(live.name)

    def _write(self, until: float) -> None:
        """Steps that only write, several at once: until the first answer ends, or something comes."""
        seconds = self._decode_seconds()
        steps = max(1, min(min(live.left for live in self._writing), int((until - self.now) / seconds) + 1
                           if until < float("inf") else 1 << 30))  # fmt: skip
        self.now += steps * seconds
        self._advance(steps)

    def _decode_seconds(self) -> float:
        machine = self.machine
        return machine.step + machine.per_sequence * len(self._writing) + machine.per_held_token * self._held

    def _advance(self, steps: int) -> None:
        for live in self._writing:
            live.left -= steps
        for live in [live for live in self._writing if live.left <= 0]:
            self._writing.remove(live)
            self._held -= live.asked.length
            for block in reversed(live.asked.blocks):
                self._pinned[block] -= 1
                if not self._pinned[block]:
                    del self._pinned[block]
                    self._idle[block] = None
            self._over(live.name)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a load.

    Attributes:
        cached: share of the prompts' tokens that were in a cache.
        mean, median, p90: seconds to the first token.
    """

    cached: float
    mean: float
    median: float
    p90: float


Choose = Callable[[str, Asked, Sequence[SimulatedReplica]], int]
"""Which replica gets a request, by its number."""


def simulate(
    load: Sequence[Asked],
    count: int,
    choose: Choose,
    machine: Machine = Machine(),
    begun: Callable[[str], None] = lambda _: None,
    over: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Runs a load on replicas.

    Args:
        load: in order of time.
        count: replicas.
        choose: where each request goes.
        machine: what each replica is.
        begun, over: as of `SimulatedReplica`.
    """
    replicas = [SimulatedReplica(machine, begun, over) for _ in range(count)]
    for number, asked in enumerate(load):
        for replica in replicas:
            replica.run(asked.at)
        name = str(number)
        replicas[choose(name, asked, replicas)].ask(asked, name)
    for replica in replicas:
        replica.run(float("inf"))
    times = sorted(time for replica in replicas for time in replica.first_tokens)
    cached = sum(replica.cached_tokens for replica in replicas)
    return Outcome(
        cached / sum(asked.length for asked in load),
        sum(times) / len(times),
        times[len(times) // 2],
        times[len(times) * 9 // 10],
    )


def round_robin(name: str, _: Asked, replicas: Sequence[SimulatedReplica]) -> int:
    """One after the other."""
    return int(name) % len(replicas)


def shortest_queue(_: str, __: Asked, replicas: Sequence[SimulatedReplica]) -> int:
    """Where the fewest requests wait or run."""
    return min(range(len(replicas)), key=lambda number: replicas[number].sequences)
