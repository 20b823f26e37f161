# SPDX-License-Identifier: MIT
"""Attention backends: their interface, the requirements of a model, and why some backends cannot meet them."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Protocol, Unpack

import torch

from candle_vllm.core.config import CACHE_TYPES
from candle_vllm.core.kernels.attention.rows import DeviceRows, ScoreOptions


class Attend(Protocol):
    """A function with the contract of `paged_attention` (`kernels/attention`), for rows on the device."""

    def __call__(
        self,
        q: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        rows: DeviceRows,
        **scores: Unpack[ScoreOptions],
    ) -> torch.Tensor: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionNeeds:
    """Requirements of a model on a device for attention.

    Attributes:
        capability: the GPU's compute capability such as (9, 0); (8, 1) for every AMD GPU; None on the CPU.
        dtype: type of queries, and of the cache unless it is quantised.
        head_dim: elements of a head; the maximum if layers differ.
        block_size: tokens of a block.
        chunks: whether any layer has chunked attention.
        soft_caps: whether a layer caps its scores.
        sinks: whether a layer's heads have sinks.
        slopes: whether a layer's scores change with distance (ALiBi, relative logits).
        cache_dtype: type of keys and values, a value of `EngineConfig.kv_cache_dtype`.
        deterministic: whether a result must not depend on the rest of the step, nor on the chunks of a prompt.
    """

    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    block_size: int
    chunks: bool = False
    soft_caps: bool = False
    sinks: bool = False
    slopes: bool = False
    cache_dtype: str = "auto"
    deterministic: bool = False


@dataclasses.dataclass(frozen=True)
class Backend:
    """An attention backend.

    Attributes:
        name: the value of `EngineConfig.attention_backend`.
        attend: the function that layers call, except for latent attention.
        capturable: whether a step of decoding sequences only can be captured in a CUDA graph, because no call waits for
            the device.
        mixed: whether a step with prompts can be captured too, by `DeviceRows.decoding`.
        finite_cache: whether the cache must be initialised with finite elements, because a NaN after the end of a
            sequence would change the sequence's result.
        note: a note about this backend for the user; may be empty.
    """

    name: str
    attend: Attend
    capturable: bool
    mixed: bool = False
    finite_cache: bool = False
    note: str = ""


def flash_refusal(needs: AttentionNeeds) -> str | None:
    """Return a sentence on the first need for which no version of FlashAttention is used; None without such a need."""
    if needs.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention computes f16 and bf16, not {needs.dtype}"
    if needs.sinks:
        return "FlashAttention does not support attention sinks"
    if needs.slopes or needs.chunks:
        return "FlashAttention is not used with ALiBi, relative logits or chunked attention"
    if needs.cache_dtype != "auto":
        return f"FlashAttention does not read a cache of {needs.cache_dtype} with queries of another type"
    if torch.version.hip is not None:
        return "FlashAttention is used only on NVIDIA GPUs"
    if needs.capability is None or needs.capability < (8, 0):
        return "FlashAttention needs compute capability 8.0"
    if needs.head_dim > 256 or needs.head_dim % 8:
        return f"FlashAttention needs a head size that is a multiple of 8 and at most 256, not {needs.head_dim}"
    if needs.deterministic:
        return "FlashAttention's results depend on the rest of the step, which 'deterministic' forbids"
    return None


PAGE_OF_2 = 256
"""The page size of FlashAttention 2 is a multiple of this number of tokens."""


def page_refusal(needs: AttentionNeeds) -> str | None:
    """Return a clause on why FlashAttention 2 cannot use blocks of this size as its pages; None if it can."""
    if needs.block_size % PAGE_OF_2:
        return f"its pages are multiples of {PAGE_OF_2} tokens, and block_size is {needs.block_size}"
    return None


def installed(module: str) -> bool:
    """Return whether a module can be found; imports its parent packages, but not the module."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a parent package is missing or broken
        return False


def triton_refusal(needs: AttentionNeeds) -> str | None:
    """Return a sentence on why our Triton kernels cannot be used; None if they can."""
    if not installed("triton"):
        return "the package triton is not installed"
    if needs.capability is None or needs.capability < (7, 5):
        return "the Triton kernels need compute capability 7.5"
    if needs.dtype == torch.bfloat16 and needs.capability < (8, 0):
        return "bf16 needs compute capability 8.0"
    if needs.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the Triton kernels compute f16, bf16 and f32, not {needs.dtype}"
    if needs.head_dim > 512:
        return f"the Triton kernels need a head size of at most 512, not {needs.head_dim}"
    if needs.head_dim > 256 and needs.capability < (8, 0):
        return "the Triton kernels need compute capability 8.0 for head sizes above 256"
    if needs.block_size < 16:
        return f"the Triton kernels need blocks of at least 16 tokens, and block_size is {needs.block_size}"
    major, minor = least = CACHE_TYPES[needs.cache_dtype].capability
    if needs.capability < least:
        others = " and ".join(repr(name) for name, kind in CACHE_TYPES.items() if kind.row_scales)
        given = f"kv_cache_dtype={needs.cache_dtype!r}"
        return f"{given} needs an NVIDIA GPU of compute capability {major}.{minor}; {others} do not"
    return None
