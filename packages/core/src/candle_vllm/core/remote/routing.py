# SPDX-License-Identifier: MIT
"""Router: choose the replica for a request (between steps 3 and 4 of its life).

The router tracks what it has sent to each replica: prompt tokens that are not computed yet, running sequences, and the
hashes of the latest prompt blocks, up to the size of the replica's cache. It sends no queries to engines, so it does
not track blocks that an engine has evicted or read from a KV tier; the cost is that a prompt is computed again.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence

from candle_vllm.core.errors import EngineOverloadedError, InvalidParameterError

MAX_INDEX = 1 << 18
"""Maximum number of blocks that are remembered per replica; 16.8 million tokens in blocks of 64."""
SEQUENCE_TOKENS = 256
"""Load of a running sequence, in prompt tokens: about the additional time of the steps that generate its answer."""
HELD_SHARE = 0.05
"""Load of a token in the context of a generating request: it makes steps longer, and takes memory in the cache."""


@dataclasses.dataclass(frozen=True)
class Room:
    """The capacity of a replica.

    Attributes:
        num_blocks: blocks of its cache; 0 without prefix caching.
        block_size: tokens of a block.
        max_num_seqs: maximum number of sequences in one step.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int


@dataclasses.dataclass
class _Given:
    """A request that was routed to a replica and has not ended; `to_run`: prompt tokens that are not computed yet."""

    replica: int
    length: int
    to_run: int
    sequences: int


class _Replica:
    """Load of one replica, and the blocks that it may have cached."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.is_up = True
        self.forget()

    def forget(self) -> None:
        self.to_run = 0  # prompt tokens that are not computed yet
        self.held = 0  # prompt tokens of requests that generate
        self.sequences = 0
        self.known: OrderedDict[Hashable, None] = OrderedDict()  # block hashes, least recently used first

    @property
    def load(self) -> float:
        """The replica's remaining work, in prompt tokens."""
        return self.to_run + SEQUENCE_TOKENS * self.sequences + HELD_SHARE * self.held

    def found(self, hashes: Sequence[Hashable]) -> int:
        """Return the number of leading blocks that this replica was sent before, as far as they are remembered."""
        known = self.known
        return next((n for n, digest in enumerate(hashes) if digest not in known), len(hashes))

    def remember(self, hashes: Sequence[Hashable]) -> None:
        known = self.known
        for digest in reversed(hashes):  # the end is dropped before the beginning, which other prompts may share
            known[digest] = None
            known.move_to_end(digest)
        while len(known) > min(self.room.num_blocks, MAX_INDEX):
            known.popitem(last=False)


class Router:
    """Chooses replicas for requests, and tracks their load; `rooms` are the replicas' capacities. Thread-safe.

    A request goes to the replica with the least work before its answer, in tokens: waiting prompts, running sequences,
    and the part of its own prompt that is not cached there. So a request with a cached prefix stays with its replica
    until waiting there costs more than computing the prefix in another replica. A replica whose batch would exceed
    `max_num_seqs` with the request is skipped if another replica's batch would not.
    """

    def __init__(self, rooms: Sequence[Room]) -> None:
        self._lock = threading.Lock()
        self._replicas = [_Replica(room) for room in rooms]
        self._given: dict[str, _Given] = {}

    @property
    def sequences(self) -> int:
        """Number of waiting and running sequences of all replicas."""
        return sum(replica.sequences for replica in self._replicas)

    def give(
        self,
        request_id: str,
        hashes: Sequence[Hashable],
        length: int,
        sequences: int = 1,
        without: Collection[int] = (),
        most: float = math.inf,
    ) -> int | None:
        """Choose the replica of a request, and count the request there until `over`.

        Args:
            request_id: an id that is unique among the requests that have not ended.
            hashes: hashes of the full blocks of its prompt, each chained over all blocks before it.
            length: tokens of its prompt.
            sequences: number of requested answers.
            without: replicas that have refused the request.
            most: maximum number of sequences of all replicas; a single request may have more.

        Returns:
            The index of the replica, or None if all replicas are down or in `without`.

        Raises:
            InvalidParameterError, EngineOverloadedError: the id is in use; there are more than `most` sequences.
        """
        with self._lock:
            if request_id in self._given:
                raise InvalidParameterError(f"request id {request_id!r} is in use", "request_id")
            if (live := self.sequences) and live + sequences > most:
                raise EngineOverloadedError(
                    f"{live} sequences are running or waiting, and at most {most} are allowed "
                    "(`max_queued_requests`): try again later"
                )
            up = [n for n, replica in enumerate(self._replicas) if replica.is_up and n not in without]
            if not up:
                return None
            with_room = [
                n for n in up if self._replicas[n].sequences + sequences <= self._replicas[n].room.max_num_seqs
            ]
            costs: list[tuple[float, int, int, int, int]] = []
            for number in with_room or up:
                replica = self._replicas[number]
                to_run = length - min(replica.found(hashes) * replica.room.block_size, length - 1)
                costs.append((replica.load + to_run, replica.sequences, len(replica.known), number, to_run))
            *_, number, to_run = min(costs)
            chosen = self._replicas[number]
            chosen.remember(hashes)
            chosen.to_run += to_run
            chosen.sequences += sequences
            self._given[request_id] = _Given(number, length, to_run, sequences)
            return number

    def place_of(self, request_id: str) -> int | None:
        """Return the replica of a request; None if the request has ended or is unknown."""
        given = self._given.get(request_id)
        return None if given is None else given.replica

    def begun(self, request_id: str) -> None:
        """Note that a request's first token has arrived, so that its prompt has been computed."""
        with self._lock:
            given = self._given.get(request_id)
            if given is not None and given.to_run:
                replica = self._replicas[given.replica]
                replica.to_run -= given.to_run
                replica.held += given.length
                given.to_run = 0

    def over(self, request_id: str) -> None:
        """Note that a request has ended, for any reason."""
        with self._lock:
            given = self._given.pop(request_id, None)
            if given is None:
                return
            replica = self._replicas[given.replica]
            replica.sequences -= given.sequences
            replica.to_run -= given.to_run
            replica.held -= 0 if given.to_run else given.length

    def lost(self, number: int) -> None:
        """Note that a replica has died: no requests are sent to it, and its requests have ended."""
        with self._lock:
            replica = self._replicas[number]
            replica.is_up = False
            replica.forget()
            self._given = {name: given for name, given in self._given.items() if given.replica != number}

    def back(self, number: int, room: Room) -> None:
        """Note that a replica was restarted, with an empty cache."""
        with self._lock:
            self._replicas[number] = _Replica(room)

    def forget_prefixes(self) -> None:
        """Note that the prefix caches of all replicas were cleared."""
        with self._lock:
            for replica in self._replicas:
                replica.known.clear()
