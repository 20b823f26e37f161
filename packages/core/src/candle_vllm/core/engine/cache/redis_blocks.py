# SPDX-License-Identifier: MIT
"""Offloaded KV-cache blocks in Redis, which all servers of a model share.

Each block has its own key; a sorted set orders the blocks by their last use. The header of every block is checked.
After a failure, a timeout or a wrong answer, Redis is not used for some seconds, and blocks are computed instead.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from candle_vllm.core.engine.cache.block_stores import HEADER, BlockError, Bytes, opened, own_name, sealed
from candle_vllm.core.engine.ranks.rank_line import time_left
from candle_vllm.core.errors import ConfigError

logger = logging.getLogger(__name__)

TIMEOUT: Final = 1.0  # seconds to connect, and for each read of an answer
_SLOWEST: Final = 8 << 20  # bytes per second: an answer may take TIMEOUT plus the time of its maximum size at this rate
_SPARE: Final = 1 << 16  # maximum bytes of an answer beyond a block; 500 hashes take 20,000
QUIET: Final = 10.0  # seconds after a failure in which Redis is not used
UNUSED: Final = 7 * 24 * 3600  # seconds after which an unused block is deleted
_KNOWN: Final = 1 << 16  # maximum number of blocks in `_known`
_AT_ONCE: Final = 500  # maximum number of blocks that one command deletes or looks up


class RedisBlocks:
    """A `BlockStore` in Redis.

    Args:
        url: redis://[user:password@]host[:port][/db], rediss:// for TLS, unix://path, checked by `RedisUrl`; the query
            may name certificate files (`ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`).
        fingerprint: everything besides the hash that determines a block's bytes.
        most_bytes: limit of the bytes of all blocks with this fingerprint.
        block_bytes: size of a block.
        listed: whether `may_have` is true only for the blocks of `has`.

    Raises:
        ConfigError: the limit is less than one block. If the server does not answer, a warning is logged.
    """

    def __init__(self, url: str, fingerprint: str, most_bytes: int, block_bytes: int, *, listed: bool = False) -> None:
        self._size, self._listed, self._most = block_bytes, listed, most_bytes // (block_bytes + HEADER)
        if not self._most:
            raise ConfigError(
                f"the part of prompt_cache_bytes for these blocks, {most_bytes}, is too small for one block of "
                f"{block_bytes + HEADER} bytes",
                "prompt_cache_bytes",
            )
        own = own_name(fingerprint)
        self._prefix, self._index = f"candle-vllm:kv:{own}:".encode(), f"candle-vllm:kv-index:{own}".encode()
        self._client = _client(url, HEADER + block_bytes)
        self._known: dict[bytes, None] = {}  # the blocks of `has`, oldest first
        self._quiet_until = 0.0
        self._to_clear, self._clearing = False, threading.Lock()
        self.num_bytes = 0
        looking = threading.Thread(target=self._look, name="candle-vllm-blocks-look", daemon=True)
        looking.start()
        looking.join(TIMEOUT)

    def has(self, digest: bytes) -> bool:
        """Whether this process knows that Redis has the block: it has written, read or found it, and not deleted it."""
        return digest in self._known and not self._to_clear

    def may_have(self, digest: bytes) -> bool:
        """True for any block unless `listed`, because other servers write too; False while Redis is not used."""
        answers = not self._to_clear and time.monotonic() >= self._quiet_until
        return answers and (not self._listed or digest in self._known)

    def look(self, digests: Sequence[bytes]) -> None:
        """Look up which of the last 500 of these blocks the index in Redis has; must not run in the engine's thread."""
        asked = list(digests[-_AT_ONCE:])
        try:
            if asked and time.monotonic() >= self._quiet_until:
                for digest, used in zip(asked, self._client.zmscore(self._index, asked), strict=True):
                    if used is not None:
                        self._remember(digest)
        except Exception as error:
            logger.warning("checkpoints in Redis could not be looked up: %s", self._failed(error))

    def read(self, digest: bytes) -> Bytes | None:
        """See `BlockStore`; takes one round trip."""
        key = self._prefix + digest
        if self._to_clear:
            return None
        try:
            asked = self._client.pipeline(transaction=False)
            asked.getrange(key, 0, HEADER + self._size)  # one byte more, to detect a longer value
            asked.expire(key, UNUSED)
            asked.zadd(self._index, {digest: time.time()}, xx=True)
            data = asked.execute(raise_on_error=False)[0]  # a Redis that refuses writes still has the block
            if isinstance(data, Exception):
                raise data
        except Exception as error:
            raise self._failed(error) from error
        if data == b"":
            if digest in self._known:  # Redis was emptied, or another server deletes: other blocks may be gone, too
                self._known.clear()
            return None
        payload = opened(digest, memoryview(data), self._size) if isinstance(data, bytes) else None
        if payload is None:
            with suppress(Exception):
                self.forget(digest)
            raise BlockError("a block in Redis is damaged; it is deleted and computed again")
        self._remember(digest)
        return payload

    def write(self, digest: bytes, data: Bytes) -> None:
        """See `BlockStore`; above the limit, the least recently used blocks are deleted."""
        if time.monotonic() < self._quiet_until:
            raise BlockError(f"Redis did not answer and is not used for {QUIET:.0f} s")
        try:
            if self._to_clear:
                self._clear()
            key, now = self._prefix + digest, time.time()
            sent = self._client.pipeline(transaction=False)
            sent.set(key, sealed(digest, data) + bytes(data), ex=UNUSED)
            sent.zadd(self._index, {digest: now})
            sent.zremrangebyscore(self._index, 0, now - UNUSED)
            sent.expire(self._index, UNUSED)
            sent.zcard(self._index)
            count = int(sent.execute()[-1])
            if count > self._most:
                oldest = [member for member, _ in self._client.zpopmin(self._index, min(count - self._most, _AT_ONCE))]
                self._delete(oldest)
                count -= len(oldest)
        except Exception as error:
            raise self._failed(error) from error
        self.num_bytes = count * (HEADER + self._size)
        self._remember(digest)

    def forget(self, digest: bytes) -> None:
        with suppress(Exception):
            self._client.zrem(self._index, digest)
            self._delete([digest])

    def clear(self) -> None:
        """See `BlockStore`; a thread deletes the blocks."""
        self._to_clear, self.num_bytes = True, 0
        threading.Thread(target=self._try_to_clear, name="candle-vllm-blocks-clear", daemon=True).start()

    def close(self) -> None:
        with suppress(Exception):
            self._client.close()

    def _look(self) -> None:
        """Count the blocks in Redis and log their size, in a thread: the constructor waits at most `TIMEOUT` for it."""
        try:
            self.num_bytes = int(self._client.zcard(self._index)) * (self._size + HEADER)
        except Exception as error:  # a malformed answer may raise any exception
            self._fails()
            logger.warning("Redis does not answer; blocks are computed until it does: %s", error)
        else:
            logger.info("KV blocks are offloaded to Redis, which has %.1f MB of this model", self.num_bytes / 1e6)

    def _try_to_clear(self) -> None:
        try:
            self._clear()
        except Exception as error:
            self._failed(error)
            logger.warning("blocks in Redis could not be deleted; Redis is not used until they are: %s", error)

    def _clear(self) -> None:
        """Delete all blocks of the fingerprint, including those that other servers write meanwhile."""
        with self._clearing:
            if not self._to_clear:
                return
            while members := self._client.zrange(self._index, 0, _AT_ONCE - 1):
                self._delete(members)
                self._client.zrem(self._index, *members)
            self._known.clear()
            self._to_clear = False

    def _delete(self, digests: list[bytes]) -> None:
        for digest in digests:
            self._known.pop(digest, None)
        if digests:
            self._client.unlink(*(self._prefix + digest for digest in digests))

    def _remember(self, digest: bytes) -> None:
        self._known.pop(digest, None)
        self._known[digest] = None
        if len(self._known) > _KNOWN:
            with suppress(StopIteration, RuntimeError):  # another thread may change the dict
                self._known.pop(next(iter(self._known)), None)

    def _fails(self) -> None:
        self._quiet_until = time.monotonic() + QUIET
        with suppress(Exception):
            self._client.connection_pool.disconnect()  # the rest of a malformed answer must not be read

    def _failed(self, error: Exception) -> BlockError:
        self._fails()
        return BlockError(f"Redis: {type(error).__name__}: {error}")


class _BoundedSocket:
    """A socket that limits the bytes and the time of each answer.

    Each send resets the limits, because the answer to its commands follows.
    """

    def __init__(self, end: Any, most: int) -> None:
        self._end, self._most = end, most
        self._left, self._until = most, time.monotonic() + TIMEOUT

    def __getattr__(self, name: str) -> Any:
        return getattr(self._end, name)

    def sendall(self, data: Bytes) -> None:
        self._end.settimeout(TIMEOUT + len(data) / _SLOWEST)  # for all of the data
        self._end.sendall(data)
        self._left, self._until = self._most, time.monotonic() + TIMEOUT + self._most / _SLOWEST

    def recv(self, size: int) -> bytes:
        data = self._waited(self._end.recv, size)
        self._count(len(data))
        return data

    def recv_into(self, buffer: Any, *size: int) -> int:
        count = self._waited(self._end.recv_into, buffer, *size)
        self._count(count)
        return count

    def _waited(self, receive: Any, *args: Any) -> Any:
        if self._end.gettimeout() != 0:  # 0: the client only polls
            self._end.settimeout(min(TIMEOUT, time_left(self._until)))
        return receive(*args)

    def _count(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise OSError(f"an answer has more than {self._most} bytes")


def _client(url: str, block_bytes: int) -> Any:
    """Return a client that connects later and rejects answers that are larger than a block."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    client = redis.Redis.from_url(
        url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT, retry=Retry(NoBackoff(), 0), protocol=2
    )
    usual: Any = client.connection_pool.connection_class

    class Bounded(usual):
        def _connect(self) -> Any:
            return _BoundedSocket(super()._connect(), block_bytes + _SPARE)

    client.connection_pool.connection_class = Bounded
    return client
