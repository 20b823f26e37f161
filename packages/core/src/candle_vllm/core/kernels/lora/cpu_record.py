"""Recording what adapters add to a product on the CPU: their rows of the input, `shrink`, and `expand` behind it.

`shrink` reads what the model's own product reads and waits for nothing, so both are one group of operations; `expand`
is a group of its own. Where a step has adapters with products apart (DoRA), the model's own goes to memory of its own,
and `expand` brings it to where it belongs.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from candle_vllm.core.kernels.activation_rows import RowForm
from candle_vllm.core.kernels.cpu_runtime.matrices import InputRows, Inputs, make_forms
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of
from candle_vllm.core.kernels.cpu_runtime.recorder import Buffer, aligned, row_stride
from candle_vllm.core.kernels.lora import layout as lay

if TYPE_CHECKING:
    from candle_vllm.core.kernels.cpu_runtime.recorder import EntryArrays, Recorder
    from candle_vllm.core.kernels.lora import Place
    from candle_vllm.core.kernels.moe.plan import Pairs, Results


def record_inputs(recorder: Recorder, source: InputRows, *, barrier: bool) -> Inputs:
    """Records the input of each entry, unquantised, of rows of the step or of those whose logits are wanted."""
    entries, counted = recorder.entries, StepNumber.ADAPTED
    if source.rows_from is StepNumber.LOGIT_ROWS:
        entries, counted = recorder.logit_entries, StepNumber.ADAPTED_LOGITS
    picked = dataclasses.replace(source, picked=address_of(entries.sources), rows_from=counted)
    form = RowForm[recorder.limits.adapter_dtype]
    return make_forms(recorder, [form], picked, copies=recorder.limits.row_adapters, barrier=barrier)[form]


class Joining:
    """What adapters do at a place of a plan.

    Args:
        recorder: of the plan.
        place: whose it is.
        inputs: of the entries; None where a table is looked up.
        rows_from: which rows of the step they are.
    """

    def __init__(
        self, recorder: Recorder, place: Place, inputs: Inputs | None, rows_from: StepNumber = StepNumber.TOKENS
    ) -> None:
        self._recorder, self._place, self._inputs, self._rows_from = recorder, place, inputs, rows_from
        wanted = rows_from is StepNumber.LOGIT_ROWS
        self._entries: EntryArrays = recorder.logit_entries if wanted else recorder.entries
        self._form, self._isa = RowForm[recorder.limits.adapter_dtype], recorder.isa
        size = lay.BLOCK_BYTES * lay.most_blocks(lay.filled(recorder.limits.adapter_rank) * len(place.parts))
        self._common = {
            "place": place.number,
            "groups_from": StepNumber.LOGIT_ADAPTERS if wanted else StepNumber.ADAPTERS,
            "starts": address_of(self._entries.starts),
            "tables": address_of(self._entries.tables),
            "h": recorder.sums(size),
            "h_bytes": size,
            **({"x": 0, "x_bytes": 0} if inputs is None else inputs.arguments),
        }

    def shrink(self) -> None:
        """Records x A^T; nothing waits behind it."""
        self._recorder.add(
            lay.shrink_operation(self._form, self._isa), lay.ShrinkArguments(**self._common), barrier=False
        )

    def look_up(self, numbers: int) -> None:
        """Records the same of a table whose rows are looked up by the step's `numbers`, an address."""
        arguments = lay.ShrinkArguments(**self._common | {"x": numbers}, rows=address_of(self._entries.sources))
        self._recorder.add(lay.lookup_operation(self._form), arguments, barrier=False)

    def own(self, width: int) -> Buffer:
        """Memory for the model's own products."""
        if self._rows_from is StepNumber.TOKENS:
            return self._recorder.buffer(width)
        stride = row_stride(width)
        made = aligned(self._recorder.limits.logit_rows * stride, np.float32)
        self._recorder.keep_array(made)
        return Buffer(made, width, stride)

    def expand(self, target: Buffer, own: Buffer, *, bias: int = 0, accumulate: bool = False, numbers: int = 0) -> None:
        """Records the sum with the model's products, which are in `own` or already in `target`."""
        apart = own is not target
        arguments = lay.ExpandArguments(
            **self._common,
            rows=address_of(self._entries.rows),
            scales=address_of(self._entries.scales),
            out=address_of(target.array),
            row_bytes=4 * target.stride,
            columns=target.width,
            base=address_of(own.array) if apart else 0,
            base_bytes=4 * own.stride,
            rows_from=self._rows_from,
            accumulate=accumulate,
            bias=bias,
            numbers=numbers,
            inputs=self._place.columns,
        )
        self._recorder.add(lay.expand_operation(self._form, self._isa), arguments)
        if apart and (numbers or self._rows_from is StepNumber.LOGIT_ROWS):
            self._recorder.add(lay.replace_operation(self._form), arguments)


def record_experts(
    recorder: Recorder, place: Place, inputs: Inputs, pairs: Pairs, results: Results, *, by_place: bool
) -> None:
    """Records what adapters add to experts' results, of inputs for each entry, or for each place of a pair."""
    form, count = RowForm[recorder.limits.adapter_dtype], pairs.top_k
    parts = len(place.parts) // place.experts
    size = lay.BLOCK_BYTES * lay.most_blocks(lay.filled(recorder.limits.adapter_rank) * parts) * count
    common = {
        "place": place.number,
        "groups_from": StepNumber.ADAPTERS,
        "starts": address_of(recorder.entries.starts),
        "tables": address_of(recorder.entries.tables),
        "h": recorder.sums(size),
        "h_bytes": size,
        **inputs.arguments,
        "rows": address_of(recorder.entries.rows),
        "places": address_of(pairs.places),
        "experts": address_of(pairs.experts),
        "top_k": count,
    }
    shrink = lay.ShrinkArguments(**common, by_place=by_place)
    recorder.add(lay.shrink_experts_operation(form, recorder.isa), shrink)
    expand = lay.ExpandArguments(
        **common,
        scales=address_of(recorder.entries.scales),
        out=address_of(results.rows),
        row_bytes=4 * results.stride,
        columns=results.width,
    )
    recorder.add(lay.expand_experts_operation(form, recorder.isa), expand)
