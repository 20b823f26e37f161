# SPDX-License-Identifier: MIT
"""Forms of the kernels of `sampling/triton_edit` that are compiled ahead of time."""

from __future__ import annotations

from candle_vllm.core.kernels.sampling.triton_edit import bias_kernel, mask_and_penalise_kernel, note_kernel
from packages.core.tests.kernels.triton.building import Build

_PENALTY_TYPES = {"count_rows": "*i32", "counts": "*i32", "penalties": "*fp64"}

_MASK_TYPES = {"mask_rows": "*i32", "masks": "*i32"}


def _build(masks: bool, counts: bool) -> Build:
    arguments = {"logits": "*fp32", "row_stride": "i32", "V": "i32", "W": "i32"}
    constants: dict[str, bool | None] = {"MASKS": masks, "COUNTS": counts}
    for there, types in ((masks, _MASK_TYPES), (counts, _PENALTY_TYPES)):
        arguments |= types if there else {}
        constants |= {} if there else dict.fromkeys(types)
    label = "-".join(name for name, there in (("masks", masks), ("counts", counts)) if there)
    return Build(mask_and_penalise_kernel, arguments, constants, aligned=("row_stride", "V"), label=label)


FORMS = (
    Build(bias_kernel, {"logits": "*fp32", "bias_ids": "*i32", "bias": "*fp32", "row_stride": "i32", "N": "i32"}),
    _build(True, True),
    _build(True, False),
    _build(False, True),
    Build(note_kernel, {"counts": "*i32", "count_rows": "*i32", "token_ids": "*i64", "R": "i32", "V": "i32"}),
)
