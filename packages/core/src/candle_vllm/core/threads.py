# SPDX-License-Identifier: MIT
"""What a process has once: threads, how many and with which stacks; when Python looks for cycles of garbage."""

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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path

STACK_BYTES = 16 << 20
"""Operations keep rows of activations and widened weights there, up to 4 MiB with the longest rows."""


@contextmanager
def deep_stacks() -> Iterator[None]:
    """Threads that start inside get `STACK_BYTES`; the system's own choice may be 2 MiB (`ulimit -s unlimited`)."""
    before = threading.stack_size(STACK_BYTES)
    try:
        yield
    finally:
        threading.stack_size(before)


LOADING_THREADS: ContextVar[int | None] = ContextVar("LOADING_THREADS", default=None)
"""How many threads decode and lay out one tensor, where somebody said it; a thread that is started asks for itself."""

LOADED_PART: ContextVar[object] = ContextVar("LOADED_PART", default=None)
"""Which part of a model is being loaded in this thread: the same one has the same name when it is loaded again."""


def loading_threads() -> int:
    """How many threads decode and lay out one tensor: as many as were asked for, or `default_threads`."""
    return LOADING_THREADS.get() or default_threads()


# ---- how many threads ------------------------------------------------------------------------------------------------


def default_threads() -> int:
    """How many threads compute where nobody says it: one for each physical core that this process is allowed.

    Of a container's quota the nearest whole number, halves up: beyond it, every thread would stop for a part of each
    period.
    """
    quota = cpu_quota()
    return physical_cores() if quota is None else max(1, min(physical_cores(), math.floor(quota + 0.5)))


def usable_cpus() -> frozenset[int]:
    """The CPUs that this thread may use, by number; all of the machine's, where the system has no such bounds."""
    if sys.platform == "linux":
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Physical cores among the CPUs that this thread may use; two hyper-threads count as one.

    On macOS the fast ones, where a processor has two kinds: a step takes as long as its slowest thread.
    """
    return _cores_of(usable_cpus())


@cache
def _cores_of(cpus: frozenset[int]) -> int:
    if sys.platform != "linux":
        with suppress(OSError, AttributeError):  # of a system that is not as it says
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
    """What `sysctl` says."""
    system = ctypes.CDLL(None)
    for name in (b"hw.perflevel0.physicalcpu", b"hw.physicalcpu"):  # the former where there are kinds of them
        count, size = ctypes.c_int32(), ctypes.c_size_t(4)
        if system.sysctlbyname(name, ctypes.byref(count), ctypes.byref(size), None, ctypes.c_size_t(0)) == 0:
            return count.value
    raise OSError("no number of CPUs")


_RECORD = struct.Struct("=QIIQQ")
"""Windows' SYSTEM_LOGICAL_PROCESSOR_INFORMATION of 64 bits: which CPUs, what they share, nothing, and what of it."""
_SHARED_CORE = 0


def _cores_of_windows() -> int:
    """The records of cores among what Windows says of its processors."""
    if sys.platform != "win32":
        raise OSError("another system")
    system, size = ctypes.WinDLL("kernel32"), ctypes.c_uint32()
    system.GetLogicalProcessorInformation(None, ctypes.byref(size))
    records = ctypes.create_string_buffer(size.value)
    if not system.GetLogicalProcessorInformation(records, ctypes.byref(size)):
        raise OSError("no records of processors")
    return cores_in(records.raw[: size.value])


def cores_in(records: bytes) -> int:
    """How many of Windows' records of processors, of 32 bytes each, are of a core."""
    whole = records[: len(records) // _RECORD.size * _RECORD.size]
    return sum(shared == _SHARED_CORE for _, shared, _, _, _ in _RECORD.iter_unpack(whole))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """How many CPUs' time the control groups of this process allow, the least of all above it; None without a limit.

    Both versions of Linux's control groups, `cpu.max` and `cpu.cfs_quota_us`.
    """
    return min((limit for group in control_groups("cpu", root) for limit in _limits(group)), default=None)


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Folders of the control groups that this process is in, of both versions, and of all above them.

    In a container the groups' paths may be the host's, which are not there: then what is mounted at the top is the
    container's own.

    Args:
        controller: of version 1, as "cpu" or "memory"; version 2 has one group for all.
        root: where the file system begins.
    """
    for line in read_or_nothing(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers:  # version 2, alone or beside version 1
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
    """The limit of one control group, if it has one."""
    quota, period = (*read_or_nothing(group / "cpu.max").split(), "", "")[:2]
    if not quota:
        quota, period = (read_or_nothing(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    if not (quota.isdecimal() and period.isdecimal()):  # "max" or -1: none
        return []
    return [int(quota) / int(period)] if int(period) else []


def read_or_nothing(path: Path) -> str:
    """The text of a file of the system, empty where it cannot be read."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


# ---- Python's cycle collector ----------------------------------------------------------------------------------------

# A start makes some 300,000 objects that stay, a thousand streams as many that go: the usual thresholds stop both again
# and again.
_COLLECTOR = (50_000, 20, 20)


def collect_seldom() -> None:
    """For a process that is all ours: the collector runs seldom, and does not run while the process ends.

    Its looks at what stays take a tenth of a start's seconds, and at the end a second, for memory that is given back
    all the same.
    """
    gc.set_threshold(*_COLLECTOR)
    atexit.register(_let_go)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keeps the collector from going again and again through what stays, while there is more and more of it.

    A compiler's many small objects make that a sixth of its time; and pinned memory that is freed within a capture
    would be recorded with it.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _let_go() -> None:
    if "triton" not in sys.modules:  # it writes a line for each object of its own that was not collected
        gc.freeze()


def process_state(pid: int) -> tuple[str, float] | None:
    """The state of a process, a letter, and the seconds of CPU time that its threads have taken.

    See proc(5), /proc/PID/stat; None where there is no such thing.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def ending(status: int | None) -> str:
    """How a child process has ended, by its `returncode`; None where it has not, and has only hung up."""
    if status is None:
        return "it closed its end of the line"
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
