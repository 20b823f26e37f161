# SPDX-License-Identifier: MIT
"""Sums over ranks of one machine, in shared memory."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from candle_vllm.core.kernels.collectives import SLOT_BYTES, ProcessGroup, shared_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has memory without a name")

SIZES = (1, 3, 1023, SLOT_BYTES // 4, SLOT_BYTES // 4 + 1, 3 * SLOT_BYTES // 4 + 7)
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
    np.savez(folder / f"{rank}.npz", **found)


def _waits(rank: int, size: int, folder: Path, memory: str) -> None:
    _group(rank, size, folder, memory).sum(torch.ones(4))
    time.sleep(600)


def _started(work: str, size: int, folder: Path, memory: str) -> list[subprocess.Popen[bytes]]:
    """This file, run once for each rank but the first."""
    command = [sys.executable, __file__, work]
    return [subprocess.Popen([*command, str(rank), str(size), str(folder), memory]) for rank in range(1, size)]


@pytest.mark.parametrize("size", [2, 3])
def test_sums_are_those_of_numpy_and_the_same_on_each_rank(size: int, tmp_path: Path) -> None:
    with shared_memory(size + 1) or pytest.fail("there is no memory") as file:
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
                    got = each[f"{turn} {dtype} {count}"]
                    if dtype == torch.float64 and size > 2:  # Gloo's, in an order of its own
                        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-12, atol=1e-12)
                    else:
                        np.testing.assert_array_equal(got, expected.numpy())
                    np.testing.assert_array_equal(got, found[0][f"{turn} {dtype} {count}"])


@pytest.mark.parametrize("how", ["abort", "killed", "patience"])
def test_who_waits_for_a_rank_that_does_not_come_fails(how: str, tmp_path: Path) -> None:
    with shared_memory(3) or pytest.fail("there is no memory") as file:
        memory = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        (other,) = _started("waits", 2, tmp_path, memory)
        group = _group(0, 2, tmp_path, memory, 0.5 if how == "patience" else 60.0)
        assert group.sum(torch.ones(4)).tolist() == [2.0] * 4

        def end() -> None:
            if how == "killed":
                other.kill()
                other.wait()  # as the ranks' watcher sees it
            group.abort()

        timer = threading.Timer(0.3, end)
        if how != "patience":
            timer.start()
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="within" if how == "patience" else "have gone"):
            group.sum(torch.ones(4))
        assert 0.25 < time.monotonic() - began < 10
        other.kill()
        other.wait()


def test_memory_has_no_name_and_keeps_its_size() -> None:
    with shared_memory(2) or pytest.fail("there is no memory") as file:
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
