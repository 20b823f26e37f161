# SPDX-License-Identifier: MIT
"""Pushes to webhooks: `Sender` sends one as an HTTP request, `Deliverer` sends the due ones in the background.

The body is the same as that of `GET /v1/mailbox/{request_id}`. Only the status of the receiver's response matters. The
queue of due pushes is the store itself: it is bounded like the store, and survives a restart if the store does. One key
has at most half of the running pushes, or one, so that a slow receiver delays only its own key.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from functools import cache

import httpx
import msgspec

from candle_vllm.core.targets import ForbiddenTarget, Target, allowed_target, parse_target, resolve
from candle_vllm.responses.store.entries import StoreUnavailableError
from candle_vllm.server.mailbox.options import MailboxOptions, WebhookAuth, WebhookOptions
from candle_vllm.server.mailbox.store import MailboxStore, Record, StoredAnswer

TIMESTAMP_HEADER = "X-Webhook-Timestamp"
ID_HEADER = "Idempotency-Key"
MAX_ANSWER = 16 << 10  # bytes of the receiver's response that are read before the connection is closed
LEASE_MARGIN_SECONDS = 30.0
POLL_SECONDS = 15.0  # between two checks of the store, to which other servers may add pushes
FAILURE_SECONDS = 15.0  # after an unexpected failure, before the next check
CLOSE_SECONDS = 5.0  # for pushes that are running at the end

_RESOLVING = 4  # host names that are resolved at the same time
_tls = cache(httpx.create_ssl_context)  # reading the certificate authorities takes 33 ms
_RETRIED = frozenset({408, 425, 429})  # statuses below 500 after which the push is tried again
_MAX_WAIT_MS = 3_600_000

logger = logging.getLogger(__name__)


class Outcome(Enum):
    """How one attempt ended."""

    DELIVERED = "delivered"
    FAILED = "failed"  # trying again may help
    REFUSED = "refused"  # trying again does not help
    FORBIDDEN = "forbidden"  # nothing was sent: the URL or its address is not allowed, or there is no URL


@dataclass(frozen=True)
class Attempt:
    """The result of one attempt.

    `detail` is a text for the log and for the owner of the record; of the receiver's response, it has only the status.
    """

    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class Message:
    """A push of a record to `target`; every attempt has the same `delivery_id`.

    `bearer` is a client's token for its own target, and `headers` are headers of a client that the operator allows.
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
        size = 0
        try:
            async for piece in response.aiter_raw():
                size += len(piece)
                if size > MAX_ANSWER:
                    break
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
        if message.target.trusted:
            options = self._options
            signature = WebhookAuth("hmac", options.signing_secret) if options.signing_secret else WebhookAuth()
            headers |= {**options.headers, **options.auth.headers(now, body), **signature.headers(now, body)}
        taken = {name.lower() for name in headers}
        return {name: value for name, value in message.headers.items() if name.lower() not in taken} | headers


class Deliverer:
    """Sends due pushes until it is closed.

    `pushed` is called when a push has ended: with True if it was delivered, with False if it was given up.
    """

    def __init__(
        self, store: MailboxStore, sender: Sender, options: MailboxOptions, pushed: Callable[[bool], object]
    ) -> None:
        self._store = store
        self._sender = sender
        self._options = options
        self._pushed = pushed
        self._lease_ms = int((options.webhook.timeout_secs + LEASE_MARGIN_SECONDS) * 1000)
        self._running: dict[asyncio.Task[None], str] = {}
        self._due = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start pushing, also the pushes that earlier servers left in the store."""
        self._pump = asyncio.create_task(self._work())

    def wake(self) -> None:
        """Check the store now, because a push is due."""
        self._due.set()

    async def close(self) -> None:
        """Give running pushes a little time; a push that is cancelled is due again when the next server starts."""
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
        tasks = list(self._running)
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self) -> None:
        while True:
            self._due.clear()
            wait = POLL_SECONDS  # or less, when a running push ends
            try:
                while len(self._running) < self._options.max_deliveries:
                    push = await self._store.claim(self._lease_ms, self._busy_owners())
                    if push is None:
                        if (due := await self._store.next_push(self._busy_owners())) is not None:
                            wait = min(max((due - self._store.now) / 1000, 0.001), POLL_SECONDS)
                        break
                    task = asyncio.create_task(self._push(push))
                    self._running[task] = push.owner
                    task.add_done_callback(self._ended)
            except StoreUnavailableError as error:
                logger.warning("the mailbox's store does not answer: %s", error.__cause__ or error)
            except Exception:
                logger.exception("due pushes could not be claimed")
                await asyncio.sleep(FAILURE_SECONDS)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._due.wait()

    def _busy_owners(self) -> list[str]:
        most = max(1, self._options.max_deliveries // 2)
        return [owner for owner, number in Counter(self._running.values()).items() if number >= most]

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._due.set()
        if not task.cancelled() and task.exception() is not None:
            logger.error("a push failed unexpectedly", exc_info=task.exception())

    async def _push(self, push: StoredAnswer) -> None:
        """Make one attempt and store its outcome; if it is cancelled or the store fails, the push becomes due again."""
        try:
            attempt = await self._try(push)
        except asyncio.CancelledError:
            with contextlib.suppress(StoreUnavailableError):
                await self._store.postpone(push, push.attempts, 0)
            raise
        with contextlib.suppress(StoreUnavailableError):
            await self._store_outcome(push, attempt)

    async def _try(self, push: StoredAnswer) -> Attempt:
        options = self._options
        try:
            if push.url is not None:  # checked again
                target = allowed_target(push.url, options.webhook_allowed_hosts, options.webhook_allow_private)
            elif options.webhook.url is not None:
                target = parse_target(options.webhook.url)
            else:
                raise ForbiddenTarget("is missing: this server no longer has a webhook")
        except ForbiddenTarget as error:
            return Attempt(Outcome.FORBIDDEN, f"the webhook's URL {error}")
        return await self._sender.send(Message(push.record, push.delivery_id, target, push.bearer))

    async def _store_outcome(self, push: StoredAnswer, attempt: Attempt) -> None:
        failed = push.attempts + 1
        wait, detail = wait_ms(self._options.webhook.retry_delay_ms, failed), attempt.detail
        if attempt.outcome is Outcome.FAILED and failed <= self._options.webhook.retry_count:
            if self._store.now + wait < push.expires:
                await self._store.postpone(push, failed, wait)
                return
            detail += ", and its record expires before the next attempt"
        await self._store.settle(push)  # first: if the store fails, the push is sent again, and ends then
        if attempt.outcome is not Outcome.DELIVERED:
            logger.warning("pushes of %s are no longer attempted: %s", push.request_id, detail)
        self._pushed(attempt.outcome is Outcome.DELIVERED)


def wait_ms(delay_ms: int, retry: int) -> int:
    """Return the wait before retry 1, 2, ...: doubled up to an hour, plus or minus a quarter to spread retries."""
    spread = random.uniform(0.75, 1.25)  # noqa: S311
    return int(min(delay_ms * 2 ** (retry - 1), _MAX_WAIT_MS) * spread)
