# SPDX-License-Identifier: MIT
"""What sampling is measured on: drawing, editing and standing at a large vocabulary. See `cases.py`."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from cases import Case, Plan, Planned

from candle_vllm.core.kernels import sampling
from candle_vllm.core.kernels.sampling import reference as sampling_reference


def sampling_cases(plan: Plan) -> Iterator[Planned]:
    """Drawing, editing and standing at a large vocabulary."""
    vocabulary = 1000 if plan.quick else 128256
    for rows in plan.sizes(1, 64, 256):
        at = f"V={vocabulary} R={rows}"
        for name, controls in _CONTROLS.items():
            yield Planned(f"draw, {name}", at, functools.partial(_draw, plan, rows, vocabulary, controls))
        yield Planned("edit", at, functools.partial(_edit, plan, rows, vocabulary))
        yield Planned("stand", at, functools.partial(_stand, plan, rows, vocabulary))


_CONTROLS = {  # temperature, min_p, top_k, top_p
    "greedy": (0.0, 0.0, 0, 1.0),
    "temperature": (0.8, 0.0, 0, 1.0),
    "top_k and top_p": (0.8, 0.0, 50, 0.95),
}


def _draw(plan: Plan, rows: int, vocabulary: int, settings: tuple[float, float, int, float]) -> Case:
    inputs = plan.copies(4 * rows * vocabulary, lambda: 3 * plan.normal(rows, vocabulary, dtype=torch.float32))
    controls = np.array([[*settings, (row + 0.5) / rows] for row in range(rows)])
    asks = sampling.asks(controls)
    device = torch.as_tensor(controls, device=plan.device)
    calls = [functools.partial(sampling.draw_tensors, logits, device, *asks) for logits in inputs]

    def wanted() -> tuple[torch.Tensor, ...]:
        found = sampling_reference.draw(inputs[0], controls)
        return tuple(torch.from_numpy(numbers).to(plan.device) for numbers in found)

    return Case(calls, wanted, 4 * rows * vocabulary, tolerance=1e-5)


def _edit(plan: Plan, rows: int, vocabulary: int) -> Case:
    """Bias, a mask and penalties in every row. The edits pile up over the calls, which takes the same time."""
    inputs = plan.copies(8 * rows * vocabulary, lambda: 3 * plan.normal(rows, vocabulary, dtype=torch.float32))
    numbers = torch.arange(rows, dtype=torch.int32, device=plan.device)
    bias_ids = torch.randperm(vocabulary, device=plan.device)[:16].int().repeat(rows, 1)
    bias = torch.ones(rows, 16, device=plan.device)
    masks = torch.randint(-(1 << 31), 1 << 31, (rows, -(-vocabulary // 32)), device=plan.device).int()
    counts = torch.randint(0, 3, (rows, vocabulary), dtype=torch.int32, device=plan.device)
    penalties = torch.tensor([[1.1, 0.1, 0.2]], dtype=torch.float64, device=plan.device).repeat(rows, 1)
    edits = sampling.DeviceEdits(bias_ids, bias, numbers, masks, numbers, counts, penalties)

    def edit(logits: torch.Tensor) -> torch.Tensor:
        sampling.edit_tensors(logits, edits)
        return logits

    def wanted() -> torch.Tensor:
        logits = first.clone()
        sampling_reference.add_bias(logits, bias_ids, bias)
        sampling_reference.mask(logits, numbers, masks)
        sampling_reference.penalise(logits, numbers, counts, penalties)
        return logits

    first = inputs[0].clone()
    calls = [functools.partial(edit, logits) for logits in inputs]
    return Case(calls, wanted, rows * (8 * vocabulary + 4 * vocabulary + vocabulary // 8), tolerance=1e-5)


def _stand(plan: Plan, rows: int, vocabulary: int) -> Case:
    inputs = plan.copies(4 * rows * vocabulary, lambda: 3 * plan.normal(rows, vocabulary, dtype=torch.float32))
    ids = torch.randint(0, vocabulary, (rows,), device=plan.device)
    tops = torch.full((rows,), 5, dtype=torch.int64, device=plan.device)

    def stand(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = sampling.stand_tensors(logits, ids, tops, 5)
        return found.offsets, found.ranks, found.top_ids

    def wanted() -> tuple[torch.Tensor, ...]:
        found = sampling_reference.stand(inputs[0].cpu(), ids.cpu().numpy(), tops.cpu().numpy())
        return tuple(torch.from_numpy(numbers).to(plan.device) for numbers in found)

    return Case([functools.partial(stand, x) for x in inputs], wanted, 4 * rows * vocabulary, tolerance=1e-5)
