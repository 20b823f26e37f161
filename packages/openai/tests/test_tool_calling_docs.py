"""docs/tool-calling.md lists every format with its names, and what it says is refused is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.openai.formats.reasoning_table import REASONING_FORMATS
from candle_vllm.openai.formats.table import TOOL_FORMATS

PAGE = (Path(__file__).parents[3] / "docs" / "tool-calling.md").read_text(encoding="utf-8")
REFUSED: dict[str, Any] = {
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"minLength": 1}},
    "contains": {"type": "array", "contains": {"type": "string"}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "$dynamicRef": {"$dynamicRef": "#a"},
    "other documents": {"$ref": "https://example.com/schema.json"},
    "unknown formats": {"type": "string", "format": "no-such-format"},
    "look-around": {"type": "string", "pattern": "(?=a)a"},
    "`oneOf` whose branches may overlap": {"oneOf": [{"type": "number"}, {"type": "integer"}]},
    "`minLength` above `maxLength`": {"type": "string", "minLength": 3, "maxLength": 2},
    "a recursion that never ends": {"$ref": "#"},
}


def table(heading: str) -> dict[str, list[list[str]]]:
    """The table below a heading: name -> the words in backticks of the other columns."""
    rows = PAGE.split(f"### {heading}\n")[1].strip().split("\n\n")[0].splitlines()[2:]
    cells = [[re.findall(r"`([^`]+)`", cell) for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    return {row[0][0]: row[1:] for row in cells}


@pytest.mark.parametrize(("heading", "rows"), [("Tool calls", TOOL_FORMATS), ("Reasoning", REASONING_FORMATS)])
def test_every_format_has_its_row(heading: str, rows: tuple[Any, ...]) -> None:
    listed = table(heading)
    assert list(listed) == [row.name for row in rows]
    for row in rows:
        aliases, sample, types = listed[row.name]
        assert tuple(aliases) == row.aliases
        assert tuple(types) == row.model_types
        assert sample or heading == "Tool calls"


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_page_says_is_refused_is(what: str) -> None:
    assert what in " ".join(PAGE.split())
    with pytest.raises(InvalidParameterError):
        ScriptedEngine().check_structured_outputs(StructuredOutputsParams(json=REFUSED[what]))
