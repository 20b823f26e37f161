# SPDX-License-Identifier: MIT
"""Triton kernels compile for the GPUs we name, without spilling registers."""

from __future__ import annotations

import dataclasses
import importlib.util
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from candle_vllm.core.kernels.triton_build import TENSOR_CORES
from packages.core.tests.kernels.triton.building import (
    AMD_TARGETS,
    CAPABILITIES,
    SHARED_LIMITS,
    Usage,
    compile_build,
    tables,
)

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

Form = tuple[str, int]  # a module's name and the place in its table

USUAL = 90
"""One form of each kernel is compiled for this capability; the rest is marked."""

FEW_BYTES = {("finish_kernel[64-SEARCH]", 75): 8, ("linear_kernel[e2m1-128parts-16-split]", 120): 8}
"""Bytes of a thread that spill where no other form is worth its lines."""

SPILLING = {
    "gfx942": {"latent_attention.triton_decode", "latent_attention.triton_prefill"},
    "gfx1100": {
        "attention.triton_decode:decode_kernel",
        "attention.triton_prefill",
        "delta_rule.triton_chunks:chunks_kernel",
        "latent_attention.triton_decode",
        "latent_attention.triton_prefill",
        "moe.triton_experts:few_kernel:plain:int",
        "moe.triton_experts:many_kernel:rounded:GroupCodec",
    },
}
"""What keeps some registers in memory on AMD's GPUs, which is slow and right; `docs/kernels.md` has the same list."""


def kind(name: str, build: Any) -> str:
    """A kernel of a module, with the product and the codec that it is given, where it is."""
    parts = [name, build.kernel.__name__]
    if "PRODUCT" in build.constants:
        parts += [build.constants["PRODUCT"].__name__, type(build.constants["FORM"]).__name__]
    return ":".join(parts)


def builds() -> Iterator[Any]:
    seen = set()
    for name, forms in tables().items():
        for place, build in enumerate(forms):
            for capability in build.capabilities:
                common = capability == USUAL and kind(name, build) not in seen
                if common:
                    seen.add(kind(name, build))
                marks = [] if common else [pytest.mark.every_form]
                yield pytest.param((name, place), capability, id=f"{name}:{build}-sm{capability}", marks=marks)


def amd_builds() -> Iterator[Any]:
    for name, forms in tables().items():
        placed = reversed(list(enumerate(forms)))
        kernels = {kind(name, build): place for place, build in placed if 80 in build.capabilities}
        for place in sorted(kernels.values()):
            for target in AMD_TARGETS:
                yield pytest.param((name, place), target, id=f"{name}:{forms[place]}-{target}")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("form", "target"), list(builds()))
def test_compiles_without_spilling(
    form: Form,
    target: int,
    background: Any,
    record_property: Callable[[str, object], None],
) -> None:
    usage = background.forms[*form, target].result()
    assert isinstance(usage, Usage), usage
    record_property("usage", usage)
    known = FEW_BYTES.get((str(tables()[form[0]][form[1]]), target), 0)
    usage = dataclasses.replace(usage, stack=0) if usage.stack == known else usage
    assert usage.fault is None, f"{usage.fault} ({usage})"


@pytest.mark.every_form
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("form", "target"), list(amd_builds()))
def test_compiles_for_amd(form: Form, target: str, background: Any) -> None:
    """No GPU, and nothing of ROCm, is needed."""
    usage = background.forms[*form, target].result()
    assert isinstance(usage, Usage), usage
    assert usage.shared <= usage.shared_limit, usage
    listed = not SPILLING[target].isdisjoint({form[0], kind(form[0], tables()[form[0]][form[1]])})
    assert (usage.stack > 0) == listed, usage


def test_every_kernel_with_products_has_a_form_for_every_gpu() -> None:
    """But where the newest of the features it serves begin later, which the loader knows."""
    later = re.compile(
        r"latent_attention|delta_rule\.triton_chunks|.*:GroupCodec$|gguf_linear\.triton:linear_kernel:rounded"
    )
    found: dict[str, set[int]] = {}
    for name, forms in tables().items():
        for build in forms:
            found.setdefault(kind(name, build), set()).update(build.capabilities)
    for kernel, targets in found.items():
        first = TENSOR_CORES if later.match(kernel) else CAPABILITIES[0]
        assert targets == {capability for capability in CAPABILITIES if capability >= first}, kernel


def test_every_kernel_has_a_form() -> None:
    """A kernel's name ends with `_kernel`; what it calls has other names."""
    import candle_vllm.core.kernels as kernels

    found = set()
    for info in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        if info.name.rpartition(".")[2].startswith("triton"):
            module = importlib.import_module(info.name)
            found |= {value for name, value in vars(module).items() if re.fullmatch(r"[a-z]\w*_kernel", name)}
    assert found == {build.kernel for forms in tables().values() for build in forms}


def test_what_has_no_bfloat16_is_built_with_float16() -> None:
    import triton

    build = next(build for build in tables()["embedding.triton"] if "*bf16" in build.arguments.values())
    assert isinstance(compile_build(build, 75), Usage)
    seen = []
    usual, triton.compile = triton.compile, lambda source, **given: seen.append(source) or usual(source, **given)
    try:
        compile_build(build, 75)
        compile_build(build, 80)
    finally:
        triton.compile = usual
    assert "*fp16" in seen[0].signature.values()
    assert "*bf16" not in seen[0].signature.values()
    assert "*bf16" in seen[1].signature.values()


def test_a_fault_is_named() -> None:
    assert Usage(40, 1024, 4096, 0).fault is None
    assert "24 bytes" in str(Usage(255, 0, 4096, 24).fault)
    assert "8192" in str(Usage(40, 8192, 4096, 0).fault)
    assert set(CAPABILITIES) <= set(SHARED_LIMITS)
