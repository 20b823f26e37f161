# SPDX-License-Identifier: MIT
"""What ranks of one machine do in shared memory: sums, and parts side by side; and rows from each to each."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from candle_vllm.core.kernels.collectives import SLOT_BYTES, ProcessGroup, shared_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has memory without a name")

SIZES = (1, 3, 1023, SLOT_BYTES // 4, SLOT_BYTES // 4 + 1, 3 * SLOT_BYTES // 4 + 7)
PARTS = ((1, 24, torch.uint8), (3, 5, torch.uint8), (2, 3, torch.float32), (5, SLOT_BYTES // 4 + 3, torch.float32))
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)


class _Notes:
    """Notes in a file, by torch's own store."""

    def __init__(self, path: Path, size: int) -> None:
        from torch import distributed

        store = distributed.FileStore(str(path), size)
        self.set: Any = store.set
        self.get: Any = store.get
        self.add: Any = store.add
        self.has: Any = lambda key: store.check([key])


def _part(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    made = np.random.default_rng([rank, size]).standard_normal(size) * 100
    return torch.from_numpy(made).to(dtype)


def _group(rank: int, size: int, folder: Path, memory: str, patience: float = 60.0) -> ProcessGroup:
    with open(memory, "r+b", buffering=0) as file:
        notes = _Notes(folder / "store", size)
        return ProcessGroup(rank, size, "cpu", notes, "test", patience=patience, memory=file, first=1)


def _sums(rank: int, size: int, folder: Path, memory: str) -> None:
    group = _group(rank, size, folder, memory)
    found = {}
    for turn in range(3):
        for dtype in TYPES:
            for count in SIZES:
                x = _part(rank, count + turn, dtype)
                assert group.sum(x) is x
                found[f"{turn} {dtype} {count}"] = x.double().numpy() if x.is_floating_point() else x.numpy()
    for rows, width, dtype in PARTS:
        own = _part(rank, rows * (width - (rank == size - 1)), torch.float32).view(rows, -1).to(dtype)
        found[f"{rows} {width} {dtype}"] = group.gather(own, width).numpy()
    np.savez(folder / f"{rank}.npz", **found)
    for dtype in (*TYPES, torch.uint8):
        _exchanges(group, dtype)


def _exchanges(group: ProcessGroup, dtype: torch.dtype) -> None:
    """Rows that say from where to where they go; some ranks send some others nothing, and then all send one nothing."""
    rank, size = group.rank, group.size
    line = group.gather(torch.arange(1, rank + 2).to(dtype)[None], size)
    assert line.dtype == dtype
    assert line.view(size, size).tolist() == [[*range(1, each + 2), *[0] * (size - each - 1)] for each in range(size)]
    for counts in (lambda one, other: (2 * one + 3 * other) % 4, lambda _, other: 5 if other else 0):
        sent, received = ([counts(*pair) for pair in pairs] for pairs in _pairs(rank, size))
        rows = [[rank, to, number] for to in range(size) for number in range(sent[to])]
        found = group.exchange(torch.tensor(rows, dtype=dtype).reshape(-1, 3), sent, received)
        assert found.dtype == dtype
        assert found.tolist() == [[of, rank, number] for of in range(size) for number in range(received[of])]


def _pairs(rank: int, size: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """From this rank to each, and from each to this one."""
    return [(rank, other) for other in range(size)], [(other, rank) for other in range(size)]


def _waits(rank: int, size: int, folder: Path, memory: str) -> None:
    group = _group(rank, size, folder, memory)
    group.sum(torch.ones(4))
    group.exchange(torch.ones(2, 1), [1, 1], [1, 1])
    time.sleep(600)


def _started(work: str, size: int, folder: Path, memory: str) -> list[subprocess.Popen[bytes]]:
    """This file, run once for each rank but the first."""
    command = [sys.executable, __file__, work]
    return [subprocess.Popen([*command, str(rank), str(size), str(folder), memory]) for rank in range(1, size)]


@pytest.mark.one_of_each(1)
@pytest.mark.parametrize("size", [2, 3])
def test_sums_and_parts_side_by_side_are_those_of_numpy_and_the_same_on_each_rank(size: int, tmp_path: Path) -> None:
    with shared_memory(size + 1) or pytest.fail("not enough memory") as file:
        memory = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        others = _started("sums", size, tmp_path, memory)
        _sums(0, size, tmp_path, memory)
        for other in others:
            assert other.wait(60) == 0
    found = [np.load(tmp_path / f"{rank}.npz") for rank in range(size)]
    for turn in range(3):
        for dtype in TYPES:
            for count in SIZES:
                parts = [_part(rank, count + turn, dtype) for rank in range(size)]
                small = dtype in (torch.bfloat16, torch.float16)
                numbers = [(part.float() if small else part).numpy() for part in parts]
                whole = numbers[0].copy()
                for number in numbers[1:]:
                    whole += number
                expected = torch.from_numpy(whole).to(dtype)
                expected = expected.double() if expected.is_floating_point() else expected
                for each in found:
                    np.testing.assert_array_equal(each[f"{turn} {dtype} {count}"], expected.numpy())
    for rows, width, dtype in PARTS:
        beside = np.zeros((rows, size, width), torch.empty(0, dtype=dtype).numpy().dtype)
        for rank in range(size):
            own = _part(rank, rows * (width - (rank == size - 1)), torch.float32).view(rows, -1).to(dtype).numpy()
            beside[:, rank, : own.shape[1]] = own
        for each in found:
            np.testing.assert_array_equal(each[f"{rows} {width} {dtype}"], beside.reshape(rows, -1))


SELDOM = pytest.param("abort in an exchange", marks=pytest.mark.every_case)


@pytest.mark.one_of_each(1)
@pytest.mark.parametrize("how", ["abort", "killed", "patience", "killed in an exchange", SELDOM])
def test_who_waits_for_a_rank_that_does_not_come_fails(how: str, tmp_path: Path) -> None:
    with shared_memory(3) or pytest.fail("not enough memory") as file:
        memory = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        (other,) = _started("waits", 2, tmp_path, memory)
        group = _group(0, 2, tmp_path, memory, 0.5 if how == "patience" else 60.0)
        assert group.sum(torch.ones(4)).tolist() == [2.0] * 4
        assert group.exchange(torch.ones(2, 1), [1, 1], [1, 1]).tolist() == [[1.0]] * 2

        def end() -> None:
            if how.startswith("killed"):
                other.kill()
                other.wait()  # as the ranks' watcher sees it
            group.abort()

        timer = threading.Timer(0.3, end)
        if how != "patience":
            timer.start()
        began = time.monotonic()
        if how.endswith("exchange"):  # which says so in words of the library below
            with pytest.raises(RuntimeError):
                group.exchange(torch.ones(2, 1), [1, 1], [1, 1])
        else:
            with pytest.raises(RuntimeError, match="within" if how == "patience" else "another rank has ended"):
                group.sum(torch.ones(4))
        assert time.monotonic() - began > 0.25
        other.kill()
        other.wait()


def _two(folder: Path, first: Callable[[ProcessGroup], object], second: Callable[[ProcessGroup], object]) -> None:
    """Two ranks over Gloo in threads of this process."""

    def run(rank: int, work: Callable[[ProcessGroup], object]) -> None:
        group = ProcessGroup(rank, 2, "cpu", _Notes(folder / "store", 2), "two", patience=20.0)
        try:
            work(group)
        finally:
            group.close()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(run, 1, second)
        run(0, first)
        other.result()


def test_a_closed_group_has_no_thread(tmp_path: Path) -> None:
    arrived, found = threading.Event(), torch.zeros(4)

    def receive(group: ProcessGroup) -> None:
        group.receive(found, 1)
        arrived.set()

    _two(tmp_path, receive, lambda group: (group.send(torch.arange(4.0), 0), arrived.wait(20)))
    assert found.tolist() == [0.0, 1.0, 2.0, 3.0]
    for thread in threading.enumerate():
        if thread.name == "candle-vllm-receiver":
            thread.join(5)
            assert not thread.is_alive()


def test_what_was_sent_is_freed(tmp_path: Path) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def send(group: ProcessGroup) -> None:
        for number in range(12):
            x = torch.full((3,), float(number))
            kept.append(weakref.ref(x))
            group.send(x, 0)
            del x
            assert group.receive(torch.zeros(1), 0).tolist() == [number]
        assert sum(each() is not None for each in kept) <= 4

    def answer(group: ProcessGroup) -> None:
        for _ in range(12):
            group.send(group.receive(torch.zeros(3), 1)[:1].clone(), 1)
        time.sleep(0.5)  # Gloo's `abort` in `close` would cut off the last one

    _two(tmp_path, answer, send)
    assert len(kept) == 12


def test_a_minimum_over_ranks_of_gpus_ends_with_another_rank(tmp_path: Path) -> None:
    class Nccl:
        def abort(self) -> None:
            pass

    failed = threading.Event()

    def wait(group: ProcessGroup) -> None:
        group._group = group._back = Nccl()
        timer = threading.Timer(0.3, group.abort)
        timer.start()
        began = time.monotonic()
        with pytest.raises(RuntimeError):
            group.least(3)
        failed.set()
        assert time.monotonic() - began < 10

    _two(tmp_path, wait, lambda _: failed.wait(30))


def test_memory_has_no_name_and_keeps_its_size() -> None:
    with shared_memory(2) or pytest.fail("not enough memory") as file:
        assert os.fstat(file.fileno()).st_nlink == 0
        assert not os.get_inheritable(file.fileno())
        for size in (0, 1 << 30):
            with pytest.raises(PermissionError):
                file.truncate(size)
        with pytest.raises(ValueError, match="length"):
            mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size + mmap.PAGESIZE)


def test_a_system_that_forbids_it_has_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def forbidden(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    assert shared_memory(2) is None
    assert "Permission denied" in caplog.text


if __name__ == "__main__":
    {"sums": _sums, "waits": _waits}[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
