# SPDX-License-Identifier: MIT
"""docs/responses.md says of every field what it does."""

from __future__ import annotations

import re
from pathlib import Path

from candle_vllm.responses.protocol.items import _KINDS
from candle_vllm.responses.protocol.request import ResponsesRequest

TEXT = (Path(__file__).parents[4] / "docs" / "responses.md").read_text()


def test_every_field_is_in_the_table() -> None:
    fields = TEXT.partition("## Fields\n")[2].partition("\n## ")[0]
    rows = [line for line in fields.splitlines() if line.startswith("| `")]
    told = {name for row in rows for name in re.findall(r"`([\w.]+)`", row.split("|")[1])}
    assert told == {*ResponsesRequest.wire_names(), *ResponsesRequest.refused_fields}


def test_every_item_is_named() -> None:
    assert len(_KINDS) > 5
    for kind in _KINDS:
        assert f"`{kind}`" in TEXT
