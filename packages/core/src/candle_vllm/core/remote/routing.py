# SPDX-License-Identifier: MIT
"""Router: which of several engines with the same model gets a request (between steps 3 and 4 of its life).

It knows what it gave to each: the prompts that are still to be run, the sequences that run, and the hashes of the
blocks that each has lately been given, as many as its cache holds. No engine is asked: what it forgot or had from
elsewhere is not known here, and costs a prompt that is run once more.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence

MAX_INDEX = 1 << 18
"""Most blocks that are remembered of one replica; 16.8 million tokens in blocks of 64."""
SEQUENCE_TOKENS = 256
"""What a sequence counts that a replica has, beside a prompt's token that is still to be run: about what the steps take
longer that write its answer."""
HELD_SHARE = 0.05
"""What a token of a text counts that is being written on: it makes steps longer, and takes room in the cache."""


@dataclasses.dataclass(frozen=True)
class Room:
    """What a replica has room for.

    Attributes:
        num_blocks: blocks of its cache; 0 where nothing is found again.
        block_size: tokens of a block.
        max_num_seqs: most sequences in one step.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int


@dataclasses.dataclass
class _Given:
    """A request that a replica has."""

    replica: int
    length: int
    to_run: int
    sequences: int


class _Replica:
    """What is known of one replica; all of it is gone when its process is."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.is_up = True
        self.forget()

    def forget(self) -> None:
        self.to_run = 0  # tokens of prompts
        self.held = 0  # tokens of prompts that have been run, of sequences that go on
        self.sequences = 0
        self.known: OrderedDict[Hashable, None] = OrderedDict()  # least recently given first

    @property
    def load(self) -> float:
        """What it has to do, in tokens of prompts."""
        return self.to_run + SEQUENCE_TOKENS * self.sequences + HELD_SHARE * self.held

    def found(self, hashes: Sequence[Hashable]) -> int:
        """How many of the first blocks it has been given before."""
        known = self.known
        return next((n for n, digest in enumerate(hashes) if digest not in known), len(hashes))

    def remember(self, hashes: Sequence[Hashable]) -> None:
        known = self.known
        for digest in reversed(hashes):  # the tail goes before the head, which other prompts may share
            known[digest] = None
            known.move_to_end(digest)
        while len(known) > min(self.room.num_blocks, MAX_INDEX):
            known.popitem(last=False)


class Router:
    """Chooses replicas and keeps count of what they have. Thread-safe.

    A request goes where the least is to be done before it is answered, in tokens: prompts that wait, sequences that
    run, and what of its own prompt is not in the cache there. So one with a known beginning stays with its replica
    until waiting there costs more than running that beginning elsewhere. A replica whose steps are full is passed over
    while another's are not.

    Args:
        rooms: of each replica.
    """

    def __init__(self, rooms: Sequence[Room]) -> None:
        self._lock = threading.Lock()
        self._replicas = [_Replica(room) for room in rooms]
        self._given: dict[str, _Given] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._given

    @property
    def sequences(self) -> int:
        """How many sequences all replicas have, waiting or running."""
        return sum(replica.sequences for replica in self._replicas)

    def give(
        self,
        request_id: str,
        hashes: Sequence[Hashable],
        length: int,
        sequences: int = 1,
        without: Collection[int] = (),
    ) -> int | None:
        """Chooses the replica of a request, and counts it there until `over`.

        Args:
            request_id: unique among those that were given and are not over.
            hashes: of the full blocks of its prompt, each chained over all before it.
            length: tokens of its prompt.
            sequences: how many answers it asks for.
            without: replicas that did not take it.

        Returns:
            its number, or None where none is up.
        """
        with self._lock:
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
        """The replica that has a request; None where it is over, or was never given."""
        given = self._given.get(request_id)
        return None if given is None else given.replica

    def begun(self, request_id: str) -> None:
        """A request's first token has come: its prompt has been run."""
        with self._lock:
            given = self._given.get(request_id)
            if given is not None and given.to_run:
                replica = self._replicas[given.replica]
                replica.to_run -= given.to_run
                replica.held += given.length
                given.to_run = 0

    def over(self, request_id: str) -> None:
        """A request has ended, however it did."""
        with self._lock:
            given = self._given.pop(request_id, None)
            if given is None:
                return
            replica = self._replicas[given.replica]
            replica.sequences -= given.sequences
            replica.to_run -= given.to_run
            replica.held -= 0 if given.to_run else given.length

    def lost(self, number: int) -> None:
        """A replica has died: nothing more goes there, and what it had is over."""
        with self._lock:
            replica = self._replicas[number]
            replica.is_up = False
            replica.forget()
            self._given = {name: given for name, given in self._given.items() if given.replica != number}

    def back(self, number: int, room: Room) -> None:
        """A replica that had died is there again, with an empty cache."""
        with self._lock:
            self._replicas[number] = _Replica(room)

    def forget_prefixes(self) -> None:
        """No replica's cache holds anything that a later prompt could begin with."""
        with self._lock:
            for replica in self._replicas:
                replica.known.clear()
