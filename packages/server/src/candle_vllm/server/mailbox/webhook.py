# SPDX-License-Identifier: MIT
"""One push: sends a record as a signed HTTP request to an address that was checked.

The body is the same as that of `GET /v1/mailbox/{request_id}`. Only the status of the receiver's response matters.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from functools import cache

import httpx
import msgspec

from candle_vllm.core.targets import ForbiddenTarget, Target, resolve
from candle_vllm.server.mailbox.options import WebhookOptions
from candle_vllm.server.mailbox.record import Record

TIMESTAMP_HEADER = "X-Webhook-Timestamp"
ID_HEADER = "Idempotency-Key"
MAX_ANSWER = 16 << 10  # bytes of the receiver's response that are read before the connection is closed

_RESOLVING = 4  # host names that are resolved at the same time
_tls = cache(httpx.create_ssl_context)  # reading the certificate authorities takes 33 ms
_RETRIED = frozenset({408, 425, 429})  # statuses below 500 after which the push is tried again


class Outcome(Enum):
    """How one attempt ended."""

    DELIVERED = "delivered"
    FAILED = "failed"  # trying again may help
    REFUSED = "refused"  # trying again does not help
    FORBIDDEN = "forbidden"  # nothing was sent: the address is not allowed


@dataclass(frozen=True)
class Attempt:
    """The result of one attempt.

    `detail` is a text for the log and for the owner of the record; of the receiver's response, it has only the status.
    """

    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class Message:
    """A push.

    Attributes:
        record: the record, with its answer.
        delivery_id: id of the push, the same for every attempt.
        target: URL to which it is sent.
        bearer: a client's token for its own target.
        headers: headers of a client that the operator allows.
    """

    record: Record
    delivery_id: str
    target: Target
    bearer: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)


class Sender:
    """Sends messages, each over a new connection, because a connection to the same address may be another host's."""

    def __init__(
        self,
        options: WebhookOptions,
        clock: Callable[[], float] = time.time,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`tls` has the trusted certificate authorities; by default, the public ones are trusted."""
        self._options = options
        self._clock = clock
        self._resolving = ThreadPoolExecutor(_RESOLVING, "candle-vllm-webhook")
        self._client = httpx.AsyncClient(
            verify=tls or _tls(trust_env=False),
            trust_env=False,  # a proxy would resolve the name once more
            follow_redirects=False,
            timeout=httpx.Timeout(options.timeout_secs, connect=options.timeout_secs / 2),  # time for a second address
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    async def close(self) -> None:
        self._resolving.shutdown(wait=False, cancel_futures=True)
        await self._client.aclose()

    async def send(self, message: Message) -> Attempt:
        """Make one attempt, within the configured time; failures of the receiver raise no exception."""
        try:
            async with asyncio.timeout(self._options.timeout_secs):
                status = await self._post(message)
        except ForbiddenTarget as error:
            return Attempt(Outcome.FORBIDDEN, f"the webhook's URL {error}")
        except TimeoutError:
            return Attempt(Outcome.FAILED, "the webhook did not answer in time")
        except (OSError, httpx.HTTPError, httpx.InvalidURL) as error:
            return Attempt(Outcome.FAILED, f"the webhook could not be reached ({type(error).__name__})")
        if 200 <= status < 300:
            return Attempt(Outcome.DELIVERED, f"the webhook answered {status}")
        retried = status >= 500 or status in _RETRIED
        return Attempt(Outcome.FAILED if retried else Outcome.REFUSED, f"the webhook answered {status}")

    async def _post(self, message: Message) -> int:
        body = msgspec.json.encode(message.record)
        headers = self._headers(message, body)
        *others, last = await resolve(message.target, self._resolving)
        for address in others:
            with contextlib.suppress(httpx.ConnectError, httpx.ConnectTimeout):  # nothing has been sent
                return await self._post_to(address, message.target, headers, body)
        return await self._post_to(last, message.target, headers, body)

    async def _post_to(self, address: str, target: Target, headers: Mapping[str, str], body: bytes) -> int:
        """Post to the address that was checked; Host and TLS have the host name."""
        request = self._client.build_request(
            "POST",
            target.url.copy_with(host=address),
            content=body,
            headers={**headers, "Host": target.url.netloc.decode("ascii")},
            extensions={"sni_hostname": target.host},
        )
        response = await self._client.send(request, stream=True)
        try:
            await _read_a_little(response)
        finally:
            await response.aclose()
        return response.status_code

    def _headers(self, message: Message, body: bytes) -> dict[str, str]:
        now = str(int(self._clock()))
        headers = {
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "candle-vllm",
            ID_HEADER: message.delivery_id,
            TIMESTAMP_HEADER: now,
        }
        if message.bearer is not None:
            headers["Authorization"] = f"Bearer {message.bearer}"
        # Pushes to a client's own URL are not signed, because the client could replay them at the operator's receiver.
        own = self._options.own_headers(now, body) if message.target.trusted else {}
        return {**message.headers, **headers, **own}


async def _read_a_little(response: httpx.Response) -> None:
    size = 0
    async for piece in response.aiter_raw():
        size += len(piece)
        if size > MAX_ANSWER:
            return
