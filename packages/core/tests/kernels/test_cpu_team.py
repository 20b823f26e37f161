# SPDX-License-Identifier: MIT
"""The thread team: every piece is done once and in its time, however threads run; closing ends the helpers."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from candle_vllm.core.kernels.cpu_runtime import team as team_module
from candle_vllm.core.kernels.cpu_runtime.kernel_cache import compiled_address
from candle_vllm.core.kernels.cpu_runtime.operation import BARRIER, address_of
from candle_vllm.core.kernels.cpu_runtime.primitives import fetch_add, int64_at
from candle_vllm.core.kernels.cpu_runtime.team import Semaphores, ThreadTeam
from tests.waiting import wait_for


def neighbour_plus_one(row, thread, threads):
    """Each thread writes what its neighbour wrote in the round before, plus one."""
    old, new = int64_at(int64_at(row)[3]), int64_at(int64_at(row)[4])
    new[thread * 8] = old[((thread + 1) % threads) * 8] + 1


def plan(rounds: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    state = np.zeros((2, threads * 8), np.int64)
    operation, rows = (
        compiled_address("cpu_runtime.primitives.tests.neighbour_plus_one", lambda: neighbour_plus_one),
        [],
    )
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


def test_every_system_s_wait_and_post_get_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows' ReleaseSemaphore is told how many, its WaitForSingleObject and Dispatch's to wait for ever."""
    calls: list[tuple[str, int, int, int]] = []
    kept = [threading.Semaphore(0) for _ in range(2)]
    given: list[int] = []

    @ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 3)
    def wait(semaphore: int, number: int, nothing: int) -> int:
        calls.append(("wait", semaphore, number, nothing))
        kept[semaphore - 7].acquire()
        return 0

    @ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 3)
    def post(semaphore: int, number: int, nothing: int) -> int:
        calls.append(("post", semaphore, number, nothing))
        kept[semaphore - 7].release()
        return 0

    def make(_: int) -> int:
        given.append(7 + len(given))
        return given[-1]

    where = (ctypes.cast(each, ctypes.c_void_p).value or 0 for each in (wait, post))
    monkeypatch.setattr(team_module, "system_semaphores", lambda: Semaphores(*where, make, given.remove))
    team = ThreadTeam(2)
    try:
        rows, state = plan(50, 2)
        team.run(rows, 50)
        wait_for(lambda: any(call[0] == "wait" and call[1] == 8 for call in calls))  # the helper sleeps
        team.run(rows, 50)
        assert state[0, ::8].tolist() == [100] * 2
    finally:
        team.close()
    assert set(calls) >= {("wait", 8, -1, 0), ("post", 8, 1, 0)}
    assert set(calls) <= {(name, number, also, 0) for number in (7, 8) for name, also in (("wait", -1), ("post", 1))}
    assert given == []  # they were given back


def test_without_semaphores_one_thread_does_it_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(team_module, "system_semaphores", lambda: None)
    team = ThreadTeam(3)
    assert team.threads == 1
    assert "they use one thread" in caplog.text
    team.close()


def test_closing_ends_the_helpers_awake_or_asleep() -> None:
    before = threading.active_count()
    for pause in (0.0, 0.05):
        team = ThreadTeam(3)
        team.run(np.zeros(1, np.int64), 0)
        time.sleep(pause)
        team.close()
        assert threading.active_count() <= before


def test_helpers_of_a_team_that_nobody_closes_end_with_it() -> None:
    """They would sleep in memory that was given back."""
    team = ThreadTeam(3)
    rows, _ = plan(20, 3)
    team.run(rows, 20)
    helpers, memory = list(team._helpers), weakref.ref(team._memory)
    time.sleep(0.05)  # they have gone to sleep
    assert all(helper.is_alive() for helper in helpers)
    del team
    gc.collect()
    wait_for(lambda: not any(helper.is_alive() for helper in helpers))
    helpers.clear()
    gc.collect()
    assert memory() is None


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


# ---- pieces ----------------------------------------------------------------------------------------------------------

BUSY, THREADS = 2, 5


@pytest.fixture(scope="module")
def busy_machine() -> Iterator[None]:
    """Processes that compute on every CPU, so that threads stop wherever the system likes."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY * (os.cpu_count() or 1))]
    yield
    for loop in loops:
        loop.kill()
        loop.wait()


@pytest.fixture(scope="module")
def team() -> Iterator[ThreadTeam]:
    made = ThreadTeam(THREADS)
    yield made
    made.close()


def count_pieces(at, piece, pieces):
    """Counts a piece of row a[4] in a[3], after a while of work, and in a[5] what came outside of its group's time.

    a[6]: rows of all groups before this one; a[7]: turns of work.
    """
    a = int64_at(at)
    seen, wrong = int64_at(a[3]), int64_at(a[5])
    for row in range(a[6]):
        for other in range(pieces):
            wrong[0] += seen[row * pieces + other] != a[8]
    value = piece
    for _ in range(a[7] * (piece + 1)):
        value = value * 6364136223846793005 + 1442695040888963407
    wrong[1] = value  # so that the work is done
    fetch_add(a[3] + (a[4] * pieces + piece) * 8, 1)
    for row in range(a[6]):
        for other in range(pieces):
            wrong[0] += seen[row * pieces + other] != a[8]


def counting_plan(barriers: list[bool], turns: list[int], run: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that count their pieces; the counts [rows, threads]; [0] what came at the wrong time."""
    counts, wrong = np.zeros((len(barriers), THREADS), np.int64), np.zeros(8, np.int64)
    operation, rows, before = compiled_address("cpu_runtime.primitives.tests.count_pieces", lambda: count_pieces), [], 0
    for row, barrier in enumerate(barriers):
        places = [address_of(counts), row, address_of(wrong), before, turns[row % len(turns)], run]
        rows += [operation, int(barrier) | (9 * 8 << 8), 0, *places]
        before = row + 1 if barrier else before
    return np.array(rows, np.int64), counts, wrong


@settings(max_examples=60, deadline=None)
@given(barriers=st.lists(st.booleans(), min_size=1, max_size=40), turns=st.lists(st.integers(0, 3000), min_size=1))
@pytest.mark.usefixtures("busy_machine")
def test_every_piece_is_done_once_and_in_its_time(team: ThreadTeam, barriers: list[bool], turns: list[int]) -> None:
    plan, counts, wrong = counting_plan(barriers, turns, 1)
    team.run(plan, len(barriers))
    assert (counts == 1).all()
    assert wrong[0] == 0


@pytest.mark.usefixtures("busy_machine")
def test_nobody_sleeps_through_his_turn(team: ThreadTeam) -> None:
    """Many small plans with pauses of all lengths between them: helpers spin, sleep, and come back late."""
    numbers, began = random.Random(0), time.perf_counter()
    for _ in range(300):
        plan, counts, wrong = counting_plan([numbers.random() < 0.7 for _ in range(numbers.randrange(1, 6))], [50], 1)
        if numbers.random() < 0.3:
            time.sleep(numbers.random() * 0.001)
        team.run(plan, len(counts))
        assert (counts == 1).all()
        assert wrong[0] == 0
    assert time.perf_counter() - began < 120


def test_what_a_late_thread_may_read_is_kept(team: ThreadTeam) -> None:
    for _ in range(50):
        team.run(counting_plan([True], [0], 1)[0], 1)
        assert len(team._plans) <= 8
