"""What a tool raises to speak to the model; each kind becomes a status of the call's result.

    ToolError                    "failed": the tool says so in its own words
    ├── ToolUnavailableError     "unavailable": it cannot be reached now
    ├── ToolTimedOutError        "timed_out": it noticed by itself that its time is over
    └── ToolArgumentsError       "invalid_arguments": they do not fit after all

Their messages reach the model, and through it the user: they must hold no secrets.
"""

from __future__ import annotations

from typing import ClassVar

from candle_vllm.core.errors import CandleVllmError
from candle_vllm.responses.tools.tool import ToolStatus


class ToolError(CandleVllmError):
    """A failure whose message the model sees, so that it can do otherwise."""

    status: ClassVar[ToolStatus] = "failed"


class ToolUnavailableError(ToolError):
    """The tool cannot run now: its server is gone, or too many calls of it run."""

    status: ClassVar[ToolStatus] = "unavailable"


class ToolTimedOutError(ToolError):
    """The tool gave up because its time was over."""

    status: ClassVar[ToolStatus] = "timed_out"


class ToolArgumentsError(ToolError):
    """The arguments fit the schema and still not the tool."""

    status: ClassVar[ToolStatus] = "invalid_arguments"
