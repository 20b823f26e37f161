# SPDX-License-Identifier: MIT
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
    "`uniqueItems` of arrays and objects": {"items": {"type": "array"}, "uniqueItems": True},
    "of fractions under bounds": {"items": {"type": "number", "minimum": 0}, "uniqueItems": True},
    "the opposite of a pattern": {"not": {"pattern": "a+"}},
    "of `multipleOf`": {"if": {"multipleOf": 2}, "then": {"minimum": 1}},
    'of "an integer"': {"not": {"type": "integer"}},
    "`propertyNames` beside `patternProperties`": {"propertyNames": {"maxLength": 3}, "patternProperties": {"a": {}}},
    "`unevaluatedProperties` beside `allOf`": {"allOf": [{}], "unevaluatedProperties": False},
    "more than 256 cases": {"allOf": [{}], "dependentRequired": {f"a{number}": ["b"] for number in range(9)}},
    "$dynamicRef": {"$dynamicRef": "#a"},
    "other documents": {"$ref": "https://example.com/schema.json"},
    "look-around": {"type": "string", "pattern": "(?=a)a"},
    "`minLength` above `maxLength`": {"type": "string", "minLength": 3, "maxLength": 2},
    "a recursion that never ends": {"$ref": "#"},
}
HELD: dict[str, Any] = {
    "`if`/`then`/`else`": {"if": {"type": "string"}, "then": {"minLength": 1}, "else": {"const": 1}},
    "`not`": {"not": {"type": "string"}},
    "`oneOf` whose options overlap": {"oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
    "`dependentRequired`": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "`dependentSchemas`": {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}},
    "`dependencies`": {"type": "object", "dependencies": {"a": ["b"]}},
    "`contains`": {"type": "array", "contains": {"type": "string"}},
    "`propertyNames`": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "look-aheads at the beginning": {"type": "string", "pattern": r"^(?!\.)(?!.*\.\.)[\w.]+@\w+$"},
    "`uniqueItems` of few values": {"items": {"enum": ["a", "b"]}, "uniqueItems": True},
    "`uniqueItems` of texts": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
    "anchors and ids of the same document": {"$ref": "#here", "$defs": {"a": {"$anchor": "here", "type": "null"}}},
    "unknown keywords": {"type": "string", "maxLenght": 3, "format": "no-such-format"},
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


@pytest.mark.parametrize("what", HELD)
def test_what_the_page_says_is_held_is(what: str) -> None:
    assert what in " ".join(PAGE.split())
    ScriptedEngine().check_structured_outputs(StructuredOutputsParams(json=HELD[what]))
