"""What a mixture of experts is given: kinds of arguments, and pairs of tokens and experts; inside step 6."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import torch

FEW = 64
"""Most pairs of token and expert for which the weights of every expert that is asked are read once, as in decoding."""

MOST_EXPERTS = 512
"""Of a layer."""

LEAST_SUM = 1e-20
"""Keeps a sum of scores from being 0 where every one of them is; nothing against any other sum."""

Activation: TypeAlias = Literal["silu", "gelu_tanh", "swiglu_oai"]
Scoring: TypeAlias = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Routing:
    """How a token's experts are chosen; see `route`.

    Attributes:
        top_k: k.
        scoring, renormalise, scale: how logits become weights.
        bias: [X] fp32 or None, an array in recorded steps; takes part in the choice alone (DeepSeek-V3's
            e_score_correction_bias).
        groups, top_groups: of experts, and how many of the groups are candidates.
    """

    top_k: int
    scoring: Scoring = "softmax"
    renormalise: bool = True
    bias: Any = None
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0


@dataclass(eq=False)
class Pairs:
    """Pairs of a token and one of its experts; pair t * k + j is token t's jth.

    Attributes:
        weights: [T, k] fp32.
        experts: [T, k] int32; those of a token differ, and a number outside 0 to X - 1 stands for none.
        count: X.
        blocks: the pairs in the order of their experts, which the GPU's kernels make when they first want it.
    """

    weights: torch.Tensor
    experts: torch.Tensor
    count: int
    blocks: Any = None

    def __post_init__(self) -> None:
        import torch

        assert self.experts.dim() == 2
        assert self.weights.shape == self.experts.shape
        assert self.experts.dtype == torch.int32
        assert self.weights.dtype == torch.float32
        assert 0 < self.count <= MOST_EXPERTS

    @property
    def tokens(self) -> int:
        """T."""
        return self.experts.shape[0]

    @property
    def top_k(self) -> int:
        """k."""
        return self.experts.shape[1]

    @property
    def number(self) -> int:
        """T * k."""
        return self.experts.numel()
