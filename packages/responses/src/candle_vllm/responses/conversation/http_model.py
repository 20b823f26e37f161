# SPDX-License-Identifier: MIT
"""HttpModel: a model behind a server with OpenAI's chat API, and the server's errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from candle_vllm.core.errors import (
    CandleVllmError,
    ConfigError,
    EngineOverloadedError,
    InvalidParameterError,
    PromptTooLongError,
    RequestError,
)
from candle_vllm.openai.events import Event
from candle_vllm.openai.json_body import MAX_DEPTH, is_deeper
from candle_vllm.openai.task import Task
from candle_vllm.responses.conversation.chat_form import chat_request
from candle_vllm.responses.conversation.http_chunks import ChunkReader

_MAX_MESSAGE = 500  # characters of a server's message
_TOO_LONG = ("context_length_exceeded", "exceed_context_size_error")  # codes of OpenAI and vLLM; type of llama.cpp
_TOO_LONG_WORDS = ("context length", "context size", "maximum model length")  # of vLLM, SGLang and older llama.cpp
_BUSY = frozenset({429, 503, 529})
_WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each retry, unless the server sends `Retry-After`
_LONGEST_WAIT = 120.0  # seconds; if a server asks for more, the request fails

logger = logging.getLogger(__name__)


class ModelServerError(CandleVllmError):
    """The server cannot be reached, fails, refuses the key, has no such model, or sends an invalid answer.

    `status` is the HTTP status of the answer, or of an error in its stream; None if the failure has no status.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ModelServerBusyError(EngineOverloadedError):
    """The server accepts no more requests now; `status` is 429, 503 or 529."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ModelServerRequestError(RequestError):
    """The server refuses the request, with its `code`, if any, and a `status` from 400 to 499.

    401, 403, 404 and 429 are other errors.
    """

    def __init__(self, message: str, status: int, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param)
        self.status = status
        self.code = code


class ModelServerPromptError(ModelServerRequestError, PromptTooLongError):
    """The server refuses the prompt, which is too long for its model."""


def error_of(status: int, body: bytes, server: str, api_key: str | None) -> CandleVllmError:
    """Return the exception for an answer with an error status; the key is never in its message."""
    envelope = _envelope(body)
    message = envelope.get("message") or body.decode("utf-8", "replace").strip() or "no reason given"
    text = f"{server} answered {status}: {shown(message, api_key)}"
    if status in (401, 403):
        return ModelServerError(f"{text} (check the API key: --api-key)", status)
    if status in _BUSY:
        return ModelServerBusyError(text, status)
    if status == 404:
        return ModelServerError(f"{text} (check the model's name, and that the base URL ends as in .../v1)", status)
    if 400 <= status < 500:
        param, code = envelope.get("param"), envelope.get("code")
        coded = code in _TOO_LONG or envelope.get("type") in _TOO_LONG
        too_long = coded or any(words in text for words in _TOO_LONG_WORDS)
        return (ModelServerPromptError if too_long else ModelServerRequestError)(
            text, status, param if isinstance(param, str) else None, code if isinstance(code, str) else None
        )
    return ModelServerError(text, status)


def shown(message: Any, api_key: str | None) -> str:
    """Return a server's message on one line, truncated, without the key."""
    text = message if isinstance(message, str) else json.dumps(message)
    if api_key:
        text = text.replace(api_key, "***")
    text = " ".join(text[: 2 * _MAX_MESSAGE].split())
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + " ..."


def _envelope(body: bytes) -> dict[str, Any]:
    """Return the `error` object of OpenAI's envelope, or of similar envelopes."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    error = value.get("error", value.get("detail", value))
    return error if isinstance(error, dict) else {"message": error}


MAX_EVENT = 4 << 20  # bytes of one event of a stream
MAX_BODY = 1 << 20  # bytes of an answer that is not a stream
_MAX_KEY = 4096
_DRAIN_SECONDS = 0.5


class HttpModel:
    """Chat model behind a server; see `ChatModel`.

    Args:
        base_url: the URL before `/chat/completions`, such as `http://127.0.0.1:2000/v1`.
        api_key: key that is sent as `Authorization: Bearer`; error messages never contain it.
        model: model name for requests that name none; None uses the first model that the server lists.
        connect_timeout: seconds to connect.
        read_timeout: seconds to wait for the first byte of the answer, and for each following byte.
        transport: transport for the requests; None uses the network.

    Raises ConfigError if the URL is no http or https URL, or has a user, query or fragment, or the key cannot be sent.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        model: str | None = None,
        connect_timeout: float = 10.0,
        read_timeout: float = 300.0,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._url = _checked_url(base_url)
        self._server = f"the model server at {self._url.host}"
        if api_key is not None and not (
            0 < len(api_key) <= _MAX_KEY and api_key.isascii() and api_key.isprintable() and " " not in api_key
        ):
            raise ConfigError(f"api_key must be 1 to {_MAX_KEY} printable ASCII characters without spaces", "api_key")
        self._key = api_key
        self._model = model
        self._no_tools: dict[str, Any] = {"tools": []}  # a server may add its own tools to a request without `tools`
        headers = {"accept-encoding": "identity", "user-agent": "candle-vllm"}
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        self._client = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(read_timeout, connect=connect_timeout),
            follow_redirects=False,
            transport=transport,
        )

    def __repr__(self) -> str:
        return f"HttpModel({self._url.host!r}, model={self._model!r})"

    async def aclose(self) -> None:
        await self._client.aclose()

    @asynccontextmanager
    async def stream(self, request: Task | Mapping[str, Any]) -> AsyncGenerator[AsyncIterator[Event]]:
        """Yield the events of the answer; leaving the context closes the connection, so that the server stops.

        Raises:
            RequestError: a chat request cannot express `request`, or the server refuses it (`ModelServerRequestError`).
            EngineOverloadedError: the server was busy at every try, or its `Retry-After` exceeds 120 seconds.
            CandleVllmError: any other failure, before the first event or between events; mostly a `ModelServerError`.
        """
        self._check_open()
        fields = chat_request(request) if isinstance(request, Task) else request
        if self._model is None and "model" not in fields:
            self._model = await self._first_model()
            self._check_open()
        body = {"model": self._model, **fields, "stream": True, "stream_options": {"include_usage": True}}
        try:
            async with aclosing(await self._chat(body)) as response, aclosing(self._events(response)) as events:
                yield events
        except httpx2.HTTPError as error:
            raise self._failed(error) from None

    async def _chat(self, body: dict[str, Any]) -> httpx2.Response:
        """Return the answer to a chat request; without tools, `tools` is an empty list if the server accepts one."""
        content, headers = _encoded({**self._no_tools, **body}), {"content-type": "application/json"}
        try:
            return await self._answer("POST", "chat/completions", content=content, headers=headers)
        except ModelServerRequestError as error:
            if "tools" in body or not self._no_tools or "tools" not in str(error):
                raise
        self._no_tools = {}  # OpenAI's API refuses an empty list
        return await self._answer("POST", "chat/completions", content=_encoded(body), headers=headers)

    async def _answer(self, method: str, path: str, **given: Any) -> httpx2.Response:
        """Return an answer with its body unread; retry if the server is busy, or disconnects before it answers."""
        for wait in (*_WAITS, None):
            try:
                request = self._client.build_request(method, f"{str(self._url).rstrip('/')}/{path}", **given)
                response = await self._client.send(request, stream=True)
            except (httpx2.ReadError, httpx2.RemoteProtocolError) as error:
                failure: CandleVllmError = self._failed(error)
            else:
                if response.status_code == 200:
                    return response
                async with aclosing(response):
                    failure = error_of(response.status_code, await self._body(response), self._server, self._key)
                if response.status_code not in _BUSY:
                    raise failure
                wait = wait and _wait_of(response.headers.get("retry-after"), wait)
            if wait is None or wait > _LONGEST_WAIT:
                raise failure
            logger.warning("%s: trying again in %d s", failure, math.ceil(wait))
            await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _check_open(self) -> None:
        if self._client.is_closed:
            raise ModelServerError(f"the connection to {self._server} was closed by this program: create a new one")

    async def _events(self, response: httpx2.Response) -> AsyncGenerator[Event]:
        reader, done = ChunkReader(), False
        try:
            sent = aiter(httpx2.EventSource(response, max_event_size=MAX_EVENT))
            async for one in sent:
                if one.data.strip() == "[DONE]":
                    await _drain(sent)
                    done = True
                    break
                if one.data:
                    for event in self._read(reader, one.data):
                        yield event
        except httpx2.HTTPError as error:
            raise self._failed(error) from None
        if not (done or reader.finished):
            raise ModelServerError(
                f"{self._server} closed the connection before its answer was complete", response.status_code
            )
        if reader.failure:
            raise ModelServerError(
                f"{self._server} ended its answer before it was complete (finish_reason {reader.failure!r})",
                response.status_code,
            )
        for event in reader.end():
            yield event

    def _read(self, reader: ChunkReader, data: str) -> list[Event]:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise ModelServerError(f"{self._server} sent an event that is not a JSON object: {shown(data, self._key)}")
        if value.get("error"):
            error = value["error"] if isinstance(value["error"], dict) else {}
            status = error.get("code")
            status = status if isinstance(status, int) and 400 <= status < 600 else 500
            raise error_of(status, data.encode(), self._server, self._key)
        if is_deeper(value, MAX_DEPTH):
            raise ModelServerError(f"{self._server} sent an event that is nested too deeply")
        return reader.read(value)

    async def _first_model(self) -> str:
        advice = "give the model's name"
        try:
            async with aclosing(await self._answer("GET", "models")) as response:
                body = await self._body(response)
            first = json.loads(body)["data"][0]["id"]
        except httpx2.HTTPError as error:
            raise self._failed(error) from None
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ModelServerError(f"{self._server} has no list of models: {advice}") from None
        if not isinstance(first, str):
            raise ModelServerError(f"{self._server} has a list of models without names: {advice}")
        return first

    async def _body(self, response: httpx2.Response) -> bytes:
        """Return the first `MAX_BODY` bytes of an answer that is not a stream."""
        read = bytearray()
        async for chunk in response.aiter_bytes():
            read += chunk
            if len(read) > MAX_BODY:
                break
        return bytes(read[:MAX_BODY])

    def _failed(self, error: httpx2.HTTPError) -> ModelServerError:
        if isinstance(error, httpx2.TimeoutException):
            return ModelServerError(f"{self._server} did not answer in time ({type(error).__name__})")
        if isinstance(error, httpx2.ConnectError):
            return ModelServerError(f"{self._server} cannot be reached: {shown(str(error), self._key)}")
        return ModelServerError(f"{self._server} broke off: {shown(str(error) or type(error).__name__, self._key)}")


def _wait_of(header: str | None, default: float) -> float:
    """Return the seconds in `Retry-After`, a number or a date; `default` if it is missing or invalid."""
    try:
        seconds = float(header or "")
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header or "").timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return default
    return max(seconds, 0.0) if math.isfinite(seconds) else default


async def _drain(events: AsyncIterator[object]) -> None:
    """Read the rest of a stream for a short time, so that its connection can be reused."""
    with contextlib.suppress(TimeoutError, httpx2.HTTPError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for _ in events:
                pass


def _encoded(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParameterError(f"the request cannot be written as JSON: {error}") from None


def _checked_url(text: str) -> httpx2.URL:
    try:
        url = httpx2.URL(text)
    except (httpx2.InvalidURL, TypeError):
        raise ConfigError("the base URL is invalid: write http://127.0.0.1:2000/v1", "base_url") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(
            f"the base URL must begin with http:// or https:// and name a host, not {text!r:.60}; to use a model "
            "of this machine without a server, load it with InferenceEngine(...)",
            "base_url",
        )
    if url.userinfo or url.query or url.fragment:
        raise ConfigError("the base URL must not have a user, a query or a fragment; a key goes to api_key", "base_url")
    return url
