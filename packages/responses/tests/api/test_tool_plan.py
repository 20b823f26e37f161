"""Tools of a request: their names for the model, the choice among them, and what the response shows of them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.responses.api.mcp_source import OpenServer
from candle_vllm.responses.api.shown_tools import shown_tools
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
    return {tool["function"]["name"]: tool["function"] for tool in plan.client_tools}


def test_what_the_model_is_shown() -> None:
    plan = planned(FUNCTION, NAMESPACE, CUSTOM, {"type": "web_search"}, SERVER)
    assert [*functions(plan)] == ["f", "n__g", "n__h", "c"]
    assert plan.paths() == ["tools.4", "tools.4", "tools.0", "tools.1.tools.0", "tools.1.tools.1", "tools.2"]
    assert functions(plan)["f"] == {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": False}
    assert functions(plan)["n__g"]["description"] == "One of the tools of n: Nice."
    assert functions(plan)["c"]["parameters"]["required"] == ["input"]
    assert [one.name for one in plan.offered["s"]] == ["s__t", "s__u"]
    tools = [FUNCTION, NAMESPACE, CUSTOM, {"type": "web_search"}, SERVER]
    shown = shown_tools(parse_responses_request({"input": "x", "tools": tools}))
    assert [tool["type"] for tool in shown] == ["function", "namespace", "custom", "mcp"]
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


def named(*names: str) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name}} for name in names]


@pytest.mark.parametrize(
    ("choice", "chat"),
    [
        (None, None),
        ("auto", "auto"),
        ("required", "required"),
        ({"type": "function", "name": "f"}, named("f")[0]),
        ({"type": "function", "name": "g"}, named("n__g")[0]),
        ({"type": "function", "name": "n__g"}, named("n__g")[0]),
        ({"type": "custom", "name": "h", "namespace": "n"}, named("n__h")[0]),
        ({"type": "mcp", "server_label": "s", "name": "u"}, named("s__u")[0]),
        ({"type": "mcp", "server_label": "s"}, {"mode": "required", "tools": named("s__t", "s__u")}),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"},
                                                                {"type": "mcp", "server_label": "s"}]},
            {"mode": "auto", "tools": named("f", "s__t", "s__u")},
        ),
        ({"type": "allowed_tools", "mode": "none", "tools": [{"type": "function", "name": "f"}]}, "none"),
    ],
)  # fmt: skip
def test_choices(choice: Any, chat: Any) -> None:
    expected = {"type": "allowed_tools", "allowed_tools": chat} if isinstance(chat, dict) and "mode" in chat else chat
    assert planned(FUNCTION, NAMESPACE, SERVER, choice=choice).choice == expected


def test_a_name_in_two_namespaces_must_be_told_apart() -> None:
    other = {**NAMESPACE, "name": "m"}
    with pytest.raises(InvalidParameterError, match="several namespaces"):
        planned(NAMESPACE, other, choice={"type": "function", "name": "g"})
    choice = {"type": "function", "name": "g", "namespace": "m"}
    assert planned(NAMESPACE, other, choice=choice).choice == named("m__g")[0]


def test_a_choice_without_tools() -> None:
    assert planned({"type": "web_search"}, choice="auto").choice is None
    with pytest.raises(InvalidParameterError, match="nothing to choose from"):
        planned(choice="required")
