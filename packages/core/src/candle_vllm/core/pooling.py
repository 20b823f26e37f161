# SPDX-License-Identifier: MIT
"""How the vector of one text is made of its hidden states: what a model's files say, and what a request may change.

No torch here. The name `PoolingParams` and its `dimensions` are vLLM's.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Protocol, get_args

from candle_vllm.core.arguments import ExplainedStruct
from candle_vllm.core.errors import InvalidParameterError

MAX_DIMENSIONS = 1 << 16

PoolingKind = Literal["mean", "cls", "last"]
"""The mean over all positions, the first one, or the last one."""


class PoolingParams(ExplainedStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one vector is made of the hidden states of a text; None is what the model itself says.

    Attributes:
        dimensions: length of the vector, where the model was trained to be cut (Matryoshka, arXiv:2205.13147): the
            first ones are kept, then normalised anew.
        normalize: scale the vector to length 1.
        pooling: which positions it is made of.
        use_activation: of a head for scores and classes, bring its logits to 0..1; None is as the model says, false
            gives logits, such as the rewards of a reward model.
    """

    dimensions: int | None = None
    normalize: bool | None = None
    pooling: PoolingKind | None = None
    use_activation: bool | None = None

    def __post_init__(self) -> None:
        dimensions: Any = self.dimensions
        if dimensions is not None and (
            isinstance(dimensions, bool) or not isinstance(dimensions, int) or not 1 <= dimensions <= MAX_DIMENSIONS
        ):
            raise InvalidParameterError(
                f"dimensions must be a whole number from 1 to {MAX_DIMENSIONS}, not {_shown(dimensions)}", "dimensions"
            )
        for name in ("normalize", "use_activation"):
            value: Any = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise InvalidParameterError(f"{name} must be true or false, not {value!r:.60}", name)
        if self.pooling is not None and self.pooling not in get_args(PoolingKind):
            raise InvalidParameterError(
                f"pooling must be one of {', '.join(get_args(PoolingKind))}, not {self.pooling!r:.60}", "pooling"
            )


def _shown(value: object) -> str:
    """A value for a message; Python refuses to write out very long numbers."""
    return "a larger number" if isinstance(value, int) and abs(value) >= 10**20 else f"{value!r:.60}"


class Behind(Protocol):
    """What stands behind the pooling; see `pooled_head.PooledHead`."""

    def __call__(self, pooled: Any, *, activate: bool) -> Any:
        """What is made of a pooled vector."""
        ...


@dataclasses.dataclass(frozen=True)
class PoolingPlan:
    """A request's `PoolingParams` with nothing left open, and what stands behind the pooling."""

    pooling: PoolingKind
    normalize: bool
    dimensions: int
    head: Behind | None = None
    activate: bool = True

    @property
    def needs_every_position(self) -> bool:
        """Hidden states of earlier positions count, so that none may come from the prefix cache."""
        return self.pooling != "last"


@dataclasses.dataclass(frozen=True)
class ModelPooling:
    """What a model's files say about its vectors.

    Attributes:
        size: E, the length of a whole vector.
        pooling: which positions a vector is made of.
        normalize: whether vectors have length 1.
        matryoshka: the model was trained so that vectors may be cut.
        matryoshka_dimensions: the lengths it was trained for; empty is any.
    """

    size: int
    pooling: PoolingKind = "last"
    normalize: bool = True
    matryoshka: bool = False
    matryoshka_dimensions: tuple[int, ...] = ()

    def plan(self, params: PoolingParams, head: Behind | None = None) -> PoolingPlan:
        """What a request gets from a model with this head.

        Raises:
            InvalidParameterError: the model cannot give vectors of that length.
        """
        dimensions = self.size if params.dimensions is None else params.dimensions
        if dimensions != self.size:
            self._check(dimensions)
        return PoolingPlan(
            pooling=params.pooling or self.pooling,
            normalize=self.normalize if params.normalize is None else params.normalize,
            dimensions=dimensions,
            head=head,
            activate=params.use_activation is not False,
        )

    def _check(self, dimensions: int) -> None:
        if dimensions > self.size:
            raise InvalidParameterError(
                f"dimensions is {dimensions} and the model's vectors have {self.size}", "dimensions"
            )
        if not self.matryoshka:
            raise InvalidParameterError(
                f"dimensions is {dimensions}, and the model's config.json does not say that its vectors of {self.size} "
                'may be cut ("is_matryoshka" or "matryoshka_dimensions"): leave dimensions out',
                "dimensions",
            )
        if self.matryoshka_dimensions and dimensions not in self.matryoshka_dimensions:
            allowed = ", ".join(map(str, sorted({*self.matryoshka_dimensions, self.size})))
            raise InvalidParameterError(
                f"dimensions is {dimensions}; the model was trained for {allowed}", "dimensions"
            )
