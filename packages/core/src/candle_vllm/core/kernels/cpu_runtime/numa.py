# SPDX-License-Identifier: MIT
"""CPU ranks: groups of a team's threads, one for each NUMA node, and memory on the node of the rank that reads it.

A rank is consecutive threads, and the work of an operation is divided in the order of threads. So a rank multiplies the
same rows of weights, on the same pages of memory, in every step.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import logging
import mmap
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from candle_vllm.core.errors import ConfigError
from candle_vllm.core.kernels.cpu_runtime.operation import address_of
from candle_vllm.core.threads import read_or_nothing, usable_cpus

logger = logging.getLogger(__name__)

PAGE = mmap.PAGESIZE


class CpuRank(NamedTuple):
    """Group of threads of one NUMA node, or of several.

    Attributes:
        cpus: CPUs on which the threads run.
        nodes: NUMA nodes of these CPUs.
        memory: nodes from which the group's memory is allocated.
    """

    cpus: frozenset[int]
    nodes: tuple[int, ...]
    memory: tuple[int, ...]


def bind_pages(address: int, size: int, nodes: Sequence[int]) -> int:
    """Make Linux allocate whole pages at `address` on these nodes when a page is first touched; return 0 or an errno.

    A single node is used while it has free memory, then other nodes; over several nodes, pages are interleaved.
    """
    call = _MBIND.get(platform.machine().lower())
    if call is None or sys.platform != "linux":
        return 38  # ENOSYS
    mask = (ctypes.c_uint64 * (max(nodes) // 64 + 1))()
    for node in nodes:
        mask[node // 64] |= 1 << node % 64
    system = ctypes.CDLL(None, use_errno=True)
    arguments = (address, size, _PREFERRED if len(nodes) == 1 else _INTERLEAVE, ctypes.addressof(mask))
    failed = system.syscall(*map(ctypes.c_long, (call, *arguments, 64 * len(mask) + 1, 0)))
    return ctypes.get_errno() if failed else 0


_MBIND = MappingProxyType(
    {"x86_64": 237, "amd64": 237, "aarch64": 235, "riscv64": 235, "loongarch64": 235, "ppc64le": 259, "s390x": 268}
)
_PREFERRED, _INTERLEAVE = 1, 3


@dataclasses.dataclass(frozen=True)
class CpuRanks:
    """Division of a team's threads into at least two ranks.

    Attributes:
        starts: first thread of each rank, and at the end the number of threads.
        bind: `bind_pages`, or a function in its place in tests.
    """

    each: tuple[CpuRank, ...]
    starts: tuple[int, ...]
    bind: Callable[[int, int, Sequence[int]], int] = dataclasses.field(default=bind_pages, compare=False)

    @property
    def threads(self) -> int:
        """Number of threads of the team."""
        return self.starts[-1]

    @functools.cached_property
    def nodes(self) -> tuple[int, ...]:
        """All nodes with memory of ranks."""
        return tuple(sorted({node for rank in self.each for node in rank.memory}))

    @property
    def apart(self) -> bool:
        """Whether the ranks have different memory nodes; otherwise no memory is bound."""
        return len({rank.memory for rank in self.each}) > 1

    def of_thread(self, thread: int) -> int:
        """Return a thread's rank."""
        return next(rank for rank, end in enumerate(self.starts[1:]) if thread < end)

    def borders(self, units: int) -> list[int]:
        """Return each rank's first unit if the threads divide `units` units of work, and at the end `units`."""
        return [units * start // self.threads for start in self.starts]

    def divides(self, heads: int) -> bool:
        """Whether `heads` heads can be divided among ranks in proportion to threads, with at least one head each."""
        shares = self.borders(heads)
        exact = all(heads * start % self.threads == 0 for start in self.starts)
        return exact and all(first < last for first, last in itertools.pairwise(shares))

    def pages(self, size: int) -> np.ndarray:
        """Allocate `size` untouched bytes from the start of a page on, interleaved over all ranks' nodes."""
        memory = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        advice = getattr(mmap, "MADV_HUGEPAGE", None)
        if advice is not None:
            try:
                memory.madvise(advice)
            except OSError:  # a Linux kernel without huge pages
                logger.debug("no large pages", exc_info=True)
        made = np.frombuffer(memory, np.uint8)
        self._bind(address_of(made), made.size, self.nodes)
        return made

    def place(self, memory: np.ndarray, borders: Sequence[int]) -> int:
        """Bind untouched memory from `pages` to its ranks' nodes; return the number of ranges that were bound.

        A page belongs to the rank whose part contains the start of the page.

        Args:
            memory: contiguous bytes.
            borders: offset in bytes of each rank's part, and the end of the last part.
        """
        at = address_of(memory)
        edges = [-(-(at + border) // PAGE) * PAGE for border in borders]
        placed = 0
        for rank, first, last in zip(self.each, edges, edges[1:]):
            if first < last:
                placed += 1
                self._bind(first, last - first, rank.memory)
        return placed

    def _bind(self, address: int, size: int, nodes: Sequence[int]) -> None:
        error = self.bind(address, -(-size // PAGE) * PAGE, nodes)
        if error:
            _say_refused(error)

    def __str__(self) -> str:
        lines = list[str]()
        for rank, first, last in zip(self.each, self.starts, self.starts[1:]):
            nodes = " and ".join(map(str, rank.nodes))
            lines.append(f"{last - first} of {self.threads} threads on node {nodes} (CPUs {cpu_ranges(rank.cpus)})")
        return ", ".join(lines)


@functools.cache
def _say_refused(error: int) -> None:
    logger.warning(
        "the system does not allow memory to be bound to NUMA nodes (%s), so ranks may read weights of another node, "
        "which is slower; a container may need the capability SYS_NICE",
        os.strerror(error),
    )


# ---- division into ranks ---------------------------------------------------------------------------------------------


def plan_ranks(
    asked: int | None, threads: int, cpus: frozenset[int] | None = None, root: Path = Path("/")
) -> CpuRanks | None:
    """Divide threads among the nodes with CPUs that this process may use; return None for a single rank.

    With fewer ranks than nodes, a rank has nodes adjacent in the order of sockets; with more, ranks share nodes.

    Args:
        asked: number of ranks, at least 1; None for one per node, but no more than threads.
        threads: number of threads of the team.
        cpus: usable CPUs; None for the CPUs that the system allows.
        root: root of the file system.

    Raises:
        ConfigError: `asked` is more than one on a system other than Linux, or more than `threads`.
    """
    if sys.platform != "linux":
        if asked is not None and asked > 1:
            raise ConfigError(
                f"cpu_ranks={asked} needs Linux, which reports NUMA nodes, and this system is {sys.platform}: leave "
                "it out, or set cpu_ranks=1",
                "cpu_ranks",
            )
        return None
    if asked == 1:
        return None
    usable = usable_cpus() if cpus is None else cpus
    nodes = _nodes(usable, root)
    count = min(len(nodes), threads) if asked is None else asked
    if count > threads:
        raise ConfigError(
            f"cpu_ranks={count} needs a thread for each, and there are {threads}: set cpu_ranks={threads} or less, or "
            f"threads={count} or more",
            "cpu_ranks",
        )
    if count == 1:
        return None
    starts = [len(nodes) * rank // count for rank in range(count + 1)]
    mine = [nodes[first : max(end, first + 1)] for first, end in itertools.pairwise(starts)]
    shared = Counter(node for each in mine for node, _ in each)
    weights = [sum(len(cpus) / shared[node] for node, cpus in each) for each in mine]
    return CpuRanks(tuple(_joined(each, root) for each in mine), _starts(weights, threads))


def _joined(nodes: Sequence[tuple[int, frozenset[int]]], root: Path) -> CpuRank:
    memory = sorted({_memory_of(node, root) for node, _ in nodes})
    return CpuRank(frozenset().union(*(cpus for _, cpus in nodes)), tuple(node for node, _ in nodes), tuple(memory))


def _starts(weights: Sequence[float], threads: int) -> tuple[int, ...]:
    """Divide threads in proportion to weights; each share has at least one thread."""
    starts, total = [0], sum(weights)
    for rank in range(1, len(weights)):
        wanted = int(threads * sum(weights[:rank]) / total + 0.5)
        starts.append(min(max(wanted, starts[-1] + 1), threads - (len(weights) - rank)))
    return *starts, threads


_NODES = "sys/devices/system/node"


def _nodes(usable: frozenset[int], root: Path) -> list[tuple[int, frozenset[int]]]:
    """Return each node with usable CPUs, and these CPUs, ordered by socket; node 0 if the system names no nodes."""
    found = []
    for folder in (root / _NODES).glob("node*"):
        number = folder.name.removeprefix("node")
        cpus = usable & parsed_ranges(read_or_nothing(folder / "cpulist"))
        if number.isdecimal() and cpus:
            package = root / f"sys/devices/system/cpu/cpu{min(cpus)}/topology/physical_package_id"
            socket = read_or_nothing(package).strip()
            found.append((int(socket) if socket.isdecimal() else 0, int(number), cpus))
    return [(node, cpus) for _, node, cpus in sorted(found, key=lambda each: each[:2])] or [(0, usable)]


def _memory_of(node: int, root: Path) -> int:
    """Return the node itself, or the nearest node that has memory."""
    having = parsed_ranges(read_or_nothing(root / _NODES / "has_memory"))
    if not having or node in having:
        return node
    online = sorted(parsed_ranges(read_or_nothing(root / _NODES / "online")))
    distances = read_or_nothing(root / _NODES / f"node{node}" / "distance").split()
    near = [(int(far), other) for far, other in zip(distances, online) if far.isdecimal() and other in having]
    return min(near)[1] if near else min(having)


def parsed_ranges(text: str) -> frozenset[int]:
    """Parse a list of numbers in Linux's notation, such as "0-3,8", up to the first part in another notation."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            return frozenset(numbers)
        numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)


def cpu_ranges(cpus: frozenset[int]) -> str:
    """Return a set of CPUs in Linux's notation, the inverse of `parsed_ranges`."""
    runs = [
        [number for _, number in run] for _, run in itertools.groupby(enumerate(sorted(cpus)), lambda e: e[1] - e[0])
    ]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
