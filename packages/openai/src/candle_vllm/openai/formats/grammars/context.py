"""What the grammars of bodies have in common: the tools, and what is guaranteed of their arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from candle_vllm.openai.errors import UnsupportedParameterError
from candle_vllm.openai.formats.calls import NAME
from candle_vllm.openai.formats.grammars.schemas import OBJECT, Root, Tool
from candle_vllm.openai.formats.grammars.writer import Writer
from candle_vllm.openai.formats.layout import ToolFormat


class Block(NamedTuple):
    """The expression of one call or more behind an opening mark.

    Attributes:
        lead: a mark that it begins with, "" where there is none.
        rest: an expression of what follows.
    """

    lead: str
    rest: str


@dataclasses.dataclass(frozen=True)
class Context:
    """One request.

    Attributes:
        writer: gets the rules.
        form: the row of the table.
        tools: what may be called.
        loose: names of the tools of which any arguments will do.
        many: whether a message may have more than one call.
    """

    writer: Writer
    form: ToolFormat
    tools: Sequence[Tool]
    loose: Collection[str]
    many: bool

    def root(self, tool: Tool) -> Root:
        """The schema that the arguments of a tool must follow."""
        return Root(tool, OBJECT if tool.name in self.loose else tool.parameters)

    def json(self, tool: Tool) -> str:
        """The arguments of a tool as JSON."""
        root = self.root(tool)
        schema: dict[str, Any] = root.self_contained(root.schema)
        if not schema.get("properties") and not schema.get("required") and schema.get("additionalProperties") is False:
            return '"{}"'
        return self.writer.json(schema)

    def check_names(self) -> None:
        """Refuses names that no parser of this format would take for one."""
        for tool in self.tools:
            if NAME.fullmatch(tool.name) is None:
                raise UnsupportedParameterError(
                    f"tools: {tool.name!r} must begin with a letter or '_' in this model's tool format; rename it",
                    "tools",
                )
