"""What can go wrong with a model behind a URL, as exceptions that keep the HTTP status."""

from __future__ import annotations

import json
from typing import Any

from candle_vllm.core.errors import CandleVllmError, EngineOverloadedError, RequestError

_MAX_MESSAGE = 500  # characters of a server's own words
_BUSY = frozenset({429, 503})


class ModelServerError(CandleVllmError):
    """The server cannot be reached, failed, refused the key, or answered something that is not OpenAI's API.

    Attributes:
        status: of its answer; None where there was none.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ModelServerBusyError(EngineOverloadedError):
    """The server takes no more requests now.

    Attributes:
        status: 429 or 503.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ModelServerRequestError(RequestError):
    """The server refuses the request.

    Attributes:
        status: 400 to 499.
        code: the server's own word for it, or None.
    """

    def __init__(self, message: str, status: int, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param)
        self.status = status
        self.code = code


def error_of(status: int, body: bytes, server: str, api_key: str | None) -> CandleVllmError:
    """The exception for an answer with an error status; the key is never in its message."""
    envelope = _envelope(body)
    words = envelope.get("message") or body.decode("utf-8", "replace").strip() or "no reason given"
    said = f"{server} answered {status}: {shown(words, api_key)}"
    if status in (401, 403):
        return ModelServerError(f"{said} (check the API key)", status)
    if status in _BUSY:
        return ModelServerBusyError(said, status)
    if status == 404:
        return ModelServerError(f"{said} (check the model's name, and that the base URL ends as in .../v1)", status)
    if 400 <= status < 500:
        param, code = envelope.get("param"), envelope.get("code")
        return ModelServerRequestError(
            said, status, param if isinstance(param, str) else None, code if isinstance(code, str) else None
        )
    return ModelServerError(said, status)


def shown(words: Any, api_key: str | None) -> str:
    """A server's words, bounded, on one line and without the key."""
    text = words if isinstance(words, str) else json.dumps(words)
    if api_key:
        text = text.replace(api_key, "***")
    text = " ".join(text[: 2 * _MAX_MESSAGE].split())
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + " ..."


def _envelope(body: bytes) -> dict[str, Any]:
    """The `error` object of OpenAI's envelope, or the nearest to it that servers send."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    error = value.get("error", value.get("detail", value))
    return error if isinstance(error, dict) else {"message": error}
