# SPDX-License-Identifier: MIT
"""The log of requests: one line for each engine request that has ended and was not refused (after step 10).

Prompts are logged only if the operator wants it, and truncated. Nothing that a client sends can begin a new line.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from logging.handlers import WatchedFileHandler
from typing import TYPE_CHECKING, Any

from candle_vllm.core.shown import FIELDS, key_values

if TYPE_CHECKING:
    from candle_vllm.server.observing.request_record import RequestRecord

MAX_PROMPT = 2048  # characters of a logged prompt
MAX_FAILURE = 500  # characters of a logged error

logger = logging.getLogger("candle_vllm.server.generations")


class RequestLog:
    """An observer that logs one record per request, with `log_prompts` also the beginning of the prompt."""

    def __init__(self, *, log_prompts: bool = False) -> None:
        self._log_prompts = log_prompts

    def __call__(self, request: RequestRecord) -> None:
        if logger.isEnabledFor(logging.INFO):
            fields = request_fields(request)
            if self._log_prompts:
                fields["prompt"] = request.info.prompt(MAX_PROMPT)
            logger.info("%s", key_values(fields), extra={FIELDS: fields})


def request_fields(request: RequestRecord) -> dict[str, Any]:
    """Return the logged fields of a request without prompt and answer: names, numbers, milliseconds, error message."""
    context, times = request.context, request.times
    seconds = request.ended - (request.first_token or request.ended)
    after_first = request.completion_tokens - request.info.count
    return {
        "request_id": request.info.request_id,
        "http_request_id": (context.http_request_id if context else None) or None,
        "route": context.route if context else None,
        "operation": request.info.operation,
        "model": request.model,
        "adapter": ",".join(request.info.adapters) or None,
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


class LogFile(WatchedFileHandler):
    """The file of `--log-file`, which may be renamed: the next record creates it anew, readable by its owner only.

    A line on standard error reports the first write that fails, and the next success.
    """

    _missing = 0

    def _open(self) -> Any:
        os.close(os.open(self.baseFilename, os.O_CREAT | os.O_WRONLY, 0o600))  # it may hold prompts
        return super()._open()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, if that is possible."""
        missing = self._missing
        try:
            if missing:
                self.stream = self._open()
                self.stream.write(self.terminator)  # ends a line that was written in part
            super().emit(record)
        except OSError:  # the file cannot be opened again
            self.handleError(record)
        if missing and missing == self._missing:
            self._missing = 0
            super().emit(self._report("the log file %s can be written again; %d lines are missing", missing))

    def _report(self, message: str, detail: object) -> logging.LogRecord:
        record = logging.LogRecord(__name__, logging.WARNING, "", 0, message, (self.baseFilename, detail), None)
        sys.stderr.write(self.format(record) + "\n")
        return record

    def handleError(self, record: logging.LogRecord) -> None:
        """Note the failure. The record that could not be written is dropped, and the next one opens the file again."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        if not self._missing:
            self._report("the log file %s cannot be written: %s", error.strerror)
        self._missing += 1
        with contextlib.suppress(OSError):
            self.close()


def _ms(start: float, end: float | None) -> float | None:
    return None if end is None else round(max(end - start, 0.0) * 1000, 2)
