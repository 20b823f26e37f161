# SPDX-License-Identifier: MIT
"""The registry: functions one by one, servers all at once, no name twice."""

from __future__ import annotations

import logging

import pytest

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.responses.tools.names import hashed_name
from candle_vllm.responses.tools.registry import MAX_TOOLS, ToolRegistry
from candle_vllm.responses.tools.tool import ToolOutput
from packages.responses.tests.tools.tools_fakes import FakeTool


def now() -> str:
    """The time."""
    return "noon"


def names(registry: ToolRegistry) -> list[str]:
    return [definition.name for definition in registry.definitions()]


def test_functions_and_tools() -> None:
    registry = ToolRegistry([now, FakeTool("a")])
    registry.add_function(now, name="later", description="x")
    assert names(registry) == ["now", "a", "later"] == list(registry.names())
    assert [tool.definition.name for tool in registry] == names(registry)
    assert ("a" in registry, "b" in registry, len(registry)) == (True, False, 3)
    assert registry.find("a") in list(registry)
    assert registry.find("b") is None
    registry.remove("a")
    assert names(registry) == ["now", "later"]
    with pytest.raises(InvalidParameterError, match="there is no tool 'a' to remove"):
        registry.remove("a")


def test_the_revision_counts_changes() -> None:
    registry = ToolRegistry()
    seen = [registry.revision]
    for change in (
        lambda: registry.add(FakeTool("a")),
        lambda: registry.replace("s", [FakeTool("s__b", server="s")]),
        lambda: registry.replace("s", []),
        lambda: registry.remove("a"),
    ):
        change()
        seen.append(registry.revision)
    assert seen == sorted(set(seen))


def test_a_servers_tools_are_replaced_together() -> None:
    registry = ToolRegistry([now])
    registry.replace("x", [FakeTool("x__a", server="x"), FakeTool("x__b", server="x")])
    registry.replace("y", [FakeTool("y__a", server="y")])
    assert registry.replace("x", [FakeTool("x__c", server="x"), FakeTool("x__a", server="x")]) == ()
    registry.add_function(now, name="last")
    assert names(registry) == ["now", "last", "x__c", "x__a", "y__a"]
    registry.replace("x", [])
    assert names(registry) == ["now", "last", "y__a"]
    registry.replace("x", [FakeTool("x__b", server="x")])
    assert names(registry) == ["now", "last", "x__b", "y__a"]  # where it was: the order is part of cached prompts


def test_patterns_choose() -> None:
    registry = ToolRegistry([now])
    registry.replace("x", [FakeTool("x__read", server="x"), FakeTool("x__write", server="x")])
    chosen = {
        pattern: [item.name for item in registry.definitions([pattern])] for pattern in ("x__*", "now", "read", "*e*")
    }
    assert chosen == {"x__*": ["x__read", "x__write"], "now": ["now"], "read": [], "*e*": ["x__read", "x__write"]}
    assert registry.definitions([]) == ()


@pytest.mark.parametrize(
    ("tool", "told"),
    [
        (FakeTool("a"), "there is a tool of this name already"),
        (FakeTool("a b"), "a name is 1 to 64"),
        (FakeTool(""), "a name is 1 to 64"),
        (FakeTool("x" * 65), "a name is 1 to 64"),
        (FakeTool("b", parameters={"type": "array"}), 'must have "type": "object"'),
        (FakeTool("b", parameters={"description": "x" * 10_000_000}), "bytes of JSON"),
    ],
)
def test_tools_that_cannot_be_added(tool: FakeTool, told: str) -> None:
    registry = ToolRegistry([FakeTool("a")])
    with pytest.raises(InvalidParameterError, match=told):
        registry.add(tool)
    assert names(registry) == ["a"]


def test_tools_of_a_server_that_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    registry = ToolRegistry()
    tools = [
        FakeTool("s__a", server="s", original_name="a", description="first"),
        FakeTool("s__a", server="s", original_name="a", description="second"),
        FakeTool("s__b", server="other", original_name="b"),
        FakeTool("s__big", server="s", original_name="big", parameters={"description": "x" * 10_000_000}),
        FakeTool("s__c", server="s", original_name="c"),
    ]
    with caplog.at_level(logging.WARNING):
        assert registry.replace("s", tools) == ("a", "b", "big")
    assert [item.description for item in registry.definitions()] == ["first", ""]
    assert names(registry) == ["s__a", "s__c"]
    assert "the tool 'a' of the MCP server 's' is left out: the server has it twice" in caplog.text


async def test_a_name_that_a_function_has() -> None:
    async def work(*_: object) -> ToolOutput:
        return ToolOutput.of_text("the server's")

    registry = ToolRegistry()
    registry.add_function(now, name="s__now")
    tool = FakeTool("s__now", work, server="s", original_name="now")
    for _ in range(2):  # also when the list comes again
        assert registry.replace("s", [tool]) == ()
        assert names(registry) == ["s__now", hashed_name("s", "now")]
    renamed = registry.find(hashed_name("s", "now"))
    assert renamed is not None
    assert renamed.definition.original_name == "now"
    assert (await renamed.run({}, lambda _: None)).content[0].text == "the server's"
    registry.remove("s__now")
    registry.replace("s", [tool])
    assert names(registry) == ["s__now"]
    registry.add(FakeTool("f"))
    registry.add(FakeTool("g"))
    assert registry.replace("u", [FakeTool(name, server="u", original_name="") for name in ("f", "g")]) == ()


def test_there_is_a_limit() -> None:
    registry = ToolRegistry()
    left_out = registry.replace("s", [FakeTool(f"s__{number}", server="s") for number in range(MAX_TOOLS + 1)])
    assert left_out == (f"s__{MAX_TOOLS}",)
    with pytest.raises(InvalidParameterError, match="no more are allowed"):
        registry.add(FakeTool("a"))
