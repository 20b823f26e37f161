# SPDX-License-Identifier: MIT
"""Models that several tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core.testing.toy_model import write_toy_model
from packages.core.tests.models.families import ROWS


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama."""
    return write_toy_model(tmp_path_factory.mktemp("toy"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Takes tests of rows that are not common out of the common run, see `models/families.py`."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        row = ROWS.get(params.get("name", ""))
        if row is not None and not row.common:
            item.add_marker("every_case")
