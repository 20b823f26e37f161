# SPDX-License-Identifier: MIT
"""Which ranks a machine has, from trees of files as Linux shows them, and what of a matrix is placed where."""

from __future__ import annotations

import errno
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from candle_vllm.core.errors import ConfigError
from candle_vllm.core.kernels.cpu_runtime import numa as module
from candle_vllm.core.kernels.cpu_runtime import weight_memory
from candle_vllm.core.kernels.cpu_runtime.numa import (
    PAGE,
    CpuRank,
    CpuRanks,
    bind_pages,
    cpu_ranges,
    parsed_ranges,
    plan_ranks,
)
from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks need Linux")


def machine(root: Path, nodes: Mapping[int, str], memory: str, sockets: Mapping[str, int], **distances: str) -> Path:
    """Files of a machine: CPUs of each node, nodes with memory, CPUs of each socket, distances from `nodeN`."""
    folder = root / "sys/devices/system/node"
    folder.mkdir(parents=True)
    (folder / "online").write_text(",".join(map(str, sorted(nodes))) + "\n")
    (folder / "has_memory").write_text(memory + "\n")
    (folder / "power").mkdir()
    for node, cpus in nodes.items():
        (folder / f"node{node}").mkdir()
        (folder / f"node{node}" / "cpulist").write_text(cpus + "\n")
        (folder / f"node{node}" / "distance").write_text(distances.get(f"node{node}", "") + "\n")
    for cpus, socket in sockets.items():
        for cpu in parsed_ranges(cpus):
            topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
            topology.mkdir(parents=True)
            (topology / "physical_package_id").write_text(f"{socket}\n")
    return root


def planned(
    root: Path, asked: int | None, threads: int, cpus: str
) -> tuple[list[tuple[str, tuple[int, ...]]], list[int]]:
    """CPUs and nodes of each rank, and where its threads begin."""
    found = plan_ranks(asked, threads, parsed_ranges(cpus), root)
    assert found is not None
    return [(cpu_ranges(rank.cpus), rank.nodes) for rank in found.each], list(found.starts)


TWO = {0: "0-3,8-11", 1: "4-7,12-15"}
SOCKETS = {"0-3,8-11": 0, "4-7,12-15": 1}


def test_two_sockets_are_two_ranks(tmp_path: Path) -> None:
    root = machine(tmp_path, TWO, "0-1", SOCKETS)
    both = [("0-3,8-11", (0,)), ("4-7,12-15", (1,))]
    assert planned(root, None, 8, "0-15") == (both, [0, 4, 8])
    assert planned(root, None, 7, "0-15") == (both, [0, 4, 7])
    assert planned(root, 2, 2, "0-15") == (both, [0, 1, 2])
    assert plan_ranks(None, 1, parsed_ranges("0-15"), root) is None  # as many as there are threads
    assert plan_ranks(1, 8, parsed_ranges("0-15"), root) is None


def test_bounds_of_the_process_count(tmp_path: Path) -> None:
    root = machine(tmp_path, TWO, "0-1", SOCKETS)
    assert plan_ranks(None, 4, parsed_ranges("0-3"), root) is None
    assert planned(root, None, 5, "0-3,12") == ([("0-3", (0,)), ("12", (1,))], [0, 4, 5])
    assert planned(root, None, 2, "0-3,12") == ([("0-3", (0,)), ("12", (1,))], [0, 1, 2])  # each has one


def test_clusters_of_a_socket_stand_together(tmp_path: Path) -> None:
    """The system numbers nodes as it likes: here 0 and 2 are the first socket's."""
    nodes = {0: "0-3", 1: "8-11", 2: "4-7", 3: "12-15"}
    root = machine(tmp_path, nodes, "0-3", {"0-7": 0, "8-15": 1})
    each = [("0-3", (0,)), ("4-7", (2,)), ("8-11", (1,)), ("12-15", (3,))]
    assert planned(root, None, 16, "0-15") == (each, [0, 4, 8, 12, 16])
    assert planned(root, 2, 16, "0-15") == ([("0-7", (0, 2)), ("8-15", (1, 3))], [0, 8, 16])
    three = [("0-3", (0,)), ("4-7", (2,)), ("8-15", (1, 3))]
    assert planned(root, 3, 16, "0-15") == (three, [0, 4, 8, 16])
    found = plan_ranks(2, 16, parsed_ranges("0-15"), root)
    assert found is not None
    assert [rank.memory for rank in found.each] == [(0, 2), (1, 3)]


def test_nodes_without_cpus_and_without_memory(tmp_path: Path) -> None:
    """2 is memory alone, as CXL is; 1 has CPUs alone, and 0 is farther from it than 2."""
    distances = {"node0": "10 21 30", "node1": "21 10 14", "node2": "30 14 10"}
    root = machine(tmp_path, {0: "0-3", 1: "4-7", 2: ""}, "0,2", {"0-3": 0, "4-7": 1}, **distances)
    found = plan_ranks(None, 8, parsed_ranges("0-7"), root)
    assert found is not None
    assert [(rank.nodes, rank.memory) for rank in found.each] == [((0,), (0,)), ((1,), (2,))]


def test_more_ranks_than_nodes_share_their_cpus(tmp_path: Path) -> None:
    root = machine(tmp_path, TWO, "0-1", SOCKETS)
    ranks, starts = planned(root, 3, 9, "0-15")
    assert ranks == [("0-3,8-11", (0,)), ("0-3,8-11", (0,)), ("4-7,12-15", (1,))]
    assert starts == [0, 2, 5, 9]
    assert planned(tmp_path / "nothing", 2, 4, "0-3") == ([("0-3", (0,))] * 2, [0, 2, 4])
    assert plan_ranks(None, 4, parsed_ranges("0-3"), tmp_path / "nothing") is None


def test_too_few_threads_are_refused_with_what_works(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are 2: set cpu_ranks=2 or less, or threads=3 or more") as refused:
        plan_ranks(3, 2, parsed_ranges("0-15"), machine(tmp_path, TWO, "0-1", SOCKETS))
    assert refused.value.setting == "cpu_ranks"


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_other_systems_have_one(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "sys", SimpleNamespace(platform=system))
    assert plan_ranks(None, 8) is None
    assert plan_ranks(1, 8) is None
    with pytest.raises(ConfigError, match=f"cpu_ranks=2 needs Linux.*{system}: leave it out"):
        plan_ranks(2, 8)


def test_lists_of_numbers() -> None:
    assert parsed_ranges("0-2,7,9-10\n") == {0, 1, 2, 7, 9, 10}
    assert parsed_ranges("") == parsed_ranges("none") == frozenset()
    assert cpu_ranges(frozenset({0, 1, 2, 7, 9, 10})) == "0-2,7,9-10"


def test_heads_are_divided_where_each_rank_gets_its_threads_share() -> None:
    rank = CpuRank(frozenset(), (0,), (0,))
    even, uneven = CpuRanks((rank, rank), (0, 4, 8)), CpuRanks((rank, rank), (0, 4, 5))
    assert [heads for heads in range(1, 11) if even.divides(heads)] == [2, 4, 6, 8, 10]
    assert [heads for heads in range(1, 11) if uneven.divides(heads)] == [5, 10]


class Bound(list[tuple[int, int, tuple[int, ...]]]):
    """What was asked of the system, which grants it."""

    def __call__(self, address: int, size: int, nodes: Sequence[int]) -> int:
        assert address % PAGE == size % PAGE == 0
        self.append((address, size, tuple(nodes)))
        return 0


def two(bound: Bound, second: int = 1) -> CpuRanks:
    return CpuRanks((CpuRank(frozenset(), (0,), (0,)), CpuRank(frozenset(), (second,), (second,))), (0, 1, 3), bound)


def test_each_rank_s_rows_are_its_pages() -> None:
    bound = Bound()
    memory = WeightMemory(1 << 20, two(bound))
    memory.take(100)  # so that the next one begins within a page
    del bound[0]
    matrix = memory.take(30 * 5000, 30)
    at = matrix.ctypes.data
    border = at + 10 * 5000  # a third of the threads, so a third of the rows
    first, middle, last = (-(-edge // PAGE) * PAGE for edge in (at, border, at + matrix.size))
    assert bound == [(first, middle - first, (0,)), (middle, last - middle, (1,))]


def test_small_matrices_and_one_node_are_placed_nowhere() -> None:
    bound = Bound()
    memory = WeightMemory(1 << 20, two(bound))
    memory.take(64 * 8, 8)
    memory.take(64 * 8, 8)
    assert [nodes for _, _, nodes in bound] == [(0, 1), (0,)]  # the piece, and the page that it begins with
    bound.clear()
    WeightMemory(1 << 20, two(bound, second=0)).take(1 << 19, 8)
    assert bound == []


def test_so_many_areas_as_the_system_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "proc/sys/vm").mkdir(parents=True)
    (tmp_path / "proc/sys/vm/max_map_count").write_text("7\n")
    most = weight_memory.most_areas
    monkeypatch.setattr(weight_memory, "most_areas", lambda: most(tmp_path))
    bound = Bound()
    memory = WeightMemory(1 << 20, two(bound))
    for _ in range(4):
        memory.take(16 * PAGE, 16)
    assert [nodes for _, _, nodes in bound] == [(0, 1), (0,), (1,), (0,), (1,)]
    assert caplog.text.count("raise vm.max_map_count") == 1


def test_the_system_s_own_answer() -> None:
    """Of its first node, and of one that no machine has."""
    memory = two(Bound()).pages(4 * PAGE)
    answer = bind_pages(memory.ctypes.data, 4 * PAGE, (0,))
    if answer in (errno.EPERM, errno.ENOSYS):
        pytest.skip("memory cannot be placed here")
    assert answer == 0
    assert bind_pages(memory.ctypes.data, 4 * PAGE, (1023,)) == errno.EINVAL
    memory[:] = 1
    assert np.count_nonzero(memory) == 4 * PAGE
