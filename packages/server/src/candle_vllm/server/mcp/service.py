"""McpService: the MCP servers of one application, from its start to its end.

Beside the ten steps. The servers connect while the model is loaded and requests are answered; one that cannot be
reached is tried again and holds nobody up.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from candle_vllm.openai.protocol.fields import MAX_TOOLS, MAX_TOOLS_SIZE
from candle_vllm.openai.protocol.tools import Tool as WireTool
from candle_vllm.openai.protocol.tools import check_tools
from candle_vllm.openai.validation import to_request_error
from candle_vllm.responses.mcp.fleet import LinkStatus, McpFleet
from candle_vllm.responses.tools.tool import ToolDefinition
from candle_vllm.server.mcp.counted_tools import CountedRegistry
from candle_vllm.server.mcp.options import McpOptions

SETTLE_SECONDS = 10.0  # that a chat request waits for servers that connect for the first time
_NAMED = 40  # tools in a line of the log

logger = logging.getLogger(__name__)


class Offer(NamedTuple):
    """What a chat request without tools is given.

    Attributes:
        tools: in OpenAI's form; each is one that a request may have, and so are all together.
        names: of them.
    """

    tools: tuple[dict[str, Any], ...] = ()
    names: tuple[str, ...] = ()


class McpService:
    """The servers and their tools. It belongs to the event loop in which it is started.

    Args:
        options: servers and limits.

    Attributes:
        registry: the tools of all servers, by the names that models call.
        called: told of every call of a tool, when it has ended: the server and how.
        calls: of clients themselves that run now.
        told: models of which the log has said that they are given no tools.

    Raises:
        ConfigError: too many servers, or two of one name.
    """

    def __init__(self, options: McpOptions) -> None:
        self.options = options
        self.called = lambda server, status: None  # noqa: ARG005
        self.calls = 0
        self.told: set[str] = set()
        self.registry = CountedRegistry(lambda server, status: self.called(server, status))
        self._fleet = McpFleet(options.servers, self.registry)
        self._configs = {config.name: config for config in options.servers}
        self._starting: asyncio.Task[None] | None = None
        self._offer = Offer()
        self._offered_revision = -1

    async def start(self) -> None:
        """Begins to connect, and does not wait for it."""
        self._starting = asyncio.create_task(self._connect(), name="MCP servers")

    async def close(self) -> None:
        """Ends all servers; nothing of them is left. Idempotent."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await self._fleet.aclose()

    async def settled(self, seconds: float = SETTLE_SECONDS) -> None:
        """Waits until every server has connected or failed once, or the time is over."""
        if self._starting is not None and not self._starting.done():
            await asyncio.wait({self._starting}, timeout=seconds)

    def status(self) -> list[LinkStatus]:
        """Each server as it is now."""
        return self._fleet.status()

    def states(self) -> list[str]:
        """The state of each server; may be called in any thread."""
        return [link.state for link in self._fleet.links.values()]

    def auto_approves(self, definition: ToolDefinition) -> bool:
        """Whether mcp.json lets the tool run without anybody's agreement."""
        config = self._configs.get(definition.server or "")
        return config is not None and config.auto_approves(definition.original_name)

    def offer(self) -> Offer:
        """The tools for chat requests: all, or those that may run here where calls do."""
        if self._offered_revision != self.registry.revision:
            self._offered_revision = self.registry.revision
            execute = self.options.execute
            chosen = [one for one in self.registry.definitions() if not execute or self.auto_approves(one)]
            self._offer = _offer(chosen)
        return self._offer

    @property
    def errors(self) -> Mapping[str, str | None]:
        """Why a server has no tools now, by its name; a view that follows the servers."""
        return _Errors(self._fleet)

    async def _connect(self) -> None:
        try:
            await self._fleet.start()
        except Exception:
            logger.exception("the MCP servers could not be started")
            return
        definitions = self.registry.definitions()
        ready = self.states().count("ready")
        logger.info("MCP servers: %d of %d are ready, with %d tools", ready, len(self._configs), len(definitions))
        if self.options.execute:
            approved = [one.name for one in definitions if self.auto_approves(one)]
            others = [one.name for one in definitions if not self.auto_approves(one)]
            logger.info("tools that run in chat requests: %s", _named(approved))
            if others:
                logger.info("tools that models are not shown, since mcp.json does not approve them: %s", _named(others))


class _Errors(Mapping[str, str | None]):
    def __init__(self, fleet: McpFleet) -> None:
        self._links = fleet.links

    def __getitem__(self, name: str) -> str | None:
        link = self._links[name]
        if link.error is not None or link.state == "ready":
            return link.error
        return "it is disabled" if link.state == "disabled" else "it is not connected yet"

    def __iter__(self) -> Iterator[str]:
        return iter(self._links)

    def __len__(self) -> int:
        return len(self._links)


def _offer(definitions: Sequence[ToolDefinition]) -> Offer:
    """Those that a request may have; the others are named in the log, once for each change of the tools."""
    tools: list[dict[str, Any]] = []
    size = 0
    for definition in definitions:
        tool = definition.to_openai()
        try:
            wire = WireTool.model_validate(tool)
            check_tools([wire])
        except ValidationError as error:
            logger.warning("models are not shown the tool %s: %s", definition.name, to_request_error(error))
            continue
        except ValueError as error:  # a rule of its own, which pydantic would have reported
            logger.warning("models are not shown the tool %s: %.200s", definition.name, error)
            continue
        size += len(json.dumps(wire.shown(), ensure_ascii=False))
        if len(tools) >= MAX_TOOLS or size > MAX_TOOLS_SIZE:
            logger.warning("models are shown %d of %d tools: more do not fit", len(tools), len(definitions))
            break
        tools.append(tool)
    return Offer(tuple(tools), tuple(tool["function"]["name"] for tool in tools))


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (", ".join(names[:_NAMED]) or "none") + more
