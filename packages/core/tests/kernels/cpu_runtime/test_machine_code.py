# SPDX-License-Identifier: MIT
"""Machine code without LLVM: linked by us it computes what it does linked by LLVM, and what cannot be is said."""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args
from weakref import WeakKeyDictionary

import llvmlite.binding
import numba
import numpy as np
import pytest

from candle_vllm.core.config import CpuLevel
from candle_vllm.core.errors import ConfigError
from candle_vllm.core.kernels.cpu_runtime import (
    kernel_cache,
    level,
    machine_code,
    operation,
    recorder,
    travelling,
)
from candle_vllm.core.kernels.cpu_runtime.compiler import assembly, compile_function, load_object
from candle_vllm.core.kernels.cpu_runtime.level import LEVELS, Isa, host_isa, host_level, level_of
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, c_function, named_function
from candle_vllm.core.kernels.cpu_runtime.primitives import float64_at, int64_at

pytestmark = pytest.mark.skipif(not level.links_here(), reason="elsewhere LLVM links")
KERNELS = Path(kernel_cache.__file__).parents[1]


@numba.njit
def fill(at, count):
    values = float64_at(at)
    for i in range(count):
        values[i] = math.exp(values[i]) + math.log(2.0 + i) * 0.3


def exponents(at, count, answer):
    """Calls the C library, has constants, and a function of its own that is not inlined."""
    fill(at, count)
    int64_at(answer)[0] = count // 3


def run(address: int, count: int) -> tuple[np.ndarray, int]:
    values, answer = np.linspace(-3, 3, count), np.zeros(1, np.int64)
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(address)(address_of(values), count, address_of(answer))
    return values, int(answer[0])


def test_linked_by_us_is_linked_by_llvm() -> None:
    made = compile_function(exponents, host_level())
    image = machine_code.link(made)
    assert {"exp", "log"} <= set(image.slots)
    again = machine_code.from_bytes(machine_code.to_bytes(image))
    assert again == image
    ours, theirs = run(machine_code.load(again), 101), run(load_object(made), 101)
    assert ours[0].tobytes() == theirs[0].tobytes()
    assert ours[1] == theirs[1] == 33


@pytest.mark.parametrize("made", [b"", b"\x7fELF\x02\x01", b"MZ" + bytes(100)])
def test_what_is_no_object_file_is_refused(made: bytes) -> None:
    with pytest.raises(machine_code.LinkError, match="not an object file"):
        machine_code.link(made)


def test_a_function_that_the_c_library_has_not_is_named() -> None:
    image = machine_code.Image(bytes(64), 0, {"no_such_function_anywhere": 0})
    with pytest.raises(machine_code.LinkError, match="no_such_function_anywhere"):
        machine_code.load(image)


def test_loaded_code_cannot_be_written() -> None:
    address = machine_code.load(machine_code.link(compile_function(exponents, host_level())))
    start, *_ = (
        line.split()[1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if (bounds := [int(x, 16) for x in line.split()[0].split("-")]) and bounds[0] <= address < bounds[1]
    )
    assert start == "r-xp"


# ---- levels ----------------------------------------------------------------------------------------------------------


def test_a_level_is_the_most_able_whose_flags_are_all_there() -> None:
    squares, best, shuffles, middle, plain, short, least, arm, dots, neon = LEVELS
    for entry in LEVELS:
        assert level_of(entry.flags | {"something"}, entry.machine) is entry
    x86 = partial(level_of, named="x86_64")
    assert x86(squares.flags - {"amx_tile"}) is best
    assert x86(best.flags - {"avx512_bf16"}) is shuffles
    assert x86(best.flags - {"avx512vbmi"}) is middle
    assert x86(best.flags - {"avx512_vnni"}) is plain
    assert x86(best.flags - {"avx512f"} | {"avx_vnni"}) is short
    assert x86(best.flags - {"avx512f"}) is least
    assert x86(least.flags - {"fma"}) is None
    assert level_of(arm.flags - {"i8mm"}, "aarch64") is level_of(arm.flags - {"bf16"}, "aarch64") is dots
    assert level_of(arm.flags - {"asimddp"}, "aarch64") is neon
    assert level_of(arm.flags, "x86_64") is level_of(best.flags, "aarch64") is None


@pytest.mark.parametrize(
    ("vendor", "flags", "ahead"),
    [
        ("GenuineIntel", "fma avx512f", 2048),
        ("AuthenticAMD", "fma", 2048),
        ("AuthenticAMD", "fma avx512f", 0),
        ("", "fma", 0),
    ],
)
def test_weights_are_asked_for_ahead_where_the_cpu_does_not(vendor, flags, ahead, monkeypatch):
    facts = f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}"
    monkeypatch.setattr(level, "machine", lambda: "x86_64")
    monkeypatch.setattr(level.Path, "read_text", lambda path: facts)
    assert level.bytes_ahead.__wrapped__() == ahead


@pytest.mark.parametrize("granted", [True, False])
def test_amx_is_used_where_the_system_lets_it(granted, monkeypatch):
    flags = " ".join(LEVELS[0].flags)
    monkeypatch.setattr(level, "machine", lambda: "x86_64")
    monkeypatch.setattr(level.Path, "read_text", lambda path: f"processor\t: 0\nflags\t\t: {flags}")
    monkeypatch.setattr(level, "_may_use_amx", lambda: granted)
    assert level_of(level.host_flags.__wrapped__()) is LEVELS[0 if granted else 1]


def test_amx_that_cannot_be_asked_for_is_not_used(monkeypatch):
    class Library:
        def syscall(self, *numbers: int) -> int:
            assert numbers == (158, 0x1023, 18)
            return -1

    monkeypatch.setattr(level.ctypes, "CDLL", lambda name: Library())
    assert not level._may_use_amx()


@pytest.mark.skipif(not operation.IS_X86, reason="instructions of x86")
def test_a_cpu_below_all_levels_runs_only_instructions_that_it_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual machine may hide AVX, and still have the model number of a processor with AVX."""
    shown = llvmlite.binding.get_host_cpu_features()
    hidden = [
        name for name in shown if name.startswith(("avx", "fma", "f16c", "xop", "vaes", "vpclmul", "gfni", "amx"))
    ]
    shown.update(dict.fromkeys(hidden, False))
    monkeypatch.setattr(llvmlite.binding, "get_host_cpu_name", lambda: "skylake")
    monkeypatch.setattr(llvmlite.binding, "get_host_cpu_features", lambda: shown)
    monkeypatch.setattr(level, "host_flags", frozenset[str])
    native = level.best_level.__wrapped__()
    assert native.name == "native"
    assert "%ymm" not in assembly(named_function("embedding.cpu:add")[1](), native)


def test_a_lower_level_may_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_args(CpuLevel) == tuple(entry.name for entry in LEVELS)
    held: list[Any] = []
    monkeypatch.setattr(level, "_CHOSEN", held)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(operation, "_address", cache(lambda code: 0))
    kernel_cache.kernel_cache.cache_clear()
    best, able = host_level(), [entry for entry in LEVELS if entry.flags <= level.host_flags()]
    monkeypatch.setattr(operation, "LEVELS_IN_USE", in_use := WeakKeyDictionary[object, level.Level]())
    monkeypatch.setattr(recorder, "LEVELS_IN_USE", in_use)
    for name, wanted in ((None, best), (able[-1].name, able[-1]), (None, best)):
        operation.use_level(name)
        assert host_level() is wanted
        folder = kernel_cache.kernel_cache()
        assert folder is not None
        assert folder.name == host_level().name
    with pytest.raises(
        ConfigError, match=rf"needs instructions that this CPU does not have; it supports .*{able[-1].name}"
    ):
        operation.use_level("neon" if level.machine() == "x86_64" else "avx2")
    if len(able) > 1:
        made = recorder.Recorder(recorder.StepLimits(1, 1, 1, 1, 16, 1), host_isa())
        with pytest.raises(ConfigError, match=f"cpu_level='{able[-1].name}' is below '{best.name}'"):
            operation.use_level(able[-1].name)
        assert host_level() is best
        del made
        operation.use_level(able[-1].name)
    kernel_cache.kernel_cache.cache_clear()


# ---- what travels ----------------------------------------------------------------------------------------------------


def test_every_function_that_is_asked_for_can_travel() -> None:
    named = set[str]()
    for path in (*KERNELS.glob("*/*.py"), *KERNELS.with_name("models").glob("*.py")):
        if path.name != "travelling.py":
            named |= set(re.findall(r'"(\w+\.(?:cpu|walk)\w*:\w+)"', path.read_text()))
    listed = {code for code, _ in travelling.functions(~Isa.GENERIC)}
    assert len(named) > 20
    assert named == listed | {"packed_linear.cpu_grids:make_codes"}  # of types whose kernels do not travel either


def test_every_function_that_travels_is_there() -> None:
    for code, constants in travelling.functions(~Isa.GENERIC):
        assert callable(named_function(code, *constants)[1]())


FEW = [("column_order.cpu:column_order", ()), ("weight_quant.cpu:make_quantise", (8,))]


def write_few(folder: Path, *levels: level.Level) -> Path:
    """Write the functions of `FEW` for these levels, as they are precompiled."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(travelling, "functions", lambda isa: iter(FEW))
        for entry in levels:
            travelling.write(entry, folder)
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a few precompiled functions, for the level of this CPU."""
    return write_few(tmp_path_factory.mktemp("compiled"), host_level())


@pytest.mark.every_case
def test_code_for_every_level_is_made_anywhere(tmp_path: Path) -> None:
    write_few(tmp_path, *LEVELS)
    assert {path.name for path in tmp_path.iterdir()} == {entry.name for entry in LEVELS} | {"imports"}
    for entry in LEVELS:
        assert {path.name for path in (tmp_path / entry.name).iterdir()} == {
            kernel_cache.kept_name(named_function(*named[:1], *named[1])[0], entry) for named in FEW
        }


_RUN = """
import sys
sys.modules["numba"] = sys.modules["llvmlite"] = None
from pathlib import Path
import numpy as np
from candle_vllm.core.kernels.cpu_runtime import kernel_cache
kernel_cache.TRAVELLING = Path(sys.argv[1])
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType
import gguf
from candle_vllm.core.kernels.weight_quant import quantiser
x = np.random.default_rng(1).normal(size=(7, 32)).astype(np.float32)
out = np.zeros((7, 34), np.uint8)
assert quantiser(GGMLQuantizationType.Q8_0)(x, out)
assert np.array_equal(out, gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0))
"""


def test_what_travels_runs_without_numba_and_without_a_cache(few: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-c", _RUN, str(few)]
    found = subprocess.run(
        program, capture_output=True, text=True, timeout=60, env={"XDG_CACHE_HOME": str(tmp_path), "PATH": ""}
    )
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_code_of_other_sources_is_not_used(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of kernels: those whose sources are the same are used."""
    (tmp_path / host_level().name).mkdir()
    names = [named_function(code, *constants)[0] for code, constants in FEW]
    kept = [kernel_cache.kept_name(name, host_level()) for name in names]
    for file, new in zip(kept, (kept[0], f"{names[1]}.0123456789abcdef"), strict=True):
        (tmp_path / host_level().name / new).symlink_to(few / host_level().name / file)
    monkeypatch.setattr(kernel_cache, "TRAVELLING", tmp_path)
    asked: list[Any] = []
    monkeypatch.setattr(kernel_cache, "kernel_cache", partial(asked.append, "the cache"))
    for (code, constants), name, looked in zip(FEW, names, ([], ["the cache"]), strict=True):
        kernel_cache.compiled_address(name, named_function(code, *constants)[1])
        assert asked == looked


def test_an_unknown_level_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        travelling.main(["avx2", "avx3"])
    assert "no level is called avx3" in capsys.readouterr().err


def test_a_function_of_integers_can_be_called_from_python() -> None:
    assert callable(c_function("sampling.cpu:draw_rows", 3))


def test_precompiled_kernels_on_a_full_disk_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel without some kernels would need Numba at its first start."""

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SystemExit, match="column_order"):
        write_few(tmp_path, host_level())
