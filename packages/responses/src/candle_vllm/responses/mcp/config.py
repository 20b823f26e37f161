# SPDX-License-Identifier: MIT
"""mcp.json: where it is found, its formats, and the servers in it.

The file may have `mcpServers` (Claude, Cursor, llama-server, candle-vllm), `servers` with `inputs` (VS Code), or
`servers` as a list (candle-vllm); or the file is the object or list of servers itself. See docs/mcp.md.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from candle_vllm.core.errors import ConfigError
from candle_vllm.core.setting_kinds import nearest
from candle_vllm.openai.errors import InvalidBodyError
from candle_vllm.openai.json_body import decode_json
from candle_vllm.responses.mcp.server_config import McpServerConfig
from candle_vllm.responses.mcp.server_keys import EXPANDED, FIELD_OF, NAMES, read_small_file

logger = logging.getLogger(__name__)

CONFIG_VARIABLE = "CANDLE_VLLM_MCP_CONFIG"
FILE_NAME = "mcp.json"
MAX_SERVERS = 64
MAX_INPUTS = 256
_MAX_WARNINGS = 20
_WRAPPERS = ("mcpServers", "servers")
_TOP_KEYS = (*_WRAPPERS, "inputs", "$schema")
_STRING = r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)'
_COMMENT = re.compile(rf"{_STRING}|//[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
_TRAILING_COMMA = re.compile(rf"{_STRING}|,(?=\s*[}}\]])", re.DOTALL)
_NO_NEWLINE = re.compile(r"[^\n]")


@dataclass(frozen=True)
class McpConfig:
    """The servers of a file, in the file's order, including disabled ones; `path` is None without a file."""

    servers: tuple[McpServerConfig, ...] = ()
    path: Path | None = None

    def server(self, name: str) -> McpServerConfig | None:
        return next((server for server in self.servers if server.name == name), None)


McpServers = McpConfig | McpServerConfig | Iterable[McpServerConfig] | str | Path
"""All types that a session accepts as its servers."""


def server_configs(servers: McpServers) -> dict[str, McpServerConfig]:
    """Return the servers of a session by name; a path is read with this process's environment and working folder.

    Raises ConfigError if a value is no configuration, a file cannot be used, or two servers have one name.
    """
    if isinstance(servers, (str, Path)):
        servers = load_mcp_config(servers)
    if isinstance(servers, McpConfig):
        servers = servers.servers
    if isinstance(servers, McpServerConfig):
        servers = (servers,)
    if isinstance(servers, Mapping) or not isinstance(servers, Iterable):
        raise _no_configuration(servers)
    by_name: dict[str, McpServerConfig] = {}
    for config in servers:
        if not isinstance(config, McpServerConfig):
            raise _no_configuration(config)
        if config.name in by_name:
            raise ConfigError(f"two MCP servers are named {config.name!r:.100}: give each its own name", "mcp_servers")
        by_name[config.name] = config
    return by_name


def _no_configuration(given: object) -> ConfigError:
    return ConfigError(
        "mcp_servers must be the path of an mcp.json or McpServerConfig objects (McpServerConfig.from_mapping makes "
        f"one of a name and an entry of mcp.json), not a {type(given).__name__}",
        "mcp_servers",
    )


def find_mcp_config(flag: Path | str | None, environ: Mapping[str, str], folder: Path) -> Path | None:
    """Return the configuration file to use, if any; ConfigError if a named file does not exist.

    The file is the first of these: `flag` (the value of --mcp-config), the value of CANDLE_VLLM_MCP_CONFIG, the file
    `.candle-vllm/mcp.json` in the home folder (HOME), and `mcp.json` in `folder`. An empty variable counts as unset.
    Relative paths are relative to `folder`.
    """
    for given, spelled in ((flag, "--mcp-config"), (environ.get(CONFIG_VARIABLE) or None, CONFIG_VARIABLE)):
        if given is not None:
            path = folder / _home_expanded(given)
            if not _is_file(path):
                raise ConfigError(f"{spelled}: the file {path!s:.300} does not exist", "mcp_config")
            return path
    homes = [Path(environ["HOME"]) / ".candle-vllm"] if environ.get("HOME") else []
    return next((base / FILE_NAME for base in (*homes, folder) if _is_file(base / FILE_NAME)), None)


def _home_expanded(path: Path | str) -> Path:
    """Return the path with its `~` replaced, if the user exists."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _is_file(path: Path) -> bool:
    """Whether a path is a file; False for a name that is too long for the operating system."""
    try:
        return path.is_file()
    except OSError:
        return False


def load_mcp_config(
    path: Path | str | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    workspace: Path | str | None = None,
    inputs: Inputs | None = None,
) -> McpConfig:
    """Read mcp.json. `cwd` and `envFile` are relative to the file's folder. Disabled servers may have unset variables.

    Args:
        path: path of the file, relative to `workspace`; None searches for one, and without one there are no servers.
        environ: environment for `${NAME}` and `MCP_INPUT_<ID>`; None uses this process's environment.
        workspace: value of `${workspaceFolder}`, and `folder` of `find_mcp_config`; None means the working folder.
        inputs: answers to `${input:id}`: a mapping, or a function that is called once for each id.

    Raises ConfigError if the file cannot be used; the message names the file, and the server and key if there are any.
    """
    environ = os.environ if environ is None else environ
    workspace = Path.cwd() if workspace is None else Path(workspace)
    found = workspace / _home_expanded(path) if path is not None else find_mcp_config(None, environ, workspace)
    if found is None:
        return McpConfig()
    try:
        content = decode_json(strip_comments(read_small_file(found, "MCP configuration")), "The file")
    except InvalidBodyError as error:
        raise ConfigError(f"{found}: {error}", "mcp_config") from None
    try:
        declared, entries = _sections(content)
        variables = Variables(environ, workspace, inputs, declared)
        servers = tuple(_server(name, entry, variables, found.parent) for name, entry in entries)
    except ConfigError as error:
        raise ConfigError(f"{found}: {error}", error.setting) from None
    return McpConfig(servers, found)


def strip_comments(text: str) -> str:
    """Replace `//` and `/* */` comments, and commas before a closing bracket, by blanks.

    Strings do not change, and lines and columns remain the same, for the messages of a JSON parser, which also reports
    other errors. A comment without end extends to the end of the text.
    """
    return _TRAILING_COMMA.sub(_blank, _COMMENT.sub(_blank, text))


def _blank(match: re.Match[str]) -> str:
    found = match.group()
    return found if found.startswith('"') else _NO_NEWLINE.sub(" ", found)


def _sections(content: Any) -> tuple[dict[str, McpInput], list[tuple[str, Any]]]:
    """Return the declared inputs, and the entries of the servers by name."""
    inner = content.get("mcp") if isinstance(content, dict) else None
    if isinstance(inner, dict) and any(key in inner for key in _WRAPPERS):
        content = inner  # the file is a program's settings, with a section "mcp"
    inputs: dict[str, McpInput] = {}
    servers = content
    if isinstance(content, dict):
        wrappers = [key for key in _WRAPPERS if key in content]
        if len(wrappers) == 2:
            raise ConfigError('both "mcpServers" and "servers" are there: put all servers into one', "servers")
        if wrappers:
            servers = content[wrappers[0]]
            inputs = _inputs(content.get("inputs", []))
            for key in [key for key in content if key not in _TOP_KEYS][:_MAX_WARNINGS]:
                hint = nearest(key[:100], _TOP_KEYS)
                logger.warning("mcp.json: the key %.60r is not known and has no effect%s", key, hint)
        else:
            servers = {key: value for key, value in content.items() if key != "$schema"}
    entries = list(_entries(servers))
    if len(entries) > MAX_SERVERS:
        raise ConfigError(f"{len(entries)} servers; at most {MAX_SERVERS} are allowed", "servers")
    return inputs, entries


def _entries(servers: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(servers, dict):
        if any(key in FIELD_OF and not isinstance(value, dict) for key, value in servers.items()):
            raise ConfigError(
                'the servers must be keyed by their names: {"mcpServers": {"my-server": {"command": ...}}}',
                "servers",
            )
        for key, value in servers.items():
            if isinstance(value, dict) and not FIELD_OF.keys() & value and any(map(_is_server, value.values())):
                raise ConfigError(f'the unknown key {key!r:.60} contains servers: rename it to "mcpServers"', "servers")
        yield from servers.items()
        return
    if not isinstance(servers, list):
        raise ConfigError('there must be an object or a list of servers, e.g. {"mcpServers": {...}}', "servers")
    seen: set[str] = set()
    for number, entry in enumerate(servers, 1):
        names = [entry[key] for key in NAMES if isinstance(entry.get(key), str)] if isinstance(entry, dict) else []
        if not names:
            raise ConfigError(f'server {number} of the list needs a "name"', "servers")
        if names[0] in seen:
            raise ConfigError(f"two servers are named {names[0]!r:.100}", "servers")
        seen.add(names[0])
        yield names[0], entry


def _is_server(value: Any) -> bool:
    return isinstance(value, dict) and any(FIELD_OF.get(key) in ("command", "url") for key in value)


def _server(name: str, entry: Any, variables: Variables, folder: Path) -> McpServerConfig:
    if not isinstance(entry, dict):
        raise ConfigError(f'MCP server {name!r:.100} must be an object with "command" or "url"', "servers")
    lenient = entry.get("disabled") is True or entry.get("enabled") is False
    expanded = {
        key: _expand(value, f"MCP server {name!r:.100}: {key}", variables, lenient) if key in EXPANDED else value
        for key, value in entry.items()
    }
    if lenient:  # a disabled server's missing file is no error
        expanded = {key: value for key, value in expanded.items() if FIELD_OF.get(key) != "env_file"}
    return McpServerConfig.from_mapping(name, expanded, folder=folder)


def _expand(value: Any, where: str, variables: Variables, lenient: bool) -> Any:
    """Return the value with the variables expanded in all of its texts."""
    if isinstance(value, dict):
        return {key: _expand(item, f"{where}.{key:.100}", variables, lenient) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, f"{where}[{number}]", variables, lenient) for number, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    try:
        return variables.expand(value, where)
    except ConfigError:
        if lenient:
            return value
        raise


def _inputs(declared: Any) -> dict[str, McpInput]:
    """Read VS Code's input declarations; an input's `command` is not run."""
    if not isinstance(declared, list) or len(declared) > MAX_INPUTS:
        raise ConfigError(f'"inputs" must be a list of at most {MAX_INPUTS} objects', "inputs")
    found: dict[str, McpInput] = {}
    for number, item in enumerate(declared, 1):
        name = item.get("id") if isinstance(item, dict) else None
        if not isinstance(name, str) or not name or name in found:
            raise ConfigError(f'input {number} needs an "id" of its own', "inputs")
        texts = {key: item[key] for key in ("description", "default") if isinstance(item.get(key), str)}
        given = item.get("options")
        options = tuple(option for option in given if isinstance(option, str)) if isinstance(given, list) else ()
        found[name] = McpInput(id=name, password=item.get("password") is True, options=options, **texts)
    return found


MAX_EXPANDED = 1 << 16  # characters of one value

_EXPRESSION = re.compile(r"\$\{([^}]*)(\}|\Z)")
_VARIABLE = re.compile(r"(?:env:)?([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
_INPUT = re.compile(r"input:([A-Za-z0-9_.-]{1,100})")


class McpInput(msgspec.Struct, frozen=True, kw_only=True):
    """A value that mcp.json requests from its user (`inputs`, as in VS Code)."""

    id: str  # name in `${input:id}`
    description: str = ""  # question for the user
    password: bool = False  # whether the answer is a secret
    default: str | None = None  # answer if the user gives none
    options: tuple[str, ...] = ()  # allowed answers; an empty list allows any

    @property
    def variable(self) -> str:
        """Name of the environment variable with the answer."""
        return "MCP_INPUT_" + re.sub(r"[^A-Z0-9]", "_", self.id.upper())


Inputs = Mapping[str, str] | Callable[[McpInput], str | None]
"""Answers by the id of an input, or a function that is called once for each input; None means no answer."""


class Variables:
    """Expands `${...}` in the values of one file; inserted values are not expanded again.

        ${NAME}  ${env:NAME}          an environment variable, which must be set
        ${NAME:-default}              the default if the variable is unset or empty
        ${input:id}                   an answer of the user
        ${workspaceFolder}  ${workspaceFolderBasename}  ${userHome}  ${pathSeparator}  ${/}

    A "$" without a "{" after it is a plain dollar sign. `workspace` is the value of `${workspaceFolder}`. The answers
    in `inputs` take precedence over the environment's `MCP_INPUT_<ID>` and the default of the `declared` input.
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
