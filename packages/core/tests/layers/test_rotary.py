# SPDX-License-Identifier: MIT
"""Rotary settings that cannot be computed with are refused before a request meets them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.rope import ROPE_KINDS, RopeConfig, attention_scale, inverse_frequencies

CPU = Placement(torch.device("cpu"), "F32")
NAN, INF = math.nan, math.inf
LONG: dict[str, Any] = {"kind": "longrope", "dim": 16, "short_factor": (1.0,) * 8, "long_factor": (2.0,) * 8}


def longrope(**changes: Any) -> RopeConfig:
    return RopeConfig(**(LONG | changes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "0 rotary dimensions"),
        ({"dim": 15}, "15 rotary dimensions"),
        ({"dim": 1026}, "1026 rotary dimensions"),
        ({"kind": "dynamic", "dim": 2}, "2 rotary dimensions .* dynamic .* from 4"),
        ({"theta": 1.0}, "rope_theta"),
        ({"theta": NAN}, "rope_theta"),
        ({"theta": INF}, "rope_theta"),
        ({"factor": 0.5}, "rotary factor is 0.5"),
        ({"factor": NAN}, "rotary factor is nan"),
        ({"factor": INF}, "rotary factor is inf"),
        ({"original_max_position": 0}, "before scaling is 0"),
        ({"original_max_position": -5}, "before scaling is -5"),
        ({"kind": "llama3", "low_freq_factor": 0.0}, "low_freq_factor is 0"),
        ({"kind": "llama3", "low_freq_factor": 5.0}, "high_freq_factor is 4.0; it must be between 5.0 and 1e6"),
        ({"kind": "yarn", "beta_fast": 0.0}, "beta_fast is 0"),
        ({"kind": "yarn", "beta_slow": -1.0}, "beta_slow is -1"),
        ({"kind": "yarn", "beta_slow": 33.0}, "beta_fast is 32.0; it must be beta_slow, 33, to 1e6"),
        ({"kind": "yarn", "attention_factor": NAN}, "attention_factor is nan"),
        ({"kind": "yarn", "attention_factor": 0.0}, "attention_factor is 0"),
        (LONG | {"long_factor": (1.0,) * 7}, "long_factor has 7 divisors; it must have 8"),
        (LONG | {"short_factor": ()}, "short_factor has 0 divisors"),
        (LONG | {"short_factor": (1.0,) * 7 + (NAN,)}, "short_factor holds nan"),
        (LONG | {"long_factor": (1.0,) * 7 + (-2.0,)}, "long_factor holds -2"),
        (LONG | {"long_factor": (INF,) * 8}, "long_factor holds inf"),
        (LONG | {"original_max_position": 1}, "context before scaling is 1; it must be above 1"),
        (LONG | {"attention_factor": NAN}, "attention_factor is nan"),
    ],
)
def test_ranges(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidFileError, match=message):
        RopeConfig(**settings)


@pytest.mark.parametrize("kind", [kind for kind, row in ROPE_KINDS.items() if "long_factor" not in row.needed])
@pytest.mark.parametrize(
    "extreme",
    [
        {"theta": 1.0000001},
        {"theta": 1e30},
        {"factor": float(1 << 24)},
        {"original_max_position": 1},
        {"original_max_position": 1 << 24},
        {"dim": 4},
        {"low_freq_factor": 3.9999999},
        {"beta_slow": 31.9999999},
        {"beta_slow": 32.0},
        {"truncate": False},
    ],
    ids=str,
)
def test_tables_are_finite_wherever_the_ranges_allow(kind: str, extreme: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"kind": kind, "factor": 2.0} | extreme
    rotary = Rotary(RopeConfig(**settings), 1 << 24, CPU)
    rotary.prepare(64)
    assert all(bool(table.isfinite().all()) for table in rotary.tables)


def test_longrope_divides_by_the_set_of_the_served_context() -> None:
    rope = longrope(long_factor=tuple(range(1, 9)), factor=4.0, original_max_position=1024)
    plain = inverse_frequencies(RopeConfig(dim=16), 1024)
    assert np.array_equal(inverse_frequencies(rope, 1024), plain)
    np.testing.assert_allclose(inverse_frequencies(rope, 1025), plain / np.arange(1, 9), rtol=1e-6)
    assert attention_scale(rope) == pytest.approx(math.sqrt(1.2))  # ln 4 is a fifth of ln 1024
    assert attention_scale(longrope()) == 1.0


@pytest.mark.parametrize("divisor", [1e-30, 1e6])
def test_longropes_tables_are_finite(divisor: float) -> None:
    rotary = Rotary(longrope(long_factor=(divisor,) * 8), 1 << 24, CPU)
    rotary.prepare(64)
    assert all(bool(table.isfinite().all()) for table in rotary.tables)


def test_longropes_divisors_may_not_be_so_small_that_angles_are_infinite() -> None:
    with pytest.raises(InvalidFileError, match="frequencies that are negative, infinite"):
        Rotary(longrope(long_factor=(1e-45,) * 8), 1 << 24, CPU)


def test_prepare_makes_the_first_rows_of_the_whole_tables() -> None:
    rope = RopeConfig(kind="yarn", factor=4.0, original_max_position=128, dim=16)
    whole, part = Rotary(rope, 512, CPU), Rotary(rope, 512, CPU)
    part.prepare(100)
    for a, b in zip(part.tables, whole.tables, strict=True):
        assert a.shape == (100, 8)
        assert b.shape == (512, 8)
        assert torch.equal(a, b[:100])
    angles = torch.arange(512).unsqueeze(1) * torch.from_numpy(inverse_frequencies(rope, 512))
    torch.testing.assert_close(whole.tables[0], angles.cos() * attention_scale(rope))
    torch.testing.assert_close(whole.tables[1], angles.sin() * attention_scale(rope))


def test_prepare_keeps_larger_tables() -> None:
    """A recorded step knows them by address."""
    rotary = Rotary(RopeConfig(dim=16), 512, CPU)
    before = rotary.tables
    rotary.prepare(10)
    assert rotary.tables is before


class _Stored:
    """As much of a stored tensor as a plain part reads."""

    name, dtype, shape = "rope_freqs.weight", "F32", (8,)

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def load(self, dtype: str) -> np.ndarray:
        assert dtype == self.dtype
        return self._values


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, 1e-45])
def test_divisors_are_checked_as_they_come(bad: float) -> None:
    part = Rotary(RopeConfig(dim=16), 512, CPU, factors=True).parameters()["factors"]
    assert isinstance(part, TensorParameter)
    part.fill(_Stored(np.full(8, 2.0, np.float32)))  # type: ignore[arg-type]
    values = np.ones(8, np.float32)
    values[3] = bad
    with pytest.raises(InvalidFileError, match=r"rope_freqs\.weight"):
        part.fill(_Stored(values))  # type: ignore[arg-type]
