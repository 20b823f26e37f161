"""Triton kernels compile for the GPUs we name, without spilling registers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from candle_vllm.core.kernels.triton_build import Usage, modules

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

Form = tuple[str, int]  # a module's name and the place in its table
USUAL = 90  # every form is compiled for this capability, one of each kernel for the others; the rest are marked


def builds() -> Iterator[Any]:
    seen = set()
    for name, module in modules().items():
        for place, build in enumerate(module.AOT):
            for capability in build.capabilities:
                key = (build.kernel, capability)
                marks = [] if capability == USUAL or key not in seen else [pytest.mark.every_form]
                seen.add(key)
                yield pytest.param((name, place), capability, id=f"{name}:{build}-sm{capability}", marks=marks)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("form", "capability"), list(builds()))
def test_compiles_without_spilling(
    form: Form,
    capability: int,
    background: Any,
    record_property: Callable[[str, object], None],
) -> None:
    usage = background.forms[*form, capability].result()
    assert isinstance(usage, Usage), usage
    record_property("usage", usage)
    assert usage.fault is None, f"{usage.fault} ({usage})"


def test_a_fault_is_named() -> None:
    assert Usage(40, 1024, 4096, 0).fault is None
    assert "24 bytes" in str(Usage(255, 0, 4096, 24).fault)
    assert "8192" in str(Usage(40, 8192, 4096, 0).fault)
