# SPDX-License-Identifier: MIT
"""What adapters add to products, by Triton: against the contract in fp64, at odd shapes and true ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from candle_vllm.core.kernels.lora import triton as kernel
from candle_vllm.core.kernels.lora.device import block_table
from candle_vllm.core.kernels.lora.layout import GPU_COLUMNS, GPU_FIELDS, GPU_RANKS

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}


@dataclasses.dataclass
class Part:
    """One adapter's part: A [r, K] and B [N, r], and what else there is."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    column_scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def padded(matrix: torch.Tensor, multiple: int, device: torch.device) -> torch.Tensor:
    width = -(-matrix.shape[1] // multiple) * multiple
    made = torch.zeros(matrix.shape[0], width, dtype=matrix.dtype)
    made[:, : matrix.shape[1]] = matrix
    return made.to(device)


def filled(table: NDArray[np.int32], length: int) -> NDArray[np.int32]:
    """With blocks that are not used."""
    made = np.zeros((3, length), np.int32)
    made[0] = -1
    made[:, : table.shape[1]] = table
    return made


def slots_of(
    adapters: Sequence[Sequence[Part | None]], widths: Sequence[int], device: torch.device
) -> tuple[kernel.Slots, list[torch.Tensor]]:
    """The table of some adapters, and the memory that it speaks of."""
    parts, kept = len(widths), list[torch.Tensor]()
    addresses = torch.zeros(len(adapters), parts, GPU_FIELDS, dtype=torch.int64)
    ranks, scales = torch.zeros(len(adapters), parts, dtype=torch.int32), torch.zeros(len(adapters), parts)
    for slot, own in enumerate(adapters):
        for place, part in enumerate(own):
            if part is None:
                continue
            c = part.column_scale
            b = part.b if c is None else (part.b.float() * c[:, None]).to(part.b.dtype)
            less = None if c is None else c - 1
            numbers = [padded(part.a, GPU_COLUMNS, device), padded(b, GPU_RANKS, device)]
            numbers += [other.to(device) if other is not None else None for other in (less, part.bias)]
            kept += [tensor for tensor in numbers if tensor is not None]
            addresses[slot, place] = torch.tensor([0 if n is None else n.data_ptr() for n in numbers])
            ranks[slot, place], scales[slot, place] = part.a.shape[0], part.scale
    begins = [sum(widths[:place]) for place in range(parts)]
    columns = torch.tensor(list(zip(begins, widths)), dtype=torch.int32)
    most = max(16, int(ranks.max()))
    tables = (tensor.to(device) for tensor in (addresses, ranks, scales, columns))
    return kernel.Slots(*tables, widest=max(widths), rank=most), kept


def expected(
    y: torch.Tensor,
    x: torch.Tensor,
    adapters: Sequence[Sequence[Part | None]],
    widths: Sequence[int],
    given: Sequence[tuple[int, int, float]],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The contract, row by row; `given` is of each entry the row, the slot and the weight."""
    wide = y.double().clone()
    for row, slot, weight in given:
        begin = 0
        for part, width in zip(adapters[slot], widths):
            columns = slice(begin, begin + width)
            begin += width
            if part is None:
                continue
            product = wide[row, columns] - (0 if bias is None else bias[columns].double())
            delta = part.scale * (part.b.double() @ (part.a.double() @ x[row].double()))
            if part.column_scale is not None:
                delta = delta * part.column_scale + product * (part.column_scale - 1)
            if part.bias is not None:
                delta = delta + part.bias
            wide[row, columns] += weight * delta
    return wide


@pytest.mark.one_of_each
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("columns", "widths", "most"), [(63, (40, 24, 24), 16), (1100, (130,), 64), (64, (64, 64), 16)]
)
def test_deltas(device: torch.device, dtype: torch.dtype, columns: int, widths: tuple[int, ...], most: int) -> None:
    """Adapters of several ranks, DoRA and biases among them; some rows have none, and keep their bits."""
    rows = 90
    x = random(rows, columns, seed=1, dtype=dtype)
    y = random(rows, sum(widths), seed=2, dtype=dtype)
    bias = random(sum(widths), seed=3, dtype=dtype)
    adapters: list[list[Part | None]] = []
    for number, rank in enumerate((1, 8, 40, 16)):
        own: list[Part | None] = []
        for place, width in enumerate(widths):
            seed = 100 * number + 10 * place
            a, b = random(rank, columns, seed=seed, dtype=dtype), random(width, rank, seed=seed + 1, dtype=dtype)
            part = Part(a / columns**0.5, b, 0.5 + number)
            if number == 2:
                part.column_scale, part.bias = 1 + random(width, seed=seed + 2) / 4, random(width, seed=seed + 3)
            own.append(None if number == 3 and place == 0 and len(widths) > 1 else part)
        adapters.append(own)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(4)).tolist()
    starts = [0, 1, 30, 47, 70]
    given = [
        (order[place], slot, 1.0 - 0.25 * slot) for slot in range(4) for place in range(starts[slot], starts[slot + 1])
    ]
    table = filled(block_table(starts, [0, 1, 2, 3], most), 12)
    blocks = kernel.Blocks(
        torch.from_numpy(table).to(device),
        torch.tensor([row for row, _, _ in given], dtype=torch.int32, device=device),
        torch.tensor([weight for *_, weight in given], device=device),
        most,
    )
    slots, kept = slots_of(adapters, widths, device)
    got = y.clone().to(device)
    kernel.add_deltas(got, x.to(device), slots, blocks, bias.to(device))
    got, wanted = got.cpu(), expected(y, x, adapters, widths, given, bias)
    assert kept
    without = order[70:]
    assert torch.equal(got[without], y[without])
    error = (got.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert float(error) <= TOLERANCE[dtype]


def test_a_row_is_what_it_is_alone(device: torch.device) -> None:
    """Whatever stands beside it in its block, and however many blocks there are."""
    x, y = random(20, 200, seed=1), random(20, 48, seed=2)
    part = Part(random(12, 200, seed=3), random(48, 12, seed=4), 2.0)
    slots, kept = slots_of([[part]], [48], device)

    def added(rows: list[int]) -> torch.Tensor:
        table = filled(block_table([0, len(rows)], [0], 16), 3)
        blocks = kernel.Blocks(
            torch.from_numpy(table).to(device),
            torch.tensor(rows, dtype=torch.int32, device=device),
            torch.ones(len(rows), device=device),
            16,
        )
        got = y.clone().to(device)
        kernel.add_deltas(got, x.to(device), slots, blocks)
        return got[rows].cpu()

    together = added(list(range(20)))
    assert kept
    for row in (0, 7, 19):
        assert torch.equal(added([row])[0], together[row])
