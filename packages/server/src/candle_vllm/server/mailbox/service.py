# SPDX-License-Identifier: MIT
"""Mailbox: the interface of the mailbox to the server's routes.

At step 10 of a request's life, `keep` stores its answer and queues its push, as its policy says. Before that, `begin`
shows clients that the answer is being generated.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import msgspec

from candle_vllm.core.targets import Target, parse_target
from candle_vllm.responses.store.backend import Upkeep
from candle_vllm.responses.store.entries import StoreUnavailableError
from candle_vllm.server.mailbox.options import HEADER_VALUE, MailboxOptions
from candle_vllm.server.mailbox.policy import DeliveryPolicy, Mode, check_bearer, client_target
from candle_vllm.server.mailbox.store import (
    MailboxError,
    MailboxStore,
    Status,
    StoredAnswer,
    invalid,
    not_found,
    settled,
)
from candle_vllm.server.mailbox.webhook import Deliverer, Message, Outcome, Sender

PURGE_SECONDS = 30.0
_BEGUN_MARGIN_MS = 60_000

logger = logging.getLogger(__name__)


class Mailbox:
    """Answers that outlive their clients; started, used and closed in one event loop. `pushed`: as in `Deliverer`."""

    def __init__(self, options: MailboxOptions) -> None:
        self.options = options
        self.pushed: Callable[[bool], object] = lambda _: None
        self.store = MailboxStore(options)
        self._sender = Sender(options.webhook)
        self._deliverer = Deliverer(self.store, self._sender, options, lambda delivered: self.pushed(delivered))
        self._pushing: Counter[str] = Counter()  # running pushes that clients asked for, by owner
        self._purging: Upkeep | None = None

    async def start(self) -> None:
        """Open the store, and continue the pushes of an earlier server; ConfigError if the store cannot be opened."""
        await self.store.open()
        self._deliverer.start()
        self._purging = Upkeep(PURGE_SECONDS, self._purge, "the mailbox could not be purged", at_once=True)

    async def close(self) -> None:
        """Stop pushing within seconds, and close the store; pending pushes remain in it."""
        if self._purging is not None:
            await self._purging.close()
        await self._deliverer.close()
        await self._sender.close()
        await self.store.close()

    def owner(self, key: str) -> str:
        """Return the owner that an API key stands for; without keys, `key` is "" and all requests have one owner."""
        return self.store.owner(key)

    async def begin(self, policy: DeliveryPolicy, owner: str, request_id: str, model: str, limit_secs: float) -> None:
        """List an answer as `streaming`; called when its client has disconnected, or at once if it is always stored.

        `limit_secs` is the time left for the request; if the server dies, the answer is an error a minute after it.
        """
        if policy.mailbox is Mode.NEVER:
            return
        expires = self.store.now + int(limit_secs * 1000) + _BEGUN_MARGIN_MS
        await self._put(StoredAnswer(owner, request_id, model, Status.STREAMING, None, expires))

    async def keep(
        self,
        policy: DeliveryPolicy,
        owner: str,
        request_id: str,
        model: str,
        answer: msgspec.Struct | bytes | Exception,
        disconnected: bool,
    ) -> bool:
        """Store an answer or queue its push, as its request asked; return whether either was done.

        If the store fails, that is logged and the answer is lost: the request itself must not fail because of it.

        Args:
            owner: result of `owner(key)`.
            answer: OpenAI's answer object (for a stream, joined from its chunks), its JSON, or the exception.
            disconnected: whether the client has disconnected.
        """
        listed, push = policy.mailbox.applies(disconnected), policy.webhook.applies(disconnected)
        if not listed and not push:
            if policy.mailbox is not Mode.NEVER:
                try:
                    await self.store.remove(owner, request_id, Status.STREAMING)
                except StoreUnavailableError as error:
                    logger.warning("a record could not be dropped: %s", error.__cause__ or error)
            return False
        status, data = settled(answer, self.options.max_record_bytes)
        expires = self.store.now + self.options.retention_secs * 1000
        stored = await self._put(
            StoredAnswer(
                owner, request_id, model, status, data, expires, listed, push,
                policy.url if push else None, policy.bearer if push else None,
            )
        )  # fmt: skip
        if stored and push:
            self._deliverer.wake()
        return stored

    async def push(
        self, owner: str, request_id: str, url: str | None, bearer: str | None, headers: Mapping[str, str]
    ) -> None:
        """Push an answer once, now, at the request of its owner.

        `url` is a client's URL, with `bearer` as its token; None means the operator's webhook. `headers` are further
        headers, whose names the operator must allow.

        Raises:
            MailboxError: 404 no such answer, 400 invalid value, 502 not delivered, 503 too many running pushes.
            StoreUnavailableError: the store fails.
        """
        push_target = self._push_target(url, bearer, headers)
        push = await self.store.get(owner, request_id)
        if push is None:
            raise not_found(request_id)
        if push.status is Status.STREAMING:
            raise invalid("request_id", "names an answer that is still being generated: try again later")
        with self._place(owner):
            attempt = await self._sender.send(Message(push.record, push.delivery_id, push_target, bearer, headers))
        self.pushed(attempt.outcome is Outcome.DELIVERED)
        if attempt.outcome is Outcome.FORBIDDEN:
            raise MailboxError(400, f"The record was not pushed: {attempt.detail}.", "invalid_value", "url")
        if attempt.outcome is not Outcome.DELIVERED:
            raise MailboxError(502, f"The record was not delivered: {attempt.detail}.", "webhook_failed")

    @contextlib.contextmanager
    def _place(self, owner: str) -> Iterator[None]:
        """Occupy one of the slots for pushes that clients ask for; one owner has at most half of the slots, or one."""
        most = self.options.max_deliveries
        if self._pushing.total() >= most or self._pushing[owner] >= max(1, most // 2):
            raise MailboxError(503, "Too many pushes are under way: try again later.", "overloaded")
        self._pushing[owner] += 1
        try:
            yield
        finally:
            self._pushing[owner] -= 1
            self._pushing += Counter()  # removes owners without pushes

    def _push_target(self, url: str | None, bearer: str | None, headers: Mapping[str, str]) -> Target:
        for name, value in headers.items():
            if name.lower() not in self.options.webhook_allowed_headers:
                raise invalid(f"headers.{name:.64}", "is not a header that this server's operator allows")
            if not HEADER_VALUE.fullmatch(value):
                raise invalid(f"headers.{name}", "must be printable ASCII, 1 to 1024 characters")
        if bearer is not None:
            check_bearer("bearer_token", bearer)
        if url is not None:
            return client_target("url", url, self.options)
        if bearer is not None:
            raise invalid("bearer_token", "is for url, which is missing")
        if self.options.webhook.url is None:
            raise invalid("url", "is required: this server has no webhook of its own")
        return parse_target(self.options.webhook.url)

    async def _purge(self) -> None:
        for lost in await self.store.purge():
            logger.warning("pushes of %s are no longer attempted: its record has expired", lost.request_id)
            self.pushed(False)

    async def _put(self, answer: StoredAnswer) -> bool:
        try:
            dropped = await self.store.put(answer)
        except StoreUnavailableError as error:
            logger.error("the answer %s could not be stored: %s", answer.request_id, error.__cause__ or error)
            return False
        if dropped:
            logger.warning("%d older records made room: the mailbox, or the key's part of it, was full", dropped)
        return True
