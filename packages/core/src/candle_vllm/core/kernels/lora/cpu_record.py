# SPDX-License-Identifier: MIT
"""Record the operations of adapters on the CPU: `shrink` before a product, `expand` around it.

`shrink` reads float32 rows of the input, which are written together with the rows for the model's matrices. `expand`
calls the operation of the model's own product and adds to the product. No barrier is between `shrink` and `expand`;
`begin` needs one if the input was converted before. If an adapter needs the model's product separately
(`PackedAdapter.apart`), the product is written to separate memory, and `expand` copies it to the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from candle_vllm.core.kernels.activation_rows import RowForm
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of, operation
from candle_vllm.core.kernels.cpu_runtime.recorder import Buffer, aligned, row_stride
from candle_vllm.core.kernels.lora import layout as lay

if TYPE_CHECKING:
    from candle_vllm.core.kernels.cpu_runtime.matrices import Inputs
    from candle_vllm.core.kernels.cpu_runtime.operation import LinearArguments
    from candle_vllm.core.kernels.cpu_runtime.recorder import EntryArrays, Recorder
    from candle_vllm.core.kernels.lora import Place
    from candle_vllm.core.kernels.moe.plan import Pairs, Results


INPUT_FORM = RowForm.F32
"""Format in which adapters of all types read their input."""


class Joining:
    """Recorder of adapters at one adapter site of a plan; its memory lives as long as the object.

    Args:
        rows_from: the `StepNumber` that is the number of rows that the layer computes.

    Attributes:
        inputs: rows that `shrink` reads, in `INPUT_FORM`; None for a table that is looked up.
    """

    def __init__(self, recorder: Recorder, place: Place, rows_from: StepNumber = StepNumber.TOKENS) -> None:
        self._recorder, self._place, self._rows_from = recorder, place, rows_from
        wanted = rows_from is StepNumber.LOGIT_ROWS
        self._entries: EntryArrays = recorder.logit_entries if wanted else recorder.entries
        self._form, self._isa = lay.NumberForm[recorder.limits.adapter_dtype], recorder.isa
        size = lay.BLOCK_BYTES * lay.most_blocks(lay.filled(recorder.limits.adapter_rank) * len(place.parts))
        self._sums = recorder.memory(recorder.limits.row_adapters * size, np.uint8)
        self.inputs: Inputs | None = None
        self._done = self._begins = 0
        self._common = {
            "place": place.number,
            "groups_from": StepNumber.LOGIT_ADAPTERS if wanted else StepNumber.ADAPTERS,
            "starts": address_of(self._entries.starts),
            "tables": address_of(self._entries.tables),
            "x": 0,
            "x_bytes": 0,
            "h": address_of(self._sums),
            "h_bytes": size,
            "rows": address_of(self._entries.rows),
        }

    def begin(self, *, barrier: bool) -> None:
        """Record `begin`, which must end before `shrink` begins; `barrier`: False if an operation between
        them has one."""
        done = aligned(lay.DONE_BYTES * self._recorder.limits.threads, np.uint8)
        self._done = self._recorder.keep_array(done)
        self._recorder.add(operation("lora.cpu_shrink:begin"), lay.BeginArguments(self._done), barrier=barrier)

    def shrink(self) -> None:
        """Record x A^T of `inputs`, without a barrier after it."""
        assert self.inputs is not None
        self._common |= {**self.inputs.arguments, "done": self._done}
        self._begins = len(self._recorder.plan)
        self._recorder.add(
            operation("lora.cpu_shrink:make_shrink", self._form, self._isa),
            lay.ShrinkArguments(**self._common),
            barrier=False,
        )

    def look_up(self, numbers: int) -> None:
        """Record the lookup of rows of B as the sums of a table; `numbers` is the address of the row numbers."""
        arguments = lay.ShrinkArguments(**self._common | {"x": numbers})
        self._recorder.add(operation("lora.cpu_tables:make_lookup", self._form.whole), arguments, barrier=False)

    def own(self, width: int) -> Buffer:
        """Return memory for the model's own products."""
        if self._rows_from is StepNumber.TOKENS:
            return self._recorder.buffer(width)
        stride = row_stride(width)
        made = aligned(self._recorder.limits.logit_rows * stride, np.float32)
        self._recorder.keep_array(made)
        return Buffer(made, width, stride)

    def expand(
        self,
        target: Buffer,
        own: Buffer,
        columns: tuple[int, int],
        product: tuple[int, LinearArguments] | None = None,
        *,
        barrier: bool = True,
        **how: Any,
    ) -> None:
        """Record `expand`, which adds adapters to the model's products; these are in `own`, or already in `target`.

        Args:
            target, own: the result, and the model's products.
            columns: first column and number of columns.
            product: the operation that computes the model's products, and its arguments; None if already computed.
            barrier: as for `Recorder.add`.
            how: values of `_arguments` that differ from the defaults.
        """
        if product is not None:
            how["beside"] = self._recorder.beside()
            product = product[0], product[1]._replace(beside=how["beside"])
        arguments = self._arguments(target, own, columns, **how)
        self._recorder.add(
            operation("lora.cpu_expand:make_expand", self._form, self._isa), arguments, barrier=barrier, inner=product
        )

    def replace(self, target: Buffer, own: Buffer, **how: Any) -> None:
        """Record the replacement of a table's rows, or of products with them, by an adapter's, after `expand`."""
        arguments = self._arguments(target, own, (0, target.width), **how)
        self._recorder.add(operation("lora.cpu_tables:replace"), arguments)

    def _arguments(
        self,
        target: Buffer,
        own: Buffer,
        columns: tuple[int, int],
        *,
        bias: int = 0,
        accumulate: bool = False,
        numbers: int = 0,
        beside: int = 0,
    ) -> lay.ExpandArguments:
        first, count = columns
        return lay.ExpandArguments(
            **self._common,
            scales=address_of(self._entries.scales),
            out=address_of(target.array),
            row_bytes=4 * target.stride,
            columns=count,
            first=first,
            base=address_of(own.array) if own is not target else 0,
            base_bytes=4 * own.stride,
            rows_from=self._rows_from,
            accumulate=accumulate,
            bias=bias,
            numbers=numbers,
            inputs=self._place.columns,
            beside=beside,
            back=8 * (len(self._recorder.plan) - self._begins) if self._done else 0,
        )


def record_experts(
    recorder: Recorder, place: Place, inputs: Inputs, pairs: Pairs, results: Results, *, by_place: bool
) -> None:
    """Record the terms that adapters add to experts' results. With `by_place`, `inputs` has a row for each place of a
    pair, else for each token."""
    form, count = lay.NumberForm[recorder.limits.adapter_dtype], pairs.top_k
    parts = len(place.parts) // place.experts
    size = lay.BLOCK_BYTES * lay.most_blocks(lay.filled(recorder.limits.adapter_rank) * parts) * count
    sums = recorder.memory(recorder.limits.row_adapters * size, np.uint8)  # reused after these two operations
    common = {
        "place": place.number,
        "groups_from": StepNumber.ADAPTERS,
        "starts": address_of(recorder.entries.starts),
        "tables": address_of(recorder.entries.tables),
        "h": address_of(sums),
        "h_bytes": size,
        **inputs.arguments,
        "rows": address_of(recorder.entries.rows),
        "places": address_of(pairs.places),
        "experts": address_of(pairs.experts),
        "top_k": count,
    }
    shrink = lay.ShrinkArguments(**common, by_place=by_place)
    recorder.add(operation("lora.cpu_experts:make_shrink", form, recorder.isa), shrink)
    expand = lay.ExpandArguments(
        **common,
        scales=address_of(recorder.entries.scales),
        out=address_of(results.rows),
        row_bytes=4 * results.stride,
        columns=results.width,
    )
    recorder.add(operation("lora.cpu_experts:make_expand", form, recorder.isa), expand)
