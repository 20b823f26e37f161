# SPDX-License-Identifier: MIT
"""What adapters (LoRA) are measured on: what they add to a layer's product, of 1, 8 and 64 of them. See `cases.py`."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from cases import BF16, Case, Plan, Planned

from candle_vllm.core.kernels.lora.device import NARROW, block_table

LAYERS = {  # columns, and rows of each matrix
    "8B qkv": (4096, (4096, 1024, 1024)),
    "8B gate, up": (4096, (14336, 14336)),
    "8B down": (14336, (4096,)),
    "0.6B qkv": (1024, (2048, 1024, 1024)),
}


def adapter_cases(plan: Plan) -> Iterator[Planned]:
    """Rows that decode, and a prompt, shared evenly by adapters of one rank."""
    layers = {"toy": (64, (32, 16))} if plan.quick else LAYERS
    for name, layer in layers.items():
        for rank in (8,) if plan.quick else (16, 64):
            for adapters in plan.sizes(1, 8, 64):
                for tokens in plan.sizes(1, 64, 4096):
                    if tokens >= adapters:
                        at = f"{name} r={rank} A={adapters} T={tokens}"
                        yield Planned("add_deltas", at, functools.partial(_added, plan, layer, rank, adapters, tokens))


def _added(plan: Plan, layer: tuple[int, tuple[int, ...]], rank: int, adapters: int, tokens: int) -> Case:
    """y is changed in place, so that additions pile up over the calls, which takes the same time."""
    columns, widths = layer
    size = adapters * rank * (len(widths) * columns + sum(widths)) * 2
    nbytes = size + 2 * tokens * (columns + 2 * sum(widths))
    starts = np.linspace(0, tokens, adapters + 1).astype(np.int64)

    def made() -> tuple[torch.Tensor, torch.Tensor, list[list[tuple[torch.Tensor, torch.Tensor]]]]:
        pairs = [
            [(plan.normal(rank, columns) / columns**0.5, plan.normal(width, rank) / rank**0.5) for width in widths]
            for _ in range(adapters)
        ]
        return plan.normal(tokens, sum(widths)), plan.normal(tokens, columns), pairs

    inputs = plan.copies(nbytes, made)
    first, x, pairs = inputs[0][0].clone(), *inputs[0][1:]

    def wanted() -> torch.Tensor:
        y = first.float()
        for own, begin, end in zip(pairs, starts[:-1], starts[1:], strict=True):
            some = x[begin:end].float()
            parts = [((some @ a.float().T) * 0.5).to(BF16).float() @ b.float().T for a, b in own]
            y[begin:end] += torch.cat(parts, 1)
        return y

    calls = [_call(plan, starts, *each) for each in inputs]
    flops = 2 * tokens * rank * (len(widths) * columns + sum(widths))
    return Case(calls, wanted, nbytes, flops, tolerance=8e-3)


def _call(
    plan: Plan,
    starts: np.ndarray,
    y: torch.Tensor,
    x: torch.Tensor,
    pairs: list[list[tuple[torch.Tensor, torch.Tensor]]],
) -> functools.partial[torch.Tensor]:
    """What is called: the launches on a GPU, else torch."""
    if plan.device != "cuda":
        return functools.partial(_in_torch, starts, y, x, pairs)
    from candle_vllm.core.kernels.lora.triton import Blocks, Slots, wide_block

    widths = [b.shape[0] for _, b in pairs[0]]
    addresses = [[[a.data_ptr(), b.data_ptr(), 0, 0] for a, b in own] for own in pairs]
    shape, rank = (len(pairs), len(widths)), pairs[0][0][0].shape[0]
    begins = np.concatenate(([0], np.cumsum(widths[:-1])))
    columns = torch.tensor(np.stack([begins, widths], 1), dtype=torch.int32, device=plan.device)
    slots = Slots(
        torch.tensor(addresses, device=plan.device),
        torch.full(shape, rank, dtype=torch.int32, device=plan.device),
        torch.full(shape, 0.5, device=plan.device),
        columns,
        max(widths),
        rank,
    )
    most = wide_block(x.device) if np.diff(starts).max() > NARROW else NARROW
    table = torch.from_numpy(block_table(starts.tolist(), list(range(len(pairs))), most)).to(plan.device)
    rows = torch.arange(len(x), dtype=torch.int32, device=plan.device)
    blocks = Blocks(table, rows, torch.ones(len(x), device=plan.device), most)
    return functools.partial(_launched, y, x, slots, blocks, pairs)


def _launched(y: torch.Tensor, x: torch.Tensor, slots: object, blocks: object, kept: object) -> torch.Tensor:
    from candle_vllm.core.kernels.lora.triton import add_deltas

    del kept  # what the addresses are those of
    add_deltas(y, x, slots, blocks)  # type: ignore[arg-type]
    return y


def _in_torch(
    starts: np.ndarray, y: torch.Tensor, x: torch.Tensor, pairs: list[list[tuple[torch.Tensor, torch.Tensor]]]
) -> torch.Tensor:
    for own, begin, end in zip(pairs, starts[:-1], starts[1:], strict=True):
        y[begin:end] += torch.cat([((x[begin:end] @ a.T) * 0.5) @ b.T for a, b in own], 1)
    return y
