"""PoolingParams: how the vector of one text is made of its hidden states. The name and `dimensions` are vLLM's."""

from __future__ import annotations

from typing import Any, Literal, get_args

import msgspec

from candle_vllm.core.errors import InvalidParameterError

MAX_DIMENSIONS = 1 << 16

PoolingKind = Literal["mean", "cls", "last"]
"""The mean over all positions, the first one, or the last one."""


class PoolingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one vector is made of the hidden states of a text; None is what the model itself says.

    Attributes:
        dimensions: length of the vector, where the model was trained to be cut (Matryoshka, arXiv:2205.13147): the
            first ones are kept, then normalised anew.
        normalize: scale the vector to length 1.
        pooling: which positions it is made of.
    """

    dimensions: int | None = None
    normalize: bool | None = None
    pooling: PoolingKind | None = None

    def __post_init__(self) -> None:
        dimensions: Any = self.dimensions
        if dimensions is not None and (
            isinstance(dimensions, bool) or not isinstance(dimensions, int) or not 1 <= dimensions <= MAX_DIMENSIONS
        ):
            raise InvalidParameterError(
                f"dimensions must be a whole number from 1 to {MAX_DIMENSIONS}, not {_shown(dimensions)}", "dimensions"
            )
        if self.normalize is not None and not isinstance(self.normalize, bool):
            raise InvalidParameterError(f"normalize must be true or false, not {self.normalize!r:.60}", "normalize")
        if self.pooling is not None and self.pooling not in get_args(PoolingKind):
            raise InvalidParameterError(
                f"pooling must be one of {', '.join(get_args(PoolingKind))}, not {self.pooling!r:.60}", "pooling"
            )


def _shown(value: object) -> str:
    """A value for a message; Python refuses to write out very long numbers."""
    return "a larger number" if isinstance(value, int) and abs(value) >= 10**20 else f"{value!r:.60}"
