"""The thread team: every thread does its share, barriers hold, and closing ends the helpers."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from candle_vllm.core.kernels.cpu_runtime.operation import BARRIER, address_of, compile_operation
from candle_vllm.core.kernels.cpu_runtime.primitives import int64_at
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam


def neighbour_plus_one(a, thread, threads):
    """Each thread writes what its neighbour wrote in the round before, plus one."""
    old, new = int64_at(a[3]), int64_at(a[4])
    new[thread * 8] = old[((thread + 1) % threads) * 8] + 1


def plan(rounds: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    state = np.zeros((2, threads * 8), np.int64)
    operation, rows = compile_operation(neighbour_plus_one), []
    for number in range(rounds):
        old, new = state[number % 2], state[(number + 1) % 2]
        rows += [operation, BARRIER | (5 * 8 << 8), 0, address_of(old), address_of(new)]
    return np.array(rows, np.int64), state


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_barriers_hold_between_operations(threads: int) -> None:
    team = ThreadTeam(threads)
    try:
        rows, state = plan(200, threads)
        for run in range(1, 6):
            team.run(rows, 200)
            assert state[0, ::8].tolist() == [200 * run] * threads
        time.sleep(0.05)  # the helpers have gone to sleep
        team.run(rows, 200)
        assert state[0, ::8].tolist() == [1200] * threads
    finally:
        team.close()


def test_closing_ends_the_helpers_awake_or_asleep() -> None:
    before = threading.active_count()
    for pause in (0.0, 0.05):
        team = ThreadTeam(3)
        team.run(np.zeros(1, np.int64), 0)
        time.sleep(pause)
        team.close()
        assert threading.active_count() == before


def test_python_runs_on_while_a_plan_does() -> None:
    team, counted, stop = ThreadTeam(1), [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1

    rows, _ = plan(200, 1)
    many = np.tile(rows, 20_000)
    other = threading.Thread(target=count)
    other.start()
    started = counted[0]
    team.run(many, 200 * 20_000)
    during = counted[0] - started
    stop.set()
    other.join()
    team.close()
    assert during > 100
