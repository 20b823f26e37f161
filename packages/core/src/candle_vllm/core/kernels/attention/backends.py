# SPDX-License-Identifier: MIT
"""Choose the attention backend, once when the engine starts.

    triton       our own Triton kernels; "auto" selects them on a GPU
    torch_flash  the FlashAttention in torch, from 2.13 on; needs no other package
    flash_attn   the packages flash-attn and flash-attn-4
    torch        the reference: runs on any device, but is slow

A backend is one function with `paged_attention`'s contract, made for one model on one device. A backend that does not
support both is refused, with the reason and what works. Only the reference and what the chosen one needs are imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from candle_vllm.core.errors import ConfigError
from candle_vllm.core.kernels.attention import reference
from candle_vllm.core.kernels.attention.backend import PAGE_OF_2, AttentionNeeds, Backend, flash_refusal, triton_refusal
from candle_vllm.core.kernels.attention.rows import DeviceRows

SETTING = "attention_backend"


def choose(name: str, needs: AttentionNeeds) -> Backend:
    """Return the backend with this name, or for "auto" the default one.

    Raises:
        ConfigError: no backend has this name, or it does not meet these needs; the message says what works.
    """
    on_cpu = needs.capability is None
    wanted = ("torch" if on_cpu else "triton") if name == "auto" else name
    if wanted not in _MAKERS:
        raise ConfigError(f"{SETTING} {name!r:.80} is not one of auto, {', '.join(_MAKERS)}", SETTING)
    if on_cpu and wanted != "torch":
        raise ConfigError(f"{SETTING} {name!r} needs a GPU: on the CPU it is 'auto' or 'torch'", SETTING)
    made = _MAKERS[wanted](needs)
    if isinstance(made, Backend):
        return made
    raise ConfigError(f"{SETTING} {name!r} cannot serve this model: {made}; {_advice(wanted, needs)}", SETTING)


def _triton(needs: AttentionNeeds) -> Backend | str:
    refusal = triton_refusal(needs)
    if refusal is not None:
        return refusal
    from candle_vllm.core.kernels.attention import triton

    return Backend("triton", triton.paged_attention, capturable=True, mixed=True)


def _torch_flash(needs: AttentionNeeds) -> Backend | str:
    from candle_vllm.core.kernels.attention import torch_flash

    return flash_refusal(needs) or torch_flash.make(needs)


def _flash_attn(needs: AttentionNeeds) -> Backend | str:
    from candle_vllm.core.kernels.attention import flash_attn

    return flash_refusal(needs) or flash_attn.make(needs)


def _torch(needs: AttentionNeeds) -> Backend | str:
    if needs.deterministic and needs.capability is not None:
        return (
            "on a GPU the sums of torch's matrix products depend on the prompt's chunks, which 'deterministic' forbids"
        )
    return Backend("torch", attend_by_reference, capturable=False, note="one sequence after another, for comparison")


def attend_by_reference(
    q: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, rows: DeviceRows, **options: Any
) -> torch.Tensor:
    return reference.paged_attention(q, key_cache, value_cache, rows.on_host(), **options)


def _advice(refused: str, needs: AttentionNeeds) -> str:
    """Return the end of the error message: a setting that works, or the advice to run without `deterministic`."""
    for size in (16, PAGE_OF_2):
        if needs.block_size < size and isinstance(
            _MAKERS[refused](dataclasses.replace(needs, block_size=size)), Backend
        ):
            return f"set block_size={size}"
    if refused != "triton" and triton_refusal(needs) is None:
        return f"set {SETTING} to 'triton'"
    if refused != "torch" and isinstance(_torch(needs), Backend):
        return f"set {SETTING} to 'torch', which is slow"
    return "no backend can: run without 'deterministic'"


_MAKERS: Mapping[str, Callable[[AttentionNeeds], Backend | str]] = MappingProxyType(
    {"triton": _triton, "torch_flash": _torch_flash, "flash_attn": _flash_attn, "torch": _torch}
)


MOST_LATENT = 640
"""Maximum elements of a latent cache row, limited by registers: 512 of the latent vector and 128 rotary elements."""


def choose_latent(name: str, needs: AttentionNeeds) -> Backend:
    """Check the backend for latent attention. Layers never call the result: latent attention has its own kernels.

    `needs.head_dim` is the number of elements of a cache row.

    Raises:
        ConfigError: latent attention cannot meet these needs.
    """
    if name not in ("auto", "triton"):
        raise ConfigError(
            f"{SETTING} {name!r:.80} does not support this model's latent attention: leave it out", SETTING
        )
    if needs.cache_dtype != "auto":
        raise ConfigError(
            f"kv_cache_dtype={needs.cache_dtype!r} is not supported with latent attention, whose cache is small: "
            "leave it out",
            "kv_cache_dtype",
        )
    if needs.capability is not None and needs.capability < (8, 0):
        raise ConfigError("latent attention needs compute capability 8.0 on a GPU: run this model on the CPU", SETTING)
    if needs.head_dim > MOST_LATENT:
        raise ConfigError(
            f"the Triton kernels need latent rows of at most {MOST_LATENT} elements, not {needs.head_dim}: run this "
            "model on the CPU",
            SETTING,
        )
    needs = dataclasses.replace(needs, head_dim=64)
    if (refusal := triton_refusal(dataclasses.replace(needs, block_size=16))) is not None:
        raise ConfigError(f"latent attention cannot run on this GPU: {refusal}: run this model on the CPU", SETTING)
    return choose("triton", needs)  # may advise another block size
