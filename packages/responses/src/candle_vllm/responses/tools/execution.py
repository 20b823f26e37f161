# SPDX-License-Identifier: MIT
"""One tool call: look-up, check, approval, run with a timeout, and result. A tool's failure is never raised.

Callers ask for an approval between `check` and `run`; `call_directly` is for programs that call a tool themselves,
without a model.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import json
import logging
import time
import uuid
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import msgspec

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai.errors import InvalidBodyError
from candle_vllm.openai.json_body import decode_json
from candle_vllm.responses.conversation.channel import end_task
from candle_vllm.responses.tools import tool
from candle_vllm.responses.tools.registry import ToolRegistry
from candle_vllm.responses.tools.tool import Report, Tool, ToolCall, ToolDefinition, ToolOutput, ToolResult, ToolStatus

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = 60.0  # seconds of a call if neither the caller nor the tool sets a timeout
DEFAULT_MAX_CHARS = 50_000  # maximum characters of an output that the model sees
MAX_ARGUMENTS = 1 << 20  # characters of JSON
MAX_OUTPUT = 16 << 20  # characters of text and base64 that a tool may return
_MAX_MESSAGE = 2000  # characters of a tool's own error
_PATIENCE = 6.0  # seconds that a cancelled tool has to end
_AGAIN = 2.0  # seconds after which a tool that still runs is cancelled again
_NEAR = 500  # names that are compared with an unknown one
_PARTS = tuple[tool.ContentPart, ...]


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """A call that may run: the tool exists, and the parsed `arguments` match its schema."""

    call: ToolCall
    definition: ToolDefinition
    tool: Tool
    arguments: dict[str, Any]


async def check(registry: ToolRegistry, call: ToolCall, *, max_chars: int = DEFAULT_MAX_CHARS) -> Checked | ToolResult:
    """Return the call with its tool and its parsed arguments, or a result that says what is wrong with it."""
    entry = registry.entry(call.name)
    if entry is None:
        return not_run(call, None, "unknown", unknown_text(call.name, registry.names()), max_chars)
    server = entry.definition.server
    arguments = parsed_arguments(call.arguments)
    if isinstance(arguments, str):
        return not_run(call, server, "invalid_arguments", arguments, max_chars)
    faults = await asyncio.to_thread(entry.checker.faults, arguments)
    if faults:
        text = "The arguments do not fit the tool's schema: " + "; ".join(faults)
        return not_run(call, server, "invalid_arguments", text, max_chars)
    return Checked(call=call, definition=entry.definition, tool=entry.tool, arguments=arguments)


def denied(checked: Checked, *, max_chars: int = DEFAULT_MAX_CHARS) -> ToolResult:
    text = "The user did not agree to this call, so it was not run. Do not call it again with the same arguments."
    return not_run(checked.call, checked.definition.server, "denied", text, max_chars)


async def run(
    checked: Checked,
    *,
    timeout: float | None = None,
    max_chars: int = DEFAULT_MAX_CHARS,
    report: Report | None = None,
) -> ToolResult:
    """Run a checked call once. `timeout` is as in `ResponsesSession.call_tool`; `max_chars` limits the result's text.

    Cancelling the coroutine cancels the tool, and waits until it has ended; a tool that does not react within six
    seconds is abandoned, with an error in the log.
    """
    own: float | None = getattr(checked.tool, "timeout", None)
    seconds = timeout if timeout is not None else own if own is not None else DEFAULT_TIMEOUT
    started = time.monotonic()
    status, output = await _run_within(checked, seconds, report, timeout)
    return ToolResult(
        call=checked.call,
        server=checked.definition.server,
        status=status,
        output=output,
        text=tool.output_text(output, max_chars),
        seconds=time.monotonic() - started,
    )


async def _run_within(
    checked: Checked, seconds: float, report: Report | None, given: float | None
) -> tuple[ToolStatus, ToolOutput]:
    """Run the tool in a task of its own, so that its cancellation cannot be mistaken for its caller's."""
    running = True

    def passed_on(progress: tool.ToolProgress) -> None:
        if running and report is not None:
            report(progress)

    task = asyncio.create_task(_outcome(checked, passed_on, given), name=f"tool {checked.definition.name}")
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        running = False
        in_time = task.done()
        if not in_time:
            await end_task(task, _PATIENCE, _AGAIN)
    if not in_time:
        return "timed_out", _failure(f"The tool did not answer within {seconds:g} seconds and was stopped.")
    return ("failed", _failure("The tool failed: it cancelled itself.")) if task.cancelled() else task.result()


async def _outcome(checked: Checked, report: Report, given: float | None) -> tuple[ToolStatus, ToolOutput]:
    """Return the tool's output or failure. Only Ctrl+C and a cancellation are raised."""
    tool.allowed_seconds.set(given)
    name = checked.definition.name
    try:
        output = await checked.tool.run(checked.arguments, report)
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise
    except BaseException as error:  # a tool's SystemExit must not end the program
        if isinstance(error, tool.ToolError):
            with contextlib.suppress(Exception):  # its `__str__` may fail
                return error.status, _failure(tool.cut(str(error) or "The tool failed.", _MAX_MESSAGE))
        logger.warning("the tool %s failed", name, exc_info=error)
        return "failed", _failure(f"The tool failed ({type(error).__name__:.100}).")
    try:
        if not isinstance(output, ToolOutput):
            raise TypeError(f"it is a {type(output).__name__}")
        output = msgspec.structs.replace(output, content=msgspec.convert(msgspec.to_builtins(output.content), _PARTS))
    except (TypeError, msgspec.ValidationError) as error:
        logger.warning("the tool %s did not return a valid ToolOutput: %s", name, error)
        return "failed", _failure("The tool failed: it did not return a tool output.")
    size = tool.output_size(output)
    if size > MAX_OUTPUT:
        return "failed", _failure(
            f"The tool returned {size} characters, and at most {MAX_OUTPUT} are allowed: ask for less."
        )
    return ("failed" if output.is_error else "completed"), output


def parsed_arguments(text: str) -> dict[str, Any] | str:
    """Return the parsed arguments, or a text that says what is wrong with them; an empty text means an empty object."""
    if len(text) > MAX_ARGUMENTS:
        return f"The arguments have {len(text)} characters, and at most {MAX_ARGUMENTS} are allowed."
    if not text.strip():
        return {}
    try:
        value = decode_json(text, "The JSON of the arguments")
    except InvalidBodyError as error:
        return str(error)
    return value if isinstance(value, dict) else "The arguments must be one JSON object."


async def call_directly(
    registry: ToolRegistry,
    server: str | None,
    name: str,
    arguments: Mapping[str, Any],
    *,
    timeout: float | None = None,
) -> ToolResult:
    """Call a tool without a model, as `ResponsesSession.call_tool`; `name` may also be the one that a model uses."""
    if timeout is not None and (not isinstance(timeout, (int, float)) or not 0 < timeout <= tool.MAX_TIMEOUT):
        raise InvalidParameterError(
            f"timeout must be more than 0 and at most {tool.MAX_TIMEOUT:g} seconds, not {timeout!r:.40}", "timeout"
        )
    if not isinstance(arguments, Mapping):
        raise InvalidParameterError(f"arguments must be an object, not a {type(arguments).__name__}", "arguments")
    try:
        text = json.dumps(dict(arguments), ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParameterError(f"arguments must be JSON: {error!s:.200}", "arguments") from None
    for definition in registry.definitions():
        if definition.server == server and name in (definition.original_name, definition.name):
            call = ToolCall(id=f"call_{uuid.uuid4().hex}", name=definition.name, arguments=text)
            checked = await check(registry, call)
            return checked if isinstance(checked, ToolResult) else await run(checked, timeout=timeout)
    where = "among the Python tools" if server is None else f"at the MCP server {server!r:.80}"
    raise InvalidParameterError(f"there is no tool {name!r:.80} {where}", "tool")


def unknown_text(name: str, known: Iterable[str]) -> str:
    """Return the text for a model that called a tool that does not exist."""
    text = f"There is no tool {name[:100]!r}."
    near = difflib.get_close_matches(name[:100], list(islice(known, _NEAR)), 3, 0.5)
    return f"{text} Did you mean {' or '.join(near)}?" if near else f"{text} Use only the tools that you were given."


def _failure(text: str) -> ToolOutput:
    return ToolOutput.of_text(text, is_error=True)


def not_run(call: ToolCall, server: str | None, status: ToolStatus, text: str, max_chars: int) -> ToolResult:
    """Return the result of a call that did not run, or did not complete."""
    output = _failure(text)
    return ToolResult(call=call, server=server, status=status, output=output, text=tool.output_text(output, max_chars))
