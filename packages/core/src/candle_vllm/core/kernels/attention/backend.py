# SPDX-License-Identifier: MIT
"""Attention backends: their interface, what a model needs of them, and what no FlashAttention supports."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Protocol

import torch

from candle_vllm.core.kernels.attention.rows import DeviceRows


class Attend(Protocol):
    """`paged_attention` of the package, for rows on the device."""

    def __call__(
        self,
        q: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        rows: DeviceRows,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        cache_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
        sinks: torch.Tensor | None = None,
        slopes: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionNeeds:
    """Requirements of a model on a device for attention.

    Attributes:
        capability: the GPU's compute capability, (9, 0), or (8, 1) for AMD's; None on the CPU.
        dtype: of queries, and of the cache but for float8.
        head_dim: elements of a head, the largest if layers differ.
        block_size: tokens of a block.
        windows, chunks: whether a layer has a sliding window, or one that is a chunk of the context.
        soft_caps: whether a layer caps its scores.
        sinks: whether a layer's heads have sinks.
        slopes: whether a layer's scores fall with distance (ALiBi).
        cache_dtype: of keys and values, as `EngineConfig.kv_cache_dtype` names it.
        deterministic: whether a result must not depend on the rest of the step, nor on how a prompt is cut.
    """

    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    block_size: int
    windows: bool = False
    chunks: bool = False
    soft_caps: bool = False
    sinks: bool = False
    slopes: bool = False
    cache_dtype: str = "auto"
    deterministic: bool = False


@dataclasses.dataclass(frozen=True)
class Backend:
    """Attention backend.

    Attributes:
        name: as `EngineConfig.attention_backend` names it.
        attend: the function that every layer calls.
        capturable: whether a step in which all sequences are among `DeviceRows.decodes` can be captured in a CUDA
            graph, because no call waits for the device.
        mixed: whether any step with `DeviceRows.decoding` can be captured, prompts included.
        finite_cache: whether every element of the cache must be finite, also before it is first written: a NaN after
            the end of a sequence would reach its result.
        note: a remark on this choice for the user; may be empty.
    """

    name: str
    attend: Attend
    capturable: bool
    mixed: bool = False
    finite_cache: bool = False
    note: str = ""


def flash_refusal(needs: AttentionNeeds) -> str | None:
    """Return what no FlashAttention supports of these needs, as a sentence."""
    if needs.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention computes f16 and bf16, not {needs.dtype}"
    if needs.sinks:
        return "FlashAttention has no attention sinks"
    if needs.slopes or needs.chunks:
        return "FlashAttention is not used with ALiBi, nor within chunks"
    if needs.cache_dtype != "auto":
        return f"FlashAttention does not read a cache of {needs.cache_dtype} beside queries of another type"
    if torch.version.hip is not None:
        return "FlashAttention is used on NVIDIA GPUs alone"
    if needs.capability is None or needs.capability < (8, 0):
        return "FlashAttention needs compute capability 8.0"
    if needs.head_dim > 256 or needs.head_dim % 8:
        return f"FlashAttention needs heads of a multiple of 8 numbers up to 256, not {needs.head_dim}"
    if needs.deterministic:
        return "FlashAttention's results depend on the rest of the step, which 'deterministic' forbids"
    return None


PAGE_OF_2 = 256
"""Tokens of a page are a multiple of this in FlashAttention 2."""


def page_refusal(needs: AttentionNeeds) -> str | None:
    """Return why FlashAttention 2 cannot read these blocks as its pages, as the end of a sentence."""
    if needs.block_size % PAGE_OF_2:
        return f"its pages are multiples of {PAGE_OF_2} tokens, and block_size is {needs.block_size}"
    return None


def installed(module: str) -> bool:
    """Whether a module can be found; imports the packages around it, not the module."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a package around it is missing, or broken
        return False


def triton_refusal(needs: AttentionNeeds) -> str | None:
    """Return what the kernels of this package do not support of these needs, as a sentence."""
    if not installed("triton"):
        return "the package triton is not installed"
    if needs.capability is None or needs.capability < (7, 5):
        return "the Triton kernels need compute capability 7.5"
    if needs.dtype == torch.bfloat16 and needs.capability < (8, 0):
        return "bf16 needs compute capability 8.0"
    if needs.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the Triton kernels compute f16, bf16 and f32, not {needs.dtype}"
    if needs.head_dim > 512:
        return f"the Triton kernels need heads of at most 512 numbers, not {needs.head_dim}"
    if needs.head_dim > 256 and needs.capability < (8, 0):
        return "the Triton kernels need compute capability 8.0 for heads of more than 256 numbers"
    if needs.block_size < 16:
        return f"the Triton kernels need blocks of at least 16 tokens, and block_size is {needs.block_size}"
    if needs.cache_dtype == "fp8" and needs.capability < (8, 9):
        return (
            "kv_cache_dtype='fp8' needs an NVIDIA GPU of compute capability 8.9, 'fp8_per_token_head' and "
            "'int8_per_token_head' do not"
        )
    return None
