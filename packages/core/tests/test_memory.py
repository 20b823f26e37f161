# SPDX-License-Identifier: MIT
"""How much memory there is, and what is said where something does not fit."""

from __future__ import annotations

import dataclasses
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from candle_vllm.core import EngineConfig, InferenceEngine, memory
from candle_vllm.core.errors import ConfigError, NoMemoryError
from candle_vllm.core.loading.cache_specs import NO_STATES, PagedSpec, SharedKVSpec, StateRoom, WindowRoom
from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.loading.tensors import MappedFile
from candle_vllm.core.memory import (
    MIB,
    CachePlan,
    Limit,
    Room,
    agreed_plan,
    plan_cache,
    room_for,
    tightest_limit,
)

MEMINFO = "MemTotal: 9000000 kB\nMemAvailable: 8388608 kB\n"
V1 = "9:name=systemd:/\n4:memory:/a/b\n1:cpu:/c\n0::/\n"
GIB = 1 << 30


@pytest.fixture(autouse=True)
def nothing_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that engines of other tests in this process have mapped do not count for the fake machines."""
    monkeypatch.setattr(memory, "mapped_bytes", lambda: 0)


def tree(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A file system with a machine of 8 GiB and the control groups of a process."""
    whole = {"proc/self/cgroup": groups, "proc/meminfo": MEMINFO, "proc/self/statm": "1000 1 1 1 0 500 0\n"}
    for name, text in (whole | {f"sys/fs/cgroup/{n}": t for n, t in files.items()}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        ("0::/\n", {}, 8 * GIB),
        ("0::/\n", {"memory.max": f"{2 * GIB}\n", "memory.current": f"{GIB}\n"}, GIB),
        ("0::/\n", {"memory.max": "max\n", "memory.current": f"{GIB}\n"}, 8 * GIB),
        # The group above allows less than the process's own.
        (
            "0::/a/b\n",
            {
                "a/memory.max": f"{3 * GIB}",
                "a/memory.current": f"{GIB}",
                "a/b/memory.max": f"{4 * GIB}",
                "a/b/memory.current": "0",
            },
            2 * GIB,
        ),
        # Pages of files that nobody has open are given back when they are needed.
        (
            "0::/\n",
            {
                "memory.max": f"{2 * GIB}",
                "memory.current": f"{2 * GIB}",
                "memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7\n",
            },
            GIB,
        ),
        (
            V1,
            {
                "memory/a/memory.limit_in_bytes": f"{3 * GIB}",
                "memory/a/memory.usage_in_bytes": f"{2 * GIB}",
                "memory/a/memory.stat": f"total_inactive_file {GIB // 2}\n",
                "memory/a/b/memory.limit_in_bytes": "9223372036854771712",
                "memory/a/b/memory.usage_in_bytes": "5",
            },
            3 * GIB // 2,
        ),
        # In a container the group's path is the host's.
        (V1, {"memory/memory.limit_in_bytes": f"{GIB}", "memory/memory.usage_in_bytes": f"{2 * GIB}"}, 0),
        ("0::/\n", {"memory.max": "garbage", "memory.current": "?"}, 8 * GIB),
    ],
)
def test_control_groups_count_as_the_machines_memory(
    groups: str, files: dict[str, str], left: int, tmp_path: Path
) -> None:
    assert tightest_limit(tree(tmp_path, groups, files)).left == left


@pytest.mark.parametrize(
    ("kind", "name", "pages"), [(resource.RLIMIT_AS, "ulimit -v", 1000), (resource.RLIMIT_DATA, "ulimit -d", 500)]
)
def test_limits_of_the_process_count_as_the_machines_memory(
    kind: int, name: str, pages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = resource.getrlimit
    monkeypatch.setattr(resource, "getrlimit", lambda asked: (GIB, GIB) if asked == kind else real(asked))
    limit = tightest_limit(tree(tmp_path, "0::/\n", {}))
    assert (limit.left, limit.name) == (GIB - pages * resource.getpagesize(), name)
    assert limit.raised_by(0) == f"raise it ({name} {(GIB + limit.spare) // 1024})"


# ---- one sentence for what does not fit ------------------------------------------------------------------------------


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = Limit(100 * MIB, "the control group (container)", 512 * MIB)
    monkeypatch.setattr(memory, "tightest_limit", lambda: limit)


def _map_without_room(*_: object, **__: object) -> None:
    raise OSError(12, "Cannot allocate memory")


def _start_without_room() -> None:
    raise RuntimeError("can't start new thread")


def _take_too_much() -> None:
    np.empty(1 << 60, np.uint8)


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (_take_too_much, "the cake"),
        (_map_without_room, "the cake"),
        (_start_without_room, "one more thread for the cake"),
    ],
)
def test_whatever_runs_out_is_one_sentence(fail: Callable[[], None], words: str) -> None:
    with (
        pytest.raises(ConfigError) as caught,
        room_for("the cake", 0, "kv_cache_memory", lambda left: f"{left // MIB}"),
    ):
        fail()
    assert str(caught.value).startswith(f"not enough memory for {words}")
    assert "100 MiB are left of the 512 MiB that the control group (container) allows; " in str(caught.value)
    assert "raise it to 768 MiB" in str(caught.value)


@pytest.mark.usefixtures("limited")
def test_what_cannot_fit_is_not_tried() -> None:
    words = r"not enough memory for the cake \(300 MiB\): .*; eat 100 or raise it to 968 MiB$"
    with (
        pytest.raises(NoMemoryError, match=words),
        room_for("the cake", 300 * MIB, way=lambda left: f"eat {left // MIB}"),
    ):
        raise AssertionError("it was tried")


@pytest.mark.usefixtures("limited")
def test_other_failures_stay_what_they_are() -> None:
    for error in (OSError(2, "No such file"), RuntimeError("other"), ImportError("no module")):
        with pytest.raises(type(error)), room_for("the cake", 0):
            raise error


def test_a_file_that_cannot_be_mapped_for_want_of_memory_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"x" * 100)
    monkeypatch.setattr("candle_vllm.core.loading.tensors.mmap.mmap", _map_without_room)
    with pytest.raises(NoMemoryError, match="not enough memory for the file"), room_for("the file", 0):
        MappedFile(tmp_path / "x")


@pytest.mark.parametrize(
    ("patched", "sentence"),
    [
        (
            "candle_vllm.core.engine.runners.recorded_runner._caches",
            r"for the KV cache \(.*; set kv_cache_memory=\d+ \(bytes\)",
        ),
        (
            "candle_vllm.core.engine.runners.recorded_runner.Recorder",
            r"a step of 512 tokens.*; set max_num_batched_tokens=128",
        ),
        (
            "candle_vllm.core.assembly.model.load_weights",
            r"for the weights of toy.*; quantise it while it is loaded \(isq='",
        ),
    ],
)
def test_each_allocation_names_its_flag(
    patched: str, sentence: str, toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patched, lambda *_, **__: _take_too_much())
    with pytest.raises(ConfigError, match=sentence):
        InferenceEngine(str(toy_model))


def test_a_thread_that_does_not_start_is_one_sentence(toy_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = threading.Thread.start

    def start(self: threading.Thread) -> None:
        if "engine" in self.name:
            _start_without_room()
        real(self)

    with InferenceEngine(EngineConfig(model=str(toy_model), threads=1)) as engine:
        monkeypatch.setattr(threading.Thread, "start", start)
        with pytest.raises(NoMemoryError, match="not enough memory for one more thread for the engine"):
            engine.generate([[1]], use_tqdm=False)
        monkeypatch.undo()


def test_the_cache_is_said_in_words_that_do_not_frighten(toy_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), InferenceEngine(str(toy_model), max_num_seqs=3, block_size=64) as engine:
        info, stats = engine.model_info, engine.stats()
    most = 3 * -(-info.max_model_len // 64)
    assert stats.num_blocks == most  # never more than the sequences can need
    (line,) = [message for message in caplog.messages if "KV cache" in message]
    assert f"room for {most * 64:,} tokens in blocks of 64; at most " in line
    assert f"all that 3 sequences of {info.max_model_len:,} tokens can need" in line
    assert "free), taken as the cache fills" in line


def test_a_context_that_is_cut_is_a_warning_with_what_all_of_it_takes(
    toy_model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "the control group (container)"
    monkeypatch.setattr("candle_vllm.core.memory.tightest_limit", lambda: Limit(128 * MIB + 50_000, name, 1 << 30))
    with caplog.at_level("WARNING"), InferenceEngine(str(toy_model), block_size=16) as engine:
        length = engine.model_info.max_model_len
    (line,) = [message for message in caplog.messages if "does not fit" in message]
    assert re.fullmatch(
        rf"the model's context of [\d,]+ tokens does not fit and is cut to {length:,}: all of it takes 1 MiB more "
        rf"than the 49 KiB that are free of the control group \(container\), 128 MiB "
        rf"put aside; if that is intended, set max_model_len to {length} \(--max-model-len {length}\)",
        line,
    ), line
    caplog.clear()
    with caplog.at_level("WARNING"), InferenceEngine(str(toy_model), block_size=16, max_model_len=length):
        pass
    assert not caplog.messages  # it is meant


def test_a_container_without_room_for_the_servers_own_work_is_refused(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = Limit(121 * MIB, "the control group (container)", 286 * MIB)
    monkeypatch.setattr("candle_vllm.core.memory.tightest_limit", lambda: limit)
    with pytest.raises(
        NoMemoryError, match=r"0 KiB of the control group \(container\), 121 MiB put aside: try to raise"
    ):
        InferenceEngine(str(toy_model))


PROGRAM = """
import resource, sys
from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.errors import ConfigError
limit = int(sys.argv[2]) << 10
resource.setrlimit(getattr(resource, sys.argv[1]), (limit, limit))
try:
    with InferenceEngine(sys.argv[3], threads=int(sys.argv[4])) as engine:
        asked = SamplingParams(max_tokens=2, ignore_eos=True)
        print(len(engine.generate([[1, 2]], asked, use_tqdm=False)[0].token_ids))
except ConfigError as error:
    print(error)
"""


@pytest.mark.parametrize(("kind", "name", "kib"), [("RLIMIT_AS", "v", 240_000), ("RLIMIT_DATA", "d", 90_000)])
def test_a_limited_process_says_what_would_fit(kind: str, name: str, kib: int, toy_model: Path) -> None:
    with InferenceEngine(str(toy_model)):  # its kernels are there then
        pass

    threads, said = 2, ""
    for _ in range(4):  # what it says is done until it works
        command = [sys.executable, "-c", PROGRAM, kind, str(kib), str(toy_model), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        if done == "2\n":
            break
        said = done
        if found := re.search(rf"raise it \(ulimit -{name} (\d+)\)$", done):
            kib = int(found[1])
        else:
            found = re.search(r"set threads=(\d)$", done)
            assert found, done
            threads = int(found[1])
    assert said
    assert done == "2\n"


def two(key_dim: int) -> float:
    """Bytes of an element."""
    return 2


def _toy(max_position: int) -> ModelConfig:
    """Sixteen elements of a token in each of two layers: 64 bytes in types of two bytes."""
    return SimpleNamespace(  # type: ignore[return-value]
        max_position=max_position,
        num_layers=2,
        cache_specs=(PagedSpec(2, 4, 4),) * 2,
    )


def test_a_share_of_the_whole_gpu_counts_what_others_have_taken() -> None:
    config = EngineConfig(model="m", gpu_memory_utilization=0.75, block_size=64)
    room = Room(6 * MIB, 0.9, total=8 * MIB)  # 2 MiB are weights, steps and other programs
    plan = plan_cache(config, _toy(1 << 20), two, 1, room)
    assert plan.num_blocks * plan.block_bytes == 4 * MIB
    assert "8192 KiB times 0.75" in plan.message
    assert "64 MiB of KV cache" in plan.warning
    with pytest.raises(NoMemoryError, match=r"try .*gpu_memory_utilization=0\.87"):
        plan_cache(dataclasses.replace(config, max_model_len=80_000), _toy(80_000), two, 1, room)


def test_a_cache_larger_than_the_free_memory_is_not_suggested() -> None:
    """80,000 tokens take 5,120,000 bytes."""
    config, model = EngineConfig(model="m", max_model_len=80_000), _toy(80_000)
    with pytest.raises(NoMemoryError, match=r"try max_model_len=\d+ or to free 3976 KiB of memory$"):
        plan_cache(config, model, two, 1, Room(MIB, 0.9))
    with pytest.raises(NoMemoryError) as error:
        plan_cache(config, model, two, 1, Room(5_200_000, 0.4))
    (found,) = re.findall(r"kv_cache_memory=(\d+)", str(error.value))
    plan_cache(dataclasses.replace(config, kv_cache_memory=int(found)), model, two, 1, Room(5_200_000, 0.4))


def test_bytes_count_before_a_share_and_main_memory_has_its_own() -> None:
    config = EngineConfig(model="m", gpu_memory_utilization=0.75, kv_cache_memory=MIB)
    plan = plan_cache(config, _toy(1 << 20), two, 1, Room(6 * MIB, 0.9, total=8 * MIB))
    assert plan.num_blocks * plan.block_bytes == MIB
    plan = plan_cache(dataclasses.replace(config, kv_cache_memory=None), _toy(1 << 20), two, 1, Room(6 * MIB, 0.5))
    assert plan.num_blocks * plan.block_bytes == 3 * MIB


# ---- layers with a window --------------------------------------------------------------------------------------------


def _gemma(layers: int, heads: int, window: int, max_position: int = 32768) -> ModelConfig:
    """A sixth of the layers sees all tokens, as in Gemma 3."""
    specs = (PagedSpec(heads, 256, 256, window if (layer + 1) % 6 else None) for layer in range(layers))
    return SimpleNamespace(max_position=max_position, num_layers=layers, cache_specs=tuple(specs))  # type: ignore[return-value]


def _gemma4() -> ModelConfig:
    """As E4B: 24 layers with keys of their own, every sixth of which sees all tokens, and 18 that read those."""
    own = [PagedSpec(2, 256, 256, 512), PagedSpec(2, 512, 512)]
    specs = [own[(layer + 1) % 6 == 0] for layer in range(24)] + [SharedKVSpec(22), SharedKVSpec(23)] * 9
    return SimpleNamespace(max_position=32768, num_layers=42, cache_specs=tuple(specs))  # type: ignore[return-value]


E4B = _gemma4()


@pytest.mark.parametrize(
    ("model", "all_pages", "windows"),
    [(_gemma(26, 1, 512), 832, 166), (_gemma(34, 4, 1024), 4352, 959), (E4B, 1792, 582)],
)
def test_layers_with_a_window_take_what_it_sees(model: ModelConfig, all_pages: int, windows: int) -> None:
    config = EngineConfig(model="m", max_num_seqs=1)
    plans = [plan_cache(config, model, two, 1, Room(1 << 34, 0.5), rows=rows, drafts=3) for rows in (0, 512)]
    assert [plan.num_bytes // MIB for plan in plans] == [all_pages, windows]
    assert {plan.num_blocks * 64 for plan in plans} == {32768}
    assert "layers with a window of" in plans[1].message


@pytest.mark.parametrize("mib", [2, 20, 60, 100, 181, 400, 1000, 4000])
@pytest.mark.parametrize("sequences", [1, 64])
@pytest.mark.parametrize("is_set", [False, True])
def test_pages_and_blocks_stay_within_the_memory(mib: int, sequences: int, is_set: bool) -> None:
    config = EngineConfig(model="m", kv_cache_memory=mib * MIB, max_model_len=32768 if is_set else None)
    model = _gemma(26, 1, 512)
    try:
        plan = plan_cache(config, model, two, sequences, Room(1 << 34, 0.5), rows=512)
    except NoMemoryError as error:
        assert is_set
        assert mib < 181
        lengths = re.findall(r"max_model_len=(-?\d+)", str(error))
        assert all(int(length) > 0 for length in lengths)
        found = re.search(r"kv_cache_memory=(\d+)", str(error))
        assert found
        config = dataclasses.replace(config, kv_cache_memory=int(found[1]))
        plan = plan_cache(config, model, two, sequences, Room(1 << 34, 0.5), rows=512)
        assert plan.num_bytes // MIB < 200
    assert config.kv_cache_memory is not None
    assert plan.num_bytes <= config.kv_cache_memory
    pages = plan.windows[0].pages if plan.windows else plan.num_blocks + 1
    assert pages - 1 >= min(plan.num_blocks, -(-(511 + 512 + 63) // 64)), "one sequence can always go on"
    assert plan.max_model_len == 32768 or not is_set


@pytest.mark.parametrize("mib", [60, 100, 150])
def test_the_memory_for_all_of_a_context_counts_larger_pools(mib: int) -> None:
    """Without `max_model_len` the pools of a larger cache are larger, too; 832 MiB hold pages for all tokens."""
    config, room = EngineConfig(model="m", kv_cache_memory=mib * MIB), Room(1 << 34, 0.5)
    plan = plan_cache(config, _gemma(26, 1, 512), two, 64, room, rows=512)
    (needed,) = re.findall(r"all of it takes (\d+) MiB of KV cache", plan.warning)
    whole = plan_cache(
        dataclasses.replace(config, kv_cache_memory=int(needed) * MIB), _gemma(26, 1, 512), two, 64, room, rows=512
    )
    assert not whole.warning


def test_layers_without_a_window_have_a_page_for_each_block() -> None:
    config = EngineConfig(model="m")
    for specs in ((PagedSpec(2, 4, 4),) * 2, (PagedSpec(1, 8, 0), PagedSpec(1, 8, 0))):
        model: Any = SimpleNamespace(max_position=4096, num_layers=2, cache_specs=specs)
        plans = [plan_cache(config, model, two, 4, Room(1 << 34, 0.5), rows=rows) for rows in (0, 64)]
        assert plans[0] == plans[1]
        assert not plans[0].windows


def test_where_all_layers_have_a_window_the_context_takes_nothing() -> None:
    config = EngineConfig(model="m", max_num_seqs=4, kv_cache_memory=4 * MIB)
    model: Any = SimpleNamespace(max_position=1 << 20, num_layers=2, cache_specs=(PagedSpec(2, 64, 64, 512),) * 2)
    plan = plan_cache(config, model, two, 4, Room(1 << 34, 0.5), rows=256)
    assert (plan.max_model_len, plan.num_blocks * 64, plan.block_bytes) == (1 << 20, 4 << 20, 0)
    assert 0 < plan.num_bytes == plan.windows[0].pages * 64 * 2 * 2 * 2 * 128 <= 4 * MIB
    assert "layers with a window of 512 tokens keep" in plan.message
    small = dataclasses.replace(config, kv_cache_memory=MIB // 2)
    assert not plan_cache(small, model, two, 4, Room(1 << 34, 0.5), rows=256).windows, "its windows do not fit"


def test_each_window_has_pages_of_its_own() -> None:
    specs = (PagedSpec(1, 64, 64, 4096), PagedSpec(1, 64, 64, 128), PagedSpec(1, 64, 64))
    model: Any = SimpleNamespace(max_position=32768, num_layers=3, cache_specs=specs)
    for size, sequences in ((None, 2), (12 * MIB, 8), (10 * MIB, 1)):
        config = EngineConfig(model="m", max_model_len=32768, kv_cache_memory=size)
        plan = plan_cache(config, model, two, sequences, Room(1 << 34, 0.5), rows=256)
        narrow, wide = plan.windows
        assert (narrow.window, wide.window) == (128, 4096)
        assert 1 + narrow.blocks(64) <= narrow.pages < wide.pages
        assert wide.pages >= 1 + wide.blocks(64)
        assert plan.num_bytes <= (size or 1 << 33)
    large: Any = SimpleNamespace(max_position=4096, num_layers=3, cache_specs=specs)
    plan = plan_cache(EngineConfig(model="m"), large, two, 2, Room(1 << 34, 0.5), rows=256)
    assert [room.window for room in plan.windows] == [128], "as many blocks as the wide window has are all"


def test_ranks_agree_on_the_pools() -> None:
    class Least:
        """Beside a rank with one pool of nine pages."""

        def least(self, number: int) -> int:
            return {2: 1, -2: -2, 1: 1, -1: -1}.get(number, min(number, 9))

    specs = (PagedSpec(1, 64, 64, 4096), PagedSpec(1, 64, 64, 128), PagedSpec(1, 64, 64))
    model: Any = SimpleNamespace(max_position=32768, num_layers=3, cache_specs=specs)
    config, ranks = EngineConfig(model="m"), cast(Any, Least())

    def plan(pools: int | None) -> CachePlan:
        return plan_cache(config, model, two, 2, Room(1 << 34, 0.5), rows=256, pools=pools)

    agreed = agreed_plan(plan, ranks)
    assert [(room.window, room.pages) for room in agreed.windows] == [(128, 9)]
    assert agreed.num_bytes == agreed.num_blocks * agreed.block_bytes + 9 * agreed.windows[0].page_bytes
    assert agreed_plan(plan, None) == plan(None)


def test_states_that_ranks_agree_on_are_those_that_are_counted() -> None:
    plan = CachePlan(100, 1000, 1024, "", states=StateRoom(8, 100, 2, 500, 300), windows=(WindowRoom(128, 4, 50, 70),))
    agreed = plan.agreed(cast(Any, SimpleNamespace(least=lambda number: min(number, 6))))
    assert plan.num_bytes == 100 * 1000 + 50 * 70 + plan.states.num_bytes
    assert (plan.states.num_bytes, agreed.states.num_bytes) == (8 * 500 + 100 * 300, 6 * 500 + 6 * 300)
    assert agreed.num_bytes == 6 * 1000 + 6 * 70 + agreed.states.num_bytes


def test_a_stage_without_states_agrees_to_the_states_of_the_others() -> None:
    def agreed(own: StateRoom, least: int) -> StateRoom:
        ranks = cast(Any, SimpleNamespace(least=lambda number: min(number, least)))
        return CachePlan(100, 1000, 1024, "", states=own).agreed(ranks).states

    assert (agreed(NO_STATES, 6).running, agreed(NO_STATES, 6).num_bytes) == (6, 0)
    assert agreed(NO_STATES, 1 << 50) == NO_STATES
    assert agreed(StateRoom(8, 100, 2, 500, 300), 1 << 50) == StateRoom(8, 100, 2, 500, 300)
