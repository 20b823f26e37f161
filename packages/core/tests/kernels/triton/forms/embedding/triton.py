# SPDX-License-Identifier: MIT
"""Forms of the kernels of `embedding/triton` that are compiled ahead of time."""

from __future__ import annotations

from candle_vllm.core.kernels.embedding.triton import _constants, embedding_kernel
from packages.core.tests.kernels.triton.building import Build


def _build(dtype: str, size: int) -> Build:
    arguments = {"token_ids": "*i64", "table": f"*{dtype}", "y": f"*{dtype}", "table_stride": "i32"}
    return Build(embedding_kernel, arguments, _constants(size), aligned=("table_stride",), label=f"{dtype}-{size}")


FORMS = (_build("bf16", 4096), _build("fp16", 1024), _build("fp32", 576))
