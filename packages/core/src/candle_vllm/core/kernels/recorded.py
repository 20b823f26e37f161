# SPDX-License-Identifier: MIT
"""Values that stand for the result of a kernel while a step is recorded.

When the layers run on `Recorded` values instead of tensors, every kernel writes an operation into a plan instead of
computing; later steps replay the plan. Kernels and layers only know this interface; what is recorded, and what is fused
on the way, is the business of `kernels/cpu_runtime/values.py`.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

# What flows through the layers: a torch.Tensor, or a Recorded while a step is recorded.
Value: TypeAlias = Any

Activation: TypeAlias = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "tanh"]
"""Without a gate, see `kernels/activation`."""

GateKind: TypeAlias = Literal["sigmoid", "silu", "gelu_tanh", "gelu", "softplus", "silu_7", "silu_16"]
"""Of a gate, see `kernels/silu_mul`."""

LIMITS: Mapping[str, float] = MappingProxyType({"silu_7": 7.0, "silu_16": 16.0})
"""Of both factors of a gated product, by its kind."""

Floats: TypeAlias = "NDArray[np.float32]"
Gates: TypeAlias = "tuple[Recorded, Recorded] | None"

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from candle_vllm.core.kernels.activation_rows import InputForm
    from candle_vllm.core.kernels.attention.rows import PagedCache
    from candle_vllm.core.kernels.delta_rule.layout import DeltaGates
    from candle_vllm.core.kernels.latent_attention.layout import LatentParts
    from candle_vllm.core.kernels.lora import Place
    from candle_vllm.core.kernels.moe import arguments as moe
    from candle_vllm.core.kernels.states import StateCache


class Matrix(Protocol):
    """A matrix [N, K] whose rows are interleaved, 16 in a tile: see `packed_linear`, `plain_linear`, `scaled_linear`.

    Attributes:
        rows, columns: N and K.
        kind: the layout, for its operations.
        data: uint8 [tiles, bytes of a tile].
        tile_bytes: of a tile.
        input_form: how it reads its input.
    """

    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def kind(self) -> enum.IntEnum: ...
    @property
    def data(self) -> np.ndarray: ...
    @property
    def tile_bytes(self) -> int: ...
    @property
    def input_form(self) -> InputForm: ...


LookUp: TypeAlias = Callable[[Any], Any]
"""Gives rows float32 [T, width] of numbers int64 [T]."""

RecordedPairs: TypeAlias = Any
"""What `Recorded.route` gives: the pairs of a step's tokens and their experts."""


class Recorded(ABC):
    """A float32 value [T, width], or [T, heads, size] after `unflatten`. T is known only when a step runs."""

    @abstractmethod
    def split(self, sizes: Sequence[int], dim: int) -> list[Recorded]:
        """Views of neighbouring columns."""

    @abstractmethod
    def unflatten(self, dim: int, sizes: Sequence[int]) -> Recorded:
        """The last dimension as heads."""

    @abstractmethod
    def flatten(self, start: int) -> Recorded:
        """The heads side by side again."""

    @abstractmethod
    def __add__(self, other: Recorded) -> Recorded:
        """The sum. `other` is a matrix's result, a table's rows or a norm; two of the first two are a result in turn.

        This value is changed in place; but a norm stays what it is, and the sum has memory of its own.
        """

    @abstractmethod
    def scaled(self, factor: float) -> Recorded:
        """Times a factor, without a cap as `kernels/scale_cap` has it; this value, or part, is changed in place."""

    @abstractmethod
    def clamped(self, low: float, high: float) -> Recorded:
        """See `kernels/scale_cap`: in place, so that earlier uses of this value must have been recorded."""

    @abstractmethod
    def beside(self, *others: Recorded) -> Recorded:
        """See `kernels/side_by_side`."""

    @abstractmethod
    def first_of_heads(self, size: int) -> Recorded:
        """See `kernels/side_by_side`."""

    @abstractmethod
    def rms_norm(self, weight: Floats, eps: float) -> Recorded:
        """See `kernels/rms_norm`."""

    @abstractmethod
    def layer_norm(self, weight: Floats, bias: Floats | None, eps: float) -> Recorded:
        """See `kernels/layer_norm`."""

    @abstractmethod
    def rotary(self, cos: Floats, sin: Floats) -> Recorded:
        """See `kernels/rotary`."""

    @abstractmethod
    def position_scale(self, table: Floats) -> Recorded:
        """See `kernels/position_scale`."""

    @abstractmethod
    def mixed(
        self, table: NDArray[np.float32], gates: Recorded | None, scale: NDArray[np.float32] | None, *, level: bool
    ) -> Recorded:
        """See `kernels/stream_mix`."""

    @abstractmethod
    def cut(self, deviations: float) -> None:
        """See `kernels/scale_cap`; in place, and nothing else may have read these columns."""

    @abstractmethod
    def short_conv(
        self, weight: Floats, bias: Floats | None, cache: StateCache, *, silu: bool, gates: Gates
    ) -> Recorded:
        """See `kernels/short_conv`; with gates, what this value stands in is changed."""

    @abstractmethod
    def delta_rule(
        self, *others: Recorded, gates: DeltaGates, cache: StateCache, scale: float, normed: bool
    ) -> Recorded:
        """See `kernels/delta_rule`; this value is q, `others` are k, v, a and b; what q and k stand in is changed."""

    @abstractmethod
    def gate_mul(self, kind: GateKind) -> Recorded:
        """See `kernels/silu_mul`."""

    @abstractmethod
    def xielu(self, numbers: Floats) -> Recorded:
        """See `models/apertus.py`; this value is changed."""

    @abstractmethod
    def gated(self, gate: Recorded, kind: GateKind) -> Recorded:
        """See `kernels/silu_mul`; this value is x, and is changed."""

    @abstractmethod
    def activation(self, kind: Activation) -> Recorded:
        """See `kernels/activation`."""

    @abstractmethod
    def linear(self, matrices: Sequence[Matrix], bias: Floats | None, place: Place | None = None) -> Recorded:
        """See `kernels/packed_linear`, `plain_linear` and `scaled_linear`; the matrices' results stand side by side.

        What adapters do at `place` is added, see `kernels/lora`.
        """

    @abstractmethod
    def route(self, routing: moe.Routing) -> RecordedPairs:
        """See `kernels/moe`; this value is the logits."""

    @abstractmethod
    def weighted(self, pairs: RecordedPairs) -> tuple[Recorded, RecordedPairs]:
        """See `kernels/moe`."""

    @abstractmethod
    def expert_linear(
        self,
        matrices: Sequence[Sequence[Matrix]],
        pairs: RecordedPairs,
        bias: Floats | None,
        activation: moe.Activation | None,
        place: Place | None = None,
    ) -> RecordedRows:
        """See `kernels/moe`; a matrix of every expert in each list, whose results stand side by side."""

    @abstractmethod
    def attend(self, k: Recorded | None, v: Recorded | None, cache: PagedCache, **scores: Any) -> Recorded:
        """See `kernels/kv_write` and `kernels/attention`; this value is q, `scores` are the fields of
        `attention/cpu_record.Scores`. Without k and v nothing is written. Where it `narrows`, the result has the rows
        alone whose successor is wanted."""

    @abstractmethod
    def attend_whole(
        self,
        heads: int,
        kv_heads: int,
        turned: tuple[RecordedTokens, Floats, Floats] | None,
        near: tuple[Floats | None, int | None],
    ) -> Recorded:
        """See `kernels/whole_attention`; this value is qkv, and the texts are the step's sequences. `turned` are the
        places, cos and sin by which queries and keys turn, `near` the bias and the window."""

    @abstractmethod
    def attend_latent(self, kv: Recorded, parts: LatentParts, cache: Any, *, scale: float) -> Recorded:
        """See `kernels/latent_attention/layout.py`; this value is the queries [T, H * (nope + R)], kv [T, L + R]."""

    @abstractmethod
    def narrowed(self) -> Recorded:
        """A copy of the rows whose successor is wanted. What is added to it, or put beside it, may have all rows."""

    @abstractmethod
    def wanted(self) -> Recorded:
        """The rows whose successor is wanted, for a product alone."""

    @abstractmethod
    def logits(self, bias: Floats | None, scale: float, cap: float | None) -> Recorded:
        """The step's scores, of a product of wanted rows: a bias is added, then as `kernels/scale_cap` says."""

    @abstractmethod
    def rows(self, wanted: NDArray[np.int64]) -> Floats:
        """What some rows were when a step ran last: a copy [len(wanted), width]. Of what the layers gave last only."""


class RecordedRows(ABC):
    """A row for each pair of a token and one of its experts, while a step is recorded."""

    @abstractmethod
    def expert_linear(
        self,
        matrices: Sequence[Sequence[Matrix]],
        pairs: RecordedPairs,
        bias: Floats | None,
        activation: moe.Activation | None,
        place: Place | None = None,
    ) -> RecordedRows:
        """See `Recorded.expert_linear`."""

    @abstractmethod
    def combine(self, shared: Recorded | None, gate: Recorded | None) -> Recorded:
        """See `kernels/moe`."""


class RecordedTokens(ABC):
    """The token ids of a step while it is recorded, or other numbers of its tokens that a table has rows for.

    Attributes:
        numbers: where they stand when the step runs.
    """

    numbers: NDArray[np.int64]

    @abstractmethod
    def embedding(self, matrix: Matrix, scale: float | None = None, place: Place | None = None) -> Recorded:
        """See `kernels/embedding`; the rows, with what adapters do at `place`, times `scale`."""

    @abstractmethod
    def looked_up(self, rows: LookUp, width: int) -> Recorded:
        """[T, width], what `rows` gives of the numbers each time before a step runs."""
