# SPDX-License-Identifier: MIT
"""ResponsesSession: a conversation with a model that may call tools."""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING, Any, Self

from candle_vllm.core.arguments import ExplainedAttributes
from candle_vllm.core.errors import ConfigError, InvalidParameterError, RequestError
from candle_vllm.core.setting_kinds import nearest
from candle_vllm.responses.conversation.chat_form import ChatMessage, ChatTranscript, check_is_list
from candle_vllm.responses.conversation.chat_model import ModelSource, local_model
from candle_vllm.responses.conversation.events import ConversationFinished, Event
from candle_vllm.responses.conversation.loop import ConversationLoop
from candle_vllm.responses.conversation.options import ConversationOptions, ConversationResult
from candle_vllm.responses.mcp.config import McpServers, server_configs
from candle_vllm.responses.tools.approval import Approval
from candle_vllm.responses.tools.execution import call_directly
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.responses.tools.tool import Tool, ToolCall, ToolDefinition, ToolResult

if TYPE_CHECKING:
    from candle_vllm.responses.conversation.http_model import HttpModel
    from candle_vllm.responses.mcp.fleet import McpFleet


class ResponsesSession(ExplainedAttributes):
    """A conversation; each call continues where the last one ended. Only one call may run at a time.

    With MCP servers or a base URL, use it as `async with ResponsesSession(...) as session`, and only once: this starts
    the servers, and ends them and all connections.

    Args:
        model: an engine, an adapter, the base URL of a server with OpenAI's chat API, or any `ChatModel`.
        messages: earlier messages in OpenAI's format, for example the `messages` of another session.
        tools: Python functions and `Tool` objects that the model may call.
        mcp_servers: servers whose tools the model may call as well: one or several configurations, or the path of an
            mcp.json, whose variables are read from this process's environment.
        api_key, model_name: API key and model name for a base URL.
        strict_servers: whether the session fails to start if an MCP server cannot be reached.

    Raises:
        ConfigError: a model, URL, key or server configuration is invalid.
        InvalidParameterError: a tool or a message is invalid.
    """

    def __init__(
        self,
        model: ModelSource,
        messages: Sequence[Mapping[str, Any]] = (),
        *,
        tools: Iterable[Tool | Callable[..., Any]] = (),
        mcp_servers: McpServers = (),
        api_key: str | None = None,
        model_name: str | None = None,
        strict_servers: bool = False,
    ) -> None:
        if not isinstance(model, str) and (api_key is not None or model_name is not None):
            raise ConfigError("api_key and model_name are for a base URL; an engine needs neither", "api_key")
        self._http: HttpModel | None = None
        if isinstance(model, str):
            from candle_vllm.responses.conversation.http_model import HttpModel

            self._http = HttpModel(model, api_key=api_key, model=model_name)
        self._model = self._http or local_model(model)
        self._tools = ToolRegistry(tools)
        self._servers = server_configs(mcp_servers)
        self._strict = strict_servers
        self._fleet: McpFleet | None = None
        self._loop: ConversationLoop | None = None  # while a conversation runs
        self._needs_context = bool(self._servers) or self._http is not None
        self._entered = self._closed = False
        self._messages = ChatTranscript(messages).messages
        self._answers: dict[str, Approval] = {}

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ", not entered" if self._needs_context and not self._entered else ""
        servers = f", MCP servers {', '.join(self._servers):.80}" if self._servers else ""
        return f"<ResponsesSession{state}: {len(self._messages)} messages, {len(self._tools)} tools{servers}>"

    async def __aenter__(self) -> Self:
        if self._entered or self._closed:
            raise ConfigError("a session can be entered only once: create another one with the messages of this one")
        self._entered = True
        if self._servers:
            from candle_vllm.responses.mcp.fleet import McpFleet

            fleet = McpFleet(self._servers.values(), self._tools, strict=self._strict)
            try:
                await fleet.start()
            except BaseException:
                await self.aclose()
                raise
            self._fleet = fleet
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the running call (its caller gets `RequestAbortedError`), the MCP servers and the connections."""
        self._closed = True
        fleet, self._fleet = self._fleet, None
        async with AsyncExitStack() as ending:
            if self._http is not None:
                ending.push_async_callback(self._http.aclose)
            if fleet is not None:
                ending.push_async_callback(fleet.aclose)
            if self._loop is not None:
                ending.push_async_callback(self._loop.aclose)

    @property
    def messages(self) -> list[ChatMessage]:
        """A copy of the transcript, which can be written as JSON; a new session with these messages continues here."""
        return copy.deepcopy(self._messages)

    @property
    def open_calls(self) -> tuple[ToolCall, ...]:
        """Calls of the last turn without a result: they will run, need an approval, or are for the caller to run."""
        return ChatTranscript(self._messages).open_calls

    @property
    def fleet(self) -> McpFleet | None:
        """The MCP servers with their status; None without MCP servers, and outside of `async with`."""
        return self._fleet

    async def run_conversation(
        self,
        messages: Sequence[Mapping[str, Any]] = (),
        options: ConversationOptions | None = None,
        *,
        client_tools: Sequence[Mapping[str, Any]] = (),
    ) -> ConversationResult:
        """Add `messages`, let the model answer, with the tools that it needs, and return the result."""
        result: ConversationResult | None = None
        async with aclosing(self.stream_conversation(messages, options, client_tools=client_tools)) as events:
            async for event in events:
                if isinstance(event, ConversationFinished):
                    result = event.result
        assert result is not None
        return result

    async def stream_conversation(
        self,
        messages: Sequence[Mapping[str, Any]] = (),
        options: ConversationOptions | None = None,
        *,
        client_tools: Sequence[Mapping[str, Any]] = (),
    ) -> AsyncGenerator[Event, None]:
        """Run as `run_conversation`, and yield events until `ConversationFinished`. Close the iterator to end the run.

        Without messages, the conversation continues where it ended: open calls first, then the model's next turn.

        The transcript grows by `messages`, by whole turns and by results of calls. If a turn fails or is cancelled
        before the transcript has grown, `messages` are not added either, so that the caller can try again. A tool call
        that was interrupted has a result that says so, and is not run again; a call that had not begun remains open.

        Args:
            messages: messages in OpenAI's format, also `tool` messages with the results of the caller's own tools.
            options: limits, approval, sampling.
            client_tools: the caller's tools in OpenAI's format; a turn that calls one is the last, the call `pending`.

        Raises:
            RequestError: a message or option is invalid, the conversation is too long, or another call is running.
            CandleVllmError: the session is not open, or the model failed.
        """
        check_is_list(messages)
        transcript = ChatTranscript([*self._messages, *messages])
        self._check_ready(messages)
        self._check_options(options)
        loop = ConversationLoop(self._model, self._tools, options, auto_approve=self._is_auto_approved)
        answers = {call.id: self._answers.get(call.id) for call in transcript.open_calls}
        self._loop, finished = loop, False
        try:
            events = loop.run(
                transcript,
                client_tools=client_tools,
                approved=[call_id for call_id, answer in answers.items() if answer is Approval.ALLOW],
                denied=[call_id for call_id, answer in answers.items() if answer is Approval.DENY],
            )
            async with aclosing(events):
                async for event in events:
                    finished = finished or isinstance(event, ConversationFinished)
                    yield event
        finally:
            self._loop = None
            if finished or transcript.grew:
                self._messages = transcript.messages
                still_open = {call.id for call in transcript.open_calls}
                self._answers = {key: answer for key, answer in self._answers.items() if key in still_open}

    def answer_approvals(self, answers: Mapping[str, Approval | str]) -> None:
        """Allow or deny open calls ("allow" or "deny" by call id); this takes effect when the conversation continues.

        Raises InvalidParameterError if a call is not open, or an answer is invalid.
        """
        if not isinstance(answers, Mapping):
            raise InvalidParameterError("answers must be 'allow' or 'deny' by the id of a call", "answers")
        known = [call.id for call in self.open_calls]
        for call_id, answer in answers.items():
            if call_id not in known:
                raise InvalidParameterError(
                    f"{call_id!r:.80} is not a call without a result; these are: {', '.join(known) or 'none'}",
                    "answers",
                )
            if answer not in (Approval.ALLOW, Approval.DENY):
                raise InvalidParameterError(f"the answer must be 'allow' or 'deny', not {answer!r:.40}", "answers")
        self._answers |= {call_id: Approval(answer) for call_id, answer in answers.items()}

    def list_openai_tools(self, allowed: Iterable[str] | None = None) -> list[dict[str, Any]]:
        """Return the tools in the format of a chat request: all, or the tools whose names match a pattern."""
        return [definition.to_openai() for definition in self._tools.definitions(allowed)]

    async def call_tool(
        self, server: str | None, tool: str, arguments: Mapping[str, Any], *, timeout: float | None = None
    ) -> ToolResult:
        """Call a tool without the model; no approval is needed, and the transcript does not change.

        Args:
            server: label of the MCP server; None for a Python function.
            tool: name of the tool on that server, or of the function.
            arguments: arguments, which are checked against the tool's schema.
            timeout: timeout in seconds; None means the tool's own timeout, or 60.

        Raises:
            ConfigError: the session is not open.
            InvalidParameterError: the tool is unknown, the arguments are no mapping of JSON values, or the timeout is
                invalid. All other errors are in the result, also arguments that do not match the schema.
        """
        self._check_open()
        return await call_directly(self._tools, server, tool, arguments, timeout=timeout)

    def _is_auto_approved(self, definition: ToolDefinition) -> bool:
        config = self._servers.get(definition.server) if definition.server is not None else None
        return config is not None and config.auto_approves(definition.original_name)

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("the session is closed: create another one with the messages of this one")
        if self._needs_context and not self._entered:
            raise ConfigError("a session with MCP servers or a base URL must be used inside `async with session:`")

    def _check_options(self, options: ConversationOptions | None) -> None:
        if not isinstance(options, (ConversationOptions, type(None))):
            raise InvalidParameterError(
                "options must be ConversationOptions, as ConversationOptions(max_turns=3) makes them, not "
                f"{type(options).__name__}",
                "options",
            )
        known = list(self._tools.names())
        for name in (options and options.allowed_tools) or ():
            if "*" not in name and name not in known:
                there = ", ".join(sorted(known)[:20]) or "none"
                raise InvalidParameterError(
                    f"allowed_tools: there is no tool {name[:60]!r}{nearest(name[:60], known)}; there are: "
                    f"{there:.500}",
                    "allowed_tools",
                )

    def _check_ready(self, messages: Sequence[Mapping[str, Any]]) -> None:
        self._check_open()
        if self._loop is not None:
            raise RequestError("a conversation of this session is running: wait for its end, or create another session")
        answered = {message.get("tool_call_id") for message in messages if message.get("role") == "tool"}
        left = [call.id for call in self.open_calls if call.id not in answered]
        if left and any(message.get("role") != "tool" for message in messages):
            raise InvalidParameterError(
                f"the calls {', '.join(left[:5])} have no result yet: go on without new messages (answer_approvals "
                "says whether they may run), or add a tool message for each of them first",
                "messages",
            )
