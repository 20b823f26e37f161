"""The mailbox's refusals: the server's own, with the header or field to blame."""

from __future__ import annotations

from candle_vllm.server.errors import HttpError


class MailboxError(HttpError):
    """A refusal of the mailbox; `param` is a header, a query parameter or a field."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(status, message, code, {"retry-after": "1"} if status == 503 else None, param=param)


def invalid(param: str, text: str) -> MailboxError:
    """400: a header or field has a value that it cannot have; `text` follows its name."""
    return MailboxError(400, f"{param} {text}", "invalid_value", param)


def busy() -> MailboxError:
    """503: the store does not answer, or too much waits for it."""
    return MailboxError(503, "The mailbox is busy or cannot be reached: try again later.", "mailbox_unavailable")


def not_found(request_id: str) -> MailboxError:
    """404: no such record of this key, whether or not another key has one."""
    return MailboxError(
        404, f"The mailbox has no record {request_id!r:.80} of this API key.", "not_found", "request_id"
    )
