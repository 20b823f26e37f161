# SPDX-License-Identifier: MIT
"""McpService: start, watch and stop the MCP servers of one application, and count the calls of their tools.

The servers connect in the background; a server that cannot be reached is tried again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from candle_vllm.openai.json_body import to_request_error
from candle_vllm.openai.protocol.fields import MAX_TOOLS, MAX_TOOLS_SIZE
from candle_vllm.openai.protocol.tools import Tool as WireTool
from candle_vllm.openai.protocol.tools import check_tools
from candle_vllm.responses.mcp.fleet import LinkStatus, McpFleet
from candle_vllm.responses.tools.names import SEPARATOR
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.responses.tools.tool import Report, Tool, ToolDefinition, ToolError, ToolOutput
from candle_vllm.server.mcp.options import McpOptions

Called = Callable[[str, str], object]  # called with the server's name and the status of the call

SETTLE_SECONDS = 10.0  # maximum wait of a chat request for the first connections
_NAMED = 40  # tools in one log line
_GRACE = 1.0  # seconds added to the tool's own timeout, so that its error message comes first

logger = logging.getLogger(__name__)


class CountedRegistry(ToolRegistry):
    """The tools of MCP servers, each as a `CountedTool`; `called` is called when a call has ended."""

    def __init__(self, called: Called) -> None:
        super().__init__()
        self._called = called

    def replace(self, server: str, tools: Sequence[Tool]) -> tuple[str, ...]:
        """See `ToolRegistry.replace`; the calls of the tools are counted."""
        return super().replace(server, [CountedTool(tool, self._called) for tool in tools])


class CountedTool:
    """A tool of an MCP server; each call is logged and counted, without its arguments."""

    def __init__(self, tool: Tool, called: Called) -> None:
        self._tool = tool
        self._called = called
        self.definition = tool.definition
        own: float | None = getattr(tool, "timeout", None)
        self.timeout = None if own is None else own + _GRACE

    async def run(self, arguments: Mapping[str, Any], report: Report) -> ToolOutput:
        status, started = "failed", time.monotonic()
        try:
            output = await self._tool.run(arguments, report)
            status = "failed" if output.is_error else "completed"
            return output
        except ToolError as error:
            status = error.status
            raise
        except BaseException as error:
            status = "failed" if isinstance(error, Exception) else "cancelled"
            raise
        finally:
            logger.info("MCP tool %s: %s after %.2f s", self.definition.name, status, time.monotonic() - started)
            self._called(self.definition.server or "", status)


class Offer(NamedTuple):
    """The tools, in OpenAI's form, that are added to a chat request without tools, and their names."""

    tools: tuple[dict[str, Any], ...] = ()
    names: tuple[str, ...] = ()


class McpService:
    """The servers and their tools. It belongs to the event loop in which it is started.

    ConfigError if there are too many servers, or two with one name.

    Attributes:
        registry: the tools of all servers, by the names that models call.
        called: called when a call of a tool has ended, with the server's name and the status of the call.
        calls: number of running calls that clients made directly.
        warned: models of which the log says that they get no tools.
    """

    def __init__(self, options: McpOptions) -> None:
        self.options = options
        self.called = lambda server, status: None  # noqa: ARG005
        self.calls = 0
        self.warned: set[str] = set()
        self.registry = CountedRegistry(lambda server, status: self.called(server, status))
        self._fleet = McpFleet(options.servers, self.registry)
        self._configs = {config.name: config for config in options.servers}
        self._starting: asyncio.Task[None] | None = None
        self._offer = Offer()
        self._offered_revision = -1

    async def start(self) -> None:
        """Begin to connect; do not wait."""
        self._starting = asyncio.create_task(self._connect(), name="MCP servers")

    async def close(self) -> None:
        """Stop all servers and free their resources. Idempotent."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await self._fleet.aclose()

    async def settled(self, seconds: float = SETTLE_SECONDS) -> None:
        """Wait until every server has connected or failed once, at most `seconds`."""
        if self._starting is not None and not self._starting.done():
            await asyncio.wait({self._starting}, timeout=seconds)

    def status(self) -> list[LinkStatus]:
        """The current status of each server."""
        return self._fleet.status()

    def states(self) -> list[str]:
        """The state of each server; may be called in any thread."""
        return [link.state for link in self._fleet.links.values()]

    def auto_approves(self, definition: ToolDefinition) -> bool:
        """Whether mcp.json lets the tool run without approval."""
        config = self._configs.get(definition.server or "")
        return config is not None and config.auto_approves(definition.original_name)

    def offer(self) -> Offer:
        """Return the tools for chat requests: all, or with `--mcp-execute` the tools that run without approval."""
        if self._offered_revision != self.registry.revision:
            self._offered_revision = self.registry.revision
            execute = self.options.execute
            self._offer = _offer([one for one in self.registry.definitions() if not execute or self.auto_approves(one)])
        return self._offer

    def refusal(self, name: str) -> str | None:
        """Return why chat requests lack the tool `name`: no approval, or its server is not connected; or None."""
        if (entry := self.registry.entry(name)) is not None:
            approved = not self.options.execute or self.auto_approves(entry.definition)
            return None if approved else "mcp.json does not approve it (autoApprove)"
        server = next((server for server in self._configs if name.startswith(server + SEPARATOR)), "")
        error = self.errors().get(server)
        return error and f"the MCP server {server!r:.80} is not connected: {error}"

    def errors(self) -> dict[str, str | None]:
        """Return why a server has no tools now, by its name; None for a server that is ready."""
        without = {"ready": None, "disabled": "it is disabled"}
        links = self._fleet.links.items()
        return {name: link.error or without.get(link.state, "it is not connected yet") for name, link in links}

    async def _connect(self) -> None:
        try:
            await self._fleet.start()
        except Exception:
            logger.exception("the MCP servers could not be started")
            return
        definitions = self.registry.definitions()
        ready, enabled = self.states().count("ready"), sum(config.enabled for config in self.options.servers)
        logger.info("MCP servers that are ready: %d of %d; tools: %d", ready, enabled, len(definitions))
        if self.options.execute:
            approved = [one.name for one in definitions if self.auto_approves(one)]
            others = [one.name for one in definitions if not self.auto_approves(one)]
            logger.info("tools that run in chat requests: %s", _named(approved))
            if others:
                logger.info("tools that models do not get, because mcp.json does not approve them: %s", _named(others))


def _offer(definitions: Sequence[ToolDefinition]) -> Offer:
    """Return the tools that fit into a request; log the other tools."""
    tools: list[dict[str, Any]] = []
    size = 0
    for definition in definitions:
        tool = definition.to_openai()
        try:
            wire = WireTool.model_validate(tool)
            check_tools([("0.function.name", wire.function.name, wire.shown())])
        except ValidationError as error:
            logger.warning("models do not get the tool %s: %s", definition.name, to_request_error(error))
            continue
        except ValueError as error:  # from `check_tools`, outside pydantic
            logger.warning("models do not get the tool %s: %.200s", definition.name, error)
            continue
        size += len(json.dumps(wire.shown(), ensure_ascii=False))
        if len(tools) >= MAX_TOOLS or size > MAX_TOOLS_SIZE:
            logger.warning("models get %d of %d tools: more do not fit into a request", len(tools), len(definitions))
            break
        tools.append(tool)
    return Offer(tuple(tools), tuple(tool["function"]["name"] for tool in tools))


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (", ".join(names[:_NAMED]) or "none") + more
