# SPDX-License-Identifier: MIT
"""Latent attention in torch: the absorbed form against keys and values that are made in full."""

from __future__ import annotations

import math

import pytest
import torch

from candle_vllm.core.kernels.attention import reference as attention_reference
from candle_vllm.core.kernels.attention.rows import AttentionRows
from candle_vllm.core.kernels.latent_attention import head_linear, latent_attention, latent_write
from packages.core.tests.kernels.latent_layer import SIZES, Layer, error, random


@pytest.mark.parametrize("name", SIZES)
def test_the_absorbed_form_is_attention(name: str) -> None:
    """In chunks over a scattered cache, against keys and values that are made in full."""
    layer = Layer(SIZES[name])
    q, kv = layer.inputs(70, seed=9)
    wanted, size, got = layer.naive(q, kv), 16, []
    table = torch.tensor([[4, 0, 3, 1, 2]])
    cache = torch.full((5, size, 1, layer.sizes.rope + layer.sizes.latent), math.nan)
    for start, end in ((0, 7), (7, 40), (40, 41), (41, 70)):
        positions = torch.arange(start, end)
        nope, rope, key, latent = layer.split(q[start:end], kv[start:end], positions)
        latent_write(key, latent, cache, table[0][positions // size] * size + positions % size)
        rows = AttentionRows((0, end - start), (end,), table)
        mixed = latent_attention(rope, head_linear(nope, layer.k_b), cache, rows, scale=layer.scale)
        got.append(head_linear(mixed, layer.v_b, invariant=True))
    assert error(torch.cat(got), wanted) < 1e-5


def test_a_negative_slot_writes_nothing() -> None:
    cache = torch.zeros(2, 4, 1, 5)
    latent_write(random(3, 2), random(3, 3), cache, torch.tensor([-1, 6, -1]))
    assert torch.equal(cache.flatten(0, 2)[6], torch.cat([random(3, 2)[1], random(3, 3)[1]]))
    assert int((cache.flatten(0, 2) != 0).any(-1).sum()) == 1


def test_one_latent_row_is_attention_with_one_key_head() -> None:
    layer = Layer(SIZES["small"])
    nope, rope, key, latent = layer.split(*layer.inputs(30, seed=4), torch.arange(30))
    table = torch.arange(2).unsqueeze(0)
    cache = torch.zeros(2, 16, 1, layer.sizes.rope + layer.sizes.latent)
    latent_write(key, latent, cache, torch.arange(30))
    rows, queries = AttentionRows((0, 30), (30,), table), head_linear(nope, layer.k_b)
    mixed = latent_attention(rope, queries, cache, rows, scale=layer.scale)
    whole = torch.cat([rope, queries], -1)
    wanted = attention_reference.paged_attention(whole, cache, cache, rows, scale=layer.scale)
    assert error(mixed, wanted[..., layer.sizes.rope :]) < 1e-6
