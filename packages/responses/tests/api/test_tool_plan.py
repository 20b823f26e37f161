# SPDX-License-Identifier: MIT
"""Tools of a request: their names for the model, the choice among them, and what the response shows of them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai.task import Choice, ToolUse
from candle_vllm.responses.api.mcp_source import OpenServer
from candle_vllm.responses.api.responder import shown_tools
from candle_vllm.responses.api.tool_plan import ToolPlan, plan_tools
from candle_vllm.responses.protocol.request import parse_responses_request
from candle_vllm.responses.tools.tool import ToolDefinition

FUNCTION = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": False}
CUSTOM = {"type": "custom", "name": "c"}
INNER = {"type": "function", "name": "g"}
NAMESPACE = {"type": "namespace", "name": "n", "description": "Nice.", "tools": [INNER, {**CUSTOM, "name": "h"}]}
SERVER = {"type": "mcp", "server_label": "s"}


class Fake:
    def __init__(self, name: str) -> None:
        self.definition = ToolDefinition(name=f"s__{name}", server="s", original_name=name)

    async def run(self, arguments: Any, report: Any) -> Any:
        raise AssertionError


def planned(*tools: dict[str, Any], choice: Any = None) -> ToolPlan:
    wire = parse_responses_request({"input": "x", "tools": list(tools), "tool_choice": choice})
    servers = {
        place: OpenServer("s", [Fake("t"), Fake("u")]) for place, tool in enumerate(tools) if tool["type"] == "mcp"
    }
    return plan_tools(wire, servers)


def functions(plan: ToolPlan) -> dict[str, dict[str, Any]]:
    """Those that the caller runs."""
    shown = {tool["function"]["name"]: tool["function"] for tool in plan.shown}
    return {name: function for name, function in shown.items() if plan.by_name[name].kind != "mcp"}


def test_what_the_model_is_shown() -> None:
    plan = planned(FUNCTION, NAMESPACE, CUSTOM, {"type": "web_search"}, SERVER)
    assert [*functions(plan)] == ["f", "n__g", "n__h", "c"]
    shown = [plan.by_name[tool["function"]["name"]].path for tool in plan.shown]
    assert shown == ["tools.4", "tools.4", "tools.0", "tools.1.tools.0", "tools.1.tools.1", "tools.2"]
    assert functions(plan)["f"] == {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": False}
    assert functions(plan)["n__g"]["description"] == "One of the tools of n: Nice."
    assert functions(plan)["c"]["parameters"]["required"] == ["input"]
    assert [one.name for one in plan.offered["s"]] == ["s__t", "s__u"]
    tools = [FUNCTION, NAMESPACE, CUSTOM, {"type": "web_search"}, SERVER]
    repeated = shown_tools(parse_responses_request({"input": "x", "tools": tools}))
    assert [tool["type"] for tool in repeated] == ["function", "namespace", "custom", "mcp"]
    assert (plan.mcp_name("s", "t"), plan.mcp_name("other", "t")) == ("s__t", "other__t")
    assert plan.needs_approval("s__t")


def test_long_names_of_namespaces_fit() -> None:
    plan = planned({"type": "namespace", "name": "n" * 60, "tools": [{"type": "function", "name": "g" * 60}]})
    (name,) = plan.by_name
    assert len(name) <= 64
    assert (plan.by_name[name].namespace, plan.by_name[name].name) == ("n" * 60, "g" * 60)


def test_grammars_of_custom_tools() -> None:
    def format_of(syntax: str) -> dict[str, Any]:
        return {**CUSTOM, "format": {"type": "grammar", "syntax": syntax, "definition": "a+"}}

    enforced = functions(planned(format_of("regex")))["c"]
    assert (enforced["strict"], enforced["parameters"]["properties"]["input"]["pattern"]) == (True, "^(?:a+)$")
    shown = functions(planned(format_of("lark")))["c"]
    assert "Lark grammar:\na+" in shown["description"]
    assert "strict" not in shown


def test_secrets_are_not_shown() -> None:
    secret = {"server_url": "https://h/p?token=hush", "authorization": "hush", "headers": {"k": "hush"}}
    (shown,) = shown_tools(parse_responses_request({"input": "x", "tools": [{**SERVER, **secret}]}))
    assert shown == {
        "type": "mcp",
        "server_label": "s",
        "server_url": "https://h/p",
        "require_approval": "always",
    }


@pytest.mark.parametrize("tools", [[{**FUNCTION, "name": "s__t"}, SERVER], [SERVER, {**FUNCTION, "name": "s__t"}]])
def test_a_function_with_the_name_of_a_servers_tool(tools: list[dict[str, Any]]) -> None:
    """Neither is left out without a word."""
    with pytest.raises(InvalidParameterError) as refusal:
        planned(*tools)
    assert refusal.value.param == f"tools.1.{'allowed_tools' if tools[1] is SERVER else 'name'}"
    assert planned({**FUNCTION, "name": "s__t"}, {**SERVER, "allowed_tools": ["u"]}).offered["s"][0].name == "s__u"


def test_a_tool_that_cannot_be_offered_does_not_spoil_the_others() -> None:
    fat = Fake("fat")
    fat.definition = msgspec.structs.replace(fat.definition, parameters={"type": "object", "title": "x" * (2 << 20)})
    wire = parse_responses_request({"input": "x", "tools": [SERVER]})
    plan = plan_tools(wire, {0: OpenServer("s", [fat, Fake("t")])})
    assert [one.name for one in plan.offered["s"]] == ["s__t"]


@pytest.mark.parametrize(
    ("choice", "chosen"),
    [
        (None, Choice()),
        ("auto", Choice()),
        ("required", Choice("required")),
        ({"type": "function", "name": "f"}, Choice("required", named="f")),
        ({"type": "function", "name": "g"}, Choice("required", named="n__g")),
        ({"type": "function", "name": "n__g"}, Choice("required", named="n__g")),
        ({"type": "custom", "name": "h", "namespace": "n"}, Choice("required", named="n__h")),
        ({"type": "mcp", "server_label": "s", "name": "u"}, Choice("required", named="s__u")),
        ({"type": "mcp", "server_label": "s"}, Choice("required", {"s__t", "s__u"})),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"},
                                                                {"type": "mcp", "server_label": "s"}]},
            Choice("auto", {"f", "s__t", "s__u"}),
        ),
        ({"type": "allowed_tools", "mode": "none", "tools": [{"type": "function", "name": "f"}]}, Choice("none")),
    ],
)  # fmt: skip
def test_choices(choice: Any, chosen: Choice) -> None:
    plan = planned(FUNCTION, NAMESPACE, SERVER, choice=choice)
    assert plan.choice == chosen
    use = plan.use(plan.choice, parallel=True)
    assert len(use.shown) == (0 if chosen.mode == "none" else 5)
    every = {"s__t", "s__u", "f", "n__g", "n__h"}
    allowed = {chosen.named} if chosen.named else chosen.names or every
    assert {tool.name for tool in use.tools} == (set() if chosen.mode == "none" else set(allowed))
    later = plan.use(plan.choice.freed(), parallel=True)
    assert (later.mode, later.named) == ("none" if chosen.mode == "none" else "auto", None)


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        ({"type": "custom", "name": "f"}, "tool_choice.name cannot be 'f': its type is 'function'"),
        ({"type": "function", "name": "s__t"}, "tool_choice.name cannot be 's__t': its type is 'mcp'"),
        ({"type": "function", "name": "h"}, "tool_choice.name cannot be 'h': its type is 'custom'"),
        ({"type": "function", "name": "fx"}, "tool_choice.name must name one of the request's tools, not 'fx'; did "
         "you mean 'f'?"),
        ({"type": "function", "name": "tx"}, "tool_choice.name must name one of the request's tools, not 'tx'"),
    ],
)  # fmt: skip
def test_a_choice_that_names_no_tool_of_its_type(choice: Any, why: str) -> None:
    with pytest.raises(InvalidParameterError) as failure:
        planned(FUNCTION, NAMESPACE, SERVER, choice=choice)
    assert str(failure.value) == why


def test_a_name_in_two_namespaces_must_be_told_apart() -> None:
    other = {**NAMESPACE, "name": "m"}
    with pytest.raises(InvalidParameterError, match="several namespaces"):
        planned(NAMESPACE, other, choice={"type": "function", "name": "g"})
    choice = {"type": "function", "name": "g", "namespace": "m"}
    assert planned(NAMESPACE, other, choice=choice).choice.named == "m__g"
    assert planned(NAMESPACE, INNER, choice={"type": "function", "name": "g"}).choice.named == "g"


def test_a_choice_without_tools() -> None:
    assert planned({"type": "web_search"}, choice="auto").use(Choice(), parallel=None) == ToolUse()
    plan = planned(choice="required")
    with pytest.raises(InvalidParameterError, match="nothing to choose from"):
        plan.use(plan.choice, parallel=None)


@pytest.mark.parametrize(
    ("wish", "rules"),
    [
        ({"never": {"tool_names": ["t"]}}, ["never", "always"]),
        ({"never": {}}, ["always", "always"]),
        ({"never": {"tool_names": None}}, ["always", "always"]),
        ({"never": {"read_only": False}, "always": {"tool_names": ["u"]}}, ["never", "always"]),
        ({"always": {}, "never": {"tool_names": ["t"]}}, ["always", "always"]),
        ("never", ["never", "never"]),
        (None, ["always", "always"]),
    ],
)
def test_an_empty_filter_approves_nothing(wish: Any, rules: list[str]) -> None:
    assert [*planned({**SERVER, "require_approval": wish}).approval.values()] == rules
