# SPDX-License-Identifier: MIT
"""Rate limits of each API key, such as requests and tokens per minute, as token buckets.

Before step 2 of a request's life, and beside step 9, where tokens are counted. Each limit is a bucket that holds at
most the limit and fills at the limit's rate. A request may begin if the level of each bucket is at least 1. Tokens are
taken out as they are counted for `usage`, so nothing is estimated and no answer is truncated. If an answer takes more
than a bucket has, the level becomes negative, and the key must wait.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.http.routing import NOBODY, Caller, Limits, caller_of
from candle_vllm.server.settings.options import Rate
from candle_vllm.server.settings.table import RATES

ROUNDING = 1e-6  # seconds by which rounding may shorten the wait of a client that obeys Retry-After
_SWEEP = 1024  # number of meters at which meters with full buckets are deleted for the first time


class Bucket:
    """The amount that may be used now; negative after too much was used.

    `limit` is the amount that is added in the rate's window, and the maximum level.
    """

    __slots__ = ("_at", "_level", "limit", "rate")

    def __init__(self, rate: Rate, limit: int, now: float) -> None:
        self.rate = rate
        self.limit = limit
        self._level = float(limit)
        self._at = now

    def level(self, now: float) -> float:
        self._level = min(self.limit, self._level + max(0.0, now - self._at) * self.limit / self.rate.seconds)
        self._at = now
        return self._level

    def take(self, count: float) -> None:
        """Take an amount out, even if the bucket holds less."""
        self._level -= count

    def until(self, wanted: float, now: float) -> float:
        """Return the seconds until the bucket has the wanted amount."""
        return max(0.0, wanted - self.level(now)) * self.rate.seconds / self.limit


class Meter:
    """The buckets of one key, one for each limit that it has. For one event loop."""

    def __init__(self, limits: Limits, now: float) -> None:
        self.buckets: list[Bucket] = []
        self.change(limits, now)

    def change(self, limits: Limits, now: float) -> None:
        """Set other limits; the amounts that were used stay used."""
        used = {bucket.rate: bucket.limit - bucket.level(now) for bucket in self.buckets}
        self.limits = limits
        self.buckets = [Bucket(rate, limits[name], now) for name, rate in RATES.items() if name in limits]
        for bucket in self.buckets:
            bucket.take(used.get(bucket.rate, 0.0))

    def spend(self, unit: str, count: int) -> None:
        """Take an amount out of the buckets of a unit."""
        for bucket in self.buckets:
            if bucket.rate.unit == unit:
                bucket.take(count)

    def is_full(self, now: float) -> bool:
        """Whether all buckets are full, as in a new meter."""
        return all(bucket.level(now) >= bucket.limit for bucket in self.buckets)

    def headers(self, now: float) -> list[tuple[bytes, bytes]]:
        """Return the response headers about the limits; for limits per minute, they have OpenAI's names."""
        headers: list[tuple[bytes, bytes]] = []
        for bucket in self.buckets:
            values = {
                "limit": str(bucket.limit),
                "remaining": str(max(0, math.floor(bucket.level(now)))),
                "reset": duration(bucket.until(bucket.limit, now)),
            }
            label = bucket.rate.label
            headers += [(f"x-ratelimit-{what}-{label}".encode(), text.encode()) for what, text in values.items()]
        return headers


class RateLimits:
    """The meters of one application: one for each label of keys with limits, and one for all callers without a key.

    Args:
        default: limits of all callers without a key together.
        refused: called with the key's label and the label of the limit when a request is refused.
        clock: a clock like `time.monotonic`.
    """

    def __init__(
        self,
        default: Limits = NOBODY.limits,
        refused: Callable[[str, str], object] = lambda *_: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._default = default
        self._refused = refused
        self.clock = clock
        self._meters: dict[str, Meter] = {}
        self._sweep = _SWEEP

    def meter(self, caller: Caller) -> Meter | None:
        """Return the meter of the caller's requests; None if the caller has no limits."""
        limits = caller.limits if caller.label else self._default
        if not limits:
            return None
        now, meter = self.clock(), self._meters.get(caller.label)
        if meter is None:
            if len(self._meters) >= self._sweep:
                self._meters = {label: each for label, each in self._meters.items() if not each.is_full(now)}
                self._sweep = max(_SWEEP, 2 * len(self._meters))
            meter = self._meters[caller.label] = Meter(limits, now)
        elif meter.limits != limits:  # the file of keys has changed
            meter.change(limits, now)
        return meter

    def admit(self, caller: Caller) -> None:
        """Count a request that begins; HttpError 429 with Retry-After if its key has used up a limit."""
        meter = self.meter(caller)
        if meter is None:
            return
        now = self.clock()
        for bucket in meter.buckets:
            wait = bucket.until(1, now)
            if wait > ROUNDING:
                rate = bucket.rate
                self._refused(caller.label, rate.label)
                seconds = max(1, math.ceil(wait))
                whose = f"The key {caller.label!r}" if caller.label else "This server"
                amount = f"{bucket.limit} {rate.unit} per {rate.window}"
                message = f"{whose} allows {amount}, and they are used up: wait {seconds} s."
                raise HttpError(429, message, "rate_limit_exceeded", {"retry-after": str(seconds)})
        meter.spend("requests", 1)

    @contextmanager
    def counted(self, caller: Caller) -> Iterator[None]:
        """Count a request as `admit` does; if the block refuses the request by an exception, it does not count."""
        self.admit(caller)
        try:
            yield
        except Exception:
            if (meter := self.meter(caller)) is not None:
                meter.spend("requests", -1)
            raise


class RateLimitMiddleware:
    """Adds headers with a caller's limits to its responses, and its meter to the scope for counting tokens."""

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
                message["headers"] = [*message.get("headers", ()), *meter.headers(self._limits.clock())]
            return send(message)

        await self._app(scope, receive, send_with_limits)


def duration(seconds: float) -> str:
    """Format a duration as OpenAI's headers do: 6m0s, 8.64s, 20ms."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds * 100) / 100, 60)
    return (f"{minutes:.0f}m" if minutes else "") + f"{rest:.2f}".rstrip("0").rstrip(".") + "s"
