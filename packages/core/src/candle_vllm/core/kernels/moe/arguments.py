"""What a mixture of experts is given: kinds of arguments, and the sizes that they share; inside step 6."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from candle_vllm.core.kernels.gguf_linear.layout import GgufMatrix
from candle_vllm.core.kernels.group_linear.layout import GroupMatrix

FEW = 64
"""Most pairs of token and expert for which the weights of every expert that is asked are read once, as in decoding."""

MOST_EXPERTS = 512
"""Of a layer."""

Activation: TypeAlias = Literal["silu", "gelu_tanh", "swiglu_oai"]
Scoring: TypeAlias = Literal["softmax", "sigmoid"]
Experts: TypeAlias = torch.Tensor | GgufMatrix | GroupMatrix
"""One matrix of every expert: [X, rows, columns], or a quantised matrix of X * rows rows."""


Biases: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Of gate and up [X, 2F], and of down [X, E]."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Routing:
    """How a token's experts are chosen; see `route`.

    Attributes:
        top_k: k.
        scoring, renormalise, scale: how logits become weights.
        bias: [X] fp32 or None.
        groups, top_groups: of experts, and how many of the groups are candidates.
    """

    top_k: int
    scoring: Scoring = "softmax"
    renormalise: bool = True
    bias: torch.Tensor | None = None
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0


@dataclass(frozen=True)
class MoeSizes:
    """Sizes.

    Attributes:
        tokens: T.
        experts: X.
        top_k: k, experts of a token.
        hidden: E.
        inner: F.
    """

    tokens: int
    experts: int
    top_k: int
    hidden: int
    inner: int

    @property
    def pairs(self) -> int:
        """Pairs of a token and one of its experts; pair t * k + j is token t's jth."""
        return self.tokens * self.top_k

    @property
    def few(self) -> bool:
        """Whether there are few pairs."""
        return self.pairs <= FEW

    @staticmethod
    def of(
        x: torch.Tensor,
        gate_up: Experts,
        down: Experts,
        weights: torch.Tensor,
        experts: torch.Tensor,
        biases: Biases | None = None,
    ) -> MoeSizes:
        """Reads them; what does not fit together is our own mistake."""
        assert x.dim() == 2
        assert experts.dim() == 2
        assert weights.shape == experts.shape
        assert len(experts) == len(x)
        assert experts.dtype == torch.int32
        assert weights.dtype == torch.float32
        tokens, hidden = x.shape
        if not isinstance(down, torch.Tensor):
            assert down.rows % hidden == 0
            count, inner = down.rows // hidden, down.columns
        else:
            count, inner = down.shape[0], down.shape[2]
            assert down.shape == (count, hidden, inner)
        if not isinstance(gate_up, torch.Tensor):
            assert gate_up.rows == count * 2 * inner
            assert gate_up.columns == hidden
        else:
            assert gate_up.shape == (count, 2 * inner, hidden)
        assert 0 < count <= MOST_EXPERTS
        if biases is not None:
            assert biases[0].shape == (count, 2 * inner)
            assert biases[1].shape == (count, hidden)
        return MoeSizes(tokens, count, experts.shape[1], hidden, inner)
