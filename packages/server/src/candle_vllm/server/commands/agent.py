"""`candle-vllm agent`: one request, carried out with the tools of MCP servers, on the terminal.

The answer goes to standard output; what the tools do, and the questions whether they may, to standard error. Its turns
enter the life of a request at step 2, or go to the server of `--base-url`.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import msgspec

from candle_vllm.core.errors import CandleVllmError, ConfigError
from candle_vllm.openai import OpenAIAdapter
from candle_vllm.responses import ConversationOptions, ResponsesSession
from candle_vllm.responses.conversation.chat_model import ModelSource
from candle_vllm.responses.conversation.events import ConversationFinished, Event
from candle_vllm.server.commands.agent_approval import TerminalApproval
from candle_vllm.server.commands.agent_display import AgentDisplay, note
from candle_vllm.server.commands.terminal import conversation, read_stdin
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.kinds import UsageError
from candle_vllm.server.settings.parts import load_engine

EXIT_UNFINISHED = 1


def agent(
    settings: Settings,
    prompt: str,
    base_url: str | None = None,
    api_key: str | None = None,
    yes: bool = False,
    approve: tuple[str, ...] = (),
    max_turns: int = 16,
    system: str | None = None,
    max_tokens: int | None = None,
    as_json: bool = False,
) -> int:
    """Carries out `prompt` ("-" reads it from standard input); 0 when the model has ended by itself, else 1."""
    from candle_vllm.responses.mcp.config import load_mcp_config

    if api_key is not None and base_url is None:
        raise UsageError("--api-key needs --base-url: a model of this process has no keys")
    text = read_stdin("request") if prompt == "-" else prompt
    if not text:
        raise UsageError("the request is empty")
    servers = load_mcp_config(settings.mcp_config)
    request: dict[str, Any] = dict(settings.default_sampling)
    if max_tokens is not None:
        request["max_completion_tokens"] = max_tokens
    approval = "never" if yes else TerminalApproval(approve)
    options = ConversationOptions(max_turns=max_turns, approval=approval, request=request)
    with _model(settings, base_url) as model:
        name = settings.model if base_url is not None else None
        session = ResponsesSession(model, mcp_servers=servers, api_key=api_key, model_name=name)
        return asyncio.run(_carry_out(session, conversation(system, text), options, as_json))


@contextlib.contextmanager
def _model(settings: Settings, base_url: str | None) -> Iterator[ModelSource]:
    if base_url is not None:
        yield base_url
        return
    with load_engine(settings) as engine:
        yield OpenAIAdapter(
            engine,
            served_model_names=[engine.model_info.name],
            tool_parser=settings.tool_parser,
            reasoning_parser=settings.reasoning_parser,
        )


async def _carry_out(
    session: ResponsesSession, messages: list[dict[str, str]], options: ConversationOptions, as_json: bool
) -> int:
    display = AgentDisplay()
    async with session:
        _introduce(session)
        try:
            async with contextlib.aclosing(session.stream_conversation(messages, options)) as events:
                async for event in events:
                    if as_json:
                        _print_json(event)
                    else:
                        display.show(event)
                    if isinstance(event, ConversationFinished):
                        return 0 if event.result.completed else EXIT_UNFINISHED
        except ConfigError:
            raise
        except CandleVllmError as error:
            note(f"error: {error}")
    return EXIT_UNFINISHED


def _introduce(session: ResponsesSession) -> None:
    """Says what there is to work with."""
    tools = len(session.list_openai_tools())
    statuses = session.fleet.status() if session.fleet is not None else []
    ready = [status.name for status in statuses if status.state == "ready"]
    if statuses:
        note(f"{tools} tools of {len(ready)} MCP servers: {', '.join(ready)}" if ready else "no MCP server is ready")
    else:
        note("no MCP servers: name a file with --mcp-config, or put an mcp.json into this folder")
    for status in statuses:
        if status.error is not None:
            note(f"{status.name} is not there: {status.error}")


def _print_json(event: Event) -> None:
    sys.stdout.write(msgspec.json.encode(event, enc_hook=str).decode() + "\n")
    sys.stdout.flush()
