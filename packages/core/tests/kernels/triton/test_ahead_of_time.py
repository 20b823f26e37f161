"""Every form of every Triton kernel compiles for the GPUs we name, without spilling registers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest

from candle_vllm.core.kernels.triton_build import Build, Usage, compile_build, modules

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

BUILDS = [
    pytest.param(name, build, target, id=f"{name}:{build}-sm{target}")
    for name, module in modules().items()
    for build in module.AOT
    for target in build.capabilities
]


@pytest.mark.parametrize(("module", "build", "capability"), BUILDS)
def test_compiles_without_spilling(
    module: str, build: Build, capability: int, record_property: Callable[[str, object], None]
) -> None:
    usage = compile_build(build, capability)
    record_property("usage", usage)
    assert usage.fault is None, f"{module}: {build} on sm_{capability}: {usage.fault} ({usage})"


def test_a_fault_is_named() -> None:
    assert Usage(40, 1024, 4096, 0).fault is None
    assert "24 bytes" in str(Usage(255, 0, 4096, 24).fault)
    assert "8192" in str(Usage(40, 8192, 4096, 0).fault)
