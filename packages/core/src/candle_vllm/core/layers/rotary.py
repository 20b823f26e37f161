# SPDX-License-Identifier: MIT
"""Rotary position embedding: tables of cosines and sines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.kernels.position_scale import position_scale
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.rotary import rotary, rotary_pair
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.loading.rope import RopeConfig, attention_scale, inverse_frequencies
from candle_vllm.core.loading.weights import Parameter
from candle_vllm.core.quantization.tensors import StoredTensor


class Rotary:
    """Rotary embedding of queries and keys, shared by a model's layers; those with a window may share another one.

    With a `query_scale` s in `rope`, queries are also multiplied by 1 + s ln(1 + floor(position / original)), where
    original is the context before its extension: by 1 at positions below original.

    GGUF files may store a scaling, such as Llama 3's, as divisors of the frequencies: the parameter "factors".

    If `rope` has axes (M-RoPE), tokens of images are rotated by several positions. Their cosines and sines are in rows
    of the tables after the rows of all positions, and are written there for each step (`turn`). For any other token the
    positions are equal, and it uses the row of its position.

    Args:
        rope: configuration of the rotary embedding.
        max_position: context for which the frequencies are computed, in tokens.
        placement: where the tables are allocated.
        factors: whether the checkpoint has divisors of the frequencies.

    Raises:
        InvalidFileError: frequencies are negative, or angles not finite, so that no request could be served.
    """

    def __init__(self, rope: RopeConfig, max_position: int, placement: Placement, *, factors: bool = False) -> None:
        self.max_position = max_position
        self._placement = placement
        self._scale = attention_scale(rope)
        self._frequencies = inverse_frequencies(rope, max_position)
        _check_angles(self._frequencies, max_position, f"the rotary settings {rope}")
        self._factors = np.ones(rope.dim // 2, np.float32) if factors else None
        self._tables: tuple[Value, Value] | None = None
        self._growth, self._original = rope.query_scale, rope.original_max_position
        self._query_factors: Value | None = None
        self._axes = np.array(rope.axes, np.int64)
        self._positions = self._room = 0

    def prepare(self, positions: int) -> None:
        """Compute the tables for positions below `positions`; larger existing tables are not changed.

        An engine calls it with the context that fits its memory, which may be far less than `max_position`.
        """
        assert 0 < positions <= self.max_position
        if self._positions < positions:
            self._positions = positions
            self._tables = self._make_tables(positions, self._room)

    def make_room(self, tokens: int) -> None:
        """Allocate rows for `tokens` image tokens of a step; references to earlier tables become invalid."""
        assert len(self._axes)
        self._positions, self._room = self._positions or self.max_position, tokens
        self._tables = self._make_tables(self._positions, tokens)

    @property
    def tables(self) -> tuple[Value, Value]:
        """cos and sin [P, R/2] in fp32: rows for positions (all if `prepare` was not called), then for image tokens."""
        if self._tables is None:
            self.prepare(self.max_position)
            assert self._tables is not None
        return self._tables

    def turn(self, places: NDArray[np.int64]) -> int:
        """Write rows for tokens by their positions [N, 4], as in `RotaryPositions`; return the first row's index.

        N is at most the number of tokens passed to `make_room`; the rows are valid until the next call.
        """
        assert len(places) <= self._room
        for table in self.tables if len(places) else ():
            numbers = np.asarray(table)  # the array shares its memory
            numbers[self.first_turned : self.first_turned + len(places)] = numbers[
                self.sources(places), np.arange(len(self._axes))
            ]
        return self.first_turned

    @property
    def first_turned(self) -> int:
        """Index of the first row that `turn` writes."""
        return self._positions

    def sources(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the source row [N, R/2] in the tables of each element that `turn` writes, for positions [N, 4]."""
        return places[:, self._axes]

    def turn_there(self, sources: Any) -> None:
        """Do what `turn` does, for tables on a GPU and `sources` on the device; queued on the current stream."""
        assert len(sources) <= self._room
        for table in self.tables:
            numbers: Any = table
            numbers[self.first_turned : self.first_turned + len(sources)] = numbers.gather(0, sources)

    def _make_tables(self, positions: int, room: int) -> tuple[Value, Value]:
        """Compute the tables: angles are float32, as in training; cosines and sines are rounded from exact values."""
        constant = self._placement.constant
        frequencies = self._frequencies if self._factors is None else self._frequencies / self._factors
        if self._growth and positions > self._original:
            periods = np.arange(positions) // self._original
            self._query_factors = constant((1 + self._growth * np.log1p(periods)).astype(np.float32))
        numbers = np.arange(positions + room, dtype=np.float32)
        numbers[positions:] = 0
        angles = (numbers[:, None] * frequencies).astype(np.float64)
        scale = np.float32(self._scale)
        cos, sin = (constant(function(angles).astype(np.float32) * scale) for function in (np.cos, np.sin))
        return cos, sin

    def scaled(self, q: Value, positions: Value) -> Value:
        """Multiply queries [T, H, D] by their position's factor; unchanged without a `query_scale`."""
        if self._growth == 0 or len(self.tables[0]) - self._room <= self._original:
            return q
        assert self._query_factors is not None, "they are made with the tables"
        return position_scale(q, positions, self._query_factors)

    def queries(self, q: Value, positions: Value) -> Value:
        """Rotate queries [T, H, D]."""
        return rotary(q, positions, *self.tables)

    def __call__(self, q: Value, k: Value, positions: Value) -> tuple[Value, Value]:
        """Rotate q [T, H, D] and k [T, K, D]."""
        return rotary_pair(q, k, positions, *self.tables)

    def parameters(self) -> Mapping[str, Parameter]:
        if self._factors is None:
            return {}
        return {"factors": _Factors(self._factors, self._frequencies, self.max_position)}


class _Factors(TensorParameter):
    """Parameter of the frequencies' divisors, checked when it is loaded."""

    def __init__(self, factors: np.ndarray, frequencies: np.ndarray, max_position: int) -> None:
        super().__init__(factors)
        self._factors = factors
        self._frequencies = frequencies
        self._max_position = max_position

    def fill(self, stored: StoredTensor) -> str | None:
        """Copy the tensor; raise `InvalidFileError` as `Rotary` does."""
        why = super().fill(stored)
        with np.errstate(all="ignore"):
            frequencies = self._frequencies / self._factors
        _check_angles(frequencies, self._max_position, f"the tensor {stored.name}")
        return why


@np.errstate(all="ignore")
def _check_angles(frequencies: np.ndarray, max_position: int, source: str) -> None:
    """Check that the largest angles are finite, and therefore all cosines and sines."""
    if not ((frequencies >= 0).all() and np.isfinite(frequencies * np.float32(max_position)).all()):
        raise InvalidFileError(f"{source} gives rotary frequencies that are negative, infinite or not a number")
