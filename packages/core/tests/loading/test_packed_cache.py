# SPDX-License-Identifier: MIT
"""Packed weights that are kept in a file between starts: the same matrices, and files that may not be used."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from candle_vllm.core import EngineConfig, InferenceEngine, SamplingParams, threads
from candle_vllm.core.assembly import packed_cache
from candle_vllm.core.assembly.encoder import load_any_model
from candle_vllm.core.devices import CPU
from candle_vllm.core.engine.build import build_engine
from candle_vllm.core.engine.runners import key_fit
from candle_vllm.core.engine.runners.recorded_runner import RecordedRunner
from candle_vllm.core.errors import ModelNotFoundError
from candle_vllm.core.kernels import packed_linear, plain_linear
from candle_vllm.core.kernels.cpu_runtime import packed_file
from candle_vllm.core.kernels.cpu_runtime.numa import CpuRank, CpuRanks
from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory, mapped_bytes
from candle_vllm.core.layers.adapters import linears_in
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.toy_gguf import write_toy_gguf
from tests.waiting import PATIENCE

CONFIG = toy_config("llama", head_dim=32, hidden_size=128, intermediate_size=256, num_hidden_layers=2)
SETTINGS: dict[str, Any] = {"device": "cpu", "threads": 1}
PROGRAM = """
import sys
from candle_vllm.core import EngineConfig
from candle_vllm.core.assembly import packed_cache
from candle_vllm.core.assembly.encoder import load_any_model
from candle_vllm.core.devices import CPU
packed_cache.LEAST_BYTES = 0
load_any_model(EngineConfig(model=sys.argv[1], device="cpu", threads=1, packed_cache=sys.argv[2]), CPU, lambda *_: None)
"""


@pytest.fixture(autouse=True, params=["mapped", "copied"])
def huge(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the system maps files in huge pages; small models are kept, too."""
    monkeypatch.setattr(packed_cache, "LEAST_BYTES", 0)
    monkeypatch.setattr(packed_file, "in_huge_pages", lambda _: request.param == "mapped")
    return request.param == "mapped"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_toy_gguf(tmp_path / "toy.gguf", CONFIG, quantization="Q4_0", others={"attn_v": "F16"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels whose matrices were packed, one entry for each matrix."""
    made = list[str]()

    def counted(module: Any) -> None:
        original = module.pack

        def pack(*given: Any, **named: Any) -> Any:
            made.append(module.__name__)
            return original(*given, **named)

        monkeypatch.setattr(module, "pack", pack)

    counted(packed_linear)
    counted(plain_linear)
    return made


def load(model: Path, folder: Path | str, **settings: Any) -> dict[str, Any]:
    """Load a model, wait until its weights are kept, and return its matrices with their layer's number and name."""
    config = EngineConfig(model=str(model), **SETTINGS, packed_cache=str(folder), **settings)
    loaded: Any = load_any_model(config, CPU, lambda *_: None)
    for memory in loaded.memories:
        if memory.writer is not None:
            memory.writer.join()
    layers = enumerate(linears_in(loaded.decoder.layers))
    return {f"{number} {name}": piece for number, layer in layers for name, piece in layer.pieces.items()}


def same(found: dict[str, Any], right: dict[str, Any]) -> bool:
    assert found.keys() == right.keys()
    assert len(right) > 10
    return all(
        (type(piece), piece.rows, piece.columns, piece.kind) == (type(other), other.rows, other.columns, other.kind)
        and piece.data.ctypes.data % 64 == 0
        and np.array_equal(piece.data, other.data)
        for piece, other in ((found[name], right[name]) for name in right)
    )


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "weights").iterdir())


def test_a_second_start_packs_nothing(model: Path, folder: Path, packings: list[str], huge: bool) -> None:
    right = load(model, folder)
    assert {name.rpartition(".")[2] for name in packings} == {"packed_linear", "plain_linear"}
    [file] = kept(folder)
    if sys.platform != "win32":
        assert {path.stat().st_mode & 0o077 for path in (folder, folder / "weights")} == {0}
    packings.clear()
    before = mapped_bytes()
    found = load(model, folder)
    assert not packings
    assert same(found, right)
    assert (mapped_bytes() > before) == huge
    assert all(piece.data.flags.writeable != huge for piece in found.values())
    copied = shutil.copytree(model.parent, model.parent / "elsewhere")  # with the times of the files
    load(copied / model.name, folder)
    assert not packings
    assert kept(folder) == [file]


@pytest.mark.skipif(sys.platform == "win32", reason="no modes of files")
def test_a_folder_that_a_group_may_write_to(
    model: Path, folder: Path, packings: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A volume of Kubernetes, and what mkdir makes with Ubuntu's umask; the folder in it is this user's alone."""
    folder.mkdir()
    folder.chmod(0o2777)
    load(model, folder)
    assert "packed at every start" not in caplog.text
    assert (folder / "weights").stat().st_mode & 0o077 == 0
    packings.clear()
    load(model, folder)
    assert not packings
    (folder / "weights").chmod(0o777)
    load(model, folder)
    assert f"other users can write to {folder / 'weights'}" in caplog.text


def test_a_file_that_is_missing_beside_the_model_is_named(model: Path, folder: Path) -> None:
    config = EngineConfig(model=str(model), packed_cache=str(folder), mmproj=folder / "none.gguf", **SETTINGS)
    with pytest.raises(ModelNotFoundError, match=r"none\.gguf is not a file; check the spelling"):
        load_any_model(config, CPU, lambda *_: None)


def test_it_may_be_off(model: Path, tmp_path: Path, packings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    right = load(model, "off")
    count = len(packings)
    assert same(load(model, "off"), right)
    assert len(packings) == 2 * count
    assert not (tmp_path / "cache" / "candle-vllm" / "weights").exists()
    load(model, "on")
    assert len(kept(tmp_path / "cache" / "candle-vllm")) == 1
    monkeypatch.setattr(packed_cache, "LEAST_BYTES", 1 << 30)
    load(model, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_what_keys_are_fitted_to_is_kept(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the file, the text or the type of keys changes."""
    measured, measure = list[int](), RecordedRunner.measure_keys
    monkeypatch.setattr(RecordedRunner, "measure_keys", lambda *given: (measured.append(1), measure(*given))[1])

    def fits(kind: str = "q8_0") -> bytes:
        measured.clear()
        config = EngineConfig(
            model=str(model), **SETTINGS, packed_cache=str(folder), kv_cache_dtype=kind, kv_cache_memory=4 << 20
        )
        engine = build_engine(config, loaded := load_any_model(config, CPU, lambda *_: None))
        found = b"".join(fit.tobytes() for fit in engine.runner.fits)
        engine.close()
        for memory in loaded.memories:
            assert memory.writer is None or memory.writer.join() is None
        return found

    right = fits()
    assert len(measured) == 1
    assert (fits(), measured) == (right, [])
    [file] = [each for each in kept(folder) if each.suffix == packed_file.FITS]
    whole = file.read_bytes()
    for harmed in (whole[:-1], whole + b"0", b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(harmed)
        assert (fits(), len(measured)) == (right, 1)
        assert file.read_bytes() == whole
    monkeypatch.setattr(key_fit, "_TEXT", "Another text.")
    assert fits() != right
    assert measured
    fits("q4_0")
    assert measured
    write_toy_gguf(model, CONFIG, quantization="Q4_0", others={"attn_v": "F16"}, seed=1)
    fits("q4_0")
    assert measured
    fits("q4_0")
    assert not measured


@pytest.mark.parametrize("harm", ["matrix", "table", "shortened", "foreign", "empty", "longer"])
def test_damaged_files_are_written_again(
    model: Path, folder: Path, packings: list[str], harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    right = load(model, folder)
    [file] = kept(folder)
    whole = file.read_bytes()
    at = {"matrix": len(whole) - 1000, "table": 200}.get(harm, 0)
    harmed = {
        "shortened": whole[: len(whole) // 2],
        "foreign": b"GGUF" + whole[4:],
        "empty": b"",
        "longer": whole + bytes(64),
    }
    file.write_bytes(harmed.get(harm, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]))
    packings.clear()
    assert same(load(model, folder), right)
    assert packings
    assert "written again" in caplog.text
    assert "unpack requires" not in caplog.text
    assert kept(folder) == [file]
    assert file.read_bytes() == whole
    packings.clear()
    assert same(load(model, folder), right)
    assert not packings


def test_changed_files_are_other_models(model: Path, folder: Path, packings: list[str]) -> None:
    first = load(model, folder)
    info = model.stat()
    write_toy_gguf(model, CONFIG, quantization="Q4_0", others={"attn_v": "F16"}, seed=1)
    assert model.stat().st_size == info.st_size
    os.utime(model, ns=(info.st_atime_ns, info.st_mtime_ns))
    packings.clear()
    second = load(model, folder)
    assert packings
    assert not same(second, first)
    assert same(second, load(model, "off"))


def test_another_layout_is_written_over(
    model: Path, folder: Path, packings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = load(model, folder)
    [file] = kept(folder)
    before = file.read_bytes()
    monkeypatch.setattr(packed_cache, "layout_version", lambda: "another")
    packings.clear()
    assert same(load(model, folder), right)
    assert packings
    assert kept(folder) == [file]
    assert file.read_bytes() != before


def test_types_of_isq_are_kept_apart(tmp_path: Path, folder: Path, packings: list[str]) -> None:
    plain = write_toy_model(tmp_path / "plain", CONFIG)
    made = {isq: load(plain, folder, isq=isq) for isq in ("q4_0", "q8_0")}
    assert len(kept(folder)) == 2
    packings.clear()
    for isq, right in made.items():
        assert same(load(plain, folder, isq=isq), right)
    assert not packings


def test_files_of_an_installation_without_a_compiler_are_kept_apart(
    model: Path, folder: Path, packings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Numba, types whose kernels are not precompiled become 8-bit codes."""
    right = load(model, folder)
    monkeypatch.setattr(packed_cache, "has_compiler", lambda: False)
    packings.clear()
    assert same(load(model, folder), right)
    assert packings
    assert len(kept(folder)) == 2


def test_a_full_disk_costs_a_warning(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(parts: Any) -> Iterator[np.ndarray]:
        yield np.concatenate([*parts])[:5000]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_file, "_chunks", full)
    right = load(model, folder)
    assert [each.levelname for each in caplog.records if "No space left" in each.getMessage()] == ["WARNING"]
    assert kept(folder) == []
    monkeypatch.undo()
    assert same(load(model, "off"), right)


def test_files_used_least_recently_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    own = tmp_path / "own.weights"
    names = ("new.weights", "old.weights", "own.weights", "left.tmp", "other.txt")
    for name, age in zip(names, (1, 2, 3, 4, 5)):
        (tmp_path / name).write_bytes(bytes(400))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    assert not packed_file.make_room(own, 901)  # half of 1000 free bytes and of 800 kept ones
    assert {path.name for path in tmp_path.iterdir()} == {*names} - {"left.tmp"}
    assert packed_file.make_room(own, 500)
    assert {path.name for path in tmp_path.iterdir()} == {"new.weights", "own.weights", "other.txt"}
    free.free = 1 << 50
    assert not packed_file.make_room(own, packed_file.MOST_BYTES + 1)
    assert packed_file.make_room(own, packed_file.MOST_BYTES - 400)
    assert (tmp_path / "new.weights").exists()


def test_parts_of_ended_processes_are_deleted(model: Path, folder: Path) -> None:
    right = load(model, folder)
    (file,) = kept(folder)
    left, running = (file.with_name(f"{name}.weights.1.1.tmp") for name in ("left", "running"))
    for part in (left, running):
        part.write_bytes(bytes(100))
    os.utime(left, (time.time() - 61, time.time() - 61))
    assert same(load(model, folder), right)  # a start that writes nothing
    assert kept(folder) == sorted([file, running])


def test_a_process_saves_weights_before_it_leaves_daemon_threads(model: Path, folder: Path, huge: bool) -> None:
    if not huge:
        pytest.skip("the process asks the system")
    program = (
        f"{PROGRAM}\nimport threading, time\nthreading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n"
    )
    program += "from candle_vllm.server.interrupts import leave\nleave(7)"
    assert subprocess.run([sys.executable, "-c", program, str(model), str(folder)], timeout=120).returncode == 7
    assert [path.suffix for path in kept(folder)] == [".weights"]


def test_two_processes_at_once(model: Path, folder: Path, packings: list[str], huge: bool) -> None:
    if not huge:
        pytest.skip("the processes ask the system")
    both = [subprocess.Popen([sys.executable, "-c", PROGRAM, str(model), str(folder)]) for _ in range(2)]
    assert [each.wait(120) for each in both] == [0, 0]
    assert len(kept(folder)) == 1
    found = load(model, folder)
    assert not packings
    assert same(found, load(model, "off"))


@pytest.mark.parametrize("what", ["process", "engine"])
def test_what_ends_gives_a_file_up(
    model: Path, folder: Path, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that would take too long is given up as soon as its first bytes show it: its matrices hold memory."""
    given_up = threading.Event()

    def slow(_: object) -> Iterator[np.ndarray]:
        yield np.zeros(1, np.uint8)
        given_up.wait(PATIENCE)
        yield np.zeros(1, np.uint8)

    monkeypatch.setattr(packed_file, "_PATIENCE", 10 * PATIENCE)
    monkeypatch.setattr(packed_file, "_chunks", slow)
    monkeypatch.setattr(
        packed_file.PackedFile,
        "_ends",
        property(lambda _: given_up.is_set(), lambda _, ends: ends and given_up.set()),
        raising=False,
    )
    config = EngineConfig(model=str(model), **SETTINGS, packed_cache=str(folder))
    ends: Callable[[], object] | None = None
    caplog.set_level(logging.INFO)
    if what == "engine":
        ends = InferenceEngine(config).close
    else:
        load_any_model(config, CPU, lambda *_: None)
    ((thread, at_exit),) = threads.AT_EXIT.items()
    (ends or at_exit)()
    assert given_up.is_set()
    assert not thread.is_alive()
    assert not threads.AT_EXIT
    assert not list(folder.glob("*/*"))
    (said,) = (each for each in caplog.records if "the model was closed before the file was written" in each.message)
    assert said.levelname == "INFO", "nobody has to do anything"


def test_engines_sleep_over_kept_weights(model: Path, folder: Path) -> None:
    """A first start has packed into memory, whose addresses stay; a second one uses the file."""
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
    prompt = [3 + n * 7 % 90 for n in range(40)]

    def answer(engine: InferenceEngine) -> Any:
        found = engine.generate([prompt], greedy, use_tqdm=False)[0].outputs[0]
        return tuple(found.token_ids), [entry.chosen.logprob for entry in found.logprobs or ()]

    answers = []
    for _ in range(2):
        with InferenceEngine(model, **SETTINGS, block_size=16, packed_cache=str(folder)) as engine:
            answers.append(answer(engine))
            if sys.platform == "linux":
                engine.sleep(2)
                engine.wake_up()
                answers.append(answer(engine))
    assert answers == answers[:1] * len(answers)


def test_memory_of_nodes_is_not_mapped() -> None:
    rank = CpuRank(nodes=(0,), cpus=frozenset({0}), memory=(0,))
    apart = CpuRanks((rank, rank._replace(memory=(1,))), (0, 1, 2))
    assert WeightMemory().can_map
    assert not WeightMemory(ranks=apart).can_map
    again = WeightMemory()
    again.begin_again()
    assert not again.can_map


def test_huge_pages_of_a_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    data = np.empty(1 << 20, np.uint8)
    first = data.ctypes.data
    smaps = tmp_path / "smaps"

    def of(kilobytes: int, at: int = first) -> bool:
        other = "1000-2000 r--p 00000000 00:00 0\nFilePmdMapped:    4096 kB\n"
        smaps.write_text(f"{other}{at:x}-{at + (1 << 20):x} r--p 00000000 fe:00 5  /x\nFilePmdMapped: {kilobytes} kB\n")
        return packed_file.in_huge_pages(data, smaps)

    assert [of(0), of(512), of(1024), of(1024, first + 4096)] == [False, False, True, False]
    assert not packed_file.in_huge_pages(data, tmp_path / "absent")
