# SPDX-License-Identifier: MIT
"""What attention is measured on: decoding, prompts, and chunks behind a long context. See `cases.py`."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import measure
import torch
from cases import Case, Plan, Planned
from models import Shape
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from candle_vllm.core.kernels import attention
from candle_vllm.core.kernels.attention import reference as attention_reference


def attention_cases(plan: Plan) -> Iterator[Planned]:
    """Decoding at several contexts and batches; prompts of several lengths, and a chunk behind a long context."""
    for name, model in plan.models.items():
        contexts = (130,) if plan.quick else (1024, 8192, 32768, 65536) if name == "8B" else (1024, 32768)
        for context in contexts:
            for batch in plan.sizes(1, 8, 64):
                build = functools.partial(_decode, plan, model, batch, context)
                yield Planned("decode attention", f"{name} R={batch} context={context}", build)
        lengths = ((70, 70),) if plan.quick else ((2048, 2048), (8192, 8192), (32768, 32768), (2048, 32768))
        for tokens, context in lengths if name != "0.6B" else lengths[1:2]:
            build = functools.partial(_prefill, plan, model, tokens, context)
            yield Planned("prefill attention", f"{name} T={tokens} context={context}", build)


def _decode(plan: Plan, model: Shape, batch: int, context: int) -> Case:
    """Every copy reads other blocks of one large cache, in random order, as after a while of serving."""
    scale = model.head_dim**-0.5
    nbytes = 4 * batch * context * model.kv_heads * model.head_dim
    copies = measure.copies_for(nbytes, plan.device)
    width = -(-context // 64)
    keys, values = (plan.normal(copies * batch * width, 64, model.kv_heads, model.head_dim) for _ in range(2))
    order = torch.randperm(len(keys), device=plan.device).int().view(copies, batch, width)
    q = plan.normal(batch, model.heads, model.head_dim)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=plan.device)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=plan.device)
    rows = [attention.DeviceRows(starts, lengths, table, decodes=batch) for table in order]
    calls = [functools.partial(attention.paged_attention, q, keys, values, row, scale=scale) for row in rows]
    host = attention.AttentionRows(tuple(range(batch + 1)), (context,) * batch, order[0].long())
    wanted = functools.partial(attention_reference.paged_attention, q, keys, values, host, scale=scale)
    return Case(
        calls,
        wanted,
        nbytes + 4 * q.numel(),
        4 * q.numel() * context,
        peers=_decode_peers(q, batch, context, keys, values),
    )


def _decode_peers(
    q: torch.Tensor, batch: int, context: int, keys: torch.Tensor, values: torch.Tensor
) -> dict[str, list[measure.Call]]:
    """Torch's attention over the same amount of cache without pages."""
    tokens = keys.shape[0] * 64 // batch // context * context * batch
    parts = [
        cache.flatten(0, 1)[:tokens].view(-1, batch, context, *cache.shape[2:]).transpose(2, 3)
        for cache in (keys, values)
    ]
    return {
        "torch": [
            functools.partial(scaled_dot_product_attention, q.unsqueeze(2), k, v, enable_gqa=True)
            for k, v in zip(*parts, strict=True)
        ]
    }


def _prefill(plan: Plan, model: Shape, tokens: int, context: int) -> Case:
    scale, width = model.head_dim**-0.5, -(-context // 64)
    keys, values = (plan.normal(width, 64, model.kv_heads, model.head_dim) for _ in range(2))
    order = torch.randperm(width, device=plan.device).unsqueeze(0)
    q = plan.normal(tokens, model.heads, model.head_dim)
    rows = attention.DeviceRows(
        torch.tensor([0, tokens], dtype=torch.int32, device=plan.device),
        torch.tensor([context], dtype=torch.int32, device=plan.device),
        order.int(),
        decodes=0,
    )
    host = attention.AttentionRows((0, tokens), (context,), order)
    seen = tokens * context - tokens * (tokens - 1) // 2
    flops = 4 * model.heads * model.head_dim * seen
    nbytes = 4 * q.numel() + 4 * context * model.kv_heads * model.head_dim
    return Case(
        [functools.partial(attention.paged_attention, q, keys, values, rows, scale=scale)],
        functools.partial(attention_reference.paged_attention, q, keys, values, host, scale=scale),
        nbytes,
        flops,
        peers=_prefill_peers(q, keys, values) if tokens == context and plan.device == "cuda" else {},
    )


def _prefill_peers(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> dict[str, list[measure.Call]]:
    """Torch's own kernels on keys and values without pages."""
    query = q.transpose(0, 1).unsqueeze(0)  # [1, H, T, D]
    k, v = (cache.flatten(0, 1)[: len(q)].transpose(0, 1).unsqueeze(0) for cache in (keys, values))

    def call(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, k, v, is_causal=True, enable_gqa=True)

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    return {name: [functools.partial(call, backend)] for name, backend in backends.items()}
