# SPDX-License-Identifier: MIT
"""The compiled kernels on disk: kept for their own sources and CPU, in a folder of the user's own, never in the way."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from candle_vllm.core.errors import ConfigError
from candle_vllm.core.kernels.cpu_runtime import compiler
from candle_vllm.core.kernels.cpu_runtime import kernel_cache as cache_module
from candle_vllm.core.kernels.cpu_runtime import operation as operation_module
from candle_vllm.core.kernels.cpu_runtime.kernel_cache import compiled_address, kernel_cache
from candle_vllm.core.kernels.cpu_runtime.level import Level, host_level
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, compile_first, is_coming, operation
from candle_vllm.core.kernels.cpu_runtime.primitives import int64_at
from candle_vllm.core.progress import Progress, heard_by

OTHER_USER = 12345


def make_add(AMOUNT: int) -> Any:
    def add(row, thread, threads):
        int64_at(int64_at(row)[3])[0] += AMOUNT

    return add


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache folder of this test, not made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    kernel_cache.cache_clear()
    yield tmp_path / "xdg" / "candle-vllm"
    kernel_cache.cache_clear()


def sum_of(*amounts: int) -> int:
    """Compiles an operation for each amount and runs them: without a team of threads, whose own takes longest."""
    total = np.zeros(1, np.int64)
    row = np.array([0, 0, 0, address_of(total)], np.int64)
    for n in amounts:
        made = compiled_address(f"cpu_runtime.primitives.add.{n}", partial(make_add, n))
        ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(made)(address_of(row), 0, 1)
    return int(total[0])


def data_files(root: Path) -> list[Path]:
    return sorted(root.glob("kernels/*/cpu_runtime.primitives.add.*"))


def compiled_now(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the names of the functions that are compiled from now on, and not read from the cache."""
    names: list[str] = []
    real = cache_module.compile_image

    def noted(function: Any, level: Level) -> bytes:
        names.append(function.__name__)
        return real(function, level)

    monkeypatch.setattr(cache_module, "compile_image", noted)
    return names


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_kept_for_the_next_start_in_folders_of_the_user_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert sum_of(3) == 3
    assert "compiling the CPU kernels for this machine" in caplog.text
    folder = kernel_cache()
    assert folder is not None
    for path in (root, root / "kernels", folder):
        assert path.stat().st_mode & 0o777 == 0o700
    assert len(data_files(root)) == 1

    caplog.clear()
    kernel_cache.cache_clear()
    names = compiled_now(monkeypatch)
    assert sum_of(3) == 3
    assert names == []
    assert caplog.text == ""


def test_compiling_is_said_where_other_kernels_are_there(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A start that needs further ones takes as long as it compiles them, and its log would be silent: it says so before
    the second one."""
    assert sum_of(3) == 3
    os.utime(root / "kernels", (1, 1))
    caplog.clear()
    monkeypatch.setattr(cache_module, "_COMPILED", count(1))  # a process that compiled nothing
    assert sum_of(3) == 3
    assert caplog.text == ""
    said: list[int] = []
    real = cache_module.compile_image

    def noted(function: Any, level: Level) -> bytes:
        said.append(caplog.text.count("compiling further CPU kernels for this machine"))
        return real(function, level)

    monkeypatch.setattr(cache_module, "compile_image", noted)
    assert sum_of(4, 5, 6) == 15
    assert said == [0, 1, 1]


def test_what_another_level_compiled_is_not_used(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum_of(1) == 1
    other = host_level()._replace(name="another")
    monkeypatch.setattr(cache_module, "host_level", lambda: other)
    kernel_cache.cache_clear()
    names = compiled_now(monkeypatch)
    assert sum_of(1) == 1
    assert "add" in names
    assert {path.parent.name for path in data_files(root)} == {host_level().name, "another"}


_COMPILE = """
import sys
import threading
sys.path.insert(0, {folder!r})
import pytest
from packages.core.tests.kernels.cpu_runtime import test_kernel_cache as test
names = test.compiled_now(pytest.MonkeyPatch())
for amount in map(int, sys.argv[1:]):
    assert test.sum_of(amount) == amount
print("compiled", names.count("add"))
"""


def start(*amounts: str) -> subprocess.Popen[str]:
    program = [sys.executable, "-c", _COMPILE.format(folder=str(Path(__file__).parents[5])), *amounts]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_compile_at_once_all_succeed(root: Path) -> None:
    running = [start("1", "20", "300"), start("300", "20", "1")]
    ended = [(process.communicate(timeout=240)[1], process.returncode) for process in running]
    for errors, status in ended:
        assert status == 0, errors
        assert "cannot" not in errors
    assert len(data_files(root)) == 3
    assert not list(root.rglob("*.tmp"))
    after = start("1", "20", "300")  # each file holds the variant that its name says, and all are there
    assert after.communicate(timeout=240)[0] == "compiled 0\n"
    assert after.returncode == 0


# ---- the first start -------------------------------------------------------------------------------------------------

ASKED = ("column_order.cpu:column_order", "position_scale.cpu:position_scale", "embedding.cpu:add")


def ask() -> None:
    for code in ASKED:
        assert operation(code) == 0


def kept(root: Path) -> set[str]:
    whole = (path for path in root.glob("kernels/*/*.cpu.*") if path.suffix != ".tmp")
    found = (path.name.rpartition(".")[0] for path in whole)
    return {name.replace(".cpu.", ".cpu:") for name in found}


@pytest.fixture
def _nothing_loaded() -> Iterator[None]:
    address = operation_module._address  # which a test may replace
    address.cache_clear()
    yield
    address.cache_clear()


@pytest.mark.usefixtures("_nothing_loaded")
def test_a_first_start_compiles_with_a_second_process(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes what this one has not come to: here it is not let come to anything until the other is done."""
    names, helpers = compiled_now(monkeypatch), list[subprocess.Popen[bytes]]()
    address, second = operation_module._address, operation_module._second_process

    def late(code: str, *constants: int) -> int:
        helpers[0].wait()
        return address(code, *constants)

    def noted(wanted: Sequence[str]) -> subprocess.Popen[bytes]:
        helper = second(wanted)
        assert helper is not None
        helpers.append(helper)
        return helper

    monkeypatch.setattr(operation_module, "_address", late)
    monkeypatch.setattr(operation_module, "_second_process", noted)
    told: list[Progress] = []
    with heard_by(told.append):
        compile_first(ask)
    assert {(each.done, each.total) for each in told} <= {(len(ASKED), len(ASKED))}
    assert kept(root) == set(ASKED)
    assert names == []
    assert operation(ASKED[0]) != 0


@pytest.mark.usefixtures("_nothing_loaded")
@pytest.mark.parametrize("program", ["/bin/false", "/nowhere/python", None])  # None: Python in another application
def test_a_second_process_that_fails_is_not_missed(
    program: str | None, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    compile_first(ask)
    assert operation(ASKED[0]) != 0
    assert ASKED[0] in kept(root)


@pytest.mark.usefixtures("_nothing_loaded")
def test_two_processes_compile_if_several_of_the_functions_asked_for_last_are_missing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an update of some sources; else a start does not ask twice. Each round leaves all functions compiled."""
    asked, given = list[int](), list[list[str]]()
    monkeypatch.setattr(operation_module, "_second_process", lambda names: given.append(list(names)))

    def ask_and_count() -> None:
        asked.append(1)
        ask()

    compile_first(ask_and_count)
    assert kept(root) == set(ASKED)
    names = compiled_now(monkeypatch)
    for there in (0, 1, 2, 3):
        operation_module._address.cache_clear()
        for noted in (asked, given, names):
            noted.clear()
        for code in ASKED[there:]:
            for path in list(root.glob(f"kernels/*/{code.replace(':', '.')}.*")):
                path.rename(path.with_suffix(".0123456789abcdef"))  # of other sources
        compile_first(ask_and_count)
        missing = ASKED[there:]
        assert (asked, given) == (([1], [list(missing[::-1])]) if len(missing) > 1 else ([], [])), there
        assert len(names) == len(given) * len(missing), there
        compile_first(ask_and_count)
        assert len(asked) == len(given) == (len(missing) > 1), there
        for code in missing:  # a single one is compiled by whoever asks for it
            assert operation(code) != 0


@pytest.mark.usefixtures("_nothing_loaded")
def test_functions_that_nobody_asks_for_any_more_make_one_start_ask_in_vain(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operation_module, "_second_process", lambda names: None)
    compile_first(ask)
    for path in root.glob("kernels/*/*.cpu.*"):
        path.unlink()
    asked = []
    for _ in range(3):
        compile_first(lambda: asked.append(operation("embedding.cpu:add")))
    assert asked == [0]


def await_second_process(code: str, monkeypatch: pytest.MonkeyPatch, start: Callable[[], object]) -> None:
    """Until what `start` leaves behind has compiled: it is told to yield to all others, which would take it for ever
    on a machine that has other work, so it keeps its share here."""
    yielded = list[tuple[int, ...]]()
    monkeypatch.setattr(os, "setpriority", lambda *given: yielded.append(given))
    start()
    helper = operation_module._COMING[code]
    assert yielded == [(os.PRIO_PROCESS, helper.pid, 10)]
    helper.wait()
    assert not is_coming(code)


@pytest.mark.usefixtures("_nothing_loaded")
def test_what_is_rare_is_compiled_by_the_second_process_and_not_waited_for(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rare, names = "rms_norm.cpu:make_head_norm", compiled_now(monkeypatch)

    def start() -> None:
        compile_first(ask, later=(f"{rare},1",))
        assert kept(root) >= set(ASKED)
        assert not is_coming(rare)  # asked for by another name

    await_second_process(f"{rare},1", monkeypatch, start)
    assert f"{rare}.1" in kept(root)
    names.clear()
    assert operation(rare, 1) != 0
    assert names == []


class Helper:
    """A second process that is at work until it is told."""

    def __init__(self) -> None:
        self.pid, self.stdin, self.done = os.getpid(), None, threading.Event()

    def poll(self) -> int | None:
        return 0 if self.done.is_set() else None

    def wait(self) -> int:
        self.done.wait()
        return 0


def test_models_that_load_meanwhile_begin_no_other_process(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Helper] = []

    def second(_: object) -> Helper:
        begun.append(Helper())
        return begun[-1]

    monkeypatch.setattr(operation_module, "_second_process", second)
    monkeypatch.setattr(operation_module, "_COMING", {})
    monkeypatch.setattr(os, "setpriority", lambda *_: None)
    rare = ("rms_norm.cpu:make_head_norm,1",)
    monkeypatch.setattr(operation_module, "is_first_start", lambda: False)
    for _ in range(3):
        compile_first(ask, later=rare)
    assert len(begun) == 1
    begun[0].done.set()
    compile_first(ask, later=rare)  # it failed, for nothing is there
    assert len(begun) == 2
    begun[1].done.set()


def test_kernels_that_another_version_asked_for_do_not_count() -> None:
    """They were renamed since, or the package went back to an older version."""
    for others in (["gone.cpu.make_sum", "sum", "rms_norm.gone.make_norm"], ["rms_norm.cpu.make_head_norm.9"]):
        cache_module.note_asked(others)
        assert not cache_module.is_first_start()
    cache_module.note_asked(["rms_norm.cpu.make_head_norm.8", "gone.cpu.make_sum", "rms_norm.cpu.make_head_norm.9"])
    assert cache_module.is_first_start()


@pytest.mark.usefixtures("_nothing_loaded")
def test_what_is_rare_comes_at_the_second_start_where_the_first_ended_too_soon(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rare, names = "rms_norm.cpu:make_head_norm", compiled_now(monkeypatch)
    compile_first(lambda: None)  # an earlier start, which asked for nothing

    def start() -> None:
        compile_first(ask, later=(f"{rare},1",))
        assert is_coming(f"{rare},1")

    await_second_process(f"{rare},1", monkeypatch, start)
    assert kept(root) == {f"{rare}.1"}  # nothing that was asked for is compiled for that
    assert names == []
    monkeypatch.setattr(operation_module.subprocess, "Popen", None)
    compile_first(ask, later=(f"{rare},1",))


@pytest.mark.usefixtures("_nothing_loaded")
def test_garbage_is_looked_for_again_behind_compiling(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = compiler.compile_function, list[bool]()

    def noted(function: Any, level: Level) -> bytes:
        seen.append(gc.isenabled())
        return real(function, level)

    monkeypatch.setattr(compiler, "compile_function", noted)
    compile_first(ask)
    assert seen
    assert not any(seen)
    assert gc.isenabled()


# ---- damage ----------------------------------------------------------------------------------------------------------


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _scramble(path: Path) -> None:
    path.write_bytes(bytes(byte ^ 0x5A for byte in path.read_bytes()))


def _other(path: Path) -> None:
    """A whole file, but another function's."""
    path.write_bytes(b"\x7fELF" + path.read_bytes())


@pytest.mark.parametrize("damage", [_empty, _cut, _scramble, _other])
def test_a_damaged_file_is_compiled_again(
    damage: Any, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert sum_of(3, 4) == 7
    for path in data_files(root):
        damage(path)
    assert sum_of(3, 4) == 7
    assert caplog.text.count("is damaged and is made again") == 2
    assert str(root) in caplog.text

    caplog.clear()
    names = compiled_now(monkeypatch)  # the cache heals
    assert sum_of(3, 4) == 7
    assert names == []
    assert caplog.text == ""


def test_a_full_disk_costs_a_warning_and_no_file(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert sum_of(3) == 3

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert sum_of(4) == 4
    assert "cannot be cached" in caplog.text
    assert "No space left" in caplog.text
    assert len(data_files(root)) == 1


def test_an_error_in_the_code_of_a_kernel_is_not_hidden() -> None:
    def wrong(row, thread, threads):
        row.nothing()

    with pytest.raises(numba.TypingError):
        compiled_address("cpu_runtime.primitives.wrong", lambda: wrong)


def test_who_waits_is_told_of_every_kernel_that_is_compiled(root: Path) -> None:
    told: list[Progress] = []
    with heard_by(told.append):
        assert sum_of(6, 60) == 66
        assert sum_of(6, 60) == 66  # read, not compiled
    assert [(each.total, each.unit) for each in told] == [(0, " kernels")] * 2
    assert len(data_files(root)) == 2
    assert told[-1].done - told[-2].done == 1


def test_without_numba_what_does_not_travel_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"add\.5 is not precompiled, .* pip install"):
        sum_of(5)
    assert caplog.text == ""


# ---- places that cannot be used --------------------------------------------------------------------------------------


def refused(caplog: pytest.LogCaptureFixture, *parts: str) -> None:
    assert kernel_cache() is None
    assert sum_of(5) == 5
    assert caplog.text.count("compiled at every start") == 1
    for part in (*parts, "XDG_CACHE_HOME"):
        assert part in caplog.text


def test_a_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "below"))
    refused(caplog, str(tmp_path / "file"))


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    refused(caplog, "home directory")


_READ_ONLY = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # gives up the superuser's right to write anywhere, from the next program on
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1], "1", "20"])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="capabilities are Linux's")
def test_a_read_only_folder_works_and_warns(root: Path) -> None:
    root.mkdir(parents=True)
    root.chmod(0o500)
    program = _COMPILE.format(folder=str(Path(__file__).parents[5]))
    found = subprocess.run([sys.executable, "-c", _READ_ONLY, program], capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    assert "compiled at every start" in found.stderr
    assert "Permission denied" in found.stderr
    assert list(root.iterdir()) == []


def test_a_read_only_folder_of_kernels(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert kernel_cache() is not None
    kernel_cache.cache_clear()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused(caplog, "cannot be written")


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_can_write_to_is_refused(
    level: int, mode: int, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = kernel_cache()
    assert folder is not None
    kernel_cache.cache_clear()
    path = (root, root / "kernels", folder)[level]
    path.chmod(mode)
    refused(caplog, f"other users can write to {path}", "delete it")
    assert data_files(root) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only the superuser gives files away")
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_folder_of_another_user_is_refused(level: int, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = kernel_cache()
    assert folder is not None
    kernel_cache.cache_clear()
    path = (root, root / "kernels", folder)[level]
    os.chown(path, OTHER_USER, -1)
    refused(caplog, f"{path} belongs to another user")


def test_a_link_inside_the_cache_is_not_followed(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "elsewhere").mkdir()
    root.mkdir(parents=True)
    (root / "kernels").symlink_to(tmp_path / "elsewhere")
    refused(caplog, "links are not followed")
    assert data_files(tmp_path / "elsewhere") == []


def test_the_cache_folder_itself_may_be_a_link(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "large-disk").mkdir()
    root.parent.mkdir()
    root.symlink_to(tmp_path / "large-disk")
    assert sum_of(6) == 6
    assert len(data_files(tmp_path / "large-disk")) == 1


# ---- old versions ----------------------------------------------------------------------------------------------------


def aged(path: Path, days: float) -> Path:
    when = time.time() - days * 86400
    os.utime(path, (when, when))
    return path


def test_all_but_a_few_old_versions_of_a_kernel_are_deleted(root: Path, tmp_path: Path) -> None:
    folder = kernel_cache()
    assert folder is not None

    def kernel(name: str, number: int, days: float) -> Path:
        path = folder / f"{name}.{number:016x}"
        path.write_text("")
        return aged(path, days)

    name = "cpu_runtime.primitives.add.3"
    old = [kernel(name, number, 2 + number) for number in range(6)]
    recent = [kernel(name, number, 0.5 + number / 100) for number in range(10, 12)]
    others = [kernel(f"cpu_runtime.primitives.add.{number}", 0, 400) for number in range(10, 19)]  # one version each
    killed, written = folder / f"{name}.0.1.2.tmp", folder / f"{name}.0.1.3.tmp"
    for path, days in ((killed, 2), (written, 0)):
        path.write_text("")
        aged(path, days)
    (folder / "notes").write_text("")
    aged(folder / "notes", 400)

    assert sum_of(3) == 3
    (new,) = set(data_files(root)) - {*old, *recent, *others, written}
    # Four stay: the new one, the two of today, and one of the older; what is no kernel stays too.
    assert set(folder.iterdir()) == {new, *recent, old[0], *others, written, folder / "notes"}


def test_versions_of_today_stay_however_many(root: Path) -> None:
    folder = kernel_cache()
    assert folder is not None
    recent = [folder / f"cpu_runtime.primitives.add.3.{number:016x}" for number in range(9)]
    for number, path in enumerate(recent):
        path.write_text("")
        aged(path, number / 100)
    assert sum_of(3) == 3
    assert all(path.exists() for path in recent)


def test_folders_of_earlier_versions_go_a_month_after_their_last_use(root: Path, tmp_path: Path) -> None:
    """They held all kernels of a version and were named by a hash."""
    folder = kernel_cache()
    assert folder is not None
    target, (old, used, notes, link) = (
        tmp_path / "target",
        (folder.parent / name for name in ("0" * 16, "1" * 16, "notes", "2" * 16)),
    )
    for path in (target, old, used, notes):
        path.mkdir()
        (path / "code").write_text("")
    link.symlink_to(target)
    (old / "link").symlink_to(target)
    for path, days in ((target, 400), (old, 32), (used, 20), (notes, 400)):
        aged(path, days)
    assert sum_of(3) == 3
    assert {path.name for path in folder.parent.iterdir()} == {path.name for path in (folder, used, notes, link)} | {
        "imports"
    }
    assert (target / "code").exists()


def test_a_start_counts_as_use(root: Path) -> None:
    assert sum_of(3) == 3
    (file,) = data_files(root)
    aged(file, 100)
    assert sum_of(3) == 3
    assert time.time() - file.stat().st_mtime < 600


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_process_goes_on_when_its_kernels_are_deleted(
    level: int, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = kernel_cache()
    assert folder is not None
    monkeypatch.setattr(cache_module, "_COMPILED", count(1))  # a process that compiled nothing
    assert sum_of(3) == 3
    folders = [folder, root / "kernels", root]
    cache_module.shutil.rmtree(folders[level])
    caplog.clear()
    assert sum_of(40, 3) == 43
    assert caplog.text == ""
    assert len(data_files(root)) == 2
    assert {each.stat().st_mode & 0o777 for each in folders} == {0o700}
