"""Triton kernels compile for the GPUs we name, without spilling registers."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import pytest

from candle_vllm.core.kernels.triton_build import Usage, compile_build, modules

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


def compile_form(form: Form, capability: int) -> Usage | str:
    """What a form takes, or the trace of why it does not compile; in a process of its own."""
    name, place = form
    try:
        return compile_build(modules()[name].AOT[place], capability)
    except Exception:
        return traceback.format_exc()  # Triton's own errors do not travel between processes


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[dict[tuple[Form, int], Future[Usage | str]]]:
    """All forms that were asked for, under way on every core."""
    calls = [item.callspec.params for item in request.session.items if "form" in getattr(item, "fixturenames", ())]  # type: ignore[attr-defined]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=os.cpu_count() or 1, mp_context=context) as pool:
        asked = [(call["form"], call["capability"]) for call in calls]
        yield {key: pool.submit(compile_form, *key) for key in asked}
        pool.shutdown(cancel_futures=True)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("form", "capability"), list(builds()))
def test_compiles_without_spilling(
    form: Form,
    capability: int,
    compiled: dict[tuple[Form, int], Future[Usage | str]],
    record_property: Callable[[str, object], None],
) -> None:
    usage = compiled[form, capability].result()
    assert isinstance(usage, Usage), usage
    record_property("usage", usage)
    assert usage.fault is None, f"{usage.fault} ({usage})"


def test_a_fault_is_named() -> None:
    assert Usage(40, 1024, 4096, 0).fault is None
    assert "24 bytes" in str(Usage(255, 0, 4096, 24).fault)
    assert "8192" in str(Usage(40, 8192, 4096, 0).fault)
