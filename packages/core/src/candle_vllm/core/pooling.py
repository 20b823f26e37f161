# SPDX-License-Identifier: MIT
"""Pooling: how a text's vector is computed from its hidden states, as the model's files and the request define."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, get_args

from candle_vllm.core.arguments import ExplainedStruct
from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.setting_kinds import shown_number

MAX_DIMENSIONS = 1 << 16

TextPooling = Literal["mean", "weighted_mean", "cls", "last"]
"""Pooling methods that give a text one vector: the mean over all positions, the mean in which position n weighs n
(SGPT, arXiv:2202.08904), the first position, the last position."""

PoolingKind = Literal[TextPooling, "all", "sparse"]
"""All pooling methods: the above; a vector of each position (ColBERT); or a weight of each token of the vocabulary
(SPLADE)."""


class PoolingMethod(NamedTuple):
    """What a pooling method reads and gives, and its names in files of sentence-transformers and in GGUF, if any."""

    positions: Literal["every", "first", "last"] = "every"
    divisor: Callable[[int], float] = lambda _: 1.0  # of the number of positions; divides the states' sum
    weights: Callable[[Any], Any] | None = None  # of an array of positions; None for weights of 1
    gives: Literal["vector", "vectors", "weights"] = "vector"  # one; one for each token; weights of the vocabulary
    mode: str | None = None
    gguf: int | None = None


POOLING_METHODS: Mapping[PoolingKind, PoolingMethod] = {
    "cls": PoolingMethod("first", mode="cls", gguf=2),
    "mean": PoolingMethod(divisor=float, mode="mean", gguf=1),
    "weighted_mean": PoolingMethod(
        divisor=lambda count: count * (count + 1) / 2, weights=lambda positions: positions + 1.0, mode="weightedmean"
    ),
    "last": PoolingMethod("last", mode="lasttoken", gguf=3),
    "all": PoolingMethod(gives="vectors"),
    "sparse": PoolingMethod(gives="weights"),
}
BY_TOKEN = frozenset(kind for kind, method in POOLING_METHODS.items() if method.gives == "vectors")
"""Pooling methods with a vector of each token; a head after them classifies tokens."""


class PoolingParams(ExplainedStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a vector is computed from the hidden states of a text; None is the model's own value.

    Attributes:
        dimensions: length of the vector, if the model was trained for truncated vectors (Matryoshka, arXiv:2205.13147):
            the first elements are kept, before the vector is normalised.
        normalize: scale the vector to length 1; for embeddings, vLLM calls this parameter `use_activation`.
        pooling: pooling method, see `PoolingKind`.
        use_activation: whether a head for scores or classes applies the model's activation to its logits; None
            means true, and false returns logits, such as the rewards of a reward model.
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
                f"dimensions must be a whole number from 1 to {MAX_DIMENSIONS}, not {shown_number(dimensions)}",
                "dimensions",
            )
        for name in ("normalize", "use_activation"):
            value: Any = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise InvalidParameterError(f"{name} must be true or false, not {value!r:.60}", name)
        if self.pooling is not None and self.pooling not in get_args(PoolingKind):
            raise InvalidParameterError(
                f"pooling must be one of {', '.join(get_args(PoolingKind))}, not {self.pooling!r:.60}", "pooling"
            )


class Behind(Protocol):
    """Layers after the pooling; see `pooled_head.PooledHead`."""

    def __call__(self, pooled: Any, *, activate: bool) -> Any:
        """Apply the layers to pooled vectors [..., E]."""

    def of(self, kind: PoolingKind) -> Behind:
        """Return the layers after a pooling of this kind."""

    def by_token(self, rows: Any, token_ids: Sequence[int], *, activate: bool, sparse: bool) -> Any:
        """Apply the layers to all positions [T, E] of a text: a vector of each, or the weights of the vocabulary."""


@dataclasses.dataclass(frozen=True)
class PoolingPlan:
    """`PoolingParams` of a request with all values resolved, and the layers after the pooling."""

    method: PoolingMethod
    normalize: bool
    dimensions: int
    head: Behind | None = None
    activate: bool = True

    @property
    def reads_states(self) -> bool:
        """Whether the hidden state of each position is read, and not only their sum."""
        return self.by_token or self.method.weights is not None

    @property
    def by_token(self) -> bool:
        """Whether the hidden states of all positions are kept instead of one pooled vector."""
        return self.method.gives != "vector"


@dataclasses.dataclass(frozen=True)
class ModelPooling:
    """Pooling of a model, from its files.

    Attributes:
        size: E, the length of a full vector.
        pooling: pooling method, see `PoolingKind`.
        normalize: whether vectors have length 1.
        matryoshka: whether the model was trained for truncated vectors.
        matryoshka_dimensions: the lengths that it was trained for; empty for any length.
        sizes: lengths of the vectors of pooling kinds whose length is not E; only a model with a length for "sparse"
            can compute weights of the vocabulary's tokens.
        prompts: texts that the model expects before an input, by the type of the input ("query", "document").
    """

    size: int
    pooling: PoolingKind = "last"
    normalize: bool = True
    matryoshka: bool = False
    matryoshka_dimensions: tuple[int, ...] = ()
    sizes: Mapping[PoolingKind, int] = dataclasses.field(default_factory=dict[PoolingKind, int])
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])

    def length(self, kind: PoolingKind) -> int:
        """Return the number of elements of a vector of this kind."""
        return self.sizes.get(kind, self.size)

    def plan(self, params: PoolingParams, head: Behind | None = None) -> PoolingPlan:
        """Resolve the pooling parameters of a request for this model and head.

        Raises InvalidParameterError if the model cannot compute vectors of that length or kind.
        """
        kind = params.pooling or self.pooling
        method = POOLING_METHODS[kind]
        weights = method.gives == "weights"
        if weights and kind not in self.sizes:
            raise InvalidParameterError("the model has no head that gives a weight to each token", "pooling")
        size, normal = self.length(kind), self.normalize and not weights
        dimensions = size if params.dimensions is None else params.dimensions
        if dimensions != size:
            self._check(dimensions, size, cut=self.matryoshka and not weights)
        return PoolingPlan(
            method=method,
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
                f"dimensions is {dimensions}, and no config.json of the model says that its vectors of {size} may be "
                'cut ("is_matryoshka" or "matryoshka_dimensions"): leave dimensions out',
                "dimensions",
            )
        if self.matryoshka_dimensions and dimensions not in self.matryoshka_dimensions:
            allowed = ", ".join(map(str, sorted({*self.matryoshka_dimensions, size})))
            raise InvalidParameterError(
                f"dimensions is {dimensions}; the model was trained for {allowed}", "dimensions"
            )
