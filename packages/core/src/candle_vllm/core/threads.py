# SPDX-License-Identifier: MIT
"""Process-wide settings: number of threads, stack size, garbage collector; and the state of processes."""

from __future__ import annotations

import atexit
import ctypes
import gc
import math
import os
import signal
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path

STACK_BYTES = 16 << 20
"""Stack size of threads; operations store activations and converted weights there, up to 4 MiB each."""


@contextmanager
def deep_stacks() -> Iterator[None]:
    """Give `STACK_BYTES` to threads that start in this context; the system's default may be only 2 MiB."""
    before = threading.stack_size(STACK_BYTES)
    try:
        yield
    finally:
        threading.stack_size(before)


LOADING_THREADS: ContextVar[int | None] = ContextVar("LOADING_THREADS", default=None)
"""Number of threads that convert one tensor, if set; a new thread starts without a value."""

LOADED_PART: ContextVar[object] = ContextVar("LOADED_PART", default=None)
"""Key of the part of a model that this thread loads; it is the same when the part is loaded again."""


def loading_threads() -> int:
    """Return `LOADING_THREADS`, or `default_threads` if it is not set."""
    return LOADING_THREADS.get() or default_threads()


def in_chunks(job: Callable[[int, int], object], count: int, step: int) -> None:
    """Run job(first, last) for chunks of `step` of `count` items, in up to `loading_threads` threads.

    The threads do not wait for each other. A single chunk is computed in this thread. The first error is raised.
    """
    chunks = [(first, min(first + step, count)) for first in range(0, count, step)]
    if len(chunks) < 2:  # `loading_threads` may read system files, and starting a thread takes as long as a small job
        for chunk in chunks:
            job(*chunk)
        return
    with ThreadPoolExecutor(min(loading_threads(), len(chunks))) as pool:
        for running in [pool.submit(job, *chunk) for chunk in chunks]:
            running.result()


# ---- how many threads ------------------------------------------------------------------------------------------------


def default_threads() -> int:
    """Return the default number of computing threads: one for each physical core that this process may use.

    It is at most the container's CPU quota, rounded, halves up: more threads would be throttled in every period.
    """
    quota = cpu_quota()
    return physical_cores() if quota is None else max(1, min(physical_cores(), math.floor(quota + 0.5)))


def usable_cpus() -> frozenset[int]:
    """Return the numbers of the CPUs that this thread may use; all CPUs on a system without CPU affinity."""
    if sys.platform == "linux":
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Return the number of physical cores among the CPUs that this thread may use; two hyper-threads count as one.

    On macOS only the fast cores of a processor count, because a step takes as long as its slowest thread.
    """
    return _cores_of(usable_cpus())


@cache
def _cores_of(cpus: frozenset[int]) -> int:
    if sys.platform != "linux":
        with suppress(OSError, AttributeError):  # the system lacks the call or reports no cores
            return max(1, min(_cores_of_windows() if sys.platform == "win32" else _cores_of_macos(), len(cpus)))
        return len(cpus)
    cores = set()
    for cpu in cpus:
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


def _cores_of_macos() -> int:
    system = ctypes.CDLL(None)
    for name in (b"hw.perflevel0.physicalcpu", b"hw.physicalcpu"):  # the first exists if core types differ
        count, size = ctypes.c_int32(), ctypes.c_size_t(4)
        if system.sysctlbyname(name, ctypes.byref(count), ctypes.byref(size), None, ctypes.c_size_t(0)) == 0:
            return count.value
    raise OSError("no number of CPUs")


_RECORD = struct.Struct("=QIIQQ")
"""Windows' SYSTEM_LOGICAL_PROCESSOR_INFORMATION, 64 bits: CPU mask, relationship, padding, and a union of 16 bytes."""
_SHARED_CORE = 0


def _cores_of_windows() -> int:
    if sys.platform == "win32":
        system, size = ctypes.WinDLL("kernel32"), ctypes.c_uint32()
    else:
        raise OSError("another system")
    system.GetLogicalProcessorInformation(None, ctypes.byref(size))
    records = ctypes.create_string_buffer(size.value)
    if not system.GetLogicalProcessorInformation(records, ctypes.byref(size)):
        raise OSError("no records of processors")
    return cores_in(records.raw[: size.value])


def cores_in(records: bytes) -> int:
    """Count the cores among Windows' processor records of 32 bytes each."""
    whole = records[: len(records) // _RECORD.size * _RECORD.size]
    return sum(shared == _SHARED_CORE for _, shared, _, _, _ in _RECORD.iter_unpack(whole))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the smallest CPU quota of this process's control groups and their parents, in CPUs; None without a limit.

    It reads `cpu.max` (version 2) and `cpu.cfs_quota_us` (version 1) of Linux's control groups.
    """
    return min((limit for group in control_groups("cpu", root) for limit in _limits(group)), default=None)


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Yield the folders of this process's control groups, of both versions, and of all their parents.

    In a container, a group's path may be the host's, which does not exist there; then the group at the mount point is
    the container's. A controller such as "cpu" or "memory" has groups in version 1; version 2 has one for all.
    """
    for line in read_or_nothing(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers:  # version 2, or both versions
            tops = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            tops = [root / "sys/fs/cgroup" / name for name in dict.fromkeys((controllers, controller))]
        else:
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        for top in tops:
            for depth in range(len(parts) + 1):
                yield top.joinpath(*parts[:depth])


def _limits(group: Path) -> list[float]:
    """Return the CPU limit of one control group in CPUs; an empty list without a limit."""
    quota, period = (*read_or_nothing(group / "cpu.max").split(), "", "")[:2]
    if not quota:
        quota, period = (read_or_nothing(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    if not (quota.isdecimal() and period.isdecimal()):  # "max" or -1: no limit
        return []
    return [int(quota) / int(period)] if int(period) else []


def read_or_nothing(path: Path) -> str:
    """Return the text of a system file; empty if it cannot be read."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


# ---- Python's cycle collector ----------------------------------------------------------------------------------------

# Loading creates some 300,000 lasting objects, and a thousand streams create and free as many: with the default
# thresholds the collector would interrupt both repeatedly.
_COLLECTOR = (50_000, 20, 20)


def collect_seldom() -> None:
    """Run the collector rarely, and not while the process ends; for a process that runs only this program.

    Scanning lasting objects takes a tenth of the start, and a second at exit, for no benefit.
    """
    gc.set_threshold(*_COLLECTOR)
    atexit.register(_freeze_objects)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the collector in this context.

    While loading or compiling creates many lasting objects, repeated scans take time: a sixth of a compiler's. Pinned
    memory that is freed during the capture of a CUDA graph would be recorded in the graph.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _freeze_objects() -> None:
    if "triton" not in sys.modules:  # Triton prints a line for each of its objects that was not collected
        gc.freeze()


AT_EXIT: dict[threading.Thread, Callable[[], None]] = {}  # by thread that writes a file: ends it, before os._exit


def process_state(pid: int) -> tuple[str, float] | None:
    """Return a process's state (a letter) and CPU seconds from /proc/PID/stat, see proc(5); None without that file."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def ending(status: int | None) -> str:
    """Describe how a child process ended, by its `returncode`; None means that it has only closed its connection."""
    if status is None:
        return "it closed its connection"
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
