# SPDX-License-Identifier: MIT
"""What the compiled code of other processors costs, counted in its assembly by `benchmarks/cpu/instructions.py`.

Sums that do not stay in registers go unnoticed by any other test, and took attention of prompts 2.5 times as long.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba")

from candle_vllm.core.kernels.attention import cpu_tiles
from candle_vllm.core.kernels.attention.cpu_cache import BF16
from candle_vllm.core.kernels.cpu_runtime.compiler import assembly
from candle_vllm.core.kernels.cpu_runtime.level import LEVELS

LEVEL = {level.name: level for level in LEVELS}
SCRIPT = Path(__file__).parents[5] / "benchmarks" / "cpu" / "instructions.py"


@pytest.fixture(scope="module")
def counting() -> Any:
    spec = importlib.util.spec_from_file_location("cpu_benchmarks_instructions", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("kind", "level", "most"), [("Q4_1", "avx2", 0.1), ("Q4_K", "avx512-vnni", 0.04), ("BF16", "avx512-bf16", 0.06)]
)
def test_products_of_eight_rows_take_few_instructions(counting: Any, kind: str, level: str, most: float) -> None:
    assert 1 / 64 < counting.per_weight(kind, LEVEL[level], 8) < most


def scores(isa: int) -> Any:
    tiles, rows, dim, kind = cpu_tiles.score_tiles, 4, 64, int(BF16)

    def kernel(q: int, at: int, coming: int, stride: int, out: int) -> None:
        tiles(q, at, coming, stride, out, rows, dim, kind, isa)

    return kernel


def values(isa: int) -> Any:
    tiles, rows, dim, kind = cpu_tiles.value_tiles, 4, 64, int(BF16)

    def kernel(weights: int, probabilities: int, at: int, coming: int, keys: int, out: int) -> None:
        tiles(weights, probabilities, at, coming, keys, out, rows, dim, kind, isa)

    return kernel


@pytest.mark.parametrize("level", ["avx2", "avx512-vnni", "neon", "neon-bf16"])
@pytest.mark.parametrize("kernel", [scores, values])
def test_sums_of_attention_stay_in_registers(counting: Any, kernel: Any, level: str) -> None:
    products = re.compile(r"\s+(?:vfmadd|fmla|bfdot)")
    text = assembly(kernel(int(LEVEL[level].isa)), LEVEL[level])
    found = [loop for loop in counting.loops(text) if any(map(products.match, loop))]
    assert found
    for line in (line for loop in found for line in loop):
        assert not re.search(r"\(%rsp|\[sp", line), line
