# SPDX-License-Identifier: MIT
"""Mixture of experts instead of a feed-forward layer: router, experts and shared expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.fields import MAX_COUNT
from candle_vllm.core.kernels import moe
from candle_vllm.core.kernels.collectives import Collective
from candle_vllm.core.kernels.plain_linear import PlainKind
from candle_vllm.core.kernels.recorded import GateKind, Recorded, Value
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import MLP, GatedMLP
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.loading.weights import Parameter

if TYPE_CHECKING:
    from candle_vllm.core.kernels.collectives.token_shares import TokenShares


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Sizes and routing of a layer's experts, a part of a model's config. Invalid values raise `InvalidFileError`.

    Attributes:
        experts: X, up to `MOST_EXPERTS`.
        top_k: number of experts per token; k.
        inner_size: F of an expert.
        scoring, renormalise, groups, top_groups, scale, jitter: see `kernels/moe`.
        correction: a bias of each expert, used only to choose experts (DeepSeek-V3's e_score_correction_bias).
        expert_scale: the routing weights of each expert are multiplied by its own factor.
        scales_input: the weight of a token's only expert multiplies the expert's input, not its result (Llama 4).
        activation: activation of the experts; if it has no gate, the shared expert is an `MLP` with squared ReLU.
        shared_activation: activation of the shared expert's gate, if `activation` has a gate.
        router_bias, expert_bias: whether router and experts have biases.
        shared_size: F of the shared expert, which every token uses; 0 without a shared expert.
        shared_gate: the shared expert's result is multiplied by a sigmoid gate of the token (Qwen2-MoE).
        first, held: this rank's experts: `held` experts from index `first` on; None for all from `first` on.
    """

    experts: int
    top_k: int
    inner_size: int
    scoring: moe.Scoring = "softmax"
    renormalise: bool = True
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    jitter: float = 0.0
    correction: bool = False
    expert_scale: bool = False
    scales_input: bool = False
    activation: moe.Activation = "silu"
    shared_activation: GateKind = "silu"
    router_bias: bool = False
    expert_bias: bool = False
    shared_size: int = 0
    shared_gate: bool = False
    first: int = 0
    held: int | None = None

    @property
    def here(self) -> int:
        """Number of this rank's experts."""
        return self.experts - self.first if self.held is None else self.held

    def __post_init__(self) -> None:
        if not 0 < self.experts <= moe.MOST_EXPERTS:
            raise InvalidFileError(f"the model has {self.experts} experts; it must have 1 to {moe.MOST_EXPERTS}")
        if self.groups < 1 or self.experts % self.groups or not 0 < self.top_groups <= self.groups:
            raise InvalidFileError(
                f"the router cannot choose {self.top_groups} of {self.groups} groups of {self.experts} experts"
            )
        if self.correction and self.groups > 1 and self.experts == self.groups:
            raise InvalidFileError(f"the router needs groups of two experts or more; {self.groups} have one")
        for size in (self.inner_size, self.shared_size):
            if not 0 <= size <= MAX_COUNT:
                raise InvalidFileError(f"the model's experts have an inner size of {size}; it must be 0 to {MAX_COUNT}")
        candidates = self.experts // self.groups * self.top_groups
        if not 0 < self.top_k <= candidates:
            raise InvalidFileError(f"the router cannot choose {self.top_k} experts of {candidates} for a token")


HostLayer: TypeAlias = Callable[[Value, Value, Callable[[], Value] | None], tuple[Value, Value]]
"""Function of x, logits and another one to run meanwhile, or None; returns the experts' sums, the other's result."""


_SAME = ("top_k", "scoring", "renormalise", "groups", "top_groups", "scale", "jitter")  # fields of a `Routing`


class Router:
    """Router: x [T, E] -> logits [T, X], always in fp32."""

    def __init__(self, hidden_size: int, mixture: Mixture, placement: Placement) -> None:
        exact = dataclasses.replace(placement, dtype="F32", plain_kind=PlainKind.F32, keeps_quantised=False)
        self.scores = Linear(hidden_size, mixture.experts, exact, bias=mixture.router_bias, kept=False)
        self.correction = placement.empty(mixture.experts) if mixture.correction else None
        self.expert_scale = placement.empty(mixture.experts) if mixture.expert_scale else None

    def __call__(self, x: Value) -> Value:
        return self.scores(x if isinstance(x, Recorded) else x.float())

    def parameters(self) -> Mapping[str, Parameter]:
        own = {"correction": self.correction, "expert_scale": self.expert_scale}
        found = {name: TensorParameter(numbers) for name, numbers in own.items() if numbers is not None}
        return {**self.scores.parameters(), **found}


class ExpertMLPs:
    """The experts' feed-forward layers.

    Parts: gate.{e}.weight [F, E] for experts with a gate, up.{e}.weight [F, E] and down.{e}.weight [E, F].
    """

    def __init__(self, hidden_size: int, mixture: Mixture, placement: Placement) -> None:
        inner, here = mixture.inner_size, {"experts": mixture.here, "first": mixture.first}
        options: dict[str, Any] = {"bias": mixture.expert_bias, **here}
        self._activation: moe.Activation = mixture.activation
        parts = ("gate", "up") if moe.is_gated(mixture.activation) else ("up",)
        self.gate_up = Linear(hidden_size, dict.fromkeys(parts, inner), placement, **options)
        self.down = Linear(inner, {"down": hidden_size}, placement, **options)

    def __call__(self, x: Value, pairs: Any) -> Any:
        """Compute the experts' results for x [T, E], a row for each of the pairs; see `kernels/moe`."""
        return self.down(self.gate_up(x, pairs, self._activation), pairs)

    def finish(self) -> None:
        self.gate_up.finish()
        self.down.finish()

    def parameters(self) -> Mapping[str, Parameter]:
        return {**self.gate_up.parameters(), **self.down.parameters()}


class SparseMLP:
    """Mixture-of-experts layer: each token of x [T, E] goes to k of X experts, and to the shared expert, if any.

    Attributes:
        collective: ranks over which results are summed, if each has parts of experts or some of the experts; else None.
        shares: sends tokens to the ranks of their experts; None if each rank has all tokens.
        elsewhere: computes experts on the CPU for steps on a GPU, with matrices in main memory, see
            `kernels/moe/host.py`; None if the experts are on the model's device.
    """

    def __init__(self, hidden_size: int, mixture: Mixture, placement: Placement) -> None:
        self._hidden_size, self._mixture = hidden_size, mixture
        self.router = Router(hidden_size, mixture, placement)
        self.experts = ExpertMLPs(hidden_size, mixture, placement)
        self.shared: GatedMLP | MLP | None = None
        if mixture.shared_size and moe.is_gated(mixture.activation):
            self.shared = GatedMLP(hidden_size, mixture.shared_size, placement, activation=mixture.shared_activation)
        elif mixture.shared_size:
            self.shared = MLP(hidden_size, mixture.shared_size, placement, bias=False, activation="relu2")
        self.shared_gate = Linear(hidden_size, 1, placement) if mixture.shared_gate else None
        self.collective: Collective | None = None
        self.shares: TokenShares | None = None
        self.elsewhere: HostLayer | None = None

    def leave_to_host(self, placement: Placement) -> None:
        """Let the CPU compute the experts, in recorded steps; call it before they are loaded."""
        self.experts = ExpertMLPs(self._hidden_size, self._mixture, placement)
        if self.router.correction is not None:
            self.router.correction = placement.empty(self._mixture.experts)
        if self.router.expert_scale is not None:
            self.router.expert_scale = placement.empty(self._mixture.experts)

    @property
    def sizes(self) -> tuple[int, int]:
        """E and X."""
        return self._hidden_size, self._mixture.experts

    def record_experts(self, x: Recorded, logits: Recorded) -> Recorded:
        """Record the experts' results for x [T, E] with the router's logits."""
        x, pairs = SparseMLP._routed(self, x, logits)  # not `self._routed`: `LatentExperts` has projected x on the GPU
        return moe.combine(self.experts(x, pairs), pairs, None)

    def _with_host(self, elsewhere: HostLayer, x: Value, logits: Value) -> Value:
        """Compute y with the shared expert on the GPU while the CPU computes the other experts."""
        if self.shared is None:
            return elsewhere(x, logits, None)[0]
        mlp, gate = self.shared, self.shared_gate
        y, shared = elsewhere(x, logits, lambda: moe.gated_rows(mlp(x), None if gate is None else gate(x)))
        return y + shared

    def __call__(self, x: Value, routed: Value | None = None) -> Value:
        """Compute y [T, E] of x [T, E]; the router reads `routed` [T, E], or x if that is None."""
        logits = self.router(x if routed is None else routed)
        if self.elsewhere is not None:
            return self._with_host(self.elsewhere, x, logits)
        shared = None if self.shared is None else self.shared(x)
        gate = None if self.shared_gate is None else self.shared_gate(x)
        x, pairs = self._routed(x, logits)
        if self.shares is not None:
            y = self.shares.experts(x, pairs, self._combined)
            return y if shared is None else y + moe.gated_rows(shared, gate)
        y = self._combined(x, pairs, shared, gate)
        return y if self.collective is None else self.collective.sum(y)

    def _routed(self, x: Value, logits: Value) -> tuple[Value, Any]:
        """Return the experts' input [T, E], and the pairs of tokens and experts."""
        pairs = moe.route(logits, self._routing())
        return moe.weighted(x, pairs) if self._mixture.scales_input else (x, pairs)

    def _combined(self, x: Value, pairs: Any, shared: Value | None = None, gate: Value | None = None) -> Value:
        """Sum weighted results of this rank's experts and the shared expert; `pairs` may name other ranks' experts."""
        if self._mixture.here < self._mixture.experts:
            pairs = pairs.among(self._mixture.first, self._mixture.here)
        dtype = None if isinstance(x, Recorded) else x.dtype
        return moe.combine(self.experts(x, pairs), pairs, dtype, shared, gate)

    def _routing(self) -> moe.Routing:
        same = {name: getattr(self._mixture, name) for name in _SAME}
        return moe.Routing(bias=self.router.correction, expert_scale=self.router.expert_scale, **same)


def mixtures_of(layers: Sequence[Any]) -> dict[int, SparseMLP]:
    """Return the `mlp` of each of a decoder's layers that is a mixture of experts, by the layers' indices."""
    found = {number: getattr(layer, "mlp", None) for number, layer in enumerate(layers)}
    return {number: mlp for number, mlp in found.items() if isinstance(mlp, SparseMLP)}
