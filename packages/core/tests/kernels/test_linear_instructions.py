# SPDX-License-Identifier: MIT
"""The tensor instructions that linear layers promise to take for every number of tokens, in the compiled code.

None on compute capability 7.5: Triton multiplies there without tensor cores (docs/kernels.md).
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from typing import Any

import pytest

from candle_vllm.core.kernels.triton_build import OPTIONS
from packages.core.tests.kernels.triton.building import CAPABILITIES, Build, tables

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from candle_vllm.core.kernels.dispatch import interpreted
from candle_vllm.core.kernels.linear.triton_products import exact

INSTRUCTION = re.compile(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.[\w.:]*")
MMA = r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(b?f16)\.\1\.f32"
PLAIN = {
    80: MMA,
    90: r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(b?f16)\.\1",
    100: r"tcgen05\.mma\..*kind::f16",
    120: MMA,
}


def forms(module: str) -> Iterator[Any]:
    kernels = [build for build in tables()[module] if build.kernel.fn.__name__ != "merge_kernel"]  # which only adds
    if module == "gguf_linear.triton":
        kernels = [build for build in kernels if build.constants.get("PRODUCT") is exact]
    for capability in CAPABILITIES:
        marks = () if capability == 90 else (pytest.mark.every_form,)
        for build in kernels:
            if capability in build.capabilities:
                yield pytest.param(build, capability, id=f"{build}-sm{capability}", marks=marks)


def instructions(build: Build, capability: int) -> set[str]:
    names = build.kernel.arg_names
    signature = {name: build.arguments.get(name, "constexpr") for name in names}
    pointers = [name for name, kind in signature.items() if kind.startswith("*")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *build.aligned)}
    source = ASTSource(build.kernel, signature, dict(build.constants), attributes)
    options = {**OPTIONS, "num_warps": build.num_warps, "num_stages": build.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return set(INSTRUCTION.findall(compiled.asm["ptx"]))


@pytest.mark.skipif(interpreted(), reason="the interpreter compiles nothing")
class TestInstructions:
    @pytest.mark.parametrize(("build", "capability"), list(forms("linear.triton")))
    def test_plain(self, build: Build, capability: int) -> None:
        found = instructions(build, capability)
        if "fp32" in str(build) or capability < 80:
            assert not found
        else:
            assert found
            assert all(re.fullmatch(PLAIN[capability], name) for name in found), found

    @pytest.mark.parametrize(("build", "capability"), list(forms("gguf_linear.triton")))
    def test_quantised(self, build: Build, capability: int) -> None:
        found = instructions(build, capability)
        assert bool(found) == (capability >= 80)
        assert all(re.fullmatch(MMA, name) for name in found), found
