# SPDX-License-Identifier: MIT
"""What a process has once: how many threads it computes on; garbage looked for seldom, and not while it ends."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from candle_vllm.core import threads
from candle_vllm.core.threads import cores_in, cpu_quota, default_threads

# What is registered first is called last.
PROGRAM = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count() > 1000))
from candle_vllm.core.threads import collect_seldom
collect_seldom()
print(gc.get_freeze_count(), gc.get_threshold()[0])
"""


@pytest.mark.parametrize(
    ("more", "frozen"),
    [("", True), ("import sys; sys.modules['triton'] = None", False)],
    ids=["plain", "with Triton, which complains"],
)
def test_nothing_is_looked_for_at_the_end(more: str, frozen: bool) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM + more], capture_output=True, text=True, check=True)
    assert done.stdout == f"0 50000\n{frozen}\n"


# ---- how many threads ------------------------------------------------------------------------------------------------

V1 = "9:name=systemd:/\n4:memory:/a\n1:{controllers}:{path}\n0::/\n"


def tree(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A file system with the control groups of a process."""
    for name, text in ({"proc/self/cgroup": groups} | {f"sys/fs/cgroup/{n}": t for n, t in files.items()}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        ("0::/a/b\n", {"a/cpu.max": "50000 100000\n", "a/b/cpu.max": "max 100000\n"}, 0.5),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "300000 100000\n"}, 3.0),
        ("0::/../host/pod\n", {"cpu.max": "200000 100000\n"}, 2.0),
        (
            V1.format(controllers="cpu", path="/"),
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            None,
        ),
        (
            V1.format(controllers="cpu,cpuacct", path="/docker/x"),
            {"cpu,cpuacct/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        (
            V1.format(controllers="cpuacct,cpu", path="/x"),
            {"cpu/x/cpu.cfs_quota_us": "20000", "cpu/x/cpu.cfs_period_us": "10000"},
            2.0,
        ),
        ("0::/\n", {"cpu.max": "what is this"}, None),
        ("0::/\n", {"cpu.max": "100000 0"}, None),
        ("no groups", {}, None),
    ],
)
def test_the_quota_of_a_container(groups: str, files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    assert cpu_quota(tree(tmp_path, groups, files)) == quota


def test_a_system_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("cores", "quota", "count"), [(4, None, 4), (4, 1.5, 2), (4, 1.25, 1), (4, 0.1, 1), (2, 8.0, 2), (4, 3.0, 3)]
)
def test_as_many_threads_as_cores_and_the_quota_allow(
    cores: int, quota: float | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "physical_cores", lambda: cores)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    assert default_threads() == count


def test_cores_are_counted_in_windows_records() -> None:
    core, cache = (struct.pack("=QII16x", 3, kind, 0) for kind in (0, 2))
    assert cores_in(core + cache + core + cache + core[:5]) == 2  # what is cut off is none
    assert cores_in(b"") == 0
