# SPDX-License-Identifier: MIT
"""Wire types of the mailbox: the record of an answer, and errors.

A record is made at step 10 of a request's life, when the answer is complete or has failed, or earlier as `streaming`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec
from msgspec import UNSET, UnsetType

from candle_vllm.core.errors import EngineDeadError
from candle_vllm.openai import to_error, to_json_bytes
from candle_vllm.openai.errors import ErrorBody, ErrorEnvelope, GenerationFailedError
from candle_vllm.server.http.errors import HttpError


class Status(StrEnum):
    """The state of an answer."""

    COMPLETED = "completed"
    STREAMING = "streaming"  # still being generated
    VALIDATION_ERROR = "validation_error"
    MODEL_ERROR = "model_error"
    INTERNAL_ERROR = "internal_error"


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One answer as clients and webhooks see it.

    Attributes:
        request_id: the id of the answer, `chatcmpl-...` or `cmpl-...`.
        model: first name of the model that answered.
        created: Unix seconds at which the record was made.
        status: state of the answer.
        response: the whole OpenAI answer, or the error envelope; absent while it streams and in lists.
    """

    request_id: str
    model: str
    created: int
    status: Status
    response: msgspec.Raw | UnsetType = UNSET


class RecordList(msgspec.Struct, frozen=True, kw_only=True):
    """One page of records, newest first, without their answers."""

    object: str = "list"
    data: Sequence[Record]
    has_more: bool


class MailboxError(HttpError):
    """An error of the mailbox; `param` is a header, a parameter of the URL or a field."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(status, message, code, {"retry-after": "1"} if status == 503 else None, param=param)


def invalid(param: str, text: str) -> MailboxError:
    """Return the 400 for an invalid value of the parameter `param`; `text` follows its name in the message."""
    return MailboxError(400, f"{param} {text}", "invalid_value", param)


def not_found(request_id: str) -> MailboxError:
    """Return the 404 for a record that this key does not have, even if another key has it."""
    return MailboxError(
        404, f"The mailbox has no record {request_id!r:.80} of this API key.", "not_found", "request_id"
    )


def settled(answer: msgspec.Struct | bytes | Exception, most: int) -> tuple[Status, bytes]:
    """Return the status and the JSON of an answer, or of the failure of its request.

    `answer` is OpenAI's answer object, its JSON, or the exception that ended the request. An answer of more than `most`
    bytes becomes an error that says so, because half an answer is of no use.
    """
    if isinstance(answer, Exception):
        error = to_error(answer)
        return _failed(answer, error.status), to_json_bytes(error.body)
    data = answer if isinstance(answer, bytes) else to_json_bytes(answer)
    if len(data) <= most:
        return Status.COMPLETED, data
    text = f"The answer has {len(data)} bytes, and the mailbox stores answers of at most {most} bytes."
    return Status.INTERNAL_ERROR, failure_body(text, "answer_too_large")


def failure_body(message: str, code: str) -> bytes:
    """Return an error envelope of the mailbox itself, as JSON."""
    return to_json_bytes(ErrorEnvelope(error=ErrorBody(message=message, type="server_error", code=code)))


def _failed(failure: Exception, status: int) -> Status:
    if isinstance(failure, GenerationFailedError | EngineDeadError):
        return Status.MODEL_ERROR
    return Status.VALIDATION_ERROR if status < 500 else Status.INTERNAL_ERROR
