# SPDX-License-Identifier: MIT
"""The tests of this folder run the Triton kernels on a GPU, or under Triton's interpreter on the CPU.

The interpreter is chosen when triton is imported, by TRITON_INTERPRET=1, for the whole process. So the tests of kernels
are collected in two cases only: on a machine with CUDA, with the marker `gpu`; and under the interpreter, where
`test_interpreter.py` starts them, in processes of their own. What compiles ahead of time needs the real compiler.

All that takes long and needs no attention: it is started when the tests are collected, in processes that get what the
others leave of the machine, and the tests that wait for it come last.

Triton's interpreter is wrong in a few places, which are put right here: it multiplies the bits of bfloat16 matrices as
integers and takes an integer for the bits of a bfloat16, it truncates to bfloat16 and loses carries on the way to e4m3,
where a GPU rounds to nearest even, and it takes e4m3's NaN for 480.
"""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import os
import resource
import subprocess
import sys
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from candle_vllm.core.kernels import triton_build
from packages.core.tests.kernels.triton.building import Usage, compile_form, tables

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__).parent
CPU_SECONDS = 3600  # that one such process may take
PROCESSES = 2  # the files under the interpreter, and the launches: what waited would end last
DRIVERS = ("test_interpreter.py", "test_ahead_of_time.py", "test_launches.py")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if collection_path.parent != HERE or collection_path.suffix != ".py":
        return None
    if collection_path.name in DRIVERS:
        return True if INTERPRETED else None
    return None if INTERPRETED or torch.cuda.is_available() else True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE and item.path.name not in DRIVERS and not INTERPRETED:
            item.add_marker(pytest.mark.gpu)
    items.sort(key=lambda item: item.path.parent == HERE and item.path.name in DRIVERS)


# ---- what runs beside the other tests --------------------------------------------------------------------------------


class Background:
    """Compilers and test processes under way, by what the tests that wait for them are given."""

    def __init__(self, items: list[pytest.Item]) -> None:
        self.forms: dict[tuple[str, int, int | str], Future[Usage | str]] = {}
        self.files: dict[tuple[str, bool], Future[subprocess.CompletedProcess[str]]] = {}
        self._open: set[subprocess.Popen[str]] = set()
        wanted: dict[bool, list[str]] = {}
        half, context = max(1, (os.cpu_count() or 1) // 2), multiprocessing.get_context("spawn")  # each imports torch
        self._compilers = ProcessPoolExecutor(half, mp_context=context, initializer=os.nice, initargs=(10,))
        self._runs = ThreadPoolExecutor(PROCESSES)
        for item in items:
            if item.path.parent == HERE and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
                given = item.callspec.params
                if "form" in given:
                    key = (*given["form"], given["target"])
                    self.forms[key] = self._compilers.submit(compile_form, *key)
                elif "file" in given:
                    wanted.setdefault(item.get_closest_marker("every_case") is not None, []).append(given["file"])
        for every_case, names in wanted.items():
            tests = [name for name in names if name.startswith("test_")]
            for group in (*([name] for name in names if name not in tests), tests):
                run = self._runs.submit(self._run, group, every_case) if group else None
                self.files |= {(name, every_case): run for name in group if run}

    def _run(self, names: list[str], every_case: bool) -> subprocess.CompletedProcess[str]:
        """Test files under the interpreter, or a script."""
        tests = names[0].startswith("test_")
        options = [
            "-m",
            "pytest",
            "-q",
            "--workers",
            "0",
            "-p",
            "no:cacheprovider",
            "--timeout",
            "0",
            *(["-m", "every_case"] if every_case else []),
        ]
        own = {"TRITON_INTERPRET": "1"} if tests else {"PYTHONPATH": str(HERE.parents[4])}  # pytest finds it itself
        environment = {**os.environ, "OMP_NUM_THREADS": "1"} | own
        files = [str(HERE / name) for name in names]
        command = ["nice", "-n", "10", sys.executable, *(options if tests else []), *files]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=environment, cwd=HERE, **pipes) as process:
            self._open.add(process)
            if hasattr(resource, "prlimit"):  # it yields to all other processes, so the clock says nothing
                resource.prlimit(process.pid, resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            output, errors = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def end(self) -> None:
        """Ends what still runs."""
        for pool in (self._compilers, self._runs):
            pool.shutdown(wait=False, cancel_futures=True)
        for process in self._open:
            if process.poll() is None:
                process.kill()


BACKGROUND = pytest.StashKey[Background]()


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    asked = [item for item in session.items if item.path.parent == HERE and item.path.name in DRIVERS]
    if asked and not session.config.option.collectonly:
        session.config.stash[BACKGROUND] = Background(asked)


def pytest_sessionfinish(session: pytest.Session) -> None:
    background = session.config.stash.get(BACKGROUND, None)
    if background is not None:
        background.end()


@pytest.fixture(scope="session")
def background(request: pytest.FixtureRequest) -> Background:
    """What was started when the tests were collected."""
    return request.config.stash[BACKGROUND]


if INTERPRETED and importlib.util.find_spec("triton") is not None:
    import numpy as np
    from triton import language as tl
    from triton.language import semantic
    from triton.runtime import interpreter

    STAY = {"fp32", "fp64", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "int1"}
    SMALL = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8)}
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounding_convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        if source == tl.float8e4nv and target in (tl.float16, tl.float32):
            wide = torch.from_numpy(np.array(data, np.uint8)).view(torch.float8_e4m3fn).float().numpy()
            return wide.astype(np.float16 if target == tl.float16 else np.float32)
        if source != tl.float32 or target not in SMALL or mode == interpreter._ir.ROUNDING_MODE.RTZ:
            return convert(data, source, target, mode)
        kind, bits = SMALL[target]
        return torch.from_numpy(np.array(data, np.float32)).to(kind).view(bits).numpy()

    def widening_dot(self, a, b, *others):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *others)

    def exact_integers(self, source, target):
        """A bfloat16 of an integer is not the integer as its bits."""
        if target.scalar == tl.bfloat16:
            source, target = self.cast_impl(source, tl.float32), tl.bfloat16
        return self.cast_impl(source, target)

    # Triton 3.6 takes the bound of a loop out of an array in a way that numpy 2.4 refuses.
    patch_tensor = interpreter._patch_lang_tensor

    def patch_bounds(tensor: type, scope: interpreter._LangPatchScope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    # It puts its language in Triton's place again for each call of a device function, which takes most of the time of
    # kernels with many of them: once in a launch is enough.
    launch, replaced = interpreter.GridExecutor.__call__, set[frozenset[str]]()

    def launch_alone(self: Any, *args: Any, **options: Any) -> None:
        replaced.clear()
        launch(self, *args, **options)

    def call_device_function(self: Any, *args: Any, **options: Any) -> Any:
        languages = frozenset(
            value.__name__ for value in self.fn.__globals__.values() if value is tl or value is tl.core
        )
        if languages not in replaced:
            interpreter._patch_lang(self.fn)
            replaced.add(languages)
        return self.rewrite()(*args, **options)

    # Half of its time went to the same few types, made and described again for every operation, and to overflows, which
    # it looks for with or without `debug` and tells only with it.
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=options.debug)
    numpy_type, numpy_types = interpreter._get_np_dtype, dict[str, np.dtype]()
    make_block, blocks = tl.block_type.__init__, dict[tuple[str, tuple[int, ...]], dict[str, Any]]()
    shapes: dict[tuple[int, ...], tuple[tl.constexpr, tl.tuple]] = {}

    def known_numpy_type(kind: tl.dtype) -> np.dtype:
        if (name := kind.scalar.name) not in numpy_types:
            numpy_types[name] = numpy_type(kind)
        return numpy_types[name]

    def known_block(self: Any, element: tl.dtype, shape: Any) -> None:
        key = element.name, tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        if element.is_ptr() or key not in blocks:
            make_block(self, element, shape)
            blocks[key] = vars(self).copy()
        else:
            vars(self).update(blocks[key])

    def tensor_of_known_shape(self: Any, handle: Any, type: tl.dtype) -> None:
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in shapes:
            shapes[sizes] = tl.constexpr(math.prod(sizes)), tl.tuple([tl.constexpr(size) for size in sizes])
        self.numel, self.shape = shapes[sizes]
        self.handle, self.type, self.dtype = handle, type, type.scalar

    # Most operations have two blocks of one shape, which it compares size by size, in its own numbers.
    broadcast = semantic.TritonSemantic.broadcast_impl_value

    def broadcast_unless_alike(self: Any, one: Any, other: Any) -> tuple[Any, Any]:
        alike = one.shape is other.shape and one.type.is_block() and other.type.is_block()  # see `shapes`
        return (one, other) if alike else broadcast(self, one, other)

    # Most have one type as well. It is the type of the result, unless it is a float of fewer than 32 bits.
    prepare = semantic.TritonSemantic.binary_op_type_checking_impl

    def prepare_unless_alike(self: Any, one: Any, other: Any, *how: Any, **named: Any) -> tuple[Any, Any]:
        tensors = isinstance(one, tl.tensor) and isinstance(other, tl.tensor)
        if tensors and one.shape is other.shape and one.dtype.name == other.dtype.name in STAY:
            return one, other
        return prepare(self, one, other, *how, **named)

    interpreter._get_np_dtype = known_numpy_type
    semantic.TritonSemantic.binary_op_type_checking_impl = prepare_unless_alike
    semantic.TritonSemantic.broadcast_impl_value = broadcast_unless_alike
    tl.block_type.__init__ = known_block
    tl.tensor.__init__ = tensor_of_known_shape
    interpreter.GridExecutor.__call__ = launch_alone
    interpreter.InterpretedFunction.__call__ = call_device_function
    interpreter._patch_lang_tensor = patch_bounds
    interpreter._convert_float = rounding_convert
    interpreter.InterpreterBuilder.create_dot = widening_dot
    interpreter.InterpreterBuilder.create_si_to_fp = exact_integers


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels' tensors live: the CPU under the interpreter, else the GPU."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if INTERPRETED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    return torch.device("cuda")


@pytest.fixture
def turing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is as on a GPU of compute capability 7.5, where the interpreter runs or the GPU is a newer one."""
    tables()  # imports the modules
    usual = triton_build.capability
    for name, module in list(sys.modules.items()):
        if name.startswith("candle_vllm.core.") and getattr(module, "capability", None) is usual:
            monkeypatch.setattr(module, "capability", lambda device: 75)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the compiled kernels take: a line for each with -v, else the largest of each number."""
    reports = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    usages = [
        (report.nodeid, dict(report.user_properties)["usage"])
        for report in reports
        if "usage" in dict(report.user_properties)
    ]
    if not usages:
        return
    terminalreporter.section("Triton kernels compiled ahead of time")
    if terminalreporter.config.get_verbosity() > 0:
        for name, usage in sorted(usages):
            terminalreporter.write_line(f"{name.partition('[')[2][:-1]}: {usage}")
    most = (max(getattr(usage, field) for _, usage in usages) for field in ("registers", "shared", "stack"))
    terminalreporter.write_line(
        "{} builds, at most {} registers, {} bytes shared, {} bytes spilled".format(len(usages), *most)
    )
