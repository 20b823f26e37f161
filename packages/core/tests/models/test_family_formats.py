# SPDX-License-Identifier: MIT
"""Every family in every format of quantised weights: the logits are those of the numbers that the format means."""

from __future__ import annotations

from pathlib import Path

import pytest

from packages.core.tests.models.families import FORMATS, ISQ_TYPES, ROWS, cases, first_rows
from packages.core.tests.models.family_formats import write_format
from packages.core.tests.models.tiny import (
    device_logits,
    eager_logits,
    error,
    recorded_logits,
    some_tokens,
    typical_spread,
    write_tiny,
)

TOKENS = some_tokens(12)
CUT = [7, 4, 1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp("family") for name in first_rows()}


def folder_of(name: str, folders: dict[str, Path]) -> Path:
    if not (folders[name] / "config.json").exists():
        write_tiny(folders[name], ROWS[name].model_type, **ROWS[name].config)
    return folders[name]


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", cases(first_rows()))
def test_logits_are_those_of_the_numbers(name: str, format: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """To the last digit op by op, decoded or as a GPU holds them; the compiled kernels round activations to 8 bits or
    bfloat16."""
    stored, plain = write_format(folder_of(name, folders), format, tmp_path)
    wanted = eager_logits(plain, TOKENS, CUT)
    assert error(eager_logits(stored, TOKENS, CUT), wanted) < 1e-5
    assert error(device_logits(stored, TOKENS, CUT), wanted) < 1e-5
    if ROWS[name].recorded:
        assert typical_spread(recorded_logits(stored, TOKENS, CUT), wanted) < 0.05


@pytest.mark.one_of_each(5)
@pytest.mark.parametrize("kind", ISQ_TYPES)
@pytest.mark.parametrize("name", cases(first_rows()))
def test_in_situ_quantisation(name: str, kind: str, folders: dict[str, Path]) -> None:
    """The types' own error, from 8 bits of rounding to 4, on matrices of normal numbers."""
    source = folder_of(name, folders)
    loaded = recorded_logits if ROWS[name].recorded else eager_logits
    plain, ours = eager_logits(source, TOKENS, CUT), loaded(source, TOKENS, CUT, isq=kind)
    assert 1e-4 < typical_spread(ours, plain) < ISQ_TYPES[kind]
    decoded = eager_logits(source, TOKENS, CUT, isq=kind)
    assert error(device_logits(source, TOKENS, CUT, isq=kind), decoded) < 1e-5
