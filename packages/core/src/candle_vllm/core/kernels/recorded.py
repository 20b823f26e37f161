# SPDX-License-Identifier: MIT
"""Placeholders of results while a step is recorded.

When the layers run on `Recorded` values instead of tensors, each kernel appends an operation to a plan instead of
computing; later steps replay the plan. Kernels and layers use only this interface; `kernels/cpu_runtime/values.py`
implements it, and decides which operations are fused. A wanted row belongs to a token whose logits are computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

# Input and output of layers: a torch.Tensor, or a Recorded while a step is recorded.
Value: TypeAlias = Any

Activation: TypeAlias = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "tanh"]
"""Activation without a gate; see `kernels/activation`."""

GateKind: TypeAlias = Literal[
    "sigmoid", "silu", "gelu_tanh", "gelu", "softplus", "silu_7", "silu_16", "silu_10", "swiglu_oai"
]
"""Activation of a gate; see `kernels/silu_mul`."""

LIMITS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"silu_7": (7.0, 7.0), "silu_16": (16.0, 16.0), "silu_10": (9.999546021312976, 10.0)}
)
"""Limits of act(gate) and of the other factor of a gated product, by its kind; silu_10's first one is SiLU(10)."""

Floats: TypeAlias = "NDArray[np.float32]"
Gates: TypeAlias = "tuple[Recorded, Recorded] | None"

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from candle_vllm.core.kernels.attention.rows import PagedCache
    from candle_vllm.core.kernels.cpu_runtime.operation import Matrix
    from candle_vllm.core.kernels.delta_rule.layout import DeltaGates
    from candle_vllm.core.kernels.latent_attention.layout import LatentParts
    from candle_vllm.core.kernels.lora import Place
    from candle_vllm.core.kernels.moe import arguments as moe
    from candle_vllm.core.kernels.states import StateCache

LookUp: TypeAlias = Callable[[Any], Any]
"""Function that returns rows float32 [T, width] for int64 row numbers [T]."""

RecordedPairs: TypeAlias = Any
"""Result of `Recorded.route`: the pairs of a step's tokens and their experts."""


class ExpertWeights(NamedTuple):
    """Lists with a matrix for every expert, whose results are concatenated, their bias, and their adapter site."""

    matrices: Sequence[Sequence[Matrix]]
    bias: Floats | None = None
    place: Place | None = None


class Recorded(ABC):
    """A float32 value [T, width], or [T, heads, size] after `unflatten`. T is known only when a step runs."""

    @abstractmethod
    def split(self, sizes: Sequence[int], dim: int) -> list[Recorded]:
        """Return views of adjacent columns."""

    @abstractmethod
    def unflatten(self, dim: int, sizes: Sequence[int]) -> Recorded:
        """Split the last dimension into heads; with `dim` 0, copy so many following rows of a step as heads of one."""

    @abstractmethod
    def flatten(self, start: int, end: int = -1) -> Recorded:
        """Merge the heads into one dimension; from 0 to 1, copy the heads of a step's row to as many rows."""

    @abstractmethod
    def __add__(self, other: Recorded) -> Recorded:
        """Return the sum with `other`: a product, the experts' sum, looked-up rows or a norm, or a computed value.

        A product and the like are added while they are computed. The sum overwrites this value, unless neither is
        computed yet, or only `other` consists of just the wanted rows.
        """

    @abstractmethod
    def scaled(self, factor: float) -> Recorded:
        """Multiply these columns by a factor, in place; see `kernels/scale_cap`."""

    @abstractmethod
    def clamped(self, low: float, high: float) -> Recorded:
        """See `kernels/scale_cap`; in place, so other uses of the unchanged value must be recorded before."""

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
    def mixed(self, table: Floats | Recorded, gates: Recorded | None, scale: Floats | None, *, level: bool) -> Recorded:
        """See `kernels/stream_mix`; a table [T, M, N] is a `Recorded` with heads of N elements."""

    @abstractmethod
    def stream_weights(self, scale: Floats, base: Floats, streams: int, *, rounds: int, eps: float) -> Recorded:
        """See `kernels/stream_mix`."""

    @abstractmethod
    def cut(self, deviations: float) -> None:
        """See `kernels/scale_cap`; in place, and no other value may have read these columns."""

    @abstractmethod
    def short_conv(
        self, weight: Floats, bias: Floats | None, cache: StateCache, *, silu: bool, gates: Gates
    ) -> Recorded:
        """See `kernels/short_conv`; with gates, the buffer of this value is overwritten."""

    @abstractmethod
    def delta_rule(
        self, *others: Recorded, gates: DeltaGates, cache: StateCache, scale: float, normed: bool
    ) -> Recorded:
        """See `kernels/delta_rule`; this value is q, `others` are k, v, a, b; buffers of q and k are overwritten."""

    @abstractmethod
    def gate_mul(self, kind: GateKind) -> Recorded:
        """See `kernels/silu_mul`."""

    @abstractmethod
    def xielu(self, numbers: Floats) -> Recorded:
        """See `models/apertus.py`; this value is overwritten."""

    @abstractmethod
    def gated(self, gate: Recorded, kind: GateKind) -> Recorded:
        """See `kernels/silu_mul`; this value is x, and is overwritten."""

    @abstractmethod
    def activation(self, kind: Activation) -> Recorded:
        """See `kernels/activation`."""

    @abstractmethod
    def linear(self, matrices: Sequence[Matrix], bias: Floats | None, place: Place | None = None) -> Recorded:
        """See `kernels/packed_linear`, `plain_linear` and `scaled_linear`; the matrices' results are concatenated.

        The terms of adapters at `place` are added; see `kernels/lora`.
        """

    @abstractmethod
    def route(self, routing: moe.Routing) -> RecordedPairs:
        """See `kernels/moe`; this value is the logits."""

    @abstractmethod
    def weighted(self, pairs: RecordedPairs) -> tuple[Recorded, RecordedPairs]:
        """See `kernels/moe`."""

    @abstractmethod
    def expert_linear(
        self, weights: ExpertWeights, pairs: RecordedPairs, activation: moe.Activation | None
    ) -> RecordedRows:
        """See `kernels/moe`."""

    @abstractmethod
    def attend(self, k: Recorded | None, v: Recorded | None, cache: PagedCache, **scores: Any) -> Recorded:
        """See `kernels/kv_write` and `kernels/attention`; this value is q, `scores` are the fields of
        `attention/cpu_record.Scores`. Without k and v nothing is written. If `narrows` is set, the result has only the
        rows whose logits are wanted."""

    @abstractmethod
    def attend_whole(
        self,
        heads: int,
        kv_heads: int,
        turned: tuple[RecordedTokens, Floats, Floats] | None,
        near: tuple[Floats | None, int | None],
    ) -> Recorded:
        """See `kernels/whole_attention`; this value is qkv, and the texts are the step's sequences. `turned` are the
        positions, cos and sin by which queries and keys are rotated, in place; `near` are bias and window."""

    @abstractmethod
    def attend_latent(self, kv: Recorded, parts: LatentParts, cache: Any, *, scale: float) -> Recorded:
        """See `kernels/latent_attention/layout.py`; this value is the queries [T, H * (nope + R)], kv [T, L + R]."""

    @abstractmethod
    def choose_positions(self, key: Recorded, weights: Recorded, parts: LatentParts, cache: Any, top: int) -> Any:
        """Return `LatentParts.chosen`; see `kernels/latent_attention`. This value is q, `key` the result of a norm."""

    @abstractmethod
    def narrowed(self) -> Recorded:
        """Return a copy of the wanted rows, to which only values with the same rows can be added."""

    @abstractmethod
    def wanted(self) -> Recorded:
        """Return the wanted rows, as the input of a product."""

    @abstractmethod
    def logits(self, bias: Floats | None, scale: float, cap: float | None) -> Recorded:
        """Compute the step's logits from a product of wanted rows: add a bias, then scale; see `kernels/scale_cap`."""

    @abstractmethod
    def rows(self, wanted: NDArray[np.int64]) -> Floats:
        """Return a copy [len(wanted), width] of rows after the last step; only for the final result of the layers."""


class RecordedRows(ABC):
    """A row for each pair of a token and one of its experts, while a step is recorded."""

    @abstractmethod
    def expert_linear(
        self, weights: ExpertWeights, pairs: RecordedPairs, activation: moe.Activation | None
    ) -> RecordedRows:
        """See `Recorded.expert_linear`."""

    @abstractmethod
    def combine(self, shared: Recorded | None, gate: Recorded | None) -> Recorded:
        """See `kernels/moe`."""


class RecordedTokens(ABC):
    """The token ids of a step while it is recorded, or, for other tables, a row number for each token.

    Attributes:
        numbers: the array that holds the numbers when the step runs.
    """

    numbers: NDArray[np.int64]

    @abstractmethod
    def embedding(self, matrix: Matrix, scale: float | None = None, place: Place | None = None) -> Recorded:
        """See `kernels/embedding`; adapters at `place` change the rows, which are then multiplied by `scale`."""

    @abstractmethod
    def looked_up(self, rows: LookUp, width: int) -> Recorded:
        """Return a value [T, width] that `rows` computes from the numbers before each step."""
