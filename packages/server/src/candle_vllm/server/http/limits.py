# SPDX-License-Identifier: MIT
"""Requests and tokens per minute of each API key: who may begin, what answers cost, and what clients are told of it.

Before step 2 of a request's life, and beside step 9, where tokens are counted. Each limit is a bucket that holds what
a minute allows and fills steadily. A request begins where the bucket of requests holds one and that of tokens anything
at all; tokens are taken out as they are counted for `usage`, so no answer is estimated, and no answer is cut. What an
answer takes beyond the bucket is owed, and the key waits until it has been filled up again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.http.routing import UNLIMITED, Caller, Limits, caller_of

Kind = Literal["requests", "tokens"]
MINUTE = 60.0
ROUNDING = 1e-6  # seconds: who waited as long as it was told may be so much too early, by floats
_SWEEP = 1024  # meters, from where on those that are as new are let go


class Bucket:
    """What may be taken now of what a minute allows; less than nothing is owed.

    Attributes:
        limit: a minute's worth, and the most that is saved up.
    """

    __slots__ = ("_at", "_level", "limit")

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self._level = float(limit)
        self._at = now

    def level(self, now: float) -> float:
        """What is in it."""
        self._level = min(self.limit, self._level + max(0.0, now - self._at) * self.limit / MINUTE)
        self._at = now
        return self._level

    def take(self, count: float) -> None:
        """Takes something out, also what is not there."""
        self._level -= count

    def until(self, wanted: float, now: float) -> float:
        """Seconds until it holds so much."""
        return max(0.0, wanted - self.level(now)) * MINUTE / self.limit


class Meter:
    """The buckets of one key, None where it has no such limit. For one event loop.

    Args:
        limits: what a minute allows.
        now: `time.monotonic()`.
    """

    def __init__(self, limits: Limits, now: float) -> None:
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.change(limits, now)

    def change(self, limits: Limits, now: float) -> None:
        """Other limits, of which as much has been used."""
        used = {kind: bucket.limit - bucket.level(now) for kind, bucket in self.buckets()}
        self.limits = limits
        requests, tokens = limits
        self.requests = None if requests is None else Bucket(requests, now)
        self.tokens = None if tokens is None else Bucket(tokens, now)
        for kind, bucket in self.buckets():
            bucket.take(used.get(kind, 0.0))

    def spend(self, tokens: int) -> None:
        """Tokens of a prompt or of an answer have been counted."""
        if self.tokens is not None:
            self.tokens.take(tokens)

    def is_full(self, now: float) -> bool:
        """Whether it is as one that was never used."""
        return all(bucket.level(now) >= bucket.limit for _, bucket in self.buckets())

    def buckets(self) -> Iterator[tuple[Kind, Bucket]]:
        """Those that there are."""
        if self.requests is not None:
            yield "requests", self.requests
        if self.tokens is not None:
            yield "tokens", self.tokens

    def headers(self, now: float) -> list[tuple[bytes, bytes]]:
        """What clients are told, under OpenAI's names."""
        told: list[tuple[bytes, bytes]] = []
        for kind, bucket in self.buckets():
            values = {
                "limit": str(bucket.limit),
                "remaining": str(max(0, math.floor(bucket.level(now)))),
                "reset": duration(bucket.until(bucket.limit, now)),
            }
            told += [(f"x-ratelimit-{what}-{kind}".encode(), text.encode()) for what, text in values.items()]
        return told


class RateLimits:
    """The meters of one application, one for each name or number of a key that has limits and was used.

    Args:
        default: of callers without a key, all of them together.
        refused: told of the label of each request that is refused, and of the limit.
        clock: as `time.monotonic`.
    """

    def __init__(
        self,
        default: Limits = UNLIMITED,
        refused: Callable[[str, Kind], object] = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._default = default
        self._refused = refused
        self.clock = clock
        self._meters: dict[str, Meter] = {}
        self._sweep = _SWEEP

    def meter(self, caller: Caller) -> Meter | None:
        """What the caller's requests are measured by; None where it has no limits."""
        limits = caller.limits if caller.label else self._default
        if limits == UNLIMITED:
            return None
        now, meter = self.clock(), self._meters.get(caller.label)
        if meter is None:
            if len(self._meters) >= self._sweep:
                self._meters = {label: each for label, each in self._meters.items() if not each.is_full(now)}
                self._sweep = max(_SWEEP, 2 * len(self._meters))
            meter = self._meters[caller.label] = Meter(limits, now)
        elif meter.limits != limits:  # the file of keys has changed: what is owed stays owed
            meter.change(limits, now)
        return meter

    def admit(self, caller: Caller) -> None:
        """A request begins.

        Raises:
            HttpError: 429 with Retry-After, because its key has used up what a minute allows.
        """
        meter = self.meter(caller)
        if meter is None:
            return
        now = self.clock()
        for kind, bucket in meter.buckets():
            wait = bucket.until(1, now)
            if wait > ROUNDING:
                self._refused(caller.label, kind)
                seconds = max(1, math.ceil(wait))
                whose = f"The key {caller.label!r}" if caller.label else "This server"
                message = f"{whose} allows {bucket.limit} {kind} per minute, and they are used up: wait {seconds} s."
                raise HttpError(429, message, "rate_limit_exceeded", {"retry-after": str(seconds)})
        if meter.requests is not None:
            meter.requests.take(1)


class RateLimitMiddleware:
    """Tells a caller with limits in every answer what is left, and whoever counts its tokens where to take them."""

    def __init__(self, app: ASGIApp, limits: RateLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        meter = None if scope["type"] == "lifespan" else self._limits.meter(caller_of(scope))
        if meter is None:
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["meter"] = meter

        def send_with_limits(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                told = meter.headers(self._limits.clock())
                message["headers"] = [*message.get("headers", ()), *told]
            return send(message)

        await self._app(scope, receive, send_with_limits)


def duration(seconds: float) -> str:
    """A time as OpenAI's headers have it: 6m0s, 8.64s, 20ms."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds * 100) / 100, 60)
    return (f"{minutes:.0f}m" if minutes else "") + f"{rest:.2f}".rstrip("0").rstrip(".") + "s"
