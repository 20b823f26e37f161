# SPDX-License-Identifier: MIT
"""Rotary position embedding: the frequencies of every scaling kind, and the tables made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.kernels.position_scale import position_scale
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.rotary import rotary, rotary_pair
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.loading.rope import RopeConfig
from candle_vllm.core.loading.weights import Parameter
from candle_vllm.core.quantization.tensors import StoredTensor


class Rotary:
    """Rotates queries and keys by position; one per model, shared by its layers.

    With a `query_scale` s of the settings, queries are also multiplied by 1 + s ln(1 + floor(position / original)),
    where original is the context before stretching: by 1 within it.

    A GGUF file of Llama 3 carries its scaling as divisors of the frequencies; they are the optional part "factors".

    Where the settings have axes, tokens of images are turned by three positions at once. What turns one of these stands
    in a row of its own behind those of all positions, and is written there for each step (`turn`); of any other token
    the three are equal, and its row is that of its position.

    Args:
        rope: the scaling.
        max_position: the context that the frequencies are made for, in tokens.
        placement: where the tables go.
        factors: the checkpoint has divisors of the frequencies.

    Raises:
        InvalidFileError: the frequencies are not finite, so that no request could be served.
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
        """Makes the tables for positions below `positions`; larger ones that are there already stay.

        An engine calls it with the context that it has memory for, which may be far less than `max_position`.
        """
        assert 0 < positions <= self.max_position
        if self._positions < positions:
            self._positions = positions
            self._tables = self._make_tables(positions, self._room)

    def make_room(self, tokens: int) -> None:
        """Makes room for as many tokens of images in a step; what knew the tables before does not know these."""
        assert len(self._axes)
        self._positions, self._room = self._positions or self.max_position, tokens
        self._tables = self._make_tables(self._positions, tokens)

    @property
    def tables(self) -> tuple[Value, Value]:
        """cos and sin [P, R/2] in fp32; for the whole context where `prepare` was not called."""
        if self._tables is None:
            self.prepare(self.max_position)
            assert self._tables is not None
        return self._tables

    @property
    def plain_tables(self) -> tuple[Value, Value]:
        """Those rows of them that are of positions."""
        cos, sin = self.tables
        return cos[: self._positions], sin[: self._positions]

    def turn(self, places: NDArray[np.int64]) -> int:
        """Writes what turns tokens by their places in time, height and width [N, 3]; gives the number of its first row.

        There is room for as many as `make_room` was told; the rows are good until the next call.
        """
        assert len(places) <= self._room
        for table in self.tables:
            numbers = np.asarray(table)  # shares its memory
            numbers[self.first_turned : self.first_turned + len(places)] = numbers[
                self.sources(places), np.arange(len(self._axes))
            ]
        return self.first_turned

    @property
    def first_turned(self) -> int:
        """The row of the tables that `turn` writes first."""
        return self._positions

    def sources(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """[N, R/2] the row of the tables that has each number of what turns tokens by their places [N, 3]."""
        return places[:, self._axes]

    def turn_there(self, sources: Any) -> None:
        """`turn` of tables on a GPU, by `sources` there; work."""
        assert len(sources) <= self._room
        for table in self.tables:
            numbers: Any = table
            numbers[self.first_turned : self.first_turned + len(sources)] = numbers.gather(0, sources)

    def _make_tables(self, positions: int, room: int) -> tuple[Value, Value]:
        """The angles are float32, as models are trained with; their cosines and sines are rounded from exact ones."""
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
        """Queries [T, H, D] times their position's factor; as they are where it is 1 everywhere."""
        if self._growth == 0 or len(self.plain_tables[0]) <= self._original:
            return q
        assert self._query_factors is not None, "they are made with the tables"
        return position_scale(q, positions, self._query_factors)

    def queries(self, q: Value, positions: Value) -> Value:
        """Queries [T, H, D], rotated."""
        return rotary(q, positions, *self.tables)

    def __call__(self, q: Value, k: Value, positions: Value) -> tuple[Value, Value]:
        """Both rotated: q [T, H, D], k [T, K, D]."""
        return rotary_pair(q, k, positions, *self.tables)

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        if self._factors is None:
            return {}
        return {"factors": _Factors(self._factors, self._frequencies, self.max_position)}


class _Factors(TensorParameter):
    """Divisors of the frequencies, checked as they come."""

    def __init__(self, factors: np.ndarray, frequencies: np.ndarray, max_position: int) -> None:
        super().__init__(factors)
        self._factors = factors
        self._frequencies = frequencies
        self._max_position = max_position

    def fill(self, stored: StoredTensor) -> str | None:
        """Copies the tensor."""
        why = super().fill(stored)
        with np.errstate(all="ignore"):
            frequencies = self._frequencies / self._factors
        _check_angles(frequencies, self._max_position, f"the tensor {stored.name}")
        return why


@np.errstate(all="ignore")
def _check_angles(frequencies: np.ndarray, max_position: int, source: str) -> None:
    """Cosines and sines are finite where the largest angles are."""
    if not ((frequencies >= 0).all() and np.isfinite(frequencies * np.float32(max_position)).all()):
        raise InvalidFileError(f"{source} gives rotary frequencies that are negative, infinite or not a number")


def attention_scale(rope: RopeConfig) -> float:
    """The factor on cos and sin: yarn's 0.1 ln(factor) + 1, divided by what scores get instead; longrope's; else 1."""
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "longrope":
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position))
    if rope.mscale and rope.mscale_all_dim:
        return yarn_scale(rope.factor, rope.mscale) / yarn_scale(rope.factor, rope.mscale_all_dim)
    return yarn_scale(rope.factor)


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1, by which a context that is stretched by `factor` sharpens attention."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@np.errstate(all="ignore")  # what is not finite is refused where it is used
def inverse_frequencies(rope: RopeConfig, max_position: int) -> np.ndarray:
    """Angle per position [R/2] in fp32, for a context of `max_position` tokens.

    Sources: linear, kaiokendev 2023; dynamic (NTK-aware), bloc97 2023, taken at the longest context from the start, so
    that cached keys stay valid as a sequence grows; llama3, Meta's reference code; yarn, Peng et al., arXiv:2309.00071;
    longrope, Ding et al., arXiv:2402.13753: the divisors for long texts where `max_position` is beyond the original
    context, else those for short ones, again once and for all texts.
    """
    theta = rope.theta
    if rope.kind == "dynamic" and max_position > rope.original_max_position:
        stretch = rope.factor * max_position / rope.original_max_position - (rope.factor - 1)
        theta *= stretch ** (rope.dim / (rope.dim - 2))
    exponents = (np.arange(0, rope.dim, 2, dtype=np.float32) / rope.dim).astype(np.float64)
    plain = 1 / np.power(np.float64(np.float32(theta)), exponents).astype(np.float32)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "proportional":
        return np.where(np.arange(len(plain)) < rope.rotated // 2, plain / np.float32(rope.factor), np.float32(0))
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        return _yarn(plain, rope)
    if rope.kind == "longrope":
        return plain / np.array(
            rope.long_factor if max_position > rope.original_max_position else rope.short_factor, np.float32
        )
    return plain


def _llama3(plain: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Slow dimensions are stretched, fast ones kept, those between blended."""
    turns = rope.original_max_position * plain / (2 * math.pi)
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clip(0, 1)
    return keep * plain + (1 - keep) * plain / rope.factor


def _yarn(plain: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Dimensions that turn more than beta_fast times are kept, fewer than beta_slow stretched, between on a ramp."""

    def dimension(turns: float) -> float:
        return rope.dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    stretch = ((np.arange(rope.dim // 2, dtype=np.float32) - low) / max(high - low, 0.001)).clip(0, 1)
    return plain * (1 - stretch) + plain / rope.factor * stretch
