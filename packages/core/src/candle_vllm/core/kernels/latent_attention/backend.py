"""Which attention backend serves latent attention on a GPU: the kernels of this folder."""

from __future__ import annotations

import dataclasses

from candle_vllm.core.errors import ConfigError
from candle_vllm.core.kernels.attention.backend import AttentionNeeds, Backend
from candle_vllm.core.kernels.attention.backends import SETTING, choose

MOST_DIM = 640
"""Numbers of a cache row that the kernels have registers for: 512 of the latent vector, 128 that rotate."""


def choose_latent(name: str, needs: AttentionNeeds) -> Backend:
    """The backend of that name, which layers of latent attention do not call: they have one function.

    `needs.head_dim` is the size of a cache row.

    Raises:
        ConfigError: it cannot serve these needs.
    """
    if name not in ("auto", "triton"):
        raise ConfigError(
            f"{SETTING} {name!r:.80} cannot serve this model, whose latent attention has kernels of its own: "
            "leave it out",
            SETTING,
        )
    if needs.fp8_cache:
        raise ConfigError(
            "--kv-cache-dtype fp8 cannot be had with latent attention, whose cache is small already: leave it out",
            "kv_cache_dtype",
        )
    if needs.capability is not None and needs.capability < (8, 0):
        raise ConfigError("latent attention needs compute capability 8.0 on a GPU: run this model on the CPU", SETTING)
    if needs.head_dim > MOST_DIM:
        raise ConfigError(
            f"the Triton kernels need latent rows of at most {MOST_DIM} numbers, not {needs.head_dim}: run this model "
            "on the CPU",
            SETTING,
        )
    return choose("triton", dataclasses.replace(needs, head_dim=64))
