# SPDX-License-Identifier: MIT
"""`${...}` in mcp.json: environment variables, inputs and folders.

    ${NAME}  ${env:NAME}          an environment variable, which must be set
    ${NAME:-default}              the default if the variable is unset or empty
    ${input:id}                   an answer of the user
    ${workspaceFolder}  ${workspaceFolderBasename}  ${userHome}  ${pathSeparator}  ${/}

Inserted values are not expanded again. A "$" without a "{" after it is a plain dollar sign.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from candle_vllm.core.errors import ConfigError

MAX_EXPANDED = 1 << 16  # characters of one value

_EXPRESSION = re.compile(r"\$\{([^}]*)(\}|\Z)")
_VARIABLE = re.compile(r"(?:env:)?([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
_INPUT = re.compile(r"input:([A-Za-z0-9_.-]{1,100})")


class McpInput(msgspec.Struct, frozen=True, kw_only=True):
    """A value that mcp.json requests from its user (`inputs`, as in VS Code).

    Attributes:
        id: name in `${input:id}`.
        description: question for the user.
        password: whether the answer is a secret.
        default: answer if the user gives none.
        options: allowed answers; an empty list allows any.
    """

    id: str
    description: str = ""
    password: bool = False
    default: str | None = None
    options: tuple[str, ...] = ()

    @property
    def variable(self) -> str:
        """Name of the environment variable with the answer."""
        return "MCP_INPUT_" + re.sub(r"[^A-Z0-9]", "_", self.id.upper())


Inputs = Mapping[str, str] | Callable[[McpInput], str | None]
"""Answers by the id of an input, or a function that is called once for each input; None means no answer."""


class Variables:
    """Expands the values of one file.

    Args:
        environ: environment variables.
        workspace: value of `${workspaceFolder}`.
        inputs: answers, which take precedence over the environment's `MCP_INPUT_<ID>` and the input's own default.
        declared: inputs that the file declares, by id.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        workspace: Path,
        inputs: Inputs | None = None,
        declared: Mapping[str, McpInput] | None = None,
    ) -> None:
        self._environ = environ
        self._workspace = workspace.absolute()
        self._inputs = inputs
        self._declared = declared or {}
        self._answers: dict[str, str | None] = {}

    def expand(self, text: str, where: str) -> str:
        """Return the expanded text; ConfigError if an expression is invalid or has no value, or the result is too long.

        `where` names server and key for messages, which show at most the expression at fault.
        """

        def value(match: re.Match[str]) -> str:
            inner, end = match.groups()
            if not end:
                raise ConfigError(f'{where} has "${{" without a "}}"', where)
            if "${" in inner:
                raise ConfigError(f"{where} has a ${{...}} inside of another, which is not supported", where)
            return self._value(inner, where)

        expanded = _EXPRESSION.sub(value, text)
        if len(expanded) > MAX_EXPANDED:
            raise ConfigError(f"{where} has {len(expanded)} characters, and {MAX_EXPANDED} are allowed", where)
        return expanded

    def _value(self, name: str, where: str) -> str:
        if (folder := self._folder(name, where)) is not None:
            return folder
        if asked := _INPUT.fullmatch(name):
            return self._input(asked[1], where)
        variable = _VARIABLE.fullmatch(name)
        if variable is None:
            raise ConfigError(
                f"{where}: ${{{name:.60}}} is not known; there are ${{NAME}}, ${{NAME:-default}}, ${{env:NAME}}, "
                "${input:id}, ${workspaceFolder} and ${userHome}",
                where,
            )
        found = self._environ.get(variable[1])
        if variable[2] is not None and not found:
            return variable[2]
        if found is None:
            raise ConfigError(
                f"{where}: the environment variable {variable[1]:.100} is not set; set it, or write "
                f"${{{variable[1]:.100}:-default}}",
                where,
            )
        return found

    def _folder(self, name: str, where: str) -> str | None:
        """Return the value of a name that is not an environment variable, or None."""
        if name == "userHome":
            home = self._environ.get("HOME") or self._environ.get("USERPROFILE")
            if not home:
                raise ConfigError(f"{where}: ${{userHome}} needs the environment variable HOME", where)
            return home
        return {
            "workspaceFolder": str(self._workspace),
            "workspaceFolderBasename": self._workspace.name,
            "pathSeparator": os.sep,
            "/": os.sep,
        }.get(name)

    def _input(self, name: str, where: str) -> str:
        if name not in self._answers:
            self._answers[name] = self._ask(self._declared.get(name, McpInput(id=name)), where)
        answer = self._answers[name]
        if answer is None:
            raise ConfigError(
                f"{where}: the input {name} has no answer; set the environment variable {McpInput(id=name).variable}",
                where,
            )
        return answer

    def _ask(self, item: McpInput, where: str) -> str | None:
        answer = self._inputs(item) if callable(self._inputs) else (self._inputs or {}).get(item.id)
        if answer is None:
            answer = self._environ.get(item.variable, item.default)
        if answer is not None and not isinstance(answer, str):
            raise ConfigError(f"{where}: the answer to the input {item.id} must be text", where)
        if answer is not None and item.options and answer not in item.options:
            raise ConfigError(
                f"{where}: the answer to the input {item.id} must be one of {', '.join(item.options):.300}", where
            )
        return answer
