"""What the launches of the GPU's kernels share: checks, constants, forms that are built ahead of time (step 6)."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from candle_vllm.core.kernels.gguf_linear.layout import PLANES, GgufMatrix, Planes
from candle_vllm.core.kernels.packed_linear.layout import PackedKind
from candle_vllm.core.kernels.triton_build import Build


class Sized(Protocol):
    """A quantised matrix, however it lies."""

    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def device(self) -> torch.device: ...


def checked(x: torch.Tensor, matrix: Sized, bias: torch.Tensor | None, out: torch.Tensor | None) -> None:
    """Whether the kernels read and write these tensors."""
    assert x.dim() == 2
    assert x.dtype in (torch.bfloat16, torch.float16)
    assert x.stride(1) == 1 or matrix.columns == 1, "the numbers of a row lie behind each other"
    assert x.shape[1] == matrix.columns
    assert x.device == matrix.device
    if bias is not None:
        assert bias.shape == (matrix.rows,)
        assert bias.is_contiguous()
        assert bias.device == x.device
    if out is not None:
        assert out.shape == (len(x), matrix.rows)
        assert out.dtype == x.dtype
        assert out.stride(1) == 1 or matrix.rows == 1, "the numbers of a row lie behind each other"
        assert out.device == x.device


def planes_of(matrix: GgufMatrix) -> tuple[torch.Tensor | None, ...]:
    """The kernels' arguments for a matrix."""
    return matrix.low, matrix.high, matrix.scales, matrix.supers


def constants_of(planes: Planes, columns: int) -> dict[str, Any]:
    """What the kernels know of a kind when they are compiled."""
    layout = planes.layout
    return {
        "LOW": planes.low,
        "HIGH": planes.high,
        "WORDS": planes.words,
        "WIDTH": layout.width,
        "NESTED": layout.nested,
        "MINIMUM": layout.minimum,
        "ZERO": layout.zero,
        "PADDED": columns % planes.step != 0,
    }


def build(
    kernel: Any, kind: PackedKind, dtype: str, constants: dict[str, Any], form: str = "", **options: Any
) -> Build:
    """A form of a kernel for matrices of a kind."""
    planes = PLANES[kind]
    elements = {1: "*i16", 2: "*i16", 4: "*i32", 8: "*i32"}
    types = dict.fromkeys(("T", "N", "K", "x_stride", "out_stride", "steps", "split_steps"), "i32")
    types |= {"x": f"*{dtype}", "low": elements[planes.low], "scales": "*i32", "token_ids": "*i64", "out": f"*{dtype}"}
    if planes.high:
        types["high"] = elements[planes.high]
    if planes.layout.nested:
        types["supers"] = "*i32"
    if constants.get("BIAS"):
        types["bias"] = f"*{dtype}"
    if constants.get("SPLIT"):
        types["out"] = "*fp32"
    arguments = {name: types[name] for name in kernel.arg_names if name in types}
    missing = {name: None for name in ("high", "supers", "bias") if name in kernel.arg_names and name not in types}
    aligned = tuple(name for name in ("N", "K", "x_stride", "out_stride") if name in arguments)
    return Build(
        kernel,
        arguments,
        {**constants, **missing},
        aligned=aligned,
        label="-".join(str(x) for x in (kind.name, dtype, constants.get("TOKENS"), form) if x),
        **options,
    )
