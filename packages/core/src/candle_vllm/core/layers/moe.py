"""Mixture of experts in the place of a feed-forward layer: router, experts, and what all tokens share."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import torch

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.fields import MAX_COUNT
from candle_vllm.core.kernels.moe import (
    MOST_EXPERTS,
    Activation,
    Experts,
    RecordedExperts,
    Routing,
    Scoring,
    moe,
    route,
)
from candle_vllm.core.kernels.plain_linear import PlainKind
from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.matrices import DeviceMatrix, Piece, TensorMatrix
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.parameters import MatrixPart, Placement, TensorPart
from candle_vllm.core.loading.weights import Part

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """What a family's config says about its experts. Values that cannot be are an `InvalidFileError`.

    Attributes:
        experts: X, up to `MOST_EXPERTS`.
        top_k: k, experts of a token.
        inner_size: F of an expert.
        scoring, renormalise, groups, top_groups, scale: see `kernels/moe`.
        correction: a number of each expert takes part in the choice alone (DeepSeek-V3's e_score_correction_bias).
        activation: of the experts.
        router_bias, expert_bias: whether there are biases.
        shared_size: F of the layer that every token goes through; 0 where there is none.
        shared_gate: its result is multiplied by a sigmoid of the token (Qwen2-MoE).
    """

    experts: int
    top_k: int
    inner_size: int
    scoring: Scoring = "softmax"
    renormalise: bool = True
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    correction: bool = False
    activation: Activation = "silu"
    router_bias: bool = False
    expert_bias: bool = False
    shared_size: int = 0
    shared_gate: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.experts <= MOST_EXPERTS:
            raise InvalidFileError(f"the model has {self.experts} experts; it must have 1 to {MOST_EXPERTS}")
        if self.groups < 1 or self.experts % self.groups or not 0 < self.top_groups <= self.groups:
            raise InvalidFileError(
                f"the best {self.top_groups} of {self.groups} groups of {self.experts} experts cannot be chosen"
            )
        if self.correction and self.groups > 1 and self.experts == self.groups:
            raise InvalidFileError(f"{self.groups} groups of one expert cannot be judged by their two best")
        for size in (self.inner_size, self.shared_size):
            if not 0 <= size <= MAX_COUNT:
                raise InvalidFileError(f"the model's experts have an inner size of {size}; it must be 1 to {MAX_COUNT}")
        candidates = self.experts // self.groups * self.top_groups
        if not 0 < self.top_k <= candidates:
            raise InvalidFileError(f"{self.top_k} experts of a token cannot be chosen among {candidates}")


class Router:
    """Scores of experts: x [T, E] -> logits [T, X], in fp32 whatever the model's other weights are."""

    def __init__(self, hidden_size: int, mixture: Mixture, placement: Placement) -> None:
        exact = dataclasses.replace(placement, dtype=torch.float32, plain_kind=PlainKind.F32, keeps_quantised=False)
        self.scores = Linear(hidden_size, mixture.experts, exact, bias=mixture.router_bias, kept=False)
        self.correction = torch.empty(mixture.experts, device=placement.device) if mixture.correction else None

    def __call__(self, x: Value) -> Value:
        return self.scores(x if isinstance(x, Recorded) else x.float())

    def parts(self) -> Mapping[str, Part]:
        """Every part that must be loaded."""
        parts = self.scores.parts()
        return parts if self.correction is None else {**parts, "correction": TensorPart(self.correction)}


class ExpertMLPs:
    """The experts' gated feed-forward layers. Parts: gate.{e}.weight [F, E], up.{e}.weight, down.{e}.weight [E, F]."""

    def __init__(self, hidden_size: int, mixture: Mixture, placement: Placement) -> None:
        self._mixture, self._placement = mixture, placement
        count, inner = mixture.experts, mixture.inner_size
        self._shapes = {"gate": (inner, hidden_size), "up": (inner, hidden_size), "down": (hidden_size, inner)}
        self.pieces: dict[str, Piece] = {}  # outside recorded steps, until `finish` has joined them
        self._joined: tuple[Experts, Experts] | None = None
        device, dtype = placement.device, placement.dtype
        if placement.stacked:
            gate_up = torch.empty(count, 2 * inner, hidden_size, device=device, dtype=dtype)
            self._joined = gate_up, torch.empty(count, hidden_size, inner, device=device, dtype=dtype)
        self.biases = None
        if mixture.expert_bias:
            shapes = (count, 2 * inner), (count, hidden_size)
            self.biases = torch.empty(shapes[0], device=device), torch.empty(shapes[1], device=device)

    def __call__(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Weighted results [T, E]; see `kernels/moe`."""
        if self._joined is None:
            self.finish()
        assert self._joined is not None
        options = {"activation": self._mixture.activation, "invariant": self._placement.invariant}
        return moe(x, *self._joined, weights, experts, biases=self.biases, **options)

    def recorded(self) -> RecordedExperts:
        """The same for recorded steps."""
        gate, up, down = (
            [self.pieces[f"{name}.{e}"] for e in range(self._mixture.experts)] for name in ("gate", "up", "down")
        )
        return RecordedExperts(gate, up, down, self._mixture.activation, self.biases)

    def finish(self) -> None:
        """See `Finishes`: on a GPU the parts become two matrices of all experts."""
        if self.pieces and not self._placement.recorded:
            gate_up = [self.pieces.pop(f"{name}.{e}") for e in range(self._mixture.experts) for name in ("gate", "up")]
            down = [self.pieces.pop(f"down.{e}") for e in range(self._mixture.experts)]
            self._joined = self._join(gate_up), self._join(down)

    def _join(self, pieces: Sequence[DeviceMatrix]) -> Experts:
        """One matrix of all rows where all are quantised alike, else plain numbers."""
        kinds = {piece.kind for piece in pieces}
        if len(kinds) == 1 and kinds != {TensorMatrix.kind}:
            return pieces[0].joined(pieces).data
        if len(kinds) > 1:
            logger.warning("experts of several types (%s) are decoded, which takes memory", ", ".join(sorted(kinds)))
        plain = [piece.decoded(self._placement.dtype) for piece in pieces]
        return torch.stack(plain).view(self._mixture.experts, -1, plain[0].shape[1])

    def parts(self) -> Mapping[str, Part]:
        """Every part that must be loaded."""
        found: dict[str, Part] = {}
        for e in range(self._mixture.experts):
            for name, shape in self._shapes.items():
                found[f"{name}.{e}.weight"] = self._part(name, e, shape)
                if self.biases is not None:
                    found[f"{name}.{e}.bias"] = TensorPart(self._rows(self.biases, name, e))
        return found

    def _part(self, name: str, expert: int, shape: tuple[int, int]) -> Part:
        if not self._placement.stacked:
            return MatrixPart(self.pieces, f"{name}.{expert}", shape, self._placement.backend(floats=True))
        assert self._joined is not None
        gate_up, down = self._joined
        assert isinstance(gate_up, torch.Tensor)
        assert isinstance(down, torch.Tensor)
        return TensorPart(self._rows((gate_up, down), name, expert))

    def _rows(self, tensors: tuple[torch.Tensor, torch.Tensor], name: str, expert: int) -> torch.Tensor:
        """What belongs to a part in the tensors of gate and up, and of down."""
        if name == "down":
            return tensors[1][expert]
        return tensors[0][expert].chunk(2)[name == "up"]


class SparseMLP:
    """Each token x [T, E] goes to k of X experts, and through a layer that all tokens share where there is one."""

    def __init__(self, hidden_size: int, mixture: Mixture, placement: Placement) -> None:
        self._mixture = mixture
        self.router = Router(hidden_size, mixture, placement)
        self.experts = ExpertMLPs(hidden_size, mixture, placement)
        self.shared = GatedMLP(hidden_size, mixture.shared_size, placement) if mixture.shared_size else None
        self.shared_gate = Linear(hidden_size, 1, placement) if mixture.shared_gate else None

    def __call__(self, x: Value) -> Value:
        logits = self.router(x)
        shared = None if self.shared is None else self.shared(x)
        gate = None if self.shared_gate is None else self.shared_gate(x)
        if isinstance(x, Recorded):
            return x.experts(logits, self._routing(), self.experts.recorded(), shared, gate)
        routing = self._routing()
        weights, experts = route(
            logits,
            routing.top_k,
            scoring=routing.scoring,
            renormalise=routing.renormalise,
            bias=routing.bias,
            groups=routing.groups,
            top_groups=routing.top_groups,
            scale=routing.scale,
        )
        y = self.experts(x, weights, experts)
        if shared is None:
            return y
        return y + (shared if gate is None else torch.sigmoid(gate.float()).to(y.dtype) * shared)

    def _routing(self) -> Routing:
        mixture = self._mixture
        return Routing(
            top_k=mixture.top_k,
            scoring=mixture.scoring,
            renormalise=mixture.renormalise,
            bias=self.router.correction,
            groups=mixture.groups,
            top_groups=mixture.top_groups,
            scale=mixture.scale,
        )
