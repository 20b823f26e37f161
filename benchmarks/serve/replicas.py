# SPDX-License-Identifier: MIT
"""Which replica gets a request: round robin, the shortest queue and the server's own router, by simulation.

    uv run benchmarks/serve/replicas.py [--replicas 4] [--requests 4000] [--seed 1]

Requests have the shape of Mooncake's conversation trace; a replica is an 8B model on one large GPU, as numbers
(`replica_load.py`). Last, what the router itself takes for one of these prompts.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence

from replica_load import (
    BLOCK,
    Asked,
    Machine,
    Outcome,
    conversations,
    round_robin,
    shortest_queue,
    simulate,
)

from candle_vllm.core.engine.step.sequence import block_hashes
from candle_vllm.core.remote.routing import Room, Router

RATES = (0.4, 0.75, 1.0)  # requests a second for each replica


def ours(load: Sequence[Asked], count: int, machine: Machine) -> Outcome:
    """What comes of the router."""
    router = Router([Room(machine.num_blocks, BLOCK, machine.max_num_seqs)] * count)

    def choose(name: str, asked: Asked, _: object) -> int:
        number = router.give(name, asked.full, asked.length)
        assert number is not None
        return number

    return simulate(load, count, choose, machine, router.begun, router.over)


def cost(count: int, tokens: int = 12_000, block: int = 64) -> tuple[float, float]:
    """Milliseconds for a prompt's hashes, and for choosing among replicas whose caches hold it."""
    prompt = random.Random(1).choices(range(100_000), k=tokens)  # noqa: S311
    times = []
    for work in (lambda: block_hashes(prompt, block, None), None):
        hashes = block_hashes(prompt, block, None)
        router, rounds = Router([Room(100_000, block, 256)] * count), 50
        begun = time.perf_counter()
        for number in range(rounds):
            if work is not None:
                work()
            else:
                router.give(str(number), hashes, tokens)
                router.over(str(number))
        times.append((time.perf_counter() - begun) / rounds * 1e3)
    return times[0], times[1]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    machine = Machine()
    print("| requests/s | rule | cached | first token: mean | median | 90 % |")
    print("|---|---|---|---|---|---|")
    for rate in RATES:
        load = conversations(args.seed, args.requests, rate * args.replicas)
        outcomes = {
            "round robin": simulate(load, args.replicas, round_robin, machine),
            "shortest queue": simulate(load, args.replicas, shortest_queue, machine),
            "this server": ours(load, args.replicas, machine),
        }
        for name, it in outcomes.items():
            print(
                f"| {rate * args.replicas:.1f} | {name} | {it.cached:.1%} | {it.mean:.2f} s | {it.median:.2f} s | "
                f"{it.p90:.2f} s |"
            )
    hashing, choosing = cost(args.replicas)
    print(f"\na prompt of 12,000 tokens: {hashing:.2f} ms for its hashes, {choosing:.3f} ms to choose a replica")


if __name__ == "__main__":
    main()
