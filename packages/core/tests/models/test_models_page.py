# SPDX-License-Identifier: MIT
"""docs/models.md says of every architecture and format what the tests say."""

from __future__ import annotations

from candle_vllm.core.models.registry import GGUF_FAMILIES, HF_FAMILIES
from packages.core.tests.models.families import RENAMED, ROWS
from packages.core.tests.models.models_page import PAGE, page, rows_by_class


def test_the_table_is_current() -> None:
    """`uv run --group dev python packages/core/tests/models/models_page.py` writes it anew."""
    text = PAGE.read_text()
    assert text == page(text)


def test_every_architecture_has_a_row() -> None:
    assert [name for name, rows in rows_by_class().items() if not rows] == []
    elsewhere = {"paddleocr", "hunyuan_vl"}  # transformers has no text model of them alone
    assert {row.gguf for row in ROWS.values()} - {None} | set(RENAMED.values()) | elsewhere == set(GGUF_FAMILIES)


def test_every_architecture_is_named_in_the_list_of_families() -> None:
    text = PAGE.read_text().partition("<!-- table")[0]
    assert [name for name in (*HF_FAMILIES, *GGUF_FAMILIES) if f"`{name}`" not in text] == []
