# SPDX-License-Identifier: MIT
"""llama.cpp's chain on a GPU against the reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from candle_vllm.core.kernels import dispatch
from candle_vllm.core.kernels.sampling import triton_chain
from candle_vllm.core.kernels.sampling.chain import narrow_in_numpy
from candle_vllm.core.kernels.sampling.contract import Link

# NumPy, in which Triton's interpreter computes, warns where the kernels mean to get inf or NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
INF = math.inf


@pytest.fixture(autouse=True)
def package_functions_run_references_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter they would run what they are compared with."""
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)


def numbers(**links: float) -> np.ndarray:
    given = {"TEMPERATURE": 1} | links
    return np.array([given.get(link.name, link.neutral or 0.0) for link in Link], np.float64)


CASES: list[dict[str, Any]] = [
    {"TOP_N_SIGMA": 1.0},
    {"TOP_K": 40},
    {"TYPICAL_P": 0.5071},
    {"TOP_P": 0.9031},
    {"MIN_P": 0.05},
    {"XTC": 0.01},
    {"XTC": 0.0},
    {"LOW": 0.5, "HIGH": 1.5, "EXPONENT": 1.0},
    {"LOW": 0.0, "HIGH": 2.0, "EXPONENT": 0.0},
    {"MIROSTAT": 2, "MU": 3.0},
    {"MIROSTAT": 2, "MU": 0.01},
    {"MIROSTAT": 2, "MU": 10.0},
    {"MIROSTAT": 1, "MU": 3.0, "TEMPERATURE": 0.7},
    {"TOP_N_SIGMA": 2.0, "TOP_K": 200, "TYPICAL_P": 0.9, "TOP_P": 0.95, "MIN_P": 0.01, "XTC": 0.1, "LOW": 0.5,
     "HIGH": 1.5, "EXPONENT": 0.7, "MIROSTAT": 2, "MU": 4.0},
]  # fmt: skip
_DRAW = np.random.default_rng(3)
_USUAL = _DRAW.standard_normal(2500) * 3
KINDS = {
    "usual": _USUAL,
    "few": _USUAL[:123],
    "ties": np.round(_USUAL[:300] * 2) / 2,
    "equal": np.full(60, -7.25),
    "lowest": np.full(60, float(np.finfo(np.float32).min)),
    "masked": np.where(_DRAW.random(300) < 0.1, _USUAL[:300], -INF),
    "one": np.array([2.0]),
}


@pytest.mark.one_of_each(4)
@pytest.mark.parametrize("kind", KINDS)
def test_the_chain_is_the_references(device: torch.device, kind: str) -> None:
    """Every case is a row of one batch, with a row between that is not asked for."""
    cases = CASES if device.type == "cuda" or kind in ("few", "ties") else CASES[-4:]
    row = KINDS[kind].astype(np.float32)
    logits = torch.from_numpy(np.tile(row, (len(cases) + 1, 1))).to(device)
    places = torch.tensor([0, *range(2, len(cases) + 1)], device=device)
    links = np.stack([numbers(**case) for case in cases])
    triton_chain.narrow(logits, places, torch.from_numpy(links).to(device))
    found = logits.cpu().numpy()
    assert found[1].tolist() == row.tolist()
    for place, case, own in zip(places.tolist(), cases, links, strict=True):
        expected = row.copy()
        narrow_in_numpy(expected, own)
        assert np.flatnonzero(found[place] > -INF).tolist() == np.flatnonzero(expected > -INF).tolist(), case
        np.testing.assert_allclose(found[place], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [math.nan, INF])
def test_broken_rows_are_left_alone(device: torch.device, poison: float) -> None:
    rows = torch.tensor([[1.0, poison, 2.0], [-INF, -INF, -INF], [1.0, 0.0, 2.0]], device=device)
    links = torch.from_numpy(np.tile(numbers(TYPICAL_P=0.5, MIROSTAT=2, MU=1), (3, 1))).to(device)
    expected = rows.cpu().numpy().copy()
    narrow_in_numpy(expected[2], links[2].cpu().numpy())
    triton_chain.narrow(rows, torch.arange(3, device=device), links)
    np.testing.assert_array_equal(rows.cpu().numpy(), expected)
