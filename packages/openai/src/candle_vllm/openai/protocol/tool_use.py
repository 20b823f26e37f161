"""What a request says about tools, in one piece: for the chat template, for parsers and for grammars (step 2)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from candle_vllm.openai.protocol.fields import invalid
from candle_vllm.openai.protocol.tools import AllowedToolsChoice, Tool, ToolChoice, ToolReference


class ToolFunction(msgspec.Struct, frozen=True):
    """A function as parsers and grammars see it.

    Attributes:
        parameters: a JSON schema that has `"type": "object"`; without properties where none were given.
        strict: the arguments must follow the schema even where calls are the model's own choice.
    """

    name: str
    description: str | None
    parameters: dict[str, Any]
    strict: bool


class ToolUse(msgspec.Struct, frozen=True, kw_only=True):
    """What a request says about tools.

    Attributes:
        tools: the functions that may be called; none in mode `none`.
        mode: `none`, `auto` (the model chooses) or `required` (at least one call).
        parallel: whether more than one call may be made.
        named: the one function that must be called, exactly once; the mode is `required` then.
        shown: the tools for the chat template, which are all of the request's, also where only some may be called.
    """

    tools: tuple[ToolFunction, ...] = ()
    mode: Literal["none", "auto", "required"] = "none"
    parallel: bool = True
    named: str | None = None
    shown: tuple[dict[str, Any], ...] = ()

    def as_template(self) -> list[dict[str, Any]] | None:
        """OpenAI's form `{"type": "function", "function": {...}}`; None where no tool is to be shown."""
        return list(self.shown) or None


def tool_use(tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool | None) -> ToolUse:
    """The three fields as one; raises the error that pydantic reports where they contradict each other.

    With `tool_choice: "none"` the tools are not shown either, so that the model does not write a call as text.
    """
    functions = {tool.function.name: _function(tool) for tool in tools or ()}
    if not functions:
        if choice not in (None, "none", "auto"):
            raise invalid("tool_choice", "needs tools: there is nothing to choose from")
        return ToolUse()
    if choice == "none":
        return ToolUse()
    use = ToolUse(
        tools=tuple(functions.values()),
        mode="required" if choice == "required" else "auto",
        parallel=parallel is not False,
        shown=tuple(tool.shown() for tool in tools or ()),
    )
    if isinstance(choice, ToolReference):
        named = _known(choice, functions, "tool_choice")
        return replace(use, tools=(functions[named],), mode="required", parallel=False, named=named)
    if isinstance(choice, AllowedToolsChoice):
        place = "tool_choice.allowed_tools.tools"
        names = {_known(one, functions, f"{place}.{i}") for i, one in enumerate(choice.allowed_tools.tools)}
        allowed = tuple(function for name, function in functions.items() if name in names)
        return replace(use, tools=allowed, mode=choice.allowed_tools.mode)
    return use


def _known(reference: ToolReference, functions: Mapping[str, ToolFunction], place: str) -> str:
    name = reference.function.name
    if name not in functions:
        near = difflib.get_close_matches(name, functions, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"the first of them is {next(iter(functions))!r}"
        raise invalid(f"{place}.function.name", f"must name one of the {len(functions)} tools, not {name!r}; {advice}")
    return name


def _function(tool: Tool) -> ToolFunction:
    function = tool.function
    schema = {"type": "object", **(function.parameters or {"properties": {}, "additionalProperties": False})}
    return ToolFunction(function.name, function.description, schema, bool(function.strict))
