# SPDX-License-Identifier: MIT
"""Linear layers: a model's products with weight matrices, on every backend, recorded or op by op.

Several stored matrices with the same input are one product (q, k, v; gate, up). A layer's experts have one `Linear` for
gate and up and one for down; the output layer is a `Linear` too, but `HeadMatrices` are not.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from candle_vllm.core.kernels.collectives import Sums
from candle_vllm.core.kernels.lora import Place
from candle_vllm.core.kernels.moe import Activation, expert_linear
from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.layers.parameters import MatrixParameter, Placement, TensorParameter
from candle_vllm.core.loading.weights import Parameter

if TYPE_CHECKING:
    from candle_vllm.core.kernels.lora.reference import EagerAdapters
    from candle_vllm.core.kernels.matrices import DeviceMatrix, Piece
    from candle_vllm.core.kernels.offloading import HostWeights

logger = logging.getLogger(__name__)


class Linear:
    """y [T, O] = x [T, I] W^T + b; for experts, W is [X, O, I], b is [X, O], and y has a row for each pair.

    Args:
        in_features: I.
        out_features: O, or the sizes of the named matrices that are stacked into O, in order.
        bias: whether there is a bias; experts' biases are fp32.
        kept: whether small floats, and integer codes in groups except those of experts, may stay in their format.
        experts: X, whose parameters are "{name}.{e}.weight"; 0 for a layer without experts.
        first: index of this rank's first expert.
        sections: see `Parameter.sections`.

    Attributes:
        pieces: the loaded matrices, by the prefix of their parameters' names.
        place: adapter site; None for a layer that adapters cannot change.
        adapters: adapters of layers that run op by op; see `number_places`.
        collective: ranks over which results are summed, if each has a part of the inputs; None if this rank has all
            inputs, and for experts, whose results are summed after they are combined.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Mapping[str, int],
        placement: Placement,
        *,
        bias: bool = False,
        kept: bool = True,
        experts: int = 0,
        sections: int = 1,
        first: int = 0,
    ) -> None:
        sizes = {"": out_features} if isinstance(out_features, int) else dict(out_features)
        self._placement, self._kept, self._experts, self._sections = placement, kept, experts, sections
        self.in_features = in_features
        ends = list(itertools.accumulate(sizes.values()))
        rows = {name: slice(end - sizes[name], end) for name, end in zip(sizes, ends)}
        self._places: dict[str, tuple[Any, slice]]  # of each part: its expert and rows in the bias
        if experts:
            self._places = {f"{name}.{first + e}.": (e, rows[name]) for e in range(experts) for name in sizes}
        else:
            self._places = {f"{name}." if name else "": (..., rows[name]) for name in sizes}
        shape, dtype = ((experts, ends[-1]), "F32") if experts else ((ends[-1],), placement.dtype)
        self.bias = placement.empty(*shape, dtype=dtype) if bias else None
        self.pieces: dict[str, Piece] = {}
        self.place: Place | None = None
        self.adapters: EagerAdapters | None = None
        self.collective: Sums | None = None
        self._kept_in: HostWeights | None = None

    def keep_in(self, memory: HostWeights) -> None:
        """Keep the matrices in `memory` once they are loaded; in recorded steps they are in main memory anyway."""
        if not self._placement.recorded:
            self._kept_in = memory

    def __call__(self, x: Value, pairs: Any = None, activation: Activation | None = None) -> Value:
        """Compute y; for experts, the results of `pairs`, with an activation act(gate) * up, see `kernels/moe`.

        Op by op, x is converted to the type of the matrices first, and y has this type.

        The order of operations is:

        1. y = x W^T. Kernels may quantise x internally.
        2. An adapter adds its product s (x A^T) B^T to y, with the unquantised x.
        3. If W is a shard with a part of the inputs, y is summed over the shards.
        4. The bias is added, once; the activation follows.

        But kernels may add the bias in 1, before the sums are stored; 2 then follows the bias. With shards only one
        rank has the bias, and the others have biases of 0.
        """
        invariant = self._placement.invariant
        if pairs is None:
            if isinstance(x, Recorded):
                return x.linear(self.matrices, self.bias, self.place)
            from candle_vllm.core.kernels.matrices import multiply

            y = multiply(x.to(self._torch_dtype), self.matrices, self.bias, invariant=invariant)
            y = y if self.adapters is None else self.adapters.add(self.place, x, y, self.bias)
            return y if self.collective is None else self.collective.sum(y)
        lora = {"place": self.place, "adapters": self.adapters}
        return expert_linear(x, self.matrices, pairs, self.bias, activation=activation, invariant=invariant, **lora)

    def number_place(self, number: int, *, lookup: bool = False) -> Place:
        """Return the layer's adapter site, with index `number` in its model."""
        parts = {
            prefix: (expert if self._experts else 0, rows.start, rows.stop)
            for prefix, (expert, rows) in self._places.items()
        }
        return Place(number, self.in_features, parts, self._experts, lookup)

    @cached_property
    def matrices(self) -> list[Any]:
        """Return the matrices; without compiled CPU kernels, fuse them if possible, and empty `pieces`."""
        pieces = [self.pieces[name] for name in self._places]
        if self._placement.weight_memory is not None:
            each = len(pieces) // max(1, self._experts)
            return [pieces[n::each] for n in range(each)] if self._experts else pieces
        from candle_vllm.core.kernels.matrices import joined

        self.pieces.clear()
        return [self._one(pieces)] if self._experts else joined(pieces)

    @cached_property
    def _torch_dtype(self) -> Any:
        return self._placement.torch_dtype

    def finish(self) -> None:
        assert self.matrices
        kept_in, self._kept_in = self._kept_in, None
        if kept_in is not None:
            kept_in.take(self.matrices)

    def _one(self, pieces: Sequence[DeviceMatrix]) -> DeviceMatrix:
        """Fuse all experts into one matrix: in their format if all have the same one, otherwise decoded."""
        from candle_vllm.core.kernels.matrices import TensorMatrix

        kinds = {piece.kind for piece in pieces}
        if len(kinds) > 1:
            logger.warning("experts of several types (%s) are decoded, which takes memory", ", ".join(sorted(kinds)))
            pieces = [TensorMatrix(piece.decoded(self._placement.torch_dtype)) for piece in pieces]
        return pieces[0].joined(pieces)

    def parameters(self) -> Mapping[str, Parameter]:
        """Return all parameters; those of a shard have fewer rows or columns, and get a part of the stored tensor."""
        backend = partial(self._placement.backend, groups=self._kept and not self._experts, floats=self._kept)
        found: dict[str, Parameter] = {}
        for prefix, (expert, rows) in self._places.items():
            shape = (rows.stop - rows.start, self.in_features)
            found[prefix + "weight"] = MatrixParameter(self.pieces, prefix, shape, backend, self._sections)
            if self.bias is not None:
                found[prefix + "bias"] = TensorParameter(self.bias[expert][rows])
        return found
