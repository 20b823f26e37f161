# SPDX-License-Identifier: MIT
"""Push answers to webhooks in the background: claim due pushes from the store, send them, and retry failed ones.

The queue is the store itself: it is bounded like the store and survives a restart. One key has at most half of the
running pushes, so that a slow receiver delays only its own key.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Callable

from candle_vllm.core.targets import ForbiddenTarget, Target, allowed_target, parse_target
from candle_vllm.responses.store.entries import StoreUnavailableError
from candle_vllm.server.mailbox.options import MailboxOptions
from candle_vllm.server.mailbox.store import MailboxStore, StoredAnswer
from candle_vllm.server.mailbox.webhook import Attempt, Message, Outcome, Sender

LEASE_MARGIN_SECONDS = 30.0
POLL_SECONDS = 15.0  # between two checks of the store, to which other servers may add pushes
FAILURE_SECONDS = 15.0  # after an unexpected failure, before the next check
CLOSE_SECONDS = 5.0  # for pushes that are running at the end
_MAX_WAIT_MS = 3_600_000

logger = logging.getLogger(__name__)


class Deliverer:
    """Sends due pushes until it is closed.

    Args:
        pushed: called when a push has ended: with True if it was delivered, with False if it was given up.
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
            wait = POLL_SECONDS
            try:
                await self._claim_all()
                wait = await self._seconds_to_next()
            except StoreUnavailableError as error:
                logger.warning("the mailbox's store does not answer: %s", error.__cause__ or error)
            except Exception:
                logger.exception("due pushes could not be claimed")
                await asyncio.sleep(FAILURE_SECONDS)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._due.wait()

    async def _claim_all(self) -> None:
        while len(self._running) < self._options.max_deliveries:
            push = await self._store.claim(self._lease_ms, self._busy_owners())
            if push is None:
                return
            task = asyncio.create_task(self._push(push))
            self._running[task] = push.owner
            task.add_done_callback(self._ended)

    async def _seconds_to_next(self) -> float:
        if len(self._running) >= self._options.max_deliveries:
            return POLL_SECONDS  # or earlier, when a running push ends
        due = await self._store.next_push(self._busy_owners())
        if due is None:
            return POLL_SECONDS
        return min(max((due - self._store.now) / 1000, 0.001), POLL_SECONDS)

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
        try:
            target = self._target(push.url)
        except ForbiddenTarget as error:
            return Attempt(Outcome.FORBIDDEN, f"the webhook's URL {error}")
        return await self._sender.send(Message(push.record, push.delivery_id, target, push.bearer))

    async def _store_outcome(self, push: StoredAnswer, attempt: Attempt) -> None:
        failed = push.attempts + 1
        if attempt.outcome is Outcome.FAILED and failed <= self._options.webhook.retry_count:
            await self._store.postpone(push, failed, wait_ms(self._options.webhook.retry_delay_ms, failed))
            return
        if attempt.outcome is not Outcome.DELIVERED:
            logger.warning("pushes of %s are no longer attempted: %s", push.request_id, attempt.detail)
        self._pushed(attempt.outcome is Outcome.DELIVERED)
        await self._store.settle(push)

    def _target(self, url: str | None) -> Target:
        """Return the target: a client's URL, checked again, or the operator's webhook; raises `ForbiddenTarget`."""
        if url is not None:
            return allowed_target(url, self._options.webhook_allowed_hosts, self._options.webhook_allow_private)
        if self._options.webhook.url is None:
            raise ForbiddenTarget("is missing: this server no longer has a webhook")
        return parse_target(self._options.webhook.url)


def wait_ms(delay_ms: int, retry: int) -> int:
    """Return the wait before retry 1, 2, ...: doubled each time, plus or minus a quarter, so that retries spread."""
    spread = random.uniform(0.75, 1.25)  # noqa: S311
    return int(min(delay_ms * 2 ** (retry - 1), _MAX_WAIT_MS) * spread)
