# SPDX-License-Identifier: MIT
"""A layer of latent attention for tests: its weights, and its result by keys and values that are made in full."""

from __future__ import annotations

import dataclasses
import math

import torch

from candle_vllm.core.kernels.rms_norm import reference as norm_reference
from candle_vllm.core.kernels.rotary import reference as rotary_reference
from candle_vllm.core.loading.config import LatentSizes

EPS = 1e-6


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """RMS(error) / RMS(wanted)."""
    return float((got.double() - wanted.double()).square().mean().sqrt() / wanted.double().square().mean().sqrt())


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass
class Layer:
    """Weights of one layer, and the tables."""

    sizes: LatentSizes

    def __post_init__(self) -> None:
        s = self.sizes
        self.k_b = random(s.heads, s.latent, s.nope, seed=1) / s.nope**0.5
        self.v_b = random(s.heads, s.value, s.latent, seed=2) / s.latent**0.5
        self.norm = 1 + 0.1 * random(s.latent, seed=3)
        angles = torch.arange(8192).unsqueeze(1) / 10000.0 ** (torch.arange(s.rope // 2) / (s.rope // 2))
        self.cos, self.sin = angles.cos().contiguous(), angles.sin().contiguous()
        self.scale = (s.nope + s.rope) ** -0.5

    def inputs(self, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """q [T, H * (nope + R)] and kv [T, L + R] of a sequence from its first token on."""
        s = self.sizes
        return random(tokens, s.heads * (s.nope + s.rope), seed=seed), random(tokens, s.latent + s.rope, seed=seed + 1)

    def split(
        self, q: torch.Tensor, kv: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries without rotation [T, H, nope], rotated queries, rotated key part [T, R], normed latent [T, L]."""
        s = self.sizes
        nope, rope = q.unflatten(-1, (s.heads, -1)).split((s.nope, s.rope), -1)
        latent, key = kv.split((s.latent, s.rope), -1)
        if not s.rope:
            return nope, rope, key, norm_reference.rms_norm(latent, self.norm, EPS)
        rope, key = (rotary_reference.rotary(x, positions, self.cos, self.sin) for x in (rope, key.unsqueeze(1)))
        return nope, rope, key.squeeze(1), norm_reference.rms_norm(latent, self.norm, EPS)

    def naive(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """A whole sequence, its keys and values made in full, by the attention of one key for every head: [T, H, V]."""
        positions = torch.arange(len(q))
        nope, rope, key, latent = self.split(q, kv, positions)
        keys = torch.einsum("hln,tl->thn", self.k_b, latent)
        keys = torch.cat([keys, key[:, None].expand(-1, self.sizes.heads, -1)], -1)
        values = torch.einsum("hvl,tl->thv", self.v_b, latent)
        scores = torch.einsum("qhd,khd->hqk", torch.cat([nope, rope], -1), keys) * self.scale
        scores.masked_fill_(torch.ones(len(q), len(q), dtype=torch.bool).triu(1), -math.inf)
        return torch.einsum("hqk,khv->qhv", scores.softmax(-1), values)


SIZES = {
    "small": LatentSizes(heads=4, nope=32, rope=16, latent=32, value=16),
    "odd": LatentSizes(heads=5, nope=48, rope=6, latent=96, value=24),
    "many heads": LatentSizes(heads=40, nope=16, rope=32, latent=64, value=16),
    "unrotated": LatentSizes(heads=4, nope=48, rope=0, latent=32, value=16),
    "lite": LatentSizes(heads=16, nope=128, rope=64, latent=512, value=128),
}
