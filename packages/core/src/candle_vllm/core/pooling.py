# SPDX-License-Identifier: MIT
"""How the vector of one text is made of its hidden states: what a model's files say, and what a request may change.

No torch here. The name `PoolingParams` and its `dimensions` are vLLM's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

from candle_vllm.core.arguments import ExplainedStruct
from candle_vllm.core.errors import InvalidParameterError

MAX_DIMENSIONS = 1 << 16

PoolingKind = Literal["mean", "cls", "last", "all", "sparse"]
"""The mean over all positions, the first one, the last one; a vector of each position (ColBERT); or a weight of each
token of the vocabulary (SPLADE)."""


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
        """What is made of pooled vectors [..., E]."""
        ...

    def of(self, kind: PoolingKind) -> Behind:
        """What stands behind a pooling of this kind."""
        ...

    def by_token(self, rows: Any, token_ids: Sequence[int], *, activate: bool, sparse: bool) -> Any:
        """What is made of all positions [T, E] of a text: a vector of each, or the vocabulary's weights."""
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

    @property
    def by_token(self) -> bool:
        """Every position is kept, not a sum of them."""
        return self.pooling in ("all", "sparse")


@dataclasses.dataclass(frozen=True)
class ModelPooling:
    """What a model's files say about its vectors.

    Attributes:
        size: E, the length of a whole vector.
        pooling: which positions a vector is made of.
        normalize: whether vectors have length 1.
        matryoshka: the model was trained so that vectors may be cut.
        matryoshka_dimensions: the lengths it was trained for; empty is any.
        sizes: lengths of vectors of other kinds of pooling, where they are not E; weights of the vocabulary are made by
            those models alone that have a length of them here.
        prompts: words that the model wants before a text, by what the text is ("query", "document").
    """

    size: int
    pooling: PoolingKind = "last"
    normalize: bool = True
    matryoshka: bool = False
    matryoshka_dimensions: tuple[int, ...] = ()
    sizes: Mapping[PoolingKind, int] = dataclasses.field(default_factory=dict[PoolingKind, int])
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])

    def length(self, kind: PoolingKind) -> int:
        """Elements of a vector of this kind."""
        return self.sizes.get(kind, self.size)

    def plan(self, params: PoolingParams, head: Behind | None = None) -> PoolingPlan:
        """What a request gets from a model with this head.

        Raises:
            InvalidParameterError: the model cannot give vectors of that length or kind.
        """
        kind = params.pooling or self.pooling
        if kind == "sparse" and kind not in self.sizes:
            raise InvalidParameterError("the model has no head that gives a weight to each token", "pooling")
        size, normal = self.length(kind), self.normalize and kind != "sparse"
        dimensions = size if params.dimensions is None else params.dimensions
        if dimensions != size:
            self._check(dimensions, size, cut=self.matryoshka and kind != "sparse")
        return PoolingPlan(
            pooling=kind,
            normalize=normal if params.normalize is None else params.normalize,
            dimensions=dimensions,
            head=None if head is None else head.of(kind),
            activate=params.use_activation is not False,
        )

    def _check(self, dimensions: int, size: int, *, cut: bool) -> None:
        if dimensions > size:
            raise InvalidParameterError(f"dimensions is {dimensions} and the model's vectors have {size}", "dimensions")
        if not cut:
            raise InvalidParameterError(
                f"dimensions is {dimensions}, and the model's config.json does not say that its vectors of {size} "
                'may be cut ("is_matryoshka" or "matryoshka_dimensions"): leave dimensions out',
                "dimensions",
            )
        if self.matryoshka_dimensions and dimensions not in self.matryoshka_dimensions:
            allowed = ", ".join(map(str, sorted({*self.matryoshka_dimensions, size})))
            raise InvalidParameterError(
                f"dimensions is {dimensions}; the model was trained for {allowed}", "dimensions"
            )
