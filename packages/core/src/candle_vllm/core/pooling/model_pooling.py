"""ModelPooling: how a model's own vectors are made, and what a request may change about it. No torch here."""

from __future__ import annotations

import dataclasses

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.pooling.params import PoolingKind, PoolingParams


@dataclasses.dataclass(frozen=True)
class PoolingPlan:
    """A request's `PoolingParams` with nothing left open."""

    pooling: PoolingKind
    normalize: bool
    dimensions: int

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

    def plan(self, params: PoolingParams) -> PoolingPlan:
        """What a request gets.

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
