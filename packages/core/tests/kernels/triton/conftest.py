"""The tests of this folder run the Triton kernels on a GPU, or under Triton's interpreter on the CPU.

The interpreter is chosen when triton is imported, by TRITON_INTERPRET=1, for the whole process. So the tests of kernels
are collected in two cases only: on a machine with CUDA, with the marker `gpu`; and under the interpreter, where
`test_interpreter.py` starts them, a process for each file. What compiles ahead of time needs the real compiler and runs
in the suite's own process.

Triton's interpreter is wrong in a few places, which are put right here: it multiplies the bits of bfloat16 matrices as
integers, and it truncates to bfloat16 and loses carries on the way to e4m3, where a GPU rounds to nearest even.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__).parent
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


if INTERPRETED and importlib.util.find_spec("triton") is not None:
    import numpy as np
    from triton import language as tl
    from triton.runtime import interpreter

    SMALL = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8)}
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounding_convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        if source != tl.float32 or target not in SMALL or mode == interpreter._ir.ROUNDING_MODE.RTZ:
            return convert(data, source, target, mode)
        kind, bits = SMALL[target]
        return torch.from_numpy(np.array(data, np.float32)).to(kind).view(bits).numpy()

    def widening_dot(self, a, b, *others):
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *others)

    # Triton 3.6 takes the bound of a loop out of an array in a way that numpy 2.4 refuses.
    patch_tensor = interpreter._patch_lang_tensor

    def patch_bounds(tensor: type, scope: interpreter._LangPatchScope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_bounds
    interpreter._convert_float = rounding_convert
    interpreter.InterpreterBuilder.create_dot = widening_dot


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
