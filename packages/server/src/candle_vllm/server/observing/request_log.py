# SPDX-License-Identifier: MIT
"""The log of requests: one line for each request to an engine that has ended. After step 10 of a request's life.

Prompts are written only where the operator asks for it, and cut; nothing that a client sends can begin a line of its
own.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from candle_vllm.core.shown import without_secrets

if TYPE_CHECKING:
    from candle_vllm.server.observing.request_record import FinishedRequest

LogFormat = Literal["text", "json"]
MAX_PROMPT = 2048  # characters
MAX_FAILURE = 500
MAX_MESSAGE = 8_192  # characters of a record that has no fields
FIELDS = "candle_vllm_fields"  # attribute of a record that has them

_PLAIN = re.compile(r"[A-Za-z0-9._:/+-]{1,256}")
_DELETE = "\x7f"

logger = logging.getLogger("candle_vllm.server.generations")


class RequestLog:
    """An observer that writes one record per request.

    Args:
        log_prompts: whether the beginning of the prompt is written as well.
        max_prompt: characters of it.
    """

    def __init__(self, *, log_prompts: bool = False, max_prompt: int = MAX_PROMPT) -> None:
        self._log_prompts = log_prompts
        self._max_prompt = max_prompt

    def __call__(self, request: FinishedRequest) -> None:
        """Writes the record of one request."""
        if logger.isEnabledFor(logging.INFO):
            fields = request_fields(request)
            if self._log_prompts:
                fields["prompt"] = request.info.prompt(self._max_prompt)
            logger.info("%s", key_values(fields), extra={FIELDS: fields})


def request_fields(request: FinishedRequest) -> dict[str, Any]:
    """What is said of a request: names and numbers, nothing of its content. Times are milliseconds."""
    context, times = request.context, request.times
    seconds = request.ended - (request.first_token or request.ended)
    after_first = request.completion_tokens - request.info.count
    return {
        "request_id": request.info.request_id,
        "http_request_id": (context.http_request_id if context else None) or None,
        "route": context.route if context else None,
        "operation": request.info.operation,
        "model": request.model,
        "key": context.key_label if context else None,
        "prompt_tokens": request.prompt_tokens,
        "cached_tokens": request.cached_tokens,
        "completion_tokens": request.completion_tokens,
        "queue_ms": _ms(request.arrived, times.first_scheduled_time),
        "ttft_ms": _ms(request.arrived, request.first_token),
        "total_ms": _ms(request.arrived, request.ended),
        "tokens_per_s": round(after_first / seconds, 2) if after_first > 0 and seconds > 0 else None,
        "finish_reason": ",".join(request.finish_reasons),
        "status": request.status,
        "error": None if request.failure is None else request.failure[:MAX_FAILURE],
    }


class JsonFormatter(logging.Formatter):
    """Every record of the log as one JSON object on one line; the log of requests with its fields apart."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of one record."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
        }
        fields = getattr(record, FIELDS, None)
        line |= {"message": _cut(record.getMessage())} if fields is None else fields
        if record.exc_info:
            line["exception"] = record.exc_text or self.formatException(record.exc_info)
        return json_line(
            {name: without_secrets(text) if isinstance(text, str) else text for name, text in line.items()}
        )


class TextFormatter(logging.Formatter):
    """The usual line; control characters in a message are escaped, so that it stays one line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line of one record, without the traceback that may follow it."""
        if not hasattr(record, FIELDS):  # those are escaped already
            record.message = escaped(_cut(record.message))
        return super().formatMessage(record)


def log_formatter(log_format: LogFormat) -> logging.Formatter:
    """What `--log-format` means."""
    return JsonFormatter() if log_format == "json" else TextFormatter()


def _cut(message: str) -> str:
    """A message of bounded length: some hold names that a client, a model or an MCP server wrote."""
    more = len(message) - MAX_MESSAGE
    return message if more <= 0 else f"{message[:MAX_MESSAGE]}... ({more} more characters)"


def _ms(start: float, end: float | None) -> float | None:
    return None if end is None else round(max(end - start, 0.0) * 1000, 2)


# ---- texts from outside, one line each, with nothing that a terminal would obey -------------------------------------


def escaped(text: str) -> str:
    """A text without control, format and separator characters, each written as Python would."""
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if character == "\\" or unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        else character
        for character in text
    )


def key_values(fields: Mapping[str, Any]) -> str:
    """`name=value name="a value"`; values that are None are left out."""
    return " ".join(f"{name}={_value(value)}" for name, value in fields.items() if value is not None)


def json_line(fields: Mapping[str, Any]) -> str:
    """One JSON object in ASCII, without values that are None."""
    known = {name: value for name, value in fields.items() if value is not None}
    return json.dumps(known, ensure_ascii=True, allow_nan=False).replace(_DELETE, "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, (int, float)):
        return str(value)
    text = str(value)
    return text if _PLAIN.fullmatch(text) else '"' + escaped(text).replace('"', '\\"') + '"'
