# SPDX-License-Identifier: MIT
"""Sampling: sample one token per row of a batch's logits, compute ranks and log-probabilities, and edit logits.

Contract: R rows of V logits in float32, one row for each token to sample. The parameters of a row are five float64
numbers, in the order of `Control`. Rules of `draw`, the sampling function:

  - the row's weights are exp((logit - largest logit) / temperature), so that the largest is 1; temperature 0 is greedy:
    the largest logit's id, the lowest among equals;
  - min_p keeps weights of at least `min_p`;
  - top_k keeps every logit that is at least the k-th largest, so all ties with the k-th are kept (as in vLLM);
  - top_p visits the tokens in descending order of weight, equal ones in ascending order of id, and keeps tokens until
    their mass, the sum of their weights, reaches top_p * (the mass of the tokens that min_p and top_k kept); the first
    token is always kept;
  - the sampled token is the first, in order of id, at which the cumulative kept weight exceeds uniform * kept mass. A
    token of weight 0 is never sampled;
  - a row's result does not depend on the other rows, bit for bit.

`reference.py` implements the rules in torch; its `draw` runs on any device. `cpu.py` is compiled; it is used on the CPU
if it is precompiled or Numba is installed. On GPUs, `triton_draw.py` samples tokens, `triton_stand.py` finds ranks,
`triton_edit.py` edits logits, and `triton_chain.py` is llama.cpp's chain.

The functions `*_tensors` and `note_tokens` take and return tensors on the logits' device. They never wait for a GPU, so
that a step that calls them can be captured.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.cpu_runtime.kernel_cache import can_compile
from candle_vllm.core.kernels.cpu_runtime.operation import (
    StepNumber,
    address_of,
    c_function,
    is_coming,
    operation,
    plan_row,
)
from candle_vllm.core.kernels.dispatch import on_gpu
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.sampling.chain import CHAIN, REPEATS
from candle_vllm.core.kernels.sampling.contract import (
    Adjustment,
    Control,
    DeviceEdits,
    DeviceStanding,
    DrawArguments,
    Standing,
    workspace_bytes,
)

if TYPE_CHECKING:
    import torch

    from candle_vllm.core.kernels.cpu_runtime.recorder import StepArrays
    from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam


# The compiled functions, and their numbers of arguments.
_DRAW, _STAND, _ADJUST = _FUNCTIONS = (
    ("sampling.cpu:draw_rows", 3),
    ("sampling.cpu:stand", 11),
    ("sampling.cpu:adjust", 15),
)
CODE, RARE_CODE = (_DRAW[0],), (_STAND[0], _ADJUST[0], CHAIN[0], REPEATS[0])
"""Functions that every request uses, and functions for log-probabilities, penalties, masks, llama.cpp's samplers."""


def prepare() -> None:
    """Compile or load `draw`, `stand` and `adjust` for the CPU, unless a second process still compiles them."""
    if can_compile():
        for function in _FUNCTIONS:
            if not is_coming(function[0]):
                c_function(*function)


def host_rows(logits: Value) -> NDArray[np.float32] | None:
    """Return logits, uncopied, as an array for the compiled functions; None if these functions cannot read them."""
    if not can_compile():
        return None
    if isinstance(logits, np.ndarray):
        assert logits.dtype == np.float32
        return logits
    return logits.numpy() if logits.device.type == "cpu" else None


def draw(logits: Value, controls: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Sample one token per row.

    Args:
        logits: [R, V] float32, each row contiguous, a tensor on any device, or an array if `can_compile()`; unchanged.
        controls: [R, 5] float64, contiguous, see `Control`.

    Returns:
        [R] int64 ids and [R] float32 largest logits, NaN for a row with a NaN. The id of a row whose largest logit is
        not finite is undefined.
    """
    assert logits.shape[0] == controls.shape[0]
    host = host_rows(logits)
    if host is not None:
        return RowDraw(host, np.zeros(StepNumber.COUNT, np.int64))(controls)
    import torch

    from candle_vllm.core.kernels.sampling import reference

    if on_gpu(logits):
        ids, largest = draw_tensors(logits, torch.as_tensor(controls, device=logits.device), *asks(controls))
        both = torch.stack((ids.double(), largest.double())).cpu().numpy()
        return both[0].astype(np.int64), both[1].astype(np.float32)
    return reference.draw(logits, controls)


class RowDraw:
    """`draw` for logits in a fixed buffer, computed by the threads of a team.

    Attributes:
        plan: the plan row of this operation; a recorded plan may contain it, to sample from the plan's logits.
        controls: [N, 5] parameters that the operation reads; N is the maximum number of sampled rows.
        ids, largest: results of N rows, `ids` in the arrays of `step`; -1 if the row's largest logit is not finite.

    Args:
        logits: [rows, V], each row contiguous; N is the number of rows, at most the sequences of `step`.
        numbers: the step's numbers, by `StepNumber`.
        team: the threads; None to use only the caller's thread.
        step: arrays of the step that computed the logits, or None. Each run of the operation prepares them for the next
            step, whose input is the sampled tokens: it writes ids, and increments positions, slots and context lengths.
    """

    def __init__(
        self,
        logits: NDArray[np.float32],
        numbers: NDArray[np.int64],
        team: ThreadTeam | None = None,
        step: StepArrays | None = None,
    ) -> None:
        (rows, vocabulary), threads = logits.shape, 1 if team is None else team.threads
        work_bytes = -(-workspace_bytes(vocabulary) // 64) * 64
        work = np.empty(threads * work_bytes, np.uint8)
        if step is not None:
            rows = min(rows, len(step.context_lens))  # the other rows are not sampled
        self.controls = np.empty((rows, 5))
        self.ids = np.empty(rows, np.int64) if step is None else step.token_ids
        self.largest = np.empty(rows, np.float32)
        counted = (0, 0, 0) if step is None else tuple(map(address_of, (step.positions, step.slots, step.context_lens)))
        self._numbers, self._team, self._kept = numbers, team, (logits, work)
        arguments = DrawArguments(
            logits=address_of(logits),
            row_bytes=logits.strides[0],
            vocabulary=vocabulary,
            controls=address_of(self.controls),
            work=address_of(work),
            work_bytes=work_bytes,
            chosen=address_of(self.ids),
            largest=address_of(self.largest),
            positions=counted[0],
            slots=counted[1],
            context_lens=counted[2],
        )
        self.plan = np.array(plan_row(operation(_DRAW[0]), address_of(numbers), arguments), np.int64)

    def __call__(self, controls: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Sample as `draw` does for the first `len(controls)` rows; the results are valid until the next call."""
        count = len(controls)
        self.controls[:count] = controls
        self._numbers[StepNumber.LOGIT_ROWS] = count
        if self._team is None or count == 1:
            c_function(*_DRAW)(address_of(self.plan), 0, 1)
        else:
            self._team.run(self.plan, 1)
        return self.ids[:count], self.largest[:count]


def stand(logits: Value, token_ids: NDArray[np.int64], tops: NDArray[np.int64]) -> Standing:
    """Compute ranks and log-probability offsets of tokens, and the ids of each row's largest logits.

    Args:
        logits: [R, V] float32, rows contiguous with finite maxima; a CPU tensor, or an array if `can_compile()`.
        token_ids: [R] below V.
        tops: [R] numbers of largest logits whose ids are returned.
    """
    host = host_rows(logits)
    if host is None:
        from candle_vllm.core.kernels.sampling import reference

        return Standing(*reference.stand(logits, token_ids, tops))
    (rows, size), work = host.shape, np.empty(workspace_bytes(host.shape[1]), np.uint8)
    offsets, ranks = np.empty(rows, np.float64), np.empty(rows, np.int64)
    top_ids = np.empty((rows, int(tops.max(initial=0))), np.int64)
    asked = (address_of(token_ids), address_of(tops))
    written = (address_of(work), address_of(offsets), address_of(ranks), *_place(top_ids, top_ids.shape[1]))
    c_function(*_STAND)(address_of(host), host.strides[0], rows, size, *asked, *written)
    return Standing(offsets, ranks, top_ids)


def adjust(row: NDArray[np.float32], adjustment: Adjustment) -> None:
    """Edit one row of V logits in place; requires `can_compile()`."""
    a = adjustment
    allowed = a.forbidden if a.allowed is None else a.allowed
    ids = (*_place(allowed), *_place(a.forbidden))
    bias, seen = (address_of(a.bias_ids), *_place(a.bias)), (address_of(a.seen_ids), *_place(a.counts))
    penalties = np.array(a.penalties, np.float64)
    c_function(*_ADJUST)(*_place(row), a.masked, a.allowed is not None, *ids, *bias, *seen, address_of(penalties))


def _place(array: np.ndarray, size: int | None = None) -> tuple[int, int]:
    """Return the address and the length of a contiguous array."""
    assert array.flags.c_contiguous
    return address_of(array), len(array) if size is None else size


def asks(controls: NDArray[np.float64]) -> tuple[bool, bool]:
    """Return `random`, `search` of `draw_tensors`: whether a row is not greedy, and whether one has top_k or top_p."""
    drawn = controls[controls[:, Control.TEMPERATURE] > 0]
    return bool(len(drawn)), bool((drawn[:, Control.TOP_K] > 0).any() or (drawn[:, Control.TOP_P] < 1).any())


def draw_tensors(
    logits: torch.Tensor, controls: torch.Tensor, random: bool = True, search: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `draw` does, without waiting for the device; V is at most 524,288.

    The id of a row whose largest logit is not finite is 0.

    Args:
        random: may be False, which saves kernel launches, if every temperature is 0.
        search: may be False, which saves a kernel launch and memory, if no row has top_k or top_p.
    """
    if on_gpu(logits):
        from candle_vllm.core.kernels.sampling import triton_draw

        return triton_draw.draw(logits, controls, random=random, search=search)
    import torch

    from candle_vllm.core.kernels.sampling import reference

    ids, largest = reference.draw(logits, controls.numpy())
    peaks = torch.from_numpy(largest)
    return torch.from_numpy(ids).masked_fill(~peaks.isfinite(), 0), peaks


def stand_tensors(logits: torch.Tensor, token_ids: torch.Tensor, tops: torch.Tensor, most: int) -> DeviceStanding:
    """Do what `stand` does, without waiting for the device; V is at most 524,288.

    `most`, the width of the result, is at least every number in `tops`.
    """
    if on_gpu(logits):
        from candle_vllm.core.kernels.sampling import triton_stand

        return triton_stand.stand(logits, token_ids, tops, most)
    import torch

    from candle_vllm.core.kernels.sampling import reference

    offsets, ranks, named = (torch.from_numpy(x) for x in reference.stand(logits, token_ids.numpy(), tops.numpy()))
    top_ids = torch.nn.functional.pad(named, (0, most - named.shape[1]), value=-1)
    top_logits = logits.gather(1, top_ids.clamp(min=0)).masked_fill(top_ids < 0, -torch.inf)
    return DeviceStanding(offsets, ranks, logits.gather(1, token_ids.unsqueeze(1)).squeeze(1), top_ids, top_logits)


def edit_tensors(logits: torch.Tensor, edits: DeviceEdits) -> None:
    """Edit [R, V] float32 logits in place, without waiting for the device.

    The order is: bias, masks, penalties. A masked logit that is NaN or +inf becomes NaN. The arithmetic of the
    penalties is float64; a finite logit stays finite or becomes -inf.
    """
    if on_gpu(logits):
        from candle_vllm.core.kernels.sampling import triton_edit

        triton_edit.edit(logits, edits)
        return
    from candle_vllm.core.kernels.sampling import reference

    if edits.bias_ids is not None and edits.bias is not None:
        reference.add_bias(logits, edits.bias_ids, edits.bias)
    if edits.mask_rows is not None and edits.masks is not None:
        reference.mask(logits, edits.mask_rows, edits.masks)
    if edits.count_rows is not None and edits.counts is not None and edits.penalties is not None:
        reference.penalise(logits, edits.count_rows, edits.counts, edits.penalties)


def narrow_tensors(logits: torch.Tensor, rows: torch.Tensor, links: torch.Tensor) -> None:
    """Apply llama.cpp's sampler chain in place (see `chain.py`), without waiting for the device.

    Args:
        logits: [R, V] float32, each row contiguous, V up to 524,288.
        rows: [N] int64, rows with a chain.
        links: [N, len(Link)] float64, contiguous.
    """
    if on_gpu(logits):
        from candle_vllm.core.kernels.sampling import triton_chain

        triton_chain.narrow(logits, rows, links)
        return
    import torch

    from candle_vllm.core.kernels.sampling.chain import narrow_in_numpy

    for row, numbers in zip(rows.tolist(), links.numpy()):
        there = logits[row].numpy().copy()
        narrow_in_numpy(there, numbers)
        logits[row] = torch.from_numpy(there)


def surprise_tensors(
    logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, temperatures: torch.Tensor
) -> torch.Tensor:
    """Return the surprise of tokens in bits, [N] float64, among the tokens that the chain left; 0 at temperature 0.

    Args:
        logits: [R, V] float32, from which the tokens were sampled.
        rows: [N] int64.
        token_ids: [N] int64 below V.
        temperatures: [N] float64.
    """
    kept, hot = logits[rows].double(), temperatures.clamp(min=1e-5).unsqueeze(1)
    chosen = kept.gather(1, token_ids.unsqueeze(1))
    bits = ((kept / hot).logsumexp(1) - (chosen / hot).squeeze(1)) / math.log(2)
    return bits.masked_fill(temperatures < 1e-5, 0.0)


def note_tokens(counts: torch.Tensor, count_rows: torch.Tensor, token_ids: torch.Tensor) -> None:
    """Count one more occurrence of each row's token in the output, in place.

    Args:
        counts: [S, V] int32, see `DeviceEdits`.
        count_rows: [R] int32, different for each counted row; -1 for a row that is not counted.
        token_ids: [R] int64; ids below 0, and from V on, are not counted.
    """
    if on_gpu(counts):
        from candle_vllm.core.kernels.sampling import triton_edit

        triton_edit.note(counts, count_rows, token_ids)
        return
    from candle_vllm.core.kernels.sampling import reference

    reference.note(counts, count_rows, token_ids)
